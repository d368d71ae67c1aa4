// Routing of few tokens to experts, and the sort of their slots by expert. fastattn/ops/moe_routing.py documents what they compute.

#pragma once

#include "../common/cuda.hpp"

namespace fastattn {

inline constexpr int kMaxRoutedExperts = 512;
inline constexpr int kMaxRoutedSlots = 256;  // T·K, all in one block

enum class MoEScore : int32_t { kSoftmax = 0, kSigmoid = 1 };

// Where the T·K slots lie when sorted by expert, stably; slots of ids outside [0, E) come last.
struct MoEPlanPointers {
  int64_t* order;    // (T·K) the slot of each sorted row
  int64_t* inverse;  // (T·K) the sorted row of each slot
  int32_t* offsets;  // (E) the row at which each expert's end
};

struct MoERouteParams {
  const void* logits;  // (T, E), dtype, rows of consecutive entries
  const float* bias;   // (E), or null: added to what chooses
  float* weights;      // (T, K)
  int64_t* indices;    // (T, K)
  MoEPlanPointers plan;
  int64_t num_tokens, stride_t;
  Dtype dtype;
  int32_t num_experts, top_k;
  int32_t num_groups, top_k_groups;  // 1, 1: no groups
  MoEScore score;
  int32_t score_first;  // 1: the scores of all logits, of which the chosen; 0: those of the chosen logits alone
  int32_t renormalize;
  float scaling_factor;
};

struct MoEDispatchParams {
  const void* indices;  // (T, K), int64 or int32
  MoEPlanPointers plan;
  int64_t num_tokens, stride_t, stride_k;
  int32_t num_experts, top_k;
  int32_t has_int64_indices;  // 0: int32
};

// moe_route and moe_dispatch in one launch. Asynchronous on the stream. cudaErrorInvalidValue: more experts or slots than above, a top_k
// that the experts of top_k_groups groups do not give, or an unknown dtype or score.
cudaError_t moe_route_dispatch(const MoERouteParams& params, cudaStream_t stream);

// The same sort of given ids, whatever they are.
cudaError_t moe_dispatch(const MoEDispatchParams& params, cudaStream_t stream);

}  // namespace fastattn
