// Attention of few queries over a paged key/value cache: fastattn::paged_attention_cpp (docs/paged_attention.md), for decoding and
// speculation, where reading the cache is what takes the time. A sequence's keys are cut into chunks of CHUNK, whoever else is in the
// batch; threads take (sequence, block of rows, chunk) in turn, with all key heads, whose rows lie side by side, or some of them where
// tasks would be few; the chunks' results are merged in their order. So neither the number of threads nor the company changes a bit.
// Each cached row is read once, in the order of memory, and widened to fp32 once, for all rows of its group.
//
// Floor: the bytes of the keys and values that are visible, over memory bandwidth.

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "instruction_sets.hpp"
#include "tensors.hpp"

namespace fastattn {
namespace {

constexpr int64_t CHUNK = 256;     // keys of one task
constexpr int64_t BLOCK = 32;      // keys of all heads that are in the second cache together, beside the next so many
constexpr int64_t ROWS = 32;       // of one task: queries times heads of a group
constexpr int64_t TASKS = 4;       // for each thread, before the key heads of a chunk stay together
constexpr int64_t UNBOUNDED = std::numeric_limits<int32_t>::max();

struct Cache {
  const void* data;
  int64_t page_stride, slot_stride, head_stride;
};

struct Params {
  const void* q;
  Cache k, v;
  Kind q_kind, cache_kind;
  const int32_t* page_table;
  int64_t table_stride, page_size;
  int64_t group, head_dim, head_dim_v;  // heads that share a key head
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  const float* slopes;  // (H,), or (B, H) with slopes_stride H; null for none
  int64_t slopes_stride;
  const float *k_scale, *v_scale;  // (H_kv,) or null
  int64_t left, right;
  float scale, softcap;
};

// A block of rows of one sequence, and a chunk of its keys. Rows count queries, and within a query the heads of a group.
struct Item {
  int64_t sequence, first_token, seqlen_q, seqlen_k, pad, row_begin, row_end, key_begin, key_end, partial;
};

// An item's key heads, some of them, and where the item's results go.
struct Task {
  const Item* item;
  int64_t head_begin, head_end;
  float* partial;
};

struct Row {
  int64_t q_offset, position, key_begin, key_end;
  float slope;
};

// The keys that a query sees: those within the window around its own place, the last query's being the last key's.
inline int64_t position_of(const Item& item, int64_t query) { return query + item.seqlen_k - item.seqlen_q; }

inline std::pair<int64_t, int64_t> visible(const Params& p, const Item& item, int64_t first_query, int64_t last_query) {
  const int64_t begin = p.left == UNBOUNDED ? 0 : std::max<int64_t>(0, position_of(item, first_query) - p.left);
  const int64_t end = p.right == UNBOUNDED ? item.seqlen_k : std::min(item.seqlen_k, position_of(item, last_query) + p.right + 1);
  return {begin, std::max(begin, end)};
}

inline Row row_of(const Params& p, const Item& item, int64_t kv_head, int64_t r) {
  const int64_t query = (item.row_begin + r) / p.group, head = kv_head * p.group + (item.row_begin + r) % p.group;
  const auto [begin, end] = visible(p, item, query, query);
  const int64_t token = item.first_token + query;  // within a sequence, or among the packed
  return {
      item.sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride, position_of(item, query), begin, end,
      p.slopes ? p.slopes[item.sequence * p.slopes_stride + head] : 0.0f,
  };
}

// What a thread works in: it grows to what a task asks for.
class Scratch {
 public:
  float* floats(int64_t n) {
    floats_.resize(n + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(floats_.data()) + 63) / 64 * 64);  // registers load whole cache lines
  }
  Row* rows(int64_t n) {
    rows_.resize(n);
    return rows_.data();
  }

 private:
  std::vector<float> floats_;
  std::vector<Row> rows_;
};

#define KERNELS "paged_attention.inl"
#include "instruction_sets.inl"

// The chunks of a row as one, rounded once: the merge of softmaxes by their maxima. A sink is one more key, with no value.
void finish(
    const Params& p, const Item* items, int64_t num_chunks, const float* partials, int64_t kv_head, const float* sinks,
    void* out, float* lse, int64_t num_heads, int64_t lse_batch_stride, int64_t lse_head_stride, int64_t out_rows) {
  const int64_t rows = items->row_end - items->row_begin, width = p.head_dim_v + 2;
  std::vector<float> acc(p.head_dim_v);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = (items->row_begin + r) / p.group, head = kv_head * p.group + (items->row_begin + r) % p.group;
    const float sink = sinks ? sinks[head] : -INFINITY;
    float peak = sink;
    const auto chunk = [&](int64_t c) { return partials + items[c].partial + (kv_head * rows + r) * width; };
    for (int64_t c = 0; c < num_chunks; ++c) peak = std::max(peak, chunk(c)[0]);
    float total = sink == -INFINITY ? 0.0f : std::exp(sink - peak);
    std::fill(acc.begin(), acc.end(), 0.0f);
    for (int64_t c = 0; c < num_chunks; ++c) {
      const float* const from = chunk(c);
      const float weight = from[0] == -INFINITY ? (from[1] != from[1] ? from[1] : 0.0f) : std::exp(from[0] - peak);
      if (weight == 0.0f) continue;
      total += weight * from[1];
      for (int64_t d = 0; d < p.head_dim_v; ++d) acc[d] += weight * from[2 + d];
    }
    const float share = total == 0.0f ? 0.0f : (p.v_scale ? p.v_scale[kv_head] : 1.0f) / total;
    const int64_t token = items->first_token + query + items->sequence * out_rows;
    for (float& x : acc) x *= share;
    baseline::store_row(out, p.q_kind, (token * num_heads + head) * p.head_dim_v, acc.data(), p.head_dim_v);
    lse[items->sequence * lse_batch_stride + head * lse_head_stride + items->first_token + query] = peak + std::log(total);
  }
}

// As fastattn::paged_attention, whose checks it counts on: page ids that are looked at are pages; index tensors int32, slopes, sinks and
// scales fp32, all contiguous but page_table's rows; last dims contiguous.
std::tuple<Tensor, Tensor> paged_attention_cpp(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seqlens_k, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
    std::optional<Tensor> leftpad, int64_t max_seqlen_q, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softmax_scale, double softcap) {
  const bool packed = cu_seqlens_q.has_value();
  const int64_t batch = seqlens_k.numel(), num_heads = q.size(q.dim() - 2), num_kv_heads = k_cache.size(2);
  const auto cache = [](const Tensor& t) { return Cache{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; };
  const Params p{
      q.data_ptr(), cache(k_cache), cache(v_cache), kind_of(q), kind_of(k_cache),
      static_cast<const int32_t*>(page_table.data_ptr()), page_table.stride(0), k_cache.size(1),
      num_heads / num_kv_heads, q.size(q.dim() - 1), v_cache.size(3),
      packed ? 0 : q.stride(0), q.stride(q.dim() - 3), q.stride(q.dim() - 2),
      values_of<float>(alibi_slopes), alibi_slopes && alibi_slopes->dim() == 2 ? num_heads : 0,
      values_of<float>(k_scale), values_of<float>(v_scale),
      window_left.value_or(UNBOUNDED), window_right.value_or(UNBOUNDED), float(softmax_scale), float(softcap),
  };
  std::vector<int64_t> out_size(q.sizes().begin(), q.sizes().end());
  out_size.back() = p.head_dim_v;
  const Tensor out = torch::stable::new_zeros(q, out_size);
  const int64_t rows_q = packed ? q.size(0) : q.size(1);
  const Tensor lse = torch::stable::new_empty(
      q, packed ? std::vector<int64_t>{num_heads, rows_q} : std::vector<int64_t>{q.size(0), num_heads, rows_q},
      torch::headeronly::ScalarType::Float);
  float* const lse_data = static_cast<float*>(lse.data_ptr());
  std::fill(lse_data, lse_data + lse.numel(), -INFINITY);

  // Tasks: each block of rows with its chunks side by side, from `blocks` on.
  std::vector<Item> items;
  std::vector<int64_t> blocks;
  int64_t size = 0;
  const int32_t *lengths = static_cast<const int32_t*>(seqlens_k.data_ptr()), *cu = values_of<int32_t>(cu_seqlens_q),
                *pads = values_of<int32_t>(leftpad);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t pad = pads ? pads[b] : 0, seqlen_q = packed ? cu[b + 1] - cu[b] : max_seqlen_q;
    for (int64_t row = 0; row < seqlen_q * p.group; row += ROWS) {
      Item item{b, packed ? cu[b] : 0, seqlen_q, lengths[b] - pad, pad, row, std::min(row + ROWS, seqlen_q * p.group), 0, 0, 0};
      const auto [begin, end] = visible(p, item, item.row_begin / p.group, (item.row_end - 1) / p.group);
      blocks.push_back(int64_t(items.size()));
      int64_t key = begin;
      do {  // a block that sees no key has one chunk of none
        item.key_begin = key;
        item.key_end = key = std::min(key + CHUNK, end);
        item.partial = size;
        size += num_kv_heads * (item.row_end - item.row_begin) * (p.head_dim_v + 2);
        items.push_back(item);
      } while (key < end);
    }
  }
  blocks.push_back(int64_t(items.size()));
  const Tensor partials = torch::stable::new_empty(q, {size}, torch::headeronly::ScalarType::Float);
  float* const partial = static_cast<float*>(partials.data_ptr());

  // All key heads of a chunk lie together, and stay together where there are chunks enough for the threads.
  const int64_t wanted = TASKS * torch::stable::get_num_threads(), parts = std::clamp<int64_t>(wanted / std::max<int64_t>(1, items.size()), 1, num_kv_heads);
  const auto attend = FASTATTN_PICK(attend);
  torch::stable::parallel_for(0, int64_t(items.size()) * parts, 1, [&](int64_t begin, int64_t end) {
    const auto task_of = [&](int64_t i) {
      const Item& item = items[i / parts];
      return Task{&item, i % parts * num_kv_heads / parts, (i % parts + 1) * num_kv_heads / parts, partial + item.partial};
    };
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const Task next = i + 1 < end ? task_of(i + 1) : Task{};
      attend(p, task_of(i), i + 1 < end ? &next : nullptr, scratch);
    }
  });
  const int64_t lse_head_stride = rows_q, lse_batch_stride = packed ? 0 : num_heads * rows_q;
  torch::stable::parallel_for(0, (int64_t(blocks.size()) - 1) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / num_kv_heads;
      finish(
          p, &items[blocks[block]], blocks[block + 1] - blocks[block], partial, task % num_kv_heads,
          values_of<float>(sinks), out.data_ptr(), lse_data, num_heads, lse_batch_stride, lse_head_stride, packed ? 0 : rows_q);
    }
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("paged_attention_cpp", TORCH_BOX(&paged_attention_cpp)); }

}  // namespace
}  // namespace fastattn
