"""The oracle of a mixture of experts: a loop over experts, each on the tokens that chose it, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .glu import geglu, swiglu

ALPHA, LIMIT = 1.702, 7.0  # gpt-oss


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate)∘up; "clamped_swiglu" is g·σ(α·g)·(u + 1) of g = min(gate, LIMIT) and u = up within ±LIMIT."""
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return gate * torch.sigmoid(ALPHA * gate) * (up + 1)
    return {"swiglu": swiglu, "geglu": geglu}[activation](gate, up)


def moe(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    layout: str = "concatenated",
    transposed: bool = False,
) -> Tensor:
    """out[t] = Σ_k weight[t, k]·(act(gate)∘up)·down_projᵀ of x[t] by expert index[t, k]; ids of no expert add nothing."""
    if transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    out = torch.zeros_like(x)
    for e in range(gate_up_proj.shape[0]):
        token, k = torch.where(top_k_index == e)
        pre = x[token] @ gate_up_proj[e].T
        pre = pre if gate_up_bias is None else pre + gate_up_bias[e]
        gate, up = (pre[:, ::2], pre[:, 1::2]) if layout == "interleaved" else pre.chunk(2, -1)
        y = gated(gate, up, activation) @ down_proj[e].T
        y = y if down_bias is None else y + down_bias[e]
        out = out.index_add(0, token, (top_k_weights[token, k, None] * y).to(x.dtype))
    return out
