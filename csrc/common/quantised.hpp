// int8 and float8_e4m3fn from fp32: rounded to nearest even and saturated, at −128 and 127, and ±448. A NaN is a NaN, and 0 in int8.

#pragma once

#include "vector.hpp"

namespace fastattn {

struct Float8E4M3 {
  uint8_t bits;
};

// Beyond 1.5·2^23 floats are the integers: the sum is rounded to one, whose last byte is the lowest of its bits. Conversions to integers
// have a quarter of an addition's rate.
template <>
__device__ __forceinline__ int8_t from_float<int8_t>(float value) {
  const float inside = fminf(fmaxf(value == value ? value : 0.0f, -128.0f), 127.0f);
  return static_cast<int8_t>(__float_as_uint(inside + 12582912.0f) & 0xff);
}

// By integer arithmetic, as sm_80 has no conversion. Dropping 20 of 23 mantissa bits rounds a normal number. Below 2^−6 all are multiples
// of 2^−9, the spacing of floats from 2^14 on.
template <>
__device__ __forceinline__ Float8E4M3 from_float<Float8E4M3>(float value) {
  const float size = fminf(fabsf(value), 448.0f);
  const uint32_t bits = __float_as_uint(size);
  const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
  const uint32_t tiny = __float_as_uint(size + 16384.0f) - 0x46800000;
  const uint32_t code = (size < 0.015625f ? tiny : normal) | (__float_as_uint(value) >> 24 & 0x80);
  return {static_cast<uint8_t>(value == value ? code : 0x7f)};
}

#if !defined(FASTATTN_CUDA_ON_CPU) && __CUDA_ARCH__ >= 890

// The same bits by the instruction for two.
__device__ __forceinline__ uint32_t float8_pair(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

template <int N>
__device__ __forceinline__ void convert(Vector<Float8E4M3>& to, const float (&from)[N], int start) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = start + 4 * i;
    words[i] = float8_pair(from[at], from[at + 1]) | float8_pair(from[at + 2], from[at + 3]) << 16;
  }
  to.bits = uint4{words[0], words[1], words[2], words[3]};
}

#endif

}  // namespace fastattn
