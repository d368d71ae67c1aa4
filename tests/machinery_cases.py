"""Every public op as a function of named tensors, for what asks all of them the same: tests/test_torch_machinery.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastattn
from fastattn.flash_attn import flash_attn_func


class Case(NamedTuple):
    """make(n): tensors of n tokens or rows, or of n sequences of n + 1 tokens. cast: those that autocast casts. loss: the result is float32 there."""

    op: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[int], dict[str, Tensor]]
    cast: tuple[str, ...] = ()
    loss: bool = False


def _qkv(n: int) -> dict[str, Tensor]:
    return {"q": torch.randn(n, n + 1, 4, 8), "k": torch.randn(n, n + 1, 2, 8), "v": torch.randn(n, n + 1, 2, 8)}


def _bhsd(n: int) -> dict[str, Tensor]:
    return dict(zip(("query", "key", "value"), torch.randn(3, n, 4, n + 1, 8).unbind()))


def _paged(n: int) -> dict[str, Tensor]:
    return {
        "q": torch.randn(n, 1, 4, 8), "k_cache": torch.randn(6, 4, 2, 8), "v_cache": torch.randn(6, 4, 2, 8),
        "page_table": torch.arange(2 * n, dtype=torch.int32).view(n, 2) % 6, "seqlens_k": torch.arange(n, dtype=torch.int32) % 7 + 1,
    }  # fmt: skip


def _cascade(**tensors: Tensor) -> Tensor:
    return fastattn.cascade_attention(**tensors, prefix_pages=torch.tensor([5], dtype=torch.int32))


def _appended(**tensors: Tensor) -> tuple[Tensor, Tensor]:
    tensors |= {name: tensors[name].clone() for name in ("k_cache", "v_cache")}
    fastattn.append_paged_kv(**tensors)
    return tensors["k_cache"], tensors["v_cache"]


def _append(n: int) -> dict[str, Tensor]:
    k, v = torch.randn(2, n, 1, 2, 8).unbind()
    paged = _paged(n)
    return {"k": k, "v": v, "k_cache": torch.randn(2 * n, 4, 2, 8), "v_cache": torch.randn(2 * n, 4, 2, 8)} | {
        "page_table": torch.arange(2 * n, dtype=torch.int32).view(n, 2), "cache_seqlens": paged["seqlens_k"],
    }  # fmt: skip


def _ids(n: int) -> Tensor:
    return torch.arange(2 * n).view(n, 2) % 3


def _experts(n: int) -> dict[str, Tensor]:
    tensors = {"x": torch.randn(n, 8), "gate_up_proj": torch.randn(3, 12, 8), "down_proj": torch.randn(3, 8, 6)}
    return tensors | {"gate_up_bias": torch.randn(3, 12), "top_k_weights": torch.rand(n, 2), "top_k_index": _ids(n)}


def _there_and_back(x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    plan = fastattn.moe_dispatch(indices, 3)
    return fastattn.moe_combine(fastattn.moe_gather(x, plan), plan, weights)


def _norm(**more: tuple[int, ...]) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {"x": torch.randn(n, n + 1, 12), **{name: torch.randn(shape) for name, shape in more.items()}}


def _added(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, n + 1, 12), "residual": torch.randn(n, n + 1, 12), "weight": torch.randn(12)}


QKV = ("q", "k", "v")
CASES: dict[str, Case] = {
    "attention": Case(lambda **t: fastattn.attention(**t, causal=True, window=(5, None), return_lse=True), _qkv, QKV),
    "flash_attn": Case(lambda **t: flash_attn_func(**t, causal=True), _qkv, QKV),
    "scaled_dot_product_attention": Case(
        lambda **t: fastattn.scaled_dot_product_attention(**t, is_causal=True), _bhsd, ("query", "key", "value")
    ),
    "paged_attention": Case(fastattn.paged_attention, _paged),
    "cascade_attention": Case(_cascade, _paged),
    "append_paged_kv": Case(_appended, _append),
    "merge_attention": Case(fastattn.merge_attention, lambda n: {"outs": torch.randn(3, n, n + 1, 4, 8), "lses": torch.randn(3, n, 4, n + 1)}),
    "softmax": Case(fastattn.softmax, _norm()),
    "layer_norm": Case(lambda **t: fastattn.layer_norm(**t, normalized_shape=12), _norm(weight=(12,), bias=(12,))),
    "rms_norm": Case(lambda **t: fastattn.rms_norm(**t, normalized_shape=12), _norm(weight=(12,))),
    "add_layer_norm": Case(lambda **t: fastattn.add_layer_norm(**t, normalized_shape=12), _added),
    "add_rms_norm": Case(lambda **t: fastattn.add_rms_norm(**t, normalized_shape=12), _added),
    "apply_rotary": Case(
        fastattn.apply_rotary,
        lambda n: {"q": torch.randn(n, n + 1, 4, 8), "k": torch.randn(n, n + 1, 2, 8), "cos": torch.rand(9, 4), "sin": torch.rand(9, 4)},
    ),
    "swiglu": Case(fastattn.swiglu, lambda n: {"gate": torch.randn(n, n + 1, 6), "up": torch.randn(n, n + 1, 6)}),
    "geglu": Case(fastattn.geglu, lambda n: {"gate": torch.randn(n, n + 1, 12)}),
    "cross_entropy": Case(fastattn.cross_entropy, lambda n: {"input": torch.randn(n, 11), "target": torch.arange(n) % 11}, loss=True),
    "linear_cross_entropy": Case(
        fastattn.linear_cross_entropy,
        lambda n: {"input": torch.randn(n, 8), "linear_weight": torch.randn(11, 8), "target": torch.arange(n) % 11},
        ("input", "linear_weight"), loss=True,
    ),
    "moe_route": Case(lambda logits: fastattn.moe_route(logits, 2), lambda n: {"logits": torch.randn(n, 4)}),
    "moe_expert_counts": Case(lambda indices: fastattn.moe_expert_counts(indices, 3), lambda n: {"indices": _ids(n)}),
    "moe_gather, moe_combine": Case(
        _there_and_back, lambda n: {"x": torch.randn(n, 8), "weights": torch.rand(n, 2), "indices": _ids(n)}
    ),
    "moe_load_balancing_loss": Case(
        fastattn.moe_load_balancing_loss, lambda n: {"probs": torch.rand(n, 3), "indices": _ids(n)}, loss=True
    ),
    "moe_z_loss": Case(fastattn.moe_z_loss, lambda n: {"logits": torch.randn(n, 4)}, loss=True),
    "grouped_mm": Case(
        fastattn.grouped_mm,
        lambda n: {"x": torch.randn(n, 8), "w": torch.randn(3, 6, 8), "offsets": torch.tensor([1, 1, 3], dtype=torch.int32)},
        ("x", "w"),
    ),
    "moe": Case(fastattn.moe, _experts, ("x", "gate_up_proj", "down_proj", "gate_up_bias")),
    "sampling_probs": Case(lambda logits: fastattn.sampling_probs(logits, top_k=3), lambda n: {"logits": torch.randn(n, 11)}),
    "sample": Case(lambda logits: fastattn.sample(logits, top_p=0.9), lambda n: {"logits": torch.randn(n, 11)}),
}  # fmt: skip
# The dispatch alone gives a plan, which the two above take; and what updates a buffer in place has torch's own ops.
ELSEWHERE = {"moe_dispatch", "moe_gather", "moe_combine", "moe_update_bias"}
