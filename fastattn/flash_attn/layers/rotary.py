"""flash_attn.layers.rotary on `fastattn.apply_rotary`: the functions and the module, with flash-attn 2.8's signatures.

cos, sin: (S_max, R/2). seqlen_offsets: an int, or (B,) int32 or int64, by which each sequence's positions are shifted: nothing is read on
the host. interleaved: pairs of columns (0, 1), (2, 3), …, else (0, R/2), (1, R/2 + 1), …

What flash-attn does in place is done in place here too, by a copy into what was given, which autograd sees: a leaf that requires a
gradient cannot be given. Errors are `fastattn.apply_rotary`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.rotary import apply_rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x (B, S, H, D), or packed (T, H, D) with cu_seqlens (B + 1,) int32, rotated; with inplace, x itself."""
    positions = _positions("apply_rotary_emb", x, seqlen_offsets, cu_seqlens)
    if positions is not None:
        cu_seqlens = None
    out, _ = apply_rotary(x, x[..., :0, :], cos, sin, interleaved=interleaved, positions=positions, cu_seqlens=cu_seqlens)
    return x.copy_(out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """qkv (B, S, 3, H, D), or (B, S, H + 2·H_kv, D) with num_heads_q = H, its queries and keys rotated in place.

    cos_k, sin_k: tables of the keys' own, cos and sin by default.
    """
    op = "apply_rotary_emb_qkv_"
    checks.check_tensor(op, "qkv", qkv)
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.dim() == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (qkv.shape[2] + num_heads_q) // 2]
    else:
        must = "have shape (B, S, 3, H, D), or (B, S, H + 2·H_kv, D) with num_heads_q = H"
        checks.reject(op, "qkv", must, f"{checks.shape(qkv)}, num_heads_q = {num_heads_q}")
    options = dict(interleaved=interleaved, positions=_positions(op, q, seqlen_offsets, None))
    if cos_k is None and sin_k is None:
        rotated_q, rotated_k = apply_rotary(q, k, cos, sin, **options)
    else:
        rotated_q, _ = apply_rotary(q, q[..., :0, :], cos, sin, **options)
        rotated_k, _ = apply_rotary(k, k[..., :0, :], cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, **options)
    q.copy_(rotated_q)
    k.copy_(rotated_k)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """kv (B, S, 2, H_kv, D), its keys rotated in place."""
    checks.check_tensor("apply_rotary_emb_kv_", "kv", kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        checks.reject("apply_rotary_emb_kv_", "kv", "have shape (B, S, 2, H_kv, D)", checks.shape(kv))
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


def _positions(op: str, x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Each token's position, None where `apply_rotary` counts them itself."""
    checks.check_tensor(op, "x", x)
    if isinstance(seqlen_offsets, int) and seqlen_offsets == 0:
        return None
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[None]
        return steps + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    checks.check_cu_seqlens(op, "cu_seqlens", cu_seqlens, x)
    tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    sequences = torch.bucketize(tokens, cu_seqlens[1:], right=True).clamp_(max=max(cu_seqlens.shape[0] - 2, 0))
    return tokens - cu_seqlens[sequences] + (seqlen_offsets[sequences] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)


class RotaryEmbedding(torch.nn.Module):
    """flash-attn's module: forward(qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None).

    dim: R, how many columns of a head are rotated, pair i by position · base^(−2i / R). The tables are computed in float32, kept in the
    dtype of what they rotate, and grow with it; with seqlen_offset a tensor, max_seqlen has to bound the positions.

    Without kv: qkv as `apply_rotary_emb_qkv_` takes it, rotated in place. With kv (B, S, 2, H_kv, D): qkv is the queries (B, S, H, D), and
    (queries, kv) are returned, both rotated in place. scale_base, XPos, raises NotImplementedError.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if scale_base is not None:
            raise NotImplementedError(f"RotaryEmbedding: scale_base (XPos) is not supported, got {scale_base}")
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.scale = None
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Tables of at least seqlen rows, on that device and in that dtype."""
        cos = self._cos_cached
        fits = cos is not None and seqlen <= self._seq_len_cached and cos.device == device and cos.dtype == dtype
        if fits and not (self.training and cos.is_inference()):
            return
        self._seq_len_cached = seqlen
        # A module cast to half precision has rounded its inv_freq too.
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angles = torch.arange(seqlen, dtype=torch.float32, device=device)[:, None] * inv_freq.to(device)
        self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, device=qkv.device, dtype=qkv.dtype)
        if self._cos_cached is None:
            raise ValueError("RotaryEmbedding: max_seqlen must be given with a tensor as seqlen_offset, got None")
        tables = self._cos_cached, self._sin_cached
        options = dict(interleaved=self.interleaved, seqlen_offsets=seqlen_offset)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, *tables, num_heads_q=num_heads_q, **options)
        q = apply_rotary_emb(qkv, *tables, inplace=True, **options)
        return q, apply_rotary_emb_kv_(kv, *tables, **options)
