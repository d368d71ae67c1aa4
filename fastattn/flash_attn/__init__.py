"""flash-attn 2.8's attention functions on fastattn's kernels: the same names, arguments and argument order.

    from fastattn.flash_attn import flash_attn_func          # was: from flash_attn import flash_attn_func

Other paths of flash-attn's are modules here too, by their names (flash_attn_interface, bert_padding, layers.rotary, losses.cross_entropy,
ops.…); `v3` and `v4` are FlashAttention-3's and -4's functions; and `fastattn.integrations.as_flash_attn` makes `import flash_attn` mean
this package, for code that is not to be edited.

What differs from flash-attn, each time by allowing more: float32 besides float16 and bfloat16; any head_dim from 1 to 512, and v's own;
softcap together with dropout; CPU tensors; an LSE that can be differentiated. And two conventions of the LSE: a row that sees no key has
−inf (flash-attn 2's unsplit kernel says +inf), and ALiBi under a causal mask is −slope·|i + S_k − S_q − j| (flash-attn 2 adds slope·j,
which moves the LSE by slope·(i + S_k − S_q)); the outputs are the same.

Options shared by every function:
    dropout_p: probability of dropping an attention weight, in [0, 1); pass 0.0 for evaluation.
    softmax_scale: multiplies q·kᵀ; 1/√D by default.
    causal: row i sees key j iff j ≤ i + S_k − S_q (aligned to the bottom right).
    window_size: (left, right) counts of keys around that diagonal, inclusive; −1 or None is unbounded; 0-d tensors are read.
    softcap: with softcap > 0 scores become softcap·tanh(score/softcap).
    alibi_slopes: (H,) or (B, H); adds −slope·|i + S_k − S_q − j|.
    deterministic: False, flash-attn's default, permits float atomics in the backward; no kernel uses them today.
    return_attn_probs: return (out, lse, S_dmask). lse: float32, natural logarithm, (B, H, S_q), packed (H, T_q). S_dmask: None without
        dropout, else the softmax's probabilities before dropout, (B, H, S_q, S_k) in q's dtype, negated where the entry was dropped;
        packed (B, H, max_seqlen_q, max_seqlen_k), 0 beyond each sequence. It holds the whole matrix: for testing, as in flash-attn.

Errors are those of `fastattn.attention`: ValueError, TypeError for types and dtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.ops import checks
from fastattn.ops.attention import attention, draw_seed, dropout_keep
from fastattn.ops.dispatch import checks_values
from fastattn.ops.paged_attention import paged_attention

from . import bert_padding
from .kv_cache import flash_attn_with_kvcache

__version__ = "2.8.3"  # flash-attn's, whose interface this is

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """Attention of q (B, S_q, H, D) over k (B, S_k, H_kv, D) and v (B, S_k, H_kv, D_v): (B, S_q, H, D_v). Options: see the module."""
    options = {
        "causal": causal,
        "window": window_size,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "deterministic": deterministic,
    }
    return _attention(q, k, v, options, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """`flash_attn_func` with k and v in one tensor kv (B, S_k, 2, H_kv, D), read where they lie."""
    k, v = _unpack("flash_attn_kvpacked_func", "kv", kv, "(B, S_k, 2, H_kv, D)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """`flash_attn_func` with q, k and v in one tensor qkv (B, S, 3, H, D), read where they lie."""
    q, k, v = _unpack("flash_attn_qkvpacked_func", "qkv", qkv, "(B, S, 3, H, D)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """Attention of packed q (T_q, H, D) over k (T_k, H_kv, D) and v (T_k, H_kv, D_v), sequence by sequence: (T_q, H, D_v).

    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, starting at 0; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
    max_seqlen_q, max_seqlen_k: upper bounds of the lengths. Other options: see the module.
    block_table: (B, max_blocks) int32; k and v are then caches (num_blocks, block_size, H_kv, D) and (…, D_v) of any block_size, sequence b
        has cu_seqlens_k[b + 1] − cu_seqlens_k[b] keys, there is no dropout, and a backward raises (`fastattn.paged_attention`).
    """
    for arg, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.check_tensor("flash_attn_varlen_func", arg, cu_seqlens)
    if block_table is not None:
        if dropout_p:
            checks.reject("flash_attn_varlen_func", "dropout_p", "be 0 with block_table", dropout_p)
        checks.check_cu_seqlens("flash_attn_varlen_func", "cu_seqlens_k", cu_seqlens_k, q)
        if checks_values(q):
            checks.check_cu_seqlens_values("flash_attn_varlen_func", "k", cu_seqlens_k, 2**31 - 1, max_seqlen_k)
        out, lse = paged_attention(
            q, k, v, block_table, cu_seqlens_k.diff(), cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, causal=causal,
            window=window_size, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes, return_lse=True,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out
    options = {
        "causal": causal,
        "window": window_size,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "deterministic": deterministic,
    }
    return _attention(q, k, v, options, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """`flash_attn_varlen_func` with k and v in one tensor kv (T_k, 2, H_kv, D), read where they lie."""
    k, v = _unpack("flash_attn_varlen_kvpacked_func", "kv", kv, "(T_k, 2, H_kv, D)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
    """`flash_attn_varlen_func` with q, k and v in one tensor qkv (T, 3, H, D), read where they lie."""
    q, k, v = _unpack("flash_attn_varlen_qkvpacked_func", "qkv", qkv, "(T, 3, H, D)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------


def _unpack(op: str, arg: str, packed: Tensor, letters: str) -> tuple[Tensor, ...]:
    """Views of the 2 (kv) or 3 (qkv) tensors that lie side by side in dim -3."""
    checks.check_tensor(op, arg, packed)
    if packed.dim() != letters.count(",") + 1 or packed.shape[-3] != len(arg):
        checks.reject(op, arg, f"have shape {letters}", checks.shape(packed))
    return packed.unbind(-3)


def _attention(q, k, v, options, return_attn_probs):
    if not return_attn_probs:
        return attention(q, k, v, **options)
    rng_state = None
    if isinstance(q, Tensor) and options["dropout_p"]:  # any type: `attention` is yet to check it
        rng_state = torch.cuda.get_rng_state(q.device) if q.is_cuda else torch.get_rng_state()
    out, lse = attention(q, k, v, **options, return_lse=True)
    if rng_state is None:
        return out, lse, None
    if q.is_cuda:
        torch.cuda.set_rng_state(rng_state, q.device)
    else:
        torch.set_rng_state(rng_state)
    seed = draw_seed(q.device)  # the one draw of that call, so the generator now stands where the call left it
    return out, lse, signed_probabilities(q, k, options, seed)


@torch.no_grad()
def signed_probabilities(q, k, options, seed) -> Tensor:
    """flash-attn's S_dmask: the reference's probabilities, signed by the mask of that seed."""
    options = dict(options)
    dropout_p, cu_seqlens_k = options.pop("dropout_p"), options.get("cu_seqlens_k")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    # P·I = P: over values that name their own position, attention gives the probabilities, under any mask or bias.
    if cu_seqlens_k is None:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        names = torch.eye(seqlen_k, dtype=q.dtype, device=q.device)[None, :, None].expand(batch, -1, kv_heads, -1)
        probabilities = reference.attention(q, k, names, **options).transpose(1, 2)
    else:
        bounds = (options["max_seqlen_q"], q.shape[0]), (options["max_seqlen_k"], k.shape[0])
        batch = cu_seqlens_k.shape[0] - 1
        seqlen_q, seqlen_k = (total if bound is None else bound for bound, total in bounds)
        tokens, _, columns = _positions(cu_seqlens_k, k.shape[0])
        names = q.new_zeros(k.shape[0], 1, seqlen_k)
        names[tokens, 0, columns] = 1.0
        packed = reference.attention(q, k, names.expand(-1, kv_heads, -1), **options)
        tokens, sequences, rows = _positions(options["cu_seqlens_q"], q.shape[0])
        probabilities = q.new_zeros(batch, heads, seqlen_q, seqlen_k)
        probabilities[sequences, :, rows] = packed[tokens]
    keep = dropout_keep(seed, batch, heads, seqlen_q, seqlen_k, dropout_p)
    return torch.where(keep, probabilities, -probabilities)


def _positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the packed tokens that belong to a sequence: their row, their sequence, and their position in it."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    tokens = tokens[tokens < cu_seqlens[-1]]
    sequences = torch.bucketize(tokens, cu_seqlens[1:], right=True)
    return tokens, sequences, tokens - cu_seqlens[sequences]
