"""`pytest benchmarks/ --benchmark-only`: the suites' rows as pytest-benchmark's cases, with its own compare, histogram and save.

Options as of `fastattn bench`: --suite (default: tiny), --device, --dtype. pytest's -k chooses ops, shapes and implementations.
"""

from __future__ import annotations

import argparse

import pytest
import torch

from fastattn.benchmarks import command, suite


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastattn")
    group.addoption("--suite", choices=suite.SUITES, default="tiny", help="which shapes (default: tiny)")
    group.addoption("--device", type=_device, default=None, help="cuda where there is one, else cpu; or name it")
    group.addoption("--dtype", choices=tuple(suite.DTYPES), default=None, help="default: bf16 on cuda, fp32 on cpu")


def _device(text: str) -> torch.device:
    try:
        return command.device(text)
    except argparse.ArgumentTypeError as error:
        raise pytest.UsageError(f"--device: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A case for each op, shape, mode and implementation at hand."""
    options = metafunc.config.option
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    cases = []
    for op in suite.OPS:
        found = suite.suite_of(op)
        builders, _ = found.peers(device)
        for shape in found.presets.get((device.type, options.suite), ()):
            for mode in found.modes:
                cases += [
                    pytest.param(Case(found, shape, mode, name, builder, dtype, device), id=f"{op}-{shape.id(dtype)}-{mode}-{name}")
                    for name, builder in builders.items()
                ]
    metafunc.parametrize("case", cases)


class Case:
    """One implementation of one row in one mode."""

    def __init__(self, of: suite.Suite, shape: suite.Shape, mode: str, name: str, builder: suite.Builder, dtype: str, device: torch.device):
        self.suite, self.shape, self.mode, self.name, self.builder, self.dtype, self.device = of, shape, mode, name, builder, dtype, device

    @property
    def group(self) -> str:
        """What pytest-benchmark shows in one table: the implementations of a row, side by side."""
        return f"{self.suite.op} {self.shape.id(self.dtype)} {self.mode}"
