"""csrc/cuda/norm.cu: the cases that every build is held to, small enough for the slowest, and the faults that they must see."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import (
    BF16,
    CRASH,
    DTYPES,
    F16,
    F32,
    LANES,
    NAN,
    NOTHING,
    OUTSIDE,
    REDUCE,
    THREADS,
    VECTOR,
    WARPS,
    WRONG,
    Buffer,
    Case,
    Fault,
    nothing,
    spread,
)
from torch import Tensor

from fastattn import reference
from fastattn.testing.budget import check_budget

SOURCE = "cuda/norm.cu"


class NormParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "weight", "bias", "y", "h", "stats")),
        *((name, c_int64) for name in ("num_rows", "num_cols", "stride_x", "stride_residual", "stride_y", "stride_h")),
        ("eps", c_float),
        ("weight_offset", c_float),
        ("dtype", c_int32),
        ("weight_dtype", c_int32),
        ("subtract_mean", c_int32),
        ("cast_before_weight", c_int32),
    ]


def norm_reference(tensors: dict[str, Tensor], dtype: torch.dtype, eps: float, weight_offset: float, subtract_mean: bool) -> dict[str, Tensor]:
    """y, h and stats by the oracle, computed in `dtype` and, but for float64, rounded where the kernel rounds."""
    x = tensors["x"]
    given = {key: t.to(dtype) for key, t in tensors.items() if t is not None}
    h = given["x"] + given["residual"] if "residual" in given else given["x"]
    rows = h.to(x.dtype).to(dtype)  # h is rounded to x's dtype before it is normalised
    shape, weight, bias = x.shape[-1], given.get("weight"), given.get("bias")
    if subtract_mean:
        weight = weight if weight is None else weight + weight_offset
        y = reference.layer_norm(rows, shape, weight, bias, eps)
    else:
        y = reference.rms_norm(rows, shape, weight, eps, weight_offset=weight_offset)
        y = y if bias is None else y + bias
    mean = rows.mean(-1) if subtract_mean else torch.zeros_like(rows[:, 0])
    rstd = torch.rsqrt((rows - mean[:, None]).square().mean(-1) + eps)
    return dict(y=y, h=rows, stats=torch.stack([rstd, mean] if subtract_mean else [rstd]))


def norm_case(
    name: str, tensors: dict[str, Tensor | None], *, subtract_mean: bool, eps: float = 1e-5, weight_offset: float = 0.0, gap: int = 0,
    lead: int = 0, leads: dict[str, int] | None = None, in_place: bool = False, stats: bool = True, sparse: int = 0, cast: bool = False,
) -> Case:  # fmt: skip
    """tensors: x (rows, N), residual, weight, bias. gap, lead: elements between rows, and before the first of each row tensor; leads: of
    one tensor. cast: cast_before_weight. sparse: elements from row to row, with nothing between."""
    x, residual, weight, bias = (tensors.get(key) for key in ("x", "residual", "weight", "bias"))
    (num_rows, num_cols), dtype = x.shape, x.dtype
    stride = sparse or num_cols + gap
    parameter = weight if weight is not None else bias
    params = NormParams(
        num_rows=num_rows, num_cols=num_cols, stride_x=stride, stride_residual=stride, stride_y=stride, stride_h=stride, eps=eps,
        weight_offset=weight_offset, dtype=DTYPES[dtype], weight_dtype=DTYPES[dtype if parameter is None else parameter.dtype],
        subtract_mean=subtract_mean, cast_before_weight=cast,
    )  # fmt: skip
    place = dict(lead=lead * x.element_size(), sparse=sparse * x.element_size())
    fresh = lambda: nothing(num_rows, num_cols, dtype=dtype, gap=gap)  # noqa: E731
    if in_place:
        buffers = [Buffer(spread(x, gap), ("y", "x"), True, **place)]
        buffers += [] if residual is None else [Buffer(spread(residual, gap), ("h", "residual"), True, **place)]
    else:
        buffers = [Buffer(spread(x, gap), ("x",), False, **place), Buffer(fresh(), ("y",), True, **place)]
        if residual is not None:
            buffers += [Buffer(spread(residual, gap), ("residual",), False, **place), Buffer(fresh(), ("h",), True, **place)]
    buffers += [Buffer(t, (key,), False) for key, t in (("weight", weight), ("bias", bias)) if t is not None]
    for buffer in buffers:
        if leads and buffer.fields[0] in leads:
            buffer.lead = leads[buffer.fields[0]] * buffer.tensor.element_size()
    if stats:
        buffers.append(Buffer(nothing(1 + subtract_mean, num_rows), ("stats",), True))
    options = dict(eps=eps, weight_offset=weight_offset, subtract_mean=subtract_mean)

    def judge(y: Tensor, h: Tensor | None = None, stats: Tensor | None = None) -> None:
        if num_rows * num_cols == 0:
            return
        if h is not None:
            assert torch.equal(h.nan_to_num(7.0), (x + residual).nan_to_num(7.0)), f"{name} h: not x + residual, rounded once"
        if cast:
            x_hat = reference.rms_norm((x + residual).double(), num_cols, eps=eps).to(dtype)
            same = y == x_hat * (weight.double() + weight_offset).to(dtype)
            assert same.double().mean() > 0.99, f"{name} y: {same.double().mean():.1%} rounded as they should be"  # x̂ may lie at a tie
            return
        known = tensors if residual is None else dict(tensors, x=x + residual, residual=None)
        ref64 = norm_reference(known, torch.float64, **options)
        naive = norm_reference(known, F32, **options)
        check_budget(f"{name} y", y, norm_reference(known, dtype, **options)["y"], ref64["y"])
        finite = ref64["y"].isfinite()
        exact, in_fp32, got = (t[finite].double() for t in (ref64["y"], naive["y"], y))
        # Rounded once, from fp32: half a unit in the last place of x's dtype beside what fp32 makes of it.
        unit = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        slack = 2 * (in_fp32 - exact).abs().max() + 1e-5 * exact.abs().max().clamp(min=1.0)
        assert ((got - exact).abs() <= 0.5 * unit + slack).all(), f"{name} y: rounded more than once"
        if stats is not None:
            check_budget(f"{name} stats", stats, naive["stats"], ref64["stats"])

    return Case(name, "norm_fwd", params, buffers, judge)


def norm_tensors(
    num_rows: int, num_cols: int, dtype: torch.dtype, *, residual: bool = False, weight: bool = True, bias: bool = False,
    weight_dtype: torch.dtype | None = None, seed: int = 0,
) -> dict[str, Tensor | None]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1000 * num_rows + num_cols)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return dict(
        x=draw(num_rows, num_cols).to(dtype),
        residual=draw(num_rows, num_cols).to(dtype) if residual else None,
        weight=draw(num_cols).to(weight_dtype or dtype) if weight else None,
        bias=draw(num_cols).to(weight_dtype or dtype) if bias else None,
    )


def norm_cases() -> list[Case]:
    """Every kernel of every dtype at the edges of what it takes, aligned and not, with each of its options."""
    cases = []
    # Length 1; a vector, less and more; a warp's one chunk; its four; a block's; more than registers hold. Rows: a block of four, and more.
    short = [(1, 1), (5, 7), (3, 8), (4, 9), (5, 255), (2, 256), (3, 257), (6, 1000), (2, 1024), (2, 1027), (3, 2056)]
    for i, (rows, cols) in enumerate(short):
        for j, subtract_mean in enumerate((False, True)):
            dtype = (F32, BF16, F16)[(i + j) % 3]
            made = norm_tensors(rows, cols, dtype, residual=(i + j) % 2 == 0, bias=subtract_mean)
            kind = "layer_norm" if subtract_mean else "rms_norm"
            gap, lead = ((0, 0), (8, 0), (1, 0), (0, 1), (7, 3))[(2 * i + j) % 5]
            name = f"{kind} {rows}x{cols} {str(dtype)[6:]} gap {gap} lead {lead}"
            cases.append(norm_case(name, made, subtract_mean=subtract_mean, gap=gap, lead=lead, in_place=i % 4 == 2))
    for dtype, cols in ((F32, 8192), (F32, 8196), (BF16, 16387), (F16, 16392)):
        for subtract_mean in (False, True):
            made = norm_tensors(2, cols, dtype, residual=cols % 16 != 0, bias=subtract_mean)
            name = f"long rows, mean {subtract_mean}, 2x{cols} {str(dtype)[6:]}"
            cases.append(norm_case(name, made, subtract_mean=subtract_mean, gap=4, in_place=cols in (16387, 8196)))
    for subtract_mean in (False, True):
        for weight_dtype in (F32, BF16):
            made = norm_tensors(3, 36, BF16, residual=True, bias=True, weight_dtype=weight_dtype)
            cases.append(norm_case(f"weight {weight_dtype}", made, subtract_mean=subtract_mean, weight_offset=1.0))
        made = norm_tensors(3, 24, F16, weight=False)
        cases.append(norm_case("no parameters, no stats", made, subtract_mean=subtract_mean, stats=False))
        cases.append(norm_case("no rows", norm_tensors(0, 8, F32), subtract_mean=subtract_mean))
        cases.append(norm_case("no columns", norm_tensors(3, 0, F32), subtract_mean=subtract_mean))
    for dtype, cols in ((BF16, 200), (F16, 1000)):
        made = norm_tensors(4, cols, dtype, residual=True)
        cases.append(norm_case(f"cast before the weight, {cols}", made, subtract_mean=False, weight_offset=1.0, cast=True))
    for cols in (40, 1000):
        made = norm_tensors(5, cols, F32, residual=True)
        cases.append(norm_case(f"in place, {cols}", made, subtract_mean=True, in_place=True, gap=4))
    for field in ("x", "residual", "y", "h", "weight", "bias"):
        made = norm_tensors(2, 48, BF16, residual=True, bias=True)
        cases.append(norm_case(f"{field} alone is not aligned", made, subtract_mean=True, leads={field: 1}))
    return cases + hostile_norm_cases()


def hostile_norm_cases() -> list[Case]:
    cases = []
    noise = torch.randn(3, 300, generator=torch.Generator().manual_seed(7))
    offset = dict(norm_tensors(3, 300, F32), x=noise + 1e4)
    cases.append(norm_case("rows of 1e4 ± 1", offset, subtract_mean=True))
    extremes = dict(norm_tensors(3, 300, F16, weight=False), x=(noise * torch.tensor([[1e-7], [1e4], [0.0]])).to(F16))
    for subtract_mean in (False, True):
        cases.append(norm_case("subnormal, large and zero rows of fp16", extremes, subtract_mean=subtract_mean))
    broken = norm_tensors(6, 40, F32)
    broken["x"][1, 3], broken["x"][4, 39] = NAN, float("inf")
    for subtract_mean in (False, True):
        cases.append(norm_case("a NaN and an infinity stay in their rows", broken, subtract_mean=subtract_mean))

    constant = (torch.randn(8, 1, generator=torch.Generator().manual_seed(4)) * torch.logspace(-8, 30, 8)[:, None]).expand(8, 1037).contiguous()
    bias = torch.randn(1037, generator=torch.Generator().manual_seed(3))

    def judge(y: Tensor, stats: Tensor) -> None:
        assert torch.equal(y, bias.expand_as(y)), "layer_norm of constant rows: not exactly bias"
        assert torch.equal(stats[1], constant[:, 0])

    case = norm_case("constant rows", dict(x=constant, bias=bias), subtract_mean=True)
    case.judge = judge
    cases.append(case)
    return cases


def far_norm_case() -> Case:
    """Rows 2^30 elements apart: five of them wrap an index of 32 bits, signed or not. The memory between is never touched."""
    made = norm_tensors(5, 64, F16, residual=True)
    return norm_case("rows 2^30 apart", made, subtract_mean=False, sparse=2**30)


CASES = norm_cases()
FAR = [far_norm_case()]
FAULTS = [
    # Barriers.
    Fault("no barrier in a block's sum", REDUCE, "  __syncthreads();\n", "", {"races": f"{NOTHING}|{WARPS}", "plain": WRONG}, quick=True),
    Fault("one array for two sums", SOURCE, "row_sum(squares, shared<Shared>().squares)", "row_sum(squares, shared<Shared>().sum)", {"races": WARPS}),
    Fault("first entry overwritten while a warp reads it", SOURCE, "      __syncwarp();\n", "      ;\n", {"races": LANES}),
    Fault("first entry overwritten while a block reads it", SOURCE, "__syncthreads();  // without one", ";  // without one", {"races": THREADS, "plain": WRONG}),
    Fault("first entry of a long row overwritten", SOURCE, "if (kSubtractMean && row.residual != nullptr) __syncthreads();", "", {"races": THREADS, "plain": WRONG}),
    Fault("barrier in a branch", REDUCE, "  if (lane == 0) partials[threadIdx.x / kWarpSize] = value;\n  __syncthreads();\n",
          "  if (lane == 0) {\n    partials[threadIdx.x / kWarpSize] = value;\n    __syncthreads();\n  }\n", {"plain": "Refused: .*(deadlock in block|in __syncthreads at reduce.hpp)"}),
    Fault("threads without columns return early", SOURCE, "  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;\n  const auto row_sum",
          "  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;\n  if (first_col >= p.num_cols) return;\n  const auto row_sum", {"plain": "Refused: .*returned"}),
    # Warp functions.
    Fault("a shuffle's mask leaves out its caller", REDUCE, "__shfl_xor_sync(kFullMask, value, distance)", "__shfl_xor_sync(0x7fffffff, value, distance)",
          {"plain": "Refused: .*__shfl_xor_sync at reduce.hpp:.*the mask 0x7fffffff"}),
    Fault("a sum of 16 pairs", REDUCE, "distance > 0;", "distance > 1;", {"plain": WRONG}),
    Fault("a shuffle's width is half a warp", REDUCE, "value, distance)", "value, distance, 16)", {"plain": WRONG}),
    # Memory.
    Fault("entries of shared memory that no warp wrote", REDUCE, "warp_reduce(lane < num_warps ? partials[lane] : Op::kNothing, op)", "warp_reduce(partials[lane], op)",
          {"races": NOTHING, "asan": OUTSIDE, "plain": WRONG}),
    Fault("a vector read across the row's end", VECTOR, "  if (aligned && count >= kVectorSize<T>) {\n    vector.bits = *", "  if (aligned && count > 0) {\n    vector.bits = *", {"asan": OUTSIDE}, quick=True),
    Fault("a vector stored across the row's end", VECTOR, "  if (aligned && count >= kVectorSize<T>) {\n    *reinterpret_cast<uint4*>(to)", "  if (aligned && count > 0) {\n    *reinterpret_cast<uint4*>(to)",
          {"asan": OUTSIDE, "plain": f"({WRONG}.*written between its rows|{CRASH})"}),
    Fault("an entry read past the row's end", VECTOR, "if (i < count) vector.lanes[i]", "if (i <= count) vector.lanes[i]", {"asan": OUTSIDE}),
    Fault("an entry stored past the row's end", VECTOR, "if (i < count) to[i]", "if (i <= count) to[i]", {"asan": OUTSIDE, "plain": f"({WRONG}.*written between its rows|{CRASH})"}),
    Fault("one row too many", SOURCE, "if (index >= p.num_rows) return;", "if (index > p.num_rows) return;", {"asan": OUTSIDE}),
    Fault("statistics one row further", SOURCE, "p.stats[p.num_rows + row] = mean", "p.stats[p.num_rows + row + 1] = mean", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("more threads than partial sums", SOURCE, "warps > kMaxThreads / kWarpSize;", "warps > kMaxThreads / kWarpSize + 1;", {"asan": OUTSIDE}),
    Fault("16 bytes of a row that is not aligned", SOURCE, "aligned(is_aligned(x) && is_aligned(y) && is_aligned(residual) && is_aligned(h))", "aligned(true)", {"asan": "misaligned address"}),
    Fault("16 bytes of a residual that is not aligned", SOURCE, " && is_aligned(residual)", "", {"asan": "misaligned address"}),
    Fault("16 bytes of a weight that is not aligned", SOURCE, "const bool aligned = is_aligned(parameter);", "const bool aligned = true;", {"asan": "misaligned address"}),
    Fault("all threads store the statistics", SOURCE, "if (p.stats == nullptr || threadIdx.x != 0) return;", "if (p.stats == nullptr) return;", {"races": f"({THREADS}).*write by .*write by"}),
    Fault("an offset of 32 bits, signed", SOURCE, "row * p.stride_x", "static_cast<int>(row) * static_cast<int>(p.stride_x)", {"plain": WRONG, "asan": "signed integer overflow"}, far=True),
    Fault("an offset of 32 bits, unsigned", SOURCE, "row * p.stride_y", "static_cast<unsigned>(row * p.stride_y)", {"plain": WRONG}, far=True),
    # Values.
    Fault("what lies past the row counts", SOURCE, "h[c][i] = i < count ? h[c][i] - rest : 0.0f;", "h[c][i] = h[c][i] - rest;", {"plain": WRONG}),
    Fault("a common offset is not taken off first", SOURCE, "const float shift = kSubtractMean ? row.first() : 0.0f;\n  if (kSubtractMean) {", "const float shift = 0.0f;\n  if (kSubtractMean) {",
          {"plain": f"{WRONG}layer_norm of constant rows"}),
    Fault("the sum is not rounded before it is normalised", SOURCE, "sum[i] = round_to<T>(to_float(added.lanes[i]) + sum[i]);", "sum[i] += to_float(added.lanes[i]);", {"plain": f"{WRONG}.*rounded more than once"}),
    Fault("rounded before the weight and after", SOURCE, "p.cast_before_weight ? round_to<T>(x_hat[i]) * round_to<T>(scale) : x_hat[i] * scale", "round_to<T>(x_hat[i]) * scale",
          {"plain": f"{WRONG}.*rounded more than once"}),
    Fault("not rounded before the weight", SOURCE, "p.cast_before_weight ? round_to<T>(x_hat[i])", "p.cast_before_weight ? x_hat[i]", {"plain": f"{WRONG}.*rounded as they should"}),
    Fault("the weight and its offset are not rounded", SOURCE, "* round_to<T>(scale) :", "* scale :", {"plain": f"{WRONG}.*rounded as they should"}),
    Fault("the weight's offset is left out", SOURCE, "parameter[i] + p.weight_offset", "parameter[i]", {"plain": WRONG}),
    Fault("a long row's second walk reads x", SOURCE, "const T* stored = row.residual == nullptr ? row.x : row.h;", "const T* stored = row.x;", {"plain": WRONG}),
    Fault("eps outside the root", SOURCE, "rsqrtf(squares / static_cast<float>(p.num_cols) + p.eps)", "rsqrtf(squares / static_cast<float>(p.num_cols)) + p.eps", {"plain": WRONG}),
]  # fmt: skip
