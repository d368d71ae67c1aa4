"""Layer norm and RMS norm, with a residual or without, as torch operators, and the public functions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastattn.cpu import norm as cpu
from fastattn.cuda import norm as cuda

from . import checks
from .attention import draw_seed_for
from .dispatch import chooses_cuda, describe, log, runs_kernels
from .operator import apply, define, differentiable, once, operators

# --------------------------------------------------------------------------------------------------------------------
# The operators: one pair for all four functions. They see rows (…, N) and parameters (N,).


def _norm_fwd(
    x, residual, weight, bias, seed, eps, p, offset, subtract_mean, cast_before_weight, dtype, backend=None
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_kernels(x):
        norm_fwd = cpu.norm_fwd
    elif chooses_cuda(
        "norm_fwd", backend, cuda.is_chosen(x), cuda.limit, x, residual, weight, bias, p, subtract_mean, cast_before_weight, dtype
    ):
        norm_fwd = cuda.norm_fwd
    else:
        from fastattn.kernels.norm import norm_fwd
    if log.isEnabledFor(logging.INFO):
        log.info("norm_fwd: x %s residual %s, by %s", describe(x), describe(residual), norm_fwd.__module__)
    y, h, stats = norm_fwd(x, residual, weight, bias, seed, eps, p, offset, subtract_mean, cast_before_weight, dtype)
    if x.dim() != 2:  # by x's dims, so that what shards one of them shards its statistics
        stats = stats.view(stats.shape[0], *x.shape[:-1])
    return y, x.new_empty(0) if h is None else h, stats  # a schema has no optional results


def _norm_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight, bias, seed, stats: Tensor, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("norm_bwd: h %s", describe(h))
    if runs_kernels(h):
        from fastattn.kernels.norm_bwd import norm_bwd
    else:
        norm_bwd = cpu.norm_bwd
    if h.dim() != 2:
        stats = stats.reshape(stats.shape[0], h.shape[:-1].numel())
    grads = norm_bwd(dy, dh, h, weight, bias, seed, stats, *options)
    return tuple(h.new_empty(0) if grad is None else grad for grad in grads)


def _norm_fwd_fake(x, residual, weight, bias, seed, eps, p, offset, subtract_mean, cast_before_weight, dtype, backend=None):
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(0) if residual is None else residual.new_empty(residual.shape),
        x.new_empty((1 + subtract_mean, *x.shape[:-1]), dtype=torch.float32),
    )


def _norm_bwd_fake(
    dy, dh, h, weight, bias, seed, stats, p, offset, subtract_mean, cast_before_weight, add, dtype, weight_grad, bias_grad
):
    return (
        h.new_empty(0) if add and p == 0.0 and dtype == h.dtype else h.new_empty(h.shape, dtype=dtype),
        h.new_empty(h.shape) if add else h.new_empty(0),
        weight.new_empty(weight.shape) if weight_grad else h.new_empty(0),
        bias.new_empty(bias.shape) if bias_grad else h.new_empty(0),
    )


define(
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? dropout_seed, float eps, float dropout_p, "
    "float weight_offset, bool subtract_mean, bool cast_before_weight, ScalarType dtype, str? backend=None) -> "
    "(Tensor y, Tensor h, Tensor stats)",
    _norm_fwd,
    _norm_fwd_fake,
)
define(
    "norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor? dropout_seed, Tensor stats, float dropout_p, "
    "float weight_offset, bool subtract_mean, bool cast_before_weight, bool add, ScalarType dtype, bool weight_grad, bool bias_grad) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _norm_bwd,
    _norm_bwd_fake,
)


@differentiable
class _Norm(torch.autograd.Function):
    """(y, h, stats) of the operator; h is empty without a residual. `options` are (dropout_p, weight_offset, subtract_mean,
    cast_before_weight)."""

    @staticmethod
    def forward(op, x, residual, weight, bias, seed, eps, options, dtype, backend):
        return operators.norm_fwd(x, residual, weight, bias, seed, eps, *options, dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, x, residual, weight, bias, seed, _, ctx.options, _, _ = inputs
        _, h, stats = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((h, stats) if residual is None else (stats,)))
        ctx.add, ctx.dtype = residual is not None, x.dtype
        ctx.save_for_backward(h if ctx.add else x, weight, bias, seed, stats)

    @staticmethod
    def backward(ctx, dy, dh, _):
        h, weight, bias, seed, stats = ctx.saved_tensors
        if not ctx.add:
            dh = None  # of an empty h, a compiler may have made one
        weight_grad, bias_grad = (wanted and dy is not None for wanted in ctx.needs_input_grad[3:5])
        if dy is None:  # the new residual alone was used
            dy = h.new_zeros((), dtype=ctx.dtype).expand(h.shape)
        dx, dresidual, dweight, dbias = torch.ops.fastattn.norm_bwd(
            dy, dh, h, weight, bias, seed, stats, *ctx.options, ctx.add, ctx.dtype, weight_grad, bias_grad
        )
        dropout_p = ctx.options[0]
        if ctx.add and dropout_p == 0.0 and ctx.dtype == h.dtype:
            dx = dresidual
        grads = dx, dresidual if ctx.add else None, dweight if weight_grad else None, dbias if bias_grad else None
        return None, *once(ctx.op, grads, dy, dh, h, weight, bias), None, None, None, None, None


def dropout_keep(seed: Tensor, num_rows: int, num_cols: int, dropout_p: float) -> Tensor:
    """The mask that add_layer_norm and add_rms_norm use with this seed on the seed's device: bool (rows, N), True = kept. For tests and
    debugging."""
    if runs_kernels(seed):
        from fastattn.reference.philox import philox_keep

        return philox_keep(int(seed), 1, 1, num_rows, num_cols, dropout_p, device=seed.device)[0, 0]
    return cpu.dropout_keep(seed, num_rows, num_cols, dropout_p)


# --------------------------------------------------------------------------------------------------------------------
# The public functions.


def _checked_shape(op: str, x: Tensor, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    must = "be an int or a sequence of ints"
    if isinstance(normalized_shape, (list, tuple)):
        sizes = tuple(checks.integer(op, "normalized_shape", size, must) for size in normalized_shape)
    else:
        sizes = (checks.integer(op, "normalized_shape", normalized_shape, must),)
    if not sizes:
        checks.reject(op, "normalized_shape", "name at least one dim", normalized_shape)
    if tuple(x.shape[-len(sizes) :]) != sizes:
        checks.reject(op, "x", f"have a shape that ends in normalized_shape = {sizes}", checks.shape(x))
    return sizes


def _normalise(
    op: str, x, residual, normalized_shape, weight, bias, eps, *, subtract_mean: bool, dropout_p=0.0, weight_offset=0.0,
    cast_before_weight=False, backend=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Check, and see the normalised dims as one: (y, h)."""
    checks.check_tensor(op, "x", x)
    checks.check_dtype(op, "x", x)
    sizes = _checked_shape(op, x, normalized_shape)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.check_tensor(op, name, parameter)
            checks.check_dtype(op, name, parameter)
            if tuple(parameter.shape) != sizes:
                checks.reject(op, name, f"have normalized_shape = {sizes}", checks.shape(parameter))
    if residual is not None:
        checks.check_dtype(op, "residual", residual)
        if residual.shape != x.shape:
            checks.reject(op, "residual", f"have x's shape {checks.shape(x)}", checks.shape(residual))
        if residual is x:  # one tensor in two places breaks a compiled autograd.Function
            residual = residual.view_as(residual)
    for name, other in (("residual", residual), ("weight", weight), ("bias", bias)):
        if other is not None and other.device != x.device:
            checks.reject(op, name, f"be on x's device {x.device}", other.device)
    for name, number in (("eps", eps), ("weight_offset", weight_offset)):
        checks.check_number(op, name, number)
    checks.check_probability(op, "dropout_p", dropout_p)
    checks.check_backend(op, backend, x, runs_kernels(x))

    dtype = x.dtype
    if cast_before_weight:
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    elif checks.autocasts_to_float32(x):
        dtype = torch.float32
    shape = x.shape
    if len(sizes) > 1:
        x, residual, weight, bias = (t if t is None else t.flatten(-len(sizes)) for t in (x, residual, weight, bias))
    seed = draw_seed_for(x) if dropout_p > 0.0 else None
    options = float(dropout_p), float(weight_offset), subtract_mean, bool(cast_before_weight)
    y, h, _ = apply(op, _Norm, op, x, residual, weight, bias, seed, float(eps), options, dtype, backend)
    return (y, h) if len(sizes) == 1 else (y.view(shape), h if residual is None else h.view(shape))


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: Literal["triton", "cuda"] | None = None,
) -> Tensor:
    """(x − mean x)/√(var x + eps)·weight + bias over the trailing dims: `torch.nn.functional.layer_norm`'s contract.

    Args:
        x: (…, *normalized_shape); float16, bfloat16 or float32. Any size of the normalised dims together, any strides: where they are
            one dim, contiguous, and the dims before it lie at no more than two strides, x is read in place (heads cut out of a packed
            projection); else it is copied.
        normalized_shape: the trailing dims' sizes, or one int.
        weight, bias: normalized_shape; any of the three dtypes, whatever x's is.
        eps: added to the variance (biased, as torch's).
        backend: which of two kernels runs the forward of CUDA tensors. None: CUDA C++ for few rows, as its launch takes less of the host,
            where it is built and does what is asked (`fastattn.cuda.norm.limit`), else Triton. What is named runs or raises.

    Returns:
        y: x's shape and dtype, contiguous. So does torch with a float32 weight on half-precision x, the one mix that it takes (on the
        CPU; on CUDA it wants one dtype); mixes it refuses are computed here by the same rule.

    Numerics: fp32 inside, one rounding. The variance is that of values whose mean is subtracted, after a common offset is: rows of
    1e4 ± 1 lose no digits and constant rows are exactly bias. Statistics are kept in fp32 for the backward, which recomputes x̂;
    dweight and dbias are fp32 sums in a fixed order, deterministic. Under autocast on CUDA the result is float32, as torch's is.
    Double backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError: an argument is no tensor, or has none of the three dtypes; eps is no number. ValueError: shapes or devices do not
        match; a backend for CPU tensors. NotImplementedError: backend="cuda" is not built, or does not do this.

    Source: Ba, Kiros and Hinton, arXiv 1607.06450.

    Example:
        >>> fastattn.layer_norm(torch.randn(4, 1000), 1000, torch.ones(1000), torch.zeros(1000))
    """
    y, _ = _normalise("layer_norm", x, None, normalized_shape, weight, bias, eps, subtract_mean=True, backend=backend)
    return y


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    backend: Literal["triton", "cuda"] | None = None,
) -> Tensor:
    """x/√(mean x² + eps)·(weight + weight_offset) over the trailing dims: `torch.nn.functional.rms_norm`'s contract, and two more.

    Args:
        x: (…, *normalized_shape), as in `layer_norm`. Heads of q or k that are cut out of a packed projection are read in place.
        normalized_shape: the trailing dims' sizes, or one int.
        weight: normalized_shape; any of the three dtypes, whatever x's is.
        eps: added to the mean of squares; None is `torch.finfo(torch.float32).eps` for every dtype, as in torch.
        weight_offset: 1.0 is Gemma's norm, whose weights are stored less 1.
        cast_before_weight: the order of roundings of Llama's norm in transformers. False: the weight is applied in fp32 and the result
            rounded once, which is torch's, and Gemma's. True: the normalised value is rounded to x's dtype, and then multiplied by the
            weight (with weight_offset: by their sum, rounded to the weight's dtype), which rounds again.
        backend: as in `layer_norm`.

    Returns:
        y: x's shape, contiguous, in x's dtype whatever the weight's is, as in torch; with cast_before_weight in the dtype that x's and
        the weight's promote to.

    Numerics: as in `layer_norm`. With cast_before_weight autocast changes nothing, as it does not touch transformers' own.

    Raises:
        As `layer_norm`, and TypeError: weight_offset is no number.

    Source: Zhang and Sennrich, arXiv 1910.07467.

    Example:
        >>> fastattn.rms_norm(torch.randn(4, 1000), 1000, torch.ones(1000), eps=1e-6)
    """
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    options = dict(weight_offset=weight_offset, cast_before_weight=cast_before_weight, backend=backend)
    y, _ = _normalise("rms_norm", x, None, normalized_shape, weight, None, eps, subtract_mean=False, **options)
    return y


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: Literal["triton", "cuda"] | None = None,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(h), h) with h = residual + dropout(x), in one pass: a pre-norm block's residual stream and its next input.

    Args:
        x: what a block adds to the stream, as in `layer_norm`.
        residual: x's shape, any of the three dtypes.
        normalized_shape, weight, bias, eps, backend: as in `layer_norm`.
        dropout_p: probability of dropping an entry of x, in [0, 1); kept ones are divided by 1 − dropout_p. The mask is counter-based
            (Philox) with a seed from torch's generator: recomputed in the backward, reproducible by `torch.manual_seed`. There is no
            training flag: pass 0.0 for evaluation.

    Returns:
        y: the normalised h, in x's dtype; h: the new residual, in residual's. Both contiguous. The sum is computed in fp32 and rounded to
        the residual's dtype, and what is normalised is h as rounded, as in `h = residual + dropout(x); y = layer_norm(h)`.

    Numerics: as in `layer_norm`. Gradients of both results flow: dresidual in residual's dtype, dx in x's. Neither x nor residual is
    written to.

    Raises:
        As `layer_norm`, and ValueError: residual has another shape or device than x, or dropout_p is outside [0, 1).

    Example:
        >>> y, residual = fastattn.add_layer_norm(torch.randn(4, 1000), torch.randn(4, 1000), 1000)
    """
    checks.check_tensor("add_layer_norm", "residual", residual)
    options = dict(subtract_mean=True, dropout_p=dropout_p, backend=backend)
    return _normalise("add_layer_norm", x, residual, normalized_shape, weight, bias, eps, **options)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    backend: Literal["triton", "cuda"] | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = residual + dropout(x), in one pass.

    Args:
        x, residual, dropout_p: as in `add_layer_norm`.
        normalized_shape, weight, eps, weight_offset, cast_before_weight, backend: as in `rms_norm`.

    Returns:
        y: the normalised h, in x's dtype (cast_before_weight: rounded to it, and in what it and the weight's promote to); h: the new
        residual, in residual's.

    Numerics, Raises: as in `add_layer_norm` and `rms_norm`.

    Example:
        >>> y, residual = fastattn.add_rms_norm(torch.randn(4, 1000), torch.randn(4, 1000), 1000, torch.ones(1000))
    """
    checks.check_tensor("add_rms_norm", "residual", residual)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    options = dict(dropout_p=dropout_p, weight_offset=weight_offset, cast_before_weight=cast_before_weight, backend=backend)
    return _normalise("add_rms_norm", x, residual, normalized_shape, weight, None, eps, subtract_mean=False, **options)
