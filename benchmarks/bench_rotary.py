"""Rotary embedding of queries and keys in one call: rows are tokens, num_cols is the head dim, 32 query and 8 key heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn

from .rows import RowShape, Variant, row_presets, row_suite

HEADS, KV_HEADS, BATCH = 32, 8, 4


def _draw(shape: RowShape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    seqlen, head_dim = max(1, shape.num_rows // BATCH), shape.num_cols
    sizes = [(BATCH, seqlen, heads, head_dim) for heads in (HEADS, KV_HEADS)]
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


VARIANTS = {
    "rotary": Variant(
        draw=_draw,
        reference=fastattn.reference.apply_rotary,
        ours=fastattn.apply_rotary,
        torch=_rotate_half,
        others={"Liger": ("liger_kernel.transformers.functional", "liger_rope", _liger)},
        traffic=(2 * (HEADS + KV_HEADS), 2 * (HEADS + KV_HEADS)),  # q, k → q, k
    )
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    q = torch.randn(1, 4, 2, 64, device=device).to(dtype)
    cos, sin = torch.randn(2, 4, 32, device=device)
    return {
        "fastattn.apply_rotary": lambda: fastattn.apply_rotary(q, q, cos, sin),
        "torch, rotate_half": lambda: _rotate_half(q, q, cos, sin),
    }


SUITE = row_suite("rotary", VARIANTS, row_presets(list(VARIANTS), (64, 128, 256), rows=16384), overhead)
