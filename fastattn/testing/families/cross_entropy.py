"""Cross-entropy's cards: rows of logits, aligned and odd; and long ones with all of the options at once."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from fastattn.kernels.row_tiles import LONG, pick_row_config

from . import DTYPES, Card, Family, Job
from .rows import buckets, named, num_cols, row_family, tile

LAUNCHERS = {"cross_entropy_fwd": cross_entropy_fwd, "cross_entropy_bwd": cross_entropy_bwd}
ALL_OPTIONS = {"cross_entropy_options_fwd": cross_entropy_fwd, "cross_entropy_options_bwd": cross_entropy_bwd}


def launch(job: Job, **override: Any) -> None:
    x, target = torch.zeros(8, num_cols(job), dtype=job.dtype), torch.zeros(8, dtype=torch.int64)
    weight, lse, options = None, None, (-100, 0.0, 0.0, 0.0)
    if job.launcher in ALL_OPTIONS:
        weight, lse, options = torch.zeros(num_cols(job)), torch.zeros(8), (-100, 0.1, 0.1, 30.0)
    if job.launcher.endswith("fwd"):
        cross_entropy_fwd(x, target, weight, *options, **override)
    else:
        one = torch.ones(())
        cross_entropy_bwd(one, lse, one, x, target, weight, torch.zeros(4, 8), *options, **override)


def tiles(job: Job) -> dict[str, str]:
    kernel = job.launcher.replace("_options", "")
    return {job.launcher: tile(pick_row_config(kernel, num_cols(job), job.dtype.itemsize))}


def rules(name: str, card: Card) -> list[str]:
    """No spills, and the logits, and their gradient, by 128 bits: what else is read and written are a few numbers a row."""
    wrong = [f"{card['stack']} bytes of spills where none are allowed"] if card["stack"] > 0 else []
    shape, warps = card["config"].split()
    rows, block = map(int, shape.split("x"))
    wide = rows * block * DTYPES[name.split()[2]].itemsize // (16 * 32 * int(warps.removeprefix("w")))
    for access in ("LDG.128", "STG.128") if "bwd" in name else ("LDG.128",):
        if card["access"].get(access, 0) < wide:
            wrong.append(f"fewer than {wide} {access}: {card['access']}")
    return wrong


_rows = row_family(LAUNCHERS, launch, flags=("aligned", "odd"), rules=rules)
FAMILY = Family(
    launchers=LAUNCHERS | ALL_OPTIONS,
    launch=launch,
    sizes={name: buckets(name) for name in LAUNCHERS} | dict.fromkeys(ALL_OPTIONS, (LONG,)),
    flags=dict.fromkeys(LAUNCHERS | ALL_OPTIONS, ("aligned", "odd")),
    tiles=tiles,
    named=lambda job, launched: (str(job), job.launcher) if job.launcher in ALL_OPTIONS else named(job, launched),
    rules=rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.size == LONG and job.launcher in LAUNCHERS,
    dtype_classes=_rows.dtype_classes,
)
