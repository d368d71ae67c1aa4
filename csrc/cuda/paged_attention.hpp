// Attention of a few queries a sequence over a paged cache: decoding and speculation. fastattn/ops/paged_attention.py documents what it
// computes, and what hostile lengths, pages and starts do: they are clamped, and keys of a page that is none are masked.

#pragma once

#include "../common/cuda.hpp"

namespace fastattn {

inline constexpr int64_t kPagedMaxKeys = int64_t{1} << 30;  // of a sequence: longer ones are cut
inline constexpr int kPagedMaxSplits = 256;
inline constexpr int64_t kNoBound = INT64_MAX;  // of a window's side

// Strides are in entries; a row's head_dim entries lie together. Rows are the queries of a group's heads: row r of a sequence's group is
// query r / (num_heads / num_kv_heads) of head r mod that.
struct PagedAttentionParams {
  const void* q;                // (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim)
  const void* k_cache;          // (num_pages, page_size, num_kv_heads, head_dim), q's dtype
  const void* v_cache;          // as k_cache
  const int32_t* page_table;    // (batch, max_pages), stride_table apart
  const int32_t* seqlens_k;     // (batch)
  const int32_t* cu_seqlens_q;  // (batch + 1), packed; or null
  const int32_t* leftpad;       // (batch): a sequence's places that hold nothing, before its keys; or null
  const float* alibi_slopes;    // (num_heads), or (batch, num_heads) stride_slopes apart; or null
  const float* sinks;           // (num_heads), or null
  const float* k_scale;         // (num_kv_heads), multiplies keys; or null
  const float* v_scale;         // the same of values
  void* out;                    // q's shape, contiguous. Packed rows of no sequence are not written
  float* lse;                   // (batch, num_heads, seqlen_q), or packed (num_heads, total_q)
  float* partial_out;           // (tiles, num_splits, tile_rows, head_dim); null for one split, as the next two
  float* partial_lse;           // (tiles, num_splits, tile_rows)
  uint32_t* counters;           // (tiles), zeros; they are zeros again when the kernel ends
  int64_t batch, seqlen_q, total_q, num_heads, num_kv_heads, head_dim;  // seqlen_q: the longest, packed
  int64_t num_pages, page_size, max_pages;
  int64_t stride_qb, stride_qs, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_table, stride_slopes;
  int64_t window_left, window_right;  // query i sees keys from i + seqlen_k − seqlen_q − left to … + right; causal: right = 0
  float softmax_scale, softcap;       // softcap 0: none
  Dtype dtype;                        // of q, caches and out
  int32_t num_splits;                 // of each tile's keys at most √(keys / tile_rows), as one block merges: paged_attention_num_splits
  int32_t tile_rows;                  // of a group, that a block computes together: paged_attention_tile_rows
};

// The tile that suits `rows` = seqlen_q·num_heads / num_kv_heads of a group. Any other that the launcher takes gives the same result, but
// for rounding: a caller who wants the same bits whatever else is in a packed batch fixes one.
int32_t paged_attention_tile_rows(int64_t rows, int64_t head_dim, Dtype dtype);

// How many tiles a launch has: batch · num_kv_heads · ⌈rows / tile_rows⌉. The sizes above are made of it.
int64_t paged_attention_tiles(const PagedAttentionParams& params);

// How many ways to split the keys of a launch's tiles on a part of so many multiprocessors with so much shared memory each: the fewest that keep it nearly as busy as the best
// count would. Lengths are on the GPU and play no part, so that a captured graph stays right as they grow. No more than kPagedMaxSplits.
int32_t paged_attention_num_splits(const PagedAttentionParams& params, int num_multiprocessors, int64_t shared_memory);

// Asynchronous on the stream. cudaErrorInvalidValue: what this kernel does not do, which is
//   - head_dim that is no multiple of 16 bytes, or more than 256 (float32: 128); v_cache's another than k_cache's
//   - a cache that does not begin at a multiple of 16 bytes, or has strides that are none, or negative ones. q and out lie anywhere
//   - tile_rows but 1, 2 and 16 for half precision with head_dim up to 128; 1, 2, 4 and 8 for anything else
//   - num_splits outside [1, kPagedMaxSplits]; more than one without partial_out, at a multiple of 16 bytes, partial_lse and counters
//   - rows of a group beyond 2^30, tiles · num_splits beyond 2^31 − 1, negative sizes, heads that their key heads do not divide
cudaError_t paged_attention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace fastattn
