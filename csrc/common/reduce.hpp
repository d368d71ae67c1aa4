// Reductions over a warp and over a block, in an order that does not depend on the run: the same bits every time.

#pragma once

#include "cuda.hpp"

namespace fastattn {

// The sum over the warp's lanes, in every lane. All lanes of the warp must call.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullMask, value, distance);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(kFullMask, value, distance));
  return value;
}

// values[0, kCount) summed over each group of kLanes neighbouring lanes. A lane keeps only its share of the sums, in the first places: the
// values are halved while the lanes are, so that kCount sums take about kCount shuffles and not kCount·log kLanes. The lane's bits, from
// the group's highest on, are the highest of its sums' numbers: of 8 sums over 16 lanes, lane l has sum l/2. All lanes of the warp must call.
template <int kLanes, int kCount, int kSize>
__device__ __forceinline__ void scatter_sums(float (&values)[kSize], int lane) {
  static_assert((kLanes & (kLanes - 1)) == 0 && (kCount & (kCount - 1)) == 0 && kCount <= kSize, "powers of two");
  if constexpr (kLanes > 1) {
    constexpr int kDistance = kLanes / 2, kHalf = kCount > 1 ? kCount / 2 : 1;
    const bool upper = (lane & kDistance) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = values[i], high = kCount > 1 ? values[kHalf + i] : low;
      values[i] = (upper ? high : low) + __shfl_xor_sync(kFullMask, upper ? low : high, kDistance);
    }
    scatter_sums<kDistance, kHalf>(values, lane);
  }
}

// The sum over a block of one dim, in every thread. All threads must call. `partials` is shared, an entry a warp: another one for each sum
// of a kernel, or there must be a barrier between its uses.
template <int kMaxWarps>
__device__ __forceinline__ float block_sum(float value, float (&partials)[kMaxWarps]) {
  static_assert(kMaxWarps <= kWarpSize, "the warps' sums are summed by one warp");
  const int lane = threadIdx.x % kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) partials[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_sum(lane < num_warps ? partials[lane] : 0.0f);
}

}  // namespace fastattn
