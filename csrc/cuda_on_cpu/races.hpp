// What the scheduler tells the race detector (races.cpp, in builds with CUDA_ON_CPU_RACES) and asks of it.

#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

// Of the thread that runs; the launch ends with `what` as its Misuse.
[[noreturn]] void fail(const char* what);

struct Running {
  bool any;         // a thread of a kernel runs, not the host
  int thread;       // its number in the block
  unsigned block;   // its block's number in the grid
};
Running running();
bool is_stack(uintptr_t address);

namespace races {

enum class Kind { kRead, kWrite, kAtomic, kIssue };  // kIssue: a write that has begun, after which the place holds nothing

#ifdef CUDA_ON_CPU_RACES
void launch_begins();
void block_begins();
void block_barrier();                                  // orders all that the block did before and does after
void warp_sync(int warp, unsigned mask);               // the same between the mask's lanes
void shared_allocated(const void* address, size_t size);  // holds nothing yet
void shared_freed(const void* address, size_t size);
void access(const void* address, size_t size, Kind kind, const void* pc);
void fence();
#else
inline void launch_begins() {}
inline void block_begins() {}
inline void block_barrier() {}
inline void warp_sync(int, unsigned) {}
inline void shared_allocated(const void*, size_t) {}
inline void shared_freed(const void*, size_t) {}
inline void access(const void*, size_t, Kind, const void*) {}
inline void fence() {}
#endif

}  // namespace races
}  // namespace cuda_on_cpu
