"""Attention and its masks, as transformers calls them: one function for its registry of attentions, one for its registry of masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fastattn.ops.attention import attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer, as transformers calls it.

    query: (B, H, S_q, D); key, value: (B, H_kv, S_k, ·), not repeated. attention_mask: None, or broadcastable to (B, H, S_q, S_k), bool
    (True = attend) or added to the scores; it then says everything about visibility. Without one, `is_causal` (the module's own by
    default, aligned to the last key) and `sliding_window` W do: a query sees W keys, itself included. s_aux: (H,) sink logits.
    position_bias: (1 or B, H, S_q, S_k), added to the scores, with its gradient. cu_seq_lens_*: B is 1 and the row holds these sequences
    one after the other; the mask, which then repeats what they say, is not read.

    Returns (B, S_q, H, D_v), and None in place of the weights, which are never formed.
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    causal, window, bias = False, (None, None), None
    if packed or attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if sliding_window is not None:
            window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    else:
        bias = attention_mask
    if position_bias is not None:
        bias = _add_position_bias(position_bias, bias)
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "attn_bias": bias,
        "sinks": s_aux,
        "dropout_p": dropout,
    }
    if not packed:
        return attention(q, k, v, **options).contiguous(), None

    lengths = {"cu_seqlens_q": cu_seq_lens_q.int(), "cu_seqlens_k": cu_seq_lens_k.int()}
    # a length that is a tensor would cost a synchronisation to read; the token count bounds it as well
    for name, length in (("max_seqlen_q", max_length_q), ("max_seqlen_k", max_length_k)):
        lengths[name] = length if isinstance(length, int) else None
    out = attention(*(t.flatten(0, 1) for t in (q, k, v)), **lengths, **options)
    return out.unflatten(0, q.shape[:2]), None


def _add_position_bias(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """T5's learned bias and a mask as one float bias; the causal flag, where there is no mask, stays a flag."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return position_bias + mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask a model builds once per forward and mask kind: None where flags can say it, so that no S × S matrix is made.

    None means: causal, aligned to the last key, and the layer's own sliding window (or all keys, for a bidirectional model). Anything
    else (padding, packed positions, chunks, a static cache's unused tail) is a dense bool (B, 1, S_q, S_k), True = attend.
    """
    flags_suffice = (
        allow_is_causal_skip
        and not allow_is_bidirectional_skip
        and isinstance(q_offset, int)
        and kv_length == q_length + q_offset - kv_offset
        and (
            local_size is None
            or (kv_offset == 0 and kv_length <= local_size)  # once a cache has slid, even few keys may be of two chunks
            or _is_sliding_window(mask_function, local_size)
        )
        and _nothing_padded(attention_mask, kv_length)
    )
    if flags_suffice:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )


def _nothing_padded(attention_mask: Tensor | None, kv_length: int) -> bool:
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling():  # reading the mask's values would break the graph
        return False
    return bool(attention_mask[:, -kv_length:].all())


def _is_sliding_window(mask_function: Callable, size: int) -> bool:
    """Both a sliding window and fixed chunks of `size` keys arrive as `local_size`; a layer's flags can say only the first.

    In a window each query sees the key `size - 1` before it. In chunks only a chunk's last query does, so that of two
    neighbours one does not, wherever chunks begin.
    """
    if torch.compiler.is_compiling():
        return False
    numbers = torch.tensor([0, 1, size - 1, size])  # its elements have no dims, and so mix with any device's
    zero, one, last, first = numbers
    return size > 1 and all(bool(mask_function(zero, zero, *pair)) for pair in ((last, zero), (first, one)))
