// Softmax of rows: forward.
//
//   y = exp(x − max x) / Σ exp(x − max x)
//
// in fp32, rounded once. A row is read once and stays in registers: a short one in those of as many lanes of a warp as it has vectors, so
// that nothing waits for a barrier, a longer one in those of a block up to kMaxThreads·kMaxChunks vectors. What is longer still is walked
// twice, the second time mostly in L2: for the maximum and the sum, of which each thread keeps its own as it goes (arXiv 1805.02867), then
// for y. A row that begins between two multiples of 16 bytes is taken from the lower one on, so that all but its ends moves in vectors.
// Entries that are none of the row's are −inf, which adds nothing to either. A row of nothing but −inf, and one with +inf or NaN in it, is
// NaN: by −inf − −inf, inf − inf, and the sum.
// Floor: numel·(itemsize of x + itemsize of y) bytes.

#include "softmax.hpp"

#include "../common/reduce.hpp"
#include "../common/vector.hpp"

namespace fastattn {
namespace {

constexpr int kMaxThreads = 512;  // that have a row
constexpr int kMaxChunks = 4;     // of 16 bytes of it, that a thread has: enough loads under way, and 32 registers in half precision
constexpr int kWarpsOfRows = 4;   // in a block, where lanes of a warp have a row
constexpr float kLog2e = 1.4426950408889634f;

using Partials = float[kMaxThreads / kWarpSize];
struct Shared {
  Partials max, sum;
};

// exp(x − max). The maximum is subtracted before the base changes: x·log2e − max·log2e would lose a common offset's digits.
__device__ __forceinline__ float exp_less(float x, float max) { return exp2f((x - max) * kLog2e); }

template <class T, class Y>
struct Row {
  static constexpr int kWidth = kVectorSize<T>;
  const T* x;
  Y* y;
  int64_t num_cols;
  int64_t start;   // the column, not above 0, that the first vector begins with: a multiple of 16 bytes of x
  bool y_aligned;  // to 16 bytes at `start`

  __device__ __forceinline__ Row(const SoftmaxParams& p, int64_t row, int64_t num_cols)
      : x(static_cast<const T*>(p.x) + row * p.stride_x),
        y(static_cast<Y*>(p.y) + row * p.stride_y),
        num_cols(num_cols),
        start(-static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T))),
        y_aligned((reinterpret_cast<uintptr_t>(y) + start * sizeof(Y)) % 16 == 0) {}

  // Which lanes of the vector that begins with column `col` are the row's: [first, end).
  struct Lanes {
    int first, end;
    __device__ __forceinline__ bool all() const { return first == 0 && end == kWidth; }
    __device__ __forceinline__ bool has(int i) const { return i >= first && i < end; }
  };
  __device__ __forceinline__ Lanes lanes(int64_t col) const {
    return {static_cast<int>(max(-col, int64_t{0})), static_cast<int>(min(num_cols - col, int64_t{kWidth}))};
  }

  // Nothing is made of what is loaded, so that a thread can have many such loads under way.
  __device__ __forceinline__ Vector<T> load(int64_t col) const {
    const Lanes own = lanes(col);
    Vector<T> vector;
    if (own.all()) {
      vector.bits = *reinterpret_cast<const uint4*>(x + col);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) vector.lanes[i] = own.has(i) ? x[col + i] : from_float<T>(-INFINITY);
    }
    return vector;
  }

  __device__ __forceinline__ void store(int64_t col, const float (&values)[kWidth]) const {
    const Lanes own = lanes(col);
    if (own.all()) {
      fastattn::store(y + col, values, kWidth, y_aligned);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (own.has(i)) y[col + i] = from_float<Y>(values[i]);
    }
  }
};

// Over the lanes or the block that have a row.
template <class Op>
__device__ __forceinline__ float row_reduce(float value, Op op, Partials& partials) {
  const int lanes = blockDim.x;
  return lanes <= kWarpSize ? warp_reduce(value, op, lanes) : block_reduce(value, op, partials);
}

// A row of up to blockDim.x·kChunks vectors. blockDim = (lanes, rows): so many lanes of a warp have a row; (threads, 1): the block has one.
template <class T, class Y, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) softmax_kernel(const SoftmaxParams params) {
  constexpr int kWidth = kVectorSize<T>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = index < params.num_rows;  // other rows of its warp may, and all lanes meet below
  const Row<T, Y> row(params, exists ? index : 0, exists ? params.num_cols : 0);
  const int64_t first_col = row.start + static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;

  Vector<T> x[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) x[c] = row.load(first_col + c * step);
  float p[kChunks][kWidth];
  float max = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    convert(p[c], x[c]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) max = fmaxf(max, p[c][i]);
  }
  max = row_reduce(max, Max{}, shared<Shared>().max);
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      p[c][i] = exp_less(p[c][i], max);
      sum += p[c][i];
    }
  const float scale = 1.0f / row_reduce(sum, Sum{}, shared<Shared>().sum);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) p[c][i] *= scale;
    row.store(first_col + c * step, p[c]);
  }
}

// The same of a longer row, in two walks. A thread's maximum and sum are those of what it has met:
//
//   m' = max(m, max x);  s' = s·exp(m − m') + Σ exp(x − m'), where m = −inf and s = 0 as long as it is nothing but −inf
template <class T, class Y>
__global__ void __launch_bounds__(kMaxThreads) softmax_long_kernel(const SoftmaxParams params) {
  constexpr int kWidth = kVectorSize<T>;
  const Row<T, Y> row(params, blockIdx.x, params.num_cols);
  const int64_t first_col = row.start + static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;

  float max = -INFINITY, sum = 0.0f;
  for (int64_t at = first_col; at < params.num_cols; at += kMaxChunks * step) {
    Vector<T> vectors[kMaxChunks];
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c) vectors[c] = row.load(at + c * step);
    float x[kMaxChunks][kWidth];
    float new_max = max;
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c) {
      convert(x[c], vectors[c]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) new_max = fmaxf(new_max, x[c][i]);
    }
    const float shift = new_max == -INFINITY ? 0.0f : new_max;
    sum *= exp_less(max, shift);
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += exp_less(x[c][i], shift);
    max = new_max;
  }
  const float row_max = block_max(max, shared<Shared>().max);
  sum *= exp_less(max, row_max == -INFINITY ? 0.0f : row_max);
  const float scale = 1.0f / block_sum(sum, shared<Shared>().sum);

  for (int64_t at = first_col; at < params.num_cols; at += kMaxChunks * step) {
    Vector<T> vectors[kMaxChunks];
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c) vectors[c] = row.load(at + c * step);
#pragma unroll
    for (int c = 0; c < kMaxChunks; ++c) {
      float y[kWidth];
      convert(y, vectors[c]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] = exp_less(y[i], row_max) * scale;
      row.store(at + c * step, y);
    }
  }
}

template <class T, class Y>
cudaError_t launch_softmax(const SoftmaxParams& params, cudaStream_t stream) {
  constexpr int64_t kWidth = kVectorSize<T>;
  const bool starts_between = !is_aligned(params.x) || (params.num_rows > 1 && params.stride_x % kWidth != 0);  // some rows: Row::start
  const int64_t vectors = (params.num_cols + kWidth - 1 + (starts_between ? kWidth - 1 : 0)) / kWidth;
  const int64_t chunks = vectors <= kWarpSize ? 1 : kMaxChunks;
  const int64_t warps = (vectors + chunks * kWarpSize - 1) / (chunks * kWarpSize);
  const bool is_long = warps > kMaxThreads / kWarpSize;
  unsigned threads = is_long ? kMaxThreads : static_cast<unsigned>(warps) * kWarpSize;
  while (chunks == 1 && threads / 2 >= vectors) threads /= 2;
  const unsigned rows = warps == 1 ? kWarpsOfRows * kWarpSize / threads : 1;
  const int64_t blocks = (params.num_rows + rows - 1) / rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = is_long       ? softmax_long_kernel<T, Y>
                      : chunks == 1 ? softmax_kernel<T, Y, 1>
                                    : softmax_kernel<T, Y, kMaxChunks>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads, rows), 0, stream, params);
}

template <class T>
cudaError_t launch_softmax(const SoftmaxParams& params, cudaStream_t stream) {
  return params.y_dtype == params.dtype ? launch_softmax<T, T>(params, stream) : launch_softmax<T, float>(params, stream);
}

}  // namespace

cudaError_t softmax_fwd(const SoftmaxParams& params, cudaStream_t stream) {
  if (params.y_dtype != params.dtype && params.y_dtype != Dtype::kFloat32) return cudaErrorInvalidValue;
  if (params.num_rows < 0 || params.num_cols < 0) return cudaErrorInvalidValue;
  if (params.num_rows == 0 || params.num_cols == 0) return cudaSuccess;
  return with_float(params.dtype, [&](auto type) { return launch_softmax<typename decltype(type)::type>(params, stream); });
}

}  // namespace fastattn
