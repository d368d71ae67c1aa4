"""Merging the attention results of disjoint sets of keys, forward and backward.

    lse = log Σ exp(lse_n)          out = Σ w_n·out_n,  w_n = exp(lse_n − lse)
    dout_n = w_n·dout               dlse_n = w_n·(dlse + d_n − Σ w_m·d_m),  d_n = dout·out_n

in fp32. A row is one query of one head, in the order of lse (B, H, S), so that a tile's LSEs lie together. A program first reads all
of its rows' LSEs at once, then SPLITS partials of BLOCK_D columns at a time, those of weight 0 never. Forward, each place of a tile
keeps a sum of its own until the walk ends; backward walks twice, first for Σ w_m·d_m, as a rounded `out` would give it with an error
many times that of d_n, and finds the few partials of its rows in cache the second time.
Floor: (N + 1)·out.numel·itemsize bytes forward, (2·N + 1) backward.
"""

import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import check_grid, launch
from .primitives import LN2, LOG2E, cast
from .rows import vector_of, with_contiguous_rows

log = logging.getLogger("fastattn")

SIZES = ["num_splits", "num_rows", "seqlen", "num_heads"]
STRIDES = [
    "stride_on", "stride_ob", "stride_os", "stride_oh", "stride_ln", "stride_lb", "stride_lh", "stride_ls", "stride_dob", "stride_dos",
    "stride_doh", "stride_dlb", "stride_dlh", "stride_dls",
]  # fmt: skip


@triton.jit
def rows_of_block(block, num_rows, seqlen, num_heads, ROWS: tl.constexpr):
    """(row, batch, position, head, in_rows) of a block of (ROWS,) rows, int64; those past the end are row 0, not to be stored."""
    row = block * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    row = tl.where(in_rows, row, 0)
    batch_head = row // seqlen
    batch, position, head = batch_head // num_heads, row % seqlen, batch_head % num_heads
    return row.to(tl.int64), batch.to(tl.int64), position.to(tl.int64), head.to(tl.int64), in_rows


@triton.jit
def read_lses(lses_ptr, num_splits, stride_ln, in_rows, ROWS: tl.constexpr):
    """(shift, row_sum) of (ROWS,) rows: Σ exp(lse_n − shift), where shift is the largest LSE, or 0 if that is infinite, as −inf − −inf
    would be NaN. No keys at all: a sum of 0."""
    LSES: tl.constexpr = 512 // ROWS
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_splits, LSES):
        split = (start + tl.arange(0, LSES))[None, :]
        mask = in_rows[:, None] & (split < num_splits)
        lse = tl.load(lses_ptr[:, None] + split.to(tl.int64) * stride_ln, mask=mask, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(lse, 1))
        shift = tl.where(tl.abs(new_max) == float("inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2((row_max - shift) * LOG2E) + tl.sum(tl.exp2((lse - shift[:, None]) * LOG2E), 1)
        row_max = new_max
    return shift, row_sum


@triton.jit
def read_weights(lses_ptr, start, num_splits, stride_ln, shift, in_rows, SPLITS: tl.constexpr):
    """(split, in_splits, weight) of SPLITS partials from `start`: int64 (1, SPLITS), and of each row exp(lse_n − shift)."""
    split = (start + tl.arange(0, SPLITS))[None, :]
    in_splits = in_rows[:, None] & (split < num_splits)
    split = split.to(tl.int64)
    lse = tl.load(lses_ptr[:, None] + split * stride_ln, mask=in_splits, other=float("-inf"))
    return split, in_splits, tl.exp2((lse - shift[:, None]) * LOG2E)


# --------------------------------------------------------------------------------------------------------------------
# Forward.


@triton.jit(do_not_specialize=[*SIZES, *STRIDES[:8]])
def _merge_attention_fwd_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, num_splits, num_rows, seqlen, num_heads, stride_on, stride_ob, stride_os, stride_oh,
    stride_ln, stride_lb, stride_lh, stride_ls, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse = m + log Σ exp(lse_n − m) and out = Σ exp(lse_n − m)·out_n / Σ exp(lse_n − m) of BLOCK_D columns of ROWS rows."""
    NUM_BLOCKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    block, start_d = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS * BLOCK_D
    row, batch, position, head, in_rows = rows_of_block(block, num_rows, seqlen, num_heads, ROWS)
    lses_ptr += batch * stride_lb + head * stride_lh + position * stride_ls
    shift, row_sum = read_lses(lses_ptr, num_splits, stride_ln, in_rows, ROWS)

    offs_d = start_d + tl.arange(0, BLOCK_D)
    in_cols = offs_d < HEAD_DIM
    outs_row = batch * stride_ob + position * stride_os + head * stride_oh
    acc = tl.zeros((ROWS, SPLITS, BLOCK_D), tl.float32)
    for start in range(0, num_splits, SPLITS):
        split, in_splits, weight = read_weights(lses_ptr, start, num_splits, stride_ln, shift, in_rows, SPLITS)
        at = (outs_row[:, None] + split * stride_on) // VECTOR * VECTOR  # what it is, and now the compiler knows
        mask = (weight != 0.0)[:, :, None] & in_cols[None, None, :]
        acc += weight[:, :, None] * tl.load(outs_ptr + at[:, :, None] + offs_d[None, None, :], mask=mask, other=0.0).to(tl.float32)
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    out = tl.sum(acc, 1) / row_sum[:, None]

    at = ((batch * seqlen + position) * num_heads + head) * HEAD_DIM
    mask = in_rows[:, None] & in_cols[None, :]
    tl.store(out_ptr + at[:, None] + offs_d[None, :], cast(out, out_ptr.dtype.element_ty), mask=mask)
    if start_d == 0:
        tl.store(lse_ptr + row, tl.where(empty, float("-inf"), shift + tl.log2(row_sum) * LN2), mask=in_rows)


# --------------------------------------------------------------------------------------------------------------------
# Backward.


@triton.jit
def dots_with_partials(
    dout_ptr, outs_ptr, dout_row, outs_row, visible, in_rows, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_n = dout·out_n of (ROWS, SPLITS) partials, 0 of those that are not visible."""
    dots = tl.zeros((ROWS, SPLITS), tl.float32)
    for start_d in range(0, HEAD_DIM, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        in_cols = offs_d < HEAD_DIM
        dout = tl.load(dout_ptr + dout_row[:, None] + offs_d[None, :], mask=in_rows[:, None] & in_cols[None, :], other=0.0)
        mask = visible[:, :, None] & in_cols[None, None, :]
        outs = tl.load(outs_ptr + outs_row[:, :, None] + offs_d[None, None, :], mask=mask, other=0.0)
        dots += tl.sum(dout.to(tl.float32)[:, None, :] * outs.to(tl.float32), 2)
    return dots


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _merge_attention_bwd_kernel(
    dout_ptr, dlse_ptr, outs_ptr, lses_ptr, douts_ptr, dlses_ptr, num_splits, num_rows, seqlen, num_heads, stride_on, stride_ob,
    stride_os, stride_oh, stride_ln, stride_lb, stride_lh, stride_ls, stride_dob, stride_dos, stride_doh, stride_dlb, stride_dlh,
    stride_dls, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dout_n = w_n·dout and dlse_n = w_n·(dlse + d_n − Σ w_m·d_m), d_n = dout·out_n, of all partials of ROWS rows."""
    row, batch, position, head, in_rows = rows_of_block(tl.program_id(0), num_rows, seqlen, num_heads, ROWS)
    lses_ptr += batch * stride_lb + head * stride_lh + position * stride_ls
    shift, row_sum = read_lses(lses_ptr, num_splits, stride_ln, in_rows, ROWS)
    scale = (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    outs_row = (batch * stride_ob + position * stride_os + head * stride_oh)[:, None]
    dout_row = (batch * stride_dob + position * stride_dos + head * stride_doh) // VECTOR * VECTOR  # as with outs' rows
    douts_row = (((batch * seqlen + position) * num_heads + head) * HEAD_DIM)[:, None]

    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_splits, SPLITS):
        split, _, weight = read_weights(lses_ptr, start, num_splits, stride_ln, shift, in_rows, SPLITS)
        at = (outs_row + split * stride_on) // VECTOR * VECTOR
        dots = dots_with_partials(dout_ptr, outs_ptr, dout_row, at, weight != 0.0, in_rows, HEAD_DIM, ROWS, SPLITS, BLOCK_D)
        total += tl.sum(weight * scale * dots, 1)
    bias = -total
    if dlse_ptr is not None:
        bias += tl.load(dlse_ptr + batch * stride_dlb + head * stride_dlh + position * stride_dls, mask=in_rows, other=0.0)

    for start in range(0, num_splits, SPLITS):
        split, in_splits, weight = read_weights(lses_ptr, start, num_splits, stride_ln, shift, in_rows, SPLITS)
        visible = weight != 0.0
        weight *= scale
        at = (outs_row + split * stride_on) // VECTOR * VECTOR
        dots = dots_with_partials(dout_ptr, outs_ptr, dout_row, at, visible, in_rows, HEAD_DIM, ROWS, SPLITS, BLOCK_D)
        dlses = tl.where(visible, weight * (dots + bias[:, None]), 0.0)
        tl.store(dlses_ptr + split * num_rows + row[:, None], dlses, mask=in_splits)
        at = douts_row + split * (num_rows.to(tl.int64) * HEAD_DIM)
        for start_d in range(0, HEAD_DIM, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            in_cols = offs_d < HEAD_DIM
            dout = tl.load(dout_ptr + dout_row[:, None] + offs_d[None, :], mask=in_rows[:, None] & in_cols[None, :], other=0.0)
            douts = tl.where(visible[:, :, None], weight[:, :, None] * dout.to(tl.float32)[:, None, :], 0.0)
            mask = in_splits[:, :, None] & in_cols[None, None, :]
            tl.store(douts_ptr + at[:, :, None] + offs_d[None, None, :], cast(douts, douts_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launchers.


@dataclass(frozen=True)
class Tile:
    """SPLITS partials of BLOCK_D columns of ROWS rows at once."""

    ROWS: int
    SPLITS: int
    BLOCK_D: int
    num_warps: int = 4

    def meta(self) -> dict[str, int]:
        """As launch arguments."""
        return dict(ROWS=self.ROWS, SPLITS=self.SPLITS, BLOCK_D=self.BLOCK_D, num_warps=self.num_warps)


FEW_ROWS, FEW_SPLITS = 1024, 4


def pick_tile(num_rows: int, num_splits: int, head_dim: int) -> Tile:
    """Static, 16 elements a thread. Of few rows in many parts, as split-KV decoding has them, a program takes one row, 64 parts and a
    128-byte line of fp32 columns, so that even 16 rows make programs for half a GPU and hundreds of parts take few round trips.
    Otherwise there are rows enough to hide those, and a program takes several."""
    if num_rows <= FEW_ROWS and num_splits > FEW_SPLITS:
        return Tile(1, 64, 32)
    block_d = _block_d(head_dim)
    return Tile(1024 // block_d, 2, block_d)


def pick_bwd_tile(head_dim: int, itemsize: int) -> Tile:
    """Static: 16 elements a thread, and of fp32, where those spill, 8."""
    block_d = _block_d(head_dim)
    return Tile(2048 // itemsize // block_d, 2, block_d)


def _block_d(head_dim: int) -> int:
    return min(64, max(16, triton.next_power_of_2(head_dim)))


def merge_attention_fwd(
    outs: torch.Tensor, lses: torch.Tensor, dtype: torch.dtype, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel over outs (N, B, S, H, D), or packed (N, T, H, D), of any strides, and lses (N, B, H, S) or (N, H, T)
    fp32 of any strides. Returns out (B, S, H, D) or (T, H, D) in `dtype` and lse (B, H, S) or (H, T), contiguous."""
    out = torch.empty(outs.shape[1:], dtype=dtype, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=outs.device)
    _launch(_merge_attention_fwd_kernel, tile, outs, lses, out_ptr=out, lse_ptr=lse)
    return out, lse


def merge_attention_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, outs: torch.Tensor, lses: torch.Tensor, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernel. dout and dlse have out's and lse's shapes and any strides; None is a dlse of zeros. Returns douts in
    outs' dtype and dlses, contiguous."""
    douts = torch.empty(outs.shape, dtype=outs.dtype, device=outs.device)
    dlses = torch.empty(lses.shape, dtype=torch.float32, device=outs.device)
    _launch(_merge_attention_bwd_kernel, tile, outs, lses, dout_ptr=dout, dlse_ptr=dlse, douts_ptr=douts, dlses_ptr=dlses)
    return douts, dlses


def _launch(kernel, tile: Tile | None, outs: torch.Tensor, lses: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Forward, or backward where there is a dout_ptr."""
    if outs.dim() == 4:  # packed is a batch of one
        outs, lses = outs[:, None], lses[:, None]
        tensors = {name: None if t is None else t[None] for name, t in tensors.items()}
    outs = with_contiguous_rows(outs)
    num_splits, batch, seqlen, num_heads, head_dim = outs.shape
    num_rows = batch * seqlen * num_heads
    strides = dict(zip(STRIDES, (*outs.stride()[:4], *lses.stride())))
    if "dout_ptr" in tensors:
        dout, dlse = tensors["dout_ptr"], tensors["dlse_ptr"] = with_contiguous_rows(tensors["dout_ptr"]), tensors["dlse_ptr"]
        strides |= dict(zip(STRIDES[8:], (*dout.stride()[:3], *((0, 0, 0) if dlse is None else dlse.stride()))))
        tile, num_blocks, vector = tile or pick_bwd_tile(head_dim, outs.element_size()), 1, vector_of(outs, dout)
    else:
        tile = tile or pick_tile(num_rows, num_splits, head_dim)
        num_blocks, vector = triton.cdiv(head_dim, tile.BLOCK_D), vector_of(outs)
    log.debug("merge_attention: %s", tile)
    check_grid("merge_attention", num_rows + tile.ROWS)  # rows, which the kernels count in 32 bits
    launch(
        kernel, check_grid("merge_attention", triton.cdiv(num_rows, tile.ROWS) * num_blocks), outs.device,
        outs_ptr=outs, lses_ptr=lses, **tensors, num_splits=num_splits, num_rows=num_rows, seqlen=seqlen, num_heads=num_heads, **strides,
        HEAD_DIM=head_dim, VECTOR=vector, **tile.meta(),
    )  # fmt: skip
