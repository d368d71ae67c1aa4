"""flash-attn's inference calls, over a contiguous or a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.append_paged_kv import append_paged_kv
from fastattn.ops.dispatch import checks_values
from fastattn.ops.paged_attention import attend_paged, check_paged, check_paged_values
from fastattn.ops.rotary import apply_rotary

OP = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append new keys and values to a cache in place, then attend to it: flash-attn's decoding call.

    Args:
        q: (B, S_q, H, D).
        k_cache, v_cache: (B_cache, S_cache, H_kv, D) and (…, D_v): row b holds sequence b; or, with block_table,
            (num_blocks, block_size, H_kv, D), any block_size. Last dims contiguous: they are not copied.
        k, v: (B, S_new, H_kv, D) and (…, D_v), to be written at positions cache_seqlens, …, cache_seqlens + S_new − 1; None for none.
        rotary_cos, rotary_sin: (S_max, R/2); rotate k by its positions in the sequence, and q too: with causal or a window, query i by
            position cache_seqlens + i, else every query by position cache_seqlens. They need k.
        cache_seqlens: (B,) int32 lengths before the append, or one int for all. None, without k, is the cache's whole length.
        cache_batch_idx: (B,) int32, which row of a contiguous cache is sequence b's. Equal ones with k: what is written is undefined.
        cache_leftpad: (B,) int32, how many places at the start of each sequence are padding, and seen by no query. cache_seqlens counts
            them, and so do rotary positions.
        block_table: (B, max_blocks) int32: `fastattn.paged_attention`'s page_table.
        causal, window_size: aligned to the bottom right of S_q × the length after the append.
        rotary_interleaved: pairs of columns (0, 1), (2, 3), … (True, flash-attn's default), or (0, R/2), (1, R/2 + 1), …
        num_splits: see `fastattn.paged_attention`. Other options: see the module.

    Returns: out (B, S_q, H, D_v), and with return_softmax_lse the log-sum-exp (B, H, S_q), −inf for a query that sees no key.

    Beyond flash-attn: any block size, block_table together with cache_leftpad, head dims up to 512, float32, int8 and float8 caches without
    scales, CPU tensors, no host sync. There is no gradient: a backward raises.

    Raises: ValueError and TypeError, as `fastattn.paged_attention` and `fastattn.append_paged_kv` do.
    """
    checks.check_tensor(OP, "q", q)
    checks.check_tensor(OP, "k_cache", k_cache)
    if q.dim() != 4:
        checks.reject(OP, "q", "have shape (B, S_q, H, D)", checks.shape(q))
    if k_cache.dim() != 4:
        checks.reject(OP, "k_cache", "have shape (B_cache, S_cache, H_kv, D), or (num_blocks, block_size, H_kv, D)", checks.shape(k_cache))
    batch, seqlen_q = q.shape[:2]
    table_name = "block_table" if block_table is not None else "cache_batch_idx"
    if (k is None) != (v is None):
        checks.reject(OP, "k and v", "be given together", f"only {'v' if k is None else 'k'}")
    if (rotary_cos is None) != (rotary_sin is None):
        checks.reject(OP, "rotary_cos and rotary_sin", "be given together", "one of them")
    if rotary_cos is not None and k is None:
        checks.reject(OP, "rotary_cos", "be None where there is no new k", "a tensor")
    if block_table is None:
        if cache_batch_idx is None:
            cache_batch_idx = torch.arange(batch, dtype=torch.int32, device=q.device)
        block_table = _int32("cache_batch_idx", cache_batch_idx, q)[:, None]  # a page a sequence
    elif cache_batch_idx is not None:
        checks.reject(OP, "cache_batch_idx", "be None with block_table", "a tensor")
    if cache_seqlens is None:
        if k is not None:
            checks.reject(OP, "cache_seqlens", "be given with k", "None")
        cache_seqlens = k_cache.shape[1] * block_table.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        length = checks.integer(OP, "cache_seqlens", cache_seqlens, "be an int or an int32 tensor")
        cache_seqlens = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    cache_seqlens = _int32("cache_seqlens", cache_seqlens, q)
    leftpad = None if cache_leftpad is None else _int32("cache_leftpad", cache_leftpad, q)

    seqlens_k = cache_seqlens
    if k is not None:
        for arg, value in (("k", k), ("v", v)):
            checks.check_tensor(OP, arg, value)
            if value.dim() != 4 or value.shape[0] != batch:
                checks.reject(OP, arg, f"have shape (B, S_new, H_kv, D) with B = {batch}", checks.shape(value))
        seqlens_k = cache_seqlens + k.shape[1]
    # All of it before the cache is written to, so that a call that raises leaves it as it was.
    max_seqlen_q, left, right = check_paged(
        OP, q, k_cache, v_cache, block_table, seqlens_k, causal=causal, window=window_size, softmax_scale=softmax_scale, softcap=softcap,
        alibi_slopes=alibi_slopes, num_splits=num_splits,
    )  # fmt: skip
    if checks_values(q):
        names = table_name, "cache_seqlens (with the new keys)" if k is not None else "cache_seqlens"
        index = dict(leftpad=leftpad, max_seqlen_q=seqlen_q, window_left=left, names=names)
        check_paged_values(OP, q, k_cache, block_table, seqlens_k, **index)

    if k is not None:
        rotary = {}
        if rotary_cos is not None:
            capacity = k_cache.shape[1] * block_table.shape[1]
            moves = any(bound is not None and bound < capacity for bound in (left, right))  # a wider window is none, as in flash-attn
            positions = cache_seqlens[:, None] + torch.arange(seqlen_q if moves else 1, dtype=torch.int32, device=q.device)
            q, _ = apply_rotary(
                q, q[:, :, :0], rotary_cos, rotary_sin, positions=positions.expand(-1, seqlen_q), interleaved=rotary_interleaved
            )
            rotary = {"cos": rotary_cos, "sin": rotary_sin, "interleaved": rotary_interleaved}
        append_paged_kv(k, v, k_cache, v_cache, block_table, cache_seqlens, **rotary)
    out, lse = attend_paged(
        q, k_cache, v_cache, block_table, seqlens_k, alibi_slopes=alibi_slopes, leftpad=leftpad, max_seqlen_q=max_seqlen_q,
        window_left=left, window_right=right, softmax_scale=softmax_scale, softcap=softcap, num_splits=num_splits,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _int32(arg: str, value: Tensor, q: Tensor) -> Tensor:
    checks.check_int32(OP, arg, value, (q.shape[0],), "(B,) = {}", q)
    return value
