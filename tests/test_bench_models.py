"""The benchmarks of a layer and of whole models: what they count, and that both implementations are the same model."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastattn.benchmarks import bench_layer, bench_model, bench_model_decode, llama, suite

CPU = torch.device("cpu")


def counted(forward, inputs, backward):
    """FLOPs of matrix products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        outs = forward(*inputs)
        if backward:
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.autograd.grad(outs, [t for t in inputs if t.requires_grad], [torch.ones_like(out) for out in outs])
    return counter.get_total_flops()


@pytest.mark.parametrize("bench", [bench_layer, bench_model], ids=["layer", "model"])
def test_flops_are_torchs(bench):
    """But for attention: naive code computes all scores, not the half that a causal mask leaves, and no product a second time."""
    (shape,) = bench.PRESETS["cpu", "tiny"]
    inputs, _ = bench.draw(shape, torch.float32, CPU)
    product = 2 * shape.num_layers * shape.batch * shape.num_heads * shape.seqlen**2 * shape.head_dim  # of all scores, Q·K or P·V
    naive = bench.plain(llama.naive)(shape)
    assert counted(naive, inputs, False) == bench.flops(shape, "fwd") + (2 - 1) * product
    assert counted(naive, inputs, True) == bench.flops(shape, "fwd+bwd") + (2 + 4 - 3.5) * product
    for which in ("fwd", "bwd", "fwd+bwd"):
        assert bench.traffic(shape, which, 2) == 2 * bench.traffic(shape, which, 1) > 0
    assert bench.flops(shape, "fwd+bwd") == bench.flops(shape, "fwd") + bench.flops(shape, "bwd")


def test_a_decode_step_reads_its_weights_and_its_cache():
    (shape,) = bench_model_decode.PRESETS["cpu", "tiny"]
    inputs, upstream = bench_model_decode.draw(shape, torch.float16, CPU)
    _, cached, *weights = inputs
    matrices = sum(t.nbytes for t in weights if t.dim() == 2)
    new = cached.nbytes // shape.context
    assert bench_model_decode.traffic(shape, "fwd", 2) == matrices + cached.nbytes + new and not upstream
    assert counted(bench_model_decode.plain(llama.naive)(shape), inputs, False) == bench_model_decode.flops(shape, "fwd")


def test_a_decode_step_is_the_same_each_time():
    """The token of a call is forgotten before the next, in the paged cache and in the contiguous one."""
    (shape,) = bench_model_decode.PRESETS["cpu", "tiny"]
    inputs, _ = bench_model_decode.draw(shape, torch.float32, CPU)
    results = []
    for build in bench_model_decode.peers(CPU)[0].values():
        forward = build(shape)
        results += [forward(*inputs) for _ in range(3)]
        other = [inputs[0].flip(0), *inputs[1:]]
        assert not torch.allclose(forward(*other), results[-1], atol=1e-2)
        results.append(forward(*inputs))
    for result in results:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


def test_names_of_weights_are_the_modules():
    model, layer = llama.Model(llama.TINY), llama.Layer(llama.TINY)
    names = [name for name, _ in model.named_parameters()]
    assert names[0] == "embedding.weight" and names[-1] == "norm.weight"
    assert [f"layers.0.{name}" for name in bench_layer.NAMES] == names[1 : 1 + len(bench_layer.NAMES)]
    assert sum(p.numel() for p in layer.parameters() if p.dim() == 2) == llama.matrix_entries(llama.TINY)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("op", ["layer", "model", "model_decode"])
def test_shapes_are_named_after_their_model(op):
    found = suite.suite_of(op)
    for (device, _), shapes in found.presets.items():
        assert shapes and device in ("cpu", "cuda")
        for shape in shapes:
            assert shape.id("bf16").startswith(shape.model) and dataclasses.asdict(shape)["model"] == shape.model
            assert shape.num_heads % shape.num_kv_heads == 0
