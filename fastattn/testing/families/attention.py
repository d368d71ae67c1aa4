"""Attention's cards: "plain" is dense and causal; "all" is packed, with grouped heads, a window on both sides, softcap, ALiBi, a float
bias with a gradient, sinks and dropout. A row split into two passes gives two cards, dk and dv; the dbias kernel rides on the dq row."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.attention import attention_fwd
from fastattn.kernels.attention_bwd import attention_bwd
from fastattn.kernels.tiles import HEAD_DIM_BUCKETS, TILES, Config, pick_config

from . import Card, Family, Job

LAUNCHERS = {"attention_fwd": attention_fwd, "attention_bwd": attention_bwd}
KERNELS = {launcher: [k for k in dict.fromkeys(row[0] for row in TILES) if k.startswith(launcher)] for launcher in LAUNCHERS}


def launch(job: Job, **override: Any) -> None:
    batch, seqlen, heads, head_dim, dtype = 2, 512, 4, job.size, job.dtype
    q, k, v = (torch.zeros(batch, seqlen, heads, head_dim, dtype=dtype) for _ in range(3))
    lse = torch.zeros(batch, heads, seqlen)
    tensors: tuple[torch.Tensor | None, ...] = (None,) * 6
    window_left, softcap, dropout_p = None, 0.0, 0.0
    if job.flags == "all":
        k, v = k[:, :, : heads // 2], v[:, :, : heads // 2]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        lse = lse.transpose(0, 1).reshape(heads, batch * seqlen)
        bias, slopes = torch.zeros(batch, heads, seqlen, seqlen, dtype=dtype), torch.zeros(heads)
        seed, cu_seqlens = torch.zeros(1, dtype=torch.int64), torch.arange(batch + 1, dtype=torch.int32) * seqlen
        tensors = (bias, slopes, slopes, seed, cu_seqlens, cu_seqlens)
        window_left, softcap, dropout_p = 100, 10.0, 0.1
    options = (seqlen, seqlen, window_left, 0, head_dim**-0.5, softcap, dropout_p)
    if job.launcher == "attention_fwd":
        attention_fwd(q, k, v, *tensors, *options, **override)
    else:
        attention_bwd(q, None, q, k, v, *tensors, q, lse, *options, job.flags == "all", **override)


def config(job: Job, kernel: str) -> Config:
    """The tile that the launcher picks for this job."""
    plain = job.flags == "plain"
    return pick_config(kernel, job.capability, job.shared_memory, job.size, job.dtype.itemsize, plain)


def tile(config: Config) -> str:
    """A Config as it stands on a card: `128x64 w8 s2 tma`."""
    switches = [name for name in ("tma", "overlap", "split") if getattr(config, name)]
    return " ".join([f"{config.BLOCK_M}x{config.BLOCK_N} w{config.num_warps} s{config.num_stages}", *switches])


def tiles(job: Job) -> dict[str, str]:
    return {kernel: tile(config(job, kernel)) for kernel in KERNELS[job.launcher]}


def named(job: Job, launched: Any) -> tuple[str, str] | None:
    kernel = launched.name.removeprefix("_").removesuffix("_kernel")
    wanted = [name for name in ("dk", "dv") if launched.args.get(f"WANT_{name.upper()}")]
    only = wanted if len(wanted) == 1 else []
    if kernel == "attention_bwd_dbias":
        kernel, only = "attention_bwd_dq", ["dbias"]
    if kernel not in KERNELS[job.launcher]:
        return None  # the kernel that computes delta has no tile to choose
    return " ".join([kernel, *str(job).split()[1:], *only]), kernel


def is_required(job: Job) -> bool:
    """True where `rules` asks for more than fitting: plain causal half precision at head dims 64 and 128."""
    return job.flags == "plain" and job.dtype_class == "half" and job.size <= 128


OTHERS = (
    Job("attention_fwd", "sm90", "half", 128, "all"),
    Job("attention_fwd", "sm100", "half", 256, "plain"),
    Job("attention_fwd", "sm120", "half", 512, "plain"),
    Job("attention_fwd", "sm80", "single", 64, "plain"),
)


def rules(name: str, card: Card) -> list[str]:
    kernel, part, dtype_class, head_dim, flags, *_ = name.split()
    wrong = []
    if dtype_class == "half":
        instruction = {"sm90": "HGMMA", "sm100": "UTCHMMA"}.get(part, "HMMA")
        if not card["mma"]:
            wrong.append("no matrix instructions")
        elif int(head_dim) <= 128 and card["mma"].get(instruction, 0) == 0:
            wrong.append(f"no {instruction}, the matrix instructions are {card['mma']}")
        if "tma" in card["config"].split() and card["tma"] == 0:
            wrong.append("the tile says tma and there is no TMA load")
        if card["hot_loop_mma"] is None:
            wrong.append("no loop holds a matrix instruction")
    if flags == "plain" and dtype_class == "half" and int(head_dim) <= 128:
        if card["stack"] > 0:
            wrong.append(f"{card['stack']} bytes of spills where none are allowed")
        if kernel == "attention_fwd" and part == "sm90" and (card["overlap"] or 0.0) < 0.5:
            wrong.append(f"only {card['overlap']} of the exponentials run under P·V, 0.5 must")
    return wrong


FAMILY = Family(
    launchers=LAUNCHERS,
    launch=launch,
    sizes=dict.fromkeys(LAUNCHERS, HEAD_DIM_BUCKETS),
    flags=dict.fromkeys(LAUNCHERS, ("plain", "all")),
    tiles=tiles,
    named=named,
    rules=rules,
    is_sampled=lambda job: is_required(job) or job in OTHERS,
)
