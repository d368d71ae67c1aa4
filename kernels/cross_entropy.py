"""Cross-entropy over rows of logits, forward and backward.

With s_c = x_c, or softcap·tanh(x_c / softcap), p_c = exp(s_c − lse), t the row's target, w its weight and ε the smoothing,

    loss = (1 − ε)·w_t·(lse − s_t) + ε/C·Σ_c w_c·(lse − s_c) + z_loss·lse²
    ds_c = g·[((1 − ε)·w_t + ε/C·Σw + 2·z_loss·lse)·p_c − (1 − ε)·w_t·[c = t] − ε/C·w_c] + dlse·p_c

in fp32, g being the gradient of this row's loss. The forward reads the logits once and writes four numbers a row: the loss, w_t (0 where
the target is ignored), max s and log Σ exp(s − max s), whose sum is the lse and which are kept apart because the sum of a large maximum
and a small logarithm loses the logarithm's digits. Rows of up to 2048 columns share a program or have it for themselves; a longer one is
walked in blocks, where each group of VECTOR adjacent columns keeps a running maximum and sum of its own (arXiv 1805.02867). The backward
reads the logits again, a block of columns a program. Floor: numel·itemsize bytes forward, twice that backward.

A target outside [0, C) that is not ignored is never followed: its row's loss and gradient are NaN.
"""

import logging

import torch
import triton
import triton.language as tl

from .launch import launch
from .primitives import LN2, LOG2E, cast, tanh
from .row_tiles import RowConfig, pick_row_config
from .rows import VECTOR, Rows, body, edge, groups, one_row, row_start, rows_of_program
from .softmax import merge_softmax, online_softmax

log = logging.getLogger("fastattn")

SIZES = ["num_rows", "inner", "num_cols"]
STRIDES = ["stride_xo", "stride_xi", "stride_rows"]


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """s of a tile of logits."""
    if HAS_SOFTCAP:
        return softcap * tanh(x * (1.0 / softcap))
    else:
        return x


@triton.jit
def target_of(target_ptr, weight_ptr, row, in_rows, num_cols, ignore_index, HAS_WEIGHT: tl.constexpr):
    """(t, whether it counts, whether it may be followed, w_t) of a (ROWS,) tile of rows; w_t is 0 where ignored, NaN where out of range."""
    target = tl.load(target_ptr + row.to(tl.int64), mask=in_rows, other=0).to(tl.int64)
    counts = in_rows & (target != ignore_index)
    inside = (target >= 0) & (target < num_cols)
    weight = tl.where(inside, 1.0, float("nan"))
    if HAS_WEIGHT:
        weight *= tl.load(weight_ptr + target, mask=counts & inside, other=0.0).to(tl.float32)
    return target, counts, counts & inside, tl.where(counts, weight, 0.0)


# --------------------------------------------------------------------------------------------------------------------
# Forward.


@triton.jit
def store_row(
    rows_ptr, stride_rows, row, in_rows, s_target, weight, counts, row_max, log_sum, shift, smooth_sum, total_weight,
    num_cols, label_smoothing, z_loss, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """The four numbers of a (ROWS,) tile of rows. smooth_sum = Σ_c w_c·(s_c − shift).

    All differences are taken from row_max or shift, numbers of the row's own size: lse − s would lose a common offset's digits.
    """
    lse = row_max + log_sum
    loss = weight * (log_sum + (row_max - s_target))
    if HAS_SMOOTHING:
        smooth = (total_weight * (log_sum + (row_max - shift)) - smooth_sum) / num_cols
        loss = (1.0 - label_smoothing) * loss + label_smoothing * smooth
    loss = tl.where(counts, loss + z_loss * lse * lse, 0.0)
    at = rows_ptr + row.to(tl.int64)
    tl.store(at, loss, mask=in_rows)
    tl.store(at + stride_rows, weight, mask=in_rows)
    tl.store(at + 2 * tl.cast(stride_rows, tl.int64), row_max, mask=in_rows)
    tl.store(at + 3 * tl.cast(stride_rows, tl.int64), log_sum, mask=in_rows)


@triton.jit
def weighted(s, shift, mask, weight_ptr, col, HAS_WEIGHT: tl.constexpr):
    """w_c·(s_c − shift) of a tile, 0 where masked."""
    terms = tl.where(mask, s - shift, 0.0)
    if HAS_WEIGHT:
        terms *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
    return terms


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr, target_ptr, weight_ptr, total_weight_ptr, rows_ptr, num_rows, inner, num_cols, stride_xo, stride_xi, stride_rows,
    ignore_index, label_smoothing, z_loss, softcap, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The four numbers of each of ROWS whole rows."""
    row, in_rows = rows_of_program(num_rows, ROWS)
    start = row_start(row, inner, stride_xo, stride_xi)
    target, counts, followed, weight = target_of(target_ptr, weight_ptr, row, in_rows, num_cols, ignore_index, HAS_WEIGHT)
    s_target = tl.load(x_ptr + start + target, mask=followed, other=0.0).to(tl.float32)
    s_target = capped(s_target, softcap, HAS_SOFTCAP)
    first, length = body(start, num_cols, ACCESS)
    length = length.to(tl.int32)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (cols < length[:, None]) & in_rows[:, None]
    x = tl.load(x_ptr + first[:, None] + cols, mask=mask, other=float("-inf")).to(tl.float32)
    s = capped(x, softcap, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        s = tl.where(mask, s, float("-inf"))
    row_max = tl.max(s, 1)
    if ACCESS == "edges":
        at, at_edge = edge(start, num_cols, in_rows)
        x_edge = tl.load(x_ptr + at, mask=at_edge, other=float("-inf")).to(tl.float32)
        s_edge = capped(x_edge, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            s_edge = tl.where(at_edge, s_edge, float("-inf"))
        row_max = tl.maximum(row_max, tl.max(s_edge, 1))
    finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)[:, None]  # of a row of nothing else, whose sum is 0, or NaN with one
    row_sum = tl.sum(tl.exp2((s - finite_max) * LOG2E), 1)
    if ACCESS == "edges":
        row_sum += tl.sum(tl.exp2((s_edge - finite_max) * LOG2E), 1)
    shift, smooth_sum, total_weight = s_target, s_target, 0.0
    if HAS_SMOOTHING:
        shift = tl.where(s_target > float("-inf"), s_target, 0.0)
        total_weight = tl.load(total_weight_ptr) if HAS_WEIGHT else num_cols.to(tl.float32)
        head = (first - start)[:, None] if ACCESS == "edges" else 0
        smooth_sum = tl.sum(weighted(s, shift[:, None], mask, weight_ptr, head + cols, HAS_WEIGHT), 1)
        if ACCESS == "edges":
            smooth_sum += tl.sum(weighted(s_edge, shift[:, None], at_edge, weight_ptr, at - start[:, None], HAS_WEIGHT), 1)
    store_row(
        rows_ptr, stride_rows, row, in_rows, s_target, weight, counts, row_max, tl.log2(row_sum) * LN2, shift, smooth_sum,
        total_weight, num_cols, label_smoothing, z_loss, HAS_SMOOTHING,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "ignore_index"])
def _cross_entropy_fwd_long_kernel(
    x_ptr, target_ptr, weight_ptr, total_weight_ptr, rows_ptr, num_rows, inner, num_cols, stride_xo, stride_xi, stride_rows,
    ignore_index, label_smoothing, z_loss, softcap, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of one long row, in one walk."""
    tl.static_assert(ROWS == 1)
    row, exists = one_row()
    start = row_start(row, inner, stride_xo, stride_xi)
    target, counts, followed, weight = target_of(target_ptr, weight_ptr, row, exists, num_cols, ignore_index, HAS_WEIGHT)
    s_target = tl.load(x_ptr + start + target, mask=followed, other=0.0).to(tl.float32)
    s_target = capped(s_target, softcap, HAS_SOFTCAP)
    shift = tl.where(s_target > float("-inf"), s_target, 0.0)
    first, length = body(start, num_cols, ACCESS)
    length = length.to(tl.int32)
    head = (first - start)[:, None] if ACCESS == "edges" else 0
    col = groups(BLOCK)  # (BLOCK / VECTOR, VECTOR)
    running_max = tl.full((BLOCK // VECTOR,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    smooth_sums = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for at in range(0, num_cols, BLOCK):
        mask = at + col < length[:, None]
        x = tl.load(x_ptr + first[:, None] + at + col, mask=mask, other=float("-inf")).to(tl.float32)
        s = capped(x, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            s = tl.where(mask, s, float("-inf"))
        running_max, running_sum = online_softmax(s, running_max, running_sum, 1)
        if HAS_SMOOTHING:
            smooth_sums += tl.sum(weighted(s, shift[:, None], mask, weight_ptr, head + at + col, HAS_WEIGHT), 1)
    row_max, row_sum = merge_softmax(running_max[None, :], running_sum[None, :], 1)
    smooth_sum = tl.sum(smooth_sums[None, :], 1)
    if ACCESS == "edges":
        at_edge, in_edge = edge(start, num_cols, exists)
        x_edge = tl.load(x_ptr + at_edge, mask=in_edge, other=float("-inf")).to(tl.float32)
        s_edge = capped(x_edge, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            s_edge = tl.where(in_edge, s_edge, float("-inf"))
        row_max, row_sum = online_softmax(s_edge, row_max, row_sum, 1)
        if HAS_SMOOTHING:
            smooth_sum += tl.sum(weighted(s_edge, shift[:, None], in_edge, weight_ptr, at_edge - start[:, None], HAS_WEIGHT), 1)
    total_weight = 0.0
    if HAS_SMOOTHING:
        total_weight = tl.load(total_weight_ptr) if HAS_WEIGHT else num_cols.to(tl.float32)
    store_row(
        rows_ptr, stride_rows, row, exists, s_target, weight, counts, row_max, tl.log2(row_sum) * LN2, shift, smooth_sum,
        total_weight, num_cols, label_smoothing, z_loss, HAS_SMOOTHING,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Backward.


@triton.jit
def logits_grad(
    x, col, target, p_scale, target_grad, smooth_grad, row_max, log2_sum, weight_ptr, mask, softcap,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dx of a (ROWS, n) tile: (p_scale·p − target_grad·[c = t] − smooth_grad·w_c)·ds/dx; row_max, … are (ROWS, 1)."""
    s = x
    if HAS_SOFTCAP:
        t = tanh(x * (1.0 / softcap))
        s = softcap * t
    dx = p_scale * tl.exp2((s - row_max) * LOG2E - log2_sum)
    dx = tl.where(col == target, dx - target_grad, dx)
    if HAS_SMOOTHING:
        if HAS_WEIGHT:
            dx -= smooth_grad * tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        else:
            dx -= smooth_grad
    if HAS_SOFTCAP:
        dx *= 1.0 - t * t
    return dx


@triton.jit(do_not_specialize=[*SIZES, "num_blocks", *STRIDES, "stride_dxo", "stride_dxi", "stride_dloss", "stride_dlse", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr, dlse_ptr, divisor_ptr, x_ptr, target_ptr, weight_ptr, total_weight_ptr, rows_ptr, dx_ptr, num_rows, inner, num_cols,
    num_blocks, stride_xo, stride_xi, stride_dxo, stride_dxi, stride_rows, stride_dloss, stride_dlse,
    ignore_index, label_smoothing, z_loss, softcap, HAS_DLSE: tl.constexpr, HAS_DIVISOR: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK columns of ROWS rows; g = dloss, over the divisor where there is one. A row without a gradient is not read."""
    program = tl.program_id(0)
    block = program % num_blocks
    row = program // num_blocks * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    row = tl.where(in_rows, row, 0)
    target, counts, _, weight = target_of(target_ptr, weight_ptr, row, in_rows, num_cols, ignore_index, HAS_WEIGHT)
    at_row = row.to(tl.int64)
    row_max = tl.load(rows_ptr + at_row + 2 * tl.cast(stride_rows, tl.int64), mask=in_rows, other=0.0)
    log_sum = tl.load(rows_ptr + at_row + 3 * tl.cast(stride_rows, tl.int64), mask=in_rows, other=0.0)
    g = tl.load(dloss_ptr + at_row * stride_dloss, mask=in_rows, other=0.0).to(tl.float32)
    if HAS_DIVISOR:
        g /= tl.load(divisor_ptr)
    target_grad, smooth_grad = g * weight, 0.0
    p_scale = target_grad
    if HAS_SMOOTHING:
        total_weight = tl.load(total_weight_ptr) if HAS_WEIGHT else num_cols.to(tl.float32)
        target_grad *= 1.0 - label_smoothing
        smooth_grad = tl.where(counts, g * (label_smoothing / num_cols), 0.0)
        p_scale = target_grad + smooth_grad * total_weight
        smooth_grad = smooth_grad[:, None]
    p_scale = tl.where(counts, p_scale + 2.0 * z_loss * g * (row_max + log_sum), 0.0)
    target_grad = tl.where(counts, target_grad, 0.0)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + at_row * stride_dlse, mask=in_rows, other=0.0).to(tl.float32)
        p_scale += dlse
        counts = counts | (dlse != 0.0)
    row_max = tl.where(counts, row_max, 0.0)[:, None]  # an ignored row may hold anything, and its gradient is 0
    log2_sum = tl.where(counts, log_sum * LOG2E, 0.0)[:, None]
    p_scale, target_grad = p_scale[:, None], target_grad[:, None]

    start, dx_start = row_start(row, inner, stride_xo, stride_xi), row_start(row, inner, stride_dxo, stride_dxi)
    first, length = body(start, num_cols, ACCESS)
    length = length.to(tl.int32)
    dx_first, _ = body(dx_start, num_cols, ACCESS)
    cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    head = (first - start).to(tl.int32)[:, None] if ACCESS == "edges" else 0
    # In int32, where one past its range may become any column: its row is NaN, or ignored, anyway.
    target = target.to(tl.int32)[:, None]
    mask = (cols < length[:, None]) & in_rows[:, None]
    x = tl.load(x_ptr + first[:, None] + cols, mask=mask & counts[:, None], other=float("-inf")).to(tl.float32)
    dx = logits_grad(
        x, head + cols, target, p_scale, target_grad, smooth_grad, row_max, log2_sum, weight_ptr, mask, softcap,
        HAS_WEIGHT, HAS_SMOOTHING, HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(dx_ptr + dx_first[:, None] + cols, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if ACCESS == "edges":
        if block == 0:
            at, at_edge = edge(start, num_cols, in_rows)
            x_edge = tl.load(x_ptr + at, mask=at_edge & counts[:, None], other=float("-inf")).to(tl.float32)
            dx_edge = logits_grad(
                x_edge, (at - start[:, None]).to(tl.int32), target, p_scale, target_grad, smooth_grad, row_max, log2_sum, weight_ptr,
                at_edge, softcap, HAS_WEIGHT, HAS_SMOOTHING, HAS_SOFTCAP,
            )  # fmt: skip
            at, at_edge = edge(dx_start, num_cols, in_rows)
            tl.store(dx_ptr + at, cast(dx_edge, dx_ptr.dtype.element_ty), mask=at_edge)


# --------------------------------------------------------------------------------------------------------------------
# Launchers. Targets, class weights and the numbers of rows are small next to the logits: those are copied where they are not contiguous.


def cross_entropy_fwd(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float, config: RowConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the forward kernel over logits (…, C), any strides, and targets (…). Returns (4, T) fp32: loss, w_t, max, log-sum."""
    rows = Rows(x=x)
    numbers = torch.empty(4, rows.num_rows, dtype=torch.float32, device=x.device)
    config = config or pick_row_config("cross_entropy_fwd", rows.num_cols, x.element_size())
    log.debug("cross_entropy_fwd: %s", config)
    args = rows.args() | _options(target, weight, label_smoothing, softcap) | dict(
        rows_ptr=numbers, stride_rows=rows.num_rows, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        softcap=softcap,
    )  # fmt: skip
    kernel = _cross_entropy_fwd_long_kernel if config.long else _cross_entropy_fwd_kernel
    launch(kernel, rows.grid("cross_entropy", config.ROWS), x.device, **args, **config.meta())
    return numbers


def cross_entropy_bwd(
    dloss: torch.Tensor, dlse: torch.Tensor | None, divisor: torch.Tensor | None, x: torch.Tensor, target: torch.Tensor,
    weight: torch.Tensor | None, numbers: torch.Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    out: torch.Tensor | None = None, config: RowConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the backward kernel. Returns dx, contiguous, or in `out`, of x's dtype, which may be x itself.

    dloss: () for all rows, or (…) one a row, any strides; divisor: () fp32, divides it; dlse: (…), None is 0;
    numbers: the forward's, or columns of it.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rows = Rows(x=x, dx=dx)
    config = config or pick_row_config("cross_entropy_bwd", rows.num_cols, x.element_size())
    log.debug("cross_entropy_bwd: %s", config)
    num_blocks = triton.cdiv(rows.num_cols, config.BLOCK)
    dloss, dlse = dloss.reshape(-1), None if dlse is None else dlse.reshape(-1)
    args = rows.args() | _options(target, weight, label_smoothing, softcap) | dict(
        dloss_ptr=dloss, dlse_ptr=dlse, divisor_ptr=divisor, rows_ptr=numbers, num_blocks=num_blocks, stride_rows=numbers.stride(0),
        stride_dloss=dloss.stride(0) if dloss.numel() > 1 else 0, stride_dlse=0 if dlse is None else dlse.stride(0),
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        HAS_DLSE=dlse is not None, HAS_DIVISOR=divisor is not None,
    )  # fmt: skip
    grid = rows.grid("cross_entropy", config.ROWS, num_blocks)
    launch(_cross_entropy_bwd_kernel, grid, x.device, **args, **config.meta())
    return dx


def _options(target: torch.Tensor, weight: torch.Tensor | None, label_smoothing: float, softcap: float) -> dict:
    """The arguments that both kernels share."""
    weight = None if weight is None else weight.contiguous()
    smoothed = label_smoothing != 0.0
    return dict(
        target_ptr=target.reshape(-1).contiguous(),
        weight_ptr=weight,
        total_weight_ptr=weight.sum(dtype=torch.float32) if weight is not None and smoothed else None,
        HAS_WEIGHT=weight is not None,
        HAS_SMOOTHING=smoothed,
        HAS_SOFTCAP=softcap != 0.0,
    )
