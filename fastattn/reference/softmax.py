"""The oracle of softmax: its definition, in any dtype."""

from __future__ import annotations

import torch


def softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """exp(x − max x) / Σ exp(x − max x) along `dim`, of x in `dtype` where that is given."""
    x = x if dtype is None else x.to(dtype)
    p = torch.exp(x - x.amax(dim, keepdim=True)) if x.numel() else x.clone()
    return p / p.sum(dim, keepdim=True)
