"""Rotary position embedding as a module: the tables of angles, plain or scaled, and their application."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.rotary import apply_rotary

ROPE_TYPES = ("default", "linear", "ntk", "dynamic", "llama3")


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys by their positions: forward(q, k, positions=None, cu_seqlens=None) → (q, k), as `apply_rotary`.

    Args:
        head_dim: D; the first rotary_dim of it (default: all) are rotated, dim pair i by position · base^(−2i / rotary_dim).
        base: the largest wavelength is 2π·base.
        max_seqlen: rows of the tables. Sequences beyond it make the tables grow where positions are the default ones; positions that
            are given must lie below it.
        scaling: None, or what transformers keeps under rope_parameters: "rope_type" and its numbers.
            "linear": every frequency over `factor`.
            "ntk": the base times factor^(R / (R − 2)), which stretches low frequencies most.
            "dynamic": the same with factor·L/L₀ − (factor − 1) for the tables' length L beyond L₀ =
            original_max_position_embeddings; the frequencies change whenever the tables grow.
            "llama3": frequencies of wavelengths beyond L₀ / low_freq_factor over `factor`, those up to L₀ / high_freq_factor as they
            are, in between blended.
        interleaved: pairs are (2i, 2i + 1) as in GPT-J, instead of (i, i + R/2) as in GPT-NeoX and Llama.

    The tables are float32 buffers of (max_seqlen, R/2), in no state_dict. Raises: ValueError for an unknown rope_type or a missing number.

    Source: Su et al., arXiv 2104.09864; Chen et al., arXiv 2306.15595 (linear); Peng et al., arXiv 2309.00071 (NTK).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        max_seqlen: int = 2048,
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.rotary_dim = head_dim, head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim:
            raise ValueError(f"RotaryEmbedding: rotary_dim must be even and at most head_dim = {head_dim}, got {self.rotary_dim}")
        self.base, self.interleaved, self.scaling = base, interleaved, dict(scaling or {"rope_type": "default"})
        self._frequencies(max_seqlen)  # a bad scaling raises here
        self.register_buffer("cos", torch.empty(0, device=device), persistent=False)
        self.register_buffer("sin", torch.empty(0, device=device), persistent=False)
        self.grow(max_seqlen)

    def grow(self, max_seqlen: int) -> None:
        """Make the tables (max_seqlen, R/2), on the device they are on."""
        # float64 on the CPU: at position 10^5 float32 angles are off by 10^-2.
        angles = torch.arange(max_seqlen, dtype=torch.float64)[:, None] * self._frequencies(max_seqlen)
        device = self.cos.device
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """As torch's, but the tables stay float32 under `.half()` and `.to(torch.bfloat16)`: angles have no use for fewer digits."""
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.grow(self.cos.shape[0])
        return self

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        seqlen = q.shape[0 if q.dim() == 3 else 1]
        if positions is None and seqlen > self.cos.shape[0]:
            self.grow(max(seqlen, 2 * self.cos.shape[0]))
        return apply_rotary(
            q, k, self.cos, self.sin, interleaved=self.interleaved, positions=positions, cu_seqlens=cu_seqlens
        )

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, scaling={self.scaling}, interleaved={self.interleaved}"
        )

    def _frequencies(self, seqlen: int) -> Tensor:
        """(R/2,) angles a position, in float64."""
        rope_type = self._number("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"RotaryEmbedding: rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
        dim, base = self.rotary_dim, self.base
        if rope_type in ("ntk", "dynamic"):
            stretch = self._number("factor")
            if rope_type == "dynamic":
                original = self._number("original_max_position_embeddings")
                stretch = stretch * max(seqlen, original) / original - (stretch - 1)
            base = base * stretch ** (dim / (dim - 2)) if dim > 2 else base
        frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        if rope_type == "linear":
            return frequencies / self._number("factor")
        return self._llama3(frequencies) if rope_type == "llama3" else frequencies

    def _llama3(self, frequencies: Tensor) -> Tensor:
        factor, low, high, original = map(
            self._number, ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        turns = original * frequencies / (2 * math.pi)  # within the original context
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return share * frequencies + (1 - share) * frequencies / factor

    def _number(self, name: str, default: Any = None) -> Any:
        value = self.scaling.get(name, default)
        if value is None:
            raise ValueError(f"RotaryEmbedding: scaling must hold {name!r}, got {self.scaling}")
        return value
