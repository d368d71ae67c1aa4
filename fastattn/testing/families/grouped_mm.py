"""The grouped product's cards, by the inner dim's size: "plain" as matrices lie; "gathered" through row numbers on both sides, with bias;
"few" and "some" rows a group. The backward's are those of the product the other way round, and of the sum over rows."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.grouped_mm import grouped_mm_bwd, grouped_mm_fwd
from fastattn.kernels.grouped_tiles import FEW, SHALLOW, SOME, GroupedConfig, pick_grouped_config

from . import Card, Family, Job

LAUNCHERS = {"grouped_mm_fwd": grouped_mm_fwd, "grouped_mm_bwd": grouped_mm_bwd}
ROWS = {"plain": 256, "gathered": 256, "few": FEW, "some": SOME}  # a group
GROUPS = 8


def launch(job: Job, **override: Any) -> None:
    num_rows = GROUPS * ROWS[job.flags]
    x, w = torch.zeros(num_rows, job.size, dtype=job.dtype), torch.zeros(GROUPS, job.size, job.size, dtype=job.dtype)
    offsets, numbers = torch.zeros(GROUPS, dtype=torch.int32), torch.zeros(num_rows, dtype=torch.int64)
    gathered = job.flags == "gathered"
    where = (numbers, numbers) if gathered else (None, None)
    if job.launcher == "grouped_mm_fwd":
        grouped_mm_fwd(x, w, offsets, w[:, 0] if gathered else None, *where, **override)
    else:
        grouped_mm_bwd(x, x, w, offsets, *where, [True] * 3, **override)


def config(job: Job, kernel: str, rows: int) -> GroupedConfig:
    return pick_grouped_config(kernel, job.capability, job.shared_memory, job.dtype.itemsize, rows, job.size)


def tile(config: GroupedConfig) -> str:
    """A GroupedConfig as it stands on a card: `128x256x64 w8 s3 x1 tma`."""
    size = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} w{config.num_warps} s{config.num_stages} x{config.resident}"
    return size + (" tma" if config.tma else "")


def tiles(job: Job) -> dict[str, str]:
    kernels = {"grouped_mm": "product"}
    if job.launcher == "grouped_mm_bwd":
        kernels["grouped_mm_weight"] = "weight_gathered" if job.flags == "gathered" else "weight"
    return {kernel: tile(config(job, found, ROWS[job.flags])) for kernel, found in kernels.items()}


def named(job: Job, launched: Any) -> tuple[str, str] | None:
    kernel = launched.name.removeprefix("_").removesuffix("_kernel")
    return " ".join([kernel, *str(job).split()]), kernel


def rules(name: str, card: Card) -> list[str]:
    """No spills; the part's own matrix instruction, and TMA loads where the tile says so."""
    kernel, _, part, dtype_class, _, flags = name.split()
    wrong = [f"{card['stack']} bytes of spills where none are allowed"] if card["stack"] > 0 else []
    if not card["config"]:
        return wrong
    if dtype_class == "half":
        instruction = {"sm90": "HGMMA", "sm100": "UTCHMMA"}.get(part, "HMMA") if flags != "few" else "HMMA"
        if card["mma"].get(instruction, 0) == 0:
            wrong.append(f"no {instruction}, the matrix instructions are {card['mma']}")
        if "tma" in card["config"].split() and card["tma"] == 0 and not (kernel == "grouped_mm_weight" and flags == "gathered"):
            wrong.append("the tile says tma and there is no TMA load")
    return wrong


FAMILY = Family(
    launchers=LAUNCHERS,
    launch=launch,
    sizes=dict.fromkeys(LAUNCHERS, (SHALLOW, 2 * SHALLOW)),
    flags={"grouped_mm_fwd": tuple(ROWS), "grouped_mm_bwd": ("plain", "gathered")},
    tiles=tiles,
    named=named,
    rules=rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.flags in ("plain", "few"),
    dtype_classes=lambda flags: ("half", "single") if flags in ("plain", "few") else ("half",),
)
