// The kernels of this folder as operators `<op>_cuda` of torch, over LibTorch's stable ABI. Schemas, and what each one takes, are in
// fastattn/cuda/<op>.py; that is checked there, and once more by the launchers, whose error is raised.
//
// With FASTATTN_CUDA_ON_CPU they are operators of CPU tensors, on kernels that run there: for tests.

#include <cstring>

#include "../common/tensors.hpp"
#include "append_paged_kv.hpp"
#include "moe_routing.hpp"
#include "norm.hpp"
#include "paged_attention.hpp"
#include "sampling.hpp"
#include "softmax.hpp"

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
  int num_multiprocessors() const { return 8; }
  int shared_memory() const { return 100 << 10; }
  cudaError_t clear(void* memory, size_t bytes) const {
    if (bytes > 0) std::memset(memory, 0, bytes);
    return cudaSuccess;
  }
#else
  explicit Device(const Tensor& t) : index_(t.get_device()) {
    int current = -1;
    cudaGetDevice(&current);
    if (index_ != current) TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(index_, &guard_));
  }
  ~Device() {  // torch's guard makes no context on the device that it goes back to
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }
  Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
    return fastattn::empty(sizes, dtype, aoti_torch_device_type_cuda(), index_);
  }
  cudaStream_t stream() const {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  int num_multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int shared_memory() const { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }
  cudaError_t clear(void* memory, size_t bytes) const { return bytes > 0 ? cudaMemsetAsync(memory, 0, bytes, stream()) : cudaSuccess; }

 private:
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    cudaDeviceGetAttribute(&value, name, index_);
    return value;
  }

  int index_;
  DeviceGuardHandle guard_ = nullptr;
#endif

 public:
  Device(const Device&) = delete;
};

void check(cudaError_t error, const char* op) {
#ifdef FASTATTN_CUDA_ON_CPU
  STD_TORCH_CHECK(error == cudaSuccess, op, ": cudaError ", int(error));
#else
  if (error != cudaSuccess) (void)cudaGetLastError();  // or torch would find it at a launch of its own
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
#endif
}

Dtype dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Char: return Dtype::kInt8;
    case ScalarType::Float8_e4m3fn: return Dtype::kFloat8E4M3;
    default: STD_TORCH_CHECK(false, op, ": a tensor has a dtype that no kernel has");
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

// As fastattn::append_paged_kv, whose checks it counts on. Last dims contiguous, cache_seqlens, cu_seqlens and scales whole; scales fp32.
void append_paged_kv_cuda(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor cache_seqlens, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> cos, std::optional<Tensor> sin, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, bool interleaved) {
  constexpr char kOp[] = "append_paged_kv_cuda";
  const Device device(k);
  const int64_t dim = k.dim();
  STD_TORCH_CHECK(
      k_cache.scalar_type() == v_cache.scalar_type() && k.scalar_type() == v.scalar_type() && cos.has_value() == sin.has_value() &&
          (!cos || cos->scalar_type() == sin->scalar_type()),
      kOp, ": k and v, the caches, and the tables must each have one dtype");
  AppendPagedKvParams p = {};
  p.k = k.data_ptr(), p.v = v.data_ptr(), p.k_cache = k_cache.data_ptr(), p.v_cache = v_cache.data_ptr();
  p.page_table = static_cast<const int32_t*>(page_table.data_ptr());
  p.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.data_ptr()), p.cu_seqlens = values_of<int32_t>(cu_seqlens);
  p.cos = values_of<void>(cos), p.sin = values_of<void>(sin);
  p.k_scale = values_of<float>(k_scale), p.v_scale = values_of<float>(v_scale);
  p.batch = dim == 4 ? k.size(0) : 1, p.seqlen = k.size(dim - 3), p.num_heads = k.size(dim - 2);
  p.head_dim = k.size(dim - 1), p.head_dim_v = v.size(dim - 1), p.num_seqs = cache_seqlens.numel();
  p.num_pages = k_cache.size(0), p.page_size = k_cache.size(1), p.max_pages = page_table.size(1);
  p.stride_kb = dim == 4 ? k.stride(0) : 0, p.stride_ks = k.stride(dim - 3), p.stride_kh = k.stride(dim - 2);
  p.stride_vb = dim == 4 ? v.stride(0) : 0, p.stride_vs = v.stride(dim - 3), p.stride_vh = v.stride(dim - 2);
  p.stride_kcp = k_cache.stride(0), p.stride_kcs = k_cache.stride(1), p.stride_kch = k_cache.stride(2);
  p.stride_vcp = v_cache.stride(0), p.stride_vcs = v_cache.stride(1), p.stride_vch = v_cache.stride(2);
  p.stride_page_table = page_table.stride(0);
  p.dtype = dtype_of(k, kOp), p.cache_dtype = dtype_of(k_cache, kOp);
  if (cos) {
    p.table_len = cos->size(0), p.rotary_dim = 2 * cos->size(1), p.table_dtype = dtype_of(*cos, kOp);
    p.stride_cos = cos->stride(0), p.stride_sin = sin->stride(0);
  }
  p.interleaved = interleaved;
  check(append_paged_kv(p, device.stream()), kOp);
}

// Memory for the sort of T·K slots.
struct MoEPlan {
  Tensor order, inverse, offsets;

  MoEPlan(const Device& device, int64_t num_slots, int64_t num_experts)
      : order(device.empty({num_slots}, ScalarType::Long)),
        inverse(device.empty({num_slots}, ScalarType::Long)),
        offsets(device.empty({num_experts}, ScalarType::Int)) {}
  MoEPlanPointers pointers() const {
    return {static_cast<int64_t*>(order.data_ptr()), static_cast<int64_t*>(inverse.data_ptr()), static_cast<int32_t*>(offsets.data_ptr())};
  }
};

int32_t int32_of(int64_t value, const char* op) {
  STD_TORCH_CHECK(value == int32_t(value), op, ": a size is beyond 32 bits");
  return int32_t(value);
}

// order, inverse and offsets as fastattn::moe_dispatch.
std::tuple<Tensor, Tensor, Tensor> moe_dispatch_cuda(Tensor indices, int64_t num_experts) {
  constexpr char kOp[] = "moe_dispatch_cuda";
  STD_TORCH_CHECK(indices.dim() == 2 && num_experts >= 0, kOp, ": indices must be (T, K)");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int, kOp, ": indices must be int32 or int64");
  const Device device(indices);
  const MoEPlan plan(device, indices.numel(), num_experts);
  MoEDispatchParams p = {};
  p.indices = indices.data_ptr(), p.plan = plan.pointers();
  p.num_tokens = indices.size(0), p.stride_t = indices.stride(0), p.stride_k = indices.stride(1);
  p.num_experts = int32_of(num_experts, kOp), p.top_k = int32_of(indices.size(1), kOp);
  p.has_int64_indices = indices.scalar_type() == ScalarType::Long;
  check(moe_dispatch(p, device.stream()), kOp);
  return {plan.order, plan.inverse, plan.offsets};
}

// weights and indices as fastattn::moe_route_fwd, and their plan. Rows of logits contiguous; bias fp32 and contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_route_dispatch_cuda(
    Tensor logits, std::optional<Tensor> bias, int64_t top_k, bool sigmoid, bool score_first, int64_t num_groups, int64_t top_k_groups,
    bool renormalize, double scaling_factor) {
  constexpr char kOp[] = "moe_route_dispatch_cuda";
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1) && top_k >= 0, kOp, ": logits must be rows of consecutive entries");
  const Device device(logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const MoEPlan plan(device, num_tokens * top_k, num_experts);
  const Tensor weights = device.empty({num_tokens, top_k}, ScalarType::Float), indices = device.empty({num_tokens, top_k}, ScalarType::Long);
  MoERouteParams p = {};
  p.logits = logits.data_ptr(), p.bias = values_of<float>(bias), p.plan = plan.pointers();
  p.weights = static_cast<float*>(weights.data_ptr()), p.indices = static_cast<int64_t*>(indices.data_ptr());
  p.num_tokens = num_tokens, p.stride_t = logits.stride(0), p.dtype = dtype_of(logits, kOp);
  p.num_experts = int32_of(num_experts, kOp), p.top_k = int32_of(top_k, kOp);
  p.num_groups = int32_of(num_groups, kOp), p.top_k_groups = int32_of(top_k_groups, kOp);
  p.score = sigmoid ? MoEScore::kSigmoid : MoEScore::kSoftmax, p.score_first = score_first;
  p.renormalize = renormalize, p.scaling_factor = float(scaling_factor);
  check(moe_route_dispatch(p, device.stream()), kOp);
  return {weights, indices, plan.order, plan.inverse, plan.offsets};
}

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

// out and lse as fastattn::paged_attention, whose checks it counts on. All small tensors contiguous, slopes, sinks and scales fp32.
std::tuple<Tensor, Tensor> paged_attention_cuda(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seqlens_k, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
    std::optional<Tensor> leftpad, int64_t max_seqlen_q, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softmax_scale, double softcap, int64_t num_splits) {
  constexpr char kOp[] = "paged_attention_cuda";
  const Device device(q);
  const bool packed = cu_seqlens_q.has_value();
  const int64_t dim = q.dim();
  STD_TORCH_CHECK(q.stride(dim - 1) == 1 && k_cache.stride(3) == 1 && v_cache.stride(3) == 1, kOp, ": last dims must be contiguous");
  STD_TORCH_CHECK(k_cache.scalar_type() == q.scalar_type() && v_cache.scalar_type() == q.scalar_type() &&
                      k_cache.size(3) == q.size(dim - 1) && v_cache.size(3) == q.size(dim - 1),
                  kOp, ": q, k_cache and v_cache must have one dtype and head_dim");
  PagedAttentionParams p = {};
  p.q = q.data_ptr(), p.k_cache = k_cache.data_ptr(), p.v_cache = v_cache.data_ptr();
  p.page_table = static_cast<const int32_t*>(page_table.data_ptr()), p.seqlens_k = static_cast<const int32_t*>(seqlens_k.data_ptr());
  p.cu_seqlens_q = values_of<int32_t>(cu_seqlens_q), p.leftpad = values_of<int32_t>(leftpad);
  p.alibi_slopes = values_of<float>(alibi_slopes), p.sinks = values_of<float>(sinks);
  p.k_scale = values_of<float>(k_scale), p.v_scale = values_of<float>(v_scale);
  p.batch = page_table.size(0), p.max_pages = page_table.size(1), p.stride_table = page_table.stride(0);
  p.num_heads = q.size(dim - 2), p.head_dim = q.size(dim - 1), p.num_kv_heads = k_cache.size(2);
  p.num_pages = k_cache.size(0), p.page_size = k_cache.size(1);
  p.total_q = packed ? q.size(0) : p.batch * max_seqlen_q;
  p.seqlen_q = packed ? std::min(max_seqlen_q, p.total_q) : max_seqlen_q;
  p.stride_qb = packed ? 0 : q.stride(0), p.stride_qs = q.stride(dim - 3), p.stride_qh = q.stride(dim - 2);
  p.stride_kp = k_cache.stride(0), p.stride_ks = k_cache.stride(1), p.stride_kh = k_cache.stride(2);
  p.stride_vp = v_cache.stride(0), p.stride_vs = v_cache.stride(1), p.stride_vh = v_cache.stride(2);
  p.stride_slopes = alibi_slopes && alibi_slopes->dim() == 2 ? p.num_heads : 0;
  p.window_left = window_left.value_or(kNoBound), p.window_right = window_right.value_or(kNoBound);
  p.softmax_scale = float(softmax_scale), p.softcap = float(softcap), p.dtype = dtype_of(q, kOp);
  // A fixed split promises a sequence the same bits in any company: packed, that may have more queries than it has itself.
  const int64_t rows = packed && num_splits > 0 ? INT32_MAX : p.seqlen_q * (p.num_heads / std::max<int64_t>(p.num_kv_heads, 1));
  p.tile_rows = paged_attention_tile_rows(rows, p.head_dim, p.dtype);
  p.num_splits = num_splits > 0 ? int32_t(num_splits) : paged_attention_num_splits(p, device.num_multiprocessors(), device.shared_memory());

  const Tensor out = device.empty(q.sizes(), q.scalar_type());
  const Tensor lse = packed ? device.empty({p.num_heads, p.total_q}, ScalarType::Float)
                            : device.empty({p.batch, p.num_heads, max_seqlen_q}, ScalarType::Float);
  p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
  if (packed) {  // rows of no sequence, which nobody writes
    check(device.clear(p.out, out.numel() * out.element_size()), kOp);
    torch::stable::fill_(const_cast<Tensor&>(lse), -INFINITY);
  }
  std::optional<Tensor> memory;
  if (p.num_splits > 1) {
    const int64_t tiles = paged_attention_tiles(p), partial_rows = tiles * p.num_splits * p.tile_rows;
    memory = device.empty({partial_rows * (p.head_dim + 1) + tiles}, ScalarType::Float);
    p.partial_out = static_cast<float*>(memory->data_ptr());
    p.partial_lse = p.partial_out + partial_rows * p.head_dim;
    p.counters = reinterpret_cast<uint32_t*>(p.partial_lse + partial_rows);
    check(device.clear(p.counters, tiles * sizeof(uint32_t)), kOp);
  }
  check(paged_attention(p, device.stream()), kOp);
  return {out, lse};
}

// As fastattn::sample. Rows of logits contiguous; temperatures, top_ps and min_ps fp32, top_ks int32 or int64, all contiguous.
Tensor sample_cuda(
    Tensor logits, Tensor seed, std::optional<Tensor> temperatures, std::optional<Tensor> top_ks, std::optional<Tensor> top_ps,
    std::optional<Tensor> min_ps, double temperature, int64_t top_k, double top_p, double min_p) {
  constexpr char kOp[] = "sample_cuda";
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) <= 1), kOp, ": logits must be rows of consecutive entries");
  const Device device(logits);
  const Tensor ids = device.empty({logits.size(0)}, ScalarType::Long);
  SampleParams p = {};
  p.logits = logits.data_ptr(), p.seeds = static_cast<const int64_t*>(seed.data_ptr()), p.ids = static_cast<int64_t*>(ids.data_ptr());
  p.temperatures = values_of<float>(temperatures), p.top_ks = values_of<void>(top_ks);
  p.top_ps = values_of<float>(top_ps), p.min_ps = values_of<float>(min_ps);
  p.num_rows = logits.size(0), p.num_cols = logits.size(1), p.stride_x = logits.stride(0);
  p.temperature = float(temperature), p.top_k = int32_of(top_k, kOp), p.top_p = float(top_p), p.min_p = float(min_p);
  p.dtype = dtype_of(logits, kOp), p.has_int64_top_ks = top_ks && top_ks->scalar_type() == ScalarType::Long;
  p.has_seed_per_row = seed.numel() > 1;
  check(sample(p, device.stream()), kOp);
  return ids;
}

// Over x's last dim, in x's dtype or fp32.
Tensor softmax_fwd_cuda(Tensor x, ScalarType dtype) {
  constexpr char kOp[] = "softmax_fwd_cuda";
  const Device device(x);
  const Rows rows(x, kOp);
  const Tensor y = device.empty(x.sizes(), dtype);
  SoftmaxParams p = {};
  p.x = x.data_ptr(), p.y = y.data_ptr();
  p.num_rows = rows.num_rows, p.num_cols = p.stride_y = rows.num_cols, p.stride_x = rows.stride;
  p.dtype = dtype_of(x, kOp), p.y_dtype = dtype_of(y, kOp);
  check(softmax_fwd(p, device.stream()), kOp);
  return y;
}

#ifdef FASTATTN_CUDA_ON_CPU
STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
#endif
  m.impl("append_paged_kv_cuda", TORCH_BOX(&append_paged_kv_cuda));
  m.impl("moe_dispatch_cuda", TORCH_BOX(&moe_dispatch_cuda));
  m.impl("moe_route_dispatch_cuda", TORCH_BOX(&moe_route_dispatch_cuda));
  m.impl("norm_fwd_cuda", TORCH_BOX(&norm_fwd_cuda));
  m.impl("paged_attention_cuda", TORCH_BOX(&paged_attention_cuda));
  m.impl("sample_cuda", TORCH_BOX(&sample_cuda));
  m.impl("softmax_fwd_cuda", TORCH_BOX(&softmax_fwd_cuda));
}

}  // namespace
}  // namespace fastattn
