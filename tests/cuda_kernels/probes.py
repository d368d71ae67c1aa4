"""csrc/cuda_on_cpu/probes.cu, kernels that test the stand-in itself: cases, misuses that it must name, faults that it must see."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import (
    BF16,
    BLOCKS,
    F16,
    F32,
    LANES,
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
)
from torch import Tensor

SOURCE = "cuda_on_cpu/probes.cu"


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


CASES = probe_cases()
FAR: list[Case] = []
FAULTS = [
    Fault("no wait for a copy", SOURCE, "    cp_async::wait<1>();\n", "", {"plain": WRONG, "races": NOTHING}),
    Fault("a wait too weak by one group", SOURCE, "cp_async::wait<1>();", "cp_async::wait<2>();", {"plain": WRONG, "races": NOTHING}, quick=True),
    Fault("no empty group at the end", SOURCE, "    cp_async::commit();  //", "    if (tile < kTilesOfBlock) cp_async::commit();  //", {"plain": WRONG, "races": NOTHING}),
    Fault("others' copies read without a barrier", SOURCE, "    __syncthreads();  // everybody's", "    // everybody's", {"races": f"{NOTHING}|{WARPS}"}),
    Fault("a stage filled while others read it", SOURCE, "    __syncthreads();  // nobody reads", "    // nobody reads", {"races": THREADS}),
    Fault("a copy past the end", SOURCE, "left >= 4 ? 16", "left > 0 ? 16", {"asan": OUTSIDE, "plain": WRONG}),
    Fault("a histogram without atomics", SOURCE, "atomicAdd(&bins.count[p.in[i] % kBins], 1u);", "bins.count[p.in[i] % kBins] += 1;", {"races": THREADS}),
    Fault("counted before all is zero", SOURCE, "  __syncthreads();  // zero for all\n", "", {"races": f"{WARPS}|{NOTHING}"}),
    Fault("counts that begin with anything", SOURCE, "if (threadIdx.x < kBins) bins.count[threadIdx.x] = 0;", "", {"races": NOTHING, "plain": WRONG}),
    Fault("blocks add without atomics", SOURCE, "atomicAdd(&p.out[threadIdx.x], bins.count[threadIdx.x]);", "p.out[threadIdx.x] += bins.count[threadIdx.x];", {"races": BLOCKS}),
    Fault("half a warp does not wait for itself", SOURCE, "  __syncwarp(mask);  //", "  //", {"races": f"{LANES}|{NOTHING}"}),
    Fault("half a warp waits with the other's mask", SOURCE, "0xffffu << (start % kWarpSize)", "0xffffu", {"plain": "Refused: .*is not in its mask"}),
    Fault("dynamic shared memory 16 bytes too small", SOURCE, "threads * sizeof(uint32_t)", "threads * sizeof(uint32_t) - 4", {"asan": OUTSIDE}),
]  # fmt: skip
