"""Appending's cards: keys as they are, rotated in both layouts of pairs, and packed, by head dim; into caches of their own dtype and of one
byte an element."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.append_paged_kv import Tile, append_paged_kv, pick_tile

from . import Card, Family, Job

LAUNCHERS = {"append_paged_kv": append_paged_kv, "append_paged_kv_int8": append_paged_kv, "append_paged_kv_fp8": append_paged_kv}
CACHE_DTYPES = {"append_paged_kv_int8": torch.int8, "append_paged_kv_fp8": torch.float8_e4m3fn}


def tile(job: Job) -> Tile:
    """A job's size is its head dim."""
    return pick_tile(job.size, job.size, 0 if job.flags == "plain" else job.size)


def launch(job: Job, **override: Any) -> None:
    quantised = job.launcher in CACHE_DTYPES
    k = torch.zeros((32, 8, job.size) if job.flags == "packed" else (2, 16, 8, job.size), dtype=job.dtype)
    k_cache, v_cache = torch.zeros(2, 8, 16, 8, job.size, dtype=CACHE_DTYPES.get(job.launcher, job.dtype)).unbind()
    lengths, scale = torch.zeros(2, dtype=torch.int32), torch.zeros(8) if quantised else None
    cos = None if job.flags == "plain" else torch.zeros(64, job.size // 2)
    cu_seqlens = torch.zeros(3, dtype=torch.int32) if job.flags == "packed" else None
    options = cu_seqlens, cos, cos, scale, scale, job.flags == "interleaved"
    append_paged_kv(k, k, k_cache, v_cache, torch.zeros(2, 4, dtype=torch.int32), lengths, *options, **override)


def rules(name: str, card: Card) -> list[str]:
    """No spills; new keys and values by 128 bits, and into the cache as many elements at once. Narrower loads are indices and scales."""
    launcher, _, _, head_dim, _ = name.split()
    wrong = [f"{card['stack']} bytes of spills where none are allowed"] if card["stack"] > 0 else []
    wide = "STG.64" if launcher in CACHE_DTYPES else "STG.128"
    stores = {access: number for access, number in card["access"].items() if access.startswith("STG")}
    if card["access"].get("LDG.128", 0) < (4 if head_dim == "128" else 2):
        wrong.append(f"few loads of 128 bits: {card['access']}")
    if set(stores) != {wide} if head_dim == "128" else wide not in stores:
        wrong.append(f"stores other than {wide}: {card['access']}")
    return wrong


FAMILY = Family(
    launchers=LAUNCHERS,
    launch=launch,
    sizes={"append_paged_kv": (80, 128)} | dict.fromkeys(CACHE_DTYPES, (128,)),
    flags={"append_paged_kv": ("plain", "rotary", "interleaved", "packed")} | dict.fromkeys(CACHE_DTYPES, ("plain", "rotary")),
    tiles=lambda job: {job.launcher: "{0.ROWS}x({0.BLOCK_R}+{0.BLOCK_REST}, {0.BLOCK_DV}) w{0.num_warps}".format(tile(job))},
    named=lambda job, launched: (str(job), job.launcher),
    rules=rules,
    is_sampled=lambda job: job.part in ("sm80", "sm90") and job.dtype_class == "half" and job.size == 128 and job.flags == "rotary",
    dtype_classes=lambda flags: ("half", "single") if flags in ("plain", "rotary") else ("half",),
)
