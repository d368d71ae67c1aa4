"""A mixture of experts over the few tokens of a decoding step, which takes as long as its weights take to be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from . import bench_moe
from .bench_moe import Shape, choose, of_models
from .models import QWEN3_30B_A3B
from .suite import COPY, Builder, Forward, Suite, find_peers, import_name

COPIED_AT_MOST = 1 << 32  # bytes of weights that the peer with a copy for each slot may make


def _shapes(tokens: tuple[int, ...], *layers: tuple[int, int, int, int]) -> list[Shape]:
    return [Shape(t, *layer) for layer in layers for t in tokens]


PRESETS = {
    ("cpu", "tiny"): _shapes((1, 3), (16, 8, 4, 2)),
    ("cpu", "quick"): _shapes((1, 8, 64), (512, 256, 32, 4)),
    ("cpu", "full"): _shapes((1, 8, 64), (512, 256, 32, 4), (2048, 768, 32, 8)),
    ("cpu", "model"): of_models((1, 8), (QWEN3_30B_A3B,)),
    ("cuda", "tiny"): _shapes((1, 8), (128, 64, 8, 2)),
    ("cuda", "quick"): of_models((1, 8, 64), (QWEN3_30B_A3B,)),
    ("cuda", "full"): of_models((1, 8, 64)),
    ("cuda", "model"): of_models((1, 16, 64)),
}


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # the weights of each expert that some token chose, once; tokens in, tokens out
    weights = 3 * shape.hidden_size * shape.intermediate_size * len(choose(shape).unique())
    return (weights + 2 * shape.num_tokens * shape.hidden_size) * itemsize


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    inputs, _ = bench_moe.draw(shape, dtype, device)
    return [t.detach() for t in inputs], []


def build_batched(shape: Shape) -> Forward:
    """What transformers decodes by: a copy of its expert's weights for each slot, and batched products."""

    def forward(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        slots = index.flatten()
        copied = slots.numel() * (gate_up[0].nbytes + down[0].nbytes)
        if copied > COPIED_AT_MOST:
            raise MemoryError(f"its copies of weights take {copied / 1e9:.0f} GB")
        rows = x.repeat_interleave(shape.top_k, 0).unsqueeze(-1)
        gate, up = torch.bmm(gate_up[slots], rows).squeeze(-1).chunk(2, -1)
        y = torch.bmm(down[slots], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.flatten()[:, None].to(y.dtype)).view(*index.shape, -1).sum(1)

    return forward


def build_triton_kernels(shape: Shape) -> Forward:
    """Its fused swiglu is gpt-oss's, so that the activation stands between its products; it has no backward: it is in this suite alone."""
    matmul = import_name("triton_kernels.matmul", "matmul")
    ragged = import_name("triton_kernels.tensor", "make_ragged_tensor_metadata")

    def forward(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        experts, order = index.flatten().sort()
        sizes = torch.histc(experts.int(), shape.num_experts, 0, shape.num_experts - 1).int()
        rows, order = ragged(sizes, order.numel()), order.int()
        z = matmul(x, gate_up.transpose(1, 2), None, a_ragged_metadata=rows, gather_indx=order // shape.top_k)
        gate, up = z.chunk(2, -1)
        y = matmul(F.silu(gate) * up, down.transpose(1, 2), None, a_ragged_metadata=rows, scatter_indx=order)
        return (y.view(*index.shape, -1) * weights[..., None].to(y.dtype)).sum(1)

    return forward


ON_CPU: dict[str, Builder] = bench_moe.ON_CPU | {"torch batched_mm": build_batched}
ON_CUDA = ON_CPU | bench_moe.ON_CUDA | {"triton_kernels": build_triton_kernels}
REQUIRES = bench_moe.REQUIRES | {"triton_kernels": ("triton_kernels.matmul", "matmul")}


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers(ON_CUDA if device.type == "cuda" else ON_CPU, REQUIRES)


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs, _ = draw(Shape(1, 64, 32, 8, 2), dtype, device)
    batched = build_batched(Shape(1, 64, 32, 8, 2))
    return {"fastattn.moe": lambda: fastattn.moe(*inputs), "torch batched_mm": lambda: batched(*inputs)}


SUITE = Suite(
    op="moe_decode",
    presets=PRESETS,
    peers=peers,
    draw=draw,
    reference=bench_moe.reference,
    flops=bench_moe.flops,
    traffic=traffic,
    ceiling=COPY,
    overhead=overhead,
    panel=bench_moe.panel,
    x_label="tokens",
    modes=("fwd",),
)
