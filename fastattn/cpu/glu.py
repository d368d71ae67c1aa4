"""Gated linear units on the CPU: torch's own activations and their gradients, in fp32, in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


def glu_fwd(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    gate, up = _halves(gate) if up is None else (gate, up)
    out = gate.new_empty(gate.shape)
    for g, u, y in _chunks(gate, up, out):
        torch.mul(activate(g.float(), activation), u, out=y)
    return out


def glu_bwd(dout: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    packed = up is None
    grads = [gate.new_empty(gate.shape) for _ in range(1 if packed else 2)]
    gate, up = _halves(gate) if packed else (gate, up)
    for d, g, u, dg, du in _chunks(dout, gate, up, *(_halves(grads[0]) if packed else grads)):
        d, g, u = d.float(), g.float(), u.float()
        torch.mul(activation_grad(u, g, activation), d, out=dg)
        torch.mul(activate(g, activation), d, out=du)
    return grads[0], None if packed else grads[1]


def activate(g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_grad(dy: Tensor, g: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, g)
    g = g.clamp(-1e4, 1e4)  # past which its slope is 0 or 1; of larger ones the cube overflows, to NaN
    return torch.ops.aten.gelu_backward(dy, g, approximate="tanh" if activation == "gelu_tanh" else "none")


def _halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    num_cols = packed.shape[-1] // 2
    return packed[..., :num_cols], packed[..., num_cols:]


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors of one shape, all cut alike; the last ones are outputs, which no reshape copies."""
    if all(t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(_CHUNK_ELEMENTS) for t in tensors), strict=True)
        return
    num_cols = tensors[0].shape[-1]
    rows = max(1, _CHUNK_ELEMENTS // max(num_cols, 1))
    yield from zip(*(t.reshape(-1, num_cols).split(rows) for t in tensors), strict=True)
