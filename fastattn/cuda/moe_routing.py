"""Routing of few tokens, and the sort of their slots by expert, in CUDA C++ (csrc/cuda/moe_routing.cu): one launch for both."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cuda_operators, in_rows

MAX_SLOTS = 256  # T·K, all in one block

cuda_operators.define("moe_dispatch_cuda(Tensor indices, int num_experts) -> (Tensor order, Tensor inverse, Tensor offsets)")
cuda_operators.define(
    "moe_route_dispatch_cuda(Tensor logits, Tensor? bias, int top_k, bool sigmoid, bool score_first, int num_groups, int top_k_groups, "
    "bool renormalize, float scaling_factor) -> (Tensor weights, Tensor indices, Tensor order, Tensor inverse, Tensor offsets)"
)


def limit(t: Tensor, num_slots: int) -> str | None:
    """What of a call the kernels do not do, or None."""
    if not cuda_operators.available("moe_route_dispatch_cuda", t):
        return cuda_operators.nothing
    return None if num_slots <= MAX_SLOTS else f"more than {MAX_SLOTS} slots"


def moe_dispatch(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the Triton kernels', within the limit above."""
    return torch.ops.fastattn.moe_dispatch_cuda(indices, num_experts)


def moe_route_dispatch(
    logits: Tensor, bias: Tensor | None, top_k: int, score: str, order: str, num_groups: int, top_k_groups: int, renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(weights, indices) as the Triton kernel's, within the limit above, and (order, inverse, offsets) of these indices."""
    bias = None if bias is None else bias.contiguous()
    return torch.ops.fastattn.moe_route_dispatch_cuda(
        in_rows(logits), bias, top_k, score == "sigmoid", order == "score_then_topk", num_groups, top_k_groups, renormalize, scaling_factor
    )
