"""Faults planted in csrc, one at a time, and which build's checks must say what about each: what test_cuda_on_cpu.py is itself tested with."""

from __future__ import annotations

from dataclasses import dataclass, field

NORM, REDUCE, VECTOR, PROBES = "cuda/norm.cu", "common/reduce.hpp", "common/vector.hpp", "cuda_on_cpu/probes.cu"
WARPS, LANES, BLOCKS, NOTHING = "race between warps", "race between lanes of a warp", "race between blocks", "holds nothing yet"
THREADS = f"{LANES}|{WARPS}"
OUTSIDE, CRASH = "(heap-buffer-overflow|out of bounds)", "Crash: "
WRONG = "AssertionError: "


@dataclass(frozen=True)
class Fault:
    """`old`, which `file` has once, becomes `new`. caught: by build, a pattern of what its run must end with."""

    name: str
    file: str
    old: str
    new: str
    caught: dict[str, str] = field(hash=False)
    op: str = "norm_fwd"
    quick: bool = False  # run by `make test`, not in `make test-more` alone
    far: bool = False  # seen by rows gigabytes apart


def probe(*args, **options) -> Fault:
    return Fault(args[0], PROBES, *args[1:], op="probe", **options)


FAULTS = [
    # Barriers.
    Fault("no barrier in a block's sum", REDUCE, "  __syncthreads();\n", "", {"races": f"{NOTHING}|{WARPS}", "plain": WRONG}, quick=True),
    Fault("one array for two sums", NORM, "row_sum(squares, shared<Shared>().squares)", "row_sum(squares, shared<Shared>().sum)", {"races": WARPS}),
    Fault("first entry overwritten while a warp reads it", NORM, "      __syncwarp();\n", "      ;\n", {"races": LANES}),
    Fault("first entry overwritten while a block reads it", NORM, "__syncthreads();  // without one", ";  // without one", {"races": THREADS, "plain": WRONG}),
    Fault("first entry of a long row overwritten", NORM, "if (kSubtractMean && row.residual != nullptr) __syncthreads();", "", {"races": THREADS, "plain": WRONG}),
    Fault("barrier in a branch", REDUCE, "  if (lane == 0) partials[threadIdx.x / kWarpSize] = value;\n  __syncthreads();\n",
          "  if (lane == 0) {\n    partials[threadIdx.x / kWarpSize] = value;\n    __syncthreads();\n  }\n", {"plain": "Refused: .*(deadlock in block|in __syncthreads at reduce.hpp)"}),
    Fault("threads without columns return early", NORM, "  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;\n  const auto row_sum",
          "  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;\n  if (first_col >= p.num_cols) return;\n  const auto row_sum", {"plain": "Refused: .*returned"}),
    # Warp functions.
    Fault("a shuffle's mask leaves out its caller", REDUCE, "__shfl_xor_sync(kFullMask, value, distance)", "__shfl_xor_sync(0x7fffffff, value, distance)",
          {"plain": "Refused: .*__shfl_xor_sync at reduce.hpp:.*the mask 0x7fffffff"}),
    Fault("a sum of 16 pairs", REDUCE, "distance > 0;", "distance > 1;", {"plain": WRONG}),
    Fault("a shuffle's width is half a warp", REDUCE, "value, distance)", "value, distance, 16)", {"plain": WRONG}),
    # Memory.
    Fault("entries of shared memory that no warp wrote", REDUCE, "warp_sum(lane < num_warps ? partials[lane] : 0.0f)", "warp_sum(partials[lane])",
          {"races": NOTHING, "asan": OUTSIDE, "plain": WRONG}),
    Fault("a vector read across the row's end", VECTOR, "  if (aligned && count >= kVectorSize<T>) {\n    vector.bits = *", "  if (aligned && count > 0) {\n    vector.bits = *", {"asan": OUTSIDE}, quick=True),
    Fault("a vector stored across the row's end", VECTOR, "  if (aligned && count >= kVectorSize<T>) {\n    *reinterpret_cast<uint4*>(to)", "  if (aligned && count > 0) {\n    *reinterpret_cast<uint4*>(to)",
          {"asan": OUTSIDE, "plain": f"({WRONG}.*written between its rows|{CRASH})"}),
    Fault("an entry read past the row's end", VECTOR, "if (i < count) vector.lanes[i]", "if (i <= count) vector.lanes[i]", {"asan": OUTSIDE}),
    Fault("an entry stored past the row's end", VECTOR, "if (i < count) to[i]", "if (i <= count) to[i]", {"asan": OUTSIDE, "plain": f"({WRONG}.*written between its rows|{CRASH})"}),
    Fault("one row too many", NORM, "if (index >= p.num_rows) return;", "if (index > p.num_rows) return;", {"asan": OUTSIDE}),
    Fault("statistics one row further", NORM, "p.stats[p.num_rows + row] = mean", "p.stats[p.num_rows + row + 1] = mean", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("more threads than partial sums", NORM, "warps > kMaxThreads / kWarpSize;", "warps > kMaxThreads / kWarpSize + 1;", {"asan": OUTSIDE}),
    Fault("16 bytes of a row that is not aligned", NORM, "aligned(is_aligned(x) && is_aligned(y) && is_aligned(residual) && is_aligned(h))", "aligned(true)", {"asan": "misaligned address"}),
    Fault("16 bytes of a residual that is not aligned", NORM, " && is_aligned(residual)", "", {"asan": "misaligned address"}),
    Fault("16 bytes of a weight that is not aligned", NORM, "const bool aligned = is_aligned(parameter);", "const bool aligned = true;", {"asan": "misaligned address"}),
    Fault("all threads store the statistics", NORM, "if (p.stats == nullptr || threadIdx.x != 0) return;", "if (p.stats == nullptr) return;", {"races": f"({THREADS}).*write by .*write by"}),
    Fault("an offset of 32 bits, signed", NORM, "row * p.stride_x", "static_cast<int>(row) * static_cast<int>(p.stride_x)", {"plain": WRONG, "asan": "signed integer overflow"}, far=True),
    Fault("an offset of 32 bits, unsigned", NORM, "row * p.stride_y", "static_cast<unsigned>(row * p.stride_y)", {"plain": WRONG}, far=True),
    # Values.
    Fault("what lies past the row counts", NORM, "h[c][i] = i < count ? h[c][i] - rest : 0.0f;", "h[c][i] = h[c][i] - rest;", {"plain": WRONG}),
    Fault("a common offset is not taken off first", NORM, "const float shift = kSubtractMean ? row.first() : 0.0f;\n  if (kSubtractMean) {", "const float shift = 0.0f;\n  if (kSubtractMean) {",
          {"plain": f"{WRONG}layer_norm of constant rows"}),
    Fault("the sum is not rounded before it is normalised", NORM, "sum[i] = to_float(from_float<T>(to_float(added.lanes[i]) + sum[i]));", "sum[i] += to_float(added.lanes[i]);", {"plain": f"{WRONG}.*rounded more than once"}),
    Fault("rounded before the weight and after", NORM, "x_hat[i] *= parameter[i] + p.weight_offset;", "x_hat[i] = to_float(from_float<T>(x_hat[i])) * (parameter[i] + p.weight_offset);",
          {"plain": f"{WRONG}.*rounded more than once"}),
    Fault("the weight's offset is left out", NORM, "parameter[i] + p.weight_offset", "parameter[i]", {"plain": WRONG}),
    Fault("a long row's second walk reads x", NORM, "const T* stored = row.residual == nullptr ? row.x : row.h;", "const T* stored = row.x;", {"plain": WRONG}),
    Fault("eps outside the root", NORM, "rsqrtf(squares / static_cast<float>(p.num_cols) + p.eps)", "rsqrtf(squares / static_cast<float>(p.num_cols)) + p.eps", {"plain": WRONG}),
    # Asynchronous copies, atomics, parts of a warp: on the probes.
    probe("no wait for a copy", "    cp_async::wait<1>();\n", "", {"plain": WRONG, "races": NOTHING}),
    probe("a wait too weak by one group", "cp_async::wait<1>();", "cp_async::wait<2>();", {"plain": WRONG, "races": NOTHING}, quick=True),
    probe("no empty group at the end", "    cp_async::commit();  //", "    if (tile < kTilesOfBlock) cp_async::commit();  //", {"plain": WRONG, "races": NOTHING}),
    probe("others' copies read without a barrier", "    __syncthreads();  // everybody's", "    // everybody's", {"races": f"{NOTHING}|{WARPS}"}),
    probe("a stage filled while others read it", "    __syncthreads();  // nobody reads", "    // nobody reads", {"races": THREADS}),
    probe("a copy past the end", "left >= 4 ? 16", "left > 0 ? 16", {"asan": OUTSIDE, "plain": WRONG}),
    probe("a histogram without atomics", "atomicAdd(&bins.count[p.in[i] % kBins], 1u);", "bins.count[p.in[i] % kBins] += 1;", {"races": THREADS}),
    probe("counted before all is zero", "  __syncthreads();  // zero for all\n", "", {"races": f"{WARPS}|{NOTHING}"}),
    probe("counts that begin with anything", "if (threadIdx.x < kBins) bins.count[threadIdx.x] = 0;", "", {"races": NOTHING, "plain": WRONG}),
    probe("blocks add without atomics", "atomicAdd(&p.out[threadIdx.x], bins.count[threadIdx.x]);", "p.out[threadIdx.x] += bins.count[threadIdx.x];", {"races": BLOCKS}),
    probe("half a warp does not wait for itself", "  __syncwarp(mask);  //", "  //", {"races": f"{LANES}|{NOTHING}"}),
    probe("half a warp waits with the other's mask", "0xffffu << (start % kWarpSize)", "0xffffu", {"plain": "Refused: .*is not in its mask"}),
    probe("dynamic shared memory 16 bytes too small", "threads * sizeof(uint32_t)", "threads * sizeof(uint32_t) - 4", {"asan": OUTSIDE}),
]  # fmt: skip
