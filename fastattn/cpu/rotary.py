"""Rotary position embedding on the CPU: plain torch in fp32, a bounded number of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k rotated. Positions lie within the tables: the operator has looked."""
    outs = q.new_empty(q.shape), k.new_empty(k.shape)
    pairs = list(zip((q, k), outs))
    if q.dim() == 3:
        pairs = [(x[None], out[None]) for x, out in pairs]
        positions = None if positions is None else positions[None]
    batch, seqlen = pairs[0][0].shape[:2]
    if cu_seqlens is not None:
        positions = _positions_in_sequences(cu_seqlens, seqlen)[None]
    cos, sin = (t[None] if t.dim() == 2 else t for t in (cos, sin))
    for x, out in pairs:
        step = max(1, _CHUNK_ELEMENTS // max(1, batch * x.shape[2] * x.shape[3]))
        for start in range(0, seqlen if x.numel() else 0, step):
            rows = slice(start, min(start + step, seqlen))
            at = None if positions is None else positions[:, rows]
            c, s = (_table_rows(table, rows, at).float().unsqueeze(2) for table in (cos, sin))
            if cu_seqlens is not None:
                past = (at < 0)[..., None, None]  # tokens of no sequence stay
                c, s = c.masked_fill(past, 1.0), s.masked_fill(past, 0.0)
            _rotate(out[:, rows], x[:, rows], c, -s if inverse else s, interleaved)
    return outs


def _rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    rotary_dim = 2 * cos.shape[-1]
    out[..., rotary_dim:] = x[..., rotary_dim:]
    x1, x2 = (t.float() for t in _halves(x[..., :rotary_dim], interleaved))
    y1, y2 = _halves(out[..., :rotary_dim], interleaved)
    y1.copy_((x1 * cos).addcmul_(x2, sin, value=-1.0))
    y2.copy_((x2 * cos).addcmul_(x1, sin))


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _table_rows(table: Tensor, rows: slice, positions: Tensor | None) -> Tensor:
    """(B or 1, rows, R/2) of a (B or 1, S_max, R/2) table; −1 is any row."""
    if positions is None:
        return table[:, rows]
    positions = positions.clamp(min=0)
    if table.shape[0] == 1:
        return table[0][positions]
    return table[torch.arange(table.shape[0])[:, None], positions]


def _positions_in_sequences(cu_seqlens: Tensor, total: int) -> Tensor:
    """(T,): each token's position in its sequence, −1 past the last one."""
    token = torch.arange(total)
    sequence = torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) - 1
    positions = token - cu_seqlens[sequence]
    return positions.masked_fill(sequence == cu_seqlens.shape[0] - 1, -1)
