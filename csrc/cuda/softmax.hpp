// Forward of softmax over rows. fastattn/ops/softmax.py documents what it computes.

#pragma once

#include "../common/cuda.hpp"

namespace fastattn {

// Rows of num_cols consecutive entries; strides are entries from one row to the next. y may be x where it has its dtype.
struct SoftmaxParams {
  const void* x;  // (num_rows, num_cols), dtype
  void* y;        // (num_rows, num_cols), y_dtype
  int64_t num_rows, num_cols;
  int64_t stride_x, stride_y;
  Dtype dtype, y_dtype;  // y's is float32 or x's
};

// Asynchronous on the stream. cudaErrorInvalidValue: what this kernel does not do (the comments above).
cudaError_t softmax_fwd(const SoftmaxParams& params, cudaStream_t stream);

}  // namespace fastattn
