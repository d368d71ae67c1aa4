"""The attention kernels on a real GPU: the same cases as in the interpreter, at GPU sizes, and what only a GPU can show."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from attention_cases import BF16, F16, F32, FEATURES, VALUES, Case, check

import fastattn

pytestmark = pytest.mark.gpu

LONG = [
    *(
        Case(2, S_q, S_k, 8, H_kv, D, D, dtype, options=options)
        for D in (64, 128, 256)
        for dtype in (F16, BF16)
        for S_q, S_k, H_kv, options in (
            (1024, 1024, 8, {}),
            (1000, 1337, 2, dict(causal=True)),
            (777, 2048, 1, dict(window=(300, 40))),
        )
    ),
    Case(1, 512, 700, 4, 2, 512, 512, BF16, options=dict(causal=True)),
    Case(1, 500, 500, 4, 2, 96, 96, BF16, options=dict(causal=True)),
    Case(1, 500, 500, 4, 2, 72, 72, BF16, options=dict(causal=True)),
    Case(1, 500, 500, 4, 2, 65, 33, F16, options=dict(causal=True)),  # no descriptor fits: the pointer path
    Case(1, 500, 500, 4, 2, 128, 128, F32, options=dict(causal=True)),
]


@pytest.mark.parametrize("case", VALUES + LONG, ids=str)
def test_values(case):
    check(case, "cuda")


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case, dtype):
    check(dataclasses.replace(case, dtype=dtype), "cuda")


def _qkv(S=512, H=8, H_kv=2, D=128, dtype=BF16, **kwargs):
    return tuple(torch.randn(2, S, h, D, device="cuda", dtype=dtype, **kwargs) for h in (H, H_kv, H_kv))


def test_packed_is_a_loop_of_dense():
    lengths = (500, 0, 1, 129, 1024)
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, 128, device="cuda", dtype=BF16) for h in (8, 2, 2))
    cu = torch.tensor((0, *lengths), device="cuda").cumsum(0).int()
    packed = fastattn.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=1024, max_seqlen_k=1024)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        dense = fastattn.attention(*(t[None, start:end] for t in (q, k, v)), causal=True)[0]
        assert torch.equal(packed[start:end], dense)


def test_gradients_are_equal_bit_for_bit_from_run_to_run():
    q, k, v = _qkv(requires_grad=True)
    dout = torch.randn_like(q)
    first = torch.autograd.grad(fastattn.attention(q, k, v, causal=True), (q, k, v), dout)
    for _ in range(20):
        again = torch.autograd.grad(fastattn.attention(q, k, v, causal=True), (q, k, v), dout)
        assert all(map(torch.equal, first, again))


def test_captured_in_a_cuda_graph_with_fresh_dropout_at_each_replay():
    q, k, v = _qkv()
    fastattn.attention(q, k, v, causal=True, dropout_p=0.5)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain = fastattn.attention(q, k, v, causal=True)
        dropped = fastattn.attention(q, k, v, causal=True, dropout_p=0.5)
    graph.replay()
    first = dropped.clone()
    graph.replay()
    assert torch.equal(plain, fastattn.attention(q, k, v, causal=True))
    assert not torch.equal(first, dropped)


def test_a_thread_of_its_own():
    """Triton's scratch allocator is a context variable that a new thread does not inherit."""
    q, k, v = _qkv(requires_grad=True)
    failures = []

    def work():
        try:
            fastattn.attention(q, k, v, causal=True).sum().backward()
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures and q.grad.isfinite().all()


def test_no_host_sync():
    q, k, v = _qkv(requires_grad=True)
    fastattn.attention(q, k, v, causal=True, dropout_p=0.1).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastattn.attention(q, k, v, causal=True, dropout_p=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_in_one_graph():
    q, k, v = _qkv(requires_grad=True)
    compiled = torch.compile(lambda q, k, v: fastattn.attention(q, k, v, causal=True) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), fastattn.attention(q, k, v, causal=True) * 2)
    compiled(q, k, v).sum().backward()
    assert q.grad.isfinite().all()


def test_offsets_past_2_31_elements():
    stride = 2**30 + 8
    k = torch.empty(3 * stride + 16, dtype=F16, device="cuda").as_strided((1, 4, 1, 16), (4 * stride, stride, 16, 1))
    k.copy_(torch.randn(1, 4, 1, 16))
    q = torch.randn(1, 4, 1, 16, dtype=F16, device="cuda")
    torch.testing.assert_close(fastattn.attention(q, k, k), fastattn.attention(q, k.contiguous(), k.contiguous()))


def test_scaled_dot_product_attention_agrees_with_torch():
    q, k, v = (t.transpose(1, 2) for t in _qkv(H_kv=8))
    got = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=2e-2, atol=2e-2)
