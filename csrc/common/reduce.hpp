// Reductions over a warp and over a block, in an order that does not depend on the run: the same bits every time.

#pragma once

#include "cuda.hpp"

namespace fastattn {

struct Sum {
  static constexpr float kNothing = 0.0f;  // what changes no result
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

struct Max {  // of the numbers: a NaN is not seen
  static constexpr float kNothing = -INFINITY;
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over each group of `lanes` neighbours, a power of 2, in every lane of it. All lanes of the warp must call.
template <class Op>
__device__ __forceinline__ float warp_reduce(float value, Op op, int lanes = kWarpSize) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) value = op(value, __shfl_xor_sync(kFullMask, value, distance));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) { return warp_reduce(value, Sum{}); }
__device__ __forceinline__ float warp_max(float value) { return warp_reduce(value, Max{}); }

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

// Over a block of one dim, in every thread. All threads must call. `partials` is shared, an entry a warp: another one for each reduction of
// a kernel, or there must be a barrier between its uses.
template <class Op, int kMaxWarps>
__device__ __forceinline__ float block_reduce(float value, Op op, float (&partials)[kMaxWarps]) {
  static_assert(kMaxWarps <= kWarpSize, "what the warps have is reduced by one warp");
  const int lane = threadIdx.x % kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  value = warp_reduce(value, op);
  if (lane == 0) partials[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_reduce(lane < num_warps ? partials[lane] : Op::kNothing, op);
}

template <int kMaxWarps>
__device__ __forceinline__ float block_sum(float value, float (&partials)[kMaxWarps]) {
  return block_reduce(value, Sum{}, partials);
}

template <int kMaxWarps>
__device__ __forceinline__ float block_max(float value, float (&partials)[kMaxWarps]) {
  return block_reduce(value, Max{}, partials);
}

}  // namespace fastattn
