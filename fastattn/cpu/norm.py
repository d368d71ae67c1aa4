"""The norms on the CPU, a bounded number of rows at a time: torch's own layer norm forward, all else in plain torch.

Torch's layer norm computes x·rstd − mean·rstd, which loses the digits of a common offset, and its backward the like; so its forward
is given rows less their first entry, and its backward is not used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 18  # entries of a chunk: what is in between stays in a core's cache


def norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    eps: float,
    dropout_p: float,
    weight_offset: float,
    subtract_mean: bool,
    cast_before_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, h, stats) of rows x (…, N): what `kernels.norm.norm_fwd` gives, but that the mask is this module's `dropout_keep`."""
    num_rows, num_cols = x.shape[:-1].numel(), x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype)
    h = None if residual is None else torch.empty(residual.shape, dtype=residual.dtype)
    stats = torch.empty((1 + subtract_mean, num_rows), dtype=torch.float32)
    keep = dropout_keep(dropout_seed, num_rows, num_cols, dropout_p) if dropout_p > 0.0 else None
    flat_x, flat_y = x.reshape(num_rows, num_cols), y.view(num_rows, num_cols)
    if residual is not None:
        flat_residual, flat_h = residual.reshape(num_rows, num_cols), h.view(num_rows, num_cols)
    if cast_before_weight:
        scale = None if weight is None else weight + weight_offset
    else:
        scale = None if weight is None else weight.float() + weight_offset
    bias = None if bias is None else bias.float()
    for rows in _chunks(num_rows, num_cols):
        part = flat_x[rows].float()
        if residual is not None:
            if keep is not None:
                part = torch.where(keep[rows], part * (1.0 / (1.0 - dropout_p)), 0.0)
            part = flat_h[rows].copy_(flat_residual[rows].float() + part).float()
        if subtract_mean:
            shift = part[:, :1].clone()
            flat_y[rows], mean, rstd = torch.native_layer_norm(part - shift, [num_cols], scale, bias, eps)
            stats[1, rows] = (mean + shift).squeeze(1)
        else:
            rstd = (part.square().mean(1, keepdim=True) + eps).rsqrt_()
            normalised = part * rstd
            if cast_before_weight:
                normalised = normalised.to(x.dtype)
            flat_y[rows] = normalised if scale is None else normalised * scale
        stats[0, rows] = rstd.squeeze(1)
    return y, h, stats


def norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    stats: Tensor,
    dropout_p: float,
    weight_offset: float,
    subtract_mean: bool,
    cast_before_weight: bool,
    add: bool,
    dtype: torch.dtype,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias), each None where `kernels.norm_bwd.norm_bwd` gives None."""
    num_rows, num_cols = h.shape[:-1].numel(), h.shape[-1]
    shared = add and dropout_p == 0.0 and dtype == h.dtype
    dresidual = torch.empty(h.shape, dtype=h.dtype) if add else None
    dx = None if shared else torch.empty(h.shape, dtype=dtype)
    keep = dropout_keep(dropout_seed, num_rows, num_cols, dropout_p) if dropout_p > 0.0 else None
    dweight, dbias = (torch.zeros(num_cols) if wanted else None for wanted in (weight_grad, bias_grad))
    if cast_before_weight:
        scale = None if weight is None else (weight + weight_offset).float()
    else:
        scale = None if weight is None else weight.float() + weight_offset
    flat_dy, flat_h = dy.reshape(num_rows, num_cols), h.reshape(num_rows, num_cols)
    flat_dh = None if dh is None else dh.reshape(num_rows, num_cols)
    for rows in _chunks(num_rows, num_cols):
        upstream, part, rstd = flat_dy[rows].float(), flat_h[rows].float(), stats[0, rows].unsqueeze(1)
        if subtract_mean:
            part = part - stats[1, rows].unsqueeze(1)
        x_hat = part * rstd
        g = upstream if scale is None else upstream * scale
        gradient = g - x_hat * (g * x_hat).mean(1, keepdim=True)
        if subtract_mean:
            gradient -= g.mean(1, keepdim=True)
        gradient *= rstd
        if dweight is not None:
            dweight += (upstream * x_hat).sum(0)
        if dbias is not None:
            dbias += upstream.sum(0)
        if flat_dh is not None:
            gradient += flat_dh[rows]
        if dresidual is not None:
            dresidual.view(num_rows, num_cols)[rows] = gradient
        if dx is not None:
            if keep is not None:
                gradient = torch.where(keep[rows], gradient * (1.0 / (1.0 - dropout_p)), 0.0)
            dx.view(num_rows, num_cols)[rows] = gradient
    dweight = None if dweight is None else dweight.to(weight.dtype)
    return dx, dresidual, dweight, None if dbias is None else dbias.to(bias.dtype)


def dropout_keep(seed: Tensor, num_rows: int, num_cols: int, dropout_p: float) -> Tensor:
    """The mask of that seed: bool (rows, N), True = kept, equal at every call."""
    generator = torch.Generator().manual_seed(int(seed))
    return torch.empty((num_rows, num_cols), dtype=torch.bool).bernoulli_(1.0 - dropout_p, generator=generator)


def _chunks(num_rows: int, num_cols: int) -> Iterator[slice]:
    size = max(1, CHUNK // max(num_cols, 1))
    return (slice(start, start + size) for start in range(0, num_rows if num_cols else 0, size))
