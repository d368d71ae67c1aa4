// The launchers of csrc/cuda to ctypes and to replay.cpp, by name: for the tests, in builds for the CPU.

#include "exports.hpp"

#include <exception>
#include <string>

#include "../cuda/append_paged_kv.hpp"
#include "../cuda/moe_routing.hpp"
#include "../cuda/norm.hpp"
#include "../cuda/paged_attention.hpp"
#include "../cuda/sampling.hpp"
#include "../cuda/softmax.hpp"
#include "probes.hpp"

namespace {

using Launcher = cudaError_t (*)(const void* params);

struct Op {
  const char* name;
  size_t params_size;
  Launcher launcher;
};

template <class Params, cudaError_t (*kLauncher)(const Params&, cudaStream_t)>
Op op(const char* name) {
  return {name, sizeof(Params), [](const void* params) { return kLauncher(*static_cast<const Params*>(params), nullptr); }};
}

const Op kOps[] = {
    op<fastattn::AppendPagedKvParams, fastattn::append_paged_kv>("append_paged_kv"),
    op<fastattn::MoEDispatchParams, fastattn::moe_dispatch>("moe_dispatch"),
    op<fastattn::MoERouteParams, fastattn::moe_route_dispatch>("moe_route_dispatch"),
    op<fastattn::NormParams, fastattn::norm_fwd>("norm_fwd"),
    op<fastattn::PagedAttentionParams, fastattn::paged_attention>("paged_attention"),
    op<fastattn::SampleParams, fastattn::sample>("sample"),
    op<fastattn::SoftmaxParams, fastattn::softmax_fwd>("softmax_fwd"),
    op<fastattn::ProbeParams, fastattn::probe>("probe"),
};

}  // namespace

const char* cuda_on_cpu_call(const char* name, const void* params, size_t params_size, uint64_t seed) {
  static thread_local std::string message;
  for (const Op& op : kOps) {
    if (std::string(op.name) != name) continue;
    if (params_size != op.params_size) return "the parameters have another size here";
    cuda_on_cpu::set_seed(seed);
    try {
      const cudaError_t error = op.launcher(params);
      if (error == cudaSuccess) return nullptr;
      message = "cudaError " + std::to_string(error);
    } catch (const std::exception& error) {
      message = error.what();
    }
    return message.c_str();
  }
  return "no such op";
}
