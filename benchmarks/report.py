"""What a person sees: tables, a progress bar, a plot. rich and matplotlib where installed, plain text where not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .suite import Suite

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


@contextmanager
def progress(title: str, total: int) -> Iterator[Any]:
    """Gives `step(description)`, to be called when each of `total` steps begins."""
    console = _console(stderr=True)
    if console is None or not console.is_terminal:
        done = 0

        def step(description: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{total}] {description}", file=sys.stderr, flush=True)

        yield step
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[title]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=total, title=title)
        begun = 0

        def step(description: str) -> None:
            nonlocal begun
            bar.update(task, completed=begun, description=description)
            begun += 1

        yield step
        bar.update(task, completed=total, description="")


# One colour a name in every plot, chosen to stay apart for colour-blind readers; ours is the dark one.
COLOURS = {
    "fastattn": "#111111", "naive": "#999999", "SDPA": "#0072B2", "SDPA flash": "#0072B2", "SDPA cuDNN": "#009E73",
    "SDPA efficient": "#56B4E9", "SDPA math": "#CC79A7", "FlexAttention": "#E69F00", "flash-attn": "#D55E00",
    "flash-attn-4": "#882255", "xformers": "#8C6D31", "torch": "#0072B2", "torch.compile": "#56B4E9",
    "Liger": "#D55E00", "QuACK": "#009E73", "FlashInfer": "#E69F00", "torch batched_mm": "#009E73", "ScatterMoE": "#E69F00",
    "SonicMoE": "#CC79A7", "triton_kernels": "#882255",
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

OURS = "fastattn"
SMALLEST = "torch.ops.aten.add"  # a call of torch's that does next to nothing: what others' host time is measured in
TITLES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}


def print_result(suite: Suite, result: dict[str, Any], names: Sequence[str], base: dict[str, Any] | None) -> None:
    """The tables of one benchmark, and what there is to say about them."""
    ceilings, where = result["ceilings"], result["provenance"]
    flops, factor = ("TFLOP/s", 1.0) if ceilings["matmul_tflops"] >= 10 else ("GFLOP/s", 1e3)
    print(
        f"\nfastattn {where['fastattn']} (commit {where['commit']}) on {where['device']['name']}, torch {where['torch']}"
    )
    print(
        f"ceilings of this run: matmul {ceilings['matmul_tflops'] * factor:.0f} {flops}, copy {ceilings['copy_gbps']:.0f} GB/s "
        f"({where['threads']} CPU threads)"
    )
    print("each peer: its time over fastattn's (above 1, fastattn is faster), and its own ms in brackets")
    peer_names = [name for name in names if name != OURS]
    unit, _ = suite.ceiling.unit(ceilings[suite.ceiling.name])
    header = ["shape", "ms", unit, f"% of {suite.ceiling.what}", *peer_names]
    has_peaks = any(f["peak_bytes"] for row in result["rows"] for figures in row["passes"].values() for f in figures.values())
    header += ["peak MB"] if has_peaks else []
    base_rows = {row["id"]: row for row in base["rows"]} if base else {}
    if base:
        header.append(f"base {str(base['provenance']['commit'])[:9]}")
        if base["provenance"]["device"]["name"] != where["device"]["name"]:
            print(f"the base was measured on another device: {base['provenance']['device']['name']}")
    for which, title in TITLES.items():
        rows = [
            _table_row(suite, result, row, which, peer_names, has_peaks, base_rows.get(row["id"], {}) if base else None)
            for row in result["rows"]
            if which in row["passes"] or (not row["verified"] and which in suite.passes)
        ]
        if rows:
            print_table(f"{suite.op}, {title}", header, rows)
    _print_remarks(result)


def _table_row(
    suite: Suite, result: dict[str, Any], row: dict[str, Any], which: str, peer_names: Sequence[str], has_peaks: bool,
    base_row: dict[str, Any] | None,
) -> list[str]:  # fmt: skip
    width = len(peer_names) + has_peaks + (base_row is not None)
    if not row["verified"]:
        return [f"!{row['id']}", "!WRONG", "", "", *[""] * width]
    figures = row["passes"][which]
    ours = figures.get(OURS)
    if ours is None:
        return [row["id"], "!failed", "", "", *[""] * width]
    _, factor = suite.ceiling.unit(result["ceilings"][suite.ceiling.name])
    rate, percent = ours[suite.ceiling.rate] * factor, ours[f"percent_of_{suite.ceiling.what}"]
    cells = [row["id"], f"{ours['ms']:.3f}", f"{rate:.1f}", f"{percent:.0f}"]
    cells += [_ratio(figures[n]["ms"], ours["ms"]) if n in figures else "–" for n in peer_names]
    if has_peaks:
        cells.append(_peaks(figures, peer_names))
    if base_row is not None:
        old = base_row.get("passes", {}).get(which, {}).get(OURS)
        cells.append(_ratio(old["ms"], ours["ms"]) if old else "–")
    return cells


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}× ({theirs:.3f})"


def _peaks(figures: dict[str, Any], peer_names: Sequence[str]) -> str:
    """Ours, and the least of the peers': what a call allocates at most beyond its inputs."""
    peers = [figures[n]["peak_bytes"] for n in peer_names if n in figures]
    least = f" (peers ≥ {min(peers) / 2**20:.0f})" if peers else ""
    return f"{figures[OURS]['peak_bytes'] / 2**20:.0f}{least}"


def _print_remarks(result: dict[str, Any]) -> None:
    print_table(
        "host time of one call on tiny tensors",
        ("call", "µs", "× aten.add"),
        [(name, f"{us:.1f}", f"{us / result['overhead_us'][SMALLEST]:.1f}") for name, us in result["overhead_us"].items()],
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


def plot(suite: Suite, result: dict[str, Any], path: Path) -> str | None:
    """Speed over size: forward above backward, a column for each panel of the suite. Returns why there is no plot, or None."""
    peak, where = result["ceilings"][suite.ceiling.name], result["provenance"]
    unit, factor = suite.ceiling.unit(peak)
    groups: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in result["rows"]:
        if row["verified"] and (place := suite.panel(row)) is not None:
            groups.setdefault(place[0], []).append((place[1], row))
    panels = []
    for which in ("fwd", "bwd"):
        for title, rows in groups.items():
            lines: dict[str, list[tuple[float, float]]] = {}
            for x, row in rows:
                for name, figures in row["passes"].get(which, {}).items():
                    lines.setdefault(name, []).append((x, figures[suite.ceiling.rate] * factor))
            if lines:
                panels.append(
                    {
                        "title": f"{TITLES[which]}, {title}", "x": suite.x_label, "y": unit, "ceiling": peak * factor,
                        "what": suite.ceiling.what, "lines": lines,
                    }
                )  # fmt: skip
    if not panels:
        return "no row to draw"
    name, commit = where["device"]["name"], str(where["commit"])[:9]
    footer = f"{name}, torch {where['torch']}, commit {commit}, {where['date'][:10]}; higher is better"
    dtype = result["rows"][0]["dtype"]
    return plot_lines(path, f"{suite.op}, {dtype}, {name}", panels, columns=len(groups), footer=footer)
