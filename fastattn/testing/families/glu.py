"""The gated linear units' cards: swiglu's over the table, packed and odd, and both of geglu's over long rows."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.glu import glu_bwd, glu_fwd
from fastattn.kernels.row_tiles import LONG, pick_row_config

from . import Family, Job
from .rows import buckets, num_cols, row_family, tile

LAUNCHERS = {"glu_fwd": glu_fwd, "glu_bwd": glu_bwd}
GELU_LAUNCHERS = {"glu_gelu_fwd": glu_fwd, "glu_gelu_bwd": glu_bwd}  # the same, with the activation as their cards' flag


def launch(job: Job, **override: Any) -> None:
    """Aligned rows are halves of a packed tensor, odd ones one contiguous row: the layouts whose bodies 128-bit accesses reach."""
    cols = num_cols(job)
    activation = job.flags.removeprefix("aligned_") if job.launcher in GELU_LAUNCHERS else "silu"
    if job.flags == "odd":
        dout = gate = up = torch.zeros(cols, dtype=job.dtype)
    else:
        dout, gate, up = torch.zeros(8, cols, dtype=job.dtype), torch.zeros(8, 2 * cols, dtype=job.dtype), None
    if job.launcher.endswith("fwd"):
        glu_fwd(gate, up, activation, **override)
    else:
        glu_bwd(dout, gate, up, activation, **override)


def tiles(job: Job) -> dict[str, str]:
    kernel = job.launcher.replace("_gelu", "")
    return {job.launcher: tile(pick_row_config(kernel, num_cols(job), job.dtype.itemsize))}


def named(job: Job, launched: Any) -> tuple[str, str]:
    return str(job), job.launcher


_rows = row_family(LAUNCHERS, launch, flags=("aligned", "odd"))
FAMILY = Family(
    launchers=LAUNCHERS | GELU_LAUNCHERS,
    launch=launch,
    sizes={name: buckets(name) for name in LAUNCHERS} | dict.fromkeys(GELU_LAUNCHERS, (LONG,)),
    flags=_rows.flags | dict.fromkeys(GELU_LAUNCHERS, ("aligned_gelu_tanh", "aligned_gelu")),
    tiles=tiles,
    named=named,
    rules=_rows.rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.size == LONG,
    dtype_classes=_rows.dtype_classes,
)
