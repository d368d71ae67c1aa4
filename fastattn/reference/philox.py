"""The kernels' dropout mask, recomputed in torch: Philox-4x32-10, counter-based, so any entry can be had on its own."""

from __future__ import annotations

import torch

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox_4x32(
    key: tuple[int, int], counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32-10 of 32-bit words held in int64: four random words of the counters' broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products of 32-bit words wrap, but their 64 bits are right: >> 32 then & _WORD is the unsigned high word
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def philox_keep(
    seed: int,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The attention kernels' dropout mask for an int64 ``seed``: bool (B, H, S_q, S_k), True where an entry is kept.

    The key is the seed's low and high word. Counter (j // 4, i, b * H + h, 0) gives the four words of key positions
    4 * (j // 4) + 0..3 in row i of head h of batch entry b; an entry is kept iff its word, unsigned, is at least
    ``floor(dropout_p * 2**32)``.
    """

    def index(size, dim):
        return torch.arange(size, dtype=torch.int64, device=device).reshape([-1 if d == dim else 1 for d in range(3)])

    heads, rows, quads = index(batch * num_heads, 0), index(seqlen_q, 1), index((seqlen_k + 3) // 4, 2)
    words = philox_4x32((seed & _WORD, (seed >> 32) & _WORD), (quads, rows, heads, torch.zeros_like(quads)))
    words = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :seqlen_k]
    return (words >= int(dropout_p * 2**32)).reshape(batch, num_heads, seqlen_q, seqlen_k)
