"""One benchmark for every op: each shape verified first, then timed beside every other implementation at hand.

What to run is an op's own business: bench_<op>.py makes a `Suite` of it. How to run, judge, save and show it is here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import report
from .provenance import checkout, provenance
from .timing import Clock, Measurement, Work, describe_error, free_memory, host_microseconds, measure_ceilings
from .verification import Check, check, relative_error

OPS = (
    "attention", "softmax", "norm", "rotary", "glu", "cross_entropy", "linear_cross_entropy", "sampling",
    "merge_attention", "append_paged_kv", "paged_attention", "moe_routing", "grouped_mm", "moe", "moe_decode",
    "layer", "model", "model_decode",
)  # fmt: skip
OURS, PASSES = report.OURS, tuple(report.TITLES)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEER_TOLERANCE = 2e-2  # ‖error‖ / ‖truth‖: far above any dtype's rounding, far below a wrong mask

Forward = Callable[..., "Tensor | tuple[Tensor, ...]"]


class Shape(Protocol):
    """A frozen dataclass: one case of a benchmark."""

    def id(self, dtype: str) -> str: ...


Builder = Callable[[Any], Forward]  # of a shape


@dataclass(frozen=True)
class Ceiling:
    """What a rate is held against: the large matmul or the large copy of the same run."""

    name: str  # in the result's "ceilings"
    rate: str  # the figure's key
    what: str
    scale: float  # of work per millisecond

    def unit(self, peak: float) -> tuple[str, float]:
        if self.name == "matmul_tflops" and peak < 10:
            return "GFLOP/s", 1e3
        return ("TFLOP/s" if self.name == "matmul_tflops" else "GB/s"), 1.0


MATMUL = Ceiling("matmul_tflops", "tflops", "matmul", 1e-9)
COPY = Ceiling("copy_gbps", "gbps", "copy", 1e-6)


@dataclass(frozen=True)
class Suite:
    """What a benchmark of one op runs.

    presets: (device type, "tiny" | "quick" | "full") → shapes; peers(device): the implementations by name, ours first, and why others
    are absent; draw(shape, dtype, device): inputs, those with a gradient as leaves, and the outputs' upstream gradients;
    reference(shape, inputs, upstream, dtype): outputs and gradients by name, computed in that dtype;
    work(shape, pass, itemsize): FLOPs, or bytes read and written, of which `ceiling` is the bound;
    overhead(device, dtype): calls on tiny tensors, by name, whose host time is reported;
    panel(row): the plot's panel and the x of a row, None for no plot; refuse(shape, dtype, device): raises where naive must not run;
    checked: what is held against the reference in place of an implementation whose own results are random, by name.
    """

    op: str
    presets: Mapping[tuple[str, str], Sequence[Shape]]
    peers: Callable[[torch.device], tuple[dict[str, Builder], dict[str, str]]]
    draw: Callable[[Any, torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]]
    reference: Callable[[Any, list[Tensor], list[Tensor], torch.dtype], dict[str, Tensor]]
    work: Callable[[Any, str, int], float]
    ceiling: Ceiling
    overhead: Callable[[torch.device, torch.dtype], dict[str, Callable[[], Any]]]
    panel: Callable[[dict[str, Any]], tuple[str, float] | None]
    x_label: str
    passes: tuple[str, ...] = PASSES
    refuse: Callable[[Any, torch.dtype, torch.device], None] = lambda shape, dtype, device: None
    checked: Mapping[str, Builder] = field(default_factory=dict)


def suite_of(op: str) -> Suite:
    return importlib.import_module(f"{__package__}.bench_{op}").SUITE


BACKENDS = ("triton", "cuda")


def backends(device: torch.device) -> tuple[str, ...]:
    """The `backend`s to show side by side: of an op that has two kernels for this device."""
    from fastattn.extensions import cuda_operators

    return BACKENDS if device.type == "cuda" and cuda_operators.why_not is None else ()


def by_backend(name: str, call: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """call(…, backend=…) for each of them, by names that begin with `name`."""
    return {f"{name} ({backend})": partial(call, backend=backend) for backend in backends(device)}


def find_peers(
    candidates: Mapping[str, Builder], requires: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, Builder], dict[str, str]]:
    """The candidates that this machine has, and the reason of each one it lacks. requires: (module, name) that a builder will import,
    asked for once here, so that an absent peer is named once and not in every row."""
    present, absent = {}, {}
    for name, builder in candidates.items():
        try:
            if name in requires:
                import_name(*requires[name])
            present[name] = builder
        except Exception as error:  # a broken binary raises anything from ImportError to OSError; all mean absent
            absent[name] = describe_error(error)
    return present, absent


def import_name(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


# --------------------------------------------------------------------------------------------------------------------
# One shape: the check, the timing.


def _outputs(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def works(forward: Forward, inputs: list[Tensor], upstream: list[Tensor]) -> dict[str, Work]:
    """The three passes of one implementation. The backward's forward runs before its clock starts."""
    learnt = [t for t in inputs if t.requires_grad]

    def inference(_: None) -> Any:
        with torch.no_grad():
            return forward(*inputs)

    def backward(result: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_outputs(result), learnt, upstream)

    return {
        "fwd": Work(inference),
        "bwd": Work(backward, prepare=lambda: forward(*inputs)),
        "fwd+bwd": Work(lambda _: backward(forward(*inputs))),
    }


def run_once(forward: Forward, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that have one."""
    outs, learnt = _outputs(forward(*inputs)), [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(outs, learnt, upstream) if learnt else ()
    return [*(out.detach() for out in outs), *grads]


def compare(results: list[Tensor], naive: dict[str, Tensor], ref64: dict[str, Tensor]) -> dict[str, Check]:
    """The error budget of outputs and gradients."""
    return {name: check(result, naive[name], ref64[name]) for name, result in zip(ref64, results, strict=True)}


def verify_shape(
    suite: Suite, shape: Shape, dtype: torch.dtype, device: torch.device, builders: Mapping[str, Builder]
) -> dict[str, dict[str, Check]]:
    """The error budget of outputs and gradients of each implementation."""
    inputs, upstream = suite.draw(shape, dtype, device)
    naive, ref64 = (suite.reference(shape, inputs, upstream, wanted) for wanted in (dtype, torch.float64))
    forwards = {name: suite.checked.get(name, builder)(shape) for name, builder in builders.items()}
    return {name: compare(run_once(forward, inputs, upstream), naive, ref64) for name, forward in forwards.items()}


def run_shape(
    suite: Suite, shape: Shape, dtype_name: str, builders: Mapping[str, Builder], clock: Clock, passes: Sequence[str]
) -> dict[str, Any]:
    """One row of the results: the checks, and where they hold, the times of every implementation in every pass.

    A wrong answer of ours leaves the row without a number. A peer that raises, runs out of memory or disagrees with the reference loses
    its own numbers, and the row says why.
    """
    dtype, device = DTYPES[dtype_name], clock.device
    row: dict[str, Any] = {
        "id": shape.id(dtype_name),
        **asdict(shape),
        "dtype": dtype_name,
        "left_out": {},
        "passes": {},
    }
    inputs, upstream = suite.draw(shape, dtype, device)
    naive, ref64 = (suite.reference(shape, inputs, upstream, wanted) for wanted in (dtype, torch.float64))
    ours = builders[OURS](shape)
    try:
        checked = suite.checked[OURS](shape) if OURS in suite.checked else ours
        checks = compare(run_once(checked, inputs, upstream), naive, ref64)  # of the very tensors that are timed
        row["checks"] = {name: {**asdict(c), "passed": c.passed} for name, c in checks.items()}
    except Exception as error:
        row["checks"], row["error"] = {}, describe_error(error)
    row["verified"] = bool(row["checks"]) and all(c["passed"] for c in row["checks"].values())
    if not row["verified"]:
        return row

    forwards = {OURS: ours}
    for name, builder in builders.items():
        if name == OURS:
            continue
        try:
            if name == "naive":
                suite.refuse(shape, dtype, device)
            forward = builder(shape)
            checked = suite.checked[name](shape) if name in suite.checked else forward
            results = run_once(checked, inputs, upstream)
            errors = [relative_error(result, truth) for result, truth in zip(results, ref64.values(), strict=True)]
            del results
            if not max(errors) < PEER_TOLERANCE:
                raise ArithmeticError(f"relative error {max(errors):.1e} against the reference")
            forwards[name] = forward
        except Exception as error:
            row["left_out"][name] = describe_error(error)
            free_memory(device)
    del naive, ref64
    free_memory(device)
    for which in passes:
        selected = {name: works(forward, inputs, upstream)[which] for name, forward in forwards.items()}
        times, failures = clock.measure(selected)
        row["left_out"] |= failures
        peaks = {name: clock.peak_bytes(selected[name]) for name in times}
        row["passes"][which] = _figures(suite, suite.work(shape, which, dtype.itemsize), times, peaks)
    return row


def _figures(
    suite: Suite, work: float, times: dict[str, Measurement], peaks: dict[str, int | None]
) -> dict[str, Any]:
    figures = {}
    for name, time in times.items():
        rate = {suite.ceiling.rate: work / time.ms * suite.ceiling.scale}
        figures[name] = {**asdict(time), **rate, "peak_bytes": peaks[name]}
        if OURS in times:
            figures[name]["ratio"] = time.ms / times[OURS].ms
    return figures


# --------------------------------------------------------------------------------------------------------------------
# The command.


def device(text: str) -> torch.device:
    """A device that is here, as an argument's type."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"must be a device that is here, got {text!r}: torch sees {count} CUDA devices")
    return found


def regex(text: str) -> re.Pattern[str]:
    """A regular expression, as an argument's type."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None


def _base(text: str) -> dict[str, Any]:
    """The result of an earlier run, as an argument's type."""
    try:
        base = json.loads(Path(text).read_text())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file to read, got {text!r}: {error.strerror}") from None
    except ValueError:
        base = None
    if not isinstance(base, dict) or base.get("op") not in OPS or "rows" not in base:
        raise argparse.ArgumentTypeError(f"must be an OP.json of an earlier run, got {text!r}")
    return base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"all, or some of {', '.join(OPS)} (default: attention)"
    )
    parser.add_argument("--device", type=device, default=None, help="cuda where there is one, else cpu; or name it")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: bf16 on cuda, fp32 on cpu")
    parser.add_argument(
        "--shapes", choices=("tiny", "quick", "full"), default=None, help="default: full on cuda, quick on cpu"
    )
    parser.add_argument("--only", type=regex, metavar="REGEX", default="", help="rows to run, e.g. 'S1024.*causal'")
    parser.add_argument(
        "--peers", type=regex, metavar="REGEX", default="", help="implementations beside fastattn, e.g. 'naive|SDPA'"
    )
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=list(PASSES), help="default: all")
    parser.add_argument("--out", type=Path, default=None, help="folder for OP.json and OP.png")
    parser.add_argument("--base", type=_base, metavar="FILE", help="an older OP.json to compare with")


def run(options: argparse.Namespace) -> int:
    """Run the benchmarks asked for; 0 where every check held and every pass ran, else 1 (a row whose check failed carries no numbers)."""
    ops = options.ops or ["attention"]
    ops = list(OPS) if ops == ["all"] else ops
    if unknown := [op for op in ops if op not in OPS]:
        raise SystemExit(f"fastattn bench: OP must be all or some of {', '.join(OPS)}, got {unknown[0]!r}")
    if options.base and ops != [options.base["op"]]:
        raise SystemExit(f"fastattn bench: --base is of {options.base['op']}: name that op, and no other")
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, seconds=0.3 if device.type == "cpu" else 0.15)
    return max([_run_suite(suite_of(op), options, clock) for op in ops])


def _run_suite(suite: Suite, options: argparse.Namespace, clock: Clock) -> int:
    device = clock.device
    preset = options.shapes or ("full" if device.type == "cuda" else "quick")
    dtype_name = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    shapes = [s for s in suite.presets[device.type, preset] if options.only.search(s.id(dtype_name))]
    if not shapes:
        ids = "\n  ".join(s.id(dtype_name) for s in suite.presets[device.type, preset])
        raise SystemExit(
            f"fastattn bench: --only {options.only.pattern!r} must match a row of {suite.op}, these are:\n  {ids}"
        )
    builders, absent = suite.peers(device)
    builders = {n: b for n, b in builders.items() if n == OURS or options.peers.search(n)}
    passes = [which for which in options.passes if which in suite.passes]

    folder = options.out or _default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"op": suite.op, "provenance": provenance(device), "absent": absent, "rows": []}
    with report.progress(suite.op, len(shapes) + 3) as step:
        step("ceilings: a large matmul, a large copy")
        before = result["ceilings"] = measure_ceilings(clock, DTYPES[dtype_name])
        step("overhead of a call")
        one = torch.ones(1, device=device)
        calls = {report.SMALLEST: lambda: torch.ops.aten.add(one, one), **suite.overhead(device, DTYPES[dtype_name])}
        result["overhead_us"] = {name: host_microseconds(call, device) for name, call in calls.items()}
        for shape in shapes:
            step(shape.id(dtype_name))
            result["rows"].append(run_shape(suite, shape, dtype_name, builders, clock, passes))
            _save(suite, result, folder)  # at each row: a run that is cut short leaves what it has
        step("ceilings again: the better of both ends counts")
        after = measure_ceilings(clock, DTYPES[dtype_name])
    result["ceilings"] = {name: max(before[name], after[name]) for name in before}
    _save(suite, result, folder)

    report.print_result(suite, result, list(builders), options.base)
    print(f"figures: {folder / suite.op}.json")
    no_plot = report.plot(suite, result, folder / f"{suite.op}.png")
    print(f"no plot: {no_plot}" if no_plot else f"plot:    {folder / suite.op}.png")
    return 0 if all(_is_whole(row, passes) for row in result["rows"]) else 1


def _is_whole(row: dict[str, Any], passes: Sequence[str]) -> bool:
    return row["verified"] and all(OURS in row["passes"][which] for which in passes)


def _save(suite: Suite, result: dict[str, Any], folder: Path) -> None:
    peak = result["ceilings"][suite.ceiling.name]
    for row in result["rows"]:
        for figures in row["passes"].values():
            for figure in figures.values():
                figure[f"percent_of_{suite.ceiling.what}"] = 100 * figure[suite.ceiling.rate] / peak
    (folder / f"{suite.op}.json").write_text(json.dumps(result, indent=1) + "\n")


def _default_folder() -> Path:
    root = checkout()
    return Path("fastattn-bench") if root is None else root / "benchmarks" / "results" / "local"
