"""Files that are whole or not there, and libraries that are only wanted where they are used."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A file of a model or tokeniser that is missing, damaged or does not fit; the message names it, and the tensor."""


def optional(name: str) -> Any:
    """An optional library, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"fastattn.models needs {name.partition('.')[0]}: pip install 'fastattn[models]'") from error


def read_json(path: Path, default: Any = None) -> Any:
    """A JSON file's content; default where there is no file, unless it is None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if default is not None:
            return default
        raise CheckpointError(f"load: {path} is missing") from error
    except ValueError as error:  # JSON, or UTF-8
        raise CheckpointError(f"load: {path} must be JSON: {error}") from error


def write_atomically(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write a file such that whoever reads it, now or after a crash, finds all of it or what was there before.

    content: bytes, or a function that writes them to the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming itself
    finally:
        os.close(folder)
