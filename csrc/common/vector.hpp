// Rows of fp32, fp16 or bf16 in memory, fp32 in registers, moved 16 bytes at a time where they lie at multiples of 16.

#pragma once

#include "cuda.hpp"

namespace fastattn {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class T>
__device__ __forceinline__ float round_to(float value) {
  return to_float(from_float<T>(value));
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) of the float that a dtype is; of any other it is cudaErrorInvalidValue.
template <class F>
cudaError_t with_float(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(Type<float>{});
    case Dtype::kFloat16: return f(Type<__half>{});
    case Dtype::kBFloat16: return f(Type<__nv_bfloat16>{});
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
inline constexpr int kVectorSize = 16 / sizeof(T);

// 16 bytes, which move in one instruction; their lanes are T's.
template <class T>
union Vector {
  uint4 bits;
  T lanes[kVectorSize<T>];
  __device__ __forceinline__ Vector() {}
};

__host__ __device__ __forceinline__ bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// from[0, kVectorSize), of which those from `count` on are not read but 0. aligned: `from` is a multiple of 16 bytes. Nothing is made of what
// is loaded, so that a thread can have many such loads under way.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* from, int64_t count, bool aligned) {
  Vector<T> vector;
  if (aligned && count >= kVectorSize<T>) {
    vector.bits = *reinterpret_cast<const uint4*>(from);
  } else {
    vector.bits = uint4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i)
      if (i < count) vector.lanes[i] = from[i];
  }
  return vector;
}

template <class T>
__device__ __forceinline__ void convert(float (&to)[kVectorSize<T>], const Vector<T>& from) {
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) to[i] = to_float(from.lanes[i]);
}

// to = from[0, N) in fp32, as above.
template <int N, class T>
__device__ __forceinline__ void load(float (&to)[N], const T* from, int64_t count, bool aligned) {
  static_assert(N % kVectorSize<T> == 0, "whole vectors");
#pragma unroll
  for (int start = 0; start < N; start += kVectorSize<T>) {
    const Vector<T> vector = load_vector(from + start, count - start, aligned);
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i) to[start + i] = to_float(vector.lanes[i]);
  }
}

// to = from[start, start + kVectorSize), rounded. A format that converts several at a time has its own (quantised.hpp).
template <int N, class T>
__device__ __forceinline__ void convert(Vector<T>& to, const float (&from)[N], int start) {
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) to.lanes[i] = from_float<T>(from[start + i]);
}

// to[0, kVectorSize) = vector; those from `count` on are not written.
template <class T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T>& vector, int64_t count, bool aligned) {
  if (aligned && count >= kVectorSize<T>) {
    *reinterpret_cast<uint4*>(to) = vector.bits;
  } else {
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i)
      if (i < count) to[i] = vector.lanes[i];
  }
}

// to[0, N) = from, rounded, as above.
template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N], int64_t count, bool aligned) {
  static_assert(N % kVectorSize<T> == 0, "whole vectors");
#pragma unroll
  for (int start = 0; start < N; start += kVectorSize<T>) {
    Vector<T> vector;
    convert(vector, from, start);
    store_vector(to + start, vector, count - start, aligned);
  }
}

}  // namespace fastattn
