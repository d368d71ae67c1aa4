"""The file of a run: one JSON for whatever ops it measured, saved row by row, so that a later run can go on from it.

    format       2
    provenance   where the figures come from (provenance.py)
    state        the device before and after: clocks, temperature and power of a GPU, load of a CPU
    ceilings     {dtype: what a large matmul and a large copy reached in this run}
    finished     false of a run that was interrupted
    ops          {op: {absent: {peer: why}, overhead_us: {call: µs}, rows: [...]}}

docs/benchmarks.md says what a row holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = 2
# Rows are told apart from another run's by what could change a figure.
ENVIRONMENT = (
    "commit", "changes", "fastattn", "python", "torch", "triton", "threads", "float32_matmul_precision", "device",
)  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    """The result in a file. OSError where it cannot be read, ValueError where it holds something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT or not isinstance(result.get("ops"), dict):
        raise ValueError(f"{path}: must be the result of `fastattn bench`, of format {FORMAT}")
    return result


def begin(path: Path, provenance: dict[str, Any], keep_finished: bool) -> dict[str, Any]:
    """The result to go on with: that of `path` where it was measured in this environment (a finished one only if `keep_finished`), else a
    new one."""
    new = {"format": FORMAT, "provenance": provenance, "state": {}, "ceilings": {}, "finished": False, "ops": {}}
    try:
        earlier = load(path)
    except (OSError, ValueError):  # nothing to go on from: the file is written anew
        return new
    if environment(earlier) != environment(new) or (earlier["finished"] and not keep_finished):
        return new
    return earlier | {"provenance": provenance, "finished": False}


def environment(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result["provenance"].get(name) for name in ENVIRONMENT}


def covers(row: Mapping[str, Any], modes: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a row that is there already answers for these modes and implementations. A red row does: its code has not changed."""
    if not row["verified"]:
        return True
    return all(mode in row["modes"] and all(n in row["modes"][mode] or n in row["left_out"] for n in names) for mode in modes)


def put(rows: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add a row, or measure one again: modes of the earlier one that the new one lacks stay."""
    for i, old in enumerate(rows):
        if old["id"] == new["id"]:
            rows[i] = new | {"modes": old["modes"] | new["modes"], "work": old["work"] | new["work"]} if new["verified"] else new
            return
    rows.append(new)


def bound_ms(work: Mapping[str, float], ceilings: Mapping[str, float]) -> float:
    """The roofline: no less time than the arithmetic takes at the matmul's rate, nor than the bytes take at the copy's."""
    return max(work["flops"] / ceilings["matmul_tflops"] / 1e9, work["bytes"] / ceilings["copy_gbps"] / 1e6)


def annotate(result: dict[str, Any]) -> None:
    """Each figure as a share of the run's ceiling in its own unit, and of what its op could reach at most under both."""
    for row, mode, figures in each_mode(result):
        ceilings = result["ceilings"].get(row["dtype"])
        if ceilings is None:
            continue
        bound = bound_ms(row["work"][mode], ceilings) if mode in row.get("work", {}) else None
        for figure in figures.values():
            for rate, ceiling in (("tflops", "matmul_tflops"), ("gbps", "copy_gbps")):
                if rate in figure:
                    figure["percent_of_ceiling"] = 100 * figure[rate] / ceilings[ceiling]
            if bound is not None:
                figure["percent_of_roofline"] = 100 * bound / figure["ms"]


def each_row(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for op, entry in result["ops"].items():
        yield from ((op, row) for row in entry["rows"])


def each_mode(result: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, dict[str, Any]]]]:
    """(row, mode, figures by implementation)"""
    for _, row in each_row(result):
        yield from ((row, mode, figures) for mode, figures in row["modes"].items())


def save(result: dict[str, Any], path: Path) -> None:
    """Write the whole file beside itself, then into its place, so that an interruption leaves the old one or the new one."""
    annotate(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
