"""Paged attention's cards: "decode" is one query a sequence, "prefill" 64, causal, over pages that hold whole blocks; their "_all"
twins are packed, over pages of 16, with a window, softcap, ALiBi and sinks. The caches are half, single, int8 and e4m3, the last two
with scales."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.paged_attention import paged_attention
from fastattn.kernels.paged_tiles import PagedConfig, pick_paged_config
from fastattn.kernels.tiles import HEAD_DIM_BUCKETS

from . import DTYPES, Card, Family, Job

CACHES = {**DTYPES, "int8": torch.int8, "e4m3": torch.float8_e4m3fn}
KERNEL = "paged_attention"
GROUP = 4


def launch(job: Job, **override: Any) -> None:
    batch, kv_heads, pages, cache_dtype = 2, 2, 64, CACHES[job.dtype_class]
    seqlen_q = 64 if job.flags.startswith("prefill") else 1
    everything = job.flags.endswith("_all")
    q = torch.zeros(batch, seqlen_q, kv_heads * GROUP, job.size, dtype=DTYPES.get(job.dtype_class, torch.bfloat16))
    k_cache, v_cache = (torch.zeros(pages, 16 if everything else 128, kv_heads, job.size, dtype=cache_dtype) for _ in range(2))
    table, seqlens = torch.zeros(batch, pages, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    scale = torch.ones(kv_heads) if cache_dtype.itemsize == 1 else None
    cu_seqlens, slopes, window_left, softcap = None, None, None, 0.0
    if everything:
        q, cu_seqlens = q.flatten(0, 1), torch.arange(batch + 1, dtype=torch.int32) * seqlen_q
        slopes, window_left, softcap = torch.zeros(kv_heads * GROUP), 100, 10.0
    paged_attention(
        q, k_cache, v_cache, table, seqlens, cu_seqlens, slopes, slopes, scale, scale, None, seqlen_q, window_left, 0, job.size**-0.5,
        softcap, 2, config(job) if everything else None, **override,
    )  # fmt: skip


def config(job: Job) -> PagedConfig:
    """The tile that the launcher picks for this job."""
    itemsizes = DTYPES.get(job.dtype_class, torch.bfloat16).itemsize, CACHES[job.dtype_class].itemsize
    rows = GROUP * (64 if job.flags.startswith("prefill") else 1)
    return pick_paged_config(job.capability, job.shared_memory, job.size, *itemsizes, rows)


def tile(config: PagedConfig) -> str:
    return f"{config.BLOCK_M}x{config.BLOCK_N} w{config.num_warps} s{config.num_stages} r{config.resident}"


def named(job: Job, launched: Any) -> tuple[str, str] | None:
    kernel = launched.name.removeprefix("_").removesuffix("_kernel")
    return (str(job), kernel) if kernel == KERNEL else None  # the merge has cards of its own


# What a multiprocessor has: shared memory in bytes, of which each resident program takes 1024 more than it asks for, and 65536 registers.
SHARED_PER_MULTIPROCESSOR = {"sm80": 164 * 1024, "sm90": 228 * 1024, "sm100": 228 * 1024, "sm120": 100 * 1024}


def rules(name: str, card: Card) -> list[str]:
    _, part, dtype_class, _, flags, *_ = name.split()
    _, warps, _, resident = card["config"].split()
    wrong = []
    if card["stack"] > 0:
        wrong.append(f"{card['stack']} bytes of spills where none are allowed")
    if dtype_class != "single" and not card["hot_loop_mma"]:
        wrong.append("no loop holds a matrix instruction")
    if flags == "decode":  # whose waves pick_splits counts
        threads = 32 * int(warps[1:])
        fits = min(SHARED_PER_MULTIPROCESSOR[part] // (card["shared"] + 1024), 65536 // (threads * -(-card["registers"] // 8) * 8))
        if fits < int(resident[1:]):
            wrong.append(f"{fits} programs fit a multiprocessor, not {resident[1:]}")
    return wrong


FAMILY = Family(
    launchers={KERNEL: paged_attention},
    launch=launch,
    sizes={KERNEL: HEAD_DIM_BUCKETS},
    flags={KERNEL: ("decode", "prefill", "decode_all", "prefill_all")},
    tiles=lambda job: {KERNEL: tile(config(job))},
    named=named,
    rules=rules,
    is_sampled=lambda job: job.size == 128 and job.part == "sm90" and not job.flags.endswith("_all"),
    dtype_classes=lambda flags: tuple(CACHES),
)
