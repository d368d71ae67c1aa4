"""Naive attention: the definition that every other implementation is judged against."""

from __future__ import annotations

import math

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    attn_bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    dropout_keep: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(mask(softcap(softmax_scale * q k^T) + alibi + attn_bias)) v``, the whole S_q x S_k matrix in memory.

    Takes what :func:`fastattn.attention` takes, and ``dropout_keep``, a bool (B, H, S_q, S_k) mask of the kept
    probabilities (packed: positions local to each sequence), drawn afresh where ``dropout_p`` is given without one.
    Products, scores and probabilities are in the inputs' dtype, float64 included; the softmax's sums and the LSE are in
    float32, or float64 for float64 inputs. Nothing is validated; ``max_seqlen_*`` and ``deterministic`` change nothing.

    Row i sees key j iff ``i + S_k - S_q - left <= j <= i + S_k - S_q + right``. A row that sees no key: output 0,
    LSE -inf (with sinks: the sink's logit), gradients 0.
    """
    left, right = (None if side is None or side == -1 else int(side) for side in window)
    if causal:
        right = 0 if right is None else min(right, 0)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale

    if cu_seqlens_q is None:
        out, lse = _dense(q, k, v, left, right, scale, softcap, attn_bias, alibi_slopes, sinks, dropout_p, dropout_keep)
        return (out, lse) if return_lse else out

    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    batch = len(starts_q) - 1
    outs, lses = [], []
    for b in range(batch):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = _dense(
            q[None, rows], k[None, keys], v[None, keys], left, right, scale, softcap,
            _of_sequence(attn_bias, b, seqlen_q, seqlen_k), slopes, sinks,
            dropout_p, _of_sequence(dropout_keep, b, seqlen_q, seqlen_k),
        )  # fmt: skip
        outs.append(out[0])
        lses.append(lse[0])
    unused = q.shape[0] - starts_q[-1]
    outs.append(q.new_zeros(unused, q.shape[1], v.shape[-1]))
    lses.append(torch.full((q.shape[1], unused), -math.inf, dtype=_accumulation_dtype(q.dtype), device=q.device))
    out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    return (out, lse) if return_lse else out


def _dense(q, k, v, left, right, scale, softcap, attn_bias, alibi_slopes, sinks, dropout_p, dropout_keep):
    (batch, seqlen_q, num_heads, _), (seqlen_k, num_kv_heads) = q.shape, k.shape[1:3]
    accumulate = _accumulation_dtype(q.dtype)
    group = num_heads // max(num_kv_heads, 1)
    q = q.transpose(1, 2)
    k = k.transpose(1, 2).repeat_interleave(group, dim=1)
    v = v.transpose(1, 2).repeat_interleave(group, dim=1)

    scores = (q * scale) @ k.transpose(-1, -2)  # scaled first: q k^T alone may overflow float16
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # distance[i, j] = j - (i + S_k - S_q): how far key j lies to the right of row i's own position
    positions_q = torch.arange(seqlen_q, device=q.device) + seqlen_k - seqlen_q
    distance = torch.arange(seqlen_k, device=q.device) - positions_q[:, None]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(accumulate)[..., None, None] * distance.abs()
    visible = torch.ones_like(scores, dtype=torch.bool)
    if attn_bias is not None and attn_bias.dtype == torch.bool:
        visible = visible & attn_bias
    elif attn_bias is not None:
        scores = scores + attn_bias
        visible = visible & (scores != -math.inf)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)

    if sinks is not None:  # one more logit a row, which every row sees and no value answers to
        sink = sinks.to(accumulate)[:, None, None].expand(batch, num_heads, seqlen_q, 1)
        scores = torch.cat([scores.to(accumulate), sink], dim=-1)
        visible = torch.cat([visible, sink != -math.inf], dim=-1)

    # An empty row becomes a row of zeros, which has a softmax and gradients without NaN; its results are then replaced.
    empty = ~visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~visible, -math.inf).masked_fill(empty, 0.0).to(accumulate)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty.squeeze(-1), -math.inf)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)[..., :seqlen_k].to(q.dtype)
    if dropout_p > 0:
        if dropout_keep is None:
            dropout_keep = torch.rand(probabilities.shape, device=q.device) >= dropout_p
        probabilities = probabilities * dropout_keep / (1.0 - dropout_p)
    return (probabilities @ v).transpose(1, 2), lse


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _of_sequence(t: torch.Tensor | None, b: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor | None:
    """The part of a tensor broadcastable to (B, H, max_seqlen_q, max_seqlen_k) that sequence b sees."""
    if t is None:
        return None
    t = t.reshape((1,) * (4 - t.dim()) + t.shape)
    t = t if t.shape[0] == 1 else t[b : b + 1]
    t = t if t.shape[2] == 1 else t[:, :, :seqlen_q]
    return t if t.shape[3] == 1 else t[:, :, :, :seqlen_k]
