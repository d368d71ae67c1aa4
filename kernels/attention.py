"""Attention forward: out = softmax(softmax_scale·Q·Kᵀ + bias)·V and its log-sum-exp, one program a tile of queries.

Online softmax (arXiv 1805.02867) over blocks of keys. With m_j the running row maximum and s_j the scores of block j in
log2 units:

    m_j = max(m_{j−1}, rowmax(s_j));  p_j = exp2(s_j − m_j);  α_j = exp2(m_{j−1} − m_j)
    l_j = α_j·l_{j−1} + rowsum(p_j);  acc_j = α_j·acc_{j−1} + p_j·V_j
    out = acc / l;                    lse = ln 2·(m + log2 l)

Key blocks are walked from the last to the first, so that the blocks a causal mask cuts come first and the state then
runs through unmasked blocks alone. With OVERLAP (arXiv 2407.08608 §3.2) iteration j issues Q·K_jᵀ and then
p_{j+1}·V_{j+1}, whose tensor-core time hides the exponentials of block j.
"""

import logging

import torch
import triton
import triton.language as tl

from .blocks import sequence, visible, visible_blocks
from .launch import check_grid, interpreted, launch, precision_of, target_of, tma_compatible
from .primitives import (
    LN2,
    LOG2E,
    cast,
    dot,
    dropout_keep,
    load_tile,
    pack_bits,
    store_tile,
    tanh,
    tile_source,
    unpack_bits,
)
from .tiles import Config, pick_config

log = logging.getLogger("fastattn")

# Lengths, counts and window bounds change from call to call: none of them may choose a compiled variant.
LENGTHS = [
    "seqlen_q", "seqlen_k", "total_q", "total_k", "num_heads", "num_blocks", "window_left", "window_right",
    "stride_bias_b", "stride_bias_h", "stride_slopes_b", "dropout_threshold",
]  # fmt: skip


@triton.jit
def score(
    qk, i, j, seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n, slope, qk_scale, softcap,
    HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile of scores in log2 units, and the softcap's tanh (for its derivative), from raw q·k; i and j are
    broadcastable index tiles.

    s = softmax_scale·qk;  s = softcap·tanh(s/softcap);  s −= slope·|i + S_k − S_q − j|;  s += bias (or −inf where a bool bias is False)
    """
    capped = qk
    if HAS_SOFTCAP:
        capped = tanh(qk * (qk_scale * LN2 / softcap))
        s = capped * (softcap * LOG2E)
    else:
        s = qk * qk_scale
    if HAS_SLOPES:
        s -= slope * tl.abs(i + (seqlen_k - seqlen_q) - j).to(tl.float32)
    if bias_base is not None:
        inside = (i < seqlen_q) & (j < seqlen_k)
        pointers = bias_base + tl.cast(i, tl.int64) * stride_bias_m + tl.cast(j, tl.int64) * stride_bias_n
        bias = tl.load(pointers, mask=inside, other=0)
        if bias_base.dtype.element_ty == tl.int8:  # a bool mask, seen as bytes
            s = tl.where(bias != 0, s, float("-inf"))
        else:
            # A finite bias stays finite in log2 units: masks made of finfo.min are meant to.
            bias = bias.to(tl.float32)
            s += tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, -3.0e38))
    return s, capped


@triton.jit
def slope_of(slopes_ptr, batch, head, stride_slopes_b):
    """One head's ALiBi slope in log2 units, or 0."""
    if slopes_ptr is None:
        return 0.0
    else:
        return tl.load(slopes_ptr + tl.cast(batch, tl.int64) * stride_slopes_b + head).to(tl.float32) * LOG2E


@triton.jit
def _attend_blocks(
    acc, row_max, row_sum, p, q, k_source, v_source, kv_head, first, stop, is_cut, start_m, seqlen_q, seqlen_k,
    window_left, window_right, stride_ks, stride_kh, stride_vs, stride_vh, bias_base, stride_bias_m, stride_bias_n,
    slope, qk_scale, softcap, seed, stream, dropout_threshold, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, FOLD_SCALE: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
    OVERLAP: tl.constexpr, MASKED: tl.constexpr, PROLOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Walk key blocks stop − 1, …, first; MASKED ones are masked if they `is_cut`. With OVERLAP, p holds the weights
    of the block walked before, whose P·V is still to come."""
    i = start_m + tl.arange(0, BLOCK_M)[:, None]
    for step in tl.range(first, stop, num_stages=1 if PROLOGUE else None):
        start_n = (first + stop - 1 - step) * BLOCK_N
        j = start_n + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(k_source, kv_head, start_n, seqlen_k, stride_ks, stride_kh, HEAD_DIM, BLOCK_N, BLOCK_D, USE_TMA, MASKED)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        if OVERLAP and not PROLOGUE:
            v = load_tile(
                v_source, kv_head, start_n + BLOCK_N, seqlen_k, stride_vs, stride_vh, HEAD_DIM_V, BLOCK_N, BLOCK_DV, USE_TMA, True
            )
            acc = dot(unpack_bits(p, v.dtype), v, acc, PRECISION)
        if not FOLD_SCALE:
            s, _ = score(
                s, i, j, seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n, slope, qk_scale, softcap,
                HAS_SLOPES, HAS_SOFTCAP,
            )  # fmt: skip
        if MASKED:
            if is_cut:
                s = tl.where(visible(i, j, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        # Raw scores and one FFMA an element where the scale is positive, else scores that are in log2 units already.
        scale = qk_scale if FOLD_SCALE else 1.0
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max * scale)  # a row without a visible key yet: avoid inf − inf
        weights = tl.exp2(s * scale - shift[:, None])
        alpha = tl.exp2(row_max * scale - shift)
        row_sum = row_sum * alpha + tl.sum(weights, 1)
        row_max = new_max
        acc = acc * alpha[:, None]
        if HAS_DROPOUT:
            keep = dropout_keep(seed, stream, start_m, start_n, dropout_threshold, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        p = pack_bits(cast(weights, q.dtype))
        if not OVERLAP:
            v = load_tile(
                v_source, kv_head, start_n, seqlen_k, stride_vs, stride_vh, HEAD_DIM_V, BLOCK_N, BLOCK_DV, USE_TMA, MASKED
            )
            acc = dot(unpack_bits(p, v.dtype), v, acc, PRECISION)
    return acc, row_max, row_sum, p


@triton.jit(do_not_specialize=LENGTHS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, sinks_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, out_ptr, lse_ptr,
    seqlen_q, seqlen_k, total_q, total_k, num_heads, num_blocks, window_left, window_right,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, stride_slopes_b,
    qk_scale, softcap, dropout_threshold, dropout_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, GROUP_SIZE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FOLD_SCALE: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """One tile of BLOCK_M queries of one head; the formula is at the top of this file.

    Within a head the tiles go from the last to the first: under a causal mask the last has the most keys, and the
    longest work goes first.
    """
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    HAS_DROPOUT: tl.constexpr = seed_ptr is not None
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
    k_source = tile_source(
        k_ptr, batch, start_k, num_kv_heads, len_k, stride_kb, stride_ks, stride_kh, 1, HEAD_DIM, BLOCK_N, BLOCK_D,
        USE_TMA,
    )  # fmt: skip
    v_source = tile_source(
        v_ptr, batch, start_k, num_kv_heads, len_k, stride_vb, stride_vs, stride_vh, 1, HEAD_DIM_V, BLOCK_N, BLOCK_DV,
        USE_TMA,
    )  # fmt: skip
    bias_base = bias_ptr
    if bias_ptr is not None:
        bias_base += tl.cast(batch, tl.int64) * stride_bias_b + tl.cast(head, tl.int64) * stride_bias_h
    slope = slope_of(slopes_ptr, batch, head, stride_slopes_b)
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0

    q = load_tile(q_source, head, start_m, len_q, stride_qs, stride_qh, HEAD_DIM, BLOCK_M, BLOCK_D, USE_TMA, True)
    begin, full_begin, full_end, end = visible_blocks(
        start_m, len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    p = pack_bits(tl.zeros((BLOCK_M, BLOCK_N), q.dtype))
    last = tl.maximum(end - 1, begin) if OVERLAP else end
    last_is_cut = (last < full_begin) | (last >= full_end)
    full_begin = tl.minimum(full_begin, last)
    full_end = tl.minimum(full_end, last)
    # The stages cover [begin, end) once, each adjacent to the one before it: with OVERLAP the next V is always the block walked before.
    # Without a right edge only the end can cut a block on the right, and with OVERLAP that block is stage 0's.
    for stage in tl.static_range(4):
        if stage == 0:  # the last block, ahead of the pipeline
            first, stop = last, end
        elif stage == 1:  # blocks cut by the right edge of the mask, or by the end
            first, stop = full_end, last
        elif stage == 2:  # uncut blocks
            first, stop = full_begin, full_end
        else:  # blocks cut by the left edge of the window
            first, stop = begin, full_begin
        if (stage != 0 or OVERLAP) and (stage != 1 or HAS_RIGHT or not OVERLAP) and (stage != 3 or HAS_LEFT):
            acc, row_max, row_sum, p = _attend_blocks(
                acc, row_max, row_sum, p, q, k_source, v_source, kv_head, first, stop,
                last_is_cut if stage == 0 else True, start_m, len_q, len_k, window_left, window_right, stride_ks,
                stride_kh, stride_vs, stride_vh, bias_base, stride_bias_m, stride_bias_n, slope, qk_scale, softcap,
                seed, batch * num_heads + head, dropout_threshold, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT,
                HAS_SLOPES, HAS_SOFTCAP, HAS_DROPOUT, FOLD_SCALE, PRECISION, USE_TMA, OVERLAP, stage != 2, stage == 0,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    if OVERLAP:
        # Where no block was walked p is 0, and the row asked for lies past the sequence, so that nothing is read.
        row = tl.where(end > begin, begin * BLOCK_N, tl.maximum(len_k, 1))
        v = load_tile(v_source, kv_head, row, len_k, stride_vs, stride_vh, HEAD_DIM_V, BLOCK_N, BLOCK_DV, USE_TMA, True)
        acc = dot(unpack_bits(p, v.dtype), v, acc, PRECISION)

    row_max = row_max * (qk_scale if FOLD_SCALE else 1.0)
    acc = tl.where(row_sum[:, None] == 0.0, 0.0, acc)  # no visible key: 0, though 0·NaN came out of P·V
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        new_max = tl.maximum(row_max, sink)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2(row_max - shift)
        row_sum = row_sum * alpha + tl.exp2(sink - shift)
        acc = acc * alpha[:, None]
        row_max = new_max
    empty = row_sum == 0.0  # no visible key and no sink: lse −inf
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), LN2 * (row_max + tl.log2(row_sum)))
    acc = acc * (dropout_scale / row_sum)[:, None]

    rows = start_m + tl.arange(0, BLOCK_M)
    if cu_seqlens_q_ptr is None:
        lse_base = lse_ptr + (batch.to(tl.int64) * num_heads + head) * seqlen_q
        out_row = batch.to(tl.int64) * seqlen_q
    else:
        lse_base = lse_ptr + head.to(tl.int64) * total_q + start_q
        out_row = start_q.to(tl.int64)
    out_base = out_ptr + (out_row * num_heads + head) * HEAD_DIM_V
    tl.store(lse_base + rows, lse, mask=rows < len_q)
    store_tile(out_base, acc, start_m, len_q, num_heads * HEAD_DIM_V, HEAD_DIM_V, BLOCK_M, BLOCK_DV)


class Problem:
    """What the forward and backward launchers derive from an op's arguments: sizes, strides, and which features are
    compiled in."""

    def __init__(
        self, q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, window_left, window_right, softmax_scale, softcap, dropout_p,
    ):  # fmt: skip
        self.packed = cu_seqlens_q is not None
        self.num_heads, self.head_dim = q.shape[-2:]
        self.num_kv_heads, self.head_dim_v = v.shape[-2:]
        self.batch = cu_seqlens_q.shape[0] - 1 if self.packed else q.shape[0]
        self.seqlen_q, self.seqlen_k = max_seqlen_q, max_seqlen_k
        self.softmax_scale, self.dropout_p = softmax_scale, dropout_p
        # A bound that no row of the longest sequence reaches is no bound: a decode step has no causal mask.
        has_left = window_left is not None and window_left < max_seqlen_k - 1
        has_right = window_right is not None and window_right < max_seqlen_q - 1
        if attn_bias is not None and attn_bias.dtype == torch.bool:
            attn_bias = attn_bias.view(torch.int8)
        self.attn_bias = attn_bias
        bias_strides = _broadcast_strides(attn_bias) if attn_bias is not None else (0, 0, 0, 0)
        slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
        self.sinks = None if sinks is None else sinks.contiguous()
        self.shared = dict(
            bias_ptr=attn_bias,
            slopes_ptr=slopes,
            seed_ptr=dropout_seed if dropout_p > 0.0 else None,
            cu_seqlens_q_ptr=None if not self.packed else cu_seqlens_q.contiguous(),
            cu_seqlens_k_ptr=None if not self.packed else cu_seqlens_k.contiguous(),
            seqlen_q=max_seqlen_q,
            seqlen_k=max_seqlen_k,
            total_q=q.shape[0],
            total_k=k.shape[0],
            num_heads=self.num_heads,
            window_left=window_left if has_left else 0,
            window_right=window_right if has_right else 0,
            **self.strides("q", q),
            **self.strides("k", k),
            **self.strides("v", v),
            **dict(zip(("stride_bias_b", "stride_bias_h", "stride_bias_m", "stride_bias_n"), bias_strides, strict=True)),
            stride_slopes_b=0 if slopes is None or slopes.dim() == 1 else slopes.stride(0),
            qk_scale=softmax_scale * LOG2E.value,
            softcap=softcap,
            dropout_threshold=int(dropout_p * 2**32) - 2**31,
            dropout_scale=1.0 / (1.0 - dropout_p),
            HEAD_DIM=self.head_dim,
            HEAD_DIM_V=self.head_dim_v,
            GROUP_SIZE=self.num_heads // max(self.num_kv_heads, 1),
            HAS_LEFT=has_left,
            HAS_RIGHT=has_right,
            HAS_SOFTCAP=softcap > 0.0,
            # scale·max(x) = max(scale·x) needs a positive scale, and folding it past the maximum needs scores that
            # nothing else changes
            FOLD_SCALE=softmax_scale > 0.0 and softcap == 0.0 and slopes is None and attn_bias is None,
            PRECISION=precision_of(q.dtype),
            BLOCK_D=max(16, triton.next_power_of_2(self.head_dim)),
            BLOCK_DV=max(16, triton.next_power_of_2(self.head_dim_v)),
        )

    def strides(self, name: str, t: torch.Tensor) -> dict[str, int]:
        batch, (row, head) = 0 if self.packed else t.stride(0), t.stride()[-3:-1]
        return {f"stride_{name}b": batch, f"stride_{name}s": row, f"stride_{name}h": head}

    def config(self, kernel: str, tensor: torch.Tensor) -> Config:
        head_dim = max(self.head_dim, self.head_dim_v)
        plain = self.shared["FOLD_SCALE"] and self.shared["seed_ptr"] is None
        # The interpreter has no registers to run out of and pays by the tile: float32 takes the large tiles there too.
        itemsize = 2 if interpreted() else tensor.element_size()
        return pick_config(kernel, *target_of(tensor), head_dim, itemsize, plain)

    def new(self, *shape: int, like: torch.Tensor, dtype: torch.dtype | None = None, fill: float = 0.0) -> torch.Tensor:
        """An output. Packed tensors may have rows that belong to no sequence, which no program writes: those keep
        `fill`."""
        dtype = like.dtype if dtype is None else dtype
        if self.packed:
            return torch.full(shape, fill, dtype=dtype, device=like.device)
        return torch.empty(shape, dtype=dtype, device=like.device)


def _broadcast_strides(t: torch.Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))


def tiling(config: Config, *tensors: torch.Tensor) -> dict:
    """A Config as launch arguments; descriptors only where every tensor's layout permits."""
    return dict(
        USE_TMA=config.tma and all(map(tma_compatible, tensors)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def attention_fwd(
    q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    window_left, window_right, softmax_scale, softcap, dropout_p, config: Config | None = None,
):  # fmt: skip
    """Launch the forward kernel; the arguments are the op's. Returns (out, lse).

    q (B, S_q, H, D), k (B, S_k, H_kv, D), v (B, S_k, H_kv, D_v), or packed (T, …); attn_bias has four dims; last
    dims are contiguous.
    """
    problem = Problem(
        q, k, v, attn_bias, alibi_slopes, sinks, dropout_seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_left,
        window_right, softmax_scale, softcap, dropout_p,
    )  # fmt: skip
    config = config or problem.config("attention_fwd", q)
    log.debug("attention_fwd: %s", config)
    out = problem.new(*q.shape[:-1], v.shape[-1], like=q)
    lse_shape = (problem.num_heads, q.shape[0]) if problem.packed else (problem.batch, problem.num_heads, max_seqlen_q)
    lse = problem.new(*lse_shape, like=q, dtype=torch.float32, fill=float("-inf"))
    num_blocks = triton.cdiv(max_seqlen_q, config.BLOCK_M)
    launch(
        _attention_fwd_kernel, check_grid("attention", num_blocks * problem.batch * problem.num_heads), q.device,
        q_ptr=q, k_ptr=k, v_ptr=v, sinks_ptr=problem.sinks, out_ptr=out, lse_ptr=lse, num_blocks=num_blocks,
        **problem.shared, OVERLAP=config.overlap, **tiling(config, q, k, v),
    )  # fmt: skip
    return out, lse
