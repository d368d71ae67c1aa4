"""Text from a model: continuous batching over a paged cache, drawing, stopping, streaming.

    for sequence, text, *_ in generation.stream(model, prompts, tokenizer, max_new_tokens=64): ...
    answers = generation.generate(model, prompts, tokenizer, max_new_tokens=64)

A step takes the scheduler's batch (prompts in chunks, one token of each answer, or a draft's guesses), runs the model on it as one packed
row, and draws a token for each request that is ready. The ids drawn are all that the host waits for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.sampling import sample, sampling_probs
from fastattn.scheduler import Batch, Scheduler, upload

from .decode_graph import DecodeGraphs
from .logits import LogitsProcessor, check_drawn
from .speculative import Drafter, judge, seed_of
from .text import StopStrings, TextRequest
from .tokenizers import StreamDecoder, Tokenizer
from .transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stream` and `generate` take by keyword.

    Drawing, by `fastattn.sample`:
        temperature: 0 is greedy. top_k, top_p, min_p: None keeps all.
        repetition_penalty: of tokens in the prompt and the answer, by transformers' rule: logits are divided by it where positive,
            multiplied where negative.
        seed: of the draws; None takes one from torch's generator. A request's numbers follow from the seed and its place in `prompts`: what
            is drawn for it does not depend on the others, on the batch, or on pages running short (with a draft model, which then gives no
            guesses, only its distribution does not). The logits may, in their last bits: a matrix product of other sizes rounds otherwise.
    Ending:
        max_new_tokens: an answer's tokens; together with its prompt it ends at the model's max_seqlen.
        stop: a string or several; the text ends before the first of them, and what may be part of one is not streamed. They are looked for
            in what follows the first min_new_tokens tokens.
        stop_tokens: ids that end an answer, and count as its last token; None is the tokeniser's eos_id.
        min_new_tokens: no stop token is drawn before.
    Memory:
        page_size: tokens of a page. num_pages: of the cache; None is enough for max_batch answers as long as the longest can be. Where
            they run short, the request that came last gives way, and is computed again later.
        max_batch: how many requests run at once, at most. chunk: how many of a prompt's tokens are computed in one step, at most.
        cuda_graphs: on CUDA, record the forward pass of one token a request, once a batch size, and replay it.
    Speculation:
        draft: a smaller model of the same vocabulary that guesses draft_tokens tokens, which the model accepts or not, in one step. The
            answers' distribution stays the model's, and so do greedy answers.

    Raises: ValueError, TypeError by the option's name.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    seed: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    max_batch: int = 64
    chunk: int = 512
    cuda_graphs: bool = True
    draft: Transformer | None = None
    draft_tokens: int = 4

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "page_size", "num_pages", "max_batch", "chunk", "draft_tokens"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"generate: {name} must be at least 1, got {count}")
        if self.min_new_tokens < 0:
            raise ValueError(f"generate: min_new_tokens must be at least 0, got {self.min_new_tokens}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"generate: repetition_penalty must be positive, got {self.repetition_penalty}")
        if self.stop and not all(self.stop_strings):
            raise ValueError(f"generate: stop must hold no empty string, got {self.stop!r}")
        sampling_probs(torch.zeros(1, 1), **self.sampling)  # which says what is wrong with these

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop)

    @property
    def sampling(self) -> dict[str, Any]:
        """`fastattn.sample`'s."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}


class Event(NamedTuple):
    """What a step added to one answer.

    sequence: the prompt's index. text: what is certain of it now, often nothing. tokens: the ids drawn. reason: None while the answer goes
    on, then "length", "stop token" or "stop string", in its last event.
    """

    sequence: int
    text: str
    tokens: list[int]
    reason: str | None


@dataclass(frozen=True)
class Answer:
    """text: without stop strings and special tokens, empty without a tokeniser. tokens: all that were drawn. reason: as an event's."""

    text: str
    tokens: list[int]
    reason: str


@dataclass
class Statistics:
    """What a generation did. Seconds are of steps, the wait for their ids included; a step that computes prompts and answers at once
    counts for each by its share of the step's tokens.

    prefill_tokens: computed, of prompts and again of those that gave way; cached_tokens: found in the cache instead. new_tokens: drawn;
    decode_tokens: those but for each answer's first, which is its prompt's. peak_pages: most pages in use at once, of num_pages.
    preemptions: requests that gave way. drafted, accepted: guesses.
    """

    num_pages: int
    steps: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_pages: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def prefill_rate(self) -> float:
        """Tokens a second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second, of all answers together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Generation(Iterator[Event]):
    """An iterator of `Event`s, made by `stream`. statistics: up to the last event. close() ends it early; its pages are free then."""

    def __init__(self, model: Transformer, prompts: Iterable[str | Sequence[int]], tokenizer: Tokenizer | None, options: Options) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.device = model.embedding.weight.device
        self._check_models()
        if options.stop_strings and tokenizer is None:
            raise ValueError("generate: tokenizer must be given with stop strings, got None")
        eos = getattr(tokenizer, "eos_id", None)
        given = ([] if eos is None else [eos]) if options.stop_tokens is None else options.stop_tokens
        self.stop_tokens = frozenset(given)
        if wrong := [token for token in given if not 0 <= token < model.config.vocab_size]:
            raise ValueError(f"generate: stop_tokens must hold ids in [0, {model.config.vocab_size}), the model's, got {wrong[0]}")
        cuda_graphs = options.cuda_graphs and self.device.type == "cuda"
        seed = torch.randint(2**62, ()).item() if options.seed is None else options.seed
        requests = [self._request(index, prompt, seed) for index, prompt in enumerate(prompts)]
        num_pages = options.num_pages or self._enough_pages(requests)
        self.cache = model.new_cache(num_pages, options.page_size)
        self.scheduler = Scheduler(self.cache, requests, max_requests=options.max_batch, chunk=options.chunk)
        self.processor = LogitsProcessor(
            repetition_penalty=options.repetition_penalty, min_new_tokens=options.min_new_tokens, stop_tokens=self.stop_tokens,
            max_requests=options.max_batch, vocab_size=model.config.vocab_size, device=self.device,
        )  # fmt: skip
        self.drafter = None
        if options.draft is not None:
            self.drafter = Drafter(
                options.draft, num_pages, options.page_size, num_draft=options.draft_tokens, chunk=options.chunk,
                cuda_graphs=cuda_graphs, processor=self.processor, sampling=options.sampling,
            )  # fmt: skip
        self.graphs = DecodeGraphs(model, self.cache) if cuda_graphs else None
        self.statistics = Statistics(num_pages)
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        self._events.close()

    # What was asked for

    def _check_models(self) -> None:
        model, draft = self.model, self.options.draft
        for name, module in (("model", model), ("draft", draft)):
            if module is not None and not (isinstance(module, Transformer) and module.causal):
                raise TypeError(f"generate: {name} must be a decoder-only Transformer, got {type(module).__name__}")
            if module is not None and module.training and module.config.dropout > 0.0:
                raise ValueError(f"generate: {name} must be in evaluation, for it has dropout: call its eval()")
        if draft is None:
            return
        if draft.config.vocab_size != model.config.vocab_size:
            sizes = f"{model.config.vocab_size}, got {draft.config.vocab_size}"
            raise ValueError(f"generate: draft must have the model's vocabulary of {sizes}")
        if draft.embedding.weight.device != self.device:
            raise ValueError(f"generate: draft must be on the model's device {self.device}, got {draft.embedding.weight.device}")

    def _request(self, index: int, prompt: str | Sequence[int], seed: int) -> TextRequest:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"generate: tokenizer must be given with prompts of text, as prompt {index} is")
            prompt = self.tokenizer.encode(prompt)
        tokens, config = [int(token) for token in prompt], self.model.config
        if not tokens:
            raise ValueError(f"generate: prompts must hold at least one token each, prompt {index} has none")
        if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < config.vocab_size)
            raise ValueError(f"generate: prompts must hold ids in [0, {config.vocab_size}), the model's, prompt {index} has {wrong}")
        room = context_of(self.model) - len(tokens)
        if room < 1:
            raise ValueError(
                f"generate: prompts must be shorter than the model's context of {context_of(self.model)} tokens, "
                f"prompt {index} has {len(tokens)}"
            )
        return TextRequest(
            index=index, tokens=tokens, prompt_length=len(tokens), max_new_tokens=min(self.options.max_new_tokens, room),
            random=random.Random(f"{seed} {index}"), stop=StopStrings(self.options.stop_strings),
            decoder=None if self.tokenizer is None else StreamDecoder(self.tokenizer),
        )  # fmt: skip

    def _enough_pages(self, requests: list[TextRequest]) -> int:
        drafted = self.options.draft_tokens if self.options.draft is not None else 0
        longest = max((request.prompt_length + request.max_new_tokens for request in requests), default=1) + drafted
        return -(-longest // self.options.page_size) * max(1, min(len(requests), self.options.max_batch))

    # The loop

    def _run(self) -> Iterator[Event]:
        with closing(self.scheduler):
            start = time.perf_counter()
            while (batch := self._next_batch()) is not None:
                drawn = self._draw(batch)
                events = [self._extend(request, tokens) for request, tokens in zip(batch.ready, drawn)]
                self._count(batch, time.perf_counter() - start)
                yield from events
                start = time.perf_counter()

    def _next_batch(self) -> Batch | None:
        if self.drafter is not None:
            room = {}
            for request in self.scheduler.running:
                request.draft.clear()
                left = request.max_new_tokens - len(request.tokens) + request.prompt_length - 1
                left = min(left, context_of(self.drafter.model) - len(request.tokens))
                if left > 0 and self.cache.length(request.id) == len(request.tokens) - 1:
                    room[request] = left
            self.drafter.propose(room)
        batch, pages = self.scheduler.step(), self.cache.num_pages - self.cache.num_free
        self.statistics.peak_pages = max(self.statistics.peak_pages, pages)
        return batch

    @torch.no_grad()
    def _draw(self, batch: Batch) -> list[list[int]]:
        """The tokens that follow each request that is ready: one, or a draft's guesses that are accepted and one."""
        hidden = self._hidden(batch)
        if not batch.ready:
            return []
        rows = [end - 1 - back for request, end in zip(batch.ready, batch.ends) for back in range(len(request.draft), -1, -1)]
        if len(rows) < len(hidden):
            hidden = hidden[upload(rows, torch.int64, self.device)]
        named = [(request, request.draft[:count]) for request in batch.ready for count in range(len(request.draft) + 1)]
        logits = self.processor(self.model.head(hidden), named)
        if any(request.draft for request in batch.ready):
            drawn = judge(logits, batch.ready, self.options.sampling)
        else:
            seeds = upload([seed_of(request.random) for request in batch.ready], torch.int64, self.device)
            drawn = [[token] for token in sample(logits, seeds=seeds, **self.options.sampling).tolist()]
        check_drawn("model", batch.ready, [tokens[-1] for tokens in drawn])
        return drawn

    def _hidden(self, batch: Batch) -> Tensor:
        """(T, H)"""
        tokens = upload(batch.tokens, torch.int64, self.device)
        if self.graphs is not None and batch.step.max_seqlen_q == 1:
            return self.graphs(tokens)
        return self.model.hidden(tokens, cache=self.cache)

    def _extend(self, request: TextRequest, drawn: list[int]) -> Event:
        self.statistics.drafted += len(request.draft)
        self.statistics.accepted += len(drawn) - 1
        text, before = "", len(request.tokens)
        for token in drawn:
            text += request.extend(token, self.stop_tokens, self.options.min_new_tokens)
            if request.reason is not None:
                break
        new = request.tokens[before:]
        self.statistics.new_tokens += len(new)
        self.statistics.decode_tokens += len(new) - (before == request.prompt_length)
        if request.draft and self.cache.length(request.id) >= len(request.tokens):
            self.cache.truncate(request.id, len(request.tokens) - 1)  # guesses that were rejected
        if request.reason is not None:
            self.scheduler.finish(request)
        return Event(request.index, text, new, request.reason)

    def _count(self, batch: Batch, seconds: float) -> None:
        counts, share = self.statistics, batch.prefill / len(batch.tokens)
        counts.steps += 1
        counts.prefill_tokens += batch.prefill
        counts.prefill_seconds += seconds * share
        counts.decode_seconds += seconds * (1 - share)
        counts.cached_tokens, counts.preemptions = self.scheduler.cached_tokens, self.scheduler.preemptions


def context_of(model: Transformer) -> int | float:
    """The longest sequence of a model."""
    return float("inf") if model.config.positions == "alibi" else model.config.max_seqlen


def stream(
    model: Transformer, prompts: Iterable[str | Sequence[int]], tokenizer: Tokenizer | None = None, **options: Any
) -> Generation:
    """Continue prompts, and give what comes as it comes.

    Args:
        model: a decoder-only `Transformer`, on any device.
        prompts: texts, which need the tokenizer, or ids; one or more of any lengths.
        options: those of `Options`.

    Returns: a `Generation`: iterate over it for `Event`s; its `statistics` are up to date after each.

    Raises: ValueError, TypeError for what was asked, by name and prompt, before anything is computed; while it runs, OutOfPages where one
        request does not fit num_pages alone, and NoDistribution for logits of NaN.

    Example:
        >>> for event in stream(model, ["Once upon"], tokenizer, temperature=0.8, seed=1):
        ...     print(event.text, end="", flush=True)
    """
    if isinstance(prompts, str):
        raise TypeError("generate: prompts must be a list of texts or of lists of ids, got one str")
    known = [f.name for f in fields(Options)]
    if unknown := sorted(options.keys() - set(known)):
        raise TypeError(f"generate: there is no option {', '.join(unknown)}; there are {', '.join(known)}")
    return Generation(model, prompts, tokenizer, Options(**options))


def generate(
    model: Transformer, prompts: Iterable[str | Sequence[int]], tokenizer: Tokenizer | None = None, **options: Any
) -> list[Answer]:
    """The answer to each prompt, in the prompts' order. Arguments and errors: `stream`'s.

    Example:
        >>> generate(model, ["2 + 2 ="], tokenizer, max_new_tokens=4)[0].text
    """
    answers: dict[int, Answer] = {}
    for sequence, text, tokens, reason in stream(model, prompts, tokenizer, **options):
        before = answers.get(sequence, Answer("", [], ""))
        answers[sequence] = Answer(before.text + text, before.tokens + tokens, reason or "")
    return [answers[sequence] for sequence in sorted(answers)]
