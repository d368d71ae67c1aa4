"""Which code runs, and what is said about it.

CUDA tensors run the Triton kernels; CPU tensors run `fastattn.cpu`, or the kernels in Triton's interpreter where TRITON_INTERPRET=1
was set before the import. Nothing else decides, and nothing falls back. Some ops have a second kernel, in CUDA C++ (`fastattn.cuda`): the
op's own rule chooses, or the caller by backend=.

Environment variables of the whole package, read once, here:

    FASTATTN_LOG=1      log each op call with its shapes and options; 2 also logs each launch with its tile
    FASTATTN_CHECK=1    check the values inside index tensors on CUDA too (this synchronises)
    FASTATTN_TUNE_DIR   a folder of tiles that `fastattn tune` measured, in place of the shipped ones (tuned.py)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
CHECK_ON_CUDA = os.environ.get("FASTATTN_CHECK", "0") == "1"
TUNE_DIR = os.environ.get("FASTATTN_TUNE_DIR") or None

log = logging.getLogger("fastattn")

_level = {"1": logging.INFO, "2": logging.DEBUG}.get(os.environ.get("FASTATTN_LOG", ""))
if _level is not None:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    log.addHandler(_handler)
    log.setLevel(_level)


def runs_kernels(tensor: torch.Tensor) -> bool:
    """True where an op on this tensor launches Triton kernels (on the GPU, or in the interpreter)."""
    return tensor.is_cuda or (INTERPRET and tensor.device.type == "cpu")


def chooses_cuda(op: str, backend: str | None, chosen: bool, limit: Callable[..., str | None], *args: Any) -> bool:
    """Whether an op that has two kernels for these tensors runs the one in CUDA C++ (fastattn.cuda), not Triton's.

    chosen: what the op's rule says where the caller names no backend; limit(*args): what of this call that kernel cannot do, or None.
    """
    if backend == "triton" or (backend is None and not chosen):
        return False
    beyond = limit(*args)
    if beyond is not None and backend == "cuda":
        raise NotImplementedError(f"fastattn.{op}: backend='cuda' does not do {beyond}")
    return beyond is None


def checks_values(tensor: torch.Tensor) -> bool:
    """True where the values inside an index tensor may be read on the host without surprise."""
    return tensor.device.type == "cpu" or CHECK_ON_CUDA


def describe(tensor: torch.Tensor | None) -> str:
    """A tensor in a log line: `bf16(2, 128, 8, 64)`."""
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
