"""Drawing a token from each row of logits in CUDA C++ (csrc/cuda/sampling.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cuda_operators, in_rows

cuda_operators.define(
    "sample_cuda(Tensor logits, Tensor seed, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, float temperature, "
    "int top_k, float top_p, float min_p) -> Tensor"
)

FEW_ROWS = 16


def limit(logits: Tensor) -> str | None:
    """What of a call the kernel does not do, or None."""
    return None if cuda_operators.available("sample_cuda", logits) else cuda_operators.nothing


def is_chosen(logits: Tensor) -> bool:
    """For decoding: a launch without a scratch that takes a fraction of what Python does to launch."""
    return logits.shape[0] <= FEW_ROWS


def sample(
    logits: Tensor, seed: Tensor, temperature: float | Tensor, top_k: int | Tensor, top_p: float | Tensor, min_p: float | Tensor
) -> Tensor:
    """As the Triton kernel's: its search, its draw from the same seed, and, but where rounding decides, its ids."""
    given = temperature, top_k, top_p, min_p
    tensors = [value.contiguous() if isinstance(value, Tensor) else None for value in given]
    tensors = [t if t is None or i == 1 else t.float() for i, t in enumerate(tensors)]
    numbers = (1 if isinstance(value, Tensor) else value for value in given)
    return torch.ops.fastattn.sample_cuda(in_rows(logits), seed, *tensors, *numbers)
