"""The oracle of cross-entropy: its definition over log-probabilities, in any dtype."""

from __future__ import annotations

import torch


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """−Σ_c q_c·w_c·log softmax(s)_c + z_loss·lse², q the target's smoothed distribution, s the logits, capped by softcap·tanh(·/softcap).

    input (C,), (N, C) or (N, C, d1, …); target class indices of its shape without C, or probabilities of its shape. "mean" divides the
    sum by that of the targets' weights (of probabilities: by their number).
    """
    x = input.movedim(1, -1) if input.dim() > 1 else input
    num_classes = x.shape[-1]
    s = x if softcap == 0.0 else softcap * torch.tanh(x / softcap)
    log_p, lse = torch.log_softmax(s, -1), torch.logsumexp(s, -1)
    w = torch.ones(num_classes, dtype=s.dtype, device=s.device) if weight is None else weight.to(s.dtype)
    if target.shape == input.shape:  # probabilities
        q = target.movedim(1, -1) if target.dim() > 1 else target
        q = (1.0 - label_smoothing) * q.to(s.dtype) + label_smoothing / num_classes
        loss = -(q * w * log_p).sum(-1)
        counts, total = torch.ones_like(lse, dtype=torch.bool), torch.ones_like(lse)
    else:
        counts = target != ignore_index
        t = torch.where(counts, target, 0).long()
        total = torch.where(counts, w[t], 0.0)
        loss = -(1.0 - label_smoothing) * w[t] * log_p.gather(-1, t.unsqueeze(-1)).squeeze(-1)
        if label_smoothing:
            loss = loss - label_smoothing * (w * log_p).mean(-1)
    loss = torch.where(counts, loss + z_loss * lse * lse, 0.0)
    if reduction == "mean":
        loss = loss.sum() / total.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return (loss, lse) if return_lse else loss
