"""Merging attention over disjoint sets of keys: a few, as a ring's step or a shared prefix leaves them, and split-KV decoding's many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn

from .models import MODELS, labelled
from .rows import Variant, row_suite
from .suite import Forward


@dataclass(frozen=True)
class Shape:
    """num_rows queries of num_heads heads in num_splits parts; num_cols is the head dim."""

    function: str
    num_splits: int
    num_rows: int
    num_cols: int
    num_heads: int = 32
    model: str = ""

    def id(self, dtype: str) -> str:
        return labelled(self.model, f"{self.function}-N{self.num_splits}-T{self.num_rows}-D{self.num_cols}-{dtype}")


def _draw(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    out, lse = (shape.num_rows, shape.num_heads, shape.num_cols), (shape.num_heads, shape.num_rows)
    outs, lses = randn(shape.num_splits, *out), randn(shape.num_splits, *lse, dtype=torch.float32)
    return [outs, lses], [randn(*out, learnt=False), randn(*lse, dtype=torch.float32, learnt=False)]


def _torch(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes first."""
    weights = torch.softmax(lses, 0).transpose(-1, -2).unsqueeze(-1)
    return (weights * outs).sum(0).to(outs.dtype), torch.logsumexp(lses, 0)


def _flashinfer(function: Callable) -> Forward:
    """Its parts are (T, N, H, D) and (T, N, H), its logarithms base 2."""

    def forward(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = function(outs.transpose(0, 1).contiguous(), lses.permute(2, 0, 1).contiguous() * 1.4426950408889634)
        return out, lse.t() * 0.6931471805599453

    return forward


MERGE = Variant(
    draw=_draw,
    reference=fastattn.reference.merge_attention,
    ours=fastattn.merge_attention,
    torch=_torch,
    others={"FlashInfer": ("flashinfer", "merge_states", _flashinfer)},
)


def _traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # outs → out; outs, dout → douts; an LSE a row beside each
    n, row = shape.num_splits, shape.num_cols * itemsize + 4
    tensors = {"fwd": n + 1, "bwd": 2 * n + 1, "fwd+bwd": 3 * n + 2}[mode]
    return tensors * shape.num_rows * shape.num_heads * row


def _flops(shape: Shape, mode: str) -> float:
    # w·out, Σ over the parts; dout·out, Σ, w·dout of each
    elements = shape.num_splits * shape.num_rows * shape.num_heads * shape.num_cols
    return {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[mode] * elements


def _model_shapes(rows: int) -> list[Shape]:
    return [Shape("merge", 2, rows, model.head_dim, model.num_heads, model.name) for model in MODELS]


def _shapes(name: str, splits: tuple[int, ...], rows: tuple[int, ...], dims: tuple[int, ...]) -> list[Shape]:
    return [Shape(name, n, r, d) for n in splits for r in rows for d in dims]


PRESETS = {
    ("cpu", "tiny"): _shapes("merge", (2,), (3,), (16,)) + _shapes("combine", (20,), (1,), (16,)),
    ("cpu", "quick"): _shapes("merge", (2,), (1024,), (128,)) + _shapes("combine", (64,), (4,), (128,)),
    ("cpu", "full"): _shapes("merge", (2, 4), (1024, 4096), (64, 128)) + _shapes("combine", (16, 64), (1, 16), (128,)),
    ("cpu", "model"): _model_shapes(512),
    ("cuda", "model"): _model_shapes(8192),
    ("cuda", "tiny"): _shapes("merge", (2,), (64,), (64,)) + _shapes("combine", (20,), (1,), (64,)),
    ("cuda", "quick"): _shapes("merge", (2,), (16384,), (128,)) + _shapes("combine", (64,), (1, 8), (128,)),
    ("cuda", "full"): _shapes("merge", (2, 4, 8), (4096, 16384), (64, 128)) + _shapes("combine", (8, 32, 128, 256), (1, 8, 32), (64, 128)),
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    outs, lses = torch.randn(2, 4, 2, 64, device=device).to(dtype), torch.randn(2, 2, 4, device=device)
    return {"fastattn.merge_attention": lambda: fastattn.merge_attention(outs, lses), "torch": lambda: _torch(outs, lses)}


SUITE = row_suite(
    "merge_attention", {"merge": MERGE, "combine": MERGE}, PRESETS, overhead, traffic=_traffic, flops=_flops, x_label="parts",
    panel=lambda row: (f"{row['function']}, T = {row['num_rows']}, D = {row['num_cols']}", row["num_splits"]),
)  # fmt: skip
