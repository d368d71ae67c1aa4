"""A layer's attention: projections, optional query and key norms, positions, attention to itself or to a context, projection back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.attention import attention
from fastattn.ops.rotary import apply_rotary

from .norm import RMSNorm

if TYPE_CHECKING:
    from fastattn.kv_cache import PagedKVCache

_OP = "Attention"


class Attention(torch.nn.Module):
    """Multi-head attention with grouped key heads, as the layers of Llama, Mistral, Qwen3 and gpt-oss have it.

    Parameters are named q_proj, k_proj, v_proj, o_proj (and q_norm, k_norm, sinks), so that such a layer's state_dict loads.

    Args:
        hidden_size: E, of inputs and outputs.
        num_heads, num_kv_heads: H, and H_kv (default H), which divides it.
        head_dim: D (default E / H).
        bias: give the four projections a bias.
        qk_norm, qk_norm_eps: RMS-normalise queries and keys over D before they are rotated, as Qwen3 does.
        window: (left, right) as in `attention`, or an int W: each token sees W keys, its own and the W − 1 before it (transformers'
            sliding_window).
        softmax_scale, softcap, dropout_p: as in `attention`; dropout in training only.
        sinks: a learnable logit a head, as in gpt-oss; 0 at first.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        window: int | tuple[int | None, int | None] | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if isinstance(window, int) and (isinstance(window, bool) or window < 1):
            checks.reject(_OP, "window", "be a pair or a positive int", window)
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            checks.reject(_OP, "num_kv_heads", f"divide num_heads = {num_heads}", num_kv_heads)
        if head_dim is None and hidden_size % num_heads:
            checks.reject(_OP, "hidden_size", f"be a multiple of num_heads = {num_heads} where head_dim is None", hidden_size)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.window = (window - 1, 0) if isinstance(window, int) else window or (None, None)
        self.softmax_scale, self.softcap, self.dropout_p = softmax_scale, softcap, dropout_p
        made = {"device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(hidden_size, num_heads * self.head_dim, bias, **made)
        self.k_proj = torch.nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias, **made)
        self.v_proj = torch.nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias, **made)
        self.o_proj = torch.nn.Linear(num_heads * self.head_dim, hidden_size, bias, **made)
        self.q_norm = RMSNorm(self.head_dim, eps=qk_norm_eps, **made) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=qk_norm_eps, **made) if qk_norm else None
        self.sinks = torch.nn.Parameter(torch.zeros(num_heads, **made)) if sinks else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        alibi_slopes: Tensor | None = None,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        causal: bool = True,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_context: Tensor | None = None,
        max_seqlen_context: int | None = None,
        cache: PagedKVCache | None = None,
        layer_idx: int = 0,
    ) -> Tensor:
        """Attend from x to itself, to a context, or to a cache.

        Args:
            x: (B, S, E), or packed (T, E) with cu_seqlens.
            cos, sin: as `apply_rotary` takes them, (S_max, R/2) or (B, S, R/2); None for no rotary embedding.
            alibi_slopes: (H,) or (B, H), as in `attention`; None for no bias by distance.
            context: (B, S_k, E), or packed (T_k, E) with cu_seqlens_context, attended to in x's place, all of it: causal, window, rotary
                embedding and ALiBi are for x alone. Or the pair that `project_context` made of it, where it is attended to many times.
            causal: a token sees itself and those before it.
            cu_seqlens, max_seqlen: (B + 1,) int32 and the longest length of packed sequences.
            cu_seqlens_context, max_seqlen_context: the same of the context; it is packed if and only if x is.
            cache, layer_idx: attend to all that the cache holds of layer `layer_idx`, once it has x's keys and values too. x is the tokens
                of the cache's current step: (B, S, E) where each sequence has S of them, or packed (T, E). (S_max, R/2) tables are read
                at the step's positions. There is no gradient.

        Returns: x's shape.

        Raises: ValueError for arguments that do not go together.
        """
        if (cos is None) != (sin is None):
            checks.reject(_OP, "cos and sin", "be given together", f"only {'sin' if cos is None else 'cos'}")
        self._check_context(context, cos, alibi_slopes, cu_seqlens, cu_seqlens_context)
        if cache is not None:
            self._check_cached(context, cu_seqlens, causal)
        rank = 2 if cu_seqlens is not None else 3
        if x.dim() != rank and not (cache is not None and x.dim() == 2):
            checks.reject(_OP, "x", "have shape (T, E) with cu_seqlens, (B, S, E) without", tuple(x.shape))
        q = self.project_queries(x)
        k, v = context if isinstance(context, tuple) else self.project_context(x if context is None else context)
        if cache is not None:
            return self.o_proj(self._attend_cached(q, k, v, cos, sin, alibi_slopes, cache, layer_idx).flatten(-2))
        if cos is not None:
            q, k = apply_rotary(q, k, cos, sin, cu_seqlens=cu_seqlens)
        if context is None:
            over_keys = {"causal": causal, "window": self.window, "cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
        else:
            over_keys = {"cu_seqlens_k": cu_seqlens_context, "max_seqlen_k": max_seqlen_context}
        out = attention(
            q, k, v, softmax_scale=self.softmax_scale, softcap=self.softcap, alibi_slopes=alibi_slopes, sinks=self.sinks,
            dropout_p=self.dropout_p if self.training else 0.0, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen, **over_keys,
        )  # fmt: skip
        return self.o_proj(out.flatten(-2))

    def project_queries(self, x: Tensor) -> Tensor:
        """The queries of x (…, E), (…, H, D), before they are rotated."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        return q if self.q_norm is None else self.q_norm(q)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a context (…, E), each (…, H_kv, D), which `forward` takes in its place."""
        k, v = (proj(context).unflatten(-1, (self.num_kv_heads, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        return (k if self.k_norm is None else self.k_norm(k)), v

    @staticmethod
    def _check_context(
        context: Any, cos: Tensor | None, alibi_slopes: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_context: Tensor | None
    ) -> None:
        if context is None:
            if cu_seqlens_context is not None:
                checks.reject(_OP, "cu_seqlens_context", "be None without a context", "a tensor")
            return
        for arg, value in (("cos", cos), ("alibi_slopes", alibi_slopes)):
            if value is not None:
                checks.reject(_OP, arg, "be None with a context", "a tensor")
        if (cu_seqlens is None) != (cu_seqlens_context is None):
            given = "cu_seqlens" if cu_seqlens_context is None else "cu_seqlens_context"
            checks.reject(_OP, "cu_seqlens and cu_seqlens_context", "be given together with a context", f"only {given}")

    def _check_cached(self, context: Tensor | None, cu_seqlens: Tensor | None, causal: bool) -> None:
        for arg, value in (("context", context), ("cu_seqlens", cu_seqlens)):
            if value is not None:
                checks.reject(_OP, arg, "be None with a cache", "a tensor")
        if not causal:
            checks.reject(_OP, "causal", "be True with a cache", causal)
        if self.training and self.dropout_p > 0.0:
            checks.reject(_OP, "dropout_p", "be 0 with a cache, or the module in evaluation", self.dropout_p)

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, alibi_slopes: Tensor | None, cache: PagedKVCache,
        layer_idx: int,
    ) -> Tensor:  # fmt: skip
        of_positions = {}
        if cos is not None and cos.dim() == 2:  # k is rotated on its way into the cache
            if cache.current is not None and cache.current.slots.numel() == q.shape[:-2].numel():  # if not, append says so
                q, _ = apply_rotary(q, q[..., :0, :], cos, sin, positions=cache.current.positions.view(q.shape[:-2]))
            of_positions = {"cos": cos, "sin": sin}
        elif cos is not None:
            q, k = apply_rotary(q, k, cos, sin)
        cache.append(layer_idx, k, v, **of_positions)
        return cache.attend(
            layer_idx, q, window=self.window, softmax_scale=self.softmax_scale, softcap=self.softcap, alibi_slopes=alibi_slopes,
            sinks=self.sinks,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, window={self.window}"
