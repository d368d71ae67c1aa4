// The kernels of this folder as operators `<op>_cuda` of torch, over LibTorch's stable ABI. Schemas, and what each one takes, are in
// fastattn/cuda/<op>.py; that is checked there, and once more by the launchers, whose error is raised.
//
// With FASTATTN_CUDA_ON_CPU they are operators of CPU tensors, on kernels that run there: for tests.

#include "../common/tensors.hpp"
#include "norm.hpp"

namespace fastattn {
namespace {

// What a launch needs to know of the tensors' device, which is the current one in the meantime.
class Device {
 public:
#ifdef FASTATTN_CUDA_ON_CPU
  explicit Device(const Tensor&) {}
  Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
    return fastattn::empty(sizes, dtype, aoti_torch_device_type_cpu(), 0);
  }
  cudaStream_t stream() const { return nullptr; }
#else
  explicit Device(const Tensor& t) : index_(t.get_device()) {
    cudaGetDevice(&before_);
    if (index_ != before_) cudaSetDevice(index_);
  }
  ~Device() {
    if (index_ != before_) cudaSetDevice(before_);
  }
  Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
    return fastattn::empty(sizes, dtype, aoti_torch_device_type_cuda(), index_);
  }
  cudaStream_t stream() const {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int index_, before_;
#endif

 public:
  Device(const Device&) = delete;
};

void check(cudaError_t error, const char* op) {
#ifdef FASTATTN_CUDA_ON_CPU
  STD_TORCH_CHECK(error == cudaSuccess, op, ": cudaError ", int(error));
#else
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
#endif
}

Dtype dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: STD_TORCH_CHECK(false, op, ": a tensor is neither float32 nor float16 nor bfloat16");
  }
}

// Tensors (…, N) as rows of consecutive entries at one stride.
struct Rows {
  int64_t num_rows = 1, num_cols, stride;

  Rows(const Tensor& t, const char* op) {
    const auto sizes = t.sizes(), strides = t.strides();
    const size_t dim = sizes.size();
    STD_TORCH_CHECK(dim > 0, op, ": a row has a dim");
    num_cols = stride = sizes[dim - 1];
    bool in_rows = num_cols <= 1 || strides[dim - 1] == 1;
    bool first = true;
    for (size_t i = dim - 1; i-- > 0;) {
      if (sizes[i] != 1) {
        if (first) stride = strides[i];
        in_rows = in_rows && strides[i] == num_rows * stride;
        first = false;
      }
      num_rows *= sizes[i];
    }
    STD_TORCH_CHECK(in_rows || num_rows * num_cols == 0, op, ": rows must lie at one stride, and their entries one after another");
  }
};

// --------------------------------------------------------------------------------------------------------------------

// y, h and statistics as fastattn::norm_fwd, all in x's dtype; h is empty without a residual.
std::tuple<Tensor, Tensor, Tensor> norm_fwd_cuda(
    Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps, double weight_offset,
    bool subtract_mean, bool cast_before_weight) {
  constexpr char kOp[] = "norm_fwd_cuda";
  const Device device(x);
  const Rows rows(x, kOp);
  const Tensor y = device.empty(x.sizes(), x.scalar_type());
  const Tensor h = residual ? device.empty(x.sizes(), x.scalar_type()) : device.empty({0}, x.scalar_type());
  const Tensor stats = device.empty({1 + subtract_mean, rows.num_rows}, ScalarType::Float);
  NormParams p = {};
  p.x = x.data_ptr(), p.y = y.data_ptr(), p.stats = static_cast<float*>(stats.data_ptr());
  p.num_rows = rows.num_rows, p.num_cols = rows.num_cols;
  p.stride_x = rows.stride, p.stride_y = p.stride_h = rows.num_cols;
  p.dtype = p.weight_dtype = dtype_of(x, kOp);
  if (residual) {
    const Rows of_residual(*residual, kOp);
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type() && of_residual.num_rows == rows.num_rows &&
                        of_residual.num_cols == rows.num_cols,
                    kOp, ": residual must have x's dtype and shape");
    p.residual = residual->data_ptr(), p.h = h.data_ptr(), p.stride_residual = of_residual.stride;
  }
  for (const auto* parameter : {&weight, &bias}) {
    if (!*parameter) continue;
    const Tensor& t = **parameter;
    STD_TORCH_CHECK(t.numel() == rows.num_cols && t.is_contiguous(), kOp, ": weight and bias must be contiguous, an entry a column");
    p.weight_dtype = dtype_of(t, kOp);
  }
  STD_TORCH_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), kOp, ": weight and bias must have one dtype");
  p.weight = values_of<void>(weight), p.bias = values_of<void>(bias);
  p.eps = float(eps), p.weight_offset = float(weight_offset);
  p.subtract_mean = subtract_mean, p.cast_before_weight = cast_before_weight;
  check(norm_fwd(p, device.stream()), kOp);
  return {y, h, stats};
}

#ifdef FASTATTN_CUDA_ON_CPU
STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
#endif
  m.impl("norm_fwd_cuda", TORCH_BOX(&norm_fwd_cuda));
}

}  // namespace
}  // namespace fastattn
