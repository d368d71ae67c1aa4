"""The compiled CPU operators beside the torch code that stands in for them; their instruction sets, sanitizers, and life without them.

What they compute is held to float64 by the tests of their ops, which run on them wherever they are built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.cpu import attention, moe_routing, paged_attention
from fastattn.cpu import sampling as cpu_sampling
from fastattn.cpu.append_paged_kv import append_paged_kv
from fastattn.extensions import cpu_operators

ROOT = Path(__file__).resolve().parent.parent
BUILT = pytest.mark.skipif(cpu_operators.why_not is not None, reason=f"compiled CPU operators: {cpu_operators.why_not}")


@pytest.fixture
def both_ways(monkeypatch):
    """call(f, …) as it is, and without the compiled operators; the first one has to have had them."""

    def call(f, *args, **kwargs):
        compiled = f(*args, **kwargs)
        with monkeypatch.context() as without:
            without.setattr(cpu_operators, "_found", set())
            return compiled, f(*args, **kwargs)

    return call


def close(compiled, plain, dtype=torch.float32):
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for mine, theirs in zip(compiled, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            finite = theirs[theirs.isfinite()].float()
            most = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=bound, atol=bound * most)


# --------------------------------------------------------------------------------------------------------------------
# Attention of short sequences.

ALIBI = torch.tensor([0.5, 0.25, 0.125, 0.7])
OPTIONS = {
    "softcap": dict(softcap=5.0),
    "dropout": dict(dropout_p=0.3),
    "both": dict(softcap=5.0, dropout_p=0.5),
    "alibi": dict(alibi_slopes=ALIBI),
    "alibi of each": dict(alibi_slopes=ALIBI * torch.tensor([[1.0], [2.0]])),
    "all": dict(softcap=5.0, dropout_p=0.1, alibi_slopes=ALIBI, sinks=torch.tensor([0.1, -1.0, 2.0, 0.0])),
}
# (S_q, S_k, D, D_v)
SIZES = [(1, 1, 1, 1), (16, 16, 64, 64), (3, 70, 40, 33), (70, 3, 33, 40), (45, 45, 8, 96), (33, 34, 100, 7)]
WINDOWS = [(None, None), (None, 0), (5, 2), (2, -1)]


def attend(sizes, dtype=torch.float32, kv_heads=2, left=None, right=None, softcap=0.0, dropout_p=0.0, alibi_slopes=None, sinks=None):
    """out, lse and gradients, of both outputs."""
    torch.manual_seed(1)
    seqlen_q, seqlen_k, dim, dim_v = sizes
    q, k = (torch.randn(2, *shape).to(dtype) for shape in ((seqlen_q, 4, dim), (seqlen_k, kv_heads, dim)))
    v, dout = (torch.randn(2, *shape).to(dtype) for shape in ((seqlen_k, kv_heads, dim_v), (seqlen_q, 4, dim_v)))
    seed = torch.tensor([1234567890123456789]) if dropout_p else None
    inputs = q, k, v, None, alibi_slopes, sinks, seed, None, None
    options = seqlen_q, seqlen_k, left, right, dim**-0.5, softcap, dropout_p
    out, lse, _ = attention.attention_fwd(*inputs, *options)
    grads = attention.attention_bwd(dout, torch.randn(lse.shape), *inputs, out, lse, None, *options, False)
    return out, lse, *grads


@BUILT
@pytest.mark.parametrize("left, right", WINDOWS)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_what_torch_makes_of_it(name, left, right, both_ways):
    for sizes in SIZES:
        close(*both_ways(attend, sizes, left=left, right=right, **OPTIONS[name]))


@BUILT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_in_half_precision_and_of_shared_heads(dtype, kv_heads, both_ways):
    for name in ("softcap", "dropout", "all"):
        close(*both_ways(attend, (33, 40, 64, 32), dtype, kv_heads, right=0, **OPTIONS[name]), dtype)


@BUILT
@pytest.mark.parametrize("softcap", [1.0, 50.0, 1e3, 1e6, 1e30])
def test_a_large_softcap_costs_no_digits(softcap):
    """It multiplies a tanh of next to nothing."""
    q, k, v = (torch.randn(1, 16, 2, 64, requires_grad=True) for _ in range(3))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, truth = fastattn.attention(q, k, v, softcap=softcap), fastattn.reference.attention(*wide, softcap=softcap)
    torch.testing.assert_close(out.double(), truth, rtol=2e-6, atol=2e-6)
    dout = torch.randn_like(out)
    for got, wanted in zip(torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(truth, wide, dout.double()), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=5e-6, atol=5e-6)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    last = fastattn.paged_attention(q[:, -1:].detach(), k.detach(), v.detach(), table, lengths, softcap=softcap)
    torch.testing.assert_close(last.double(), truth[:, -1:].detach(), rtol=2e-6, atol=2e-6)


@BUILT
def test_any_strides_of_lse():
    q, k, v, dout = (torch.randn(2, 7, 4, 8) for _ in range(4))
    inputs, options = (q, k, v, *[None] * 6), (7, 7, None, None, 0.3, 2.0, 0.0)
    out, lse, _ = attention.attention_fwd(*inputs, *options)
    strided = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    both = [attention.attention_bwd(dout, None, *inputs, out, t, None, *options, False) for t in (lse, strided)]
    assert all(torch.equal(a, b) for a, b in zip(*(grads[:3] for grads in both), strict=True))


@BUILT
def test_the_dropout_mask_is_the_same_bit_for_bit():
    """Of equal scores the output times S_k·(1 − p) counts the kept keys, by v's one-hot rows."""
    seed, p, seqlen = torch.tensor([42]), 0.25, 37
    q, k = torch.zeros(3, 5, 4, 8), torch.zeros(3, seqlen, 2, 8)
    v = torch.eye(seqlen).expand(3, 2, seqlen, seqlen).transpose(1, 2)
    out, _, _ = attention.attention_fwd(q, k, v, *[None] * 3, seed, None, None, 5, seqlen, None, None, 1.0, 0.0, p)
    kept = attention.dropout_keep(seed, 3, 4, 5, seqlen, p).transpose(1, 2)
    assert torch.equal(out > 0, kept) and 0.6 < kept.float().mean() < 0.9
    torch.testing.assert_close(out[kept] * seqlen * (1 - p), torch.ones(int(kept.sum())))


@BUILT
def test_what_a_window_hides_is_not_seen(both_ways):
    """NaN there comes to nothing: in rows that see no key, and in the gradients of all."""
    q, k, v = torch.randn(1, 4, 2, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    k[:, 7:], q[:, 3] = float("nan"), 0.5
    out, lse, _ = attention.attention_fwd(q, k, v, *[None] * 6, 4, 9, None, -6, 1.0, 3.0, 0.0)
    assert out.isfinite().all() and not out[:, 0].any() and (lse[..., 0] == -torch.inf).all()


# --------------------------------------------------------------------------------------------------------------------
# Paged attention of few queries.

PAGED = {
    "plain": {}, "causal": dict(window_right=0), "window": dict(window_left=9, window_right=3), "softcap": dict(softcap=4.0),
    "alibi": dict(alibi_slopes=ALIBI), "alibi of each": dict(alibi_slopes=ALIBI * torch.tensor([[1.0], [2.0], [3.0]])),
    "sinks": dict(sinks=torch.tensor([0.5, -2.0, 1.0, 0.0])), "leftpad": dict(leftpad=torch.tensor([3, 0, 40], dtype=torch.int32)),
}  # fmt: skip


def paged(dims, dtype=torch.float32, cache_dtype=None, seqlens=(700, 1, 40), seqlen_q=3, scaled=False, only=None, **options):
    torch.manual_seed(2)
    (dim, dim_v), page_size, batch = dims, 16, len(seqlens)
    pages = -(-max(seqlens) // page_size)
    q = torch.randn(batch, seqlen_q, 4, dim).to(dtype)
    caches = [20 * torch.randn(batch * pages, page_size, 2, d) if scaled else torch.randn(batch * pages, page_size, 2, d) for d in (dim, dim_v)]
    caches = [t.to(cache_dtype or dtype) for t in caches]
    table = torch.randperm(batch * pages).view(batch, pages).int()
    scales = dict(k_scale=torch.tensor([0.05, 0.02]), v_scale=torch.tensor([0.03, 0.05])) if scaled else {}
    rows = slice(None) if only is None else slice(only, only + 1)
    names = ("cu_seqlens_q", "alibi_slopes", "sinks", "k_scale", "v_scale", "leftpad")
    tensors = [(scales | options).get(name) for name in names]
    bounds = [options.get(name) for name in ("window_left", "window_right")]
    lengths = torch.tensor(seqlens, dtype=torch.int32)[rows]
    return paged_attention.paged_attention(
        q[rows], *caches, table[rows], lengths, *tensors, seqlen_q, *bounds, dim**-0.5, options.get("softcap", 0.0), 0
    )


@BUILT
@pytest.mark.parametrize("name", PAGED)
def test_paged_attention_is_what_torch_makes_of_it(name, both_ways):
    for dims in ((64, 64), (40, 33), (1, 7), (128, 100)):
        close(*both_ways(paged, dims, **PAGED[name]))


@BUILT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_paged_attention_of_half_precision_and_quantised_caches(dtype, cache_dtype, both_ways):
    close(*both_ways(paged, (64, 40), dtype, cache_dtype, scaled=cache_dtype is not None, window_right=0), dtype)


@BUILT
def test_neither_threads_nor_company_change_a_bit():
    threads = torch.get_num_threads()
    whole = paged((64, 64), seqlens=(1500, 3, 700))
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert all(map(torch.equal, paged((64, 64), seqlens=(1500, 3, 700)), whole))
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        alone = paged((64, 64), seqlens=(1500, 3, 700), only=b)
        assert all(torch.equal(one, all_[b : b + 1]) for one, all_ in zip(alone, whole, strict=True))


@BUILT
def test_who_is_chosen():
    """Up to 64 rows; and of dense attention what is short and has more between its products than a mask."""
    assert cpu_operators.available("paged_attention_cpp") and cpu_operators.available("attention_bwd_cpp")
    q, k = torch.zeros(1, 64, 8, 16), torch.zeros(1, 512, 4, 16)
    fits = lambda q=q, k=k, bias=None, cu=None, softcap=1.0, p=0.0, sinks=None, window=(None, 0): attention._compiled_fits(q, k, bias, None, sinks, cu, window, softcap, p)  # noqa: E731
    assert fits() and fits(softcap=0.0, p=0.1) and fits(softcap=0.0, sinks=k) and fits(softcap=0.0, window=(3, 0)) and fits(softcap=0.0, window=(None, 2))
    assert not fits(softcap=0.0) and not fits(softcap=0.0, window=(None, None)) and not fits(bias=k) and not fits(cu=k) and not fits(q.double(), k.double()) and not fits(k=k.repeat(1, 2, 1, 1))
    assert fits(q[:, :1], k.repeat(1, 2, 1, 1)) and not fits(q[:, :1], k.repeat(1, 3, 1, 1))


# --------------------------------------------------------------------------------------------------------------------
# Slots sorted by expert.

IDS = {
    "random": lambda: torch.randint(60, (97, 4)),
    "none": lambda: torch.zeros(0, 4, dtype=torch.int64),
    "one": lambda: torch.zeros(1, 1, dtype=torch.int64),
    "nobody's": lambda: torch.randint(60, 120, (33, 2)),
    "some nobody's": lambda: torch.randint(90, (500, 3)),
    "negative": lambda: torch.randint(-20, 70, (50, 8)),
    "of one expert": lambda: torch.full((70, 8), 59),
    "transposed": lambda: torch.randint(64, (6, 41)).t(),
    "every third": lambda: torch.randint(64, (100, 12))[::2, ::3],
    "expanded": lambda: torch.randint(64, (9, 1)).expand(9, 5),
    "of an offset": lambda: torch.randint(64, (20, 9))[3:, 1:],
}


@BUILT
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", IDS)
def test_dispatch_is_what_torch_makes_of_it(name, dtype, both_ways):
    ids = IDS[name]()
    if dtype == torch.int32:  # of the same strides
        ids = torch.empty_strided(ids.shape, ids.stride(), dtype=dtype).copy_(ids) if name != "expanded" else ids[:, :1].int().expand(9, 5)
    for num_experts in (60, 1, 512):
        compiled, plain = both_ways(moe_routing.moe_dispatch, ids, num_experts)
        for mine, theirs in zip(compiled, plain, strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@BUILT
def test_dispatch_of_the_smallest_and_largest_ids(both_ways):
    ends = torch.iinfo(torch.int64)
    compiled, plain = both_ways(moe_routing.moe_dispatch, torch.tensor([[ends.min, 0, ends.max, -1, 2**32, 1]]), 2)
    assert all(map(torch.equal, compiled, plain)) and compiled[0].tolist() == [1, 5, 0, 2, 3, 4]


@BUILT
def test_dispatch_by_several_threads(both_ways):
    """So many slots that each thread sorts a stretch, which begins amid a token."""
    threads, ids = torch.get_num_threads(), torch.randint(70, (70001, 3))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, *both_ways(moe_routing.moe_dispatch, ids, 64)))
    finally:
        torch.set_num_threads(threads)


@BUILT
def test_dispatch_refuses_what_it_cannot_read():
    assert cpu_operators.available("moe_dispatch_cpp")
    for ids in (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 2, 2, dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="moe_dispatch_cpp: indices must"):
            torch.ops.fastattn.moe_dispatch_cpp(ids, 4)


# --------------------------------------------------------------------------------------------------------------------
# Sampling.


def ends(x):
    """Rows with a NaN, an infinity, nothing, and one token."""
    x[0, 3], x[1, 5], x[2], x[3, 1:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    return x


LOGITS = {
    "normal": lambda: 3 * torch.randn(6, 3001),
    "ties": lambda: torch.randint(-4, 4, (6, 700)).float(),
    "all equal": lambda: torch.full((3, 300), -2.5),
    "one": lambda: torch.randn(3, 1),
    "few": lambda: torch.randn(5, 17),
    "masked": lambda: torch.randn(5, 1000).masked_fill(torch.rand(5, 1000) < 0.7, -torch.inf),
    "masked by the least": lambda: torch.randn(5, 1000).masked_fill(torch.rand(5, 1000) < 0.7, torch.finfo(torch.float32).min),
    "far apart": lambda: torch.randn(4, 500) * 1e30,
    "close together": lambda: torch.randn(4, 500) * 1e-30,
    "signed zeros": lambda: torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0, -1.0]] * 3),
    "ends": lambda: ends(torch.randn(7, 300)),
    "transposed": lambda: torch.randn(600, 4).t(),
    "a transposed column": lambda: torch.randn(1, 4).t(),
    "rows with gaps": lambda: torch.randn(4, 900)[:, 5:700],
}
# temperature, top_k, top_p, min_p
SAMPLINGS = {
    "plain": (1.0, 0, 1.0, 0.0), "top k": (1.0, 5, 1.0, 0.0), "top p": (0.7, 0, 0.9, 0.0), "both": (1.3, 40, 0.6, 0.0), "min p": (1.0, 0, 1.0, 0.1),
    "all": (2.0, 200, 0.95, 0.02), "least p": (1.0, 0, 0.0, 0.0), "most p": (1.0, 0, 1 - 2**-24, 0.0), "many": (1.0, 250, 1.0, 0.0), "greedy": (0.0, 7, 0.5, 0.0),
    "cold": (1e-3, 20, 0.9, 0.0), "hot": (1e4, 20, 0.9, 0.0),
}  # fmt: skip


@BUILT
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", LOGITS)
def test_sampling_is_what_torch_makes_of_it(name, sampling, both_ways):
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if name in ("normal", "ends") else (torch.float32,):
        logits = LOGITS[name]()
        logits = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype).copy_(logits)
        compiled, plain = both_ways(cpu_sampling.sampling_probs, logits, *SAMPLINGS[sampling])
        assert torch.equal(compiled.isnan(), plain.isnan()) and torch.equal(compiled > 1e-30, plain > 1e-30)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-9, equal_nan=True)
        for seed in range(3):
            drawn, expected = both_ways(cpu_sampling.sample, logits, torch.tensor([seed]), *SAMPLINGS[sampling])
            assert torch.equal(drawn, expected)


@BUILT
def test_nothing_to_sample_or_to_append():
    """Of strides that `contiguous` leaves to empty tensors."""
    assert fastattn.sample(torch.randn(0, 20)[:, ::2]).shape == (0,) and fastattn.sampling_probs(torch.randn(0, 20)[:, ::2]).shape == (0, 10)
    new, cache = torch.randn(2, 0, 2, 32)[..., ::2], torch.zeros(3, 4, 2, 16)
    fastattn.append_paged_kv(new, new, cache, cache.clone(), torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    assert not cache.any()


@BUILT
def test_sampling_by_each_rows_own_parameters(both_ways):
    logits = torch.randn(len(SAMPLINGS), 2000)
    temperature, top_k, top_p, min_p = (torch.tensor(values) for values in zip(*SAMPLINGS.values(), strict=True))
    for parameters in ((temperature, top_k, top_p, min_p), (0.8, top_k.int(), 0.9, min_p.double()), (temperature[::1], 30, top_p, 0.0)):
        compiled, plain = both_ways(cpu_sampling.sampling_probs, logits, *parameters)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-9)
    one_by_one = [cpu_sampling.sampling_probs(row[None], *p) for row, p in zip(logits, SAMPLINGS.values(), strict=True)]
    assert torch.equal(torch.cat(one_by_one), cpu_sampling.sampling_probs(logits, temperature, top_k, top_p, min_p))


@BUILT
def test_sampling_draws_by_the_cumulative_sum():
    """Every number of a fine grid gives the token that float64 gives, but next to a boundary."""
    logits, parameters = torch.randn(1, 1000) * 2, (1.0, 300, 0.9, 0.01)
    cdf = cpu_sampling.sampling_probs(logits, *parameters).double().cumsum(1)[0]
    numbers = torch.linspace(0, 1, 5001, dtype=torch.float64)[:-1]
    drawn = torch.ops.fastattn.sample_cpp(logits.expand(5000, -1), numbers, None, None, None, None, *parameters)
    low, high = (torch.searchsorted(cdf / cdf[-1], numbers + offset, right=True) for offset in (-1e-6, 1e-6))
    assert ((low <= drawn) & (drawn <= high)).all() and (drawn == high).double().mean() > 0.99


# --------------------------------------------------------------------------------------------------------------------
# Appending to a paged cache.

TABLE = torch.tensor([[3, 0, -1, 9, 7], [1, 30, 5, 6, 2], [8, 4, 10, -(2**31), 2**31 - 1]], dtype=torch.int32)
APPENDS = {
    "plain": {}, "rotary": dict(rotary=16), "part of a key": dict(rotary=6), "interleaved": dict(rotary=6, interleaved=True), "one key": dict(new=1, rotary=16),
    "packed": dict(lengths=(5, 0, 9)), "packed, rotary": dict(lengths=(0, 7, 1), rotary=16), "no room": dict(cached=(0, 17, -2)), "none": dict(new=0), "packed, none": dict(lengths=(0, 0, 0)),
    "heads first": dict(transposed=True, rotary=4), "a long one": dict(lengths=(2, 14, 1), cached=(0, 1, 3)),
}  # fmt: skip


@BUILT
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", APPENDS)
def test_appending_is_what_torch_makes_of_it(name, stored, both_ways):
    options = dict(new=6, rotary=0, interleaved=False, lengths=None, cached=(2, 0, 9), transposed=False) | APPENDS[name]
    lead = (3, options["new"]) if options["lengths"] is None else (sum(options["lengths"]),)
    cu = None if options["lengths"] is None else torch.tensor((0, *options["lengths"])).cumsum(0).int()
    quantised = stored.itemsize == 1
    scales = [torch.rand(2) * 0.1 + 0.01 if quantised else None for _ in "kv"]
    tables = [torch.randn(40, options["rotary"] // 2) if options["rotary"] else None for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        k, v = torch.randn(*lead, 2, 16), torch.randn(*lead, 2, 11)
        if k.numel():
            v.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        k, v = (t.transpose(-2, -3).contiguous().transpose(-2, -3) if options["transposed"] else t for t in (k.to(dtype), v.to(dtype)))

        def append(k, v):
            caches = [torch.full((11, 4, 2, n), 7.0).to(stored) for n in (16, 11)]
            lengths = torch.tensor(options["cached"], dtype=torch.int32)
            append_paged_kv(k, v, *caches, TABLE[:, :4], lengths, cu, *tables, *scales, options["interleaved"])
            return caches

        compiled, plain = both_ways(append, k, v)
        for mine, theirs in zip(compiled, plain, strict=True):
            same = (mine.view(torch.uint8) == theirs.view(torch.uint8)) if quantised else (mine == theirs) | (mine.isnan() & theirs.isnan())
            if not options["rotary"]:
                assert same.all()
            else:  # a fused product and sum rounds otherwise, which a bit of what is stored may show
                assert same.float().mean() > 0.9
                torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.13 if quantised else 1e-2, atol=1.0 if quantised else 1e-5, equal_nan=True)


@BUILT
def test_e4m3_of_every_kind_of_float(both_ways):
    """Around each boundary of rounding, NaN, infinities, and what saturates."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ends = codes[codes.isfinite()].unique()
    halfway = (ends[1:] + ends[:-1]) / 2
    values = torch.cat([codes, halfway, halfway.nextafter(torch.tensor(1e9)), halfway.nextafter(torch.tensor(-1e9)), torch.tensor([1e9, -1e9, torch.inf, -torch.inf, 1e-30, -0.0])])
    x = torch.zeros(1, 2, 1, 512)
    x.view(-1)[: len(values)] = values

    def append(k):
        caches = [torch.zeros(1, 2, 1, 512).to(torch.float8_e4m3fn) for _ in "kv"]
        append_paged_kv(k, k, *caches, *(torch.zeros(*shape, dtype=torch.int32) for shape in ((1, 1), (1,))), *[None] * 5, False)
        return caches

    compiled, plain = both_ways(append, x)
    assert torch.equal(compiled[0].view(torch.uint8), plain[0].view(torch.uint8))


# --------------------------------------------------------------------------------------------------------------------
# Other instruction sets, sanitizers, and none of it.


def run_these(names: str, **environment: str) -> str:
    """This file's tests of such names in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", names, __file__]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@BUILT
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    assert "passed" in run_these("torch_makes or half_precision or mask or large_softcap", ATEN_CPU_CAPABILITY=capability)


@BUILT
@pytest.mark.more
def test_under_sanitizers(tmp_path):
    """Addresses and undefined behaviour, in a library built for it."""
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path / "_C.so"
    flags = ["-std=c++17", "-O1", "-g", "-fno-math-errno", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
    sources = sorted(map(str, (ROOT / "csrc" / "cpu").glob("*.cpp")))
    include, link = [f"-I{path}" for path in include_paths()], [f"-L{path}" for path in library_paths()]
    subprocess.run(
        [compiler, "-shared", "-fPIC", *flags, *sanitize, *include, *sources, *link, "-ltorch", "-ltorch_cpu", "-lc10", "-o", library],
        check=True,
    )
    runtimes = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    for capability in ("avx512", "default"):
        run_these(
            "torch_makes or half_precision or threads", FASTATTN_EXTENSION=str(library), LD_PRELOAD=":".join(runtimes),
            ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="1", ATEN_CPU_CAPABILITY=capability,
        )  # fmt: skip


@pytest.mark.parametrize("library, why", [("0", "turned off by FASTATTN_EXTENSION=0"), (__file__, "does not load: ")])
def test_without_them_everything_works(library, why):
    code = f"""
import torch, fastattn
from fastattn.extensions import cpu_operators
assert cpu_operators.why_not.startswith({why!r}), cpu_operators.why_not
assert not cpu_operators.available("attention_fwd_cpp")
q = torch.randn(1, 5, 2, 8, requires_grad=True)
fastattn.attention(q, q, q, softcap=3.0).sum().backward()
assert q.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"FASTATTN_EXTENSION": library}, check=True)


def test_attention_is_differentiated_through_them():
    """The public function, gradients and all, beside the reference."""
    q, k, v = (torch.randn(2, 20, 4, 16, requires_grad=True) for _ in range(3))
    out, expected = fastattn.attention(q, k, v, softcap=2.0, causal=True), fastattn.reference.attention(q, k, v, softcap=2.0, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(out)
    for got, wanted in zip(*(torch.autograd.grad(t, (q, k, v), dout) for t in (out, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
