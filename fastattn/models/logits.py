"""What is done to logits before a token is drawn from them, by the tokens that are there already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.scheduler import Request, upload


class NoDistribution(RuntimeError):
    """There are NaN or +inf among a model's logits, or nothing but −inf."""


def check_drawn(whose: str, requests: Sequence[Request], ids: Sequence[int]) -> None:
    """Raise NoDistribution where `fastattn.sample` could draw nothing for a request. whose: "model" or "draft"."""
    for request, id in zip(requests, ids):
        if id < 0:
            raise NoDistribution(f"generate: the {whose}'s logits for prompt {request.index} hold NaN or +inf, or nothing but −inf")


class LogitsProcessor:
    """A penalty on tokens that stand in the prompt or the answer, and no end before an answer has its minimum length.

    Args:
        repetition_penalty: a logit of a token that is there already is divided by it where positive, multiplied where negative
            (Keskar et al., arXiv 1909.05858; transformers' repetition_penalty). 1 leaves all.
        min_new_tokens, stop_tokens: while an answer is shorter, the logits of these tokens are −inf.
        max_requests: rows of the table of tokens seen, (max_requests, vocab_size) bool, which only a penalty takes.

    The table follows the requests' lists of tokens: what is new of them travels to the device with each call, and nothing comes back.
    """

    def __init__(
        self, *, repetition_penalty: float, min_new_tokens: int, stop_tokens: frozenset[int], max_requests: int, vocab_size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.penalty, self.min_new_tokens = repetition_penalty, min_new_tokens
        self.device = device
        self._stops = upload(sorted(stop_tokens), torch.int64, device) if stop_tokens and min_new_tokens else None
        self._seen = None
        if repetition_penalty != 1.0:
            self._seen = torch.zeros(max_requests, vocab_size, dtype=torch.bool, device=device)
        self._free = list(range(max_requests))
        self._rows: dict[Request, int] = {}  # of the table
        self._known: dict[Request, int] = {}  # how many of its tokens the table has

    def __call__(self, logits: Tensor, rows: Sequence[tuple[Request, Sequence[int]]]) -> Tensor:
        """logits (R, V), each row of a request and of tokens that follow its own. Returns (R, V), which may be the same tensor."""
        if self._seen is not None:
            seen = self._seen_by(rows)
            logits = logits.float()
            logits = torch.where(seen, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)
        short = [len(r.tokens) - r.prompt_length + len(more) < self.min_new_tokens for r, more in rows]
        if self._stops is not None and any(short):
            short = upload(short, torch.bool, self.device)[:, None]
            logits = logits.index_copy(1, self._stops, logits[:, self._stops].masked_fill(short, -torch.inf))
        return logits

    def _seen_by(self, rows: Sequence[tuple[Request, Sequence[int]]]) -> Tensor:
        """(R, V) bool."""
        for request in [request for request in self._rows if request.id < 0]:  # it is done, or waits
            self._free.append(self._rows.pop(request))
            del self._known[request]
        for request in dict.fromkeys(request for request, _ in rows if request not in self._rows):
            self._rows[request], self._known[request] = self._free.pop(), 0
            self._seen[self._rows[request]] = False
        news = [(self._rows[r], token) for r in self._rows for token in r.tokens[self._known[r] :]]
        self._known = {request: len(request.tokens) for request in self._rows}
        _mark(self._seen, news)
        seen = self._seen[upload([self._rows[request] for request, _ in rows], torch.int64, self.device)]
        _mark(seen, [(row, token) for row, (_, more) in enumerate(rows) for token in more])
        return seen


def _mark(table: Tensor, places: list[tuple[int, int]]) -> None:
    if places:
        row, token = upload(list(zip(*places)), torch.int64, table.device)
        table[row, token] = True
