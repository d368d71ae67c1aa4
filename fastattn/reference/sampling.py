"""The oracle of sampling: the distribution that a token is drawn from, by sorting, in any dtype."""

from __future__ import annotations

import torch


def sampling_probs(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    min_p: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, V) probabilities of logits (B, V), in their dtype: temperature, top-k, top-p, min-p, renormalised after each.

    Each parameter is None, a number, or a tensor with one value a row. Ties go to the lower id, a temperature of 0 to one token.
    """

    def of_rows(value, default):
        value = torch.as_tensor(default if value is None else value, device=logits.device)
        return value.expand(logits.shape[0])[:, None]

    temperature, top_k = of_rows(temperature, 1.0).to(logits.dtype), of_rows(top_k, 0)
    top_p, min_p = of_rows(top_p, 1.0), of_rows(min_p, 0.0)
    x, order = logits.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    greedy = temperature == 0
    p = torch.softmax(x / torch.where(greedy, 1.0, temperature), 1)
    p = torch.where(greedy & (rank > 0), 0.0, p)
    p = p / p.sum(1, keepdim=True)
    p = torch.where((top_k > 0) & (rank >= top_k), 0.0, p)
    p = p / p.sum(1, keepdim=True)
    mass_before = p.cumsum(1) - p
    p = torch.where((top_p < 1) & (mass_before >= top_p) & (rank > 0), 0.0, p)
    p = p / p.sum(1, keepdim=True)
    p = torch.where(p < min_p * p[:, :1], 0.0, p)
    p = p / p.sum(1, keepdim=True)
    return torch.zeros_like(p).scatter(1, order, p)
