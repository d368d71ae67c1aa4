// New keys and values into a paged cache: fastattn::append_paged_kv_cpp (docs/kv_cache.md). Threads take tokens in turn, each row in fp32 on
// its way: rotated, divided by its head's scale, rounded once.
//
// Floor: reading k and v, and writing them as the cache has them.

#include <algorithm>
#include <cmath>
#include <optional>

#include "instruction_sets.hpp"
#include "tensors.hpp"

namespace fastattn {
namespace {

constexpr int64_t MAX_COLS = 512;
constexpr int64_t TOKENS = 16;  // of a thread, at least

#define KERNELS "append_paged_kv.inl"
#include "instruction_sets.inl"

// Rows (token, head) of new keys or values, and where they go.
struct Side {
  const void* from;
  void* to;
  Kind kind, cache_kind;
  int64_t batch_stride, token_stride, head_stride, page_stride, slot_stride, cache_head_stride, num_cols;
  const float* scale;  // (H_kv,) or null

  Side(const Tensor& x, const Tensor& cache, const std::optional<Tensor>& scale)
      : from(x.data_ptr()),
        to(cache.data_ptr()),
        kind(kind_of(x)),
        cache_kind(kind_of(cache)),
        batch_stride(x.dim() == 4 ? x.stride(0) : 0),
        token_stride(x.stride(x.dim() - 3)),
        head_stride(x.stride(x.dim() - 2)),
        page_stride(cache.stride(0)),
        slot_stride(cache.stride(1)),
        cache_head_stride(cache.stride(2)),
        num_cols(x.size(x.dim() - 1)),
        scale(values_of<float>(scale)) {
    STD_TORCH_CHECK(num_cols <= MAX_COLS && (num_cols <= 1 || (x.stride(x.dim() - 1) == 1 && cache.stride(3) == 1)),
                    "append_paged_kv_cpp: rows must be consecutive entries, ", MAX_COLS, " at most");
  }
};

// As fastattn::append_paged_kv, whose checks it counts on, but that tokens without a slot are skipped. Index tensors int32, cu_seqlens and
// cache_seqlens contiguous; scales fp32; cos and sin of one dtype and contiguous, fp32, fp16 or bf16.
void append_paged_kv_cpp(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor cache_seqlens, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> cos, std::optional<Tensor> sin, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, bool interleaved) {
  const Side sides[2] = {{k, k_cache, k_scale}, {v, v_cache, v_scale}};
  const int64_t batch = cache_seqlens.numel(), num_heads = k.size(k.dim() - 2);
  const int64_t num_pages = k_cache.size(0), page_size = k_cache.size(1), max_pages = page_table.size(1);
  const int64_t table_stride = page_table.stride(0), page_stride = page_table.stride(1);
  const int32_t *table = static_cast<const int32_t*>(page_table.data_ptr()), *lengths = static_cast<const int32_t*>(cache_seqlens.data_ptr());
  const int32_t* const cu = values_of<int32_t>(cu_seqlens);
  const int64_t new_tokens = cu ? 0 : k.size(1), total = cu ? std::min<int64_t>(cu[batch], k.size(0)) : batch * new_tokens;
  const int64_t half = cos ? cos->size(1) : 0, positions = cos ? cos->size(0) : 0;
  const Kind table_kind = cos ? kind_of(*cos) : Kind::f32;
  const auto load_row = FASTATTN_PICK(load_row);
  const auto rotate = FASTATTN_PICK(rotate);
  const auto store_scaled = FASTATTN_PICK(store_scaled);

  torch::stable::parallel_for(0, total, TOKENS, [&](int64_t begin, int64_t end) {
    float x[MAX_COLS], angles[2][MAX_COLS / 2];
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = cu ? std::upper_bound(cu, cu + batch + 1, int32_t(token)) - cu - 1 : token / new_tokens;
      const int64_t index = token - (cu ? cu[b] : b * new_tokens), position = lengths[b] + index;
      if (position < 0 || position >= max_pages * page_size) continue;
      const int64_t page = table[b * table_stride + position / page_size * page_stride], slot = position % page_size;
      if (page < 0 || page >= num_pages) continue;
      const bool turns = position < positions;
      if (turns)
        for (int i = 0; i < 2; ++i) load_row(at((i ? *sin : *cos).data_ptr(), table_kind, position * half), table_kind, half, angles[i]);
      for (const Side& side : sides) {
        const int64_t first = (cu ? token : index) * side.token_stride + (cu ? 0 : b * side.batch_stride);
        for (int64_t head = 0; head < num_heads; ++head) {
          load_row(at(side.from, side.kind, first + head * side.head_stride), side.kind, side.num_cols, x);
          if (turns && &side == sides) rotate(x, angles[0], angles[1], half, interleaved);
          const int64_t offset = page * side.page_stride + slot * side.slot_stride + head * side.cache_head_stride;
          store_scaled(side.to, side.cache_kind, offset, x, side.scale ? side.scale[head] : 1.0f, side.num_cols);
        }
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("append_paged_kv_cpp", TORCH_BOX(&append_paged_kv_cpp)); }

}  // namespace
}  // namespace fastattn
