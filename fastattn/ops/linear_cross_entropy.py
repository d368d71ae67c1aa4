"""Cross-entropy of a linear layer's output as a torch operator, and the public function.

The logits of a chunk of tokens at a time: a matmul into a buffer of the op's own, cross_entropy's row kernel for their statistics, and the
same kernel for their gradient, written over them; then, while they are there,

    dinput = dlogits·W          dW += dlogitsᵀ·input          db += Σ dlogits

with dW and db in float32. For "mean" and "sum" the forward does all of it, for an upstream gradient of 1, since the logits would have to be
made again otherwise; the backward scales. Where the upstream gradient is one a token, the backward makes the logits again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import checks
from .cross_entropy import (
    autocasts,
    check_options,
    check_target,
    check_target_values,
    implementation,
    reduce,
    reduce_fake,
)
from .dispatch import describe, log
from .operator import apply, autocast, define, differentiable, once, operators

ALIGNED = 8  # logits are laid out in rows of a multiple of it, for 128-bit accesses and matmuls whatever the vocabulary


def default_chunk(num_tokens: int) -> int:
    """An eighth of the tokens, in multiples of 128, from 256 to 4096.

    Each chunk reads the weights twice and reads and writes all of a float32 dW, which takes as long as the matmuls of some hundreds of
    tokens do; above 4096 nothing is gained.
    """
    return min(max(-(-num_tokens // 1024) * 128, 256), 4096)


class _Chunks:
    """The logits of chunks of tokens, one chunk at a time, in one buffer."""

    def __init__(self, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, chunk_size: int | None):
        self.input, self.weight, self.bias = input, linear_weight, linear_bias
        self.size = min(chunk_size or default_chunk(input.shape[0]), max(input.shape[0], 1))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        num_tokens, num_classes = self.input.shape[0], self.weight.shape[0]
        buffer = self.input.new_empty(self.size, -(-num_classes // ALIGNED) * ALIGNED) if num_tokens else None
        for start in range(0, num_tokens, self.size):
            tokens = slice(start, min(start + self.size, num_tokens))
            logits = buffer[: tokens.stop - start, :num_classes]
            if self.bias is None:
                torch.mm(self.input[tokens], self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, self.input[tokens], self.weight.t(), out=logits)
            yield tokens, logits


def _empty_grads(input: Tensor, linear_weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """dinput in input's dtype, dW and db in float32, of those that are wanted; empty of the others."""
    shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    dtypes = input.dtype, torch.float32, torch.float32
    return tuple(
        input.new_empty(shape if want else 0, dtype=dtype) for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )


class _Grads:
    """The gradients that are wanted, as they come together from chunks of dlogits, the first one at token 0."""

    def __init__(self, input: Tensor, linear_weight: Tensor, wanted: list[bool]):
        self.input, self.weight, self.wanted = input, linear_weight, wanted
        self.tensors = _empty_grads(input, linear_weight, wanted)
        if not input.shape[0]:
            for grad in self.tensors:
                grad.zero_()

    def add(self, tokens: slice, dlogits: Tensor) -> None:
        (dinput, dweight, dbias), keep = self.tensors, float(tokens.start > 0)
        if self.wanted[0]:
            torch.mm(dlogits, self.weight, out=dinput[tokens])
        if self.wanted[1]:
            _accumulate(dweight, dlogits.t(), self.input[tokens], keep)
        if self.wanted[2]:
            chunk = dlogits.sum(0, dtype=torch.float32)
            _ = dbias.add_(chunk) if keep else dbias.copy_(chunk)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, keep: float) -> None:
    """total = keep·total + a·b, total in float32 whatever a and b are; what it held is not looked at where keep is 0."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=keep)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=keep, out_dtype=torch.float32, out=total)
    elif keep:  # the CPU has no such matmul, and in float32 it takes three times as long: one rounding a chunk
        total.add_(torch.mm(a, b))
    else:
        total.copy_(torch.mm(a, b))


def _unit(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What gradients are made for, () fp32: such that a token's are of the order of 1 whatever the class weights are, as half precision
    rounds them before a mean divides them. 1 / the mean weight of the targets that count, or 1."""
    if weight is None:
        return torch.ones((), dtype=torch.float32, device=target.device)
    counts = target != ignore_index
    weights = weight.float()[target.clamp(0, weight.shape[0] - 1)] * counts
    return torch.where(counts.any(), counts.sum() / weights.sum(), 1.0)


def _scaled(grad: Tensor, dloss: Tensor, divisor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad·dloss / divisor with one rounding; where nothing counted (divisor 0) there is no gradient."""
    scale = dloss.float()
    if divisor is not None:
        scale = torch.where(divisor == 0.0, 0.0, scale / divisor)
    # One dim at least: a 0-d factor would be rounded to grad's dtype first.
    return torch.mul(grad, scale.reshape([1] * grad.dim()), out=torch.empty(grad.shape, dtype=dtype, device=grad.device))


# --------------------------------------------------------------------------------------------------------------------
# The operators.


def _linear_cross_entropy_fwd(
    input, linear_weight, linear_bias, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype, return_lse,
    chunk_size, wanted,
):  # fmt: skip
    if log.isEnabledFor(logging.INFO):
        log.info("linear_cross_entropy_fwd: input %s linear_weight %s %s", describe(input), describe(linear_weight), reduction)
    check_target_values("linear_cross_entropy", target, linear_weight.shape[0], ignore_index)
    rows, options = implementation(input), (ignore_index, label_smoothing, z_loss, softcap)
    grads = _Grads(input, linear_weight, wanted)
    numbers = input.new_empty(4, input.shape[0], dtype=torch.float32)
    one = _unit(target, weight if reduction == "mean" else None, ignore_index) if any(wanted) else None
    for tokens, logits in _Chunks(input, linear_weight, linear_bias, chunk_size):
        numbers[:, tokens] = found = rows.cross_entropy_fwd(logits, target[tokens], weight, *options)
        if any(wanted):
            rows.cross_entropy_bwd(one, None, None, logits, target[tokens], weight, found, *options, out=logits)
            grads.add(tokens, logits)
    loss, lse, divisor = reduce(numbers, target.shape, reduction, dtype, return_lse)
    if any(wanted) and divisor.numel():
        divisor.mul_(one)
    return loss, lse, divisor, numbers, *grads.tensors


def _linear_cross_entropy_fwd_fake(
    input, linear_weight, linear_bias, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype, return_lse,
    chunk_size, wanted,
):  # fmt: skip
    numbers = input.new_empty(4, input.shape[0], dtype=torch.float32)
    reduced = reduce_fake(input, target.shape, reduction, dtype, return_lse)
    return *reduced, numbers, *_empty_grads(input, linear_weight, wanted)


def _linear_cross_entropy_scale(dloss, divisor, grad, dtype):
    return _scaled(grad, dloss, divisor, dtype)


def _linear_cross_entropy_bwd(
    dloss, dlse, divisor, input, linear_weight, linear_bias, target, weight, numbers, ignore_index, label_smoothing, z_loss, softcap,
    chunk_size, wanted,
):  # fmt: skip
    if log.isEnabledFor(logging.INFO):
        log.info("linear_cross_entropy_bwd: input %s linear_weight %s", describe(input), describe(linear_weight))
    rows, options = implementation(input), (ignore_index, label_smoothing, z_loss, softcap)
    grads = _Grads(input, linear_weight, wanted)
    for tokens, logits in _Chunks(input, linear_weight, linear_bias, chunk_size):
        rows.cross_entropy_bwd(
            dloss[tokens] if dloss.dim() else dloss, None if dlse is None else dlse[tokens], divisor, logits, target[tokens],
            weight, numbers[:, tokens], *options, out=logits,
        )  # fmt: skip
        grads.add(tokens, logits)
    return tuple(grad.to(input.dtype) for grad in grads.tensors)


def _linear_cross_entropy_bwd_fake(dloss, dlse, divisor, input, linear_weight, linear_bias, *rest):
    return tuple(grad.to(input.dtype) for grad in _empty_grads(input, linear_weight, rest[-1]))


_INPUTS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
_OPTIONS = "float label_smoothing, float z_loss, float softcap"
define(
    f"linear_cross_entropy_fwd({_INPUTS}, int ignore_index, str reduction, {_OPTIONS}, ScalarType dtype, bool return_lse, "
    "SymInt? chunk_size, bool[] wanted) -> (Tensor loss, Tensor lse, Tensor divisor, Tensor numbers, Tensor dinput, "
    "Tensor dlinear_weight, Tensor dlinear_bias)",
    _linear_cross_entropy_fwd,
    _linear_cross_entropy_fwd_fake,
    torch_on_cuda=True,
)
define(
    "linear_cross_entropy_scale(Tensor dloss, Tensor? divisor, Tensor grad, ScalarType dtype) -> Tensor",
    _linear_cross_entropy_scale,
    lambda dloss, divisor, grad, dtype: grad.new_empty(grad.shape, dtype=dtype),
    torch_on_cuda=True,
)
define(
    f"linear_cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor? divisor, {_INPUTS}, Tensor numbers, int ignore_index, {_OPTIONS}, "
    "SymInt? chunk_size, bool[] wanted) -> (Tensor dinput, Tensor dlinear_weight, Tensor dlinear_bias)",
    _linear_cross_entropy_bwd,
    _linear_cross_entropy_bwd_fake,
    torch_on_cuda=True,
)


def _matmul_flops(input: Tensor, linear_weight: Tensor) -> int:
    return 2 * input.shape[0] * input.shape[1] * linear_weight.shape[0]


@register_flop_formula(torch.ops.fastattn.linear_cross_entropy_fwd, get_raw=True)
def _linear_cross_entropy_fwd_flops(input, linear_weight, *rest, **_) -> int:
    return _matmul_flops(input, linear_weight) * (1 + sum(rest[-1][:2]))


@register_flop_formula(torch.ops.fastattn.linear_cross_entropy_bwd, get_raw=True)
def _linear_cross_entropy_bwd_flops(dloss, dlse, divisor, input, linear_weight, *rest, **_) -> int:
    return _matmul_flops(input, linear_weight) * (1 + sum(rest[-1][:2]))


@differentiable
class _LinearCrossEntropy(torch.autograd.Function):
    """Of input (T, H) and targets (T,): (loss, lse), what a backward needs of the forward, and the gradients that it made."""

    @staticmethod
    def forward(
        input, linear_weight, linear_bias, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype, return_lse,
        chunk_size, wanted,
    ):  # fmt: skip
        return operators.linear_cross_entropy_fwd(
            input, linear_weight, linear_bias, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, dtype,
            return_lse, chunk_size, wanted,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ignore_index, ctx.reduction, label_smoothing, z_loss, softcap, _, ctx.return_lse, chunk_size, ctx.made = inputs
        ctx.options = label_smoothing, z_loss, softcap, chunk_size
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1 if not ctx.return_lse else 2 :])
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx, dloss, dlse, *_):
        input, linear_weight, linear_bias, target, weight, divisor, numbers, *made = ctx.saved_tensors
        divisor = divisor if ctx.reduction == "mean" else None
        wanted = list(ctx.needs_input_grad[:3])
        dloss = numbers.new_zeros(()) if dloss is None else dloss
        if any(ctx.made):
            grads = [
                torch.ops.fastattn.linear_cross_entropy_scale(dloss, divisor, grad, input.dtype) if want else None
                for grad, want in zip(made, wanted, strict=True)
            ]
        else:
            grads = torch.ops.fastattn.linear_cross_entropy_bwd(
                dloss, dlse if ctx.return_lse else None, divisor, input, linear_weight, linear_bias, target, weight, numbers,
                ctx.ignore_index, *ctx.options, wanted,
            )  # fmt: skip
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *once("linear_cross_entropy", grads, dloss, dlse, input, linear_weight, linear_bias), *[None] * 11


# --------------------------------------------------------------------------------------------------------------------
# The public function.


def _check(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, chunk_size: int | None) -> None:
    op = "linear_cross_entropy"
    for arg, t in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        checks.check_tensor(op, arg, t)
    if linear_bias is not None:
        checks.check_tensor(op, "linear_bias", linear_bias)
    if input.dim() == 0:
        checks.reject(op, "input", "have shape (…, H)", checks.shape(input))
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        checks.reject(op, "linear_weight", f"have shape (C, H) with input's H = {input.shape[-1]}", checks.shape(linear_weight))
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        checks.reject(op, "linear_bias", f"have shape (C,) = ({linear_weight.shape[0]},)", checks.shape(linear_bias))
    if target.is_floating_point():
        raise NotImplementedError(f"{op}: target must hold class indices; for probabilities use fastattn.cross_entropy of the logits")
    check_target(op, target, input.shape[:-1], "(…)", input.device)
    if chunk_size is not None and checks.integer(op, "chunk_size", chunk_size, "be an int or None") < 1:
        checks.reject(op, "chunk_size", "be positive", chunk_size)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_entropy(input·linear_weightᵀ + linear_bias, target, …)`, never holding the logits of more than a chunk of tokens.

    Names and order of `torch.nn.functional.linear_cross_entropy` (torch 2.13). T tokens, hidden size H, vocabulary C.

    Args:
        input: (…, H), float16, bfloat16 or float32; T is the product of the dims before H.
        linear_weight: (C, H), input's dtype. linear_bias: (C,), input's dtype; None is 0.
        target: (…), int64 or int32 class indices.
        weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse: as in `fastattn.cross_entropy`.
        chunk_size: tokens at a time; None is an eighth of them, from 256 to 4096. A chunk's logits take chunk_size·C·itemsize bytes.

    Returns:
        loss, in input's dtype. With return_lse (loss, lse): lse is float32 of target's shape, and its gradient flows.

    Memory: one chunk of logits, a float32 gradient of linear_weight, and the gradients themselves. Where input, weight or bias require
    them, the gradients of a "mean" or a "sum" are made in the forward (three matmuls), and scaled, out of place, in the backward. With
    reduction="none" or return_lse, whose upstream gradients are one a token, the backward makes the logits again (one matmul forward,
    three backward).

    Numerics: logits and their gradients are rounded to input's dtype, as a linear layer rounds them; sums are in fp32, that of the
    weight's gradient over the chunks included (on the CPU, each chunk's part of it is a matmul in input's dtype). Under autocast input,
    weight and bias are cast as for a linear layer, and the loss is float32. Bit for bit the same result at every run with the same
    chunk_size. Double backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError: no tensor, or another dtype. ValueError: shapes, devices or options that do not fit, or a class weight that requires a
        gradient. IndexError: a target out of range, on CPU tensors; on CUDA the loss and the gradients are NaN. NotImplementedError: class
        probabilities as target.

    Source: the chunks are those of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989).

    Example:
        >>> hidden = model(tokens)  # (B, S, H)
        >>> fastattn.linear_cross_entropy(hidden[:, :-1], lm_head.weight, tokens[:, 1:]).backward()
    """
    op = "linear_cross_entropy"
    _check(input, linear_weight, linear_bias, target, chunk_size)
    dtype = torch.float32 if autocasts(input) else input.dtype
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    checks.check_dtype(op, "input", input)
    for arg, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and (t.dtype != input.dtype or t.device != input.device):
            checks.reject(op, arg, f"have input's dtype {input.dtype} and device {input.device}", f"{t.dtype} on {t.device}", TypeError)
    check_options(
        op, weight, linear_weight.shape[0], input.device, ignore_index, reduction, label_smoothing, z_loss, softcap
    )
    in_forward = torch.is_grad_enabled() and reduction != "none" and not return_lse
    wanted = [in_forward and t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
    loss, lse, *_ = apply(
        op, _LinearCrossEntropy, input.reshape(target.numel(), input.shape[-1]), linear_weight, linear_bias, target.reshape(-1), weight,
        int(ignore_index), reduction, float(label_smoothing), float(z_loss), float(softcap), dtype, bool(return_lse),
        None if chunk_size is None else int(chunk_size), wanted,
    )  # fmt: skip
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return (loss, lse.reshape(target.shape)) if return_lse else loss
