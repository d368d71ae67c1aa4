"""Merging's cards: many rows of two parts, and few rows of many, whose parts split-KV decoding leaves in fp32; by head dim."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.merge_attention import Tile, merge_attention_bwd, merge_attention_fwd, pick_bwd_tile, pick_tile

from . import Card, Family, Job

LAUNCHERS = {"merge_attention_fwd": merge_attention_fwd, "merge_attention_bwd": merge_attention_bwd}
SHAPES = {"many": (2, 4096), "few": (64, 16)}  # parts and rows


def tile(job: Job) -> Tile:
    if job.launcher == "merge_attention_bwd":
        return pick_bwd_tile(job.size, job.dtype.itemsize)
    num_splits, num_rows = SHAPES[job.flags]
    return pick_tile(num_rows, num_splits, job.size)


def launch(job: Job, **override: Any) -> None:
    num_splits, num_rows = SHAPES[job.flags]
    outs, lses = torch.zeros(num_splits, num_rows, 1, job.size, dtype=job.dtype), torch.zeros(num_splits, 1, num_rows)
    if job.launcher == "merge_attention_fwd":
        merge_attention_fwd(outs, lses, torch.bfloat16 if job.flags == "few" else job.dtype, **override)
    else:
        merge_attention_bwd(outs[0], lses[0], outs, lses, **override)


def rules(name: str, card: Card) -> list[str]:
    """No spills, and partials by 128 bits: what else is read and written are LSEs, one a row and part."""
    launcher, _, dtype_class, _, flags = name.split()
    wrong = [f"{card['stack']} bytes of spills where none are allowed"] if card["stack"] > 0 else []
    loads = 4 if dtype_class == "single" else 2  # 2048 elements of 128 threads
    for access, least in {"LDG.128": loads, "STG.128": 0 if flags == "few" else 1}.items():
        if card["access"].get(access, 0) < least:
            wrong.append(f"fewer than {least} {access}: {card['access']}")
    return wrong


FAMILY = Family(
    launchers=LAUNCHERS,
    launch=launch,
    sizes=dict.fromkeys(LAUNCHERS, (64, 80, 128)),
    flags={"merge_attention_fwd": ("many", "few"), "merge_attention_bwd": ("many",)},
    tiles=lambda job: {job.launcher: "{0.ROWS}x{0.SPLITS}x{0.BLOCK_D} w{0.num_warps}".format(tile(job))},
    named=lambda job, launched: (str(job), job.launcher),
    rules=rules,
    is_sampled=lambda job: job.part == "sm90" and job.size == 128 and (job.flags == "few") == (job.dtype_class == "single"),
    dtype_classes=lambda flags: ("single",) if flags == "few" else ("half", "single"),
)
