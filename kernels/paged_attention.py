"""Attention of a few new queries a sequence over keys and values that lie in pages: decode, speculation, chunked prefill.

The online softmax of `kernels/attention.py`. What differs is where keys are and how the work is cut:

    key n of sequence b is row n mod page_size of page page_table[b, n // page_size]
    row r of a tile is query r // G of head r mod G of a group: the G query heads that share keys read them once
    split s of a tile walks its s-th share of the tile's key blocks; `merge_attention` puts the shares together

A block of keys that lies in one page takes one page id, any other an id a key. Either way the ids of a block are loaded one
iteration ahead: an id loaded in the iteration that needs it would cost the pipeline one of its stages.
"""

import logging

import torch
import triton
import triton.language as tl

from .attention import score
from .blocks import sequence, visible, visible_blocks
from .launch import check_grid, interpreted, launch, num_multiprocessors, precision_of, target_of
from .merge_attention import merge_attention_fwd, pick_tile
from .paged_tiles import LARGEST, PagedConfig, pick_paged_config, pick_splits
from .primitives import INTERPRETED, LN2, LOG2E, cast, dot

log = logging.getLogger("fastattn")

LENGTHS = [
    "seqlen_q", "total_q", "num_pages", "capacity", "num_kv_heads", "num_blocks", "num_splits", "window_left",
    "window_right", "stride_table", "stride_slopes_b",
]  # fmt: skip
MAX_KEYS = 2**30  # of one sequence, so that a key's place and a bound of the window add up within int32


@triton.jit
def _page_ids(table, start_n, first_key, stop_key, PAGE_SIZE: tl.constexpr, GATHER: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of keys start_n … start_n + BLOCK_N: an id a key if GATHER, else their one id. −1 for keys outside [first_key, stop_key),
    whose entries are not read: they may hold anything."""
    if GATHER:
        n = start_n + tl.arange(0, BLOCK_N)
        return tl.load(table + n // PAGE_SIZE, mask=(n >= first_key) & (n < stop_key), other=-1)
    else:
        return tl.load(table + (start_n // PAGE_SIZE if PAGE_SIZE > 0 else 0), mask=start_n < stop_key, other=-1)


@triton.jit
def _load_rows(base, pages, n, inside, stride_page, stride_row, NUM_COLS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Rows n of a head's keys or values from their pages, zero where not inside."""
    row = n % PAGE_SIZE if PAGE_SIZE > 0 else n
    offset = pages.to(tl.int64) * stride_page + row.to(tl.int64) * stride_row
    cols = tl.arange(0, BLOCK_COLS)
    return tl.load(base + offset[:, None] + cols[None, :], mask=inside[:, None] & (cols < NUM_COLS)[None, :], other=0)


@triton.jit
def _dequantize(x, dtype: tl.constexpr, E4M3: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Cached values in the queries' dtype, scale apart. float8_e4m3fn arrives as its bytes.

    Below sm_89 no instruction converts it: its bits one exponent range up are float16's, 2^8 too small, but for NaN.
    """
    if not E4M3:
        return cast(x.to(tl.float32), dtype) if INTERPRETED else x.to(dtype)
    elif NATIVE_E4M3:
        return x.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return cast(tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0), dtype)


@triton.jit
def _attend_pages(
    acc, row_max, row_sum, q, k_base, v_base, table, first, stop, i, first_key, len_q, len_k, num_pages, leftpad, window_left,
    window_right, stride_kp, stride_ks, stride_vp, stride_vs, slope, qk_scale, softcap, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr, GATHER: tl.constexpr, E4M3: tl.constexpr, NATIVE_E4M3: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Walk key blocks first, …, stop − 1 of one sequence. Only MASKED ones may be cut by the mask."""
    first_n, stop_n = first_key + leftpad, len_k + leftpad
    pages = _page_ids(table, first * BLOCK_N + leftpad, first_n, stop_n, PAGE_SIZE, GATHER, BLOCK_N)
    for block in tl.range(first, stop):
        start_n = block * BLOCK_N
        j = start_n + tl.arange(0, BLOCK_N)
        inside = (j >= first_key) & (j < tl.where((pages >= 0) & (pages < num_pages), len_k, 0))
        k = _load_rows(k_base, pages, j + leftpad, inside, stride_kp, stride_ks, HEAD_DIM, PAGE_SIZE, BLOCK_D)
        v = _load_rows(v_base, pages, j + leftpad, inside, stride_vp, stride_vs, HEAD_DIM_V, PAGE_SIZE, BLOCK_DV)
        pages = _page_ids(table, start_n + BLOCK_N + leftpad, first_n, stop_n, PAGE_SIZE, GATHER, BLOCK_N)
        k = _dequantize(k, q.dtype, E4M3, NATIVE_E4M3)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        s, _ = score(s, i[:, None], j[None, :], len_q, len_k, None, 0, 0, slope, qk_scale, softcap, HAS_SLOPES, HAS_SOFTCAP)
        seen = inside[None, :]
        if MASKED:
            seen = seen & visible(i[:, None], j[None, :], len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        s = tl.where(seen, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row without a visible key yet: avoid inf − inf
        weights = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.sum(weights, 1)
        row_max = new_max
        acc = acc * alpha[:, None]
        acc = dot(cast(weights, q.dtype), _dequantize(v, q.dtype, E4M3, NATIVE_E4M3), acc, PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=LENGTHS)
def _paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, seqlens_k_ptr, cu_seqlens_q_ptr, leftpad_ptr, slopes_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr,
    out_ptr, partial_ptr, lse_ptr,
    seqlen_q, total_q, num_pages, capacity, num_kv_heads, num_blocks, num_splits, window_left, window_right,
    stride_qb, stride_qs, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_table, stride_slopes_b,
    qk_scale, softcap,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP_SIZE: tl.constexpr, PAGE_SIZE: tl.constexpr, GATHER: tl.constexpr,
    E4M3: tl.constexpr, NATIVE_E4M3: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One split of one tile of BLOCK_M rows of one group of heads; the formulas are at the top of this file."""
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    program = tl.program_id(0)
    start_m = (num_blocks - 1 - program % num_blocks) * BLOCK_M  # a prompt's last rows see the most keys: longest first
    split = program // num_blocks % num_splits
    kv_head = program // num_blocks // num_splits % num_kv_heads
    batch = program // num_blocks // num_splits // num_kv_heads
    start_q, len_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, total_q)
    if start_m >= len_q * GROUP_SIZE:
        return

    leftpad = 0
    if leftpad_ptr is not None:
        leftpad = tl.minimum(tl.maximum(tl.load(leftpad_ptr + batch), 0), capacity)
    len_k = tl.minimum(tl.maximum(tl.load(seqlens_k_ptr + batch) - leftpad, 0), capacity - leftpad)

    row = start_m + tl.arange(0, BLOCK_M)
    i = row // GROUP_SIZE
    head = kv_head * GROUP_SIZE + row % GROUP_SIZE
    in_rows = i < len_q
    q_base = q_ptr + batch.to(tl.int64) * stride_qb + start_q.to(tl.int64) * stride_qs
    q_rows = i.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh
    cols = tl.arange(0, BLOCK_D)
    q = tl.load(q_base + q_rows[:, None] + cols[None, :], mask=in_rows[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)
    slope = 0.0
    if HAS_SLOPES:
        slopes = slopes_ptr + batch.to(tl.int64) * stride_slopes_b
        slope = tl.load(slopes + head, mask=in_rows, other=0.0).to(tl.float32)[:, None] * LOG2E
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr + kv_head).to(tl.float32)

    # How many queries a tile reaches over: one more than it holds where it ends within a group.
    BLOCK_I: tl.constexpr = BLOCK_M // GROUP_SIZE if BLOCK_M % GROUP_SIZE == 0 else (BLOCK_M - 2 + GROUP_SIZE) // GROUP_SIZE + 1
    start_i = start_m // GROUP_SIZE
    begin, full_begin, full_end, end = visible_blocks(
        start_i, len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_I, BLOCK_N
    )
    first_key = tl.maximum(start_i + len_k - len_q - window_left, 0) if HAS_LEFT else 0
    share = tl.cdiv(end - begin, num_splits)
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    table = table_ptr + batch.to(tl.int64) * stride_table
    k_base = k_ptr + kv_head.to(tl.int64) * stride_kh
    v_base = v_ptr + kv_head.to(tl.int64) * stride_vh
    # A small tile masks every block: its loads take longer than that, and one loop has one ramp. A large one masks only those cut.
    ONE_LOOP: tl.constexpr = BLOCK_M <= 16
    for stage in tl.static_range(3):
        if ONE_LOOP:
            first, stop = begin, end
        elif stage == 0:  # blocks cut by the left edge of the window
            first, stop = begin, full_begin
        elif stage == 1:  # uncut blocks
            first, stop = full_begin, full_end
        else:  # blocks cut by the right edge of the mask, or by the end
            first, stop = full_end, end
        if (stage == 2 or not ONE_LOOP) and (stage != 0 or HAS_LEFT):
            acc, row_max, row_sum = _attend_pages(
                acc, row_max, row_sum, q, k_base, v_base, table, first, stop, i, first_key, len_q, len_k, num_pages, leftpad,
                window_left, window_right, stride_kp, stride_ks, stride_vp, stride_vs, slope, qk_scale, softcap, HEAD_DIM,
                HEAD_DIM_V, PAGE_SIZE, GATHER, E4M3, NATIVE_E4M3, HAS_LEFT, HAS_RIGHT, HAS_SLOPES, HAS_SOFTCAP, PRECISION,
                stage != 1, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    acc = tl.where(row_sum[:, None] == 0.0, 0.0, acc)  # no visible key: 0, though 0·NaN came out of P·V
    if sinks_ptr is not None:  # one split's, so that the merged result has it once
        sink = tl.load(sinks_ptr + head, mask=i < tl.where(split == 0, len_q, 0), other=float("-inf")).to(tl.float32) * LOG2E
        new_max = tl.maximum(row_max, sink)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.exp2(sink - shift)
        acc = acc * alpha[:, None]
        row_max = new_max
    empty = row_sum == 0.0  # no visible key and no sink: lse −inf
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), LN2 * (row_max + tl.log2(row_sum)))
    value_scale = tl.load(v_scale_ptr + kv_head).to(tl.float32) if v_scale_ptr is not None else 1.0
    acc = acc * (value_scale / row_sum)[:, None]

    num_heads = num_kv_heads * GROUP_SIZE
    token = start_q.to(tl.int64) + i
    if cu_seqlens_q_ptr is None:
        token += batch.to(tl.int64) * seqlen_q
        lse_row = (batch.to(tl.int64) * num_heads + head) * seqlen_q + i
    else:
        lse_row = head.to(tl.int64) * total_q + token
    cols_v = tl.arange(0, BLOCK_DV)
    mask = in_rows[:, None] & (cols_v < HEAD_DIM_V)[None, :]
    offsets = ((token * num_heads + head) * HEAD_DIM_V)[:, None] + cols_v[None, :]
    num_rows = tl.cast(total_q, tl.int64) * num_heads
    if num_splits == 1:  # not compiled in: one variant serves both
        tl.store(out_ptr + offsets, cast(acc, out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + split * num_rows * HEAD_DIM_V + offsets, acc, mask=mask)
    tl.store(lse_ptr + split * num_rows + lse_row, lse, mask=in_rows)


def paged_attention(
    q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, leftpad, max_seqlen_q,
    window_left, window_right, softmax_scale, softcap, num_splits, config: PagedConfig | None = None,
):  # fmt: skip
    """Launch the kernel, and the merge of its splits; the arguments are the op's. Returns (out, lse).

    q (B, S_q, H, D) or packed (T, H, D); caches (num_pages, page_size, H_kv, D or D_v); last dims are contiguous.
    """
    packed = cu_seqlens_q is not None
    (num_heads, head_dim), (num_kv_heads, head_dim_v) = q.shape[-2:], v_cache.shape[-2:]
    num_pages, page_size = k_cache.shape[:2]
    batch, max_pages = page_table.shape
    tokens = q.shape[0] if packed else batch * max_seqlen_q
    if packed:  # where the caller's is any upper bound
        max_seqlen_q = min(max_seqlen_q, tokens)
    group = num_heads // max(num_kv_heads, 1)
    target = target_of(q)
    if config is None:
        # A fixed split promises a sequence the same bits in any company: packed, that may have more queries than it has itself.
        rows = LARGEST if packed and num_splits > 0 else group * max_seqlen_q
        itemsizes = 2 if interpreted() else q.element_size(), k_cache.element_size()
        config = pick_paged_config(*target, max(head_dim, head_dim_v), *itemsizes, rows)
    capacity = min(max_pages * page_size, MAX_KEYS)
    one_page = max_pages == 1
    gather = not one_page and (page_size % config.BLOCK_N != 0 or leftpad is not None)
    num_blocks = triton.cdiv(group * max_seqlen_q, config.BLOCK_M)
    programs = num_blocks * batch * num_kv_heads
    merge_tile = pick_tile(0, num_splits, head_dim_v) if num_splits > 0 else None  # for a fixed split by no count of rows either
    if num_splits == 0:
        slots = num_multiprocessors(q.device) * config.resident
        num_splits = pick_splits(programs, slots, triton.cdiv(capacity, config.BLOCK_N))
    check_grid("paged_attention", group * max_seqlen_q + config.BLOCK_M)  # rows, which the kernel counts in 32 bits
    grid = check_grid("paged_attention", programs * num_splits)
    log.debug("paged_attention: %s, %d splits", config, num_splits)

    out_shape, lse_shape = (*q.shape[:-1], head_dim_v), (num_heads, tokens) if packed else (batch, num_heads, max_seqlen_q)
    # The kernel stores through one of out and partial, by num_splits; both are always given, so that one variant of it serves both.
    if num_splits == 1:
        out, lse = _new(packed, out_shape, 0.0, q.dtype, q.device), _new(packed, lse_shape, float("-inf"), torch.float32, q.device)
        partial = lse
    else:
        partial = torch.empty((num_splits, *out_shape), dtype=torch.float32, device=q.device)
        lse = _new(packed, (num_splits, *lse_shape), float("-inf"), torch.float32, q.device)
        out = q
    launch(
        _paged_attention_kernel, grid, q.device,
        q_ptr=q, k_ptr=_as_bytes(k_cache), v_ptr=_as_bytes(v_cache), table_ptr=page_table, seqlens_k_ptr=seqlens_k,
        cu_seqlens_q_ptr=cu_seqlens_q, leftpad_ptr=leftpad, slopes_ptr=alibi_slopes, sinks_ptr=sinks, k_scale_ptr=k_scale,
        v_scale_ptr=v_scale, out_ptr=out, partial_ptr=partial, lse_ptr=lse,
        seqlen_q=max_seqlen_q, total_q=tokens, num_pages=num_pages, capacity=capacity,
        num_kv_heads=num_kv_heads, num_blocks=num_blocks, num_splits=num_splits,
        window_left=0 if window_left is None else min(window_left, capacity),  # bounds that reach all keys; int32 holds every sum
        window_right=0 if window_right is None else min(window_right, max_seqlen_q),
        stride_qb=0 if packed else q.stride(0), stride_qs=q.stride(-3), stride_qh=q.stride(-2),
        **dict(zip(("stride_kp", "stride_ks", "stride_kh"), k_cache.stride())),
        **dict(zip(("stride_vp", "stride_vs", "stride_vh"), v_cache.stride())),
        stride_table=page_table.stride(0),
        stride_slopes_b=alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        qk_scale=softmax_scale * LOG2E.value, softcap=softcap,
        HEAD_DIM=head_dim, HEAD_DIM_V=head_dim_v, GROUP_SIZE=group, PAGE_SIZE=0 if one_page else page_size, GATHER=gather,
        E4M3=k_cache.dtype == torch.float8_e4m3fn, NATIVE_E4M3=target.capability >= (8, 9) and not interpreted(),
        HAS_LEFT=window_left is not None, HAS_RIGHT=window_right is not None, HAS_SOFTCAP=softcap > 0.0,
        PRECISION=precision_of(q.dtype), BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_DV=max(16, triton.next_power_of_2(head_dim_v)),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return (out, lse) if num_splits == 1 else merge_attention_fwd(partial, lse, q.dtype, merge_tile)


def _new(packed: bool, shape: tuple[int, ...], fill: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An output. Packed tensors may have rows that belong to no sequence, which no program writes: those keep `fill`."""
    return torch.full(shape, fill, dtype=dtype, device=device) if packed else torch.empty(shape, dtype=dtype, device=device)


def _as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
