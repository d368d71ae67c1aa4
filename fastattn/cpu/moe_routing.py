"""Routing to experts and back on the CPU: a stable sort (in C++ where it is built), and gathers of one of a token's rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cpu_operators

_TINY = 1e-20  # in the denominator of renormalised weights

cpu_operators.define("moe_dispatch_cpp(Tensor indices, int num_experts) -> (Tensor order, Tensor inverse, Tensor offsets)")


def moe_route_fwd(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, order: str, num_groups: int, top_k_groups: int, renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = logits.float()
    scores = _scores(x, score) if order == "score_then_topk" or score == "sigmoid" else x
    choice = x if bias is None else (scores if order == "score_then_topk" else x) + bias
    ranking = _sorted(choice)
    if top_k_groups < num_groups:
        grouped = choice.unflatten(1, (num_groups, choice.shape[1] // num_groups))
        best = grouped.gather(2, _sorted(grouped)[..., :2])
        groups = _sorted(best[..., 0] if bias is None else best.sum(2))[:, :top_k_groups]
        dropped = torch.ones(len(x), num_groups, dtype=torch.bool).scatter_(1, groups, False)
        dropped = dropped.repeat_interleave(grouped.shape[2], 1).gather(1, ranking)
        ranking = ranking.gather(1, dropped.long().argsort(dim=1, stable=True))
    indices = ranking[:, :top_k].contiguous()
    weights = scores.gather(1, indices)
    if score == "softmax" and order == "topk_then_score":
        weights = weights.softmax(1)
    elif renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + _TINY)
    return weights * scaling_factor, indices


def moe_route_bwd(
    dweights: Tensor, logits: Tensor, indices: Tensor, score: str, order: str, renormalize: bool, scaling_factor: float
) -> Tensor:
    x, ds = logits.float(), dweights * scaling_factor
    if score == "softmax" and order == "topk_then_score":
        ds = torch._softmax_backward_data(ds, x.gather(1, indices).softmax(1), 1, torch.float32)
        return torch.zeros_like(x).scatter_(1, indices, ds).to(logits.dtype)
    scores = _scores(x, score)
    if renormalize:
        chosen = scores.gather(1, indices)
        total = chosen.sum(1, keepdim=True) + _TINY
        ds = (ds - (ds * chosen).sum(1, keepdim=True) / total) / total
    ds = torch.zeros_like(x).scatter_(1, indices, ds)
    dx = torch._softmax_backward_data(ds, scores, 1, torch.float32) if score == "softmax" else scores * (1 - scores) * ds
    return dx.to(logits.dtype)


def _scores(x: Tensor, score: str) -> Tensor:
    return x.softmax(1) if score == "softmax" else x.sigmoid()


def _sorted(x: Tensor) -> Tensor:
    """Numbers along the last dim, the largest value's first: NaN before all, ties in order."""
    return x.sort(dim=-1, descending=True, stable=True).indices


def moe_dispatch(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    if cpu_operators.available("moe_dispatch_cpp"):
        return torch.ops.fastattn.moe_dispatch_cpp(indices, num_experts)
    bins = _bins(indices, num_experts)
    order = bins.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return order, inverse, bins.bincount(minlength=num_experts)[:num_experts].cumsum(0).int()


def moe_expert_counts(indices: Tensor, num_experts: int) -> Tensor:
    return _bins(indices, num_experts).bincount(minlength=num_experts)[:num_experts].clone()


def _bins(indices: Tensor, num_experts: int) -> Tensor:
    """Flat expert ids, num_experts for those that name none."""
    flat = indices.flatten().long()
    return flat.masked_fill((flat < 0) | (flat >= num_experts), num_experts)


def moe_gather_fwd(x: Tensor, inverse: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    if len(x) == 0:
        return x.new_empty(0, x.shape[1])
    num_kept = min(int(offsets[-1]), len(inverse))
    slot = ((inverse >= 0) & (inverse < num_kept)).nonzero()[:, 0]
    token = torch.zeros_like(inverse).scatter_(0, inverse[slot], slot // top_k)
    out = x.index_select(0, token)
    out[max(num_kept, 0) :] = 0.0
    return out


def moe_combine_fwd(y: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    out = torch.zeros(len(y) // top_k, y.shape[1], dtype=torch.float32)
    for k, (row, kept) in enumerate(_rows(inverse, offsets, top_k)):
        weight = None if weights is None else weights[:, k, None]
        if kept is None:
            rows = y.index_select(0, row).float()
        else:
            rows = y.index_select(0, row.masked_fill(~kept, 0)).float().masked_fill(~kept[:, None], 0.0)
            weight = None if weight is None else weight.masked_fill(~kept[:, None], 0.0)
        if weight is None:
            out += rows
        else:
            out.addcmul_(weight, rows)
    return out.to(y.dtype)


def moe_combine_bwd(dout: Tensor, y: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    dy, dweights = y.new_zeros(y.shape), torch.zeros(weights.shape, dtype=torch.float32)
    dout = dout.float()
    for k, (row, kept) in enumerate(_rows(inverse, offsets, weights.shape[1])):
        kept = slice(None) if kept is None else kept
        row, part = row[kept], dout[kept]
        dy[row] = (weights[kept, k, None] * part).to(y.dtype)
        dweights[kept, k] = (part * y[row]).sum(1)
    return dy, dweights


def _rows(inverse: Tensor, offsets: Tensor, top_k: int):
    """For each k, the sorted row of every token, and whether an expert has it: None where all are had, as they usually are."""
    kept = (inverse >= 0) & (inverse < min(int(offsets[-1]), len(inverse)))
    columns = [None] * top_k if bool(kept.all()) else kept.view(-1, top_k).unbind(1)
    yield from zip(inverse.view(-1, top_k).unbind(1), columns, strict=True)
