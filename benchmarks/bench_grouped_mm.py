"""The grouped matrix product, as a mixture of experts has it: tokens gathered into the first product, sorted rows into the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from . import bench_moe
from .models import MIXTURES, QWEN3_30B_A3B, Model
from .rows import Variant, row_suite
from .suite import MATMUL


@dataclass(frozen=True)
class Shape(bench_moe.Shape):
    """"up": x[gather] of (T, H), T·K rows, times (E, 2·I, H). "down": (T·K, I) times (E, H, I)."""

    function: str = "up"

    def id(self, dtype: str) -> str:
        name = super().id(dtype)
        return f"{self.model}-{self.function}{name.removeprefix(self.model)}" if self.model else f"{self.function}-{name}"

    @property
    def product(self) -> tuple[int, int]:
        """(N, K) of one group's matrix."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (2 * inner, hidden) if self.function == "up" else (hidden, inner)


def _draw(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    scores = torch.randn(shape.num_tokens, shape.num_experts, generator=randn.generator, device=randn.device)
    plan = fastattn.moe_dispatch(scores.topk(shape.top_k).indices, shape.num_experts)
    rows, (cols, size) = len(plan.order), shape.product
    x = randn(shape.num_tokens if shape.function == "up" else rows, size)
    w = torch.stack([randn(cols, size, learnt=False) * size**-0.5 for _ in range(shape.num_experts)]).requires_grad_()
    routing = [plan.order // shape.top_k, plan.order] if shape.function == "up" else []
    return [x, w, plan.offsets, *routing], [randn(rows, cols, learnt=False)]


def _scattermoe(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the sorted experts that its kernel takes, from the offsets that the others take."""

    def forward(x: Tensor, w: Tensor, offsets: Tensor, gather: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        rows = torch.arange(len(x) if order is None else len(order), dtype=torch.int32, device=x.device)
        experts, order = torch.searchsorted(offsets, rows, right=True), rows.long() if order is None else order
        return linear(
            x, w.transpose(1, 2), len(order) // len(x), experts, order, offsets.long(), grouped_in=gather is None, grouped_out=True
        )  # fmt: skip

    return forward


SCATTERMOE = {"ScatterMoE": ("scattermoe.parallel_experts", "parallel_linear", _scattermoe)}
VARIANTS = {
    "up": Variant(
        draw=_draw,
        reference=lambda x, w, offsets, gather, order: fastattn.reference.grouped_mm(x, w, offsets, gather=gather),
        ours=lambda x, w, offsets, gather, order: fastattn.grouped_mm(x, w, offsets, gather=gather),
        torch=lambda x, w, offsets, gather, order: F.grouped_mm(x[gather], w.transpose(1, 2), offs=offsets),
        others=SCATTERMOE,
    ),
    "down": Variant(
        draw=_draw,
        reference=fastattn.reference.grouped_mm,
        ours=fastattn.grouped_mm,
        torch=lambda x, w, offsets: F.grouped_mm(x, w.transpose(1, 2), offs=offsets),
        others=SCATTERMOE,
    ),
}


def _flops(shape: Shape, mode: str) -> float:
    # one product forward, two backward
    cols, size = shape.product
    return 2 * shape.num_tokens * shape.top_k * cols * size * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]


def _traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # x, w → y; x, w, dy → dx, dw
    cols, size = shape.product
    x = (shape.num_tokens if shape.function == "up" else shape.num_tokens * shape.top_k) * size
    w, y = shape.num_experts * cols * size, shape.num_tokens * shape.top_k * cols
    return {"fwd": x + w + y, "bwd": 2 * x + 2 * w + y, "fwd+bwd": 3 * x + 3 * w + 2 * y}[mode] * itemsize


def _shapes(*layers: tuple[int, int, int, int, int]) -> list[Shape]:
    """Both products of layers (T, H, I, E, K)."""
    return [Shape(*layer, function=name) for name in VARIANTS for layer in layers]


def _of_models(tokens: int, models: Sequence[Model] = MIXTURES) -> list[Shape]:
    return [Shape(*astuple(layer), function=name) for name in VARIANTS for layer in bench_moe.of_models((tokens,), models)]


_SMALL = [(256, 512, 256, 16, 4), (1024, 512, 256, 16, 4)]
PRESETS = {
    ("cpu", "tiny"): _shapes((6, 16, 8, 4, 2)),
    ("cpu", "quick"): _shapes(*_SMALL),
    ("cpu", "full"): _shapes(*_SMALL, (2048, 768, 256, 128, 8)),
    ("cpu", "model"): _of_models(256, (QWEN3_30B_A3B,)),
    ("cuda", "model"): _of_models(8192),
    ("cuda", "tiny"): _shapes((64, 128, 64, 8, 2)),
    ("cuda", "quick"): _shapes((16384, 4096, 512, 128, 8)),
    ("cuda", "full"): _shapes((40960, 768, 256, 128, 8), (24576, 1536, 256, 128, 8), *((t, 4096, 512, 128, 8) for t in (2048, 16384))),
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x, w = torch.randn(8, 64, device=device).to(dtype), torch.randn(4, 64, 64, device=device).to(dtype)
    offsets = torch.tensor([2, 4, 4, 8], dtype=torch.int32, device=device)
    calls = {"fastattn.grouped_mm": lambda: fastattn.grouped_mm(x, w, offsets)}
    if hasattr(F, "grouped_mm"):
        calls["torch grouped_mm"] = lambda: F.grouped_mm(x, w.transpose(1, 2), offs=offsets)
    return calls


def panel(row: dict[str, Any]) -> tuple[str, float]:
    title, x = bench_moe.panel(row)
    return f"{row['function']}, {title}", x


SUITE = row_suite(
    "grouped_mm", VARIANTS, PRESETS, overhead, traffic=_traffic, flops=_flops, ceiling=MATMUL, x_label="tokens",
    panel=panel,
)
