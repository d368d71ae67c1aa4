// A token drawn from each row of logits. fastattn/ops/sampling.py documents what it computes.

#pragma once

#include "../common/cuda.hpp"

namespace fastattn {

inline constexpr int64_t kMaxSampledColumns = int64_t{1} << 22;  // whose weights, in units of 2^-40, 64 bits hold the sum of

// Each parameter is a number, or has one a row where its pointer is not null.
struct SampleParams {
  const void* logits;   // (num_rows, num_cols), dtype, rows of consecutive entries
  const int64_t* seeds;  // (1), or one a row, on the device
  int64_t* ids;         // (num_rows): −1 in a row that has no distribution
  const float* temperatures;
  const void* top_ks;  // int32 or int64
  const float* top_ps;
  const float* min_ps;
  int64_t num_rows, num_cols, stride_x;
  float temperature;  // 0: argmax
  int32_t top_k;      // 0 or less, or num_cols or more: all
  float top_p;        // 1: all
  float min_p;        // 0: all
  Dtype dtype;
  int32_t has_int64_top_ks;
  int32_t has_seed_per_row;
};

// Asynchronous on the stream. cudaErrorInvalidValue: no columns or more than above, more than 2^31 − 1 rows, or an unknown dtype. Parameters
// out of range draw some token of the row.
cudaError_t sample(const SampleParams& params, cudaStream_t stream);

}  // namespace fastattn
