"""Rotary embedding's cards: whole heads and heads rotated in part, in both layouts of pairs, and with positions of each kind."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.rotary import rotary, rotary_config

from . import Card, Family, Job, narrow
from .rows import buckets, tile

LAUNCHERS = {"rotary": rotary, "rotary_partial": rotary}
TOKENS = 16


def rotary_dim(job: Job) -> int:
    """A job's size is its head dim."""
    return job.size // 2 if job.launcher == "rotary_partial" else job.size


def launch(job: Job, **override: Any) -> None:
    shape = (1, TOKENS) if job.flags != "packed" else (TOKENS,)
    q, k = (torch.zeros(*shape, heads, job.size, dtype=job.dtype) for heads in (32, 8))
    cos = torch.zeros(TOKENS, rotary_dim(job) // 2)
    positions = torch.zeros(shape, dtype=torch.int64) if job.flags == "positions" else None
    cu_seqlens = torch.zeros(3, dtype=torch.int32) if job.flags == "packed" else None
    rotary(q, k, cos, cos, positions, cu_seqlens, job.flags == "interleaved", False, **override)


def rules(name: str, card: Card) -> list[str]:
    launcher, _, _, _, flags = name.split()
    wrong = []
    if card["stack"] > 0:
        wrong.append(f"{card['stack']} bytes of spills where none are allowed")
    if not any(access.endswith(".128") for access in card["access"]):
        wrong.append(f"no 128-bit access: {card['access']}")
    if launcher == "rotary" and flags in ("halves", "interleaved") and narrow(card):
        wrong.append(f"narrow accesses to whole heads: {card['access']}")
    return wrong


FAMILY = Family(
    launchers=LAUNCHERS,
    launch=launch,
    sizes={"rotary": buckets("rotary"), "rotary_partial": (80, 128)},
    flags={"rotary": ("halves", "interleaved", "positions", "packed"), "rotary_partial": ("halves", "interleaved")},
    tiles=lambda job: {job.launcher: tile(rotary_config(job.size, rotary_dim(job), job.dtype.itemsize))},
    named=lambda job, launched: (str(job), job.launcher),
    rules=rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.size in (64, 80),
    dtype_classes=lambda flags: ("half", "single") if flags in ("halves", "interleaved") else ("half",),
)
