"""Merging attention results as a torch operator, and the public function."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.cpu import merge_attention as cpu

from . import checks
from .dispatch import describe, log, runs_kernels
from .operator import apply, define, differentiable, once, operators

OP = "merge_attention"


def _implementation(outs: Tensor):
    """The module with this device's merge_attention_fwd and merge_attention_bwd; kernels are imported here, so that `import fastattn`
    needs no Triton."""
    if runs_kernels(outs):
        from fastattn.kernels import merge_attention

        return merge_attention
    return cpu


def _merge_attention_fwd(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("merge_attention_fwd: outs %s lses %s", describe(outs), describe(lses))
    return _implementation(outs).merge_attention_fwd(outs, lses, outs.dtype)


def _merge_attention_bwd(dout: Tensor, dlse: Tensor | None, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("merge_attention_bwd: outs %s dlse %s", describe(outs), describe(dlse))
    return _implementation(outs).merge_attention_bwd(dout, dlse, outs, lses)


define(
    "merge_attention_fwd(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    _merge_attention_fwd,
    lambda outs, lses: (outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])),
)
define(
    "merge_attention_bwd(Tensor dout, Tensor? dlse, Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    _merge_attention_bwd,
    lambda dout, dlse, outs, lses: (outs.new_empty(outs.shape), lses.new_empty(lses.shape)),
)


@differentiable
class _MergeAttention(torch.autograd.Function):
    @staticmethod
    def forward(outs, lses):
        return operators.merge_attention_fwd(outs, lses)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None
        outs, lses = ctx.saved_tensors
        dout = outs.new_zeros(outs.shape[1:]) if dout is None else dout
        grads = torch.ops.fastattn.merge_attention_bwd(dout, dlse, outs, lses)
        return once(OP, grads, dout, dlse, outs, lses)


def _check(outs: Tensor, lses: Tensor) -> None:
    for arg, t in (("outs", outs), ("lses", lses)):
        checks.check_tensor(OP, arg, t)
    checks.check_dtype(OP, "outs", outs)
    if outs.dim() not in (4, 5):
        checks.reject(OP, "outs", "have shape (N, B, S, H, D) or packed (N, T, H, D)", checks.shape(outs))
    if outs.shape[-1] < 1:
        checks.reject(OP, "outs", "have a head_dim of at least 1", outs.shape[-1])
    if lses.dtype != torch.float32:
        checks.reject(OP, "lses", "be float32", lses.dtype, TypeError)
    checks.check_device(OP, "lses", lses, "outs'", outs.device)
    *several, seqlen, num_heads, _ = outs.shape
    letters, expected = "(N, B, H, S)" if outs.dim() == 5 else "(N, H, T)", (*several, num_heads, seqlen)
    if lses.shape != expected:
        checks.reject(OP, "lses", f"have shape {letters} = {expected} to match outs", checks.shape(lses))


def merge_attention(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from results over N disjoint sets of them: a context split between devices or programs, a shared
    prefix and each sequence's own tail, a cache and the new tokens.

    lse = log Σ exp(lse_n) and out = Σ exp(lse_n − lse)·out_n. Associative and commutative but for rounding; its identity is (0, −inf).

    Args:
        outs: (N, B, S, H, D), or packed (N, T, H, D), any D; float16, bfloat16 or float32. Any strides with a contiguous last dim; other
            last-dim strides cost a copy. Or a list of N tensors (B, S, H, D) or (T, H, D), which is stacked, at the cost of a copy.
        lses: (N, B, H, S), or (N, H, T), float32, natural logarithms, as `attention(..., return_lse=True)` gives them (FlashInfer's are
            base 2); any strides. Or a list of N.

    Returns:
        (out, lse): out (B, S, H, D) or (T, H, D) in outs' dtype, and lse (B, H, S) or (H, T) float32, contiguous. A partial with an LSE
        of −inf contributes nothing, whatever its out holds, and has gradients of 0. Of nothing but those, and of N = 0, the result is
        out 0, lse −inf. An LSE of +inf or NaN makes its row's out NaN.

    Numerics: fp32 inside, one rounding. Gradients reach outs and lses, from those of out and lse. Double backward and forward-mode AD raise
    NotImplementedError.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Source: Dao et al., arXiv 2205.14135, appendix B (the algebra); Ye et al., arXiv 2501.01005, section 2.2 (as an operator).

    Example:
        >>> q, k, v = torch.randn(3, 1, 64, 8, 64).unbind()
        >>> halves = [fastattn.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(40), slice(40, None))]
        >>> out, lse = fastattn.merge_attention(*zip(*halves))
    """
    outs, lses = (torch.stack(tuple(ts)) if isinstance(ts, (list, tuple)) else ts for ts in (outs, lses))
    _check(outs, lses)
    return apply(OP, _MergeAttention, outs, lses)
