"""Drawing a token a row: rows are sequences of a batch, num_cols the vocabulary. Temperature, top-k and top-p, all on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn

from .models import MODELS
from .rows import RowShape, Variant, row_suite
from .suite import BACKENDS, OURS, by_backend

OPTIONS: dict[str, dict[str, Any]] = {
    "sample": {},
    "sample_top_k": {"temperature": 0.8, "top_k": 50},
    "sample_top_p": {"temperature": 0.8, "top_p": 0.9},
    "sample_top_k_top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


def _draw(shape: RowShape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [(3 * randn(shape.num_rows, shape.num_cols, learnt=False))], []


def _sorted(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Callable[[Tensor], Tensor]:
    """What one writes first: sort the vocabulary, cut, draw."""

    def forward(logits: Tensor) -> Tensor:
        values, ids = (logits.float() / temperature).sort(-1, descending=True)
        if top_k is not None:
            values[:, top_k:] = float("-inf")
        probs = values.softmax(-1)
        if top_p is not None:
            probs = probs * (probs.cumsum(-1) - probs < top_p)
        return ids.gather(-1, torch.multinomial(probs, 1))[:, 0]

    return forward


def _flashinfer(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Callable:
    def wrap(function: Callable) -> Callable[[Tensor], Tensor]:
        def forward(logits: Tensor) -> Tensor:
            rows = logits.float() / temperature
            return function(rows, logits.shape[-1] if top_k is None else top_k, 1.0 if top_p is None else top_p)

        return forward

    return wrap


def _of(options: dict[str, Any]) -> Variant:
    return Variant(
        draw=_draw,
        reference=lambda logits: fastattn.reference.sampling_probs(logits, **options),
        ours=lambda logits, **backend: fastattn.sample(logits, **options, **backend),
        torch=_sorted(**options),
        others={"FlashInfer": ("flashinfer.sampling", "top_k_top_p_sampling_from_logits", _flashinfer(**options))},
        traffic=(1, 0),  # the logits once
        flops=(5, 0),  # ÷T, max, exp, Σ and a comparison, whatever the search for the cut adds
        has_backends=True,
    )


def _model_shapes(batches: tuple[int, ...]) -> list[RowShape]:
    return [RowShape("sample_top_k_top_p", batch, model.vocab_size, model.name) for model in MODELS for batch in batches]


def _shapes(batches: tuple[int, ...], vocabularies: tuple[int, ...], names: tuple[str, ...] = tuple(OPTIONS)) -> list[RowShape]:
    return [RowShape(name, batch, vocab) for name in names for batch in batches for vocab in vocabularies]


PRESETS = {
    ("cpu", "tiny"): _shapes((2,), (100, 101)),
    ("cpu", "quick"): _shapes((1, 16), (32000,)),
    ("cpu", "full"): _shapes((1, 16, 64), (32000, 128256)),
    ("cpu", "model"): _model_shapes((1, 16)),
    ("cuda", "model"): _model_shapes((1, 64)),
    ("cuda", "tiny"): _shapes((4,), (1000, 1001)),
    ("cuda", "quick"): _shapes((1, 64), (128256,)),
    ("cuda", "full"): _shapes((1, 16, 64, 256), (32000, 50257, 128256)),
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    logits = torch.randn(4, 64, device=device).to(dtype)
    return {
        "fastattn.sample": lambda: fastattn.sample(logits, top_k=5),
        **by_backend("fastattn.sample", lambda backend: fastattn.sample(logits, top_k=5, backend=backend), device),
        "torch, by sorting": lambda: _sorted(top_k=5)(logits),
    }


def _probs(shape: RowShape) -> Callable[[Tensor], Tensor]:
    return lambda logits: fastattn.sampling_probs(logits, **OPTIONS[shape.function])


def _truth(shape: RowShape) -> Callable[[Tensor], Tensor]:
    return lambda logits: fastattn.reference.sampling_probs(logits, **OPTIONS[shape.function])


# A draw is random: ours is held to the distribution it draws from, and a peer's draws are timed on trust.
SUITE = row_suite(
    "sampling", {name: _of(options) for name, options in OPTIONS.items()}, PRESETS, overhead, modes=("fwd",), x_label="vocabulary",
    panel=lambda row: (f"{row['function']}, B = {row['num_rows']}", row["num_cols"]),
    checked={OURS: _probs, **{name: _truth for name in ("torch", "FlashInfer", *(f"{OURS} ({backend})" for backend in BACKENDS))}},
)  # fmt: skip
