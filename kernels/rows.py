"""Tensors as rows, the way the row kernels see them: where a row lies, and which of its columns 128-bit accesses reach.

A tensor (…, N) is num_rows rows of num_cols columns, columns contiguous. Row r starts at element

    (r // inner)·stride_outer + (r % inner)·stride_inner

which holds for any tensor that is dense but for one gap: a batch of heads cut out of a packed projection, a row stride with
padding, a batch expanded from one. A row's access is one of three, chosen for all tensors of a launch together:

    "vector"   every row starts on 16 bytes and N is a multiple of VECTOR: 128-bit accesses throughout
    "edges"    rows start anywhere, alike in all tensors: the aligned body by 128 bits, up to VECTOR − 1 columns before and
               after it one by one
    "scalar"   neither: one by one
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .launch import check_grid

MOST = 2**31 - 2**17  # rows, or columns
VECTOR = tl.constexpr(8)  # columns in a 128-bit access of a 16-bit dtype; of a 32-bit one they are two accesses


class Rows:
    """Tensors of one shape but for the last dim's size, walked row by row together: what a kernel is told of them.

    Columns that are not contiguous, and leading dims that no (outer, inner) pair of strides describes, cost a copy; `tensors`
    holds what the kernel gets. An output is never copied: allocate it contiguous.
    """

    def __init__(self, **tensors: torch.Tensor):
        """Names are the kernel's, without _ptr; num_cols is the first one's."""
        first = next(iter(tensors.values()))
        self.num_cols = first.shape[-1]
        self.num_rows = first.numel() // self.num_cols if self.num_cols else 0
        given = list(tensors.values())
        if all(map(torch.Tensor.is_contiguous, given)):
            split = None
        else:
            given = [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in given]
            split = _split(given)
            if split is None:
                given = [t.contiguous() for t in given]
        self.inner, strides = split or (max(self.num_rows, 1), [(0, t.shape[-1]) for t in given])
        self.tensors = dict(zip(tensors, given, strict=True))
        self.strides = dict(zip(tensors, strides, strict=True))
        self.access = _access(self.num_cols, given, strides)

    def args(self) -> dict:
        """As launch arguments: NAME_ptr, the sizes, stride_NAMEo and stride_NAMEi, ACCESS."""
        args = {f"{name}_ptr": t for name, t in self.tensors.items()}
        args |= dict(num_rows=self.num_rows, inner=self.inner, num_cols=self.num_cols)
        for name, (outer, inner) in self.strides.items():
            args[f"stride_{name}o"], args[f"stride_{name}i"] = outer, inner
        return args | dict(ACCESS=self.access)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def grid(self, op: str, rows_a_program: int, num_blocks: int = 1) -> tuple[int]:
        """num_blocks programs for each rows_a_program rows. Kernels count rows and columns in 32 bits, a tile's past the end too."""
        for what, number in (("rows", self.num_rows), ("columns", self.num_cols)):
            if number > MOST:
                raise ValueError(f"{op}: the input must have at most {MOST} {what}, got {number}")
        return check_grid(op, triton.cdiv(self.num_rows, rows_a_program) * num_blocks)


def _split(tensors: list[torch.Tensor]) -> tuple[int, list[tuple[int, int]]] | None:
    """(inner, (stride_outer, stride_inner) of each): the leading dims as two, of one stride each in every tensor."""
    dims = [dim for dim, size in enumerate(tensors[0].shape[:-1]) if size != 1]
    groups: list[tuple[int, list[int]]] = []  # innermost first: size, and the stride in each tensor
    for dim in reversed(dims):
        size, strides = tensors[0].shape[dim], [t.stride(dim) for t in tensors]
        if groups and all(stride == inner * groups[-1][0] for stride, inner in zip(strides, groups[-1][1], strict=True)):
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        else:
            groups.append((size, strides))
    if len(groups) > 2:
        return None
    groups += [(1, [0] * len(tensors))] * (2 - len(groups))
    (inner, stride_inner), (_, stride_outer) = groups
    return max(inner, 1), list(zip(stride_outer, stride_inner, strict=True))


def _access(num_cols: int, tensors: list[torch.Tensor], strides: list[tuple[int, int]]) -> str:
    if any(t.data_ptr() % 16 for t in tensors):
        return "scalar"
    starts = {(outer % 8, inner % 8) for outer, inner in strides}
    if starts == {(0, 0)} and num_cols % 8 == 0:
        return "vector"
    return "edges" if len(starts) == 1 else "scalar"


def vector_of(*tensors: torch.Tensor) -> int:
    """How many elements, at most 8, every row of these tensors starts at a multiple of."""
    if any(t.data_ptr() % 16 for t in tensors):
        return 1
    return math.gcd(8, *(t.stride(dim) for t in tensors for dim in range(t.dim() - 1) if t.shape[dim] > 1))


def with_contiguous_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


# --------------------------------------------------------------------------------------------------------------------
# In a kernel. Offsets are int64 elements from the tensor's base.


@triton.jit
def rows_of_program(num_rows, ROWS: tl.constexpr):
    """The (ROWS,) rows of this program, and which of them there are; those past the end are row 0, not to be stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    return tl.where(in_rows, row, 0), in_rows


@triton.jit
def row_start(row, inner, stride_outer, stride_inner):
    """Where rows start: of one row or of a (ROWS,) tile of them."""
    outer = row // inner
    return outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def body(start, num_cols, ACCESS: tl.constexpr):
    """(first, length) of the part of a row at `start` that is aligned if any is: multiples of VECTOR, unless "scalar"."""
    if ACCESS == "vector":
        return start // VECTOR * VECTOR, num_cols // VECTOR * VECTOR + start * 0  # what they are, and now the compiler knows
    elif ACCESS == "edges":
        first = (start + (VECTOR - 1)) // VECTOR * VECTOR
        return first, tl.maximum(start + num_cols - first, 0) // VECTOR * VECTOR
    else:
        return start, num_cols + start * 0


@triton.jit
def edge(start, num_cols, in_rows):
    """(offsets, mask) of the columns outside the body, (ROWS, 2·VECTOR) for (ROWS,) starts: those before it, those after."""
    lane = tl.arange(0, 2 * VECTOR)[None, :]
    first, length = body(start, num_cols, "edges")
    before = tl.minimum(first - start, num_cols)[:, None]
    col = tl.where(lane < VECTOR, lane, before + length[:, None] + lane - VECTOR)
    return start[:, None] + col, tl.where(lane < VECTOR, lane < before, col < num_cols) & in_rows[:, None]


@triton.jit
def one_row():
    """This program's row where it has one alone, as a (1,) tile, and that it exists: what `edge` takes."""
    return tl.program_id(0) + tl.arange(0, 1), tl.full((1,), True, tl.int1)


@triton.jit
def groups(BLOCK: tl.constexpr):
    """BLOCK column numbers, VECTOR adjacent ones a row: (BLOCK / VECTOR, VECTOR)."""
    return (tl.arange(0, BLOCK // VECTOR) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
