// What the operators beside this file need of torch's tensors besides.
#pragma once

#include "../common/tensors.hpp"
#include "elements.hpp"

namespace fastattn {

inline Kind kind_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Kind::f32;
    case ScalarType::Half: return Kind::f16;
    case ScalarType::BFloat16: return Kind::bf16;
    case ScalarType::Char: return Kind::i8;
    default: return Kind::e4m3;
  }
}

inline Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) { return empty(sizes, dtype, aoti_torch_device_type_cpu(), 0); }

inline const void* at(const void* data, Kind kind, int64_t offset) { return static_cast<const char*>(data) + offset * size_of(kind); }

}  // namespace fastattn
