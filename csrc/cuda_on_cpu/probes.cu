#include "probes.hpp"

#include "../common/cp_async.hpp"
#include "../common/vector.hpp"

namespace fastattn {
namespace {

constexpr int kThreads = 64;
constexpr int kStages = 2;
constexpr int kTilesOfBlock = 5;
constexpr int kBins = 16;

// Bits of a T, as a number.
template <class T>
__device__ __forceinline__ uint32_t bits_of(T value) {
  static_assert(sizeof(T) == 2, "half or bfloat16");
  return *reinterpret_cast<const uint16_t*>(&value);
}

__global__ void warp_functions(const ProbeParams p) {
  const int lane = threadIdx.x;
  const uint32_t value = p.in[lane];
  uint32_t* out = p.out + lane * 16;
  out[0] = __shfl_sync(kFullMask, value, (lane + 5) % 32);
  out[1] = __shfl_sync(kFullMask, value, 9, 8);
  out[2] = __shfl_up_sync(kFullMask, value, 3);
  out[3] = __shfl_up_sync(kFullMask, value, 3, 16);
  out[4] = __shfl_down_sync(kFullMask, value, 7);
  out[5] = __shfl_down_sync(kFullMask, value, 2, 4);
  out[6] = __shfl_xor_sync(kFullMask, value, 17);
  out[7] = __shfl_xor_sync(kFullMask, value, 8, 8);
  out[8] = __ballot_sync(kFullMask, value % 2);
  out[9] = __match_any_sync(kFullMask, value % 3);
  out[10] = static_cast<uint32_t>(__any_sync(kFullMask, value == 0) + 2 * __all_sync(kFullMask, value < 65536));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  out[11] = __reduce_add_sync(kFullMask, value);
  out[12] = static_cast<uint32_t>(__reduce_min_sync(kFullMask, static_cast<int>(value) - 30000));
  out[13] = __reduce_max_sync(kFullMask, value);
#endif
  out[14] = static_cast<uint32_t>(__popc(value) + 100 * __ffs(static_cast<int>(value)) + 10000 * __clz(static_cast<int>(value)));
  out[15] = static_cast<uint32_t>(__syncthreads_count(value % 2) + 100 * __syncthreads_or(value == 1) + 1000 * __syncthreads_and(value < 65536));
}

__global__ void conversions(const ProbeParams p) {
  for (int64_t i = threadIdx.x; i < p.size; i += blockDim.x) {
    float value;
    memcpy(&value, &p.in[i], 4);
    p.out[i] = bits_of(from_float<__half>(value));
    p.out[p.size + i] = bits_of(from_float<__nv_bfloat16>(value));
    __half half;
    memcpy(&half, &p.in[i], 2);
    value = to_float(half);
    memcpy(&p.out[2 * p.size + i], &value, 4);
  }
}

// A block sums kTilesOfBlock tiles of kThreads·4 numbers; a thread copies 16 bytes of a tile, and adds what its neighbour has copied.
struct Stages {
  uint4 tile[kStages][kThreads];
};

__global__ void pipeline(const ProbeParams p) {
  Stages& stages = shared<Stages>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTilesOfBlock * kThreads * 4;
  const auto fetch = [&](int tile) {
    const int64_t at = first + (static_cast<int64_t>(tile) * kThreads + threadIdx.x) * 4;
    const int64_t left = p.size - at;
    const int bytes = left >= 4 ? 16 : left > 0 ? static_cast<int>(left) * 4 : 0;
    if (tile < kTilesOfBlock) cp_async::copy16(&stages.tile[tile % kStages][threadIdx.x], bytes ? p.in + at : p.in, bytes);
    cp_async::commit();  // also where there is nothing to fetch: wait counts groups
  };
  uint32_t sum = 0;
  fetch(0);
  for (int tile = 0; tile < kTilesOfBlock; ++tile) {
    fetch(tile + 1);
    cp_async::wait<1>();
    __syncthreads();  // everybody's copies of this tile have landed
    const uint4 four = stages.tile[tile % kStages][(threadIdx.x + 33) % kThreads];
    sum += four.x + four.y + four.z + four.w;
    __syncthreads();  // nobody reads the stage any more
  }
  sum = __reduce_add_sync(kFullMask, sum);
  if (threadIdx.x % kWarpSize == 0) atomicAdd(&p.out[blockIdx.x], sum);
}

struct Bins {
  unsigned count[kBins];
};

__global__ void histogram(const ProbeParams p) {
  Bins& bins = shared<Bins>();
  if (threadIdx.x < kBins) bins.count[threadIdx.x] = 0;
  __syncthreads();  // zero for all
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.size; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    atomicAdd(&bins.count[p.in[i] % kBins], 1u);
  __syncthreads();  // counted
  if (threadIdx.x < kBins) atomicAdd(&p.out[threadIdx.x], bins.count[threadIdx.x]);
}

struct Lanes {
  uint32_t value[kThreads];
};

__global__ void halves(const ProbeParams p) {
  Lanes& lanes = shared<Lanes>();
  const int start = threadIdx.x / 16 * 16, lane = threadIdx.x % 16;
  const unsigned mask = 0xffffu << (start % kWarpSize);
  lanes.value[threadIdx.x] = p.in[threadIdx.x];
  __syncwarp(mask);  // the half has stored
  p.out[threadIdx.x] = lanes.value[start + 15 - lane];
}

__global__ void reverse_dynamic(const ProbeParams p) {
  uint32_t* values = dynamic_shared<uint32_t>();
  values[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = values[p.size - 1 - threadIdx.x];
}

__global__ void barrier_in_branch(const ProbeParams) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers(const ProbeParams) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return(const ProbeParams) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void caller_not_in_mask(const ProbeParams) { __shfl_sync(0x7fffffff, threadIdx.x, 0); }

__global__ void source_not_in_mask(const ProbeParams) {
  if (threadIdx.x % kWarpSize < 8) __shfl_xor_sync(0xff, threadIdx.x, 8);
}

__global__ void shuffle_in_branch(const ProbeParams) {
  if (threadIdx.x % 2 == 0) {
    __shfl_sync(kFullMask, 1, 0);
  } else {
    __shfl_sync(kFullMask, 2, 0);
  }
}

__global__ void lane_returned(const ProbeParams) {
  if (threadIdx.x == 0) return;
  __syncwarp();
}

__global__ void part_warp(const ProbeParams) { __syncwarp(); }

__global__ void unaligned_copy(const ProbeParams p) {
  Stages& stages = shared<Stages>();
  cp_async::copy16(&stages.tile[0][threadIdx.x], p.in + 1);
}

}  // namespace

cudaError_t probe(const ProbeParams& p, cudaStream_t stream) {
  const auto one_block = [&](void (*kernel)(ProbeParams), unsigned threads) { return launch(kernel, dim3(1), dim3(threads), 0, stream, p); };
  switch (p.probe) {
    case Probe::kWarpFunctions: return one_block(warp_functions, kWarpSize);
    case Probe::kConversions: return one_block(conversions, kThreads);
    case Probe::kPipeline: {
      constexpr int64_t kTile = int64_t{kTilesOfBlock} * kThreads * 4;
      return launch(pipeline, dim3(static_cast<unsigned>((p.size + kTile - 1) / kTile)), dim3(kThreads), 0, stream, p);
    }
    case Probe::kHistogram: return launch(histogram, dim3(3), dim3(kThreads), 0, stream, p);
    case Probe::kHalves: return one_block(halves, kThreads);
    case Probe::kDynamic: {
      const unsigned threads = static_cast<unsigned>(p.size);
      return launch(reverse_dynamic, dim3(1), dim3(threads), threads * sizeof(uint32_t), stream, p);
    }
    case Probe::kBarrierInBranch: return one_block(barrier_in_branch, kThreads);
    case Probe::kTwoBarriers: return one_block(two_barriers, kThreads);
    case Probe::kEarlyReturn: return one_block(early_return, kThreads);
    case Probe::kCallerNotInMask: return one_block(caller_not_in_mask, kThreads);
    case Probe::kSourceNotInMask: return one_block(source_not_in_mask, kThreads);
    case Probe::kShuffleInBranch: return one_block(shuffle_in_branch, kThreads);
    case Probe::kLaneReturned: return one_block(lane_returned, kThreads);
    case Probe::kPartWarp: return one_block(part_warp, kThreads - 16);
    case Probe::kUnalignedCopy: return one_block(unaligned_copy, kThreads);
    case Probe::kTooManyThreads: return one_block(part_warp, 1056);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
