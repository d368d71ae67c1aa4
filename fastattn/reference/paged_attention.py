"""Naive paged attention: gather each sequence's keys and values, then attend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention import attention


def gather_pages(cache: Tensor, page_table: Tensor, seqlen: int, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """The first `seqlen` rows (seqlen, H_kv, D) of one sequence, in `dtype`; `scale` (H_kv,) multiplies what is read."""
    page_size = cache.shape[1]
    pages = page_table[: -(-seqlen // page_size)].long()
    rows = cache.view(torch.uint8)[pages].view(cache.dtype) if cache.dtype == torch.float8_e4m3fn else cache[pages]
    rows = rows.flatten(0, 1)[:seqlen].to(dtype)
    return rows if scale is None else rows * scale.to(dtype)[:, None]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`reference.attention` of each sequence over its gathered pages: takes what :func:`fastattn.paged_attention` takes.

    Everything is computed in q's dtype, float64 included; nothing is validated, and ``num_splits`` changes nothing.
    """
    packed = cu_seqlens_q is not None
    starts = cu_seqlens_q.tolist() if packed else [b * q.shape[1] for b in range(q.shape[0] + 1)]
    rows = q if packed else q.flatten(0, 1)
    outs, lses = [], []
    for b, seqlen_k in enumerate(seqlens_k.tolist()):
        k = gather_pages(k_cache, page_table[b], seqlen_k, q.dtype, k_scale)
        v = gather_pages(v_cache, page_table[b], seqlen_k, q.dtype, v_scale)
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = attention(
            rows[None, starts[b] : starts[b + 1]], k[None], v[None], causal=causal, window=window, softmax_scale=softmax_scale,
            softcap=softcap, alibi_slopes=slopes, sinks=sinks, return_lse=True,
        )  # fmt: skip
        outs.append(out[0])
        lses.append(lse[0])
    unused = rows.shape[0] - starts[-1]  # rows of no sequence
    outs.append(rows.new_zeros(unused, q.shape[-2], v_cache.shape[-1]))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lses.append(torch.full((q.shape[-2], unused), -math.inf, dtype=lse_dtype))
    out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    if not packed:
        out = out.unflatten(0, q.shape[:2])
        lse = lse.unflatten(-1, q.shape[:2]).transpose(0, 1)
    return (out, lse) if return_lse else out
