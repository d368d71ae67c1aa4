"""README's table of what has been measured, and the plots beside the results, from benchmarks/results/<device>/*.json.

    make readme        or  python -m fastattn.benchmarks.readme
    … --check          fails where README.md says something else than the results do

Everything between the two markers is written here, and nothing else is touched.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import report, results
from .provenance import checkout
from .suite import MODES, OPS, OURS, suite_of

BEGIN, END = "<!-- benchmarks: written by `make readme` -->", "<!-- end of benchmarks -->"
IN_FULL = ("attention",)  # ops whose every row README has; the others are a line each
OF_OTHERS = ("cuda_host_time.json", "page_pool.json")  # that `fastattn bench` did not write


def generate(root: Path) -> str:
    """What stands between the markers."""
    found = [(path.relative_to(root), results.load(path)) for path in result_files(root)]
    folders = dict.fromkeys(path.parent for path, _ in found)
    parts = [part for folder in folders for part in _of_device([(p, r) for p, r in found if p.parent == folder])]
    on_gpu = {op for _, result in found if result["provenance"]["device"]["type"] == "cuda" for op in result["ops"]}
    missing = [op for op in OPS if op not in on_gpu]
    parts.append(f"Not yet run on a GPU: {', '.join(missing)}." if missing else "Every op has run on a GPU.")
    return "\n\n".join(parts)


def result_files(root: Path) -> list[Path]:
    """Of every device but `local`, which is not committed."""
    paths = sorted((root / "benchmarks" / "results").glob("*/*.json"))
    return [path for path in paths if path.parent.name != "local" and path.name not in OF_OTHERS]


def _of_device(found: Sequence[tuple[Path, Mapping[str, Any]]]) -> Iterator[str]:
    """The tables of one folder's files."""
    where = found[0][1]["provenance"]
    cores = f", {where['threads']} threads" if where["device"]["type"] == "cpu" else ""
    yield f"**{where['device']['name']}{cores}**, torch {where['torch']}"
    lines = []
    for path, result in found:
        for op in result["ops"]:
            rows = result["ops"][op]["rows"]
            if op not in IN_FULL:
                lines += [[*line, _measured(path, result)] for line in _summary(op, rows)]
                continue
            yield f"{op}, {_measured(path, result)}:"
            yield _full_table(rows)
            if (plot := path.with_name(f"{op}.png")) in _plots(path, result):
                yield f"![Speed of {op} over its sizes]({plot})"
    if lines:
        yield _markdown(["op", "mode", "shapes", "of the roofline, median", "peers' time / ours, geometric mean", "measured"], lines)


def _measured(path: Path, result: Mapping[str, Any]) -> str:
    return f"[{result['provenance']['date'][:10]}, {str(result['provenance']['commit'])[:9]}]({path})"


def _full_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Forward, and forward and backward together or else the backward, of every row, beside what most rows have."""
    rows = [row for row in rows if row["verified"]]
    modes = [mode for mode in ("fwd", "fwd+bwd", "bwd") if any(mode in row["modes"] for row in rows)][:2]
    counts: dict[str, int] = {}
    for row in rows:
        for name in row["modes"].get(modes[0], {}):
            counts[name] = counts.get(name, 0) + 1
    peers = [name for name, count in counts.items() if name != OURS and 2 * count > len(rows)]
    header = ["shape"] + [cell for mode in modes for cell in (f"{MODES[mode]} ms", *(f"{name} / ours" for name in peers))]
    lines = []
    for row in rows:
        cells = [f"`{row['id']}`"]
        for mode in modes:
            figures = row["modes"].get(mode, {})
            cells.append(f"{figures[OURS]['ms']:.3g}" if OURS in figures else "–")
            cells += [report.ratio_text(figures[name]) if OURS in figures and name in figures else "–" for name in peers]
        lines.append(cells)
    return _markdown(header, lines)


def _summary(op: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """A line a mode: the geometric mean of each peer's time over ours, and how much of the roofline ours reaches."""
    for mode in ("fwd", "bwd"):
        of_mode = [row["modes"][mode] for row in rows if OURS in row["modes"].get(mode, {})]
        if not of_mode:
            continue
        names = dict.fromkeys(name for figures in of_mode for name in figures if name != OURS)
        ratios = {name: [figures[name]["ratio"] for figures in of_mode if name in figures] for name in names}
        means = [f"{name} {math.exp(statistics.fmean(map(math.log, found))):.2f}×" for name, found in ratios.items()]
        shares = [figures[OURS]["percent_of_roofline"] for figures in of_mode if "percent_of_roofline" in figures[OURS]]
        yield [op, MODES[mode], str(len(of_mode)), _share(shares), ", ".join(means) or "–"]


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def _plots(path: Path, result: Mapping[str, Any]) -> list[Path]:
    """Where the plots of a result lie: of ops that have a line over two sizes or more."""
    def has_line(op: str) -> bool:
        suite = suite_of(op)
        found = (report.panels(suite, result, mode, suite.ceiling.rate) for mode in ("fwd", "bwd"))
        return any(len(points) > 1 for of_mode in found for lines in of_mode.values() for points in lines.values())

    return [path.with_name(f"{op}.png") for op in result["ops"] if has_line(op)]


def _share(shares: Sequence[float]) -> str:
    """The median; – where there is none, or more than all: of a mode whose work another mode has done."""
    median = statistics.median(shares) if shares else math.inf
    return f"{median:.0f} %" if median <= 100 else "–"


def replaced(text: str, generated: str) -> str:
    """The page with what stands between its markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: must have the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="readme", description="Write what has been measured into README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where README.md differs")
    options = parser.parse_args(arguments)
    root = checkout()
    if root is None:
        parser.error("must run from a checkout")
    page = root / "README.md"
    text = page.read_text(encoding="utf-8")
    new = replaced(text, generate(root))
    if options.check:
        print("README.md is what the results say" if text == new else "README.md differs from the results: run `make readme`")
        return int(text != new)
    page.write_text(new, encoding="utf-8")
    for path in result_files(root):
        result = results.load(path)
        for plot in _plots(path, result):
            why = report.plot(suite_of(plot.stem), result, plot)
            print(f"no plot {plot.relative_to(root)}: {why}" if why else f"plot {plot.relative_to(root)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
