// Includes lanes.inl and the file that KERNELS names once for each instruction set, each in a namespace of its own; FASTATTN_PICK(f) is the
// function f of the widest that this processor has. GCC alone compiles functions of one file for several, and on x86 alone it pays: wheels
// are built for the oldest processors.

namespace baseline {
#define LANES 4
#include "lanes.inl"
#include KERNELS
#undef LANES
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include "lanes.inl"
#include KERNELS
#undef LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "lanes.inl"
#include KERNELS
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#else
namespace avx2 = baseline;
namespace avx512 = baseline;
#endif

#define FASTATTN_PICK(f) (widest() == 16 ? avx512::f : widest() == 8 ? avx2::f : baseline::f)
