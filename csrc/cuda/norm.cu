// Layer norm and RMS norm, with a residual added on the way or not: forward.
//
//   h = x, or x + residual, rounded to their dtype and stored: the new residual
//   x̂ = (h − mean h)·rstd with rstd = 1/√(mean (h − mean h)² + eps); RMS norm has no mean: x̂ = h·rstd with rstd = 1/√(mean h² + eps)
//   y = x̂·(weight + weight_offset) + bias, of factors that are rounded first where cast_before_weight says so
//
// in fp32. A row is read once and stays in registers: in those of one warp while it is short, so that nothing waits for a barrier, in those
// of a block up to kMaxThreads·kMaxChunks vectors. A longer one is walked again, mostly in L2. The mean is that of h less the row's first
// entry, so that a common offset costs no digits, and the variance is taken of what is left when it is subtracted.
// Floor: 2·numel·itemsize bytes, 4·numel·itemsize with a residual.

#include "norm.hpp"

#include "../common/reduce.hpp"
#include "../common/vector.hpp"

namespace fastattn {
namespace {

constexpr int kMaxThreads = 512;  // that have a row
constexpr int kMaxChunks = 4;     // of 16 bytes of it, that a thread has: enough loads under way, and 32 registers in half precision
constexpr int kWarpRows = 4;      // in a block, where a warp has a row

using Partials = float[kMaxThreads / kWarpSize];
struct Shared {
  Partials sum, squares;
};

template <class T>
struct Row {
  const T* x;
  const T* residual;  // or null
  T* y;
  T* h;
  bool aligned;  // all of them, to 16 bytes

  __device__ __forceinline__ Row(const NormParams& p, int64_t row)
      : x(static_cast<const T*>(p.x) + row * p.stride_x),
        residual(p.residual ? static_cast<const T*>(p.residual) + row * p.stride_residual : nullptr),
        y(static_cast<T*>(p.y) + row * p.stride_y),
        h(p.residual ? static_cast<T*>(p.h) + row * p.stride_h : nullptr),
        aligned(is_aligned(x) && is_aligned(y) && is_aligned(residual) && is_aligned(h)) {}

  // h from column `col` on, in fp32, as it is stored there where there is a residual; 0 past the row's end.
  __device__ __forceinline__ void add(float (&sum)[kVectorSize<T>], const Vector<T>& x, const Vector<T>& added, int64_t col, int64_t count) const {
    convert(sum, x);
    if (residual == nullptr) return;
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i) sum[i] = round_to<T>(to_float(added.lanes[i]) + sum[i]);
    store(h + col, sum, count, aligned);
  }

  // About what the row's entries have in common, if anything: the first one.
  __device__ __forceinline__ float first() const { return to_float(x[0]) + (residual ? to_float(residual[0]) : 0.0f); }
};

// values = parameter[col, col + N), in fp32.
template <class T, int N>
__device__ __forceinline__ void load_parameter(float (&values)[N], const void* parameter, Dtype dtype, int64_t col, int64_t count) {
  const bool aligned = is_aligned(parameter);
  if (dtype == Dtype::kFloat32)
    load(values, static_cast<const float*>(parameter) + col, count, aligned);
  else
    load(values, static_cast<const T*>(parameter) + col, count, aligned);
}

// y = x̂·(weight + weight_offset) + bias from column `col` on.
template <class T, int N>
__device__ __forceinline__ void store_scaled(const NormParams& p, const Row<T>& row, float (&x_hat)[N], int64_t col, int64_t count) {
  float parameter[N];
  if (p.weight != nullptr) {
    load_parameter<T>(parameter, p.weight, p.weight_dtype, col, count);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float scale = parameter[i] + p.weight_offset;
      x_hat[i] = p.cast_before_weight ? round_to<T>(x_hat[i]) * round_to<T>(scale) : x_hat[i] * scale;
    }
  }
  if (p.bias != nullptr) {
    load_parameter<T>(parameter, p.bias, p.weight_dtype, col, count);
#pragma unroll
    for (int i = 0; i < N; ++i) x_hat[i] += parameter[i];
  }
  store(row.y + col, x_hat, count, row.aligned);
}

__device__ __forceinline__ void store_stats(const NormParams& p, int64_t row, float rstd, float mean) {
  if (p.stats == nullptr || threadIdx.x != 0) return;
  p.stats[row] = rstd;
  if (p.subtract_mean) p.stats[p.num_rows + row] = mean;
}

// 1/√(mean of squares + eps)
__device__ __forceinline__ float inverse_root(float squares, const NormParams& p) {
  return rsqrtf(squares / static_cast<float>(p.num_cols) + p.eps);
}

// A row of up to blockDim.x·kChunks vectors. blockDim = (32, rows): a warp has a row; (threads, 1): the block has one.
template <class T, bool kSubtractMean, int kChunks>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(const NormParams p) {
  constexpr int kWidth = kVectorSize<T>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= p.num_rows) return;  // a whole warp, and never one of a block that has barriers
  const bool warp_has_row = blockDim.x == kWarpSize;
  const Row<T> row(p, index);
  const int64_t first_col = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;
  const auto row_sum = [&](float value, Partials& partials) { return warp_has_row ? warp_sum(value) : block_sum(value, partials); };

  const float shift = kSubtractMean ? row.first() : 0.0f;
  if (kSubtractMean) {  // y may be x and h residual: their first entries are overwritten once all have read them
    if (warp_has_row)
      __syncwarp();
    else if (row.residual != nullptr)
      __syncthreads();  // without one, the barrier of the first sum comes before y
  }

  Vector<T> x[kChunks], added[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t col = first_col + c * step, count = p.num_cols - col;
    x[c] = load_vector(row.x + col, count, row.aligned);
    if (row.residual != nullptr) added[c] = load_vector(row.residual + col, count, row.aligned);
  }
  float h[kChunks][kWidth];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t col = first_col + c * step, count = p.num_cols - col;
    row.add(h[c], x[c], added[c], col, count);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      h[c][i] = i < count ? h[c][i] - shift : 0.0f;
      sum += h[c][i];
    }
  }
  const float rest = kSubtractMean ? row_sum(sum, shared<Shared>().sum) / static_cast<float>(p.num_cols) : 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t count = p.num_cols - first_col - c * step;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      h[c][i] = i < count ? h[c][i] - rest : 0.0f;
      squares += h[c][i] * h[c][i];
    }
  }
  const float rstd = inverse_root(row_sum(squares, shared<Shared>().squares), p);
  store_stats(p, index, rstd, shift + rest);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t col = first_col + c * step;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) h[c][i] *= rstd;
    store_scaled(p, row, h[c], col, p.num_cols - col);
  }
}

// The same of a longer row: a walk for each sum and one for y. The later ones read h as the first one stored it; a thread reads only what it
// has stored itself.
template <class T, bool kSubtractMean>
__global__ void __launch_bounds__(kMaxThreads) norm_long_kernel(const NormParams p) {
  constexpr int kWidth = kVectorSize<T>;
  const int64_t index = blockIdx.x;
  const Row<T> row(p, index);
  const T* stored = row.residual == nullptr ? row.x : row.h;
  const int64_t first_col = static_cast<int64_t>(threadIdx.x) * kWidth;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kWidth;

  const float shift = kSubtractMean ? row.first() : 0.0f;
  if (kSubtractMean && row.residual != nullptr) __syncthreads();  // as above

  float h[kWidth];
  float sum = 0.0f, squares = 0.0f;
  for (int64_t col = first_col; col < p.num_cols; col += step) {
    const int64_t count = p.num_cols - col;
    const Vector<T> x = load_vector(row.x + col, count, row.aligned);
    Vector<T> added;
    if (row.residual != nullptr) added = load_vector(row.residual + col, count, row.aligned);
    row.add(h, x, added, col, count);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float centred = i < count ? h[i] - shift : 0.0f;
      sum += centred;
      squares += centred * centred;
    }
  }
  float rest = 0.0f;
  if (kSubtractMean) {
    rest = block_sum(sum, shared<Shared>().sum) / static_cast<float>(p.num_cols);
    squares = 0.0f;
    for (int64_t col = first_col; col < p.num_cols; col += step) {
      const int64_t count = p.num_cols - col;
      load(h, stored + col, count, row.aligned);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float centred = i < count ? h[i] - shift - rest : 0.0f;
        squares += centred * centred;
      }
    }
  }
  const float rstd = inverse_root(block_sum(squares, shared<Shared>().squares), p);
  store_stats(p, index, rstd, shift + rest);
  for (int64_t col = first_col; col < p.num_cols; col += step) {
    load(h, stored + col, p.num_cols - col, row.aligned);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) h[i] = (h[i] - shift - rest) * rstd;
    store_scaled(p, row, h, col, p.num_cols - col);
  }
}

template <class T, bool kSubtractMean>
cudaError_t launch_norm(const NormParams& p, cudaStream_t stream) {
  const int64_t vectors = (p.num_cols + kVectorSize<T> - 1) / kVectorSize<T>;
  const int64_t chunks = vectors <= kWarpSize ? 1 : kMaxChunks;
  const int64_t warps = (vectors + chunks * kWarpSize - 1) / (chunks * kWarpSize);
  const bool is_long = warps > kMaxThreads / kWarpSize;
  const unsigned threads = is_long ? kMaxThreads : static_cast<unsigned>(warps) * kWarpSize;
  const unsigned rows = warps == 1 ? kWarpRows : 1;
  const int64_t blocks = (p.num_rows + rows - 1) / rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = is_long       ? norm_long_kernel<T, kSubtractMean>
                      : chunks == 1 ? norm_kernel<T, kSubtractMean, 1>
                                    : norm_kernel<T, kSubtractMean, kMaxChunks>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads, rows), 0, stream, p);
}

template <class T>
cudaError_t launch_norm(const NormParams& p, cudaStream_t stream) {
  return p.subtract_mean ? launch_norm<T, true>(p, stream) : launch_norm<T, false>(p, stream);
}

}  // namespace

cudaError_t norm_fwd(const NormParams& params, cudaStream_t stream) {
  const bool has_parameter = params.weight != nullptr || params.bias != nullptr;
  if (has_parameter && params.weight_dtype != params.dtype && params.weight_dtype != Dtype::kFloat32) return cudaErrorInvalidValue;
  if (params.cast_before_weight && params.weight != nullptr && params.weight_dtype != params.dtype) return cudaErrorInvalidValue;
  if (params.num_rows < 0 || params.num_cols < 0) return cudaErrorInvalidValue;
  if (params.num_rows == 0 || params.num_cols == 0) return cudaSuccess;
  return with_float(params.dtype, [&](auto type) { return launch_norm<typename decltype(type)::type>(params, stream); });
}

}  // namespace fastattn
