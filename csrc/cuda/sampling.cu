// Drawing a token from each row of logits, without sorting the vocabulary.
//
//   w = exp((x − max x) / temperature)        p = w / Σ w over the tokens kept
//
// Tokens are kept in order of x, ties to the lower id: the top_k first; of those the fewest whose mass reaches top_p of theirs; of those
// the ones with w ≥ min_p. It is the algorithm of kernels/sampling.py, with its groups of columns and its draw, so that equal seeds give
// equal tokens; a block has a row, which it reads from memory once and from L2 after that:
//
// 1. A walk over the row gives the maximum of each group of columns, and its sum of w where nothing is cut by a count.
// 2. A cut is a threshold on x, searched for between two bounds: the tokens from `hi` up are too few, those from `lo` up enough. A probe
//    is a walk that counts and weighs the tokens between a threshold and hi, and collects the first kCandidates in order of their ids. The
//    first threshold is one that half to seven eighths of the groups' maxima reach: most often the tokens that reach it are enough, and
//    fit. Else the bounds close in until what lies between them fits, or is of one value.
// 3. The rest of the search takes place in shared memory and registers, on those candidates alone.
// 4. Where the candidates hold all that is kept, the token is drawn from them, else from the whole row, by group and then within it.
//
// Masses are integers in units of 2^-40, which add up without error in any order: no order of threads changes a bit, and a candidate's mass
// is exact to its w. What is not: the sum of w of a group of columns, fp32 as in Triton but added in another order. So the two kernels keep
// the same tokens and draw the same one, but where a top_p of the whole vocabulary or the draw of a group is within 2^-22 of another one.
//
// Floor: numel·itemsize bytes. A walk is bound by one SM's share of L2, 64 bytes a cycle, or by 8 instructions an element where it has to
// exponentiate. Walks: 1 without a cut, 2 with min_p alone or with a cut that the first probe brackets (any top_k up to half the number of
// groups, which is 1024, of fp32 512; a top_p that as many of the likeliest tokens reach), fewer than 70 for any input, as every second
// threshold halves the 32-bit keys between the bounds.
// Barriers: 1 each four tiles of a probe, and 1 for each step of a search.

#include "sampling.hpp"

#include "../common/approx.hpp"
#include "../common/order.hpp"
#include "../common/philox.hpp"
#include "../common/reduce.hpp"
#include "../common/vector.hpp"

namespace fastattn {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGroupColumns = 8;                      // of a group in each tile
constexpr int kTiles = 4;                             // under way at once
constexpr int kCandidates = 4096;
constexpr int kOwn = kCandidates / kThreads;  // candidates of a thread
constexpr int kLowest = -2139095040;          // the key of the lowest finite float
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kUnit = 1099511627776.0f;  // 2^40: what w = 1 weighs
constexpr int64_t kNoGoal = INT64_MAX;

template <class T>
inline constexpr int kTile = kThreads * kVectorSize<T>;  // columns: 16 bytes a thread
template <class T>
inline constexpr int kGroupThreads = kGroupColumns / kVectorSize<T>;

// What a block adds up: how many, their mass, and the least and the most of some keys.
struct Tally {
  int64_t mass;
  int count, least, most;
};
__device__ __forceinline__ Tally nothing() { return {0, 0, INT32_MAX, INT32_MIN}; }

struct Shared {
  Tally tallies[2][kWarps];  // of two reductions in turn, here and below: none overwrites what is still read
  int64_t masses[2][kWarps];
  int numbers[2][kWarps];
  uint2 counts[2][kWarps];  // of four tiles, how many tokens a probe finds in each, in 16 bits each
  alignas(16) float x[kCandidates];
  alignas(16) int id[kCandidates];
  float edge[2 * kGroupColumns];  // the row's entries before and after its body, else −infinity
  uint64_t seed;  // and the counter, of the row's draw
  unsigned counter;
  int last_tie;
  float group_sum;
  int group;
};

// --------------------------------------------------------------------------------------------------------------------
// Reductions over the block, each in every thread. All threads must call.

struct Block {
  Shared& s;
  int turn = 0;

  __device__ __forceinline__ Tally sum(const Tally& own) {
    return reduce(s.tallies, own, [](const Tally& t) -> Tally {
      return {warp_sum(t.mass), __reduce_add_sync(kFullMask, t.count), __reduce_min_sync(kFullMask, t.least),
              __reduce_max_sync(kFullMask, t.most)};
    });
  }
  __device__ __forceinline__ int64_t sum(int64_t mass) {
    return reduce(s.masses, mass, [](int64_t mass) { return warp_sum(mass); });
  }
  __device__ __forceinline__ int sum(int number) {
    return reduce(s.numbers, number, [](int number) { return __reduce_add_sync(kFullMask, number); });
  }
  __device__ __forceinline__ int most(int number) {
    return reduce(s.numbers, number, [](int number) { return __reduce_max_sync(kFullMask, number); });
  }

  // The sum over the threads before this one, and over all.
  __device__ __forceinline__ int64_t sum_before(int64_t own, int64_t& total) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int64_t up_to = warp_prefix_sum(own);
    turn ^= 1;
    if (lane == kWarpSize - 1) s.masses[turn][warp] = up_to;
    __syncthreads();
    const int64_t of_warp = s.masses[turn][lane];
    total = warp_sum(of_warp);
    return warp_sum(lane < warp ? of_warp : int64_t{0}) + up_to - own;
  }

 private:
  template <class V, class F>
  __device__ __forceinline__ V reduce(V (&partials)[2][kWarps], const V& own, const F& over_warp) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const V of_warp = over_warp(own);
    turn ^= 1;
    if (lane == 0) partials[turn][warp] = of_warp;
    __syncthreads();
    return over_warp(partials[turn][lane]);
  }
};

// --------------------------------------------------------------------------------------------------------------------
// A row.

// Its body is what 16-byte loads reach, beginning at a group's multiple of entries from the tensor's start; the edges lie before and after
// it. Where the tensor does not begin at a multiple of 16 bytes, the body is the whole row, loaded entry by entry.
template <class T>
struct Row {
  const SampleParams& p;
  const T* x;
  int first, length;  // the body's first column, and how many it has

  __device__ __forceinline__ Row(const SampleParams& p, int64_t row) : p(p), x(static_cast<const T*>(p.logits) + row * p.stride_x) {
    const int past = static_cast<int>((row * p.stride_x) & (kGroupColumns - 1));
    first = aligned() ? min((kGroupColumns - past) % kGroupColumns, num_cols()) : 0;
    length = aligned() ? (num_cols() - first) / kGroupColumns * kGroupColumns : num_cols();
  }

  // What the parameters say is asked each time: it takes no register.
  __device__ __forceinline__ int num_cols() const { return static_cast<int>(p.num_cols); }
  __device__ __forceinline__ bool aligned() const { return is_aligned(p.logits); }

  // The column of the edge's lane, or num_cols.
  __device__ __forceinline__ int edge_col(int lane) const {
    if (lane < kGroupColumns) return lane < first ? lane : num_cols();
    return min(first + length + lane - kGroupColumns, num_cols());
  }

  __device__ __forceinline__ float at(int col) const { return col < num_cols() ? to_float(x[col]) : -INFINITY; }

  // The body from `offset` on, −infinity past its end.
  __device__ __forceinline__ Vector<T> load(int offset) const {
    const T* from = x + first + offset;
    Vector<T> vector;
    if (aligned() && offset < length) {
      vector.bits = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) vector.lanes[i] = offset + i < length ? from[i] : from_float<T>(-INFINITY);
    }
    return vector;
  }

  // f(vector, its offset into the body, turn) for all of this thread's, kTiles under way at once; all threads have as many.
  template <class F>
  __device__ __forceinline__ void walk(const F& f) const {
    const int own = threadIdx.x * kVectorSize<T>;
    for (int start = 0; start < length; start += kTiles * kTile<T>) {
      Vector<T> vectors[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) vectors[tile] = load(start + tile * kTile<T> + own);
      f(vectors, start + own);
    }
  }
};

// What weighs a token, and what is kept: above the threshold, or on it up to the column last_tie, and of a w of min_p or more.
struct Weights {
  float row_max, scale, min_p;  // scale = log2e / temperature
  float threshold;
  int last_tie;

  __device__ __forceinline__ float weight(float x, float shift) const { return exp2_approx((x - shift) * scale); }
  __device__ __forceinline__ float weight(float x) const { return weight(x, row_max); }

  __device__ __forceinline__ float kept(float x, int col) const {
    const float w = weight(x);
    return w >= min_p && (x > threshold || (x == threshold && col <= last_tie)) ? w : 0.0f;
  }
};

// Mass in units of 2^-40. Where no parameter is out of range, a weight is 1 at most, and a group's sum the number of its tokens; so that
// elsewhere too no sum overflows.
__device__ __forceinline__ int64_t share(float weight, float most = 1.0f) { return static_cast<int64_t>(fminf(weight, most) * kUnit); }
template <class T>
__device__ __forceinline__ int64_t share_of_group(float sum) {
  return share(sum, static_cast<float>(kMaxSampledColumns / (kThreads / kGroupThreads<T>)));
}

// The least mass that is `top_p` of `mass`.
__device__ __forceinline__ int64_t goal_of(float top_p, int64_t mass) {
  return static_cast<int64_t>(ceil(static_cast<double>(fmaxf(top_p, 0.0f)) * static_cast<double>(mass)));
}

// A key strictly between two that are not neighbours: of the middle value, or at odd steps the middle of the keys. Values halve what is left
// of a spread of logits, keys that of a range whose ends are far off, as masks of −1e9 are.
__device__ __forceinline__ int between(int lo, int hi, int step) {
  const int key = step % 2 == 0 ? float_key(0.5f * key_float(lo) + 0.5f * key_float(hi)) : (lo & hi) + ((lo ^ hi) >> 1);
  return min(max(key, lo + 1), hi - 1);
}

// The sum over the threads that have a group, in each.
template <class T>
__device__ __forceinline__ float group_sum(float value) {
  if constexpr (kGroupThreads<T> == 2) value += __shfl_xor_sync(kFullMask, value, 1);
  return value;
}
template <class T>
__device__ __forceinline__ bool leads_group() {
  return threadIdx.x % kGroupThreads<T> == 0;
}

// --------------------------------------------------------------------------------------------------------------------
// The search.

// A key that half to seven eighths of the groups with a token in them reach. group_max: of this thread's group, in its leader; else −inf.
__device__ __forceinline__ int first_threshold(Block& block, float group_max, float row_max) {
  const bool has_token = group_max > -INFINITY;
  const Tally all = block.sum(Tally{0, has_token, float_key(has_token ? group_max : row_max), 0});
  int lo = all.least, hi = float_key(row_max) + 1, key = lo, reached = all.count;
  for (int step = 0; hi > lo + 1 && (8 * reached > 7 * all.count || 2 * reached < all.count); ++step) {
    key = between(lo, hi, step);
    reached = block.sum(static_cast<int>(group_max >= key_float(key)));
    (2 * reached < all.count ? hi : lo) = key;
  }
  return 2 * reached < all.count ? lo : key;
}

// Of the tokens low ≤ x < high, in every thread; and in shared memory those of them, in order of their ids, but for the first `skip` and as
// many as fit.
template <class T>
__device__ __forceinline__ Tally probe(Block& block, const Row<T>& row, const Weights& weights, float low, float high, int skip) {
  Shared& s = block.s;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  Tally own = nothing();
  const auto weigh = [&](float x) {
    own.mass += share(weights.weight(x));
    own.least = min(own.least, float_key(x));
  };
  const auto collect = [&](int place, float x, int id) {
    if (place < 0 || place >= kCandidates) return;
    s.x[place] = x;
    s.id[place] = id;
  };
  const float edge_x = lane < 2 * kGroupColumns ? s.edge[lane] : -INFINITY;
  const unsigned edges = __ballot_sync(kFullMask, edge_x >= low && edge_x < high), before = edges & ((1u << kGroupColumns) - 1);
  int count = __popc(before), turn = 0;

  row.walk([&](const Vector<T>(&vectors)[kTiles], int offset) {
    unsigned inside = 0;    // a bit for each token, 8 for each tile
    uint2 number = {0, 0};  // how many they are, 16 bits for each tile
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) {
        const float x = to_float(vectors[tile].lanes[i]);
        inside |= static_cast<unsigned>(x >= low && x < high) << (tile * 8 + i);
      }
      (tile < 2 ? number.x : number.y) += static_cast<unsigned>(__popc(inside >> (tile * 8) & 0xff)) << (tile % 2 * 16);
    }
    const uint2 up_to = {static_cast<unsigned>(warp_prefix_sum(static_cast<int>(number.x))),
                         static_cast<unsigned>(warp_prefix_sum(static_cast<int>(number.y)))};
    turn ^= 1;
    if (lane == kWarpSize - 1) s.counts[turn][warp] = up_to;
    __syncthreads();  // all warps' counts are there, and nobody reads the candidates of an earlier probe
    const uint2 of_warp = s.counts[turn][lane];
    const bool is_before = lane < warp;
    const unsigned all_x = __reduce_add_sync(kFullMask, of_warp.x), all_y = __reduce_add_sync(kFullMask, of_warp.y);
    const unsigned place_x = __reduce_add_sync(kFullMask, is_before ? of_warp.x : 0u) + up_to.x - number.x;
    const unsigned place_y = __reduce_add_sync(kFullMask, is_before ? of_warp.y : 0u) + up_to.y - number.y;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int shift = tile % 2 * 16;
      int place = count - skip + static_cast<int>((tile < 2 ? place_x : place_y) >> shift & 0xffff);
      for (unsigned left = inside >> (tile * 8) & 0xff; left != 0; left &= left - 1) {
        const int col = row.first + offset + tile * kTile<T> + __ffs(static_cast<int>(left)) - 1;
        const float x = to_float(row.x[col]);  // again, from L1: few are, and no register holds it until here
        weigh(x);
        collect(place++, x, col);
      }
      count += static_cast<int>((tile < 2 ? all_x : all_y) >> shift & 0xffff);
    }
  });

  if (warp == 0 && (edges >> lane & 1)) {
    weigh(edge_x);
    const int place = __popc(edges & ((1u << lane) - 1)) - skip + (lane < kGroupColumns ? 0 : count - __popc(before));
    collect(place, edge_x, row.edge_col(lane));
  }
  Tally all = block.sum(own);
  all.count = count + __popc(edges ^ before);
  return all;
}

// What a search has come to.
struct Bounds {
  int lo, count;     // of the tokens from lo up
  int64_t mass;
  int above;         // how many of them are no candidates, and lie above these
  int64_t mass_above;
  int held;          // how many are candidates
};

// Probes until the tokens between lo and hi fit the candidates or are of one value, beginning with `threshold`. Enough is a count of k or a
// mass of `goal`.
template <class T>
__device__ __forceinline__ void bracket(Block& block, const Row<T>& row, const Weights& weights, int threshold, Bounds& b, int& hi, int k,
                                        int64_t goal) {
  int most = b.count;  // tokens between lo and hi, at most
  b.above = 0, b.mass_above = 0;
  for (int step = 0;; ++step) {
    const bool last = hi <= b.lo + 1 || most <= kCandidates || step == 1;
    int key = last ? b.lo : between(b.lo, hi, step);
    if (step == 0 && most > kCandidates) key = min(max(threshold, b.lo), hi - 1);
    const Tally found = probe(block, row, weights, key_float(key), key_float(hi), 0);
    if (b.above + found.count >= k || b.mass_above + found.mass >= goal || key == b.lo) {
      b.lo = found.count > 0 ? max(key, found.least) : hi;
      most = b.held = found.count;
      b.mass = b.mass_above + found.mass;
      if (found.count <= kCandidates || hi <= b.lo + 1) break;
    } else {
      hi = key;
      b.above += found.count;
      b.mass_above += found.mass;
      most -= found.count;
    }
  }
  b.count = b.above + b.held;
}

// Which tokens top-k and then top-p keep: weights.threshold and weights.last_tie. A first search is for the count k, or without top-k for
// the mass; a second one, within the first one's tokens, for top_p of theirs. How many candidates there are is returned if all that is kept
// is among them, else 0.
template <class T>
__device__ __forceinline__ int find_cut(Block& block, const Row<T>& row, Weights& weights, float group_max, int64_t row_mass, int k,
                                        float top_p) {
  Shared& s = block.s;
  const int top = float_key(weights.row_max) + 1;
  int start = top - 1;  // not asked for where all tokens fit the candidates
  if (k > 1 && row.num_cols() > kCandidates) start = first_threshold(block, group_max, weights.row_max);
  int64_t goal = k < row.num_cols() ? kNoGoal : goal_of(top_p, row_mass);
  Bounds b = {kLowest, row.num_cols(), row_mass, 0, 0, 0};
  while (true) {
    int hi = top;
    if (b.held == 0) {
      bracket(block, row, weights, start, b, hi, k, goal);
      k = min(k, b.count);
    }

    // Between lo and hi on the candidates, until one token, or one value, lies between them, or count is k to the token. lo is a token's
    // key, and hi one above a token's: many ties cost no step.
    float x[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int place = threadIdx.x * kOwn + i;
      x[i] = place < b.held ? s.x[place] : -INFINITY;
    }
    int fewer = b.above;  // and `less`: the count and mass from hi up
    int64_t less = b.mass_above;
    for (int step = 0; hi > b.lo + 1 && b.count > fewer + 1 && (b.count != k || b.mass >= goal); ++step) {
      const int key = between(b.lo, hi, step);
      Tally own = nothing();
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int x_key = float_key(x[i]);
        if (x_key >= key) {
          ++own.count;
          own.mass += share(weights.weight(x[i]));
          own.least = min(own.least, x_key);
        } else if (x_key >= b.lo) {
          own.most = max(own.most, x_key);
        }
      }
      const Tally inside = block.sum(own);
      const int count = b.above + inside.count;
      const int64_t mass = b.mass_above + inside.mass;
      if (count >= k || mass >= goal)
        b.lo = inside.count > 0 ? inside.least : key, b.count = count, b.mass = mass;
      else
        hi = inside.most + 1, fewer = count, less = mass;
    }

    weights.threshold = key_float(b.lo);
    weights.last_tie = row.num_cols();
    const int ties = b.count - fewer;
    int wanted = ties;
    int64_t kept_mass = b.mass;
    if (ties > 1 && (b.count > k || b.mass >= goal)) {  // all of one value
      const int64_t tie_mass = share(weights.weight(weights.threshold));
      wanted = 0;  // the most that do not reach the goal, and then one more
#pragma unroll 1
      for (int bit = static_cast<int>(kMaxSampledColumns); bit > 0; bit /= 2)
        if (wanted + bit < ties && less + (wanted + bit) * tie_mass < goal) wanted += bit;
      wanted = max(min(wanted + 1, k - fewer), 1);
      kept_mass = less + wanted * tie_mass;
    }
    if (wanted < ties) {
      if (b.held <= kCandidates) {
        int own = 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) own += x[i] == weights.threshold;
        int64_t all;
        int place = static_cast<int>(block.sum_before(own, all));
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
          if (x[i] == weights.threshold && ++place == wanted) s.last_tie = s.id[threadIdx.x * kOwn + i];
        __syncthreads();  // it is known, and read below by all before another search can find one
        weights.last_tie = s.last_tie;
      } else {
        probe(block, row, weights, weights.threshold, key_float(b.lo + 1), wanted - 1);
        weights.last_tie = s.id[0];
      }
    }
    if (b.above > 0 || b.held > kCandidates) b.held = 0;
    if (goal != kNoGoal || !(top_p < 1.0f)) return b.held;
    goal = goal_of(top_p, kept_mass);
  }
}

// --------------------------------------------------------------------------------------------------------------------
// The draw: the token whose part of the cumulative sum of shares holds a uniform number. One thread finds it, and writes it.

// A uniform integer in [0, total), of a uniform 64-bit one.
__device__ __forceinline__ int64_t ticket(uint64_t word, int64_t total) {
  return static_cast<int64_t>(__umul64hi(word, static_cast<uint64_t>(total)));
}

// A token among the candidates.
__device__ __forceinline__ void draw_from_candidates(Block& block, const Weights& weights, int held, uint64_t word, int64_t* id) {
  const Shared& s = block.s;
  int64_t own[kOwn], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int place = threadIdx.x * kOwn + i;
    own[i] = place < held ? share(weights.kept(s.x[place], s.id[place])) : 0;
    sum += own[i];
  }
  int64_t number = -block.sum_before(sum, total);
  number += ticket(word, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (number >= 0 && number < own[i]) *id = s.id[threadIdx.x * kOwn + i];
    number -= own[i];
  }
}

// A token of the whole row: a group by the sums of its tokens' w, or one of the edge; then a token of that group, by its share of the sum.
template <class T>
__device__ __forceinline__ void draw_from_row(Block& block, const Row<T>& row, const Weights& weights, float sum, uint64_t word,
                                              uint64_t second_word, int64_t* id) {
  Shared& s = block.s;
  const int thread = threadIdx.x;
  const int64_t own = leads_group<T>() ? share_of_group<T>(sum) : 0;
  int64_t in_body;
  const int64_t before = block.sum_before(own, in_body);
  const int lane = thread % kWarpSize;
  const int64_t edge = lane < 2 * kGroupColumns ? share(weights.kept(s.edge[lane], row.edge_col(lane))) : 0;
  const int64_t before_edge = in_body + warp_prefix_sum(edge) - edge;
  int64_t number = ticket(word, in_body + warp_sum(edge));
  if (number >= in_body) {
    if (thread == lane && number >= before_edge && number < before_edge + edge) *id = row.edge_col(lane);
    return;
  }
  if (number >= before && number < before + own) {
    s.group = thread / kGroupThreads<T>;
    s.group_sum = sum;
  }
  __syncthreads();  // the group is known

  const float per_sum = 1.0f / s.group_sum;
  const auto offset_of = [&](int start) {
    const int place = start + thread;
    return place / kGroupColumns * kTile<T> + s.group * kGroupColumns + place % kGroupColumns;
  };
  const auto token_share = [&](int offset) {
    return offset < row.length ? share(weights.kept(row.at(row.first + offset), row.first + offset) * per_sum) : int64_t{0};
  };
  const int num_places = (row.length + kTile<T> - 1) / kTile<T> * kGroupColumns;
  int64_t mass = 0;
#pragma unroll 1
  for (int start = 0; start < num_places; start += kThreads) mass += token_share(offset_of(start));
  number = ticket(second_word, block.sum(mass));
#pragma unroll 1
  for (int start = 0; start < num_places; start += kThreads) {
    const int offset = offset_of(start);
    int64_t total;
    const int64_t part = token_share(offset), past = block.sum_before(part, total);
    if (number >= past && number < past + part) *id = row.first + offset;
    number -= total;
  }
}

// --------------------------------------------------------------------------------------------------------------------
// The kernel.

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleParams p) {
  const int64_t index = blockIdx.x;
  Shared& s = shared<Shared>();
  Block block = {s};
  const Row<T> row(p, index);
  const float temperature = p.temperatures ? p.temperatures[index] : p.temperature;
  const bool is_greedy = temperature == 0.0f;
  Weights weights;
  weights.scale = fminf(kLog2e / (is_greedy ? 1.0f : temperature), 1e38f);  // finite, so that 0·scale is 0
  weights.min_p = is_greedy ? 0.0f : p.min_ps ? p.min_ps[index] : p.min_p;
  weights.threshold = -INFINITY;
  weights.last_tie = row.num_cols();
  const float top_p = is_greedy ? 1.0f : p.top_ps ? p.top_ps[index] : p.top_p;
  int64_t top_k = p.top_k;
  if (p.top_ks) top_k = p.has_int64_top_ks ? static_cast<const int64_t*>(p.top_ks)[index] : static_cast<const int32_t*>(p.top_ks)[index];
  const int k = is_greedy ? 1 : static_cast<int>(top_k <= 0 || top_k > row.num_cols() ? row.num_cols() : top_k);

  // The maxima; a group's sum is that of exp((x − its running maximum) / temperature) until the walk ends (arXiv 1805.02867).
  const bool needs_sums = k == row.num_cols();
  float own_max = -INFINITY, own_sum = 0.0f;
  const auto shift_of = [](float maximum) { return maximum == -INFINITY ? 0.0f : maximum; };
  row.walk([&](const Vector<T>(&vectors)[kTiles], int) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float x[kVectorSize<T>];
      convert(x, vectors[tile]);
      const float old_shift = own_max;
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) own_max = max_or_nan(own_max, x[i]);
      if (!needs_sums) continue;
      const float shift = shift_of(own_max);
      own_sum *= weights.weight(old_shift, shift);
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) own_sum += weights.weight(x[i], shift);
    }
  });
  const int thread = threadIdx.x;
  const float edge_x = thread < 2 * kGroupColumns ? row.at(row.edge_col(thread)) : -INFINITY;
  if (thread < 2 * kGroupColumns) s.edge[thread] = edge_x;
  if (thread == 0) {  // a row with a seed of its own draws what it would draw alone
    s.seed = static_cast<uint64_t>(p.seeds[p.has_seed_per_row ? index : 0]);
    s.counter = p.has_seed_per_row ? 0 : static_cast<unsigned>(index);
  }
  weights.row_max = key_float(block.most(float_key(max_or_nan(own_max, edge_x))));
  if (!(weights.row_max > -INFINITY && weights.row_max < INFINITY)) {  // no distribution
    if (thread == 0) p.ids[index] = -1;
    return;
  }
  if (thread == 0) p.ids[index] = 0;  // the token where parameters out of range keep none

  int held = 0;
  float sum = 0.0f;
  int64_t row_mass = 0;
  if (needs_sums) {
    sum = group_sum<T>(own_sum * weights.weight(own_max, weights.row_max));
    const int64_t edge_mass = thread < 2 * kGroupColumns ? share(weights.weight(edge_x)) : 0;
    row_mass = block.sum((leads_group<T>() ? share_of_group<T>(sum) : 0) + edge_mass);
  }
  const bool has_cut = !needs_sums || top_p < 1.0f;
  if (has_cut) {
    float group_max = own_max;
    if constexpr (kGroupThreads<T> == 2) group_max = fmaxf(group_max, __shfl_xor_sync(kFullMask, group_max, 1));
    held = find_cut(block, row, weights, leads_group<T>() ? group_max : -INFINITY, row_mass, k, top_p);
  }
  if (held == 0 && (has_cut || weights.min_p > 0.0f)) {  // the sums of what is kept
    own_sum = 0.0f;
    row.walk([&](const Vector<T>(&vectors)[kTiles], int offset) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < kVectorSize<T>; ++i)
          own_sum += weights.kept(to_float(vectors[tile].lanes[i]), row.first + offset + tile * kTile<T> + i);
    });
    sum = group_sum<T>(own_sum);
  }

  const uint4 words = philox(s.seed, uint4{s.counter, 0, 0, 0});
  const uint64_t word = uint64_t{words.x} << 32 | words.y, second_word = uint64_t{words.z} << 32 | words.w;
  if (held > 0)
    draw_from_candidates(block, weights, held, word, p.ids + index);
  else
    draw_from_row(block, row, weights, sum, word, second_word, p.ids + index);
}

template <class T>
cudaError_t launch_sample(const SampleParams& p, cudaStream_t stream) {
  return launch(sample_kernel<T>, dim3(static_cast<unsigned>(p.num_rows)), dim3(kThreads), 0, stream, p);
}

}  // namespace

cudaError_t sample(const SampleParams& params, cudaStream_t stream) {
  if (params.num_rows < 0 || params.num_rows > INT32_MAX) return cudaErrorInvalidValue;
  if (params.num_cols < 1 || params.num_cols > kMaxSampledColumns) return cudaErrorInvalidValue;
  if (params.dtype != Dtype::kFloat32 && params.dtype != Dtype::kFloat16 && params.dtype != Dtype::kBFloat16) return cudaErrorInvalidValue;
  if (params.num_rows == 0) return cudaSuccess;
  return with_float(params.dtype, [&](auto type) { return launch_sample<typename decltype(type)::type>(params, stream); });
}

}  // namespace fastattn
