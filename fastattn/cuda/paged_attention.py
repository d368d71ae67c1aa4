"""Attention over a paged cache in CUDA C++ (csrc/cuda/paged_attention.cu), for decoding and speculation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cuda_operators, in_rows

cuda_operators.define(
    "paged_attention_cuda(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seqlens_k, Tensor? cu_seqlens_q, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? leftpad, int max_seqlen_q, int? window_left, "
    "int? window_right, float softmax_scale, float softcap, int num_splits) -> (Tensor out, Tensor lse)"
)

FEW_ROWS = 16  # queries times heads of a group: one tile


def limit(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """What of a call the kernel does not do, or None."""
    if not cuda_operators.available("paged_attention_cuda", q):
        return cuda_operators.nothing
    if k_cache.dtype != q.dtype:
        return "a quantised cache"
    head_dim, itemsize = q.shape[-1], q.element_size()
    if v_cache.shape[-1] != head_dim or head_dim * itemsize % 16 != 0 or head_dim * itemsize > 512:
        return "a D_v that is not D, or a D that is no multiple of 16 bytes, or above 512"
    for cache in (k_cache, v_cache):
        strides = (stride for size, stride in zip(cache.shape, cache.stride()[:3]) if size > 1)
        if cache.data_ptr() % 16 != 0 or any(stride * itemsize % 16 != 0 for stride in strides):
            return "rows of a cache that do not begin at multiples of 16 bytes"
    return None


def is_chosen(q: Tensor, k_cache: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int, num_splits: int) -> bool:
    """Where a tile has all of a group's queries: one launch of it merges its own splits, and more rows are for Triton's larger tiles.

    Not in a packed batch of a fixed split, which promises a sequence the same bits in any company: max_seqlen_q is the company's.
    """
    if cu_seqlens_q is not None and num_splits > 0:
        return False
    return max_seqlen_q * (q.shape[-2] // k_cache.shape[2]) <= FEW_ROWS


def paged_attention(
    q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, *rest
) -> tuple[Tensor, Tensor]:
    """As the Triton kernel's, within the limits above."""
    in_fp32 = (t if t is None else t.float() for t in (alibi_slopes, sinks, k_scale, v_scale))
    return torch.ops.fastattn.paged_attention_cuda(in_rows(q), k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, *in_fp32, *rest)
