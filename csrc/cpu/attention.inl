// The part of attention.cpp that is compiled once for each instruction set (instruction_sets.inl).

// A head's keys or values, or some of its queries, as fp32 rows of `width`; zeros in what is over, rows and columns.
inline void load_rows(const Rows& rows, Kind kind, int64_t begin, int64_t end, int64_t padded_rows, int64_t dim, int64_t width, float scale,
                      float* out) {
  for (int64_t i = begin; i < end; ++i) {
    float* const to = out + (i - begin) * width;
    load_row(at(rows.data, kind, rows.offset(i)), kind, dim, to);
    if (scale != 1.0f)
      for (int64_t d = 0; d < dim; ++d) to[d] *= scale;
    std::fill(to + dim, to + width, 0.0f);
  }
  std::fill(out + (end - begin) * width, out + padded_rows * width, 0.0f);
}

inline void zero(float* x, int64_t n) { std::fill(x, x + n, 0.0f); }

// Which of a row's weights dropout keeps: 1 or 0, from the row's two random words and one for every two keys.
inline void keep(const Dropout& dropout, uint64_t row_counter, int64_t keys, float* __restrict__ out) {
  uint32_t words[2];
  words_of(row_counter, words);
  const uint32_t factor = words[0] | 1;
  for (int64_t pair = 0; pair < (keys + 1) / 2; ++pair) {
    uint32_t x = words[1] + dropout.key_words[pair];
    x = (x ^ uint32_t(int32_t(x) >> 16)) * factor;
    x += uint32_t(int32_t(x) >> 16);
    out[2 * pair] = int32_t(x << 16) >> 16 >= dropout.threshold ? 1.0f : 0.0f;
    out[2 * pair + 1] = int32_t(x) >> 16 >= dropout.threshold ? 1.0f : 0.0f;
  }
}

// x = 0 where a mark is 0.
inline void drop(float* __restrict__ x, const float* __restrict__ marks, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = marks[j] != 0.0f ? x[j] : 0.0f;
}

// (n, width) to (width, n), both multiples of four.
inline void transpose(const float* x, int64_t n, int64_t width, float* out) {
  for (int64_t i = 0; i < n; i += 4)
    for (int64_t d = 0; d < width; d += 4) transpose_four(x + i * width + d, width, out + d * n + i, n);
}

// scores (rows, apart) of these queries, already scaled, with all that is added to them; hidden ones are −∞. tanh: those of softcap
// before they are multiplied by it, or null.
inline void score(const Params& p, const Row* row, int64_t rows, const float* q, int64_t width, const float* k_t, float* scores,
                  int64_t apart, float* tanh) {
  product(q, width, 1, k_t, apart, scores, apart, rows, apart, p.head_dim, false);
  for (int64_t r = 0; r < rows; ++r) {
    float* const s = scores + r * apart;
    if (p.softcap > 0.0f) {
      float* const t = tanh ? tanh + r * apart : s;
      for (int64_t j = 0; j < p.seqlen_k; j += LANES) {
        lanes_at(t + j) = tanh_(lanes_at(s + j) / p.softcap);
        lanes_at(s + j) = p.softcap * lanes_at(t + j);
      }
    }
    if (row[r].slope != 0.0f)
      for (int64_t j = 0; j < p.seqlen_k; ++j) s[j] -= row[r].slope * float(std::llabs(j - row[r].position));
    std::fill(s, s + row[r].key_begin, -INFINITY);
    std::fill(s + row[r].key_end, s + apart, -INFINITY);
  }
}

// out and lse of one key head and the queries that share it, BLOCK rows at a time.
void forward(const Head& head, Workspace& workspace) {
  const Params& p = *head.params;
  const int64_t keys = padded(p.seqlen_k), width = padded(p.head_dim), width_v = padded(p.head_dim_v);
  float *const k = workspace.take(keys * width), *const k_t = workspace.take(keys * width), *const v = workspace.take(keys * width_v), *const q = workspace.take(BLOCK * width),
              *const acc = workspace.take(BLOCK * width_v), *const scores = workspace.take(BLOCK * keys), *const kept = workspace.take(keys);
  load_rows(head.k, p.kind, 0, p.seqlen_k, keys, p.head_dim, width, 1.0f, k);
  transpose(k, keys, width, k_t);
  load_rows(head.v, p.kind, 0, p.seqlen_k, keys, p.head_dim_v, width_v, 1.0f, v);
  for (int64_t begin = 0; begin < head.num_rows(); begin += BLOCK) {
    const int64_t rows = std::min(BLOCK, head.num_rows() - begin);
    load_rows(head.q, p.kind, begin, begin + rows, rows, p.head_dim, width, p.scale, q);
    Row row[BLOCK];
    for (int64_t r = 0; r < rows; ++r) row[r] = head.row(begin + r);
    score(p, row, rows, q, width, k_t, scores, keys, nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      float* const s = scores + r * keys;
      Lanes peaks = Lanes{} + row[r].sink;
      for (int64_t j = 0; j < keys; j += LANES) peaks = lanes_at(s + j) > peaks ? lanes_at(s + j) : peaks;
      const float peak = max(peaks);
      const float shift = peak == -INFINITY ? 0.0f : peak;  // −∞ less −∞ is no number
      Lanes part = {};
      for (int64_t j = 0; j < keys; j += LANES) part += lanes_at(s + j) = exp_(lanes_at(s + j) - shift);
      float total = sum(part);
      if (row[r].sink != -INFINITY) total += exp_(row[r].sink - shift);
      *row[r].lse = total == 0.0f ? -INFINITY : shift + std::log(total);
      const float share = total == 0.0f ? 0.0f : p.dropout.scale / total;
      for (int64_t j = 0; j < keys; ++j) s[j] *= share;
      if (p.dropout.threshold != Dropout::NONE) {
        keep(p.dropout, row[r].counter, p.seqlen_k, kept);
        drop(s, kept, p.seqlen_k);
      }
    }
    product(scores, keys, 1, v, width_v, acc, width_v, rows, width_v, p.seqlen_k, false);
    for (int64_t r = 0; r < rows; ++r) {
      if (*row[r].lse == -INFINITY) zero(acc + r * width_v, width_v);  // whatever v holds
      store_row(p.out, p.kind, row[r].out_offset, acc + r * width_v, p.head_dim_v);
    }
  }
}

// With P the softmax and dP = dout·Vᵀ, dropped ones 0: dS = P∘(dP − Σ P∘dP + dlse), through softcap's tanh; dq = dS·K, dk = dSᵀ·Q and
// dv = Pᵀ·dout, of the P that dropout leaves.
void backward(const Head& head, Workspace& workspace) {
  const Params& p = *head.params;
  const int64_t keys = padded(p.seqlen_k), width = padded(p.head_dim), width_v = padded(p.head_dim_v);
  const auto take = [&](int64_t n) { return workspace.take(n); };
  float *const k = take(keys * width), *const k_t = take(keys * width), *const v = take(keys * width_v), *const v_t = take(keys * width_v), *const dk = take(keys * width), *const dv = take(keys * width_v),
              *const q = take(BLOCK * width), *const dout = take(BLOCK * width_v), *const dq = take(BLOCK * width),
              *const scores = take(BLOCK * keys), *const dscores = take(BLOCK * keys), *const tanh = take(p.softcap > 0.0f ? BLOCK * keys : 0),
              *const kept = take(keys);
  const bool dropped = p.dropout.threshold != Dropout::NONE;
  load_rows(head.k, p.kind, 0, p.seqlen_k, keys, p.head_dim, width, 1.0f, k);
  load_rows(head.v, p.kind, 0, p.seqlen_k, keys, p.head_dim_v, width_v, 1.0f, v);
  transpose(k, keys, width, k_t);
  transpose(v, keys, width_v, v_t);
  for (int64_t begin = 0; begin < head.num_rows(); begin += BLOCK) {
    const int64_t rows = std::min(BLOCK, head.num_rows() - begin);
    load_rows(head.q, p.kind, begin, begin + rows, rows, p.head_dim, width, p.scale, q);
    load_rows(head.dout, p.kind, begin, begin + rows, rows, p.head_dim_v, width_v, p.dropout.scale, dout);
    Row row[BLOCK];
    for (int64_t r = 0; r < rows; ++r) row[r] = head.row(begin + r);
    score(p, row, rows, q, width, k_t, scores, keys, tanh);
    product(dout, width_v, 1, v_t, keys, dscores, keys, rows, keys, p.head_dim_v, false);
    for (int64_t r = 0; r < rows; ++r) {
      float *const s = scores + r * keys, *const ds = dscores + r * keys;
      const bool empty = *row[r].lse == -INFINITY;
      const float lse = empty ? INFINITY : *row[r].lse;
      for (int64_t j = 0; j < keys; j += LANES) lanes_at(s + j) = exp_(lanes_at(s + j) - lse);  // P; 0 where hidden, and in an empty row
      if (dropped) {
        keep(p.dropout, row[r].counter, p.seqlen_k, kept);
        drop(ds, kept, p.seqlen_k);
      }
      std::fill(ds, ds + row[r].key_begin, 0.0f);  // whatever v holds there
      std::fill(ds + row[r].key_end, ds + keys, 0.0f);
      Lanes part = {};
      for (int64_t j = 0; j < keys; j += LANES) part += lanes_at(s + j) * lanes_at(ds + j);
      const float delta = empty ? 0.0f : sum(part), shift = (row[r].dlse && !empty ? *row[r].dlse : 0.0f) - delta;
      *row[r].delta = delta;
      for (int64_t j = 0; j < keys; j += LANES) lanes_at(ds + j) = lanes_at(s + j) * (lanes_at(ds + j) + shift);
      if (p.softcap > 0.0f)
        for (int64_t j = 0; j < keys; j += LANES) {
          const Lanes t = lanes_at(tanh + r * keys + j);
          lanes_at(ds + j) *= 1.0f - t * t;
        }
      if (dropped) drop(s, kept, p.seqlen_k);
    }
    product(dscores, keys, 1, k, width, dq, width, rows, width, p.seqlen_k, false);
    product(dscores, 1, keys, q, width, dk, width, p.seqlen_k, width, rows, begin > 0);  // q is scaled already
    product(scores, 1, keys, dout, width_v, dv, width_v, p.seqlen_k, width_v, rows, begin > 0);
    for (int64_t i = 0; i < rows * width; ++i) dq[i] *= p.scale;
    for (int64_t r = 0; r < rows; ++r) store_row(p.dq, p.kind, row[r].dq_offset, dq + r * width, p.head_dim);
  }
  for (int64_t j = 0; j < p.seqlen_k; ++j) {
    store_row(p.dk, p.kind, head.dk_offset(j), dk + j * width, p.head_dim);
    store_row(p.dv, p.kind, head.dv_offset(j), dv + j * width_v, p.head_dim_v);
  }
}
