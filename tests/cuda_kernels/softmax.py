"""csrc/cuda/softmax.cu: the cases that every build is held to, small enough for the slowest, and the faults that they must see."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import (
    BF16,
    CRASH,
    DTYPES,
    F16,
    F32,
    NAN,
    NOTHING,
    OUTSIDE,
    REDUCE,
    WARPS,
    WRONG,
    Buffer,
    Case,
    Fault,
    nothing,
    spread,
)
from torch import Tensor

from fastattn.reference import softmax as reference
from fastattn.testing.budget import check_budget

SOURCE = "cuda/softmax.cu"
INF = float("inf")


class SoftmaxParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "y")),
        *((name, c_int64) for name in ("num_rows", "num_cols", "stride_x", "stride_y")),
        ("dtype", c_int32),
        ("y_dtype", c_int32),
    ]


def softmax_case(
    name: str, x: Tensor, y_dtype: torch.dtype | None = None, *, gap: int = 0, lead: int = 0, y_gap: int | None = None,
    y_lead: int | None = None, in_place: bool = False, sparse: int = 0, answer: str = "",
) -> Case:  # fmt: skip
    """x (rows, N). gap, lead: elements between rows, and before the first, of x, and of y where that has none of its own. sparse: elements
    from row to row, with nothing between."""
    (num_rows, num_cols), y_dtype = x.shape, y_dtype or x.dtype
    y_gap, y_lead = gap if y_gap is None else y_gap, lead if y_lead is None else y_lead
    params = SoftmaxParams(
        num_rows=num_rows, num_cols=num_cols, stride_x=sparse or num_cols + gap, stride_y=sparse or num_cols + y_gap, dtype=DTYPES[x.dtype],
        y_dtype=DTYPES[y_dtype],
    )  # fmt: skip
    size, y_size = x.element_size(), y_dtype.itemsize
    if in_place:
        buffers = [Buffer(spread(x, gap), ("y", "x"), True, lead * size)]
    else:
        y = nothing(num_rows, num_cols, dtype=y_dtype, gap=y_gap)
        buffers = [Buffer(spread(x, gap), ("x",), False, lead * size, sparse * size)]
        buffers.append(Buffer(y, ("y",), True, y_lead * y_size, sparse * y_size))

    def judge(y: Tensor) -> None:
        if x.numel() == 0:
            return
        ref64, in_fp32 = reference(x.double()), reference(x.float())
        check_budget(name, y, in_fp32 if y_dtype == F32 else reference(x), ref64)
        finite = ref64.isfinite()
        if not finite.any():
            return
        exact, plain, got = (t[finite].double() for t in (ref64, in_fp32, y))
        # Rounded once, from fp32: half a unit in the last place beside what fp32 makes of it.
        unit = torch.finfo(y_dtype).eps * exact + torch.finfo(y_dtype).smallest_normal * torch.finfo(y_dtype).eps
        slack = 2 * (plain - exact).abs().max() + 1e-6 * exact
        assert ((got - exact).abs() <= 0.5 * unit + slack).all(), f"{name}: rounded more than once"

    return Case(name, "softmax_fwd", params, buffers, judge, answer)


def draw(num_rows: int, num_cols: int, dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * num_rows + num_cols)
    return (scale * torch.randn(num_rows, num_cols, generator=generator)).to(dtype)


def softmax_cases() -> list[Case]:
    """Every kernel of every pair of dtypes at the edges of what it takes, with rows that begin anywhere between two multiples of 16 bytes."""
    cases = []
    # Lanes a row: 1, 2, 4 … 32, a warp's four chunks, a block's. Rows: fewer than a block has, and more.
    short = [(1, 1), (130, 3), (131, 8), (5, 9), (67, 16), (9, 25), (33, 33), (17, 100), (9, 128), (6, 250), (5, 255)]
    short += [(3, 257), (6, 511), (2, 1024), (3, 1027), (2, 2056)]
    for i, (rows, cols) in enumerate(short):
        for j in range(2):
            dtype = (F32, BF16, F16)[(i + j) % 3]
            gap, lead = ((0, 0), (8, 0), (1, 0), (0, 1), (7, 3))[(2 * i + j) % 5]
            y_dtype = F32 if (i + j) % 2 else dtype
            name = f"{rows}x{cols} {str(dtype)[6:]} to {str(y_dtype)[6:]} gap {gap} lead {lead}"
            cases.append(softmax_case(name, draw(rows, cols, dtype), y_dtype, gap=gap, lead=lead, in_place=y_dtype == dtype and i % 4 == 2))
    for dtype, cols, gap in ((F32, 8192, 0), (F32, 8193, 3), (BF16, 16384, 8), (F16, 16381, 2)):
        cases.append(softmax_case(f"long rows, 2x{cols} {str(dtype)[6:]}", draw(2, cols, dtype), gap=gap, in_place=cols % 2 == 1))
    cases.append(softmax_case("long rows to float", draw(2, 16391, BF16), F32))
    for lead in range(1, 8):
        cases.append(softmax_case(f"rows {lead} after a multiple of 16 bytes", draw(3, 40 - lead, BF16), gap=lead, lead=lead))
        y_dtype, only_x = F32 if lead % 2 else F16, dict(gap=3, lead=lead, y_gap=lead, y_lead=0)
        cases.append(softmax_case(f"only x {lead} after a multiple of 16 bytes", draw(2, 37, F16), y_dtype, **only_x))
        cases.append(softmax_case(f"a short row {lead} after a multiple of 16 bytes", draw(40, 2, BF16), gap=6, lead=lead))
    cases.append(softmax_case("no rows", draw(0, 8, F32)))
    cases.append(softmax_case("no columns", draw(3, 0, F32)))
    cases.append(softmax_case("an output that is neither x's dtype nor float32", draw(1, 8, BF16), F16, answer="^cudaError 1$"))
    cases.append(softmax_case("fp32 to half", draw(1, 8, F32), F16, answer="^cudaError 1$"))
    return cases + hostile_cases()


def hostile_cases() -> list[Case]:
    cases = []
    for cols in (9, 300, 1500, 8200):
        x = draw(8, cols, F32)
        x[0] = -INF
        x[1, : cols // 2] = -INF
        x[2, 3], x[3, cols - 1], x[4, 5], x[5, 0] = INF, NAN, -INF, -NAN
        x[6] = NAN
        x[7, 1:] = -INF
        cases.append(softmax_case(f"infinities and NaNs, {cols}", x))
        if cols < 8200:
            cases.append(softmax_case(f"a common offset, {cols}", draw(2, cols, F32, 1.0) + torch.tensor([[1e4], [-1e4]]), gap=1))
            cases.append(softmax_case(f"equal entries, {cols}", torch.full((2, cols), 3.0).to(BF16)))
    wide = torch.tensor([[-3e38, 3e38, 0.0, 3e38], [-3e38, -3e38, -3.2e38, -3e38], [1e-40, -1e-40, 0.0, -0.0]])
    cases.append(softmax_case("the largest and the smallest floats", wide))
    rising = torch.arange(9000.0)[None] / 40 * torch.tensor([[1.0], [-1.0]])
    cases.append(softmax_case("a maximum that rises all the way", rising))
    late = torch.full((1, 20000), -INF).to(BF16)  # all of a thread's first entries are -inf
    late[0, 17000:17003] = torch.tensor([1.0, 2.0, -INF])
    cases.append(softmax_case("nothing but −inf until late", late))
    return cases


def far_case() -> Case:
    """Rows 2^30 elements apart: five of them wrap an index of 32 bits, signed or not. The memory between is never touched."""
    return softmax_case("rows 2^30 apart", draw(5, 64, F16), sparse=2**30)


CASES = softmax_cases()
FAR = [far_case()]
FAULTS = [
    # Reductions.
    Fault("no barrier in a block's reduction", REDUCE, "  __syncthreads();\n", "", {"races": f"{NOTHING}|{WARPS}", "plain": WRONG}),
    Fault("one array for the maximum and the sum", SOURCE, "row_reduce(sum, Sum{}, shared<Shared>().sum)", "row_reduce(sum, Sum{}, shared<Shared>().max)", {"races": WARPS}, quick=True),
    Fault("one array for both of a long row", SOURCE, "block_sum(sum, shared<Shared>().sum)", "block_sum(sum, shared<Shared>().max)", {"races": WARPS}),
    Fault("entries of shared memory that no warp wrote", REDUCE, "warp_reduce(lane < num_warps ? partials[lane] : Op::kNothing, op)", "warp_reduce(partials[lane], op)",
          {"races": NOTHING, "asan": OUTSIDE, "plain": WRONG}),
    Fault("a maximum that begins at 0", REDUCE, "kNothing = -INFINITY", "kNothing = 0.0f", {"plain": WRONG}),
    Fault("a reduction of twice the lanes that a row has", REDUCE, "distance = lanes / 2;", "distance = lanes;", {"plain": f"{WRONG}|Refused: "}),
    Fault("rows that do not exist leave their warp", SOURCE, "  const Row<T, Y> row(params, exists ? index : 0,", "  if (!exists) return;\n  const Row<T, Y> row(params, exists ? index : 0,",
          {"plain": "Refused: .*returned"}),
    # Memory.
    Fault("a row too many", SOURCE, "index < params.num_rows;", "index <= params.num_rows;", {"asan": OUTSIDE}),
    Fault("a vector before the row's start", SOURCE, "if (own.all()) {\n      vector", "if (own.end == kWidth) {\n      vector", {"plain": WRONG}),
    Fault("a vector across the row's end", SOURCE, "if (own.all()) {\n      vector", "if (own.first == 0) {\n      vector", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("a vector stored across the row's end", SOURCE, "if (own.all()) {\n      fastattn::store", "if (own.first == 0) {\n      fastattn::store", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("a column past the end", SOURCE, "i < end; }", "i <= end; }", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("a column before the start", SOURCE, "return i >= first &&", "return i >= first - 1 &&", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("vectors from the row's own start", SOURCE, "start(-static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T)))", "start(0)", {"asan": "misaligned address"}),
    Fault("y taken for aligned", SOURCE, "y_aligned((reinterpret_cast<uintptr_t>(y) + start * sizeof(Y)) % 16 == 0)", "y_aligned(true)", {"asan": "misaligned address"}),
    Fault("no room for a row that begins between", SOURCE, "(starts_between ? kWidth - 1 : 0)", "0", {"plain": WRONG}),
    Fault("the stride does not count where rows begin", SOURCE, "!is_aligned(params.x) || (params.num_rows > 1 && params.stride_x % kWidth != 0)", "!is_aligned(params.x)", {"plain": WRONG}),
    Fault("more threads than partial results", SOURCE, "warps > kMaxThreads / kWarpSize;", "warps > kMaxThreads / kWarpSize + 1;", {"asan": OUTSIDE}),
    Fault("an offset of 32 bits, signed", SOURCE, "row * p.stride_x", "static_cast<int>(row) * static_cast<int>(p.stride_x)", {"plain": WRONG, "asan": "signed integer overflow"}, far=True),
    Fault("an offset of 32 bits, unsigned", SOURCE, "row * p.stride_y", "static_cast<unsigned>(row * p.stride_y)", {"plain": WRONG}, far=True),
    # Values.
    Fault("what is none of the row's is 0", SOURCE, "from_float<T>(-INFINITY)", "from_float<T>(0.0f)", {"plain": WRONG}),
    Fault("no maximum", SOURCE, "max = row_reduce(max, Max{}, shared<Shared>().max);", "max = 0.0f;", {"plain": WRONG}),
    Fault("the base changes before the maximum is subtracted", SOURCE, "exp2f((x - max) * kLog2e)", "exp2f(x * kLog2e - max * kLog2e)", {"plain": WRONG}),
    Fault("a sum that is not moved to the new maximum", SOURCE, "    sum *= exp_less(max, shift);\n", "", {"plain": WRONG}),
    Fault("−inf less −inf in a long row", SOURCE, "const float shift = new_max == -INFINITY ? 0.0f : new_max;", "const float shift = new_max;", {"plain": WRONG}),
    Fault("a thread's sum is not moved to the row's maximum", SOURCE, "  sum *= exp_less(max, row_max == -INFINITY ? 0.0f : row_max);\n", "", {"plain": WRONG}),
    Fault("a chunk of a long row is left out", SOURCE, "at < params.num_cols; at += kMaxChunks * step) {\n    Vector<T> vectors[kMaxChunks];\n#pragma unroll\n    for (int c = 0; c < kMaxChunks; ++c) vectors[c] = row.load(at + c * step);\n    float x",
          "at < params.num_cols; at += (kMaxChunks + 1) * step) {\n    Vector<T> vectors[kMaxChunks];\n#pragma unroll\n    for (int c = 0; c < kMaxChunks; ++c) vectors[c] = row.load(at + c * step);\n    float x", {"plain": WRONG}),
    Fault("rounded before it is scaled", SOURCE, "for (int i = 0; i < kWidth; ++i) p[c][i] *= scale;", "for (int i = 0; i < kWidth; ++i) p[c][i] = to_float(from_float<Y>(p[c][i])) * scale;", {"plain": WRONG}),
]  # fmt: skip
