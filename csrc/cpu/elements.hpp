// Elements of tensors as fp32 and back: plain loops over bits, which compilers vectorise for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastattn {

enum class Kind { f32, f16, bf16, i8, e4m3 };

inline int64_t size_of(Kind kind) {
  return kind == Kind::f32 ? 4 : kind == Kind::f16 || kind == Kind::bf16 ? 2 : 1;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A small float's exponent and mantissa, moved to where fp32 has them, are that number times 2^(difference of the biases); so
// subnormal ones come out right too. What is left are the codes of infinity and NaN.
inline float float_of_f16(uint16_t h) {
  uint32_t bits = bits_of(float_of(uint32_t(h & 0x7fff) << 13) * 0x1p112f);
  bits |= (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return float_of(bits | uint32_t(h & 0x8000) << 16);
}

inline float float_of_e4m3(uint8_t b) {
  uint32_t bits = bits_of(float_of(uint32_t(b & 0x7f) << 20) * 0x1p120f);
  bits |= (b & 0x7f) == 0x7f ? 0x7fc00000u : 0u;
  return float_of(bits | uint32_t(b & 0x80) << 24);
}

// Rounded to nearest, ties to even.
inline uint16_t bf16_of(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t f16_of(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  uint32_t bits = bits_of(x) & 0x7fffffff;
  if (bits >= 0x47800000)  // 2^16 or more, infinity, NaN
    return uint16_t(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (bits < 0x38800000)  // subnormal: a sum with 0.5 has its unit in the last place
    return uint16_t(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000));
  bits += 0xfff + (bits >> 13 & 1) - (112u << 23);
  return uint16_t(sign | bits >> 13);
}

// Saturates at ±448, of infinity too.
inline uint8_t e4m3_of(float x) {
  const uint32_t sign = bits_of(x) >> 24 & 0x80;
  const float size = float_of(bits_of(x) & 0x7fffffff);
  if (size != size) return uint8_t(sign | 0x7f);
  const uint32_t bits = bits_of(size < 448.0f ? size : 448.0f);
  if (bits < 0x3c800000)  // subnormal: a sum with 2^14 has its unit, 2^-9, in the last place
    return uint8_t(sign | (bits_of(float_of(bits) + 16384.0f) - 0x46800000));
  return uint8_t(sign | ((bits + 0x7ffff + (bits >> 20 & 1) - (120u << 23)) >> 20));
}

}  // namespace fastattn
