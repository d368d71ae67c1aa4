// What operators need of torch's tensors, over the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>

namespace fastattn {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kMaxDim = 64;

// Not initialised, contiguous. Straight from torch's C functions: through its dispatcher it takes several microseconds.
inline Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype, int32_t device_type, int32_t device_index) {
  const int64_t dim = int64_t(sizes.size());
  STD_TORCH_CHECK(dim <= kMaxDim, "fastattn: a tensor of more than ", kMaxDim, " dims");
  std::array<int64_t, kMaxDim> strides;
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[size_t(i)] = stride;
    stride *= std::max<int64_t>(sizes[size_t(i)], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

template <class T>
const T* values_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

}  // namespace fastattn
