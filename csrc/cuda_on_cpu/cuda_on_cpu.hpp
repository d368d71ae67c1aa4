// The CUDA runtime of a .cu that g++ compiles: for tests of kernels on machines without a GPU. csrc/README.md says what it checks and what
// it cannot show; runtime.cpp schedules, and races.cpp looks for races.
//
// The threads of a block are fibers that one OS thread switches between; blocks run one after another. A thread runs until it waits: for the
// block (__syncthreads) or for lanes of its warp (__syncwarp, shuffles, votes), and where it waits is a source line, which the functions
// below take as a defaulted argument. What CUDA leaves undefined ends the launch: the host's call throws cuda_on_cpu::Misuse.

#pragma once

#ifndef __GNUC__
#error "needs g++ or clang++"
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __restrict__  // other threads are other fibers of this one, so that a promise of no alias does not hold

// Reads and writes inside it are no accesses of a kernel's to the race detector.
#define CUDA_ON_CPU_UNSEEN __attribute__((noinline, no_sanitize("thread")))

// --------------------------------------------------------------------------------------------------------------------
// Types.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __attribute__((may_alias, aligned(8))) uint2 {
  unsigned x, y;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) float2 {
  float x, y;
};
struct __attribute__((may_alias, aligned(16))) float4 {
  float x, y, z, w;
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

// A subnormal half m·2^−24 is exact in fp32, as is every other one.
inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, mantissa = value.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f));
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return {0x7fff};  // the one NaN that CUDA gives
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // subnormal: fp32 rounds at 2^−24 where a 0.5 is added, whose last place is that
    const float rounded = __uint_as_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (__float_as_uint(rounded) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)))};
}

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// --------------------------------------------------------------------------------------------------------------------
// The runtime.

namespace cuda_on_cpu {

struct Site {
  const char* file;
  int line;
};

// A launch that broke a rule: what, where, and which threads.
struct Misuse : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which whatever may run does. 0: ascending; 1: descending; any other: blocks, warps and lanes are shuffled, lanes and warps
// again at every pass, and half of the asynchronous copies land at once.
void set_seed(uint64_t seed);

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* argument);

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

// Of the running block. `key` tells the types apart.
void* shared_memory(const void* key, size_t size, size_t alignment);
void* dynamic_shared_memory();

struct Tally {  // of the predicates that the threads of a block came to a barrier with
  int count;
  bool any, all;
};
Tally block_barrier(const char* name, bool predicate, Site site);

enum class Meeting { kSync, kTogether, kShuffle, kBallot, kMatch, kAdd, kMin, kMax, kMinSigned, kMaxSigned, kAnd, kOr, kXor };

// What the lanes of `mask` do together; `source` is the lane that a shuffle reads from.
uint64_t warp_meeting(Meeting kind, const char* name, unsigned mask, uint64_t value, int source, Site site);

// What all lanes of a warp compute together: `compute` is called once, with the arguments of all lanes, and writes their results there.
void warp_together(const char* name, void* argument, void (*compute)(void* const* lanes), const char* file = __builtin_FILE(),
                   int line = __builtin_LINE());
// The addresses that all lanes have given, which must be multiples of 16.
void warp_addresses(const char* name, const void* mine, const void* (&all)[32], const char* file = __builtin_FILE(),
                    int line = __builtin_LINE());

int lane_of_shuffle_down(int distance, int width);
int lane_of_shuffle_up(int distance, int width);
int lane_of_shuffle_xor(int bits, int width);
int lane_of_shuffle(int lane, int width);

void cp_async(void* target, const void* source, int bytes, int source_bytes, const char* file = __builtin_FILE(),
              int line = __builtin_LINE());
void cp_async_commit();
void cp_async_wait(int pending);

// To the race detector, an access that no other atomic one races with.
void note_atomic(void* address, size_t size);
void note_fence();

template <class T>
inline constexpr char kKeyOfShared = 0;

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T, class F>
CUDA_ON_CPU_UNSEEN T atomic(T* address, F change) {
  note_atomic(address, sizeof(T));
  const T old = *address;
  *address = change(old);
  return old;
}

}  // namespace cuda_on_cpu

namespace fastattn {

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const Params& params) {
#ifdef CUDA_ON_CPU_NO_LAUNCH  // to time what the host does before it
  return cudaSuccess;
#endif
  const struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call = {kernel, params};
  const auto body = [](const void* argument) {
    const Call& call = *static_cast<const Call*>(argument);
    call.kernel(call.params);
  };
  return cuda_on_cpu::run(grid, block, shared_bytes, body, &call);
}

template <class T>
T& shared() {
  return *static_cast<T*>(cuda_on_cpu::shared_memory(&cuda_on_cpu::kKeyOfShared<T>, sizeof(T), alignof(T)));
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_on_cpu::dynamic_shared_memory());
}

}  // namespace fastattn

#define threadIdx (::cuda_on_cpu::thread_index())
#define blockIdx (::cuda_on_cpu::block_index())
#define blockDim (::cuda_on_cpu::block_size())
#define gridDim (::cuda_on_cpu::grid_size())

// --------------------------------------------------------------------------------------------------------------------
// Device functions, with CUDA's names and meanings. `file` and `line` are never given.

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier("__syncthreads", false, {file, line}); }
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier("__syncthreads_or", predicate != 0, {file, line}).any;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier("__syncthreads_and", predicate != 0, {file, line}).all;
}
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier("__syncthreads_count", predicate != 0, {file, line}).count;
}

inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_meeting(cuda_on_cpu::Meeting::kSync, "__syncwarp", mask, 0, 0, {file, line});
}

#define CUDA_ON_CPU_SHUFFLE(name, operand, lane_of)                                                                                    \
  template <class T>                                                                                                                   \
  T name(unsigned mask, T value, int operand, int width = 32, CUDA_ON_CPU_SITE) {                                                      \
    using namespace cuda_on_cpu;                                                                                                       \
    return from_bits<T>(warp_meeting(Meeting::kShuffle, #name, mask, to_bits(value), lane_of(operand, width), {file, line}));          \
  }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, lane, lane_of_shuffle)
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, distance, lane_of_shuffle_up)
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, distance, lane_of_shuffle_down)
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, bits, lane_of_shuffle_xor)

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  using namespace cuda_on_cpu;
  return static_cast<unsigned>(warp_meeting(Meeting::kBallot, "__ballot_sync", mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  using namespace cuda_on_cpu;
  return warp_meeting(Meeting::kBallot, "__any_sync", mask, predicate != 0, 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  using namespace cuda_on_cpu;
  return warp_meeting(Meeting::kBallot, "__all_sync", mask, predicate != 0, 0, {file, line}) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  using namespace cuda_on_cpu;
  return static_cast<unsigned>(warp_meeting(Meeting::kMatch, "__match_any_sync", mask, to_bits(value), 0, {file, line}));
}

#define CUDA_ON_CPU_REDUCE(name, T, kind)                                                                                              \
  inline T name(unsigned mask, T value, CUDA_ON_CPU_SITE) {                                                                            \
    using namespace cuda_on_cpu;                                                                                                       \
    return from_bits<T>(warp_meeting(Meeting::kind, #name, mask, to_bits(value), 0, {file, line}));                                    \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, unsigned, kAdd)
CUDA_ON_CPU_REDUCE(__reduce_add_sync, int, kAdd)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, unsigned, kMin)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, int, kMinSigned)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, unsigned, kMax)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, int, kMaxSigned)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, unsigned, kAnd)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, unsigned, kOr)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, unsigned, kXor)

#undef CUDA_ON_CPU_SHUFFLE
#undef CUDA_ON_CPU_REDUCE
#undef CUDA_ON_CPU_SITE

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic(address, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic(address, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic(address, [=](T old) { return old | value; });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic(address, [=](T old) { return old == expected ? value : old; });
}

template <class T>
T atomicInc(T* address, std::common_type_t<T> last) {
  return cuda_on_cpu::atomic(address, [=](T old) { return old >= last ? T{0} : static_cast<T>(old + 1); });
}
inline void __threadfence() { cuda_on_cpu::note_fence(); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __brev(unsigned value) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (value >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
T __ldg(const T* address) {
  return *address;
}
using std::max;
using std::min;
