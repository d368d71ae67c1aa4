"""A mixture of experts: two grouped products with the activation in the first one's epilogue, and their gradients.

Forward, over the rows r of expert e, sorted as a plan of `moe_dispatch` has them, slot s = order[r] = t·K + k of token t:

    z[r] = x[t]·gate_up[e]ᵀ + b₁[e]        a[r] = act(gate)∘up, the halves of z[r]        y[r] = a[r]·down[e]ᵀ + b₂[e]
    out[t] = Σ_k w[s]·y[r(s)]

Backward, from z alone, with dy[r] = w[s]·dout[t] never written:

    da′[r] = dout[t]·down[e]        dw[s] = ⟨da′[r], a[r]⟩ + ⟨dout[t], b₂[e]⟩
    dz[r] = w[s]·da′[r] through the activation          a′[r] = w[s]·a[r]
    ddown[e] = Σ_r dout[t]ᵀ·a′[r]   db₂[e] = Σ_r w[s]·dout[t]   dgate_up[e] = Σ_r dz[r]ᵀ·x[t]   db₁[e] = Σ_r dz[r]
    dx[t] = Σ_k (dz·gate_up[e])[r(s)]

The products' second line is the epilogue of the first. dw is summed block by block of columns, and the blocks in one order: no atomics.
Rows that no expert has are computed nowhere and read nowhere. Floor: 6·T·K·H·I FLOPs forward, 12 backward.
"""

import logging

import torch
import triton
import triton.language as tl

from .glu import activation as activation_of
from .glu import logistic
from .grouped_mm import (
    COUNTS,
    Matrices,
    add_bias,
    columns,
    config_of,
    find_tile,
    grid_of,
    launch_product,
    launch_sum,
    launch_weight,
    matrices_source,
    num_lanes,
    numbered_rows,
    ordered_ends,
    product,
    rows_source,
    rows_wide,
    schedule,
)
from .grouped_tiles import GroupedConfig
from .launch import check_grid, launch, precision_of
from .moe_routing import moe_combine_fwd
from .primitives import cast
from .rows import vector_of, with_contiguous_rows

log = logging.getLogger("fastattn")

ALPHA, LIMIT = tl.constexpr(1.702), tl.constexpr(7.0)  # gpt-oss
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_tanh", "clamped_swiglu": "clamped_swiglu"}  # as the kernels call them


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """act(gate)∘up, and its derivatives by gate and by up."""
    if ACTIVATION == "clamped_swiglu":
        g = tl.minimum(gate, LIMIT)
        u = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        s, ds = logistic(g * ALPHA)
        by_gate = tl.where(gate <= LIMIT, u * (s + g * ALPHA * ds), 0.0)
        return g * s * u, by_gate, tl.where((up <= LIMIT) & (up >= -LIMIT), g * s, 0.0)
    else:
        y, slope = activation_of(gate, ACTIVATION)
        return y * up, up * slope, y


@triton.jit
def split_columns(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile; no thread gives another anything."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=COUNTS)
def _moe_up_kernel(
    x_ptr, w_ptr, bias_ptr, offsets_ptr, order_ptr, pre_ptr, out_ptr, num_rows, num_x_rows, stride_x, stride_we, stride_wh, stride_w,
    N: tl.constexpr, K: tl.constexpr, HALVES: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, N_MAJOR: tl.constexpr,
    DIVISOR: tl.constexpr, ACTIVATION: tl.constexpr, VECTOR_X: tl.constexpr, VECTOR_W: tl.constexpr, PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pre[r] = x[order[r] // DIVISOR]·w[e]ᵀ + bias[e], if it is to be kept, and out[r] = act(gate)∘up of it.

    A tile has as many gate columns as up columns, so that the epilogue has both: HALVES = 2, of w's two halves of N rows; HALVES = 1,
    neighbours among N rows that are gate and up in turns.
    """
    NUM_BLOCKS: tl.constexpr = (N * HALVES + BLOCK_N - 1) // BLOCK_N
    NUM_COLS: tl.constexpr = N * HALVES
    last, last_end = schedule(offsets_ptr, num_rows, NUM_GROUPS, GROUPS, BLOCK_M)
    x_source = rows_source(x_ptr, order_ptr, last_end, stride_x, K, BLOCK_M, BLOCK_K, USE_TMA)
    w_source = matrices_source(w_ptr, stride_we, stride_wh, stride_w, N, K, NUM_GROUPS, HALVES, N_MAJOR, BLOCK_N, BLOCK_K, USE_TMA)
    for index in range(tl.program_id(0), tl.max(last, 0) * NUM_BLOCKS, tl.num_programs(0)):
        group, row, end, block = find_tile(index, offsets_ptr, last, num_rows, NUM_BLOCKS, GROUPS, GROUP_M, BLOCK_M)
        acc = product(
            x_source, w_source, order_ptr, row, end, num_x_rows, group, block, stride_x, stride_we, stride_wh, stride_w, N, K, HALVES,
            N_MAJOR, DIVISOR, VECTOR_X, VECTOR_W, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
        )  # fmt: skip
        n, _, column = columns(block, N, HALVES, BLOCK_N)
        acc = add_bias(acc, bias_ptr, group, column, n < N, NUM_COLS)
        rows = row + tl.arange(0, BLOCK_M)
        if pre_ptr is not None:
            target = pre_ptr + (rows.to(tl.int64) * NUM_COLS)[:, None] + column[None, :]
            kept = acc
            if pre_ptr.dtype.element_ty == tl.float16:  # an infinite one would have a backward of NaN
                kept = tl.where(acc > 65504.0, 65504.0, tl.where(acc < -65504.0, -65504.0, acc))
            tl.store(target, cast(kept, pre_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (n < N)[None, :])
        if HALVES == 2:
            gate, up = split_columns(acc, BLOCK_M, BLOCK_N)
        else:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        a, _, _ = gated(gate, up, ACTIVATION)
        column = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        target = out_ptr + (rows.to(tl.int64) * (NUM_COLS // 2))[:, None] + column[None, :]
        tl.store(target, cast(a, out_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (column < NUM_COLS // 2)[None, :])


@triton.jit
def gated_backward(
    da, dot, pre_ptr, dpre_ptr, out_ptr, rows, end, weight, column, N: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From BLOCK columns of da′, WIDTH at a time: dz and a′ stored, and dot + ⟨da′, a⟩ of each row returned."""
    if BLOCK > WIDTH:
        left, right = split_columns(da, BLOCK_M, BLOCK)
        dot = gated_backward(
            left, dot, pre_ptr, dpre_ptr, out_ptr, rows, end, weight, column, N, INTERLEAVED, ACTIVATION, BLOCK_M, BLOCK // 2, WIDTH
        )
        return gated_backward(
            right, dot, pre_ptr, dpre_ptr, out_ptr, rows, end, weight, column + BLOCK // 2, N, INTERLEAVED, ACTIVATION, BLOCK_M,
            BLOCK // 2, WIDTH,
        )  # fmt: skip
    else:
        n = column + tl.arange(0, BLOCK)
        mask = (rows < end)[:, None] & (n < N)[None, :]
        start = rows.to(tl.int64) * (2 * N)
        if INTERLEAVED:
            both = 2 * column + tl.arange(0, 2 * BLOCK)
            at = start[:, None] + both[None, :]
            mask_both = (rows < end)[:, None] & (both < 2 * N)[None, :]
            gate, up = tl.split(tl.reshape(tl.load(pre_ptr + at, mask=mask_both, other=0.0), (BLOCK_M, BLOCK, 2)))
        else:
            at = start[:, None] + n[None, :]
            gate, up = tl.load(pre_ptr + at, mask=mask, other=0.0), tl.load(pre_ptr + N + at, mask=mask, other=0.0)
        a, by_gate, by_up = gated(gate.to(tl.float32), up.to(tl.float32), ACTIVATION)
        dot += tl.sum(tl.where(mask, da * a, 0.0), 1)
        da = da * weight[:, None]
        if dpre_ptr is not None:
            dgate, dup = cast(da * by_gate, dpre_ptr.dtype.element_ty), cast(da * by_up, dpre_ptr.dtype.element_ty)
            if INTERLEAVED:
                tl.store(dpre_ptr + at, tl.reshape(tl.join(dgate, dup), (BLOCK_M, 2 * BLOCK)), mask=mask_both)
            else:
                tl.store(dpre_ptr + at, dgate, mask=mask)
                tl.store(dpre_ptr + N + at, dup, mask=mask)
        if out_ptr is not None:
            target = out_ptr + (rows.to(tl.int64) * N)[:, None] + n[None, :]
            tl.store(target, cast(a * weight[:, None], out_ptr.dtype.element_ty), mask=mask)
        return dot


@triton.jit(do_not_specialize=[*COUNTS, "num_slots"])
def _moe_down_bwd_kernel(
    x_ptr, w_ptr, offsets_ptr, order_ptr, weights_ptr, pre_ptr, dpre_ptr, out_ptr, dots_ptr, num_rows, num_x_rows, num_slots, stride_x,
    stride_we, stride_wh, stride_w, N: tl.constexpr, K: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, N_MAJOR: tl.constexpr,
    INTERLEAVED: tl.constexpr, NUM_DOTS: tl.constexpr, DIVISOR: tl.constexpr, ACTIVATION: tl.constexpr, VECTOR_X: tl.constexpr,
    VECTOR_W: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """da′[r] = x[order[r] // DIVISOR]·w[e]ᵀ, x being dout and w downᵀ; in the epilogue, a few columns after the other, so
    that little of all that it needs is in registers at a time, dpre[r] and a′[r] = out[r]. dots[s, block] is ⟨da′, a⟩ of a block's columns.
    What of the three is None is not wanted.
    """
    NUM_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    WIDTH: tl.constexpr = 16 if INTERLEAVED else 32
    last, last_end = schedule(offsets_ptr, num_rows, NUM_GROUPS, GROUPS, BLOCK_M)
    x_source = rows_source(x_ptr, order_ptr, last_end, stride_x, K, BLOCK_M, BLOCK_K, USE_TMA)
    w_source = matrices_source(w_ptr, stride_we, stride_wh, stride_w, N, K, NUM_GROUPS, 1, N_MAJOR, BLOCK_N, BLOCK_K, USE_TMA)
    for index in range(tl.program_id(0), tl.max(last, 0) * NUM_BLOCKS, tl.num_programs(0)):
        group, row, end, block = find_tile(index, offsets_ptr, last, num_rows, NUM_BLOCKS, GROUPS, GROUP_M, BLOCK_M)
        acc = product(
            x_source, w_source, order_ptr, row, end, num_x_rows, group, block, stride_x, stride_we, stride_wh, stride_w, N, K, 1, N_MAJOR,
            DIVISOR, VECTOR_X, VECTOR_W, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_M)
        slot, exists = numbered_rows(order_ptr, rows, rows < end, num_slots, 1)
        weight = tl.load(weights_ptr + slot, mask=exists, other=0.0)
        dot = tl.zeros((BLOCK_M,), tl.float32)
        dot = gated_backward(
            acc, dot, pre_ptr, dpre_ptr, out_ptr, rows, end, weight, block * BLOCK_N, N, INTERLEAVED, ACTIVATION, BLOCK_M, BLOCK_N, WIDTH
        )
        if dots_ptr is not None:
            tl.store(dots_ptr + slot * NUM_DOTS + block, dot, mask=exists)


@triton.jit(do_not_specialize=["num_rows", "num_x_rows", "num_slots", "stride_x"])
def _moe_bias_dot_kernel(
    x_ptr, bias_ptr, offsets_ptr, order_ptr, dots_ptr, num_rows, num_x_rows, num_slots, stride_x, N: tl.constexpr, NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr, NUM_DOTS: tl.constexpr, DIVISOR: tl.constexpr, VECTOR_X: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dots[s, −1] = ⟨x[order[r] // DIVISOR], bias[e]⟩ of ROWS rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ends = ordered_ends(offsets_ptr, num_rows, NUM_GROUPS, GROUPS)
    expert = tl.sum(((row[:, None] >= ends[None, :]) & (tl.arange(0, GROUPS) < NUM_GROUPS)[None, :]).to(tl.int32), 1)
    in_rows = (row < num_rows) & (expert < NUM_GROUPS)
    at, exists = numbered_rows(order_ptr, row, in_rows, num_x_rows, DIVISOR)
    x_start = at * stride_x // VECTOR_X * VECTOR_X
    bias_start = tl.where(in_rows, expert, 0).to(tl.int64) * N
    dot = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = exists[:, None] & (column < N)[None, :]
        x = tl.load(x_ptr + x_start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dot += x * tl.load(bias_ptr + bias_start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    slot, exists = numbered_rows(order_ptr, row, in_rows, num_slots, 1)
    tl.store(dots_ptr + slot * NUM_DOTS + NUM_DOTS - 1, tl.sum(dot, 1), mask=exists)


# --------------------------------------------------------------------------------------------------------------------
# Launchers.


DOT_ROWS, DOT_BLOCK = 16, 128  # static: 16 elements a thread


def _upright(w: torch.Tensor, transposed: bool) -> torch.Tensor:
    return w.transpose(1, 2) if transposed else w


def moe_fwd(
    x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor, gate_up_bias: torch.Tensor | None, down_bias: torch.Tensor | None, activation: str, layout: str,
    transposed: bool, keep: bool, config: GroupedConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the two products and the sum. x (T, H) and weights (T, K) fp32, of any strides. Returns out (T, H) and z (T·K, 2·I),
    contiguous, z empty unless it is to be kept. config is that of the first product."""
    op, num_rows, top_k = "moe", order.shape[0], weights.shape[1]
    x, order, offsets = with_contiguous_rows(x), order.contiguous(), offsets.contiguous()
    up = Matrices(_upright(gate_up_proj, transposed), halves=2 if layout == "concatenated" else 1)
    down = Matrices(_upright(down_proj, transposed))
    pre = torch.empty(num_rows if keep else 0, up.num_cols * up.halves, dtype=x.dtype, device=x.device)
    a = torch.empty(num_rows, down.size, dtype=x.dtype, device=x.device)
    tile = config or config_of("gated", x, num_rows, up.num_groups, up.size, up.aligned and rows_wide(x))
    log.debug("%s: %s", op, tile)
    launch(
        _moe_up_kernel,
        grid_of(op, num_rows, up.num_groups, triton.cdiv(up.num_cols * up.halves, tile.BLOCK_N), tile, x.device), x.device,
        x_ptr=x, bias_ptr=None if gate_up_bias is None else gate_up_bias.contiguous(), offsets_ptr=offsets, order_ptr=order,
        pre_ptr=pre if keep else None, out_ptr=a, num_rows=num_rows, num_x_rows=x.shape[0], stride_x=x.stride(0), **up.args(),
        HALVES=up.halves, GROUPS=num_lanes(up.num_groups), DIVISOR=top_k, ACTIVATION=ACTIVATIONS[activation], VECTOR_X=vector_of(x),
        PRECISION=precision_of(x.dtype), USE_TMA=tile.tma and up.aligned, **tile.meta(),
    )  # fmt: skip
    y = torch.empty(num_rows, x.shape[1], dtype=x.dtype, device=x.device)
    launch_product(op, a, down, down_bias, offsets, y, num_rows=num_rows, tail=False)
    return moe_combine_fwd(y, inverse, offsets, weights, top_k), pre


def moe_bwd(
    dout: torch.Tensor, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor,
    gate_up_proj: torch.Tensor, down_proj: torch.Tensor, gate_up_bias: torch.Tensor | None, down_bias: torch.Tensor | None,
    pre: torch.Tensor, activation: str, layout: str, transposed: bool, wanted: list[bool], config: GroupedConfig | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Launch the gradients' kernels. dout is (T, H), of any strides. Returns dx, dweights (fp32), dgate_up_proj, ddown_proj, dgate_up_bias
    and ddown_bias, contiguous, empty where not wanted. config is that of the first kernel."""
    op, num_rows, top_k = "moe", order.shape[0], weights.shape[1]
    want_x, want_weights, want_gate_up, want_down, want_gate_up_bias, want_down_bias = wanted
    dout, order, offsets, weights = with_contiguous_rows(dout), order.contiguous(), offsets.contiguous(), weights.contiguous()
    dx, dweights = dout.new_empty(0), weights.new_empty(0)
    dgate_up, ddown, dgate_up_bias, ddown_bias = (
        dout.new_empty(0 if t is None or not want else t.shape)
        for t, want in zip((gate_up_proj, down_proj, gate_up_bias, down_bias), wanted[2:], strict=True)
    )
    dpre = a = None
    want_dpre = want_x or want_gate_up or want_gate_up_bias
    if want_dpre or want_weights or want_down:
        dpre, a, dweights = _down_bwd(
            dout, order, offsets, weights, down_proj, down_bias, pre, activation, layout, transposed, want_dpre, want_down, want_weights,
            config,
        )  # fmt: skip
    if want_down:
        _launch_weight(op, (dout, order, top_k), (a, None, 1), offsets, ddown, transposed, num_rows)
    del a
    if want_down_bias and down_bias is not None:
        launch_sum(op, dout, offsets, ddown_bias, num_rows=num_rows, numbers=order, divisor=top_k, scale=weights.view(-1))
    if want_gate_up_bias and gate_up_bias is not None:
        launch_sum(op, dpre, offsets, dgate_up_bias, num_rows=num_rows)
    if want_gate_up:
        _launch_weight(op, (dpre, None, 1), (with_contiguous_rows(x), order, top_k), offsets, dgate_up, transposed, num_rows)
    if want_x:
        rows = dout.new_empty(num_rows, dout.shape[1])
        matrices = Matrices(_upright(gate_up_proj, transposed).transpose(1, 2))
        launch_product(op, dpre, matrices, None, offsets, rows, num_rows=num_rows, tail=False)
        del dpre
        dx = moe_combine_fwd(rows, inverse, offsets, None, top_k)
    return dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias


def _down_bwd(
    dout: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, down_proj: torch.Tensor,
    down_bias: torch.Tensor | None, pre: torch.Tensor, activation: str, layout: str, transposed: bool, want_dpre: bool, want_a: bool,
    want_weights: bool, config: GroupedConfig | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """(dz (T·K, 2·I), a′ (T·K, I), dweights (T, K) fp32): None, None and empty where not wanted."""
    op, num_rows, top_k = "moe", order.shape[0], weights.shape[1]
    down = Matrices(_upright(down_proj, transposed).transpose(1, 2))
    kernel = "gated_bwd_interleaved" if layout == "interleaved" else "gated_bwd"
    tile = config or config_of(kernel, dout, num_rows, down.num_groups, down.size, down.aligned and rows_wide(dout))
    log.debug("%s: %s", op, tile)
    num_blocks = triton.cdiv(down.num_cols, tile.BLOCK_N)
    num_dots = num_blocks + (down_bias is not None)
    dpre = torch.empty_like(pre) if want_dpre else None
    a = pre.new_empty(num_rows, down.num_cols) if want_a else None
    dots = weights.new_zeros(weights.numel(), num_dots) if want_weights else None  # rows of nobody are written by nobody
    shared = dict(
        offsets_ptr=offsets, order_ptr=order, num_rows=num_rows, num_x_rows=dout.shape[0], num_slots=weights.numel(),
        stride_x=dout.stride(0), GROUPS=num_lanes(down.num_groups), NUM_DOTS=num_dots, DIVISOR=top_k, VECTOR_X=vector_of(dout),
    )  # fmt: skip
    launch(
        _moe_down_bwd_kernel, grid_of(op, num_rows, down.num_groups, num_blocks, tile, dout.device), dout.device,
        x_ptr=dout, weights_ptr=weights, pre_ptr=pre, dpre_ptr=dpre, out_ptr=a, dots_ptr=dots, **shared, **down.args(),
        INTERLEAVED=layout == "interleaved", ACTIVATION=ACTIVATIONS[activation], PRECISION=precision_of(dout.dtype),
        USE_TMA=tile.tma and down.aligned, **tile.meta(),
    )  # fmt: skip
    if dots is None:
        return dpre, a, weights.new_empty(0)
    if down_bias is not None:
        launch(
            _moe_bias_dot_kernel, check_grid(op, triton.cdiv(num_rows, DOT_ROWS)), dout.device,
            x_ptr=dout, bias_ptr=down_bias.contiguous(), dots_ptr=dots, **shared, N=dout.shape[1], NUM_GROUPS=down.num_groups,
            ROWS=DOT_ROWS, BLOCK=DOT_BLOCK, num_warps=4,
        )  # fmt: skip
    return dpre, a, dots.sum(1).view(weights.shape)


Side = tuple[torch.Tensor, "torch.Tensor | None", int]  # a matrix, its row numbers, their divisor


def _launch_weight(
    op: str, a: Side, b: Side, offsets: torch.Tensor, out: torch.Tensor, transposed: bool, num_rows: int
) -> None:
    """Launch aᵀ·b into out (E, N, K); of transposed matrices, bᵀ·a into (E, K, N)."""
    (a, a_numbers, a_divisor), (b, b_numbers, b_divisor) = (b, a) if transposed else (a, b)
    launch_weight(
        op, a, b, offsets, out, num_rows=num_rows, a_numbers=a_numbers, a_divisor=a_divisor, b_numbers=b_numbers, b_divisor=b_divisor
    )
