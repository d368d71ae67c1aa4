// cp.async (sm_80): global to shared memory without a register in between, in groups that a thread waits for.
//
// A thread sees its own copies after wait<N>(); others see them after a barrier that follows it.

#pragma once

#include "cuda.hpp"

namespace fastattn::cp_async {

// 16 bytes, of which the last 16 − source_bytes are written as zeros and not read. Both pointers at multiples of 16.
__device__ __forceinline__ void copy16(void* target, const void* source, int source_bytes = 16) {
#ifdef FASTATTN_CUDA_ON_CPU
  cuda_on_cpu::cp_async(target, source, 16, source_bytes);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(source_bytes) : "memory");
#endif
}

// The copies since the last commit are a group, also where there are none.
__device__ __forceinline__ void commit() {
#ifdef FASTATTN_CUDA_ON_CPU
  cuda_on_cpu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until no more than the newest kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wait() {
#ifdef FASTATTN_CUDA_ON_CPU
  cuda_on_cpu::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastattn::cp_async
