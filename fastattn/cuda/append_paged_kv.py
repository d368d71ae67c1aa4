"""Appending to a paged cache in CUDA C++ (csrc/cuda/append_paged_kv.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cuda_operators, in_rows

cuda_operators.define(
    "append_paged_kv_cuda(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor cache_seqlens, "
    "Tensor? cu_seqlens, Tensor? cos, Tensor? sin, Tensor? k_scale, Tensor? v_scale, bool interleaved) -> ()"
)

FEW_TOKENS = 64


def limit(k: Tensor, cos: Tensor | None, sin: Tensor | None) -> str | None:
    """What of a call the kernel does not do, or None."""
    if not cuda_operators.available("append_paged_kv_cuda", k):
        return cuda_operators.nothing
    if cos is not None and (cos.dtype == torch.float64 or cos.dtype != sin.dtype):
        return "tables in float64, or of two dtypes"
    return None


def is_chosen(k: Tensor) -> bool:
    """Where launching takes longer than the tokens: C++ needs a fraction of what Python does to launch."""
    return k.shape[:-2].numel() <= FEW_TOKENS


def append_paged_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cache_seqlens: Tensor, cu_seqlens: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    """As the Triton kernel's, within the limits above."""
    k, v, page_table, cos, sin = (t if t is None else in_rows(t) for t in (k, v, page_table, cos, sin))
    whole = (t if t is None else t.contiguous() for t in (cache_seqlens, cu_seqlens))
    scales = (t if t is None else t.contiguous() for t in (k_scale, v_scale))
    torch.ops.fastattn.append_paged_kv_cuda(k, v, k_cache, v_cache, page_table, *whole, cos, sin, *scales, interleaved)
