"""The row ops on a real GPU: values at GPU sizes, what only a GPU can show (graphs, syncs, autocast, threads), and determinism.

The cases run on CPU tensors at small sizes too, so that what is written here is known to be sound before a GPU sees it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from op_contract import check_op, run, upstream
from torch import Tensor

import fastattn
from fastattn import reference

IGNORED = 3  # every third target


def rows(device, dtype, num_rows, num_cols):
    def randn(*size):
        return torch.randn(size).to(device, dtype)

    return randn, randn(num_rows, num_cols), randn(num_cols), randn(num_cols)


def case(name: str, device: str, dtype: torch.dtype, num_rows: int, num_cols: int) -> tuple[Callable, Callable, dict[str, Tensor]]:
    """(op, oracle, tensors) of one function at one size."""
    randn, x, weight, bias = rows(device, dtype, num_rows, num_cols)
    residual = randn(num_rows, num_cols)
    if name == "softmax":
        return fastattn.softmax, reference.softmax, {"x": x}
    if name == "softmax dim 0":
        return lambda x: fastattn.softmax(x, 0), lambda x: reference.softmax(x, 0), {"x": x}
    if name in ("layer_norm", "rms_norm"):
        ours, oracle = getattr(fastattn, name), getattr(reference, name)
        tensors = {"x": x, "weight": weight} | ({"bias": bias} if name == "layer_norm" else {})
        return (*(lambda x, f=f, **kw: f(x, num_cols, **kw) for f in (ours, oracle)), tensors)
    if name in ("add_layer_norm", "add_rms_norm"):
        ours, oracle = getattr(fastattn, name), getattr(reference, name)
        tensors = {"x": x, "residual": residual, "weight": weight} | ({"bias": bias} if name == "add_layer_norm" else {})
        return (*(lambda x, residual, f=f, **kw: f(x, residual, num_cols, **kw) for f in (ours, oracle)), tensors)
    if name == "swiglu packed":
        return fastattn.swiglu, reference.swiglu, {"gate": randn(num_rows, 2 * num_cols)}
    if name in ("swiglu", "geglu"):
        return getattr(fastattn, name), getattr(reference, name), {"gate": x, "up": residual}
    if name == "rotary":
        q, k = randn(2, num_rows, 8, 128), randn(2, num_rows, 2, 128)
        angles = torch.rand(num_rows, 64, device=device) * 6

        def rotate(function):
            return lambda q, k: function(q, k, angles.cos().to(torch.promote_types(q.dtype, torch.float32)), angles.sin().to(torch.promote_types(q.dtype, torch.float32)))

        return rotate(fastattn.apply_rotary), rotate(reference.apply_rotary), {"q": q, "k": k}
    target = torch.randint(num_cols, (num_rows,)).to(device)
    target[::IGNORED] = -100
    if name == "cross_entropy":
        options = dict(label_smoothing=0.1, z_loss=1e-3)
        return (*(lambda input, f=f: f(input, target, **options) for f in (fastattn.cross_entropy, reference.cross_entropy)), {"input": x})
    assert name == "linear_cross_entropy"
    hidden, head = randn(num_rows, 64), randn(num_cols, 64) / 8
    functions = fastattn.linear_cross_entropy, reference.linear_cross_entropy
    return (*(lambda input, linear_weight, f=f: f(input, linear_weight, target) for f in functions), {"input": hidden, "linear_weight": head})


NAMES = [
    "softmax", "softmax dim 0", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "swiglu", "swiglu packed", "geglu", "rotary",
    "cross_entropy", "linear_cross_entropy",
]  # fmt: skip
NAMED = pytest.mark.parametrize("name", NAMES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
LENGTHS = [64, 100, 256, 513, 1000, 2048, 4096, 8192, 16384, 32768, 50257, 65536, 131072]


@NAMED
@DTYPES
def test_the_cases_are_sound(name, dtype):
    op, oracle, tensors = case(name, "cpu", dtype, 6, 40)
    check_op(name, op, oracle, tensors)


@pytest.mark.gpu
@NAMED
@DTYPES
@pytest.mark.parametrize("num_cols", LENGTHS)
def test_values(name, dtype, num_cols):
    op, oracle, tensors = case(name, "cuda", dtype, max(3, min(513, (1 << 22) // num_cols)), num_cols)
    check_op(name, op, oracle, tensors)


@pytest.mark.gpu
@NAMED
def test_the_same_bits_every_time(name):
    op, _, tensors = case(name, "cuda", torch.bfloat16, 5000, 4096 if name != "linear_cross_entropy" else 1000)
    douts = upstream(op, tensors)
    first, second = run(op, tensors, douts), run(op, tensors, douts)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.gpu
@NAMED
def test_nothing_waits_for_the_device(name):
    op, _, tensors = case(name, "cuda", torch.bfloat16, 64, 1000)
    douts = upstream(op, tensors)
    run(op, tensors, douts)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, tensors, douts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@NAMED
def test_captured_in_a_graph(name):
    op, _, tensors = case(name, "cuda", torch.bfloat16, 64, 1000)
    with torch.no_grad():
        expected = op(**tensors)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            op(**tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = op(**tensors)
        graph.replay()
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, expected)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_sample_draws_anew_at_every_replay_of_a_graph():
    logits = torch.zeros(64, 5000, device="cuda")
    fastattn.sample(logits, top_k=1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = fastattn.sample(logits, top_k=1000)
    graph.replay()
    first = ids.clone()
    graph.replay()
    assert not torch.equal(first, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, dict(top_k=50), dict(top_p=0.9), dict(top_k=100, top_p=0.8, min_p=0.05)], ids=str)
@pytest.mark.parametrize("vocab_size", [1000, 32000, 50257, 128256])
def test_sampling_probs(options, vocab_size):
    logits = 3 * torch.randn(8, vocab_size, device="cuda", dtype=torch.bfloat16)
    got, expected = fastattn.sampling_probs(logits, **options), reference.sampling_probs(logits.double(), **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)
    ids = fastattn.sample(logits, **options)
    assert (expected.gather(1, ids[:, None]) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f.softmax(x, -1), lambda f, x: f.layer_norm(x, (1000,)),
        lambda f, x: f.cross_entropy(x, torch.zeros(64, dtype=torch.int64, device="cuda")),
    ],
)  # fmt: skip
def test_autocast_gives_float32_as_torch_does(call):
    x = torch.randn(64, 1000, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = call(fastattn, x), call(torch.nn.functional, x)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_backward_from_several_threads():
    op, _, tensors = case("add_rms_norm", "cuda", torch.bfloat16, 1000, 4096)
    douts = upstream(op, tensors)
    expected, wrong = run(op, tensors, douts), []

    def work():
        for _ in range(10):
            wrong.extend(key for key, value in run(op, tensors, douts).items() if not torch.equal(value, expected[key]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements():
    x = torch.randn(70000, 32768, device="cuda", dtype=torch.bfloat16)
    y = fastattn.softmax(x, -1)
    torch.testing.assert_close(y[-3:].float(), x[-3:].float().softmax(-1), rtol=1e-2, atol=1e-6)
