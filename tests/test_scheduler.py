"""The scheduler without a model: who runs, who waits, and what each step computes."""

from __future__ import annotations

import pytest
import torch

from fastattn import PagedKVCache
from fastattn.page_pool import OutOfPages
from fastattn.scheduler import Request, Scheduler


def make(lengths, num_pages, **options):
    """Requests of different tokens, over pages of 4."""
    cache = PagedKVCache(1, num_pages, 4, 1, 2, dtype=torch.float32, device="cpu")
    requests = [Request(index=i, tokens=[100 * i + n for n in range(length)], prompt_length=length) for i, length in enumerate(lengths)]
    return Scheduler(cache, requests, **dict(max_requests=8, chunk=8) | options)


def run(scheduler, length):
    """Draw until each answer has that length. Returns the running requests of each step, and those that ended in order."""
    ran, ended = [], []
    while (batch := scheduler.step()) is not None:
        ran.append([request.index for request in scheduler.running])
        scheduler.cache.commit()
        for request in batch.ready:
            request.tokens.append(7)
            if len(request.answer) == length:
                scheduler.finish(request)
                ended.append(request.index)
    return ran, ended


def test_a_step_holds_chunks_of_prompts_and_single_tokens():
    scheduler = make((2, 19), 20)
    batch = scheduler.step()
    assert batch.tokens == [0, 1, *range(100, 108)] and batch.prefill == 10
    assert [r.index for r in batch.ready] == [0] and batch.ends == [2] and batch.step.seqlens_k.tolist() == [2, 8]
    scheduler.running[0].tokens.append(7)
    batch = scheduler.step()
    assert batch.tokens == [7, *range(108, 116)] and batch.prefill == 8 and batch.ends == [1]
    scheduler.running[0].tokens.append(8)
    scheduler.running[0].draft = [5, 6]
    batch = scheduler.step()
    assert batch.tokens == [8, 5, 6, 116, 117, 118] and batch.prefill == 3
    assert [r.index for r in batch.ready] == [0, 1] and batch.ends == [3, 6]
    scheduler.close()
    assert scheduler.cache.num_free == 20 and all(request.id == -1 for request in batch.ready)


def test_a_request_joins_when_there_are_pages_for_all_its_tokens():
    scheduler = make((12, 9, 1), 5)  # 3 pages, 3 and 1: the second waits, and the third does not overtake it
    ran, ended = run(scheduler, 4)
    assert ran[:6] == [[0]] * 5 + [[1, 2]] and sorted(ended) == [0, 1, 2]


def test_the_last_to_come_gives_way_and_comes_back_first():
    scheduler = make((4, 4, 4, 4), 4)
    ran, ended = run(scheduler, 8)
    assert ran[0] == [0, 1, 2, 3] and ran[1] == [0, 1]  # each takes a second page
    assert ended == [0, 1, 2, 3] and scheduler.preemptions >= 2
    assert scheduler.cache.num_free == 4


def test_guesses_go_before_requests():
    scheduler = make((4, 4), 4)
    scheduler.step()
    for request in scheduler.running:
        request.tokens.append(7)
        request.draft = [1, 2, 3, 4]
    batch = scheduler.step()
    assert batch.tokens == [7, 7] and scheduler.preemptions == 0 and not any(request.draft for request in batch.ready)


def test_what_begins_alike_is_found():
    scheduler = make((9, 9), 10, max_requests=1)
    scheduler._more = iter([Request(index=i, tokens=list(range(9 + i)), prompt_length=9 + i) for i in range(2)])
    run(scheduler, 1)
    assert scheduler.cached_tokens == 8


def test_one_that_does_not_fit_alone_raises():
    scheduler = make((17,), 4, chunk=100)
    with pytest.raises(OutOfPages):
        scheduler.step()
    scheduler.close()
    assert scheduler.cache.num_free == 4
