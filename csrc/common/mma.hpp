// Tensor cores (sm_80): products of 16-bit tiles that a warp holds together, in fp32, and the loads that bring them there.
//
// Of a tile, lane l has, in pairs of neighbours, with g = l / 4 and t = 2·(l mod 4):
//
//   a (16, 16): (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)      pairs along a row
//   b (16, 8):  (t, g), (t + 8, g)                                  pairs down a column
//   c (16, 8):  (g, t), (g + 8, t)                                  pairs along a row
//
// All lanes of the warp must call.

#pragma once

#include "vector.hpp"

namespace fastattn::mma {

// Two values as the halves of a register, the first one low.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(sizeof(T) == 2, "half or bfloat16");
  union {
    T lanes[2];
    uint32_t bits;
  } both;
  both.lanes[0] = from_float<T>(low);
  both.lanes[1] = from_float<T>(high);
  return both.bits;
}

#ifdef FASTATTN_CUDA_ON_CPU

namespace on_cpu {

template <class T>
float value_of(uint32_t pair, int which) {
  const T value = {static_cast<uint16_t>(pair >> 16 * which)};
  return to_float(value);
}

struct Product {
  float* c;
  const uint32_t *a, *b;
};

template <class T>
CUDA_ON_CPU_UNSEEN void multiply(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Product& given = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int which = 0; which < 2; ++which) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 8 + which] = value_of<T>(given.a[i], which);
      for (int i = 0; i < 2; ++i) b[t + i * 8 + which][g] = value_of<T>(given.b[i], which);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* const c = static_cast<const Product*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) c[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
  }
}

}  // namespace on_cpu

// c += a·b
template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  on_cpu::Product given = {c, a, b};
  cuda_on_cpu::warp_together("mma", &given, on_cpu::multiply<T>);
}

// Four 8×8 tiles of 16 bits from shared memory: lane l gives the address of row l mod 8 of tile l / 8, at a multiple of 16, and gets of
// each tile the pair (g, t).
inline void load_tiles(uint32_t (&to)[4], const void* row) {
  const void* rows[kWarpSize];
  cuda_on_cpu::warp_addresses("ldmatrix", row, rows);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int i = 0; i < 4; ++i) std::memcpy(&to[i], static_cast<const char*>(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}

// The same, but of each transposed tile.
inline void load_tiles_transposed(uint32_t (&to)[4], const void* row) {
  const void* rows[kWarpSize];
  cuda_on_cpu::warp_addresses("ldmatrix", row, rows);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int which = 0; which < 2; ++which)
      std::memcpy(&pair[which], static_cast<const char*>(rows[8 * i + lane % 4 * 2 + which]) + lane / 4 * 2, 2);
    to[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

#else

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void load_tiles(uint32_t (&to)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_tiles_transposed(uint32_t (&to)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

#endif

}  // namespace fastattn::mma
