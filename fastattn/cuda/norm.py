"""Norms in CUDA C++ (csrc/cuda/norm.cu), forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cuda_operators

from .rows import are_few, lie_at_one_stride

cuda_operators.define(
    "norm_fwd_cuda(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool subtract_mean, "
    "bool cast_before_weight) -> (Tensor y, Tensor h, Tensor stats)"
)

is_chosen = are_few


def limit(x, residual, weight, bias, dropout_p, subtract_mean, cast_before_weight, dtype) -> str | None:
    """What of a call the kernel does not do, or None."""
    if not cuda_operators.available("norm_fwd_cuda", x):
        return cuda_operators.nothing
    if dropout_p > 0.0:
        return "dropout"
    if dtype != x.dtype or (residual is not None and residual.dtype != x.dtype):
        return "a residual or a result of another dtype than x's"
    parameters = [t for t in (weight, bias) if t is not None]
    if any(t.dtype not in (x.dtype, torch.float32) or t.dtype != parameters[0].dtype for t in parameters):
        return "parameters that are neither both float32 nor both of x's dtype"
    if cast_before_weight and subtract_mean:
        return "a cast before the weight of a layer norm"
    if not (lie_at_one_stride(x) and (residual is None or lie_at_one_stride(residual))):
        return "rows at more than one stride"
    return None


def norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, dropout_seed: None, eps: float, dropout_p: float,
    weight_offset: float, subtract_mean: bool, cast_before_weight: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the Triton kernel's, within the limits above; h is empty without a residual."""
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    return torch.ops.fastattn.norm_fwd_cuda(x, residual, weight, bias, eps, weight_offset, subtract_mean, cast_before_weight)
