"""What the row kernels' cards have in common: buckets of row lengths, tiles, names and rules.

Flags begin with what the rows' layout is: "aligned" rows are read and written by 128 bits, "odd" ones (one column short of the
bucket) by 128 bits but for their edges, "strided" ones lie along another dim than the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastattn.kernels.row_tiles import LONG, ROW_BUCKETS, ROW_TILES, RowConfig, pick_row_config

from . import Card, Family, Job, narrow

LONG_ROW = 100_000  # columns of a LONG card's row; the code does not depend on it


def num_cols(job: Job) -> int:
    """Columns of the job's rows."""
    length = LONG_ROW if job.size == LONG else job.size
    return length - 1 if job.flags.startswith("odd") else length


def buckets(kernel: str) -> tuple[int, ...]:
    return tuple(b for b in ROW_BUCKETS if (kernel, "half", b) in ROW_TILES)


def tile(config: RowConfig) -> str:
    """A RowConfig as it stands on a card: `1x4096 w4`."""
    return f"{config.ROWS}x{config.BLOCK} w{config.num_warps}"


def tiles(job: Job) -> dict[str, str]:
    return {job.launcher: tile(pick_row_config(job.launcher, num_cols(job), job.dtype.itemsize))}


def named(job: Job, launched: Any) -> tuple[str, str] | None:
    kernel = launched.name.removeprefix("_").removesuffix("_kernel")
    return " ".join([kernel, *str(job).split()[1:]]), job.launcher


def rules(name: str, card: Card) -> list[str]:
    _, _, _, _, flags = name.split()
    wrong = []
    if card["stack"] > 0:
        wrong.append(f"{card['stack']} bytes of spills where none are allowed")
    if not any(access.endswith(".128") for access in card["access"]):
        wrong.append(f"no 128-bit access: {card['access']}")
    if flags.startswith("aligned") and narrow(card):
        wrong.append(f"narrow accesses to aligned rows: {card['access']}")
    return wrong


def row_family(
    launchers: Mapping[str, Callable], launch: Callable[..., None], flags: tuple[str, ...], rules: Callable = rules
) -> Family:
    """A Family of launchers whose names are kernels of ROW_TILES. Only aligned rows are compiled in single precision too."""
    return Family(
        launchers=launchers,
        launch=launch,
        sizes={name: buckets(name) for name in launchers},
        flags=dict.fromkeys(launchers, flags),
        tiles=tiles,
        named=named,
        rules=rules,
        is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.size in (4096, LONG),
        dtype_classes=lambda flags: ("half", "single") if flags.startswith("aligned") else ("half",),
    )
