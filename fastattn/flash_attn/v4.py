"""FlashAttention-4's functions (`flash_attn.cute`) on fastattn's kernels.

    from fastattn.flash_attn.v4 import flash_attn_func          # was: from flash_attn.cute import flash_attn_func

Names, arguments, their order and what is returned are FlashAttention-4's: always a pair (out, lse), the LSE None unless return_lse,
float32, a natural logarithm, (B, H, S_q), packed (H, T_q), and differentiable.

Options shared by every function:
    softmax_scale, causal, softcap, deterministic: as in `fastattn.flash_attn`. window_size: (left, right), None or −1 unbounded.
    learnable_sink: (H,), one logit a head that joins the softmax's denominator; gets its gradient.
    num_splits: as in `fastattn.flash_attn.v3`. pack_gqa, and what concerns scheduling: change nothing here.
    qv, gather_kv_indices, score_mod, score_mod_bwd, mask_mod, aux_tensors, aux_scalars, block_sparse_tensors, block_sparse_tensors_bwd:
        NotImplementedError, naming the option. `fastattn.attention`'s attn_bias takes masks and biases as tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import attention

from . import v3
from .v3 import refuse, varlen

__all__ = ["flash_attn_combine", "flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q (B, S_q, H, D) over k (B, S_k, H_kv, D) and v (B, S_k, H_kv, D_v): (B, S_q, H, D_v). Options: see the module."""
    refuse(
        "flash_attn_func", qv=qv, gather_kv_indices=gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd, mask_mod=mask_mod,
        aux_tensors=aux_tensors, aux_scalars=aux_scalars, block_sparse_tensors=block_sparse_tensors,
        block_sparse_tensors_bwd=block_sparse_tensors_bwd,
    )  # fmt: skip
    result = attention(
        q, k, v, causal=causal, window=window_size, softmax_scale=softmax_scale, softcap=softcap, sinks=learnable_sink,
        deterministic=deterministic, return_lse=return_lse,
    )  # fmt: skip
    return result if return_lse else (result, None)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    block_sparse_tensors: Any = None,
    aux_tensors: list[Tensor] | None = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed q (T_q, H, D) over k (T_k, H_kv, D) and v (T_k, H_kv, D_v), or dense ones where cu_seqlens_* are None.

    seqused_k: (B,) int32, how many of its keys each sequence uses. page_table: (B, max_pages) int32; k and v are then
    (num_pages, page_size, H_kv, ·), and seqused_k or cu_seqlens_k says how many keys there are. With either a backward raises.
    seqused_q, seqlen_k_per_split: NotImplementedError.
    """
    op = "flash_attn_varlen_func"
    refuse(
        op, qv=qv, seqused_q=seqused_q, gather_kv_indices=gather_kv_indices, score_mod=score_mod, score_mod_bwd=score_mod_bwd,
        mask_mod=mask_mod, block_sparse_tensors=block_sparse_tensors, aux_tensors=aux_tensors, aux_scalars=aux_scalars,
        seqlen_k_per_split=seqlen_k_per_split,
    )  # fmt: skip
    scores = dict(causal=causal, window=window_size, softmax_scale=softmax_scale, softcap=softcap, sinks=learnable_sink)
    result = varlen(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, page_table, num_splits,
        scores | dict(return_lse=return_lse), dict(deterministic=deterministic),
    )  # fmt: skip
    return result if return_lse else (result, None)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`fastattn.flash_attn.v3.flash_attn_combine`, also of packed parts (N, T, H, D) and (N, T, H); lse is None unless return_lse.

    cu_seqlens says of packed parts where sequences begin, and changes nothing. seqused and virtual_batch_idx: NotImplementedError.
    """
    refuse("flash_attn_combine", seqused=seqused, virtual_batch_idx=virtual_batch_idx)
    merged, lse = v3.flash_attn_combine(out_partial, lse_partial, out, out_dtype)
    return merged, lse if return_lse else None
