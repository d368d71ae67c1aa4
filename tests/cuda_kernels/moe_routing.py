"""csrc/cuda/moe_routing.cu: routing and the sort at the edges of what one block takes, and the faults that the builds must see."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import (
    BF16,
    DTYPES,
    F16,
    F32,
    LANES,
    NAN,
    NOTHING,
    OUTSIDE,
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

SOURCE = "cuda/moe_routing.cu"
INF, I32, I64 = float("inf"), torch.int32, torch.int64
PLAN = ("order", "inverse", "offsets")


class RouteParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "bias", "weights", "indices", *PLAN)),
        *((name, c_int64) for name in ("num_tokens", "stride_t")),
        *((name, c_int32) for name in ("dtype", "num_experts", "top_k", "num_groups", "top_k_groups", "score", "score_first", "renormalize")),
        ("scaling_factor", c_float),
    ]


class DispatchParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("indices", *PLAN)),
        *((name, c_int64) for name in ("num_tokens", "stride_t", "stride_k")),
        *((name, c_int32) for name in ("num_experts", "top_k", "has_int64_indices")),
    ]


def plan_buffers(num_slots: int, num_experts: int) -> list[Buffer]:
    return [
        Buffer(nothing(num_slots, dtype=I64), ("order",), True),
        Buffer(nothing(num_slots, dtype=I64), ("inverse",), True),
        Buffer(nothing(num_experts, dtype=I32), ("offsets",), True),
    ]


def check_plan(name: str, indices: Tensor, num_experts: int, plan: dict[str, Tensor]) -> None:
    for (key, got), want in zip(plan.items(), reference.moe_dispatch(indices, num_experts)):
        assert torch.equal(got, want), f"{name} {key}: {got.tolist()}, not {want.tolist()}"


def route_case(
    name: str, logits: Tensor, top_k: int, *, score: str = "softmax", order: str = "score_then_topk", bias: Tensor | None = None,
    groups: tuple[int, int] | None = None, renormalize: bool = False, scaling_factor: float = 1.0, gap: int = 0, lead: int = 0,
    bias_lead: int = 0, sparse: int = 0,
) -> Case:  # fmt: skip
    """gap, lead: elements between rows of logits, and before the first. sparse: elements from row to row, with nothing between."""
    (num_tokens, num_experts), dtype = logits.shape, logits.dtype
    num_groups, top_k_groups = groups or (1, 1)
    params = RouteParams(
        num_tokens=num_tokens, stride_t=sparse or num_experts + gap, dtype=DTYPES[dtype], num_experts=num_experts, top_k=top_k,
        num_groups=num_groups, top_k_groups=top_k_groups, score=score == "sigmoid", score_first=order == "score_then_topk",
        renormalize=renormalize, scaling_factor=scaling_factor,
    )  # fmt: skip
    size = logits.element_size()
    buffers = [
        Buffer(spread(logits, gap), ("logits",), False, lead=lead * size, sparse=sparse * size),
        *([] if bias is None else [Buffer(bias, ("bias",), False, lead=bias_lead * 4)]),
        Buffer(nothing(num_tokens, top_k), ("weights",), True),
        Buffer(nothing(num_tokens, top_k, dtype=I64), ("indices",), True),
        *plan_buffers(num_tokens * top_k, num_experts),
    ]
    options = dict(score=score, order=order, bias=bias, renormalize=renormalize, scaling_factor=scaling_factor)
    options |= {} if groups is None else dict(num_groups=num_groups, top_k_groups=top_k_groups)

    def judge(weights: Tensor, indices: Tensor, **plan: Tensor) -> None:
        truth, chosen = reference.moe_route(logits.double(), top_k, **options)
        assert torch.equal(indices, chosen), f"{name} indices: {indices.tolist()}, not {chosen.tolist()}"
        check_budget(f"{name} weights", weights, reference.moe_route(logits, top_k, **options)[0], truth)
        check_plan(name, indices, num_experts, plan)

    return Case(f"route {name} {num_tokens}x{num_experts} top {top_k}", "moe_route_dispatch", params, buffers, judge)


def dispatch_case(name: str, indices: Tensor, num_experts: int, sparse: int = 0) -> Case:
    """sparse: elements from token to token, with nothing between."""
    num_tokens, top_k = indices.shape
    stride_t, stride_k = indices.stride()
    params = DispatchParams(
        num_tokens=num_tokens, stride_t=sparse or stride_t, stride_k=stride_k, num_experts=num_experts, top_k=top_k,
        has_int64_indices=indices.dtype == I64,
    )  # fmt: skip
    ids = Buffer(indices, ("indices",), False, sparse=sparse * indices.element_size())

    def judge(**plan: Tensor) -> None:
        check_plan(name, indices.long(), num_experts, plan)

    return Case(f"dispatch {name} {num_tokens}x{top_k} of {num_experts}", "moe_dispatch", params, [ids, *plan_buffers(indices.numel(), num_experts)], judge)


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


# --------------------------------------------------------------------------------------------------------------------
# Routing.

DEEPSEEK = dict(score="sigmoid", groups=(8, 4), renormalize=True, scaling_factor=2.5)
LATER = dict(order="topk_then_score")


def route_cases() -> list[Case]:
    cases = []
    # One expert, all of them chosen; each number of experts a lane, its last and the next one's first; as many tokens, slots and warps as
    # there can be.
    sizes = [
        (1, 1, 1), (5, 7, 2), (3, 60, 4), (2, 128, 8), (2, 129, 5), (3, 256, 8), (2, 257, 9), (1, 512, 8), (40, 8, 6), (256, 3, 1), (18, 33, 14),
        (1, 300, 256), (17, 512, 15),
    ]  # fmt: skip
    for i, (tokens, experts, top_k) in enumerate(sizes):
        dtype, (gap, lead) = (F32, BF16, F16)[i % 3], ((0, 0), (8, 0), (1, 0), (0, 1), (5, 3))[i % 5]
        options = (dict(), dict(renormalize=True), LATER, dict(score="sigmoid"))[i % 4]
        cases.append(route_case(f"{str(dtype)[6:]} gap {gap} lead {lead}", draw(tokens, experts, dtype=dtype), top_k, gap=gap, lead=lead, **options))
    for score in ("softmax", "sigmoid"):
        for order in ("score_then_topk", "topk_then_score"):
            for biased in (False, True):
                options = dict(score=score, order=order, bias=0.2 * draw(20) if biased else None, renormalize=biased, scaling_factor=0.7)
                cases.append(route_case(f"{score} {order}, biased {biased}", draw(3, 20, dtype=BF16), 3, **options))
                options["renormalize"] = not biased
                cases.append(route_case(f"{score} {order}, biased {biased}, and else", draw(3, 20), 3, **options))
    for bias_lead in (0, 1):
        bias = 0.1 * draw(256)
        cases.append(route_case(f"DeepSeek-V3, bias lead {bias_lead}", draw(3, 256, dtype=BF16), 8, bias=bias, bias_lead=bias_lead, **DEEPSEEK))
    # Groups of one and of all, of sizes that no number of lanes divides, more of them than lanes.
    grouped = [(160, 6, 8, 3), (9, 3, 3, 1), (6, 3, 6, 4), (30, 12, 5, 2), (12, 4, 2, 1), (70, 4, 35, 9), (512, 5, 16, 3), (64, 3, 64, 7)]
    for experts, top_k, *groups in grouped:
        for biased in (False, True):
            options = dict(bias=0.2 * draw(experts) if biased else None, groups=tuple(groups), score="sigmoid" if experts % 4 else "softmax")
            cases.append(route_case(f"groups {groups}, biased {biased}", draw(2 if experts < 512 else 18, experts), top_k, **options))
    return cases + hostile_route_cases() + refused_cases()


def hostile_route_cases() -> list[Case]:
    cases = [route_case("no tokens", draw(0, 40), 2)]
    tied = draw(4, 130).round()
    tied[0], tied[1, ::2] = 0.0, -0.0
    for options in (dict(), dict(score="sigmoid", bias=torch.zeros(130)), dict(bias=torch.zeros(130), groups=(13, 5)), dict(groups=(13, 5))):
        cases.append(route_case(f"ties {list(options)}", tied, 9, **options))
    # Sums of groups tie to the bit: what is added is exact.
    halves = draw(2, 48).round() / 2
    cases.append(route_case("ties of sums", halves, 5, bias=torch.zeros(48), groups=(12, 5), **LATER))
    broken = draw(10, 40)
    broken[0, 3], broken[1, 39], broken[2, :] = NAN, INF, -INF
    broken[3, 5:] = -INF
    broken[4, 7], broken[4, 30], broken[4, 31] = -INF, NAN, INF
    broken[5].view(I32)[[2, 17]] = -0x400000  # NaNs with a sign
    broken[6], broken[7], broken[8] = 1e30, -3e38, broken[8] * 1e38
    broken[9] = -200.0 - draw(40).abs()  # a sigmoid of which is 0, and so the sum
    for score in ("softmax", "sigmoid"):
        for order in ("score_then_topk", "topk_then_score"):
            options = dict(score=score, order=order, renormalize=True)
            cases.append(route_case(f"NaN and infinities, {score} {order}", broken, 6, **options))
            cases.append(route_case(f"NaN and infinities in groups, {score} {order}", broken, 6, groups=(8, 3), **options))
    biased = dict(bias=torch.where(torch.arange(40) % 7 == 0, -INF, 0.0), groups=(8, 3), **LATER)
    cases.append(route_case("a bias of -inf", broken[:4], 6, **biased))
    return cases


def refused_cases() -> list[Case]:
    cases = []
    changes = [
        dict(num_experts=0), dict(num_experts=513), dict(top_k=0), dict(top_k=-3), dict(top_k=9), dict(num_tokens=-1), dict(num_tokens=129),
        dict(num_tokens=2**62), dict(num_groups=0), dict(num_groups=3), dict(num_groups=16), dict(top_k_groups=0), dict(top_k_groups=2),
        dict(num_groups=8, top_k_groups=1), dict(dtype=3), dict(score=2),
    ]  # fmt: skip
    for change in changes:
        case = route_case(f"refused {change}", draw(1, 8), 2)
        for key, value in change.items():
            setattr(case.params, key, value)
        case.answer = "^cudaError 1$"
        cases.append(case)
    for change in (dict(num_experts=0), dict(num_experts=513), dict(top_k=0), dict(num_tokens=-1), dict(num_tokens=129), dict(num_tokens=2**62)):
        case = dispatch_case(f"refused {change}", torch.zeros(1, 2, dtype=I64), 8)
        for key, value in change.items():
            setattr(case.params, key, value)
        case.answer = "^cudaError 1$"
        cases.append(case)
    return cases


# --------------------------------------------------------------------------------------------------------------------
# The sort.


def dispatch_cases() -> list[Case]:
    ids = lambda tokens, top_k, experts, dtype=I64: torch.randint(  # noqa: E731
        experts, (tokens, top_k), generator=torch.Generator().manual_seed(tokens + experts), dtype=dtype
    )
    cases = [
        dispatch_case("int32", ids(32, 8, 128, I32), 128),
        dispatch_case("int64, ids beyond", ids(31, 8, 16), 13),
        dispatch_case("one slot", ids(1, 1, 1), 1),
        dispatch_case("no tokens", ids(0, 4, 5), 512),
        dispatch_case("one expert", torch.full((128, 2), 4), 33),
        dispatch_case("the last expert", torch.full((33, 1), 511), 512),
        dispatch_case("nobody's", torch.full((16, 3), 7), 7),
        dispatch_case("all experts", ids(32, 7, 512), 512),
        dispatch_case("of every other column", ids(9, 8, 40)[:, ::2], 40),
        dispatch_case("transposed", ids(4, 30, 40, I32).t(), 40),
        dispatch_case("a row for all tokens", ids(1, 4, 6).expand(20, 4), 6),
    ]
    extremes = torch.tensor([[0, -1, 2**31, 2**32, 2**32 + 1, -(2**63), 2**63 - 1, 5, 4, -(2**32)]])
    cases.append(dispatch_case("ids of 64 bits", extremes, 5))
    cases.append(dispatch_case("ids of 32 bits", torch.tensor([[3, -1, 2**31 - 1, -(2**31), 5, 4, 0]], dtype=I32), 5))
    return cases


def far_cases() -> list[Case]:
    """Rows 2^30 elements apart: five of them wrap an index of 32 bits, signed or not."""
    ids = torch.arange(15).view(5, 3) % 7
    return [route_case("rows 2^30 apart", draw(5, 64, dtype=F16), 3, sparse=2**30), dispatch_case("rows 2^30 apart", ids, 6, sparse=2**30)]


CASES = route_cases() + dispatch_cases()
FAR = far_cases()
FAULTS = [
    # Barriers.
    Fault("sorted before all have chosen", SOURCE, "route<T, kKeys>(p, token, s, keys);\n  __syncthreads();", "route<T, kKeys>(p, token, s, keys);", {"races": f"{WARPS}|{NOTHING}"}, quick=True),
    Fault("sorted before all ids are read", SOURCE, "  }\n  __syncthreads();  // all ids are known\n  sort_slots(s, num", "  }\n  sort_slots(s, num", {"races": f"{WARPS}|{NOTHING}"}),
    Fault("counts read before they are made", SOURCE, "  __syncthreads();  // slots are counted\n", "", {"races": f"{LANES}|{WARPS}", "plain": WRONG}),
    Fault("places read before they are made", SOURCE, "  __syncthreads();  // experts have their places\n", "", {"races": f"{WARPS}|{NOTHING}"}),
    Fault("a warp does not wait for what it has chosen", SOURCE, "  __syncwarp();  // what each", "  // what each", {"races": f"{LANES}|{NOTHING}"}),
    Fault("a warp does not wait for its keys", SOURCE, "  __syncwarp();  // a lane reads", "  // a lane reads", {"races": f"{LANES}|{NOTHING}"}),
    Fault("a group's key among those still read", SOURCE, "    __syncwarp();  // the group's", "    // the group's", {"races": LANES}),
    Fault("a warp does not wait for its groups' keys", SOURCE, "  __syncwarp();  // all groups have", "  // all groups have", {"races": LANES}),
    Fault("what is kept among keys still read", SOURCE, "  __syncwarp();  // all groups' keys", "  // all groups' keys", {"races": LANES}),
    Fault("a warp does not wait for what is kept", SOURCE, "  __syncwarp();  // it is known", "  // it is known", {"races": LANES}),
    # Memory.
    Fault("experts' counts that begin with anything", SOURCE, "  clear_counts(s.slots, p.num_experts);\n", "", {"races": NOTHING, "plain": "(Crash|AssertionError|Refused)"}),
    Fault("nobody's count begins with anything", SOURCE, "expert <= num_experts; expert += blockDim.x", "expert < num_experts; expert += blockDim.x", {"races": NOTHING}),
    Fault("the groups' shared memory 4 bytes too small", SOURCE, "has_groups ? warps * kKeyBytes :", "has_groups ? warps * kKeyBytes - 4 :", {"asan": OUTSIDE}),
    Fault("logits read past the row's end", SOURCE, "to[i] = i < count ? to_float(from[i]) : -INFINITY;", "to[i] = i <= count ? to_float(from[i]) : -INFINITY;", {"asan": OUTSIDE, "plain": WRONG}),
    Fault("an expert's offset too many", SOURCE, "    if (thread < num_experts) {\n      s.begin", "    if (thread <= num_experts) {\n      s.begin", {"asan": OUTSIDE}),
    Fault("a negative id", SOURCE, "id >= 0 && id < p.num_experts", "id < p.num_experts", {"plain": "(Crash|AssertionError)"}),
    Fault("an id cut to 32 bits", SOURCE, "const int64_t id = p.has_int64", "const int id = p.has_int64", {"plain": WRONG}),
    Fault("a slot that is none has an expert", SOURCE, "if (thread < num_slots) bin = s.expert[thread];", "bin = s.expert[thread];", {"races": NOTHING}),
    Fault("a row of logits by an offset of 32 bits", SOURCE, "token * p.stride_t", "token * static_cast<int>(p.stride_t)", {"plain": "(Crash|AssertionError)", "asan": "signed integer overflow"}, far=True),
    Fault("a token's ids by an offset of 32 bits", SOURCE, "slot / p.top_k * p.stride_t", "static_cast<unsigned>(slot / p.top_k * p.stride_t)", {"plain": WRONG}, far=True),
    # Values.
    Fault("ties go to the highest lane", SOURCE, "lane == __ffs(static_cast<int>(holders)) - 1", "lane == 31 - __clz(static_cast<int>(holders))", {"plain": f"{WRONG}.*indices"}),
    Fault("ties go to a lane's highest", SOURCE, "for (int i = kKeys - 1; i >= 0; --i)", "for (int i = 0; i < kKeys; ++i)", {"plain": f"{WRONG}.*indices"}),
    Fault("ties of groups go to the higher", SOURCE, "other < group)", "other > group)", {"plain": f"{WRONG}.*indices"}),
    Fault("a NaN with a sign is the least", SOURCE, "return x == x ? float_key(x) : kNanKey;", "return float_key(x);", {"plain": f"{WRONG}.*indices"}),
    Fault("a group's two largest are of one lane", SOURCE, "max(min(first, other), max(second, other_second))", "max(second, other_second)", {"plain": f"{WRONG}.*indices"}),
    Fault("groups are summed where they have one expert", SOURCE, "p.bias != nullptr && group_size > 1", "p.bias != nullptr", {"plain": f"{WRONG}.*indices"}),
    Fault("what lies past a token's experts counts", SOURCE, "to[i] = i < count ? to[i] : -INFINITY;", ";", {"plain": f"{WRONG}.*weights"}),
    Fault("the bias weighs", SOURCE, "  if (p.top_k_groups < p.num_groups) keep", "  for (int i = 0; i < kKeys; ++i) x[i] = choice[i];\n  if (p.top_k_groups < p.num_groups) keep", {"plain": WRONG}),
    Fault("a sum of 0 divides", SOURCE, "warp_sum(total) + kTiny", "warp_sum(total)", {"plain": f"{WRONG}.*weights"}),
    Fault("a slot is counted twice", SOURCE, "count_of(s, bin, warp) + rank", "count_of(s, bin, warp + 1) + rank", {"plain": "(Crash|AssertionError)"}),
    Fault("a slot is before itself", SOURCE, "((1u << lane) - 1)", "((2u << lane) - 1)", {"plain": "(Crash|AssertionError)"}),
]  # fmt: skip
