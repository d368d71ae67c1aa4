"""Softmax of rows against the naive formula, torch, and the fused kernels at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastattn

from .rows import Variant, row_presets, row_suite
from .suite import by_backend


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x = torch.randn(4, 64, device=device).to(dtype)
    leaf = x.clone().requires_grad_()
    return {
        "fastattn.softmax": lambda: fastattn.softmax(x, -1),
        **by_backend("fastattn.softmax", lambda backend: fastattn.softmax(x, -1, backend=backend), device),
        "torch softmax": lambda: F.softmax(x, -1),
        "fastattn.softmax, recording a gradient": lambda: fastattn.softmax(leaf, -1),
        "torch softmax, recording a gradient": lambda: F.softmax(leaf, -1),
    }


VARIANTS = {
    "softmax": Variant(
        draw=lambda s, randn: ([randn(s.num_rows, s.num_cols)], [randn(s.num_rows, s.num_cols, learnt=False)]),
        reference=fastattn.reference.softmax,
        ours=lambda x, **options: fastattn.softmax(x, -1, **options),
        torch=lambda x: F.softmax(x, -1),
        others={
            "Liger": ("liger_kernel.transformers.functional", "liger_softmax", lambda f: f),
            "QuACK": ("quack.softmax", "softmax", lambda f: f),
        },
        traffic=(2, 3),  # x → y; y, dy → dx
        flops=(5, 4),  # max, −, exp, Σ, ÷; y·dy, Σ, −, ·
        has_backends=True,
    )
}
SUITE = row_suite(
    "softmax", VARIANTS, row_presets(list(VARIANTS), of_model=lambda model: [("softmax", model.vocab_size)]), overhead
)
