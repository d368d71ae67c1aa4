"""Types of the commands' arguments."""

from __future__ import annotations

import argparse

import torch


def device(text: str) -> torch.device:
    """A device that is here."""
    try:
        found = torch.empty(0, device=text).device  # which tells whether it is there
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"must be a device that is there, got {text!r}: {str(error).splitlines()[0]}") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return found
