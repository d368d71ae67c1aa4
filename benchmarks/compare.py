"""What got slower between two results, beyond what noise explains.

    fastattn bench --base OLD.json                            measures, then compares
    python -m fastattn.benchmarks.compare OLD.json NEW.json   compares two files

A row's time counts as changed where it differs by more than three standard errors of both medians, by more than either run's second timing
of the same code differed from its first, and by more than the machine itself did: the ceilings that the two runs measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report, results
from .suite import OURS
from .timing import resolution

STANDARD_ERRORS = 3.0  # a hundred comparisons of unchanged code are expected to name none


@dataclass(frozen=True)
class Change:
    """One figure of ours in both results. ratio: the new time over the old one."""

    op: str
    id: str
    mode: str
    old_ms: float
    new_ms: float
    resolution: float

    @property
    def ratio(self) -> float:
        return self.new_ms / self.old_ms

    @property
    def verdict(self) -> str:
        """"slower", "faster", or "≈" within the resolution."""
        if max(self.ratio, 1 / self.ratio) - 1 <= self.resolution:
            return "≈"
        return "slower" if self.ratio > 1 else "faster"


def compare(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Our figures that both results have, in the new one's order."""
    old_rows = {(op, row["id"]): row for op, row in results.each_row(base)}
    return [
        change
        for op, row in results.each_row(new)
        if (op, row["id"]) in old_rows
        for change in _of_row(op, old_rows[op, row["id"]], row, drift(base, new, row["dtype"]))
    ]


def drift(base: Mapping[str, Any], new: Mapping[str, Any], dtype: str) -> float:
    """How far the machine differs from itself: the larger change of the two ceilings, as a share."""
    old, now = (result["ceilings"].get(dtype) for result in (base, new))
    if old is None or now is None:
        return 0.0
    return max(max(old[name] / now[name], now[name] / old[name]) - 1 for name in ("matmul_tflops", "copy_gbps"))


def _of_row(op: str, old: Mapping[str, Any], new: Mapping[str, Any], drifted: float) -> Iterator[Change]:
    for mode, figures in new["modes"].items():
        before, now = old["modes"].get(mode, {}).get(OURS), figures.get(OURS)
        if before and now:
            repeated = max(before.get("resolution", 0.0), now.get("resolution", 0.0), drifted)
            yield Change(op, new["id"], mode, before["ms"], now["ms"], resolution(before, now, repeated, STANDARD_ERRORS))


def print_changes(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Say what changed; returns what got slower."""
    changes = compare(base, new)
    where, there = new["provenance"], base["provenance"]
    print(f"\nbase: commit {str(there['commit'])[:9]}, {there['date'][:10]}, {there['device']['name']}")
    if there["device"]["name"] != where["device"]["name"]:
        print(f"the base was measured on another device: {there['device']['name']}, not {where['device']['name']}")
    told = sorted((c for c in changes if c.verdict != "≈"), key=lambda c: -c.ratio)
    rows = [
        [f"{c.op} {c.id}", c.mode, f"{'!' if c.verdict == 'slower' else ''}{c.verdict}", f"{c.old_ms:.3f}", f"{c.new_ms:.3f}",
         f"{c.ratio:.2f}×", f"±{c.resolution:.0%}"]
        for c in told
    ]  # fmt: skip
    if rows:
        report.print_table("against the base", ("shape", "mode", "", "base ms", "ms", "ms / base", "resolution"), rows, left=3)
    slower = [c for c in told if c.verdict == "slower"]
    print(f"{len(changes)} figures in both: {len(slower)} slower, {len(told) - len(slower)} faster, the rest within the resolution")
    return slower


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare", description="What got slower between two results of `fastattn bench`.")
    parser.add_argument("base", type=Path, help="the older result")
    parser.add_argument("new", type=Path)
    parser.add_argument("--fail-if-slower", action="store_true", help="exit with 1 where something got slower")
    options = parser.parse_args(arguments)
    try:
        base, new = results.load(options.base), results.load(options.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    slower = print_changes(base, new)
    return 1 if slower and options.fail_if_slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
