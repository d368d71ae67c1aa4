"""flash-attn's helpers between padded batches (B, S, ...) and packed tokens (T, ...), under flash-attn 2.8's names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of `input` (N, ...) at `indices` (T,) int64, as (T, ...). Differentiable; repeated rows add their gradients."""
    return input.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the padding of a batch.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or int; nonzero = a token.
        unused_mask: (B, S), bool or int; nonzero = a row that is kept in the packed layout without being a token.

    Returns:
        hidden_states: (T, ...), the rows that either mask keeps. Differentiable.
        indices: (T,) int64, where they lie in the flattened (B·S) batch.
        cu_seqlens: (B + 1,) int32, where each sequence starts among the T rows.
        max_seqlen_in_batch: int, the longest sequence. (It is read from the device: this call synchronises.)
        seqused: (B,) int32, how many tokens of each sequence attention_mask marks.

    Raises: ValueError unless the masks have hidden_states' first two dims.
    """
    for arg, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"unpad_input: {arg} must have shape (B, S) = {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}"
            )
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    seqlens = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen = int(seqlens.max()) if seqlens.numel() else 0
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens, max_seqlen, used.sum(dim=-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`: zeros (batch, seqlen, ...) with the rows of `hidden_states` (T, ...) at `indices` (T,). Differentiable."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
