"""Cross-entropy of rows of logits: mean over the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .rows import RowShape, Variant, row_presets, row_suite


def _draw(shape: RowShape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    target = torch.randint(shape.num_cols, (shape.num_rows,), generator=randn.generator, device=randn.device)
    return [randn(shape.num_rows, shape.num_cols), target], [randn(learnt=False)]


VARIANTS = {
    "cross_entropy": Variant(
        draw=_draw,
        reference=fastattn.reference.cross_entropy,
        ours=fastattn.cross_entropy,
        torch=F.cross_entropy,
        others={
            "Liger": ("liger_kernel.transformers.functional", "liger_cross_entropy", lambda f: f),
            "QuACK": ("quack.cross_entropy", "cross_entropy", lambda f: lambda x, t: f(x, t).mean().to(x.dtype)),
        },
        traffic=(1, 2),  # logits; logits → dlogits
        flops=(4, 4),  # max, −, exp, Σ; −, exp, − the target's 1, ·dloss
    )
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    logits, target = torch.randn(4, 64, device=device).to(dtype), torch.zeros(4, dtype=torch.int64, device=device)
    return {
        "fastattn.cross_entropy": lambda: fastattn.cross_entropy(logits, target),
        "torch cross_entropy": lambda: F.cross_entropy(logits, target),
    }


LENGTHS = (8192, 32768, 50257, 65536, 131072, 262144)
PRESETS = row_presets(list(VARIANTS), LENGTHS, of_model=lambda model: [("cross_entropy", model.vocab_size)])
SUITE = row_suite("cross_entropy", VARIANTS, PRESETS, overhead)
