"""The oracle of the gated linear units: their definitions, in any dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """gate∘σ(gate)∘up; with up=None gate holds [gate; up] along its last dim."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return gate * torch.sigmoid(gate) * up


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(gate)∘up with gelu(g) = g·Φ(g), or with approximate="tanh" g·(1 + tanh(√(2/π)·(g + 0.044715·g³)))/2."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    if approximate == "tanh":
        cdf = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        cdf = 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return gate * cdf * up
