"""What a person sees in a terminal: tables, a progress bar; and plots as PNG. rich and matplotlib where installed, plain text where not."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .suite import MODES, OURS, Suite

PIPED_WIDTH = 240  # columns of a table that goes to a file or a pipe, where no terminal says how wide it is


def missing(*packages: str) -> list[str]:
    """Those of these optional packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _console(stderr: bool = False) -> Any:
    """A rich console, or None without rich."""
    if missing("rich"):
        return None
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PIPED_WIDTH)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table; its first `left` columns are words, the others figures. A cell that starts with "!" is bad news."""
    print(f"\n{title}")
    console = _console()
    if console is None:
        print(plain_table(header, rows, left))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell[1:], style="bold red") if cell.startswith("!") else Text(cell) for cell in row))
    console.print(table)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    cells = [[cell.removeprefix("!") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        aligned = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def time_left(elapsed: float, done: int, total: int) -> str:
    """As far as the steps that are done tell: rows differ."""
    if not done:
        return ""
    seconds = round(elapsed / done * (total - done))
    return f"about {seconds // 60} min {seconds % 60:02d} s left" if seconds >= 60 else f"about {seconds} s left"


@contextmanager
def progress(title: str, total: int) -> Iterator[Any]:
    """Gives `step(description)`, to be called when each of `total` steps begins."""
    console, begun, start = _console(stderr=True), 0, time.monotonic()
    if console is None or not console.is_terminal:

        def step(description: str) -> None:
            nonlocal begun
            left = time_left(time.monotonic() - start, begun, total)
            begun += 1
            print(f"[{begun}/{total}] {description}{left and ', ' + left}", file=sys.stderr, flush=True)

        yield step
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[title]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[left]}  {task.description}"), console=console) as bar:
        task = bar.add_task("", total=total, title=title, left="")

        def step(description: str) -> None:
            nonlocal begun
            left = time_left(time.monotonic() - start, begun, total)
            bar.update(task, completed=begun, description=description, left=left)
            begun += 1

        yield step
        bar.update(task, completed=total, description="", left="")


# One colour a name in every plot, chosen to stay apart for colour-blind readers; ours is the dark one.
COLOURS = {
    "fastattn": "#111111", "naive": "#999999", "SDPA": "#0072B2", "SDPA flash": "#0072B2", "SDPA cuDNN": "#009E73",
    "SDPA efficient": "#56B4E9", "SDPA math": "#CC79A7", "FlexAttention": "#E69F00", "flash-attn": "#D55E00",
    "flash-attn-4": "#882255", "xformers": "#8C6D31", "torch": "#0072B2", "torch.compile": "#56B4E9",
    "Liger": "#D55E00", "QuACK": "#009E73", "FlashInfer": "#E69F00", "torch batched_mm": "#009E73", "ScatterMoE": "#E69F00",
    "SonicMoE": "#CC79A7", "triton_kernels": "#882255", "flash-attn-3": "#AA4466", "apex": "#CC79A7", "vLLM": "#8C6D31",
    "vLLM Triton": "#8C6D31", "torch varlen_attn": "#44AA99", "naive, compiled": "#DDAA33",
}  # fmt: skip


def plot_lines(path: Path, title: str, panels: Sequence[dict[str, Any]], columns: int, footer: str) -> str | None:
    """Write a PNG of small line plots. A panel: title, x label, y label, ceiling and what it is of,
    and lines {name: [(x, y), …]}.

    Returns None, or why there is no plot.
    """
    if missing("matplotlib", "numpy"):
        return f"{' and '.join(missing('matplotlib', 'numpy'))} not installed"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.5, 3.6 * columns + 0.8), 2.9 * height + 1.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: pyplot, which would pick a window system, is never imported
    grid = figure.subplots(height, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(panels):
            axes.set_visible(False)
            continue
        _draw_panel(axes, panels[i], first_column=i % columns == 0, last_line=i + columns >= len(panels))
    handles = {}
    for axes in grid.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    names, lines = list(handles.keys()), list(handles.values())
    legend = {"ncols": min(6, 3 * columns, len(names)), "frameon": False, "title": footer, "title_fontsize": 7}
    figure.legend(lines, names, loc="outside lower center", **legend)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.savefig(path)
    return None


def _draw_panel(axes: Any, panel: dict[str, Any], first_column: bool, last_line: bool) -> None:
    ticks = sorted({x for points in panel["lines"].values() for x, _ in points})
    for name, points in panel["lines"].items():
        ours = name == "fastattn"
        axes.plot(
            *zip(*points), label=name, color=COLOURS.get(name), marker="o", markersize=5 if ours else 3.5,
            linewidth=2.4 if ours else 1.4, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.axhline(
        panel["ceiling"], color="#bbbbbb", linestyle="--", linewidth=1, label=f"large {panel['what']}, same run", zorder=1
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * max(panel["ceiling"], *(y for points in panel["lines"].values() for _, y in points)))
    axes.set_title(panel["title"], fontsize=10)
    if first_column:
        axes.set_ylabel(panel["y"])
    if last_line:
        axes.set_xlabel(panel["x"])
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


# --------------------------------------------------------------------------------------------------------------------
# A benchmark's result.

SMALLEST = "torch.ops.aten.add"  # a call of torch's that does next to nothing: what others' host time is measured in


def print_op(suite: Suite, result: Mapping[str, Any], names: Sequence[str]) -> None:
    """The tables of one op, and what there is to say about them."""
    entry, where = result["ops"][suite.op], result["provenance"]
    print(f"\n{suite.op}: fastattn {where['fastattn']} (commit {where['commit']}) on {where['device']['name']}, torch {where['torch']}")
    for dtype, ceilings in result["ceilings"].items():
        flops, factor = ("TFLOP/s", 1.0) if ceilings["matmul_tflops"] >= 10 else ("GFLOP/s", 1e3)
        rates = f"matmul {ceilings['matmul_tflops'] * factor:.0f} {flops}, copy {ceilings['copy_gbps']:.0f} GB/s"
        print(f"ceilings of this run in {dtype}: {rates} ({where['threads']} CPU threads)")
    print("each peer: its time over fastattn's (above 1, fastattn is faster; ≈: within the resolution), and its ms in brackets")
    peers = [name for name in names if name != OURS]
    for mode, title in MODES.items():
        rows = [row for row in entry["rows"] if mode in row["modes"] or (not row["verified"] and mode in suite.modes)]
        if rows:
            header, cells = _table(suite, result["ceilings"], rows, mode, peers)
            print_table(f"{suite.op}, {title}", header, cells)
    _print_remarks(entry)


# What stands beside a peer-independent figure only where some row has it: header, and the cell of our figure.
_OPTIONAL = {
    "tokens_per_second": ("tokens/s", lambda ours, others: f"{ours['tokens_per_second']:,.0f}"),
    "graph_ms": ("graph ms", lambda ours, others: f"{ours['graph_ms']:.3f}" if ours["graph_ms"] else "–"),
    "peak_bytes": ("peak MB", lambda ours, others: _peaks(ours, others)),
}


def _table(
    suite: Suite, ceilings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], mode: str, peers: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    peak = max((c[suite.ceiling.name] for c in ceilings.values()), default=0.0)
    unit, factor = suite.ceiling.unit(peak)
    measured = [figures[OURS] for row in rows if OURS in (figures := row["modes"].get(mode, {}))]
    optional = [name for name in _OPTIONAL if any(figure.get(name) is not None for figure in measured)]
    header = ["shape", "ms", "±", unit, f"% of {suite.ceiling.what}", "% of roofline"]
    header += [*(_OPTIONAL[name][0] for name in optional), *peers]
    cells = []
    for row in rows:
        figures = row["modes"].get(mode, {})
        ours = figures.get(OURS)
        if ours is None:
            verdict = "failed" if row["verified"] else "WRONG"
            cells.append([f"!{row['id']}", f"!{verdict}", *[""] * (len(header) - 2)])
            continue
        line = [row["id"], f"{ours['ms']:.3f}", f"{ours['resolution']:.0%}", f"{ours[suite.ceiling.rate] * factor:.1f}"]
        line += [f"{ours[share]:.0f}" for share in ("percent_of_ceiling", "percent_of_roofline")]
        line += [_OPTIONAL[name][1](ours, [figures[n] for n in peers if n in figures]) for name in optional]
        cells.append([*line, *(f"{ratio_text(figures[n])} ({figures[n]['ms']:.3f})" if n in figures else "–" for n in peers)])
    return header, cells


def ratio_text(figure: Mapping[str, Any]) -> str:
    """A peer's time over ours; ≈ where it may be 1."""
    return "≈" if is_level(figure) else f"{figure['ratio']:.2f}×"


def is_level(figure: Mapping[str, Any]) -> bool:
    """Whether a peer's ratio lies within the resolution of the measurement."""
    return max(figure["ratio"], 1 / figure["ratio"]) - 1 <= figure["resolution"]


def _peaks(ours: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Ours, and the least of the peers': what a call allocates at most beyond its inputs."""
    peers = [figure["peak_bytes"] for figure in others]
    least = f" (peers ≥ {min(peers) / 2**20:.0f})" if peers else ""
    return f"{ours['peak_bytes'] / 2**20:.0f}{least}"


def _print_remarks(entry: Mapping[str, Any]) -> None:
    print_table(
        "host time of one call on tiny tensors",
        ("call", "µs", "× aten.add"),
        [(name, f"{us:.1f}", f"{us / entry['overhead_us'][SMALLEST]:.1f}") for name, us in entry["overhead_us"].items()],
    )
    for row in entry["rows"]:
        if not row["verified"]:
            failed = {n: c for n, c in row["checks"].items() if not c["passed"]}
            over = [f"{n} error {c['error']:.1e}, budget {c['budget']:.1e}" for n, c in failed.items()]
            print(f"WRONG, so without numbers: {row['id']}: {row.get('error') or '; '.join(over)}")
    for name, reason in entry["absent"].items():
        print(f"absent: {name} ({reason})")
    for what, key in (("left out", "left_out"), ("not captured as a CUDA graph", "not_captured")):
        for (name, reason), ids in grouped_reasons(entry["rows"], key).items():
            print(f"{what}: {name} in {len(ids)} rows ({reason}): {', '.join(ids[:3])}{', …' if len(ids) > 3 else ''}")


def grouped_reasons(rows: Sequence[Mapping[str, Any]], key: str) -> dict[tuple[str, str], list[str]]:
    """{(name, reason): row ids}"""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.get(key, {}).items():
            found.setdefault((name, reason), []).append(row["id"])
    return found


def panels(suite: Suite, result: Mapping[str, Any], mode: str, figure: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{panel's title: {implementation: [(x, figure), …]}} of one mode, by the suite's panels; what lacks the figure is left out."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in result["ops"][suite.op]["rows"]:
        if not row["verified"] or (place := suite.panel(row)) is None:
            continue
        title, x = place
        for name, figures in row["modes"].get(mode, {}).items():
            if figures.get(figure) is not None:
                found.setdefault(title, {}).setdefault(name, []).append((x, figures[figure]))
    return {title: {name: sorted(points) for name, points in lines.items()} for title, lines in found.items()}


def plot(suite: Suite, result: Mapping[str, Any], path: Path) -> str | None:
    """Speed over size: forward above backward, a column for each panel of the suite. Returns why there is no plot, or None."""
    where, dtype = result["provenance"], result["ops"][suite.op]["rows"][0]["dtype"]
    peak = result["ceilings"][dtype][suite.ceiling.name]
    unit, factor = suite.ceiling.unit(peak)
    drawn, columns = [], 1
    for mode in ("fwd", "bwd"):
        of_mode = panels(suite, result, mode, suite.ceiling.rate)
        columns = max(columns, len(of_mode))
        for title, lines in of_mode.items():
            scaled = {name: [(x, y * factor) for x, y in points] for name, points in lines.items()}
            drawn.append({
                "title": f"{MODES[mode]}, {title}", "x": suite.x_label, "y": unit, "ceiling": peak * factor,
                "what": suite.ceiling.what, "lines": scaled,
            })  # fmt: skip
    if not drawn:
        return "no row to draw"
    name, commit = where["device"]["name"], str(where["commit"])[:9]
    footer = f"{name}, torch {where['torch']}, commit {commit}, {where['date'][:10]}; higher is better"
    return plot_lines(path, f"{suite.op}, {dtype}, {name}", drawn, columns=columns, footer=footer)
