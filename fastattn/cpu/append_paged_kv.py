"""Appending to a paged cache on the CPU: in C++ where it is built, else plain torch, a bounded number of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cpu_operators, in_rows

from .rotary import rotary

cpu_operators.define(
    "append_paged_kv_cpp(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor cache_seqlens, "
    "Tensor? cu_seqlens, Tensor? cos, Tensor? sin, Tensor? k_scale, Tensor? v_scale, bool interleaved) -> ()"
)

_CHUNK_ELEMENTS = 1 << 20


def append_paged_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cache_seqlens: Tensor, cu_seqlens: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    """k, rotated, and v into their slots. Positions lie within the tables, and cu_seqlens within k: the operator has looked."""
    if cpu_operators.available("append_paged_kv_cpp") and (cos is None or cos.dtype == sin.dtype != torch.float64):
        rest = (t if t is None else t.contiguous() for t in (cache_seqlens, cu_seqlens, cos, sin, k_scale, v_scale))
        torch.ops.fastattn.append_paged_kv_cpp(in_rows(k), in_rows(v), k_cache, v_cache, page_table, *rest, interleaved)
        return
    lengths = torch.full(cache_seqlens.shape, k.shape[1]) if cu_seqlens is None else cu_seqlens.diff()
    if k.dim() == 4:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    sequence = torch.repeat_interleave(lengths)  # of each new token
    index = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
    slots = _slots(page_table, cache_seqlens.long()[sequence] + index, sequence, *k_cache.shape[:2])
    step = max(1, _CHUNK_ELEMENTS // max(1, k[:1].numel(), v[:1].numel()))
    for page, slot, position, token in zip(*(t.split(step) for t in slots)):
        new_k = k[token].float()
        if cos is not None:
            new_k, _ = rotary(new_k, new_k[:, :0], cos, sin, position, None, interleaved, False)
        _store(k_cache, page, slot, new_k, k_scale)
        _store(v_cache, page, slot, v[token].float(), v_scale)


def _slots(
    page_table: Tensor, position: Tensor, sequence: Tensor, num_pages: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(page, slot, position, token) of those tokens whose position has a page in the cache."""
    inside = (position >= 0) & (position < page_table.shape[1] * page_size)
    token = inside.nonzero()[:, 0]
    page = page_table[sequence[token], position[token] // page_size].long()
    exists = (page >= 0) & (page < num_pages)
    page, token = page[exists], token[exists]
    return page, position[token] % page_size, position[token], token


def _store(cache: Tensor, page: Tensor, slot: Tensor, x: Tensor, scale: Tensor | None) -> None:
    """x / scale in the cache's dtype: rounded to nearest even and saturated in int8, where a NaN is 0, and float8_e4m3fn."""
    if scale is not None:
        x = x / scale[:, None]
    if cache.dtype == torch.int8:
        x = x.nan_to_num(0.0).round().clamp(-128, 127)
    elif cache.dtype == torch.float8_e4m3fn:
        x = x.clamp(-448, 448).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)
    cache[page, slot] = x.to(cache.dtype)
