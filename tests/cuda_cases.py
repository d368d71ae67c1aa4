"""The cases that every build of csrc/cuda is held to, small enough for the slowest; test_cuda_on_cpu.py adds larger ones."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import Buffer, Case
from torch import Tensor

from fastattn import reference
from fastattn.testing.budget import check_budget

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = {F32: 0, F16: 1, BF16: 2}
NAN = float("nan")


def nothing(*shape: int, dtype: torch.dtype = F32, gap: int = 0) -> Tensor:
    """NaN, or the largest int: what a kernel must overwrite. gap: that many elements more between rows."""
    fill = NAN if dtype.is_floating_point else torch.iinfo(dtype).max
    rows = torch.full((*shape[:-1], shape[-1] + gap), fill, dtype=dtype)
    return rows[..., : shape[-1]]


def spread(t: Tensor, gap: int) -> Tensor:
    """The same rows with gaps of NaN between them."""
    rows = nothing(*t.shape, dtype=t.dtype, gap=gap)
    rows.copy_(t)
    return rows


# --------------------------------------------------------------------------------------------------------------------
# Norms.


class NormParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "weight", "bias", "y", "h", "stats")),
        *((name, c_int64) for name in ("num_rows", "num_cols", "stride_x", "stride_residual", "stride_y", "stride_h")),
        ("eps", c_float),
        ("weight_offset", c_float),
        ("dtype", c_int32),
        ("weight_dtype", c_int32),
        ("subtract_mean", c_int32),
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
    lead: int = 0, leads: dict[str, int] | None = None, in_place: bool = False, stats: bool = True, sparse: int = 0,
) -> Case:  # fmt: skip
    """tensors: x (rows, N), residual, weight, bias. gap, lead: elements between rows, and before the first of each row tensor; leads: of
    one tensor. sparse: elements from row to row, with nothing between."""
    x, residual, weight, bias = (tensors.get(key) for key in ("x", "residual", "weight", "bias"))
    (num_rows, num_cols), dtype = x.shape, x.dtype
    stride = sparse or num_cols + gap
    parameter = weight if weight is not None else bias
    params = NormParams(
        num_rows=num_rows, num_cols=num_cols, stride_x=stride, stride_residual=stride, stride_y=stride, stride_h=stride, eps=eps,
        weight_offset=weight_offset, dtype=DTYPES[dtype], weight_dtype=DTYPES[dtype if parameter is None else parameter.dtype],
        subtract_mean=subtract_mean,
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


# --------------------------------------------------------------------------------------------------------------------
# The stand-in itself.


class ProbeParams(ctypes.Structure):
    _fields_ = [("in_", c_void_p), ("out", c_void_p), ("size", c_int64), ("probe", c_int32)]


PROBES = (
    "warp_functions", "conversions", "pipeline", "histogram", "halves", "dynamic", "barrier_in_branch", "two_barriers", "early_return",
    "caller_not_in_mask", "source_not_in_mask", "shuffle_in_branch", "lane_returned", "part_warp", "unaligned_copy", "too_many_threads",
)  # fmt: skip

# What each misuse answers: lines are those of probes.cu that it happens at.
MISUSES = {
    "barrier_in_branch": r"deadlock in block \(0, 0, 0\): 40 in __syncthreads at probes.cu:\d+ \(threads 0-39\); 24 returned \(threads 40-63\)",
    "two_barriers": r"deadlock .*: 32 in __syncthreads at probes.cu:\d+ \(threads 0, 2, .*; 32 in __syncthreads at probes.cu:\d+ \(threads 1, 3",
    "early_return": r"deadlock .*: 63 in __syncthreads at probes.cu:\d+ \(threads 0-4, 6-63\); 1 returned \(threads 5\)",
    "caller_not_in_mask": r"__shfl_sync at probes.cu:\d+ with mask 0x7fffffff: the caller, lane 31, is not in its mask",
    "source_not_in_mask": r"__shfl_xor_sync at probes.cu:\d+: lane 0 reads lane 8, which is not in the mask 0x000000ff",
    "shuffle_in_branch": r"__shfl_sync at probes.cu:\d+ with mask 0xffffffff: lane \d+ is here, lane \d+ in __shfl_sync at probes.cu:\d+",
    "lane_returned": r"returned",
    "part_warp": r"__syncwarp at probes.cu:\d+ with mask 0xffffffff: the block has no lane 16 in this warp",
    "unaligned_copy": r"cp.async at cp_async.hpp:\d+: an address is not at a multiple of the size",
    "too_many_threads": r"^cudaError 9$",
}


def probe_case(name: str, into: Tensor, out: Tensor, want: Tensor | None = None, answer: str = "") -> Case:
    params = ProbeParams(size=len(into), probe=PROBES.index(name))

    def judge(out: Tensor) -> None:
        assert torch.equal(out, want), f"{name}: at {(out != want).nonzero()[:5].tolist()}"

    return Case(f"{name} {len(into)}", "probe", params, [Buffer(into, ("in_",), False), Buffer(out, ("out",), True)], judge, answer)


def warp_functions_expected(v: Tensor) -> Tensor:
    lane = torch.arange(32)
    odd, below = (v % 2).bool(), lambda source, width: torch.where(source // width == lane // width, source, lane)
    bits = lambda flags: int(sum(1 << i for i, flag in enumerate(flags.tolist()) if flag))  # noqa: E731
    columns = [
        v[(lane + 5) % 32],
        v[lane // 8 * 8 + 9 % 8],
        v[below(lane - 3, 32).where(lane >= 3, lane)],
        v[below(lane - 3, 16).where(lane >= 3, lane)],
        v[below(lane + 7, 32).where(lane < 25, lane)],
        v[below(lane + 2, 4)],
        v[lane ^ 17],
        v[torch.where((lane ^ 8) // 8 <= lane // 8, lane ^ 8, lane)],  # an earlier segment's lane is read, a later one's is not
        torch.full((32,), bits(odd)),
        torch.tensor([bits(v % 3 == x % 3) for x in v]),
        torch.full((32,), int((v == 0).any()) + 2),
        torch.full((32,), int(v.sum())),
        torch.full((32,), int(v.min()) - 30000),
        torch.full((32,), int(v.max())),
        torch.tensor([x.bit_count() + 100 * ((x & -x).bit_length()) + 10000 * (32 - x.bit_length()) for x in v.tolist()]),
        torch.full((32,), int(odd.sum()) + 100 * int((v == 1).any()) + 1000),
    ]
    wrapped = torch.stack(columns, 1)
    return torch.where(wrapped >= 2**31, wrapped - 2**32, wrapped).int()


def conversions_expected(bits: Tensor) -> Tensor:
    floats = bits.view(F32)
    as_bits = lambda t: t.view(torch.int16).int() & 0xFFFF  # noqa: E731
    nan = torch.tensor(0x7FFF, dtype=torch.int32)
    half, bfloat = (torch.where(floats.isnan(), nan, as_bits(floats.to(dtype))) for dtype in (F16, BF16))
    from_half = (bits & 0xFFFF).to(torch.int16).view(F16)
    payload = (bits & 0x8000) << 16 | 0x7F800000 | (bits & 0x3FF) << 13  # torch quiets a signalling NaN
    return torch.stack([half, bfloat, torch.where(from_half.isnan(), payload, from_half.float().view(torch.int32))])


def probe_cases() -> list[Case]:
    """The right ones. Numbers are int32 here: torch has few operations on unsigned ones."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda size, top=2**16: torch.randint(0, top, (size,), generator=generator, dtype=torch.int32)  # noqa: E731
    cases = []
    for v in (draw(32), draw(32, 2), torch.arange(32, dtype=torch.int32)):
        cases.append(probe_case("warp_functions", v, nothing(32, 16, dtype=torch.int32), warp_functions_expected(v.long())))
    floats = torch.randn(300, generator=generator) * torch.logspace(-9, 5, 300)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), NAN, 65504.0, 65519.996, 65520.0, 2**-24, 2**-25, 1.5 * 2**-25, 2**-14, 3.39e38])
    given = torch.cat([floats, special]).view(torch.int32)
    cases.append(probe_case("conversions", given, nothing(3, len(given), dtype=torch.int32), conversions_expected(given)))
    for size in (1280, 1, 1279, 3001):
        v = draw(size)
        blocks = -(-size // 1280)
        sums = torch.nn.functional.pad(v, (0, blocks * 1280 - size)).view(blocks, 1280).sum(1, dtype=torch.int32)
        cases.append(probe_case("pipeline", v, torch.zeros(blocks, dtype=torch.int32), sums))
    v = draw(500)
    cases.append(probe_case("histogram", v, torch.zeros(16, dtype=torch.int32), torch.bincount(v % 16, minlength=16).int()))
    v = draw(64)
    cases.append(probe_case("halves", v, nothing(64, dtype=torch.int32), v.view(4, 16).flip(1).flatten()))
    for size in (1, 40, 1024):
        v = draw(size)
        cases.append(probe_case("dynamic", v, nothing(size, dtype=torch.int32), v.flip(0)))
    return cases


def misuse_cases() -> list[Case]:
    return [probe_case(name, torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32), answer=said) for name, said in MISUSES.items()]


def all_floats_case() -> Case:
    """Each half, and floats around every rounding boundary of half and bfloat16."""
    exponents = torch.arange(0, 2**16, dtype=torch.int64) << 16
    near = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (exponents[:, None] | near).flatten()
    bits = torch.cat([bits, torch.arange(2**16)])
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).int()
    return probe_case("conversions", bits, nothing(3, len(bits), dtype=torch.int32), conversions_expected(bits))
