"""The oracle of rotary position embedding: its definition, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each pair of columns (x₁, x₂) of q and k turned by its angle: (x₁·cos − x₂·sin, x₂·cos + x₁·sin)."""
    packed = q.dim() == 3
    batch, seqlen = (1, q.shape[0]) if packed else q.shape[:2]
    turned = torch.ones(batch, seqlen, 1, 1, dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        restarting = [torch.arange(end - start) for start, end in zip(ends[:-1], ends[1:])]
        positions = torch.cat([*restarting, torch.zeros(seqlen - ends[-1], dtype=torch.int64)]).to(q.device)
        turned[:, ends[-1] :] = False  # past the last sequence
    elif positions is None:
        positions = torch.arange(seqlen, device=q.device)
    positions = positions.long().expand(batch, seqlen)
    cos, sin = (t.expand(batch, *t.shape[-2:]).gather(1, positions[..., None].expand(-1, -1, t.shape[-1])) for t in (cos, sin))
    cos, sin = cos[:, :, None], (-sin if inverse else sin)[:, :, None]  # (B, S, 1, R/2)

    def rotated(x: Tensor) -> Tensor:
        rotary_dim, whole = 2 * cos.shape[-1], x[None] if packed else x
        pairs, rest = whole[..., :rotary_dim], whole[..., rotary_dim:]
        x1, x2 = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        turned_pairs = torch.stack([y1, y2], -1).flatten(-2) if interleaved else torch.cat([y1, y2], -1)
        y = torch.where(turned, torch.cat([turned_pairs.to(x.dtype), rest], -1), whole)
        return y[0] if packed else y

    return rotated(q), rotated(k)
