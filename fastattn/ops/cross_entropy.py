"""Cross-entropy as a torch operator, and the public function."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from fastattn.cpu import cross_entropy as cpu

from . import checks
from .dispatch import checks_values, describe, log, runs_kernels
from .operator import apply, define, differentiable, once, operators

REDUCTIONS = ("none", "mean", "sum")


def implementation(x: Tensor):
    """The module with this device's cross_entropy_fwd and cross_entropy_bwd; kernels are imported here, so that `import fastattn` needs
    no Triton."""
    if runs_kernels(x):
        from fastattn.kernels import cross_entropy

        return cross_entropy
    return cpu


def reduce(numbers: Tensor, shape: torch.Size, reduction: str, dtype: torch.dtype, return_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, what divides a mean) from the forward's four numbers a row, summed in a fixed order; what is not asked for is empty."""
    lse = (numbers[2] + numbers[3]).view(shape) if return_lse else numbers.new_empty(0)
    if reduction == "none":
        return numbers[0].to(dtype, copy=True).view(shape), lse, numbers.new_empty(0)
    if reduction == "sum":
        return numbers[0].sum().to(dtype), lse, numbers.new_empty(0)
    total, divisor = numbers[:2].sum(1)
    return (total / divisor).to(dtype), lse, divisor.clone()


def reduce_fake(x: Tensor, shape: torch.Size, reduction: str, dtype: torch.dtype, return_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `reduce` allocates."""
    return (
        x.new_empty(shape if reduction == "none" else (), dtype=dtype),
        x.new_empty(shape if return_lse else 0, dtype=torch.float32),
        x.new_empty(() if reduction == "mean" else 0, dtype=torch.float32),
    )


def check_target_values(op: str, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Every target counts a class or is ignored; looked at only where that costs no wait for a GPU, or was asked for."""
    if not checks_values(target):
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bool(wrong.any()):
        must = f"hold classes in [0, {num_classes - 1}] or ignore_index = {ignore_index}"
        checks.reject(op, "target", must, int(target[wrong][0]), IndexError)


def _cross_entropy_fwd(
    input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype, return_lse
):  # fmt: skip
    if log.isEnabledFor(logging.INFO):
        log.info("cross_entropy_fwd: input %s target %s %s", describe(input), describe(target), reduction)
    check_target_values("cross_entropy", target, input.shape[-1], ignore_index)
    numbers = implementation(input).cross_entropy_fwd(
        input, target, weight, ignore_index, label_smoothing, z_loss, softcap
    )
    return *reduce(numbers, target.shape, reduction, dtype, return_lse), numbers


def _cross_entropy_fwd_fake(
    input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype, return_lse
):  # fmt: skip
    numbers = input.new_empty(4, target.numel(), dtype=torch.float32)
    return *reduce_fake(input, target.shape, reduction, dtype, return_lse), numbers


def _cross_entropy_bwd(
    dloss, dlse, divisor, input, target, weight, numbers, ignore_index, label_smoothing, z_loss, softcap
):  # fmt: skip
    if log.isEnabledFor(logging.INFO):
        log.info("cross_entropy_bwd: input %s", describe(input))
    return implementation(input).cross_entropy_bwd(
        dloss, dlse, divisor, input, target, weight, numbers, ignore_index, label_smoothing, z_loss, softcap
    )


define(
    "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction, float label_smoothing, "
    "float z_loss, float softcap, ScalarType dtype, bool return_lse) -> (Tensor loss, Tensor lse, Tensor divisor, Tensor numbers)",
    _cross_entropy_fwd,
    _cross_entropy_fwd_fake,
    torch_on_cuda=True,
)
define(
    "cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor? divisor, Tensor input, Tensor target, Tensor? weight, Tensor numbers, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap) -> Tensor",
    _cross_entropy_bwd,
    lambda dloss, dlse, divisor, input, *_: input.new_empty(input.shape),
)


@differentiable
class _CrossEntropy(torch.autograd.Function):
    """Of logits (…, C) and targets (…): (loss, lse), and what the backward needs of the forward."""

    @staticmethod
    def forward(input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype, return_lse):
        return operators.cross_entropy_fwd(
            input, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype, return_lse
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, ctx.ignore_index, ctx.reduction, *ctx.options, _, ctx.return_lse = inputs
        _, _, divisor, numbers = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1 if not ctx.return_lse else 2 :])
        ctx.save_for_backward(input, target, weight, divisor, numbers)

    @staticmethod
    def backward(ctx, dloss, dlse, *_):
        input, target, weight, divisor, numbers = ctx.saved_tensors
        dinput = torch.ops.fastattn.cross_entropy_bwd(
            numbers.new_zeros(()) if dloss is None else dloss, dlse if ctx.return_lse else None,
            divisor if ctx.reduction == "mean" else None, input, target, weight, numbers, ctx.ignore_index, *ctx.options,
        )  # fmt: skip
        return *once("cross_entropy", [dinput], dloss, dlse, input), *[None] * 9


# --------------------------------------------------------------------------------------------------------------------
# The public function.


def check_options(
    op: str, weight: Tensor | None, num_classes: int, device: torch.device, ignore_index: int, reduction: str,
    label_smoothing: float, z_loss: float, softcap: float,
) -> None:  # fmt: skip
    """What cross_entropy and linear_cross_entropy have in common."""
    if num_classes == 0:
        checks.reject(op, "input", "have at least one class", 0)
    if weight is not None:
        checks.check_tensor(op, "weight", weight)
        checks.check_float(op, "weight", weight)
        if checks.shape(weight) != (num_classes,):
            checks.reject(op, "weight", f"have shape (C,) = ({num_classes},)", checks.shape(weight))
        if weight.device != device:
            checks.reject(op, "weight", f"be on input's device {device}", weight.device)
        if weight.requires_grad and torch.is_grad_enabled():
            checks.reject(op, "weight", "not require a gradient (none is computed)", "requires_grad=True")
    checks.integer(op, "ignore_index", ignore_index, "be an int")
    if reduction not in REDUCTIONS:
        checks.reject(op, "reduction", f"be one of {', '.join(REDUCTIONS)}", repr(reduction))
    for arg, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        checks.check_number(op, arg, value)
    if not 0.0 <= label_smoothing <= 1.0:
        checks.reject(op, "label_smoothing", "lie in [0, 1]", label_smoothing)
    if not -math.inf < z_loss < math.inf:
        checks.reject(op, "z_loss", "be finite", z_loss)
    checks.check_softcap(op, softcap)


def check_target(op: str, target: Tensor, expected: torch.Size, letters: str, device: torch.device) -> None:
    """Class indices of a shape."""
    if target.dtype not in (torch.int64, torch.int32):
        checks.reject(op, "target", "be int64 or int32 class indices", target.dtype, TypeError)
    if target.shape != expected:
        checks.reject(op, "target", f"have shape {letters} = {tuple(expected)}", checks.shape(target))
    if target.device != device:
        checks.reject(op, "target", f"be on input's device {device}", target.device)


def autocasts(x: Tensor) -> bool:
    """Whether a surrounding autocast region makes this a float32 loss: torch's does so on every device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _of_probabilities(input, target, weight, reduction, label_smoothing, z_loss, softcap, return_lse):
    """The loss against class probabilities, from torch's own in float32, with this op's terms around it."""
    s = input.float() if softcap == 0.0 else softcap * torch.tanh(input.float() / softcap)
    loss = torch.nn.functional.cross_entropy(
        s, target.float(), None if weight is None else weight.float(), reduction=reduction, label_smoothing=label_smoothing
    )
    lse = torch.logsumexp(s, min(1, input.dim() - 1)) if z_loss or return_lse else None
    if z_loss:
        penalty = z_loss * lse * lse
        loss = loss + {"none": lambda p: p, "mean": torch.mean, "sum": torch.sum}[reduction](penalty)
    loss = loss.to(torch.float32 if autocasts(input) else torch.promote_types(input.dtype, target.dtype))
    return (loss, lse) if return_lse else loss


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits: `torch.nn.functional.cross_entropy`'s contract, without a second tensor of the logits' size in the forward.

    With s the logits, p = softmax(s), t a row's target, w the class weights and ε = label_smoothing, a row's loss is

        (1 − ε)·w_t·(−log p_t) + ε/C·Σ_c w_c·(−log p_c) + z_loss·lse²          lse = log Σ_c exp(s_c)

    Args:
        input: (C,), (N, C) or (N, C, d1, …), float16, bfloat16 or float32, any C. The class dim is read as it lies where its entries are
            adjacent, at any stride between rows (so `logits[:, :-1].transpose(1, 2)` costs nothing), and copied otherwise.
        target: (), (N,) or (N, d1, …), int64 or int32 class indices. Or probabilities of input's shape and any floating dtype: those go
            to torch's own cross_entropy (with its memory), ignore_index is not for them, and their gradient and higher ones exist.
        weight: (C,), any floating dtype; None is 1.
        ignore_index: a target of this value adds no loss and gets no gradient, whatever its row holds; it may be a class.
        reduction: "mean" (over the weights of the targets that count), "sum" or "none" (target's shape).
        label_smoothing: ε in [0, 1].
        z_loss: adds z_loss·lse² for each target that counts, before the reduction and not weighted.
        softcap: s = softcap·tanh(input / softcap) stands in for input everywhere; 0 is none.
        return_lse: also give lse.

    Returns:
        loss, in input's dtype (float32 under autocast, as in torch). With return_lse (loss, lse): lse is float32 of target's shape, the
        natural logarithm for every row, ignored ones included, and its gradient flows into input.

    No valid target makes a mean NaN and a sum 0, as in torch; so are a row of nothing but −inf, and +inf or NaN in a row that counts, NaN.
    A target that is no class raises IndexError on CPU tensors; on CUDA, where looking would wait for the GPU, it makes its row's loss and
    gradient NaN (FASTATTN_CHECK=1 looks). Numerics: fp32 inside, one rounding; sums in a fixed order. Nothing is saved for the backward but
    the input and four numbers a row. Double backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError: no tensor, or another dtype. ValueError: shapes, devices or options that do not fit, no class at all, or a weight that
        requires a gradient. IndexError: a target out of range.

    Source: Milakov and Gimelshein, arXiv 1805.02867; z-loss: Chowdhery et al., arXiv 2204.02311; softcap: Gemma 2, arXiv 2408.00118.

    Example:
        >>> fastattn.cross_entropy(torch.randn(4, 50257), torch.tensor([3, -100, 0, 50256]), label_smoothing=0.1)
    """
    op = "cross_entropy"
    checks.check_tensor(op, "input", input)
    checks.check_tensor(op, "target", target)
    checks.check_dtype(op, "input", input)
    if input.dim() == 0:
        checks.reject(op, "input", "have shape (C,), (N, C) or (N, C, d1, …)", checks.shape(input))
    class_dim = min(1, input.dim() - 1)
    check_options(
        op, weight, input.shape[class_dim], input.device, ignore_index, reduction, label_smoothing, z_loss, softcap
    )
    if target.is_floating_point():
        if target.shape != input.shape:
            checks.reject(op, "target", f"have input's shape {checks.shape(input)} to hold probabilities", checks.shape(target))
        if ignore_index >= 0:
            checks.reject(op, "ignore_index", "be negative with probabilities as target, where nothing is ignored", ignore_index)
        return _of_probabilities(input, target, weight, reduction, label_smoothing, z_loss, softcap, return_lse)
    logits = input.movedim(class_dim, -1) if input.dim() > 2 else input
    check_target(op, target, logits.shape[:-1], "(N, d1, …)", input.device)
    dtype = torch.float32 if autocasts(input) else input.dtype
    loss, lse, _, _ = apply(
        op, _CrossEntropy, logits, target, weight, int(ignore_index), reduction, float(label_smoothing), float(z_loss),
        float(softcap), dtype, bool(return_lse),
    )  # fmt: skip
    return (loss, lse) if return_lse else loss
