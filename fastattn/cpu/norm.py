"""The norms on the CPU: torch's own layer norm where it keeps its digits, else plain torch, a bounded number of rows at a time.

Of half precision, torch's layer norm sums dweight and dbias in half precision: its backward gets float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 18  # entries of a chunk: what is in between stays in a core's cache
# Torch's layer norm computes x·rstd − mean·rstd, and its backward the like. Rows whose |mean|·rstd is larger go another way.
MAX_OFFSET = 8.0


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
    scale = _scale(weight, weight_offset, cast_before_weight)
    bias = None if bias is None else bias.float()
    if not x.numel():
        h = None if residual is None else residual.new_empty(residual.shape)
        return x.new_empty(x.shape, dtype=dtype), h, torch.zeros(1 + subtract_mean, num_rows)
    if subtract_mean and residual is None and dtype == x.dtype:
        y, mean, rstd = torch.native_layer_norm(x, [num_cols], _given(scale, x), bias, eps)
        stats = torch.cat([rstd.view(1, num_rows), mean.view(1, num_rows)])
        if _is_steady(stats):
            return y, None, stats
    flat_x = x.reshape(num_rows, num_cols)
    flat_residual = None if residual is None else residual.reshape(num_rows, num_cols)
    keep = dropout_keep(dropout_seed, num_rows, num_cols, dropout_p) if dropout_p > 0.0 else None

    def rows_of(rows: slice) -> tuple[Tensor | None, ...]:
        h = part = flat_x[rows].float()
        if residual is not None:
            if keep is not None:
                part = torch.where(keep[rows], part * (1.0 / (1.0 - dropout_p)), 0.0)
            h = flat_residual[rows].float().add(part).to(residual.dtype)
            part = h.float()
        if subtract_mean:
            shift = part[:, :1]
            y, mean, rstd = torch.native_layer_norm(part - shift, [num_cols], scale, bias, eps)
            mean = mean + shift
        else:
            mean, rstd = None, part.square().mean(1, keepdim=True).add_(eps).rsqrt_()
            y = part * rstd
            y = y.to(x.dtype) if cast_before_weight else y
            y = y if scale is None else y * scale
        return y.to(dtype), None if residual is None else h, rstd, mean

    y, h, rstd, mean = _gathered(rows_of, num_rows, num_cols)
    stats = rstd.view(1, num_rows) if mean is None else torch.cat([rstd.view(1, num_rows), mean.view(1, num_rows)])
    return y.view(x.shape), None if h is None else h.view(x.shape), stats


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
    scale = _scale(weight, weight_offset, cast_before_weight)
    bias32 = bias if bias is None else bias.float()
    steady = subtract_mean and h.numel() > 0 and _is_steady(stats)
    flat_dy, flat_h = dy.reshape(num_rows, num_cols), h.reshape(num_rows, num_cols)
    flat_dh = None if dh is None else dh.reshape(num_rows, num_cols)
    keep = dropout_keep(dropout_seed, num_rows, num_cols, dropout_p) if dropout_p > 0.0 else None
    dweight, dbias = (torch.zeros(num_cols) if wanted else None for wanted in (weight_grad, bias_grad))

    def rows_of(rows: slice) -> tuple[Tensor | None, Tensor | None]:
        upstream, part, rstd = flat_dy[rows].float(), flat_h[rows].float(), stats[0, rows].unsqueeze(1)
        mean = stats[1, rows].unsqueeze(1) if subtract_mean else None
        if steady:
            gradient, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                upstream, part, [num_cols], mean, rstd, scale, bias32, [True, weight_grad, bias_grad]
            )
        else:
            x_hat = (part if mean is None else part - mean) * rstd
            g = upstream if scale is None else upstream * scale
            gradient = g - x_hat * (g * x_hat).mean(1, keepdim=True)
            gradient = (gradient if mean is None else gradient.sub_(g.mean(1, keepdim=True))).mul_(rstd)
            of_weight = (upstream * x_hat).sum(0) if weight_grad else None
            of_bias = upstream.sum(0) if bias_grad else None
        if weight_grad:
            dweight.add_(of_weight)
        if bias_grad:
            dbias.add_(of_bias)
        if flat_dh is not None:
            gradient = gradient + flat_dh[rows]
        dresidual = gradient.to(h.dtype) if add else None
        if keep is not None:
            gradient = torch.where(keep[rows], gradient * (1.0 / (1.0 - dropout_p)), 0.0)
        return None if add and dropout_p == 0.0 and dtype == h.dtype else gradient.to(dtype), dresidual

    grads = (t if t is None else t.view(h.shape) for t in _gathered(rows_of, num_rows, num_cols))
    return *grads, _like(dweight, weight, weight_grad), _like(dbias, bias, bias_grad)


def dropout_keep(seed: Tensor, num_rows: int, num_cols: int, dropout_p: float) -> Tensor:
    """The mask of that seed: bool (rows, N), True = kept, equal at every call."""
    generator = torch.Generator().manual_seed(int(seed))
    return torch.empty((num_rows, num_cols), dtype=torch.bool).bernoulli_(1.0 - dropout_p, generator=generator)


def _gathered(rows_of, num_rows: int, num_cols: int) -> Iterator[Tensor | None]:
    """What `rows_of(slice)` gives for all rows, put together from chunks of them."""
    size = max(1, CHUNK // max(num_cols, 1))
    first = rows_of(slice(0, size))
    if num_rows <= size:
        return (t if t is None else t.contiguous() for t in first)
    whole = [None if t is None else torch.empty((num_rows, t.shape[1]), dtype=t.dtype) for t in first]
    for start in range(0, num_rows, size):
        for t, part in zip(whole, first if start == 0 else rows_of(slice(start, start + size)), strict=True):
            if t is not None:
                t[start : start + size] = part
    return iter(whole)


def _scale(weight: Tensor | None, weight_offset: float, cast_before_weight: bool) -> Tensor | None:
    """weight + weight_offset: in float32, or, where the normalised value was rounded before it, rounded too."""
    if weight is None:
        return None
    weight = weight if cast_before_weight else weight.float()
    return weight + weight_offset if weight_offset else weight


def _given(scale: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight that makes torch keep float32 statistics of half-precision x."""
    return torch.ones(x.shape[-1]) if scale is None and x.dtype != torch.float32 else scale


def _is_steady(stats: Tensor) -> bool:
    rstd, mean = stats
    return bool((mean.abs() * rstd).amax() <= MAX_OFFSET)


def _like(gradient: Tensor | None, parameter: Tensor | None, wanted: bool) -> Tensor | None:
    return gradient.to(parameter.dtype) if wanted else None
