// Attention of a few queries a sequence over keys and values that lie in pages: decoding and speculation.
//
//   s = scale·q·k, softcap·tanh(s / softcap), less slope·|distance|;   lse = log Σ e^s;   out = Σ e^(s − lse)·v
//
//   key n of sequence b is row n mod page_size of page page_table[b, n / page_size]
//   row r of a tile is query r / G of head r mod G of a group: the G query heads that share keys read them once
//
// by the online softmax (arXiv 1805.02867) in fp32 and base 2. A tile's keys are divided among `num_splits` blocks, those of a block among
// its warps, which take turns at as many as a stage holds. No warp waits for another until the keys are done: each has stages of its own,
// which cp.async fills two ahead, keys and values apart, from page ids that are loaded one stage earlier still. Then the block puts its
// warps together, and the last block of a tile to end, which a counter tells, the splits, in their order: one launch, since decoding is
// latency. A sequence too short for all of its splits is shared by fewer, and by one with nothing to merge.
//
// Floor: 2·Σ seqlens_k·H_kv·D·itemsize bytes, the visible keys and values, once a tile. Partial results add 8 bytes a split and entry of
// out.

#include "paged_attention.hpp"

#include "../common/cp_async.hpp"
#include "../common/divide.hpp"
#include "../common/mma.hpp"
#include "../common/reduce.hpp"
#include "../common/vector.hpp"

namespace fastattn {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStages = 2;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int32_t kMostKeys = static_cast<int32_t>(kPagedMaxKeys);

// What the launcher makes of the parameters.
struct Args : PagedAttentionParams {
  Divider page_divider;
  int32_t group, num_tiles, capacity;  // heads that share keys; tiles of a sequence's group; keys that a row of the table can have
  int32_t left, right;                 // bounds that reach all keys where there are none: sums of them stay in 32 bits
  float score_scale, cap;              // s = q·k·score_scale, or tanh(q·k·score_scale)·cap; base 2
};

// What a block computes: its tile, and its share of the keys that the tile's rows see.
struct Work {
  int64_t tile, first_token;  // among all tiles; of the sequence
  int32_t batch, kv_head, first_row, num_rows, len_q, diagonal;
  int32_t leftpad, split, num_active, begin, end;  // keys begin … end − 1 of this split, of num_active ones that have any

  // step: keys that the block walks at a time.
  __device__ __forceinline__ Work(const Args& a, int tile_rows, int step) {
    const int32_t number = static_cast<int32_t>(blockIdx.x);
    const int32_t in_group = number % a.num_tiles;
    split = number / a.num_tiles % a.num_splits;
    const int32_t pair = number / a.num_tiles / a.num_splits;
    kv_head = pair % static_cast<int32_t>(a.num_kv_heads);
    batch = pair / static_cast<int32_t>(a.num_kv_heads);
    tile = static_cast<int64_t>(pair) * a.num_tiles + in_group;

    if (a.cu_seqlens_q == nullptr) {
      first_token = batch * a.seqlen_q;
      len_q = static_cast<int32_t>(a.seqlen_q);
    } else {  // clamped, so that no content makes the kernel read or write outside
      const int64_t start = min(max(static_cast<int64_t>(a.cu_seqlens_q[batch]), int64_t{0}), a.total_q);
      const int64_t stop = min(max(static_cast<int64_t>(a.cu_seqlens_q[batch + 1]), start), a.total_q);
      first_token = start;
      len_q = static_cast<int32_t>(min(stop - start, a.seqlen_q));
    }
    first_row = in_group * tile_rows;
    num_rows = min(len_q * a.group - first_row, tile_rows);
    leftpad = a.leftpad == nullptr ? 0 : min(max(a.leftpad[batch], 0), a.capacity);
    const int32_t len_k = min(max(a.seqlens_k[batch], leftpad) - leftpad, a.capacity - leftpad);
    diagonal = len_k - len_q;

    const int32_t first_i = first_row / a.group, last_i = min((first_row + tile_rows - 1) / a.group, len_q - 1);
    const int32_t first_key = max(first_i + diagonal - a.left, 0);
    const int32_t stop_key = max(min(last_i + diagonal + a.right + 1, len_k), first_key);
    const int32_t steps = (stop_key - first_key + step - 1) / step;
    const int32_t share = max((steps + a.num_splits - 1) / a.num_splits, 1);
    num_active = max((steps + share - 1) / share, 1);
    begin = min(first_key + split * share * step, stop_key);
    end = min(begin + share * step, stop_key);
  }

  // Of a tile without rows no split has anything to do, of any other its first one has.
  __device__ __forceinline__ bool is_nothing() const { return num_rows <= 0 || split >= num_active; }
};

// A row of a tile: where it is, which keys it sees, and what it makes of q·k.
struct Row {
  int32_t i, head, diagonal, first_key, last_key;
  float slope, scale, cap;

  __device__ __forceinline__ Row(const Args& a, const Work& w, int row)
      : i((w.first_row + row) / a.group),
        head(w.kv_head * a.group + (w.first_row + row) % a.group),
        diagonal(i + w.diagonal),
        first_key(diagonal - a.left),
        last_key(row < w.num_rows ? min(diagonal + a.right, w.end - 1) : -1),
        slope(row < w.num_rows && a.alibi_slopes != nullptr ? a.alibi_slopes[w.batch * a.stride_slopes + head] * kLog2E : 0.0f),
        scale(a.k_scale == nullptr ? a.score_scale : a.score_scale * a.k_scale[w.kv_head]),
        cap(a.cap) {}

  // Products to scores in base 2.
  template <int N>
  __device__ __forceinline__ void scale_products(float* products) const {
    if (cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < N; ++i) products[i] = tanhf(products[i] * scale) * cap;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) products[i] *= scale;
    }
  }

  // Less the bias, and −∞ where the row does not see key j.
  __device__ __forceinline__ float masked(float score, int32_t j, bool exists) const {
    score -= slope * fabsf(static_cast<float>(diagonal - j));
    return exists && j >= first_key && j <= last_key ? score : -INFINITY;
  }

  __device__ __forceinline__ int64_t token(const Work& w) const { return w.first_token + i; }
  __device__ __forceinline__ int64_t lse_index(const Args& a, const Work& w) const {
    return a.cu_seqlens_q == nullptr ? (w.batch * a.num_heads + head) * a.seqlen_q + i : head * a.total_q + token(w);
  }
  template <class T>
  __device__ __forceinline__ const T* q(const Args& a, const Work& w) const {
    const int64_t start = a.cu_seqlens_q == nullptr ? w.batch * a.stride_qb : w.first_token * a.stride_qs;
    return static_cast<const T*>(a.q) + start + i * a.stride_qs + head * a.stride_qh;
  }
};

// One head's keys or values.
template <class T>
struct Cache {
  const T* rows;
  int64_t page_stride, row_stride;
};

// The page that key j is in; −1 where nothing is to be read: past this split's end, whose entries may hold anything, or of no such page.
__device__ __forceinline__ int32_t page_of(const Args& a, const Work& w, int32_t j) {
  if (j >= w.end) return -1;
  const int32_t page = a.page_table[w.batch * a.stride_table + a.page_divider.quotient(j + w.leftpad)];
  return page >= 0 && page < a.num_pages ? page : -1;
}

// Copies the keys or values of a stage. Lane l has the page of the stage's key l, and finds its row for all: copy i of a lane, to target(i,
// key), is 16 bytes of key i·(32 / kLanes) + lane / kLanes, those after its kLanes-th neighbour's; zeros where there is no page, or no such
// entry. A stage without keys makes an empty group: wait counts them.
template <int kCopies, int kLanes, class T, class Target>
__device__ __forceinline__ void copy_stage(
    const Args& a, const Work& w, const Cache<T>& cache, int32_t page, int32_t start, const Target& target) {
  if (start < w.end) {
    const int lane = threadIdx.x % kWarpSize, col = lane % kLanes * kVectorSize<T>;
    const int32_t place = start + lane + w.leftpad, in_page = a.page_divider.remainder(place, a.page_divider.quotient(place));
    const int64_t my_row = page < 0 ? -1 : page * cache.page_stride + in_page * cache.row_stride;
    const bool in_row = col < a.head_dim;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int key = i * (kWarpSize / kLanes) + lane / kLanes;
      const int64_t row = __shfl_sync(kFullMask, my_row, key);
      const bool exists = in_row && row >= 0;
      cp_async::copy16(target(i, key), exists ? cache.rows + row + col : cache.rows, exists ? 16 : 0);
    }
  }
  cp_async::commit();
}

__device__ __forceinline__ float finite_or_zero(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }  // no −∞ − −∞

template <int N>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(to + i) = float4{from[i], from[i + 1], from[i + 2], from[i + 3]};
}

// sum += weight·from
template <int N>
__device__ __forceinline__ void add_floats(float (&sum)[N], float weight, const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    sum[i] += weight * four.x;
    sum[i + 1] += weight * four.y;
    sum[i + 2] += weight * four.z;
    sum[i + 3] += weight * four.w;
  }
}

// Of a row: its largest score, and the sum of 2^(score − that).
template <int kRows>
struct Shared {
  float row_max[kWarps][kRows], row_sum[kWarps][kRows], inverse[kRows];
  bool is_last;
};

// out = values·factor from entry `col` on.
template <class T>
__device__ __forceinline__ void store_out(
    const Args& a, const Work& w, const Row& row, int col, float (&values)[kVectorSize<T>], float factor) {
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) values[i] *= factor;
  T* out = static_cast<T*>(a.out) + (row.token(w) * a.num_heads + row.head) * a.head_dim + col;
  store(out, values, kVectorSize<T>, is_aligned(a.out));
}

// Puts the splits of a tile together. memory: kRows·kPagedMaxSplits floats, and kThreads·kVectorSize<T> more.
template <class T, int kRows, int kLanes>
__device__ __forceinline__ void merge_splits(const Args& a, const Work& w, float* memory, Shared<kRows>& shared) {
  constexpr int kWidth = kVectorSize<T>, kTasks = kRows * kLanes, kParts = kTasks < kThreads ? kThreads / kTasks : 1;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* const weights = memory;  // (kRows, kPagedMaxSplits)
  float* const sums = memory + kRows * kPagedMaxSplits;
  const int64_t first = w.tile * a.num_splits * kRows;  // of the tile's partial rows

  for (int row = warp; row < w.num_rows; row += kWarps) {
    const float* lses = a.partial_lse + first + row;
    float largest = -INFINITY, total = 0.0f;
    for (int split = lane; split < w.num_active; split += kWarpSize) largest = fmaxf(largest, lses[split * kRows]);
    largest = warp_max(largest);
    for (int split = lane; split < w.num_active; split += kWarpSize) {
      const float weight = exp2f(lses[split * kRows] - finite_or_zero(largest));
      weights[row * kPagedMaxSplits + split] = weight;
      total += weight;
    }
    total = warp_sum(total);
    if (lane == 0) {
      shared.inverse[row] = total == 0.0f ? 0.0f : 1.0f / total;
      a.lse[Row(a, w, row).lse_index(a, w)] = total == 0.0f ? -INFINITY : kLn2 * (largest + log2f(total));
    }
  }
  __syncthreads();  // the weights of all rows

  for (int n = threadIdx.x; n < kTasks * kParts; n += kThreads) {  // with several parts, once
    const int part = n / kTasks, row = n % kTasks / kLanes, col = n % kLanes * kWidth;
    const bool exists = row < w.num_rows && col < a.head_dim;
    float sum[kWidth] = {};
    if (exists) {
      const float* from = a.partial_out + (first + row) * a.head_dim + col;
#pragma unroll 8
      for (int split = part; split < w.num_active; split += kParts)
        add_floats(sum, weights[row * kPagedMaxSplits + split], from + static_cast<int64_t>(split) * kRows * a.head_dim);
    }
    if constexpr (kParts > 1) {
      store_floats(sums + n * kWidth, sum);
      __syncthreads();  // the sums of all parts
      if (part == 0)
        for (int other = 1; other < kParts; ++other) add_floats(sum, 1.0f, sums + (other * kTasks + n) * kWidth);
    }
    if (exists && part == 0) store_out<T>(a, w, Row(a, w, row), col, sum, shared.inverse[row]);
  }
}

// Puts a block's warps together, and stores the result, or this split's part of it. parts: (kWarps·kGroups, kRows, kLanes·kVectorSize<T>),
// a warp's weighted values in kGroups parts; shared has its rows' maxima and sums. Nobody needs dynamic shared memory for anything else.
template <class T, int kRows, int kLanes, int kGroups>
__device__ __forceinline__ void finish(const Args& a, const Work& w, float* parts, Shared<kRows>& shared) {
  constexpr int kWidth = kVectorSize<T>, kTasks = kRows * kLanes;
  const int64_t first = (w.tile * a.num_splits + w.split) * kRows;
  const bool is_whole = w.num_active == 1;
  for (int n = threadIdx.x; n < kTasks; n += kThreads) {
    const int index = n / kLanes, col = n % kLanes * kWidth;
    if (index >= w.num_rows || col >= a.head_dim) continue;
    const Row row(a, w, index);
    // One split's, so that the merged result has it once.
    const float sink = a.sinks != nullptr && w.split == 0 ? a.sinks[row.head] * kLog2E : -INFINITY;
    float largest = sink;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) largest = fmaxf(largest, shared.row_max[warp][index]);
    const float shift = finite_or_zero(largest);
    float total = exp2f(sink - shift), sum[kWidth] = {};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float part = shared.row_sum[warp][index];
      if (part == 0.0f) continue;  // it saw no key, and what it has may be 0·NaN
      const float weight = exp2f(shared.row_max[warp][index] - shift);
      total += part * weight;
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        add_floats(sum, weight, parts + ((warp * kGroups + group) * kRows + index) * kLanes * kWidth + col);
    }
    const float factor = total == 0.0f ? 0.0f : (a.v_scale == nullptr ? 1.0f : a.v_scale[w.kv_head]) / total;
    const float lse = total == 0.0f ? -INFINITY : largest + log2f(total);
    if (is_whole) {
      store_out<T>(a, w, row, col, sum, factor);
      if (col == 0) a.lse[row.lse_index(a, w)] = kLn2 * lse;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] *= factor;
      store_floats(a.partial_out + (first + index) * a.head_dim + col, sum);
      if (col == 0) a.partial_lse[first + index] = lse;
    }
  }
  if (is_whole) return;
  __syncthreads();  // all of the block's part is stored, and `parts` read
  if (threadIdx.x == 0) {
    __threadfence();  // what the block has stored comes before the count
    const unsigned last = static_cast<unsigned>(w.num_active - 1);
    shared.is_last = atomicInc(a.counters + w.tile, last) == last;  // which leaves 0 for the next launch
    __threadfence();  // and what the others have, before what follows
  }
  __syncthreads();
  if (shared.is_last) merge_splits<T, kRows, kLanes>(a, w, parts, shared);
}

// --------------------------------------------------------------------------------------------------------------------
// A tile of up to 8 rows, on CUDA cores.

constexpr int kPasses = 4;  // 16-byte chunks of keys that a thread has in a stage
constexpr size_t kCoreBytes = size_t{kStages} * 2 * kPasses * kThreads * 16;  // 32 KiB

// kLanes lanes have a key, each 16 bytes of it, so that a warp has 32 / kLanes keys in a pass: the same lanes copy, multiply and add up the
// same bytes, and see none but their own; a stage needs no barrier. A key's scores are summed over its lanes so that each lane is left
// with its share of a tile's scores (scatter_sums): row by its highest bits, then pass. It masks and exponentiates those alone, and the
// lanes get the weights by shuffles.
template <class T, int kLanes, int kRows>
__global__ void __launch_bounds__(kThreads, kRows < 4 ? 4 : kRows == 4 ? 3 : 2) cores_kernel(const Args a) {
  constexpr int kWidth = kVectorSize<T>, kGroups = kWarpSize / kLanes, kKeys = kPasses * kGroups;
  constexpr int kRowLanes = kLanes / kRows;  // that have one row's scores
  constexpr int kPassLanes = kRowLanes < kPasses ? kRowLanes : kPasses;  // that have different ones
  constexpr int kOwned = kPasses / kPassLanes, kSame = kRowLanes / kPassLanes;  // scores of a lane, lanes of a score
  const Work w(a, kRows, kWarps * kKeys);
  if (w.is_nothing()) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int group = lane / kLanes, col = lane % kLanes * kWidth;
  const int my_row = lane % kLanes / kRowLanes, my_pass = lane % kRowLanes / kSame * kOwned;
  const Row row(a, w, my_row);
  const Cache<T> keys = {static_cast<const T*>(a.k_cache) + w.kv_head * a.stride_kh, a.stride_kp, a.stride_ks};
  const Cache<T> values = {static_cast<const T*>(a.v_cache) + w.kv_head * a.stride_vh, a.stride_vp, a.stride_vs};

  float q[kRows][kWidth];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const bool exists = r < w.num_rows && col < a.head_dim;
    const T* from = exists ? Row(a, w, r).q<T>(a, w) + col : nullptr;
    load(q[r], from, exists ? kWidth : 0, is_aligned(from));
  }

  uint4* const stages = dynamic_shared<uint4>() + threadIdx.x;
  const auto chunk = [&](int stage, int half, int pass) { return stages + ((stage * 2 + half) * kPasses + pass) * kThreads; };
  const auto load_page = [&](int32_t start) { return lane < kKeys ? page_of(a, w, start + lane) : -1; };
  const auto copy = [&](const Cache<T>& cache, int32_t page, int32_t start, int stage, int half) {
    copy_stage<kPasses, kLanes>(a, w, cache, page, start, [&](int pass, int) { return chunk(stage, half, pass); });
  };

  constexpr int kStep = kWarps * kKeys;
  int32_t start = w.begin + warp * kKeys;
  int32_t page = load_page(start);
  const int32_t second = load_page(start + kStep);
  // Which keys have a page, of this stage and the next.
  unsigned exists = __ballot_sync(kFullMask, page >= 0), exists_next = __ballot_sync(kFullMask, second >= 0);
  copy(keys, page, start, 0, 0);
  copy(values, page, start, 0, 1);
  page = load_page(start + 2 * kStep);
  copy(keys, second, start + kStep, 1, 0);
  copy(values, second, start + kStep, 1, 1);

  float acc[kRows][kWidth] = {};
  float row_max = -INFINITY, row_sum = 0.0f;  // of my row; the sum is of my scores alone
  for (int stage = 0; start < w.end; start += kStep, stage ^= 1) {
    float products[kRows * kPasses];
    cp_async::wait<3>();  // these keys; under way are the values, and the next stage's
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      Vector<T> vector;
      vector.bits = *chunk(stage, 0, pass);
      float k[kWidth];
      convert(k, vector);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += q[r][i] * k[i];
        products[r * kPasses + pass] = sum;
      }
    }
    scatter_sums<kLanes, kRows * kPasses>(products, lane);
    copy(keys, page, start + 2 * kStep, stage, 0);  // where the thread itself has read these, and nobody else has

    row.scale_products<kOwned>(products);
    float weights[kOwned], new_max = row_max;
#pragma unroll
    for (int o = 0; o < kOwned; ++o) {
      const int key = (my_pass + o) * kGroups + group;
      weights[o] = row.masked(products[o], start + key, exists >> key & 1);
      new_max = fmaxf(new_max, weights[o]);
    }
    exists = exists_next;
    exists_next = __ballot_sync(kFullMask, page >= 0);
#pragma unroll
    for (int distance = kSame; distance < kWarpSize; distance *= 2)
      if (distance < kRowLanes || distance >= kLanes) new_max = fmaxf(new_max, __shfl_xor_sync(kFullMask, new_max, distance));
    const float shift = finite_or_zero(new_max), fade = exp2f(row_max - shift);
    row_sum *= fade;
#pragma unroll
    for (int o = 0; o < kOwned; ++o) row_sum += weights[o] = exp2f(weights[o] - shift);
    if (__any_sync(kFullMask, new_max != row_max)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float factor = __shfl_sync(kFullMask, fade, r * kRowLanes);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) acc[r][i] *= factor;
      }
    }
    row_max = new_max;

    cp_async::wait<3>();  // these values; under way are the next stage, and the keys after it
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      Vector<T> vector;
      vector.bits = *chunk(stage, 1, pass);
      float v[kWidth];
      convert(v, vector);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int owner = group * kLanes + r * kRowLanes + pass / kOwned * kSame;
        const float weight = __shfl_sync(kFullMask, weights[pass % kOwned], owner);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) acc[r][i] += weight * v[i];
      }
    }
    copy(values, page, start + 2 * kStep, stage, 1);
    page = load_page(start + 3 * kStep);
  }

#pragma unroll
  for (int distance = kSame; distance < kWarpSize; distance *= 2)
    if (distance < kRowLanes || distance >= kLanes) row_sum += __shfl_xor_sync(kFullMask, row_sum, distance);
  Shared<kRows>& state = shared<Shared<kRows>>();
  if (group == 0 && lane % kRowLanes == 0) {
    state.row_max[warp][my_row] = row_max;
    state.row_sum[warp][my_row] = row_sum;
  }
  __syncthreads();  // no warp reads its stages any more, nor has a copy under way
  float* const parts = dynamic_shared<float>();
  static_assert(sizeof(float) * kWarps * kGroups * kRows * kLanes * kWidth <= kCoreBytes, "in the stages' place");
  static_assert(sizeof(float) * (kRows * kPagedMaxSplits + kThreads * kWidth) <= kCoreBytes, "the same for the merge");
#pragma unroll
  for (int r = 0; r < kRows; ++r) store_floats(parts + (((warp * kGroups + group) * kRows + r) * kLanes) * kWidth + col, acc[r]);
  __syncthreads();  // the parts of all warps
  finish<T, kRows, kLanes, kGroups>(a, w, parts, state);
}

// --------------------------------------------------------------------------------------------------------------------
// A tile of 16 rows, on tensor cores.

constexpr int kMmaRows = 16;
constexpr int kCopies = 8;                                                 // chunks of keys that a lane copies in a stage
constexpr int kStageChunks = kCopies * kWarpSize;                          // of a warp's keys, or values
constexpr int kMmaChunks = kStages * 2 * kWarps * kStageChunks;            // 64 KiB
constexpr size_t mma_bytes(int lanes) { return 16 * (size_t{kMmaChunks} + kMmaRows * lanes); }  // and the queries

// Where chunk `col` of a row of kLanes chunks lies: 8 rows' chunks of one column, which ldmatrix reads at a time, lie in different banks.
template <int kLanes>
__device__ __forceinline__ int swizzled(int row, int col) {
  return row * kLanes + (col ^ (row & 7));
}

// Scores are a product of 16 rows and a stage's keys, and the weights' product with its values follows in the same registers: what is rows
// and keys of c is the same of a. Keys and values of kLanes·8 entries, those past head_dim zeros, lie in stages of the warp's own.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 3) mma_kernel(const Args a) {
  constexpr int kDim = kLanes * 8, kKeys = kStageChunks / kLanes, kStep = kWarps * kKeys;
  const Work w(a, kMmaRows, kStep);
  if (w.is_nothing()) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Cache<T> keys = {static_cast<const T*>(a.k_cache) + w.kv_head * a.stride_kh, a.stride_kp, a.stride_ks};
  const Cache<T> values = {static_cast<const T*>(a.v_cache) + w.kv_head * a.stride_vh, a.stride_vp, a.stride_vs};
  uint4* const memory = dynamic_shared<uint4>();
  const auto tile = [&](int stage, int half) { return memory + ((stage * 2 + half) * kWarps + warp) * kStageChunks; };

  const auto load_page = [&](int32_t start) { return lane < kKeys ? page_of(a, w, start + lane) : -1; };
  const auto copy = [&](const Cache<T>& cache, int32_t page, int32_t start, int stage, int half) {
    const auto target = [&](int, int key) { return tile(stage, half) + swizzled<kLanes>(key, lane % kLanes); };
    copy_stage<kCopies, kLanes>(a, w, cache, page, start, target);
  };

  int32_t start = w.begin + warp * kKeys;
  int32_t page = load_page(start);
  const int32_t second = load_page(start + kStep);
  // Which keys have a page, of this stage and the next.
  unsigned exists = __ballot_sync(kFullMask, page >= 0), exists_next = __ballot_sync(kFullMask, second >= 0);
  copy(keys, page, start, 0, 0);
  copy(values, page, start, 0, 1);
  page = load_page(start + 2 * kStep);
  copy(keys, second, start + kStep, 1, 0);
  copy(values, second, start + kStep, 1, 1);

  uint4* const queries = memory + kMmaChunks;
  for (int n = threadIdx.x; n < kMmaRows * kLanes; n += kThreads) {
    const int row = n / kLanes, col = n % kLanes;
    const bool is_there = row < w.num_rows && col * 8 < a.head_dim;
    const T* from = is_there ? Row(a, w, row).q<T>(a, w) + col * 8 : nullptr;
    queries[swizzled<kLanes>(row, col)] = load_vector(from, is_there ? 8 : 0, is_aligned(from)).bits;
  }
  __syncthreads();  // all queries

  const Row rows[2] = {Row(a, w, lane / 4), Row(a, w, lane / 4 + 8)};
  float acc[kDim / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};  // the sums are of this lane's scores alone
  for (int stage = 0; start < w.end; start += kStep, stage ^= 1) {
    float scores[kKeys / 8][4] = {};
    cp_async::wait<3>();  // these keys; under way are the values, and the next stage's
    __syncwarp();         // all lanes' copies
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t q[4];  // loaded anew each time: they would fill 32 registers that the keys' addresses need
      mma::load_tiles(q, queries + swizzled<kLanes>(lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        uint32_t both[4];  // keys 8·n and 8 more, of 16 entries
        mma::load_tiles(both, tile(stage, 0) + swizzled<kLanes>(n * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        mma::multiply<T>(scores[n], q, {both[0], both[1]});
        mma::multiply<T>(scores[n + 1], q, {both[2], both[3]});
      }
    }
    __syncwarp();  // no lane reads these keys any more
    copy(keys, page, start + 2 * kStep, stage, 0);

    rows[0].scale_products<kKeys / 2>(scores[0]);
    float new_max[2] = {row_max[0], row_max[1]};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = n * 8 + lane % 4 * 2 + i % 2;
        scores[n][i] = rows[i / 2].masked(scores[n][i], start + key, exists >> key & 1);
        new_max[i / 2] = fmaxf(new_max[i / 2], scores[n][i]);
      }
    }
    exists = exists_next;
    exists_next = __ballot_sync(kFullMask, page >= 0);
    float shift[2], fade[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      new_max[half] = fmaxf(new_max[half], __shfl_xor_sync(kFullMask, new_max[half], 1));
      new_max[half] = fmaxf(new_max[half], __shfl_xor_sync(kFullMask, new_max[half], 2));
      shift[half] = finite_or_zero(new_max[half]);
      fade[half] = exp2f(row_max[half] - shift[half]);
      row_sum[half] *= fade[half];
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row_sum[i / 2] += scores[n][i] = exp2f(scores[n][i] - shift[i / 2]);
    }
    if (__any_sync(kFullMask, new_max[0] != row_max[0] || new_max[1] != row_max[1])) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[n][i] *= fade[i / 2];
      }
    }
    row_max[0] = new_max[0];
    row_max[1] = new_max[1];

    cp_async::wait<3>();  // these values; under way are the next stage, and the keys after it
    __syncwarp();         // all lanes' copies
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const float(&low)[4] = scores[2 * k], (&high)[4] = scores[2 * k + 1];
      const uint32_t weights[4] = {mma::pack<T>(low[0], low[1]), mma::pack<T>(low[2], low[3]), mma::pack<T>(high[0], high[1]),
                                   mma::pack<T>(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t both[4];  // 16 keys, of entries 8·n and 8 more
        mma::load_tiles_transposed(both, tile(stage, 1) + swizzled<kLanes>(k * 16 + lane % 16, n + lane / 16));
        mma::multiply<T>(acc[n], weights, {both[0], both[1]});
        mma::multiply<T>(acc[n + 1], weights, {both[2], both[3]});
      }
    }
    __syncwarp();  // no lane reads these values any more
    copy(values, page, start + 2 * kStep, stage, 1);
    page = load_page(start + 3 * kStep);
  }

  Shared<kMmaRows>& state = shared<Shared<kMmaRows>>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row_sum[half] += __shfl_xor_sync(kFullMask, row_sum[half], 1);
    row_sum[half] += __shfl_xor_sync(kFullMask, row_sum[half], 2);
    if (lane % 4 == 0) {
      state.row_max[warp][lane / 4 + half * 8] = row_max[half];
      state.row_sum[warp][lane / 4 + half * 8] = row_sum[half];
    }
  }
  __syncthreads();  // no warp reads its stages any more, nor has a copy under way
  float* const parts = dynamic_shared<float>();
  static_assert(sizeof(float) * kWarps * kMmaRows * kDim <= 16 * size_t{kMmaChunks}, "in the stages' place");
  static_assert(sizeof(float) * (kMmaRows * kPagedMaxSplits + kThreads * 8) <= 16 * size_t{kMmaChunks}, "the same for the merge");
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(parts + (warp * kMmaRows + lane / 4 + half * 8) * kDim + n * 8 + lane % 4 * 2) =
          float2{acc[n][half * 2], acc[n][half * 2 + 1]};
  }
  __syncthreads();  // the parts of all warps
  finish<T, kMmaRows, kLanes, 1>(a, w, parts, state);
}

// --------------------------------------------------------------------------------------------------------------------
// The launcher.

int64_t rows_of(const PagedAttentionParams& p) { return p.num_kv_heads == 0 ? 0 : p.seqlen_q * (p.num_heads / p.num_kv_heads); }

// Whether tensor cores take more than two rows. Static: a key of head dim 128 takes a warp 61, 73 and 96 instructions for 1, 2 and 4 rows on
// CUDA cores (sm_90's SASS), and 60 for 16 on tensor cores. An H100's memory leaves its multiprocessors time for some 130.
template <class T>
constexpr bool has_mma(int64_t head_dim) {
  return sizeof(T) == 2 && head_dim <= 128;
}

template <class T, int kLanes>
cudaError_t launch_cores(const Args& a, unsigned blocks, cudaStream_t stream) {
  const auto run = [&](void (*kernel)(Args)) { return launch(kernel, dim3(blocks), dim3(kThreads), kCoreBytes, stream, a); };
  if (a.tile_rows == 1) return run(cores_kernel<T, kLanes, 1>);
  if (a.tile_rows == 2) return run(cores_kernel<T, kLanes, 2>);
  if constexpr (!has_mma<T>(kLanes * kVectorSize<T>)) {
    if (a.tile_rows == 4) return run(cores_kernel<T, kLanes, 4>);
    if (a.tile_rows == 8) return run(cores_kernel<T, kLanes, 8>);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_mma(const Args& a, unsigned blocks, cudaStream_t stream) {
  if (a.head_dim <= 64) return launch(mma_kernel<T, 8>, dim3(blocks), dim3(kThreads), mma_bytes(8), stream, a);
  return launch(mma_kernel<T, 16>, dim3(blocks), dim3(kThreads), mma_bytes(16), stream, a);
}

template <class T>
cudaError_t launch_tiles(const Args& a, unsigned blocks, cudaStream_t stream) {
  if constexpr (has_mma<T>(0))
    if (a.tile_rows == kMmaRows && has_mma<T>(a.head_dim)) return launch_mma<T>(a, blocks, stream);
  const int64_t chunks = a.head_dim / kVectorSize<T>;
  if (chunks <= 8) return launch_cores<T, 8>(a, blocks, stream);
  if (chunks <= 16) return launch_cores<T, 16>(a, blocks, stream);
  if (chunks <= 32) return launch_cores<T, 32>(a, blocks, stream);
  return cudaErrorInvalidValue;
}

// Whether rows that lie at these strides begin at multiples of 16 bytes, `width` entries. Strides of dims of one entry may be anything.
bool are_rows_aligned(const PagedAttentionParams& p, const void* cache, int64_t page, int64_t row, int64_t head, int width) {
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || (stride >= 0 && stride % width == 0); };
  return is_aligned(cache) && fits(p.num_pages, page) && fits(p.page_size, row) && fits(p.num_kv_heads, head);
}

}  // namespace

int32_t paged_attention_tile_rows(int64_t rows, int64_t head_dim, Dtype dtype) {
  if (rows <= 2) return rows <= 1 ? 1 : 2;
  if (dtype == Dtype::kFloat32 ? has_mma<float>(head_dim) : has_mma<__half>(head_dim)) return kMmaRows;
  return rows <= 4 ? 4 : 8;
}

int64_t paged_attention_tiles(const PagedAttentionParams& p) {
  return p.batch * p.num_kv_heads * ((rows_of(p) + p.tile_rows - 1) / p.tile_rows);
}

int32_t paged_attention_num_splits(const PagedAttentionParams& p, int num_multiprocessors, int64_t shared_memory) {
  constexpr int64_t kMinSteps = 4;  // of a split: below that its start and its share of the merge cost more than it saves
  const int64_t chunks = (p.head_dim * (p.dtype == Dtype::kFloat32 ? 4 : 2) + 15) / 16;
  const int64_t lanes = chunks <= 8 ? 8 : chunks <= 16 ? 16 : 32;
  const bool is_mma = p.tile_rows == kMmaRows;
  const int64_t step = kWarps * (is_mma ? kStageChunks : kPasses * kWarpSize) / lanes;
  const int64_t bounds = is_mma ? 3 : p.tile_rows < 4 ? 4 : p.tile_rows == 4 ? 3 : 2;  // of the kernels' __launch_bounds__
  constexpr int64_t kReserved = 2 << 10;                                               // of shared memory, for static ones and the driver
  const int64_t room = shared_memory / (static_cast<int64_t>(is_mma ? mma_bytes(static_cast<int>(lanes)) : kCoreBytes) + kReserved);
  const int64_t resident = room < 1 ? 1 : room < bounds ? room : bounds;
  const int64_t slots = num_multiprocessors * resident, tiles = paged_attention_tiles(p);
  const int64_t capacity = p.page_size > 0 && p.max_pages > kPagedMaxKeys / p.page_size ? kPagedMaxKeys : p.max_pages * p.page_size;
  int64_t most = capacity / (step * kMinSteps) < kPagedMaxSplits ? capacity / (step * kMinSteps) : kPagedMaxSplits;
  while (most > 1 && most * most * p.tile_rows > capacity) --most;  // one block merges a tile's splits: no more rows than a split has keys
  static thread_local struct {
    int64_t tiles, slots, most;
    int32_t splits;
  } known = {};  // a model's layers ask the same, and the answer takes microseconds
  if (known.tiles == tiles && known.slots == slots && known.most == most && known.splits > 0) return known.splits;
  // Blocks run in waves of `slots`, and a last wave that is not full takes as long as one that is.
  const auto share_busy = [&](int64_t splits) {
    const double waves = static_cast<double>(tiles * splits) / static_cast<double>(slots);
    return waves / static_cast<double>((tiles * splits + slots - 1) / slots);
  };
  double best = 0.0;
  for (int64_t n = 1; n <= most; ++n) best = share_busy(n) > best ? share_busy(n) : best;
  int64_t splits = 1;
  while (splits < most && share_busy(splits) < 0.85 * best) ++splits;
  known = {tiles, slots, most, static_cast<int32_t>(splits)};
  return known.splits;
}

cudaError_t paged_attention(const PagedAttentionParams& p, cudaStream_t stream) {
  for (const int64_t size : {p.batch, p.seqlen_q, p.total_q, p.num_heads, p.num_kv_heads, p.num_pages, p.max_pages})
    if (size < 0) return cudaErrorInvalidValue;
  const bool is_float32 = p.dtype == Dtype::kFloat32;
  if (!is_float32 && p.dtype != Dtype::kFloat16 && p.dtype != Dtype::kBFloat16) return cudaErrorInvalidValue;
  const int width = is_float32 ? 4 : 8;
  if (p.head_dim <= 0 || p.head_dim % width != 0 || p.page_size <= 0) return cudaErrorInvalidValue;
  if (p.num_kv_heads == 0 || p.num_heads % p.num_kv_heads != 0) return cudaErrorInvalidValue;
  if (!are_rows_aligned(p, p.k_cache, p.stride_kp, p.stride_ks, p.stride_kh, width)) return cudaErrorInvalidValue;
  if (!are_rows_aligned(p, p.v_cache, p.stride_vp, p.stride_vs, p.stride_vh, width)) return cudaErrorInvalidValue;
  if (p.tile_rows < 1 || p.num_splits < 1 || p.num_splits > kPagedMaxSplits) return cudaErrorInvalidValue;
  constexpr int64_t kMost = INT32_MAX;
  if (p.batch > kMost || p.num_heads > kMost || p.seqlen_q > kPagedMaxKeys || rows_of(p) > kPagedMaxKeys) return cudaErrorInvalidValue;
  const int64_t tiles_of_group = (rows_of(p) + p.tile_rows - 1) / p.tile_rows, pairs = p.batch * p.num_kv_heads;
  if (pairs == 0 || tiles_of_group == 0) return cudaSuccess;
  if (p.num_splits > 1 && (!p.partial_out || !is_aligned(p.partial_out) || !p.partial_lse || !p.counters)) return cudaErrorInvalidValue;
  if (pairs > kMost / p.num_splits / tiles_of_group) return cudaErrorInvalidValue;

  Args a;
  static_cast<PagedAttentionParams&>(a) = p;
  const int64_t page_size = p.page_size < kPagedMaxKeys ? p.page_size : kPagedMaxKeys;
  a.page_divider = Divider(static_cast<uint32_t>(page_size));
  a.group = static_cast<int32_t>(p.num_heads / p.num_kv_heads);
  a.num_tiles = static_cast<int32_t>(tiles_of_group);
  a.capacity = p.max_pages > kPagedMaxKeys / page_size ? kMostKeys : static_cast<int32_t>(p.max_pages * page_size);
  const auto clamped = [](int64_t bound, int64_t most) { return static_cast<int32_t>(min(max(bound, -most), most)); };
  a.left = clamped(p.window_left, kMostKeys);
  a.right = clamped(p.window_right, kMostKeys - 1);
  const bool is_capped = p.softcap > 0.0f;
  a.score_scale = is_capped ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2E;
  a.cap = is_capped ? p.softcap * kLog2E : 0.0f;
  const unsigned blocks = static_cast<unsigned>(pairs * tiles_of_group * p.num_splits);
  return with_float(p.dtype, [&](auto type) { return launch_tiles<typename decltype(type)::type>(a, blocks, stream); });
}

}  // namespace fastattn
