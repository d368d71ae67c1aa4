"""`fastattn bench`: which rows to run, one after the other, into one file that an interruption leaves whole."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastattn.command_line import INTERRUPTED, device, regex

from . import compare, page, report, results
from .provenance import checkout, device_state, provenance
from .suite import DTYPES, MODES, OPS, OURS, SUITES, Builder, Shape, Suite, run_shape, suite_of
from .timing import Clock, host_microseconds, measure_ceilings


def _base(text: str) -> dict[str, Any]:
    """The result of an earlier run, as an argument's type."""
    try:
        return results.load(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file to read, got {text!r}: {error.strerror}") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help=f"all, or some of {', '.join(OPS)} (default: all)")
    add("--suite", choices=SUITES, default=None, help="which shapes (default: full on cuda, quick on cpu)")
    add("--shape", type=regex, metavar="REGEX", default="", help="rows to run, e.g. 'S1024.*causal'")
    add("--peers", type=regex, metavar="REGEX", default="", help="implementations beside fastattn, e.g. 'naive|SDPA'")
    add("--mode", choices=MODES, default=None, help="default: all three; of the quick suite, the first two")
    add("--dtype", choices=DTYPES, default=None, help="default: bf16 on cuda, fp32 on cpu")
    add("--device", type=device, default=None, help="cuda where there is one, else cpu; or name it")
    add("--json", type=Path, metavar="FILE", help="the result; rows that it has of this commit and machine are not measured again")
    add("--html", type=Path, metavar="FILE", help="the report (default: beside the result)")
    add("--base", type=_base, metavar="FILE", help="an older result to compare with")
    add("--fail-if-slower", action="store_true", help="exit with 1 where something is slower than in the base")


def run(options: argparse.Namespace) -> int:
    """Run the benchmarks asked for; 0 where every check held and every mode ran, 1 where one did not (a row whose check failed carries no
    numbers) or, if asked for, where something got slower; 130 after an interruption, with what was measured in the file."""
    ops = list(OPS) if options.ops in ([], ["all"]) else options.ops
    if unknown := [op for op in ops if op not in OPS]:
        raise SystemExit(f"fastattn bench: OP must be all or some of {', '.join(OPS)}, got {unknown[0]!r}")
    if options.fail_if_slower and options.base is None:
        raise SystemExit("fastattn bench: --fail-if-slower must come with --base")
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    jobs = _jobs(ops, device, dtype, options)
    path = options.json or _default_folder() / "bench.json"
    html = options.html or path.with_suffix(".html")
    _check_outputs(path, html)
    result = results.begin(path, provenance(device), keep_finished=options.json is not None)
    result["finished"] = _measure(jobs, dtype, Clock(device, seconds=0.08 if device.type == "cpu" else 0.15), result, path)
    results.save(result, path)
    page.write(result, html)

    selected = {job.suite.op: job for job in jobs}
    for op, job in selected.items():
        if op in result["ops"]:
            report.print_op(job.suite, result, job.names)
    print(f"\nfigures: {path}\nreport:  {html}")
    slower = compare.print_changes(options.base, result) if options.base else []
    if not result["finished"]:
        print("interrupted: the same command goes on from here")
        return INTERRUPTED
    whole = all(_is_whole(row, job.modes) for op, job in selected.items() for row in result["ops"][op]["rows"])
    return 1 if not whole or (slower and options.fail_if_slower) else 0


def _check_outputs(path: Path, html: Path) -> None:
    """Before anything is measured: files that can be written, and of which nobody misses what they hold."""
    if path.resolve() == html.resolve():
        raise SystemExit(f"fastattn bench: --html must be another file than --json, got {html} for both")
    for name, file in (("--json", path), ("--html", html)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new = not file.exists()
            with open(file, "a"):
                pass
            if new:
                file.unlink()
        except OSError as error:
            raise SystemExit(f"fastattn bench: {name} must be a file to write, got {file}: {error.strerror}") from None
    if path.exists() and path.stat().st_size:
        try:
            results.load(path)
        except ValueError as error:
            raise SystemExit(f"fastattn bench: --json would overwrite what is no result of this command: {error}") from None


class Job:
    """The rows of one op that a run is to have."""

    def __init__(self, suite: Suite, shapes: Sequence[Shape], modes: Sequence[str], device: torch.device, peers: re.Pattern[str]) -> None:
        self.suite, self.shapes, self.modes = suite, shapes, modes
        present, self.absent = suite.peers(device)
        self.builders: dict[str, Builder] = {name: b for name, b in present.items() if name == OURS or peers.search(name)}

    @property
    def names(self) -> list[str]:
        return list(self.builders)


def _jobs(ops: Sequence[str], device: torch.device, dtype: str, options: argparse.Namespace) -> list[Job]:
    preset = options.suite or ("full" if device.type == "cuda" else "quick")
    peers, wanted = options.peers or re.compile(""), options.shape or re.compile("")
    jobs, ids = [], []
    for op in ops:
        suite = suite_of(op)
        shapes = suite.presets.get((device.type, preset), ())
        ids += [shape.id(dtype) for shape in shapes]
        shapes = [shape for shape in shapes if wanted.search(shape.id(dtype))]
        default = suite.modes if preset != "quick" else [mode for mode in suite.modes if mode != "fwd+bwd"]  # which is about their sum
        modes = [mode for mode in suite.modes if mode == options.mode] if options.mode else default
        if shapes and modes:
            jobs.append(Job(suite, shapes, modes, device, peers))
    if not jobs and options.shape and not any(wanted.search(id) for id in ids):
        raise SystemExit(f"fastattn bench: --shape {wanted.pattern!r} must match a row, these are:\n  " + "\n  ".join(ids))
    if not jobs:
        asked = f"--mode {options.mode}" if ids else f"--suite {preset}"
        raise SystemExit(f"fastattn bench: {asked} must be one that one of the ops has, none of {', '.join(ops)} does")
    return jobs


def _measure(jobs: Sequence[Job], dtype: str, clock: Clock, result: dict[str, Any], path: Path) -> bool:
    """Measure into `result` what it lacks, saved at each row; False where Ctrl-C ended that."""
    missing = {job: [s for s in job.shapes if not _has(result, job, s.id(dtype))] for job in jobs}
    rows = sum(map(len, missing.values()))
    if kept := sum(len(job.shapes) for job in jobs) - rows:
        print(f"{kept} rows are in {path} already, of this commit on this machine: delete it to measure them again")
    if not rows:
        return True
    todo = {job: shapes for job, shapes in missing.items() if shapes}
    try:
        with report.progress("bench", rows + len(todo) + 2) as step:
            step("ceilings: a large matmul, a large copy")
            result["state"].setdefault("before", device_state(clock.device))
            _raise_ceilings(result, dtype, clock)
            for job, shapes in todo.items():
                step(f"{job.suite.op}: host time of a call")
                entry = _entry(result, job, dtype, clock)
                for shape in shapes:
                    step(f"{job.suite.op} {shape.id(dtype)}")
                    results.put(entry["rows"], run_shape(job.suite, shape, dtype, job.builders, clock, job.modes))
                    results.save(result, path)
            step("ceilings again: the better of both ends counts")
            _raise_ceilings(result, dtype, clock)
            result["state"]["after"] = device_state(clock.device)
    except KeyboardInterrupt:
        return False
    return True


def _has(result: dict[str, Any], job: Job, id: str) -> bool:
    rows = result["ops"].get(job.suite.op, {"rows": []})["rows"]
    return any(row["id"] == id and results.covers(row, job.modes, job.names) for row in rows)


def _entry(result: dict[str, Any], job: Job, dtype: str, clock: Clock) -> dict[str, Any]:
    """The op's place in the result, with the host time of a call in it."""
    entry = result["ops"].setdefault(job.suite.op, {"absent": {}, "overhead_us": {}, "rows": []})
    entry["absent"] = job.absent
    if not entry["overhead_us"]:
        one = torch.ones(1, device=clock.device)
        calls = {report.SMALLEST: lambda: torch.ops.aten.add(one, one), **job.suite.overhead(clock.device, DTYPES[dtype])}
        entry["overhead_us"] = {name: host_microseconds(call, clock.device) for name, call in calls.items()}
    return entry


def _raise_ceilings(result: dict[str, Any], dtype: str, clock: Clock) -> None:
    """The best of all measurements of a run is what the machine can do."""
    found, before = measure_ceilings(clock, DTYPES[dtype]), result["ceilings"].get(dtype, {})
    result["ceilings"][dtype] = {name: max(value, before.get(name, value)) for name, value in found.items()}


def _is_whole(row: dict[str, Any], modes: Sequence[str]) -> bool:
    return row["verified"] and all(OURS in row["modes"].get(mode, {OURS}) for mode in modes)


def _default_folder() -> Path:
    root = checkout()
    return Path("fastattn-bench") if root is None else root / "benchmarks" / "results" / "local"
