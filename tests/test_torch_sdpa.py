"""torch's attention calls through fastattn as its flash backend: which come, values and gradients, layouts, dropout, refusals, restoring."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETING
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
)
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import fastattn
from fastattn import reference
from fastattn.integrations import torch_sdpa
from fastattn.ops.attention import dropout_keep
from fastattn.testing.budget import check_budget

aten = torch.ops.aten
OF_2_13 = "block_table" in inspect.signature(varlen_attn).parameters


@pytest.fixture
def active():
    torch_sdpa.register()
    activate_flash_attention_impl("fastattn")
    yield
    restore_flash_attention_impl()


@pytest.fixture
def calls(active, monkeypatch):
    """Names of what fastattn was called for, in order."""
    made = []

    def counted(name):
        function = getattr(torch_sdpa, name)

        def counting(*args, **kwargs):
            made.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(torch_sdpa, name, counting)

    for name in ("attend", "attend_backward", "paged_attention"):
        counted(name)
    return made


def qkv(batch=2, heads=4, kv_heads=None, seqlen_q=9, seqlen_k=None, head_dim=8, dtype=torch.float32):
    """(B, H, S, D) views of (B, S, H, D) memory, as projections give them."""
    shapes = [(batch, seqlen_q, heads, head_dim), *[(batch, seqlen_k or seqlen_q, kv_heads or heads, head_dim)] * 2]
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def naive(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """torch's formula in plain operators, which nothing here replaces; a row that sees nothing is 0."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(scores.shape[2:], dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores, visible = scores + attn_mask.to(scores.dtype), visible & (attn_mask > float("-inf"))
    return torch.softmax(scores.masked_fill(~visible, -1e4), -1).masked_fill(~visible, 0.0) @ v


def check_against(name, function, expected, tensors):
    """Value and gradients of function(*tensors) within the budget of expected(*tensors)."""
    results = []
    for call, dtype in ((function, None), (expected, None), (expected, torch.float64)):
        inputs = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]
        out = call(*inputs)
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out.dtype))
        results.append((out, *grads))
    for part, out, in_dtype, ref64 in zip(("out", "dq", "dk", "dv"), *results):
        check_budget(f"{name} {part}", out, in_dtype, ref64)


def mask_of(kind, dtype):
    visible = torch.rand(2, 1, 9, 12) < 0.7
    visible[:, :, 3] = False  # a row that sees nothing
    return visible if kind == "bool" else torch.randn(9, 12).masked_fill(~visible[0, 0], float("-inf")).to(dtype)


CASES = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "causal-short": ({"seqlen_k": 5}, {"is_causal": True}),
    "causal-long": ({"seqlen_k": 13}, {"is_causal": True}),
    "gqa-scale": ({"kv_heads": 2, "seqlen_k": 12}, {"enable_gqa": True, "scale": 0.7}),
    "bool-mask": ({"seqlen_k": 12}, {"attn_mask": "bool"}),
    "float-mask": ({"seqlen_k": 12}, {"attn_mask": "float"}),
}


@pytest.mark.both
@pytest.mark.parametrize("case, dtype", [*((case, torch.float32) for case in CASES), ("gqa-scale", torch.bfloat16), ("bool-mask", torch.float16)])
def test_scaled_dot_product_attention(calls, launches, case, dtype):
    sizes, options = CASES[case]
    if "attn_mask" in options:
        options = options | {"attn_mask": mask_of(options["attn_mask"], dtype)}
    tensors = qkv(dtype=dtype, **sizes)
    functions = (lambda q, k, v, f=f: f(q, k, v, **options) for f in (F.scaled_dot_product_attention, naive))
    check_against(f"sdpa {case}", *functions, tensors)
    assert calls == ["attend", "attend_backward"]
    assert launches is None or launches.count >= 2


def test_scaled_dot_product_attention_in_float64(calls):
    q, k, v = qkv(dtype=torch.float64)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True), naive(q, k, v, is_causal=True), rtol=1e-12, atol=1e-12)
    assert calls == ["attend"]


def test_the_cpu_path_calls_torchs_own_kernel(calls):
    """Both ways of fastattn's own that end in the replaced operator on the CPU."""
    q, k, v = qkv(dtype=torch.float32)
    expected = naive(q, k, v)
    torch.testing.assert_close(fastattn.scaled_dot_product_attention(q, k, v), expected)
    torch.testing.assert_close(fastattn.attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2), expected)


# --------------------------------------------------------------------------------------------------------------------
# Which calls come: what docs/torch_sdpa.md says of the CPU.


def test_modules_in_training_come(calls):
    x = torch.randn(2, 7, 16, requires_grad=True)
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    module(x, x, x, need_weights=False)[0].sum().backward()
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    encoder(x).sum().backward()
    assert calls == ["attend", "attend_backward", *["attend"] * 2, *["attend_backward"] * 2]


def test_the_fast_path_of_evaluation_does_not_come_unless_it_is_off(calls):
    x = torch.randn(2, 7, 16)
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    with torch.no_grad():
        fast = module(x, x, x, need_weights=False)[0], encoder(x)
        assert calls == []
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = module(x, x, x, need_weights=False)[0], encoder(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert calls == ["attend"] * 3
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b)


def test_what_torch_gives_to_another_backend_does_not_come(calls):
    q, k, v = qkv()
    F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    F.scaled_dot_product_attention(q, k, v[..., :4])
    F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(9, 9, requires_grad=True))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v)
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 7, 16)
    module(x, x, x, need_weights=True)
    assert calls == []
    query, key, value = qkv(seqlen_k=12)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(9, 12))  # which the CPU gets as a mask
    torch.testing.assert_close(out, naive(query, key, value, torch.ones(9, 12, dtype=torch.bool).tril(3)))
    assert calls == ["attend"]


# --------------------------------------------------------------------------------------------------------------------
# Packed sequences.


def packed(lengths_q=(5, 0, 3, 9), lengths_k=(4, 6, 3, 11), heads=4, kv_heads=2, head_dim=8, dtype=torch.float32):
    shapes = [(sum(lengths_q), heads), (sum(lengths_k), kv_heads), (sum(lengths_k), kv_heads)]
    tensors = [torch.randn(*shape, head_dim).to(dtype).requires_grad_() for shape in shapes]
    cu_seqlens = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    return tensors, (*cu_seqlens, max(lengths_q), max(lengths_k))


def packed_reference(lengths, **options):
    return lambda q, k, v: reference.attention(q, k, v, cu_seqlens_q=lengths[0], cu_seqlens_k=lengths[1], **options)


@pytest.mark.both
@pytest.mark.parametrize("window", [(-1, 0), (2, 1)], ids=str)
def test_varlen_attn(calls, window):
    tensors, lengths = packed(kv_heads=2 if OF_2_13 else 4)
    gqa = {"enable_gqa": True} if OF_2_13 else {}

    def function(q, k, v):
        return varlen_attn(q, k, v, *lengths, window_size=window, scale=0.3, **gqa)

    check_against("varlen_attn", function, packed_reference(lengths, window=window, softmax_scale=0.3), tensors)
    assert calls == ["attend", "attend_backward"]


def test_varlen_attn_gives_its_lse(active):
    tensors, lengths = packed(kv_heads=4)
    out, lse = varlen_attn(*tensors, *lengths, window_size=(-1, 0), return_aux=AuxRequest(lse=True))
    expected = packed_reference(lengths, causal=True, return_lse=True)(*tensors)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.both
@pytest.mark.skipif(not OF_2_13, reason="this torch's varlen_attn has no caches")
@pytest.mark.parametrize("form", ["packed", "pages"])
def test_varlen_attn_over_caches(calls, form):
    (q, k, v), (cu_q, cu_k, max_q, max_k) = packed()
    used = torch.tensor([3, 0, 3, 10], dtype=torch.int32)
    keys = [t.detach()[start : start + n] for t in (k, v) for start, n in zip(cu_k[:-1].tolist(), used.tolist())]
    cu_used = torch.tensor([0, *itertools.accumulate(used.tolist())], dtype=torch.int32)
    expected = reference.attention(
        q.detach(), torch.cat(keys[:4]), torch.cat(keys[4:]), causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_used
    )
    options = dict(window_size=(-1, 0), enable_gqa=True, seqused_k=used, num_splits=2)
    if form == "pages":  # of 4 keys, sequence by sequence in reverse
        table = torch.arange(11, -1, -1, dtype=torch.int32).view(4, 3)
        cache = torch.full((2, 12, 4, 2, 8), float("nan"))
        for b, n in enumerate(used.tolist()):
            for i in range(n):
                cache[:, table[b, i // 4], i % 4] = torch.stack([keys[b][i], keys[4 + b][i]])
        out = varlen_attn(q.detach(), *cache, cu_q, None, max_q, 12, block_table=table, **options)
    else:
        out = varlen_attn(q.detach(), k.detach(), v.detach(), cu_q, cu_k, max_q, max_k, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert calls == ["paged_attention"]


def test_used_keys_of_a_dense_batch(active):
    q, k, v = (t.detach().transpose(1, 2) for t in qkv(seqlen_q=2, seqlen_k=9))
    used = torch.tensor([9, 4], dtype=torch.int32)
    out, *_ = aten._flash_attention_forward(q, k, v, None, None, 2, 9, 0.0, True, False, seqused_k=used)
    for b, n in enumerate(used.tolist()):
        torch.testing.assert_close(out[b : b + 1], reference.attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True))


@pytest.mark.skipif(not hasattr(aten, "_flash_attention_forward_no_dropout_inplace"), reason="this torch has no varlen_attn_out")
def test_varlen_attn_out(calls):
    from torch.nn.attention.varlen import varlen_attn_out

    (q, k, v), lengths = packed()
    out = torch.empty_like(q)
    with torch.no_grad():
        assert varlen_attn_out(out, q, k, v, *lengths, enable_gqa=True) is out
        torch.testing.assert_close(out, packed_reference(lengths)(q, k, v))
    assert calls == ["attend"]


@pytest.mark.both
def test_alibi_and_its_missing_gradient(active):
    (q, k, v), lengths = packed()
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    call = dict(alibi_slopes=slopes, window_size_left=4)
    with torch.no_grad():
        out, *_ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, **call)
        expected = packed_reference(lengths, causal=True, window=(4, 0), alibi_slopes=slopes)(q, k, v)
    torch.testing.assert_close(out, expected)
    with pytest.raises(NotImplementedError, match="_flash_attention_forward on fastattn: alibi_slopes with a gradient is not supported"):
        aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, **call)


# --------------------------------------------------------------------------------------------------------------------
# What runs on CUDA, on CPU tensors.


@pytest.mark.both
@pytest.mark.parametrize("seqlen_k", [9, 13, 5])
def test_cuda_functions_align_to_the_bottom_right(launches, seqlen_k):
    q, k, v = (t.detach() for t in qkv(kv_heads=2, seqlen_k=seqlen_k))
    out, lse, cum_q, cum_k, max_q, max_k, rng_state, offset, mask = torch_sdpa.sdpa_forward(q, k, v, is_causal=True, scale=0.4)
    heads_last = [t.transpose(1, 2).requires_grad_() for t in (q, k, v)]
    expected, expected_lse = reference.attention(*heads_last, causal=True, softmax_scale=0.4, return_lse=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    torch.testing.assert_close(lse, expected_lse)
    assert (cum_q, cum_k, max_q, max_k, mask.shape, offset.shape) == (None, None, 9, seqlen_k, (0,), ())
    assert rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
    dout = torch.randn_like(out)
    grads = torch_sdpa.sdpa_backward(
        dout, q, k, v, out, lse, None, None, max_q, max_k, 0.0, True, rng_state, offset, scale=0.4
    )
    for grad, wanted in zip(grads, torch.autograd.grad(expected, heads_last, dout.transpose(1, 2))):
        torch.testing.assert_close(grad.transpose(1, 2), wanted)
    assert launches is None or launches.count >= 2


@pytest.mark.both
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_the_backward_has_the_forwards_dropout(active, layout):
    """The mask's seed goes through torch's own autograd as its rng_state."""
    p, lengths = 0.3, (None, None, 9, 9)
    tensors = [t.transpose(1, 2).detach().contiguous().requires_grad_() for t in qkv(batch=1)]
    if layout == "packed":
        tensors = [t.detach()[0].requires_grad_() for t in tensors]
        lengths = (*[torch.tensor([0, 9], dtype=torch.int32)] * 2, 9, 9)
    out, lse, rng_state, _, _ = aten._flash_attention_forward(*tensors, *lengths, p, False, False)
    keep = dropout_keep(rng_state.view(torch.int64)[:1], 1, 4, 9, 9, p)
    assert 0.5 < keep.float().mean() < 0.9

    def expected(q, k, v):
        q, k, v = ((t if t.dim() == 4 else t[None]).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1) * keep / (1 - round(p * 2**16) / 2**16)
        return (weights @ v).transpose(1, 2).view_as(out)

    torch.testing.assert_close(out, expected(*tensors), rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(expected(*tensors), tensors, dout)
    for grad, want in zip(torch.autograd.grad(out, tensors, dout), wanted):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
    again = aten._flash_attention_forward(*tensors, *lengths, p, False, False)[2]
    assert not torch.equal(rng_state.view(torch.int64), again.view(torch.int64))
    torch.manual_seed(5)
    first = aten._flash_attention_forward(*tensors, *lengths, p, False, False)[0]
    torch.manual_seed(5)
    assert torch.equal(first, aten._flash_attention_forward(*tensors, *lengths, p, False, False)[0])


def test_cuda_functions_never_sync(monkeypatch):
    """On the way to the launches, under a dispatch mode that refuses `.item()` and device copies."""
    pytest.importorskip("triton", reason="needs triton")
    from fastattn.kernels import attention, attention_bwd, paged_attention
    from fastattn.ops import attention as ops
    from fastattn.ops import paged_attention as paged_ops
    from fastattn.testing.stub_driver import no_host_sync, stub_driver

    launched = []
    for module in (attention, attention_bwd, paged_attention):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **meta: launched.append(kernel.__name__))
    for module in (ops, paged_ops, torch_sdpa):
        monkeypatch.setattr(module, "runs_kernels", lambda tensor: True)
    for module in (ops, paged_ops):
        monkeypatch.setattr(module, "checks_values", lambda tensor: False)
    q, k, v = (t.detach().bfloat16() for t in qkv(kv_heads=2))
    (pq, pk, pv), lengths = packed(dtype=torch.bfloat16)
    pq, pk, pv = (t.detach() for t in (pq, pk, pv))
    used = torch.tensor([4, 6, 3, 11], dtype=torch.int32)
    with stub_driver(), no_host_sync():
        out, lse, *_, rng_state, offset, _ = torch_sdpa.sdpa_forward(q, k, v, 0.1, True)
        torch_sdpa.sdpa_backward(out, q, k, v, out, lse, None, None, 9, 9, 0.1, True, rng_state, offset)
        out, lse, rng_state, offset, _ = torch_sdpa.flash_forward(pq, pk, pv, *lengths, 0.0, True, False)
        torch_sdpa.flash_backward(out, pq, pk, pv, out, lse, *lengths, 0.0, True, rng_state, offset)
        torch_sdpa.flash_forward(pq, pk, pv, *lengths, 0.0, True, False, seqused_k=used)
    forward, backward, paged = (sum(part in name for name in launched) for part in ("attention_fwd", "attention_bwd", "paged"))
    assert (forward, paged) == (2, 1) and backward >= 4, launched


def one_rank_of_a_ring(rank, world, store):
    """What torch's context parallelism does on CUDA: its ring over the operators' functions, here on CPU tensors."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    shapes = [(2, heads, 16, 8) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(shape) for shape in shapes)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    for is_causal, balanced in ((False, False), (True, False), (True, True)):
        expected = naive(*inputs, is_causal=is_causal, enable_gqa=True)
        wanted = expected, *torch.autograd.grad(expected, inputs, dout)
        parts = torch.arange(16).chunk(2 * world)
        mine = torch.cat([parts[rank], parts[-1 - rank]] if balanced else parts[2 * rank : 2 * rank + 2])
        ring._cp_options.enable_load_balance = balanced
        local = dict(zip(("query", "key", "value"), (t[:, :, mine].contiguous() for t in (q, k, v))))
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = ring._templated_ring_attention(
            group, 2, torch_sdpa.sdpa_forward, **local, is_causal=is_causal
        )
        grads = ring._templated_ring_attention_backward(
            group, 2, torch_sdpa.sdpa_backward, dout[:, :, mine].contiguous(), "grad_out", **local, out=out, logsumexp=lse,
            is_causal=is_causal, cum_seq_q=cum_q, cum_seq_k=cum_k, max_q=max_q, max_k=max_k, dropout_p=0.0, philox_seed=seed,
            philox_offset=offset, scale=None,
        )  # fmt: skip
        for found, whole in zip((out, *grads), wanted):
            torch.testing.assert_close(found, whole[:, :, mine], rtol=1e-4, atol=1e-5)
    torch.distributed.destroy_process_group()


@pytest.mark.more
def test_torchs_ring_runs_over_the_functions_for_cuda(tmp_path):
    if importlib.util.find_spec("torch.distributed.tensor.experimental._context_parallel") is None:
        pytest.skip("this torch has its ring elsewhere")
    torch.multiprocessing.spawn(one_rank_of_a_ring, (2, tmp_path / "store"), nprocs=2)


# --------------------------------------------------------------------------------------------------------------------
# Layouts.


def laid_out(shape, order):
    """Memory in the order of `order`, the last dim last; "wide": with gaps in it."""
    if order == "wide":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]
    dims = {"first": (0, 1, 2, 3), "second": (0, 2, 1, 3)}[order]
    return torch.randn([shape[d] for d in dims]).permute(dims)


def same_layout(real, meta):
    for a, b in zip(real, meta):
        if torch.is_tensor(a) and a.numel():
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride())), (a.stride(), b.stride())


@pytest.mark.parametrize("order", ["first", "second", "wide"])
@pytest.mark.parametrize("operator", ["_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_flash_attention"])
def test_strides_are_those_of_torchs_meta_functions(operator, order):
    q, k, v = laid_out((2, 4, 6, 8), order), laid_out((2, 2, 6, 8) if operator[1] == "s" else (2, 4, 2, 8), order), None
    v = k.clone(memory_format=torch.preserve_format)
    meta = [t.to("meta") for t in (q, k, v)]
    names = {**torch_sdpa.IMPLEMENTATIONS["CUDA"], **torch_sdpa.IMPLEMENTATIONS["CPU"]}
    forward = operator if operator[1] == "s" else f"{operator}_forward"
    lengths, options = ((), (0.0, True)) if operator[1] == "s" else ((None, None, 4, 4), (0.0, True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        real, of_meta = (f(*t, *lengths, *options) for f, t in ((names[forward], (q, k, v)), (getattr(aten, forward), meta)))
    same_layout(real, of_meta)
    lengths = () if operator.endswith("cpu") else (None, None, 4, 4)
    if operator.endswith("cpu"):
        rest = (0.0, True)
    else:
        rest = (0.0, True, *real[-3:-1])
    saved = [torch.randn_like(real[0]), q, k, v, *real[:2]]
    grads = names[f"{operator}_backward"](*saved, *lengths, *rest)
    if operator.endswith("cpu"):
        wanted = [torch.empty_permuted(t.shape, (0, 2, 1, 3)) for t in (q, k, v)]
    else:
        wanted = [torch.empty_like(t) for t in (q, k, v)]
    same_layout(grads, wanted)


@pytest.mark.more
def test_compiled_by_inductor(calls):
    """Inductor asserts the strides of every result, and its code calls the operators: a graph follows each activation."""
    tensors, lengths = packed(kv_heads=4, lengths_q=(5, 3), lengths_k=(5, 3))
    x = torch.randn(2, 6, 3, 4, 8, requires_grad=True)  # (B, S, 3, H, D)

    def function(x, q, k, v):
        parts = (t.transpose(1, 2) for t in (x * 1.5).unbind(2))
        out = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        return out.sin().sum() + (varlen_attn(q * 2, k, v, *lengths) * 3).cos().sum()

    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    inputs = x, *tensors
    expected = torch.autograd.grad(function(*inputs), inputs)
    eager = list(calls)
    calls.clear()
    for grad, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
    assert sorted(calls) == sorted(eager) == ["attend"] * 2 + ["attend_backward"] * 2


# --------------------------------------------------------------------------------------------------------------------
# Registering, activating, restoring.


def test_registering_activates_nothing():
    torch_sdpa.register()
    torch_sdpa.register()
    assert "fastattn" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None


@pytest.fixture
def every_warning():
    """torch says once what it would say of every overridden operator."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_restoring_gives_torchs_own_back(every_warning):
    q, k, v = qkv(seqlen_q=40)
    dout = torch.randn(2, 4, 40, 8)

    def results():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return [out, *torch.autograd.grad(out, (q, k, v), dout)]

    (pq, pk, pv), lengths = packed(kv_heads=4)
    before = results()
    torch_sdpa.register()
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            activate_flash_attention_impl("fastattn")
            activate_flash_attention_impl("fastattn")  # which first restores
        assert current_flash_attention_impl() == "fastattn"
        for during, own in zip(results(), before):
            torch.testing.assert_close(during, own)
        varlen_attn(pq, pk, pv, *lengths)
        restore_flash_attention_impl()
        assert current_flash_attention_impl() is None
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(results(), before))
        with pytest.raises(NotImplementedError, match="_flash_attention_forward"):
            varlen_attn(pq, pk, pv, *lengths)


def test_a_forward_and_its_backward_may_be_on_either_side_of_an_activation():
    mask = torch.rand(9, 9) < 0.6
    mask[4] = False
    q, k, v = qkv()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, mask).sum(), (q, k, v))
    torch_sdpa.register()
    before = F.scaled_dot_product_attention(q, k, v, mask)
    activate_flash_attention_impl("fastattn")
    for grad, wanted in zip(torch.autograd.grad(before.sum(), (q, k, v)), expected):
        torch.testing.assert_close(grad, wanted)
    during = F.scaled_dot_product_attention(q, k, v, mask)
    restore_flash_attention_impl()
    for grad, wanted in zip(torch.autograd.grad(during.sum(), (q, k, v)), expected):
        torch.testing.assert_close(grad, wanted)


def test_autocast_is_above_the_operators(calls):
    q, k, v = qkv()
    (pq, pk, pv), lengths = packed(kv_heads=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert varlen_attn(pq, pk, pv, *lengths).dtype == torch.float32
    assert calls == ["attend"] * 2


# --------------------------------------------------------------------------------------------------------------------
# Refusals.

DENSE = (None, None, 9, 9)
CPU_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


def refusals():
    q, k, v = (t.detach() for t in qkv())
    b, s, h = (t.transpose(1, 2) for t in (q, k, v))
    (pq, pk, pv), (cu_q, cu_k, max_q, max_k) = packed()
    pq, pk, pv = pq.detach(), pk.detach(), pv.detach()
    used, flash = torch.tensor([4, 6, 3, 11], dtype=torch.int32), torch_sdpa.flash_forward
    varlen = (cu_q, cu_k, max_q, max_k, 0.0, False, False)
    return {
        "debug mask": (lambda: torch_sdpa.sdpa_forward(q, k, v, return_debug_mask=True), NotImplementedError, "return_debug_mask=True is not supported"),
        "debug mask, flash": (lambda: flash(b, s, h, *DENSE, 0.0, False, True), NotImplementedError, "aten::_flash_attention_forward on fastattn: return_debug_mask"),
        "value dim": (lambda: torch_sdpa.sdpa_forward(q, k, v[..., :4]), NotImplementedError, "a value with head_dim 4, where query has 8, is not supported"),
        "cpu dropout": (lambda: torch_sdpa.cpu_sdpa_forward(q, k, v, 0.1), NotImplementedError, f"aten::{CPU_FORWARD} on fastattn: dropout_p is not supported"),
        "dropout over a cache": (lambda: flash(pq, pk, pv, cu_q, cu_k, max_q, max_k, 0.1, False, False, seqused_k=used), NotImplementedError, "dropout_p with seqused_k is not supported"),
        "gradient over a cache": (lambda: flash(pq.requires_grad_(), pk, pv, *varlen, seqused_k=used), NotImplementedError, "seqused_k with a gradient is not supported"),
        "pages without lengths": (lambda: flash(pq.detach(), pk[:, None], pv[:, None], cu_q, None, max_q, max_k, 0.0, False, False, block_table=torch.zeros(4, 3, dtype=torch.int32)), ValueError, "seqused_k or cum_seq_k must be given with block_table, got neither"),
        "too many used": (lambda: flash(pq.detach(), pk, pv, *varlen, seqused_k=used + 1), ValueError, r"seqused_k must not exceed the lengths \[4, 6, 3, 11\]"),
        "one cum_seq": (lambda: flash(pq.detach(), pk, pv, cu_q, None, max_q, max_k, 0.0, False, False), ValueError, "cu_seqlens_q and cu_seqlens_k must be given together"),
        "heads": (lambda: flash(b, s[:, :, :3], h[:, :, :3], *DENSE, 0.0, False, False), ValueError, "_flash_attention_forward: k must have a head count that divides q's 4, got 3"),
        "dtype": (lambda: torch_sdpa.sdpa_forward(q.double(), k.double(), v.double()), TypeError, "q must be float16, bfloat16 or float32"),
        "saved": (lambda: torch_sdpa.cpu_sdpa_backward(q[:, :, 1:], q, k, v, q, q[..., 0], 0.0, False), ValueError, r"grad_out must have shape \(2, 9, 4, 8\), got \(2, 8, 4, 8\)"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_refusals_name_what_they_refuse(case):
    call, error, match = refusals()[case]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.interpret
def test_float64_cannot_be_interpreted(active):
    assert INTERPRETING
    with pytest.raises(NotImplementedError, match="float64 in Triton's interpreter is not supported"):
        F.scaled_dot_product_attention(*qkv(dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_backward_takes_a_block_of_the_keys(dtype):
    """As a ring has it: each block's gradients by the whole's output and log-sum-exp, and they add up."""
    q, k, v, dout = (torch.randn(2, 3, 20, 16, dtype=dtype) for _ in range(4))
    out, lse = torch_sdpa.cpu_sdpa_forward(q, k, v, 0.0, False)
    backward = torch_sdpa.cpu_sdpa_backward
    whole = backward(dout, q, k, v, out, lse, 0.0, False)
    parts = [backward(dout, q, k[:, :, part], v[:, :, part], out, lse, 0.0, False) for part in (slice(0, 12), slice(12, 20))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], atol=6e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2)
    for name in (1, 2):
        torch.testing.assert_close(torch.cat([part[name] for part in parts], 2), whole[name], atol=3e-2 if dtype != torch.float32 else 1e-5, rtol=2e-2)
