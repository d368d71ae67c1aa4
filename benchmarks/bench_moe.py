"""A mixture of experts, from routed tokens to their sum, in time and in memory: layers of models of 1.4, 7 and 30 billion parameters, as
SonicMoE publishes figures of them and of its peers (arXiv 2512.14080)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .models import MIXTURES, QWEN3_30B_A3B, Model, labelled
from .suite import MATMUL, OURS, Builder, Forward, Suite, find_peers, import_name


@dataclass(frozen=True)
class Shape:
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    model: str = ""

    def id(self, dtype: str) -> str:
        name = f"T{self.num_tokens}-H{self.hidden_size}-I{self.intermediate_size}-E{self.num_experts}-K{self.top_k}-{dtype}"
        return labelled(self.model, name)


def of_models(tokens: tuple[int, ...], models: Sequence[Model] = MIXTURES) -> list[Shape]:
    """Their layers, as if every one had a plain SwiGLU between its matrices: gpt-oss has biases and a clamp there."""
    return [Shape(t, m.hidden_size, m.intermediate_size, m.num_experts, m.top_k, m.name) for m in models for t in tokens]


_1B, _7B = Shape(40960, 768, 256, 128, 8), Shape(24576, 1536, 256, 128, 8)
_30B = [Shape(tokens, 4096, 512, 128, 8) for tokens in (2048, 8192, 32768)]
_30B_COARSE = Shape(32768, 4096, 1024, 64, 4)
_120B = Shape(32768, 4096, 1024, 128, 8)
_SMALL = [Shape(tokens, 512, 256, 16, 4) for tokens in (256, 1024)]
PRESETS = {
    ("cpu", "tiny"): [Shape(64, 64, 32, 8, 2), Shape(37, 32, 24, 6, 1)],
    ("cpu", "quick"): _SMALL,
    ("cpu", "full"): [*_SMALL, Shape(256, 768, 256, 128, 8), Shape(2048, 768, 256, 128, 8)],
    ("cpu", "model"): of_models((256,), (QWEN3_30B_A3B,)),  # the others' weights, and their gradients in float64, fill a small machine
    ("cuda", "model"): of_models((8192,)),
    ("cuda", "tiny"): [Shape(256, 128, 64, 8, 2), Shape(100, 128, 64, 8, 2)],
    ("cuda", "quick"): [_7B, _30B[-1]],
    ("cuda", "full"): [_1B, _7B, *_30B, _30B_COARSE, _120B],
}


def flops(shape: Shape, mode: str) -> float:
    # three products of (T·K, H) and (H, I) or back forward, two such each backward
    forward = 6 * shape.num_tokens * shape.top_k * shape.hidden_size * shape.intermediate_size
    return forward * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # x, the chosen experts' weights → out; x, dout, weights → dx, and every expert's gradient
    tokens, matrices = shape.num_tokens * shape.hidden_size, 3 * shape.hidden_size * shape.intermediate_size
    chosen = matrices * len(choose(shape).unique())
    forward, backward = 2 * tokens + chosen, 3 * tokens + chosen + matrices * shape.num_experts
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode] * itemsize


@functools.cache
def choose(shape: Shape) -> Tensor:
    """Each token's experts: different ones, uniformly. By the shape alone, so that a count of bytes knows them too."""
    return torch.randn(shape.num_tokens, shape.num_experts, generator=torch.Generator().manual_seed(0)).topk(shape.top_k).indices


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    tokens, hidden, inner, experts = shape.num_tokens, shape.hidden_size, shape.intermediate_size, shape.num_experts
    x, weights = randn(tokens, hidden), randn(tokens, shape.top_k).float().softmax(-1)
    gate_up = torch.stack([randn(2 * inner, hidden, scale=hidden**-0.5) for _ in range(experts)])
    down = torch.stack([randn(hidden, inner, scale=inner**-0.5) for _ in range(experts)])
    x, weights, gate_up, down = (t.requires_grad_() for t in (x, weights, gate_up, down))
    return [x, choose(shape).to(device), weights, gate_up, down], [randn(tokens, hidden)]


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """out, and where inputs have gradients dx, dweights, dgate_up and ddown, in `dtype`, an expert at a time: what autograd keeps of all of
    them in float64 fits no GPU. Tokens' sums over their experts are in at least float32."""
    x, index, weights, gate_up, down = (t.detach() for t in inputs)
    wide = torch.promote_types(dtype, torch.float32)
    learnt = inputs[0].requires_grad
    out, dx = (torch.zeros_like(x, dtype=wide) for _ in range(2))
    dweights = torch.zeros_like(weights, dtype=wide)
    dgate_up, ddown = (torch.zeros_like(t, dtype=dtype) if learnt else t for t in (gate_up, down))
    for expert in index.unique().tolist():
        token, k = torch.where(index == expert)
        parts = x[token].to(dtype), weights[token, k, None].to(wide), gate_up[expert, None].to(dtype), down[expert, None].to(dtype)
        rows, weight, up, back = (t.requires_grad_(learnt) for t in parts)
        part = fastattn.reference.moe(rows, torch.zeros_like(token)[:, None], weight, up, back)
        out.index_add_(0, token, part.detach().to(wide))
        if learnt:
            drows, dweight, dup, dback = torch.autograd.grad(part, (rows, weight, up, back), upstream[0][token].to(dtype))
            dx.index_add_(0, token, drows.to(wide))
            dweights[token, k], dgate_up[expert], ddown[expert] = dweight[:, 0], dup[0], dback[0]
    grads = {"dx": dx.to(dtype), "dweights": dweights, "dgate_up": dgate_up, "ddown": ddown} if learnt else {}
    return {"out": out.to(dtype), **grads}


def composition(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What transformers runs by default: sort, gather, torch's grouped products, back in order, sum."""
    top_k = index.shape[1]
    experts, order = index.flatten().sort()
    counts = torch.histc(experts.float() if x.device.type == "cpu" else experts.int(), len(gate_up), 0, len(gate_up) - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    y = y * weights.flatten()[order, None].to(y.dtype)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[inverse].view(*index.shape, -1).sum(1)


def build_compiled(shape: Shape) -> Forward:
    torch.compiler.reset()
    return torch.compile(composition, dynamic=False, fullgraph=True)


def build_scattermoe(shape: Shape) -> Forward:
    sort, linear = (import_name("scattermoe.parallel_experts", name) for name in ("flatten_sort_count", "parallel_linear"))

    def forward(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        plan = sort(index, num_experts=shape.num_experts)
        gate, up = linear(x, gate_up.transpose(1, 2), shape.top_k, *plan, grouped_out=True).chunk(2, -1)
        return linear(F.silu(gate) * up, down.transpose(1, 2), 1, *plan, gates=weights.to(x.dtype), grouped_in=True)

    return forward


def build_sonicmoe(shape: Shape) -> Forward:
    """By the entry that takes what a router chose, as transformers calls it; its other one has a router of its own."""
    function, activations = import_name("sonicmoe", "moe_general_routing_inputs"), import_name("sonicmoe.enums", "ActivationType")

    def forward(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        tokens = torch.arange(index.numel(), dtype=torch.int32, device=x.device) // shape.top_k
        out, _ = function(
            x, weights.flatten(), tokens, index.flatten().int(), gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None,
            shape.num_experts, torch.cuda.current_stream().cuda_stream, activations.SWIGLU, not torch.is_grad_enabled(), concat_layout=True,
        )  # fmt: skip
        return out

    return forward


def build_liger(shape: Shape) -> Forward:
    function = import_name("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction")
    return lambda x, index, weights, gate_up, down: function.apply(x, gate_up, down, index.int(), weights)


def build_vllm(shape: Shape) -> Forward:
    """Forward only."""
    function = import_name("vllm.model_executor.layers.fused_moe", "fused_experts")
    return torch.no_grad()(lambda x, index, weights, gate_up, down: function(x, gate_up, down, weights, index.int()))


ON_CPU: dict[str, Builder] = {
    OURS: lambda shape: fastattn.moe,
    "naive": lambda shape: fastattn.reference.moe,
    "torch": lambda shape: composition,
}
ON_CUDA = ON_CPU | {
    "torch.compile": build_compiled, "ScatterMoE": build_scattermoe, "SonicMoE": build_sonicmoe, "Liger": build_liger,
    "vLLM": build_vllm,
}  # fmt: skip
REQUIRES = {
    "torch": ("torch.nn.functional", "grouped_mm"),
    "torch.compile": ("torch.nn.functional", "grouped_mm"),
    "ScatterMoE": ("scattermoe.parallel_experts", "parallel_linear"),
    "SonicMoE": ("sonicmoe", "moe_general_routing_inputs"),
    "Liger": ("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction"),
    "vLLM": ("vllm.model_executor.layers.fused_moe", "fused_experts"),
}


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers(ON_CUDA if device.type == "cuda" else ON_CPU, REQUIRES)


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs, _ = draw(Shape(4, 64, 32, 8, 2), dtype, device)
    calls = {"fastattn.moe": lambda: fastattn.moe(*inputs)}
    if hasattr(F, "grouped_mm"):
        calls["torch's composition"] = lambda: composition(*inputs)
    return calls


def panel(row: dict[str, Any]) -> tuple[str, float]:
    return f"H = {row['hidden_size']}, I = {row['intermediate_size']}, E = {row['num_experts']}", row["num_tokens"]


SUITE = Suite(
    op="moe",
    presets=PRESETS,
    peers=peers,
    draw=draw,
    reference=reference,
    flops=flops,
    traffic=traffic,
    ceiling=MATMUL,
    overhead=overhead,
    panel=panel,
    x_label="tokens",
)
