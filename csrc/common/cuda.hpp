// The one include of every .cu: the CUDA runtime under nvcc, or its stand-in on the CPU (csrc/cuda_on_cpu) under g++.
//
// What the two compilers spell differently is a function here: a launch has no <<<>>>, shared memory is asked for by type, and an
// instruction that needs inline PTX has a wrapper with a C++ body beside it (cp_async.hpp).

#pragma once

#include <cstdint>

#ifdef FASTATTN_CUDA_ON_CPU
#include "../cuda_on_cpu/cuda_on_cpu.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastattn {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffff;

// Values are part of the launchers' interface.
enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kFloat8E4M3 = 4 };

#ifndef FASTATTN_CUDA_ON_CPU

inline constexpr size_t kDefaultShared = 48 << 10;  // dynamic, that a block has without being asked about

// kernel<<<grid, block, shared_bytes, stream>>>(params). Errors of the launch alone: a kernel's own come with a later call.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  if (shared_bytes > kDefaultShared) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// The block's one T in static shared memory, not initialised.
template <class T>
__device__ __forceinline__ T& shared() {
  __shared__ T storage;
  return storage;
}

// The launch's shared_bytes, at a multiple of 16.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastattn_dynamic_shared[];
  return reinterpret_cast<T*>(fastattn_dynamic_shared);
}

#endif

}  // namespace fastattn
