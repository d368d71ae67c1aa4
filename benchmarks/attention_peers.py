"""The implementations of attention that are timed, each behind one signature: forward(q, k, v, sinks=None) -> out, over (B, S, H, D)
tensors or packed (T, H, D) ones; whatever layout it wants inside is a view.

What an implementation lacks it says by NotImplementedError, and is left out of the row.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.ops.attention import attend

from .suite import OURS, Builder, Forward, import_name

if TYPE_CHECKING:
    from .bench_attention import Shape


def dropout_seed(device: torch.device) -> Tensor:
    """Of the mask that the check knows."""
    return torch.full((1,), 20240229, dtype=torch.int64, device=device)


@functools.cache
def cu_seqlens(shape: Shape, device: torch.device) -> Tensor:
    """Where the packed sequences begin, and end; of a dense batch too."""
    lengths = shape.lengths or (shape.seqlen,) * shape.batch
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def build_fastattn(shape: Shape) -> Forward:
    def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return fastattn.attention(
            q, k, v, causal=shape.causal, window=(shape.window, None), softcap=shape.softcap, dropout_p=shape.dropout_p, sinks=sinks,
            **(_packed(shape, q.device) if shape.lengths else {}),
        )  # fmt: skip

    return forward


def _packed(shape: Shape, device: torch.device) -> dict[str, Any]:
    """The keywords of packed sequences."""
    starts = cu_seqlens(shape, device)
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": shape.seqlen, "max_seqlen_k": shape.seqlen}


def with_known_dropout(shape: Shape) -> Forward | None:
    """What is held against the reference where a mask is drawn: ours, with a mask that the reference knows. So ours is checked, and a
    peer's dropout is timed on trust. None where nothing is random."""
    if not shape.dropout_p:
        return None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        right = 0 if shape.causal else None
        return attend(q, k, v, window_right=right, dropout_p=shape.dropout_p, dropout_seed=dropout_seed(q.device))[0]

    return forward


def _lacks(shape: Shape, **options: str) -> None:
    """Raises where the shape has an option that the implementation does not."""
    for name, word in options.items():
        if getattr(shape, name):
            raise NotImplementedError(f"has no {word}")


# --------------------------------------------------------------------------------------------------------------------
# In torch.


def visible(shape: Shape, seqlen: int, device: torch.device) -> Tensor:
    """The causal or windowed mask of one sequence, (S, S), True = seen."""
    seen = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).tril()
    return seen if shape.window is None else seen.triu(-shape.window)


def _one_by_one(shape: Shape, forward: Forward) -> Forward:
    """Packed sequences by a call each."""

    def loop(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        parts = zip(*(t.split(shape.lengths) for t in (q, k, v)))
        return torch.cat([forward(*(t[None] for t in part), *rest)[0] for part in parts])

    return loop if shape.lengths else forward


def build_naive(shape: Shape) -> Forward:
    """What one writes first: two matrix products with a softmax between them."""

    def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        group_size = q.shape[2] // k.shape[2]
        if group_size > 1:
            k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        if shape.causal:
            scores = scores.masked_fill(~visible(shape, q.shape[2], q.device), -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
        if shape.dropout_p:
            weights = F.dropout(weights, shape.dropout_p)
        return (weights @ v).transpose(1, 2)

    return _one_by_one(shape, forward)


def build_compiled(shape: Shape) -> Forward:
    torch.compiler.reset()  # past its recompilation limit, dynamo would run the uncompiled function without an error
    return torch.compile(build_naive(shape), dynamic=False, fullgraph=True)


def sdpa_builder(backend: str | None) -> Builder:
    """torch's scaled_dot_product_attention, held to one backend of torch.nn.attention.SDPBackend, or as torch chooses."""

    def build(shape: Shape) -> Forward:
        _lacks(shape, softcap="softcap", sinks="sinks")
        mask = functools.cache(functools.partial(visible, shape))

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options: dict[str, Any] = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
            options |= {"is_causal": shape.causal} if shape.window is None else {"attn_mask": mask(q.shape[1], q.device)}
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, dropout_p=shape.dropout_p, **options).transpose(1, 2)

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return call(q, k, v)

        return _one_by_one(shape, call if backend is None else forced)

    return build


def build_flex(shape: Shape) -> Forward:
    """FlexAttention, compiled for this one shape, as its users are told to; packed sequences as documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _lacks(shape, dropout_p="dropout", sinks="sinks of its own")
    torch.compiler.reset()
    tokens = sum(shape.lengths) or shape.seqlen
    documents = torch.repeat_interleave(torch.tensor(shape.lengths or (tokens,), device="cuda"))
    left = tokens if shape.window is None else shape.window

    def seen(b, h, i, j):
        return (i >= j) & (i - j <= left) & (documents[i] == documents[j])

    def capped(score, b, h, i, j):
        return shape.softcap * torch.tanh(score / shape.softcap)

    block_mask = create_block_mask(seen, None, None, tokens, tokens, device="cuda") if shape.causal else None
    score_mod = capped if shape.softcap else None
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[-2] != k.shape[-2]
        q, k, v = (t.view(-1, tokens, *t.shape[-2:]).transpose(1, 2) for t in (q, k, v))
        out = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)
        return out[0] if shape.lengths else out

    return forward


def build_varlen_attn(shape: Shape) -> Forward:
    """torch's own over packed sequences; a dense batch is packed, which is a view."""
    _lacks(shape, softcap="softcap", dropout_p="dropout", sinks="sinks")
    function = import_name("torch.nn.attention.varlen", "varlen_attn")
    window = (-1 if shape.window is None else shape.window, 0) if shape.causal else (-1, -1)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat, starts = [t.flatten(0, -3) for t in (q, k, v)], cu_seqlens(shape, q.device)
        grouped = {"enable_gqa": True} if q.shape[-2] != k.shape[-2] else {}
        return function(*flat, starts, starts, shape.seqlen, shape.seqlen, window_size=window, **grouped).view_as(q)

    return forward


# --------------------------------------------------------------------------------------------------------------------
# Of others.


def _flash_options(shape: Shape) -> dict[str, Any]:
    """As every flash-attn since the second calls them; options that are off are not passed, since not every one has them."""
    options: dict[str, Any] = {"causal": shape.causal}
    options |= {} if shape.window is None else {"window_size": (shape.window, 0)}
    options |= {"softcap": shape.softcap} if shape.softcap else {}
    return options | ({"dropout_p": shape.dropout_p} if shape.dropout_p else {})


def _flash_builder(module: str, varlen: str, sinks: str | None = None, **lacking: str) -> Builder:
    """A module with flash_attn_func, and a function for packed sequences; `sinks`: what it calls them."""

    def build(shape: Shape) -> Forward:
        _lacks(shape, **lacking, **({} if sinks else {"sinks": "sinks"}))
        dense, packed, options = import_name(module, "flash_attn_func"), import_name(module, varlen), _flash_options(shape)

        def forward(q: Tensor, k: Tensor, v: Tensor, *sink: Tensor) -> Tensor:
            named = {sinks: sink[0]} if sink else {}
            lengths = _packed(shape, q.device) if shape.lengths else {}
            result = (packed if lengths else dense)(q, k, v, **lengths, **options, **named)
            return result[0] if isinstance(result, tuple) else result

        return forward

    return build


build_flash_attn = _flash_builder("flash_attn", "flash_attn_varlen_func")
build_flash_attn_3 = _flash_builder("flash_attn_interface", "flash_attn_varlen_func", dropout_p="dropout")
build_flash_attn_4 = _flash_builder("flash_attn.cute", "flash_attn_varlen_func", sinks="learnable_sink", dropout_p="dropout")


def build_xformers(shape: Shape) -> Forward:
    _lacks(shape, softcap="softcap", sinks="sinks")
    function = import_name("xformers.ops", "memory_efficient_attention")
    biases = import_name("xformers.ops.fmha", "attn_bias")
    if shape.lengths:
        bias = biases.BlockDiagonalCausalMask.from_seqlens(list(shape.lengths), device="cuda")
    elif shape.window is not None:
        bias = biases.LowerTriangularFromBottomRightLocalAttentionMask(shape.window + 1)
    else:
        bias = biases.LowerTriangularMask() if shape.causal else None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dense = [t.view(-1, *t.shape[-3:]) for t in (q, k, v)]
        return function(*dense, attn_bias=bias, p=shape.dropout_p).view_as(q)

    return forward


def build_flashinfer(shape: Shape) -> Forward:
    """Forward only. Its plan is made once, as a serving engine makes it once for all layers."""
    _lacks(shape, dropout_p="dropout", sinks="sinks in this wrapper")
    wrapper = import_name("flashinfer", "BatchPrefillWithRaggedKVCacheWrapper")

    @functools.cache
    def planned(dtype: torch.dtype, device: torch.device) -> Any:
        made, starts = wrapper(torch.empty(256 << 20, dtype=torch.uint8, device=device), "NHD"), cu_seqlens(shape, device)
        made.plan(
            starts, starts, shape.num_heads, shape.num_kv_heads, shape.head_dim, causal=shape.causal,
            window_left=-1 if shape.window is None else shape.window, logits_soft_cap=shape.softcap or None, q_data_type=dtype,
        )  # fmt: skip
        return made

    @torch.no_grad()
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return planned(q.dtype, q.device).run(*(t.flatten(0, -3) for t in (q, k, v))).view_as(q)

    return forward


def build_vllm(shape: Shape) -> Forward:
    """Forward only: its build of flash-attn, over packed sequences."""
    _lacks(shape, dropout_p="dropout", sinks="sinks in this build")
    function = import_name("vllm.vllm_flash_attn", "flash_attn_varlen_func")
    options = _flash_options(shape)

    @torch.no_grad()
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(*(t.flatten(0, -3) for t in (q, k, v)), **_packed(shape, q.device), **options).view_as(q)

    return forward


ON_CPU: dict[str, Builder] = {
    OURS: build_fastattn,
    "naive": build_naive,
    "SDPA": sdpa_builder(None),
}
ON_CUDA: dict[str, Builder] = {
    OURS: build_fastattn,
    "naive": build_naive,
    "naive, compiled": build_compiled,
    "SDPA flash": sdpa_builder("FLASH_ATTENTION"),
    "SDPA cuDNN": sdpa_builder("CUDNN_ATTENTION"),
    "SDPA efficient": sdpa_builder("EFFICIENT_ATTENTION"),
    "SDPA math": sdpa_builder("MATH"),
    "FlexAttention": build_flex,
    "torch varlen_attn": build_varlen_attn,
    "flash-attn": build_flash_attn,
    "flash-attn-3": build_flash_attn_3,
    "flash-attn-4": build_flash_attn_4,
    "xformers": build_xformers,
    "FlashInfer": build_flashinfer,
    "vLLM": build_vllm,
}
REQUIRES = {
    "FlexAttention": ("torch.nn.attention.flex_attention", "flex_attention"),
    "torch varlen_attn": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn": ("flash_attn", "flash_attn_func"),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_func"),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
    "FlashInfer": ("flashinfer", "BatchPrefillWithRaggedKVCacheWrapper"),
    "vLLM": ("vllm.vllm_flash_attn", "flash_attn_varlen_func"),
}
