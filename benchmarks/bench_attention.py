"""Attention against naive attention and every other implementation at hand (attention_peers.py): plain, grouped heads, and each option at
short and at long sequences."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.ops.attention import dropout_keep

from . import attention_peers
from .attention_peers import ON_CPU, ON_CUDA, REQUIRES
from .models import MODELS, Model, labelled
from .suite import MATMUL, Builder, Suite, find_peers
from .verification import TENSORS, reference_results


@dataclass(frozen=True)
class Shape:
    """Self-attention: S_q = S_k, D_v = D.

    window: keys to the left of its own that a query sees, with causal; lengths: those of `batch` packed sequences, seqlen the longest.
    """

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    sinks: bool = False
    lengths: tuple[int, ...] = ()
    model: str = ""

    def id(self, dtype: str) -> str:
        heads = f"H{self.num_heads}" + ("" if self.num_kv_heads == self.num_heads else f"-Hkv{self.num_kv_heads}")
        mask = "causal" if self.causal else "full"
        tokens = f"T{sum(self.lengths)}" if self.lengths else f"S{self.seqlen}"
        return labelled(self.model, "-".join([f"B{self.batch}-{tokens}-{heads}-D{self.head_dim}-{dtype}-{mask}", *self.options]))

    @property
    def options(self) -> list[str]:
        """What is beyond the plain call, in words."""
        given = {
            "varlen": bool(self.lengths), f"window{self.window}": self.window is not None, f"softcap{self.softcap:g}": self.softcap,
            f"dropout{self.dropout_p:g}": self.dropout_p, "sinks": self.sinks,
        }  # fmt: skip
        return [name for name, on in given.items() if on]


def _grid(tokens: int, seqlens: Sequence[int], heads_of: dict[int, int]) -> list[Shape]:
    """{D: H} × causal or not × seqlens, `tokens` tokens in each batch."""
    return [
        Shape(max(1, tokens // seqlen), seqlen, num_heads, num_heads, head_dim, causal)
        for head_dim, num_heads in heads_of.items()
        for causal in (True, False)
        for seqlen in seqlens
    ]


def _with_options(plain: Shape) -> list[Shape]:
    """One option at a time of a causal shape: a window of an eighth, five sequences of very different lengths, and so on."""
    seqlen = plain.seqlen
    lengths = (seqlen // 2, seqlen // 4, seqlen // 8 + 1, 1, seqlen // 8 - 2)
    changes = [
        {"window": seqlen // 8 - 1}, {"batch": len(lengths), "seqlen": max(lengths), "lengths": lengths}, {"softcap": 30.0},
        {"dropout_p": 0.1, "batch": 1}, {"sinks": True},  # the reference holds a mask of dropout
    ]  # fmt: skip
    return [replace(plain, **change) for change in changes]


def _of_model(model: Model, batch: int, seqlen: int) -> Shape:
    window = model.window - 1 if model.window and model.window < seqlen else None
    heads = model.num_heads, model.num_kv_heads, model.head_dim
    return Shape(batch, seqlen, *heads, True, window, model.softcap, sinks=model.sinks, model=model.name)


_CUDA_HEADS = {64: 32, 128: 16}  # hidden size 2048 and 16k tokens: the shapes published figures use
_LLAMA = Shape(2, 8192, 32, 8, 128, True)
_ON_CPU = [shape for seqlen in (256, 1024) for shape in _with_options(Shape(1, seqlen, 8, 8, 64, True))]
_ON_CUDA = [shape for seqlen in (1024, 4096) for shape in _with_options(Shape(16384 // seqlen, seqlen, 16, 16, 128, True))]
PRESETS = {
    ("cpu", "tiny"): [*_grid(64, (32, 64), {16: 2}), *_with_options(Shape(1, 64, 4, 2, 16, True))],
    ("cpu", "quick"): [
        *(s for s in _grid(1, (512, 1024, 2048), {64: 8}) if s.causal or s.seqlen < 2048), Shape(1, 1024, 8, 2, 128, True), *_ON_CPU,
    ],
    ("cpu", "full"): [*_grid(1, (512, 1024, 2048, 4096, 8192), {64: 8, 128: 8}), Shape(1, 2048, 32, 8, 128, True), *_ON_CPU],
    ("cpu", "model"): [_of_model(model, 1, 1024) for model in MODELS],
    ("cuda", "tiny"): [*_grid(512, (256, 512), {64: 2}), *_with_options(Shape(1, 512, 4, 2, 64, True))],
    ("cuda", "quick"): [
        *(s for s in _grid(16384, (1024, 4096, 16384), _CUDA_HEADS) if s.causal or s.seqlen == 4096), _LLAMA, *_ON_CUDA[-5:],
    ],
    ("cuda", "full"): [*_grid(16384, (512, 1024, 2048, 4096, 8192, 16384), _CUDA_HEADS), _LLAMA, *_ON_CUDA],
    ("cuda", "model"): [_of_model(model, 2, 8192) for model in MODELS],
}  # fmt: skip


def flops(shape: Shape, mode: str) -> float:
    # 4·H·D a pair of query and key: S² of them, half when causal, W·S − W²/2 in a window of W; 2.5 times that backward (5 products, not 2)
    pairs = 0.0
    for length in shape.lengths or (shape.seqlen,) * shape.batch:
        keys = length if shape.window is None else min(length, shape.window + 1)
        pairs += length * keys - keys**2 / 2 if shape.causal else length**2
    return 4 * pairs * shape.num_heads * shape.head_dim * {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[mode]


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # q, k, v → out; q, k, v, out, dout → dq, dk, dv
    tokens = sum(shape.lengths) if shape.lengths else shape.batch * shape.seqlen
    forward, backward = 2 * (shape.num_heads + shape.num_kv_heads), 4 * (shape.num_heads + shape.num_kv_heads)
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode] * tokens * shape.head_dim * itemsize


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the sinks if any, and out's upstream gradient; random data, since zeros run faster than real data."""
    generator = torch.Generator(device).manual_seed(0)
    lead = (sum(shape.lengths),) if shape.lengths else (shape.batch, shape.seqlen)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs = [randn(*lead, heads, shape.head_dim) for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
    inputs += [randn(shape.num_heads)] if shape.sinks else []
    return [t.requires_grad_() for t in inputs], [randn(*lead, shape.num_heads, shape.head_dim)]


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """By blocks; packed sequences one by one."""
    q, k, v, *sinks = inputs
    options: dict[str, Any] = {"window_left": shape.window, "softcap": shape.softcap, "sinks": sinks[0] if sinks else None}
    if shape.dropout_p:
        seed = attention_peers.dropout_seed(q.device)
        keep = dropout_keep(seed, shape.batch, shape.num_heads, shape.seqlen, shape.seqlen, shape.dropout_p)
        options |= {"dropout_p": shape.dropout_p, "keep": keep}
    if not shape.lengths:
        return dict(zip(TENSORS, reference_results(q, k, v, *upstream, shape.causal, dtype, **options)))
    parts = zip(*(t.split(shape.lengths) for t in (q, k, v, *upstream)))
    results = [reference_results(*(t[None] for t in part), shape.causal, dtype, **options) for part in parts]
    return {name: torch.cat([t[0] for t in of_all]) for name, of_all in zip(TENSORS, zip(*results))}


def refuse_beyond_memory(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """CUDA refuses an allocation by itself; a CPU process that asks for too much is killed."""
    if device.type == "cpu":
        need = 12 * shape.batch * shape.num_heads * shape.seqlen**2 * dtype.itemsize  # S × S matrices alive in a backward
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > free // 2:
            raise MemoryError(f"S × S matrices need about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    q, k, v = (torch.randn(1, 16, 1, 64, device=device).to(dtype) for _ in range(3))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    with_grad = [t.clone().requires_grad_() for t in (q, k, v)]
    heads_first_with_grad = [t.transpose(1, 2) for t in with_grad]
    return {
        "fastattn.attention": lambda: fastattn.attention(q, k, v),
        "fastattn.scaled_dot_product_attention": lambda: fastattn.scaled_dot_product_attention(*heads_first),
        "torch SDPA": lambda: F.scaled_dot_product_attention(*heads_first),
        "fastattn.attention, recording a gradient": lambda: fastattn.attention(*with_grad),
        "torch SDPA, recording a gradient": lambda: F.scaled_dot_product_attention(*heads_first_with_grad),
    }


def panel(row: dict[str, Any]) -> tuple[str, float] | None:
    if row["num_heads"] != row["num_kv_heads"] or row.get("model"):
        return None
    options = {"varlen": row.get("lengths"), "window": row.get("window"), "softcap": row.get("softcap"), "dropout": row.get("dropout_p")}
    words = [name for name, on in {**options, "sinks": row.get("sinks")}.items() if on]
    words = [f"D = {row['head_dim']}", "causal" if row["causal"] else "full", *words]
    return ", ".join(words), sum(row["lengths"]) if row.get("lengths") else row["seqlen"]


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers(ON_CUDA if device.type == "cuda" else ON_CPU, REQUIRES)


SUITE = Suite(
    op="attention",
    presets=PRESETS,
    peers=peers,
    draw=draw,
    reference=reference,
    flops=flops,
    traffic=traffic,
    ceiling=MATMUL,
    overhead=overhead,
    panel=panel,
    x_label="sequence length",
    refuse=refuse_beyond_memory,
    checked=dict.fromkeys(ON_CUDA | ON_CPU, attention_peers.with_known_dropout),
)
