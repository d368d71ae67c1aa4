"""Where tokens stand, and the two ways of saying so that are neither learned nor rotary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.kv_cache import PagedKVCache


def positions_of(tokens: Tensor, cu_seqlens: Tensor | None = None, cache: PagedKVCache | None = None) -> Tensor:
    """Each token's place in its sequence, from 0: tokens' shape, or (1, S), which broadcasts to it. Nothing waits for the device.

    tokens: (B, S), or packed (T,) with cu_seqlens (N + 1,); with a cache, the tokens of its current step.
    """
    if cache is not None:
        return cache.current.positions.view(tokens.shape)
    places = torch.arange(tokens.shape[-1], device=tokens.device, dtype=torch.int32)
    if cu_seqlens is None:
        return places[None]
    sequence = torch.searchsorted(cu_seqlens, places, right=True) - 1  # the last that starts at or before a token
    return places - cu_seqlens[sequence]


def sinusoidal(positions: Tensor, hidden_size: int) -> Tensor:
    """(…, H) float32: the sine and the cosine of the position at H/2 wavelengths from 2π to 20000π, all sines first.

    Source: Vaswani et al., arXiv 1706.03762, where they alternate; a linear layer follows, to which the order of columns is the same.
    """
    exponents = torch.arange(hidden_size // 2, device=positions.device, dtype=torch.float32) * (2 / hidden_size)
    angles = positions[..., None].float() * torch.exp(-math.log(10000.0) * exponents)  # (…, H/2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """(H,) float32: how much a score falls by each token of distance: 2^(−8/H), 2^(−16/H), …, 2^(−8).

    Where H is no power of two, those of the power of two below, and then every other one of the power of two above.

    Source: Press et al., arXiv 2108.12409.
    """
    below = 2 ** (num_heads.bit_length() - 1)
    first = torch.arange(1, below + 1, device=device, dtype=torch.float32) / below
    rest = (2 * torch.arange(num_heads - below, device=device, dtype=torch.float32) + 1) / (2 * below)
    return torch.exp2(-8.0 * torch.cat([first, rest]))
