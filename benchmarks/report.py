"""What a person sees: tables, a progress bar, a plot. rich and matplotlib where installed, plain text where not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    "flash-attn-4": "#882255", "xformers": "#8C6D31",
}  # fmt: skip


def plot_lines(path: Path, title: str, panels: Sequence[dict[str, Any]], columns: int, footer: str) -> str | None:
    """Write a PNG of small line plots. A panel: title, x label, y label, ceiling, and lines {name: [(x, y), …]}.

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
    legend = {"ncols": min(6, len(names)), "frameon": False, "title": footer, "title_fontsize": 7}
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
        panel["ceiling"], color="#bbbbbb", linestyle="--", linewidth=1, label="large matmul, same run", zorder=1
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
