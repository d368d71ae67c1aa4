// What the operators beside this file need of torch's tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>

#include "elements.hpp"

namespace fastattn {

using torch::stable::Tensor;

inline Kind kind_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return Kind::f32;
    case ScalarType::Half: return Kind::f16;
    case ScalarType::BFloat16: return Kind::bf16;
    case ScalarType::Char: return Kind::i8;
    default: return Kind::e4m3;
  }
}

template <class T>
const T* values_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Not initialised, contiguous, on the CPU. Straight from torch's C functions: through its dispatcher it takes several microseconds.
inline Tensor empty(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) {
  const int64_t dim = int64_t(sizes.size());
  std::array<int64_t, 8> strides;
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[size_t(i)] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes.begin(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline const void* at(const void* data, Kind kind, int64_t offset) { return static_cast<const char*>(data) + offset * size_of(kind); }

}  // namespace fastattn
