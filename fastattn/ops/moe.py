"""A mixture of experts, from routed tokens to their sum, as a torch operator, and the public function.

Tokens are gathered into the first product, whose epilogue is the activation; the second product's rows are summed token by token. What a
backward needs is x, the pre-activation and the plan: the second product's output, T·K rows of H, is gone as soon as it is summed. The
gradient of a router's weight is ⟨dout[t], y⟩ of its row y = a·down_projᵀ + down_bias; that is
⟨dout[t]·down_proj, a⟩ + ⟨dout[t], down_bias⟩, and the backward has dout·down_proj anyway, and a from the pre-activation.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn.cpu import moe as cpu

from . import checks
from .dispatch import checks_values, describe, log, runs_kernels
from .grouped_mm import check_bias, check_matrices
from .moe_routing import MAX_EXPERTS, MoEPlan, check_id_values, check_ids, check_plan, check_plan_values, moe_dispatch
from .operator import apply, autocast, define, differentiable, is_watched, once, operators, wants_gradient

ACTIVATIONS = ("swiglu", "geglu", "clamped_swiglu")
LAYOUTS = ("concatenated", "interleaved")
ALPHA, LIMIT = cpu.ALPHA, cpu.LIMIT  # of "clamped_swiglu"


def _implementation(t: Tensor):
    """The module with this device's moe_fwd and moe_bwd; kernels are imported here, so that `import fastattn` needs no Triton."""
    if runs_kernels(t):
        from fastattn.kernels import moe

        return moe
    return cpu


def _moe_fwd(x, order, inverse, offsets, weights, gate_up_proj, down_proj, *rest):
    if log.isEnabledFor(logging.INFO):
        log.info("moe_fwd: x %s weights %s gate_up_proj %s", *map(describe, (x, weights, gate_up_proj)))
    if checks_values(x):
        check_plan_values("moe", order, inverse, offsets)
    return _implementation(x).moe_fwd(x, order, inverse, offsets, weights, gate_up_proj, down_proj, *rest)


def _moe_fwd_fake(x, order, inverse, offsets, weights, gate_up_proj, down_proj, *rest):
    *_, transposed, keep = rest
    return x.new_empty(x.shape), x.new_empty(order.shape[0] if keep else 0, gate_up_proj.shape[2 if transposed else 1])


def _moe_bwd(dout, x, order, inverse, offsets, weights, gate_up_proj, *rest):
    if log.isEnabledFor(logging.INFO):
        log.info("moe_bwd: dout %s weights %s gate_up_proj %s wanted %s", *map(describe, (dout, weights, gate_up_proj)), rest[-1])
    return _implementation(dout).moe_bwd(dout, x, order, inverse, offsets, weights, gate_up_proj, *rest)


def _moe_bwd_fake(dout, x, order, inverse, offsets, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, *rest):
    tensors = dout, weights, gate_up_proj, down_proj, gate_up_bias, down_bias
    return tuple(
        dout.new_empty(0 if t is None or not want else t.shape, dtype=torch.float32 if t is weights else dout.dtype)
        for t, want in zip(tensors, rest[-1], strict=True)
    )


_INPUTS = (
    "Tensor x, Tensor order, Tensor inverse, Tensor offsets, Tensor weights, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, "
    "Tensor? down_bias"
)
_OPTIONS = "str activation, str layout, bool transposed"
define(f"moe_fwd({_INPUTS}, {_OPTIONS}, bool keep) -> (Tensor out, Tensor pre)", _moe_fwd, _moe_fwd_fake)
define(
    f"moe_bwd(Tensor dout, {_INPUTS}, Tensor pre, {_OPTIONS}, bool[] wanted) -> (Tensor dx, Tensor dweights, "
    "Tensor dgate_up_proj, Tensor ddown_proj, Tensor dgate_up_bias, Tensor ddown_bias)",
    _moe_bwd,
    _moe_bwd_fake,
    torch_on_cuda=True,
)


def _product_flops(order: Tensor, down_proj: Tensor) -> int:
    """Of the second product; the first is twice as wide."""
    return 2 * order.shape[0] * down_proj.shape[1] * down_proj.shape[2]


@register_flop_formula(torch.ops.fastattn.moe_fwd, get_raw=True)
def _moe_fwd_flops(x, order, inverse, offsets, weights, gate_up_proj, down_proj, *rest, **_) -> int:
    return 3 * _product_flops(order, down_proj)


@register_flop_formula(torch.ops.fastattn.moe_bwd, get_raw=True)
def _moe_bwd_flops(dout, x, order, inverse, offsets, weights, gate_up_proj, down_proj, *rest, **_) -> int:
    want_x, _, want_gate_up, want_down, _, _ = rest[-1]
    return (any(rest[-1][:5]) + 2 * want_x + 2 * want_gate_up + want_down) * _product_flops(order, down_proj)


@differentiable
class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, order, inverse, offsets, activation, layout, transposed, keep
    ):
        return operators.moe_fwd(
            x, order, inverse, offsets, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, activation, layout, transposed, keep
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, activation, layout, transposed, _ = inputs
        ctx.options = activation, layout, transposed
        _, pre = output
        ctx.set_materialize_grads(False)  # pre's would be zeros, as many as it has
        ctx.mark_non_differentiable(pre)
        ctx.save_for_backward(*tensors, pre)

    @staticmethod
    def backward(ctx, dout, _):
        x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, order, inverse, offsets, pre = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:6])
        grads = torch.ops.fastattn.moe_bwd(
            dout, x, order, inverse, offsets, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, pre, *ctx.options, wanted
        )
        grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *once("moe", grads, dout, x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias), *[None] * 7


def moe(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    layout: str = "concatenated",
    transposed: bool = False,
    plan: MoEPlan | None = None,
) -> Tensor:
    """Each token through its K experts, and their weighted sum: out[t] = Σ_k weight[t, k]·expert(index[t, k])(x[t]), where an expert is

        gate, up = halves of x·gate_up_projᵀ + gate_up_bias        y = (act(gate)∘up)·down_projᵀ + down_bias

    No token is dropped, nothing waits for the GPU, and nothing is added atomically: two runs are the same bit for bit.

        Mixtral, Qwen3-MoE, DeepSeek-V3    as they are
        gpt-oss                            activation="clamped_swiglu", layout="interleaved", transposed=True, both biases

    Args:
        x: (T, H), any T and H; float16, bfloat16 or float32. Any strides with a contiguous last dim; others cost a copy.
        top_k_index: (T, K) int32 or int64: `moe_route`'s indices. A token may name an expert twice. Ids of E or more are nobody's (experts
            of other ranks) and add nothing. Negative ids are refused where they lie on the CPU, and so is a plan that is none; on CUDA
            they are nobody's too.
        top_k_weights: (T, K): `moe_route`'s weights; float16, bfloat16 or float32, read as fp32.
        gate_up_proj: (E, 2·I, H), x's dtype; E up to 512. Its rows are [gate; up], or with layout="interleaved" gate and up in turns.
        down_proj: (E, H, I), x's dtype.
        activation: "swiglu", silu(gate)∘up; "geglu", gelu(gate)∘up with gelu's tanh approximation; or gpt-oss's "clamped_swiglu",
            g·σ(1.702·g)∘(u + 1) of g = min(gate, 7) and u = up within ±7.
        gate_up_bias: (E, 2·I), in gate_up_proj's order. down_bias: (E, H). None is 0.
        transposed: gate_up_proj is (E, H, 2·I) and down_proj (E, I, H), read as they lie.
        plan: `moe_dispatch(top_k_index, E)`, where it is known (`moe_route(…, return_plan=True)`); None makes it.

    Returns:
        out: (T, H) in x's dtype, contiguous.

    Memory: a forward that is to be differentiated keeps x, the pre-activation (T·K, 2·I) and the plan of `moe_dispatch`. The experts'
    output (T·K, H) is held within the forward alone, and as much for x's gradient within the backward.

    Numerics: products are summed in fp32, activations computed in fp32; the pre-activation where it is kept, the activation and a row's
    output are rounded to x's dtype, the weighted sum is in fp32 in the order of k. Gradients reach x, top_k_weights, both projections and
    both biases; an expert without tokens has gradients of 0. Under autocast x, projections and biases are cast as for a linear layer, at
    every call. Double backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Source: Shazeer et al., arXiv 1701.06538; the backward from ⟨dout·down_proj, a⟩ is SonicMoE's (arXiv 2512.14080).

    Example:
        >>> x, gate_up, down = torch.randn(100, 64), torch.randn(8, 2 * 96, 64), torch.randn(8, 64, 96)
        >>> weights, indices = fastattn.moe_route(torch.randn(100, 8), 2, renormalize=True)
        >>> fastattn.moe(x, indices, weights, gate_up, down).shape
        torch.Size([100, 64])
    """
    op = "moe"
    checks.check_tensor(op, "x", x)
    x, gate_up_proj, down_proj, gate_up_bias, down_bias = autocast(x, gate_up_proj, down_proj, gate_up_bias, down_bias)
    checks.check_dtype(op, "x", x)
    if x.dim() != 2 or x.shape[1] < 1:
        checks.reject(op, "x", "have shape (T, H) with H of 1 or more", checks.shape(x))
    checks.check_choice(op, "activation", activation, ACTIVATIONS)
    checks.check_choice(op, "layout", layout, LAYOUTS)
    checks.check_bool(op, "transposed", transposed)
    hidden_size, letters = x.shape[1], "(E, H, 2·I)" if transposed else "(E, 2·I, H)"
    check_matrices(op, "gate_up_proj", gate_up_proj, x, letters)
    num_experts, rows, cols = gate_up_proj.shape
    cols, rows = (rows, cols) if transposed else (cols, rows)
    if cols != hidden_size or rows % 2:
        checks.reject(op, "gate_up_proj", f"have shape {letters} with x's H = {hidden_size}", checks.shape(gate_up_proj))
    if num_experts > MAX_EXPERTS:
        checks.reject(op, "gate_up_proj", f"have at most {MAX_EXPERTS} experts", checks.shape(gate_up_proj))
    letters = "(E, I, H)" if transposed else "(E, H, I)"
    check_matrices(op, "down_proj", down_proj, x, letters)
    expected = (num_experts, rows // 2, hidden_size) if transposed else (num_experts, hidden_size, rows // 2)
    if checks.shape(down_proj) != expected:
        checks.reject(op, "down_proj", f"have shape {letters} = {expected} to match gate_up_proj", checks.shape(down_proj))
    check_bias(op, "gate_up_bias", gate_up_bias, x, (num_experts, rows), "(E, 2·I)")
    check_bias(op, "down_bias", down_bias, x, (num_experts, hidden_size), "(E, H)")
    check_ids(op, "top_k_index", top_k_index)
    checks.check_tensor(op, "top_k_weights", top_k_weights)
    checks.check_dtype(op, "top_k_weights", top_k_weights)
    for arg, t in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
        checks.check_device(op, arg, t, "x's", x.device)
        if t.dim() != 2 or t.shape[0] != x.shape[0] or t.shape[1] < 1:
            checks.reject(op, arg, f"have shape (T, K) with x's T = {x.shape[0]}", checks.shape(t))
    if top_k_weights.shape != top_k_index.shape:
        checks.reject(op, "top_k_weights", f"have top_k_index's shape {checks.shape(top_k_index)}", checks.shape(top_k_weights))
    if plan is None:
        plan = moe_dispatch(top_k_index, num_experts)
    else:
        check_plan(op, plan, "x", x)
        sizes = plan[0].shape[0], plan[2].shape[0]
        if sizes != (top_k_index.numel(), num_experts):
            checks.reject(op, "plan", f"be of {top_k_index.numel()} slots and {num_experts} experts", f"{sizes[0]} and {sizes[1]}")
        if type(top_k_index) is Tensor and not is_watched():  # no operator reads them here, such as moe_dispatch is
            check_id_values(op, top_k_index, "top_k_index")
    tensors = x, top_k_weights.float(), gate_up_proj, down_proj, gate_up_bias, down_bias
    out, _ = apply(op, _MoE, *tensors, *plan, activation, layout, bool(transposed), wants_gradient(*tensors))
    return out
