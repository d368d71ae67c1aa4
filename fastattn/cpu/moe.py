"""A mixture of experts on the CPU: the algorithm of the kernels, an expert at a time, in torch's matrix products.

Those of float16 are computed in float32, of rows and of a matrix at a time: the pre-activation and dout·down_proj, which kernels have in
fp32, may be more than float16 holds where what becomes of them is not. bfloat16 holds them, and rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .glu import activate, activation_grad
from .grouped_mm import groups, product
from .moe_routing import moe_combine_fwd

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_tanh"}  # as glu calls them
ALPHA, LIMIT = 1.702, 7.0  # gpt-oss
BLOCK = 2048  # rows that are gathered and gated at once


def moe_fwd(
    x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, layout: str, transposed: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, the pre-activation of each sorted row; empty unless it is to be kept)."""
    top_k = weights.shape[1]
    gate_up_proj, down_proj, token = _upright(gate_up_proj, transposed), _upright(down_proj, transposed), order // top_k
    pre, y = x.new_empty(order.shape[0] if keep else 0, gate_up_proj.shape[1]), x.new_empty(order.shape[0], x.shape[1])
    for block, experts, sizes in _blocks(offsets):
        inputs = x.index_select(0, token[block])
        wide = _wide(x.dtype)
        z = pre[block] if keep and wide == x.dtype else inputs.new_empty(inputs.shape[0], gate_up_proj.shape[1], dtype=wide)
        _products(inputs, gate_up_proj, gate_up_bias, z, experts, sizes)
        if keep and wide != x.dtype:  # an infinite one would have a backward of NaN
            pre[block] = z.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
        _products(_gated(*_halves(z, layout), activation).to(x.dtype), down_proj, down_bias, y[block], experts, sizes)
    return moe_combine_fwd(y, inverse, offsets, weights, top_k), pre


def moe_bwd(
    dout: Tensor, x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, gate_up_proj: Tensor,
    down_proj: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, pre: Tensor, activation: str, layout: str, transposed: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweights, dgate_up_proj, ddown_proj, dgate_up_bias, ddown_bias), empty where not wanted."""
    want_x, want_weights, want_gate_up, want_down = wanted[:4]
    top_k, row_weights = weights.shape[1], weights.flatten()[order]
    make = dout.new_empty if bool((offsets.diff(prepend=offsets.new_zeros(1)) > 0).all()) else dout.new_zeros  # 0 without tokens
    dgate_up, ddown, dgate_up_bias, ddown_bias = (
        make(t.shape if t is not None and want else 0)
        for t, want in zip((gate_up_proj, down_proj, gate_up_bias, down_bias), wanted[2:], strict=True)
    )
    dgate_up_t, ddown_t = (_upright(dw, transposed) if dw.numel() else dw for dw in (dgate_up, ddown))
    gate_up_proj, down_proj, token = _upright(gate_up_proj, transposed), _upright(down_proj, transposed), order // top_k
    dx_rows = dout.new_empty(order.shape[0] if want_x else 0, dout.shape[1])
    drow_weights = torch.zeros(order.shape[0], dtype=torch.float32)
    for block, experts, sizes in _blocks(offsets):
        dy, weight = dout.index_select(0, token[block]), row_weights[block, None]
        da, (gate, up) = dy.new_empty(dy.shape[0], down_proj.shape[2], dtype=_wide(dy.dtype)), _halves(pre[block], layout)
        _products(dy, down_proj.transpose(1, 2), None, da, experts, sizes)
        da = da.float()
        a, dgate, dup = _gated_bwd(weight * da, gate.float(), up.float(), activation)
        drow_weights[block] = (da * a).sum(1)
        dpre = torch.empty_like(pre[block])
        for half, grad in zip(_halves(dpre, layout), (dgate, dup), strict=True):
            half.copy_(grad)
        if want_x:
            _products(dpre, gate_up_proj.transpose(1, 2), None, dx_rows[block], experts, sizes)
        if want_gate_up:
            _weight_gradients(dpre, x.index_select(0, token[block]), dgate_up_t, experts, sizes)
        if want_down:
            _weight_gradients(dy, (weight * a).to(dy.dtype), ddown_t, experts, sizes)
        if want_weights and down_bias is not None:
            for out, rows, expert in zip(drow_weights[block].split(sizes), dy.split(sizes), experts, strict=True):
                out += torch.mv(rows.float(), down_bias[expert].float())
        if dgate_up_bias.numel():
            for rows, expert in zip(dpre.split(sizes), experts, strict=True):
                dgate_up_bias[expert] = rows.sum(0, dtype=torch.float32)
        if ddown_bias.numel():
            for rows, expert in zip((weight * dy).split(sizes), experts, strict=True):
                ddown_bias[expert] = rows.sum(0)
    dx = moe_combine_fwd(dx_rows, inverse, offsets, None, top_k) if want_x else dout.new_empty(0)
    dweights = drow_weights[inverse].view(weights.shape) if want_weights else drow_weights[:0]
    return dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias


def _blocks(offsets: Tensor) -> Iterator[tuple[slice, list[int], list[int]]]:
    """Experts in turn, so many that they have few rows together, or one that has many: their rows, they, and the size of each one's part.
    Whatever goes row by row is done a block at a time, so that experts of few rows cost little more than their products."""
    start = stop = 0
    experts: list[int] = []
    sizes: list[int] = []
    for expert, rows in groups(offsets):
        if experts and rows.stop - start > BLOCK:
            yield slice(start, stop), experts, sizes
            start, experts, sizes = stop, [], []
        stop = rows.stop
        experts.append(expert)
        sizes.append(rows.stop - rows.start)
    if experts:
        yield slice(start, stop), experts, sizes


def _products(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, experts: list[int], sizes: list[int]) -> None:
    for expert, rows, part in zip(experts, x.split(sizes), out.split(sizes), strict=True):
        product(rows, w, bias, expert, out=part)


def _weight_gradients(dy: Tensor, x: Tensor, dw: Tensor, experts: list[int], sizes: list[int]) -> None:
    for expert, rows, inputs in zip(experts, dy.split(sizes), x.split(sizes), strict=True):
        torch.mm(rows.t(), inputs, out=dw[expert])


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of a product that something is yet to become of."""
    return torch.float32 if dtype == torch.float16 else dtype


def _upright(w: Tensor, transposed: bool) -> Tensor:
    return w.transpose(-1, -2) if transposed else w


def _halves(z: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(gate, up), views."""
    return (z[:, ::2], z[:, 1::2]) if layout == "interleaved" else z.chunk(2, -1)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate)∘up in fp32."""
    gate, up = gate.float(), up.float()
    if activation == "clamped_swiglu":
        gate = gate.clamp(max=LIMIT)
        return gate * torch.sigmoid(ALPHA * gate) * (up.clamp(-LIMIT, LIMIT) + 1)
    return activate(gate, ACTIVATIONS[activation]) * up


def _gated_bwd(da: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(act(gate)∘up, its gradients by gate and up), all fp32."""
    if activation != "clamped_swiglu":
        act = activate(gate, ACTIVATIONS[activation])
        return act * up, activation_grad(da * up, gate, ACTIVATIONS[activation]), da * act
    g, u = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT) + 1
    s = torch.sigmoid(ALPHA * g)
    slope = s * (1 + ALPHA * g * (1 - s))
    return g * s * u, da * u * slope * (gate <= LIMIT), da * g * s * (up.abs() <= LIMIT)
