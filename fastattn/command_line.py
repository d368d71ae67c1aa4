"""What the commands share: types of their arguments, the status of an interruption, and a standard output that nobody reads any more."""

from __future__ import annotations

import argparse
import os
import re
import sys

import torch

INTERRUPTED = 130  # the exit status of what Ctrl-C ended, by the shell's convention: 128 + SIGINT


def device(text: str) -> torch.device:
    """A device that is here, as an argument's type."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"must be a device that is here, got {text!r}: torch sees {count} CUDA devices")
    return found


def regex(text: str) -> re.Pattern[str]:
    """A regular expression, as an argument's type."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None


def silence_stdout() -> None:
    """Write to nowhere from here on: who read has gone, and the interpreter is not to complain of it as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
