// Slots of tokens sorted by expert: fastattn::moe_dispatch_cpp (docs/moe_routing.md), a stable counting sort. Each thread has a stretch of the slots,
// counts its experts, and then knows where in every expert's rows its own begin: neither the number of threads nor their order changes a bit.
//
// Floor: reading the ids twice and writing 16 bytes a slot.

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensors.hpp"

namespace fastattn {
namespace {

constexpr int64_t STRETCH = 1 << 16;  // slots of a thread, at least, 150 us of work: waking another for less can take longer than it saves

// Ids (T, K) of any strides. Slot t·K + k is token t's k-th.
template <class Id>
struct Ids {
  const Id* data;
  int64_t token_stride, stride, top_k, num_experts;

  // f(slot, expert) for each slot from `begin` to `end`, in order; num_experts for those that name none.
  template <class F>
  void each(int64_t begin, int64_t end, const F& f) const {
    if (begin == end) return;
    int64_t k = begin % top_k;
    const Id* token = data + begin / top_k * token_stride;
    for (int64_t slot = begin; slot < end; ++slot) {
      f(slot, int64_t(std::min<uint64_t>(uint64_t(int64_t(token[k * stride])), uint64_t(num_experts))));  // a negative one is past all
      if (++k == top_k) k = 0, token += token_stride;
    }
  }
};

template <class Id>
void sort(const Ids<Id>& ids, int64_t num_slots, int64_t* order, int64_t* inverse, int32_t* offsets) {
  const int64_t bins = ids.num_experts + 1;
  const int64_t stretches = std::clamp<int64_t>(num_slots / STRETCH, 1, torch::stable::get_num_threads());
  const auto begin_of = [&](int64_t stretch) { return num_slots * stretch / stretches; };
  std::vector<int64_t> next(stretches * bins);  // a stretch's slots of each bin; then the row of its next one
  const auto for_each_stretch = [&](const auto& f) {
    torch::stable::parallel_for(0, stretches, 1, [&](int64_t first, int64_t last) {
      for (int64_t stretch = first; stretch < last; ++stretch) f(begin_of(stretch), begin_of(stretch + 1), next.data() + stretch * bins);
    });
  };
  for_each_stretch([&](int64_t begin, int64_t end, int64_t* count) {
    ids.each(begin, end, [&](int64_t, int64_t expert) { ++count[expert]; });
  });
  int64_t row = 0;
  for (int64_t expert = 0; expert < bins; ++expert) {
    for (int64_t stretch = 0; stretch < stretches; ++stretch) row += std::exchange(next[stretch * bins + expert], row);
    if (expert < ids.num_experts) offsets[expert] = int32_t(row);
  }
  for_each_stretch([&](int64_t begin, int64_t end, int64_t* next) {
    ids.each(begin, end, [&](int64_t slot, int64_t expert) {
      const int64_t row = next[expert]++;
      order[row] = slot;
      inverse[slot] = row;
    });
  });
}

// As fastattn::moe_dispatch: order and inverse int64, offsets int32. indices int32 or int64.
std::tuple<Tensor, Tensor, Tensor> moe_dispatch_cpp(Tensor indices, int64_t num_experts) {
  const ScalarType dtype = indices.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, "moe_dispatch_cpp: indices must be int32 or int64");
  STD_TORCH_CHECK(indices.dim() == 2 && num_experts >= 0, "moe_dispatch_cpp: indices must have shape (T, K), num_experts be 0 or more");
  const int64_t num_slots = indices.numel();
  const Tensor order = empty({num_slots}, ScalarType::Long), inverse = empty({num_slots}, ScalarType::Long);
  const Tensor offsets = empty({num_experts}, ScalarType::Int);
  const auto run = [&](auto* data) {
    const Ids<std::remove_const_t<std::remove_pointer_t<decltype(data)>>> ids{
        data, indices.stride(0), indices.stride(1), indices.size(1), num_experts};
    sort(ids, num_slots, static_cast<int64_t*>(order.data_ptr()), static_cast<int64_t*>(inverse.data_ptr()),
         static_cast<int32_t*>(offsets.data_ptr()));
  };
  if (dtype == ScalarType::Int)
    run(static_cast<const int32_t*>(indices.data_ptr()));
  else
    run(static_cast<const int64_t*>(indices.data_ptr()));
  return {order, inverse, offsets};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("moe_dispatch_cpp", TORCH_BOX(&moe_dispatch_cpp)); }

}  // namespace
}  // namespace fastattn
