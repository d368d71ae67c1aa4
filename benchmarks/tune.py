"""`fastattn tune OP`: measure tiles around those of the tables on this GPU, print rows for the tables, and keep them for this machine.

    fastattn tune attention --suite quick             print what would be better, with its receipts
    fastattn tune attention --write                    and write it to FASTATTN_TUNE_DIR, where the next process finds it

For each row that the op's benchmark shapes ask for, its neighbours (tiles that differ in a field or two) are compiled for this part. Those
that spill more than the row's own tile, or break a rule of its kernel cards, are dropped. The others run the shapes, each checked against
the reference first, then timed in turn with the present tile, cold, median. The fastest over all the row's shapes is proposed where it wins
by more than the spread of the measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastattn.command_line import regex
from fastattn.ops import tuned

from . import report, suite
from .provenance import provenance
from .timing import Clock, Work, describe_error

LEAST_GAIN = 0.01  # below which a change of tile is not worth a line, whatever the spread

Key = tuple[Any, ...]
# name → milliseconds, spread; for what raised: name → why
Measure = Callable[[Mapping[str, Work]], tuple[dict[str, tuple[float, float]], dict[str, str]]]


# --------------------------------------------------------------------------------------------------------------------
# Candidates.

# What may change, by steps: factors of sizes and warps, differences of counts; and the bounds of what comes out.
STEPS: dict[str, tuple[tuple[float, ...], str]] = {
    "ROWS": ((0.5, 2), "factor"),
    "BLOCK": ((0.5, 2), "factor"),
    "BLOCK_M": ((0.5, 2), "factor"),
    "BLOCK_N": ((0.5, 2), "factor"),
    "BLOCK_K": ((0.5, 2), "factor"),
    "num_warps": ((0.5, 2), "factor"),
    "num_stages": ((-1, 1), "difference"),
    "resident": ((-1, 1), "difference"),
}
BOUNDS = {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256), "BLOCK_K": (16, 128), "num_warps": (1, 16), "num_stages": (1, 6), "resident": (1, 8)}
MOST_ELEMENTS = 256  # a thread, of a tile of rows


def candidates(tile: Any, reach: int = 2) -> list[Any]:
    """Tiles that differ from this one in at most `reach` fields, by one step each; this one first.

    A row tile's BLOCK changes only where a row is walked in blocks: elsewhere it holds the row.
    """
    fields = [f.name for f in dataclasses.fields(tile) if f.name in STEPS]
    if getattr(tile, "long", True) is False:
        fields.remove("BLOCK")
    found = {tile: None}
    for count in range(1, reach + 1):
        for names in itertools.combinations(fields, count):
            for values in itertools.product(*(_neighbours(name, getattr(tile, name)) for name in names)):
                candidate = dataclasses.replace(tile, **dict(zip(names, values)))
                if _is_sane(candidate):
                    found[candidate] = None
    return list(found)


def _neighbours(name: str, value: int) -> list[int]:
    steps, kind = STEPS[name]
    low, high = BOUNDS.get(name, (1, 1 << 16))
    moved = [int(value * step) if kind == "factor" else int(value + step) for step in steps]
    return [v for v in moved if low <= v <= high]


def _is_sane(tile: Any) -> bool:
    rows = getattr(tile, "ROWS", None)
    return rows is None or 1 <= rows * tile.BLOCK / (32 * tile.num_warps) <= MOST_ELEMENTS


@dataclass(frozen=True)
class Row:
    """A row of a tile table: its table's name, its key."""

    table: str
    key: Key

    def __str__(self) -> str:
        return " ".join(map(str, self.key))


@contextmanager
def installed(row: Row, tile: Any) -> Iterator[None]:
    """This tile in the row's place, and what was there before afterwards."""
    table = tuned.tables()[row.table]
    before = dict(table.installed)
    table.install(before | {row.key: tile})
    try:
        yield
    finally:
        table.install(before)


def asked_by(call: Callable[[], Any]) -> list[Row]:
    """The rows that the launches of a call pick their tiles from."""
    tables = tuned.tables()
    for table in tables.values():
        table.asked = set()
    try:
        call()
        return [Row(name, key) for name, table in tables.items() for key in sorted(table.asked, key=str)]
    finally:
        for table in tables.values():
            table.asked = None


# --------------------------------------------------------------------------------------------------------------------
# What the compiler says of them.


def job_of(row: Row, part: str):
    """The kernel cards' job that compiles this row for a part; None where there is none."""
    from fastattn.testing.families import families

    for family in families().values():
        for job in family.jobs():
            if job.part == part and row in asked_by(partial(family.tiles, job)):
                return job
    return None


def compile_tile(row: Row, tile: Any, job: Any) -> dict[str, dict[str, Any]] | str:
    """The cards of a tile in this row's place; or what the part refuses, in words."""
    from triton.runtime.errors import OutOfResources

    from fastattn.testing import cards

    try:
        with installed(row, tile):
            return cards.compile_cards(job)
    except OutOfResources as error:
        return describe_error(error)


def prune(row: Row, tiles: Sequence[Any], job: Any) -> tuple[list[Any], dict[Any, str]]:
    """The tiles that are worth a run, the first (the present one) always; and of the others, why they are not."""
    from fastattn.testing import cards

    present, *others = tiles
    own = compile_tile(row, present, job)
    if isinstance(own, str):
        raise RuntimeError(f"tune: the present tile of {row} does not compile: {own}")
    known = {what.partition(": ")[2] for name, card in own.items() for what in cards.violations(name, card)}
    kept, dropped = [present], {}
    for tile in others:
        found = compile_tile(row, tile, job)
        if isinstance(found, str):
            dropped[tile] = found
            continue
        spills = sum(card["stack"] for card in found.values()) - sum(card["stack"] for card in own.values())
        broken = [what.partition(": ")[2] for name, card in found.items() for what in cards.violations(name, card)]
        reasons = [f"spills {spills} bytes more"] if spills > 0 else [what for what in broken if what not in known]
        if reasons:
            dropped[tile] = reasons[0]
        else:
            kept.append(tile)
    return kept, dropped


# --------------------------------------------------------------------------------------------------------------------
# Runs.


@dataclass(frozen=True)
class Case:
    """One pass of one benchmark shape: what to time; and verify(), which raises where a result is wrong."""

    name: str
    work: Work
    verify: Callable[[], None]


@dataclass
class Result:
    """What came out for one row: of each tile that ran, its time over the present one's (geometric mean of the cases)."""

    row: Row
    present: Any
    ratios: dict[Any, float] = field(default_factory=dict)
    times: dict[Any, dict[str, tuple[float, float]]] = field(default_factory=dict)  # tile → case → ms, spread
    dropped: dict[Any, str] = field(default_factory=dict)

    @property
    def best(self) -> Any:
        return min(self.ratios, key=lambda tile: self.ratios[tile])

    @property
    def resolution(self) -> float:
        """The spread of the present tile's times, as a share of them: the largest of the cases."""
        return max((spread / ms for ms, spread in self.times[self.present].values()), default=0.0)

    @property
    def is_better(self) -> bool:
        return self.best != self.present and 1 - self.ratios[self.best] > max(LEAST_GAIN, self.resolution)


def measure_row(row: Row, kept: Sequence[Any], dropped: dict[Any, str], cases: Iterable[Case], measure: Measure) -> Result:
    """Run every tile on every case, one case after the other. A tile that raises or whose result is wrong is dropped, with what it said."""
    result = Result(row, kept[0], dropped=dict(dropped), times={tile: {} for tile in kept})
    for case in cases:
        works = {}
        for tile in kept:
            if tile in result.dropped:
                continue
            try:
                with installed(row, tile):
                    case.verify()
                works[str(tile)] = _with_tile(row, tile, case.work)
            except Exception as error:  # a tile's own fault: the others still run
                if tile == result.present:
                    raise
                result.dropped[tile] = describe_error(error)
        times, failures = measure(works)
        for tile in kept:
            if str(tile) in times:
                result.times[tile][case.name] = times[str(tile)]
            elif str(tile) in failures and tile not in result.dropped:
                result.dropped[tile] = failures[str(tile)]
    present = result.times[result.present]
    for tile in kept:
        if tile not in result.dropped:
            logs = [math.log(result.times[tile][name][0] / ms) for name, (ms, _) in present.items()]
            result.ratios[tile] = math.exp(sum(logs) / len(logs))
    return result


def _with_tile(row: Row, tile: Any, work: Work) -> Work:
    def run(argument: Any) -> Any:
        with installed(row, tile):
            return work.run(argument)

    return Work(run, work.prepare)


def cases_of(found: suite.Suite, shape: Any, dtype: torch.dtype, device: torch.device, modes: Sequence[str]) -> list[Case]:
    """The modes of one shape, as the benchmark runs and checks them."""
    inputs, upstream = found.draw(shape, dtype, device)
    builder = found.peers(device)[0][suite.OURS]
    references = tuple(found.reference(shape, inputs, upstream, wanted) for wanted in (dtype, torch.float64))

    def verify() -> None:
        suite.checked_forward(found, shape, suite.OURS, builder, inputs, upstream, references)

    works = suite.works(builder(shape), inputs, upstream)
    name = shape.id(next(name for name, known in suite.DTYPES.items() if known == dtype))
    return [Case(f"{name} {which}", works[which], verify) for which in modes if which != "fwd+bwd"]


def clock_measure(clock: Clock) -> Measure:
    def measure(works: Mapping[str, Work]) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
        times, failures = clock.measure(dict(works))
        return {name: (time.ms, time.spread_ms) for name, time in times.items()}, failures

    return measure


# --------------------------------------------------------------------------------------------------------------------
# What is printed and kept.


def receipt(result: Result, where: dict[str, Any]) -> dict[str, Any]:
    """How the proposed tile came about, as a line of the user's file holds it."""
    device = where["device"]
    present, best = result.times[result.present], result.times[result.best]
    return {
        "faster_by": round(1 / result.ratios[result.best], 4),
        "resolution": round(result.resolution, 4),
        "cases": {
            case: {"ms": best[case][0], "spread_ms": best[case][1], "present_ms": present[case][0]} for case in best
        },
        "instead_of": dataclasses.asdict(result.present),
        "gpu": device["name"],
        **{name: (device.get("nvidia_smi") or {}).get(name) for name in ("driver_version", "clocks.sm", "clocks.mem", "power.limit")},
        **{name: where[name] for name in ("torch", "triton", "date", "commit")},
    }


def as_source(row: Row, tile: Any, note: str) -> str:
    """A line for the table in kernels/, with its receipt behind it."""
    fields = dataclasses.fields(tile)
    sizes = [str(getattr(tile, f.name)) for f in fields if f.default is dataclasses.MISSING]
    others = [(f.name, getattr(tile, f.name)) for f in fields if f.default not in (dataclasses.MISSING, getattr(tile, f.name))]
    arguments = ", ".join(sizes + [f"{name}={value}" for name, value in others])
    key = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in row.key)
    return f"    ({key}): {type(tile).__name__}({arguments}),  # {note}"


def show(result: Result, where: dict[str, Any]) -> None:
    """Print what was measured of a row, and the row to write where another tile is better."""
    ranked = sorted(result.ratios, key=lambda tile: result.ratios[tile])
    rows = []
    for tile in ranked:
        ms = " ".join(f"{ms:.3f}±{spread:.3f}" for ms, spread in result.times[tile].values())
        mark = " (present)" if tile == result.present else ""
        rows.append([_short(tile) + mark, f"{result.ratios[tile]:.3f}", ms])
    report.print_table(f"{result.row}: {len(ranked)} tiles ran", ("tile", "time / present", "ms a case"), rows)
    for tile, reason in result.dropped.items():
        print(f"  not run: {_short(tile)}: {reason}")
    if not result.is_better:
        print(f"  keeps its tile: nothing is faster by more than {max(LEAST_GAIN, result.resolution):.1%}")
        return
    gain, now = 1 / result.ratios[result.best], where["date"][:10]
    note = f"{gain:.2f}x of {_short(result.present)} on {where['device']['name']}, {now}, commit {str(where['commit'])[:9]}"
    print(as_source(result.row, result.best, note))


def _short(tile: Any) -> str:
    return ", ".join(f"{f.name}={getattr(tile, f.name)}" for f in dataclasses.fields(tile) if getattr(tile, f.name) is not False)


# --------------------------------------------------------------------------------------------------------------------
# The command.


def tune(
    found: suite.Suite, shapes: Sequence[Any], dtype: torch.dtype, device: torch.device, part: str, *, modes: Sequence[str],
    measure: Measure, wanted: Callable[[Row], bool] = lambda row: True, reach: int = 2,
    cases_of: Callable[..., list[Case]] = cases_of,
) -> Iterator[Result]:  # fmt: skip
    """Each row's result, as it comes. Of the shapes' tensors, one shape's are there at a time."""

    users: dict[Row, dict[Any, set[str]]] = {}  # row → shape → cases
    for shape in shapes:
        for case in cases_of(found, shape, dtype, device, modes):
            for row in filter(wanted, asked_by(case.work.once)):
                users.setdefault(row, {}).setdefault(shape, set()).add(case.name)
    tables = tuned.tables()
    for row, used in users.items():
        tiles = candidates(tables[row.table].pick(*row.key), reach)
        job = job_of(row, part)
        kept, dropped = prune(row, tiles, job) if job is not None else (tiles, {})
        cases = (
            case for shape, names in used.items() for case in cases_of(found, shape, dtype, device, modes) if case.name in names
        )  # fmt: skip
        yield measure_row(row, kept, dropped, cases, measure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastattn tune", description="Measure an op's tiles around the table's on this GPU.")
    parser.add_argument("op", choices=suite.OPS)
    parser.add_argument("--suite", choices=("tiny", "quick", "full"), default="quick", help="the benchmark's (default: quick)")
    parser.add_argument("--shape", type=regex, default="", metavar="REGEX", help="shapes, by their benchmark's names")
    parser.add_argument("--rows", type=regex, default="", metavar="REGEX", help="rows, e.g. 'attention_fwd .* 128'")
    parser.add_argument("--mode", choices=("fwd", "bwd"), nargs="+", default=["fwd", "bwd"])
    parser.add_argument("--dtype", choices=suite.DTYPES, default="bf16")
    parser.add_argument("--reach", type=int, choices=(1, 2, 3), default=2, help="how many fields may differ at once (default: 2)")
    parser.add_argument("--seconds", type=float, default=0.15, help="to time one tile on one shape")
    parser.add_argument("--write", action="store_true", help=f"write what is better to {tuned.VARIABLE}")
    options = parser.parse_args(argv)
    folder = os.environ.get(tuned.VARIABLE)
    if options.write and not folder:
        parser.error(f"--write needs {tuned.VARIABLE}, the folder to write to")
    if not torch.cuda.is_available():
        print("fastattn tune: needs a CUDA device, torch sees none", file=sys.stderr)
        return 1
    if options.write:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return _run(options, torch.device("cuda", torch.cuda.current_device()), Path(folder) if options.write else None)


def _run(options: argparse.Namespace, device: torch.device, folder: Path | None) -> int:
    from fastattn.kernels.launch import target_of
    from fastattn.kernels.tiles import part_of

    found = suite.suite_of(options.op)
    shapes = [s for s in found.presets["cuda", options.suite] if options.shape.search(s.id(options.dtype))]
    modes = [which for which in options.mode if which in found.modes]
    target = target_of(torch.empty(0, device=device))
    where = provenance(device)
    gpu = tuned.Gpu(where["device"]["name"], target.capability)
    results = []
    for result in tune(
        found, shapes, suite.DTYPES[options.dtype], device, part_of(*target), modes=modes,
        measure=clock_measure(Clock(device, options.seconds)), wanted=lambda row: bool(options.rows.search(str(row))), reach=options.reach,
    ):  # fmt: skip
        results.append(result)
        show(result, where)
        if folder is not None and result.is_better:  # at each row: a run that is cut short leaves what it has
            keep(folder, gpu, result, where)
    better = sum(result.is_better for result in results)
    print(f"{len(results)} rows, {better} better with another tile" + (f": {tuned.file_of(folder, gpu)}" if folder and better else ""))
    return 0


def keep(folder: Path, gpu: tuned.Gpu, result: Result, where: dict[str, Any]) -> Path:
    """Write a row's better tile to the user's file; the file."""
    file = tuned.file_of(folder, gpu)
    tuned.write(file, gpu, [tuned.TunedRow(result.row.table, result.row.key, result.best, receipt(result, where))])
    return file
