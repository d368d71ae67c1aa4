"""The CUDA C++ kernels as operators, on CPU tensors: bindings, limits, and the rules that choose them.

The kernels' own tests are in test_cuda_on_cpu.py. Here an op runs from its public function to the kernel, in the process whose CPU tensors
run kernels; and every test of an op that is for kernels runs once more on these.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cuda_on_cpu import BF16, F16, F32
from op_contract import check_op

import fastattn
from fastattn import extensions
from fastattn.extensions import cuda_operators

pytestmark = pytest.mark.interpret


def ran(f) -> list[str]:
    """The names of the CUDA operators that f calls."""
    with torch.autograd.profiler.profile() as profiler:
        f()
    return [event.name.removeprefix("fastattn::") for event in profiler.function_events if event.name.endswith("_cuda")]


# --------------------------------------------------------------------------------------------------------------------
# The choice.

X, WEIGHT = torch.randn(3, 40), torch.randn(40)
Q, CACHE, TABLE, LENGTHS = torch.randn(2, 1, 4, 16), torch.randn(9, 4, 2, 16), torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([9, 4], dtype=torch.int32)
NEW = torch.randn(2, 3, 2, 16)
CALLS = {
    "norm": (lambda backend: fastattn.rms_norm(X, 40, WEIGHT, backend=backend), "norm_fwd_cuda"),
    "softmax": (lambda backend: fastattn.softmax(X, -1, backend=backend), "softmax_fwd_cuda"),
    "paged_attention": (lambda backend: fastattn.paged_attention(Q, CACHE, CACHE, TABLE, LENGTHS, backend=backend), "paged_attention_cuda"),
    "sampling": (lambda backend: fastattn.sample(X, backend=backend), "sample_cuda"),
    "moe_routing": (lambda backend: fastattn.moe_dispatch(torch.tensor([[3, 1], [0, 3]]), 4, backend=backend), "moe_dispatch_cuda"),
    "routing and its plan": (lambda backend: fastattn.moe_route(X, 2, return_plan=True, backend=backend), "moe_route_dispatch_cuda"),
    "append_paged_kv": (lambda backend: fastattn.append_paged_kv(NEW, NEW, CACHE.clone(), CACHE.clone(), TABLE, LENGTHS, backend=backend), "append_paged_kv_cuda"),
}  # fmt: skip
BEYOND = {
    "norm dropout": (lambda backend: fastattn.add_rms_norm(X, X, 40, dropout_p=0.5, backend=backend), "dropout"),
    "norm dtype": (lambda backend: fastattn.add_rms_norm(X, X.half(), 40, backend=backend), "a residual or a result of another dtype than x's"),
    "norm weights": (lambda backend: fastattn.layer_norm(X, 40, WEIGHT, WEIGHT.half(), backend=backend), "parameters that are neither"),
    "norm strides": (lambda backend: fastattn.rms_norm(X.view(3, 2, 20)[:, :, :19], 19, backend=backend), None),
    "softmax dim": (lambda backend: fastattn.softmax(X, 0, backend=backend), "another dim than the last"),
    "softmax gaps": (lambda backend: fastattn.softmax(torch.randn(3, 4, 20)[:, :3], -1, backend=backend), "rows at more than one stride"),
    "paged int8": (lambda backend: fastattn.paged_attention(Q, *[(CACHE * 20).to(torch.int8)] * 2, TABLE, LENGTHS, backend=backend), "a quantised cache"),
    "paged D_v": (lambda backend: fastattn.paged_attention(Q, CACHE, CACHE[..., :8].contiguous(), TABLE, LENGTHS, backend=backend), "a D_v that is not D"),
    "paged rows": (lambda backend: fastattn.paged_attention(Q, *[torch.randn(9, 4, 2, 17)[..., 1:]] * 2, TABLE, LENGTHS, backend=backend), "rows of a cache that do not begin at multiples of 16 bytes"),
    "append tables": (lambda backend: fastattn.append_paged_kv(NEW, NEW, CACHE.clone(), CACHE.clone(), TABLE, LENGTHS, cos=torch.ones(30, 8).double(), sin=torch.ones(30, 8).double(), backend=backend), "tables in float64"),
    "norm gaps": (lambda backend: fastattn.rms_norm(torch.randn(3, 4, 20)[:, :3], 20, backend=backend), "rows at more than one stride"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_rule_and_the_caller_choose(name, cuda, monkeypatch):
    call, operator = CALLS[name]
    assert ran(lambda: call(None)) == [operator] and ran(lambda: call("cuda")) == [operator] and ran(lambda: call("triton")) == []
    with monkeypatch.context() as none:
        none.setattr(cuda_operators, "_found", set())
        assert ran(lambda: call(None)) == []
        with pytest.raises(NotImplementedError, match="backend='cuda' does not do anything: (this torch has no CUDA|not built)"):
            call("cuda")


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_beyond_it_is_tritons_or_raises(name, cuda):
    call, said = BEYOND[name]
    assert bool(ran(lambda: call(None))) == (said is None)
    if said is not None:
        with pytest.raises(NotImplementedError, match=f"backend='cuda' does not do {said}"):
            call("cuda")


def test_a_backend_that_there_is_not(cuda):
    for name, (call, _) in CALLS.items():
        with pytest.raises(ValueError, match="backend must be one of 'triton', 'cuda', got 'cudnn'"):
            call("cudnn")
        with pytest.raises(TypeError, match="backend must be a str, got int"):
            call(1)
        assert name


def test_what_is_large_is_tritons(cuda):
    x = torch.zeros(1, 1 << 18)
    for op in (lambda x: fastattn.rms_norm(x, x.shape[-1]), lambda x: fastattn.softmax(x, -1)):
        assert len(ran(lambda: op(x[:, : 1 << 17]))) == 1 and ran(lambda: op(x)) == []  # noqa: B023
    wide, one = torch.randn(2, 9, 4, 16), torch.tensor([0, 1, 2], dtype=torch.int32)
    assert ran(lambda: fastattn.paged_attention(wide[:, :8], CACHE, CACHE, TABLE, LENGTHS)) and not ran(lambda: fastattn.paged_attention(wide, CACHE, CACHE, TABLE, LENGTHS))
    # A fixed split's bits do not depend on the company, and which kernel ran would.
    assert not ran(lambda: fastattn.paged_attention(Q[:, 0], CACHE, CACHE, TABLE, LENGTHS, cu_seqlens_q=one, max_seqlen_q=1, num_splits=2))
    ids = torch.zeros(129, 2, dtype=torch.int64)
    assert ran(lambda: fastattn.moe_dispatch(ids[:128], 4)) and not ran(lambda: fastattn.moe_dispatch(ids, 4))
    assert ran(lambda: fastattn.sample(torch.randn(16, 9))) and not ran(lambda: fastattn.sample(torch.randn(17, 9)))
    many = torch.randn(1, 65, 2, 16)
    assert not ran(lambda: fastattn.append_paged_kv(many, many, CACHE.clone(), CACHE.clone(), TABLE[:1], LENGTHS[:1]))


def test_odd_shapes_are_no_reason_to_fail(cuda):
    """By the rule, which has to know what the bindings refuse."""
    for op in (lambda x: fastattn.rms_norm(x, 3), lambda x: fastattn.softmax(x, -1)):
        x = torch.randn(*[1] * 17, 2, 3)
        torch.testing.assert_close(op(x), op(x.view(2, 3)).view(x.shape))
    column = torch.randn(1, 4).t()
    assert column.stride() == (1, 4) and not fastattn.sample(column).any() and not fastattn.moe_route(column, 1, return_plan=True)[1].any()
    every_other = torch.randn(0, 20)[:, ::2]
    assert every_other.stride() == (20, 2) and fastattn.sample(every_other).shape == (0,)
    assert fastattn.moe_route(every_other, 1, return_plan=True)[1].shape == (0, 1)
    assert fastattn.paged_attention(torch.randn(2, 0, 4, 32)[..., ::2], CACHE, CACHE, TABLE, LENGTHS).shape == (2, 0, 4, 16)
    nothing = torch.randn(2, 0, 2, 32)[..., ::2]
    fastattn.append_paged_kv(nothing, nothing, CACHE.clone(), CACHE.clone(), TABLE, LENGTHS)
    for batch, new in ((0, 1), (2, 0)):
        q, table = torch.randn(batch, new, 4, 16), TABLE[:batch]
        for splits in (0, 4):
            assert fastattn.paged_attention(q, CACHE, CACHE, table, LENGTHS[:batch], num_splits=splits).shape == q.shape
    no_queries = dict(cu_seqlens_q=torch.zeros(3, dtype=torch.int32), max_seqlen_q=1)
    assert fastattn.paged_attention(Q[:0, 0], CACHE, CACHE, TABLE, LENGTHS, **no_queries, backend="cuda", num_splits=2).shape == (0, 4, 16)


def test_interpreted_kernels_have_no_use_for_a_gpus(cuda, monkeypatch):
    """Where operators are CUDA tensors' alone, as on a GPU machine."""
    monkeypatch.setattr(extensions, "_is_implemented", lambda name, key: key == "CUDA")
    for call, _ in CALLS.values():
        assert ran(lambda: call(None)) == []  # noqa: B023


# --------------------------------------------------------------------------------------------------------------------
# Norms.


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64), (1, 1, 1, 2100), (40,), (0, 8), (3, 0)])
def test_norms(shape, dtype, cuda):
    tensors = dict(x=torch.randn(shape), residual=torch.randn(shape), weight=torch.randn(shape[-1:]))
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    if tensors["x"].numel() == 0:
        assert fastattn.add_rms_norm(**tensors, normalized_shape=shape[-1], backend="cuda")[0].shape == shape
        return
    for options in ({}, dict(weight_offset=1.0), dict(cast_before_weight=True)):
        check_op(
            f"add_rms_norm {shape} {options}",
            lambda backend="cuda", **t: fastattn.add_rms_norm(**t, normalized_shape=shape[-1], backend=backend, **options),  # noqa: B023
            lambda **t: fastattn.reference.add_rms_norm(**t, normalized_shape=shape[-1], **options),  # noqa: B023
            tensors,
        )
    tensors["bias"] = torch.randn(shape[-1:]).to(dtype)
    check_op(
        f"add_layer_norm {shape}",
        lambda **t: fastattn.add_layer_norm(**t, normalized_shape=shape[-1], backend="cuda"),
        lambda **t: fastattn.reference.add_layer_norm(**t, normalized_shape=shape[-1]),
        tensors,
    )


# --------------------------------------------------------------------------------------------------------------------
# Routing.


@pytest.mark.parametrize("options", [{}, dict(score="sigmoid", num_groups=4, top_k_groups=2, renormalize=True), dict(order="topk_then_score")])
def test_routing_and_its_plan(options, cuda):
    """The same choice, plan and gradient as by Triton."""
    logits, dweights = torch.randn(9, 16), torch.randn(9, 3)
    results = []
    for backend in ("cuda", "triton"):
        leaf = logits.clone().requires_grad_()
        weights, indices, plan = fastattn.moe_route(leaf, 3, **options, return_plan=True, backend=backend)
        weights.backward(dweights)
        results.append((indices, *plan, weights, leaf.grad))
    for n, (mine, theirs) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(mine, theirs, **(dict(rtol=1e-6, atol=1e-6) if n > 3 else dict(rtol=0, atol=0)))
    assert all(map(torch.equal, plan, fastattn.moe_dispatch(indices, 16)))


@pytest.mark.parametrize("top_k", [1, 50, 5000])
def test_sampling_draws_what_triton_draws(top_k, cuda):
    logits = torch.randn(6, 6000) * 3
    logits[0, 7:] = -torch.inf
    for seed in range(4):
        ids = []
        for backend in ("cuda", "triton"):
            torch.manual_seed(seed)
            ids.append(fastattn.sample(logits, temperature=0.9, top_k=top_k, top_p=0.95, backend=backend))
        assert torch.equal(*ids)
    seeds = torch.arange(6)
    assert torch.equal(*(fastattn.sample(logits, seeds=seeds, top_k=top_k, backend=backend) for backend in ("cuda", "triton")))


# --------------------------------------------------------------------------------------------------------------------
# The ops' own tests.


@pytest.mark.more
@pytest.mark.parametrize("op", [name for name in CALLS if " " not in name])
def test_an_ops_tests_pass_on_them(op, cuda_library):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "(interpret or both) and not more", f"tests/test_{op}.py"],
        env=os.environ | {"FASTATTN_CUDA_EXTENSION": str(cuda_library)}, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
