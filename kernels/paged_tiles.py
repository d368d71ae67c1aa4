"""Tile and split choices of paged attention: frozen data, and the pure functions that pick.

A row is (part, dtype class, largest head dim, rows) → PagedConfig. Rows are queries times the heads that share their keys: 16 for a
decode step, which is bound by memory and wants 32 to 64 KB of keys and values in flight a multiprocessor; LARGEST for anything longer.
The dtype class is the cache's: "half", "single", and "quantized" for one byte a value. Receipts: "static" = chosen by what the compiler
makes of it (no spills, registers, shared memory; the kernel cards), not yet timed on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .tile_table import TileTable
from .tiles import HEAD_DIM_BUCKETS, part_of

SMALLEST, LARGEST = 16, 1 << 30
MAX_SPLITS = 256


@dataclass(frozen=True)
class PagedConfig:
    """One tile: BLOCK_M rows by BLOCK_N keys. `resident`: how many such programs fit a multiprocessor together, at most."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    resident: int = 1


def _parts(dtype_class: str, rows: int, *parts: str, tiles: tuple[tuple[int, ...], ...]):
    """Rows of the table from one tile a bucket of head dims."""
    return {
        (part, dtype_class, bucket, rows): PagedConfig(*tile)
        for part in parts
        for bucket, tile in zip(HEAD_DIM_BUCKETS, tiles, strict=True)
    }


# fmt: off
_SHIPPED: dict[tuple[str, str, int, int], PagedConfig] = {
    # static. Decode: 0 spills, 32 to 64 KB of loads in flight a program and 2 to 4 of those a multiprocessor.
    **_parts("half", SMALLEST, "sm80",
             tiles=((16, 64, 4, 4, 3), (16, 64, 4, 3, 2), (16, 32, 4, 3, 2), (16, 16, 4, 3, 1))),
    **_parts("half", SMALLEST, "sm90", "sm100",
             tiles=((16, 64, 4, 4, 4), (16, 64, 4, 3, 3), (16, 32, 4, 3, 3), (16, 16, 4, 3, 2))),
    **_parts("half", SMALLEST, "sm120",
             tiles=((16, 64, 4, 3, 2), (16, 32, 4, 3, 2), (16, 32, 4, 2, 2), (16, 16, 4, 2, 1))),
    **_parts("quantized", SMALLEST, "sm80", "sm90", "sm100",
             tiles=((16, 64, 4, 4, 2), (16, 64, 4, 4, 2), (16, 32, 4, 4, 2), (16, 32, 8, 2, 1))),
    **_parts("quantized", SMALLEST, "sm120",
             tiles=((16, 64, 4, 4, 2), (16, 64, 4, 3, 2), (16, 32, 4, 3, 2), (16, 32, 8, 2, 1))),
    **_parts("single", SMALLEST, "sm80", "sm90", "sm100",
             tiles=((16, 32, 4, 4, 2), (16, 16, 8, 3, 2), (16, 16, 4, 3, 1), (16, 16, 8, 2, 1))),
    **_parts("single", SMALLEST, "sm120",
             tiles=((16, 16, 4, 4, 2), (16, 16, 4, 3, 1), (16, 16, 4, 2, 1), (16, 16, 8, 1, 1))),
    # Prefill: HGMMA on sm_90.
    **_parts("half", LARGEST, "sm90", "sm100",
             tiles=((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2))),
    **_parts("half", LARGEST, "sm80",
             tiles=((128, 64, 8, 2), (64, 32, 8, 3), (32, 32, 8, 2), (32, 16, 8, 2))),
    **_parts("half", LARGEST, "sm120",
             tiles=((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2))),
    **_parts("quantized", LARGEST, "sm90", "sm100",
             tiles=((64, 64, 8, 3), (64, 64, 8, 3), (64, 16, 8, 2), (32, 16, 8, 2))),
    **_parts("quantized", LARGEST, "sm80", "sm120",
             tiles=((64, 32, 8, 3), (64, 32, 8, 3), (32, 32, 8, 2), (32, 16, 8, 2))),
    **_parts("single", LARGEST, "sm80", "sm90", "sm100", "sm120",
             tiles=((16, 16, 4, 3), (16, 16, 8, 2), (16, 16, 4, 2), (16, 16, 16, 1))),
}
# fmt: on
PAGED_TILES = TileTable(PagedConfig, _SHIPPED)


def pick_paged_config(
    capability: tuple[int, int], shared_memory: int, head_dim: int, itemsize: int, cache_itemsize: int, rows: int
) -> PagedConfig:
    """The tile of one launch. `head_dim` is the larger of D and D_v, the item sizes are the queries' and the cache's bytes per element,
    `rows` the most rows that a group of heads has in one sequence. Pure: no GPU needed."""
    bucket = next(limit for limit in HEAD_DIM_BUCKETS if head_dim <= limit)
    dtype_class = "single" if itemsize == 4 else "quantized" if cache_itemsize == 1 else "half"
    return PAGED_TILES.pick(part_of(capability, shared_memory), dtype_class, bucket, SMALLEST if rows <= SMALLEST else LARGEST)


MIN_BLOCKS_PER_SPLIT = 4  # below that the ramp of a split's loop, and its share of the merge, cost more than it saves


@functools.lru_cache(maxsize=4096)
def pick_splits(programs: int, slots: int, max_blocks: int) -> int:
    """How many ways to split the keys of each of `programs` tiles, none longer than `max_blocks` key blocks, on a part that has room for
    `slots` programs at a time.

    The fewest that keep the part nearly as busy as the best count would: programs run in waves of `slots`, and a last wave that is not full
    takes as long as one that is. With w = programs·n / slots, n splits keep the part busy w / ⌈w⌉ of the time (flash-attn's heuristic).
    Lengths are on the GPU and play no part, so that a captured graph stays right as they grow; a sequence shorter than its table allows has
    shorter splits.
    """
    if programs == 0:
        return 1
    most = max(1, min(max_blocks // MIN_BLOCKS_PER_SPLIT, MAX_SPLITS))
    busy = [programs * n / slots / -(-programs * n // slots) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(busy, 1) if share >= 0.85 * max(busy))
