"""The state of a training run on disk: whole files alone, of which the last few are kept.

A file is written beside its place, flushed, and renamed into it: whenever the process is killed, each file that has its name
is whole.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .files import CheckpointError, write_atomically


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write a step's state, then remove all but the newest `keep`.

    Raises: OSError (a full disk, say): then what was there before still is.
    """

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # an open file: torch would hide the system's error from a path's
            torch.save(state, file)

    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, write)
    for old in snapshots(folder)[:-keep]:
        old.unlink()
    return path


def snapshots(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-????????.pt"))


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises: CheckpointError for a damaged file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip file's, a pickle's or torch's own
        raise CheckpointError(f"train: {path} is damaged ({error}): remove it to resume from the one before it") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, made where it is not there, for this process alone, and without what a killed one left half written.

    Raises: CheckpointError where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process, however that ends
        except BlockingIOError as error:
            raise CheckpointError(f"train: another process is training into {folder}") from error
        for leftover in (file for place in ("", "checkpoints", "tokens") for file in (folder / place).glob(".*.tmp")):
            if re.fullmatch(r"\..+\.\d+\.tmp", leftover.name) and leftover.is_file():  # as files.write_atomically calls them
                leftover.unlink()
        yield
