"""Attention against naive attention and every other implementation at hand."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .suite import MATMUL, Builder, Forward, Suite, find_peers, import_name
from .verification import TENSORS, reference_results


@dataclass(frozen=True)
class Shape:
    """Self-attention: S_q = S_k, D_v = D."""

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool

    def id(self, dtype: str) -> str:
        heads = f"H{self.num_heads}" + ("" if self.num_kv_heads == self.num_heads else f"-Hkv{self.num_kv_heads}")
        mask = "causal" if self.causal else "full"
        return f"B{self.batch}-S{self.seqlen}-{heads}-D{self.head_dim}-{dtype}-{mask}"


def _grid(tokens: int, seqlens: Sequence[int], heads_of: dict[int, int]) -> list[Shape]:
    """{D: H} × causal or not × seqlens, `tokens` tokens in each batch."""
    return [
        Shape(max(1, tokens // seqlen), seqlen, num_heads, num_heads, head_dim, causal)
        for head_dim, num_heads in heads_of.items()
        for causal in (True, False)
        for seqlen in seqlens
    ]


_CUDA_HEADS = {64: 32, 128: 16}  # hidden size 2048 and 16k tokens: the shapes published figures use
_LLAMA = Shape(2, 8192, 32, 8, 128, True)
PRESETS = {
    ("cpu", "tiny"): _grid(64, (32, 64), {16: 2}),
    ("cpu", "quick"): _grid(1, (512, 1024, 2048), {64: 8}) + [Shape(1, 1024, 8, 2, 128, True)],
    ("cpu", "full"): _grid(1, (512, 1024, 2048, 4096, 8192), {64: 8, 128: 8}) + [Shape(1, 2048, 32, 8, 128, True)],
    ("cuda", "tiny"): _grid(512, (256, 512), {64: 2}),
    ("cuda", "quick"): _grid(16384, (1024, 4096, 16384), _CUDA_HEADS) + [_LLAMA],
    ("cuda", "full"): _grid(16384, (512, 1024, 2048, 4096, 8192, 16384), _CUDA_HEADS) + [_LLAMA],
}


def flops(shape: Shape, which: str, itemsize: int = 0) -> float:
    # 4·B·H·S_q·S_k·D, half of it when causal; the backward pass 2.5 times that (five products beside the forward's two)
    forward = 4 * shape.batch * shape.num_heads * shape.seqlen**2 * shape.head_dim * (0.5 if shape.causal else 1.0)
    return forward * {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[which]


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, and out's upstream gradient; random data, since zeros run faster than real data."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(num_heads: int) -> Tensor:
        size = (shape.batch, shape.seqlen, num_heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs = [randn(heads).requires_grad_() for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
    return inputs, [randn(shape.num_heads)]


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return dict(zip(TENSORS, reference_results(*inputs, *upstream, shape.causal, dtype), strict=True))


def refuse_beyond_memory(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """CUDA refuses an allocation by itself; a CPU process that asks for too much is killed."""
    if device.type == "cpu":
        need = (
            12 * shape.batch * shape.num_heads * shape.seqlen**2 * dtype.itemsize
        )  # S × S matrices alive in a backward
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
    if row["num_heads"] != row["num_kv_heads"]:
        return None
    return f"D = {row['head_dim']}, {'causal' if row['causal'] else 'full'}", row["seqlen"]


# --------------------------------------------------------------------------------------------------------------------
# The implementations, each behind one signature and one layout: forward(q, k, v) -> out over (B, S, H, D) tensors; whatever layout
# it wants inside is a view.


def build_fastattn(shape: Shape) -> Forward:
    return lambda q, k, v: fastattn.attention(q, k, v, causal=shape.causal)


def build_naive(shape: Shape) -> Forward:
    """What one writes first: two matrix products with a softmax between them."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group_size = q.shape[2] // k.shape[2]
        if group_size > 1:
            k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        if shape.causal:
            hidden = torch.ones(shape.seqlen, shape.seqlen, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)

    return forward


def sdpa_builder(backend: str | None) -> Builder:
    """torch's scaled_dot_product_attention, held to one backend of torch.nn.attention.SDPBackend, or as torch chooses."""

    def build(shape: Shape) -> Forward:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, **grouped).transpose(1, 2)

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return call(q, k, v)

        return call if backend is None else forced

    return build


def build_flex(shape: Shape) -> Forward:
    """FlexAttention, compiled for this one shape, as its users are told to."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # past its recompilation limit, dynamo would run the uncompiled function without an error
    block_mask = None
    if shape.causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.seqlen, shape.seqlen, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    return forward


def build_flash_attn(shape: Shape) -> Forward:
    flash_attn_func = import_name("flash_attn", "flash_attn_func")
    return lambda q, k, v: flash_attn_func(q, k, v, causal=shape.causal)


def build_flash_attn_4(shape: Shape) -> Forward:
    flash_attn_func = import_name("flash_attn.cute", "flash_attn_func")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=shape.causal)
        return result[0] if isinstance(result, tuple) else result

    return forward


def build_xformers(shape: Shape) -> Forward:
    memory_efficient_attention = import_name("xformers.ops", "memory_efficient_attention")
    bias = import_name("xformers.ops.fmha.attn_bias", "LowerTriangularMask")() if shape.causal else None
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias)


ON_CPU: dict[str, Builder] = {
    "fastattn": build_fastattn,
    "naive": build_naive,
    "SDPA": sdpa_builder(None),
}
ON_CUDA: dict[str, Builder] = {
    "fastattn": build_fastattn,
    "naive": build_naive,
    "SDPA flash": sdpa_builder("FLASH_ATTENTION"),
    "SDPA cuDNN": sdpa_builder("CUDNN_ATTENTION"),
    "SDPA efficient": sdpa_builder("EFFICIENT_ATTENTION"),
    "SDPA math": sdpa_builder("MATH"),
    "FlexAttention": build_flex,
    "flash-attn": build_flash_attn,
    "flash-attn-4": build_flash_attn_4,
    "xformers": build_xformers,
}
REQUIRES = {
    "FlexAttention": ("torch.nn.attention.flex_attention", "flex_attention"),
    "flash-attn": ("flash_attn", "flash_attn_func"),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}


def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    return find_peers(ON_CUDA if device.type == "cuda" else ON_CPU, REQUIRES)


SUITE = Suite(
    op="attention",
    presets=PRESETS,
    peers=peers,
    draw=draw,
    reference=reference,
    work=flops,
    ceiling=MATMUL,
    overhead=overhead,
    panel=panel,
    x_label="sequence length",
    refuse=refuse_beyond_memory,
)
