"""Softmax, forward and backward.

    y = exp(x − max x) / Σ exp(x − max x)          dx = y ∘ (dy − Σ y∘dy)

in fp32. Along the last dim, a row of up to 32768 columns (16384 backward) is read once and stays in registers, and short rows
share a program; a longer one is walked twice in blocks, where each group of VECTOR adjacent columns keeps a running maximum and
sum of its own (arXiv 1805.02867), so that nothing is reduced across threads before the walk ends. Along another dim, a program
takes adjacent columns of it. Floor: 2·numel·itemsize bytes forward, 3·numel·itemsize backward; a walk reads its inputs again.
"""

import logging

import torch
import triton
import triton.language as tl

from .launch import check_grid, launch
from .primitives import LOG2E, cast
from .row_tiles import RowConfig, pick_row_config
from .rows import MOST, VECTOR, Rows, body, edge, groups, one_row, row_start, rows_of_program

log = logging.getLogger("fastattn")

SIZES = ["num_rows", "inner", "num_cols"]
STRIDES = ["stride_xo", "stride_xi", "stride_yo", "stride_yi", "stride_dyo", "stride_dyi", "stride_dxo", "stride_dxi"]


# --------------------------------------------------------------------------------------------------------------------
# Forward.


@triton.jit(do_not_specialize=[*SIZES, *STRIDES[:4]])
def _softmax_fwd_kernel(
    x_ptr, y_ptr, num_rows, inner, num_cols, stride_xo, stride_xi, stride_yo, stride_yi,
    ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = exp(x − m) / Σ exp(x − m) of ROWS whole rows.

    The maximum is subtracted before the base changes: x·log2e − m·log2e would lose a common offset's digits.
    """
    row, in_rows = rows_of_program(num_rows, ROWS)
    start = row_start(row, inner, stride_xo, stride_xi)
    first, length = body(start, num_cols, ACCESS)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (cols < length[:, None]) & in_rows[:, None]
    x = tl.load(x_ptr + first[:, None] + cols, mask=mask, other=float("-inf")).to(tl.float32)
    row_max = tl.max(x, 1)
    if ACCESS == "edges":
        at, at_edge = edge(start, num_cols, in_rows)
        x_edge = tl.load(x_ptr + at, mask=at_edge, other=float("-inf")).to(tl.float32)
        row_max = tl.maximum(row_max, tl.max(x_edge, 1))
    p = tl.exp2((x - row_max[:, None]) * LOG2E)
    row_sum = tl.sum(p, 1)
    if ACCESS == "edges":
        p_edge = tl.exp2((x_edge - row_max[:, None]) * LOG2E)
        row_sum += tl.sum(p_edge, 1)
    scale = (1.0 / row_sum)[:, None]
    start = row_start(row, inner, stride_yo, stride_yi)
    first, _ = body(start, num_cols, ACCESS)
    tl.store(y_ptr + first[:, None] + cols, cast(p * scale, y_ptr.dtype.element_ty), mask=mask)
    if ACCESS == "edges":
        at, at_edge = edge(start, num_cols, in_rows)
        tl.store(y_ptr + at, cast(p_edge * scale, y_ptr.dtype.element_ty), mask=at_edge)


@triton.jit
def online_softmax(x, running_max, running_sum, AXIS: tl.constexpr):
    """The running maxima and sums of exp(x − max) after a block x, reduced along AXIS; −inf and 0 before the first.

    m′ = max(m, max x);  s′ = s·exp(m − m′) + Σ exp(x − m′), where a group of nothing but −inf keeps m = −inf and s = 0.
    """
    new_max = tl.maximum(running_max, tl.max(x, AXIS))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2((x - tl.expand_dims(shift, AXIS)) * LOG2E)
    return new_max, running_sum * tl.exp2((running_max - shift) * LOG2E) + tl.sum(p, AXIS)


@triton.jit
def merge_softmax(running_max, running_sum, AXIS: tl.constexpr):
    """(max, sum of exp(x − max)) of groups together. All of them −inf: (−inf, 0)."""
    total_max = tl.max(running_max, AXIS)
    shift = tl.where(total_max == float("-inf"), 0.0, total_max)
    return total_max, tl.sum(running_sum * tl.exp2((running_max - tl.expand_dims(shift, AXIS)) * LOG2E), AXIS)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES[:4]])
def _softmax_fwd_long_kernel(
    x_ptr, y_ptr, num_rows, inner, num_cols, stride_xo, stride_xi, stride_yo, stride_yi,
    ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of one long row, in two walks: maximum and sum, then y."""
    tl.static_assert(ROWS == 1)
    row, exists = one_row()
    start, y_start = row_start(row, inner, stride_xo, stride_xi), row_start(row, inner, stride_yo, stride_yi)
    first, length = body(start, num_cols, ACCESS)
    y_first, _ = body(y_start, num_cols, ACCESS)
    col = groups(BLOCK)  # (BLOCK / VECTOR, VECTOR)
    running_max = tl.full((BLOCK // VECTOR,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for at in range(0, num_cols, BLOCK):
        x = tl.load(x_ptr + first[:, None] + at + col, mask=at + col < length[:, None], other=float("-inf")).to(tl.float32)
        running_max, running_sum = online_softmax(x, running_max, running_sum, 1)
    row_max, row_sum = merge_softmax(running_max, running_sum, 0)
    if ACCESS == "edges":
        at_edge, in_edge = edge(start, num_cols, exists)
        x_edge = tl.load(x_ptr + at_edge, mask=in_edge, other=float("-inf")).to(tl.float32)
        edge_max, edge_sum = online_softmax(x_edge, row_max + tl.zeros((1,), tl.float32), row_sum, 1)
        row_max, row_sum = tl.max(edge_max, 0), tl.max(edge_sum, 0)
        at_edge, in_edge = edge(y_start, num_cols, exists)
        y_edge = tl.exp2((x_edge - row_max) * LOG2E) / row_sum
        tl.store(y_ptr + at_edge, cast(y_edge, y_ptr.dtype.element_ty), mask=in_edge)
    scale = 1.0 / row_sum
    for at in range(0, num_cols, BLOCK):
        mask = at + col < length[:, None]
        x = tl.load(x_ptr + first[:, None] + at + col, mask=mask, other=float("-inf")).to(tl.float32)
        y = tl.exp2((x - row_max) * LOG2E) * scale
        tl.store(y_ptr + y_first[:, None] + at + col, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "num_blocks"])
def _softmax_strided_fwd_kernel(
    x_ptr, y_ptr, num_rows, num_cols, num_blocks, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Softmax down the columns of contiguous (num_rows, num_cols) matrices, BLOCK_COLS columns a program: each lane keeps a
    maximum and a sum of the rows it meets, merged at the end."""
    if ALIGNED:
        num_cols = num_cols // VECTOR * VECTOR  # what it is, and now the compiler knows
    matrix, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    base = matrix.to(tl.int64) * num_rows * num_cols
    col = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    lane = tl.arange(0, BLOCK_ROWS)[:, None]
    running_max = tl.full((BLOCK_ROWS, BLOCK_COLS), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for row in range(0, num_rows, BLOCK_ROWS):
        mask = (row + lane < num_rows) & (col < num_cols)
        x = tl.load(x_ptr + base + (row + lane).to(tl.int64) * num_cols + col, mask=mask, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(running_max, x)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        running_sum = running_sum * tl.exp2((running_max - shift) * LOG2E) + tl.exp2((x - shift) * LOG2E)
        running_max = new_max
    col_max, col_sum = merge_softmax(running_max, running_sum, 0)
    scale = (1.0 / col_sum)[None, :]
    for row in range(0, num_rows, BLOCK_ROWS):
        mask = (row + lane < num_rows) & (col < num_cols)
        offsets = base + (row + lane).to(tl.int64) * num_cols + col
        x = tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        tl.store(y_ptr + offsets, cast(tl.exp2((x - col_max[None, :]) * LOG2E) * scale, y_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Backward.


@triton.jit(do_not_specialize=[*SIZES, *STRIDES[2:]])
def _softmax_bwd_kernel(
    y_ptr, dy_ptr, dx_ptr, num_rows, inner, num_cols, stride_yo, stride_yi, stride_dyo, stride_dyi, stride_dxo, stride_dxi,
    ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = y∘(dy − Σ y∘dy) of ROWS whole rows."""
    row, in_rows = rows_of_program(num_rows, ROWS)
    y_start = row_start(row, inner, stride_yo, stride_yi)
    dy_start = row_start(row, inner, stride_dyo, stride_dyi)
    dx_start = row_start(row, inner, stride_dxo, stride_dxi)
    y_first, length = body(y_start, num_cols, ACCESS)
    dy_first, _ = body(dy_start, num_cols, ACCESS)
    dx_first, _ = body(dx_start, num_cols, ACCESS)
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (cols < length[:, None]) & in_rows[:, None]
    y = tl.load(y_ptr + y_first[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + dy_first[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    dot = tl.sum(y * dy, 1)
    if ACCESS == "edges":
        at, at_edge = edge(y_start, num_cols, in_rows)
        y_edge = tl.load(y_ptr + at, mask=at_edge, other=0.0).to(tl.float32)
        at, at_edge = edge(dy_start, num_cols, in_rows)
        dy_edge = tl.load(dy_ptr + at, mask=at_edge, other=0.0).to(tl.float32)
        dot += tl.sum(y_edge * dy_edge, 1)
    dx = y * (dy - dot[:, None])
    tl.store(dx_ptr + dx_first[:, None] + cols, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    if ACCESS == "edges":
        at, at_edge = edge(dx_start, num_cols, in_rows)
        tl.store(dx_ptr + at, cast(y_edge * (dy_edge - dot[:, None]), dx_ptr.dtype.element_ty), mask=at_edge)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES[2:]])
def _softmax_bwd_long_kernel(
    y_ptr, dy_ptr, dx_ptr, num_rows, inner, num_cols, stride_yo, stride_yi, stride_dyo, stride_dyi, stride_dxo, stride_dxi,
    ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of one long row, in two walks: Σ y∘dy, then dx."""
    tl.static_assert(ROWS == 1)
    row, exists = one_row()
    y_start = row_start(row, inner, stride_yo, stride_yi)
    dy_start = row_start(row, inner, stride_dyo, stride_dyi)
    dx_start = row_start(row, inner, stride_dxo, stride_dxi)
    y_first, length = body(y_start, num_cols, ACCESS)
    dy_first, _ = body(dy_start, num_cols, ACCESS)
    dx_first, _ = body(dx_start, num_cols, ACCESS)
    cols = tl.arange(0, BLOCK)
    partial = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, num_cols, BLOCK):
        mask = at + cols < length
        y = tl.load(y_ptr + y_first + at + cols, mask=mask, other=0.0).to(tl.float32)
        partial += y * tl.load(dy_ptr + dy_first + at + cols, mask=mask, other=0.0).to(tl.float32)
    dot = tl.sum(partial, 0)
    if ACCESS == "edges":
        at_edge, in_edge = edge(y_start, num_cols, exists)
        y_edge = tl.load(y_ptr + at_edge, mask=in_edge, other=0.0).to(tl.float32)
        at_edge, in_edge = edge(dy_start, num_cols, exists)
        dy_edge = tl.load(dy_ptr + at_edge, mask=in_edge, other=0.0).to(tl.float32)
        dot += tl.sum(tl.sum(y_edge * dy_edge, 1), 0)
        at_edge, in_edge = edge(dx_start, num_cols, exists)
        tl.store(dx_ptr + at_edge, cast(y_edge * (dy_edge - dot), dx_ptr.dtype.element_ty), mask=in_edge)
    for at in range(0, num_cols, BLOCK):
        mask = at + cols < length
        y = tl.load(y_ptr + y_first + at + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_first + at + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + dx_first + at + cols, cast(y * (dy - dot), dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "num_blocks"])
def _softmax_strided_bwd_kernel(
    y_ptr, dy_ptr, dx_ptr, num_rows, num_cols, num_blocks, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx down the columns of contiguous (num_rows, num_cols) matrices, BLOCK_COLS columns a program."""
    if ALIGNED:
        num_cols = num_cols // VECTOR * VECTOR  # what it is, and now the compiler knows
    matrix, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    base = matrix.to(tl.int64) * num_rows * num_cols
    col = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    lane = tl.arange(0, BLOCK_ROWS)[:, None]
    partial = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for row in range(0, num_rows, BLOCK_ROWS):
        mask = (row + lane < num_rows) & (col < num_cols)
        offsets = base + (row + lane).to(tl.int64) * num_cols + col
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        partial += y * tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dot = tl.sum(partial, 0)[None, :]
    for row in range(0, num_rows, BLOCK_ROWS):
        mask = (row + lane < num_rows) & (col < num_cols)
        offsets = base + (row + lane).to(tl.int64) * num_cols + col
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, cast(y * (dy - dot), dx_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# Launchers.

STRIDED = dict(BLOCK_ROWS=16, BLOCK_COLS=128, num_warps=4)  # static: 256 bytes a row of a tile, 16 elements a thread


def softmax_fwd(x: torch.Tensor, dim: int, dtype: torch.dtype, config: RowConfig | None = None) -> torch.Tensor:
    """Launch the forward kernel over x, any shape of at least one dim, any strides. Returns y, contiguous, in `dtype`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if dim == x.dim() - 1:
        _launch_rows((_softmax_fwd_kernel, _softmax_fwd_long_kernel), "softmax_fwd", config, x=x, y=y)
    else:
        _launch_strided(_softmax_strided_fwd_kernel, dim, x=x.contiguous(), y=y)
    return y


def softmax_bwd(
    dy: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype, config: RowConfig | None = None
) -> torch.Tensor:
    """Launch the backward kernel; dy has y's shape and any strides. Returns dx, contiguous, in `dtype`."""
    dx = torch.empty(y.shape, dtype=dtype, device=y.device)
    if dim == y.dim() - 1:
        _launch_rows((_softmax_bwd_kernel, _softmax_bwd_long_kernel), "softmax_bwd", config, y=y, dy=dy, dx=dx)
    else:
        _launch_strided(_softmax_strided_bwd_kernel, dim, y=y.contiguous(), dy=dy.contiguous(), dx=dx)
    return dx


def _launch_rows(kernels: tuple, name: str, config: RowConfig | None, **tensors: torch.Tensor) -> None:
    rows = Rows(**tensors)
    config = config or pick_row_config(name, rows.num_cols, max(t.element_size() for t in tensors.values()))
    log.debug("%s: %s", name, config)
    launch(kernels[config.long], rows.grid("softmax", config.ROWS), rows.device, **rows.args(), **config.meta())


def _launch_strided(kernel, dim: int, **tensors: torch.Tensor) -> None:
    """Over contiguous tensors seen as matrices (…, size of dim, what follows it)."""
    shape = next(iter(tensors.values())).shape
    num_rows, num_cols = shape[dim], shape[dim + 1 :].numel()
    num_blocks = triton.cdiv(num_cols, STRIDED["BLOCK_COLS"])
    if max(num_rows, num_cols) > MOST:  # counted in 32 bits
        raise ValueError(f"softmax: x must have dims of at most {MOST} here, got {max(num_rows, num_cols)}")
    programs = shape[:dim].numel() * num_blocks if num_rows else 0
    launch(
        kernel, check_grid("softmax", programs), next(iter(tensors.values())).device,
        **{f"{name}_ptr": t for name, t in tensors.items()},
        num_rows=num_rows, num_cols=num_cols, num_blocks=num_blocks, ALIGNED=num_cols % VECTOR.value == 0, **STRIDED,
    )  # fmt: skip
