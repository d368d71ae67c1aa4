// Routing for decode: few tokens, whose experts, weights and sort by expert one block makes in one launch.
//
//   c = x, or x + bias, or score(x) + bias                      what chooses; x are a token's logits
//   indices = the top_k largest c, of the experts in the top_k_groups best groups; ties to the lower id
//   weights = score(x) of those, or the score of those x alone; divided by their sum (+ 1e-20) if asked; times scaling_factor
//   row of slot s = #{j: id_j < id_s} + #{j < s: id_j = id_s}    offsets_e = #{j: id_j ≤ e}
//
// A warp has a token and a lane neighbouring experts of it, in registers, as integer keys that stand to each other as the floats do. A
// round of the choice is a maximum over the warp (redux, sm_80) and a vote; the lowest lane that has the maximum writes down its expert and
// looks for its next one. The sort counts: a warp has 32 slots, and knows of each expert how many it has; how many lie before a slot is a sum of
// such counts, integers that nobody adds to another's. What a slot's row is depends on ids alone, so the order is the same every time.
//
// Floor: latency. T·E·itemsize bytes read and 28 bytes a slot written, each once: one trip to memory, top_k rounds of about 90 cycles
// (arithmetic), and three barriers: ids known, slots counted, experts placed. Groups add five waits of a warp for itself.

#include "moe_routing.hpp"

#include "../common/order.hpp"
#include "../common/reduce.hpp"
#include "../common/vector.hpp"

namespace fastattn {
namespace {

template <int kKeys>
constexpr int kMaxWarps = kKeys > 8 ? 16 : 32;  // of a block: what registers allow, and a lane at least for each slot and expert
constexpr int kSlotWarps = kMaxRoutedSlots / kWarpSize;
constexpr int kGroupBytes = 32 << 10;  // of dynamic shared memory, at most, for keys of the tokens that have groups

constexpr int kTaken = INT32_MIN;   // a key below every float's: of what is chosen already, or is no choice
constexpr int kNanKey = INT32_MAX;  // above every float's: torch.topk takes a NaN for the largest
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kTiny = 1e-20f;  // in the denominator of renormalised weights, as DeepSeek-V3 has it

// Of the block's slots.
struct Slots {
  int expert[kMaxRoutedSlots];                                       // num_experts: nobody's
  alignas(16) uint16_t counts[kMaxRoutedExperts + 1][kSlotWarps];  // of each expert, how many slots each warp has
  int begin[kMaxRoutedExperts + 1];                                // of each expert, its first row
};

struct Shared {
  Slots slots;
  float logit[kMaxRoutedSlots];  // of each slot's expert
};

// --------------------------------------------------------------------------------------------------------------------
// The choice.

// What is compared: a NaN above all others.
__device__ __forceinline__ int order_key(float x) { return x == x ? float_key(x) : kNanKey; }

// From 1e-38 down it is 0, and it needs no call.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2f(-x * kLog2e)); }

// to = from[0, N) in fp32, −infinity from `count` on.
template <int N, class T>
__device__ __forceinline__ void load_experts(float (&to)[N], const T* from, int count) {
  if constexpr (N % kVectorSize<T> == 0) {
    load(to, from, count, is_aligned(from));
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? to[i] : -INFINITY;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? to_float(from[i]) : -INFINITY;
  }
}

// Makes the keys kTaken that are not in the top_k_groups best groups: by their largest key, or, where there is a bias, by the sum of their
// two largest. key[i] is that of number lane·kKeys + i, and `keys` are the warp's, in shared memory.
template <int kKeys>
__device__ __forceinline__ void keep_groups(const MoERouteParams& p, int (&key)[kKeys], int* keys) {
  const int lane = threadIdx.x % kWarpSize;
  const int group_size = p.num_experts / p.num_groups;
  const bool adds = p.bias != nullptr && group_size > 1;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) keys[lane * kKeys + i] = key[i];
  __syncwarp();  // a lane reads what others have stored

  // Several lanes have a group, if there are few. In the end its key stands in the place of its first expert's.
  const int team = kWarpSize >> min(5, 32 - __clz(p.num_groups - 1));
  for (int first_group = 0; first_group < p.num_groups; first_group += kWarpSize / team) {
    const int group = first_group + lane / team;
    int first = kTaken, second = kTaken;
    if (group < p.num_groups) {
      int at = lane % group_size;  // each group from another one on: other banks
      for (int j = lane % team; j < group_size; j += team) {
        const int other = keys[group * group_size + at];
        second = max(second, min(first, other));
        first = max(first, other);
        at = at + team < group_size ? at + team : at + team - group_size;
      }
    }
    for (int distance = team / 2; distance > 0; distance /= 2) {
      const int other = __shfl_xor_sync(kFullMask, first, distance), other_second = __shfl_xor_sync(kFullMask, second, distance);
      second = max(min(first, other), max(second, other_second));
      first = max(first, other);
    }
    __syncwarp();  // the group's keys have been read
    if (group < p.num_groups && lane % team == 0)
      keys[group * group_size] = adds ? order_key(key_float(first) + key_float(second)) : first;
  }
  __syncwarp();  // all groups have theirs

  unsigned kept = 0;  // a bit for each of the lane's groups: every 32nd
  for (int group = lane; group < p.num_groups; group += kWarpSize) {
    const int own = keys[group * group_size];
    int better = 0;
    for (int other = 0; other < p.num_groups; ++other) {
      const int other_key = keys[other * group_size];
      better += other_key > own || (other_key == own && other < group);
    }
    kept |= static_cast<unsigned>(better < p.top_k_groups) << (group / kWarpSize);
  }
  __syncwarp();  // all groups' keys have been read
  for (int group = lane; group < p.num_groups; group += kWarpSize) keys[group * group_size] = kept >> (group / kWarpSize) & 1;
  __syncwarp();  // it is known who is kept

  int group = lane * kKeys / group_size, in_group = lane * kKeys % group_size;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (lane * kKeys + i < p.num_experts && !keys[group * group_size]) key[i] = kTaken;
    if (++in_group == group_size) in_group = 0, ++group;
  }
}

// experts and their logits: of the top_k largest keys, in that order. key[i] is that of number lane·kKeys + i; of equal ones the lowest is
// first.
template <int kKeys>
__device__ __forceinline__ void choose(int (&key)[kKeys], const float (&x)[kKeys], int top_k, int* experts, float* logits) {
  const int lane = threadIdx.x % kWarpSize;
  int own = kTaken;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) own = max(own, key[i]);
  for (int k = 0; k < top_k; ++k) {
    const int best = __reduce_max_sync(kFullMask, own);
    int place = 0;  // of the lane's own largest, which does not wait for the warp's: there is no branch
    float logit = x[0];
#pragma unroll
    for (int i = kKeys - 1; i >= 0; --i) {
      place = key[i] == own ? i : place;
      logit = key[i] == own ? x[i] : logit;
    }
    const unsigned holders = __ballot_sync(kFullMask, own == best);
    const bool has_best = lane == __ffs(static_cast<int>(holders)) - 1;
    if (has_best) {
      experts[k] = lane * kKeys + place;
      logits[k] = logit;
    }
    const int taken = has_best ? place : kKeys;
    own = kTaken;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      key[i] = i == taken ? kTaken : key[i];
      own = max(own, key[i]);
    }
  }
}

// Experts and weights of a token, by its warp. The experts are those of its slots.
template <class T, int kKeys>
__device__ __forceinline__ void route(const MoERouteParams& p, int token, Shared& s, int* keys) {
  const int lane = threadIdx.x % kWarpSize, first = lane * kKeys, count = p.num_experts - first;
  const bool is_softmax = p.score == MoEScore::kSoftmax;
  float x[kKeys], bias[kKeys];
  load_experts(x, static_cast<const T*>(p.logits) + token * p.stride_t + first, count);
  if (p.bias != nullptr) load_experts(bias, p.bias + first, count);

  float row_max = 0.0f, inverse_sum = 1.0f;
  if (is_softmax && p.score_first) {
    row_max = x[0];
#pragma unroll
    for (int i = 1; i < kKeys; ++i) row_max = fmaxf(row_max, x[i]);
    row_max = warp_last(row_max);
    float row_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) row_sum += exp2f((x[i] - row_max) * kLog2e);
    inverse_sum = 1.0f / warp_sum(row_sum);
  }
  const auto score = [&](float logit) { return is_softmax ? exp2f((logit - row_max) * kLog2e) * inverse_sum : sigmoid(logit); };

  // Without a bias the logits choose: their order is the scores', and no rounding of scores makes ties.
  float choice[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) choice[i] = p.bias == nullptr ? x[i] : (p.score_first ? score(x[i]) : x[i]) + bias[i];
  int key[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) key[i] = i < count ? order_key(choice[i]) : kTaken;
  if (p.top_k_groups < p.num_groups) keep_groups(p, key, keys);
  int* experts = s.slots.expert + token * p.top_k;
  float* logits = s.logit + token * p.top_k;
  choose(key, x, p.top_k, experts, logits);
  __syncwarp();  // what each has chosen is all lanes' to read, and keys of groups are free for the warp's next token

  const bool of_chosen = is_softmax && !p.score_first;  // they sum to 1 as they are
  if (of_chosen) {
    row_max = -INFINITY;
    for (int k = lane; k < p.top_k; k += kWarpSize) row_max = fmaxf(row_max, logits[k]);
    row_max = warp_last(row_max);
    float row_sum = 0.0f;
    for (int k = lane; k < p.top_k; k += kWarpSize) row_sum += exp2f((logits[k] - row_max) * kLog2e);
    inverse_sum = 1.0f / warp_sum(row_sum);
  }
  float inverse_total = 1.0f;
  if (p.renormalize && !of_chosen) {
    float total = 0.0f;
    for (int k = lane; k < p.top_k; k += kWarpSize) total += score(logits[k]);
    inverse_total = 1.0f / (warp_sum(total) + kTiny);
  }
  for (int k = lane; k < p.top_k; k += kWarpSize) {
    p.weights[token * p.top_k + k] = score(logits[k]) * inverse_total * p.scaling_factor;
    p.indices[token * p.top_k + k] = experts[k];
  }
}

// --------------------------------------------------------------------------------------------------------------------
// The sort. All threads of the block call, which are at least as many as its slots, and as the experts.

__device__ __forceinline__ void clear_counts(Slots& s, int num_experts) {
  for (int expert = threadIdx.x; expert <= num_experts; expert += blockDim.x)
    *reinterpret_cast<uint4*>(s.counts[expert]) = uint4{0, 0, 0, 0};
}

// How many slots of an expert the first `num_warps` warps have.
__device__ __forceinline__ int count_of(const Slots& s, int expert, int num_warps) {
  const Vector<uint16_t> counts = load_vector(s.counts[expert], kSlotWarps, true);
  int count = 0;
#pragma unroll
  for (int i = 0; i < kSlotWarps; ++i) count += i < num_warps ? counts.lanes[i] : 0;
  return count;
}

// The plan of the slots' experts, after clear_counts and a barrier.
__device__ __forceinline__ void sort_slots(Slots& s, int num_slots, int num_experts, const MoEPlanPointers& plan) {
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const bool warp_has_slots = warp * kWarpSize < num_slots, warp_has_experts = warp * kWarpSize < num_experts;

  // A thread has a slot,
  int bin = -1, rank = 0;
  if (warp_has_slots) {
    if (thread < num_slots) bin = s.expert[thread];
    const unsigned same = __match_any_sync(kFullMask, bin);
    rank = __popc(same & ((1u << lane) - 1));
    if (bin >= 0 && rank == 0) s.counts[bin][warp] = static_cast<uint16_t>(__popc(same));
  }
  // and an expert: at first all that lie before its warp's.
  int end = 0;
  if (warp_has_experts) {
    for (int slot = lane; slot < num_slots; slot += kWarpSize) end += s.expert[slot] < warp * kWarpSize;
    end = __reduce_add_sync(kFullMask, end);
  }
  __syncthreads();  // slots are counted
  if (warp_has_experts) {
    end += warp_prefix_sum(thread < num_experts ? count_of(s, thread, kSlotWarps) : 0);
    if (thread < num_experts) {
      s.begin[thread + 1] = end;
      plan.offsets[thread] = end;
    }
    if (thread == 0) s.begin[0] = 0;
  }
  __syncthreads();  // experts have their places
  if (bin < 0) return;
  const int row = s.begin[bin] + count_of(s, bin, warp) + rank;
  plan.inverse[thread] = row;
  plan.order[row] = thread;
}

// --------------------------------------------------------------------------------------------------------------------
// The kernels.

template <class T, int kKeys>
__global__ void __launch_bounds__(kMaxWarps<kKeys>* kWarpSize) moe_route_dispatch_kernel(const MoERouteParams p) {
  Shared& s = shared<Shared>();
  clear_counts(s.slots, p.num_experts);
  const int warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
  int* keys = dynamic_shared<int>() + warp * kKeys * kWarpSize;
  for (int token = warp; token < p.num_tokens; token += num_warps) route<T, kKeys>(p, token, s, keys);
  __syncthreads();  // all ids are known
  sort_slots(s.slots, static_cast<int>(p.num_tokens) * p.top_k, p.num_experts, p.plan);
}

__global__ void __launch_bounds__(kMaxRoutedExperts) moe_dispatch_kernel(const MoEDispatchParams p) {
  Slots& s = shared<Slots>();
  clear_counts(s, p.num_experts);
  const int slot = threadIdx.x, num_slots = static_cast<int>(p.num_tokens) * p.top_k;
  if (slot < num_slots) {
    const int64_t at = slot / p.top_k * p.stride_t + slot % p.top_k * p.stride_k;
    const int64_t id = p.has_int64_indices ? static_cast<const int64_t*>(p.indices)[at] : static_cast<const int32_t*>(p.indices)[at];
    s.expert[slot] = id >= 0 && id < p.num_experts ? static_cast<int>(id) : p.num_experts;
  }
  __syncthreads();  // all ids are known
  sort_slots(s, num_slots, p.num_experts, p.plan);
}

// --------------------------------------------------------------------------------------------------------------------
// The launchers.

// Whether one block does it; both are checked by themselves first, so that their product is an int's.
bool fits(int64_t num_tokens, int top_k, int num_experts) {
  if (num_experts < 1 || num_experts > kMaxRoutedExperts || top_k < 1 || num_tokens < 0) return false;
  return num_tokens <= kMaxRoutedSlots / top_k;
}

// So many that each slot and each expert has a thread.
int warps_of_sort(int num_slots, int num_experts) { return (max(num_slots, num_experts) + kWarpSize - 1) / kWarpSize; }

template <class T, int kKeys>
cudaError_t launch_route(const MoERouteParams& p, cudaStream_t stream) {
  constexpr int kKeyBytes = kKeys * kWarpSize * sizeof(int);
  const bool has_groups = p.top_k_groups < p.num_groups;
  const int num_tokens = static_cast<int>(p.num_tokens);
  const int most = has_groups ? min(kMaxWarps<kKeys>, kGroupBytes / kKeyBytes) : kMaxWarps<kKeys>;
  const int warps = max(min(num_tokens, most), warps_of_sort(num_tokens * p.top_k, p.num_experts));
  return launch(moe_route_dispatch_kernel<T, kKeys>, dim3(1), dim3(warps * kWarpSize), has_groups ? warps * kKeyBytes : 0, stream, p);
}

template <class T>
cudaError_t launch_route(const MoERouteParams& p, cudaStream_t stream) {
  if (p.num_experts <= 4 * kWarpSize) return launch_route<T, 4>(p, stream);
  if (p.num_experts <= 8 * kWarpSize) return launch_route<T, 8>(p, stream);
  return launch_route<T, 16>(p, stream);
}

}  // namespace

cudaError_t moe_route_dispatch(const MoERouteParams& params, cudaStream_t stream) {
  const MoERouteParams& p = params;
  if (!fits(p.num_tokens, p.top_k, p.num_experts)) return cudaErrorInvalidValue;
  if (p.num_groups < 1 || p.num_groups > p.num_experts || p.num_experts % p.num_groups != 0) return cudaErrorInvalidValue;
  if (p.top_k_groups < 1 || p.top_k_groups > p.num_groups) return cudaErrorInvalidValue;
  if (p.top_k > p.num_experts / p.num_groups * p.top_k_groups) return cudaErrorInvalidValue;
  if (p.score != MoEScore::kSoftmax && p.score != MoEScore::kSigmoid) return cudaErrorInvalidValue;
  return with_float(p.dtype, [&](auto type) { return launch_route<typename decltype(type)::type>(p, stream); });
}

cudaError_t moe_dispatch(const MoEDispatchParams& params, cudaStream_t stream) {
  if (!fits(params.num_tokens, params.top_k, params.num_experts)) return cudaErrorInvalidValue;
  const int warps = warps_of_sort(static_cast<int>(params.num_tokens) * params.top_k, params.num_experts);
  return launch(moe_dispatch_kernel, dim3(1), dim3(warps * kWarpSize), 0, stream, params);
}

}  // namespace fastattn
