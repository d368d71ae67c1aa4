"""What happens inside a language model while it reads: measured through hooks, on the model as it is.

Letters as in transformer.py: S tokens of one text, L layers, H hidden size (heads: N), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn.nn as fnn
from fastattn.ops.attention import attention
from fastattn.ops.rotary import apply_rotary

from .positions import alibi_slopes, sinusoidal
from .transformer import Transformer


@dataclass
class Trace:
    """One text's way through a model.

    tokens: (S,). stream: (L + 1, S, H), the residual stream before the first layer and after each. attention: for each layer the weights
    (N, S, S) with which token i reads token j; a row sums to 1, or to less where a sink takes the rest. experts: for each layer the ids
    (S, top_k) that its router chose, None where there is no mixture.
    """

    tokens: Tensor
    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    attention: list[Tensor] = field(default_factory=list)
    experts: list[Tensor | None] = field(default_factory=list)


@torch.no_grad()
def trace(model: Transformer, tokens: Tensor) -> Trace:
    """Read tokens (S,) and keep what passes by. The model is left as it was: hooks see each layer's inputs and outputs.

    Raises: ValueError for no tokens, or more than the model takes.
    """
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(f"trace: tokens must have shape (S,) with S > 0, got {tuple(tokens.shape)}")
    seen, stream = Trace(tokens), []
    seen.experts = [None] * len(model.layers)

    def read_layer(layer: torch.nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        if not stream:
            stream.append(inputs[0][0])
        stream.append(out[0])

    def read_attention(module: fnn.Attention, inputs: tuple[Tensor], places: dict[str, Any]) -> None:
        seen.attention.append(attention_weights(module, inputs[0], **places)[0])

    with _hooked() as hooks:
        for number, layer in enumerate(model.layers):
            hooks.append(layer.register_forward_hook(read_layer))
            hooks.append(layer.attention.register_forward_pre_hook(read_attention, with_kwargs=True))
            if layer.moe is not None:

                def read_experts(module: torch.nn.Module, inputs: tuple[Tensor, ...], number: int = number) -> None:
                    seen.experts[number] = inputs[1].view(len(tokens), -1)

                hooks.append(layer.moe.experts.register_forward_pre_hook(read_experts))
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval().hidden(tokens[None])
        finally:
            for module, training in modes.items():
                module.training = training
    seen.stream = torch.stack(stream)
    return seen


@contextmanager
def _hooked() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_weights(
    module: fnn.Attention, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, alibi_slopes: Tensor | None = None,
    causal: bool = True, **places: Any,
) -> Tensor:  # fmt: skip
    """(B, N, S, S) float32: the weights of `module(x, cos, sin, …)`, which it never forms itself. From its queries, keys and the
    log-sum-exp of their scores: e^(score − lse).

    x: (B, S, H). Other arguments are the module's; packed sequences, a cache and a context are not looked into.
    """
    q, (k, v) = module.project_queries(x), module.project_context(x)
    if cos is not None:
        q, k = apply_rotary(q, k, cos, sin)
    scale = 1 / math.sqrt(module.head_dim) if module.softmax_scale is None else module.softmax_scale
    _, lse = attention(
        q, k, v, causal=causal, window=module.window, softmax_scale=scale, softcap=module.softcap, alibi_slopes=alibi_slopes,
        sinks=module.sinks, return_lse=True,
    )  # fmt: skip

    k = k.repeat_interleave(module.num_heads // module.num_kv_heads, 2)
    scores = scale * torch.einsum("bind,bjnd->bnij", q.float(), k.float())
    if module.softcap:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    distance = torch.arange(x.shape[1], device=x.device)
    distance = distance[:, None] - distance  # i − j
    if alibi_slopes is not None:
        scores -= alibi_slopes.float()[..., None, None] * distance.abs()
    left, right = module.window[0], 0 if causal else module.window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if right is not None:
        hidden |= distance < -right
    if left is not None:
        hidden |= distance > left
    return torch.exp(scores - lse[..., None]).masked_fill(hidden, 0.0)


# --------------------------------------------------------------------------------------------------------------------
# What heads do.

KINDS = {
    "previous token": "reads the token before",
    "first token": "rests on the first token, which serves as a sink where there is nothing to read (arXiv 2309.17453)",
    "same token": "reads the token itself",
    "duplicate token": "reads where the same token stood before",
    "induction": "reads what followed the same token before, and so copies (Olsson et al., arXiv 2209.11895)",
}
THRESHOLD = 0.4  # a kind's mean weight from which a head is called so


def head_scores(model: Transformer, seen: Trace, length: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    """For each layer and kind of `KINDS`, the mean weight (N,) that heads give to what defines the kind.

    The first three are read off `seen`'s own text (of its second token on), the last two off `length` random tokens that come twice, where
    nothing but having been there before tells what comes next.
    """
    length = min(length, model.config.max_seqlen // 2)
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size, (length,), generator=generator).to(seen.tokens.device)
    twice = trace(model, torch.cat([once, once])).attention
    scores = []
    for weights, repeated in zip(seen.attention, twice, strict=True):
        text, second = weights[:, 1:], repeated[:, length:]
        scores.append({
            "previous token": _mean_diagonal(text, 0),
            "first token": text[:, :, 0].mean(-1) if text.shape[1] else weights.new_zeros(len(weights)),
            "same token": _mean_diagonal(text, 1),
            "duplicate token": _mean_diagonal(second, 0),
            "induction": _mean_diagonal(second, 1),
        })  # fmt: skip
    return scores


def _mean_diagonal(weights: Tensor, offset: int) -> Tensor:
    """The mean over i of weights[:, i, i + offset]; 0 for no rows."""
    diagonal = weights.diagonal(offset, -2, -1)
    return diagonal.mean(-1) if diagonal.shape[-1] else weights.new_zeros(len(weights))


def kind_of_head(scores: dict[str, float]) -> str | None:
    """The kind of the highest score, None where that is below `THRESHOLD`."""
    kind = max(scores, key=scores.__getitem__)
    return kind if scores[kind] >= THRESHOLD else None


# --------------------------------------------------------------------------------------------------------------------
# What vectors say.


@torch.no_grad()
def logit_lens(model: Transformer, stream: Tensor) -> Tensor:
    """(…, V) log-probabilities of the next token, were the residual stream (…, H) the last layer's (nostalgebraist, 2020)."""
    return torch.log_softmax(model.head(model.norm(stream)).float(), -1)


@torch.no_grad()
def nearest(model: Transformer, vectors: Tensor, k: int, besides: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k tokens (M, k) whose embeddings point most nearly the way of vectors (M, H), and the cosines. besides: (M, …) ids to leave
    out."""
    table = F.normalize(model.embedding.weight.float(), dim=-1)
    cosines = F.normalize(vectors.float(), dim=-1) @ table.T  # (M, V)
    if besides is not None:
        cosines.scatter_(1, besides, -math.inf)
    values, ids = cosines.topk(min(k, cosines.shape[1]))
    return ids, values


@torch.no_grad()
def position_picture(model: Transformer, length: int) -> tuple[str, Tensor]:
    """What positions look like to the model: what the picture is, and its values in −1 … 1, a row a position."""
    config, device = model.config, model.embedding.weight.device
    if config.positions == "rotary":
        return "cosine of the angle by which each pair of a head's dims is turned", model.rotary.cos[:length].float()
    if config.positions == "alibi":
        distance = torch.arange(length, device=device, dtype=torch.float32)[:, None]
        bias = -distance * alibi_slopes(config.num_heads, device)
        return "weight left after the bias by distance, for each head", torch.exp(bias)
    if config.positions == "learned":
        vectors = model.position_embedding.weight[:length].float()
        return "cosine between the vectors of two positions", F.normalize(vectors, dim=-1) @ F.normalize(vectors, dim=-1).T
    return "the vector added to a token, a row a position", sinusoidal(torch.arange(length, device=device), config.hidden_size)


def parameters_by_part(model: Transformer) -> dict[str, int]:
    """Parameters of each part of the model; they add up to `model.num_parameters()`."""
    parts = {"embedding": 0, "positions": 0, "attention": 0, "feed-forward": 0, "experts": 0, "router": 0, "norms": 0, "unembedding": 0}
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
    return {part: count for part, count in parts.items() if count}


def _part_of(name: str) -> str:
    if "norm" in name:
        return "norms"
    for words, part in (("position_embedding", "positions"), ("unembedding", "unembedding"), ("embedding", "embedding"),
                        ("attention", "attention"), ("moe.gate", "router"), ("moe", "experts")):  # fmt: skip
        if words in name:
            return part
    return "feed-forward"
