"""What to measure and tune next, from results: what is wrong, then the largest gaps to a peer, then to the ceiling of the same run.

    python -m fastattn.benchmarks.next benchmarks/results/local [--out next.md]

Markdown, an order of work and no verdict: each line says what was measured, against what, and the command that goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .suite import OURS

NEAR = 80.0  # percent of a ceiling: what reaches it has little left to win
AT_MOST = 12  # lines a section; the rest is counted
# Ops whose tiles are rows of a table; of others, `tune` has nothing to choose.
TUNABLE = (
    "attention", "softmax", "norm", "rotary", "glu", "cross_entropy", "linear_cross_entropy", "sampling", "paged_attention", "grouped_mm",
    "moe", "moe_decode",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One mode of one row: how long we took, what was fastest beside us, and the share of the ceiling we reached."""

    op: str
    row: str
    which: str
    ms: float
    spread_ms: float
    peer: str | None  # the fastest
    peer_ms: float | None
    peer_spread_ms: float
    percent: float | None  # of the ceiling
    ceiling: str

    @property
    def behind(self) -> float:
        """Our time over the fastest peer's."""
        return self.ms / self.peer_ms if self.peer_ms else 0.0

    @property
    def is_behind(self) -> bool:
        """By more than both measurements are wide."""
        return self.peer_ms is not None and self.ms - self.peer_ms > max(self.spread_ms, self.peer_spread_ms)

    @property
    def room(self) -> float:
        """By what factor the ceiling is faster."""
        return 100 / self.percent if self.percent else 0.0


@dataclass
class Results:
    """What there is to order."""

    cells: list[Cell] = field(default_factory=list)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)  # op, row, what
    failed: list[tuple[str, str, str]] = field(default_factory=list)  # op, row, what of ours raised
    ops: list[str] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=dict)  # op → device, date, commit
    absent: dict[str, str] = field(default_factory=dict)  # peer → why


def read(documents: Iterable[dict[str, Any]]) -> Results:
    """Results of benchmark documents, whatever other fields these have. A figure that is not there is None."""
    found = Results()
    for op, entry, where in _ops_of(documents):
        found.ops.append(op)
        device = (where.get("device") or {}).get("name", "an unknown device")
        found.where[op] = f"{device}, {str(where.get('date', 'no date'))[:10]}, commit {str(where.get('commit'))[:9]}"
        found.absent |= entry.get("absent", {})
        for row in entry["rows"]:
            name = row["id"]
            if not row.get("verified", False):
                red = [tensor for tensor, check in row.get("checks", {}).items() if not check.get("passed")]
                found.wrong.append((op, name, row.get("error") or f"outside the error budget: {', '.join(red)}"))
                continue
            if OURS in row.get("left_out", {}):
                found.failed.append((op, name, row["left_out"][OURS]))
            for which, figures in row.get("modes", {}).items():
                if OURS in figures:
                    found.cells.append(_cell(op, name, which, figures))
    return found


def _ops_of(documents: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(op, what has its rows, provenance)"""
    for document in documents:
        yield from ((op, entry, document.get("provenance", {})) for op, entry in document["ops"].items())


def _cell(op: str, name: str, which: str, figures: dict[str, dict[str, Any]]) -> Cell:
    ours = figures[OURS]
    peers = {peer: figure for peer, figure in figures.items() if not peer.startswith(OURS)}
    best = min(peers, key=lambda peer: peers[peer]["ms"], default=None)
    shares = {key.removeprefix("percent_of_"): value for key, value in ours.items() if key.startswith("percent_of_") and value is not None}
    ceiling = "roofline" if "roofline" in shares else next(iter(shares), "")
    return Cell(
        op, name, which, ours["ms"], ours.get("spread_ms", 0.0), best, peers[best]["ms"] if best else None,
        peers[best].get("spread_ms", 0.0) if best else 0.0, shares.get(ceiling), ceiling,
    )  # fmt: skip


def order(results: Results) -> tuple[list[Cell], list[Cell]]:
    """The cells where a peer is faster, the furthest behind first; and of the others those with room, the most first. Of an op's pass, each
    section holds the worst row, as one tile or one kernel is behind them all."""
    behind = sorted((cell for cell in results.cells if cell.is_behind), key=lambda cell: -cell.behind)
    first = _worst_of_each(behind)
    named = {(cell.op, cell.which) for cell in first}
    roomy = (
        cell for cell in results.cells
        if (cell.op, cell.which) not in named and cell.percent is not None and cell.percent < NEAR
    )  # fmt: skip
    return first, _worst_of_each(sorted(roomy, key=lambda cell: -cell.room))


def _worst_of_each(cells: Sequence[Cell]) -> list[Cell]:
    return list({(cell.op, cell.which): cell for cell in reversed(cells)}.values())[::-1]


# --------------------------------------------------------------------------------------------------------------------
# Markdown.


def as_markdown(results: Results, known_ops: Sequence[str] = ()) -> str:
    """The written order. known_ops: all there are, of which those without a result are named."""
    behind, roomy = order(results)
    lines = ["# What to measure and tune next", ""]
    lines += [f"From {len(results.cells)} timed modes of {len(results.ops)} ops:", ""]
    lines += [f"- {op}: {where}" for op, where in results.where.items()]
    lines += ["", "## 1. Wrong, or not run", ""]
    lines += [f"- `{op}` {row}: {what}" for op, row, what in results.wrong + results.failed] or ["Nothing."]
    lines += ["", "## 2. Slower than something that was at hand", ""]
    lines += _table(behind, lambda cell: f"{cell.behind:.2f}× of {cell.peer}") or ["Nothing."]
    lines += ["", "## 3. Ahead of what was at hand, and far from the ceiling", ""]
    lines += _table(roomy, lambda cell: "nothing is faster") or ["Nothing."]
    missing = [op for op in known_ops if op not in results.ops]
    lines += ["", "## 4. Not measured", ""]
    lines += [f"- `{op}`: `fastattn bench {op}`" for op in missing]
    lines += [f"- beside {peer}: {why}" for peer, why in results.absent.items()]
    lines += [] if missing or results.absent else ["Nothing."]
    return "\n".join(lines) + "\n"


def _table(cells: Sequence[Cell], gap: Any) -> list[str]:
    if not cells:
        return []
    lines = ["| | op, pass | worst row | ms | gap | of the ceiling | next |", "|---|---|---|---|---|---|---|"]
    for number, cell in enumerate(cells[:AT_MOST], 1):
        share = "not known" if cell.percent is None else f"{cell.percent:.0f} % of {cell.ceiling}"
        lines.append(f"| {number} | {cell.op}, {cell.which} | {cell.row} | {cell.ms:.3f} | {gap(cell)} | {share} | {_next(cell)} |")
    return lines + ([f"\nand {len(cells) - AT_MOST} more."] if len(cells) > AT_MOST else [])


def _next(cell: Cell) -> str:
    if cell.op in TUNABLE:
        mode = f" --mode {cell.which}" if cell.which in ("fwd", "bwd") else ""
        return f"`fastattn tune {cell.op} --shape '^{cell.row}$'{mode}`"
    return f"`fastattn cards --op {cell.op}`, then a profile" if cell.op != "linear_cross_entropy" else "a profile"


# --------------------------------------------------------------------------------------------------------------------


def documents(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Benchmark results among files and folders. A folder's other JSON is passed over; a file that is named and is none is refused."""
    found = []
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                document = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise SystemExit(f"next: {file} must be a benchmark's result, got {error}") from None
            is_result = isinstance(document, dict) and ("ops" in document or {"op", "rows"} <= document.keys())
            if is_result:
                found.append(document)
            elif not path.is_dir():
                raise SystemExit(f"next: {file} must be a benchmark's result, it has neither ops nor op and rows")
    if not found:
        raise SystemExit(f"next: there must be a benchmark's result in {', '.join(map(str, paths))}, there is none")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    from .suite import OPS

    parser = argparse.ArgumentParser(prog="python -m fastattn.benchmarks.next", description="An order of work, from benchmark results.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="OP.json files, or folders of them")
    parser.add_argument("--out", type=Path, help="write the Markdown there (default: print it)")
    options = parser.parse_args(argv)
    text = as_markdown(read(documents(options.paths)), OPS)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
