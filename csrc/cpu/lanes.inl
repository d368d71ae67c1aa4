// What the kernels beside this file share and is compiled once for each instruction set: rows of fp32 in registers of LANES floats, and
// their products. Included within each set's namespace (instruction_sets.inl).

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// n elements of one row as fp32. What follows them, up to a multiple of LANES, is left as it is.
inline void load_row(const void* row, Kind kind, int64_t n, float* __restrict__ out) {
  switch (kind) {
    case Kind::f32:
      std::memcpy(out, row, 4 * n);
      break;
    case Kind::f16: {
      const auto* from = static_cast<const uint16_t*>(row);
      for (int64_t i = 0; i < n; ++i) out[i] = float_of_f16(from[i]);
      break;
    }
    case Kind::bf16: {
      const auto* from = static_cast<const uint16_t*>(row);
      for (int64_t i = 0; i < n; ++i) out[i] = float_of(uint32_t(from[i]) << 16);
      break;
    }
    case Kind::i8: {
      const auto* from = static_cast<const int8_t*>(row);
      for (int64_t i = 0; i < n; ++i) out[i] = float(from[i]);
      break;
    }
    case Kind::e4m3: {
      const auto* from = static_cast<const uint8_t*>(row);
      for (int64_t i = 0; i < n; ++i) out[i] = float_of_e4m3(from[i]);
      break;
    }
  }
}

inline void store_row(void* out, Kind kind, int64_t offset, const float* __restrict__ row, int64_t n) {
  if (kind == Kind::f32) {
    std::memcpy(static_cast<float*>(out) + offset, row, 4 * n);
  } else {
    auto* const to = static_cast<uint16_t*>(out) + offset;
    if (kind == Kind::bf16)
      for (int64_t i = 0; i < n; ++i) to[i] = bf16_of(row[i]);
    else
      for (int64_t i = 0; i < n; ++i) to[i] = f16_of(row[i]);
  }
}

typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Lanes& lanes_at(float* x) { return *reinterpret_cast<Lanes*>(x); }
inline const Lanes& lanes_at(const float* x) { return *reinterpret_cast<const Lanes*>(x); }

// e^x for x ≤ 0, to a unit in the last place or two: 2^n·2^f with n the nearest integer to x·log₂e, and Taylor's series of 2^f.
inline Lanes exp_(Lanes x) {
  const Lanes y = x * 1.44269504f;
  const Lanes n = (y + 12582912.0f) - 12582912.0f;  // 1.5·2^23, beyond which floats are integers
  const Lanes f = y - n;
  Lanes p = f * 1.5252734e-5f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const Lanes least = Lanes{} - 126.0f;
  const Ints exponent = __builtin_convertvector(y > least ? n : least, Ints) + 127;  // a NaN stays one in p
  const Ints bits = exponent << 23;
  Lanes power;
  std::memcpy(&power, &bits, sizeof power);
  return y < least ? Lanes{} : p * power;
}

inline float exp_(float x) { return exp_(Lanes{} + x)[0]; }

// tanh x = sign(x)·(1 − e^(−2|x|)) / (1 + e^(−2|x|)); where that difference would cancel, x + x³·P(x²) with P from Cephes' tanhf: a large
// softcap multiplies what is lost.
inline Lanes tanh_(Lanes x) {
  const Lanes size = x < 0.0f ? -x : x, e = exp_(-2.0f * size), t = (1.0f - e) / (1.0f + e), z = x * x;
  Lanes p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return size < 0.625f ? x + x * z * p : x < 0.0f ? -t : t;
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

inline float max(Lanes x) {
  Four quarters[LANES / 4], top;
  std::memcpy(quarters, &x, sizeof x);
  top = quarters[0];
  for (int i = 1; i < LANES / 4; ++i) top = quarters[i] > top ? quarters[i] : top;
  return std::max(std::max(top[0], top[1]), std::max(top[2], top[3]));
}

inline float sum(Lanes x) {
  Four quarters[LANES / 4];
  std::memcpy(quarters, &x, sizeof x);
  for (int i = 1; i < LANES / 4; ++i) quarters[0] += quarters[i];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

// The transpose of four rows of four, `from` apart in x, to rows `to` apart.
inline void transpose_four(const float* x, int64_t from, float* out, int64_t to) {
  Four r[4];
  for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const Four*>(x + i * from);
  const Four a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  *reinterpret_cast<Four*>(out) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(out + to) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(out + 2 * to) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(out + 3 * to) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// C (rows, cols) = A·B, or more of it: A (rows, inner) of any strides; B (inner, cols) and C with rows of whole registers. A block of C stays in
// registers while the inner dim goes by.
template <int ROWS, int COLS>
inline void product_block(
    const float* __restrict__ a, int64_t a_row, int64_t a_col, const float* __restrict__ b, int64_t b_row, float* __restrict__ c, int64_t c_row,
    int64_t inner, bool more) {
  Lanes acc[ROWS][COLS] = {};
  for (int64_t k = 0; k < inner; ++k) {
    Lanes y[COLS];
    for (int i = 0; i < COLS; ++i) y[i] = lanes_at(b + k * b_row + i * LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < COLS; ++i) acc[r][i] += a[r * a_row + k * a_col] * y[i];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < COLS; ++i) {
      Lanes& x = lanes_at(c + r * c_row + i * LANES);
      x = more ? x + acc[r][i] : acc[r][i];
    }
}

template <int COLS>
inline void product_columns(
    const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t inner, bool more) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) product_block<4, COLS>(a + r * a_row, a_row, a_col, b, b_row, c + r * c_row, c_row, inner, more);
  for (; r < rows; ++r) product_block<1, COLS>(a + r * a_row, a_row, a_col, b, b_row, c + r * c_row, c_row, inner, more);
}

inline void product(
    const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t cols,
    int64_t inner, bool more) {
  constexpr int WIDE = LANES == 16 ? 4 : 2;  // with 4 rows, what the registers have room for
  int64_t j = 0;
  for (; j + WIDE * LANES <= cols; j += WIDE * LANES) product_columns<WIDE>(a, a_row, a_col, b + j, b_row, c + j, c_row, rows, inner, more);
  for (; j < cols; j += LANES) product_columns<1>(a, a_row, a_col, b + j, b_row, c + j, c_row, rows, inner, more);
}
