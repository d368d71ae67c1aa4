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
