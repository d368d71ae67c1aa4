"""Tile choices as frozen data, and the pure function that picks one.

A row is (kernel, part, dtype class, largest head dim) → Config. Parts share a row where they share the matrix
instruction and the shared memory: "sm80" (mma.sync, 163 KB a block), "sm120" (mma.sync, 99 KB: also 8.6 and 8.9),
"sm90" (wgmma and TMA, 227 KB), "sm100" (tcgen05 and TMA, 227 KB). Every row is compiled for its part by the kernel
cards; a receipt beside a row says what it was chosen by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .tile_table import TileTable


@dataclass(frozen=True)
class Config:
    """One kernel's tile.

    BLOCK_M counts queries and BLOCK_N keys. `tma` permits descriptors where the tensors' layout does. `overlap` runs
    the softmax of a block under the P·V of the one before it. `split` computes dK and dV in two passes, each with
    half the accumulators.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    tma: bool = False
    overlap: bool = False
    split: bool = False


HEAD_DIM_BUCKETS = (64, 128, 256, 512)

# Receipts: "static" = chosen by what the compiler makes of it (no spills, registers, shared memory, overlap; the kernel
# cards), not yet timed on a GPU.
_SHIPPED: dict[tuple[str, str, str, int], Config] = {
    # forward
    ("attention_fwd", "sm80", "half", 64): Config(128, 64, 8, 3),
    ("attention_fwd", "sm80", "half", 128): Config(128, 32, 8, 3),
    ("attention_fwd", "sm80", "half", 256): Config(64, 64, 8, 1),
    ("attention_fwd", "sm80", "half", 512): Config(32, 32, 8, 1),
    ("attention_fwd", "sm90", "half", 64): Config(128, 128, 8, 2, tma=True, overlap=True),
    ("attention_fwd", "sm90", "half", 128): Config(128, 128, 8, 2, tma=True, overlap=True),
    ("attention_fwd", "sm90", "half", 256): Config(128, 64, 8, 2, tma=True, overlap=True),
    ("attention_fwd", "sm90", "half", 512): Config(64, 32, 8, 2),
    ("attention_fwd", "sm100", "half", 64): Config(128, 128, 8, 2, tma=True),
    ("attention_fwd", "sm100", "half", 128): Config(128, 128, 8, 2, tma=True),
    ("attention_fwd", "sm100", "half", 256): Config(128, 64, 8, 2, tma=True),
    ("attention_fwd", "sm100", "half", 512): Config(64, 32, 8, 2),
    ("attention_fwd", "sm120", "half", 64): Config(128, 64, 8, 3),
    ("attention_fwd", "sm120", "half", 128): Config(128, 32, 8, 3),
    ("attention_fwd", "sm120", "half", 256): Config(64, 64, 8, 1),
    ("attention_fwd", "sm120", "half", 512): Config(32, 32, 8, 1),
    # dK and dV
    ("attention_bwd_dkdv", "sm80", "half", 64): Config(32, 128, 8, 1),
    ("attention_bwd_dkdv", "sm80", "half", 128): Config(32, 64, 8, 3, split=True),
    ("attention_bwd_dkdv", "sm80", "half", 256): Config(32, 64, 8, 2, split=True),
    ("attention_bwd_dkdv", "sm80", "half", 512): Config(16, 32, 8, 2, split=True),
    ("attention_bwd_dkdv", "sm90", "half", 64): Config(64, 128, 8, 2, tma=True),
    ("attention_bwd_dkdv", "sm90", "half", 128): Config(32, 128, 8, 2, tma=True, split=True),
    ("attention_bwd_dkdv", "sm90", "half", 256): Config(32, 64, 8, 2, tma=True, split=True),
    ("attention_bwd_dkdv", "sm90", "half", 512): Config(32, 32, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm100", "half", 64): Config(64, 128, 8, 1, tma=True),
    ("attention_bwd_dkdv", "sm100", "half", 128): Config(32, 128, 8, 2, tma=True, split=True),
    ("attention_bwd_dkdv", "sm100", "half", 256): Config(64, 64, 8, 1, tma=True, split=True),
    ("attention_bwd_dkdv", "sm100", "half", 512): Config(32, 32, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm120", "half", 64): Config(32, 128, 8, 1),
    ("attention_bwd_dkdv", "sm120", "half", 128): Config(32, 64, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm120", "half", 256): Config(32, 64, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm120", "half", 512): Config(16, 32, 8, 1, split=True),
    # dQ
    ("attention_bwd_dq", "sm80", "half", 64): Config(128, 32, 8, 2),
    ("attention_bwd_dq", "sm80", "half", 128): Config(64, 64, 8, 2),
    ("attention_bwd_dq", "sm80", "half", 256): Config(64, 32, 8, 2),
    ("attention_bwd_dq", "sm80", "half", 512): Config(32, 16, 8, 1),
    ("attention_bwd_dq", "sm90", "half", 64): Config(128, 64, 8, 2, tma=True),
    ("attention_bwd_dq", "sm90", "half", 128): Config(128, 64, 8, 2, tma=True),
    ("attention_bwd_dq", "sm90", "half", 256): Config(128, 32, 8, 2, tma=True),
    ("attention_bwd_dq", "sm90", "half", 512): Config(32, 32, 8, 1),
    ("attention_bwd_dq", "sm100", "half", 64): Config(128, 64, 8, 2, tma=True),
    ("attention_bwd_dq", "sm100", "half", 128): Config(128, 64, 8, 2, tma=True),
    ("attention_bwd_dq", "sm100", "half", 256): Config(128, 32, 8, 2, tma=True),
    ("attention_bwd_dq", "sm100", "half", 512): Config(32, 32, 8, 1),
    ("attention_bwd_dq", "sm120", "half", 64): Config(128, 32, 8, 2),
    ("attention_bwd_dq", "sm120", "half", 128): Config(128, 32, 8, 2),
    ("attention_bwd_dq", "sm120", "half", 256): Config(64, 32, 8, 1),
    ("attention_bwd_dq", "sm120", "half", 512): Config(32, 16, 8, 1),
    # float32
    ("attention_fwd", "sm80", "single", 64): Config(64, 32, 8, 2),
    ("attention_fwd", "sm80", "single", 128): Config(32, 16, 8, 2),
    ("attention_fwd", "sm80", "single", 256): Config(16, 16, 8, 1),
    ("attention_fwd", "sm80", "single", 512): Config(16, 16, 8, 1),
    ("attention_fwd", "sm90", "single", 64): Config(64, 32, 8, 2),
    ("attention_fwd", "sm90", "single", 128): Config(32, 16, 8, 2),
    ("attention_fwd", "sm90", "single", 256): Config(16, 16, 8, 2),
    ("attention_fwd", "sm90", "single", 512): Config(16, 16, 8, 1),
    ("attention_fwd", "sm100", "single", 64): Config(64, 32, 8, 2),
    ("attention_fwd", "sm100", "single", 128): Config(32, 16, 8, 2),
    ("attention_fwd", "sm100", "single", 256): Config(16, 16, 8, 2),
    ("attention_fwd", "sm100", "single", 512): Config(16, 16, 8, 1),
    ("attention_fwd", "sm120", "single", 64): Config(64, 32, 8, 2),
    ("attention_fwd", "sm120", "single", 128): Config(32, 16, 8, 2),
    ("attention_fwd", "sm120", "single", 256): Config(16, 16, 8, 1),
    ("attention_fwd", "sm120", "single", 512): Config(16, 16, 8, 1),
    ("attention_bwd_dkdv", "sm80", "single", 64): Config(16, 32, 4, 1),
    ("attention_bwd_dkdv", "sm80", "single", 128): Config(16, 32, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm80", "single", 256): Config(16, 16, 4, 1, split=True),
    ("attention_bwd_dkdv", "sm80", "single", 512): Config(16, 8, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm90", "single", 64): Config(16, 32, 4, 1),
    ("attention_bwd_dkdv", "sm90", "single", 128): Config(16, 32, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm90", "single", 256): Config(16, 16, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm90", "single", 512): Config(16, 8, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm100", "single", 64): Config(16, 32, 4, 1),
    ("attention_bwd_dkdv", "sm100", "single", 128): Config(16, 32, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm100", "single", 256): Config(16, 16, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm100", "single", 512): Config(16, 8, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm120", "single", 64): Config(16, 32, 4, 1),
    ("attention_bwd_dkdv", "sm120", "single", 128): Config(16, 32, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm120", "single", 256): Config(16, 16, 8, 1, split=True),
    ("attention_bwd_dkdv", "sm120", "single", 512): Config(16, 8, 4, 1, split=True),
    ("attention_bwd_dq", "sm80", "single", 64): Config(64, 32, 8, 1),
    ("attention_bwd_dq", "sm80", "single", 128): Config(32, 32, 8, 1),
    ("attention_bwd_dq", "sm80", "single", 256): Config(16, 16, 4, 1),
    ("attention_bwd_dq", "sm80", "single", 512): Config(16, 16, 8, 1),
    ("attention_bwd_dq", "sm90", "single", 64): Config(64, 32, 8, 1),
    ("attention_bwd_dq", "sm90", "single", 128): Config(32, 32, 8, 1),
    ("attention_bwd_dq", "sm90", "single", 256): Config(16, 16, 4, 1),
    ("attention_bwd_dq", "sm90", "single", 512): Config(16, 16, 8, 1),
    ("attention_bwd_dq", "sm100", "single", 64): Config(64, 32, 8, 1),
    ("attention_bwd_dq", "sm100", "single", 128): Config(32, 32, 8, 1),
    ("attention_bwd_dq", "sm100", "single", 256): Config(16, 16, 4, 1),
    ("attention_bwd_dq", "sm100", "single", 512): Config(16, 16, 8, 1),
    ("attention_bwd_dq", "sm120", "single", 64): Config(32, 32, 8, 1),
    ("attention_bwd_dq", "sm120", "single", 128): Config(32, 16, 8, 1),
    ("attention_bwd_dq", "sm120", "single", 256): Config(16, 16, 4, 1),
    ("attention_bwd_dq", "sm120", "single", 512): Config(8, 16, 4, 1),
}
TILES = TileTable(Config, _SHIPPED)


def part_of(capability: tuple[int, int], shared_memory: int) -> str:
    """The row name of a part. Below 8.0 there is no bf16 matrix instruction and no asynchronous copy: refused by
    name."""
    if capability < (8, 0):
        major, minor = capability
        raise RuntimeError(f"fastattn needs compute capability 8.0 (Ampere) or newer, this GPU has {major}.{minor}")
    if shared_memory < 163 * 1024:
        return "sm120"
    return {8: "sm80", 9: "sm90", 10: "sm100"}.get(capability[0], "sm80")


def pick_config(
    kernel: str, capability: tuple[int, int], shared_memory: int, head_dim: int, itemsize: int, plain: bool = True
) -> Config:
    """The tile of one launch. `head_dim` is the larger of D and D_v, `itemsize` the inputs' bytes per element,
    `plain` whether nothing but a mask comes between the scores and the softmax. Pure: no GPU needed."""
    bucket = next(limit for limit in HEAD_DIM_BUCKETS if head_dim <= limit)
    dtype_class = "half" if itemsize == 2 else "single"
    config = TILES.pick(kernel, part_of(capability, shared_memory), dtype_class, bucket)
    if not plain and config.BLOCK_M * config.BLOCK_N > 64 * 128:
        # Forward, sm_90, D = 64, every feature on: 128×128 spills 2144 bytes and is 32776 instructions, 128×64 none and
        # 9696.
        config = replace(config, BLOCK_N=config.BLOCK_N // 2)
    return config
