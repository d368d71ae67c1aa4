"""Serve many sequences at once with a Hugging Face model: continuous batching over one paged cache.

    from fastattn.integrations import serving
    answers = serving.generate(model, prompts, max_new_tokens=64)     # lists of token ids, of any lengths

No model code is patched and no transformers cache is used: the model is called on one packed row of all sequences' new tokens, and
each attention layer appends its keys and values to a `PagedKVCache` and attends through it. The cache travels as a keyword argument,
which transformers' models hand down to their attention function.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from fastattn.kv_cache import PagedKVCache
from fastattn.ops.sampling import sample
from fastattn.scheduler import Batch, Request, Scheduler, upload

NAME = "fastattn_paged"


def register() -> None:
    """Make "fastattn_paged" a value of `attn_implementation`, for forwards that are given `kv_cache=`. `generate` does so itself."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the cache knows what there is to see


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kv_cache: PagedKVCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer over the cache's current step: query (1, H, T, D), key and value (1, H_kv, T, D) of its T new tokens, rotated
    already. Returns (1, T, H, D), and None in place of the weights.

    Raises: ValueError without a kv_cache.
    """
    if kv_cache is None:
        raise ValueError(f"{NAME}: the model must be called with kv_cache=, a PagedKVCache whose step has been taken")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    kv_cache.append(module.layer_idx, k, v)
    window = (None if sliding_window is None else sliding_window - 1, None)
    out = kv_cache.attend(
        module.layer_idx, q, window=window, softmax_scale=scaling, softcap=softcap or 0.0, sinks=s_aux
    )
    return out.unsqueeze(0), None


def cache_for(model: nn.Module, num_pages: int, page_size: int = 16, *, dtype: torch.dtype | None = None) -> PagedKVCache:
    """A cache of a model's layers, heads and head dim, on its device and, unless told otherwise, in its dtype."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return PagedKVCache(
        config.num_hidden_layers, num_pages, page_size, kv_heads, head_dim, dtype=dtype or model.dtype, device=model.device
    )  # fmt: skip


def stream(
    model: nn.Module,
    prompts: Iterable[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    cache: PagedKVCache | None = None,
    max_sequences: int = 64,
    chunk: int = 512,
    stop: int | Iterable[int] | None = None,
    temperature: float = 0.0,
    **sampling: Any,
) -> Iterator[tuple[int, list[int]]]:
    """(index, answer) of each prompt, as it ends: sequences join when there is room, and leave when they are done.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, one sequence or more; read as they are needed.
        max_new_tokens: how long an answer gets; one that reaches a `stop` token (by default the model's own) ends with it.
        cache: of `cache_for`, where one is to be kept: prompts that begin alike then share their pages from call to call. By default one
            with room for `max_sequences` prompts and answers as long as the longest.
        max_sequences: how many run at once, at most. chunk: how many tokens of each prompt are computed in one step, at most.
        temperature: 0 is greedy; it and `sampling` (top_k, top_p, min_p, generator) are `fastattn.sample`'s.

    A sequence for which the cache has no page left gives way to those before it, and starts again once one of them is done.

    Raises: OutOfPages where a sequence does not fit the cache alone. ValueError for an empty prompt, and for a count below 1.
    """
    for name, count in (("max_new_tokens", max_new_tokens), ("max_sequences", max_sequences), ("chunk", chunk)):
        if count < 1:
            raise ValueError(f"stream: {name} must be at least 1, got {count}")
    if cache is None:
        prompts = list(prompts)
        pages = max((-(-(len(prompt) + max_new_tokens) // 16) for prompt in prompts), default=1)
        cache = cache_for(model, pages * min(len(prompts), max_sequences) or 1)
    if stop is None:
        stop = (getattr(model, "generation_config", None) or model.config).eos_token_id
    stop = set() if stop is None else set(stop) if isinstance(stop, Iterable) else {operator.index(stop)}
    with closing(Scheduler(cache, _requests(prompts), max_requests=max_sequences, chunk=chunk)) as scheduler:
        while (batch := scheduler.step()) is not None:
            logits = _forward(model, cache, batch)
            tokens = sample(logits, temperature=temperature, **sampling).tolist()
            for request, token in zip(batch.ready, tokens, strict=True):
                request.tokens.append(token)
                if token in stop or len(request.answer) == max_new_tokens:
                    scheduler.finish(request)
                    yield request.index, request.answer


def _requests(prompts: Iterable[Sequence[int]]) -> Iterator[Request]:
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"stream: prompts must hold at least one token each, prompt {index} has none")
        yield Request(index=index, tokens=[int(token) for token in prompt], prompt_length=len(prompt))


@torch.no_grad()
def _forward(model: nn.Module, cache: PagedKVCache, batch: Batch) -> Tensor:
    """Logits after the last token of each request that is ready for another."""
    row, last = (upload(numbers, torch.int64, model.device) for numbers in ([batch.tokens], [end - 1 for end in batch.ends]))
    with _paged(model):
        return model(
            input_ids=row, position_ids=batch.step.positions[None].long(), use_cache=False, logits_to_keep=last, kv_cache=cache
        ).logits[0]


@contextmanager
def _paged(model: nn.Module) -> Iterator[None]:
    """The model on the cache for one forward: between two, it is its owner's."""
    before = model.config._attn_implementation
    register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def generate(model: nn.Module, prompts: Iterable[Sequence[int]], **options: Any) -> list[list[int]]:
    """The answer to each prompt, as token ids, in the prompts' order. Options: `stream`'s."""
    answers = dict(stream(model, prompts, **options))
    return [answers[index] for index in range(len(answers))]
