"""torch's own attention calls on fastattn, for models that are not to be edited.

    from fastattn.integrations import torch_sdpa

    torch_sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("fastattn")
    ...                                             # F.scaled_dot_product_attention, nn.MultiheadAttention, varlen_attn, …
    torch.nn.attention.restore_flash_attention_impl()

torch picks a backend for each call, and reaches its flash backend through a few operators. While fastattn is active these are the
functions below, on CUDA and on the CPU; what torch gives to another backend stays there (docs/torch_sdpa.md has the table). Operators are
replaced and no function is patched: compiled graphs follow each activation, and the autograd above the operators stays torch's.

An operator's strides are part of its contract, as compilers assert those of torch's meta functions: outputs and gradients are laid out as
torch lays them out. So is its causal mask: top-left in the operators for the CPU, bottom-right in all others, to which torch itself gives
S_q ≠ S_k only for `causal_lower_right` and for packed sequences.

An option that nothing in fastattn honours raises NotImplementedError, a RuntimeError as torch's own refusals are, and names it.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library
from torch.nn.attention import register_flash_attention_impl

from fastattn.ops import checks
from fastattn.ops.attention import attend, attend_backward, check_attention, check_saved, draw_seed, rng_state
from fastattn.ops.dispatch import runs_kernels
from fastattn.ops.operator import wants_gradient
from fastattn.ops.paged_attention import as_cache, paged_attention

NAME = "fastattn"


def register() -> None:
    """Make "fastattn" known to `torch.nn.attention.activate_flash_attention_impl`. Activates nothing; calling it again changes nothing."""
    register_flash_attention_impl(NAME, register_fn=_activate)


class _Activation:
    """What torch keeps while fastattn is active, to undo it."""

    def __init__(self, libraries: list[Library]) -> None:
        self.libraries = libraries

    def remove(self) -> None:
        while self.libraries:
            self.libraries.pop()._destroy()


def _activate() -> _Activation:
    active = _Activation([])
    with warnings.catch_warnings():  # of overriding a kernel, which is what this is for
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel", category=UserWarning)
        for key, implementations in IMPLEMENTATIONS.items():
            library = Library("aten", "IMPL", key)
            active.libraries.append(library)
            for operator, implementation in implementations.items():
                if hasattr(torch.ops.aten, operator):  # torch 2.11 has none that writes to a given output
                    library.impl(operator, implementation, key)
    return active


# --------------------------------------------------------------------------------------------------------------------
# What the implementations share.


def _refuse(operator: str, what: str) -> NoReturn:
    raise NotImplementedError(f"aten::{operator} on fastattn: {what} is not supported")


def _options(operator: str, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window=(None, None)) -> dict[str, Any]:
    """`attend`'s options, packed where there are cum_seq; the window is aligned to the bottom right."""
    checks.check_probability(operator, "dropout_p", dropout_p)
    left, right = checks.check_scores(operator, is_causal, window, scale, 0.0)
    options = dict(window_left=left, window_right=right, softmax_scale=scale, dropout_p=dropout_p)
    if cum_seq_q is not None:
        options |= dict(cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k, max_seqlen_q=max_q, max_seqlen_k=max_k)
    return options


def _forward(operator: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """out, lse, and the three that torch returns beside them, of (B, S, H, D) or packed tensors."""
    lengths = {name: option for name, option in options.items() if "seqlen" in name}
    check_attention(operator, q, k, v, alibi_slopes=options.get("alibi_slopes"), **lengths)
    _check_head_dim(operator, q, v)
    seed = draw_seed(q.device) if options["dropout_p"] > 0.0 else None
    out, lse = attend(q, k, v, dropout_seed=seed, **options)
    return out, lse, _beside(q, seed)


def _backward(
    operator: str, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of (B, S, H, D) or packed tensors. block: torch's context parallelism has the operators work on blocks of the keys."""
    check_saved(operator, q, q, grad_out=grad_out, out=out, logsumexp=lse)
    seed = state.view(torch.int64)[:1] if options["dropout_p"] > 0.0 else None
    return attend_backward(grad_out, q, k, v, out, lse, dropout_seed=seed, **options)


def _check_head_dim(operator: str, query: Tensor, value: Tensor) -> None:
    if value.shape[-1] != query.shape[-1]:  # torch's result has query's shape
        _refuse(operator, f"a value with head_dim {value.shape[-1]}, where query has {query.shape[-1]},")


def _beside(query: Tensor, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """rng_state, (2,) uint64, which carries our int64 seed to the backward; an offset that we need not; and no debug mask."""
    return rng_state(query, seed).view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """`result` with the strides of torch.empty_like(like)."""
    strides = torch.empty_like(like, device="meta").stride()
    if all(size <= 1 or a == b for size, a, b in zip(like.shape, result.stride(), strides)):
        return result
    return torch.empty_like(like).copy_(result)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, H, S, D) from (B, S, H, D), and back."""
    return [t.transpose(1, 2) for t in tensors]


# --------------------------------------------------------------------------------------------------------------------
# scaled_dot_product_attention on CUDA: (B, H, S, D).


@torch.no_grad()
def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention; lse (B, H, S_q)."""
    operator = "_scaled_dot_product_flash_attention"
    if return_debug_mask:
        _refuse(operator, "return_debug_mask=True")
    options = _options(operator, None, None, None, None, dropout_p, is_causal, scale)
    out, lse, beside = _forward(operator, *_heads_first(query, key, value), **options)
    return _laid_out(out.transpose(1, 2), query), lse, None, None, query.shape[2], key.shape[2], *beside


@torch.no_grad()
def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    operator = "_scaled_dot_product_flash_attention_backward"
    options = _options(operator, None, None, None, None, dropout_p, is_causal, scale)
    tensors = *_heads_first(grad_out, query, key, value, out), logsumexp, philox_seed
    grads = _backward(operator, *tensors, block=True, **options)
    return tuple(_laid_out(grad, t) for grad, t in zip(_heads_first(*grads), (query, key, value)))


# --------------------------------------------------------------------------------------------------------------------
# Packed sequences, (T, H, D) with cum_seq, and dense ones, (B, S, H, D): varlen_attn, nested tensors, CUDA and the CPU alike.


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward; lse (B, H, S_q), packed (H, T_q).

    seqused_k: (B,) int32, how many of its keys each sequence uses. block_table: (B, max_pages) int32; key and value are then
    (num_pages, page_size, H_kv, D), any page_size, and seqused_k or cum_seq_k says how many keys there are. num_splits: as
    `fastattn.paged_attention` takes it with either of these, and nothing without, where no keys are split. None of the three, nor
    alibi_slopes, has a place in torch's backward operator: with inputs that require a gradient they raise.
    """
    operator, window = "_flash_attention_forward", (window_size_left, window_size_right)
    if return_debug_mask:
        _refuse(operator, "return_debug_mask=True")
    without_backward = {"seqused_k": seqused_k, "block_table": block_table, "alibi_slopes": alibi_slopes}
    given = [name for name, option in without_backward.items() if option is not None]
    if given and wants_gradient(query, key, value):
        _refuse(operator, f"{given[0]} with a gradient")
    with torch.no_grad():
        if seqused_k is None and block_table is None:
            options = _options(operator, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window)
            out, lse, beside = _forward(operator, query, key, value, alibi_slopes=alibi_slopes, **options)
        else:
            if dropout_p:
                _refuse(operator, f"dropout_p with {given[0]}")
            cache = _in_pages(operator, query, key, value, cum_seq_k, max_k, seqused_k, block_table)
            packed = {} if cum_seq_q is None else dict(cu_seqlens_q=cum_seq_q, max_seqlen_q=max_q)
            out, lse = paged_attention(
                query, *cache, causal=is_causal, window=window, softmax_scale=scale, alibi_slopes=alibi_slopes,
                num_splits=num_splits or 0, return_lse=True, **packed,
            )  # fmt: skip
            _check_head_dim(operator, query, out)
            beside = _beside(query)
        return _laid_out(out, query), lse, *beside


def _in_pages(operator: str, query, key, value, cum_seq_k, max_k, seqused_k, block_table) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_cache, v_cache, page_table and seqlens_k of keys that are in pages, or are fewer than the tensors hold."""
    lengths = None
    if cum_seq_k is not None:
        checks.check_cu_seqlens(operator, "cum_seq_k", cum_seq_k, query)
        lengths = cum_seq_k.diff()
    if block_table is not None:
        if seqused_k is None and lengths is None:
            checks.reject(operator, "seqused_k or cum_seq_k", "be given with block_table", "neither")
        return key, value, block_table, lengths if seqused_k is None else seqused_k
    return *as_cache(operator, key, value, cum_seq_k, max_k, seqused_k), seqused_k


def flash_forward_out(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace: `flash_forward` into `out`. Returns the lse."""
    result, lse, *_ = flash_forward(query, key, value, *args, **options)
    out.copy_(result)
    return lse


@torch.no_grad()
def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_backward."""
    operator, window = "_flash_attention_backward", (window_size_left, window_size_right)
    options = _options(operator, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window)
    grads = _backward(operator, grad_out, query, key, value, out, logsumexp, rng_state, block=True, **options)
    return tuple(_laid_out(grad, t) for grad, t in zip(grads, (query, key, value)))


# --------------------------------------------------------------------------------------------------------------------
# scaled_dot_product_attention on the CPU: (B, H, S, D), with masks, float64 too, without dropout.


def _cpu_options(operator: str, query, key, value, dropout_p, is_causal, attn_mask, scale) -> dict[str, Any]:
    if dropout_p:
        _refuse(operator, "dropout_p")
    if runs_kernels(query) and query.dtype == torch.float64:
        _refuse(operator, "float64 in Triton's interpreter")
    check_attention(operator, *_heads_first(query, key, value), attn_bias=attn_mask, float64=True)
    _check_head_dim(operator, query, value)
    checks.check_scores(operator, is_causal, (None, None), scale, 0.0)
    top_left = query.shape[2] - key.shape[2] if is_causal else None
    return dict(attn_bias=attn_mask, window_right=top_left, softmax_scale=scale)


@torch.no_grad()
def cpu_sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu; lse (B, H, S_q), 0 for a row whose mask hides every key, as torch has it."""
    operator = "_scaled_dot_product_flash_attention_for_cpu"
    options = _cpu_options(operator, query, key, value, dropout_p, is_causal, attn_mask, scale)
    out, lse = attend(*_heads_first(query, key, value), **options)
    lse = lse.transpose(1, 2).contiguous()
    if attn_mask is not None:
        lse.masked_fill_(lse == -math.inf, 0.0)
    return _laid_out(out.transpose(1, 2), query), lse.transpose(1, 2)


@torch.no_grad()
def cpu_sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_for_cpu_backward; gradients whose memory is (B, S, H, D)."""
    operator = "_scaled_dot_product_flash_attention_for_cpu_backward"
    options = _cpu_options(operator, query, key, value, dropout_p, is_causal, attn_mask, scale) | dict(dropout_p=0.0)
    # Keys may be a block of those that `out` and `logsumexp` are of. Half precision is where the CPU path makes a softmax of its own.
    block = query.dtype in (torch.float16, torch.bfloat16)
    grads = _backward(operator, *_heads_first(grad_out, query, key, value, out), logsumexp, None, block=block, **options)
    return tuple(_heads_first(*grads))


_FLASH = {
    "_flash_attention_forward": flash_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_forward_out,
    "_flash_attention_backward": flash_backward,
}
IMPLEMENTATIONS = {
    "CUDA": {
        "_scaled_dot_product_flash_attention": sdpa_forward,
        "_scaled_dot_product_flash_attention_backward": sdpa_backward,
        **_FLASH,
    },
    "CPU": {
        "_scaled_dot_product_flash_attention_for_cpu": cpu_sdpa_forward,
        "_scaled_dot_product_flash_attention_for_cpu_backward": cpu_sdpa_backward,
        **_FLASH,
    },
}
