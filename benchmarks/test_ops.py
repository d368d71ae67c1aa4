"""Each implementation of each row under pytest-benchmark, checked first as `fastattn bench` checks it."""

from __future__ import annotations

import pytest
import torch

from fastattn.benchmarks import suite, timing


def test_op(case, benchmark):
    dtype, device = suite.DTYPES[case.dtype], case.device
    inputs, upstream = case.suite.draw(case.shape, dtype, device)
    try:
        if case.name == "naive":
            case.suite.refuse(case.shape, dtype, device)
        forward, differentiable = suite.checked_forward(case.suite, case.shape, case.name, case.builder, inputs, upstream)
    except (NotImplementedError, MemoryError) as error:
        if case.name == suite.OURS:
            raise
        pytest.skip(f"{case.name}: {timing.describe_error(error)}")
    if not differentiable and case.mode != "fwd":
        pytest.skip(f"{case.name}: has no backward")
    work = suite.works(forward, inputs, upstream)[case.mode]

    def run(argument) -> None:
        work.run(argument)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = case.group
    benchmark.extra_info |= {
        "device": str(device), "flops": case.suite.flops(case.shape, case.mode),
        "bytes": case.suite.traffic(case.shape, case.mode, dtype.itemsize),
    }  # fmt: skip
    benchmark.pedantic(run, setup=lambda: ((work.prepare(),), {}), rounds=5, warmup_rounds=1)
