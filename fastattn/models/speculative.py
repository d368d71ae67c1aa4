"""Speculative decoding: a small model guesses several tokens, the large one judges them all in one step.

Guesses d_1 … d_k are drawn from the small model's distributions q_1 … q_k. The large one's are p_1 … p_k, and p_{k+1} after the last.
d_j is accepted with probability min(1, p_j(d_j) / q_j(d_j)). At the first that is not, a token is drawn from max(0, p_j − q_j), normalised;
where all are, one from p_{k+1}. What comes out has the large model's distribution exactly (Leviathan et al., arXiv 2211.17192). At
temperature 0 all distributions are of one token, and a guess is accepted if and only if it is the large model's own choice.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from fastattn.ops.sampling import sample, sampling_probs
from fastattn.page_pool import OutOfPages
from fastattn.scheduler import upload

from .decode_graph import DecodeGraphs
from .logits import LogitsProcessor, check_drawn
from .text import TextRequest
from .transformer import Transformer


def accept(p: Tensor, q: Tensor, draft: Tensor, lengths: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """How many guesses of each of B drafts of up to K are accepted, and what the token after them is drawn from.

    Args:
        p: (B, K + 1, V) the judge's distributions before and after each guess. q: (B, K, V) those that the guesses were drawn from.
        draft: (B, K) int64, the guesses; lengths: (B,) how many of them there are. What lies beyond a draft's length means nothing in
        any tensor. uniform: (B, K) numbers in [0, 1).

    Returns: accepted (B,) int64, and weights (B, V), not normalised.
    """
    (batch, longest), device = draft.shape, p.device
    places, rows = torch.arange(longest + 1, device=device), torch.arange(batch, device=device)
    p_of_draft, q_of_draft = (t[:, :longest].gather(2, draft[..., None])[..., 0] for t in (p, q))
    good = (uniform * q_of_draft < p_of_draft) & (places[:longest] < lengths[:, None])
    accepted = good.long().cumprod(1).sum(1)
    of_judge = p[rows, accepted]
    rejected = accepted < lengths
    of_draft = q[rows, accepted.clamp(max=longest - 1)]
    rest = torch.where(rejected[:, None], of_judge - of_draft, of_judge).clamp(min=0.0)
    # Two distributions that differ by rounding alone leave nothing of each other.
    return accepted, torch.where(rest.sum(1, keepdim=True) > 0.0, rest, of_judge)


class Drafter:
    """Guesses tokens of running requests by a small model with a cache of its own.

    Args:
        model, num_pages, page_size: the small one, and its cache's. num_draft: tokens a guess. chunk: tokens of a request that are
        computed in one step, at most. cuda_graphs: record steps of one token a request.
        processor, sampling: what is done to the logits before a draw, and `sampling_probs`' options.

    Where its cache has no page left, there is no guess.
    """

    def __init__(
        self, model: Transformer, num_pages: int, page_size: int, *, num_draft: int, chunk: int, cuda_graphs: bool,
        processor: LogitsProcessor, sampling: dict,
    ) -> None:  # fmt: skip
        self.model, self.num_draft, self.chunk = model, num_draft, chunk
        self.processor, self.sampling = processor, sampling
        self.cache = model.new_cache(num_pages, page_size)
        self.device = self.cache.device
        self.graphs = DecodeGraphs(model, self.cache) if cuda_graphs else None
        self._ids: dict[TextRequest, int] = {}

    @torch.no_grad()
    def propose(self, room: dict[TextRequest, int]) -> None:
        """Set `draft` and `draft_probs` of running requests, of which all tokens but the last are computed. room: how many tokens each may
        be given, at most."""
        self._follow(room)
        probs: dict[TextRequest, list[Tensor]] = {request: [] for request in room}
        try:
            while long := [r for r in room if len(r.tokens) - self.cache.length(self._ids[r]) > self.chunk]:
                self._hidden(long)
            for place in range(self.num_draft):
                batch = [request for request in room if room[request] > place]
                if not batch:
                    break
                for request, token, q in zip(batch, *self._draw(batch)):
                    request.draft.append(token)
                    probs[request].append(q)
        except OutOfPages:
            for request in room:
                request.draft.clear()
        for request in room:
            request.draft_probs = torch.stack(probs[request]) if request.draft else None

    def _follow(self, requests: Iterable[TextRequest]) -> None:
        """Bring the cache's sequences in line with the requests' tokens, the last of which is still to be computed."""
        for request in [request for request in self._ids if request.id < 0]:  # it is done, or waits
            self.cache.free(self._ids.pop(request))
        for request in requests:
            if request not in self._ids:
                self._ids[request] = self.cache.allocate(request.tokens)
            elif self.cache.length(self._ids[request]) >= len(request.tokens):
                self.cache.truncate(self._ids[request], len(request.tokens) - 1)  # guesses that were rejected

    def _draw(self, batch: list[TextRequest]) -> tuple[list[int], Tensor]:
        logits = self.processor(self.model.head(self._hidden(batch)), [(request, request.draft) for request in batch])
        seeds = upload([seed_of(request.random) for request in batch], torch.int64, self.device)
        ids = sample(logits, seeds=seeds, **self.sampling).tolist()
        check_drawn("draft", batch, ids)
        return ids, sampling_probs(logits, **self.sampling)

    def _hidden(self, batch: list[TextRequest]) -> Tensor:
        """(B, H) after the last new token of each, of which there are a chunk at most."""
        ids = [self._ids[request] for request in batch]
        new = [(r.tokens + r.draft)[self.cache.length(id) :][: self.chunk] for r, id in zip(batch, ids)]
        flat = [token for tokens in new for token in tokens]
        step = self.cache.step(ids, list(map(len, new)), flat)
        tokens = upload(flat, torch.int64, self.device)
        if self.graphs is not None and step.max_seqlen_q == 1:
            return self.graphs(tokens)
        hidden = self.model.hidden(tokens, cache=self.cache)
        return hidden[step.cu_seqlens_q[1:].long() - 1]


def judge(logits: Tensor, requests: list[TextRequest], sampling: dict) -> list[list[int]]:
    """The tokens that follow each request: the guesses that are accepted, and one more.

    logits: (R, V): of each request, one after another, its len(draft) + 1 rows. One wait for the device.
    """
    lengths = [len(request.draft) for request in requests]
    longest, device = max(lengths), logits.device
    first = accumulate((length + 1 for length in lengths[:-1]), initial=0)
    rows = [[start + min(place, length) for place in range(longest + 1)] for start, length in zip(first, lengths)]
    p = sampling_probs(logits, **sampling)[upload(rows, torch.int64, device)]
    q = torch.zeros_like(p[:, :longest])
    for row, request in enumerate(requests):
        if request.draft:
            q[row, : len(request.draft)] = request.draft_probs
    padding = [[0] * (longest - length) for length in lengths]
    draft = upload([r.draft + more for r, more in zip(requests, padding)], torch.int64, device)
    uniform = upload([[r.random.random() for _ in r.draft] + more for r, more in zip(requests, padding)], torch.float32, device)
    accepted, weights = accept(p, q, draft, upload(lengths, torch.int64, device), uniform)
    seeds = upload([seed_of(request.random) for request in requests], torch.int64, device)
    last = sample(weights.log(), seeds=seeds)
    return [r.draft[:count] + [token] for r, (count, token) in zip(requests, torch.stack([accepted, last], 1).tolist())]


def seed_of(numbers: random.Random) -> int:
    """For `fastattn.sample`."""
    return numbers.getrandbits(62)
