// New keys and values into a paged cache, in one launch: keys rotated on the way if tables are given, both quantised if the cache is.
//
//   cache[page_table[b, p / page_size], p % page_size] = quantised(rotated(x_i, p) / scale),    p = cache_seqlens[b] + i
//
// in fp32, rounded once. A row is one head of one token. A thread has kColumns of it twice: both columns of the pairs that it turns, or,
// where nothing is turned, some of each half of what there is, so that neighbours in a warp are neighbours in memory. It loads them first
// and then looks up where they go, which takes several loads one after another: sequence, length, page and angles.
//
// Whatever the index tensors hold, a slot outside the page table or the cache is not written, and a position outside the tables not turned.
// Floor: (k.numel + v.numel)·(itemsize of k + itemsize of the cache) bytes.

#include "append_paged_kv.hpp"

#include "../common/quantised.hpp"

namespace fastattn {
namespace {

constexpr int kThreads = 128;  // of a block, at most: a decode step's few rows make many blocks
constexpr int kMaxHeadDim = 512;

// At least 16 bytes of k, of the tables and of the cache, whatever their dtypes are.
template <class Cache>
inline constexpr int kColumns = sizeof(Cache) == 1 ? 16 : 8;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How many threads have a row of which `rotary_dim` columns are turned.
template <int kColumns>
__host__ __device__ constexpr int threads_of_row(int head_dim, int rotary_dim) {
  return ceil_div(rotary_dim / 2, kColumns) + ceil_div(head_dim - rotary_dim, 2 * kColumns);
}

// What a thread has of a row: columns from `first` on, before first_end, and from `second` on, before second_end. With `angle` ≥ 0 they are
// pairs, to be turned by the angles from that column of the tables on.
struct Share {
  int first, first_end, second, second_end, angle;
};

template <int kColumns>
__device__ __forceinline__ Share share_of_thread(int thread, int head_dim, int rotary_dim, bool interleaved) {
  const int half = rotary_dim / 2, turning = ceil_div(half, kColumns);
  if (thread < turning) {
    const int angle = thread * kColumns;
    if (interleaved) return {2 * angle, rotary_dim, 2 * angle + kColumns, rotary_dim, angle};
    return {angle, half, half + angle, rotary_dim, angle};
  }
  const int first = rotary_dim + (thread - turning) * kColumns;
  const int second = first + ceil_div(head_dim - rotary_dim, 2 * kColumns) * kColumns;
  return {first, head_dim, second, head_dim, -1};
}

// Where a new token belongs; a position below 0: nowhere.
struct Place {
  int64_t sequence, position;
};

// Of `token` of the batch's `sequence`, or of all packed ones. Those are in the sequence whose start is the last entry of cu_seqlens that
// is not past them, by bisection among its entries whatever they hold.
__device__ __forceinline__ Place place_of_token(const AppendPagedKvParams& p, int64_t sequence, int64_t token) {
  if (p.cu_seqlens != nullptr) {
    int64_t low = 0, high = p.num_seqs;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (p.cu_seqlens[middle] <= token)
        low = middle;
      else
        high = middle - 1;
    }
    if (low == p.num_seqs) return {0, -1};  // past the last one's end
    sequence = low;
    token -= max(p.cu_seqlens[low], 0);
    if (token < 0) return {0, -1};  // before the first one's start
  }
  return {sequence, p.cache_seqlens[sequence] + token};
}

// Entry `entry` of a sequence's page table; −1 past its end.
__device__ __forceinline__ int32_t page_of_entry(const AppendPagedKvParams& p, int64_t sequence, int64_t entry) {
  return entry < p.max_pages ? p.page_table[sequence * p.stride_page_table + entry] : -1;
}

template <int N>
__device__ __forceinline__ void load_angles(float (&angles)[N], const void* table, Dtype dtype, int64_t at, int count) {
  const auto load_from = [&](auto* from) { load(angles, from + at, count, is_aligned(from + at)); };
  if (dtype == Dtype::kFloat32)
    load_from(static_cast<const float*>(table));
  else if (dtype == Dtype::kFloat16)
    load_from(static_cast<const __half*>(table));
  else
    load_from(static_cast<const __nv_bfloat16*>(table));
}

__device__ __forceinline__ void turn_pair(float& x1, float& x2, float cos, float sin) {
  const float y1 = x1 * cos - x2 * sin;
  x2 = x2 * cos + x1 * sin;
  x1 = y1;
}

// The pairs of N angles: (first[i], second[i]), or adjacent ones of first and then second.
template <int N>
__device__ __forceinline__ void turn(float (&first)[N], float (&second)[N], const float (&cos)[N], const float (&sin)[N],
                                     bool interleaved) {
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      turn_pair(first[2 * i], first[2 * i + 1], cos[i], sin[i]);
      turn_pair(second[2 * i], second[2 * i + 1], cos[N / 2 + i], sin[N / 2 + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) turn_pair(first[i], second[i], cos[i], sin[i]);
  }
}

// N entries as they were loaded, of which nothing is made yet.
template <class T, int N>
struct Vectors {
  Vector<T> parts[N / kVectorSize<T>];

  __device__ __forceinline__ Vectors(const T* from, int count) {
    const bool aligned = is_aligned(from);
#pragma unroll
    for (int i = 0; i < N / kVectorSize<T>; ++i)
      parts[i] = load_vector(from + i * kVectorSize<T>, count - i * kVectorSize<T>, aligned);
  }

  __device__ __forceinline__ void to_floats(float (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(parts[i / kVectorSize<T>].lanes[i % kVectorSize<T>]);
  }
};

// blockDim = (threads of a row of k and of v, rows).
template <class T, class Cache>
__global__ void __launch_bounds__(kThreads) append_paged_kv_kernel(const AppendPagedKvParams p) {
  constexpr int N = kColumns<Cache>;
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  const auto num_heads = static_cast<uint32_t>(p.num_heads), seqlen = static_cast<uint32_t>(p.seqlen);
  if (row >= p.batch * p.seqlen * p.num_heads) return;
  const int64_t head = row % num_heads, batch = row / num_heads / seqlen, token = row / num_heads % seqlen;

  const int head_dim = static_cast<int>(p.head_dim), rotary_dim = static_cast<int>(p.rotary_dim);
  const int thread = threadIdx.x, k_threads = threads_of_row<N>(head_dim, rotary_dim);
  const bool is_k = thread < k_threads;
  const Share share = is_k ? share_of_thread<N>(thread, head_dim, rotary_dim, p.interleaved)
                           : share_of_thread<N>(thread - k_threads, static_cast<int>(p.head_dim_v), 0, false);
  const T* x = is_k ? static_cast<const T*>(p.k) + batch * p.stride_kb + token * p.stride_ks + head * p.stride_kh
                    : static_cast<const T*>(p.v) + batch * p.stride_vb + token * p.stride_vs + head * p.stride_vh;
  const Vectors<T, N> loaded_first(x + share.first, share.first_end - share.first);
  const Vectors<T, N> loaded_second(x + share.second, share.second_end - share.second);

  const Place place = place_of_token(p, batch, token);
  if (place.position < 0) return;
  const auto position = static_cast<uint32_t>(place.position), page_size = static_cast<uint32_t>(p.page_size);  // below 2·2^31
  const int64_t page = page_of_entry(p, place.sequence, position / page_size);  // on its way while pairs turn
  const int64_t slot = position % page_size;
  float first[N], second[N];
  loaded_first.to_floats(first);
  loaded_second.to_floats(second);
  if (share.angle >= 0 && position < p.table_len) {
    float cos[N], sin[N];
    load_angles(cos, p.cos, p.table_dtype, position * p.stride_cos + share.angle, rotary_dim / 2 - share.angle);
    load_angles(sin, p.sin, p.table_dtype, position * p.stride_sin + share.angle, rotary_dim / 2 - share.angle);
    turn(first, second, cos, sin, p.interleaved);
  }
  if (page < 0 || page >= p.num_pages) return;
  if (const float* scales = is_k ? p.k_scale : p.v_scale; scales != nullptr) {
    const float scale = scales[head];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      first[i] = __fdiv_rn(first[i], scale);
      second[i] = __fdiv_rn(second[i], scale);
    }
  }
  Cache* to = is_k ? static_cast<Cache*>(p.k_cache) + page * p.stride_kcp + slot * p.stride_kcs + head * p.stride_kch
                   : static_cast<Cache*>(p.v_cache) + page * p.stride_vcp + slot * p.stride_vcs + head * p.stride_vch;
  store(to + share.first, first, share.first_end - share.first, is_aligned(to + share.first));
  store(to + share.second, second, share.second_end - share.second, is_aligned(to + share.second));
}

template <class T, class Cache>
cudaError_t launch_append(const AppendPagedKvParams& p, cudaStream_t stream) {
  constexpr int N = kColumns<Cache>;
  static_assert(threads_of_row<N>(kMaxHeadDim, 2) + threads_of_row<N>(kMaxHeadDim, 0) <= kThreads, "a block has the widest row");
  const int threads = threads_of_row<N>(static_cast<int>(p.head_dim), static_cast<int>(p.rotary_dim)) +
                      threads_of_row<N>(static_cast<int>(p.head_dim_v), 0);
  const int rows = kThreads / threads;
  const int64_t blocks = (p.batch * p.seqlen * p.num_heads + rows - 1) / rows;
  return launch(append_paged_kv_kernel<T, Cache>, dim3(static_cast<unsigned>(blocks)), dim3(threads, rows), 0, stream, p);
}

template <class T>
cudaError_t launch_append(const AppendPagedKvParams& p, cudaStream_t stream) {
  switch (p.cache_dtype) {
    case Dtype::kFloat32: return launch_append<T, float>(p, stream);
    case Dtype::kFloat16: return launch_append<T, __half>(p, stream);
    case Dtype::kBFloat16: return launch_append<T, __nv_bfloat16>(p, stream);
    case Dtype::kInt8: return launch_append<T, int8_t>(p, stream);
    case Dtype::kFloat8E4M3: return launch_append<T, Float8E4M3>(p, stream);
  }
  return cudaErrorInvalidValue;
}

bool is_float(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16; }

// What the kernel counts in 32 bits fits there.
bool takes(const AppendPagedKvParams& p) {
  for (const int64_t size : {p.batch, p.seqlen, p.num_heads, p.num_seqs, p.num_pages, p.page_size, p.max_pages, p.table_len})
    if (size < 0 || size > INT32_MAX) return false;
  for (const int64_t head_dim : {p.head_dim, p.head_dim_v})
    if (head_dim < 1 || head_dim > kMaxHeadDim) return false;
  if (p.page_size < 1 || (p.cu_seqlens == nullptr ? p.num_seqs != p.batch : p.batch != 1)) return false;
  if (p.rotary_dim < 0 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0) return false;
  if (p.rotary_dim > 0 && (p.cos == nullptr || p.sin == nullptr || !is_float(p.table_dtype))) return false;
  const int64_t tokens = p.batch * p.seqlen;
  return tokens <= INT32_MAX && tokens * p.num_heads <= INT32_MAX;
}

}  // namespace

cudaError_t append_paged_kv(const AppendPagedKvParams& params, cudaStream_t stream) {
  if (!takes(params)) return cudaErrorInvalidValue;
  if (params.batch == 0 || params.seqlen == 0 || params.num_heads == 0 || params.num_pages == 0) return cudaSuccess;
  return with_float(params.dtype, [&](auto type) { return launch_append<typename decltype(type)::type>(params, stream); });
}

}  // namespace fastattn
