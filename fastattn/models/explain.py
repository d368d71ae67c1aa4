"""One sentence's way through a language model, as a page that needs nothing else: `fastattn explain "text" --model DIR --out page.html`.

`explain` measures (inspection.py) and writes numbers as JSON into explain.html, whose script draws them.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import inspection
from .files import write_atomically
from .tokenizers import Tokenizer
from .transformer import Transformer

MOST_TOKENS = 96  # of a text: attention takes S² bytes a head
LISTED = 2000  # tokens of the last distribution that are named; the rest are counted by logit
ANALOGIES = (("king", "man", "woman"), ("Paris", "France", "Italy"), ("walking", "walk", "swim"), ("bigger", "big", "cold"))
COMPARED = ("bank", "We walked along the bank of the river", "She took the money to the bank in town")


def explain(
    model: Transformer, tokenizer: Tokenizer, text: str, *, name: str = "", compared: Sequence[str] = COMPARED
) -> str:
    """The page, as HTML.

    model, tokenizer: as `load` returns them. text: of 1 to `MOST_TOKENS` tokens. name: the model's, for the title. compared: a word, and
    two sentences that have it.

    Raises: ValueError for a text of no tokens or too many, or a vocabulary that is not the model's.
    """
    page = (Path(__file__).parent / "explain.html").read_text()
    data = json.dumps(measure(model, tokenizer, text, name=name, compared=compared), ensure_ascii=False, separators=(",", ":"))
    return page.replace("/*DATA*/null", data.replace("<", "\\u003c"), 1)  # "</script>" in a text would end the script


def write_page(path: str | Path, page: str) -> None:
    write_atomically(Path(path), page.encode())


@torch.no_grad()
def measure(
    model: Transformer, tokenizer: Tokenizer, text: str, *, name: str = "", compared: Sequence[str] = COMPARED
) -> dict[str, Any]:
    """All that the page shows, of types that JSON has."""
    if not (isinstance(model, Transformer) and model.causal):
        raise ValueError(f"explain: model must be a decoder-only language model, got {type(model).__name__}")
    ids = tokenizer.encode(text)
    longest = min(MOST_TOKENS, model.config.max_seqlen)
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"explain: text must have 1 to {longest} tokens, got {len(ids)}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"explain: tokenizer must have at most the model's {model.config.vocab_size} tokens, got {tokenizer.vocab_size}")
    device = model.embedding.weight.device
    seen = inspection.trace(model, torch.tensor(ids, device=device))
    if not torch.isfinite(seen.stream).all():
        raise ValueError("explain: model must compute finite numbers, and its residual stream has others")
    names = _Names(tokenizer)
    return {
        "name": name or type(model).__name__,
        "text": text,
        "tokens": [{"id": id, "text": names(id)} for id in ids],
        "shape": _shape(model, len(ids)),
        "embeddings": _embeddings(model, tokenizer, names, seen, compared),
        "heads": _heads(model, seen),
        "experts": [None if chosen is None else chosen.tolist() for chosen in seen.experts],
        "stream": _stream(model, names, seen),
        "sampling": _sampling(model, names, seen),
        "cache": _cache(model),
    }


class _Names:
    """Tokens as a person can read them, each decoded once; tokens of one byte that is no character as that byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, id: int) -> str:
        if id not in self.known:
            text = self.tokenizer.decode([id], special=True) if id < self.tokenizer.vocab_size else ""
            self.known[id] = text if text and "\ufffd" not in text else f"⟨{id}⟩"
        return self.known[id]


def _rounded(x: Tensor, digits: int = 4) -> Any:
    return [_rounded(part, digits) for part in x] if x.dim() else round(float(x), digits)


def _bytes(x: Tensor) -> str:
    """Values in 0 … 1 as bytes, in base 64."""
    return base64.b64encode((x.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes()).decode()


def _shape(model: Transformer, seqlen: int) -> dict[str, Any]:
    """Where the parameters lie, and what passes through."""
    c = model.config
    middle = f"experts: {c.top_k} of {c.num_experts}, each {c.intermediate_size} wide" if c.num_experts else "feed-forward"
    stages = [
        ("tokens", [seqlen], "ids"),
        ("embedding", [seqlen, c.hidden_size], f"one of {c.vocab_size:,} rows for each token; positions: {c.positions}"),
        ("queries", [seqlen, c.num_heads, c.head_dim], f"in each of {c.num_layers} layers, {c.num_heads} heads"),
        ("keys, values", [seqlen, c.num_kv_heads, c.head_dim], f"{c.num_heads // c.num_kv_heads} query heads share a key head"),
        ("attention", [c.num_heads, seqlen, seqlen], "weights; never in memory at once but for this page"),
        (middle, [seqlen, c.intermediate_size], f"on each token alone, {c.activation}"),
        ("residual stream", [seqlen, c.hidden_size], f"each layer adds to it; {c.norm} norm"),
        ("logits", [seqlen, c.vocab_size], "the embedding again" if c.tied_embeddings else "a matrix of their own"),
    ]
    return {
        "parameters": inspection.parameters_by_part(model),
        "total": model.num_parameters(),
        "layers": c.num_layers, "num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads,
        "windows": [c.layer_window(number) for number in range(c.num_layers)],
        "stages": [{"name": stage, "size": size, "note": note} for stage, size, note in stages],
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Embeddings.


def _embeddings(
    model: Transformer, tokenizer: Tokenizer, names: _Names, seen: inspection.Trace, compared: Sequence[str]
) -> dict[str, Any]:
    ids, cosines = inspection.nearest(model, model.embedding.weight[seen.tokens], 8, seen.tokens[:, None])
    title, picture = inspection.position_picture(model, min(model.config.max_seqlen, 128))
    return {
        "nearest": [_listed(names, *row) for row in zip(ids.tolist(), _rounded(cosines, 3), strict=True)],
        "analogies": [_analogy(model, tokenizer, names, *words) for words in ANALOGIES],
        "compared": _compare(model, tokenizer, *compared),
        "positions": {"title": title, "rows": picture.shape[0], "cols": picture.shape[1], "data": _bytes(picture / 2 + 0.5)},
    }


def _listed(names: _Names, ids: Sequence[int], values: Sequence[float]) -> list[list[Any]]:
    return [[names(id), value] for id, value in zip(ids, values, strict=True)]


def _analogy(model: Transformer, tokenizer: Tokenizer, names: _Names, a: str, b: str, c: str) -> dict[str, Any]:
    """a − b + c over embeddings of length one, and the tokens nearest to it besides the three; or why there is no such thing here."""
    row: dict[str, Any] = {"a": a, "b": b, "c": c}
    ids = [tokenizer.encode(f" {word}", special=False) for word in (a, b, c)]
    if long := [word for word, pieces in zip((a, b, c), ids, strict=True) if len(pieces) != 1]:
        return row | {"missing": f"no single token here: {', '.join(long)}"}
    ids = torch.tensor(ids, device=model.embedding.weight.device)[:, 0]
    x = F.normalize(model.embedding.weight[ids].float(), dim=-1)
    found, cosines = inspection.nearest(model, (x[0] - x[1] + x[2])[None], 5, ids[None])
    return row | {"nearest": _listed(names, found[0].tolist(), _rounded(cosines[0], 3))}


def _compare(model: Transformer, tokenizer: Tokenizer, word: str, *sentences: str) -> dict[str, Any]:
    """A word's vector in two sentences: after each layer, the cosine between the two, and of each to the word's embedding."""
    vectors = []
    for sentence in sentences:
        before, found, _ = sentence.partition(word)
        if not found:
            raise ValueError(f"explain: compared must be a word and two sentences that have it, got {sentence!r} without {word!r}")
        tokens = tokenizer.encode(before + word)
        stream = inspection.trace(model, torch.tensor(tokens, device=model.embedding.weight.device)).stream
        vectors.append((stream[:, -1].float(), model.embedding.weight[tokens[-1]].float()))
    (a, static), (b, _) = vectors
    return {
        "word": word, "sentences": list(sentences),
        "between": _rounded(F.cosine_similarity(a, b, -1), 4),
        "to_static": [_rounded(F.cosine_similarity(x, static[None], -1), 4) for x in (a, b)],
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Layers.


def _heads(model: Transformer, seen: inspection.Trace) -> dict[str, Any]:
    """Each layer's attention weights as bytes, (N, S, S) row by row, and each head's kind and scores."""
    layers = []
    for weights, scores in zip(seen.attention, inspection.head_scores(model, seen), strict=True):
        of_heads = [{kind: round(float(score[head]), 3) for kind, score in scores.items()} for head in range(len(weights))]
        layers.append({
            "weights": _bytes(weights), "scores": of_heads, "kinds": [inspection.kind_of_head(of_head) for of_head in of_heads],
        })  # fmt: skip
    return {"layers": layers, "kinds": inspection.KINDS, "threshold": inspection.THRESHOLD}


def _stream(model: Transformer, names: _Names, seen: inspection.Trace) -> dict[str, Any]:
    """After each layer, for each token: the residual stream's length, and the five likeliest next tokens."""
    norms = seen.stream.float().norm(dim=-1)  # (L + 1, S)
    lens = []
    for stream in seen.stream:
        probs, ids = inspection.logit_lens(model, stream).exp().topk(min(5, model.config.vocab_size))
        lens.append([_listed(names, *row) for row in zip(ids.tolist(), _rounded(probs, 4), strict=True)])
    return {"norms": _rounded(norms, 2), "lens": lens}


def _sampling(model: Transformer, names: _Names, seen: inspection.Trace) -> dict[str, Any]:
    """The last token's distribution: the largest log-probabilities with their tokens, and of the rest how many lie in each 1/8."""
    logits = inspection.logit_lens(model, seen.stream[-1, -1])
    values, ids = logits.sort(descending=True, stable=True)
    listed = min(LISTED, len(ids))
    lists = [[names(id), round(value, 4)] for id, value in zip(ids[:listed].tolist(), values[:listed].tolist(), strict=True)]
    bins, counts = torch.unique((values[listed:] * 8).round() / 8, return_counts=True)
    return {"tokens": lists, "rest": [[value, count] for value, count in zip(bins.tolist(), counts.tolist(), strict=True)]}


def _cache(model: Transformer) -> dict[str, Any]:
    """Bytes that the cache grows by with each token, and the operations of generating n tokens with it and without."""
    c, itemsize = model.config, model.embedding.weight.dtype.itemsize
    lengths = sorted({round(2 ** (step / 4)) for step in range(4 * int(math.log2(c.max_seqlen)) + 1)})
    read = [n * model.flops_per_token(n) / 3 for n in lengths]  # n tokens, each once: what generating them takes with a cache
    without = [read[0]]  # Σ over m ≤ n of reading m tokens, by trapezoids
    for (m, before), (n, now) in pairwise(zip(lengths, read, strict=True)):
        without.append(without[-1] + (n - m) * (before + now) / 2)
    return {
        "bytes_per_token": 2 * c.num_layers * c.num_kv_heads * c.head_dim * itemsize, "itemsize": itemsize,
        "unshared_bytes_per_token": 2 * c.num_layers * c.num_heads * c.head_dim * itemsize,
        "lengths": lengths, "with_cache": read, "without_cache": without,
    }  # fmt: skip
