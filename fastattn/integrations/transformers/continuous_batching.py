"""`model.generate_batch`, transformers' own continuous batching, on fastattn.

transformers batches continuously for `sdpa`, for `paged|eager`, and for whatever has "flash" in its name: those run in its flash wrapper,
which unpads, packs and pages, and wants three functions of a flash package. Here are the three, under the name "fastattn_flash2" (the 2 is
what its decode path over pages looks for), and what puts them where transformers looks. What a function can do, transformers reads from its
signature, and drops options that are not in it, sinks for one: so these have all that fastattn has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.modeling_flash_attention_utils as hub
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from fastattn.ops.append_paged_kv import append_paged_kv
from fastattn.ops.attention import attention
from fastattn.ops.paged_attention import paged_attention

FLASH_NAME = "fastattn_flash2"

Window = tuple[int | None, int | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """`fastattn.attention` of q (B, S_q, H, D) over k, v (B, S_k, H_kv, ·) under flash-attn's names; s_aux: (H,) sink logits."""
    return attention(
        q, k, v, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window=window_size, softcap=softcap, sinks=s_aux,
        deterministic=deterministic,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The same of packed q (T_q, H, D) over k, v (T_k, H_kv, ·). A length that is a tensor is not read, which would wait for the device:
    the token count bounds it as well."""
    max_seqlen_q, max_seqlen_k = (length if isinstance(length, int) else None for length in (max_seqlen_q, max_seqlen_k))
    return attention(
        q, k, v, cu_seqlens_q=cu_seqlens_q.int(), cu_seqlens_k=cu_seqlens_k.int(), max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window=window_size, softcap=softcap, sinks=s_aux,
        deterministic=deterministic,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Append k, v (B, S_new, H_kv, ·) to pages (num_blocks, block_size, H_kv, ·) in place at cache_seqlens (B,), then attend to them."""
    block_table, cache_seqlens = block_table.int(), cache_seqlens.int()
    append_paged_kv(k, v, k_cache, v_cache, block_table, cache_seqlens)
    return paged_attention(
        q, k_cache, v_cache, block_table, cache_seqlens + k.shape[1], causal=causal, window=window_size, softmax_scale=softmax_scale,
        softcap=softcap, sinks=s_aux,
    )  # fmt: skip


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """One attention layer, through transformers' flash wrapper.

    Where a mask (B, S_k) of padding meets attention that is not causal, the wrapper takes the keys' padding for the queries' as well, which
    in cross-attention is somebody else's: there `fastattn.attention` is given the mask, and nothing is unpadded.

    Raises: ValueError for what the wrapper would drop without a word, or fails at: T5's position bias, and float32 in a layer that has no
    nn.Linear to read the model's dtype from (GPT-2's are Conv1D).
    """
    layer = type(module).__name__
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f'{FLASH_NAME}: {layer} must run with attn_implementation="fastattn", got a position_bias, which no flash function takes'
        )
    if query.dtype == torch.float32 and not torch.is_autocast_enabled(query.device.type) and not _has_linear(module):
        raise ValueError(
            f'{FLASH_NAME}: {layer} in float32 must run with attn_implementation="fastattn" (or in half precision): transformers looks '
            "for an nn.Linear in the layer to know the model's dtype, got none"
        )
    is_causal = kwargs.get("is_causal")
    if attention_mask is not None and not (module.is_causal if is_causal is None else is_causal):
        return _bidirectional(query, key, value, attention_mask, **kwargs), None
    return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _bidirectional(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """(B, S_q, H, D_v) of (B, H, S, ·) over the keys that the mask keeps; a static cache's unused tail, which it does not reach, is not."""
    q, k, v = query.transpose(1, 2), *(t[:, :, : attention_mask.shape[1]].transpose(1, 2) for t in (key, value))
    width = None if sliding_window is None else sliding_window - 1
    return attention(
        q, k, v, window=(width, width), softmax_scale=scaling, softcap=softcap or 0.0, attn_bias=attention_mask[:, None, None].bool(),
        sinks=s_aux, dropout_p=dropout,
    ).contiguous()  # fmt: skip


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())


# --------------------------------------------------------------------------------------------------------------------
# Where transformers looks for them.

_lazy_imports_before: Callable | None = None
_gpt_oss_before: list[str] | None = None


def _lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> tuple:
    """transformers' function that imports what a name stands for; ours for our name."""
    if implementation is not None and implementation.removeprefix("paged|") == FLASH_NAME:
        return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, hub._pad_input, hub._unpad_input
    return _lazy_imports_before(implementation, *args, **kwargs)


def _gpt_oss() -> type:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

    return GptOssPreTrainedModel


def install(put: Callable[[type, str, Any], None]) -> None:
    """Register the name by `put(registry, name, function)`, and have `_lazy_imports` know it."""
    global _lazy_imports_before, _gpt_oss_before
    put(AttentionInterface, FLASH_NAME, attention_forward)
    put(AttentionMaskInterface, FLASH_NAME, flash_attention_mask)
    paged = AttentionInterface._global_mapping.get("paged|flash_attention_2")
    if paged is not None:  # transformers below 5.20 looks under a second name
        put(AttentionInterface, f"paged|{FLASH_NAME}", paged)
        put(AttentionMaskInterface, f"paged|{FLASH_NAME}", flash_attention_mask)
    if _lazy_imports_before is None:
        _lazy_imports_before, hub._lazy_imports = hub._lazy_imports, _lazy_imports
        # gpt-oss lists the flash implementations that know its sinks, and has any other name replaced by one of them
        model = _gpt_oss()
        _gpt_oss_before = model._compatible_flash_implementations
        model._compatible_flash_implementations = [*_gpt_oss_before, FLASH_NAME]


def remove() -> None:
    """Undo `install`, but for the registries. Raises: RuntimeError where somebody has put another function in `_lazy_imports`' place."""
    global _lazy_imports_before, _gpt_oss_before
    if _lazy_imports_before is None:
        return
    if hub._lazy_imports is not _lazy_imports:
        raise RuntimeError(
            "unregister: transformers.modeling_flash_attention_utils._lazy_imports must be the one that register put there, "
            f"got {hub._lazy_imports!r}: undo that first"
        )
    hub._lazy_imports, _lazy_imports_before = _lazy_imports_before, None
    _gpt_oss()._compatible_flash_implementations, _gpt_oss_before = _gpt_oss_before, None
    if hub._loaded_implementation in (FLASH_NAME, f"paged|{FLASH_NAME}"):
        hub._loaded_implementation = None  # the functions that it stands for are ours
