"""The norms' cards. Aligned rows have a residual, a gradient of the new one, weight and bias: the most that a tile has to hold."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.norm import norm_fwd
from fastattn.kernels.norm_bwd import RESIDENT_WARPS, norm_bwd
from fastattn.kernels.row_tiles import LONG, pick_row_config

from . import Card, Family, Job
from .rows import buckets, num_cols, row_family, tile

LAUNCHERS = {"norm_fwd": norm_fwd, "rms_norm_bwd": norm_bwd, "layer_norm_bwd": norm_bwd}
# The table's tiles as other options use them: an RMS norm's forward, no residual and rows that start anywhere, a mask.
VARIANTS = {
    "rms_norm_fwd": norm_fwd,
    "norm_odd_fwd": norm_fwd,
    "norm_odd_bwd": norm_bwd,
    "norm_dropout_fwd": norm_fwd,
    "norm_dropout_bwd": norm_bwd,
}
MAX_NARROW = 24  # a row's statistics and first entries; its own columns one by one would be more


def launch(job: Job, **override: Any) -> None:
    rows = torch.zeros(1000, num_cols(job), dtype=job.dtype)
    weight = torch.zeros(num_cols(job), dtype=job.dtype)
    rms, aligned = job.launcher.startswith("rms"), job.flags == "aligned"
    dropout_p, seed = (0.1, torch.zeros(1, dtype=torch.int64)) if "dropout" in job.launcher else (0.0, None)
    residual, bias = rows if aligned else None, None if rms else weight
    options = dropout_p, 0.0, not rms, False
    if job.launcher.endswith("fwd"):
        norm_fwd(rows, residual, weight, bias, seed, 1e-5, *options, job.dtype, **override)
    else:
        stats = torch.zeros(1 if rms else 2, len(rows))
        norm_bwd(rows, residual, rows, weight, bias, seed, stats, *options, aligned, job.dtype, True, not rms, **override)


def tiles(job: Job) -> dict[str, str]:
    kernel = "norm_fwd" if job.launcher.endswith("fwd") else "rms_norm_bwd" if job.launcher.startswith("rms") else "layer_norm_bwd"
    return {job.launcher: tile(pick_row_config(kernel, num_cols(job), job.dtype.itemsize))}


def named(job: Job, launched: Any) -> tuple[str, str]:
    if "coefficients" in launched.name:
        return f"{job} coefficients", ""
    return str(job), job.launcher


def rules(name: str, card: Card) -> list[str]:
    launcher, _, _, _, flags, *_ = name.split()
    wrong = []
    if card["stack"] > 0:
        wrong.append(f"{card['stack']} bytes of spills where none are allowed")
    if not any(access.endswith(".128") for access in card["access"]):
        wrong.append(f"no 128-bit access: {card['access']}")
    narrow = sum(number for access, number in card["access"].items() if not access.endswith(".128"))
    if flags == "aligned" and narrow > MAX_NARROW:
        wrong.append(f"narrow accesses to aligned rows: {card['access']}")
    if flags == "aligned" and launcher.endswith("bwd") and card["registers"] * 32 * RESIDENT_WARPS > 1 << 16:
        wrong.append(f"{card['registers']} registers a thread: {RESIDENT_WARPS} warps do not stay on a multiprocessor")
    return wrong


_rows = row_family(LAUNCHERS, launch, flags=("aligned",))
FAMILY = Family(
    launchers=LAUNCHERS | VARIANTS,
    launch=launch,
    sizes={name: buckets(name) for name in LAUNCHERS}
    | {name: (256, 4096, LONG) if "odd" in name else (4096,) for name in VARIANTS},
    flags=_rows.flags | {name: ("odd",) if "odd" in name else ("aligned",) for name in VARIANTS},
    tiles=tiles,
    named=named,
    rules=rules,
    is_sampled=lambda job: _rows.is_sampled(job) and job.launcher in LAUNCHERS,
    dtype_classes=_rows.dtype_classes,
)
