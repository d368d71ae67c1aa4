// Which instruction set to run: see instruction_sets.inl.
#pragma once

#include <cstdlib>
#include <cstring>

namespace fastattn {

constexpr int UNROLL = 4;  // rows that the products of lanes.inl take at a time

// Floats in a register of the widest set that this processor has, or of a narrower one where torch is told so (ATEN_CPU_CAPABILITY=avx2 or
// default).
inline int widest() {
  static const int lanes = [] {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    const char* const wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const auto is = [&](const char* name) { return wanted && std::strcmp(wanted, name) == 0; };
    if (is("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 4;
    if (is("avx2") || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
      return 8;
    return 16;
#else
    return 4;
#endif
  }();
  return lanes;
}

}  // namespace fastattn
