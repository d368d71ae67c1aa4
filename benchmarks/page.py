"""The report of a run: one HTML page that needs nothing else, drawn from the result's file alone.

    fastattn bench … --html FILE
    python -m fastattn.benchmarks.page RESULT.json REPORT.html

What is on it was measured, or read from the kernel cards of the checkout; the layout is report.html.j2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts, report, results
from .charts import Point
from .provenance import checkout
from .report import grouped_reasons, is_level, ratio_text
from .suite import MODES, OURS, Suite, suite_of

TEMPLATE = Path(__file__).with_name("report.html.j2")
HEAT_FULL = 3.0  # the ratio from which a cell's colour is full
LEVEL = 1.02  # a mean of ratios this near to 1 has no colour
GAPS = 10  # rows listed where a peer is faster
CARDS_PART = "sm90"  # whose cards are listed one by one where the run was on no GPU


def write(result: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result), encoding="utf-8")


def render(result: Mapping[str, Any]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    colours = _colours(result)
    ops = [_op(suite_of(op), result, colours) for op in result["ops"]]
    return template.render(
        where=result["provenance"], ops=ops, overview=_overview(result), gaps=_gaps(result), shown_gaps=GAPS, counts=_counts(result),
        ceilings=_ceilings(result), cards=_cards(result), environment=_environment(result), finished=result["finished"],
        memory_measured=any(op["memory"] for op in ops),
    )  # fmt: skip


def _colours(result: Mapping[str, Any]) -> dict[str, int]:
    """A number for each implementation, 0 for ours: the page's style sheet gives it a colour."""
    names = {OURS: None}
    for _, _, figures in results.each_mode(result):
        names |= dict.fromkeys(figures)
    return {name: i if i == 0 else 1 + (i - 1) % 9 for i, name in enumerate(names)}


# --------------------------------------------------------------------------------------------------------------------
# What stands at the top.


def _counts(result: Mapping[str, Any]) -> dict[str, int]:
    rows = [row for _, row in results.each_row(result)]
    figures = sum(OURS in figures for _, _, figures in results.each_mode(result))
    return {"ops": len(result["ops"]), "rows": len(rows), "wrong": sum(not row["verified"] for row in rows), "figures": figures}


def _ceilings(result: Mapping[str, Any]) -> list[str]:
    texts = []
    for dtype, found in result["ceilings"].items():
        unit, factor = ("TFLOP/s", 1.0) if found["matmul_tflops"] >= 10 else ("GFLOP/s", 1e3)
        texts.append(f"{dtype} matmul {found['matmul_tflops'] * factor:.0f} {unit}, copy {found['copy_gbps']:.0f} GB/s")
    return texts


def _overview(result: Mapping[str, Any]) -> dict[str, Any]:
    """Ops by peers: the geometric mean of the peer's time over ours, over the rows and modes that have both."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for op, row in results.each_row(result):
        for mode, figures in row["modes"].items():
            if mode == "fwd+bwd":  # the other two say it
                continue
            for name, figure in figures.items():
                if name != OURS and "ratio" in figure:
                    ratios.setdefault(op, {}).setdefault(name, []).append(figure["ratio"])
    peers = list(dict.fromkeys(name for of_op in ratios.values() for name in of_op))
    lines = []
    for op, of_op in ratios.items():
        means = {name: math.exp(statistics.fmean(map(math.log, found))) for name, found in of_op.items()}
        cells = [_mean_cell(means[name], len(of_op[name])) if name in means else None for name in peers]
        lines.append({"op": op, "cells": cells})
    return {"peers": peers, "lines": lines}


def _gaps(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where a peer is faster than we are by more than the resolution: the largest first, one peer a row and mode."""
    found = []
    for op, row in results.each_row(result):
        for mode, figures in row["modes"].items():
            faster = [(f["ratio"], name) for name, f in figures.items() if name != OURS and f.get("ratio", 1.0) < 1 and not is_level(f)]
            if faster:
                ratio, name = min(faster)
                found.append({"op": op, "id": row["id"], "mode": mode, "peer": name, "ratio": ratio, "ms": figures[OURS]["ms"]})
    return sorted(found, key=lambda gap: gap["ratio"])


def _mean_cell(mean: float, count: int) -> dict[str, Any]:
    return _heat(mean, f"{mean:.2f}×", f"the geometric mean of {count} figures", level=max(mean, 1 / mean) <= LEVEL)


def _heat(ratio: float, text: str, title: str, level: bool = False) -> dict[str, Any]:
    """A cell of a heat map: how strong its colour is, and which."""
    strength = 0.0 if level else min(1.0, abs(math.log(ratio)) / math.log(HEAT_FULL))
    share = f"{12 + 58 * strength:.0f}%" if strength else "0%"
    return {"text": text, "title": title, "tone": "good" if ratio >= 1 else "bad", "strength": share}


# --------------------------------------------------------------------------------------------------------------------
# One op.


def _op(suite: Suite, result: Mapping[str, Any], colours: Mapping[str, int]) -> dict[str, Any]:
    entry = result["ops"][suite.op]
    rows = entry["rows"]
    names = [name for name in colours if any(name in figures for row in rows for figures in row["modes"].values())]
    ours = [figures[OURS] for row in rows for figures in row["modes"].values() if OURS in figures]
    return {
        "name": suite.op,
        "rows": len(rows),
        "of_ceiling": _median(ours, "percent_of_ceiling"),
        "of_roofline": _median(ours, "percent_of_roofline"),
        "ceiling": suite.ceiling.what,
        "legend": [{"name": name, "colour": colours[name]} for name in names],
        "roofline": _roofline(suite, result, rows),
        "backward": "bwd" in suite.modes,
        "speed": list(_lines(suite, result, colours, suite.ceiling.rate)),
        "memory": list(_lines(suite, result, colours, "peak_bytes")),
        "tables": [_table(suite, result, mode, names) for mode in MODES if any(mode in row["modes"] for row in rows)],
        "wrong": [{"id": row["id"], "why": _why(row)} for row in rows if not row["verified"]],
        "overhead": [
            {"call": call, "us": f"{us:.1f}", "times": f"{us / entry['overhead_us'][report.SMALLEST]:.1f}"}
            for call, us in entry["overhead_us"].items()
        ]
        if report.SMALLEST in entry["overhead_us"]
        else [],
        "absent": entry["absent"],
        "left_out": [(name, reason, len(ids)) for (name, reason), ids in grouped_reasons(rows, "left_out").items()],
    }


def _median(figures: Sequence[Mapping[str, Any]], key: str) -> str | None:
    found = [figure[key] for figure in figures if key in figure]
    return f"{statistics.median(found):.0f} %" if found else None


def _why(row: Mapping[str, Any]) -> str:
    failed = [f"{name}: error {c['error']:.1e}, budget {c['budget']:.1e}" for name, c in row["checks"].items() if not c["passed"]]
    return row.get("error") or "; ".join(failed)


def _roofline(suite: Suite, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Our forward and backward under the roof of their dtype; None where there is no arithmetic, or there are several roofs."""
    dtypes = {row["dtype"] for row in rows} & set(result["ceilings"])
    if len(dtypes) != 1:
        return None
    ceilings = result["ceilings"][dtypes.pop()]
    unit, factor = ("TFLOP/s", 1.0) if ceilings["matmul_tflops"] >= 10 else ("GFLOP/s", 1e3)
    series: dict[str, list[Point]] = {}
    for row in rows:
        for mode in ("fwd", "bwd"):
            figure, work = row["modes"].get(mode, {}).get(OURS), row.get("work", {}).get(mode)
            if figure and work and work["flops"] and work["bytes"]:
                rate = work["flops"] / figure["ms"] / 1e9 * factor
                title = f"{row['id']}, {figure['ms']:.3f} ms, {rate:.3g} {unit}, {figure['percent_of_roofline']:.0f} % of its roofline"
                series.setdefault(MODES[mode], []).append(Point(work["flops"] / work["bytes"], rate, title))
    return charts.roofline(series, ceilings["matmul_tflops"], ceilings["copy_gbps"], unit, factor) if series else None


def _lines(suite: Suite, result: Mapping[str, Any], colours: Mapping[str, int], figure: str) -> Iterator[dict[str, str]]:
    """A chart for each panel of the suite that has more than one size."""
    peaks = [ceilings[suite.ceiling.name] for ceilings in result["ceilings"].values()]
    unit, factor = suite.ceiling.unit(max(peaks, default=0.0))
    memory = figure == "peak_bytes"
    unit, factor = ("MB", 2.0**-20) if memory else (unit, factor)
    for mode in ("fwd", "bwd"):
        for title, found in report.panels(suite, result, mode, figure).items():
            if len({x for points in found.values() for x, _ in points}) < 2:
                continue
            series = {
                name: [Point(x, y * factor, f"{suite.x_label} {charts.number(x)}, {y * factor:.3g} {unit}") for x, y in points]
                for name, points in found.items()
            }
            ceiling = None if memory or len(peaks) != 1 else peaks[0] * factor
            yield {"title": f"{title}, {MODES[mode]}", "svg": charts.lines(series, suite.x_label, unit, colours, ceiling)}


def _table(suite: Suite, result: Mapping[str, Any], mode: str, names: Sequence[str]) -> dict[str, Any]:
    """The rows of one mode, the peers' ratios as a heat map."""
    rows = [row for row in result["ops"][suite.op]["rows"] if OURS in row["modes"].get(mode, {})]
    unit, factor = suite.ceiling.unit(max((c[suite.ceiling.name] for c in result["ceilings"].values()), default=0.0))
    peers = [name for name in names if name != OURS and any(name in row["modes"][mode] for row in rows)]
    optional = ("graph_ms", "peak_bytes", "tokens_per_second")
    graphs, memory, tokens = (any(row["modes"][mode][OURS].get(key) is not None for row in rows) for key in optional)
    lines = []
    for row in rows:
        figures = row["modes"][mode]
        ours = figures[OURS]
        cells = [f"{ours['ms']:.3f}", f"{ours.get('resolution', 0.0):.0%}", f"{ours[suite.ceiling.rate] * factor:.1f}"]
        cells += [f"{ours[share]:.0f}" if share in ours else "–" for share in ("percent_of_ceiling", "percent_of_roofline")]
        cells += [f"{ours['graph_ms']:.3f}" if ours.get("graph_ms") else "–"] if graphs else []
        cells += [f"{ours['peak_bytes'] / 2**20:.0f}"] if memory else []
        cells += [f"{ours['tokens_per_second']:,.0f}"] if tokens else []
        heat = [_peer_cell(name, figures[name]) if name in figures else None for name in peers]
        lines.append({"id": row["id"], "cells": cells, "heat": heat})
    header = ["ms", "±", unit, f"% of {suite.ceiling.what}", "% of roofline"]
    header += ["graph ms"] * graphs + ["peak MB"] * memory + ["tokens/s"] * tokens
    return {"title": MODES[mode], "header": header, "peers": peers, "lines": lines}


def _peer_cell(name: str, figure: Mapping[str, Any]) -> dict[str, Any]:
    title = f"{name}: {figure['ms']:.3f} ms, quartiles {figure['spread_ms']:.3f} ms apart over {figure['rounds']} calls"
    return _heat(figure["ratio"], ratio_text(figure), title, is_level(figure))


# --------------------------------------------------------------------------------------------------------------------
# Kernel cards and the environment.


def _cards(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The golden cards of the checkout's Triton kernels: a line a launcher, and one part's rows; None of an installed package."""
    root = checkout()
    files = sorted(path for path in (root / "tests" / "cards").glob("*.json") if path.stem != "cuda") if root else []
    if not files:
        return None
    capability = result["provenance"]["device"].get("capability")
    part = f"sm{capability.replace('.', '')}" if capability else CARDS_PART
    launchers = []
    for file in files:
        cards = json.loads(file.read_text())
        of_part = [_card(name, card) for name, card in cards.items() if f" {part} " in f" {card['job']} "]
        spilled = [card["stack"] for card in cards.values() if card["stack"]]
        launchers.append({
            "name": file.stem, "rows": len(cards), "registers": max(card["registers"] for card in cards.values()),
            "spilled": len(spilled), "most": max(spilled, default=0), "shared": max(card["shared"] for card in cards.values()) // 1024,
            "mma": ", ".join(sorted({kind for card in cards.values() for kind in card["mma"]})) or "–", "cards": of_part,
        })  # fmt: skip
    return {"part": part, "launchers": launchers}


def _card(name: str, card: Mapping[str, Any]) -> list[str]:
    hot = [card["hot_loop_instructions"], card["hot_loop_mma"], card["hot_loop_ex2"]]
    figures = [card["registers"], card["stack"], card["shared"] // 1024, *("–" if figure is None else figure for figure in hot)]
    return [name, card["config"], *map(str, figures)]


def _environment(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value, one a line; what is absent is left out."""
    where, lines = result["provenance"], []
    for name, value in where.items():
        if isinstance(value, Mapping):
            lines += [(f"{name} {inner}", _text(of_it)) for inner, of_it in value.items() if of_it is not None]
        elif value is not None:
            lines.append((name, str(value)))
    for when, state in result["state"].items():
        lines.append((f"state {when}", _text(state)))
    return lines


def _text(value: Any) -> str:
    return ", ".join(f"{name} {of_it}" for name, of_it in value.items()) if isinstance(value, Mapping) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="page", description="The report of a result of `fastattn bench`.")
    parser.add_argument("result", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args(arguments)
    try:
        result = results.load(options.result)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write(result, options.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
