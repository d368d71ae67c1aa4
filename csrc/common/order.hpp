// Floats as integers in the same order: what is compared, searched for and reduced over a warp by one instruction.

#pragma once

#include "cuda.hpp"

namespace fastattn {

// The int that stands to the others as the float x does; −0 is 0. Of a NaN it is above +infinity's or below −infinity's, by its sign.
__device__ __forceinline__ int float_key(float x) {
  const int bits = __float_as_int(x + 0.0f);
  return bits ^ (bits >> 31 & INT32_MAX);
}

// The inverse.
__device__ __forceinline__ float key_float(int key) { return __int_as_float(key ^ (key >> 31 & INT32_MAX)); }

// NaN where one of the two is. One instruction (sm_80).
__device__ __forceinline__ float max_or_nan(float a, float b) {
#ifdef FASTATTN_CUDA_ON_CPU
  return a == a && b == b ? fmaxf(a, b) : __int_as_float(0x7fffffff);
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

// The largest of the warp's lanes in that order, in every lane: one instruction. All lanes of the warp must call.
__device__ __forceinline__ float warp_last(float value) { return key_float(__reduce_max_sync(kFullMask, float_key(value))); }

}  // namespace fastattn
