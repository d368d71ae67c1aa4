"""Paged attention on the CPU. Few queries, as decoding has them, are csrc/cpu/paged_attention.cpp's where it is built, which reads each key
and value once, where it lies. Otherwise `cpu.attention` over a bounded number of keys at a time, and the running merge of what that gives.

Sequences with equally many queries go together, as many as make a chunk; a chunk of keys is read from their pages, attended to by a
chunk of the queries, and let go. So the memory used is a few chunks, however long the sequences. A chunk that lies in one page of one
sequence is read where it lies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.extensions import cpu_operators

from . import attention as dense

_CHUNK_ELEMENTS = 1 << 19  # of keys, and as many of values: what a core's cache holds, between being gathered and being read
_CHUNK_KEYS = 512  # at least: fewer, and the fixed cost of a chunk shows
_CHUNK_KEYS_AT_MOST = 4096
_CHUNK_SCORES = 1 << 20  # that a bias is made for, of all rows, keys, and with ALiBi heads
_COMPILED_ROWS = 64  # up to so many queries times heads of a group; of more, torch's products take no longer
_FOLDED_ROWS = 128  # up to so many, the heads of a group become rows of one product over the keys they share


cpu_operators.define(
    "paged_attention_cpp(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seqlens_k, Tensor? cu_seqlens_q, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? leftpad, int max_seqlen_q, int? window_left, "
    "int? window_right, float softmax_scale, float softcap) -> (Tensor out, Tensor lse)"
)


class _Options(NamedTuple):
    """What comes between the scores and the softmax. slopes: (H,) or (b, H); left and right: None where unbounded."""

    slopes: Tensor | None
    left: int | None
    right: int | None
    scale: float
    softcap: float


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    cu_seqlens_q: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    leftpad: Tensor | None,
    max_seqlen_q: int,
    window_left: int | None,
    window_right: int | None,
    softmax_scale: float,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """The operator's contract on CPU tensors; page ids that count are taken to be valid. num_splits changes nothing here."""
    if cpu_operators.available("paged_attention_cpp") and max_seqlen_q * (q.shape[-2] // k_cache.shape[2]) <= _COMPILED_ROWS:
        floats = map(dense.contiguous_floats, (alibi_slopes, sinks, k_scale, v_scale))
        return torch.ops.fastattn.paged_attention_cpp(
            q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, *floats, leftpad, max_seqlen_q, window_left, window_right,
            softmax_scale, softcap,
        )  # fmt: skip
    packed, num_heads, page_size = cu_seqlens_q is not None, q.shape[-2], k_cache.shape[1]
    pads = [0] * len(seqlens_k) if leftpad is None else leftpad.tolist()
    seqlens = [length - pad for length, pad in zip(seqlens_k.tolist(), pads, strict=True)]
    starts = cu_seqlens_q.tolist() if packed else []
    seqlens_q = [stop - start for start, stop in itertools.pairwise(starts)] if packed else [max_seqlen_q] * len(seqlens)
    out = q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    lse = torch.full((num_heads, q.shape[0]) if packed else (q.shape[0], num_heads, max_seqlen_q), -math.inf)
    if sinks is not None:  # of a query that sees no key, and so is in no group
        (lse[:, : starts[-1]] if packed else lse).copy_(sinks[:, None])

    keys = min(_CHUNK_KEYS_AT_MOST, max(_CHUNK_KEYS, _CHUNK_ELEMENTS // max(1, k_cache.shape[-2:].numel())))
    alone = page_size > keys or leftpad is not None or num_splits > 0  # a fixed split: the same bits in any company
    for batch in _groups(seqlens_q, seqlens, 1 if alone else keys):
        lengths, pad, seqlen_q, table = [seqlens[b] for b in batch], pads[batch[0]], seqlens_q[batch[0]], page_table[batch]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[batch]
        options = _Options(slopes, window_left, window_right, softmax_scale, softcap)
        step = max(_CHUNK_KEYS, keys // len(batch))
        num_rows = max(1, _CHUNK_SCORES // (len(batch) * step * (1 if slopes is None else num_heads)))
        for start_q in range(0, seqlen_q, num_rows):
            rows = range(start_q, min(start_q + num_rows, seqlen_q))
            visible = [_visible_keys(rows, seqlen_q, length, window_left, window_right) for length in lengths]
            used = [(first + pad, length + pad) for (first, _), length in zip(visible, lengths, strict=True)]
            if packed:
                at = torch.tensor([starts[b] for b in batch])[:, None] + torch.arange(rows.start, rows.stop)
            else:
                at = slice(None) if batch == list(range(len(seqlens))) else batch, slice(rows.start, rows.stop)
            q_ = q[at]
            results: tuple[Tensor, Tensor] | None = None
            ends = min(first for first, _ in visible) + pad, max(last for _, last in visible) + pad
            for start, stop in _chunks(*ends, step, page_size):
                place = _place(table, start, stop, used, page_size)
                k, v = _read(k_cache, place, k_scale, q.dtype), _read(v_cache, place, v_scale, q.dtype)
                part = _attend(q_, k, v, start - pad, rows, seqlen_q, lengths, options)
                results = part if results is None else _merge(*results, *part)
            if results is None:  # these rows see no key
                continue
            out_, lse_ = results if sinks is None else _add_sinks(*results, sinks)
            out[at] = out_.to(q.dtype)
            if packed:
                lse[:, at] = lse_.transpose(0, 1)
            else:
                lse[at[0], :, at[1]] = lse_
    return out, lse


def _visible_keys(rows: range, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> tuple[int, int]:
    """(first, last + 1) of the keys that any of these rows sees."""
    shift = seqlen_k - seqlen_q
    first = 0 if left is None else max(0, rows.start + shift - left)
    last = seqlen_k if right is None else max(0, min(seqlen_k, rows.stop + shift + right))
    return min(first, last), last


def _groups(seqlens_q: list[int], seqlens_k: list[int], keys: int) -> Iterator[list[int]]:
    """Every sequence that has a query and a key, longest first, in groups of equally many queries and about `keys` keys a chunk."""
    order = [b for b, (queries, length) in enumerate(zip(seqlens_q, seqlens_k, strict=True)) if queries > 0 and length > 0]
    order.sort(key=lambda b: (-seqlens_q[b], -seqlens_k[b]))
    while order:
        most = max(1, keys // min(seqlens_k[order[0]], _CHUNK_KEYS))
        together = [b for b in order[:most] if seqlens_q[b] == seqlens_q[order[0]]]
        order = order[len(together) :]
        yield together


def _chunks(start: int, stop: int, step: int, page_size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in chunks of about `step` keys: whole pages, or parts of one page where it is larger."""
    while start < stop:
        page_start = start // page_size * page_size
        if page_size > step:
            end = min(start + step, page_start + page_size)
        else:
            end = page_start + max(1, step // page_size) * page_size
        yield start, min(end, stop)
        start = end


# Reading a chunk.


class _Place(NamedTuple):
    """Where a chunk lies: rows `rows` of these pages, side by side, of each sequence; and what of it is outside what a sequence uses."""

    pages: Tensor | int  # (b, n) or the one there is
    rows: slice
    outside: list[tuple[int, slice]]


def _place(table: Tensor, start: int, stop: int, used: list[tuple[int, int]], page_size: int) -> _Place:
    """Keys start … stop of each sequence, of which those in [from, upto) are in use. Other entries may be anything: not looked at."""
    first, last = start // page_size, (stop - 1) // page_size + 1
    rows = slice(start - first * page_size, stop - first * page_size)
    if len(used) == 1 and last - first == 1:
        return _Place(int(table[0, first]), rows, [])
    pages, outside = table[:, first:last], []
    if not all(from_ < (first + 1) * page_size and upto > (last - 1) * page_size for from_, upto in used):
        place, (from_, upto) = torch.arange(first, last) * page_size, torch.tensor(used).T[..., None]
        pages = pages.masked_fill((place + page_size <= from_) | (place >= upto), 0)
    for b, (from_, upto) in enumerate(used):
        parts = slice(0, max(0, from_ - start)), slice(max(0, upto - start), stop - start)
        outside += [(b, part) for part in parts if part.start < part.stop]
    return _Place(pages, rows, outside)


def _read(cache: Tensor, place: _Place, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A chunk's keys or values (b, n, H_kv, D), in q's dtype or float32; zero outside, where there may be NaN, and 0·NaN is NaN."""
    if isinstance(place.pages, int):
        rows = cache[place.pages, place.rows].unsqueeze(0)
    else:
        values = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache  # torch gathers bytes
        rows = values.index_select(0, place.pages.flatten()).view(cache.dtype)  # six times as fast as values[pages]
        rows = rows.view(len(place.pages), -1, *cache.shape[2:])[:, place.rows]
        for b, part in place.outside:
            rows[b, part].view(torch.uint8).zero_()
    if scale is not None or rows.dtype != dtype:
        rows = rows.float() if scale is None else rows.float() * scale.float()[:, None]
    return rows


# Attending to it.


def _attend(
    q: Tensor, k: Tensor, v: Tensor, start: int, rows: range, seqlen_q: int, lengths: list[int], options: _Options
) -> tuple[Tensor, Tensor]:
    """out (b, R, H, D_v) and lse (b, H, R) of q (b, R, H, D), `rows` of each sequence's seqlen_q, over keys start … of each sequence."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    group = num_heads // num_kv_heads
    bias = _bias(start, k.shape[1], rows, seqlen_q, lengths, options)
    q = q.to(k.dtype)
    folds = 1 < group and group * len(rows) <= _FOLDED_ROWS
    if folds:  # (b, R, H_kv·G, D) to (b, G·R, H_kv, D), and (b, H_kv·G or 1, R, keys) to (b, H_kv or 1, G·R, keys)
        q = q.unflatten(2, (num_kv_heads, group)).permute(0, 3, 1, 2, 4).flatten(1, 2)
        if bias is not None:
            by_group = (num_kv_heads, group) if options.slopes is not None else (1, 1)
            bias = bias.unflatten(1, by_group).expand(-1, -1, group, -1, -1).flatten(2, 3)
    out, lse, _ = dense.attention_fwd(
        q, k, v, bias, None, None, None, None, None, q.shape[1], k.shape[1], None, None, options.scale, options.softcap, 0.0
    )
    if folds:
        out = out.unflatten(1, (group, len(rows))).permute(0, 2, 3, 1, 4).flatten(2, 3)
        lse = lse.unflatten(2, (group, len(rows))).flatten(1, 2)
    return out, lse


def _bias(start: int, keys: int, rows: range, seqlen_q: int, lengths: list[int], options: _Options) -> Tensor | None:
    """What is added to the scores of keys start …, (b|1, H|1, R, keys): −∞ where a query does not see a key; None for nothing."""
    slopes, left, right = options[:3]
    shortest, longest = min(lengths), max(lengths)
    seen_by_all = shortest if right is None else min(shortest, shortest - seqlen_q + rows.start + right + 1)
    is_cut = start + keys > seen_by_all or (left is not None and start < longest - seqlen_q + rows.stop - 1 - left)
    if slopes is None and not is_cut:
        return None
    lengths_, j = torch.tensor(lengths)[:, None, None], torch.arange(start, start + keys)
    distance = j - (torch.arange(rows.start, rows.stop)[:, None] + lengths_ - seqlen_q)  # how far right of a row's own position
    hidden = (j >= lengths_).expand_as(distance)
    if right is not None:
        hidden = hidden | (distance > right)
    if left is not None:
        hidden = hidden | (distance < -left)
    bias = torch.zeros(())
    if slopes is not None:
        bias = -slopes.float().view(-1, slopes.shape[-1], 1, 1) * distance.abs().unsqueeze(1)
    return bias.masked_fill(hidden.unsqueeze(1), -math.inf)


def _merge(out: Tensor, lse: Tensor, out_: Tensor, lse_: Tensor) -> tuple[Tensor, Tensor]:
    """The results of two sets of keys as one, in float32."""
    total = torch.logaddexp(lse, lse_)
    shift = total.masked_fill(total == -math.inf, 0.0)
    weight, weight_ = ((part - shift).exp().transpose(1, 2).unsqueeze(-1) for part in (lse, lse_))
    return torch.addcmul(out * weight, out_, weight_), total


def _add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """A sink is one more key, with no value."""
    total = torch.logaddexp(lse, sinks.float()[:, None])
    share = (lse - total).exp().masked_fill(total == -math.inf, 0.0)
    return out * share.transpose(1, 2).unsqueeze(-1), total
