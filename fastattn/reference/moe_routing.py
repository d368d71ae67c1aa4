"""The oracles of routing tokens to experts and back: sorting by torch's stable sort, gathering and adding by indexing, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    order: str = "score_then_topk",
    bias: Tensor | None = None,
    num_groups: int | None = None,
    top_k_groups: int | None = None,
    renormalize: bool = False,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token by score (or logit) + bias, and their scores, in fp32 (float64 of float64 logits).

    Without a bias the logits choose, which order experts as their scores do. A stable sort puts NaN first and keeps the order of ties.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    scored = torch.softmax(x, -1) if score == "softmax" else torch.sigmoid(x)
    choice = x if bias is None else (scored if order == "score_then_topk" else x) + bias.to(x.dtype)
    if num_groups is not None:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.sort(dim=-1, descending=True, stable=True).values
        group_scores = best[..., 0] if bias is None else best[..., :2].sum(-1)
        groups = group_scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k_groups]
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, groups, False)
        # −inf and NaN are choices too, so experts of other groups are put behind all of them, not given a low score.
        ranks = choice.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        ranks = ranks + choice.shape[-1] * dropped.repeat_interleave(grouped.shape[-1], -1)
        indices = ranks.argsort(-1)[..., :top_k]
    else:
        indices = choice.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    if score == "softmax" and order == "topk_then_score":
        weights = torch.softmax(x.gather(-1, indices), -1)
    else:
        weights = scored.gather(-1, indices)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling_factor, indices


def moe_dispatch(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, inverse, offsets) of a stable sort by expert, ids of no expert last."""
    flat = indices.flatten()
    expert = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = expert.argsort(stable=True)
    offsets = torch.stack([(expert <= e).sum() for e in range(num_experts)])
    return order, order.argsort(), offsets.int()


def moe_gather(x: Tensor, plan: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """x[order // K], and 0 in rows that no expert has."""
    order, _, offsets = plan
    rows = x[order // max(1, len(order) // max(1, len(x)))]
    return rows.masked_fill((torch.arange(len(order), device=x.device) >= offsets[-1])[:, None], 0.0)


def moe_combine(y: Tensor, plan: tuple[Tensor, Tensor, Tensor], weights: Tensor) -> Tensor:
    """Σ_k weights[t, k]·y[inverse[t·K + k]] over the rows that an expert has."""
    _, inverse, offsets = plan
    nobody = (inverse >= offsets[-1]).view(weights.shape)
    rows = y[inverse].view(*weights.shape, y.shape[-1]).masked_fill(nobody[..., None], 0.0)
    return (weights.masked_fill(nobody, 0.0).unsqueeze(-1).to(y.dtype) * rows).sum(1)
