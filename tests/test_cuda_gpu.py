"""The CUDA C++ kernels on a real GPU: values at GPU sizes beside Triton's, graphs, streams, and NVIDIA's own sanitizers.

What they compute at every edge is held on the CPU (test_cuda_on_cpu.py, test_cuda_operators.py); that each case here is sound, by
running it there on CPU tensors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from cuda_on_cpu import BF16, F16, F32
from torch import Tensor

import fastattn
from fastattn.extensions import cuda_operators

BUILT = pytest.mark.skipif(cuda_operators.why_not is not None, reason=f"CUDA operators: {cuda_operators.why_not}")


def paged_case(device: str, dtype: torch.dtype, batch: int, seqlen: int, new: int, group: int) -> Callable[..., list[Tensor]]:
    heads, dim, page = 2, 128, 16
    max_pages = -(-seqlen // page)
    q = torch.randn(batch, new, heads * group, dim).to(device, dtype)
    caches = [torch.randn(batch * max_pages, page, heads, dim).to(device, dtype) for _ in "kv"]
    table = torch.randperm(batch * max_pages).view(batch, max_pages).int().to(device)
    lengths = torch.randint(new, seqlen + 1, (batch,)).int().to(device)
    return lambda **options: list(fastattn.paged_attention(q, *caches, table, lengths, return_lse=True, **options))


def append_case(device: str, dtype: torch.dtype, cache_dtype: torch.dtype, batch: int) -> Callable[..., list[Tensor]]:
    k, v = (torch.randn(batch, 2, 4, 128).to(device, dtype) for _ in "kv")
    table = torch.randperm(batch * 4).view(batch, 4).int().to(device)
    lengths = torch.randint(0, 60, (batch,)).int().to(device)
    cos, sin = (torch.randn(64, 64).to(device) for _ in range(2))

    def run(**options):
        caches = [torch.zeros(batch * 4, 16, 4, 128, device=device).to(cache_dtype) for _ in "kv"]
        fastattn.append_paged_kv(k, v, *caches, table, lengths, cos=cos, sin=sin, **options)
        return [cache.float() for cache in caches]

    return run


def routing_case(device: str, dtype: torch.dtype, tokens: int, experts: int, top_k: int, **routing) -> Callable[..., list[Tensor]]:
    logits = torch.randn(tokens, experts).to(device, dtype)

    def run(**options):
        weights, indices, plan = fastattn.moe_route(logits, top_k, **routing, return_plan=True, **options)
        return [weights, indices, *plan]

    return run


def sampling_case(device: str, dtype: torch.dtype, rows: int, vocabulary: int, **sampling) -> Callable[..., list[Tensor]]:
    logits = (3 * torch.randn(rows, vocabulary)).to(device, dtype)

    def run(**options):
        generator = torch.Generator(device).manual_seed(5)
        return [fastattn.sample(logits, generator=generator, **sampling, **options)]

    return run


def row_case(device: str, dtype: torch.dtype, op: str, rows: int, cols: int) -> Callable[..., list[Tensor]]:
    x, residual, weight = (torch.randn(*size).to(device, dtype) for size in ((rows, cols), (rows, cols), (cols,)))
    if op == "softmax":
        return lambda **options: [fastattn.softmax(x, -1, **options)]
    return lambda **options: list(fastattn.add_rms_norm(x, residual, cols, weight, **options))


# Name → (a case of a device, how far Triton's result may be).
CASES: dict[str, tuple[Callable[[str], Callable[..., list[Tensor]]], float]] = {
    **{f"paged {dtype} {args}": (lambda device, dtype=dtype, args=args: paged_case(device, dtype, *args), 1e-4 if dtype == F32 else 2e-2)
       for dtype in (F32, F16, BF16) for args in ((1, 500, 1, 1), (3, 300, 1, 4), (2, 260, 2, 8))},
    **{f"append {cache}": (lambda device, cache=cache: append_case(device, BF16, cache, 3), 0.13)
       for cache in (BF16, torch.int8, torch.float8_e4m3fn)},
    "route softmax": (lambda device: routing_case(device, F32, 7, 128, 8), 1e-5),
    "route groups": (lambda device: routing_case(device, BF16, 4, 256, 8, score="sigmoid", num_groups=8, top_k_groups=4, renormalize=True), 1e-5),
    "sample": (lambda device: sampling_case(device, F32, 2, 9000), 0.0),
    "sample top k, top p": (lambda device: sampling_case(device, BF16, 3, 9000, top_k=50, top_p=0.9), 0.0),
    **{f"{op} {dtype} {cols}": (lambda device, op=op, dtype=dtype, cols=cols: row_case(device, dtype, op, 3, cols), 1e-5 if dtype == F32 else 2e-2)
       for op in ("softmax", "add_rms_norm") for dtype in (F32, BF16) for cols in (100, 4096, 20000)},
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", CASES)


def hold(name: str, device: str) -> None:
    """By CUDA as by Triton, the same bits twice, and by the rule the same as by name."""
    make, bound = CASES[name]
    torch.manual_seed(0)
    run = make(device)
    mine, again, theirs = run(backend="cuda"), run(backend="cuda"), run(backend="triton")
    for a, b, c in zip(mine, again, theirs, strict=True):
        assert torch.equal(a, b), name
        torch.testing.assert_close(a, c, rtol=bound, atol=bound, msg=lambda said: f"{name}: {said}")


@pytest.mark.interpret
@NAMES
def test_cases_are_sound(name, cuda):
    hold(name, "cpu")


@pytest.mark.gpu
@BUILT
@NAMES
def test_values(name):
    hold(name, "cuda")


@pytest.mark.gpu
@BUILT
@NAMES
def test_a_graph_replays_it(name):
    """With what its tensors hold by then."""
    run = CASES[name][0]("cuda")
    if "sample" in name:
        pytest.skip("a generator of its own is not one that a graph knows")
    expected = run(backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(backend="cuda")
    for t in results:
        t.zero_()
    for _ in range(2):
        graph.replay()
        assert all(map(torch.equal, results, expected))


@pytest.mark.gpu
@BUILT
def test_streams_do_not_share_memory():
    """Splits that two streams merge at a time."""
    runs = [paged_case("cuda", BF16, 1, 8000, 1, 4) for _ in range(2)]
    expected = [run(backend="cuda") for run in runs]
    streams = [torch.cuda.Stream() for _ in runs]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for run, stream in zip(runs, streams):
            with torch.cuda.stream(stream):
                results.append(run(backend="cuda"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for mine, theirs in zip(results, expected) for a, b in zip(mine, theirs))


@pytest.mark.gpu
@BUILT
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_under_nvidias_sanitizer(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([*command, "-k", "test_values", __file__], capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-5000:]
