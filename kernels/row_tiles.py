"""Tile choices of the row kernels as frozen data, and the pure function that picks one.

A row is (kernel, dtype class, largest row length) → RowConfig, for every part: no matrix instructions are in play, and what
differs between parts (registers and threads an SM) is alike from sm_80 to sm_100. LONG stands for any length beyond the last
bucket, walked in blocks. All rows of all kernels keep to two rules of thumb: 16 to 32 elements a thread, and enough programs
resident that about 64 KB of loads are in flight on an SM. "static" = chosen by what the compiler makes of it, not yet timed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tile_table import TileTable

LONG = 1 << 31
ROW_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, LONG)


@dataclass(frozen=True)
class RowConfig:
    """One kernel's tile: BLOCK columns of ROWS rows at once; `long`: BLOCK columns after BLOCK columns of one row."""

    ROWS: int
    BLOCK: int
    num_warps: int
    long: bool = False

    def meta(self) -> dict[str, int]:
        """As launch arguments."""
        return dict(ROWS=self.ROWS, BLOCK=self.BLOCK, num_warps=self.num_warps)


def _rows(kernel: str, dtype_class: str, *tiles: tuple[int, int, int]) -> dict[tuple[str, str, int], RowConfig]:
    """Rows of the table from one (ROWS, BLOCK, num_warps) a bucket, shortest first; the last is LONG's."""
    buckets = (*ROW_BUCKETS[: len(tiles) - 1], LONG)
    return {
        (kernel, dtype_class, bucket): RowConfig(*tile, long=bucket == LONG)
        for bucket, tile in zip(buckets, tiles, strict=True)
    }


# fmt: off
_SHIPPED: dict[tuple[str, str, int], RowConfig] = {
    # softmax: static. Forward keeps a row in registers up to 32768; 65536 spills at every legal warp count.
    **_rows("softmax_fwd", "half", (64, 64, 4), (32, 128, 4), (16, 256, 4), (2, 512, 1), (1, 1024, 1), (1, 2048, 2),
            (1, 4096, 4), (1, 8192, 8), (1, 16384, 16), (1, 32768, 16), (1, 8192, 8)),
    **_rows("softmax_fwd", "single", (64, 64, 4), (32, 128, 4), (16, 256, 4), (2, 512, 1), (1, 1024, 1), (1, 2048, 2),
            (1, 4096, 4), (1, 8192, 8), (1, 16384, 16), (1, 32768, 16), (1, 8192, 8)),
    # Backward holds two rows: half as many elements a thread where rows share a program, and 32768 goes the long way.
    **_rows("softmax_bwd", "half", (64, 64, 8), (16, 128, 4), (16, 256, 8), (2, 512, 1), (1, 1024, 1), (1, 2048, 2),
            (1, 4096, 4), (1, 8192, 8), (1, 16384, 16), (1, 8192, 8)),
    **_rows("softmax_bwd", "single", (64, 64, 8), (16, 128, 4), (16, 256, 8), (2, 512, 1), (1, 1024, 1), (1, 2048, 2),
            (1, 4096, 4), (1, 8192, 8), (1, 16384, 16), (1, 8192, 8)),
    # glu: static. Nothing is reduced, so 16 elements a thread of any rows: forward 32 to 48 registers, backward 36 to 80. A bucket is
    # for short strided rows to share a program; contiguous tensors are one row.
    **{
        (kernel, dtype_class, bucket): RowConfig(rows, block, 4, long=bucket == LONG)
        for kernel in ("glu_fwd", "glu_bwd")
        for dtype_class in ("half", "single")
        for bucket, rows, block in ((128, 16, 128), (512, 4, 512), (LONG, 1, 2048))
    },
    # cross_entropy: static, 64 KB in flight an SM throughout. Forward walks rows of more than 2048 columns, 16 elements a thread: 32 need
    # no more than 40 registers, but spill with weights, smoothing and softcap. Backward has no row to hold: a program a block of columns.
    **{
        (kernel, dtype_class, bucket): RowConfig(rows, block, num_warps, long=long)
        for dtype_class in ("half", "single")
        for kernels, bucket, rows, block, num_warps, long in (
            (("cross_entropy_fwd", "cross_entropy_bwd"), 64, 64, 64, 8, False),
            (("cross_entropy_fwd", "cross_entropy_bwd"), 128, 32, 128, 8, False),
            (("cross_entropy_fwd", "cross_entropy_bwd"), 256, 4, 256, 1, False),
            (("cross_entropy_fwd", "cross_entropy_bwd"), 512, 2, 512, 1, False),
            (("cross_entropy_fwd", "cross_entropy_bwd"), 1024, 1, 1024, 1, False),
            (("cross_entropy_fwd", "cross_entropy_bwd"), 2048, 1, 2048, 2, False),
            (("cross_entropy_fwd",), 32768, 1, 2048, 4, True),
            (("cross_entropy_fwd",), LONG, 1, 4096, 8, True),
            (("cross_entropy_bwd",), LONG, 1, 4096, 4, False),
        )
        for kernel in kernels
    },
    # sampling: static. One tile for any vocabulary, 16 KB of loads in flight from one program: 60 registers without a cut, 120 with one.
    **_rows("sample", "half", (1, 8192, 16)), **_rows("sample", "single", (1, 4096, 16)),
    **_rows("sampling_probs", "half", (1, 8192, 16)), **_rows("sampling_probs", "single", (1, 4096, 16)),
    # rotary, by head dim: static. 2048 elements a program, a 128-bit access of each half a thread: 32 registers, 64 KB in flight an SM.
    # Twice the rows take 54.
    **{
        ("rotary", dtype_class, bucket): RowConfig(2048 // bucket, bucket, 4)
        for dtype_class in ("half", "single")
        for bucket in (64, 128, 256, 512)
    },
    # norm: static. Forward, a row stays in registers up to 8192 columns, as of longer ones no two programs fit on an SM. Backward keeps
    # to 128 registers a thread, which 16 warps an SM have, and holds what fits beside the sums: RMS norm 32 elements a thread, layer
    # norm (and what has no sums) 16, fp32 16.
    **_rows("norm_fwd", "half", (64, 64, 4), (32, 128, 4), (8, 256, 4), (2, 512, 1), (1, 1024, 1), (1, 2048, 2),
            (1, 4096, 4), (1, 8192, 8), (1, 16384, 16)),
    **_rows("norm_fwd", "single", (32, 64, 4), (16, 128, 4), (8, 256, 4), (2, 512, 2), (1, 1024, 2), (1, 2048, 4),
            (1, 4096, 8), (1, 8192, 16), (1, 8192, 16)),
    **_rows("rms_norm_bwd", "half", (32, 64, 4), (4, 128, 1), (2, 256, 1), (1, 512, 1), (1, 1024, 1), (1, 2048, 2),
            (1, 4096, 4), (1, 8192, 8), (1, 16384, 16), (8, 256, 4)),
    **_rows("rms_norm_bwd", "single", (16, 64, 4), (8, 128, 4), (4, 256, 4), (2, 512, 4), (1, 1024, 4), (1, 2048, 8),
            (1, 4096, 8), (1, 8192, 16), (8, 256, 4)),
    **_rows("layer_norm_bwd", "half", (32, 64, 4), (4, 128, 2), (2, 256, 1), (1, 512, 1), (1, 1024, 2), (1, 2048, 4),
            (1, 4096, 8), (1, 8192, 16), (8, 256, 4)),
    **_rows("layer_norm_bwd", "single", (16, 64, 4), (8, 128, 4), (4, 256, 4), (2, 512, 4), (1, 1024, 2), (1, 2048, 4),
            (1, 4096, 8), (8, 256, 8)),
}
# fmt: on
ROW_TILES = TileTable(RowConfig, _SHIPPED)


def pick_row_config(kernel: str, num_cols: int, itemsize: int) -> RowConfig:
    """The tile for rows of num_cols columns; `itemsize` is the widest row's. Pure: no GPU needed."""
    dtype_class = "half" if itemsize == 2 else "single"
    buckets = (bucket for bucket in ROW_BUCKETS if num_cols <= bucket and (kernel, dtype_class, bucket) in ROW_TILES)
    return ROW_TILES.pick(kernel, dtype_class, next(buckets, LONG))
