"""One transformer layer, Llama's: from fastattn.nn, against the same layer in plain torch with SDPA, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from . import llama
from .llama import LLAMA_1B, LLAMA_8B, SMOLLM2, TINY, Attend, Layer, Sizes, plain_layer, tables
from .suite import MATMUL, Builder, Forward, Suite, find_peers


@dataclass(frozen=True)
class Shape(Sizes):
    """A layer of a model, over `batch` sequences of `seqlen` tokens, causal."""

    batch: int
    seqlen: int

    def id(self, dtype: str) -> str:
        return f"{self.model}-B{self.batch}-S{self.seqlen}-{dtype}"


def _shapes(sizes: Sizes, *batches: tuple[int, int]) -> list[Shape]:
    return [Shape(**vars(sizes) | {"num_layers": 1}, batch=batch, seqlen=seqlen) for batch, seqlen in batches]


PRESETS = {
    ("cpu", "tiny"): _shapes(TINY, (2, 16)),
    ("cpu", "quick"): _shapes(SMOLLM2, (1, 512)),
    ("cpu", "full"): _shapes(SMOLLM2, (1, 512), (1, 2048)),
    ("cpu", "model"): _shapes(SMOLLM2, (1, 1024)),
    ("cuda", "tiny"): _shapes(TINY, (2, 64)),
    ("cuda", "quick"): _shapes(LLAMA_1B, (4, 2048)) + _shapes(LLAMA_8B, (2, 4096)),
    ("cuda", "full"): _shapes(LLAMA_1B, (8, 1024), (4, 2048), (1, 8192)) + _shapes(LLAMA_8B, (4, 2048), (2, 4096), (1, 8192)),
    ("cuda", "model"): _shapes(SMOLLM2, (8, 2048)) + _shapes(LLAMA_1B, (4, 2048)) + _shapes(LLAMA_8B, (2, 4096)),
}


def flops(shape: Shape, mode: str) -> float:
    # 2 a matrix entry and token, causal attention 2·B·H·S²·D; the backward passes twice and 2.5 times that
    products = 2.0 * shape.batch * shape.seqlen * llama.matrix_entries(shape)
    attention = 2.0 * shape.batch * shape.num_heads * shape.seqlen**2 * shape.head_dim
    return {"fwd": products + attention, "bwd": 2 * products + 2.5 * attention, "fwd+bwd": 3 * products + 3.5 * attention}[mode]


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # weights read once a pass, their gradients written once; x and the residual in and out, in each direction
    weights, rows = llama.matrix_entries(shape), shape.batch * shape.seqlen * shape.hidden_size
    forward, backward = weights + 4 * rows, 2 * weights + 8 * rows
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode] * itemsize


NAMES = [name for name, _ in Layer(TINY).named_parameters()]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """x, residual, the weights by NAMES; upstream gradients of the layer's two outputs."""
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.batch, shape.seqlen, shape.hidden_size)
    x, residual, *upstream = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(4))
    weights = llama.parameters_of(Layer(shape), dtype, device)
    return [t.requires_grad_() for t in (x, residual, *(weights[name] for name in NAMES))], upstream


def build_fastattn(shape: Shape) -> Forward:
    layer = Layer(shape)

    def forward(x: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = tables(shape.head_dim, shape.seqlen, x.device)
        return functional_call(layer, dict(zip(NAMES, weights)), (x, residual, cos, sin))

    return forward


def plain(attend: Attend) -> Builder:
    def build(shape: Shape) -> Forward:
        def forward(x: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = tables(shape.head_dim, shape.seqlen, x.device)
            return plain_layer(dict(zip(NAMES, weights)), "", shape, x, residual, cos, sin, attend)

        return forward

    return build


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = llama.cast(inputs, dtype)
    outs = plain(llama.naive)(shape)(*leaves)
    grads = torch.autograd.grad(outs, leaves, [t.to(dtype) for t in upstream])
    names = ["out", "residual", "dx", "dresidual", *(f"d{name}" for name in NAMES)]
    return dict(zip(names, [*(out.detach() for out in outs), *grads], strict=True))


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers(llama.builders(build_fastattn, plain, device), {})


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    (shape,) = _shapes(TINY, (1, 8))
    inputs, _ = draw(shape, dtype, device)
    ours, theirs = build_fastattn(shape), plain(llama.sdpa)(shape)
    return {"fastattn's layer": lambda: ours(*inputs), "torch's layer": lambda: theirs(*inputs)}


SUITE = Suite(
    op="layer",
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
