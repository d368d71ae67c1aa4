"""The implementations that attention is timed beside, each behind one signature and one layout.

Every one is built for a case and returns `forward(q, k, v) -> out` over (B, S, H, D) tensors; whatever layout it wants inside is a view.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from .timing import describe_error

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Builder = Callable[[int, bool], Forward]  # (seqlen, causal) -> forward


def build_fastattn(seqlen: int, causal: bool) -> Forward:
    return lambda q, k, v: fastattn.attention(q, k, v, causal=causal)


def build_naive(seqlen: int, causal: bool) -> Forward:
    """What one writes first: two matrix products with a softmax between them."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group_size = q.shape[2] // k.shape[2]
        if group_size > 1:
            k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        if causal:
            hidden = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)

    return forward


def sdpa_builder(backend: str | None) -> Builder:
    """torch's scaled_dot_product_attention, held to one backend of torch.nn.attention.SDPBackend, or as torch chooses."""

    def build(seqlen: int, causal: bool) -> Forward:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **grouped).transpose(1, 2)

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return call(q, k, v)

        return call if backend is None else forced

    return build


def build_flex(seqlen: int, causal: bool) -> Forward:
    """FlexAttention, compiled for this one shape, as its users are told to."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # past its recompilation limit, dynamo would run the uncompiled function without an error
    block_mask = None
    if causal:
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen, seqlen, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    return forward


def build_flash_attn(seqlen: int, causal: bool) -> Forward:
    flash_attn_func = _import("flash_attn", "flash_attn_func")
    return lambda q, k, v: flash_attn_func(q, k, v, causal=causal)


def build_flash_attn_4(seqlen: int, causal: bool) -> Forward:
    flash_attn_func = _import("flash_attn.cute", "flash_attn_func")

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return forward


def build_xformers(seqlen: int, causal: bool) -> Forward:
    memory_efficient_attention = _import("xformers.ops", "memory_efficient_attention")
    bias = _import("xformers.ops.fmha.attn_bias", "LowerTriangularMask")() if causal else None
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias)


def _import(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


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
# Needed by a peer's builder; asked for once, so that an absent peer is named once and not in every row.
_REQUIRES = {
    "FlexAttention": ("torch.nn.attention.flex_attention", "flex_attention"),
    "flash-attn": ("flash_attn", "flash_attn_func"),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}


def available(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
    """The implementations that this machine has for this device, fastattn first, and the reason of each one it lacks."""
    present, absent = {}, {}
    for name, builder in (ON_CUDA if device.type == "cuda" else ON_CPU).items():
        try:
            if name in _REQUIRES:
                _import(*_REQUIRES[name])
            present[name] = builder
        except Exception as error:  # a broken binary raises anything from ImportError to OSError; all mean absent
            absent[name] = describe_error(error)
    return present, absent
