// Drawing a token from each row of logits, and the distribution that it is drawn from: fastattn::sample_cpp, sampling_probs_cpp (docs/sampling.md).
// A thread has a row, which stays in its cache. Nothing is sorted but the tokens of one bin: a walk over the row counts and weighs the
// tokens of BINS intervals of x below its largest; the counts say which of them top_k ends in, their weights in which one top_p does.
//
// Floor: a read of the logits; the exponentials cost more, some 0.3 ns a token with AVX-512.

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "instruction_sets.hpp"
#include "tensors.hpp"

namespace fastattn {
namespace {

constexpr int64_t SEGMENT = 256;  // columns whose weights are summed in fp32, and by which a token is looked for
constexpr int BINS = 4096;
constexpr float DEEPEST = 40.0f;  // e^−40 of the largest weight is nobody's top_p: beyond, all tokens are of one bin

#define KERNELS "sampling.inl"
#include "instruction_sets.inl"

struct Parameters {
  float temperature, top_p, min_p;
  int64_t top_k;
};

struct Cut {
  float threshold = -INFINITY;
  int32_t last = INT32_MAX;  // id, of the tokens at the threshold
};

// A row's memory, which a thread uses again for the next one.
struct Scratch {
  std::vector<float> x, w;
  std::vector<double> sums, mass;
  std::vector<int32_t> count, ids;

  explicit Scratch(int64_t n)
      : x(baseline::segments(n) * SEGMENT), w(x.size()), sums(baseline::segments(n)), mass(BINS), count(BINS) {}
};

// Where the tokens of top_k, and of those the fewest whose weights reach top_p of theirs, end in order of x, ties to the lower id.
Cut find_cut(Scratch& row, int64_t n, int64_t top_k, float top_p, float most, float least, float temperature) {
  const float depth = std::min(most - least, DEEPEST * temperature), scale = depth > 1e-30f ? (BINS - 1) / depth : 0.0f;
  const auto bins_of = FASTATTN_PICK(bins_of);
  const auto for_each_bin = [&](const auto& f) {
    int32_t bin[SEGMENT];
    for (int64_t first = 0; first < n; first += SEGMENT) {
      if (scale > 0.0f)
        bins_of(row.x.data() + first, most, scale, bin);
      else
        std::fill(bin, bin + SEGMENT, 0);
      for (int64_t i = first; i < std::min(first + SEGMENT, n); ++i) f(i, bin[i - first]);
    }
  };
  const auto comes_before = [&](int32_t a, int32_t b) { return row.x[a] != row.x[b] ? row.x[a] > row.x[b] : a < b; };
  const auto collect = [&](int wanted) {
    row.ids.clear();
    for_each_bin([&](int64_t i, int bin) {
      if (bin == wanted) row.ids.push_back(int32_t(i));
    });
  };
  std::fill(row.count.begin(), row.count.end(), 0);
  std::fill(row.mass.begin(), row.mass.end(), 0.0);
  for_each_bin([&](int64_t i, int bin) { ++row.count[bin], row.mass[bin] += row.w[i]; });

  int end = 0;  // the bin that top_k ends in, and how many of it are kept
  double total = 0.0;
  int64_t kept = top_k;
  while (kept > row.count[end]) kept -= row.count[end], total += row.mass[end++];
  const bool whole = kept == row.count[end];
  if (!whole || top_p >= 1.0f) {
    collect(end);
    std::nth_element(row.ids.begin(), row.ids.begin() + (kept - 1), row.ids.end(), comes_before);
    row.ids.resize(kept);
    if (top_p >= 1.0f) return {row.x[row.ids.back()], row.ids.back()};
  }
  if (whole)
    total += row.mass[end];
  else
    for (const int32_t id : row.ids) total += row.w[id];

  const double target = double(top_p) * total;
  int bin = 0;
  double reached = 0.0;
  while (bin < end && reached + row.mass[bin] < target) reached += row.mass[bin++];
  if (bin < end || whole) collect(bin);
  std::sort(row.ids.begin(), row.ids.end(), comes_before);
  int32_t last = row.ids.front();
  for (const int32_t id : row.ids) {
    last = id;
    if ((reached += row.w[id]) >= target) break;
  }
  return {row.x[last], last};
}

// The row's weights, those of tokens that are not kept 0, and their sum: NaN where there is no distribution.
double distribution(Scratch& row, const void* logits, Kind kind, int64_t n, Parameters p) {
  if (p.temperature == 0.0f) p = {1.0f, 1.0f, 0.0f, 1};
  if (p.top_k <= 0 || p.top_k > n) p.top_k = n;
  const auto [most, least] = FASTATTN_PICK(load_logits)(logits, kind, n, row.x.data());
  const double total = FASTATTN_PICK(weigh)(row.x.data(), n, most, p.temperature, row.w.data(), row.sums.data());
  const bool has_cut = p.top_k < n || p.top_p < 1.0f;
  if (!std::isfinite(total) || !(has_cut || p.min_p > 0.0f)) return std::isfinite(total) ? total : NAN;
  const Cut cut = has_cut ? find_cut(row, n, p.top_k, p.top_p, most, least, p.temperature) : Cut{};
  return FASTATTN_PICK(keep)(row.x.data(), n, cut.threshold, cut.last, p.min_p, row.w.data(), row.sums.data());
}

// The first token with which the weights' sum exceeds `number` of 1; the last one of any weight where rounding leaves none.
int64_t draw(const Scratch& row, int64_t n, double total, double number) {
  const double goal = std::min(number * total, std::nextafter(total, 0.0));
  double sum = 0.0;
  int64_t last = 0;
  for (int64_t first = 0; first < n; first += SEGMENT) {
    const double after = sum + row.sums[first / SEGMENT];
    if (after == sum) continue;
    const bool is_here = after > goal;
    for (int64_t i = first; i < std::min(first + SEGMENT, n); ++i) {
      if (row.w[i] == 0.0f) continue;
      last = i;
      if (is_here && (sum += row.w[i]) > goal) return i;
    }
    sum = after;
  }
  return last;
}

// f(row, parameters) for each of the logits' rows. One parameter a row, or for all of them.
template <class F>
void for_each_row(
    const Tensor& logits, const std::optional<Tensor>& temperatures, const std::optional<Tensor>& top_ks, const std::optional<Tensor>& top_ps,
    const std::optional<Tensor>& min_ps, const Parameters& all, const F& f) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) == 1) && logits.size(1) > 0, "sampling: logits must be rows of consecutive entries");
  for (const auto* t : {&temperatures, &top_ks, &top_ps, &min_ps})
    STD_TORCH_CHECK(!*t || ((*t)->numel() == logits.size(0) && (*t)->is_contiguous()), "sampling: parameters must be one a row");
  const float *temperature = values_of<float>(temperatures), *top_p = values_of<float>(top_ps), *min_p = values_of<float>(min_ps);
  const int64_t* top_k = values_of<int64_t>(top_ks);
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(logits.size(1));
    for (int64_t row = begin; row < end; ++row) {
      Parameters p = all;
      if (temperature) p.temperature = temperature[row];
      if (top_k) p.top_k = top_k[row];
      if (top_p) p.top_p = top_p[row];
      if (min_p) p.min_p = min_p[row];
      const Kind kind = kind_of(logits);
      f(row, scratch, distribution(scratch, at(logits.data_ptr(), kind, row * logits.stride(0)), kind, logits.size(1), p));
    }
  });
}

// As fastattn.cpu.sampling.sample, with the rows' uniform numbers, float64 (B,). temperatures, top_ps, min_ps fp32, top_ks int64.
Tensor sample_cpp(
    Tensor logits, Tensor numbers, std::optional<Tensor> temperatures, std::optional<Tensor> top_ks, std::optional<Tensor> top_ps,
    std::optional<Tensor> min_ps, double temperature, int64_t top_k, double top_p, double min_p) {
  const Tensor ids = empty({logits.size(0)}, ScalarType::Long);
  STD_TORCH_CHECK(numbers.numel() == logits.size(0) && numbers.scalar_type() == ScalarType::Double, "sampling: numbers must be one a row");
  const double* number = static_cast<const double*>(numbers.data_ptr());
  int64_t* id = static_cast<int64_t*>(ids.data_ptr());
  const Parameters all{float(temperature), float(top_p), float(min_p), top_k};
  for_each_row(logits, temperatures, top_ks, top_ps, min_ps, all, [&](int64_t row, const Scratch& scratch, double total) {
    id[row] = std::isnan(total) ? -1 : draw(scratch, logits.size(1), total, number[row]);
  });
  return ids;
}

// As fastattn.cpu.sampling.sampling_probs.
Tensor sampling_probs_cpp(
    Tensor logits, std::optional<Tensor> temperatures, std::optional<Tensor> top_ks, std::optional<Tensor> top_ps,
    std::optional<Tensor> min_ps, double temperature, int64_t top_k, double top_p, double min_p) {
  const int64_t num_cols = logits.size(1);
  const Tensor probs = empty({logits.size(0), num_cols}, ScalarType::Float);
  float* const out = static_cast<float*>(probs.data_ptr());
  const Parameters all{float(temperature), float(top_p), float(min_p), top_k};
  for_each_row(logits, temperatures, top_ks, top_ps, min_ps, all, [&](int64_t row, const Scratch& scratch, double total) {
    if (std::isnan(total))
      std::fill_n(out + row * num_cols, num_cols, NAN);
    else
      FASTATTN_PICK(divide)(scratch.w.data(), num_cols, float(total), out + row * num_cols);
  });
  return probs;
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("sample_cpp", TORCH_BOX(&sample_cpp));
  m.impl("sampling_probs_cpp", TORCH_BOX(&sampling_probs_cpp));
}

}  // namespace
}  // namespace fastattn
