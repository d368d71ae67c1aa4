// Functions of the hardware, with the error that it has.

#pragma once

#include "cuda.hpp"

namespace fastattn {

// 2^x to 2 units in the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef FASTATTN_CUDA_ON_CPU
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

}  // namespace fastattn
