"""The grouped product's cards, by the inner dim's size: "plain" as matrices lie; "gathered" through row numbers on both sides, with bias;
"few" and "some" rows a group; "odd" and "odd_few", of sizes that no descriptor and no vector load fits; "limit" and "limit_few", as many
groups as there may be. The backward's are those of the product the other way round, and of the sum over rows."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch

from fastattn.kernels.grouped_mm import grouped_mm_bwd, grouped_mm_fwd
from fastattn.kernels.grouped_tiles import FEW, SHALLOW, SOME, GroupedConfig, pick_grouped_config
from fastattn.ops.grouped_mm import MAX_GROUPS

from . import PARTS, SHARED_MEMORY_LIMITS, Card, Family, Job

RESERVED = 1024  # bytes of shared memory that the system takes of each program's, and of a multiprocessor's beyond a program's limit
LAUNCHERS = {"grouped_mm_fwd": grouped_mm_fwd, "grouped_mm_bwd": grouped_mm_bwd}


class Case(NamedTuple):
    """What flags stand for: how many rows a group has, how many groups there are, and how far sizes are from the table's."""

    rows: int = 256
    groups: int = 8
    less: int = 0


CASES = {
    "plain": Case(), "gathered": Case(), "few": Case(FEW), "some": Case(SOME), "odd": Case(less=1), "odd_few": Case(FEW, less=1),
    "limit": Case(groups=MAX_GROUPS), "limit_few": Case(FEW, groups=MAX_GROUPS),
}  # fmt: skip


def overlapping(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows (R, K) or matrices (E, N, K) that are as good as contiguous to all that choose a kernel, but for the first dim's stride: that
    many would fill a machine."""
    first, *rest = shape
    apart, strides = 8 if shape[-1] % 8 == 0 else 1, (shape[-1], 1)[-len(rest) :]
    return torch.zeros(math.prod(rest) + apart * first, dtype=dtype).as_strided(shape, (apart, *strides))


def launch(job: Job, **override: Any) -> None:
    case = CASES[job.flags]
    num_rows, size = case.groups * case.rows, job.size - case.less
    x, w = overlapping(num_rows, size, dtype=job.dtype), overlapping(case.groups, size, size, dtype=job.dtype)
    offsets, numbers = torch.zeros(case.groups, dtype=torch.int32), torch.zeros(num_rows, dtype=torch.int64)
    gathered = job.flags == "gathered"
    where = (numbers, numbers) if gathered else (None, None)
    if job.launcher == "grouped_mm_fwd":
        grouped_mm_fwd(x, w, offsets, w[:, :, 0] if gathered else None, *where, **override)
    else:
        grouped_mm_bwd(x, x, w, offsets, *where, num_rows, [True] * 3, **override)


def config(job: Job, kernel: str, case: Case) -> GroupedConfig:
    return pick_grouped_config(kernel, job.capability, job.shared_memory, job.dtype.itemsize, case.rows, job.size, case.less == 0)


def tile(config: GroupedConfig) -> str:
    """A GroupedConfig as it stands on a card: `128x256x64 w8 s3 x1 tma`."""
    size = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} w{config.num_warps} s{config.num_stages} x{config.resident}"
    return size + (" tma" if config.tma else "")


def tiles(job: Job) -> dict[str, str]:
    kernels = {"grouped_mm": "product"}
    if job.launcher == "grouped_mm_bwd":
        kernels["grouped_mm_weight"] = "weight_gathered" if job.flags == "gathered" else "weight"
    return {kernel: tile(config(job, found, CASES[job.flags])) for kernel, found in kernels.items()}


def named(job: Job, launched: Any) -> tuple[str, str] | None:
    kernel = launched.name.removeprefix("_").removesuffix("_kernel")
    return " ".join([kernel, *str(job).split()]), kernel


def rules(name: str, card: Card) -> list[str]:
    """No spills (of as many groups as there may be, none in the loop); room for as many programs together as the tile says; the part's
    own matrix instruction, and TMA loads where it says so."""
    kernel, _, part, dtype_class, _, flags = name.split()
    spills = card["hot_loop_local"] if flags.startswith("limit") else card["stack"]
    wrong = [f"{card['stack']} bytes of spills where none are allowed"] if spills else []
    if not card["config"]:
        return wrong
    resident = int(re.search(r" x(\d+)", card["config"])[1])
    room = SHARED_MEMORY_LIMITS[PARTS[part]] + RESERVED
    if resident * (card["shared"] + RESERVED) > room:
        wrong.append(f"{resident} programs of {card['shared']} bytes of shared memory are over {part}'s {room}")
    if dtype_class == "half":
        instruction = {"sm90": "HGMMA", "sm100": "UTCHMMA"}.get(part, "HMMA") if not flags.endswith("few") else "HMMA"
        if card["mma"].get(instruction, 0) == 0:
            wrong.append(f"no {instruction}, the matrix instructions are {card['mma']}")
        if "tma" in card["config"].split() and card["tma"] == 0 and not (kernel == "grouped_mm_weight" and flags == "gathered"):
            wrong.append("the tile says tma and there is no TMA load")
    return wrong


FAMILY = Family(
    launchers=LAUNCHERS,
    launch=launch,
    sizes=dict.fromkeys(LAUNCHERS, (SHALLOW, 2 * SHALLOW)),
    flags={"grouped_mm_fwd": tuple(CASES), "grouped_mm_bwd": ("plain", "gathered", "odd")},
    tiles=tiles,
    named=named,
    rules=rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.flags in ("plain", "few"),
    dtype_classes=lambda flags: ("half", "single") if flags in ("plain", "few") else ("half",),
)
