// Division by a number that the launcher knows, in three instructions (Granlund and Montgomery, 1994).

#pragma once

#include "cuda.hpp"

namespace fastattn {

// Quotients of numbers from 0 to 2^31 − 1 by a divisor from 1 to 2^31.
class Divider {
 public:
  Divider() = default;
  explicit Divider(uint32_t divisor) : divisor_(divisor), shift_(0) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }

  __device__ __forceinline__ int32_t quotient(int32_t number) const {
    const uint32_t n = static_cast<uint32_t>(number);
    return static_cast<int32_t>((__umulhi(n, multiplier_) + n) >> shift_);
  }
  __device__ __forceinline__ int32_t remainder(int32_t number, int32_t quotient) const {
    return number - quotient * static_cast<int32_t>(divisor_);
  }

 private:
  uint32_t divisor_, multiplier_, shift_;
};

}  // namespace fastattn
