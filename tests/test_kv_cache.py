"""PagedKVCache: its tensors, what a step says, pages copied in every layer, errors; the mirror that a GPU gets, on the CPU."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

import fastattn
from fastattn import kv_cache, page_pool
from fastattn.kv_cache import ARRAYS, PagedKVCache

POOLS = {"python": page_pool.PythonPagePool} | ({"compiled": page_pool.PagePool} if page_pool.COMPILED else {})


@pytest.fixture(params=["python", "compiled"], autouse=True)
def pool(request, monkeypatch):
    if request.param not in POOLS:
        pytest.skip("needs the compiled page pool: pybind11 and a C++17 compiler")
    monkeypatch.setattr(kv_cache, "PagePool", POOLS[request.param])


def make(num_pages=20, page_size=4, dtype=torch.float32, **options):
    return PagedKVCache(2, num_pages, page_size, 3, 8, dtype=dtype, device="cpu", **options)


def test_tensors():
    cache = make(dtype=torch.int8, head_dim_v=5, k_scale=torch.ones(2, 3))
    assert [k.shape for k in cache.k_cache] == [(20, 4, 3, 8)] * 2
    assert [v.shape for v in cache.v_cache] == [(20, 4, 3, 5)] * 2
    assert {t.dtype for t in (*cache.k_cache, *cache.v_cache)} == {torch.int8}
    assert cache.k_scale.shape == (2, 3) and cache.v_scale is None
    assert (cache.num_pages, cache.page_size, cache.num_free, cache.current) == (20, 4, 20, None)


def test_a_step():
    cache = make()
    a, b = cache.allocate(), cache.allocate()
    cache.step([a], 3)
    step = cache.step([b, a], [5, 2])
    assert step is cache.current
    assert step.page_table[0, :2].tolist() == [1, 2] and step.page_table[1, :2].tolist() == [0, 3]
    assert step.cache_seqlens.tolist() == [0, 3] and step.seqlens_k.tolist() == [5, 5]
    assert step.cu_seqlens_q.tolist() == [0, 5, 7] and step.max_seqlen_q == 5
    assert step.slots.tolist() == [4, 5, 6, 7, 8, 3, 12] and step.positions.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert {getattr(step, name).dtype for name in ARRAYS} == {torch.int32}


def test_steps_are_written_in_place():
    cache = make()
    ids = [cache.allocate() for _ in range(2)]
    first = cache.step(ids, 2)
    second = cache.step(ids, 1)
    for name in ("page_table", "cache_seqlens", "seqlens_k", "cu_seqlens_q", "slots", "positions"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
    assert first.seqlens_k.tolist() == [3, 3]


def test_an_empty_batch():
    step = make().step([], 1)
    assert [len(getattr(step, name)) for name in ARRAYS] == [0, 0, 0, 1, 0, 0] and step.max_seqlen_q == 0


@pytest.mark.parametrize("dtype", kv_cache.DTYPES, ids=str)
@pytest.mark.parametrize("call", ["step", "extend"])
def test_a_fork_keeps_its_contents_in_every_layer(dtype, call):
    cache = make(dtype=dtype)
    a = cache.allocate()
    slots = cache.step([a], 6).slots.long()
    for t in (*cache.k_cache, *cache.v_cache):
        t.view(-1, *t.shape[2:])[slots] = torch.randint(1, 100, (6, *t.shape[2:])).to(dtype)
    before = [t.view(-1, *t.shape[2:])[slots].clone() for t in (*cache.k_cache, *cache.v_cache)]
    b = cache.fork(a)
    if call == "step":
        cache.step([b], 1)
    else:
        cache.extend(b, 1)
    pages = torch.tensor(cache.pool.pages(b))
    assert cache.pool.pages(a)[1] != pages[1] and cache.length(b) == 7
    for t, old in zip((*cache.k_cache, *cache.v_cache), before):
        assert torch.equal(t[pages].flatten(0, 1)[:6].float(), old.float())
        assert torch.equal(t.view(-1, *t.shape[2:])[slots].float(), old.float())


def test_prefixes_and_the_rest_of_the_pools_calls():
    cache = make()
    prompt = torch.arange(10)
    a = cache.allocate(prompt)
    cache.step([a], 10, prompt)
    cache.commit()
    cache.free(a)
    b = cache.allocate(prompt)
    assert cache.length(b) == 8 and cache.num_free == 18
    cache.step([b], 2, prompt[8:])
    cache.truncate(b, 9)
    assert cache.length(b) == 9
    off = make(share_prefixes=False)
    a = off.allocate([1] * 9)
    off.step([a], 9, [1] * 9)
    off.commit()
    assert off.length(off.allocate([1] * 9)) == 0


def forward(cache, count, layers=(0, 1), value=1.0):
    for layer in layers:
        cache.append(layer, torch.full((count, 3, 8), value), torch.full((count, 3, 8), value))


def test_what_every_layer_has_appended_is_shared_from_the_next_step_on():
    cache, prompt = make(), list(range(9))
    a = cache.allocate(prompt)
    cache.step([a], 9, prompt)
    forward(cache, 9)
    cache.step([a], 1, [9])
    assert cache.length(cache.allocate(prompt)) == 8


def test_what_a_layer_lacks_is_not_shared_unless_commit_says_so():
    cache, prompt = make(), list(range(9))
    a = cache.allocate(prompt)
    cache.step([a], 9, prompt)
    forward(cache, 9, layers=[0])  # and raised
    b = cache.fork(a)
    cache.step([a, b], 1, [9, 9])
    forward(cache, 2)
    cache.commit()
    assert cache.length(cache.allocate(prompt)) == 0
    for id in (a, b):
        cache.free(id)
    a = cache.allocate(prompt)
    cache.step([a], 9, prompt)
    cache.truncate(a, 0)  # the same again, from the start
    cache.step([a], 9, prompt)
    forward(cache, 9)
    cache.step([a], 0)
    assert cache.length(cache.allocate(prompt)) == 8
    other = [10 + token for token in prompt]
    b = cache.allocate(other)
    cache.step([b], 9, other)
    cache.commit()  # by one who writes without append
    assert cache.length(cache.allocate(other)) == 8


def test_what_extend_makes_room_for_is_not_shared():
    cache = make()
    a = cache.allocate()
    cache.extend(a, 8)
    cache.step([a], 1, [8])
    forward(cache, 1)
    cache.commit()
    assert cache.length(cache.allocate(list(range(9)))) == 0
    with pytest.raises(TypeError, match="PagedKVCache.extend: new must be an int, got list"):
        cache.extend(a, [1, 2])


@pytest.mark.parametrize("call", ["free", "truncate", "extend"])
def test_a_step_whose_sequences_change_is_over(call):
    def change(cache, id):
        {"free": cache.free, "truncate": lambda id: cache.truncate(id, 0), "extend": lambda id: cache.extend(id, 1)}[call](id)

    cache = make()
    a, b, c = (cache.allocate() for _ in range(3))
    step = cache.step([a, b], 2)
    change(cache, c)
    assert cache.current is step
    change(cache, a)
    with pytest.raises(RuntimeError, match="PagedKVCache.append: there is no current step: call step first"):
        forward(cache, 4)


def test_a_copy_of_what_the_step_has_yet_to_write_ends_it():
    cache = make()
    a = cache.allocate()
    cache.step([a], 2)
    cache.extend(cache.fork(a), 1)
    assert cache.current is None


def contents(cache, id):
    """Of every layer, what the sequence's pages hold: (tokens, H_kv, D)."""
    pages = torch.tensor(cache.pool.pages(id))
    return [t[pages].flatten(0, 1)[: cache.length(id)].clone() for t in (*cache.k_cache, *cache.v_cache)]


@pytest.mark.parametrize("place", ["copy", "grow", "upload"])
@pytest.mark.parametrize("then", ["step", "another batch", "extend"])
def test_a_step_that_raises_midway_can_be_made_again(place, then, monkeypatch):
    """As where the device, or pinned memory, runs out: once, in each of the three parts that follow the pool's step."""
    cache = make(num_pages=60)
    cache._mirror._in_place = False
    a = cache.allocate()
    others = [cache.allocate() for _ in range(3)]
    cache.step([a, *others], 6)
    forward(cache, 24, value=3.0)
    b = cache.fork(a)
    before = contents(cache, a)
    batch = [b, a, *others, cache.allocate()] if place == "grow" else [b, a]
    failing = {"copy": "tensor", "grow": "zeros_like", "upload": "cat"}[place]

    with monkeypatch.context() as patch:
        works = getattr(torch, failing)

        def fails_late(*args, **kwargs):
            patch.setattr(torch, failing, fails)
            return works(*args, **kwargs)

        def fails(*args, **kwargs):
            raise torch.OutOfMemoryError(place)

        patch.setattr(torch, failing, fails_late if place == "grow" else fails)
        with pytest.raises(torch.OutOfMemoryError):
            cache.step(batch, 1)
    assert cache.current is None and [cache.length(id) for id in (a, b)] == [6, 6]

    if then == "extend":
        cache.extend(b, 1)
    if then == "another batch":
        batch = batch[1:2]
    step = cache.step(batch, 1)
    host = torch.frombuffer(cache.pool.page_table, dtype=torch.int32).view(cache.pool.page_table.shape)
    assert torch.equal(cache._mirror._tensors["page_table"], host)
    for row, id in enumerate(batch):
        pages = cache.pool.pages(id)
        assert step.page_table[row, : len(pages)].tolist() == pages
        assert step.seqlens_k[row] == cache.length(id)
    for id in (a, b):
        assert all(torch.equal(now[:6], old) for now, old in zip(contents(cache, id), before))
    assert cache.pool.pages(a)[1] != cache.pool.pages(b)[1]
    cache.step([a, b, *others], 1)  # rows of the missed step that have not changed since
    assert torch.equal(cache._mirror._tensors["page_table"], torch.frombuffer(cache.pool.page_table, dtype=torch.int32).view(cache.pool.page_table.shape))


def test_an_extend_that_raises_midway_can_be_made_again(monkeypatch):
    cache = make()
    a = cache.allocate()
    cache.step([a], 6)
    forward(cache, 6, value=3.0)
    b, before = cache.fork(a), contents(cache, a)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.extend(b, 3)
    assert cache.length(b) == 6
    cache.extend(b, 3)
    for id in (a, b):
        assert all(torch.equal(now[:6], old) for now, old in zip(contents(cache, id), before))


def test_neither_copied_nor_pickled():
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a PagedKVCache cannot be copied or pickled"):
            call(make())


def test_a_cache_made_in_inference_mode_is_written_outside_of_it():
    with torch.inference_mode():
        cache = make()
        a = cache.allocate()
        cache.step([a], 6)
    cache.k_cache[0][0] = 1
    cache.step([a, cache.fork(a)], 100 // 20)
    assert not cache.current.slots.is_inference()


def test_the_mirror_of_a_gpu_follows_every_step():
    """The path of CUDA tensors, but for the pinned memory: tensors of their own, sent what changed."""
    rng = random.Random(0)
    cache = make(num_pages=400, page_size=2)
    cache._mirror._in_place = False
    live = [cache.allocate() for _ in range(3)]
    tables, addresses = [], set()
    for turn in range(120):
        if rng.random() < 0.2:
            live.append(cache.fork(rng.choice(live)) if rng.random() < 0.5 else cache.allocate())
        if len(live) > 12 or rng.random() < 0.1 and len(live) > 1:
            cache.free(live.pop(rng.randrange(len(live))))
        if turn % 5 == 0:
            rng.shuffle(live)
        if cache.num_free < 60:
            cache.truncate(live[0], 0)
            continue
        step = cache.step(live, [rng.randint(0, 4) if rng.random() < 0.1 else 1 for _ in live])
        used = dict(zip(ARRAYS, (len(live), len(live), len(live), len(live) + 1, len(step.slots), len(step.slots))))
        for name in ARRAYS:
            host = torch.frombuffer(getattr(cache.pool, name), dtype=torch.int32).view(getattr(cache.pool, name).shape)
            assert torch.equal(getattr(step, name), host[: used[name]])
            assert name != "page_table" or torch.equal(cache._mirror._tensors[name], host)
            assert getattr(step, name).untyped_storage().data_ptr() != host.untyped_storage().data_ptr()
        if not any(table is cache.pool.page_table for table in tables):
            tables.append(cache.pool.page_table)
        addresses.add(step.page_table.data_ptr())
    assert len(addresses) <= len(tables) < 12


@pytest.mark.gpu
def test_steps_on_a_gpu_equal_those_on_the_cpu():
    caches = [PagedKVCache(1, 5000, 4, 1, 8, dtype=torch.float16, device=device) for device in ("cpu", "cuda")]
    rng = random.Random(0)
    for cache in caches:
        ids = [cache.allocate() for _ in range(40)]
    held = []
    for _ in range(60):
        rng.shuffle(ids)
        batch, count = ids[: rng.randint(1, 40)], rng.randint(0, 3)
        cpu, cuda = (cache.step(batch, count) for cache in caches)
        # What a kernel of this step would read, read before the host goes on: nobody synchronises in between.
        held.append([(getattr(cpu, name).clone(), getattr(cuda, name).clone()) for name in ARRAYS])
    for step in held:
        for name, (on_cpu, on_cuda) in zip(ARRAYS, step):
            assert torch.equal(on_cpu, on_cuda.cpu()), name


ERRORS = {
    "layers": (lambda: PagedKVCache(0, 1, 1, 1, 1, dtype=torch.half, device="cpu"), ValueError, "PagedKVCache: num_layers must be at least 1, got 0"),
    "head_dim_v": (lambda: make(head_dim_v=-2), ValueError, "PagedKVCache: head_dim_v must be at least 1, got -2"),
    "no int": (lambda: make(head_dim_v=2.0), TypeError, "PagedKVCache: head_dim_v must be an int, got float"),
    "pages": (lambda: make(num_pages=0), ValueError, "PagePool: num_pages must be at least 1, got 0"),
    "dtype": (lambda: make(dtype=torch.float64), TypeError, "PagedKVCache: dtype must be one of torch.float16, .*, got torch.float64"),
    "scale": (lambda: make(k_scale=1.0), TypeError, "PagedKVCache: k_scale must be a torch.Tensor, got float"),
    "scale dtype": (lambda: make(v_scale=torch.ones(2, 3).half()), TypeError, "PagedKVCache: v_scale must be float32, got torch.float16"),
    "scale shape": (lambda: make(k_scale=torch.ones(3)), ValueError, r"PagedKVCache: k_scale must have shape \(num_layers, num_kv_heads\) = \(2, 3\), got \(3,\)"),
    "another cache's": (lambda: make().step([make().allocate()], 1), ValueError, "PagePool.step: id must be a live sequence's, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_by_name(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


def test_out_of_pages_leaves_every_sequence():
    cache = make(num_pages=2)
    a = cache.allocate()
    step = cache.step([a], 5)
    with pytest.raises(page_pool.OutOfPages, match="PagePool.step: needs 1 pages, of 2 there are 0 free"):
        cache.step([a], 4)
    assert cache.length(a) == 5 and cache.current is None and step.seqlens_k.tolist() == [5]


@pytest.mark.parametrize("op", ["append", "attend"])
def test_layers_are_those_of_the_cache(op):
    cache = make()
    cache.step([cache.allocate()], 1)
    q = torch.randn(1, 3, 8)
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=f"PagedKVCache.{op}: layer_idx must be between 0 and 1, got {layer}"):
            getattr(cache, op)(layer, *[q, q][: 2 if op == "append" else 1])
    with pytest.raises(TypeError, match=f"PagedKVCache.{op}: layer_idx must be an int, got str"):
        getattr(cache, op)("0", *[q, q][: 2 if op == "append" else 1])


def test_queries_of_another_shape_than_the_step_are_refused():
    cache = make()
    with pytest.raises(RuntimeError, match="PagedKVCache.attend: there is no current step: call step first"):
        cache.attend(0, torch.randn(1, 3, 8))
    a, b = cache.allocate(), cache.allocate()
    cache.step([a, b], [3, 1])
    for shape in ((3, 3, 8), (2, 2, 3, 8), (4, 3)):
        with pytest.raises(ValueError, match=r"PagedKVCache.attend: q must have shape \(4, H, D\) in this step, got"):
            cache.attend(0, torch.randn(*shape))
    cache.step([a, b], 2)
    with pytest.raises(ValueError, match=r"q must have shape \(4, H, D\), or \(2, 2, H, D\) in this step, got"):
        cache.attend(0, torch.randn(4, 1, 3, 8))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_attention_over_the_cache_is_attention(packed):
    """Two prompts, then decode steps, after a fork too: each output is that of plain attention over the whole sequence."""
    cache = make(page_size=3)
    a, b = cache.allocate(), cache.allocate()
    history: dict[int, list[tuple[torch.Tensor, ...]]] = {a: [], b: []}

    def forward(ids, count):
        step = cache.step(ids, count)
        q, k, v = torch.randn(len(ids), count, 6, 8), *torch.randn(2, len(ids), count, 3, 8)
        for id, *new in zip(ids, k, v):
            history[id] += zip(*new)
        if packed:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        cache.append(1, k, v)
        out = cache.attend(1, q).view(len(ids), count, 6, 8)
        for i, id in enumerate(ids):
            keys, values = (torch.stack(t)[None] for t in zip(*history[id]))
            expected = fastattn.attention(q.view(len(ids), count, 6, 8)[i : i + 1], keys, values, causal=True)
            torch.testing.assert_close(out[i : i + 1], expected)
        assert step is cache.current

    forward([a, b], 5)
    forward([b, a], 1)
    c = cache.fork(a)
    history[c] = list(history[a])
    forward([a, c, b], 1)
    forward([c, a], 2)
