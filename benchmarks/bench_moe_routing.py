"""What surrounds the experts of a mixture: routing, dispatch (the sort by expert and the gather), and combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn

from .models import MIXTURES, labelled
from .rows import Variant, row_suite
from .suite import by_backend


@dataclass(frozen=True)
class Shape:
    """num_rows tokens with top_k of num_experts experts each; num_cols is the hidden size, but E of "route". "sort" is a dispatch of rows
    so short that the sort is what takes time."""

    function: str
    num_rows: int
    num_experts: int
    top_k: int
    num_cols: int
    model: str = ""

    def id(self, dtype: str) -> str:
        name = f"{self.function}-T{self.num_rows}-E{self.num_experts}-K{self.top_k}-H{self.num_cols}-{dtype}"
        return labelled(self.model, name)


def _indices(shape: Shape, randn: Callable[..., Tensor]) -> Tensor:
    logits = randn(shape.num_rows, shape.num_experts, learnt=False, dtype=torch.float32)
    return logits.topk(shape.top_k).indices


def _draw_route(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    top_k = torch.zeros(shape.top_k, device=randn.device)  # by its length
    return [randn(shape.num_rows, shape.num_experts), top_k], [randn(shape.num_rows, shape.top_k, learnt=False, dtype=torch.float32)]


def _draw_dispatch(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    experts = torch.zeros(shape.num_experts, device=randn.device)  # by its length
    x, rows = randn(shape.num_rows, shape.num_cols), randn(shape.num_rows * shape.top_k, shape.num_cols, learnt=False)
    return [x, _indices(shape, randn), experts], [rows]


def _draw_combine(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    plan, slots = fastattn.moe_dispatch(_indices(shape, randn), shape.num_experts), shape.num_rows * shape.top_k
    weights = randn(shape.num_rows, shape.top_k, dtype=torch.float32)
    return [randn(slots, shape.num_cols), weights, *plan], [randn(shape.num_rows, shape.num_cols, learnt=False)]


def _torch_route(logits: Tensor, top_k: Tensor) -> Tensor:
    weights = logits.softmax(-1, dtype=torch.float32).topk(len(top_k)).values
    return weights / weights.sum(-1, keepdim=True)


def _torch_plan(indices: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
    """What transformers does: a sort, and a histogram that does not synchronise."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.histc(flat.float() if flat.device.type == "cpu" else flat.int(), len(experts), 0, len(experts) - 1)
    return order, inverse, counts.cumsum(0).int()


def _torch_dispatch(x: Tensor, indices: Tensor, experts: Tensor) -> Tensor:
    order, _, _ = _torch_plan(indices, experts)
    return x[order // indices.shape[1]]


def _torch_combine(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
    return (y[inverse].view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).to(y.dtype)


DISPATCH = Variant(
    draw=_draw_dispatch,
    reference=lambda x, indices, experts: fastattn.reference.moe_gather(x, fastattn.reference.moe_dispatch(indices, len(experts))),
    ours=lambda x, indices, experts, **backend: fastattn.moe_gather(x, fastattn.moe_dispatch(indices, len(experts), **backend)),
    torch=_torch_dispatch,
    has_backends=True,
)
VARIANTS = {
    "route": Variant(
        draw=_draw_route,
        reference=lambda logits, top_k: fastattn.reference.moe_route(logits, len(top_k), renormalize=True)[0],
        ours=lambda logits, top_k, **backend: fastattn.moe_route(
            logits, len(top_k), renormalize=True, return_plan=bool(backend), **backend
        )[0],
        torch=_torch_route,
        has_backends=True,  # which sort too
    ),
    "dispatch": DISPATCH,
    "sort": DISPATCH,
    "combine": Variant(
        draw=_draw_combine,
        reference=lambda y, weights, *plan: fastattn.reference.moe_combine(y, plan, weights),
        ours=lambda y, weights, *plan: fastattn.moe_combine(y, fastattn.MoEPlan(*plan), weights),
        torch=_torch_combine,
    ),
}


def _traffic(shape: Shape, mode: str, itemsize: int) -> float:
    tokens, slots = shape.num_rows, shape.num_rows * shape.top_k
    row = shape.num_cols * itemsize
    if shape.function == "route":  # logits → weights, ids; logits, dweights, ids → dlogits
        forward, backward = tokens * row + 12 * slots, 2 * tokens * row + 12 * slots
    elif shape.function == "combine":  # y → out; dout, y → dy; weights and places beside them
        forward, backward = (tokens + slots) * row + 12 * slots, (tokens + 2 * slots) * row + 16 * slots
    else:  # ids, twice, → order, inverse; x → y; dy → dx
        forward, backward = (tokens + slots) * row + 40 * slots, (tokens + slots) * row + 8 * slots
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]


def _flops(shape: Shape, mode: str) -> float:
    # a logit's max, −, exp, Σ, ÷ and its derivative's 4; nothing; a product and a sum of each slot's element, two of each backward
    forward, backward, elements = {
        "route": (5, 4, shape.num_rows * shape.num_cols),
        "combine": (2, 3, shape.num_rows * shape.top_k * shape.num_cols),
    }.get(shape.function, (0, 1, shape.num_rows * shape.top_k * shape.num_cols))
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode] * elements


def _shapes(tokens: tuple[int, ...], models: tuple[tuple[int, int, int], ...], model: str = "") -> list[Shape]:
    """For models (E, K, H)."""
    return [
        Shape(name, t, e, k, {"route": e, "sort": 8}.get(name, h), model) for name in VARIANTS for t in tokens for e, k, h in models
    ]


def _of_models(tokens: int) -> list[Shape]:
    return [s for m in MIXTURES for s in _shapes((tokens,), ((m.num_experts, m.top_k, m.hidden_size),), m.name)]


MIXTRAL, QWEN3, DEEPSEEK = (8, 2, 4096), (128, 8, 2048), (256, 8, 7168)
PRESETS = {
    ("cpu", "tiny"): _shapes((5,), ((8, 2, 16),)),
    ("cpu", "quick"): _shapes((1024,), (QWEN3,)),
    ("cpu", "full"): _shapes((1024, 4096), (MIXTRAL, QWEN3)),
    ("cpu", "model"): _of_models(512),
    ("cuda", "model"): _of_models(16384),
    ("cuda", "tiny"): _shapes((64,), ((8, 2, 64),)),
    ("cuda", "quick"): _shapes((16384,), (QWEN3,)),
    ("cuda", "full"): _shapes((64, 4096, 32768), (MIXTRAL, QWEN3, DEEPSEEK)),
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    logits, x = torch.randn(4, 8, device=device).to(dtype), torch.randn(4, 64, device=device).to(dtype)
    weights, indices = fastattn.moe_route(logits, 2)
    plan = fastattn.moe_dispatch(indices, 8)
    y = fastattn.moe_gather(x, plan)
    return {
        "fastattn.moe_route": lambda: fastattn.moe_route(logits, 2),
        "fastattn.moe_dispatch": lambda: fastattn.moe_dispatch(indices, 8),
        **by_backend("fastattn.moe_route, sorted", partial(fastattn.moe_route, logits, 2, return_plan=True), device),
        **by_backend("fastattn.moe_dispatch", partial(fastattn.moe_dispatch, indices, 8), device),
        "fastattn.moe_gather": lambda: fastattn.moe_gather(x, plan),
        "fastattn.moe_combine": lambda: fastattn.moe_combine(y, plan, weights),
        "torch softmax and topk": lambda: _torch_route(logits, weights[0]),
        "torch sort": lambda: _torch_plan(indices, logits[0]),
    }


SUITE = row_suite(
    "moe_routing", VARIANTS, PRESETS, overhead, traffic=_traffic, flops=_flops, x_label="tokens",
    panel=lambda row: (f"{row['function']}, E = {row['num_experts']}, K = {row['top_k']}", row["num_rows"]),
)  # fmt: skip
