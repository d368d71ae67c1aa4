"""Merging attention results on the CPU: plain torch in fp32, one partial at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention_fwd(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.zeros(outs.shape[1:], dtype=torch.float32)
    for weight, partial in zip(_weights(lses), outs):
        out.addcmul_(weight, _without(weight == 0, partial.float()))
    return out.to(dtype), torch.logsumexp(lses, 0).contiguous()


def merge_attention_bwd(dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    douts, dots = outs.new_empty(outs.shape), lses.new_empty(lses.shape)
    weights, dout = _weights(lses), dout.float()
    for n, (weight, partial) in enumerate(zip(weights, outs)):
        douts[n] = _without(weight == 0, weight * dout)
        dots[n] = (partial * dout).sum(-1).transpose(-1, -2)
    weights = weights.squeeze(-1).transpose(-1, -2)
    dots.masked_fill_(weights == 0, 0.0)
    dots -= (weights * dots).sum(0)
    return douts, (weights * (dots if dlse is None else dots + dlse)).masked_fill_(weights == 0, 0.0).contiguous()


def _weights(lses: Tensor) -> Tensor:
    """exp(lse_n − lse), as they multiply outs: (N, B, S, H, 1) or (N, T, H, 1)."""
    weights = torch.softmax(lses, 0).masked_fill((lses == float("-inf")).all(0), 0.0)
    return weights.transpose(-1, -2).unsqueeze(-1)


def _without(rows: Tensor, x: Tensor) -> Tensor:
    """x with zeros in some rows, of which there are mostly none."""
    return x.masked_fill(rows, 0.0) if rows.any() else x
