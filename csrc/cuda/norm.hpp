// Forward of layer norm and RMS norm, with a residual added on the way or not. fastattn/ops/norm.py documents what they compute.

#pragma once

#include "../common/cuda.hpp"

namespace fastattn {

// Rows of num_cols consecutive entries; strides are entries from one row to the next. y may be x, and h may be residual.
struct NormParams {
  const void* x;         // (num_rows, num_cols), dtype
  const void* residual;  // as x, or null
  const void* weight;    // (num_cols), weight_dtype, or null
  const void* bias;      // as weight
  void* y;               // as x
  void* h;               // as x: x + residual. Not written where there is no residual
  float* stats;          // (1, num_rows) rstd, or (2, num_rows) rstd and mean; or null
  int64_t num_rows, num_cols;
  int64_t stride_x, stride_residual, stride_y, stride_h;
  float eps, weight_offset;
  Dtype dtype, weight_dtype;   // the weight's is float32 or x's
  int32_t subtract_mean;       // 1: layer norm; 0: RMS norm
  int32_t cast_before_weight;  // 1: x̂, and weight + weight_offset, are rounded to dtype before they are multiplied
};

// Asynchronous on the stream. cudaErrorInvalidValue: what this kernel does not do (the comments above).
cudaError_t norm_fwd(const NormParams& params, cudaStream_t stream);

}  // namespace fastattn
