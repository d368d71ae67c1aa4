"""The oracle of merging attention results: its definition, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """lse = log Σ exp(lse_n) and out = Σ exp(lse_n − lse)·out_n, where an lse_n of −inf is a 0 whatever its out_n holds."""
    nothing = lses == float("-inf")
    empty = nothing.all(0)
    lse = torch.logsumexp(lses.masked_fill(empty, 0.0), 0)  # of no keys at all, anything that has a gradient
    weights = torch.exp(lses - lse).transpose(-1, -2).unsqueeze(-1).to(outs.dtype)  # (N, B, S, H, 1)
    out = (weights * outs.masked_fill(nothing.transpose(-1, -2).unsqueeze(-1), 0.0)).sum(0)
    return out, lse.masked_fill(empty, float("-inf"))
