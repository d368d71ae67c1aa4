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

// The same of integers, of which no sum may overflow: 22 bits of each at a time.
__device__ __forceinline__ int64_t warp_sum(int64_t value) {
  const uint64_t bits = static_cast<uint64_t>(value);
  constexpr unsigned kPart = (1u << 22) - 1;
  const uint64_t low = __reduce_add_sync(kFullMask, static_cast<unsigned>(bits) & kPart);
  const uint64_t middle = __reduce_add_sync(kFullMask, static_cast<unsigned>(bits >> 22) & kPart);
  const uint64_t high = __reduce_add_sync(kFullMask, static_cast<unsigned>(bits >> 44));
  return static_cast<int64_t>(low + (middle << 22) + (high << 44));
}

// The sum over the lanes up to this one. All lanes of the warp must call.
template <class T>
__device__ __forceinline__ T warp_prefix_sum(T sum) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T earlier = __shfl_up_sync(kFullMask, sum, distance);
    if (lane >= distance) sum += earlier;
  }
  return sum;
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
