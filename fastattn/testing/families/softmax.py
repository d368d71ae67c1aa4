"""Softmax's cards: rows along the last dim, aligned and odd; and along another dim, which has one tile for all."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.softmax import softmax_bwd, softmax_fwd

from . import Family, Job
from .rows import num_cols, row_family, tiles

LAUNCHERS = {"softmax_fwd": softmax_fwd, "softmax_bwd": softmax_bwd}
STRIDED_LAUNCHERS = {"softmax_strided_fwd": softmax_fwd, "softmax_strided_bwd": softmax_bwd}


def launch(job: Job, **override: Any) -> None:
    strided = job.launcher in STRIDED_LAUNCHERS
    shape, dim = ((2, 300, job.size), 1) if strided else ((8, num_cols(job)), 1)
    x = torch.zeros(shape, dtype=job.dtype)
    if job.launcher.endswith("fwd"):
        softmax_fwd(x, dim, job.dtype, **override)
    else:
        softmax_bwd(x, x, dim, job.dtype, **override)


_rows = row_family(LAUNCHERS, launch, flags=("aligned", "odd"))
FAMILY = Family(
    launchers=LAUNCHERS | STRIDED_LAUNCHERS,
    launch=launch,
    sizes=_rows.sizes | dict.fromkeys(STRIDED_LAUNCHERS, (128,)),
    flags=_rows.flags | dict.fromkeys(STRIDED_LAUNCHERS, ("strided",)),
    tiles=lambda job: {} if job.launcher in STRIDED_LAUNCHERS else tiles(job),  # those have one tile for all
    named=_rows.named,
    rules=_rows.rules,
    is_sampled=_rows.is_sampled,
    dtype_classes=_rows.dtype_classes,
)
