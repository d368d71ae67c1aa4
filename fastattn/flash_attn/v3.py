"""FlashAttention-3's functions (`flash_attn_interface` of flash-attention's hopper/) on fastattn's kernels.

    from fastattn.flash_attn.v3 import flash_attn_func          # was: from flash_attn_interface import flash_attn_func

Names, arguments, their order and what is returned are FlashAttention-3's: `out`, or with return_attn_probs `(out, softmax_lse)`, the LSE
float32, a natural logarithm, (B, H, S_q), packed (H, T_q).

Options shared by every function:
    softmax_scale, causal, window_size, softcap, deterministic: as in `fastattn.flash_attn`.
    num_splits: into how many parts a paged call's keys are cut; without pages no keys are split. pack_gqa, sm_margin, scheduler_metadata
        concern how FlashAttention-3 lays out its work, and change nothing here.
    qv, attention_chunk, q_descale, k_descale, v_descale: NotImplementedError, naming the option.

What is not FlashAttention-3's limit here: the GPU (no Hopper needed), float32, any head_dim from 1 to 512 and v's own, an LSE with a
gradient. There is no float8 attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.attention import attention
from fastattn.ops.merge_attention import merge_attention
from fastattn.ops.paged_attention import as_cache, paged_attention

from . import kv_cache

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def refuse(op: str, **options: Any) -> None:
    """Raise NotImplementedError for the first option that is set: not None, 0 or False."""
    for name, option in options.items():
        if option is not None and (isinstance(option, Tensor) or option):
            raise NotImplementedError(f"{op}: {name} is not supported")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, S_q, H, D) over k (B, S_k, H_kv, D) and v (B, S_k, H_kv, D_v): (B, S_q, H, D_v). Options: see the module."""
    refuse("flash_attn_func", qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    return attention(
        q, k, v, causal=causal, window=window_size, softmax_scale=softmax_scale, softcap=softcap, deterministic=deterministic,
        return_lse=return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` of qkv (B, S, 3, H, D), or (B, S, H + 2·H_kv, D) with num_heads_q = H, read where it lies."""
    op = "flash_attn_qkvpacked_func"
    checks.check_tensor(op, "qkv", qkv)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k, v = qkv.unbind(2)
    elif qkv.dim() == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        kv_heads = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, kv_heads, kv_heads], dim=2)
    else:
        must = "have shape (B, S, 3, H, D), or (B, S, H + 2·H_kv, D) with num_heads_q = H"
        checks.reject(op, "qkv", must, f"{checks.shape(qkv)}, num_heads_q = {num_heads_q}")
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed q (T_q, H, D) over k (T_k, H_kv, D) and v (T_k, H_kv, D_v), sequence by sequence: (T_q, H, D_v).

    seqused_k: (B,) int32, how many of its keys each sequence uses; a backward then raises. seqused_q: NotImplementedError.
    """
    op = "flash_attn_varlen_func"
    refuse(
        op, seqused_q=seqused_q, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk
    )
    scores = dict(causal=causal, window=window_size, softmax_scale=softmax_scale, softcap=softcap, return_lse=return_attn_probs)
    return varlen(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, None, num_splits, scores,
        dict(deterministic=deterministic),
    )  # fmt: skip


def varlen(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None,
    max_seqlen_k: int | None, seqused_k: Tensor | None, page_table: Tensor | None, num_splits: int, scores: dict[str, Any],
    training: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Versions 3 and 4's packed, paged and partly used keys alike. scores: options that all calls take; training: those of `attention`."""
    if seqused_k is None and page_table is None:
        lengths = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        if cu_seqlens_q is not None:
            lengths |= dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
        return attention(q, k, v, **lengths, **scores, **training)
    if seqused_k is None:
        if cu_seqlens_k is None:
            checks.reject(op, "seqused_k", "be given with page_table", "None")
        seqused_k = cu_seqlens_k.diff()
    if page_table is None:
        k, v, page_table = as_cache(op, k, v, cu_seqlens_k, max_seqlen_k, seqused_k)
    queries = {} if cu_seqlens_q is None else dict(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q)
    return paged_attention(q, k, v, page_table, seqused_k, num_splits=num_splits, **queries, **scores)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None, None]:
    """`fastattn.flash_attn.flash_attn_with_kvcache` by FlashAttention-3's names: page_table is its block_table.

    Returns out, or with return_softmax_lse (out, softmax_lse, out_accum, softmax_lse_accum), of which the last two, FlashAttention-3's
    parts before they are combined, are None. cu_seqlens_q, with packed q (T_q, H, D), needs a page_table and takes no new k and v.
    cu_seqlens_k_new and rotary_seqlens: NotImplementedError.
    """
    op = "flash_attn_with_kvcache"
    refuse(
        op, qv=qv, cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale, attention_chunk=attention_chunk,
    )  # fmt: skip
    if cu_seqlens_q is not None:
        no_place = dict(
            k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad
        )
        for name, option in no_place.items():
            if option is not None:
                raise NotImplementedError(f"{op}: {name} with cu_seqlens_q is not supported")
        if page_table is None or not isinstance(cache_seqlens, Tensor):
            raise NotImplementedError(f"{op}: cu_seqlens_q without page_table and a tensor of cache_seqlens is not supported")
        out, lse = paged_attention(
            q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, causal=causal,
            window=window_size, softmax_scale=softmax_scale, softcap=softcap, num_splits=num_splits, return_lse=True,
        )  # fmt: skip
    else:
        out, lse = kv_cache.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, page_table, softmax_scale,
            causal, window_size, softcap, rotary_interleaved, None, num_splits, return_softmax_lse=True,
        )  # fmt: skip
    return (out, lse, None, None) if return_softmax_lse else out


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The attention over all keys from N parts: out_partial (N, B, S, H, D), lse_partial (N, B, S, H), any strides.

    Returns (out, lse), (B, S, H, D) in out_dtype (out_partial's by default) or written to `out`, and (B, S, H): the axes of an LSE are in
    another order here than elsewhere, as they are in FlashAttention-3.
    """
    checks.check_tensor("flash_attn_combine", "lse_partial", lse_partial)
    merged, lse = merge_attention(out_partial, lse_partial.transpose(-1, -2))
    if out is not None:
        merged = out.copy_(merged)
    elif out_dtype is not None:
        merged = merged.to(out_dtype)
    return merged, lse.transpose(-1, -2)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """What FlashAttention-3 schedules ahead of a decoding step: here nothing, an empty int32 tensor on cache_seqlens' device."""
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)
