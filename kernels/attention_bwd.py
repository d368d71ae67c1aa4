"""Attention backward: recompute P from the saved log-sum-exp, one pass for dK and dV, one for dQ, one for dbias. No
atomics.

With s the scores in natural units, p = exp(s − lse), keep the dropout mask and r = 1/(1 − dropout_p):

    dv = (p∘keep·r)ᵀ·dout              dp = (dout·vᵀ)∘keep·r
    delta = rowsum(dout∘out) − dlse    ds = p∘(dp − delta)               (arXiv 2205.14135, appendix B; dlse enters through delta)
    dbias = ds                         ds_raw = ds·(1 − tanh²) under a softcap
    dq = softmax_scale·ds_raw·k        dk = softmax_scale·ds_rawᵀ·q      dsink = −Σ exp(sink − lse)·delta

dsink and a broadcast dbias sum delta over thousands of entries, where the rounding of the stored `out` would show: for
them the dQ pass recomputes rowsum(dout∘out) in fp32, as rowsum(p∘dp).

dK and dV are computed with keys as rows, Sᵀ = K·Qᵀ, so that P and dS are left operands of their matmuls and stay in
registers.
"""

import logging

import torch
import triton
import triton.language as tl

from .attention import LENGTHS, Problem, score, slope_of, tiling
from .blocks import sequence, visible, visible_blocks
from .launch import check_grid, launch
from .primitives import LOG2E, cast, dot, dropout_keep, load_tile, store_tile, tile_source
from .tiles import Config

log = logging.getLogger("fastattn")


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_blocks", "stride_dlse_b", "stride_dlse_h", "stride_dlse_s"])
def _attention_bwd_delta_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr, num_rows, num_heads, num_blocks,
    stride_dob, stride_dos, stride_doh, stride_dod, stride_dlse_b, stride_dlse_h, stride_dlse_s,
    HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout∘out) − dlse, and lse in log2 units with +inf for empty rows, so that exp2(s − lse2) is 0
    there."""
    program = tl.program_id(0)
    rows = (program % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (program // num_blocks // num_heads).to(tl.int64)
    head = (program // num_blocks % num_heads).to(tl.int64)
    cols = tl.arange(0, BLOCK_DV)
    mask = (rows < num_rows)[:, None] & (cols < HEAD_DIM_V)[None, :]
    out_rows = ((batch * num_rows + rows) * num_heads + head) * HEAD_DIM_V
    dout_rows = batch * stride_dob + rows.to(tl.int64) * stride_dos + head * stride_doh
    out = tl.load(out_ptr + out_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + dout_rows[:, None] + cols.to(tl.int64)[None, :] * stride_dod, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        dlse_rows = batch * stride_dlse_b + head * stride_dlse_h + rows.to(tl.int64) * stride_dlse_s
        delta -= tl.load(dlse_ptr + dlse_rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    lse_rows = (batch * num_heads + head) * num_rows + rows
    lse = tl.load(lse_ptr + lse_rows, mask=rows < num_rows, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)  # no key, no gradient, whatever dlse holds there
    tl.store(delta_ptr + lse_rows, delta, mask=rows < num_rows)
    tl.store(lse2_ptr + lse_rows, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=rows < num_rows)


@triton.jit
def row_base(ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED: tl.constexpr):
    """One head's rows of lse2 or delta: (B, H, S_q), or packed (H, T_q)."""
    if PACKED:
        return ptr + tl.cast(head, tl.int64) * total_q + start_q
    else:
        return ptr + (tl.cast(batch, tl.int64) * num_heads + head) * seqlen_q


@triton.jit
def probabilities(
    qk, lse2, i, j, seqlen_q, seqlen_k, window_left, window_right, bias_base, stride_bias_m, stride_bias_n, slope,
    qk_scale, softcap, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """p = exp2(s − lse2) of a tile, and the softcap's tanh; lse2 broadcasts along the keys."""
    s, capped = score(
        qk, i, j, seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n, slope, qk_scale, softcap, HAS_SLOPES,
        HAS_SOFTCAP,
    )  # fmt: skip
    p = tl.exp2(s - lse2)
    if MASKED:
        p = tl.where(visible(i, j, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT), p, 0.0)
    return p, capped


@triton.jit
def score_gradient(p, dp, delta, capped, HAS_SOFTCAP: tl.constexpr):
    """ds and ds_raw of a tile; delta broadcasts along the keys."""
    ds = p * (dp - delta)
    ds_raw = ds
    if HAS_SOFTCAP:
        ds_raw = ds * (1.0 - capped * capped)
    return ds, ds_raw


@triton.jit
def _gather_queries(
    dk, dv, k, v, q_source, dout_source, head, lse2_base, delta_base, first, stop, start_n, seqlen_q, seqlen_k,
    window_left, window_right, stride_qs, stride_qh, stride_dos, stride_doh, bias_base, stride_bias_m, stride_bias_n,
    slope, qk_scale, softcap, seed, stream, dropout_threshold, dropout_scale, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add what the query blocks [first, stop) of one head give to a tile of dK and dV."""
    j = start_n + tl.arange(0, BLOCK_N)[:, None]
    for block in tl.range(first, stop):
        start_m = block * BLOCK_M
        rows = start_m + tl.arange(0, BLOCK_M)
        i = rows[None, :]
        q = load_tile(q_source, head, start_m, seqlen_q, stride_qs, stride_qh, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, MASKED)
        dout = load_tile(
            dout_source, head, start_m, seqlen_q, stride_dos, stride_doh, HEAD_DIM_V, BLOCK_M, BLOCK_DV, USE_TMA, MASKED
        )
        lse2 = tl.load(lse2_base + rows, mask=rows < seqlen_q, other=float("inf"))[None, :]
        qk = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
        p, capped = probabilities(
            qk, lse2, i, j, seqlen_q, seqlen_k, window_left, window_right, bias_base, stride_bias_m, stride_bias_n,
            slope, qk_scale, softcap, HAS_LEFT, HAS_RIGHT, HAS_SLOPES, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        if HAS_DROPOUT:
            keep = tl.trans(dropout_keep(seed, stream, start_m, start_n, dropout_threshold, BLOCK_M, BLOCK_N))
        if WANT_DV:
            kept = p
            if HAS_DROPOUT:
                kept = tl.where(keep, p * dropout_scale, 0.0)
            dv = dot(cast(kept, q.dtype), dout, dv, PRECISION)
        if WANT_DK:
            delta = tl.load(delta_base + rows, mask=rows < seqlen_q, other=0.0)[None, :]
            dp = dot(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
            if HAS_DROPOUT:
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            _, ds_raw = score_gradient(p, dp, delta, capped, HAS_SOFTCAP)
            dk = dot(cast(ds_raw, q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    seqlen_q, seqlen_k, total_q, total_k, num_heads, num_blocks, window_left, window_right,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh, stride_dod, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slopes_b,
    softmax_scale, qk_scale, softcap, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N keys of one key/value head, summed over its group of query heads.

    Under a causal mask the first keys are seen by the most queries, so tiles in ascending order start the longest
    work first.
    """
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    HAS_DROPOUT: tl.constexpr = seed_ptr is not None
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    program = tl.program_id(0)
    num_kv_heads = num_heads // GROUP_SIZE
    start_n = (program % num_blocks) * BLOCK_N
    batch = program // num_blocks // num_kv_heads
    kv_head = program // num_blocks % num_kv_heads
    start_q, len_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, total_q)
    start_k, len_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, total_k)
    if start_n >= len_k:
        return

    q_source = tile_source(
        q_ptr, batch, start_q, num_heads, len_q, stride_qb, stride_qs, stride_qh, 1, HEAD_DIM, BLOCK_M, BLOCK_D,
        USE_TMA,
    )  # fmt: skip
    dout_source = tile_source(
        dout_ptr, batch, start_q, num_heads, len_q, stride_dob, stride_dos, stride_doh, stride_dod, HEAD_DIM_V, BLOCK_M,
        BLOCK_DV, USE_TMA,
    )  # fmt: skip
    k_source = tile_source(
        k_ptr, batch, start_k, num_kv_heads, len_k, stride_kb, stride_ks, stride_kh, 1, HEAD_DIM, BLOCK_N, BLOCK_D,
        USE_TMA,
    )  # fmt: skip
    k = load_tile(k_source, kv_head, start_n, len_k, stride_ks, stride_kh, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, True)
    v = k
    if WANT_DK:
        v_source = tile_source(
            v_ptr, batch, start_k, num_kv_heads, len_k, stride_vb, stride_vs, stride_vh, 1, HEAD_DIM_V, BLOCK_N,
            BLOCK_DV, USE_TMA,
        )  # fmt: skip
        v = load_tile(v_source, kv_head, start_n, len_k, stride_vs, stride_vh, HEAD_DIM_V, BLOCK_N, BLOCK_DV, USE_TMA, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    # The queries that see these keys: the same geometry, transposed.
    begin, full_begin, full_end, end = visible_blocks(
        start_n, len_k, len_q, window_right, window_left, HAS_RIGHT, HAS_LEFT, BLOCK_N, BLOCK_M
    )
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    for head in tl.range(kv_head * GROUP_SIZE, (kv_head + 1) * GROUP_SIZE):
        lse2_base = row_base(lse2_ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED)
        delta_base = row_base(delta_ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED)
        bias_base = bias_ptr
        if bias_ptr is not None:
            bias_base += tl.cast(batch, tl.int64) * stride_bias_b + tl.cast(head, tl.int64) * stride_bias_h
        slope = slope_of(slopes_ptr, batch, head, stride_slopes_b)
        for stage in tl.static_range(3):  # blocks cut by the causal edge, uncut blocks, blocks cut by the window or the end
            if stage == 0:
                first, stop = begin, full_begin
            elif stage == 1:
                first, stop = full_begin, full_end
            else:
                first, stop = full_end, end
            if HAS_RIGHT if stage == 0 else True:
                dk, dv = _gather_queries(
                    dk, dv, k, v, q_source, dout_source, head, lse2_base, delta_base, first, stop, start_n, len_q,
                    len_k, window_left, window_right, stride_qs, stride_qh, stride_dos, stride_doh, bias_base,
                    stride_bias_m, stride_bias_n, slope, qk_scale, softcap, seed, batch * num_heads + head,
                    dropout_threshold, dropout_scale, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, HAS_SLOPES,
                    HAS_SOFTCAP, HAS_DROPOUT, PRECISION, USE_TMA, WANT_DK, WANT_DV, stage != 1, BLOCK_M, BLOCK_N,
                    BLOCK_D, BLOCK_DV,
                )  # fmt: skip

    kv_row = (start_k.to(tl.int64) if PACKED else batch.to(tl.int64) * seqlen_k) * num_kv_heads + kv_head
    if WANT_DK:
        store_tile(dk_ptr + kv_row * HEAD_DIM, dk * softmax_scale, start_n, len_k, num_kv_heads * HEAD_DIM, HEAD_DIM, BLOCK_N, BLOCK_D)
    if WANT_DV:
        store_tile(dv_ptr + kv_row * HEAD_DIM_V, dv, start_n, len_k, num_kv_heads * HEAD_DIM_V, HEAD_DIM_V, BLOCK_N, BLOCK_DV)


@triton.jit
def _gather_keys(
    dq, p_dp, q, dout, lse2, delta, k_source, v_source, kv_head, first, stop, start_m, seqlen_q, seqlen_k, window_left,
    window_right, stride_ks, stride_kh, stride_vs, stride_vh, bias_base, stride_bias_m, stride_bias_n, slope, qk_scale,
    softcap, seed, stream, dropout_threshold, dropout_scale, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WANT_P_DP: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add what the key blocks [first, stop) give to a tile of dQ, and to rowsum(p∘dp) where it is wanted."""
    i = start_m + tl.arange(0, BLOCK_M)[:, None]
    for block in tl.range(first, stop):
        start_n = block * BLOCK_N
        j = start_n + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(k_source, kv_head, start_n, seqlen_k, stride_ks, stride_kh, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, MASKED)
        v = load_tile(v_source, kv_head, start_n, seqlen_k, stride_vs, stride_vh, HEAD_DIM_V, BLOCK_N, BLOCK_DV, USE_TMA, MASKED)
        qk = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        dp = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        p, capped = probabilities(
            qk, lse2, i, j, seqlen_q, seqlen_k, window_left, window_right, bias_base, stride_bias_m, stride_bias_n,
            slope, qk_scale, softcap, HAS_LEFT, HAS_RIGHT, HAS_SLOPES, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        if HAS_DROPOUT:
            keep = dropout_keep(seed, stream, start_m, start_n, dropout_threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        if WANT_P_DP:
            p_dp += tl.sum(p * dp, 1)
        _, ds_raw = score_gradient(p, dp, delta, capped, HAS_SOFTCAP)
        dq = dot(cast(ds_raw, k.dtype), k, dq, PRECISION)
    return dq, p_dp


@triton.jit(do_not_specialize=LENGTHS)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr,
    p_dp_ptr,
    seqlen_q, seqlen_k, total_q, total_k, num_heads, num_blocks, window_left, window_right,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh, stride_dod, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slopes_b,
    softmax_scale, qk_scale, softcap, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head; tiles from the last to the first, as in the forward kernel."""
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    HAS_DROPOUT: tl.constexpr = seed_ptr is not None
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    program = tl.program_id(0)
    start_m = (num_blocks - 1 - program % num_blocks) * BLOCK_M
    batch = program // num_blocks // num_heads
    head = program // num_blocks % num_heads
    start_q, len_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, total_q)
    start_k, len_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, total_k)
    if start_m >= len_q:
        return

    num_kv_heads = num_heads // GROUP_SIZE
    kv_head = head // GROUP_SIZE
    q_source = tile_source(
        q_ptr, batch, start_q, num_heads, len_q, stride_qb, stride_qs, stride_qh, 1, HEAD_DIM, BLOCK_M, BLOCK_D,
        USE_TMA,
    )  # fmt: skip
    dout_source = tile_source(
        dout_ptr, batch, start_q, num_heads, len_q, stride_dob, stride_dos, stride_doh, stride_dod, HEAD_DIM_V, BLOCK_M,
        BLOCK_DV, USE_TMA,
    )  # fmt: skip
    k_source = tile_source(
        k_ptr, batch, start_k, num_kv_heads, len_k, stride_kb, stride_ks, stride_kh, 1, HEAD_DIM, BLOCK_N, BLOCK_D,
        USE_TMA,
    )  # fmt: skip
    v_source = tile_source(
        v_ptr, batch, start_k, num_kv_heads, len_k, stride_vb, stride_vs, stride_vh, 1, HEAD_DIM_V, BLOCK_N, BLOCK_DV,
        USE_TMA,
    )  # fmt: skip
    q = load_tile(q_source, head, start_m, len_q, stride_qs, stride_qh, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, True)
    dout = load_tile(dout_source, head, start_m, len_q, stride_dos, stride_doh, HEAD_DIM_V, BLOCK_M, BLOCK_DV, USE_TMA, True)
    rows = start_m + tl.arange(0, BLOCK_M)
    lse2_base = row_base(lse2_ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED)
    delta_base = row_base(delta_ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED)
    lse2 = tl.load(lse2_base + rows, mask=rows < len_q, other=float("inf"))[:, None]
    delta = tl.load(delta_base + rows, mask=rows < len_q, other=0.0)[:, None]
    bias_base = bias_ptr
    if bias_ptr is not None:
        bias_base += tl.cast(batch, tl.int64) * stride_bias_b + tl.cast(head, tl.int64) * stride_bias_h
    slope = slope_of(slopes_ptr, batch, head, stride_slopes_b)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    begin, full_begin, full_end, end = visible_blocks(
        start_m, len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    p_dp = tl.zeros((BLOCK_M,), tl.float32)
    for stage in tl.static_range(3):  # blocks cut by the left edge, uncut blocks, blocks cut by the right edge
        if stage == 0:
            first, stop = begin, full_begin
        elif stage == 1:
            first, stop = full_begin, full_end
        else:
            first, stop = full_end, end
        if HAS_LEFT if stage == 0 else True:
            dq, p_dp = _gather_keys(
                dq, p_dp, q, dout, lse2, delta, k_source, v_source, kv_head, first, stop, start_m, len_q, len_k,
                window_left, window_right, stride_ks, stride_kh, stride_vs, stride_vh, bias_base, stride_bias_m,
                stride_bias_n, slope, qk_scale, softcap, seed, batch * num_heads + head, dropout_threshold,
                dropout_scale, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT, HAS_SLOPES, HAS_SOFTCAP, HAS_DROPOUT,
                p_dp_ptr is not None, PRECISION, USE_TMA, stage != 1, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    if p_dp_ptr is not None:
        p_dp_base = row_base(p_dp_ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED)
        tl.store(p_dp_base + rows, p_dp, mask=rows < len_q)
    dq_row = ((start_q.to(tl.int64) if PACKED else batch.to(tl.int64) * seqlen_q) * num_heads + head) * HEAD_DIM
    store_tile(dq_ptr + dq_row, dq * softmax_scale, start_m, len_q, num_heads * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=[*LENGTHS, "batch_size", "num_blocks_n", "bias_b", "bias_h", "bias_m", "bias_n"])
def _attention_bwd_dbias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, dout_ptr, lse2_ptr, delta_ptr, dbias_ptr,
    seqlen_q, seqlen_k, total_q, total_k, num_heads, num_blocks, num_blocks_n, batch_size, bias_b, bias_h, bias_m, bias_n, window_left,
    window_right,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh, stride_dod, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slopes_b,
    qk_scale, softcap, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a contiguous (bias_b, bias_h, bias_m, bias_n) bias: the sum of ds over everything the
    tile was broadcast to.

    A dim of size 1 is summed over its whole range by this one program, in a fixed order: deterministic, and no S_q ×
    S_k buffer beyond the gradient itself.
    """
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    HAS_DROPOUT: tl.constexpr = seed_ptr is not None
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    tiles_m = tl.cdiv(bias_m, BLOCK_M)
    tiles_n = tl.cdiv(bias_n, BLOCK_N)
    program = tl.program_id(0)
    tile_n = program % tiles_n
    tile_m = program // tiles_n % tiles_m
    h = program // tiles_n // tiles_m % bias_h
    b = program // tiles_n // tiles_m // bias_h
    batches = batch_size // bias_b  # how many sequences, heads and blocks share this tile
    heads = num_heads // bias_h
    blocks_m = num_blocks if ONE_ROW else 1
    blocks_n = num_blocks_n if ONE_COL else 1
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, batches * heads * blocks_m * blocks_n):
        start_n = (tile_n + step % blocks_n) * BLOCK_N
        start_m = (tile_m + step // blocks_n % blocks_m) * BLOCK_M
        head = h + step // blocks_n // blocks_m % heads
        batch = b + step // blocks_n // blocks_m // heads
        start_q, len_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, total_q)
        start_k, len_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, total_k)
        if (start_m < len_q) & (start_n < len_k):
            num_kv_heads = num_heads // GROUP_SIZE
            kv_head = head // GROUP_SIZE
            q_source = tile_source(
                q_ptr, batch, start_q, num_heads, len_q, stride_qb, stride_qs, stride_qh, 1, HEAD_DIM, BLOCK_M, BLOCK_D,
                USE_TMA,
            )  # fmt: skip
            k_source = tile_source(
                k_ptr, batch, start_k, num_kv_heads, len_k, stride_kb, stride_ks, stride_kh, 1, HEAD_DIM, BLOCK_N,
                BLOCK_D, USE_TMA,
            )  # fmt: skip
            q = load_tile(q_source, head, start_m, len_q, stride_qs, stride_qh, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, True)
            k = load_tile(k_source, kv_head, start_n, len_k, stride_ks, stride_kh, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, True)
            qk = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            dout_source = tile_source(
                dout_ptr, batch, start_q, num_heads, len_q, stride_dob, stride_dos, stride_doh, stride_dod, HEAD_DIM_V,
                BLOCK_M, BLOCK_DV, USE_TMA,
            )  # fmt: skip
            v_source = tile_source(
                v_ptr, batch, start_k, num_kv_heads, len_k, stride_vb, stride_vs, stride_vh, 1, HEAD_DIM_V, BLOCK_N,
                BLOCK_DV, USE_TMA,
            )  # fmt: skip
            dout = load_tile(dout_source, head, start_m, len_q, stride_dos, stride_doh, HEAD_DIM_V, BLOCK_M, BLOCK_DV, USE_TMA, True)
            v = load_tile(v_source, kv_head, start_n, len_k, stride_vs, stride_vh, HEAD_DIM_V, BLOCK_N, BLOCK_DV, USE_TMA, True)
            dp = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            rows = start_m + tl.arange(0, BLOCK_M)
            lse2_base = row_base(lse2_ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED)
            delta_base = row_base(delta_ptr, batch, head, start_q, seqlen_q, total_q, num_heads, PACKED)
            lse2 = tl.load(lse2_base + rows, mask=rows < len_q, other=float("inf"))[:, None]
            delta = tl.load(delta_base + rows, mask=rows < len_q, other=0.0)[:, None]
            j = start_n + tl.arange(0, BLOCK_N)[None, :]
            bias_base = bias_ptr
            if bias_ptr is not None:
                bias_base += tl.cast(batch, tl.int64) * stride_bias_b + tl.cast(head, tl.int64) * stride_bias_h
            p, capped = probabilities(
                qk, lse2, rows[:, None], j, len_q, len_k, window_left, window_right, bias_base, stride_bias_m,
                stride_bias_n, slope_of(slopes_ptr, batch, head, stride_slopes_b), qk_scale, softcap, HAS_LEFT,
                HAS_RIGHT, HAS_SLOPES, HAS_SOFTCAP, True,
            )  # fmt: skip
            if HAS_DROPOUT:
                keep = dropout_keep(seed, batch * num_heads + head, start_m, start_n, dropout_threshold, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            ds, _ = score_gradient(p, dp, delta, capped, HAS_SOFTCAP)
            dbias += ds
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if ONE_ROW:
        dbias = tl.where(rows[:, None] == 0, tl.sum(dbias, 0)[None, :], 0.0)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_COL:
        dbias = tl.where(cols[None, :] == 0, tl.sum(dbias, 1)[:, None], 0.0)
    head_base = dbias_ptr + (b.to(tl.int64) * bias_h + h) * bias_m * bias_n
    pointers = head_base + rows.to(tl.int64)[:, None] * bias_n + cols[None, :]
    tl.store(pointers, cast(dbias, dbias_ptr.dtype.element_ty), mask=(rows < bias_m)[:, None] & (cols < bias_n)[None, :])


def attention_bwd(
    dout, dlse, q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, out, lse,
    max_seqlen_q, max_seqlen_k, window_left, window_right, softmax_scale, softcap, dropout_p, bias_grad,
    configs: dict[str, Config] | None = None,
):  # fmt: skip
    """Launch the backward kernels; the arguments are the op's. Returns (dq, dk, dv, dbias or None, dsinks or None).

    dout may have any strides, dlse may be None. `configs` overrides tiles by kernel name.
    """
    problem = Problem(
        q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left,
        window_right, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    shared = problem.shared
    num_heads = problem.num_heads

    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows, batch = (q.shape[0], 1) if problem.packed else (max_seqlen_q, problem.batch)
    num_blocks = triton.cdiv(rows, 32)
    dlse_strides = (0, 0, 0) if dlse is None else (0, *dlse.stride())[-3:]
    dout_strides = {**problem.strides("do", dout), "stride_dod": dout.stride(-1)}
    launch(
        _attention_bwd_delta_kernel, check_grid("attention", num_blocks * batch * num_heads), q.device,
        out_ptr=out, dout_ptr=dout, lse_ptr=lse, dlse_ptr=dlse, delta_ptr=delta, lse2_ptr=lse2, num_rows=rows, num_heads=num_heads,
        num_blocks=num_blocks, **dout_strides, stride_dlse_b=dlse_strides[0], stride_dlse_h=dlse_strides[1], stride_dlse_s=dlse_strides[2],
        HEAD_DIM_V=problem.head_dim_v, BLOCK_M=32, BLOCK_DV=shared["BLOCK_DV"], num_warps=4,
    )  # fmt: skip

    def config_of(kernel: str) -> Config:
        config = (configs or {}).get(kernel) or problem.config(kernel, q)
        log.debug("%s: %s", kernel, config)
        return config

    tensors = dict(q_ptr=q, k_ptr=k, v_ptr=v, dout_ptr=dout, lse2_ptr=lse2, delta_ptr=delta, **dout_strides)

    dk, dv = problem.new(*k.shape, like=k), problem.new(*v.shape, like=v)
    config = config_of("attention_bwd_dkdv")
    num_blocks = triton.cdiv(max_seqlen_k, config.BLOCK_N)
    for want_dk, want_dv in ((False, True), (True, False)) if config.split else ((True, True),):
        launch(
            _attention_bwd_dkdv_kernel, check_grid("attention", num_blocks * problem.batch * problem.num_kv_heads), q.device,
            **tensors, dk_ptr=dk, dv_ptr=dv, num_blocks=num_blocks, softmax_scale=softmax_scale, **shared,
            WANT_DK=want_dk, WANT_DV=want_dv, **tiling(config, q, k, v, dout),
        )  # fmt: skip

    dq = problem.new(*q.shape, like=q)
    p_dp = problem.new(*lse.shape, like=lse) if sinks is not None or bias_grad else None
    config = config_of("attention_bwd_dq")
    num_blocks = triton.cdiv(max_seqlen_q, config.BLOCK_M)
    launch(
        _attention_bwd_dq_kernel, check_grid("attention", num_blocks * problem.batch * num_heads), q.device,
        **tensors, dq_ptr=dq, p_dp_ptr=p_dp, num_blocks=num_blocks, softmax_scale=softmax_scale, **shared, **tiling(config, q, k, v, dout),
    )  # fmt: skip

    if p_dp is not None:
        if dlse is not None:
            p_dp = (p_dp - dlse).where(lse != float("-inf"), 0.0)
        tensors["delta_ptr"] = delta = p_dp.contiguous()

    dbias = None
    if bias_grad:
        dbias = torch.empty(attn_bias.shape, dtype=attn_bias.dtype, device=q.device)
        bias_b, bias_h, bias_m, bias_n = attn_bias.shape
        tiles = triton.cdiv(bias_m, config.BLOCK_M) * triton.cdiv(bias_n, config.BLOCK_N)
        launch(
            _attention_bwd_dbias_kernel, check_grid("attention", tiles * bias_b * bias_h), q.device,
            **tensors, dbias_ptr=dbias, num_blocks=num_blocks, num_blocks_n=triton.cdiv(max_seqlen_k, config.BLOCK_N),
            batch_size=problem.batch, bias_b=bias_b, bias_h=bias_h, bias_m=bias_m, bias_n=bias_n, **shared,
            ONE_ROW=bias_m == 1, ONE_COL=bias_n == 1, **tiling(config, q, k, v, dout),
        )  # fmt: skip

    dsinks = None
    if sinks is not None:
        # A row whose lse is −inf (its sink too) has no weight.
        per_head = sinks.float().unsqueeze(-1)  # (H, 1) against (B, H, S_q) or (H, T_q)
        weight = torch.exp(per_head - lse).where(lse != float("-inf"), 0.0)
        dsinks = -(weight * delta).sum(-1)
        dsinks = (dsinks.sum(0) if dsinks.dim() == 2 else dsinks).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks
