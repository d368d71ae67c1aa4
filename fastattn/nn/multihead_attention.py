"""torch.nn.MultiheadAttention over fastattn's attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.scaled_dot_product_attention import scaled_dot_product_attention

_OP = "MultiheadAttention"


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: its constructor, its state_dict, its forward signature and its results.

    With need_weights=False no S_q × S_k matrix is made beyond the mask that the caller hands in; with need_weights=True (torch's
    default) the weights are the matrix, and are computed plainly. Pass need_weights=False wherever the weights are not read.

    Differences, all deliberate:
        - A query that may attend to no key gets zero attention, and the output bias alone comes out; torch gives NaN with
          need_weights=True. Its weights and its gradients are 0 too.
        - Wrong shapes and types raise ValueError and TypeError where torch asserts.
        - No fused inference path of its own, and no nested tensors: forward does the same thing in training and evaluation.
        - `dropout` drops other weights than torch's generator would, under need_weights=False.
        - `torch.jit.script` does not take this module; `torch.compile` and `torch.export` do.

    Inside `torch.nn.TransformerEncoderLayer` (assign it to `layer.self_attn`) this module runs in training, and in evaluation wherever
    gradients are on. In evaluation without gradients torch's layer reads the weights off its modules and runs one fused operator that
    calls no submodule; the results agree, but to have this module run there too, call
    `torch.backends.mha.set_fastpath_enabled(False)`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Project, attend, project back.

        Args:
            query: (S_q, B, E), with batch_first (B, S_q, E), or without a batch (S_q, E).
            key, value: likewise with S_k for S_q, and kdim and vdim for E.
            key_padding_mask: (B, S_k), without a batch (S_k,). bool: True = a key that nobody sees. Float: added to the scores.
            need_weights: return the attention weights too, after dropout.
            attn_mask: (S_q, S_k) or (B·H, S_q, S_k). bool: True = may NOT attend (the opposite of scaled_dot_product_attention).
                Float: added to the scores.
            average_attn_weights: the weights' mean over the heads, instead of the weights of each head.
            is_causal: a hint that attn_mask, which must be given, is the causal mask aligned to the top left. Used, in the mask's place,
                with need_weights=False and no key_padding_mask; what a wrong hint does is undefined, as in torch.

        Returns:
            output: of query's shape. weights: None, or (B, S_q, S_k), or with average_attn_weights=False (B, H, S_q, S_k), each without B
            where the input had no batch. add_bias_kv and add_zero_attn append one key each, which S_k then counts.

        Raises:
            ValueError: shapes that do not go together. TypeError: what is no tensor; masks that are neither bool nor float; nested tensors.
            RuntimeError: is_causal without attn_mask, or an attn_mask of the wrong shape, as in torch.
        """
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        q, k, v = (self._split_heads(t, batched) for t in self._project(query, key, value))  # (B, H, S, D)
        if self.bias_k is not None:
            k, v = (self._append(t, bias) for t, bias in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))

        is_causal = is_causal and not need_weights and key_padding_mask is None
        mask = None if is_causal else _merge(attn_mask, key_padding_mask, q, k.shape[2])
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            weights = F.dropout(_weights(q, k, mask), dropout_p)
            out = weights @ v
        else:
            weights, out = None, scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)

        out = self.out_proj(self._join_heads(out, batched))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        return out, weights if weights is None or batched else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The three input projections: one matmul for self-attention, two where key is value, else three."""
        if self.in_proj_weight is None:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return tuple(map(F.linear, (query, key, value), weights, biases))
        weight, bias, size = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        q = F.linear(query, weight[:size], None if bias is None else bias[:size])
        if key is value:
            return q, *F.linear(key, weight[size:], None if bias is None else bias[size:]).chunk(2, dim=-1)
        k = F.linear(key, weight[size : 2 * size], None if bias is None else bias[size : 2 * size])
        return q, k, F.linear(value, weight[2 * size :], None if bias is None else bias[2 * size :])

    def _split_heads(self, t: Tensor, batched: bool) -> Tensor:
        """(S, E), (B, S, E) or (S, B, E) as a (B, H, S, D) view."""
        t = t.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return t.transpose(0, 1).unsqueeze(0)
        return t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3)

    def _join_heads(self, t: Tensor, batched: bool) -> Tensor:
        """(B, H, S, D) in the layout of the inputs, with E = H·D."""
        if not batched:
            return t.squeeze(0).transpose(0, 1).flatten(-2)
        return (t.transpose(1, 2) if self.batch_first else t.permute(2, 0, 1, 3)).flatten(-2)

    def _append(self, t: Tensor, bias: Tensor) -> Tensor:
        """(B, H, S, D) with the learned key or value `bias` (1, 1, E) as one more position."""
        bias = bias.view(1, self.num_heads, 1, self.head_dim).expand(t.shape[0], -1, -1, -1)
        return torch.cat([t, bias], dim=2)

    def _check(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> None:
        for arg, t in (("query", query), ("key", key), ("value", value)):
            checks.check_tensor(_OP, arg, t)
        if query.dim() not in (2, 3):
            checks.reject(_OP, "query", "have 2 dims (no batch) or 3", checks.shape(query))
        batched = query.dim() == 3
        layout = "(S, E)" if not batched else "(B, S, E)" if self.batch_first else "(S, B, E)"
        batch_dim = 0 if self.batch_first else 1
        for arg, t, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if t.dim() != query.dim() or t.shape[-1] != size:
                checks.reject(_OP, arg, f"have shape {layout} with E = {size}", checks.shape(t))
            if batched and t.shape[batch_dim] != query.shape[batch_dim]:
                must = f"have shape {layout} with B = {query.shape[batch_dim]} to match query"
                checks.reject(_OP, arg, must, checks.shape(t))
        if value.shape[:-1] != key.shape[:-1]:
            checks.reject(_OP, "value", f"have key's {checks.shape(key)[:-1]} before its last dim", checks.shape(value))
        for arg, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is None:
                continue
            checks.check_tensor(_OP, arg, mask)
            if not (mask.dtype == torch.bool or mask.is_floating_point()):
                checks.reject(_OP, arg, "be bool or float", mask.dtype, TypeError)
        batch = query.shape[batch_dim] if batched else 1
        seqlen_q, seqlen_k = (t.shape[0 if not batched else 1 - batch_dim] for t in (query, key))
        padding_shape = (batch, seqlen_k) if batched else (seqlen_k,)
        if key_padding_mask is not None and key_padding_mask.shape != padding_shape:
            must = f"have shape {'(B, S_k)' if batched else '(S_k,)'} = {padding_shape}"
            checks.reject(_OP, "key_padding_mask", must, checks.shape(key_padding_mask))
        shapes = ((seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k))
        if attn_mask is not None and attn_mask.shape not in shapes:
            must = f"have shape (S_q, S_k) = {shapes[0]} or (B·H, S_q, S_k) = {shapes[1]}"
            checks.reject(_OP, "attn_mask", must, checks.shape(attn_mask), RuntimeError)
        if is_causal and attn_mask is None:
            checks.reject(_OP, "attn_mask", "be the causal mask that is_causal=True hints at", "None", RuntimeError)


def _merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, seqlen_k: int) -> Tensor | None:
    """Both masks as one in scaled_dot_product_attention's convention, broadcastable to (B, H, S_q, S_k).

    Two bool masks stay bool, one byte an entry. Keys beyond the masks' last column (add_bias_kv, add_zero_attn) are visible to all.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, q.shape[:2]))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.reshape(q.shape[0], 1, 1, -1))
    if not masks:
        return None
    masks = [F.pad(mask, (0, seqlen_k - mask.shape[-1])) for mask in masks]
    if all(mask.dtype == torch.bool for mask in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    floats = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return floats[0] if len(floats) == 1 else floats[0] + floats[1]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√D + mask), (B, H, S_q, S_k), in the dtype that softmax gives q's; 0 in the rows that see no key."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if mask is None:
        return scores.softmax(dim=-1)
    if mask.dtype in checks.FLOAT_DTYPES:  # as autocast does for torch's baddbmm; `+` would promote instead
        mask = mask.to(scores.dtype)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
