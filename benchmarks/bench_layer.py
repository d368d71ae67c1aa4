"""One layer of a transformer as Llama has it: every op in its place, and the matrix products between them, which are torch's for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .models import LLAMA_3_8B, SMOLLM2_135M, Model, labelled
from .rows import Variant, row_suite
from .suite import MATMUL, Forward

DENSE = (SMOLLM2_135M, LLAMA_3_8B)  # models whose every layer is this one


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of seqlen tokens through a layer of these sizes."""

    batch: int
    seqlen: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    function: str = "layer"
    model: str = ""

    def id(self, dtype: str) -> str:
        heads = f"H{self.num_heads}-Hkv{self.num_kv_heads}-D{self.head_dim}"
        return labelled(self.model, f"B{self.batch}-S{self.seqlen}-E{self.hidden_size}-{heads}-I{self.intermediate_size}-{dtype}")

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the projections: q, k and v in one, their output, gate and up in one, down."""
        all_heads = self.num_heads + 2 * self.num_kv_heads
        return (
            (all_heads * self.head_dim, self.hidden_size), (self.hidden_size, self.num_heads * self.head_dim),
            (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size),
        )  # fmt: skip


def _draw(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """x, the weights of both norms, the four matrices; cos and sin, which nothing learns."""
    size = shape.batch, shape.seqlen, shape.hidden_size
    norms = [randn(shape.hidden_size) for _ in range(2)]
    matrices = [(randn(out, inner, learnt=False) * inner**-0.5).requires_grad_() for out, inner in shape.matrices]
    frequencies = 10000.0 ** -(torch.arange(0, shape.head_dim, 2, device=randn.device) / shape.head_dim)
    angles = torch.arange(shape.seqlen, device=randn.device)[:, None] * frequencies
    return [randn(*size), *norms, *matrices, angles.cos(), angles.sin()], [randn(*size, learnt=False)]


def layer(ops: ModuleType | type) -> Forward:
    """The layer by a module that has rms_norm, apply_rotary, attention, add_rms_norm and swiglu."""

    def forward(
        x: Tensor, norm_1: Tensor, norm_2: Tensor, qkv: Tensor, output: Tensor, gate_up: Tensor, down: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        hidden_size, head_dim = x.shape[-1], 2 * cos.shape[-1]
        num_heads = output.shape[1] // head_dim
        num_kv_heads = (qkv.shape[0] // head_dim - num_heads) // 2
        projected = F.linear(ops.rms_norm(x, hidden_size, norm_1), qkv).unflatten(-1, (-1, head_dim))
        q, k, v = projected.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
        q, k = ops.apply_rotary(q, k, cos, sin)
        attended = F.linear(ops.attention(q, k, v, causal=True).flatten(2), output)
        x, residual = ops.add_rms_norm(attended, x, hidden_size, norm_2)
        return residual + F.linear(ops.swiglu(F.linear(x, gate_up)), down)

    return forward


class InTorch:
    """The same ops as one writes them in torch today."""

    @staticmethod
    def rms_norm(x: Tensor, size: int, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (size,), weight)

    @staticmethod
    def add_rms_norm(x: Tensor, residual: Tensor, size: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return F.rms_norm(residual, (size,), weight), residual

    @staticmethod
    def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (torch.cat([t, t], -1)[:, None].to(q.dtype) for t in (cos, sin))

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        return rotated(q), rotated(k)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    @staticmethod
    def swiglu(packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, -1)
        return F.silu(gate) * up


def _flops(shape: Shape, mode: str) -> float:
    # 2 a token and weight, and attention's 4·H·D·S²/2; backward twice and 2.5 times that
    products = 2 * shape.batch * shape.seqlen * sum(out * inner for out, inner in shape.matrices)
    attention = 2 * shape.batch * shape.num_heads * shape.head_dim * shape.seqlen**2
    return {"fwd": products + attention, "bwd": 2 * products + 2.5 * attention, "fwd+bwd": 3 * products + 3.5 * attention}[mode]


def _traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # x, weights → out; x, dout, weights → dx, their gradients; what lies between could stay on the chip
    weights, tokens = sum(out * inner for out, inner in shape.matrices), shape.batch * shape.seqlen * shape.hidden_size
    forward, backward = weights + 2 * tokens, 2 * weights + 3 * tokens
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode] * itemsize


def _of_models(batch: int, seqlen: int, models: Sequence[Model]) -> list[Shape]:
    return [
        Shape(batch, seqlen, m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim, m.intermediate_size, model=m.name) for m in models
    ]


PRESETS = {
    ("cpu", "tiny"): [Shape(2, 16, 32, 4, 2, 8, 48)],
    ("cpu", "quick"): _of_models(1, 512, (SMOLLM2_135M,)),
    ("cpu", "full"): _of_models(1, 512, DENSE[:1]) + _of_models(1, 2048, DENSE[:1]),
    ("cpu", "model"): _of_models(1, 512, DENSE[:1]),
    ("cuda", "tiny"): [Shape(2, 128, 128, 4, 2, 64, 256)],
    ("cuda", "quick"): _of_models(2, 4096, (LLAMA_3_8B,)),
    ("cuda", "full"): [shape for seqlen in (1024, 4096, 8192) for shape in _of_models(8192 // seqlen, seqlen, DENSE)],
    ("cuda", "model"): _of_models(2, 4096, DENSE),
}
VARIANT = Variant(draw=_draw, reference=layer(fastattn.reference), ours=layer(fastattn), torch=layer(InTorch))


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, learnt: bool = True) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    randn.device = device
    inputs, _ = _draw(PRESETS["cuda", "tiny"][0], randn)
    inputs = [t.detach() for t in inputs]
    return {"fastattn's ops": lambda: VARIANT.ours(*inputs), "torch's": lambda: VARIANT.torch(*inputs)}


SUITE = row_suite(
    "layer", {"layer": VARIANT}, PRESETS, overhead, flops=_flops, traffic=_traffic, ceiling=MATMUL, x_label="sequence length",
    panel=lambda row: (row["model"] or "layer", row["seqlen"]),
)  # fmt: skip
