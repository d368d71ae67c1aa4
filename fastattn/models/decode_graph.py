"""A decoding step as a CUDA graph: the forward pass of one token a sequence is recorded once, and then replayed with one launch.

A step of a small batch is hundreds of launches of a few microseconds each, which the host takes longer to make than the device to run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.kv_cache import PagedKVCache, Step

from .transformer import Transformer

_PLAIN_STEPS = 3  # of a batch size before it is recorded: one that is passed through as answers end is not worth it


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # (B,), read by it
    hidden: Tensor  # (B, H), written by it


class DecodeGraphs:
    """`model.hidden(tokens, cache=cache)` for steps of one token a sequence, by a graph of each batch size that lasts.

    A graph reads the cache's step tensors where they lie. They move when a step is larger than all before it, and all graphs are then
    recorded anew. Graphs share their memory, so what one returns is to be read before the next call.
    """

    def __init__(self, model: Transformer, cache: PagedKVCache) -> None:
        self.model, self.cache = model, cache
        self._graphs: dict[int, _Recorded] = {}  # by batch size
        self._steps: Counter[int] = Counter()  # that each batch size has had
        self._places: tuple[int, ...] = ()  # of the step tensors that the graphs read
        self._pool: Any = None  # of memory, that of all graphs

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B,) of the cache's current step, one a sequence. Returns (B, H); the step may have ended."""
        places = _places(self.cache.current)
        if places != self._places:
            self._graphs.clear()
            self._places = places
        self._steps[len(tokens)] += 1
        if self._steps[len(tokens)] <= _PLAIN_STEPS:  # which are the first to compile and look up, too
            return self._forward(tokens)
        if len(tokens) not in self._graphs:
            self._graphs[len(tokens)] = self._record(tokens)
        recorded = self._graphs[len(tokens)]
        recorded.tokens.copy_(tokens, non_blocking=True)
        recorded.graph.replay()
        self.cache.commit()  # no append was called, but what it does was done
        return recorded.hidden

    def _record(self, tokens: Tensor) -> _Recorded:
        tokens, graph = tokens.clone(), torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream(tokens.device)
        beside.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(beside):  # writes the step's keys and values, which the graph writes again
            self._forward(tokens)
        torch.cuda.current_stream(tokens.device).wait_stream(beside)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._forward(tokens)
        return _Recorded(graph, tokens, hidden)

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model.hidden(tokens[:, None], cache=self.cache)[:, 0]


def _places(step: Step) -> tuple[int, ...]:
    tensors = (step.page_table, step.cache_seqlens, step.seqlens_k, step.cu_seqlens_q, step.slots, step.positions)
    return (step.page_table.stride(0), *(tensor.data_ptr() for tensor in tensors))
