"""SwiGLU and GEGLU of separate and of packed gates, over rows of num_cols outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .models import Model
from .rows import RowShape, Variant, forward_only, row_presets, row_suite

_LIGER = "liger_kernel.transformers.functional"


def _separate(shape: RowShape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    gate, up = (randn(shape.num_rows, shape.num_cols) for _ in range(2))
    return [gate, up], [randn(shape.num_rows, shape.num_cols, learnt=False)]


def _packed(shape: RowShape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [randn(shape.num_rows, 2 * shape.num_cols)], [randn(shape.num_rows, shape.num_cols, learnt=False)]


def _halves(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, -1)
        return activation(gate) * up

    return forward


VARIANTS = {
    "swiglu": Variant(
        draw=_separate,
        reference=fastattn.reference.swiglu,
        ours=fastattn.swiglu,
        torch=lambda gate, up: F.silu(gate) * up,
        others={"Liger": (_LIGER, "liger_swiglu", lambda f: f)},
        traffic=(3, 5),  # gate, up → y; gate, up, dy → dgate, dup
        flops=(6, 12),  # −, exp, +, ÷, ·gate, ·up; those, and σ', dy·up, dy·silu and their products
    ),
    "swiglu_packed": Variant(
        draw=_packed,
        reference=fastattn.reference.swiglu,
        ours=fastattn.swiglu,
        torch=_halves(F.silu),
        others={
            "FlashInfer": ("flashinfer", "silu_and_mul", forward_only(lambda f: f)),
            "vLLM": ("vllm.model_executor.layers.activation", "SiluAndMul", forward_only(lambda layer: layer().forward_cuda)),
        },
        traffic=(3, 5),
        flops=(6, 12),
    ),
    "geglu": Variant(
        draw=_separate,
        reference=fastattn.reference.geglu,
        ours=fastattn.geglu,
        torch=lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        others={"Liger": (_LIGER, "liger_geglu", lambda f: f)},
        traffic=(3, 5),
        flops=(11, 22),  # a cubic, tanh as exp, +, ÷, and the products; its derivative
    ),
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    gate, up = (torch.randn(4, 64, device=device).to(dtype) for _ in range(2))
    return {
        "fastattn.swiglu": lambda: fastattn.swiglu(gate, up),
        "torch silu and product": lambda: F.silu(gate) * up,
    }


def _of_model(model: Model) -> list[tuple[str, int]]:
    return [(model.activation, model.intermediate_size)] if model.activation in VARIANTS else []


LENGTHS = (1024, 2048, 4096, 8192, 14336)
SUITE = row_suite("glu", VARIANTS, row_presets(list(VARIANTS), LENGTHS, of_model=_of_model), overhead)
