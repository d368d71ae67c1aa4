"""flash-attn's inference calls: `flash_attn_with_kvcache` and `flash_attn_varlen_func(block_table=...)` against a naive account of them."""

from __future__ import annotations

import inspect

import pytest
import torch
from paged_cases import BF16, F16, F32, pages_of

from fastattn import flash_attn, reference
from fastattn.testing.budget import check_budget

# flash-attn 2.8.4, flash_attn/flash_attn_interface.py
SIGNATURE = dict(
    q=..., k_cache=..., v_cache=..., k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
    alibi_slopes=None, num_splits=0, return_softmax_lse=False,
)  # fmt: skip


def test_signature_is_flash_attn_s():
    parameters = inspect.signature(flash_attn.flash_attn_with_kvcache).parameters
    assert {name: ... if p.default is p.empty else p.default for name, p in parameters.items()} == SIGNATURE
    assert list(parameters) == list(SIGNATURE)


def naive(
    q, k_cache, v_cache, k=None, v=None, *, rotary_cos=None, rotary_sin=None, cache_seqlens, cache_batch_idx=None, cache_leftpad=None,
    causal=False, window_size=(-1, -1), rotary_interleaved=True, alibi_slopes=None, softmax_scale=None, softcap=0.0, dtype,
):  # fmt: skip
    """(out, lse) in `dtype` of contiguous caches, which it writes to, sequence by sequence."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        row = b if cache_batch_idx is None else int(cache_batch_idx[b])
        length, pad = int(cache_seqlens[b]), 0 if cache_leftpad is None else int(cache_leftpad[b])
        q_ = q[b : b + 1].to(dtype)
        if k is not None:
            k_ = k[b : b + 1].to(dtype)
            if rotary_cos is not None:
                tables = rotary_cos.to(dtype), rotary_sin.to(dtype)
                moves = causal or window_size != (-1, -1)
                at = length + torch.arange(q.shape[1]) * moves
                q_, _ = reference.apply_rotary(q_, q_, *tables, positions=at[None], interleaved=rotary_interleaved)
                at = length + torch.arange(k.shape[1])
                k_, _ = reference.apply_rotary(k_, k_, *tables, positions=at[None], interleaved=rotary_interleaved)
                q_, k_ = q_.to(q.dtype).to(dtype), k_.to(k_cache.dtype)  # both are rounded on the way
            k_cache[row, length : length + k.shape[1]] = k_[0].to(k_cache.dtype)
            v_cache[row, length : length + k.shape[1]] = v[b]
            length += k.shape[1]
        keys, values = (cache[row : row + 1, pad:length].to(dtype) for cache in (k_cache, v_cache))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out, lse = reference.attention(
            q_, keys, values, causal=causal, window=window_size, alibi_slopes=slopes, softmax_scale=softmax_scale, softcap=softcap,
            return_lse=True,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def tables(length=128, dim=32):
    angles = torch.arange(length)[:, None] / 100 ** (torch.arange(dim // 2) / (dim // 2))
    return dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())


INDEX = dict(cache_batch_idx=torch.tensor([3, 0], dtype=torch.int32))
PAD = dict(cache_leftpad=torch.tensor([5, 0], dtype=torch.int32))
CASES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(20, 3)),
    "softcap": dict(causal=True, softcap=3.0, softmax_scale=0.3),
    "alibi": dict(causal=True, alibi_slopes=torch.rand(2, 4)),
    "batch_idx": dict(causal=True, **INDEX),
    "leftpad": dict(causal=True, **PAD),
    "rotary": dict(causal=True, **tables()),
    "rotary, not causal": tables(),
    "rotary in halves": dict(window_size=(30, 0), rotary_interleaved=False, **tables(dim=64)),
    "rotary and leftpad": dict(causal=True, **PAD, **INDEX, **tables()),
}


CALLS = [(name, S_new) for name, options in CASES.items() for S_new in (None, 1, 4) if S_new or "rotary_cos" not in options]


@pytest.mark.both
@pytest.mark.parametrize("name, S_new", CALLS)
@pytest.mark.parametrize("page_size", [None, 16])
def test_values(name, S_new, page_size):
    options = dict(CASES[name])
    if page_size is not None:
        options.pop("cache_batch_idx", None)
    dtype = {"softcap": F32, "rotary": BF16}.get(name, F16)
    lengths = torch.tensor([40, 77], dtype=torch.int32)
    q = torch.randn(2, S_new or 3, 4, 64).to(dtype)
    k_cache, v_cache = (torch.randn(4, 100, 2, 64).to(dtype) for _ in range(2))
    new = {} if S_new is None else {name: torch.randn(2, S_new, 2, 64).to(dtype) for name in ("k", "v")}
    expected_caches = k_cache.clone(), v_cache.clone()
    truth, baseline = (
        naive(q, *expected_caches, **new, cache_seqlens=lengths, **options, dtype=wanted) for wanted in (torch.float64, dtype)
    )
    if page_size is None:
        caches, table = (k_cache, v_cache), None
    else:
        after = lengths + (S_new or 0)
        caches, table = pages_of(k_cache[:2], v_cache[:2], lengths=after, page_size=page_size)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, *caches, **new, cache_seqlens=lengths, block_table=table, **options, return_softmax_lse=True
    )
    check_budget(f"kvcache {name} out", out, baseline[0], truth[0])
    check_budget(f"kvcache {name} lse", lse, baseline[1], truth[1])
    if page_size is None:
        torch.testing.assert_close(caches[0], expected_caches[0], rtol=0.0 if S_new is None else 1e-2, atol=0.0 if S_new is None else 1e-2)
        assert torch.equal(caches[1], expected_caches[1])
    only_out = flash_attn.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths, block_table=table, causal=True)
    assert isinstance(only_out, torch.Tensor)


@pytest.mark.both
def test_lengths_may_be_one_int_or_none():
    q, cache = torch.randn(2, 1, 4, 64), torch.randn(2, 30, 2, 64)
    whole = flash_attn.flash_attn_with_kvcache(q, cache, cache)
    torch.testing.assert_close(whole, flash_attn.flash_attn_func(q, cache, cache))
    some = flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=17)
    torch.testing.assert_close(some, flash_attn.flash_attn_func(q, cache[:, :17], cache[:, :17]))


@pytest.mark.both
def test_varlen_over_a_block_table():
    lengths = torch.tensor([40, 7, 20], dtype=torch.int32)
    k, v, q = torch.randn(3, 40, 2, 64), torch.randn(3, 40, 2, 64), torch.randn(12, 4, 64)
    caches, table = pages_of(k, v, lengths=lengths, page_size=8)
    starts_q, starts_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in ([5, 1, 6], lengths.tolist()))
    packed = [torch.cat([t[b, :n] for b, n in enumerate(lengths.tolist())]) for t in (k, v)]
    options = dict(causal=True, window_size=(15, 0), return_attn_probs=True)
    out, lse, nothing = flash_attn.flash_attn_varlen_func(q, *caches, starts_q, starts_k, 6, 40, block_table=table, **options)
    expected = flash_attn.flash_attn_varlen_func(q, *packed, starts_q, starts_k, 6, 40, **options)
    torch.testing.assert_close((out, lse), expected[:2])
    assert nothing is None
    only_out = flash_attn.flash_attn_varlen_func(q, *caches, starts_q, starts_k, 6, 40, block_table=table)
    assert only_out.shape == q.shape
    with pytest.raises(ValueError, match="flash_attn_varlen_func: dropout_p must be 0 with block_table, got 0.1"):
        flash_attn.flash_attn_varlen_func(q, *caches, starts_q, starts_k, 6, 40, 0.1, block_table=table)


def test_decoding_step_by_step_is_the_whole_sequence():
    tables_ = tables(64)
    q, k, v = torch.randn(2, 20, 4, 64), torch.randn(2, 20, 2, 64), torch.randn(2, 20, 2, 64)
    caches = [torch.zeros(2, 32, 2, 64) for _ in range(2)]
    whole = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, **tables_, cache_seqlens=0, causal=True)
    kept = [cache.clone() for cache in caches]
    for cache in caches:
        cache.zero_()
    steps = []
    for i in range(20):
        now = [t[:, i : i + 1] for t in (q, k, v)]
        steps.append(flash_attn.flash_attn_with_kvcache(now[0], *caches, *now[1:], **tables_, cache_seqlens=i, causal=True))
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.testing.assert_close(caches, kept)


def call(**changes):
    arguments = dict(q=torch.randn(2, 1, 4, 64), k_cache=torch.randn(2, 30, 2, 64), v_cache=torch.randn(2, 30, 2, 64))
    return flash_attn.flash_attn_with_kvcache(**(arguments | changes))


NEW = dict(k=torch.randn(2, 1, 2, 64), v=torch.randn(2, 1, 2, 64))
INT32 = dict(dtype=torch.int32)
ERRORS = [
    (TypeError, r"q must be a torch.Tensor, got int", dict(q=3)),
    (ValueError, r"q must have shape \(B, S_q, H, D\), got \(4, 64\)", dict(q=torch.randn(4, 64))),
    (ValueError, r"k_cache must have shape \(B_cache, S_cache, H_kv, D\), or .*, got \(30, 2, 64\)", dict(k_cache=torch.randn(30, 2, 64))),
    (ValueError, r"k and v must be given together, got only k", dict(k=NEW["k"])),
    (ValueError, r"k and v must be given together, got only v", dict(v=NEW["v"])),
    (ValueError, r"cache_seqlens must be given with k, got None", NEW),
    (ValueError, r"rotary_cos and rotary_sin must be given together, got one of them", NEW | dict(cache_seqlens=1, rotary_sin=torch.randn(9, 8))),
    (ValueError, r"rotary_cos must be None where there is no new k, got a tensor", tables()),
    (ValueError, r"cache_batch_idx must be None with block_table, got a tensor", dict(cache_batch_idx=torch.zeros(2, **INT32), block_table=torch.zeros(2, 1, **INT32))),
    (TypeError, r"cache_batch_idx must be an int32 tensor, got torch.int64", dict(cache_batch_idx=torch.zeros(2, dtype=torch.int64))),
    (TypeError, r"cache_seqlens must be an int or an int32 tensor, got float", dict(cache_seqlens=1.5)),
    (TypeError, r"cache_seqlens must be an int32 tensor, got torch.int64", dict(cache_seqlens=torch.zeros(2, dtype=torch.int64))),
    (ValueError, r"cache_leftpad must have shape \(B,\) = \(2,\), got \(3,\)", dict(cache_leftpad=torch.zeros(3, **INT32))),
    (TypeError, r"v_cache must have k_cache's dtype torch.float32, got torch.int8", dict(v_cache=torch.zeros(2, 30, 2, 64, dtype=torch.int8))),
]  # fmt: skip


@pytest.mark.parametrize("error, message, changes", ERRORS, ids=[message[:45] for _, message, _ in ERRORS])
def test_errors(error, message, changes):
    with pytest.raises(error, match=f"^flash_attn_with_kvcache: {message}"):
        call(**changes)


HOSTILE = [
    (ValueError, r"cache_seqlens must lie in .* = \[0, 30\], got 31", dict(cache_seqlens=31)),
    (ValueError, r"cache_seqlens \(with the new keys\) must lie in .* = \[0, 30\], got 31", NEW | dict(cache_seqlens=30)),
    (ValueError, r"cache_leftpad must lie between 0 and its sequence's length", NEW | dict(cache_seqlens=3, cache_leftpad=torch.tensor([5, 0], **INT32))),
    (ValueError, r"cache_batch_idx must hold pages in \[0, num_pages\) = \[0, 2\) .* got 2 at \[1, 0\]", NEW | dict(cache_seqlens=3, cache_batch_idx=torch.tensor([0, 2], **INT32))),
    (ValueError, r"k must have shape \(B, S_new, H_kv, D\) with B = 2, got \(2, 64\)", dict(k=NEW["k"][:, 0, 0], v=NEW["v"], cache_seqlens=3)),
    (ValueError, r"softcap must be finite", NEW | dict(cache_seqlens=3, softcap=-1.0)),
    (ValueError, r"num_splits must lie", NEW | dict(cache_seqlens=3, num_splits=-3)),
    (ValueError, r"window must be a pair", NEW | dict(cache_seqlens=3, window_size=(1, 2, 3))),
    (ValueError, r"window must be a pair", NEW | tables() | dict(cache_seqlens=3, window_size=None)),
    (ValueError, r"alibi_slopes must have shape", NEW | dict(cache_seqlens=3, alibi_slopes=torch.rand(3))),
]  # fmt: skip


@pytest.mark.parametrize("error, message, changes", HOSTILE, ids=[message[:45] for _, message, _ in HOSTILE])
def test_a_call_that_raises_leaves_the_cache_alone(error, message, changes):
    cache = torch.randn(2, 30, 2, 64)
    before = cache.clone()
    with pytest.raises(error, match=f"^flash_attn_with_kvcache: {message}"):
        call(k_cache=cache, v_cache=cache, **changes)
    assert torch.equal(cache, before)


def test_block_table_s_lengths_are_checked_by_name():
    cache, table = torch.randn(4, 8, 2, 64), torch.zeros(2, 2, **INT32)
    for starts, message in (([0, 5, 3], "cu_seqlens_k must not decrease"), ([2, 5, 9], "cu_seqlens_k must start at 0, got 2")):
        starts_q, starts_k = torch.tensor([0, 1, 2], **INT32), torch.tensor(starts, **INT32)
        with pytest.raises(ValueError, match=f"flash_attn_varlen_func: {message}"):
            flash_attn.flash_attn_varlen_func(torch.randn(2, 4, 64), cache, cache, starts_q, starts_k, 1, 9, block_table=table)


def test_no_gradient_is_silently_lost():
    q = torch.randn(2, 1, 4, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="fastattn.paged_attention has no gradient"):
        call(q=q).sum().backward()
