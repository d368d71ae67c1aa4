"""Layer norm, RMS norm and their fused residual additions, of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .models import Model
from .rows import RowShape, Variant, forward_only, row_presets, row_suite
from .suite import by_backend

_LIGER, _APEX = "liger_kernel.transformers.functional", "apex.normalization.fused_layer_norm"
_EPS = 1.1920929e-07  # of float32, as torch's rms_norm has it for float32


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


def _into_new(function: Callable) -> Callable:
    """vLLM's norm writes where it is told to."""

    def forward(x: Tensor, w: Tensor) -> Tensor:
        out = torch.empty_like(x)
        function(out, x, w, _EPS)
        return out

    return forward


def _in_place(function: Callable) -> Callable:
    """What overwrites x and the residual gets copies, which are in its time as they are in that of whoever needs either again."""

    def forward(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = x.clone(), residual.clone()
        function(x, residual, w, _EPS)
        return x, residual

    return forward


VARIANTS = {
    "rms_norm": Variant(
        draw=_inputs("weight"),
        reference=_over_columns(fastattn.reference.rms_norm),
        ours=_over_columns(fastattn.rms_norm),
        torch=lambda x, w: F.rms_norm(x, x.shape[-1:], w),
        others={
            "Liger": (_LIGER, "liger_rms_norm", lambda f: lambda x, w: f(x, w, _EPS)),
            "QuACK": ("quack", "rmsnorm", lambda f: lambda x, w: f(x, w, eps=_EPS)),
            "apex": (_APEX, "fused_rms_norm_affine", lambda f: lambda x, w: f(x, w, w.shape, _EPS)),
            "FlashInfer": ("flashinfer", "rmsnorm", forward_only(lambda f: lambda x, w: f(x, w, eps=_EPS))),
            "vLLM": ("vllm._custom_ops", "rms_norm", forward_only(_into_new)),
        },
        traffic=(2, 3),  # x → y; x, dy → dx
        flops=(4, 9),  # x², Σ, ·rstd, ·w; x̂, w·dy, its product with x̂, Σ, ·x̂, −, ·rstd, and dy·x̂, Σ for dw
        has_backends=True,
    ),
    "layer_norm": Variant(
        draw=_inputs("weight", "bias"),
        reference=_over_columns(fastattn.reference.layer_norm),
        ours=_over_columns(fastattn.layer_norm),
        torch=lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        others={
            "Liger": (_LIGER, "liger_layer_norm", lambda f: lambda x, w, b: f(x, w, b, 1e-5)),
            "apex": (_APEX, "fused_layer_norm_affine", lambda f: lambda x, w, b: f(x, w, b, w.shape, 1e-5)),
        },
        traffic=(2, 3),
        flops=(7, 13),  # the same, a mean subtracted and a bias added, their gradients summed
        has_backends=True,
    ),
    "add_rms_norm": Variant(
        draw=_inputs("residual", "weight"),
        reference=_with_residual(fastattn.reference.add_rms_norm),
        ours=_with_residual(fastattn.add_rms_norm),
        torch=_add_then(F.rms_norm),
        others={
            "Liger": (_LIGER, "liger_fused_add_rms_norm", lambda f: lambda x, r, w: f(x, r, w, _EPS)),
            "QuACK": ("quack", "rmsnorm", lambda f: lambda x, r, w: f(x, w, residual=r, prenorm=True, eps=_EPS)),
            "FlashInfer": ("flashinfer", "fused_add_rmsnorm", forward_only(_in_place)),
            "vLLM": ("vllm._custom_ops", "fused_add_rms_norm", forward_only(_in_place)),
        },
        traffic=(4, 5),  # x, residual → y, residual; residual, dy, dresidual → dx, dresidual
        flops=(5, 10),  # one addition more
        has_backends=True,
    ),
    "add_layer_norm": Variant(
        draw=_inputs("residual", "weight", "bias"),
        reference=_with_residual(fastattn.reference.add_layer_norm),
        ours=_with_residual(fastattn.add_layer_norm),
        torch=_add_then(F.layer_norm),
        traffic=(4, 5),
        flops=(8, 14),
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


def _of_model(model: Model) -> list[tuple[str, int]]:
    return [(name, model.hidden_size) for name in (model.norm, f"add_{model.norm}")]


SUITE = row_suite("norm", VARIANTS, row_presets(list(VARIANTS), of_model=_of_model), overhead)
