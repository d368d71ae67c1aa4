// Small kernels that the stand-in itself is tested with: right ones, whose values are known, and each misuse that it must name.

#pragma once

#include "../common/cuda.hpp"

namespace fastattn {

enum class Probe : int32_t {
  // in: 32 numbers below 2^16. out: (32 lanes, 16): what each warp function gives.
  kWarpFunctions,
  // in: size bits of float32. out: (3, size): the half and the bfloat16 nearest to each, as bits; the float of its low 16 bits as a half.
  kConversions,
  // in: size numbers, 16-byte aligned. out: (blocks) sums of their tiles, which cp.async brings in two stages.
  kPipeline,
  // in: size numbers. out: (16) how many have each remainder: counted in shared memory, then added by each of several blocks.
  kHistogram,
  // in, out: 64. Reversed within each half of a warp through shared memory; the halves wait for nobody but themselves.
  kHalves,
  // in, out: size, up to 1024. Reversed through dynamic shared memory.
  kDynamic,
  // The misuses; in and out are not used.
  kBarrierInBranch,
  kTwoBarriers,
  kEarlyReturn,
  kCallerNotInMask,
  kSourceNotInMask,
  kShuffleInBranch,
  kLaneReturned,
  kPartWarp,
  kUnalignedCopy,
  kTooManyThreads,
};

struct ProbeParams {
  const uint32_t* in;
  uint32_t* out;
  int64_t size;
  Probe probe;
};

cudaError_t probe(const ProbeParams& params, cudaStream_t stream);

}  // namespace fastattn
