"""flash_attn.flash_attn_interface: the public functions under this path too, and the private ones that other libraries build on.

`_flash_attn_forward` and its kin are one direction each, outside autograd: ring attention and context parallelism call them on a block of
keys at a time, and give the backward the output and log-sum-exp over all of them. Signatures and results are flash-attn 2.8's:

    forward: (out, softmax_lse, S_dmask, rng_state). softmax_lse: float32, natural logarithm, (B, H, S_q), packed (H, T_q). S_dmask: empty,
        or with return_softmax and dropout what `flash_attn_func` returns. rng_state: (2,) int64, for the backward.
    backward: writes dq, dk and dv, where they are not None, and returns softmax_d = rowsum(dout·out), float32, of softmax_lse's shape
        (flash-attn pads its rows to a multiple of 128).

Here they are plain functions, whose parameters inspect.getfullargspec finds, also where flash-attn's are torch operators. window_size_*:
−1 is unbounded. deterministic, and zero_tensors: nothing depends on them here.

Raises: as `fastattn.attention`, and NotImplementedError naming an option that is not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.attention import attend, attend_backward, check_attention, check_saved, draw_seed, rng_state
from fastattn.ops.paged_attention import as_cache, attend_paged, check_paged

from . import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    signed_probabilities,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, S_q, H, D), k and v (B, S_k, H_kv, ·)."""
    window = window_size_left, window_size_right
    scores = dict(softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes)
    return _forward("_flash_attn_forward", q, k, v, dropout_p, causal, window, scores, {}, return_softmax)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (T_q, H, D), k and v (T_k, H_kv, ·), or caches (num_blocks, block_size, H_kv, ·) with block_table.

    seqused_k, leftpad_k: (B,) int32, how many keys of each sequence there are, and how many of these, at its start, are padding. Neither
    they nor block_table go together with dropout.
    """
    op, window = "_flash_attn_varlen_forward", (window_size_left, window_size_right)
    scores = dict(softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes)
    if block_table is None and leftpad_k is None and seqused_k is None:
        lengths = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
        return _forward(op, q, k, v, dropout_p, causal, window, scores, lengths, return_softmax)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _forward_over_cache(op, q, k, v, dropout_p, causal, window, scores, *lengths, block_table, leftpad_k, seqused_k)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Gradients of `_flash_attn_forward`, or one block's part of them. rng_state: the forward's, needed with dropout."""
    window = window_size_left, window_size_right
    scores = dict(softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes)
    tensors = dout, q, k, v, out, softmax_lse
    return _backward("_flash_attn_backward", tensors, (dq, dk, dv), dropout_p, causal, window, scores, {}, rng_state)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Gradients of `_flash_attn_varlen_forward` without caches."""
    window = window_size_left, window_size_right
    scores = dict(softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes)
    lengths = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    tensors = dout, q, k, v, out, softmax_lse
    return _backward("_flash_attn_varlen_backward", tensors, (dq, dk, dv), dropout_p, causal, window, scores, lengths, rng_state)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


# --------------------------------------------------------------------------------------------------------------------


def _checked(op: str, q, k, v, dropout_p, causal, window, scores: dict[str, Any], lengths: dict[str, Any]) -> dict[str, Any]:
    """`attend`'s options, once the call is found to be as `fastattn.attention` documents."""
    check_attention(op, q, k, v, alibi_slopes=scores["alibi_slopes"], **lengths)
    left, right = checks.check_scores(op, causal, window, scores["softmax_scale"], scores["softcap"])
    checks.check_probability(op, "dropout_p", dropout_p)
    return dict(dropout_p=dropout_p, window_left=left, window_right=right, **scores, **lengths)


@torch.no_grad()
def _forward(op, q, k, v, dropout_p, causal, window, scores, lengths, return_softmax) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _checked(op, q, k, v, dropout_p, causal, window, scores, lengths)
    seed = draw_seed(q.device) if dropout_p else None
    out, lse = attend(q, k, v, dropout_seed=seed, **options)
    probabilities = q.new_empty(0)
    if return_softmax and dropout_p:
        options = dict(dropout_p=dropout_p, causal=causal, window=window, **scores, **lengths)
        probabilities = signed_probabilities(q, k, options, seed)
    return out, lse, probabilities, rng_state(q, seed)


@torch.no_grad()
def _forward_over_cache(
    op, q, k, v, dropout_p, causal, window, scores, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, leftpad_k,
    seqused_k,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if dropout_p:
        raise NotImplementedError(f"{op}: dropout_p is not supported with block_table, leftpad_k or seqused_k")
    checks.check_tensor(op, "q", q)
    checks.check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, q)
    if block_table is None:
        k, v, block_table = as_cache(op, k, v, cu_seqlens_k, max_seqlen_k, seqused_k)
    cache = k, v, block_table, cu_seqlens_k.diff() if seqused_k is None else seqused_k
    queries = dict(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q)
    _, left, right = check_paged(op, q, *cache, causal=causal, window=window, **queries, **scores)
    if leftpad_k is not None:
        checks.check_int32(op, "leftpad_k", leftpad_k, (block_table.shape[0],), f"(B,) = ({block_table.shape[0]},)", q)
    out, lse = attend_paged(q, *cache, leftpad=leftpad_k, window_left=left, window_right=right, **queries, **scores)
    return out, lse, q.new_empty(0), rng_state(q)


@torch.no_grad()
def _backward(op, tensors, grads, dropout_p, causal, window, scores, lengths, state) -> Tensor:
    dout, q, k, v, out, lse = tensors
    options = _checked(op, q, k, v, dropout_p, causal, window, scores, lengths)
    check_saved(op, q, v, dout=dout, out=out, softmax_lse=lse)
    if dropout_p and state is None:
        checks.reject(op, "rng_state", "be the forward's with dropout", "None")
    seed = state[:1] if dropout_p else None
    for buffer, grad in zip(grads, attend_backward(*tensors, dropout_seed=seed, block=True, **options)):
        if buffer is not None:
            buffer.copy_(grad)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()
