"""What every test runs under: fixed seeds, poisoned empties, checked interpreted launches, and honest skips.

The suite runs as two processes, because TRITON_INTERPRET is read when a kernel is decorated:
    TRITON_INTERPRET=1 pytest -m "(interpret or both) and not more"
    pytest -m "not interpret and not more and not gpu"
Only torch and pytest are needed to import this file.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
REQUIRE_ALL = os.environ.get("FASTATTN_REQUIRE_ALL") == "1"
CAN_CHECK = all(importlib.util.find_spec(module) for module in ("triton", "numpy"))

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # No deadline: an interpreted launch takes as long as it takes. Derandomised: a red run is red again tomorrow.
    settings.register_profile("fastattn", deadline=None, derandomize=True, max_examples=25, print_blob=True)
    settings.load_profile("fastattn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this process cannot run."""
    for item in items:
        in_both = item.get_closest_marker("both") is not None
        wants_interpreter = item.get_closest_marker("interpret") is not None or (in_both and INTERPRETING)
        if wants_interpreter and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="interpret: runs in the process with TRITON_INTERPRET=1"))
        elif not wants_interpreter and INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="compiled: runs in the process without TRITON_INTERPRET"))
        if wants_interpreter and not CAN_CHECK:
            item.add_marker(pytest.mark.skip(reason="needs triton and numpy: the interpreter"))
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device on this machine"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Under FASTATTN_REQUIRE_ALL=1 (CI, where everything optional is installed) a "needs ..." skip is a failure."""
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = _skip_reason(report)
        if reason.startswith("needs "):
            report.outcome = "failed"
            report.longrepr = f"FASTATTN_REQUIRE_ALL=1 forbids this skip: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The same rule for modules skipped as a whole (`pytest.importorskip(..., reason="needs ...")`)."""
    report = yield
    if REQUIRE_ALL and report.skipped:
        reason = _skip_reason(report)
        if reason.startswith("needs "):
            report.outcome = "failed"
            report.longrepr = f"FASTATTN_REQUIRE_ALL=1 forbids this skip: {collector.nodeid}: {reason}"
    return report


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


@pytest.fixture(autouse=True)
def fixed_seed_and_poisoned_empties():
    """Seed torch, and let it fill every torch.empty with NaN (or the largest int), so that unwritten output shows."""
    torch.manual_seed(0)
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(autouse=True)
def launches(request: pytest.FixtureRequest):
    """Runs every interpreted launch of an `interpret` or `both` test under the bounds and race checker.

    Gives the checker's record, so that a test can assert `launches.count > 0`; None in other tests.
    """
    if not INTERPRETING or not any(map(request.node.get_closest_marker, ("interpret", "both"))):
        yield None
        return
    from fastattn.testing.checker import checked_launches

    with checked_launches() as record:
        yield record


CUDA_OPERATORS = frozenset(
    f"{op}_cuda" for op in ("append_paged_kv", "moe_dispatch", "moe_route_dispatch", "norm_fwd", "paged_attention", "sample", "softmax_fwd")
)


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory):
    """csrc/cuda's operators, built for CPU tensors."""
    from cuda_on_cpu import build_operators, made_once

    return made_once(tmp_path_factory, "cuda-operators", build_operators) / "operators.so"


@pytest.fixture
def cuda(cuda_library, monkeypatch: pytest.MonkeyPatch):
    """The CUDA operators are there, for the CPU tensors of an `interpret` test."""
    from fastattn.extensions import cuda_operators

    torch.ops.load_library(cuda_library)
    missing = [name for name in CUDA_OPERATORS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{name}", "CPU")]
    assert not missing
    monkeypatch.setattr(cuda_operators, "_found", CUDA_OPERATORS)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, through Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
