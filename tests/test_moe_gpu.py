"""Mixtures of experts on a real GPU: values at GPU sizes, and what only a GPU can show (graphs, waits, the same bits, permuted tokens).

The cases run on CPU tensors at small sizes too, so that what is written here is known to be sound before a GPU sees it.
"""

from __future__ import annotations

import pytest
import torch
from op_contract import check_op, run, upstream

import fastattn
from fastattn import reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MODELS = {  # hidden, inner, experts, top_k, options
    "mixtral": (4096, 1024, 8, 2, {}),
    "qwen3": (2048, 768, 128, 8, {}),
    "gpt-oss": (2880, 2880, 32, 4, dict(activation="clamped_swiglu", layout="interleaved", transposed=True, biases=True)),
    "odd": (200, 72, 9, 3, dict(activation="geglu", biases=True)),
    "unaligned": (131, 77, 5, 2, {}),
}
NAMED = pytest.mark.parametrize("model", MODELS)


def case(model, device, dtype, num_tokens, shrink=1):
    """(op, oracle, tensors): tokens through a model's experts, some ids of nobody."""
    hidden, inner, num_experts, top_k, options = MODELS[model]
    hidden, inner, num_experts = (max(2, size // shrink) for size in (hidden, inner, num_experts))
    top_k, options = min(top_k, num_experts), dict(options)

    def randn(*size, fan=1):
        return (torch.randn(size) * fan**-0.5).to(device, dtype)

    tensors = {
        "x": randn(num_tokens, hidden),
        "gate_up_proj": randn(num_experts, 2 * inner, hidden, fan=hidden),
        "down_proj": randn(num_experts, hidden, inner, fan=inner),
    }
    if options.get("transposed"):
        tensors |= {name: w.transpose(1, 2).contiguous() for name, w in tensors.items() if w.dim() == 3}
    if options.pop("biases", False):
        tensors |= {"gate_up_bias": randn(num_experts, 2 * inner), "down_bias": randn(num_experts, hidden)}
    tensors["top_k_weights"] = torch.rand(num_tokens, top_k).to(device)
    indices = torch.randint(num_experts + 1, (num_tokens, top_k)).to(device)
    return *((lambda f=f, **t: f(t.pop("x"), indices, **t, **options) for f in (fastattn.moe, reference.moe))), tensors


@NAMED
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
def test_the_cases_are_sound(model, dtype):
    op, oracle, tensors = case(model, "cpu", dtype, 60, shrink=32)
    check_op(model, op, oracle, tensors)


@pytest.mark.gpu
@NAMED
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 500, 3000])
def test_values(model, dtype, num_tokens):
    op, oracle, tensors = case(model, "cuda", dtype, num_tokens)
    check_op(model, op, oracle, tensors)


@pytest.mark.gpu
@NAMED
def test_the_same_bits_every_time_and_for_permuted_tokens(model):
    hidden, inner, num_experts, top_k, _ = MODELS[model]
    op, _, tensors = case(model, "cuda", BF16, 3000)
    douts = upstream(op, tensors)
    first, second = run(op, tensors, douts), run(op, tensors, douts)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    x, gate_up, down = (torch.randn(size, device="cuda", dtype=BF16) for size in ((3000, 128), (8, 192, 128), (8, 128, 96)))
    weights, indices = fastattn.moe_route(torch.randn(3000, 8, device="cuda"), 2)
    order = torch.randperm(3000, device="cuda")
    out, permuted = fastattn.moe(x, indices, weights, gate_up, down), fastattn.moe(x[order], indices[order], weights[order], gate_up, down)
    assert torch.equal(out[order], permuted)


@pytest.mark.gpu
@NAMED
@pytest.mark.parametrize("num_tokens", [4, 1000])
def test_nothing_waits_for_the_device(model, num_tokens):
    op, _, tensors = case(model, "cuda", BF16, num_tokens)
    douts = upstream(op, tensors)
    run(op, tensors, douts)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, tensors, douts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@NAMED
@pytest.mark.parametrize("num_tokens", [4, 1000])
def test_captured_in_a_graph_that_other_routes_replay(model, num_tokens):
    hidden, inner, num_experts, top_k, _ = MODELS[model]
    x, gate_up, down = (
        torch.randn(size, device="cuda", dtype=BF16) * size[-1] ** -0.5
        for size in ((num_tokens, hidden), (num_experts, 2 * inner, hidden), (num_experts, hidden, inner))
    )
    logits = torch.randn(num_tokens, num_experts, device="cuda")

    def layer():
        weights, indices = fastattn.moe_route(logits, top_k, renormalize=True)
        return fastattn.moe(x, indices, weights, gate_up, down)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer()
        for _ in range(3):
            logits.normal_()
            x.normal_()
            graph.replay()
            assert torch.equal(out, layer())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gathered", [False, True])
def test_grouped_mm(dtype, gathered):
    num_rows, num_groups, num_cols, size = 2000, 16, 520, 1544
    x, w = torch.randn(num_rows, size), torch.randn(num_groups, num_cols, size) * size**-0.5
    offsets = torch.randint(num_rows, (num_groups,)).sort().values.int().cuda()
    where = {name: torch.randperm(num_rows).cuda() for name in ("gather", "scatter")} if gathered else {}
    tensors = {"x": x.to("cuda", dtype), "w": w.to("cuda", dtype), "bias": w[:, :, 0].to("cuda", dtype)}
    functions = fastattn.grouped_mm, reference.grouped_mm
    check_op("grouped_mm", *(lambda x, w, bias, f=f: f(x, w, offsets, bias=bias, **where) for f in functions), tensors)


@pytest.mark.gpu
def test_matrices_beyond_two_to_the_31_elements():
    num_groups, num_cols, size = 70, 8192, 4096
    x, w = torch.randn(40, size, device="cuda", dtype=BF16), torch.empty(num_groups, num_cols, size, device="cuda", dtype=BF16)
    w[-1].normal_(std=size**-0.5)
    offsets = torch.zeros(num_groups, dtype=torch.int32, device="cuda")
    offsets[-1] = 40
    torch.testing.assert_close(fastattn.grouped_mm(x, w, offsets), x @ w[-1].T, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_differentiated_forward_keeps_no_expert_s_output():
    """Beside inputs and outputs: the pre-activation; while it runs, the activation and the rows that are summed."""
    num_tokens, hidden, inner, num_experts, top_k = 8192, 2048, 256, 32, 4
    x, gate_up, down = (
        torch.randn(size, device="cuda", dtype=BF16, requires_grad=True)
        for size in ((num_tokens, hidden), (num_experts, 2 * inner, hidden), (num_experts, hidden, inner))
    )
    weights, indices = fastattn.moe_route(torch.randn(num_tokens, num_experts, device="cuda"), top_k)
    fastattn.moe(x, indices, weights, gate_up, down)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fastattn.moe(x, indices, weights, gate_up, down)
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    slots = num_tokens * top_k
    plan = 16 * slots + 4 * num_experts
    assert kept <= 2 * (num_tokens * hidden + slots * 2 * inner) + plan + (8 << 20)
    assert peak <= kept + 2 * slots * (inner + hidden) + (8 << 20)
    assert out.shape == x.shape
