"""One benchmark for every op: each shape verified first, then timed beside every other implementation at hand.

What to run is an op's own business: bench_<op>.py makes a `Suite` of it. How one row of it is judged and timed is here; command.py runs
many of them, results.py keeps them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .timing import Clock, Work, describe_error, free_memory, resolution
from .verification import Check, check, relative_error

OPS = (
    "attention", "softmax", "norm", "rotary", "glu", "cross_entropy", "linear_cross_entropy", "sampling",
    "merge_attention", "append_paged_kv", "paged_attention", "moe_routing", "grouped_mm", "moe", "moe_decode",
    "layer", "model", "model_decode",
)  # fmt: skip
OURS, AGAIN = "fastattn", "fastattn, again"  # ours is timed twice: what it differs from itself by is noise
MODES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
SUITES = ("tiny", "quick", "full", "model")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEER_TOLERANCE = 2e-2  # ‖error‖ / ‖truth‖: far above any dtype's rounding, far below a wrong mask

Forward = Callable[..., "Tensor | tuple[Tensor, ...]"]


class Shape(Protocol):
    """A frozen dataclass: one case of a benchmark. `model` names the model it is from, "" for none. Of a whole model, `tokens` says how
    many a call goes through."""

    def id(self, dtype: str) -> str: ...


Builder = Callable[[Any], Forward]  # of a shape


@dataclass(frozen=True)
class Ceiling:
    """What a rate is held against: the large matmul or the large copy of the same run."""

    name: str  # in the result's "ceilings"
    rate: str  # the figure's key
    what: str
    work: str  # of the row's "work"
    scale: float  # of work per millisecond

    def unit(self, peak: float) -> tuple[str, float]:
        if self.name == "matmul_tflops" and peak < 10:
            return "GFLOP/s", 1e3
        return ("TFLOP/s" if self.name == "matmul_tflops" else "GB/s"), 1.0


MATMUL = Ceiling("matmul_tflops", "tflops", "matmul", "flops", 1e-9)
COPY = Ceiling("copy_gbps", "gbps", "copy", "bytes", 1e-6)


@dataclass(frozen=True)
class Suite:
    """What a benchmark of one op runs.

    presets: (device type, one of SUITES) → shapes; peers(device): the implementations by name, ours first, and why others
    are absent; draw(shape, dtype, device): inputs, those with a gradient as leaves, and the outputs' upstream gradients;
    reference(shape, inputs, upstream, dtype): outputs and gradients by name, computed in that dtype;
    flops(shape, mode): the arithmetic there is to do; traffic(shape, mode, itemsize): the bytes that have to be read or written;
    ceiling: which of the two its rate is told in; overhead(device, dtype): calls on tiny tensors, by name, whose host time is reported;
    panel(row): the plot's panel and the x of a row, None for no plot; refuse(shape, dtype, device): raises where naive must not run;
    checked: by name, what is held against the reference in place of an implementation whose own results are random; None: itself.
    """

    op: str
    presets: Mapping[tuple[str, str], Sequence[Shape]]
    peers: Callable[[torch.device], tuple[dict[str, Builder], dict[str, str]]]
    draw: Callable[[Any, torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]]
    reference: Callable[[Any, list[Tensor], list[Tensor], torch.dtype], dict[str, Tensor]]
    flops: Callable[[Any, str], float]
    traffic: Callable[[Any, str, int], float]
    ceiling: Ceiling
    overhead: Callable[[torch.device, torch.dtype], dict[str, Callable[[], Any]]]
    panel: Callable[[dict[str, Any]], tuple[str, float] | None]
    x_label: str
    modes: tuple[str, ...] = tuple(MODES)
    refuse: Callable[[Any, torch.dtype, torch.device], None] = lambda shape, dtype, device: None
    checked: Mapping[str, Callable[[Any], Forward | None]] = field(default_factory=dict)


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
    """The three modes of one implementation. The backward's forward runs before its clock starts."""
    learnt = [t for t in inputs if t.requires_grad]

    def inference(_: None) -> Any:
        with torch.no_grad():
            return forward(*inputs)

    def backward(result: Any, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_outputs(result), learnt, upstream, retain_graph=retain_graph)

    return {
        "fwd": Work(inference),
        "bwd": Work(backward, prepare=lambda: forward(*inputs), capture=partial(backward, retain_graph=True)),
        "fwd+bwd": Work(lambda _: backward(forward(*inputs))),
    }


def run_once(forward: Forward, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that have one; the outputs alone of what has no backward."""
    outs, learnt = _outputs(forward(*inputs)), [t for t in inputs if t.requires_grad]
    differentiable = learnt and all(out.requires_grad for out in outs)
    grads = torch.autograd.grad(outs, learnt, upstream) if differentiable else ()
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
    forwards = {name: _stand_in(suite, name, shape) or builder(shape) for name, builder in builders.items()}
    return {name: compare(run_once(forward, inputs, upstream), naive, ref64) for name, forward in forwards.items()}


def _stand_in(suite: Suite, name: str, shape: Shape) -> Forward | None:
    """What is checked in place of an implementation, if anything is."""
    return suite.checked[name](shape) if name in suite.checked else None


def checked_forward(
    suite: Suite, shape: Shape, name: str, builder: Builder, inputs: list[Tensor], upstream: list[Tensor],
    references: Sequence[dict[str, Tensor]] | None = None,
) -> tuple[Forward, bool]:  # fmt: skip
    """An implementation that was held against the reference on these very tensors, and whether it has a backward.

    Raises ArithmeticError where it computes something else: of ours whatever is outside the error budget. references: the naive results
    and the float64 ones, where they are there already.
    """
    naive, ref64 = references or tuple(suite.reference(shape, inputs, upstream, dtype) for dtype in (inputs[0].dtype, torch.float64))
    forward = builder(shape)
    results = run_once(_stand_in(suite, name, shape) or forward, inputs, upstream)
    if name == OURS:
        if failed := [n for n, c in compare(results, naive, ref64).items() if not c.passed]:
            raise ArithmeticError(f"outside the error budget: {', '.join(failed)}")
        return forward, True
    return forward, _check_peer(results, list(ref64.values()))


def run_shape(
    suite: Suite, shape: Shape, dtype_name: str, builders: Mapping[str, Builder], clock: Clock, modes: Sequence[str]
) -> dict[str, Any]:
    """One row of the results: the checks, and where they hold, the times of every implementation in every mode.

    A wrong answer of ours leaves the row without a number. A peer that raises, runs out of memory or disagrees with the reference loses
    its own numbers, and the row says why.
    """
    dtype, device = DTYPES[dtype_name], clock.device
    work = {mode: {"flops": suite.flops(shape, mode), "bytes": suite.traffic(shape, mode, dtype.itemsize)} for mode in modes}
    row: dict[str, Any] = {
        "id": shape.id(dtype_name), **asdict(shape), "dtype": dtype_name, "work": work, "left_out": {}, "modes": {},
    }  # fmt: skip
    inputs, upstream = suite.draw(shape, dtype, device)
    ours = builders[OURS](shape)
    try:
        references = tuple(suite.reference(shape, inputs, upstream, wanted) for wanted in (dtype, torch.float64))
        checks = compare(run_once(_stand_in(suite, OURS, shape) or ours, inputs, upstream), *references)  # of what is timed
        row["checks"] = {name: {**asdict(c), "passed": c.passed} for name, c in checks.items()}
    except Exception as error:
        row["checks"], row["error"] = {}, describe_error(error)
    row["verified"] = bool(row["checks"]) and all(c["passed"] for c in row["checks"].values())
    if not row["verified"]:
        return row

    candidates = {OURS: works(ours, inputs, upstream)}
    for name, builder in builders.items():
        if name == OURS:
            continue
        try:
            if name == "naive":
                suite.refuse(shape, dtype, device)
            forward, differentiable = checked_forward(suite, shape, name, builder, inputs, upstream, references)
            of_peer = works(forward, inputs, upstream)
            candidates[name] = of_peer if differentiable else {"fwd": of_peer["fwd"]}
            if not differentiable and set(modes) - {"fwd"}:
                row["left_out"][name] = "has no backward"
        except Exception as error:
            row["left_out"][name] = describe_error(error)
            free_memory(device)
    del references
    free_memory(device)
    for mode in modes:
        row["modes"][mode], failures = _measure({n: w[mode] for n, w in candidates.items() if mode in w}, suite.ceiling, work[mode], clock)
        row["left_out"] |= failures
        for figure in row["modes"][mode].values() if hasattr(shape, "tokens") else ():
            figure["tokens_per_second"] = 1e3 * shape.tokens / figure["ms"]
    if device.type == "cuda":  # after everything else, as a call that cannot be recorded may leave an error behind
        row["not_captured"] = _measure_replays(candidates, row["modes"], clock)
    return row


def _check_peer(results: list[Tensor], ref64: list[Tensor]) -> bool:
    """Raises where a peer computes something else; else whether it gave gradients."""
    error = max(relative_error(result, truth) for result, truth in zip(results, ref64))
    if not error < PEER_TOLERANCE:
        raise ArithmeticError(f"relative error {error:.1e} against the reference")
    return len(results) == len(ref64)


def _measure(
    selected: Mapping[str, Work], ceiling: Ceiling, work: Mapping[str, float], clock: Clock
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The figures of one mode by implementation, and for each one that raised, what it said."""
    times, failures = clock.measure({**selected, AGAIN: selected[OURS]})
    ours, again = (times.pop(name, None) for name in (OURS, AGAIN))
    repeated = 0.0 if ours is None or again is None else abs(again.ms / ours.ms - 1)
    figures: dict[str, dict[str, Any]] = {}
    for name, time in (({OURS: ours} if ours else {}) | times).items():
        figure = figures[name] = {**asdict(time), ceiling.rate: work[ceiling.work] / time.ms * ceiling.scale}
        figure["peak_bytes"] = clock.peak_bytes(selected[name])
        if ours is not None:
            figure["ratio"] = time.ms / ours.ms
            figure["resolution"] = repeated if name == OURS else resolution(asdict(time), asdict(ours), repeated)
    return figures, {name: reason for name, reason in failures.items() if name != AGAIN}


def _measure_replays(
    candidates: Mapping[str, Mapping[str, Work]], modes: dict[str, dict[str, dict[str, Any]]], clock: Clock
) -> dict[str, str]:
    """Adds `graph_ms` to the figures, one implementation after the other, as each graph holds memory of its own; what could not be
    recorded, and why."""
    reasons: dict[str, str] = {}
    for mode, figures in modes.items():
        for name, figure in figures.items():
            try:
                times, failures = clock.measure({name: clock.replay(candidates[name][mode])})
                figure["graph_ms"] = times[name].ms if name in times else None
                reasons |= failures
            except Exception as error:
                figure["graph_ms"], reasons[name] = None, describe_error(error)
            free_memory(clock.device)
    return reasons
