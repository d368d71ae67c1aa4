"""What a training run writes about itself: a CSV file, a TensorBoard log, a plot of the loss; and the figures of a step."""

from __future__ import annotations

import csv
import importlib.util
import io
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .files import write_atomically

COLUMNS = (
    "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gib", "validation_loss", "validation_perplexity",
)  # fmt: skip

# Dense bfloat16 TFLOP/s, by a part of the device's name; from the vendor's data sheets.
PEAKS = {"A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "L40S": 362, "L4": 121, "RTX 4090": 165}


class TrainingLog:
    """log.csv, one row a step, with an event file of TensorBoard beside it; and loss.png.

    folder: where. last_step: rows of later steps, of a run that was stopped after its last checkpoint, are dropped.

    Attributes: absent: what is not written, and for want of which package.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self.folder, self.path = folder, folder / "log.csv"
        rows = [row for row in read_log(self.path) if row["step"] <= last_step]
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
        write_atomically(self.path, content.getvalue().encode())
        self._file = open(self.path, "a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        wanted = {"the TensorBoard log": "tensorboard", "loss.png": "matplotlib"}
        self.absent = {what: package for what, package in wanted.items() if importlib.util.find_spec(package) is None}
        self._board = None
        if "the TensorBoard log" not in self.absent:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1 if last_step else None)

    def write(self, row: dict[str, Any]) -> None:
        """A step's row, by the names of `COLUMNS`; those that it lacks stay empty."""
        self._writer.writerow(row)
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name not in ("step", "tokens") and value is not None:
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def plot(self) -> None:
        """Draw loss.png of all rows, where there is matplotlib."""
        rows = read_log(self.path)
        if "loss.png" in self.absent or not rows:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)  # draws into memory, whatever window system there is
        axes = figure.subplots()
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training", color="#0072B2", linewidth=1)
        validated = [row for row in rows if row["validation_loss"] is not None]
        if validated:
            points = [row["step"] for row in validated], [row["validation_loss"] for row in validated]
            axes.plot(*points, label="validation", color="#D55E00", marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="loss (nats a token)", title=self.folder.name)
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        write_atomically(self.folder / "loss.png", lambda path: figure.savefig(path, format="png"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.csv, numbers or None; a last one that was not written to its end is left out. None of a file that is not there."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    text = path.read_text(encoding="utf-8")
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        numbers = {name: float(value) if value else None for name, value in row.items() if name in COLUMNS}
        rows.append(numbers | {name: int(numbers[name]) for name in ("step", "tokens")})
    return rows


def progress_line(row: dict[str, Any], steps: int) -> str:
    mfu = "" if row.get("mfu") is None else f"  MFU {100 * row['mfu']:.1f} %"
    line = f"step {row['step']:>{len(str(steps))}}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  |gradient| {row['grad_norm']:.2f}"
    line += f"  {row['tokens_per_second']:,.0f} tokens/s{mfu}  {row['memory_gib']:.2f} GiB"
    if row.get("validation_loss") is not None:
        line += f"  validation loss {row['validation_loss']:.4f}, perplexity {row['validation_perplexity']:.2f}"
    return line


def peak_memory_gib(device: torch.device) -> float:
    """The most that was allocated on the GPU; of a process on the CPU, the most that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**30 if sys.platform == "darwin" else 2**20)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(floating-point operations a second that model FLOPs utilisation is a share of, what they are).

    A GPU of the table: its data sheet's, in bfloat16. Any other device: of a matrix product, measured here.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part in sorted(PEAKS, key=len, reverse=True):
            if part in name:
                return PEAKS[part] * 1e12, f"{PEAKS[part]} TFLOP/s, {name}'s in bfloat16 by its data sheet"
    size = 4096 if device.type == "cuda" else 768
    x = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    flops = 2 * size**3 / best
    return flops, f"{flops / 1e9:,.0f} GFLOP/s, a product of {size}² matrices measured here"
