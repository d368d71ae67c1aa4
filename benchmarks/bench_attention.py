"""Attention against naive attention and every other implementation at hand: verified first, then timed."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

from . import peers, report
from .provenance import checkout, provenance
from .timing import Clock, Measurement, Work, describe_error, free_memory, host_microseconds, measure_ceilings
from .verification import TENSORS, check, reference_results, relative_error

OURS = "fastattn"
PASSES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEER_TOLERANCE = 2e-2  # ‖error‖ / ‖truth‖: far above any dtype's rounding, far below a wrong mask


@dataclass(frozen=True)
class Shape:
    """Self-attention: S_q = S_k, D_v = D."""

    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool

    def id(self, dtype: str) -> str:
        heads = f"H{self.num_heads}" + ("" if self.num_kv_heads == self.num_heads else f"-Hkv{self.num_kv_heads}")
        mask = "causal" if self.causal else "full"
        return f"B{self.batch}-S{self.seqlen}-{heads}-D{self.head_dim}-{dtype}-{mask}"


def _grid(tokens: int, seqlens: Sequence[int], heads_of: dict[int, int]) -> list[Shape]:
    """{D: H} × causal or not × seqlens, `tokens` tokens in each batch."""
    return [
        Shape(max(1, tokens // seqlen), seqlen, num_heads, num_heads, head_dim, causal)
        for head_dim, num_heads in heads_of.items()
        for causal in (True, False)
        for seqlen in seqlens
    ]


_CUDA_HEADS = {64: 32, 128: 16}  # hidden size 2048 and 16k tokens: the shapes published figures use
_LLAMA = Shape(2, 8192, 32, 8, 128, True)
PRESETS = {
    ("cpu", "tiny"): _grid(64, (32, 64), {16: 2}),
    ("cpu", "quick"): _grid(1, (512, 1024, 2048), {64: 8}) + [Shape(1, 1024, 8, 2, 128, True)],
    ("cpu", "full"): _grid(1, (512, 1024, 2048, 4096, 8192), {64: 8, 128: 8}) + [Shape(1, 2048, 32, 8, 128, True)],
    ("cuda", "tiny"): _grid(512, (256, 512), {64: 2}),
    ("cuda", "quick"): _grid(16384, (1024, 4096, 16384), _CUDA_HEADS) + [_LLAMA],
    ("cuda", "full"): _grid(16384, (512, 1024, 2048, 4096, 8192, 16384), _CUDA_HEADS) + [_LLAMA],
}


def flops(shape: Shape, which: str) -> float:
    # 4·B·H·S_q·S_k·D, half of it when causal; the backward pass 2.5 times that (five products beside the forward's two)
    forward = 4 * shape.batch * shape.num_heads * shape.seqlen**2 * shape.head_dim * (0.5 if shape.causal else 1.0)
    return forward * {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[which]


# --------------------------------------------------------------------------------------------------------------------
# One shape: inputs, the check, the timing.


def draw_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k, v as leaves that take a gradient, and an upstream gradient; random data, since zeros run faster than real data."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(num_heads: int) -> Tensor:
        size = (shape.batch, shape.seqlen, num_heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs = [randn(heads).requires_grad_() for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
    return inputs, randn(shape.num_heads)


def works(forward: peers.Forward, inputs: list[Tensor], dout: Tensor) -> dict[str, Work]:
    """The three passes of one implementation. The backward's forward runs before its clock starts."""

    def inference(_: None) -> Tensor:
        with torch.no_grad():
            return forward(*inputs)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, dout)

    return {
        "fwd": Work(inference),
        "bwd": Work(backward, prepare=lambda: forward(*inputs)),
        "fwd+bwd": Work(lambda _: backward(forward(*inputs))),
    }


def run_once(forward: peers.Forward, inputs: list[Tensor], dout: Tensor) -> list[Tensor]:
    out = forward(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def verify(results: list[Tensor], naive: list[Tensor], ref64: list[Tensor]) -> dict[str, dict[str, Any]]:
    """The error budget of out, dq, dk and dv, on the very tensors that are timed."""
    checks = {name: check(*tensors) for name, *tensors in zip(TENSORS, results, naive, ref64)}
    return {name: {**asdict(c), "passed": c.passed} for name, c in checks.items()}


def run_shape(
    shape: Shape, dtype_name: str, builders: dict[str, peers.Builder], clock: Clock, passes: Sequence[str]
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
    inputs, dout = draw_inputs(shape, dtype, device)
    naive, ref64 = (reference_results(*inputs, dout, shape.causal, wanted) for wanted in (dtype, torch.float64))
    ours = builders[OURS](shape.seqlen, shape.causal)
    try:
        row["checks"] = verify(run_once(ours, inputs, dout), naive, ref64)
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
                _refuse_beyond_memory(shape, dtype, device)
            forward = builder(shape.seqlen, shape.causal)
            errors = [relative_error(*pair) for pair in zip(run_once(forward, inputs, dout), ref64)]
            if not max(errors) < PEER_TOLERANCE:
                raise ArithmeticError(f"relative error {max(errors):.1e} against the reference")
            forwards[name] = forward
        except Exception as error:
            row["left_out"][name] = describe_error(error)
            free_memory(device)
    del naive, ref64
    free_memory(device)
    for which in passes:
        selected = {name: works(forward, inputs, dout)[which] for name, forward in forwards.items()}
        times, failures = clock.measure(selected)
        row["left_out"] |= failures
        row["passes"][which] = _figures(shape, which, times)
    return row


def _refuse_beyond_memory(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """CUDA refuses an allocation by itself; a CPU process that asks for too much is killed."""
    if device.type == "cpu":
        need = (
            12 * shape.batch * shape.num_heads * shape.seqlen**2 * dtype.itemsize
        )  # S × S matrices alive in a backward
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > free // 2:
            raise MemoryError(f"S × S matrices need about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


def _figures(shape: Shape, which: str, times: dict[str, Measurement]) -> dict[str, Any]:
    figures = {}
    for name, time in times.items():
        figures[name] = {**asdict(time), "tflops": flops(shape, which) / time.ms / 1e9}
        if OURS in times:
            figures[name]["ratio"] = time.ms / times[OURS].ms
    return figures


def measure_overhead(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Microseconds of host time a call costs, on tensors so small that nothing else counts."""
    q, k, v = (torch.randn(1, 16, 1, 64, device=device).to(dtype) for _ in range(3))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    with_grad = [t.clone().requires_grad_() for t in (q, k, v)]
    heads_first_with_grad = [t.transpose(1, 2) for t in with_grad]
    calls = {
        "fastattn.attention": lambda: fastattn.attention(q, k, v),
        "fastattn.scaled_dot_product_attention": lambda: fastattn.scaled_dot_product_attention(*heads_first),
        "torch SDPA": lambda: F.scaled_dot_product_attention(*heads_first),
        "fastattn.attention, recording a gradient": lambda: fastattn.attention(*with_grad),
        "torch SDPA, recording a gradient": lambda: F.scaled_dot_product_attention(*heads_first_with_grad),
    }
    return {name: host_microseconds(call, device) for name, call in calls.items()}


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
    if not isinstance(base, dict) or base.get("op") != "attention" or "rows" not in base:
        raise argparse.ArgumentTypeError(f"must be an attention.json of an earlier run, got {text!r}")
    return base


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--out", type=Path, default=None, help="folder for attention.json and attention.png")
    parser.add_argument("--base", type=_base, metavar="FILE", help="an older attention.json to compare with")


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; 0 where every check held, 1 where one did not (its rows then carry no numbers)."""
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = options.shapes or ("full" if device.type == "cuda" else "quick")
    dtype_name = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    shapes = [s for s in PRESETS[device.type, preset] if options.only.search(s.id(dtype_name))]
    if not shapes:
        ids = "\n  ".join(s.id(dtype_name) for s in PRESETS[device.type, preset])
        raise SystemExit(f"fastattn bench: --only {options.only.pattern!r} must match a row, these are:\n  {ids}")
    builders, absent = peers.available(device)
    builders = {n: b for n, b in builders.items() if n == OURS or options.peers.search(n)}

    folder = options.out or _default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(device, seconds=0.3 if device.type == "cpu" else 0.15)
    result: dict[str, Any] = {"op": "attention", "provenance": provenance(device), "absent": absent, "rows": []}
    with report.progress("attention", len(shapes) + 3) as step:
        step("ceilings: a large matmul, a large copy")
        before = result["ceilings"] = measure_ceilings(clock, DTYPES[dtype_name])
        step("overhead of a call")
        result["overhead_us"] = measure_overhead(device, DTYPES[dtype_name])
        for shape in shapes:
            step(shape.id(dtype_name))
            result["rows"].append(run_shape(shape, dtype_name, builders, clock, options.passes))
            _save(result, folder)  # at each row: a run that is cut short leaves what it has
        step("ceilings again: the better of both ends counts")
        after = measure_ceilings(clock, DTYPES[dtype_name])
    result["ceilings"] = {name: max(before[name], after[name]) for name in before}
    _save(result, folder)

    print_result(result, list(builders), options.base)
    print(f"figures: {folder / 'attention.json'}")
    no_plot = plot(result, folder / "attention.png")
    print(f"no plot: {no_plot}" if no_plot else f"plot:    {folder / 'attention.png'}")
    return 0 if all(row["verified"] for row in result["rows"]) else 1


def _save(result: dict[str, Any], folder: Path) -> None:
    for row in result["rows"]:
        for figures in row["passes"].values():
            for figure in figures.values():
                figure["percent_of_matmul"] = 100 * figure["tflops"] / result["ceilings"]["matmul_tflops"]
    (folder / "attention.json").write_text(json.dumps(result, indent=1) + "\n")


def _default_folder() -> Path:
    root = checkout()
    return Path("fastattn-bench") if root is None else root / "benchmarks" / "results" / "local"


# --------------------------------------------------------------------------------------------------------------------
# What is printed and drawn.


def _unit(peak_tflops: float) -> tuple[str, float]:
    return ("TFLOP/s", 1.0) if peak_tflops >= 10 else ("GFLOP/s", 1e3)


def print_result(result: dict[str, Any], names: Sequence[str], base: dict[str, Any] | None) -> None:
    ceilings, where = result["ceilings"], result["provenance"]
    unit, factor = _unit(ceilings["matmul_tflops"])
    print(
        f"\nfastattn {where['fastattn']} (commit {where['commit']}) on {where['device']['name']}, torch {where['torch']}"
    )
    print(
        f"ceilings of this run: matmul {ceilings['matmul_tflops'] * factor:.0f} {unit}, copy {ceilings['copy_gbps']:.0f} GB/s "
        f"({where['threads']} CPU threads)"
    )
    print("each peer: its time over fastattn's (above 1, fastattn is faster), and its own ms in brackets")
    peer_names = [name for name in names if name != OURS]
    header = ["shape", "ms", unit, "% of matmul", *peer_names]
    base_rows = {row["id"]: row for row in base["rows"]} if base else {}
    if base:
        header.append(f"base {str(base['provenance']['commit'])[:9]}")
        if base["provenance"]["device"]["name"] != where["device"]["name"]:
            print(f"the base was measured on another device: {base['provenance']['device']['name']}")
    for which, title in PASSES.items():
        rows = [
            _table_row(row, which, peer_names, factor, base_rows.get(row["id"], {}) if base else None)
            for row in result["rows"]
            if which in row["passes"] or not row["verified"]
        ]
        if rows:
            report.print_table(f"attention, {title}", header, rows)
    _print_remarks(result)


def _table_row(
    row: dict[str, Any], which: str, peer_names: Sequence[str], factor: float, base_row: dict[str, Any] | None
) -> list[str]:
    width = len(peer_names) + (base_row is not None)
    if not row["verified"]:
        return [f"!{row['id']}", "!WRONG", "", "", *[""] * width]
    figures = row["passes"][which]
    ours = figures.get(OURS)
    if ours is None:
        return [row["id"], "!failed", "", "", *[""] * width]
    cells = [row["id"], f"{ours['ms']:.3f}", f"{ours['tflops'] * factor:.1f}", f"{ours['percent_of_matmul']:.0f}"]
    cells += [_ratio(figures[n]["ms"], ours["ms"]) if n in figures else "–" for n in peer_names]
    if base_row is not None:
        old = base_row.get("passes", {}).get(which, {}).get(OURS)
        cells.append(_ratio(old["ms"], ours["ms"]) if old else "–")
    return cells


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}× ({theirs:.3f})"


def _print_remarks(result: dict[str, Any]) -> None:
    report.print_table(
        "host time of one call on tiny tensors",
        ("call", "µs"),
        [(name, f"{microseconds:.1f}") for name, microseconds in result["overhead_us"].items()],
    )
    for row in result["rows"]:
        if not row["verified"]:
            failed = {n: c for n, c in row["checks"].items() if not c["passed"]}
            over = [f"{n} error {c['error']:.1e}, budget {c['budget']:.1e}" for n, c in failed.items()]
            print(f"WRONG, so without numbers: {row['id']}: {row.get('error') or '; '.join(over)}")
    for name, reason in result["absent"].items():
        print(f"absent: {name} ({reason})")
    left_out: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["left_out"].items():
            left_out.setdefault((name, reason), []).append(row["id"])
    for (name, reason), ids in left_out.items():
        print(f"left out: {name} in {len(ids)} rows ({reason}): {', '.join(ids[:3])}{', …' if len(ids) > 3 else ''}")


def plot(result: dict[str, Any], path: Path) -> str | None:
    """Speed over sequence length: forward above backward, a column for each head dim and mask. Returns why there is no plot, or None."""
    peak, where = result["ceilings"]["matmul_tflops"], result["provenance"]
    unit, factor = _unit(peak)
    groups: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["verified"] and row["num_heads"] == row["num_kv_heads"]:
            groups.setdefault((row["head_dim"], row["causal"]), []).append(row)
    panels = []
    for which in ("fwd", "bwd"):
        for (head_dim, causal), rows in groups.items():
            lines: dict[str, list[tuple[int, float]]] = {}
            for row in rows:
                for name, figures in row["passes"].get(which, {}).items():
                    lines.setdefault(name, []).append((row["seqlen"], figures["tflops"] * factor))
            if lines:
                title = f"{PASSES[which]}, D = {head_dim}, {'causal' if causal else 'full'}"
                panels.append(
                    {"title": title, "x": "sequence length", "y": unit, "ceiling": peak * factor, "lines": lines}
                )
    if not panels:
        return "no row to draw"
    name, commit = where["device"]["name"], str(where["commit"])[:9]
    footer = f"{name}, torch {where['torch']}, commit {commit}, {where['date'][:10]}; higher is better"
    dtype = result["rows"][0]["dtype"]
    return report.plot_lines(path, f"attention, {dtype}, {name}", panels, columns=len(groups), footer=footer)
