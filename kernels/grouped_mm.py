"""The grouped matrix product, its gradients, and the parts of which a mixture of experts builds its own.

    out[scatter[r]] = x[gather[r]]·w[e]ᵀ + bias[e]      for the rows r of group e: offsets[e − 1] ≤ r < offsets[e]

The gradient of x is the same product with w the other way round; that of w[e] is the sum over the group's rows of an outer product,
dw[e] = Σ_r dy[r]ᵀ·x[r].

How many tiles a group has, only the GPU knows. Programs stay, as many as the part has room for, and walk through tiles in one numbering:
each looks at how many tiles all groups have to find its next one (`schedule`, `find_tile`), so that nothing waits for a count, no table
is written and no program starts in vain. Within a group GROUP_M tiles of rows go through the columns side by side, then the next ones: the
matrix's part that a wave of programs reads, and the rows', stay in the L2 cache. The rows in no group are written with
zeros, by all programs after their last tile.

Rows that are gathered are loaded through their numbers, straight into shared memory; what lies as a matrix comes by TMA where it may.
Floor: 2·R·N·K FLOPs; (R·K + R·N + E·N·K)·itemsize bytes.
"""

import logging
import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .grouped_tiles import GroupedConfig, pick_grouped_config
from .launch import check_grid, interpreted, launch, num_multiprocessors, precision_of, target_of
from .primitives import cast, dot
from .rows import vector_of, with_contiguous_rows

log = logging.getLogger("fastattn")

MOST_ROWS = 2**31 - 2**17  # counted in 32 bits, a tile's past the end too


# --------------------------------------------------------------------------------------------------------------------
# Which tile a program computes.


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def ordered_ends(offsets_ptr, num_rows, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr):
    """(GROUPS,): where each group ends, brought into order whatever offsets holds; past the last group, its end again."""
    group = tl.arange(0, GROUPS)
    end = tl.load(offsets_ptr + group, mask=group < NUM_GROUPS, other=0)
    return tl.associative_scan(tl.minimum(tl.maximum(end, 0), num_rows), 0, larger)


@triton.jit
def rows_of_group(offsets_ptr, group, num_rows, GROUPS: tl.constexpr):
    """(start, end) of one group's rows, the ends in order."""
    other = tl.arange(0, GROUPS)
    ends = tl.load(offsets_ptr + other, mask=other <= group, other=0)
    start = tl.max(tl.where(other < group, ends, 0), 0)
    return tl.minimum(start, num_rows), tl.minimum(tl.maximum(tl.max(ends, 0), 0), num_rows)


@triton.jit
def schedule(offsets_ptr, num_rows, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(last, end): (GROUPS,) how many tiles a group and those before it have, and where the last group ends."""
    group = tl.arange(0, GROUPS)
    ends = ordered_ends(offsets_ptr, num_rows, NUM_GROUPS, GROUPS)
    before = tl.load(offsets_ptr + group - 1, mask=(group > 0) & (group <= NUM_GROUPS), other=0)
    starts = tl.associative_scan(tl.minimum(tl.maximum(before, 0), num_rows), 0, larger)
    return tl.cumsum((ends - starts + (BLOCK_M - 1)) // BLOCK_M, 0), tl.max(ends, 0)


@triton.jit
def find_tile(
    index, offsets_ptr, last, num_rows, NUM_BLOCKS: tl.constexpr, GROUPS: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(group, row, end, block) of tile `index`, of which each group has NUM_BLOCKS a tile of rows: rows row, …, end − 1, at most
    BLOCK_M of them, and a block of columns.

    `last` never decreases, so that the first group with tiles left is where it is least. A group's ends are read once more: kept from one
    tile to the next, those of all groups would take registers from the product.
    """
    NEVER: tl.constexpr = 2147483647
    done = last * NUM_BLOCKS <= index
    group = tl.min(tl.where(done, NEVER, tl.arange(0, GROUPS)), 0)
    start, end = rows_of_group(offsets_ptr, group, num_rows, GROUPS)
    local = index - tl.max(tl.where(done, last, 0), 0) * NUM_BLOCKS
    first = local // (GROUP_M * NUM_BLOCKS) * GROUP_M
    local = local % (GROUP_M * NUM_BLOCKS)
    abreast = tl.minimum((end - start + (BLOCK_M - 1)) // BLOCK_M - first, GROUP_M)
    return group, start + (first + local % abreast) * BLOCK_M, end, local // abreast


# --------------------------------------------------------------------------------------------------------------------
# A tile of a product.


@triton.jit
def numbered_rows(numbers_ptr, row, in_rows, num_rows, DIVISOR: tl.constexpr):
    """(where rows lie, int64; whether they do): row numbers[row] // DIVISOR of a matrix of num_rows, or row itself without numbers."""
    if numbers_ptr is None:
        return row.to(tl.int64), in_rows
    else:
        number = tl.load(numbers_ptr + row, mask=in_rows, other=-1)
        exists = (number >= 0) & (number // DIVISOR < num_rows)
        return tl.where(exists, number // DIVISOR, 0), exists


@triton.jit
def columns(block, N: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr):
    """(n, half, column) of a block of BLOCK_N columns of HALVES·N: N of each half, BLOCK_N / HALVES of each in a block."""
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    at = tl.arange(0, BLOCK_N)
    n, half = block * WIDTH + at % WIDTH, at // WIDTH
    return n, half, half * N + n


@triton.jit
def rows_source(
    x_ptr, gather_ptr, end, stride_x, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr
):
    """Where `product` reads a tile's rows: if none are gathered a descriptor of the matrix up to the last group's end, or the pointer."""
    if USE_TMA and gather_ptr is None:
        return tl.make_tensor_descriptor(x_ptr, [tl.maximum(end, 1), K], [stride_x, 1], [BLOCK_M, BLOCK_K])
    else:
        return x_ptr


@triton.jit
def matrices_source(
    w_ptr, stride_we, stride_wh, stride_w, N: tl.constexpr, K: tl.constexpr, NUM_GROUPS: tl.constexpr, HALVES: tl.constexpr,
    N_MAJOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Where `product` reads its matrices: one descriptor of all of them, or the pointer."""
    if not USE_TMA:
        return w_ptr
    elif N_MAJOR:
        return tl.make_tensor_descriptor(
            w_ptr, [NUM_GROUPS, K, HALVES, N], [stride_we, stride_w, stride_wh, 1], [1, BLOCK_K, HALVES, BLOCK_N // HALVES]
        )
    else:
        return tl.make_tensor_descriptor(
            w_ptr, [NUM_GROUPS, HALVES, N, K], [stride_we, stride_wh, stride_w, 1], [1, HALVES, BLOCK_N // HALVES, BLOCK_K]
        )


@triton.jit
def product(
    x_source, w_source, gather_ptr, row, end, num_x_rows, group, block, stride_x, stride_we, stride_wh, stride_w, N: tl.constexpr,
    K: tl.constexpr, HALVES: tl.constexpr, N_MAJOR: tl.constexpr, DIVISOR: tl.constexpr, VECTOR_X: tl.constexpr, VECTOR_W: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32: rows row, …, end − 1 of x (of gathered ones, those that there are) times a block of matrix `group`.

    A matrix has HALVES·N rows of K, half `h` from stride_wh·h on. Its rows are stride_w apart and contiguous; N_MAJOR, its columns are.
    """
    rows = row + tl.arange(0, BLOCK_M)
    at, exists = numbered_rows(gather_ptr, rows, rows < end, num_x_rows, DIVISOR)
    x_start = at * stride_x // VECTOR_X * VECTOR_X  # what it is, and now the compiler knows
    n, half, _ = columns(block, N, HALVES, BLOCK_N)
    along = half.to(tl.int64) * stride_wh // VECTOR_W * VECTOR_W
    along += n if N_MAJOR else n.to(tl.int64) * stride_w // VECTOR_W * VECTOR_W
    w_start = group.to(tl.int64) * stride_we // VECTOR_W * VECTOR_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        if USE_TMA and gather_ptr is None:
            x = x_source.load([row, k])
        else:
            mask = exists[:, None] if K % BLOCK_K == 0 else exists[:, None] & (cols < K)[None, :]
            x = tl.load(x_source + x_start[:, None] + cols[None, :], mask=mask, other=0.0)
        if USE_TMA and N_MAJOR:
            w = w_source.load([group, k, 0, block * (BLOCK_N // HALVES)]).reshape(BLOCK_K, BLOCK_N)
        elif USE_TMA:
            w = tl.trans(w_source.load([group, 0, block * (BLOCK_N // HALVES), k]).reshape(BLOCK_N, BLOCK_K))
        else:
            across = cols.to(tl.int64) * stride_w // VECTOR_W * VECTOR_W if N_MAJOR else cols.to(tl.int64)
            mask = (n < N)[None, :] if K % BLOCK_K == 0 else (n < N)[None, :] & (cols < K)[:, None]
            w = tl.load(w_source + w_start + across[:, None] + along[None, :], mask=mask, other=0.0)
        acc = dot(x, w, acc, PRECISION)
    return acc


@triton.jit
def add_bias(acc, bias_ptr, group, column, in_cols, NUM_COLS: tl.constexpr):
    """acc + bias[group], of (E, NUM_COLS)."""
    if bias_ptr is None:
        return acc
    else:
        return acc + tl.load(bias_ptr + group.to(tl.int64) * NUM_COLS + column, mask=in_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_rows(tile, out_ptr, scatter_ptr, row, end, num_rows, column, N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Round a tile to the output's dtype and store its rows row, …, end − 1, where they go."""
    rows = row + tl.arange(0, BLOCK_M)
    at, exists = numbered_rows(scatter_ptr, rows, rows < end, num_rows, 1)
    target = out_ptr + (at * N)[:, None] + column[None, :]
    tl.store(target, cast(tile, out_ptr.dtype.element_ty), mask=exists[:, None] & (column < N)[None, :])


# Numbers of rows change from call to call: none of them may choose a compiled variant.
COUNTS = ["num_rows", "num_x_rows", "stride_x", "stride_we", "stride_wh", "stride_w"]


@triton.jit(do_not_specialize=COUNTS)
def _grouped_mm_kernel(
    x_ptr, w_ptr, bias_ptr, offsets_ptr, gather_ptr, scatter_ptr, out_ptr, num_rows, num_x_rows, stride_x, stride_we, stride_wh, stride_w,
    N: tl.constexpr, K: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, TAIL: tl.constexpr, N_MAJOR: tl.constexpr,
    DIVISOR: tl.constexpr, VECTOR_X: tl.constexpr, VECTOR_W: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[scatter[r]] = x[gather[r] // DIVISOR]·w[e]ᵀ + bias[e]; with TAIL, 0 for the rows in no group."""
    NUM_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    last, last_end = schedule(offsets_ptr, num_rows, NUM_GROUPS, GROUPS, BLOCK_M)
    x_source = rows_source(x_ptr, gather_ptr, last_end, stride_x, K, BLOCK_M, BLOCK_K, USE_TMA)
    w_source = matrices_source(w_ptr, stride_we, stride_wh, stride_w, N, K, NUM_GROUPS, 1, N_MAJOR, BLOCK_N, BLOCK_K, USE_TMA)
    for index in range(tl.program_id(0), tl.max(last, 0) * NUM_BLOCKS, tl.num_programs(0)):
        group, row, end, block = find_tile(index, offsets_ptr, last, num_rows, NUM_BLOCKS, GROUPS, GROUP_M, BLOCK_M)
        acc = product(
            x_source, w_source, gather_ptr, row, end, num_x_rows, group, block, stride_x, stride_we, stride_wh, stride_w, N, K, 1,
            N_MAJOR, DIVISOR, VECTOR_X, VECTOR_W, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA,
        )  # fmt: skip
        column, _, _ = columns(block, N, 1, BLOCK_N)
        acc = add_bias(acc, bias_ptr, group, column, column < N, N)
        store_rows(acc, out_ptr, scatter_ptr, row, end, num_rows, column, N, BLOCK_M)
    if TAIL:
        for row in range(last_end + tl.program_id(0) * BLOCK_M, num_rows, tl.num_programs(0) * BLOCK_M):
            for block in range(NUM_BLOCKS):
                column, _, _ = columns(block, N, 1, BLOCK_N)
                zero = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
                store_rows(zero, out_ptr, scatter_ptr, row, num_rows, num_rows, column, N, BLOCK_M)


# --------------------------------------------------------------------------------------------------------------------
# Gradients of matrices and biases, and of gathered rows.


@triton.jit
def operand(
    source, numbers_ptr, row, end, num_numbered, stride, block, N: tl.constexpr, DIVISOR: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """(BLOCK_K, BLOCK): rows row, …, end − 1 of a block of a matrix's columns, the others 0."""
    if USE_TMA and numbers_ptr is None:
        return source.load([row, block * BLOCK])
    else:
        rows = row + tl.arange(0, BLOCK_K)
        at, exists = numbered_rows(numbers_ptr, rows, rows < end, num_numbered, DIVISOR)
        column = block * BLOCK + tl.arange(0, BLOCK)
        start = at * stride // VECTOR * VECTOR
        mask = exists[:, None] if N % BLOCK == 0 else exists[:, None] & (column < N)[None, :]
        return tl.load(source + start[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "num_a_rows", "num_b_rows", "stride_a", "stride_b"])
def _grouped_mm_weight_kernel(
    a_ptr, b_ptr, offsets_ptr, a_numbers_ptr, b_numbers_ptr, out_ptr, num_rows, num_a_rows, num_b_rows, stride_a, stride_b,
    N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, A_DIVISOR: tl.constexpr, B_DIVISOR: tl.constexpr, VECTOR_A: tl.constexpr,
    VECTOR_B: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = Σ_r a[r]ᵀ·b[r] over the rows of group e, (N, K) from a's N columns and b's K: a (BLOCK_M, BLOCK_N) tile a program,
    BLOCK_K rows at a time."""
    NUM_M: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    NUM_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (NUM_M * NUM_N)
    local = tl.program_id(0) % (NUM_M * NUM_N)
    first = local // (GROUP_M * NUM_N) * GROUP_M
    abreast = tl.minimum(NUM_M - first, GROUP_M)
    block_m = first + local % (GROUP_M * NUM_N) % abreast
    block_n = local % (GROUP_M * NUM_N) // abreast
    start, end = rows_of_group(offsets_ptr, group, num_rows, GROUPS)
    a_source, b_source = a_ptr, b_ptr
    if USE_TMA and a_numbers_ptr is None:  # as long as the group: what lies past its end reads as 0
        a_source = tl.make_tensor_descriptor(a_ptr, [tl.maximum(end, 1), N], [stride_a, 1], [BLOCK_K, BLOCK_M])
    if USE_TMA and b_numbers_ptr is None:
        b_source = tl.make_tensor_descriptor(b_ptr, [tl.maximum(end, 1), K], [stride_b, 1], [BLOCK_K, BLOCK_N])
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(start, end, BLOCK_K):
        a = operand(a_source, a_numbers_ptr, row, end, num_a_rows, stride_a, block_m, N, A_DIVISOR, VECTOR_A, BLOCK_M, BLOCK_K, USE_TMA)
        b = operand(b_source, b_numbers_ptr, row, end, num_b_rows, stride_b, block_n, K, B_DIVISOR, VECTOR_B, BLOCK_N, BLOCK_K, USE_TMA)
        acc = dot(tl.trans(a), b, acc, PRECISION)
    n, k = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    target = out_ptr + group.to(tl.int64) * (N * K) + (n.to(tl.int64) * K)[:, None] + k[None, :]
    tl.store(target, cast(acc, out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_y_rows", "num_scales", "stride_y"])
def _grouped_sum_kernel(
    y_ptr, offsets_ptr, numbers_ptr, scale_ptr, out_ptr, num_rows, num_y_rows, stride_y, num_scales, N: tl.constexpr, GROUPS: tl.constexpr,
    DIVISOR: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[e] = Σ_r scale[numbers[r]]·y[numbers[r] // DIVISOR] over the rows of group e, in fp32: a block of columns a program."""
    NUM_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    group, column = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    start, end = rows_of_group(offsets_ptr, group, num_rows, GROUPS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for row in tl.range(start, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        at, exists = numbered_rows(numbers_ptr, rows, rows < end, num_y_rows, DIVISOR)
        y_start = at * stride_y // VECTOR * VECTOR
        y = tl.load(y_ptr + y_start[:, None] + column[None, :], mask=exists[:, None] & (column < N)[None, :], other=0.0).to(tl.float32)
        if scale_ptr is not None:
            slot, exists = numbered_rows(numbers_ptr, rows, rows < end, num_scales, 1)
            y *= tl.load(scale_ptr + slot, mask=exists, other=0.0)[:, None]
        acc += y
    tl.store(out_ptr + group.to(tl.int64) * N + column, cast(tl.sum(acc, 0), out_ptr.dtype.element_ty), mask=column < N)


@triton.jit
def _sum_gathered_kernel(y_ptr, order_ptr, starts_ptr, out_ptr, N: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = Σ y[order[i]] over starts[t] ≤ i < starts[t + 1], one after the other in fp32."""
    NUM_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    at, column = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(starts_ptr + at), tl.load(starts_ptr + at + 1)):
        start = tl.load(order_ptr + i) * N // VECTOR * VECTOR
        acc += tl.load(y_ptr + start + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at.to(tl.int64) * N + column, cast(acc, out_ptr.dtype.element_ty), mask=column < N)


# --------------------------------------------------------------------------------------------------------------------
# Launchers.


class Matrices:
    """A stack of matrices (E, N, K) as kernels are told of it: read as it lies if one of its last two dims is contiguous."""

    def __init__(self, w: torch.Tensor, halves: int = 1):
        """halves=2: the N rows are those of two, one half after the other."""
        if w.stride(2) != 1 and w.stride(1) != 1:
            w = w.contiguous()
        self.n_major = w.stride(2) != 1
        self.tensor, self.num_groups, self.halves = w, w.shape[0], halves
        self.num_cols, self.size = w.shape[1] // halves, w.shape[2]
        self.stride = w.stride(2) if self.n_major else w.stride(1)
        self.stride_half = self.num_cols * w.stride(1)
        strides, aligned = (w.stride(0), self.stride, self.stride_half), w.data_ptr() % 16 == 0
        self.vector = math.gcd(8, *strides) if aligned else 1
        # As TMA wants it: starts on 16 bytes, and every stride a positive multiple of them.
        self.aligned = aligned and all(stride > 0 and stride * w.element_size() % 16 == 0 for stride in strides)

    def args(self) -> dict:
        return dict(
            w_ptr=self.tensor, stride_we=self.tensor.stride(0), stride_wh=self.stride_half, stride_w=self.stride, N=self.num_cols,
            K=self.size, NUM_GROUPS=self.num_groups, N_MAJOR=self.n_major, VECTOR_W=self.vector,
        )  # fmt: skip


def rows_aligned(t: torch.Tensor) -> bool:
    """The same of a matrix with contiguous rows."""
    return t.numel() > 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0 and t.stride(0) * t.element_size() % 16 == 0


def rows_wide(t: torch.Tensor) -> bool:
    """Whether its rows, gathered or not, are loaded 16 bytes at a time."""
    return vector_of(t) * t.element_size() >= 16


def num_lanes(num_groups: int) -> int:
    """Of a program that looks at all groups: a power of two."""
    return max(16, triton.next_power_of_2(num_groups))


def check_rows(op: str, num_rows: int) -> None:
    if num_rows > MOST_ROWS:
        raise ValueError(f"{op}: the input must have at most {MOST_ROWS} rows, got {num_rows}")


def grid_of(op: str, num_rows: int, num_groups: int, num_blocks: int, config: GroupedConfig, device: torch.device) -> tuple[int]:
    """As many programs as have room together, or as there can be tiles, one in each group that is not full among them."""
    check_rows(op, num_rows)
    tiles = min(num_groups, num_rows) + num_rows // config.BLOCK_M
    check_grid(op, tiles * num_blocks)  # tiles, which the kernels number in 32 bits
    return (min(tiles * num_blocks, num_multiprocessors(device) * config.resident),)


def config_of(kernel: str, t: torch.Tensor, num_rows: int, num_groups: int, inner: int, aligned: bool) -> GroupedConfig:
    config = pick_grouped_config(kernel, *target_of(t), t.element_size(), num_rows / num_groups, inner, aligned)
    if interpreted():  # it pays by the operation and by the element, and small matrices have several tiles this way
        limits = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}
        config = replace(config, **{name: min(limit, getattr(config, name)) for name, limit in limits.items()})
    return config


def launch_product(
    op: str, x: torch.Tensor, w: Matrices, bias: torch.Tensor | None, offsets: torch.Tensor, out: torch.Tensor, *, num_rows: int,
    gather: torch.Tensor | None = None, divisor: int = 1, scatter: torch.Tensor | None = None, tail: bool = True,
    config: GroupedConfig | None = None,
) -> None:  # fmt: skip
    """Launch the product of num_rows rows into out, contiguous."""
    x = with_contiguous_rows(x)
    aligned = w.aligned and (gather is not None or rows_aligned(x))
    config = config or config_of("product", x, num_rows, w.num_groups, w.size, aligned and rows_wide(x))
    log.debug("%s: %s", op, config)
    launch(
        _grouped_mm_kernel,
        grid_of(op, num_rows, w.num_groups, triton.cdiv(w.num_cols, config.BLOCK_N), config, x.device), x.device,
        x_ptr=x, bias_ptr=None if bias is None else bias.contiguous(), offsets_ptr=offsets.contiguous(), gather_ptr=gather,
        scatter_ptr=scatter, out_ptr=out, num_rows=num_rows, num_x_rows=x.shape[0], stride_x=x.stride(0), **w.args(),
        GROUPS=num_lanes(w.num_groups), TAIL=tail, DIVISOR=divisor, VECTOR_X=vector_of(x), PRECISION=precision_of(x.dtype),
        USE_TMA=config.tma and aligned, **config.meta(),
    )  # fmt: skip


def launch_weight(
    op: str, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, *, num_rows: int,
    a_numbers: torch.Tensor | None = None, a_divisor: int = 1, b_numbers: torch.Tensor | None = None, b_divisor: int = 1,
    config: GroupedConfig | None = None,
) -> None:  # fmt: skip
    """Launch the sums over rows aᵀ·b into out (E, N, K), contiguous."""
    check_rows(op, num_rows)
    num_groups, num_m, num_n = out.shape
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    gathered = a_numbers is not None or b_numbers is not None
    aligned = all(numbers is not None or rows_aligned(t) for t, numbers in ((a, a_numbers), (b, b_numbers)))
    wide = aligned and rows_wide(a) and rows_wide(b)
    config = config or config_of("weight_gathered" if gathered else "weight", a, num_rows, num_groups, num_rows, wide)
    log.debug("%s: %s", op, config)
    launch(
        _grouped_mm_weight_kernel,
        check_grid(op, num_groups * triton.cdiv(num_m, config.BLOCK_M) * triton.cdiv(num_n, config.BLOCK_N)), a.device,
        a_ptr=a, b_ptr=b, offsets_ptr=offsets.contiguous(), a_numbers_ptr=a_numbers, b_numbers_ptr=b_numbers, out_ptr=out,
        num_rows=num_rows, num_a_rows=a.shape[0], num_b_rows=b.shape[0], stride_a=a.stride(0), stride_b=b.stride(0), N=num_m, K=num_n,
        GROUPS=num_lanes(num_groups), A_DIVISOR=a_divisor, B_DIVISOR=b_divisor, VECTOR_A=vector_of(a), VECTOR_B=vector_of(b),
        PRECISION=precision_of(a.dtype), USE_TMA=config.tma and aligned, **config.meta(),
    )  # fmt: skip


SUM_ROWS, SUM_BLOCK = 32, 128  # static: 16 elements a thread, rows of 256 bytes


def launch_sum(
    op: str, y: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor, *, num_rows: int, numbers: torch.Tensor | None = None,
    divisor: int = 1, scale: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the sums over rows of y into out (E, N), contiguous; scale is flat, by numbers."""
    check_rows(op, num_rows)
    (num_groups, num_cols), y = out.shape, with_contiguous_rows(y)
    launch(
        _grouped_sum_kernel, check_grid(op, num_groups * triton.cdiv(num_cols, SUM_BLOCK)), y.device,
        y_ptr=y, offsets_ptr=offsets.contiguous(), numbers_ptr=numbers, scale_ptr=scale, out_ptr=out, num_rows=num_rows,
        num_y_rows=y.shape[0], stride_y=y.stride(0), num_scales=0 if scale is None else scale.shape[0], N=num_cols,
        GROUPS=num_lanes(num_groups), DIVISOR=divisor, VECTOR=vector_of(y), ROWS=SUM_ROWS, BLOCK=SUM_BLOCK, num_warps=8,
    )  # fmt: skip


def grouped_mm_fwd(
    x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, bias: torch.Tensor | None, gather: torch.Tensor | None,
    scatter: torch.Tensor | None, config: GroupedConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the product of x (T, K) and w (E, N, K), of any strides. Returns out (R, N), contiguous."""
    num_rows = (x if gather is None else gather).shape[0]
    new = torch.empty if scatter is None else torch.zeros  # there is no saying which rows it names
    out = new(num_rows, w.shape[1], dtype=x.dtype, device=x.device)
    gather, scatter = (None if t is None else t.contiguous() for t in (gather, scatter))
    launch_product(
        "grouped_mm", x, Matrices(w), bias, offsets, out, num_rows=num_rows, gather=gather, scatter=scatter, tail=scatter is None,
        config=config,
    )  # fmt: skip
    return out


def grouped_mm_bwd(
    dout: torch.Tensor, x: torch.Tensor | None, w: torch.Tensor | None, offsets: torch.Tensor, gather: torch.Tensor | None,
    scatter: torch.Tensor | None, num_x_rows: int, wanted: list[bool], config: GroupedConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the gradients' kernels. dout is (R, N), of any strides; x may be None where dw is not wanted, w where dx is not. Returns dx,
    dw and dbias, contiguous, empty where not wanted. config is that of dx's product."""
    op, (want_x, want_w, want_bias) = "grouped_mm", wanted
    gather, scatter = (None if t is None else t.contiguous() for t in (gather, scatter))
    dout = with_contiguous_rows(dout)
    num_rows, num_groups, num_cols = dout.shape[0], offsets.shape[0], dout.shape[1]
    dx = dw = dbias = dout.new_empty(0)
    if want_x:
        rows = dx = dout.new_empty(num_x_rows, w.shape[2])
        if gather is not None:
            rows = dout.new_empty(num_rows, w.shape[2])
        launch_product(op, dout, Matrices(w.transpose(1, 2)), None, offsets, rows, num_rows=num_rows, gather=scatter, config=config)
        if gather is not None:
            _sum_gathered(rows, gather, dx)
    if want_w:
        dw = dout.new_empty(num_groups, num_cols, x.shape[1])
        launch_weight(op, dout, x, offsets, dw, num_rows=num_rows, a_numbers=scatter, b_numbers=gather)
    if want_bias:
        dbias = dout.new_empty(num_groups, num_cols)
        launch_sum(op, dout, offsets, dbias, num_rows=num_rows, numbers=scatter)
    return dx, dw, dbias


def _sum_gathered(rows: torch.Tensor, gather: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = the sum of the rows r with gather[r] = t, in the order of r."""
    numbers, order = gather.sort(stable=True)
    starts = torch.searchsorted(numbers, torch.arange(out.shape[0] + 1, device=out.device))
    num_cols = out.shape[1]
    block = min(1024, max(16, triton.next_power_of_2(num_cols)))
    launch(
        _sum_gathered_kernel, check_grid("grouped_mm", out.shape[0] * triton.cdiv(num_cols, block)), out.device,
        y_ptr=rows, order_ptr=order, starts_ptr=starts, out_ptr=out, N=num_cols, VECTOR=vector_of(rows), BLOCK=block, num_warps=4,
    )  # fmt: skip
