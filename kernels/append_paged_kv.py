"""New keys and values into a paged cache, in one launch: keys rotated on the way if tables are given, both quantised if the cache is.

    cache[page_table[b, p // page_size], p % page_size] = quantised(rotated(x_i, p) / scale),    p = cache_seqlens[b] + i

A row is one head of one token, and a program takes ROWS of them, keys and values alike, so that their place in the cache is looked up
once. Whatever the index tensors hold, a slot outside the page table or the cache is not written.
Floor: (k.numel + v.numel)·(itemsize of k + itemsize of the cache) bytes.
"""

import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import check_grid, launch
from .primitives import cast
from .rows import vector_of

log = logging.getLogger("fastattn")


@triton.jit
def sequence_of_token(cu_seqlens_ptr, num_seqs, search_steps, token):
    """(sequence, index) of (ROWS,) packed tokens; the index is −1 past the last sequence.

    By bisection for the last entry of cu_seqlens that is not past the token, among entries 0 to num_seqs whatever they hold.
    """
    low = token * 0
    high = low + num_seqs
    for _ in range(0, search_steps):
        middle = (low + high + 1) // 2
        begins = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    inside = low < num_seqs
    start = tl.maximum(tl.load(cu_seqlens_ptr + low), 0)
    return tl.where(inside, low, 0), tl.where(inside, token - start, -1)


@triton.jit
def slot_of_token(
    page_table_ptr, cache_seqlens_ptr, batch, index, in_rows, num_pages, page_size, capacity, stride_page_table
):
    """(position, page, slot, is_slot) of the new tokens: where in their sequence they are, which page and which of its slots that is, and
    whether the cache has it; those without one get page 0."""
    position = tl.load(cache_seqlens_ptr + batch, mask=in_rows, other=0).to(tl.int64) + index
    is_slot = in_rows & (index >= 0) & (position >= 0) & (position < capacity)
    position = tl.where(is_slot, position, 0).to(tl.int32)  # capacity fits
    entry = batch.to(tl.int64) * stride_page_table + position // page_size
    page = tl.load(page_table_ptr + entry, mask=is_slot, other=-1)
    is_slot = is_slot & (page >= 0) & (page < num_pages)
    return position, tl.where(is_slot, page, 0).to(tl.int64), (position % page_size).to(tl.int64), is_slot


@triton.jit
def round_to_even(x):
    """fp32 rounded to an integer, |x| ≤ 2^22: beyond 1.5·2^23 floats are the integers, and the sum is rounded to one."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def float8_e4m3fn(x):
    """fp32 to the bits of float8_e4m3fn, rounded to nearest even, saturated to ±448; by integer arithmetic, as sm_80 converts none.

    Dropping 20 of 23 mantissa bits rounds a normal number. Below 2^-6 all are multiples of 2^-9, the spacing of floats from 2^14 on.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    size_bits = size.to(tl.int32, bitcast=True)
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    tiny = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, tiny, normal) | ((bits >> 24) & 0x80)
    return tl.where(x == x, code, 0x7F).to(tl.uint8)


@triton.jit
def store(cache_ptr, at, x, scale, mask):
    """x / scale in the cache's dtype, of which uint8 stands for float8_e4m3fn. A NaN is an int8 of 0."""
    if scale is not None:
        x = tl.div_rn(x, scale + tl.zeros(x.shape, tl.float32))
    if cache_ptr.dtype.element_ty == tl.int8:
        x = round_to_even(tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -128.0), 127.0)).to(tl.int8)
    elif cache_ptr.dtype.element_ty == tl.uint8:
        x = float8_e4m3fn(x)
    else:
        x = cast(x, cache_ptr.dtype.element_ty)
    tl.store(cache_ptr + at, x, mask=mask)


@triton.jit
def append_rows(x_ptr, cache_ptr, x_row, cache_row, scale, mask, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Columns FIRST to LAST of (ROWS, 1) rows as they are."""
    cols = FIRST + tl.arange(0, BLOCK)[None, :]
    mask = mask & (cols < LAST)
    store(cache_ptr, cache_row + cols, tl.load(x_ptr + x_row + cols, mask=mask, other=0.0).to(tl.float32), scale, mask)


@triton.jit
def append_rotated(
    x_ptr, cos_ptr, sin_ptr, cache_ptr, x_row, cos_row, sin_row, cache_row, scale, mask, in_table, INTERLEAVED: tl.constexpr,
    ROTARY_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns 0 to ROTARY_DIM of (ROWS, 1) rows, turned by their table rows' angles; a token without a table row stays as it is."""
    half = tl.arange(0, BLOCK // 2)[None, :]
    in_half = half < ROTARY_DIM // 2
    cos = tl.load(cos_ptr + cos_row + half, mask=in_table & in_half, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + sin_row + half, mask=in_table & in_half, other=0.0).to(tl.float32)
    if INTERLEAVED:
        cols = tl.arange(0, BLOCK)[None, :]
        mask = mask & (cols < ROTARY_DIM)
        pairs = tl.load(x_ptr + x_row + cols, mask=mask, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(pairs, (pairs.shape[0], BLOCK // 2, 2)))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), pairs.shape)
        store(cache_ptr, cache_row + cols, y, scale, mask)
    else:
        mask = mask & in_half
        x1 = tl.load(x_ptr + x_row + half, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + x_row + ROTARY_DIM // 2 + half, mask=mask, other=0.0).to(tl.float32)
        store(cache_ptr, cache_row + half, x1 * cos - x2 * sin, scale, mask)
        store(cache_ptr, cache_row + ROTARY_DIM // 2 + half, x2 * cos + x1 * sin, scale, mask)


@triton.jit(do_not_specialize=[
    "num_rows", "seqlen", "num_heads", "num_seqs", "search_steps", "table_len", "num_pages", "page_size", "capacity", "stride_kb",
    "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh", "stride_kcp", "stride_kcs", "stride_kch", "stride_vcp", "stride_vcs",
    "stride_vch", "stride_page_table", "stride_coss", "stride_sins",
])  # fmt: skip
def _append_paged_kv_kernel(
    k_ptr, v_ptr, page_table_ptr, cache_seqlens_ptr, cu_seqlens_ptr, cos_ptr, sin_ptr, k_scale_ptr, v_scale_ptr, k_cache_ptr, v_cache_ptr,
    num_rows, seqlen, num_heads, num_seqs, search_steps, table_len, num_pages, page_size, capacity, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_kcp, stride_kcs, stride_kch, stride_vcp, stride_vcs, stride_vch, stride_page_table, stride_coss,
    stride_sins, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, ROTARY_DIM: tl.constexpr,
    VECTOR: tl.constexpr, CACHE_VECTOR: tl.constexpr, TABLE_VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """ROWS rows of k and of v into their slots."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    row = tl.where(in_rows, row, 0)
    token, head = row // num_heads, row % num_heads
    if cu_seqlens_ptr is None:
        batch, index = token // seqlen, token % seqlen
        x_batch, x_token = batch.to(tl.int64), index.to(tl.int64)
    else:
        batch, index = sequence_of_token(cu_seqlens_ptr, num_seqs, search_steps, token)
        in_rows = in_rows & (index >= 0)  # of no sequences at all, there is no length to read
        x_batch, x_token = token.to(tl.int64) * 0, token.to(tl.int64)
    position, page, slot, is_slot = slot_of_token(
        page_table_ptr, cache_seqlens_ptr, batch, index, in_rows, num_pages, page_size, capacity, stride_page_table
    )
    x_head = head.to(tl.int64)
    mask = is_slot[:, None]

    # Multiples of the vectors anyway, and now the compiler knows.
    k_row = ((x_batch * stride_kb + x_token * stride_ks + x_head * stride_kh) // VECTOR * VECTOR)[:, None]
    k_cache_row = ((page * stride_kcp + slot * stride_kcs + x_head * stride_kch) // CACHE_VECTOR * CACHE_VECTOR)[:, None]
    k_scale, v_scale = k_scale_ptr, v_scale_ptr  # None, or each row's
    if k_scale_ptr is not None:
        k_scale = tl.load(k_scale_ptr + head, mask=in_rows, other=1.0)[:, None]
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr + head, mask=in_rows, other=1.0)[:, None]
    if ROTARY_DIM > 0:
        in_table = (is_slot & (position < table_len))[:, None]
        cos_row = (position.to(tl.int64) * stride_coss // TABLE_VECTOR * TABLE_VECTOR)[:, None]
        sin_row = (position.to(tl.int64) * stride_sins // TABLE_VECTOR * TABLE_VECTOR)[:, None]
        append_rotated(
            k_ptr, cos_ptr, sin_ptr, k_cache_ptr, k_row, cos_row, sin_row, k_cache_row, k_scale, mask, in_table, INTERLEAVED,
            ROTARY_DIM, BLOCK_R,
        )  # fmt: skip
    if BLOCK_REST > 0:
        append_rows(k_ptr, k_cache_ptr, k_row, k_cache_row, k_scale, mask, ROTARY_DIM, HEAD_DIM, BLOCK_REST)
    v_row = ((x_batch * stride_vb + x_token * stride_vs + x_head * stride_vh) // VECTOR * VECTOR)[:, None]
    v_cache_row = ((page * stride_vcp + slot * stride_vcs + x_head * stride_vch) // CACHE_VECTOR * CACHE_VECTOR)[:, None]
    append_rows(v_ptr, v_cache_ptr, v_row, v_cache_row, v_scale, mask, 0, HEAD_DIM_V, BLOCK_DV)


# --------------------------------------------------------------------------------------------------------------------
# Launcher.


@dataclass(frozen=True)
class Tile:
    """ROWS rows of BLOCK_R rotated columns of k, BLOCK_REST others, and BLOCK_DV columns of v."""

    ROWS: int
    BLOCK_R: int
    BLOCK_REST: int
    BLOCK_DV: int
    num_warps: int = 2

    def meta(self) -> dict[str, int]:
        """As launch arguments."""
        names = ("ROWS", "BLOCK_R", "BLOCK_REST", "BLOCK_DV", "num_warps")
        return {name: getattr(self, name) for name in names}


def pick_tile(head_dim: int, head_dim_v: int, rotary_dim: int) -> Tile:
    """Static. 1024 elements of k and of v a program, 16 of each a thread, so that a half of a row to rotate is a 128-bit access; two
    warps, so that a decode step's few rows make many programs."""
    rotated, rest = (triton.next_power_of_2(dim) if dim else 0 for dim in (rotary_dim, head_dim - rotary_dim))
    block_dv = triton.next_power_of_2(head_dim_v)
    return Tile(max(1, min(64, 1024 // max(rotated, rest, block_dv))), rotated, rest, block_dv)


def append_paged_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor, cache_seqlens: torch.Tensor,
    cu_seqlens: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None, interleaved: bool, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Launch the kernel over k (B, S_new, H_kv, D) and v (B, S_new, H_kv, D_v), or packed (T, …) with cu_seqlens (B + 1,) int32, of one
    dtype and any strides, into caches (num_pages, page_size, H_kv, D or D_v) of one dtype with a contiguous last dim.

    page_table (B, max_pages) and cache_seqlens (B,) int32; cos and sin (S_max, R/2), or None for no rotation; scales (H_kv,) fp32.
    """
    if k.dim() == 3:
        k, v = k[None], v[None]
    k, v, page_table = (t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in (k, v, page_table))
    if cos is not None:
        cos, sin = (t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in (cos, sin))
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    batch, seqlen, num_heads, head_dim = k.shape
    num_pages, page_size = k_cache.shape[:2]
    num_rows, head_dim_v, rotary_dim = batch * seqlen * num_heads, v.shape[-1], 0 if cos is None else 2 * cos.shape[-1]
    num_seqs = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tile = tile or pick_tile(head_dim, head_dim_v, rotary_dim)
    check_grid("append_paged_kv", num_rows + tile.ROWS)  # rows, which the kernel counts in 32 bits
    log.debug("append_paged_kv: %s", tile)
    strides = {f"stride_{name}{dim}": t.stride(i) for name, t in (("k", k), ("v", v)) for i, dim in enumerate("bsh")}
    strides |= {f"stride_{name}{dim}": t.stride(i) for name, t in (("kc", k_cache), ("vc", v_cache)) for i, dim in enumerate("psh")}
    strides |= {f"stride_{name}s": 0 if t is None else t.stride(0) for name, t in (("cos", cos), ("sin", sin))}
    launch(
        _append_paged_kv_kernel, check_grid("append_paged_kv", triton.cdiv(num_rows, tile.ROWS)), k.device,
        k_ptr=k, v_ptr=v, page_table_ptr=page_table, cache_seqlens_ptr=cache_seqlens.contiguous(),
        cu_seqlens_ptr=None if cu_seqlens is None else cu_seqlens.contiguous(), cos_ptr=cos, sin_ptr=sin,
        k_scale_ptr=None if k_scale is None else k_scale.contiguous(), v_scale_ptr=None if v_scale is None else v_scale.contiguous(),
        k_cache_ptr=k_cache, v_cache_ptr=v_cache, num_rows=num_rows, seqlen=seqlen, num_heads=num_heads, num_seqs=num_seqs,
        search_steps=num_seqs.bit_length(), table_len=0 if cos is None else cos.shape[0], num_pages=num_pages, page_size=page_size,
        capacity=min(page_table.shape[1] * page_size, 2**31 - 1), **strides, stride_page_table=page_table.stride(0),
        INTERLEAVED=interleaved, HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, ROTARY_DIM=rotary_dim, VECTOR=vector_of(k, v),
        CACHE_VECTOR=vector_of(k_cache, v_cache), TABLE_VECTOR=1 if cos is None else vector_of(cos, sin), **tile.meta(),
    )  # fmt: skip
