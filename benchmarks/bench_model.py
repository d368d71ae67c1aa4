"""A whole language model's training step, forward and backward: from fastattn.nn, against plain torch with SDPA, eager and compiled.

The optimizer, which would be torch's in each, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from . import llama
from .llama import LLAMA_1B, SMOLLM2, TINY, Attend, Model, Sizes, plain_model, tables
from .suite import MATMUL, Builder, Forward, Suite, find_peers


@dataclass(frozen=True)
class Shape(Sizes):
    """A model, over `batch` sequences of `seqlen` tokens: `tokens` in all."""

    batch: int
    seqlen: int
    tokens: int

    def id(self, dtype: str) -> str:
        return f"{self.model}-B{self.batch}-S{self.seqlen}-{dtype}"


def _shapes(sizes: Sizes, *batches: tuple[int, int]) -> list[Shape]:
    return [Shape(**vars(sizes), batch=batch, seqlen=seqlen, tokens=batch * seqlen) for batch, seqlen in batches]


PRESETS = {
    ("cpu", "tiny"): _shapes(TINY, (2, 16)),
    ("cpu", "quick"): _shapes(Sizes("4 layers of SmolLM2", 576, 9, 3, 64, 1536, 4, 8192), (1, 256)),
    ("cpu", "full"): _shapes(SMOLLM2, (1, 512)),
    ("cpu", "model"): _shapes(SMOLLM2, (1, 256)),
    ("cuda", "tiny"): _shapes(TINY, (2, 64)),
    ("cuda", "quick"): _shapes(SMOLLM2, (8, 2048)) + _shapes(LLAMA_1B, (2, 2048)),
    ("cuda", "full"): _shapes(SMOLLM2, (32, 512), (8, 2048), (2, 8192)) + _shapes(LLAMA_1B, (4, 1024), (2, 2048), (1, 4096)),
    ("cuda", "model"): _shapes(SMOLLM2, (8, 2048)) + _shapes(LLAMA_1B, (2, 2048)),
}


def flops(shape: Shape, mode: str) -> float:
    # each layer as bench_layer counts it, and the head: 2 an entry and token forward, 4 backward
    products = 2.0 * shape.tokens * (shape.num_layers * llama.matrix_entries(shape) + shape.vocab_size * shape.hidden_size)
    attention = 2.0 * shape.num_layers * shape.batch * shape.num_heads * shape.seqlen**2 * shape.head_dim
    return {"fwd": products + attention, "bwd": 2 * products + 2.5 * attention, "fwd+bwd": 3 * products + 3.5 * attention}[mode]


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # weights read once a pass, their gradients written once; the residual stream in and out of each layer, in each direction
    weights = shape.num_layers * llama.matrix_entries(shape) + shape.vocab_size * shape.hidden_size
    rows = shape.num_layers * shape.tokens * shape.hidden_size
    forward, backward = weights + 2 * rows, 2 * weights + 4 * rows
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode] * itemsize


def names_of(sizes: Sizes) -> list[str]:
    return [name for name, _ in Model(sizes).named_parameters()]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens, their targets, and the weights; the loss's upstream gradient is 1."""
    generator = torch.Generator(device).manual_seed(1)
    ids, target = torch.randint(shape.vocab_size, (2, shape.batch, shape.seqlen), generator=generator, device=device)
    weights = llama.parameters_of(Model(shape), dtype, device)
    return [ids, target, *(weights[name].requires_grad_() for name in names_of(shape))], [torch.ones((), dtype=dtype, device=device)]


def build_fastattn(shape: Shape) -> Forward:
    model, names = Model(shape), names_of(shape)

    def forward(ids: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, weights)), (ids, target, *tables(shape.head_dim, shape.seqlen, ids.device)))

    return forward


def plain(attend: Attend) -> Builder:
    def build(shape: Shape) -> Forward:
        names = names_of(shape)

        def forward(ids: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
            return plain_model(dict(zip(names, weights)), shape, ids, target, *tables(shape.head_dim, shape.seqlen, ids.device), attend)

        return forward

    return build


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = llama.cast(inputs, dtype)
    loss = plain(llama.naive)(shape)(*leaves)
    grads = torch.autograd.grad(loss, leaves[2:], upstream[0].to(loss.dtype))
    return dict(zip(["loss", *(f"d{name}" for name in names_of(shape))], [loss.detach(), *grads], strict=True))


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers(llama.builders(build_fastattn, plain, device), {})


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    (shape,) = _shapes(TINY, (1, 8))
    inputs, _ = draw(shape, dtype, device)
    ours, theirs = build_fastattn(shape), plain(llama.sdpa)(shape)
    return {"fastattn's model of 2 layers": lambda: ours(*inputs), "torch's": lambda: theirs(*inputs)}


SUITE = Suite(
    op="model",
    presets=PRESETS,
    peers=peers,
    draw=draw,
    reference=reference,
    flops=flops,
    traffic=traffic,
    ceiling=MATMUL,
    overhead=overhead,
    panel=lambda row: (row["model"], row["seqlen"]),
    x_label="sequence length",
)
