"""flash_attn.ops.rms_norm: the norm that flash-attn's extension of old has, by name."""

from __future__ import annotations

from torch import Tensor

from fastattn.ops import norm

from .triton.layer_norm import RMSNorm

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x/√(mean x² + epsilon)·weight over the last dim."""
    return norm.rms_norm(x, x.shape[-1], weight, epsilon).to(x.dtype)  # autocast has norms return float32
