// The part of paged_attention.cpp that is compiled once for each instruction set (instruction_sets.inl).

// The sums of four registers' lanes, UNROLL of them.
inline Four sums(const Lanes* x) {
  Four parts[4];
  for (int i = 0; i < 4; ++i) {
    Four quarters[LANES / 4];
    std::memcpy(quarters, x + i, sizeof quarters);
    parts[i] = quarters[0];
    for (int j = 1; j < LANES / 4; ++j) parts[i] += quarters[j];
  }
  const Four a = __builtin_shufflevector(parts[0], parts[1], 0, 4, 1, 5) + __builtin_shufflevector(parts[0], parts[1], 2, 6, 3, 7);
  const Four b = __builtin_shufflevector(parts[2], parts[3], 0, 4, 1, 5) + __builtin_shufflevector(parts[2], parts[3], 2, 6, 3, 7);
  return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}

// Rows of one head lie apart, which hardware does not see ahead through.
inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

constexpr int TILE = LANES == 16 ? 4 : 2;  // rows whose products with UNROLL keys are in registers together

// out[r, u] = ⟨a[r], b[u]⟩ for rows r and UNROLL u; out's rows are `apart` floats apart.
template <int COUNT>
inline void multiply(const float* __restrict__ a, const float* __restrict__ b, int64_t width, float* __restrict__ out, int64_t apart) {
  Lanes acc[COUNT][UNROLL] = {};
  for (int64_t d = 0; d < width; d += LANES) {
    Lanes y[UNROLL];
    for (int u = 0; u < UNROLL; ++u) y[u] = lanes_at(b + u * width + d);
    for (int r = 0; r < COUNT; ++r) {
      const Lanes x = lanes_at(a + r * width + d);
      for (int u = 0; u < UNROLL; ++u) acc[r][u] += x * y[u];
    }
  }
  for (int r = 0; r < COUNT; ++r) *reinterpret_cast<Four*>(out + r * apart) = sums(acc[r]);
}

inline void multiply_rows(const float* a, int64_t rows, const float* b, int64_t width, float* out, int64_t apart) {
  int64_t r = 0;
  for (; r + TILE <= rows; r += TILE) multiply<TILE>(a + r * width, b, width, out + r * apart, apart);
  for (; r < rows; ++r) multiply<1>(a + r * width, b, width, out + r * apart, apart);
}

// out[r] += Σ_u weights[r, u]·v[u] for rows r and UNROLL u; weights' rows are `apart` floats apart.
template <int COUNT>
inline void accumulate(
    const float* __restrict__ weights, int64_t apart, const float* __restrict__ v, int64_t width, float* __restrict__ out) {
  for (int64_t d = 0; d < width; d += LANES) {
    Lanes y[UNROLL];
    for (int u = 0; u < UNROLL; ++u) y[u] = lanes_at(v + u * width + d);
    for (int r = 0; r < COUNT; ++r) {
      Lanes x = lanes_at(out + r * width + d);
      for (int u = 0; u < UNROLL; ++u) x += weights[r * apart + u] * y[u];
      lanes_at(out + r * width + d) = x;
    }
  }
}

inline void accumulate_rows(
    const float* weights, int64_t apart, int64_t rows, const float* v, int64_t width, float* out) {
  int64_t r = 0;
  for (; r + TILE <= rows; r += TILE) accumulate<TILE>(weights + r * apart, apart, v, width, out + r * width);
  for (; r < rows; ++r) accumulate<1>(weights + r * apart, apart, v, width, out + r * width);
}

// One chunk of keys of one sequence and key head, seen by a block of rows: their running maximum, sum and weighted values, by the online
// softmax (arXiv 1805.02867), BLOCK keys at a time.
void attend(const Params& p, const Item& item, int64_t kv_head, float* __restrict__ scratch, float* __restrict__ partial) {
  const int64_t rows = item.row_end - item.row_begin, width = padded(p.head_dim), width_v = padded(p.head_dim_v);
  float* const q = scratch;                      // (rows, width)
  float* const acc = q + rows * width;           // (rows, width_v)
  float* const scores = acc + rows * width_v;    // (rows, BLOCK)
  float* const loaded = scores + rows * BLOCK;   // (UNROLL, width or width_v), zero past the dims
  float* const peak = loaded + UNROLL * std::max(width, width_v);  // (rows), and the sums of what is e^(score − peak)
  float* const total = peak + rows;
  std::memset(scratch, 0, sizeof(float) * (total + rows - scratch));

  const float scale = p.scale * (p.k_scale ? p.k_scale[kv_head] : 1.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const Row row = row_of(p, item, kv_head, r);
    load_row(at(p.q, p.q_kind, row.q_offset), p.q_kind, p.head_dim, q + r * width);
    for (int64_t d = 0; d < p.head_dim; ++d) q[r * width + d] *= scale;
    peak[r] = -INFINITY;
  }

  const int32_t* const table = p.page_table + item.sequence * p.table_stride;
  const auto offset = [&](const Cache& cache, int64_t j) {
    const int64_t place = j + item.pad;
    return table[place / p.page_size] * cache.page_stride + place % p.page_size * cache.slot_stride + kv_head * cache.head_stride;
  };
  // UNROLL rows of a cache from key j on, zeros after the last; what lies AHEAD is fetched meanwhile.
  const auto load = [&](const Cache& cache, int64_t j, int64_t dim, int64_t width) {
    for (int64_t u = 0; u < UNROLL; ++u) {
      if (j + u + AHEAD < item.key_end) prefetch_row(at(cache.data, p.cache_kind, offset(cache, j + u + AHEAD)), dim * size_of(p.cache_kind));
      if (j + u < item.key_end)
        load_row(at(cache.data, p.cache_kind, offset(cache, j + u)), p.cache_kind, dim, loaded + u * width);
      else
        std::memset(loaded + u * width, 0, sizeof(float) * width);
      for (int64_t d = dim; d < width; ++d) loaded[u * width + d] = 0.0f;
    }
  };
  for (int64_t start = item.key_begin; start < item.key_end; start += BLOCK) {
    const int64_t keys = std::min<int64_t>(BLOCK, item.key_end - start);
    for (int64_t j = 0; j < keys; j += UNROLL) {
      load(p.k, start + j, p.head_dim, width);
      multiply_rows(q, rows, loaded, width, scores + j, BLOCK);
    }

    for (int64_t r = 0; r < rows; ++r) {
      const Row row = row_of(p, item, kv_head, r);
      float* const s = scores + r * BLOCK;
      if (p.softcap > 0.0f)
        for (int64_t j = 0; j < keys; j += LANES) lanes_at(s + j) = p.softcap * tanh_(lanes_at(s + j) / p.softcap);
      if (row.slope != 0.0f)
        for (int64_t j = 0; j < keys; ++j) s[j] -= row.slope * float(std::llabs(start + j - row.position));
      const int64_t first = std::clamp<int64_t>(row.key_begin - start, 0, keys), last = std::clamp<int64_t>(row.key_end - start, first, keys);
      for (int64_t j = 0; j < first; ++j) s[j] = -INFINITY;
      for (int64_t j = last; j < BLOCK; ++j) s[j] = -INFINITY;
      Lanes tops = Lanes{} + peak[r];
      for (int64_t j = 0; j < keys; j += LANES) tops = lanes_at(s + j) > tops ? lanes_at(s + j) : tops;
      const float top = max(tops);
      if (first == last || top == -INFINITY) {  // nothing seen yet, or of −∞: no difference to take
        for (int64_t j = first; j < last; ++j) total[r] += s[j] != s[j] ? s[j] : 0.0f;
        std::memset(s, 0, sizeof(float) * BLOCK);
        continue;
      }
      Lanes part = {};
      for (int64_t j = 0; j < keys; j += LANES) part += lanes_at(s + j) = exp_(lanes_at(s + j) - top);
      if (top != peak[r]) {
        const float fade = peak[r] == -INFINITY ? 0.0f : exp_(peak[r] - top);
        for (int64_t d = 0; d < width_v; ++d) acc[r * width_v + d] *= fade;
        total[r] *= fade;
        peak[r] = top;
      }
      total[r] += sum(part);
    }

    for (int64_t j = 0; j < keys; j += UNROLL) {
      load(p.v, start + j, p.head_dim_v, width_v);
      accumulate_rows(scores + j, BLOCK, rows, loaded, width_v, acc);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    float* const to = partial + r * (p.head_dim_v + 2);
    to[0] = peak[r];
    to[1] = total[r];
    std::memcpy(to + 2, acc + r * width_v, sizeof(float) * p.head_dim_v);
  }
}
