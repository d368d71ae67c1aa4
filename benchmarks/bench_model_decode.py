"""One token for each of a batch of sequences by a whole language model: fastattn.nn over a PagedKVCache, whose step is part of it, against
plain torch with SDPA over a contiguous cache.

All sequences are as long, which a contiguous cache needs and a paged one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import fastattn

from . import llama
from .bench_model import names_of
from .llama import LLAMA_1B, LLAMA_8B, SMOLLM2, TINY, Attend, Model, Sizes, plain_model, tables
from .suite import COPY, OURS, Builder, Forward, Suite, find_peers

PAGE_SIZE = 64


@dataclass(frozen=True)
class Shape(Sizes):
    """A model, and `batch` sequences of which `context` tokens are cached."""

    batch: int
    context: int

    @property
    def tokens(self) -> int:
        return self.batch

    def id(self, dtype: str) -> str:
        return f"{self.model}-B{self.batch}-S{self.context}-{dtype}"


def _shapes(sizes: Sizes, *batches: tuple[int, int]) -> list[Shape]:
    return [Shape(**vars(sizes), batch=batch, context=context) for batch, context in batches]


PRESETS = {
    ("cpu", "tiny"): _shapes(TINY, (2, 21)),
    ("cpu", "quick"): _shapes(Sizes("4 layers of SmolLM2", 576, 9, 3, 64, 1536, 4, 8192), (4, 512)),
    ("cpu", "full"): _shapes(SMOLLM2, (1, 512), (8, 512)),
    ("cpu", "model"): _shapes(SMOLLM2, (1, 512)),
    ("cuda", "tiny"): _shapes(TINY, (2, 100)),
    ("cuda", "quick"): _shapes(LLAMA_1B, (1, 4096), (32, 4096)),
    ("cuda", "full"): _shapes(LLAMA_1B, (1, 4096), (32, 4096), (128, 2048)) + _shapes(LLAMA_8B, (1, 8192), (32, 4096)),
    ("cuda", "model"): _shapes(LLAMA_1B, (1, 4096), (32, 4096)) + _shapes(LLAMA_8B, (1, 8192)),
}


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # every weight once; every cached key and value once, the new ones written
    weights = shape.num_layers * llama.matrix_entries(shape) + shape.vocab_size * shape.hidden_size
    cached = 2 * shape.num_layers * shape.batch * (shape.context + 1) * shape.num_kv_heads * shape.head_dim
    return float(weights + cached) * itemsize


def flops(shape: Shape, mode: str) -> float:
    # 2 a weight and sequence; 4·H·D a cached token
    weights = shape.num_layers * llama.matrix_entries(shape) + shape.vocab_size * shape.hidden_size
    return shape.batch * (2.0 * weights + 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * (shape.context + 1))


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The new tokens (B, 1); what is cached (L, 2, B, S, H_kv, D), rotated already; the weights."""
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(shape.vocab_size, (shape.batch, 1), generator=generator, device=device)
    size = (shape.num_layers, 2, shape.batch, shape.context, shape.num_kv_heads, shape.head_dim)
    cached = torch.randn(size, generator=generator, device=device).to(dtype)
    weights = llama.parameters_of(Model(shape), dtype, device)
    return [ids, cached, *(weights[name] for name in names_of(shape))], []


def filled_cache(shape: Shape, cached: Tensor) -> tuple[fastattn.PagedKVCache, list[int]]:
    """A paged cache of what is cached, and its sequences."""
    pages = shape.batch * (-(-(shape.context + 1) // PAGE_SIZE) + 1)
    cache = fastattn.PagedKVCache(
        shape.num_layers, pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim, dtype=cached.dtype, device=cached.device
    )
    sequences = [cache.allocate() for _ in range(shape.batch)]
    cache.step(sequences, shape.context)
    for index, (k, v) in enumerate(cached):
        cache.append(index, k, v)
    return cache, sequences


def build_fastattn(shape: Shape) -> Forward:
    model, names = Model(shape), names_of(shape)
    filled: list[Any] = []

    def forward(ids: Tensor, cached: Tensor, *weights: Tensor) -> Tensor:
        if not filled:
            filled.extend(filled_cache(shape, cached))
        cache, sequences = filled
        for sequence in sequences:
            cache.truncate(sequence, shape.context)  # the token of the call before
        cache.step(sequences, 1)
        with torch.no_grad():
            cos, sin = tables(shape.head_dim, shape.context + 1, ids.device)
            return functional_call(model, dict(zip(names, weights)), (ids, None, cos, sin, cache))

    return forward


def plain(attend: Attend) -> Builder:
    def build(shape: Shape) -> Forward:
        names = names_of(shape)
        caches: list[Tensor] = []

        def forward(ids: Tensor, cached: Tensor, *weights: Tensor) -> Tensor:
            if not caches:  # (L, 2, B, H_kv, S + 1, D), the last token's place to be written
                caches.append(torch.nn.functional.pad(cached.transpose(3, 4), (0, 0, 0, 1)))
            cos, sin = (table[shape.context :] for table in tables(shape.head_dim, shape.context + 1, ids.device))

            def keys_and_values(index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                caches[0][index, 0, :, :, -1:], caches[0][index, 1, :, :, -1:] = k, v
                return caches[0][index].unbind()

            with torch.no_grad():
                return plain_model(dict(zip(names, weights)), shape, ids, None, cos, sin, attend, keys_and_values)

        return forward

    return build


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"logits": plain(llama.naive)(shape)(*llama.cast(inputs, dtype))}


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers({OURS: build_fastattn, "naive": plain(llama.naive), "torch": plain(llama.sdpa)}, {})


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    (shape,) = _shapes(TINY, (1, 8))
    inputs, _ = draw(shape, dtype, device)
    ours, theirs = build_fastattn(shape), plain(llama.sdpa)(shape)
    return {"fastattn's model of 2 layers": lambda: ours(*inputs), "torch's": lambda: theirs(*inputs)}


SUITE = Suite(
    op="model_decode",
    presets=PRESETS,
    peers=peers,
    draw=draw,
    reference=reference,
    flops=flops,
    traffic=traffic,
    ceiling=COPY,
    overhead=overhead,
    panel=lambda row: (f"{row['model']}, S = {row['context']}", row["batch"]),
    x_label="sequences",
    modes=("fwd",),
)
