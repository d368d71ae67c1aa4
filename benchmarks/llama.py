"""A Llama-style layer and language model twice: built from fastattn.nn, and in plain torch. The benchmarks of whole models run both on the
same weights, which come in as tensors by the names that fastattn's modules have for them.

Sizes are those of models of these names; weights are random, and the head is the embedding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
import fastattn.nn as fnn

from . import models
from .suite import OURS, Builder, Forward

EPS = 1e-6
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, S_q, D), (B, H_kv, S_k, D) twice → (B, H, S_q, D)


@dataclass(frozen=True)
class Sizes:
    """One model's, and how many of its layers there are here."""

    model: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_layers: int
    vocab_size: int

    @classmethod
    def of(cls, model: models.Model, num_layers: int) -> Sizes:
        heads = model.num_heads, model.num_kv_heads, model.head_dim
        return cls(model.name, model.hidden_size, *heads, model.intermediate_size, num_layers, model.vocab_size)


TINY = Sizes("tiny", 32, 4, 2, 8, 48, 2, 64)
SMOLLM2 = Sizes.of(models.SMOLLM2_135M, 30)
LLAMA_1B = Sizes.of(models.LLAMA_32_1B, 16)
LLAMA_8B = Sizes.of(models.LLAMA_3_8B, 32)


class Layer(nn.Module):
    """From fastattn.nn: two norms that add the residual on the way, attention, a gated projection."""

    def __init__(self, sizes: Sizes, device: str = "meta"):
        super().__init__()
        self.input_layernorm = fnn.RMSNorm(sizes.hidden_size, eps=EPS, device=device)
        self.self_attn = fnn.Attention(sizes.hidden_size, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, device=device)
        self.post_attention_layernorm = fnn.RMSNorm(sizes.hidden_size, eps=EPS, device=device)
        self.gate_up_proj = nn.Linear(sizes.hidden_size, 2 * sizes.intermediate_size, bias=False, device=device)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False, device=device)
        self.activation = fnn.SwiGLU()

    def forward(self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, **cached: Any) -> tuple[Tensor, Tensor]:
        """x, residual (B, S, E); `cached` is what `fastattn.nn.Attention` takes of a cache."""
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, cos, sin, **cached), residual)
        return self.down_proj(self.activation(self.gate_up_proj(x))), residual


class Model(nn.Module):
    """Embedding, layers, norm; the head is the embedding."""

    def __init__(self, sizes: Sizes, device: str = "meta"):
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.hidden_size, device=device)
        self.layers = nn.ModuleList(Layer(sizes, device) for _ in range(sizes.num_layers))
        self.norm = fnn.RMSNorm(sizes.hidden_size, eps=EPS, device=device)

    def forward(
        self, ids: Tensor, target: Tensor | None, cos: Tensor, sin: Tensor, cache: fastattn.PagedKVCache | None = None
    ) -> Tensor:
        """ids (B, S) → the mean loss of target (B, S), or the logits (B, V) of the last tokens where that is None."""
        x = self.embedding(ids)
        residual = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, cos, sin, **({} if cache is None else {"cache": cache, "layer_idx": index}))
        x, _ = self.norm(x, residual)
        if target is not None:
            return fastattn.linear_cross_entropy(x, self.embedding.weight, target)
        return F.linear(x[:, -1], self.embedding.weight)


def parameters_of(module: nn.Module, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by name: matrices by the square root of their fan-in, norms near 1."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, like in module.named_parameters():
        values = torch.randn(like.shape, generator=generator, device=device)
        values = values / math.sqrt(like.shape[-1]) if like.dim() > 1 else 1 + 0.1 * values
        found[name] = values.to(dtype)
    return found


@functools.lru_cache(maxsize=8)
def tables(head_dim: int, seqlen: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rotary = fnn.RotaryEmbedding(head_dim, max_seqlen=seqlen, device=device)
    return rotary.cos, rotary.sin


# --------------------------------------------------------------------------------------------------------------------
# Plain torch.


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, whichever backend it chooses."""
    one_query = q.shape[2] == 1  # which sees all keys; is_causal aligns to the top left
    return F.scaled_dot_product_attention(q, k, v, is_causal=not one_query, enable_gqa=q.shape[1] != k.shape[1])


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All scores at once."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def builders(ours: Builder, plain: Callable[[Attend], Builder], device: torch.device) -> dict[str, Builder]:
    """Ours, and the same in plain torch by each way to attend; on CUDA also what torch.compile makes of both."""
    found = {OURS: ours, "naive": plain(naive), "torch": plain(sdpa)}
    if device.type == "cuda":
        found |= {"torch.compile": _compiled(plain(sdpa)), f"{OURS} (compiled)": _compiled(ours)}
    return found


def _compiled(builder: Builder) -> Builder:
    """torch.compile's, of one shape."""

    def build(shape: Any) -> Forward:
        torch.compiler.reset()  # past its recompilation limit, dynamo would run the uncompiled function without an error
        return torch.compile(builder(shape), dynamic=False, fullgraph=True)

    return build


def plain_layer(
    weights: Mapping[str, Tensor], prefix: str, sizes: Sizes, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, attend: Attend,
    keys_and_values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda k, v: (k, v),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `Layer`. cos, sin: (S, D/2), of x's positions; keys_and_values: all there are, from the new ones, rotated, (B, H_kv, S, D)."""

    def linear(name: str, t: Tensor) -> Tensor:
        return F.linear(t, weights[f"{prefix}{name}.weight"])

    def norm(name: str, t: Tensor) -> Tensor:
        return F.rms_norm(t, (sizes.hidden_size,), weights[f"{prefix}{name}.weight"], EPS)

    def rotated(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(t.dtype)

    residual = residual + x
    h = norm("input_layernorm", residual)
    q, k, v = (
        linear(f"self_attn.{name}_proj", h).unflatten(-1, (heads, sizes.head_dim)).transpose(1, 2)
        for name, heads in (("q", sizes.num_heads), ("k", sizes.num_kv_heads), ("v", sizes.num_kv_heads))
    )
    out = attend(rotated(q), *keys_and_values(rotated(k), v)).transpose(1, 2).flatten(-2)
    residual = residual + linear("self_attn.o_proj", out)
    gate, up = linear("gate_up_proj", norm("post_attention_layernorm", residual)).chunk(2, -1)
    return linear("down_proj", F.silu(gate) * up), residual


def plain_model(
    weights: Mapping[str, Tensor], sizes: Sizes, ids: Tensor, target: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend,
    keys_and_values: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda index, k, v: (k, v),
) -> Tensor:  # fmt: skip
    """As `Model`."""
    x = F.embedding(ids, weights["embedding.weight"])
    residual = torch.zeros_like(x)
    for index in range(sizes.num_layers):
        cached = functools.partial(keys_and_values, index)
        x, residual = plain_layer(weights, f"layers.{index}.", sizes, x, residual, cos, sin, attend, cached)
    x = F.rms_norm(residual + x, (sizes.hidden_size,), weights["norm.weight"], EPS)
    if target is None:
        return F.linear(x[:, -1], weights["embedding.weight"])
    return F.cross_entropy(F.linear(x, weights["embedding.weight"]).flatten(0, 1), target.flatten())


def matrix_entries(sizes: Sizes) -> int:
    """Of one layer's four projections and its gated one."""
    heads = (2 * sizes.num_heads + 2 * sizes.num_kv_heads) * sizes.head_dim
    return sizes.hidden_size * (heads + 3 * sizes.intermediate_size)


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Leaves of another dtype for a reference; what is no float stays."""
    return [t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
