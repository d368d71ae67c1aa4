"""Layer norm and RMS norm, with a residual added on the way or not: forward. The backward is in `norm_bwd`.

    h = x, or residual + dropout(x), rounded to the residual's dtype and stored: the new residual
    x̂ = (h − mean h)·rstd with rstd = 1/√(mean (h − mean h)² + eps); RMS norm has no mean: x̂ = h/√(mean h² + eps)
    y = x̂·(weight + weight_offset) + bias

in fp32. A row of up to 8192 columns stays in registers, and short rows share a program: the mean is that of h less the row's first
entry, so that a common offset costs no digits, and the variance is taken of what is left when it is subtracted. A longer row is
walked twice in blocks, with nothing reduced across threads before a walk ends; so few rows are on the way at a time that the second
walk mostly finds them in L2. Floor: 2·numel·itemsize bytes, 4·numel·itemsize with a residual.
"""

import logging

import torch
import triton
import triton.language as tl

from .launch import launch
from .primitives import cast, dropout_keep
from .row_tiles import RowConfig, pick_row_config
from .rows import VECTOR, Rows, body, edge, groups, one_row, row_start, rows_of_program

log = logging.getLogger("fastattn")

SIZES = ["num_rows", "inner", "num_cols"]
STRIDES = ["stride_xo", "stride_xi", "stride_residualo", "stride_residuali", "stride_yo", "stride_yi"]


@triton.jit
def load_weight(weight_ptr, col, mask, weight_offset, CAST_BEFORE_WEIGHT: tl.constexpr, POLICY: tl.constexpr):
    """weight + weight_offset: in fp32, or, where the normalised value was rounded before it, rounded too."""
    weight = tl.load(weight_ptr + col, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32) + weight_offset
    if CAST_BEFORE_WEIGHT:
        weight = cast(weight, weight_ptr.dtype.element_ty).to(tl.float32)
    return weight


@triton.jit
def load_sum(x_ptr, residual_ptr, h_ptr, x_at, residual_at, h_at, mask, keep, dropout_scale):
    """h of a tile in fp32: x, or residual + dropout(x) as it is rounded and stored."""
    h = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        if keep is not None:
            h = tl.where(keep, h * dropout_scale, 0.0)
        h += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
        rounded = cast(h, h_ptr.dtype.element_ty)
        tl.store(h_ptr + h_at, rounded, mask=mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def load_first(x_ptr, residual_ptr, x_start, residual_start, in_rows):
    """About what a row's entries have in common, if anything: its first, of rows at `start`."""
    shift = tl.load(x_ptr + x_start, mask=in_rows, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        shift += tl.load(residual_ptr + residual_start, mask=in_rows, other=0.0).to(tl.float32)
    return shift


@triton.jit
def store_scaled(
    y_ptr, weight_ptr, bias_ptr, y_at, mask, x_hat, col, in_cols, weight_offset, X_DTYPE: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Store y = x̂·(weight + weight_offset) + bias of a tile; `col` and `in_cols` are the weight's."""
    y = x_hat
    if CAST_BEFORE_WEIGHT:
        y = cast(y, X_DTYPE).to(tl.float32)
    if weight_ptr is not None:
        y *= load_weight(weight_ptr, col, in_cols, weight_offset, CAST_BEFORE_WEIGHT, "evict_last")
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=in_cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y_ptr + y_at, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "dropout_threshold"])
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, stats_ptr, num_rows, inner, num_cols, stride_xo,
    stride_xi, stride_residualo, stride_residuali, stride_yo, stride_yi, eps, weight_offset, dropout_threshold, dropout_scale,
    SUBTRACT_MEAN: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x̂·(weight + weight_offset) + bias of ROWS whole rows; stats = (rstd, mean) of each. h lies where y lies."""
    row, in_rows = rows_of_program(num_rows, ROWS)
    x_start, residual_start = row_start(row, inner, stride_xo, stride_xi), row_start(row, inner, stride_residualo, stride_residuali)
    y_start = row_start(row, inner, stride_yo, stride_yi)
    x_first, length = body(x_start, num_cols, ACCESS)
    residual_first, _ = body(residual_start, num_cols, ACCESS)
    y_first, _ = body(y_start, num_cols, ACCESS)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (cols < length[:, None]) & in_rows[:, None]
    keep = None
    if seed_ptr is not None:
        keep = dropout_keep(tl.load(seed_ptr), 0, tl.program_id(0) * ROWS, 0, dropout_threshold, ROWS, BLOCK)
    x_at, residual_at, y_at = x_first[:, None] + cols, residual_first[:, None] + cols, y_first[:, None] + cols
    h = load_sum(x_ptr, residual_ptr, h_ptr, x_at, residual_at, y_at, mask, keep, dropout_scale)
    if ACCESS == "edges":
        x_edge, at_edge = edge(x_start, num_cols, in_rows)
        residual_edge, _ = edge(residual_start, num_cols, in_rows)
        y_edge, _ = edge(y_start, num_cols, in_rows)
        h_edge = load_sum(x_ptr, residual_ptr, h_ptr, x_edge, residual_edge, y_edge, at_edge, None, dropout_scale)
    if SUBTRACT_MEAN:
        shift = load_first(x_ptr, residual_ptr, x_start, residual_start, in_rows)
        h = tl.where(mask, h - shift[:, None], 0.0)
        total = tl.sum(h, 1)
        if ACCESS == "edges":
            h_edge = tl.where(at_edge, h_edge - shift[:, None], 0.0)
            total += tl.sum(h_edge, 1)
        rest = total / num_cols
        h = tl.where(mask, h - rest[:, None], 0.0)
        if ACCESS == "edges":
            h_edge = tl.where(at_edge, h_edge - rest[:, None], 0.0)
        tl.store(stats_ptr + tl.cast(num_rows, tl.int64) + row, shift + rest, mask=in_rows)
    squares = tl.sum(h * h, 1)
    if ACCESS == "edges":
        squares += tl.sum(h_edge * h_edge, 1)
    rstd = tl.rsqrt(squares / num_cols + eps)
    tl.store(stats_ptr + row, rstd, mask=in_rows)
    if ACCESS == "edges":
        store_scaled(
            y_ptr, weight_ptr, bias_ptr, y_edge, at_edge, h_edge * rstd[:, None], x_edge - x_start[:, None], at_edge, weight_offset,
            x_ptr.dtype.element_ty, CAST_BEFORE_WEIGHT,
        )  # fmt: skip
        col, in_cols = (x_first - x_start).to(tl.int32)[:, None] + cols, mask
    elif ACCESS == "vector":
        col, in_cols = cols, cols < num_cols // VECTOR * VECTOR
    else:
        col, in_cols = cols, cols < num_cols
    store_scaled(
        y_ptr, weight_ptr, bias_ptr, y_at, mask, h * rstd[:, None], col, in_cols, weight_offset, x_ptr.dtype.element_ty,
        CAST_BEFORE_WEIGHT,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "dropout_threshold"])
def _norm_fwd_long_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, stats_ptr, num_rows, inner, num_cols, stride_xo,
    stride_xi, stride_residualo, stride_residuali, stride_yo, stride_yi, eps, weight_offset, dropout_threshold, dropout_scale,
    SUBTRACT_MEAN: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of one long row, in two walks: the statistics, then y. The second reads h again, as it was stored.

    The first walk sums up h less `shift`, the mean of the row's first block, and the squares: the row's variance is at least
    BLOCK/N of the squared distance between the two means, so that their difference loses no more than that of its digits.
    """
    tl.static_assert(ROWS == 1)
    row, exists = one_row()
    x_start, residual_start = row_start(row, inner, stride_xo, stride_xi), row_start(row, inner, stride_residualo, stride_residuali)
    y_start = row_start(row, inner, stride_yo, stride_yi)
    x_first, length = body(x_start, num_cols, ACCESS)
    residual_first, _ = body(residual_start, num_cols, ACCESS)
    y_first, _ = body(y_start, num_cols, ACCESS)
    col = groups(BLOCK)  # (BLOCK / VECTOR, VECTOR)
    shift = tl.zeros((1,), tl.float32)
    if SUBTRACT_MEAN:
        near = tl.load(x_ptr + x_first[:, None] + col, mask=col < length[:, None], other=0.0).to(tl.float32)
        if residual_ptr is not None:
            near += tl.load(residual_ptr + residual_first[:, None] + col, mask=col < length[:, None], other=0.0).to(tl.float32)
        shift += tl.sum(tl.sum(near, 1), 0) / tl.maximum(tl.minimum(length, BLOCK), 1).to(tl.float32)
    sums, squares = tl.zeros((BLOCK // VECTOR,), tl.float32), tl.zeros((BLOCK // VECTOR,), tl.float32)
    for at in range(0, num_cols, BLOCK):
        mask = at + col < length[:, None]
        keep = None
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), 0, tl.program_id(0), at, dropout_threshold, 1, BLOCK)
            keep = tl.reshape(keep, (BLOCK // VECTOR, VECTOR))
        x_at, residual_at, y_at = x_first[:, None] + at + col, residual_first[:, None] + at + col, y_first[:, None] + at + col
        h = load_sum(x_ptr, residual_ptr, h_ptr, x_at, residual_at, y_at, mask, keep, dropout_scale)
        if SUBTRACT_MEAN:
            h = tl.where(mask, h - shift[:, None], 0.0)
            sums += tl.sum(h, 1)
        squares += tl.sum(h * h, 1)
    total, variance = tl.sum(sums, 0) + tl.zeros((1,), tl.float32), tl.sum(squares, 0) + tl.zeros((1,), tl.float32)
    if ACCESS == "edges":
        x_edge, at_edge = edge(x_start, num_cols, exists)
        residual_edge, _ = edge(residual_start, num_cols, exists)
        y_edge, _ = edge(y_start, num_cols, exists)
        h_edge = load_sum(x_ptr, residual_ptr, h_ptr, x_edge, residual_edge, y_edge, at_edge, None, dropout_scale)
        if SUBTRACT_MEAN:
            h_edge = tl.where(at_edge, h_edge - shift[:, None], 0.0)
            total += tl.sum(h_edge, 1)
        variance += tl.sum(h_edge * h_edge, 1)
    rest, variance = total / num_cols, variance / num_cols
    if SUBTRACT_MEAN:
        variance = tl.maximum(variance - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(stats_ptr + tl.cast(num_rows, tl.int64) + row, shift + rest)
    rstd = tl.rsqrt(variance + eps)
    tl.store(stats_ptr + row, rstd)
    if ACCESS == "edges":
        store_scaled(
            y_ptr, weight_ptr, bias_ptr, y_edge, at_edge, (h_edge - rest[:, None]) * rstd[:, None], x_edge - x_start[:, None], at_edge,
            weight_offset, x_ptr.dtype.element_ty, CAST_BEFORE_WEIGHT,
        )  # fmt: skip
    if residual_ptr is not None:
        tl.debug_barrier()  # h comes back from memory, and another thread may have written it
    for at in range(0, num_cols, BLOCK):
        mask = at + col < length[:, None]
        if residual_ptr is not None:
            h = tl.load(h_ptr + y_first[:, None] + at + col, mask=mask, other=0.0).to(tl.float32)
        else:
            h = tl.load(x_ptr + x_first[:, None] + at + col, mask=mask, other=0.0).to(tl.float32)
        if SUBTRACT_MEAN:
            h = (h - shift[:, None]) - rest[:, None]
        if ACCESS == "edges":
            of_weight = (x_first - x_start).to(tl.int32)[:, None] + at + col
        else:
            of_weight = at + col
        store_scaled(
            y_ptr, weight_ptr, bias_ptr, y_first[:, None] + at + col, mask, h * rstd[:, None], of_weight, mask, weight_offset,
            x_ptr.dtype.element_ty, CAST_BEFORE_WEIGHT,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Launcher.


def norm_fwd(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    dropout_seed: torch.Tensor | None, eps: float, dropout_p: float, weight_offset: float, subtract_mean: bool,
    cast_before_weight: bool, dtype: torch.dtype, config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """Launch the forward kernel over rows x (…, N), any strides; weight and bias (N,).

    Returns y in `dtype` and, with a residual, h in its dtype, both contiguous; stats, fp32: (2, rows), rstd and mean, or (1, rows)
    without a mean.
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = None if residual is None else torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    stats = torch.empty((1 + subtract_mean, x.shape[:-1].numel()), dtype=torch.float32, device=x.device)
    tensors = dict(x=x, y=y) if residual is None else dict(x=x, residual=residual, y=y)
    rows = Rows(**tensors)
    args = dict(residual_ptr=None, stride_residualo=0, stride_residuali=0) | rows.args()
    if dropout_p > 0.0 and rows.access == "edges":
        args["ACCESS"] = "scalar"  # a mask comes in fours of columns, which an edge would split
    config = config or pick_row_config("norm_fwd", rows.num_cols, max(t.element_size() for t in tensors.values()))
    log.debug("norm_fwd: %s", config)
    launch(
        _norm_fwd_long_kernel if config.long else _norm_fwd_kernel, rows.grid("norm", config.ROWS), rows.device, **args,
        weight_ptr=None if weight is None else weight.contiguous(), bias_ptr=None if bias is None else bias.contiguous(),
        seed_ptr=dropout_seed if dropout_p > 0.0 else None, h_ptr=h, stats_ptr=stats,
        eps=eps, weight_offset=weight_offset, dropout_threshold=int(dropout_p * 2**32) - 2**31, dropout_scale=1.0 / (1.0 - dropout_p),
        SUBTRACT_MEAN=subtract_mean, CAST_BEFORE_WEIGHT=cast_before_weight, **config.meta(),
    )  # fmt: skip
    return y, h, stats
