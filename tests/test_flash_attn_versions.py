"""FlashAttention-3's and -4's faces: signatures, return conventions, values against the reference, and refusals by name."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from fastattn import reference
from fastattn.flash_attn import v3, v4

DESCALE = "q_descale k_descale v_descale"
SIGNATURES = {
    (v3, "flash_attn_func"): f"q k v softmax_scale causal qv {DESCALE} window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    (v3, "flash_attn_qkvpacked_func"): f"qkv softmax_scale causal {DESCALE} window_size attention_chunk softcap deterministic num_heads_q sm_margin return_attn_probs",
    (v3, "flash_attn_varlen_func"): f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale causal qv {DESCALE} window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
    (v3, "flash_attn_with_kvcache"): f"q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens {DESCALE} softmax_scale causal window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse",
    (v3, "flash_attn_combine"): "out_partial lse_partial out out_dtype",
    (v3, "get_scheduler_metadata"): "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens qkv_dtype headdim_v cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size max_seqlen_k_new causal window_size attention_chunk has_softcap num_splits pack_gqa sm_margin",
    (v4, "flash_attn_func"): "q k v qv gather_kv_indices softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod aux_tensors aux_scalars block_sparse_tensors block_sparse_tensors_bwd return_lse",
    (v4, "flash_attn_varlen_func"): "q k v qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k seqused_q seqused_k gather_kv_indices page_table softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars return_lse scheduler_metadata seqlen_k_per_split disable_scheduler_metadata",
    (v4, "flash_attn_combine"): "out_partial lse_partial out out_dtype cu_seqlens seqused virtual_batch_idx return_lse",
}  # fmt: skip


@pytest.mark.parametrize("module, name", SIGNATURES, ids=lambda x: getattr(x, "__name__", x))
def test_signatures(module, name):
    assert list(inspect.signature(getattr(module, name)).parameters) == SIGNATURES[module, name].split()


def dense(batch=2, seqlen_q=7, seqlen_k=10, heads=4, kv_heads=2):
    shapes = [(batch, seqlen_q, heads, 8), (batch, seqlen_k, kv_heads, 8), (batch, seqlen_k, kv_heads, 8)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def packed(lengths_q=(5, 0, 3), lengths_k=(4, 6, 8)):
    q, k, v = (t.detach()[0].requires_grad_() for t in dense(1, sum(lengths_q), sum(lengths_k)))
    cu_seqlens = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    return (q, k, v), (*cu_seqlens, max(lengths_q), max(lengths_k))


def same_with_gradients(results, expected, inputs):
    """Values, and gradients of the sum of both results where there are two."""
    torch.manual_seed(2)
    weights = [torch.randn_like(t) for t in expected]
    for result, wanted in zip(results, expected):
        torch.testing.assert_close(result, wanted)
    grads, wanted = (
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(ts, weights)), inputs, retain_graph=True) for ts in (results, expected)
    )
    for a, b in zip(grads, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


def test_v3_dense():
    q, k, v = dense()
    options = dict(softmax_scale=0.4, causal=True, softcap=2.0)
    out = v3.flash_attn_func(q, k, v, window_size=(4, -1), num_splits=3, pack_gqa=True, sm_margin=8, **options)
    assert torch.is_tensor(out)
    results = v3.flash_attn_func(q, k, v, 0.4, True, window_size=(4, -1), softcap=2.0, return_attn_probs=True)
    assert type(results) is tuple and len(results) == 2 and torch.equal(results[0], out)
    same_with_gradients(results, reference.attention(q, k, v, window=(4, -1), return_lse=True, **options), (q, k, v))


def test_v3_qkvpacked():
    qkv = torch.randn(2, 6, 3, 4, 8, requires_grad=True)
    expected = reference.attention(*qkv.unbind(2), causal=True, return_lse=True)
    same_with_gradients(v3.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True), expected, (qkv,))
    heads = torch.randn(2, 6, 8, 8, requires_grad=True)  # 4 of q, 2 of k, 2 of v
    expected = reference.attention(*heads.split([4, 2, 2], 2), return_lse=True)
    same_with_gradients(v3.flash_attn_qkvpacked_func(heads, num_heads_q=4, return_attn_probs=True), expected, (heads,))
    with pytest.raises(ValueError, match="flash_attn_qkvpacked_func: qkv must have shape"):
        v3.flash_attn_qkvpacked_func(heads)


@pytest.mark.parametrize("version", [v3, v4], ids=["v3", "v4"])
def test_varlen(version):
    tensors, lengths = packed()
    options = dict(causal=True, window_size=(3, -1))
    expected = reference.attention(*tensors, causal=True, window=(3, -1), cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1], return_lse=True)
    if version is v3:
        results = v3.flash_attn_varlen_func(*tensors, *lengths, return_attn_probs=True, **options)
    else:
        results = v4.flash_attn_varlen_func(*tensors, None, *lengths, return_lse=True, **options)
    same_with_gradients(results, expected, tensors)


@pytest.mark.both
@pytest.mark.parametrize("version", [v3, v4], ids=["v3", "v4"])
def test_used_keys(version):
    tensors, (cu_q, cu_k, max_q, max_k) = packed()
    q, k, v = (t.detach() for t in tensors)
    used = torch.tensor([4, 2, 5], dtype=torch.int32)
    keys, values = (torch.cat([t[s : s + n] for s, n in zip(cu_k.tolist(), used.tolist())]) for t in (k, v))
    cu_used = torch.tensor([0, 4, 6, 11], dtype=torch.int32)
    sinks = {} if version is v3 else {"learnable_sink": SINKS}
    out = version.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, seqused_k=used, causal=True, **sinks
    )
    out = out if version is v3 else out[0]
    expected = reference.attention(
        q, keys, values, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_used, sinks=sinks.get("learnable_sink")
    )
    torch.testing.assert_close(out, expected)
    with pytest.raises(NotImplementedError, match="no gradient"):
        out = version.flash_attn_varlen_func(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, seqused_k=used)
        (out if version is v3 else out[0]).sum().backward()


def test_v4_dense_with_sinks():
    q, k, v = dense()
    sinks = SINKS.clone().requires_grad_()
    out, lse = v4.flash_attn_func(q, k, v, causal=True, window_size=(4, None), learnable_sink=sinks)
    assert lse is None
    results = v4.flash_attn_func(q, k, v, causal=True, window_size=(4, None), learnable_sink=sinks, return_lse=True)
    assert torch.equal(results[0], out)
    same_with_gradients(results, reference.attention(q, k, v, causal=True, window=(4, None), sinks=sinks, return_lse=True), (q, k, v, sinks))


def test_v4_pages_and_dense_batches():
    q, k, v = (t.detach() for t in dense(seqlen_k=12))
    used = torch.tensor([11, 5], dtype=torch.int32)
    expected = torch.cat([reference.attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True) for b, n in enumerate(used.tolist())])
    out, lse = v4.flash_attn_varlen_func(q, k, v, seqused_k=used, causal=True)
    torch.testing.assert_close(out, expected)
    assert lse is None
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    caches = [t.unflatten(1, (3, 4)).flatten(0, 1) for t in (k, v)]
    out, lse = v4.flash_attn_varlen_func(q, *caches, page_table=table, seqused_k=used, causal=True, num_splits=2, return_lse=True)
    torch.testing.assert_close(out, expected)
    cu_q, cu_k = torch.tensor([0, 7, 14], dtype=torch.int32), torch.tensor([0, 11, 16], dtype=torch.int32)
    out, lse = v4.flash_attn_varlen_func(
        q.flatten(0, 1), *caches, None, cu_q, cu_k, 7, 11, page_table=table, causal=True, return_lse=True
    )
    torch.testing.assert_close(out.view_as(expected), expected)
    assert lse.shape == (4, 14)
    torch.testing.assert_close(v4.flash_attn_varlen_func(q, k, v)[0], reference.attention(q, k, v))
    with pytest.raises(ValueError, match="flash_attn_varlen_func: seqused_k must be given with page_table, got None"):
        v4.flash_attn_varlen_func(q, *caches, page_table=table)


def test_v3_with_kvcache():
    q, k_cache, v_cache = (t.detach() for t in dense(seqlen_q=2, seqlen_k=12))
    k, v = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 8)
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    metadata = v3.get_scheduler_metadata(2, 2, 12, 4, 2, 8, lengths)
    assert metadata.dtype == torch.int32 and metadata.numel() == 0
    results = v3.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, scheduler_metadata=metadata, pack_gqa=False, return_softmax_lse=True
    )
    assert len(results) == 4 and results[2:] == (None, None)
    for b, n in enumerate((7, 11)):
        assert torch.equal(k_cache[b, n - 2 : n], k[b])
        expected, lse = reference.attention(q[b : b + 1], k_cache[b : b + 1, :n], v_cache[b : b + 1, :n], causal=True, return_lse=True)
        torch.testing.assert_close(results[0][b : b + 1], expected)
        torch.testing.assert_close(results[1][b : b + 1], lse)
    # Packed queries over pages, and nothing new.
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    caches = [t.unflatten(1, (3, 4)).flatten(0, 1) for t in (k_cache, v_cache)]
    out = v3.flash_attn_with_kvcache(
        q.flatten(0, 1), *caches, cache_seqlens=lengths + 2, page_table=table, cu_seqlens_q=torch.tensor([0, 2, 4], dtype=torch.int32),
        max_seqlen_q=2, causal=True,
    )  # fmt: skip
    torch.testing.assert_close(out.view_as(q), results[0])


@pytest.mark.parametrize("version", [v3, v4], ids=["v3", "v4"])
def test_combine(version):
    q, k, v = (t.detach() for t in dense())
    parts = [reference.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(4), slice(4, 10))]
    outs, lses = torch.stack([p[0] for p in parts]), torch.stack([p[1].transpose(1, 2) for p in parts])
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    out, lse = version.flash_attn_combine(outs, lses)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.transpose(1, 2))
    buffer = torch.empty_like(out, dtype=torch.bfloat16)
    assert version.flash_attn_combine(outs, lses, buffer)[0] is buffer
    torch.testing.assert_close(buffer, expected.bfloat16(), rtol=1e-2, atol=1e-2)
    assert version.flash_attn_combine(outs, lses, out_dtype=torch.float16)[0].dtype == torch.float16
    if version is v4:
        packed_out, none = v4.flash_attn_combine(outs.flatten(1, 2), lses.flatten(1, 2), return_lse=False)
        torch.testing.assert_close(packed_out, out.flatten(0, 1))
        assert none is None


T = torch.ones(1)
REFUSED = {
    (v3, "flash_attn_func"): dict(qv=T, q_descale=T, k_descale=T, v_descale=T, attention_chunk=64),
    (v3, "flash_attn_varlen_func"): dict(seqused_q=T, qv=T, k_descale=T, attention_chunk=64),
    (v3, "flash_attn_with_kvcache"): dict(qv=T, cu_seqlens_k_new=T, rotary_seqlens=T, v_descale=T, attention_chunk=64),
    (v4, "flash_attn_func"): dict(qv=T, gather_kv_indices=T, score_mod=max, score_mod_bwd=max, mask_mod=max, aux_tensors=[T], aux_scalars=[1], block_sparse_tensors=T, block_sparse_tensors_bwd=T),
    (v4, "flash_attn_varlen_func"): dict(qv=T, seqused_q=T, gather_kv_indices=T, score_mod=max, mask_mod=max, block_sparse_tensors=T, aux_tensors=[T], seqlen_k_per_split=64),
    (v4, "flash_attn_combine"): dict(seqused=T, virtual_batch_idx=T),
}  # fmt: skip


@pytest.mark.parametrize("module, name", REFUSED, ids=lambda x: getattr(x, "__name__", x))
def test_what_is_not_there_is_refused_by_name(module, name):
    function = getattr(module, name)
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for option, value in REFUSED[module, name].items():
        with pytest.raises(NotImplementedError, match=f"^{name}: {option} is not supported"):
            function(*[None] * len(needed), **{option: value})


def test_packed_queries_of_a_cache_refuse_what_they_cannot():
    q, k, v = (t.detach() for t in dense())
    cu_q = torch.tensor([0, 7, 14], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache: k with cu_seqlens_q"):
        v3.flash_attn_with_kvcache(q.flatten(0, 1), k, v, k, v, cu_seqlens_q=cu_q)
    with pytest.raises(NotImplementedError, match="cu_seqlens_q without page_table"):
        v3.flash_attn_with_kvcache(q.flatten(0, 1), k, v, cache_seqlens=cu_q, cu_seqlens_q=cu_q)
