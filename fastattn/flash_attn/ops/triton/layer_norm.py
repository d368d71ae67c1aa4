"""flash_attn.ops.triton.layer_norm on fastattn's norms: the functions and RMSNorm, with flash-attn 2.8's signatures.

Options shared by all:
    x: (…, N). weight, bias: (N,). eps: added to the variance, or for an RMS norm to the mean of squares.
    residual: x's shape; what is normalised is then residual + dropout(x).
    dropout_p: probability of dropping an entry of x; pass 0.0 for evaluation.
    prenorm: return (y, residual_out): also what was normalised, in residual's dtype; without a residual, in x's, or in float32 with
        residual_in_fp32.
    zero_centered_weight: the weight is stored less 1 (RMS norms only).
    out_dtype: y's dtype, x's by default.

x1, weight1, bias1 (a parallel norm), rowscale, return_dropout_mask, out and residual_out raise NotImplementedError, and so does an RMS
norm's bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, residual_out) with prenorm: a layer norm, or with is_rms_norm an RMS norm, of x or of residual + dropout(x)."""
    unsupported = dict(
        x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale, return_dropout_mask=return_dropout_mask or None, out=out,
        residual_out=residual_out, bias=bias if is_rms_norm else None,
        zero_centered_weight=zero_centered_weight and not is_rms_norm or None,
    )  # fmt: skip
    given = [name for name, option in unsupported.items() if option is not None]
    if given:
        raise NotImplementedError(f"{'rms_norm_fn' if is_rms_norm else 'layer_norm_fn'}: {given[0]} is not supported")
    shape, out_dtype = x.shape[-1:], x.dtype if out_dtype is None else out_dtype
    if residual is None and dropout_p:
        residual = torch.zeros_like(x, dtype=torch.float32 if residual_in_fp32 else x.dtype)
    if is_rms_norm:
        options: dict[str, Any] = dict(weight=weight, eps=eps, weight_offset=1.0 if zero_centered_weight else 0.0)
        plain, added = rms_norm, add_rms_norm
    else:
        options = dict(weight=weight, bias=bias, eps=eps)
        plain, added = layer_norm, add_layer_norm
    wide = x.to(torch.promote_types(x.dtype, out_dtype))  # so that y is rounded once
    if residual is None:
        y, stream = plain(wide, shape, **options), x.float() if prenorm and residual_in_fp32 else x
    else:
        y, stream = added(wide, residual, shape, dropout_p=dropout_p, **options)
    y = y.to(out_dtype)  # under autocast, norms return float32
    return (y, stream) if prenorm else y


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` with is_rms_norm=True."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, zero_centered_weight, True,
        return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(torch.nn.Module):
    """flash-attn's RMS norm: forward(x, residual=None, prenorm=False, residual_in_fp32=False). Its dropout acts in training only."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p, self.zero_centered_weight = eps, dropout_p, zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm_fn(
            x, self.weight, None, residual=residual, eps=self.eps, dropout_p=self.dropout_p if self.training else 0.0, prenorm=prenorm,
            residual_in_fp32=residual_in_fp32, zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip
