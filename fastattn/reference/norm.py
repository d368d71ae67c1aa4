"""The oracle of the norms: their definitions, in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = int | Sequence[int]


def _normalised_dims(normalized_shape: Shape) -> tuple[int, ...]:
    return tuple(range(-(1 if isinstance(normalized_shape, int) else len(normalized_shape)), 0))


def layer_norm(
    x: Tensor, normalized_shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(x − mean x) / √(var x + eps) · weight + bias over the trailing dims `normalized_shape`, in x's dtype."""
    dims = _normalised_dims(normalized_shape)
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype)


def rms_norm(
    x: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
) -> Tensor:
    """x / √(mean x² + eps) · (weight + weight_offset) over the trailing dims `normalized_shape`, in x's dtype, or with
    cast_before_weight in the one that x's and weight's promote to. eps None: that of float32."""
    return _rms_norm(x, x.dtype, normalized_shape, weight, eps, weight_offset, cast_before_weight)


def _rms_norm(x, dtype, normalized_shape, weight, eps, weight_offset, cast_before_weight) -> Tensor:
    """What is rounded, before the weight or after it, is rounded to `dtype`."""
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    y = x * torch.rsqrt(x.square().mean(_normalised_dims(normalized_shape), keepdim=True) + eps)
    y = y.to(dtype) if cast_before_weight else y
    y = y if weight is None else y * (weight + weight_offset)
    return y if cast_before_weight else y.to(dtype)


def _add(x: Tensor, residual: Tensor, dropout_p: float, dropout_keep: Tensor | None) -> Tensor:
    if dropout_keep is not None:
        x = torch.where(dropout_keep, x / (1.0 - dropout_p), 0.0)
    return (residual + x).to(residual.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    dropout_keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(h), h) with h = residual + dropout(x), where `dropout_keep` (x's shape, True = kept) is the mask."""
    h = _add(x, residual, dropout_p, dropout_keep)
    return layer_norm(h, normalized_shape, weight, bias, eps).to(x.dtype), h


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    cast_before_weight: bool = False,
    dropout_keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = residual + dropout(x), where `dropout_keep` (x's shape, True = kept) is the mask."""
    h = _add(x, residual, dropout_p, dropout_keep)
    return _rms_norm(h, x.dtype, normalized_shape, weight, eps, weight_offset, cast_before_weight), h
