// A row of new keys or values for append_paged_kv.cpp, for one instruction set (instruction_sets.inl).

// The first 2·half columns of x rotated, by a position's row of the tables.
inline void rotate(float* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin, int64_t half, bool interleaved) {
  const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float &a = x[i * step], &b = x[i * step + apart];
    const float rotated = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = rotated;
  }
}

// x/scale as `kind`, to nearest even; int8 and e4m3 saturate.
inline void store_scaled(void* out, Kind kind, int64_t offset, float* __restrict__ x, float scale, int64_t n) {
  if (scale != 1.0f)
    for (int64_t i = 0; i < n; ++i) x[i] /= scale;
  if (kind == Kind::i8) {
    auto* const to = static_cast<int8_t*>(out) + offset;
    for (int64_t i = 0; i < n; ++i) {
      const float y = x[i] != x[i] ? 0.0f : std::min(std::max(x[i], -128.0f), 127.0f);
      to[i] = int8_t((y + 12582912.0f) - 12582912.0f);  // 1.5·2^23, beyond which floats are integers
    }
  } else if (kind == Kind::e4m3) {
    auto* const to = static_cast<uint8_t*>(out) + offset;
    for (int64_t i = 0; i < n; ++i) to[i] = e4m3_of(x[i]);
  } else {
    store_row(out, kind, offset, x, n);
  }
}
