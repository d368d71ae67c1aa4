"""Softmax as a torch operator, and the public function."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from fastattn.cpu import softmax as cpu
from fastattn.cuda import softmax as cuda

from . import checks
from .dispatch import chooses_cuda, describe, log, runs_kernels
from .operator import apply, define, differentiable, once, operators


def _softmax_fwd(x: Tensor, dim: int, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    if not runs_kernels(x):
        softmax_fwd = cpu.softmax_fwd
    elif chooses_cuda("softmax_fwd", backend, cuda.is_chosen(x), cuda.limit, x, dim):
        softmax_fwd = cuda.softmax_fwd
    else:
        from fastattn.kernels.softmax import softmax_fwd  # here, so that `import fastattn` needs no Triton
    if log.isEnabledFor(logging.INFO):
        log.info("softmax_fwd: x %s dim=%d dtype=%s, by %s", describe(x), dim, dtype, softmax_fwd.__module__)
    return softmax_fwd(x, dim, dtype)


def _softmax_bwd(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    if log.isEnabledFor(logging.INFO):
        log.info("softmax_bwd: y %s dim=%d", describe(y), dim)
    if runs_kernels(y):
        from fastattn.kernels.softmax import softmax_bwd
    else:
        softmax_bwd = cpu.softmax_bwd
    return softmax_bwd(dy, y, dim, dtype)


define(
    "softmax_fwd(Tensor x, int dim, ScalarType dtype, str? backend=None) -> Tensor",
    _softmax_fwd,
    lambda x, dim, dtype, backend=None: x.new_empty(x.shape, dtype=dtype),
)
define(
    "softmax_bwd(Tensor dy, Tensor y, int dim, ScalarType dtype) -> Tensor",
    _softmax_bwd,
    lambda dy, y, dim, dtype: y.new_empty(y.shape, dtype=dtype),
)


@differentiable
class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(x, dim, dtype, backend):
        return operators.softmax_fwd(x, dim, dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, y):
        x, ctx.dim, _, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dx = torch.ops.fastattn.softmax_bwd(dy, y, ctx.dim, ctx.dtype)
        return *once("softmax", [dx], dy, y), None, None, None


def softmax(
    x: Tensor, dim: int = -1, dtype: torch.dtype | None = None, *, backend: Literal["triton", "cuda"] | None = None
) -> Tensor:
    """exp(x − max x) / Σ exp(x − max x) along `dim`: `torch.nn.functional.softmax`'s contract.

    Args:
        x: any shape and strides; float16, bfloat16 or float32 (any dtype where `dtype` is given). Any length along `dim`.
        dim: the dim whose entries sum to 1. The last one is fastest; another one wants a contiguous x, and copies one that is not.
        dtype: x's values are cast to it first, and it is the result's; None is x's own.
        backend: which of two kernels runs the forward of CUDA tensors. None: CUDA C++ for few rows, as its launch takes less of the host,
            where it is built and does what is asked (`fastattn.cuda.softmax.limit`), else Triton. What is named runs or raises.

    Returns:
        y: x's shape, contiguous. A row of nothing but −inf is NaN, as in torch, and so is a row with +inf or NaN in it.

    Numerics: fp32 inside, one rounding. Under autocast on CUDA the result is float32, as torch's is. Double backward and forward-mode AD
    raise NotImplementedError.

    Raises:
        TypeError: x is no tensor, or the dtype is none of the three. IndexError: `dim` is out of range. ValueError: a backend for CPU
        tensors. NotImplementedError: backend="cuda" is not built, or does not do this.

    Source: Milakov and Gimelshein, arXiv 1805.02867 (rows longer than registers hold).

    Example:
        >>> fastattn.softmax(torch.randn(4, 1000), dim=-1).sum(-1)
    """
    checks.check_tensor("softmax", "x", x)
    if dtype is None and checks.autocasts_to_float32(x):
        dtype = torch.float32
    dim = checks.dimension("softmax", "dim", dim, x.dim())
    if dtype is not None and not (dtype == torch.float32 and x.dtype in checks.FLOAT_DTYPES):
        x = x.to(dtype)  # but for half precision to float32, which the kernel reads and writes itself
    checks.check_dtype("softmax", "x", x)
    checks.check_backend("softmax", backend, x, runs_kernels(x))
    dtype = x.dtype if dtype is None else dtype
    if x.dim() == 0:
        return apply("softmax", _Softmax, x.reshape(1), 0, dtype, backend).reshape(())
    return apply("softmax", _Softmax, x, dim, dtype, backend)
