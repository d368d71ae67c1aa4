"""Routing tokens to experts and back as torch operators, and the public functions."""

from __future__ import annotations

import logging
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastattn.cpu import moe_routing as cpu
from fastattn.cuda import moe_routing as cuda

from . import checks
from .dispatch import checks_values, chooses_cuda, describe, log, runs_kernels
from .operator import apply, define, differentiable, once, operators

MAX_EXPERTS = 512  # whose scores a row keeps in registers
SCORES = ("softmax", "sigmoid")
ORDERS = ("score_then_topk", "topk_then_score")


class MoEPlan(NamedTuple):
    """Where the T·K slots of a batch, slot t·K + k being token t's k-th expert, lie when sorted by expert.

    order: (T·K,) int64, the slot of each sorted row. inverse: (T·K,) int64, the sorted row of each slot. offsets: (E,) int32, the row at
    which each expert's end: expert e has rows offsets[e − 1] to offsets[e], as `torch.nn.functional.grouped_mm` takes them. Rows from
    offsets[−1] on are those of ids that name no expert.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def _implementation(t: Tensor):
    """The module with this device's functions; kernels are imported here, so that `import fastattn` needs no Triton."""
    if runs_kernels(t):
        from fastattn.kernels import moe_routing

        return moe_routing
    return cpu


# --------------------------------------------------------------------------------------------------------------------
# The operators.


def _moe_route_fwd(logits: Tensor, bias: Tensor | None, top_k: int, score: str, order: str, *options) -> tuple[Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("moe_route_fwd: logits %s bias %s top_k=%d %s %s", *map(describe, (logits, bias)), top_k, score, order)
    return _implementation(logits).moe_route_fwd(logits, bias, top_k, score, order, *options)


def _moe_route_bwd(dweights: Tensor, logits: Tensor, indices: Tensor, *options) -> Tensor:
    if log.isEnabledFor(logging.INFO):
        log.info("moe_route_bwd: logits %s indices %s", *map(describe, (logits, indices)))
    return _implementation(logits).moe_route_bwd(dweights, logits, indices, *options)


def _moe_route_dispatch(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, order: str, num_groups: int, top_k_groups: int, renormalize: bool,
    scaling_factor: float, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = logits, bias, top_k, score, order, num_groups, top_k_groups, renormalize, scaling_factor
    if runs_kernels(logits) and chooses_cuda("moe_route", backend, True, cuda.limit, logits, logits.shape[0] * top_k):
        if log.isEnabledFor(logging.INFO):
            given = *map(describe, (logits, bias)), top_k, score, order
            log.info("moe_route_dispatch: logits %s bias %s top_k=%d %s %s, by CUDA C++", *given)
        return cuda.moe_route_dispatch(*options)
    weights, indices = _moe_route_fwd(*options)
    return weights, indices, *_moe_dispatch(indices, logits.shape[1], backend)


def _moe_dispatch(indices: Tensor, num_experts: int, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("moe_dispatch: indices %s num_experts=%d", describe(indices), num_experts)
    check_id_values("moe_dispatch", indices)
    if runs_kernels(indices) and chooses_cuda("moe_dispatch", backend, True, cuda.limit, indices, indices.numel()):
        return cuda.moe_dispatch(indices, num_experts)
    return _implementation(indices).moe_dispatch(indices, num_experts)


def _moe_expert_counts(indices: Tensor, num_experts: int) -> Tensor:
    if log.isEnabledFor(logging.INFO):
        log.info("moe_expert_counts: indices %s num_experts=%d", describe(indices), num_experts)
    check_id_values("moe_expert_counts", indices)
    return _implementation(indices).moe_expert_counts(indices, num_experts)


def _moe_gather_fwd(x: Tensor, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    if log.isEnabledFor(logging.INFO):
        log.info("moe_gather_fwd: x %s top_k=%d", describe(x), top_k)
    return _implementation(x).moe_gather_fwd(x, inverse, offsets, top_k)


def _moe_combine_fwd(y: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    if log.isEnabledFor(logging.INFO):
        log.info("moe_combine_fwd: y %s weights %s", describe(y), describe(weights))
    return _implementation(y).moe_combine_fwd(y, inverse, offsets, weights, top_k)


def _moe_combine_bwd(dout: Tensor, y: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("moe_combine_bwd: y %s weights %s", describe(y), describe(weights))
    return _implementation(y).moe_combine_bwd(dout, y, inverse, offsets, weights)


define(
    "moe_route_fwd(Tensor logits, Tensor? bias, int top_k, str score, str order, int num_groups, int top_k_groups, bool renormalize,"
    " float scaling_factor) -> (Tensor, Tensor)",
    _moe_route_fwd,
    lambda logits, bias, top_k, *options: (
        logits.new_empty((logits.shape[0], top_k), dtype=torch.float32),
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int64),
    ),
)
define(
    "moe_route_dispatch(Tensor logits, Tensor? bias, int top_k, str score, str order, int num_groups, int top_k_groups, bool renormalize,"
    " float scaling_factor, str? backend=None) -> (Tensor weights, Tensor indices, Tensor order, Tensor inverse, Tensor offsets)",
    _moe_route_dispatch,
    lambda logits, bias, top_k, *options: (
        logits.new_empty((logits.shape[0], top_k), dtype=torch.float32),
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int64),
        logits.new_empty(logits.shape[0] * top_k, dtype=torch.int64),
        logits.new_empty(logits.shape[0] * top_k, dtype=torch.int64),
        logits.new_empty(logits.shape[1], dtype=torch.int32),
    ),
)
define(
    "moe_route_bwd(Tensor dweights, Tensor logits, Tensor indices, str score, str order, bool renormalize, float scaling_factor) -> Tensor",
    _moe_route_bwd,
    lambda dweights, logits, *options: logits.new_empty(logits.shape),
)
define(
    "moe_dispatch(Tensor indices, int num_experts, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _moe_dispatch,
    lambda indices, num_experts, backend=None: (
        indices.new_empty(indices.numel(), dtype=torch.int64),
        indices.new_empty(indices.numel(), dtype=torch.int64),
        indices.new_empty(num_experts, dtype=torch.int32),
    ),
)
define(
    "moe_expert_counts(Tensor indices, int num_experts) -> Tensor",
    _moe_expert_counts,
    lambda indices, num_experts: indices.new_empty(num_experts, dtype=torch.int64),
)
define(
    "moe_gather_fwd(Tensor x, Tensor inverse, Tensor offsets, int top_k) -> Tensor",
    _moe_gather_fwd,
    lambda x, inverse, offsets, top_k: x.new_empty((inverse.shape[0], x.shape[1])),
)
define(
    "moe_combine_fwd(Tensor y, Tensor inverse, Tensor offsets, Tensor? weights, int top_k) -> Tensor",
    _moe_combine_fwd,
    lambda y, inverse, offsets, weights, top_k: y.new_empty((y.shape[0] // top_k, y.shape[1])),
)
define(
    "moe_combine_bwd(Tensor dout, Tensor y, Tensor inverse, Tensor offsets, Tensor weights) -> (Tensor, Tensor)",
    _moe_combine_bwd,
    lambda dout, y, inverse, offsets, weights: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
)


@differentiable
class _MoERoute(torch.autograd.Function):
    """(weights, indices), and with_plan (order, inverse, offsets)."""

    @staticmethod
    def forward(logits, bias, top_k, score, order, num_groups, top_k_groups, renormalize, scaling_factor, with_plan, backend):
        options = logits, bias, top_k, score, order, num_groups, top_k_groups, renormalize, scaling_factor
        return operators.moe_route_dispatch(*options, backend) if with_plan else operators.moe_route_fwd(*options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, _, _, score, order, _, _, renormalize, scaling_factor, _, _ = inputs
        _, indices, *plan = output
        ctx.options = score, order, renormalize, scaling_factor
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices, *plan)
        ctx.save_for_backward(logits, indices)

    @staticmethod
    def backward(ctx, dweights, *_):
        logits, indices = ctx.saved_tensors
        dlogits = torch.ops.fastattn.moe_route_bwd(dweights, logits, indices, *ctx.options)
        return *once("moe_route", [dlogits], dweights, logits), *[None] * 10


@differentiable
class _MoEGather(torch.autograd.Function):
    @staticmethod
    def forward(x, inverse, offsets, top_k):
        return operators.moe_gather_fwd(x, inverse, offsets, top_k)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, inverse, offsets, ctx.top_k = inputs
        ctx.save_for_backward(inverse, offsets)

    @staticmethod
    def backward(ctx, dout):
        inverse, offsets = ctx.saved_tensors
        dx = torch.ops.fastattn.moe_combine_fwd(dout, inverse, offsets, None, ctx.top_k)
        return *once("moe_gather", [dx], dout), None, None, None


@differentiable
class _MoECombine(torch.autograd.Function):
    @staticmethod
    def forward(y, inverse, offsets, weights):
        return operators.moe_combine_fwd(y, inverse, offsets, weights, weights.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dout):
        y, inverse, offsets, weights = ctx.saved_tensors
        grads = torch.ops.fastattn.moe_combine_bwd(dout, y, inverse, offsets, weights)
        dy, dweights = once("moe_combine", grads, dout, y, weights)
        return dy, None, None, dweights


# --------------------------------------------------------------------------------------------------------------------
# Checks.


def _check_rows(op: str, arg: str, t: Tensor, letters: str) -> None:
    """A float matrix."""
    checks.check_tensor(op, arg, t)
    checks.check_dtype(op, arg, t)
    if t.dim() != 2:
        checks.reject(op, arg, f"have shape {letters}", checks.shape(t))
    if t.shape[1] < 1:
        checks.reject(op, arg, "have at least 1 column", checks.shape(t))


def _between(op: str, arg: str, value: object, least: int, most: int, why: str = "") -> int:
    value = checks.integer(op, arg, value, "be an int")
    if not least <= value <= most:
        checks.reject(op, arg, f"lie in [{least}, {most}]{why}", value)
    return value


def check_ids(op: str, arg: str, ids: Tensor) -> None:
    """Expert ids, whatever they are."""
    checks.check_tensor(op, arg, ids)
    if ids.dtype not in (torch.int32, torch.int64):
        checks.reject(op, arg, "be int32 or int64", ids.dtype, TypeError)


def _check_indices(op: str, indices: Tensor, num_experts: object) -> int:
    check_ids(op, "indices", indices)
    return _between(op, "num_experts", num_experts, 1, MAX_EXPERTS)


def check_id_values(op: str, ids: Tensor, arg: str = "indices") -> None:
    """Read the ids (this synchronises on CUDA): none is negative."""
    if checks_values(ids) and ids.numel() and (least := ids.min().item()) < 0:
        checks.reject(op, arg, "hold ids of 0 or more (those of num_experts or more are nobody's)", least)


def check_plan(op: str, plan: MoEPlan, arg: str, t: Tensor) -> None:
    """Three tensors on t's device, such as moe_dispatch gives. What they hold cannot lead a kernel astray."""
    if not isinstance(plan, tuple) or len(plan) != 3:
        checks.reject(op, "plan", "be what moe_dispatch returns", type(plan).__name__, TypeError)
    for name, part, dtype in zip(MoEPlan._fields, plan, (torch.int64, torch.int64, torch.int32)):
        checks.check_tensor(op, f"plan.{name}", part)
        if part.dtype != dtype:
            checks.reject(op, f"plan.{name}", f"be {str(dtype).removeprefix('torch.')}", part.dtype, TypeError)
        checks.check_device(op, f"plan.{name}", part, f"{arg}'s", t.device)
        if part.dim() != 1:
            checks.reject(op, f"plan.{name}", "have one dim", checks.shape(part))
    if plan[0].shape != plan[1].shape:
        checks.reject(op, "plan.inverse", f"have plan.order's shape {checks.shape(plan[0])}", checks.shape(plan[1]))
    if plan[2].shape[0] < 1:
        checks.reject(op, "plan.offsets", "have shape (E,)", checks.shape(plan[2]))


def check_plan_values(op: str, order: Tensor, inverse: Tensor, offsets: Tensor) -> None:
    """Read a plan (this synchronises on CUDA): order and inverse undo each other, and experts' ends do not decrease."""
    num_slots = order.shape[0]
    for name, rows in (("order", order), ("inverse", inverse)):
        wrong = (rows < 0) | (rows >= num_slots)
        if bool(wrong.any()):
            checks.reject(op, f"plan.{name}", f"hold slots in [0, T·K) = [0, {num_slots})", int(rows[wrong][0]))
    wrong = (inverse[order] != torch.arange(num_slots, device=order.device)).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        checks.reject(op, "plan.inverse", f"hold the row {row} of slot {int(order[row])}", int(inverse[order[row]]))
    ends = [0, *offsets.tolist(), num_slots]
    for expert, (start, end) in enumerate(zip(ends, ends[1:])):
        if end < start:
            checks.reject(op, "plan.offsets", f"not decrease, from 0 to at most {num_slots}", f"{start} then {end} at index {expert}")


# --------------------------------------------------------------------------------------------------------------------
# Routing.


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    order: str = "score_then_topk",
    bias: Tensor | None = None,
    num_groups: int | None = None,
    top_k_groups: int | None = None,
    renormalize: bool = False,
    scaling_factor: float = 1.0,
    return_plan: bool = False,
    backend: Literal["triton", "cuda"] | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, MoEPlan]:
    """The experts of each token, and their weights.

        Mixtral      renormalize=True
        Qwen3-MoE    renormalize=norm_topk_prob
        gpt-oss      order="topk_then_score"
        DeepSeek-V3  score="sigmoid", bias=…, num_groups=8, top_k_groups=4, renormalize=True, scaling_factor=2.5

    Args:
        logits: (T, E), E from 1 to 512; float16, bfloat16 or float32. Any strides with a contiguous last dim; others cost a copy.
        top_k: K, how many experts a token has, from 1 to E (with groups, to the number of experts in top_k_groups of them).
        score: "softmax" or "sigmoid".
        order: "score_then_topk": the scores of all logits, and of those the chosen; or "topk_then_score": the logits choose, and the chosen
            ones alone are scored (a softmax of them sums to 1, a sigmoid is the same either way).
        bias: (E,), any float dtype, read as fp32: added to what chooses, never to what weighs (DeepSeek-V3's correction bias; see
            `moe_update_bias`). It has no gradient, and may require none.
        num_groups, top_k_groups: experts lie in num_groups groups of E / num_groups neighbours, and only those of the top_k_groups best
            groups can be chosen. A group's score is the sum of its two best biased scores where there is a bias (of its one, if it has no
            more), else its best score. None: no groups.
        renormalize: divide each token's weights by their sum (+ 1e-20).
        scaling_factor: multiplies the weights, after that.
        return_plan: also return `moe_dispatch(indices, E)`, for `moe(…, plan=)`: up to 256 slots are routed and sorted in one launch.
        backend: which of two kernels runs on CUDA tensors, with return_plan. None: CUDA C++ for up to 256 slots, where it is built, else
            Triton. What is named runs or raises.

    Returns:
        (weights, indices): (T, K) float32 and (T, K) int64, contiguous, best first by what chooses. A token's experts are distinct.
        plan (with return_plan): an `MoEPlan`.

    Ties go to the lower id. Without a bias the logits choose, whose order the scores share, so that CPU and GPU agree on every choice; with
    one, two sums within rounding of each other may come in either order. A NaN counts as the largest value, as it does for torch.topk.
    A softmax row with NaN or +inf in it, or of nothing but −inf, has weights of NaN.

    Numerics: fp32 inside. The gradient of weights reaches the logits, the choice taken as it is. Double backward and forward-mode AD raise
    NotImplementedError.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Source: Shazeer et al., arXiv 1701.06538 (top-k gating); DeepSeek-AI, arXiv 2412.19437, section 2.1.2 (bias and groups).

    Example:
        >>> weights, indices = fastattn.moe_route(torch.randn(100, 8), 2, renormalize=True)
    """
    op = "moe_route"
    _check_rows(op, "logits", logits, "(T, E)")
    num_experts = logits.shape[1]
    if num_experts > MAX_EXPERTS:
        checks.reject(op, "logits", f"have at most {MAX_EXPERTS} experts", checks.shape(logits))
    checks.check_choice(op, "score", score, SCORES)
    checks.check_choice(op, "order", order, ORDERS)
    if bias is not None:
        checks.check_tensor(op, "bias", bias)
        checks.check_float(op, "bias", bias)
        checks.check_device(op, "bias", bias, "logits'", logits.device)
        if bias.shape != (num_experts,):
            checks.reject(op, "bias", f"have shape (E,) = ({num_experts},)", checks.shape(bias))
        if bias.requires_grad:
            checks.reject(op, "bias", "not require a gradient (it moves the choice alone)", "requires_grad=True")
        bias = bias.float()
    if (num_groups is None) != (top_k_groups is None):
        checks.reject(op, "num_groups and top_k_groups", "be given together", "one of them")
    if num_groups is None:
        num_groups = top_k_groups = 1
    num_groups = _between(op, "num_groups", num_groups, 1, num_experts)
    if num_experts % num_groups:
        checks.reject(op, "num_groups", f"divide the number of experts {num_experts}", num_groups)
    top_k_groups = _between(op, "top_k_groups", top_k_groups, 1, num_groups)
    top_k = _between(op, "top_k", top_k, 1, num_experts // num_groups * top_k_groups, ", as many experts as can be chosen")
    checks.check_number(op, "scaling_factor", scaling_factor)
    if not -math.inf < scaling_factor < math.inf:
        checks.reject(op, "scaling_factor", "be finite", scaling_factor)
    checks.check_backend(op, backend, logits, runs_kernels(logits))
    if backend is not None and not return_plan:
        checks.reject(op, "backend", "be None without return_plan", repr(backend))
    options = top_k, score, order, num_groups, top_k_groups, bool(renormalize), float(scaling_factor)
    weights, indices, *plan = apply(op, _MoERoute, logits, bias, *options, bool(return_plan), backend)
    return (weights, indices, MoEPlan(*plan)) if return_plan else (weights, indices)


def moe_expert_counts(indices: Tensor, num_experts: int) -> Tensor:
    """How many tokens each expert has.

    Args:
        indices: expert ids, int32 or int64, any shape and strides. Those of num_experts or more count for nobody; negative ones are refused
            on the CPU, and count for nobody on CUDA.
        num_experts: E, from 1 to 512.

    Returns:
        counts: (E,) int64.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Example:
        >>> fastattn.moe_expert_counts(torch.tensor([[0, 2], [2, 1]]), 4)
        tensor([1, 1, 2, 0])
    """
    return operators.moe_expert_counts(indices, _check_indices("moe_expert_counts", indices, num_experts))


def moe_load_balancing_loss(probs: Tensor, indices: Tensor) -> Tensor:
    """E·Σ f_e·p_e: f_e the share of tokens that expert e has, p_e its mean probability. Least where experts are used alike: K then.

    Args:
        probs: (T, E), any float dtype: each token's probabilities of all experts, such as softmax of the logits.
        indices: (T, K) int32 or int64: each token's experts, as `moe_expert_counts` takes them.

    Returns:
        loss: () float32; 0 where T = 0. Its gradient reaches probs, the f_e taken as they are. transformers' load_balancing_loss_func
        is this over all layers' tokens together; Switch Transformers' has K = 1.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Source: Fedus et al., arXiv 2101.03961, equations 4 to 6.

    Example:
        >>> logits = torch.randn(100, 8)
        >>> _, indices = fastattn.moe_route(logits, 2)
        >>> fastattn.moe_load_balancing_loss(logits.softmax(-1), indices)
    """
    op = "moe_load_balancing_loss"
    checks.check_tensor(op, "probs", probs)
    checks.check_float(op, "probs", probs)
    if probs.dim() != 2:
        checks.reject(op, "probs", "have shape (T, E)", checks.shape(probs))
    num_tokens, num_experts = probs.shape
    _check_indices(op, indices, num_experts)
    checks.check_device(op, "indices", indices, "probs'", probs.device)
    if indices.dim() != 2 or indices.shape[0] != num_tokens:
        checks.reject(op, "indices", f"have shape (T, K) with T = {num_tokens}", checks.shape(indices))
    return load_balancing_loss_of(probs, operators.moe_expert_counts(indices, num_experts))


def load_balancing_loss_of(probs: Tensor, counts: Tensor) -> Tensor:
    """`moe_load_balancing_loss` where `moe_expert_counts` is known."""
    num_tokens, num_experts = probs.shape
    return (counts.float() * probs.sum(0, dtype=torch.float32)).sum() * (num_experts / max(num_tokens, 1) ** 2)


def moe_z_loss(logits: Tensor) -> Tensor:
    """The mean of (log Σ_e exp x_e)² over tokens, which keeps a router's logits small.

    Args:
        logits: (T, E), any float dtype.

    Returns:
        loss: () float32; 0 where T = 0. Its gradient reaches the logits.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: another shape.

    Source: Zoph et al., arXiv 2202.08906, equation 5.

    Example:
        >>> loss = 1e-3 * fastattn.moe_z_loss(torch.randn(100, 8))
    """
    op = "moe_z_loss"
    checks.check_tensor(op, "logits", logits)
    checks.check_float(op, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        checks.reject(op, "logits", "have shape (T, E)", checks.shape(logits))
    return torch.logsumexp(logits.float(), 1).square().sum() / max(logits.shape[0], 1)


@torch.no_grad()
def moe_update_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Move the bias of each expert by `rate`, in place: up where it has fewer tokens than the mean, down where more, not where as many.

    To be called once a step, after the optimiser, with the counts of the whole batch (summed over ranks).

    Args:
        bias: (E,), floating point: `moe_route`'s. Written in place; it may require no gradient.
        counts: (E,), int or float: `moe_expert_counts`' of the step.
        rate: DeepSeek-V3 trains with 0.001.

    Returns:
        bias, the same tensor.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Source: Wang et al., arXiv 2408.15664, algorithm 1.

    Example:
        >>> fastattn.moe_update_bias(torch.zeros(3), torch.tensor([4, 1, 4]), 0.001)
        tensor([-0.0010,  0.0010, -0.0010])
    """
    op = "moe_update_bias"
    for arg, t in (("bias", bias), ("counts", counts)):
        checks.check_tensor(op, arg, t)
    checks.check_float(op, "bias", bias)
    if bias.dim() != 1:
        checks.reject(op, "bias", "have shape (E,)", checks.shape(bias))
    if bias.requires_grad:
        checks.reject(op, "bias", "not require a gradient (it is written in place)", "requires_grad=True")
    checks.check_device(op, "counts", counts, "bias's", bias.device)
    if counts.shape != bias.shape:
        checks.reject(op, "counts", f"have bias's shape {checks.shape(bias)}", checks.shape(counts))
    if counts.dtype == torch.bool or counts.is_complex():
        checks.reject(op, "counts", "hold ints or floats", counts.dtype, TypeError)
    checks.check_number(op, "rate", rate)
    return bias.add_(torch.sign(counts.sum() - counts * counts.shape[0]).to(bias.dtype), alpha=rate)


# --------------------------------------------------------------------------------------------------------------------
# To the experts and back.


def moe_dispatch(indices: Tensor, num_experts: int, *, backend: Literal["triton", "cuda"] | None = None) -> MoEPlan:
    """The plan that brings each expert's tokens together: a stable sort of the T·K slots by expert, by counting, in one order always.

    Args:
        indices: (T, K) int32 or int64, any strides, T·K below 2^31. A token may name an expert twice. Ids of num_experts or more are
            nobody's (experts of other ranks): they come last, and contribute nothing. Negative ids are refused where indices lie on the
            CPU; on CUDA they are nobody's too (FASTATTN_CHECK=1 refuses them there as well, and synchronises).
        num_experts: E, from 1 to 512.
        backend: which of two kernels runs on CUDA tensors. None: CUDA C++ for up to 256 slots, where it is built, else Triton. What is
            named runs or raises.

    Returns:
        plan: an `MoEPlan` (order, inverse, offsets). Nothing waits for the GPU: how many tokens an expert has, only offsets knows.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Example:
        >>> plan = fastattn.moe_dispatch(torch.tensor([[1, 0], [1, 3]]), 3)
        >>> plan.order.tolist(), plan.offsets.tolist()  # slot 1 to expert 0, slots 0 and 2 to expert 1, slot 3 to nobody
        ([1, 0, 2, 3], [1, 3, 3])
    """
    op = "moe_dispatch"
    num_experts = _check_indices(op, indices, num_experts)
    if indices.dim() != 2 or indices.shape[1] < 1:
        checks.reject(op, "indices", "have shape (T, K)", checks.shape(indices))
    checks.check_backend(op, backend, indices, runs_kernels(indices))
    return MoEPlan(*operators.moe_dispatch(indices, num_experts, backend))


def moe_gather(x: Tensor, plan: MoEPlan) -> Tensor:
    """Each token's row to all its places among the sorted rows: x[plan.order // K], and 0 in the rows that no expert has.

    `moe_combine` with weights of 1 is its backward, which adds a token's K rows in fp32 and in one order, where indexing adds atomically.

    Args:
        x: (T, H), any H; float16, bfloat16 or float32. Any strides with a contiguous last dim; others cost a copy.
        plan: `moe_dispatch`'s of these T tokens.

    Returns:
        y: (T·K, H) in x's dtype, contiguous, sorted by expert.

    Numerics: a copy. Double backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Example:
        >>> plan = fastattn.moe_dispatch(torch.randint(8, (100, 2)), 8)
        >>> fastattn.moe_gather(torch.randn(100, 64), plan).shape
        torch.Size([200, 64])
    """
    op = "moe_gather"
    _check_rows(op, "x", x, "(T, H)")
    check_plan(op, plan, "x", x)
    num_tokens, num_slots = x.shape[0], plan[0].shape[0]
    if (num_slots != 0) if num_tokens == 0 else (num_slots < num_tokens or num_slots % num_tokens != 0):
        checks.reject(op, "x", f"have shape (T, H) with T·K = {num_slots} to match plan", checks.shape(x))
    top_k = num_slots // num_tokens if num_tokens else 1
    return apply(op, _MoEGather, x, plan[1], plan[2], top_k)


def moe_combine(y: Tensor, plan: MoEPlan, weights: Tensor) -> Tensor:
    """Each token's weighted sum of its experts' rows: out[t] = Σ_k weights[t, k]·y[plan.inverse[t·K + k]].

    Args:
        y: (T·K, H) in sorted order, any H; float16, bfloat16 or float32. Any strides with a contiguous last dim; others cost a copy. Rows
            that no expert has, those from plan.offsets[−1] on, are never read and may hold anything.
        plan: `moe_dispatch`'s.
        weights: (T, K), `moe_route`'s; float16, bfloat16 or float32, read as fp32.

    Returns:
        out: (T, H) in y's dtype, contiguous. A token that no expert has is 0.

    Numerics: fp32 in the order of k, one rounding; nothing is added atomically, so that two runs are the same bit for bit. Gradients reach
    y and weights: dy = weights·dout, and the gradient of a weight is the dot product of dout and the row, in fp32; both are 0 where no
    expert has the row. Double backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Example:
        >>> x, (weights, indices) = torch.randn(100, 64), fastattn.moe_route(torch.randn(100, 8), 2, renormalize=True)
        >>> plan = fastattn.moe_dispatch(indices, 8)
        >>> torch.testing.assert_close(fastattn.moe_combine(fastattn.moe_gather(x, plan), plan, weights), x)
    """
    op = "moe_combine"
    _check_rows(op, "y", y, "(T·K, H)")
    check_plan(op, plan, "y", y)
    _check_rows(op, "weights", weights, "(T, K)")
    checks.check_device(op, "weights", weights, "y's", y.device)
    if weights.shape[0] * weights.shape[1] != plan[0].shape[0]:
        checks.reject(op, "weights", f"have shape (T, K) with T·K = {plan[0].shape[0]} to match plan", checks.shape(weights))
    if y.shape[0] != plan[0].shape[0]:
        checks.reject(op, "y", f"have shape (T·K, H) with T·K = {plan[0].shape[0]} to match plan", checks.shape(y))
    return apply(op, _MoECombine, y, plan[1], plan[2], weights.float())
