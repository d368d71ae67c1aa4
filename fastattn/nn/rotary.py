"""Rotary position embedding as a module: the tables of angles, plain or scaled, and their application."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.rotary import apply_rotary

# What each rope_type reads from `scaling`.
NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys by their positions: forward(q, k, positions=None, cu_seqlens=None, max_seqlen=None) → (q, k), as
    `apply_rotary`.

    Args:
        head_dim: D; the first R = rotary_dim of it (default: all, or scaling's partial_rotary_factor) are rotated, dim pair i by
            position · base^(−2i / R).
        base: the largest wavelength is 2π·base; default scaling's rope_theta, or 10000.
        max_seqlen: rows of the tables. Longer sequences make the tables grow where positions are the default ones; positions that
            are given must lie below it.
        scaling: None, or what transformers keeps under rope_parameters: "rope_type" and its numbers, all of which are used.
            "linear": every frequency over `factor`.
            "ntk": the base times factor^(R / (R − 2)), which stretches low frequencies most.
            "dynamic": the same with factor·L/L₀ − (factor − 1) for sequences of L > L₀ = original_max_position_embeddings tokens, L that
            of the call (max_seqlen for packed ones; of the tables where positions are given).
            "llama3": frequencies of wavelengths beyond L₀ / low_freq_factor over `factor`, those up to L₀ / high_freq_factor as they
            are, in between blended.
        interleaved: pairs are (2i, 2i + 1) as in GPT-J, instead of (i, i + R/2) as in GPT-NeoX and Llama.

    The tables are float32 buffers of (max_seqlen, R/2), whatever dtype the module is cast to, in no state_dict.

    Raises: ValueError for an unknown rope_type, a number that is missing or that nothing here uses, a base that is not scaling's.

    Source: Su et al., arXiv 2104.09864; Chen et al., arXiv 2306.15595 (linear); Peng et al., arXiv 2309.00071 (NTK).
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = None,
        max_seqlen: int = 2048,
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.scaling = dict(scaling or {})
        self.rope_type = self.scaling.setdefault("rope_type", self.scaling.pop("type", "default"))
        if self.rope_type not in NUMBERS:
            raise ValueError(f"RotaryEmbedding: rope_type must be one of {', '.join(NUMBERS)}, got {self.rope_type!r}")
        expected = NUMBERS[self.rope_type]
        given = self.scaling.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"}
        if given != set(expected):
            wanted = f"hold {', '.join(expected) or 'nothing'} for rope_type {self.rope_type!r}"
            raise ValueError(f"RotaryEmbedding: scaling must {wanted}, got {', '.join(sorted(given)) or 'nothing'}")
        theta = self.scaling.get("rope_theta")
        if None not in (base, theta) and base != theta:
            raise ValueError(f"RotaryEmbedding: base must be scaling's rope_theta = {theta} or None, got {base}")
        self.base = next((b for b in (base, theta) if b is not None), 10000.0)
        if rotary_dim is None:
            rotary_dim = int(head_dim * self.scaling.get("partial_rotary_factor", 1.0))
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ValueError(f"RotaryEmbedding: rotary_dim must be even and at most head_dim = {head_dim}, got {rotary_dim}")
        self.head_dim, self.rotary_dim, self.interleaved = head_dim, rotary_dim, interleaved
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0, device=device), persistent=False)
        self.grow(max_seqlen)

    def grow(self, max_seqlen: int) -> None:
        """Make the tables (max_seqlen, R/2), on the device they are on."""
        device = self.cos.device
        with torch.inference_mode(False), torch.no_grad():  # whatever made them grow, training may save them
            # float64 on the CPU: at position 10^5 float32 angles are off by 10^-2.
            positions = torch.arange(max_seqlen, dtype=torch.float64, device="cpu")
            angles = positions[:, None] * self._frequencies(max_seqlen)
            self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """As torch's, but the tables stay float32 under `.half()` and `.to(torch.bfloat16)`, angles having no use for fewer digits, and
        are made where they were on no device (`.to_empty`)."""
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32 or was_meta:
            self.grow(self.cos.shape[0])
        return self

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if positions is None:
            self._fit(q.shape[0 if q.dim() == 3 else 1] if max_seqlen is None else max_seqlen, cu_seqlens, max_seqlen)
        return apply_rotary(
            q, k, self.cos, self.sin, interleaved=self.interleaved, positions=positions, cu_seqlens=cu_seqlens
        )

    def _fit(self, seqlen: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
        """Tables for sequences of that length."""
        if self.rope_type != "dynamic":
            if seqlen > self.cos.shape[0]:
                self.grow(max(seqlen, 2 * self.cos.shape[0]))
            return
        if cu_seqlens is not None and max_seqlen is None:
            raise ValueError("RotaryEmbedding: max_seqlen must be given with cu_seqlens where scaling is dynamic, got None")
        seqlen = max(seqlen, self.scaling["original_max_position_embeddings"])  # the frequencies are the length's own
        if seqlen != self.cos.shape[0]:
            self.grow(seqlen)

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, base={self.base}, rotary_dim={self.rotary_dim}, scaling={self.scaling}, interleaved={self.interleaved}"
        )

    def _frequencies(self, seqlen: int) -> Tensor:
        """(R/2,) angles a position, in float64."""
        dim, base = self.rotary_dim, self.base
        if self.rope_type in ("ntk", "dynamic") and dim > 2:
            stretch = self.scaling["factor"]
            if self.rope_type == "dynamic":
                original = self.scaling["original_max_position_embeddings"]
                stretch = stretch * max(seqlen, original) / original - (stretch - 1)
            base = base * stretch ** (dim / (dim - 2))
        frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        if self.rope_type == "linear":
            return frequencies / self.scaling["factor"]
        return self._llama3(frequencies) if self.rope_type == "llama3" else frequencies

    def _llama3(self, frequencies: Tensor) -> Tensor:
        factor, low, high, original = (self.scaling[name] for name in NUMBERS["llama3"])
        turns = original * frequencies / (2 * math.pi)  # within the original context
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return share * frequencies + (1 - share) * frequencies / factor
