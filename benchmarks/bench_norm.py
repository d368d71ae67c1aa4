"""Layer norm, RMS norm and their fused residual additions, of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .rows import RowShape, Variant, row_presets, row_suite
from .suite import by_backend

_LIGER = "liger_kernel.transformers.functional"


def _inputs(*names: str) -> Callable:
    """Draws x, then what is named, and gradients of one output or, with a residual, two."""

    def draw(shape: RowShape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        rows, columns = (shape.num_rows, shape.num_cols), (shape.num_cols,)
        tensors = [randn(*rows), *(randn(*(rows if name == "residual" else columns)) for name in names)]
        return tensors, [randn(*rows, learnt=False) for _ in range(2 if "residual" in names else 1)]

    return draw


def _over_columns(function: Callable) -> Callable:
    """function(x, …, normalized_shape, …) with the last dim normalized; a residual comes before it."""
    return lambda x, *rest, **options: function(x, x.shape[-1], *rest, **options)


def _with_residual(function: Callable) -> Callable:
    return lambda x, residual, *rest, **options: function(x, residual, x.shape[-1], *rest, **options)


def _add_then(norm: Callable) -> Callable:
    def forward(x: Tensor, residual: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return norm(residual, residual.shape[-1:], *rest), residual

    return forward


VARIANTS = {
    "rms_norm": Variant(
        draw=_inputs("weight"),
        reference=_over_columns(fastattn.reference.rms_norm),
        ours=_over_columns(fastattn.rms_norm),
        torch=lambda x, w: F.rms_norm(x, x.shape[-1:], w),
        others={
            "Liger": (_LIGER, "liger_rms_norm", lambda f: lambda x, w: f(x, w, 1.1920929e-07)),
            "QuACK": ("quack", "rmsnorm", lambda f: lambda x, w: f(x, w, eps=1.1920929e-07)),
        },
        traffic=(2, 3),  # x → y; x, dy → dx
        has_backends=True,
    ),
    "layer_norm": Variant(
        draw=_inputs("weight", "bias"),
        reference=_over_columns(fastattn.reference.layer_norm),
        ours=_over_columns(fastattn.layer_norm),
        torch=lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        others={"Liger": (_LIGER, "liger_layer_norm", lambda f: lambda x, w, b: f(x, w, b, 1e-5))},
        traffic=(2, 3),
        has_backends=True,
    ),
    "add_rms_norm": Variant(
        draw=_inputs("residual", "weight"),
        reference=_with_residual(fastattn.reference.add_rms_norm),
        ours=_with_residual(fastattn.add_rms_norm),
        torch=_add_then(F.rms_norm),
        others={
            "Liger": (_LIGER, "liger_fused_add_rms_norm", lambda f: lambda x, r, w: f(x, r, w, 1.1920929e-07)),
            "QuACK": ("quack", "rmsnorm", lambda f: lambda x, r, w: f(x, w, residual=r, prenorm=True, eps=1.1920929e-07)),
        },
        traffic=(4, 5),  # x, residual → y, residual; residual, dy, dresidual → dx, dresidual
        has_backends=True,
    ),
    "add_layer_norm": Variant(
        draw=_inputs("residual", "weight", "bias"),
        reference=_with_residual(fastattn.reference.add_layer_norm),
        ours=_with_residual(fastattn.add_layer_norm),
        torch=_add_then(F.layer_norm),
        traffic=(4, 5),
        has_backends=True,
    ),
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x, weight = (torch.randn(*size, device=device).to(dtype) for size in ((4, 64), (64,)))
    leaf = x.clone().requires_grad_()
    return {
        "fastattn.rms_norm": lambda: fastattn.rms_norm(x, 64, weight),
        **by_backend("fastattn.rms_norm", lambda backend: fastattn.rms_norm(x, 64, weight, backend=backend), device),
        "torch rms_norm": lambda: F.rms_norm(x, (64,), weight),
        "fastattn.rms_norm, recording a gradient": lambda: fastattn.rms_norm(leaf, 64, weight),
        "torch rms_norm, recording a gradient": lambda: F.rms_norm(leaf, (64,), weight),
    }


SUITE = row_suite("norm", VARIANTS, row_presets(list(VARIANTS)), overhead)
