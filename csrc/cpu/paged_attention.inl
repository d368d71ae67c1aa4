// The part of paged_attention.cpp that is compiled once for each instruction set (instruction_sets.inl).

constexpr int TILE = LANES / UNROLL;  // rows whose products with UNROLL keys are in registers together: a register of sums

// Of two registers, sums of lanes SPAN apart: a's where a lane's number lacks the bit SPAN, b's where it has it.
template <int SPAN, int... LANE>
inline Lanes fold(Lanes a, Lanes b, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(a, b, (LANE & SPAN ? LANES + LANE - SPAN : LANE)...) +
         __builtin_shufflevector(a, b, (LANE & SPAN ? LANES + LANE : LANE + SPAN)...);
}

// One register of the sums of LANES registers, in their order.
template <int SPAN = LANES / 2>
inline Lanes sums(Lanes* x) {
  for (int i = 0; i < SPAN; ++i) x[i] = fold<SPAN>(x[i], x[i + SPAN], std::make_integer_sequence<int, LANES>());
  if constexpr (SPAN > 1)
    return sums<SPAN / 2>(x);
  else
    return x[0];
}

// out[r, u] = ⟨a[r], b[u]⟩ for TILE rows r and UNROLL u, of which the first `count` rows are stored; out's rows are `apart` floats apart.
inline void multiply(
    const float* __restrict__ a, const float* const* b, int64_t width, float* __restrict__ out, int64_t apart, int64_t count) {
  Lanes acc[TILE * UNROLL] = {};
  for (int64_t d = 0; d < width; d += LANES) {
    Lanes y[UNROLL];
    for (int u = 0; u < UNROLL; ++u) y[u] = lanes_at(b[u] + d);
    for (int r = 0; r < TILE; ++r) {
      const Lanes x = lanes_at(a + r * width + d);
      for (int u = 0; u < UNROLL; ++u) acc[r * UNROLL + u] += x * y[u];
    }
  }
  float products[LANES];
  lanes_at(products) = sums(acc);
  for (int64_t r = 0; r < count; ++r) std::memcpy(out + r * apart, products + r * UNROLL, sizeof(float) * UNROLL);
}

// out[r] += Σ_u weights[r, u]·v[u] for COUNT rows r and UNROLL u; weights' rows are `apart` floats apart.
template <int COUNT>
inline void accumulate(
    const float* __restrict__ weights, int64_t apart, const float* const* v, int64_t width, float* __restrict__ out) {
  for (int64_t d = 0; d < width; d += LANES) {
    Lanes y[UNROLL];
    for (int u = 0; u < UNROLL; ++u) y[u] = lanes_at(v[u] + d);
    for (int r = 0; r < COUNT; ++r) {
      Lanes x = lanes_at(out + r * width + d);
      for (int u = 0; u < UNROLL; ++u) x += weights[r * apart + u] * y[u];
      lanes_at(out + r * width + d) = x;
    }
  }
}

// The cached rows of one block of keys for all key heads of a task, in the order in which they lie.
struct Block {
  const Item* item = nullptr;
  int64_t start = 0, keys = 0;
  int64_t k[BLOCK], v[BLOCK];  // offsets of each key's first head

  void locate(const Params& p, const Item& of, int64_t first) {
    item = &of, start = first, keys = std::clamp<int64_t>(of.key_end - first, 0, BLOCK);
    const int32_t* const table = p.page_table + of.sequence * p.table_stride;
    int64_t page = (first + of.pad) / p.page_size, slot = (first + of.pad) % p.page_size;
    for (int64_t j = 0; j < keys; ++j) {
      k[j] = table[page] * p.k.page_stride + slot * p.k.slot_stride;
      v[j] = table[page] * p.v.page_stride + slot * p.v.slot_stride;
      if (++slot == p.page_size) slot = 0, ++page;
    }
  }
};

// Fetches a block's rows into the second cache, one a call. Hardware sees ahead within a row, and not through a page table.
struct Fetch {
  const Params& p;
  const Cache& cache;
  const int64_t* offsets;
  int64_t keys, head_begin, head_end, bytes, head = head_begin, key = 0;

  void next() {
    if (key >= keys) return;
    const char* const row = static_cast<const char*>(at(cache.data, p.cache_kind, offsets[key] + head * cache.head_stride));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
    if (++head == head_end) head = head_begin, ++key;
  }
};

// One chunk of keys of one sequence and some of its key heads, seen by a block of rows: their running maximum, sum and weighted values, by
// the online softmax (arXiv 1805.02867). BLOCK keys of all the heads at a time, so that memory is read in its own order, while the block
// after it, of this chunk or the next task's, is on its way.
void attend(const Params& p, const Task& task, const Task* next_task, Scratch& scratch) {
  const Item& item = *task.item;
  const int64_t rows = item.row_end - item.row_begin, width = padded(p.head_dim), width_v = padded(p.head_dim_v);
  const int64_t tiled = (rows + TILE - 1) / TILE * TILE, heads = task.head_end - task.head_begin, widest = std::max(width, width_v);
  const int64_t sizes[] = {heads * tiled * width, heads * rows * width_v, rows * BLOCK, UNROLL * widest, widest, heads * rows, heads * rows};
  const int64_t size = std::accumulate(std::begin(sizes), std::end(sizes), int64_t(0));
  float* const q = scratch.floats(size);        // (heads, tiled, width)
  float* const acc = q + sizes[0];              // (heads, rows, width_v)
  float* const scores = acc + sizes[1];         // (rows, BLOCK)
  float* const loaded = scores + sizes[2];      // (UNROLL, width or width_v), zero past the dims
  const float* const nothing = loaded + sizes[3];  // a row of zeros
  float* const peaks = loaded + sizes[3] + sizes[4];  // (heads, rows)
  float* const totals = peaks + sizes[5];       // (heads, rows), of e^(score − peak)
  std::memset(q, 0, sizeof(float) * size);
  Row* const rows_of = scratch.rows(heads * rows);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t kv_head = task.head_begin + h;
    const float scale = p.scale * (p.k_scale ? p.k_scale[kv_head] : 1.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const Row row = rows_of[h * rows + r] = row_of(p, item, kv_head, r);
      float* const to = q + (h * tiled + r) * width;
      load_row(at(p.q, p.q_kind, row.q_offset), p.q_kind, p.head_dim, to);
      for (int64_t d = 0; d < p.head_dim; ++d) to[d] *= scale;
      peaks[h * rows + r] = -INFINITY;
    }
  }

  const float* found[UNROLL];
  // UNROLL rows of a cache from a block's key j on as fp32, in their place or `loaded`; zeros after the last.
  const auto load = [&](const Cache& cache, const int64_t* offsets, int64_t j, int64_t keys, int64_t kv_head, int64_t dim, int64_t width) {
    for (int64_t u = 0; u < UNROLL; ++u) {
      if (j + u >= keys) {
        found[u] = nothing;
        continue;
      }
      const void* const row = at(cache.data, p.cache_kind, offsets[j + u] + kv_head * cache.head_stride);
      if (p.cache_kind == Kind::f32 && dim == width) {
        found[u] = static_cast<const float*>(row);
      } else {
        load_row(row, p.cache_kind, dim, loaded + u * width);
        for (int64_t d = dim; d < width; ++d) loaded[u * width + d] = 0.0f;
        found[u] = loaded + u * width;
      }
    }
  };

  Block blocks[2];
  blocks[0].locate(p, item, item.key_begin);
  for (int64_t start = item.key_begin, turn = 0; start < item.key_end; start += BLOCK, turn ^= 1) {
    const Block& block = blocks[turn];
    Block& next = blocks[turn ^ 1];
    const bool last = start + BLOCK >= item.key_end;
    const Task& then = last && next_task ? *next_task : task;
    next.locate(p, *then.item, last && next_task ? then.item->key_begin : start + BLOCK);
    Fetch fetch_k{p, p.k, next.k, next.keys, then.head_begin, then.head_end, p.head_dim * size_of(p.cache_kind)};
    Fetch fetch_v{p, p.v, next.v, next.keys, then.head_begin, then.head_end, p.head_dim_v * size_of(p.cache_kind)};
    const int64_t keys = block.keys;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t kv_head = task.head_begin + h;
      for (int64_t j = 0; j < keys; j += UNROLL) {
        for (int u = 0; u < UNROLL; ++u) fetch_k.next();
        load(p.k, block.k, j, keys, kv_head, p.head_dim, width);
        for (int64_t r = 0; r < rows; r += TILE)
          multiply(q + (h * tiled + r) * width, found, width, scores + r * BLOCK + j, BLOCK, std::min<int64_t>(TILE, rows - r));
      }

      float *const peak = peaks + h * rows, *const total = totals + h * rows, *const values = acc + h * rows * width_v;
      for (int64_t r = 0; r < rows; ++r) {
        const Row& row = rows_of[h * rows + r];
        float* const s = scores + r * BLOCK;
        if (p.softcap > 0.0f)
          for (int64_t j = 0; j < keys; j += LANES) lanes_at(s + j) = p.softcap * tanh_(lanes_at(s + j) / p.softcap);
        if (row.slope != 0.0f)
          for (int64_t j = 0; j < keys; ++j) s[j] -= row.slope * float(std::llabs(start + j - row.position));
        const int64_t first = std::clamp<int64_t>(row.key_begin - start, 0, keys), end = std::clamp<int64_t>(row.key_end - start, first, keys);
        for (int64_t j = 0; j < first; ++j) s[j] = -INFINITY;
        for (int64_t j = end; j < BLOCK; ++j) s[j] = -INFINITY;
        Lanes tops = Lanes{} + peak[r];
        for (int64_t j = 0; j < keys; j += LANES) tops = lanes_at(s + j) > tops ? lanes_at(s + j) : tops;
        const float top = max(tops);
        if (first == end || top == -INFINITY) {  // nothing seen yet, or of −∞: no difference to take
          for (int64_t j = first; j < end; ++j) total[r] += s[j] != s[j] ? s[j] : 0.0f;
          std::memset(s, 0, sizeof(float) * BLOCK);
          continue;
        }
        Lanes part = {};
        for (int64_t j = 0; j < keys; j += LANES) part += lanes_at(s + j) = exp_(lanes_at(s + j) - top);
        if (top != peak[r]) {
          const float fade = peak[r] == -INFINITY ? 0.0f : exp_(peak[r] - top);
          for (int64_t d = 0; d < width_v; ++d) values[r * width_v + d] *= fade;
          total[r] *= fade;
          peak[r] = top;
        }
        total[r] += sum(part);
      }

      for (int64_t j = 0; j < keys; j += UNROLL) {
        for (int u = 0; u < UNROLL; ++u) fetch_v.next();
        load(p.v, block.v, j, keys, kv_head, p.head_dim_v, width_v);
        int64_t r = 0;
        for (; r + TILE <= rows; r += TILE) accumulate<TILE>(scores + r * BLOCK + j, BLOCK, found, width_v, values + r * width_v);
        for (; r < rows; ++r) accumulate<1>(scores + r * BLOCK + j, BLOCK, found, width_v, values + r * width_v);
      }
    }
  }

  for (int64_t h = 0; h < heads; ++h)
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = task.partial + ((task.head_begin + h) * rows + r) * (p.head_dim_v + 2);
      to[0] = peaks[h * rows + r];
      to[1] = totals[h * rows + r];
      std::memcpy(to + 2, acc + (h * rows + r) * width_v, sizeof(float) * p.head_dim_v);
    }
}
