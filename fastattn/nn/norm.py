"""torch.nn.LayerNorm and torch.nn.RMSNorm over fastattn's norms, which also add a residual on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for `torch.nn.LayerNorm`.

    With a residual, x is added to it first: forward(x, residual) returns (norm(residual + x), residual + x), in one kernel.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return add_layer_norm(x, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for `torch.nn.RMSNorm`, and for the RMS norms of Llama and Gemma.

    weight_offset: added to the weight; 1.0 is Gemma's norm, whose weight starts at 0 as here. cast_before_weight: round the normalised
    value to x's dtype before the weight multiplies it, as transformers' Llama does, bit for bit. With a residual, x is added to it first:
    forward(x, residual) returns (norm(residual + x), residual + x), in one kernel.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        cast_before_weight: bool = False,
    ) -> None:
        self.weight_offset, self.cast_before_weight = weight_offset, cast_before_weight  # reset_parameters reads them
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """The weight such that it changes nothing."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        options = {"weight_offset": self.weight_offset, "cast_before_weight": self.cast_before_weight}
        if residual is None:
            return rms_norm(x, self.normalized_shape, self.weight, self.eps, **options)
        return add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps, **options)
