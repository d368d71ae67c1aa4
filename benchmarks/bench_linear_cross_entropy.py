"""The loss of a language model's head, logits included: what they cost in time, and in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .models import MODELS, SMALL, Model, labelled
from .suite import MATMUL, OURS, Builder, Forward, Suite, find_peers, import_name

BLOCK_LOGITS = 1 << 27  # entries of the largest piece of the logits that the reference holds


@dataclass(frozen=True)
class Shape:
    num_tokens: int
    hidden_size: int
    vocab_size: int
    model: str = ""

    def id(self, dtype: str) -> str:
        return labelled(self.model, f"T{self.num_tokens}-H{self.hidden_size}-V{self.vocab_size}-{dtype}")


def _of_models(num_tokens: int, models: tuple[Model, ...]) -> list[Shape]:
    return [Shape(num_tokens, model.hidden_size, model.vocab_size, model.name) for model in models]


_LLAMA = Shape(8192, 4096, 128256)
PRESETS = {
    ("cpu", "tiny"): [Shape(16, 8, 50), Shape(5, 8, 33)],
    ("cpu", "quick"): [Shape(512, 256, 8192), Shape(512, 576, 49152)],
    ("cpu", "full"): [Shape(512, 256, 8192), Shape(512, 576, 49152), Shape(1024, 768, 50257)],
    ("cpu", "model"): _of_models(512, SMALL),
    ("cuda", "model"): _of_models(8192, MODELS),
    ("cuda", "tiny"): [Shape(256, 128, 1000), Shape(100, 128, 1001)],
    ("cuda", "quick"): [Shape(8192, 768, 50257), _LLAMA],
    ("cuda", "full"): [Shape(8192, 768, 50257), Shape(8192, 2048, 32000), Shape(4096, 4096, 128256), _LLAMA, Shape(8192, 2304, 256000)],
}


def flops(shape: Shape, mode: str) -> float:
    # one product of (T, H) and (V, H) forward; two such backward
    forward = 2 * shape.num_tokens * shape.hidden_size * shape.vocab_size
    return forward * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # x, w; x, w → dx, dw; no logits
    matrices = (shape.num_tokens + shape.vocab_size) * shape.hidden_size * itemsize
    return matrices * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x, weight = randn(shape.num_tokens, shape.hidden_size), randn(shape.vocab_size, shape.hidden_size)
    weight = weight * shape.hidden_size**-0.5  # logits of the order of 1
    target = torch.randint(shape.vocab_size, (shape.num_tokens,), generator=generator, device=device)
    return [x.requires_grad_(), weight.requires_grad_(), target], [randn()]


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """loss, dinput and dweight in `dtype`, the logits in blocks of rows; the weight's gradient sums them in at least float32."""
    x, weight, target = inputs
    accumulate = torch.promote_types(dtype, torch.float32)
    weight = weight.detach().to(dtype).requires_grad_()
    loss, dx = torch.zeros((), dtype=accumulate, device=x.device), torch.empty_like(x, dtype=dtype)
    dweight = torch.zeros_like(weight, dtype=accumulate)
    for rows in torch.arange(shape.num_tokens).split(max(1, BLOCK_LOGITS // shape.vocab_size)):
        block = x[rows[0] : rows[-1] + 1].detach().to(dtype).requires_grad_()
        part = fastattn.reference.linear_cross_entropy(block, weight, target[rows[0] : rows[-1] + 1], reduction="sum")
        part = part.to(accumulate) / shape.num_tokens
        grads = torch.autograd.grad(part, (block, weight), upstream[0].to(accumulate))
        loss += part.detach()
        dx[rows[0] : rows[-1] + 1] = grads[0]
        dweight += grads[1]
    return {"loss": loss.to(dtype), "dinput": dx, "dweight": dweight.to(dtype)}


def _torch(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _compiled(shape: Shape) -> Forward:
    torch.compiler.reset()
    return torch.compile(_torch, dynamic=False, fullgraph=True)


def _liger(shape: Shape) -> Forward:
    function = import_name("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda x, weight, target: function(x, weight, target)


def _quack(shape: Shape) -> Forward:
    function = import_name("quack.linear_cross_entropy", "linear_cross_entropy")
    return lambda x, weight, target: function(x, weight, target, reduction="mean")


def _torch_fused(shape: Shape) -> Forward:
    return import_name("torch.nn.functional", "linear_cross_entropy")


ON_CPU: dict[str, Builder] = {
    OURS: lambda shape: fastattn.linear_cross_entropy,
    "naive": lambda shape: fastattn.reference.linear_cross_entropy,
    "torch": lambda shape: _torch,
    "torch linear_cross_entropy": _torch_fused,
}
ON_CUDA = ON_CPU | {"torch.compile": _compiled, "Liger": _liger, "QuACK": _quack}
REQUIRES = {
    "torch linear_cross_entropy": ("torch.nn.functional", "linear_cross_entropy"),
    "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "QuACK": ("quack.linear_cross_entropy", "linear_cross_entropy"),
}


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers(ON_CUDA if device.type == "cuda" else ON_CPU, REQUIRES)


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs, _ = draw(Shape(4, 16, 64), dtype, device)
    return {
        "fastattn.linear_cross_entropy": lambda: fastattn.linear_cross_entropy(*inputs),
        "torch, linear then cross_entropy": lambda: _torch(*inputs),
    }


SUITE = Suite(
    op="linear_cross_entropy",
    presets=PRESETS,
    peers=peers,
    draw=draw,
    reference=reference,
    flops=flops,
    traffic=traffic,
    ceiling=MATMUL,
    overhead=overhead,
    panel=lambda row: (f"H = {row['hidden_size']}", row["vocab_size"]),
    x_label="vocabulary",
)
