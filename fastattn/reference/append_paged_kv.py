"""The oracle of appending to a paged cache: token by token, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.rotary import apply_rotary


def append_paged_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """New token i of sequence b goes to position p = cache_seqlens[b] + i: slot p % page_size of page page_table[b, p // page_size]."""
    num_pages, page_size = k_cache.shape[:2]
    for b, length in enumerate(cache_seqlens.tolist()):
        new = slice(None) if cu_seqlens is None else slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        new_k, new_v = (x[b] if cu_seqlens is None else x[new] for x in (k, v))
        for i in range(new_k.shape[0]):
            position = length + i
            page = int(page_table[b, position // page_size]) if 0 <= position < page_table.shape[1] * page_size else -1
            if not 0 <= page < num_pages:
                continue
            one_k = new_k[None, i]
            if cos is not None:
                at = torch.tensor([position], device=k.device)
                one_k, _ = apply_rotary(one_k, one_k, cos, sin, interleaved=interleaved, positions=at)
            for x, cache, scale in ((one_k[0], k_cache, k_scale), (new_v[i], v_cache, v_scale)):
                cache[page, position % page_size] = _stored(x, cache.dtype, scale)


def _stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """x / scale, rounded to nearest even and saturated where dtype is int8 or float8_e4m3fn."""
    x = x if scale is None else x / scale[:, None]
    if dtype == torch.int8:
        return x.nan_to_num(0.0).clamp(-128, 127).round().to(dtype)
    if dtype == torch.float8_e4m3fn:
        return x.float().clamp(-448, 448).to(dtype)
    return x.to(dtype)
