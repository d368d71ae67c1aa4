"""A mixture of experts on the CPU: the algorithm of the kernels, an expert at a time, in torch's matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped_mm import groups, product
from .moe_routing import moe_combine_fwd

ALPHA, LIMIT = 1.702, 7.0  # gpt-oss


def moe_fwd(
    x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, layout: str, transposed: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, the pre-activation of each sorted row; empty unless it is to be kept)."""
    top_k = weights.shape[1]
    gate_up_proj, down_proj = _upright(gate_up_proj, transposed), _upright(down_proj, transposed)
    pre = x.new_zeros(order.shape[0] if keep else 0, gate_up_proj.shape[1])
    y = x.new_empty(order.shape[0], x.shape[1])
    for expert, rows in groups(offsets):
        inputs = x.index_select(0, order[rows] // top_k)
        z = product(inputs, gate_up_proj[expert], _of(gate_up_bias, expert), out=pre[rows] if keep else None)
        product(_gated(*_halves(z, layout), activation), down_proj[expert], _of(down_bias, expert), out=y[rows])
    return moe_combine_fwd(y, inverse, offsets, weights, top_k), pre


def moe_bwd(
    dout: Tensor, x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, pre: Tensor, activation: str, layout: str, transposed: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweights, dgate_up_proj, ddown_proj, dgate_up_bias, ddown_bias), empty where not wanted."""
    want_x, want_weights, want_gate_up, want_down, want_gate_up_bias, want_down_bias = wanted
    top_k, row_weights = weights.shape[1], weights.flatten()[order]
    dgate_up, ddown = (x.new_zeros(w.shape if want else 0) for w, want in ((gate_up_proj, want_gate_up), (down_proj, want_down)))
    dgate_up_bias, ddown_bias = (
        x.new_zeros(b.shape if b is not None and want else 0)
        for b, want in ((gate_up_bias, want_gate_up_bias), (down_bias, want_down_bias))
    )
    gate_up_proj, down_proj = _upright(gate_up_proj, transposed), _upright(down_proj, transposed)
    dx_rows = x.new_empty(order.shape[0] if want_x else 0, x.shape[1])
    drow_weights = torch.zeros(order.shape[0], dtype=torch.float32)
    for expert, rows in groups(offsets):
        token, weight = order[rows] // top_k, row_weights[rows, None]
        dy = dout.index_select(0, token)
        da, (gate, up) = torch.mm(dy, down_proj[expert]).float(), _halves(pre[rows], layout)
        a, dgate, dup = _gated_bwd(weight * da, gate.float(), up.float(), activation)
        drow_weights[rows] = (da * a).sum(1)
        if want_weights and down_bias is not None:
            drow_weights[rows] += torch.mv(dy.float(), down_bias[expert].float())
        dpre = torch.empty_like(pre[rows])
        for half, grad in zip(_halves(dpre, layout), (dgate, dup), strict=True):
            half.copy_(grad)
        if want_x:
            torch.mm(dpre, gate_up_proj[expert], out=dx_rows[rows])
        if want_gate_up:
            torch.mm(dpre.t(), x.index_select(0, token), out=_upright(dgate_up[expert], transposed))
        if want_down:
            torch.mm(dy.t(), (weight * a).to(x.dtype), out=_upright(ddown[expert], transposed))
        if dgate_up_bias.numel():
            dgate_up_bias[expert] = dpre.sum(0, dtype=torch.float32)
        if ddown_bias.numel():
            ddown_bias[expert] = (weight * dy).sum(0)
    dx = moe_combine_fwd(dx_rows, inverse, offsets, None, top_k) if want_x else dx_rows
    dweights = drow_weights[inverse].view(weights.shape) if want_weights else drow_weights[:0]
    return dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias


def _upright(w: Tensor, transposed: bool) -> Tensor:
    return w.transpose(-1, -2) if transposed else w


def _of(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _halves(z: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(gate, up), views."""
    return (z[:, ::2], z[:, 1::2]) if layout == "interleaved" else z.chunk(2, -1)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate)∘up in fp32, rounded once."""
    dtype, gate, up = gate.dtype, gate.float(), up.float()
    if activation == "clamped_swiglu":
        gate = gate.clamp(max=LIMIT)
        a = gate * torch.sigmoid(ALPHA * gate) * (up.clamp(-LIMIT, LIMIT) + 1)
    else:
        a = (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    return a.to(dtype)


def _gated_bwd(da: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(act(gate)∘up, its gradients by gate and up), all fp32."""
    if activation == "swiglu":
        act = F.silu(gate)
        return act * up, torch.ops.aten.silu_backward(da * up, gate), da * act
    if activation == "geglu":
        act = F.gelu(gate, approximate="tanh")
        return act * up, torch.ops.aten.gelu_backward(da * up, gate, approximate="tanh"), da * act
    g, u = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT) + 1
    s = torch.sigmoid(ALPHA * g)
    slope = s * (1 + ALPHA * g * (1 - s))
    return g * s * u, da * u * slope * (gate <= LIMIT), da * g * s * (up.abs() <= LIMIT)
