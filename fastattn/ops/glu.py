"""Gated linear units as torch operators, and the public functions."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fastattn.cpu import glu as cpu

from . import checks
from .dispatch import describe, log, runs_kernels
from .operator import apply, define, differentiable, once, operators


def _implementation(gate: Tensor):
    """The module with this device's glu_fwd and glu_bwd; kernels are imported here, so that `import fastattn` needs no Triton."""
    if runs_kernels(gate):
        from fastattn.kernels import glu

        return glu
    return cpu


def _glu_fwd(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if log.isEnabledFor(logging.INFO):
        log.info("glu_fwd: gate %s up %s %s", describe(gate), describe(up), activation)
    return _implementation(gate).glu_fwd(gate, up, activation)


def _glu_bwd(dout: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("glu_bwd: gate %s up %s %s", describe(gate), describe(up), activation)
    dgate, dup = _implementation(gate).glu_bwd(dout, gate, up, activation)
    return dgate, gate.new_empty(0) if dup is None else dup  # a schema has no optional results


def _glu_fwd_fake(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2) if up is None else gate.shape)


def _glu_bwd_fake(dout: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


define("glu_fwd(Tensor gate, Tensor? up, str activation) -> Tensor", _glu_fwd, _glu_fwd_fake)
define("glu_bwd(Tensor dout, Tensor gate, Tensor? up, str activation) -> (Tensor, Tensor)", _glu_bwd, _glu_bwd_fake)


@differentiable
class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(op, gate, up, activation):
        return operators.glu_fwd(gate, up, activation)

    @staticmethod
    def setup_context(ctx, inputs, out):
        ctx.op, gate, up, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.ops.fastattn.glu_bwd(dout, gate, up, ctx.activation)
        return None, *once(ctx.op, [dgate, None if up is None else dup], dout, gate, up), None


def _gated(op: str, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    checks.check_tensor(op, "gate", gate)
    checks.check_dtype(op, "gate", gate)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            checks.reject(op, "gate", "have an even last dim to hold [gate; up] without up", checks.shape(gate))
    else:
        checks.check_tensor(op, "up", up)
        checks.check_like(op, "up", up, gate, owner="gate's")
        if up.shape != gate.shape:
            checks.reject(op, "up", f"have gate's shape {checks.shape(gate)}", checks.shape(up))
        if up is gate:  # one tensor in two places breaks a compiled autograd.Function
            up = up.view_as(up)
    return apply(op, _Glu, op, gate, up, activation)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate)∘up, with silu(g) = g·σ(g): `torch.nn.functional.silu(gate) * up` in one pass.

    Args:
        gate: (…, N); float16, bfloat16 or float32. With up=None (…, 2·N): [gate; up] along the last dim, as one projection computes
            them, read in place.
        up: gate's shape and dtype. Either may have any strides with a contiguous last dim (`gate, up = projected.chunk(2, -1)`
            costs no copy); other last-dim strides cost one.

    Returns:
        out: (…, N) in gate's dtype, contiguous. inf and NaN are where `silu(gate) * up` has them.

    Numerics: fp32 inside, one rounding. The backward recomputes silu from gate, so that nothing but the inputs is saved; with up=None
    its gradient is one tensor. Double backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError: an argument is no tensor, gate has none of the three dtypes, or up another one than gate. ValueError: up has another
        shape or device than gate, or without up gate's last dim is odd.

    Source: Shazeer, arXiv 2002.05202.

    Example:
        >>> fastattn.swiglu(torch.randn(4, 2 * 1000))  # of [gate; up]: (4, 1000)
    """
    return _gated("swiglu", gate, up, "silu")


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(gate)∘up: `torch.nn.functional.gelu(gate, approximate=approximate) * up` in one pass.

    Args:
        gate, up: as in `swiglu`.
        approximate: "tanh" is gelu(g) = g·(1 + tanh(√(2/π)·(g + 0.044715·g³)))/2, "none" is g·Φ(g) with Φ(g) = (1 + erf(g/√2))/2.
            Mind that torch's default is "none".

    Returns:
        out: (…, N) in gate's dtype, contiguous. inf and NaN are where `gelu(gate) * up` has them.

    Numerics: as in `swiglu`. Φ is a fit to 3e-8 that keeps its relative accuracy (0.2 %) where 1 + erf has cancelled to 0. Double
    backward and forward-mode AD raise NotImplementedError.

    Raises:
        TypeError, ValueError: as in `swiglu`. ValueError: `approximate` is neither "tanh" nor "none".

    Sources: Hendrycks and Gimpel, arXiv 1606.08415; Shazeer, arXiv 2002.05202.

    Example:
        >>> fastattn.geglu(torch.randn(4, 1000), torch.randn(4, 1000), approximate="none")
    """
    if approximate not in ("tanh", "none"):
        checks.reject("geglu", "approximate", 'be "tanh" or "none"', repr(approximate))
    return _gated("geglu", gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")
