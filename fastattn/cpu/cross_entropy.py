"""Cross-entropy on the CPU: torch's log_softmax and softmax over a few rows at a time, so that extra memory does not grow with the logits.

    loss = (1 − ε)·w_t·(lse − s_t) + ε/C·Σ_c w_c·(lse − s_c) + z_loss·lse²
    ds_c = g·[((1 − ε)·w_t + ε/C·Σw + 2·z_loss·lse)·p_c − (1 − ε)·w_t·[c = t] − ε/C·w_c] + dlse·p_c
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

CHUNK = 1 << 18  # entries of the logits at a time: 1 MB in float32, which a cache holds


def cross_entropy_fwd(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Of logits (…, C), any strides, and targets (…): (4, T) float32 of loss, w_t (0 where ignored), max s and log Σ exp(s − max s)."""
    x, target = _rows(x), target.reshape(-1)
    counts, t, w_t = _targets(target, weight, ignore_index, x.shape[-1])
    numbers = torch.empty(4, x.shape[0], dtype=torch.float32)
    for rows in _chunks(x):
        s, _ = _capped(x[rows], softcap)
        log_p = torch.log_softmax(s, -1)
        row_max = s.amax(-1)
        log_sum = torch.where(row_max == -torch.inf, row_max, -log_p.amax(-1))
        lse = row_max + log_sum
        loss = -w_t[rows] * log_p.gather(1, t[rows, None]).squeeze(1)
        if label_smoothing:
            smooth = log_p.sum(-1) if weight is None else log_p @ weight.float()
            loss = (1.0 - label_smoothing) * loss - label_smoothing / x.shape[-1] * smooth
        loss = torch.where(counts[rows], loss + z_loss * lse * lse, 0.0)
        torch.stack((loss, w_t[rows], row_max, log_sum), out=numbers[:, rows])
    return numbers


def cross_entropy_bwd(
    dloss: torch.Tensor, dlse: torch.Tensor | None, divisor: torch.Tensor | None, x: torch.Tensor, target: torch.Tensor,
    weight: torch.Tensor | None, numbers: torch.Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dx, contiguous, or in `out`, of x's dtype, which may be x itself.

    dloss: () for all rows, or (…) one a row; divisor: () float32, divides it; dlse: (…), None is 0; numbers: the forward's.
    """
    dx = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    x, dx_rows, target = _rows(x), dx.view(-1, dx.shape[-1]), target.reshape(-1)
    num_classes = x.shape[-1]
    counts, t, w_t = _targets(target, weight, ignore_index, num_classes)
    g = torch.where(counts, dloss.reshape(-1).float() if divisor is None else dloss.reshape(-1).float() / divisor, 0.0)
    smooth_grad = g * (label_smoothing / num_classes)
    target_grad = g * w_t * (1.0 - label_smoothing)
    total_weight = num_classes if weight is None else weight.float().sum()
    p_scale = target_grad + smooth_grad * total_weight
    if z_loss:
        p_scale += torch.where(counts, 2.0 * z_loss * g * numbers[2:].sum(0), 0.0)
    if dlse is not None:
        dlse = dlse.reshape(-1).float()
        p_scale += dlse
        counts = counts | (dlse != 0.0)
    for rows in _chunks(x):
        s, tanh = _capped(x[rows], softcap)
        ds = torch.softmax(s, -1).mul_(p_scale[rows, None])
        ds.scatter_add_(1, t[rows, None], -target_grad[rows, None])
        if label_smoothing:
            ds -= smooth_grad[rows, None] if weight is None else torch.outer(smooth_grad[rows], weight.float())
        if softcap:
            ds.mul_(1.0 - tanh * tanh)
        if not bool(counts[rows].all()):  # an ignored row may hold anything, and its gradient is 0
            ds.masked_fill_(~counts[rows, None], 0.0)
        dx_rows[rows] = ds
    return dx


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of about CHUNK entries."""
    step = max(1, CHUNK // x.shape[-1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def _targets(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(whether each row's target counts, the target or 0, its weight or 0)."""
    counts = target != ignore_index
    t = torch.where(counts, target, 0).long()
    return counts, t, counts.float() if weight is None else torch.where(counts, weight.float()[t], 0.0)


def _capped(x: torch.Tensor, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A few rows' (s, tanh(x / softcap)) in float32."""
    if not softcap:
        x = x.float()
        return x, x
    tanh = torch.tanh(x.float() / softcap)
    return tanh * softcap, tanh
