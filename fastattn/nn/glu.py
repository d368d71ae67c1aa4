"""Gated linear units as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.glu import geglu, swiglu


class SwiGLU(torch.nn.Module):
    """silu(gate)·up, the activation between a Llama MLP's projections. forward(gate, up), or forward(x) with x = [gate; up]."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return swiglu(gate, up)


class GEGLU(torch.nn.Module):
    """gelu(gate)·up. forward(gate, up), or forward(x) with x = [gate; up]; approximate as in `torch.nn.GELU`, but "tanh" by default."""

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
