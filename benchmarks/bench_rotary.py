"""Rotary embedding of queries and keys in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn

from .models import GPT_2, MODELS, labelled
from .rows import Variant, row_suite

BATCH = 4


@dataclass(frozen=True)
class Shape:
    """num_rows tokens; num_cols is the head dim."""

    function: str
    num_rows: int
    num_cols: int
    num_heads: int = 32
    num_kv_heads: int = 8
    model: str = ""

    def id(self, dtype: str) -> str:
        return labelled(self.model, f"{self.function}-M{self.num_rows}-N{self.num_cols}-{dtype}")

    @property
    def elements(self) -> int:
        """Of the queries and the keys."""
        return self.num_rows * (self.num_heads + self.num_kv_heads) * self.num_cols


def _draw(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    seqlen, head_dim = max(1, shape.num_rows // BATCH), shape.num_cols
    sizes = [(BATCH, seqlen, heads, head_dim) for heads in (shape.num_heads, shape.num_kv_heads)]
    angles = torch.arange(seqlen, device=randn.device)[:, None] * 10000.0 ** -(
        torch.arange(0, head_dim, 2, device=randn.device) / head_dim
    )
    tables = [angles.cos(), angles.sin()]
    return [*(randn(*size) for size in sizes), *tables], [randn(*size, learnt=False) for size in sizes]


def _rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers does it, apart from the dims' order."""
    cos, sin = (torch.cat([t, t], -1)[:, None].to(q.dtype) for t in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return rotated(q), rotated(k)


def _liger(function: Callable) -> Callable:
    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (torch.cat([t, t], -1)[None] for t in (cos, sin))
        # Liger rotates in place: it gets copies, which are in its time as they are in its users'
        q, k = function(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return forward


def _flash_attn(function: Callable) -> Callable:
    """Queries and keys by a call each, its tables in their dtype."""

    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        return function(q, cos, sin), function(k, cos, sin)

    return forward


VARIANTS = {
    "rotary": Variant(
        draw=_draw,
        reference=fastattn.reference.apply_rotary,
        ours=fastattn.apply_rotary,
        torch=_rotate_half,
        others={
            "Liger": ("liger_kernel.transformers.functional", "liger_rope", _liger),
            "flash-attn": ("flash_attn.layers.rotary", "apply_rotary_emb", _flash_attn),
        },
    )
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    q = torch.randn(1, 4, 2, 64, device=device).to(dtype)
    cos, sin = torch.randn(2, 4, 32, device=device)
    return {
        "fastattn.apply_rotary": lambda: fastattn.apply_rotary(q, q, cos, sin),
        "torch, rotate_half": lambda: _rotate_half(q, q, cos, sin),
    }


def _traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # q, k → q, k; the backward is the same of their gradients
    return 2 * shape.elements * itemsize * (2 if mode == "fwd+bwd" else 1)


def _flops(shape: Shape, mode: str) -> float:
    # two products and a sum of each element, either way
    return 3 * shape.elements * (2 if mode == "fwd+bwd" else 1)


def _shapes(num_rows: int, *dims: int) -> list[Shape]:
    return [Shape("rotary", num_rows, d) for d in dims]


def _model_shapes(num_rows: int) -> list[Shape]:
    """Of all models but the one that learns its positions."""
    return [Shape("rotary", num_rows, m.head_dim, m.num_heads, m.num_kv_heads, m.name) for m in MODELS if m is not GPT_2]


PRESETS = {
    ("cpu", "tiny"): _shapes(8, 32, 66),
    ("cpu", "quick"): _shapes(1024, 64, 128),
    ("cpu", "full"): _shapes(1024, 64, 128, 256),
    ("cpu", "model"): _model_shapes(512),
    ("cuda", "tiny"): _shapes(64, 64, 128),
    ("cuda", "quick"): _shapes(16384, 64, 128),
    ("cuda", "full"): _shapes(16384, 64, 128, 256),
    ("cuda", "model"): _model_shapes(8192),
}
SUITE = row_suite(
    "rotary", VARIANTS, PRESETS, overhead, traffic=_traffic, flops=_flops, x_label="head dim",
)
