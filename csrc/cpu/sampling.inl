// A row of logits for sampling.cpp, for one instruction set (instruction_sets.inl). Rows are fp32 in memory that goes on, with −∞, to a whole
// number of segments.

inline int64_t segments(int64_t n) { return (n + SEGMENT - 1) / SEGMENT; }

// x: the row, padded. The largest of its entries (NaN is passed over), and the least finite one.
inline std::pair<float, float> load_logits(const void* row, Kind kind, int64_t n, float* x) {
  load_row(row, kind, n, x);
  std::fill(x + n, x + segments(n) * SEGMENT, -INFINITY);
  Lanes most = Lanes{} - INFINITY, least = Lanes{} + INFINITY;
  for (int64_t i = 0; i < segments(n) * SEGMENT; i += LANES) {
    const Lanes y = lanes_at(x + i);
    most = y > most ? y : most;
    least = y < least ? (y > -INFINITY ? y : least) : least;
  }
  return {max(most), -max(-least)};
}

// w = e^((x − most)/temperature). Returns their sum, NaN where an entry of x is or most is infinite.
inline double weigh(const float* x, int64_t n, float most, float temperature, float* w, double* sums) {
  double total = 0.0;
  for (int64_t s = 0; s < segments(n); ++s) {
    Lanes part = {};
    for (int64_t i = s * SEGMENT; i < (s + 1) * SEGMENT; i += LANES) {
      lanes_at(w + i) = exp_((lanes_at(x + i) - most) / temperature);
      part += lanes_at(w + i);
    }
    total += sums[s] = sum(part);
  }
  return total;
}

// w = 0 but where x is above the threshold, or at it with an id of up to `last`, and where w ≥ least. Returns the sum of what stays.
inline double keep(const float* x, int64_t n, float threshold, int32_t last, float least, float* w, double* sums) {
  double total = 0.0;
  Ints first;
  for (int i = 0; i < LANES; ++i) first[i] = i;
  for (int64_t s = 0; s < segments(n); ++s) {
    Lanes part = {};
    for (int64_t i = s * SEGMENT; i < (s + 1) * SEGMENT; i += LANES) {
      const Lanes y = lanes_at(x + i), share = lanes_at(w + i);
      const auto kept = ((y > threshold) | ((y == threshold) & (first + int32_t(i) <= last))) & (share >= least);
      lanes_at(w + i) = kept ? share : Lanes{};
      part += lanes_at(w + i);
    }
    total += sums[s] = sum(part);
  }
  return total;
}

// The bin of each entry of a segment: larger ones come earlier.
inline void bins_of(const float* x, float most, float scale, int32_t* bin) {
  for (int64_t i = 0; i < SEGMENT; ++i) bin[i] = int32_t(std::min((most - x[i]) * scale, float(BINS - 1)));
}

inline void divide(const float* w, int64_t n, float total, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] / total;
}
