#!/usr/bin/env python3
"""Time what the host does for a launch of each CUDA operator, on a machine without a GPU.

    python tools/host_time.py [--json FILE]

g++ builds csrc/cuda for CPU tensors with the launch itself compiled out. Each row is of one decoding step's size: the C++ operator alone,
and the public function around it (which reads index tensors of the CPU, as it does not those of a GPU), in microseconds of one thread and
as multiples of torch.ops.aten.add, torch's smallest call.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "FASTATTN_CUDA_EXTENSION"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what the host does for a launch of each CUDA operator.")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures there")
    options = parser.parse_args()
    if LIBRARY not in os.environ:  # both are read when fastattn is imported
        sys.path.insert(0, str(ROOT / "tests"))
        from cuda_on_cpu import build_operators

        folder = Path(tempfile.mkdtemp())
        os.environ |= {LIBRARY: str(build_operators(folder, "-O3", "-DCUDA_ON_CPU_NO_LAUNCH", "-Wno-unused")), "TRITON_INTERPRET": "1"}
        os.execv(sys.executable, [sys.executable, *sys.argv])

    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    one = torch.ones(1)
    add = best(lambda: torch.ops.aten.add(one, one))
    figures = {"torch.ops.aten.add": {"us": add}}
    for name, (operator, public) in calls().items():
        figures[name] = {"operator_us": best(operator), "public_us": best(public)}
    print(f"{'':24}{'operator':>10}{'× add':>8}{'public':>10}{'× add':>8}")
    print(f"{'torch.ops.aten.add':24}{add:10.1f}{1:8.1f}")
    for name, row in list(figures.items())[1:]:
        print(f"{name:24}" + "".join(f"{row[key]:10.1f}{row[key] / add:8.1f}" for key in ("operator_us", "public_us")))
    if options.json:
        from fastattn.benchmarks.provenance import provenance

        result = {"op": "cuda_host_time", "provenance": provenance(torch.device("cpu")), "rows": figures}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def best(call: Callable[[], object], repeats: int = 15, number: int = 2000) -> float:
    """The least of many means, in microseconds: whatever else the machine does only adds."""
    means = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(number):
            call()
        means.append((time.perf_counter() - start) / number * 1e6)
    return min(means)


def calls() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """(C++ operator, public function) by name; bf16, B = 1, H = 32 over 8 of 128, a Qwen3-MoE router, a vocabulary of 128,256."""
    import torch

    import fastattn

    bf16, ops = torch.bfloat16, torch.ops.fastattn
    x, weight = torch.randn(1, 4096).to(bf16), torch.randn(4096).to(bf16)
    q, new = torch.randn(1, 1, 32, 128).to(bf16), torch.randn(1, 1, 8, 128).to(bf16)
    cache = torch.randn(128, 16, 8, 128).to(bf16)
    table, lengths = torch.arange(128, dtype=torch.int32)[None], torch.tensor([2000], dtype=torch.int32)
    logits, scores = torch.randn(1, 128256).to(bf16), torch.randn(1, 128).to(bf16)
    indices, seed = torch.arange(8)[None], torch.tensor([1])
    nones = [None] * 6
    return {
        "norm": (
            lambda: ops.norm_fwd_cuda(x, x, weight, None, 1e-6, 0.0, False, False),
            lambda: fastattn.add_rms_norm(x, x, 4096, weight, backend="cuda"),
        ),
        "softmax": (lambda: ops.softmax_fwd_cuda(x, bf16), lambda: fastattn.softmax(x, -1, backend="cuda")),
        "append_paged_kv": (
            lambda: ops.append_paged_kv_cuda(new, new, cache, cache, table, lengths, *nones[:5], False),
            lambda: fastattn.append_paged_kv(new, new, cache, cache, table, lengths, backend="cuda"),
        ),
        "paged_attention": (
            lambda: ops.paged_attention_cuda(q, cache, cache, table, lengths, *nones, 1, None, 0, 0.09, 0.0, 0),
            lambda: fastattn.paged_attention(q, cache, cache, table, lengths, backend="cuda"),
        ),
        "moe_route, moe_dispatch": (
            lambda: ops.moe_route_dispatch_cuda(scores, None, 8, False, True, 1, 1, True, 1.0),
            lambda: fastattn.moe_route(scores, 8, renormalize=True, return_plan=True, backend="cuda"),
        ),
        "moe_dispatch": (lambda: ops.moe_dispatch_cuda(indices, 128), lambda: fastattn.moe_dispatch(indices, 128, backend="cuda")),
        "sample": (
            lambda: ops.sample_cuda(logits, seed, *nones[:4], 0.8, 50, 0.9, 0.0),
            lambda: fastattn.sample(logits, temperature=0.8, top_k=50, top_p=0.9, backend="cuda"),
        ),
    }


if __name__ == "__main__":
    main()
