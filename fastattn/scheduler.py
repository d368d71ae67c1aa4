"""Continuous batching: which of many requests compute which of their tokens in each step of a paged cache.

A request waits until there are pages for all its tokens, computes them in chunks beside the others' single new ones, and leaves when it
is done. One for which no page is left gives way to those before it: its pages are freed, and it computes its tokens again once another has
ended. Nothing here knows a model; `fastattn.models.generation` and `fastattn.integrations.serving` both run on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv_cache import PagedKVCache, Step
from .page_pool import OutOfPages


@dataclass(eq=False, kw_only=True)
class Request:
    """A prompt and its answer so far.

    index: the prompt's. tokens: its ids and the answer's. prompt_length: where the answer starts. draft: ids guessed to follow, computed
    together with the last of `tokens`. id: its sequence's in the cache, −1 before and after that.
    """

    index: int
    tokens: list[int]
    prompt_length: int
    draft: list[int] = field(default_factory=list)
    id: int = -1

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass(frozen=True)
class Batch:
    """One step: T new tokens, one running request's after another's.

    tokens: (T,) their ids. prefill: how many of these are of a prompt, or computed again. ready: the requests whose last token is among
    them; after the forward pass one can be drawn for each. ends: where the new tokens of each of these end in T, its draft's included.
    step: the cache's.
    """

    tokens: list[int]
    prefill: int
    ready: list[Request]
    ends: list[int]
    step: Step


class Scheduler:
    """Takes requests into a cache, step by step.

    Args:
        cache: whose `step` the scheduler calls; the caller's forward pass appends to it and attends.
        requests: read as they are needed.
        max_requests: how many run at once, at most. chunk: how many tokens of each are computed in one step, at most.

    Attributes: running, in the order in which they came. waiting: those that gave way, or found no room. preemptions: how many gave way.
    cached_tokens: tokens that were in the cache as their requests joined, and needed no computing.

    Example:
        >>> scheduler = Scheduler(cache, requests, max_requests=64, chunk=512)
        >>> while (batch := scheduler.step()) is not None:
        ...     for request, token in zip(batch.ready, draw(batch)):
        ...         request.tokens.append(token)
        ...         if token == eos:
        ...             scheduler.finish(request)
    """

    def __init__(self, cache: PagedKVCache, requests: Iterable[Request], *, max_requests: int, chunk: int) -> None:
        self.cache, self.max_requests, self.chunk = cache, max_requests, chunk
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preemptions = self.cached_tokens = 0
        self._more = iter(requests)
        self._full = False  # pages ran short: nobody joins before one ends

    def step(self) -> Batch | None:
        """Let requests join, and take the cache's next step; None when all are done.

        Raises: OutOfPages where a request does not fit the cache alone.
        """
        self._admit()
        while self.running:
            try:
                return self._take_step()
            except OutOfPages:
                drafts = [request.draft for request in self.running if request.draft]
                if len(self.running) == 1 and not drafts:
                    raise
                for draft in drafts:  # guesses go before requests do
                    draft.clear()
                if not drafts:
                    self._give_way()
                    self.preemptions += 1
        return None

    def finish(self, request: Request) -> None:
        """End a running request, after the forward pass of the step; what it computed stays for those that begin alike."""
        self.running.remove(request)
        self.cache.commit()
        self._leave(request)
        self._full = False

    def close(self) -> None:
        """Take all running requests off the cache."""
        while self.running:
            self._leave(self.running.pop())

    def _leave(self, request: Request) -> None:
        self.cache.free(request.id)
        request.id = -1

    def _admit(self) -> None:
        while not self._full and len(self.running) < self.max_requests:
            request = self.waiting.popleft() if self.waiting else next(self._more, None)
            if request is None:
                return
            request.id = self.cache.allocate(request.tokens)
            found = self.cache.length(request.id)
            self.running.append(request)
            if len(self.running) > 1 and not self._has_room():
                self._give_way()
            else:
                self.cached_tokens += found

    def _has_room(self) -> bool:
        """Are there pages for all tokens of those that run?"""
        size, length = self.cache.page_size, self.cache.length
        missing = (-(-len(s.tokens) // size) + -length(s.id) // size for s in self.running)
        return sum(missing) <= self.cache.num_free

    def _give_way(self) -> None:
        request = self.running.pop()
        self._leave(request)
        self.waiting.appendleft(request)
        self._full = True

    def _take_step(self) -> Batch:
        tokens: list[int] = []
        counts, ready, ends, prefill = [], [], [], 0
        for request in self.running:
            new = request.tokens[self.cache.length(request.id) :]
            if len(new) > 1 or len(request.tokens) == request.prompt_length:
                prefill += min(len(new), self.chunk)
            if len(new) > self.chunk:
                new = new[: self.chunk]
            else:
                new += request.draft
                ready.append(request)
                ends.append(len(tokens) + len(new))
            tokens += new
            counts.append(len(new))
        return Batch(tokens, prefill, ready, ends, self.cache.step([request.id for request in self.running], counts, tokens))


def upload(numbers: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list as a tensor; on CUDA it travels from pinned memory, and nobody waits."""
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
