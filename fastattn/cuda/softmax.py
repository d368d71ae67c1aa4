"""Softmax of rows in CUDA C++ (csrc/cuda/softmax.cu), forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cuda_operators

from .rows import are_few, lie_at_one_stride

cuda_operators.define("softmax_fwd_cuda(Tensor x, ScalarType dtype) -> Tensor")

is_chosen = are_few


def limit(x: Tensor, dim: int) -> str | None:
    """What of a call the kernel does not do, or None."""
    if not cuda_operators.available("softmax_fwd_cuda", x):
        return cuda_operators.nothing
    if dim != x.dim() - 1:
        return "another dim than the last"
    if not lie_at_one_stride(x):
        return "rows at more than one stride"
    return None


def softmax_fwd(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """As the Triton kernel's, within the limits above."""
    return torch.ops.fastattn.softmax_fwd_cuda(x, dtype)
