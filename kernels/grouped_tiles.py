"""Tile choices of grouped matrix products: frozen data, and the pure function that picks.

A row is (kernel, part, dtype class, rows a group, size of the product's inner dim) → GroupedConfig. Kernels: "product" is any grouped
product, "gated" the one with an activation in its epilogue, "gated_bwd" and "gated_bwd_interleaved" the one with the activation's backward,
"weight" and "weight_gathered" the sum over a group's rows. Rows a group are counted on the average, the only number that the host knows:
FEW is decoding, bound by the reading of matrices. Receipts: "static" = chosen by what the compiler makes of it (no spills, registers,
shared memory, matrix instructions, loads in flight; the kernel cards), not yet timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tile_table import TileTable
from .tiles import part_of

FEW, SOME, MANY = 16, 64, 1 << 31
# The inner dim's sizes: up to 1024, a tile's stores take half as long as its products, and two programs a multiprocessor take turns.
SHALLOW, DEEP = 1024, 1 << 31


@dataclass(frozen=True)
class GroupedConfig:
    """One tile: BLOCK_M rows by BLOCK_N columns, BLOCK_K of the inner dim at a time; of "weight", rows are the inner dim.

    resident: how many programs fit a multiprocessor together, for which the compiler is held to their share of registers. tma permits
    descriptors where the tensors' layout does. GROUP_M: how many tiles of rows go through the columns together, so that both their operands
    stay in the L2 cache.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    resident: int = 1
    tma: bool = False
    GROUP_M: int = 8

    def meta(self) -> dict[str, int]:
        """As launch arguments."""
        sizes = dict(BLOCK_M=self.BLOCK_M, BLOCK_N=self.BLOCK_N, BLOCK_K=self.BLOCK_K, GROUP_M=self.GROUP_M)
        share = 65536 // (32 * self.num_warps * self.resident) // 8 * 8
        return sizes | dict(num_warps=self.num_warps, num_stages=self.num_stages, maxnreg=share if share < 255 else None)


Key = tuple[str, str, str, int, int]


def _rows(kernels: str, parts: str, dtype_class: str, rows: int, *tile: int, inner: tuple[int, ...] = (SHALLOW, DEEP), tma: bool = False):
    """Rows of the table that share a tile."""
    return {
        (kernel, part, dtype_class, rows, size): GroupedConfig(*tile, tma=tma)
        for kernel in kernels.split()
        for part in parts.split()
        for size in inner
    }


# fmt: off
# static, all of it. L2 feeds a multiprocessor some 32 bytes a cycle: a 128×256 tile wants 49 of its share, a 128×128 one 65.
_SHIPPED: dict[Key, GroupedConfig] = {
    **_rows("product gated", "sm80", "half", FEW, 16, 128, 64, 4, 4, 2),
    **_rows("product gated", "sm120", "half", FEW, 16, 128, 64, 4, 3, 2),
    **_rows("product gated", "sm90 sm100", "half", FEW, 16, 128, 64, 4, 4, 4, tma=True),
    **_rows("product gated", "sm80 sm120", "half", SOME, 64, 128, 32, 4, 4, 2),
    **_rows("product gated", "sm90 sm100", "half", SOME, 64, 128, 64, 4, 3, 3, tma=True),
    **_rows("product gated", "sm80", "half", MANY, 128, 128, 32, 8, 4, 1),
    **_rows("product gated", "sm120", "half", MANY, 128, 128, 64, 8, 3, 1),
    **_rows("product gated", "sm90", "half", MANY, 128, 128, 64, 8, 3, 2, inner=(SHALLOW,), tma=True),
    **_rows("product gated", "sm90", "half", MANY, 128, 256, 64, 8, 4, 1, inner=(DEEP,), tma=True),
    **_rows("product", "sm100", "half", MANY, 128, 256, 64, 8, 4, 1, tma=True),
    **_rows("gated", "sm100", "half", MANY, 128, 128, 64, 8, 4, 1, tma=True),
    **_rows("gated_bwd gated_bwd_interleaved", "sm80", "half", MANY, 128, 64, 32, 8, 4, 1),
    **_rows("gated_bwd gated_bwd_interleaved", "sm120", "half", MANY, 128, 64, 32, 8, 5, 1),
    **_rows("gated_bwd", "sm90 sm100", "half", MANY, 128, 256, 64, 8, 4, 1, tma=True),
    **_rows("gated_bwd_interleaved", "sm90 sm100", "half", MANY, 128, 128, 64, 8, 4, 1, tma=True),
    **_rows("weight", "sm80 sm120", "half", MANY, 128, 128, 32, 8, 4, 1),
    **_rows("weight", "sm90 sm100", "half", MANY, 128, 256, 64, 8, 4, 1, tma=True),
    # Row numbers that are loaded in the loop keep two stages of the others from being loads in flight.
    **_rows("weight_gathered", "sm80 sm120", "half", MANY, 128, 128, 32, 8, 5, 1),
    **_rows("weight_gathered", "sm90 sm100", "half", MANY, 128, 256, 64, 8, 5, 1, tma=True),
    **_rows("product gated", "sm80 sm90 sm100 sm120", "single", FEW, 16, 64, 32, 4, 3, 2),
    **_rows("product gated", "sm80 sm90 sm100 sm120", "single", SOME, 64, 64, 32, 4, 3, 2),
    **_rows("product gated", "sm80 sm90", "single", MANY, 64, 64, 32, 4, 3, 2),
    **_rows("product gated", "sm100 sm120", "single", MANY, 64, 64, 32, 8, 3, 1),
    **_rows("gated_bwd gated_bwd_interleaved", "sm80 sm90 sm100 sm120", "single", MANY, 64, 64, 32, 8, 2, 1),
    **_rows("weight weight_gathered", "sm80 sm90 sm100 sm120", "single", MANY, 64, 64, 32, 4, 3, 2),
}
# fmt: on
GROUPED_TILES = TileTable(GroupedConfig, _SHIPPED)


def pick_grouped_config(
    kernel: str, capability: tuple[int, int], shared_memory: int, itemsize: int, rows_a_group: float, inner: int, aligned: bool = True
) -> GroupedConfig:
    """The tile of one launch: `rows_a_group` on the average, `inner` the size of the dim that is summed over. Pure: no GPU needed.

    aligned: whether rows start on 16 bytes, of matrices and of what is not gathered. If not, elements are loaded one by one, through
    registers, of which 16-bit ones take as many as float32: they have its tiles.
    """
    rows = MANY if kernel not in ("product", "gated") else next(limit for limit in (FEW, SOME, MANY) if rows_a_group <= limit)
    dtype_class = "half" if itemsize == 2 and aligned else "single"
    return GROUPED_TILES.pick(kernel, part_of(capability, shared_memory), dtype_class, rows, SHALLOW if inner <= SHALLOW else DEEP)
