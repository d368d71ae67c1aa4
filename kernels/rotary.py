"""Rotary position embedding of queries and keys in one launch.

    y₁ = x₁∘cos − x₂∘sin        y₂ = x₂∘cos + x₁∘sin

in fp32, where (x₁, x₂) are the halves of a head's first ROTARY_DIM columns, or with INTERLEAVED its even and odd ones, and cos and
sin are the table row of the token's position; the other columns stay. A rotation by −angle undoes it, and is its backward: INVERSE.

A row is one head of one token, and a program takes ROWS of them, first q's, then k's, so that head counts choose no tile.
Floor: 2·(q.numel + k.numel)·itemsize bytes.
"""

import logging
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .launch import check_grid, launch
from .primitives import cast
from .row_tiles import RowConfig, pick_row_config
from .rows import vector_of

log = logging.getLogger("fastattn")


@triton.jit
def position_in_sequence(cu_seqlens_ptr, num_seqs, search_steps, token):
    """The position of (ROWS,) packed tokens in their sequences; −1 past the last one.

    By bisection for the last entry of cu_seqlens that is not past the token, among entries 0 to num_seqs whatever they hold.
    """
    low = token * 0
    high = low + num_seqs
    for _ in range(0, search_steps):
        middle = (low + high + 1) // 2
        begins = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return tl.where(low < num_seqs, token - tl.load(cu_seqlens_ptr + low), -1)


@triton.jit
def table_row(
    positions_ptr, cu_seqlens_ptr, batch, token, in_rows, table_len, num_seqs, search_steps, stride_positionsb, stride_positionss
):
    """(position, in_table): the table rows of (ROWS,) tokens as int64, and which tokens have one; the others get row 0."""
    if positions_ptr is not None:
        at = batch.to(tl.int64) * stride_positionsb + token.to(tl.int64) * stride_positionss
        position = tl.load(positions_ptr + at, mask=in_rows, other=0)
    elif cu_seqlens_ptr is not None:
        position = position_in_sequence(cu_seqlens_ptr, num_seqs, search_steps, token)
    else:
        position = token
    in_table = in_rows & (position >= 0) & (position < table_len)
    return tl.where(in_table, position, 0).to(tl.int64), in_table


@triton.jit(do_not_specialize=[
    "seqlen", "num_heads", "num_kv_heads", "q_rows", "k_rows", "q_programs", "table_len", "num_seqs", "search_steps",
    "stride_qb", "stride_qs", "stride_qh", "stride_kb", "stride_ks", "stride_kh", "stride_cosb", "stride_coss", "stride_sinb",
    "stride_sins", "stride_positionsb", "stride_positionss",
])  # fmt: skip
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, cu_seqlens_ptr, q_out_ptr, k_out_ptr, seqlen, num_heads, num_kv_heads, q_rows,
    k_rows, q_programs, table_len, num_seqs, search_steps, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_cosb, stride_coss, stride_sinb, stride_sins, stride_positionsb, stride_positionss, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, VECTOR: tl.constexpr, TABLE_VECTOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """y₁ = x₁∘cos − x₂∘sin and y₂ = x₂∘cos + x₁∘sin of ROWS rows of q or of k; a token without a table row stays as it is."""
    is_q = tl.program_id(0) < q_programs
    x_ptr = tl.where(is_q, q_ptr, k_ptr)
    y_ptr = tl.where(is_q, q_out_ptr, k_out_ptr)
    heads = tl.where(is_q, num_heads, num_kv_heads)
    row = (tl.program_id(0) - tl.where(is_q, 0, q_programs)) * ROWS + tl.arange(0, ROWS)
    in_rows = row < tl.where(is_q, q_rows, k_rows)
    row = tl.where(in_rows, row, 0)
    token, head = row // heads, row % heads
    batch, token = token // seqlen, token % seqlen
    x = batch.to(tl.int64) * tl.where(is_q, stride_qb, stride_kb) + token.to(tl.int64) * tl.where(is_q, stride_qs, stride_ks)
    x += head.to(tl.int64) * tl.where(is_q, stride_qh, stride_kh)
    x = (x // VECTOR * VECTOR)[:, None]  # what it is, and now the compiler knows
    y = (row.to(tl.int64) * HEAD_DIM)[:, None]

    half = tl.arange(0, BLOCK // 2)[None, :]
    in_half = in_rows[:, None] & (half < ROTARY_DIM // 2)
    if INTERLEAVED:
        cols = tl.arange(0, BLOCK)[None, :]
        in_cols = in_rows[:, None] & (cols < ROTARY_DIM)
        pairs = tl.load(x_ptr + x + cols, mask=in_cols, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(pairs, (ROWS, BLOCK // 2, 2)))
    else:
        x1 = tl.load(x_ptr + x + half, mask=in_half, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + x + ROTARY_DIM // 2 + half, mask=in_half, other=0.0).to(tl.float32)
    if BLOCK_REST > 0:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)[None, :]
        in_rest = in_rows[:, None] & (rest < HEAD_DIM)
        x_rest = tl.load(x_ptr + x + rest, mask=in_rest, other=0.0)

    position, in_table = table_row(
        positions_ptr, cu_seqlens_ptr, batch, token, in_rows, table_len, num_seqs, search_steps, stride_positionsb, stride_positionss
    )
    # As with x: multiples of TABLE_VECTOR anyway.
    cos_row = (batch.to(tl.int64) * stride_cosb + position * stride_coss) // TABLE_VECTOR * TABLE_VECTOR
    sin_row = (batch.to(tl.int64) * stride_sinb + position * stride_sins) // TABLE_VECTOR * TABLE_VECTOR
    in_table = in_table[:, None] & (half < ROTARY_DIM // 2)
    cos = tl.load(cos_ptr + cos_row[:, None] + half, mask=in_table, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_row[:, None] + half, mask=in_table, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    dtype = q_out_ptr.dtype.element_ty
    if INTERLEAVED:
        tl.store(y_ptr + y + cols, cast(tl.reshape(tl.join(y1, y2), (ROWS, BLOCK)), dtype), mask=in_cols)
    else:
        tl.store(y_ptr + y + half, cast(y1, dtype), mask=in_half)
        tl.store(y_ptr + y + ROTARY_DIM // 2 + half, cast(y2, dtype), mask=in_half)
    if BLOCK_REST > 0:
        tl.store(y_ptr + y + rest, x_rest, mask=in_rest)


# --------------------------------------------------------------------------------------------------------------------
# Launcher.


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, interleaved: bool, inverse: bool, config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the kernel over q (B, S, H, D) and k (B, S, H_kv, D), or packed (T, …), of one dtype and any strides.

    cos and sin are (S_max, R/2), (1, S_max, R/2) or (B, S_max, R/2). positions (B, S) or (1, S), packed (T,), or cu_seqlens
    (N + 1,) int32 of N packed sequences, or neither. Returns q and k rotated, contiguous.
    """
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    if q.dim() == 3:
        q, k, positions = q[None], k[None], None if positions is None else positions[None]
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    q, k, cos, sin = (t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in (q, k, cos, sin))
    batch, seqlen, num_heads, head_dim = q.shape
    num_kv_heads, rotary_dim = k.shape[2], 2 * cos.shape[-1]
    q_rows, k_rows = batch * seqlen * num_heads, batch * seqlen * num_kv_heads
    config = config or rotary_config(head_dim, rotary_dim, q.element_size())
    check_grid("apply_rotary", max(q_rows, k_rows) + config.ROWS)  # rows, which the kernel counts in 32 bits
    log.debug("rotary: %s", config)
    q_programs = triton.cdiv(q_rows, config.ROWS)
    num_seqs = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    strides = {f"stride_{name}{dim}": t.stride(i) for name, t in (("q", q), ("k", k)) for i, dim in enumerate("bsh")}
    for name, t in (("cos", cos), ("sin", sin), ("positions", positions)):  # of a batch of one, all take the same
        shared = t is None or t.shape[0] == 1
        strides |= {f"stride_{name}b": 0 if shared else t.stride(0), f"stride_{name}s": 0 if t is None else t.stride(1)}
    launch(
        _rotary_kernel, (q_programs + triton.cdiv(k_rows, config.ROWS),), q.device,
        q_ptr=q, k_ptr=k, cos_ptr=cos, sin_ptr=sin, positions_ptr=positions,
        cu_seqlens_ptr=None if cu_seqlens is None else cu_seqlens.contiguous(), q_out_ptr=q_out, k_out_ptr=k_out,
        seqlen=seqlen, num_heads=num_heads, num_kv_heads=num_kv_heads, q_rows=q_rows, k_rows=k_rows, q_programs=q_programs,
        table_len=cos.shape[1], num_seqs=num_seqs, search_steps=num_seqs.bit_length(), **strides,
        INTERLEAVED=interleaved, INVERSE=inverse, HEAD_DIM=head_dim, ROTARY_DIM=rotary_dim,
        VECTOR=vector_of(q, k), TABLE_VECTOR=vector_of(cos, sin), **config.meta(),
        BLOCK_REST=triton.next_power_of_2(head_dim - rotary_dim) if rotary_dim < head_dim else 0,
    )  # fmt: skip
    return q_out, k_out


def rotary_config(head_dim: int, rotary_dim: int, itemsize: int) -> RowConfig:
    """The head dim's tile, cut to the columns that are rotated: as many rows, and as many fewer warps, so that each thread still has
    as many columns."""
    config = pick_row_config("rotary", head_dim, itemsize)
    block = min(config.BLOCK, max(2, triton.next_power_of_2(rotary_dim)))
    return replace(config, BLOCK=block, num_warps=max(1, config.num_warps * block // config.BLOCK))
