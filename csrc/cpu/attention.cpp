// Attention of short sequences, forward and backward: fastattn::attention_fwd_cpp and attention_bwd_cpp, for softcap, dropout, ALiBi, sinks
// and windows, between whose steps in torch's ops the time goes where there is little to compute. One thread has a key head of a batch entry
// and the query heads that share it: its keys and values as fp32 in its cache, and a block of rows at a time, whole. The backward computes
// the softmax again from its log-sum-exp.
//
// Everything is summed in fp32 and rounded once. The dropout mask is that of fastattn/cpu/attention.py, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <tuple>
#include <vector>

#include "instruction_sets.hpp"
#include "tensors.hpp"

namespace fastattn {
namespace {

constexpr int64_t BLOCK = 32;  // rows of queries

inline int64_t padded_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory of one task, taken piece by piece; each piece starts on a cache line.
class Workspace {
 public:
  void begin() {  // anew, in the largest piece
    if (chunks_.size() > 1) chunks_.erase(chunks_.begin(), chunks_.end() - 1);
    used_ = 0;
  }
  float* take(int64_t floats) {
    const int64_t start = used_;
    used_ += padded_to(floats, 16);
    if (chunks_.empty() || used_ > capacity_) return grow(floats);
    return chunks_.back().data() + start;
  }

 private:
  float* grow(int64_t floats) {  // what was taken before stays where it is
    capacity_ = std::max<int64_t>(2 * capacity_, padded_to(floats, 16) + (1 << 16));
    chunks_.emplace_back(capacity_);
    used_ = padded_to(floats, 16);
    return chunks_.back().data();
  }
  std::vector<std::vector<float>> chunks_;
  int64_t used_ = 0, capacity_ = 0;
};

// As fastattn/cpu/attention.py counts: 16 bits for each weight, from two words of its row and one of each pair of keys.
struct Dropout {
  static constexpr int32_t NONE = std::numeric_limits<int32_t>::min();
  int32_t threshold = NONE;  // weights whose bits are less are dropped
  float scale = 1.0f;        // 1 / (1 − p)
  uint64_t row_key = 0;
  const uint32_t* key_words = nullptr;
};

uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// Two words of a counter, by the same steps but for shifts that bring copies of the sign in.
inline void words_of(uint64_t counter, uint32_t* words) {
  uint64_t x = (counter ^ uint64_t(int64_t(counter) >> 32)) * 0xBF58476D1CE4E5B9;
  x = (x ^ uint64_t(int64_t(x) >> 29)) * 0x94D049BB133111EB;
  x ^= uint64_t(int64_t(x) >> 32);
  words[0] = uint32_t(x);
  words[1] = uint32_t(x >> 32);
}

struct Params {
  Kind kind;
  int64_t seqlen_q, seqlen_k, num_heads, group, head_dim, head_dim_v;
  int64_t left, right;  // bounds of the window, or UNBOUNDED
  float scale, softcap;
  const float *slopes, *sinks;  // (H,) or (B, H); (H,)
  int64_t slopes_stride;
  Dropout dropout;
  void* out;
  float* lse;
  // backward alone
  const float* dlse;
  float* delta;
  void *dq, *dk, *dv;
};
constexpr int64_t UNBOUNDED = std::numeric_limits<int64_t>::max();

// Row i of a group of heads: its token, and which of the heads. 64-bit divisions would take longer than a short row.
struct Place {
  int64_t token, head;
  Place(int64_t i, int64_t group) : token(group == 1 ? i : uint32_t(i) / uint32_t(group)), head(i - token * group) {}
};

// Rows of a group of heads of one batch entry.
struct Rows {
  const void* data = nullptr;
  int64_t start = 0, group = 1, token_stride = 0, head_stride = 0;
  int64_t offset(int64_t i) const {
    const Place place(i, group);
    return start + place.token * token_stride + place.head * head_stride;
  }
};

struct Row {
  int64_t position, key_begin, key_end, out_offset, dq_offset;
  uint64_t counter;
  float slope, sink;
  float *lse, *delta;
  const float* dlse;
};

// A key head of a batch entry, and the query heads that share it.
struct Head {
  const Params* params;
  int64_t batch, kv_head;
  Rows q, k, v, dout;

  int64_t num_rows() const { return params->seqlen_q * params->group; }

  Row row(int64_t i) const {
    const Params& p = *params;
    const Place place(i, p.group);
    const int64_t query = place.token, head = kv_head * p.group + place.head, position = query + p.seqlen_k - p.seqlen_q;
    const int64_t begin = p.left == UNBOUNDED ? 0 : std::clamp<int64_t>(position - p.left, 0, p.seqlen_k);
    const int64_t end = p.right == UNBOUNDED ? p.seqlen_k : std::clamp<int64_t>(position + p.right + 1, 0, p.seqlen_k);
    const int64_t token = (batch * p.seqlen_q + query) * p.num_heads + head, flat = (batch * p.num_heads + head) * p.seqlen_q + query;
    return {
        position, std::min(begin, end), end, token * p.head_dim_v, token * p.head_dim,
        p.dropout.row_key + (uint64_t(batch) * uint64_t(p.num_heads) + uint64_t(head)) * (uint64_t(1) << 32) + uint64_t(query),
        p.slopes ? p.slopes[batch * p.slopes_stride + head] : 0.0f, p.sinks ? p.sinks[head] : -INFINITY,
        p.lse + flat, p.delta ? p.delta + flat : nullptr, p.dlse ? p.dlse + flat : nullptr,
    };
  }
  int64_t key(int64_t j) const { return (batch * params->seqlen_k + j) * (params->num_heads / params->group) + kv_head; }
  int64_t dk_offset(int64_t j) const { return key(j) * params->head_dim; }
  int64_t dv_offset(int64_t j) const { return key(j) * params->head_dim_v; }
};

#define KERNELS "attention.inl"
#include "instruction_sets.inl"

struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> alibi_slopes, sinks, dropout_seed;
  std::optional<int64_t> window_left, window_right;
  double softmax_scale, softcap, dropout_p;
};

Params params_of(const Inputs& inputs, std::vector<uint32_t>& key_words) {
  Params p{};
  const Tensor &q = inputs.q, &k = inputs.k;
  p.kind = kind_of(q);
  p.seqlen_q = q.size(1), p.seqlen_k = k.size(1), p.num_heads = q.size(2), p.group = q.size(2) / k.size(2);
  p.head_dim = q.size(3), p.head_dim_v = inputs.v.size(3);
  p.left = inputs.window_left.value_or(UNBOUNDED), p.right = inputs.window_right.value_or(UNBOUNDED);
  p.scale = float(inputs.softmax_scale), p.softcap = float(inputs.softcap);
  p.slopes = values_of<float>(inputs.alibi_slopes), p.sinks = values_of<float>(inputs.sinks);
  p.slopes_stride = inputs.alibi_slopes && inputs.alibi_slopes->dim() == 2 ? p.num_heads : 0;
  if (inputs.dropout_p > 0.0) {
    const uint64_t key = splitmix64(uint64_t(*static_cast<const int64_t*>(inputs.dropout_seed->data_ptr())));
    p.dropout.threshold = int32_t(std::lrint(inputs.dropout_p * 65536.0)) - 32768;
    p.dropout.scale = float(1.0 / (1.0 - inputs.dropout_p));
    p.dropout.row_key = key >> 2;
    key_words.resize(padded_to(p.seqlen_k, 4) / 2);
    for (size_t i = 0; i < key_words.size(); i += 2) words_of((splitmix64(key) >> 2) + i / 2, &key_words[i]);
    p.dropout.key_words = key_words.data();
  }
  return p;
}

Rows rows_of(const Tensor& t, int64_t batch, int64_t first_head, int64_t group) {
  return {t.data_ptr(), batch * t.stride(0) + first_head * t.stride(2), group, t.stride(1), t.stride(2)};
}

template <class Run>
void for_each_head(const Params& p, const Inputs& inputs, const Tensor* dout, const Run& run) {
  const int64_t kv_heads = inputs.k.size(2);
  torch::stable::parallel_for(0, inputs.q.size(0) * kv_heads, 1, [&](int64_t begin, int64_t end) {
    thread_local Workspace workspace;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / kv_heads, h = task % kv_heads;
      const Head head{
          &p, b, h, rows_of(inputs.q, b, h * p.group, p.group), rows_of(inputs.k, b, h, 1), rows_of(inputs.v, b, h, 1),
          dout ? rows_of(*dout, b, h * p.group, p.group) : Rows{},
      };
      workspace.begin();
      run(head, workspace);
    }
  });
}

// As fastattn::attention_fwd's of a dense call without a bias, whose checks it counts on: last dims contiguous; slopes and sinks fp32 and
// contiguous; dropout_p a multiple of 2^−16.
std::tuple<Tensor, Tensor> attention_fwd_cpp(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softmax_scale, double softcap, double dropout_p) {
  const Inputs inputs{q, k, v, alibi_slopes, sinks, dropout_seed, window_left, window_right, softmax_scale, softcap, dropout_p};
  std::vector<uint32_t> key_words;
  Params p = params_of(inputs, key_words);
  const Tensor out = empty({q.size(0), p.seqlen_q, p.num_heads, p.head_dim_v}, q.scalar_type());
  const Tensor lse = empty({q.size(0), p.num_heads, p.seqlen_q}, torch::headeronly::ScalarType::Float);
  p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
  for_each_head(p, inputs, nullptr, FASTATTN_PICK(forward));
  return {out, lse};
}

// Returns dq, dk, dv, contiguous, and delta = Σ P∘dP (B, H, S_q) fp32, of which a sink's gradient is made. dlse as lse, contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd_cpp(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
    std::optional<Tensor> dropout_seed, Tensor lse, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softmax_scale, double softcap, double dropout_p) {
  const Inputs inputs{q, k, v, alibi_slopes, sinks, dropout_seed, window_left, window_right, softmax_scale, softcap, dropout_p};
  std::vector<uint32_t> key_words;
  Params p = params_of(inputs, key_words);
  const auto like = [](const Tensor& t) { return empty({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type()); };
  const Tensor dq = like(q), dk = like(k), dv = like(v);
  const Tensor delta = empty({q.size(0), p.num_heads, p.seqlen_q}, torch::headeronly::ScalarType::Float);
  p.lse = static_cast<float*>(lse.data_ptr()), p.delta = static_cast<float*>(delta.data_ptr());
  p.dlse = values_of<float>(dlse);
  p.dq = dq.data_ptr(), p.dk = dk.data_ptr(), p.dv = dv.data_ptr();
  for_each_head(p, inputs, &dout, FASTATTN_PICK(backward));
  return {dq, dk, dv, delta};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_fwd_cpp", TORCH_BOX(&attention_fwd_cpp));
  m.impl("attention_bwd_cpp", TORCH_BOX(&attention_bwd_cpp));
}

}  // namespace
}  // namespace fastattn
