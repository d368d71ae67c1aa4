"""Routing's cards, by the number of experts and as three models route; the sort's, by that too; gather's and combine's, by row length."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.moe_routing import (
    moe_combine_bwd,
    moe_combine_fwd,
    moe_dispatch,
    moe_gather_fwd,
    moe_route_bwd,
    moe_route_fwd,
    pick_route_bwd_tile,
    pick_route_tile,
    pick_tile,
)

from . import Card, Family, Job

ROUTING = {"moe_route_fwd": moe_route_fwd, "moe_route_bwd": moe_route_bwd}
SORTING = {"moe_dispatch": moe_dispatch}
MOVING = {"moe_gather_fwd": moe_gather_fwd, "moe_combine_fwd": moe_combine_fwd, "moe_combine_bwd": moe_combine_bwd}
ROUTERS = {  # top_k; score, order, renormalize, scaling_factor; number of groups and how many are chosen
    "softmax": (8, ("softmax", "score_then_topk", True, 1.0), (1, 1)),
    "chosen": (4, ("softmax", "topk_then_score", False, 1.0), (1, 1)),
    "groups": (8, ("sigmoid", "score_then_topk", True, 2.5), (8, 4)),
}
TOP_K = {"few": 8, "many": 40}  # rows a token: written out, and in a loop
TOKENS, EXPERTS = 64, 64


def launch(job: Job, **override: Any) -> None:
    if job.launcher in ROUTING:
        _route(job, **override)
    elif job.launcher in SORTING:
        moe_dispatch(torch.zeros(TOKENS if job.flags == "ids" else 8, 8, dtype=torch.int64), job.size)
    else:
        _move(job, **override)


def _route(job: Job, **override: Any) -> None:
    top_k, (score, order, *rest), groups = ROUTERS[job.flags]
    logits = torch.zeros(TOKENS, job.size, dtype=job.dtype)
    if job.launcher == "moe_route_fwd":
        bias = torch.zeros(job.size) if job.flags == "groups" else None
        moe_route_fwd(logits, bias, top_k, score, order, *groups, *rest, **override)
    else:
        moe_route_bwd(torch.zeros(TOKENS, top_k), logits, torch.zeros(TOKENS, top_k, dtype=torch.int64), score, order, *rest, **override)


def _move(job: Job, **override: Any) -> None:
    top_k = TOP_K[job.flags]
    x, y = (torch.zeros(rows, job.size, dtype=job.dtype) for rows in (TOKENS, TOKENS * top_k))
    plan, weights = (torch.zeros(TOKENS * top_k, dtype=torch.int64), torch.zeros(EXPERTS, dtype=torch.int32)), torch.zeros(TOKENS, top_k)
    if job.launcher == "moe_gather_fwd":
        moe_gather_fwd(x, *plan, top_k, **override)
    elif job.launcher == "moe_combine_fwd":
        moe_combine_fwd(y, *plan, weights, top_k, **override)
    else:
        moe_combine_bwd(x, y, *plan, weights, **override)


def tiles(job: Job) -> dict[str, str]:
    if job.launcher in SORTING:  # one tile for all
        return {}
    pick = {"moe_route_fwd": pick_route_tile, "moe_route_bwd": pick_route_bwd_tile}.get(job.launcher)
    tile = pick_tile(job.size, job.dtype.itemsize, 8) if pick is None else pick(job.size)
    return {job.launcher: f"{tile.ROWS}x{tile.BLOCK} w{tile.num_warps}"}


def named(job: Job, launched: Any) -> tuple[str, str]:
    kernel = launched.name.removeprefix("_").removesuffix("_kernel")
    return " ".join([kernel, *str(job).split()[1:]]), job.launcher


def rules(name: str, card: Card) -> list[str]:
    """No spills, and rows by 128 bits: two accesses a thread of each."""
    kernel, _, _, _, flags = name.split()
    wrong = [f"{card['stack']} bytes of spills where none are allowed"] if card["stack"] > 0 else []
    least = {
        "moe_gather_fwd": {"LDG.128": 2, "STG.128": 2},
        "moe_combine_fwd": {"LDG.128": 2 * TOP_K["few"] if flags == "few" else 2, "STG.128": 2},
        "moe_combine_bwd": {"LDG.128": 4, "STG.128": 2},
    }
    for access, number in least.get(kernel, {}).items():
        if card["access"].get(access, 0) < number:
            wrong.append(f"fewer than {number} {access}: {card['access']}")
    return wrong


FAMILY = Family(
    launchers=ROUTING | SORTING | MOVING,
    launch=launch,
    sizes=dict.fromkeys(ROUTING, (64, 256, 512)) | dict.fromkeys(SORTING, (64, 512)) | dict.fromkeys(MOVING, (64, 4096)),
    flags=dict.fromkeys(ROUTING, tuple(ROUTERS)) | dict.fromkeys(SORTING, ("ids", "few-ids")) | dict.fromkeys(MOVING, tuple(TOP_K)),
    tiles=tiles,
    named=named,
    rules=rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.size >= 512 and job.flags in ("softmax", "ids", "few"),
    dtype_classes=lambda flags: ("half", "single") if flags == "few" else ("single",) if flags == "groups" else ("half",),
)
