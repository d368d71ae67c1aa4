// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as fastattn/reference/philox.py and tl.philox
// have it.

#pragma once

#include "cuda.hpp"

namespace fastattn {

// Four random words of a counter, under the seed as key.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint4 counter) {
  uint32_t key_x = static_cast<uint32_t>(seed), key_y = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter.x, b = uint64_t{0xCD9E8D57} * counter.z;
    counter = uint4{static_cast<uint32_t>(b >> 32) ^ counter.y ^ key_x, static_cast<uint32_t>(b),
                    static_cast<uint32_t>(a >> 32) ^ counter.w ^ key_y, static_cast<uint32_t>(a)};
    key_x += 0x9E3779B9;
    key_y += 0xBB67AE85;
  }
  return counter;
}

}  // namespace fastattn
