"""csrc/cuda/sampling.cu: tokens against the distribution in float64 and the draw that a seed stands for, and the faults to be seen."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import (
    BF16,
    DTYPES,
    F16,
    F32,
    NAN,
    NOTHING,
    OUTSIDE,
    THREADS,
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
from fastattn.reference.philox import philox_4x32

SOURCE = "cuda/sampling.cu"
INF, I32, I64 = float("inf"), torch.int32, torch.int64
SEED = 0x1234_5678_9ABC_DEF
WHOLE = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
NEAR = 4e-6  # a share of the distribution that fp32 may put on either side of a number drawn


class SampleParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "seeds", "ids", "temperatures", "top_ks", "top_ps", "min_ps")),
        *((name, c_int64) for name in ("num_rows", "num_cols", "stride_x")),
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("min_p", c_float),
        ("dtype", c_int32),
        ("has_int64_top_ks", c_int32),
        ("has_seed_per_row", c_int32),
    ]


def uniform_numbers(num_rows: int, seeds: Tensor | None) -> list[tuple[float, float]]:
    """Each row's two, in [0, 1)."""
    zero = torch.zeros(num_rows, dtype=I64)
    counter = torch.arange(num_rows) if seeds is None else zero
    seeds = torch.tensor([SEED]) if seeds is None else seeds
    a, b, c, d = philox_4x32((seeds & 0xFFFFFFFF, seeds >> 32), (counter, zero, zero, zero))
    return [((a << 32 | b) / 2**64, (c << 32 | d) / 2**64) for a, b, c, d in zip(*(t.tolist() for t in (a, b, c, d)))]


def check_drawn(name: str, p: Tensor, place: int, number: float, slack: float) -> None:
    """`place` is where the cumulative sum of p holds the number."""
    up_to = p.cumsum(0)
    lo, hi = (up_to[place] - p[place]).item(), up_to[place].item()
    assert lo - slack <= number <= hi + slack, f"{name}: {place} has [{lo:.7f}, {hi:.7f}), the number is {number:.7f}"


def check_row(name: str, p: Tensor, token: int, numbers: tuple[float, float], groups: Tensor | None) -> None:
    """A token of probabilities p; groups: of each column, where the whole row is drawn from by group."""
    assert 0 <= token < len(p) and p[token] > 0, f"{name}: {token} is not kept"
    if groups is None:
        return check_drawn(name, p, token, numbers[0], NEAR)
    group = int(groups[token])
    sums = torch.zeros(int(groups.max()) + 1, dtype=p.dtype).index_add(0, groups, p)
    check_drawn(f"{name}, group", sums, group, numbers[0], NEAR)
    members = (groups == group).nonzero()[:, 0]
    check_drawn(f"{name}, in group {group}", p[members] / sums[group], int((members == token).nonzero()), numbers[1], NEAR)


def groups_of(num_cols: int, dtype: torch.dtype, start: int, aligned: bool) -> Tensor:
    """The group of each column of a row that starts at element `start`: every tile of its body has eight neighbours of it. Those of the
    edges are groups of their own, after all others."""
    tile = 4096 if dtype == F32 else 8192
    first = min(-start % 8, num_cols) if aligned else 0
    length = (num_cols - first) // 8 * 8 if aligned else num_cols
    col = torch.arange(num_cols)
    groups = (col - first) % tile // 8
    edge = (col < first) | (col >= first + length)
    groups[edge] = tile // 8 + torch.arange(int(edge.sum()))
    return groups


def sample_case(
    name: str, logits: Tensor, *, by_group: bool = False, gap: int = 0, lead: int = 0, sparse: int = 0, hostile: bool = False,
    seeds: Tensor | None = None, **options: float | Tensor,
) -> Case:  # fmt: skip
    """options, seeds: as `fastattn.sample`'s. by_group: the candidates do not hold all that is kept. hostile: any token of the row will do."""
    (num_rows, num_cols), dtype = logits.shape, logits.dtype
    of_rows = {key: value for key, value in options.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in (WHOLE | options).items() if key not in of_rows}
    top_ks = of_rows.get("top_k")
    params = SampleParams(
        num_rows=num_rows, num_cols=num_cols, stride_x=sparse or num_cols + gap, dtype=DTYPES[dtype],
        has_int64_top_ks=top_ks is not None and top_ks.dtype == I64, has_seed_per_row=seeds is not None, **numbers,
    )  # fmt: skip
    size = logits.element_size()
    buffers = [
        Buffer(spread(logits, gap), ("logits",), False, lead=lead * size, sparse=sparse * size),
        Buffer(torch.tensor([SEED]) if seeds is None else seeds, ("seeds",), False),
        Buffer(nothing(num_rows, dtype=I64), ("ids",), True),
        *(Buffer(value, (key + "s",), False) for key, value in of_rows.items()),
    ]

    def judge(ids: Tensor) -> None:
        valid = ~(logits.isnan() | (logits == INF)).any(1) & (logits > -INF).any(1)
        probs = None if hostile else reference.sampling_probs(logits.double(), **options)
        for row, (token, numbers) in enumerate(zip(ids.tolist(), uniform_numbers(num_rows, seeds))):
            if not valid[row]:
                assert token == -1, f"{name}: row {row} has no distribution, and {token} is drawn"
            elif hostile:
                assert 0 <= token < num_cols, f"{name}: row {row}: {token}"
            else:
                groups = groups_of(num_cols, dtype, row * params.stride_x, lead == 0) if by_group else None
                check_row(f"{name}, row {row}", probs[row], token, numbers, groups)

    return Case(f"sample {name} {num_rows}x{num_cols} {str(dtype)[6:]}", "sample", params, buffers, judge)


def draw(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def sample_cases() -> list[Case]:
    cases = [
        # The whole row: one column, less than a group, edges before and after, entries that no 16-byte load reaches, more than one tile.
        sample_case("whole", draw(1, 1), by_group=True),
        sample_case("whole", draw(2, 9, dtype=BF16), by_group=True),
        sample_case("whole, gap 3", draw(2, 1001, dtype=F16), by_group=True, gap=3),
        sample_case("whole, lead 1", draw(1, 1003), by_group=True, lead=1, temperature=2.0),
        sample_case("whole, flat", draw(1, 9000, dtype=BF16, scale=0.3), by_group=True),
        sample_case("whole, more than a block has threads", draw(1, 530000, scale=0.1), by_group=True, temperature=1.5),
        sample_case("min_p", draw(1, 1000, dtype=BF16), by_group=True, min_p=0.1),
        # Cuts whose tokens the candidates hold.
        sample_case("top_k", draw(2, 1001, scale=0.3), top_k=5, gap=1),
        sample_case("top_p", draw(1, 700, dtype=F16, scale=0.5), top_p=0.6, lead=3),
        sample_case("all options", draw(1, 4099, dtype=BF16), temperature=0.7, top_k=40, top_p=0.9, min_p=0.3),
        sample_case("top_k, a first threshold", draw(1, 20000, dtype=F16), top_k=50, temperature=4.0),
        sample_case("top_p, a first threshold", draw(1, 9001, scale=3.0), top_p=0.7, gap=2),
        sample_case("greedy", draw(1, 5000, dtype=BF16), temperature=0.0, top_k=7, top_p=0.3, min_p=1.0),
        # Ties: of all, for the last place, and their lower ids.
        sample_case("equal, top_k", torch.zeros(2, 300), top_k=7),
        sample_case("equal, top_p", torch.zeros(1, 101, dtype=BF16), top_p=0.5),
        sample_case("equal, greedy", torch.where(torch.arange(99) % 2 == 0, -0.0, 0.0)[None], temperature=0.0),
        sample_case("ties", draw(2, 1000).round(), top_k=8, top_p=0.7, temperature=2.0),
        # Cuts that take more than one probe, and more tokens than candidates.
        sample_case("flat, top_p", draw(1, 9001, scale=0.1), top_p=0.9, by_group=True),
        sample_case("flat, top_k", draw(1, 12000, dtype=F16, scale=0.5), top_k=6000, top_p=0.95, by_group=True),
        sample_case("equal beyond the candidates", torch.zeros(1, 9003, dtype=BF16), top_k=5000, by_group=True, gap=6),
        sample_case("more wanted than there are", torch.where(torch.arange(10000) % 2 == 0, 0.5, -INF)[None], top_k=6000, by_group=True),
        sample_case("masks of -1e9", torch.where(torch.arange(6000) % 3 == 0, draw(6000), torch.tensor(-1e9))[None], top_k=100, temperature=9.0),
        sample_case("one above masks of -inf, top_p", torch.where(torch.arange(5000) == 4321, 1.0, -INF)[None], top_p=0.5),
        sample_case("one above masks of -inf, top_k", torch.where(torch.arange(5000) == 4321, 1.0, -INF)[None], top_k=50, by_group=True),
        sample_case("top_p of 0", draw(1, 800), top_p=0.0),
        sample_case("no rows", draw(0, 40)),
    ]
    rows = dict(
        temperature=torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0]),
        top_k=torch.tensor([3, -1, 7, 2**32 + 1, 100]),
        top_p=torch.tensor([0.5, 0.9, 1.0, 0.7, 0.1]),
        min_p=torch.tensor([0.0, 0.1, 0.0, 0.05, 0.0]),
    )
    cases.append(sample_case("parameters of each row", draw(5, 50), **rows))
    cases.append(sample_case("seeds of each row", draw(3, 700), by_group=True, seeds=torch.tensor([2**62 - 1, 0, 7])))
    two = {key: value[1:3].int() if key == "top_k" else value[1:3] for key, value in rows.items()}
    cases.append(sample_case("parameters of each row, int32", draw(2, 50), **two))
    return cases + hostile_cases() + refused_cases()


def hostile_cases() -> list[Case]:
    broken = draw(6, 29)
    broken[0, 2], broken[1, 28], broken[2, 20], broken[3], broken[4, 0] = NAN, INF, NAN, -INF, -INF
    broken[5].view(I32)[3] = -0x400000  # a NaN with a sign
    cases = [sample_case("NaN and infinities", broken[:2], top_k=3), sample_case("NaN and infinities, whole", broken, by_group=True, gap=4)]
    extremes = torch.tensor([[3e38, -3e38, 3.1e38, 0.0, 1e-40]])
    cases.append(sample_case("the ends of fp32", extremes, top_k=2))
    bad = dict(
        temperature=torch.tensor([-1.0, NAN, INF, 1.0, 1e-45]),
        top_k=torch.tensor([0, -(2**63), 2**63 - 1, 2**32 + 1, 2]),
        top_p=torch.tensor([0.5, NAN, -INF, 2.0, 0.5]),
        min_p=torch.tensor([NAN, 0.0, -1.0, 2.0, INF]),
    )
    cases.append(sample_case("parameters out of range", draw(5, 100), hostile=True, **bad))
    return cases


def refused_cases() -> list[Case]:
    cases = []
    for change in (dict(num_cols=0), dict(num_cols=-1), dict(num_cols=2**22 + 1), dict(num_rows=-1), dict(num_rows=2**31), dict(dtype=3)):
        case = sample_case(f"refused {change}", draw(1, 8))
        for key, value in change.items():
            setattr(case.params, key, value)
        case.answer = "^cudaError 1$"
        cases.append(case)
    return cases


CASES = sample_cases()
FAR = [sample_case("rows 2^30 apart", draw(5, 64, dtype=F16), by_group=True, sparse=2**30)]
FAULTS = [
    # Barriers.
    Fault("tokens placed before all are counted", SOURCE, "    __syncthreads();  // all warps' counts are there", "    // all warps' counts are there", {"races": f"{NOTHING}|{WARPS}"}, quick=True),
    Fault("a reduction that waits for nobody", SOURCE, "    __syncthreads();\n    return over_warp", "    return over_warp", {"races": f"{NOTHING}|{WARPS}"}),
    Fault("a prefix that waits for nobody", SOURCE, "    __syncthreads();\n    const int64_t of_warp", "    const int64_t of_warp", {"races": f"{NOTHING}|{WARPS}"}),
    Fault("two reductions in one array", SOURCE, "    turn ^= 1;\n    if (lane == 0)", "    if (lane == 0)", {"races": WARPS}),
    Fault("the last tie read before it is found", SOURCE, "        __syncthreads();  // it is known", "        // it is known", {"races": f"{NOTHING}|{THREADS}"}),
    Fault("the group read before it is found", SOURCE, "  __syncthreads();  // the group is known\n", "", {"races": f"{NOTHING}|{THREADS}"}),
    # Memory.
    Fault("a candidate too many", SOURCE, "place >= kCandidates", "place > kCandidates", {"asan": OUTSIDE}),
    Fault("an entry read past the body's end", SOURCE, "offset + i < length ? from[i]", "offset + i <= length ? from[i]", {"asan": OUTSIDE}),
    Fault("16 bytes of a body that is not aligned", SOURCE, "if (aligned() && offset < length)", "if (offset < length)", {"asan": "misaligned address|heap-buffer-overflow"}),
    Fault("a row of logits sampled by an offset of 32 bits", SOURCE, "x(static_cast<const T*>(p.logits) + row * p.stride_x)", "x(static_cast<const T*>(p.logits) + static_cast<unsigned>(row * p.stride_x))", {"plain": WRONG}, far=True),
    Fault("top_k cut to 32 bits", SOURCE, "  int64_t top_k = p.top_k;", "  int top_k = p.top_k;", {"plain": WRONG}),
    # Values.
    Fault("a NaN is no entry", SOURCE, "float_key(max_or_nan(own_max, edge_x))", "float_key(fmaxf(own_max, edge_x))", {"plain": WRONG}),
    Fault("no token below the bound is a bound", SOURCE, "found.count > 0 ? max(key, found.least) : hi", "max(key, found.least)", {"plain": WRONG}),
    Fault("a tie too few for top_p", SOURCE, "max(min(wanted + 1, k - fewer), 1)", "max(min(wanted, k - fewer), 1)", {"plain": WRONG}),
    Fault("the last tie is not kept", SOURCE, "col <= last_tie", "col < last_tie", {"plain": WRONG}),
    Fault("top_p of the whole row, not of top_k's", SOURCE, "    goal = goal_of(top_p, kept_mass);", "    goal = goal_of(top_p, b.mass_above);", {"plain": WRONG}),
    Fault("min_p of no token", SOURCE, "return w >= min_p && (", "return (", {"plain": WRONG}),
    Fault("the ties of a probe from its first on", SOURCE, "key_float(b.lo + 1), wanted - 1)", "key_float(b.lo + 1), 0)", {"plain": WRONG}),
    Fault("the edge is not drawn from", SOURCE, "ticket(word, in_body + warp_sum(edge))", "ticket(word, in_body)", {"plain": WRONG}),
    Fault("a group and its token by one number", SOURCE, "ticket(second_word, block", "ticket(word, block", {"plain": WRONG}),
    Fault("a sum that forgets its maximum has risen", SOURCE, "      own_sum *= weights.weight(old_shift, shift);\n", "", {"plain": WRONG}),
]  # fmt: skip
