// New keys and values into a paged cache. fastattn/ops/append_paged_kv.py documents what is written where.

#pragma once

#include "../common/cuda.hpp"

namespace fastattn {

// Strides are entries; the last dim of every tensor but the scales' and lengths' is consecutive, and theirs are consecutive, too.
struct AppendPagedKvParams {
  const void* k;                 // (batch, seqlen, num_heads, head_dim), dtype
  const void* v;                 // (batch, seqlen, num_heads, head_dim_v), dtype
  void* k_cache;                 // (num_pages, page_size, num_heads, head_dim), cache_dtype
  void* v_cache;                 // (num_pages, page_size, num_heads, head_dim_v), cache_dtype
  const int32_t* page_table;     // (num_seqs, max_pages)
  const int32_t* cache_seqlens;  // (num_seqs)
  const int32_t* cu_seqlens;     // (num_seqs + 1), and batch is 1; or null: num_seqs is batch
  const void* cos;               // (table_len, rotary_dim / 2), table_dtype; or null where rotary_dim is 0
  const void* sin;               // as cos
  const float* k_scale;          // (num_heads), or null: 1
  const float* v_scale;          // as k_scale
  int64_t batch, seqlen, num_heads, head_dim, head_dim_v, num_seqs;
  int64_t num_pages, page_size, max_pages, table_len, rotary_dim;
  int64_t stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh;
  int64_t stride_kcp, stride_kcs, stride_kch, stride_vcp, stride_vcs, stride_vch;
  int64_t stride_page_table, stride_cos, stride_sin;
  Dtype dtype, cache_dtype;  // float32, float16 or bfloat16; of the caches also int8 and float8_e4m3fn
  Dtype table_dtype;         // float32, float16 or bfloat16
  int32_t interleaved;       // 1: pairs of columns (0, 1), (2, 3), …; 0: (0, rotary_dim/2), (1, rotary_dim/2 + 1), …
};

// Asynchronous on the stream. cudaErrorInvalidValue: what this kernel does not do (the comments above), a head_dim or head_dim_v that is
// not from 1 to 512, an odd rotary_dim or one above head_dim, a page_size below 1, and a size, or number of rows (batch·seqlen·num_heads),
// that is no int32. Two tokens in one slot leave either of them there, element by element.
cudaError_t append_paged_kv(const AppendPagedKvParams& params, cudaStream_t stream);

}  // namespace fastattn
