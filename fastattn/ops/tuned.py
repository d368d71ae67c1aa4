"""Tiles of a user's own: rows that `fastattn tune` measured on this machine's GPU, in place of those of the shipped tables.

FASTATTN_TUNE_DIR is a folder with a file a kind of GPU, `NVIDIA-H200-sm90.jsonl`. Its first line says what it is for, others are rows:

    {"gpu": "NVIDIA H200", "capability": "9.0"}
    {"table": "attention", "row": ["attention_fwd", "sm90", "half", 128], "tile": {"BLOCK_M": 128, ...}, "receipt": {"ms": 1.2, ...}}

It is read before the first kernel runs on a GPU, not at import. What it says is done, or refused by file and line: rows of tables that this
version does not have, and tiles that are none. Where the variable is not set, there is no code of this in a call's way.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .dispatch import TUNE_DIR, log

if TYPE_CHECKING:
    from fastattn.kernels.tile_table import TileTable

VARIABLE = "FASTATTN_TUNE_DIR"


class Gpu(NamedTuple):
    """What a file is for."""

    name: str
    capability: tuple[int, int]


class TunedRow(NamedTuple):
    """One line of a file: a row of a table, the tile that stands in for the shipped one, and how it came about."""

    table: str
    key: tuple[Any, ...]
    tile: Any
    receipt: dict[str, Any]


def tables() -> dict[str, TileTable]:
    """The tile tables by the names that files have for them."""
    from fastattn.kernels.grouped_tiles import GROUPED_TILES
    from fastattn.kernels.paged_tiles import PAGED_TILES
    from fastattn.kernels.row_tiles import ROW_TILES
    from fastattn.kernels.tiles import TILES

    return {"attention": TILES, "rows": ROW_TILES, "paged": PAGED_TILES, "grouped": GROUPED_TILES}


def file_of(folder: Path, gpu: Gpu) -> Path:
    """Where the rows of a kind of GPU are kept."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-")
    return folder / f"{name}-sm{gpu.capability[0]}{gpu.capability[1]}.jsonl"


# --------------------------------------------------------------------------------------------------------------------
# Files.


def read(file: Path, gpu: Gpu) -> list[TunedRow]:
    """The rows of a file. Raises: ValueError, by file and line, for whatever is not as above or not for this GPU."""
    lines = file.read_text(encoding="utf-8").splitlines()
    rows: list[TunedRow] = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            if number == 1:
                _check_header(found, gpu)
            else:
                rows.append(_row(found))
        except ValueError as error:  # JSON's own is one
            raise ValueError(f"{VARIABLE}: {file}:{number}: {error}") from None
    if not lines:
        raise ValueError(f"{VARIABLE}: {file}:1: the first line must say what the file is for, there is none")
    twice = {row[:2] for row in rows if sum(row[:2] == other[:2] for other in rows) > 1}
    if twice:
        raise ValueError(f"{VARIABLE}: {file}: a row must be there once, got {sorted(map(str, twice))[0]} twice")
    return rows


def write(file: Path, gpu: Gpu, rows: Iterable[TunedRow]) -> None:
    """Add rows to a file, in place of its rows of the same keys; makes the file and its folder."""
    known = {row[:2]: row for row in (read(file, gpu) if file.exists() else [])} | {row[:2]: row for row in rows}
    lines = [{"gpu": gpu.name, "capability": "{}.{}".format(*gpu.capability)}]
    lines += [
        {"table": row.table, "row": list(row.key), "tile": dataclasses.asdict(row.tile), "receipt": row.receipt}
        for _, row in sorted(known.items(), key=str)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _check_header(found: Any, gpu: Gpu) -> None:
    wanted = {"gpu": gpu.name, "capability": "{}.{}".format(*gpu.capability)}
    got = {name: found.get(name) for name in wanted} if isinstance(found, dict) else found
    if got != wanted:
        raise ValueError(f"the first line must have {json.dumps(wanted)}, got {json.dumps(got)}")


def _row(found: Any) -> TunedRow:
    if not isinstance(found, dict) or not {"table", "row", "tile"} <= found.keys() <= {"table", "row", "tile", "receipt"}:
        raise ValueError(f"a line must have table, row and tile, and may have a receipt, got {json.dumps(found)[:100]}")
    known = tables()
    if found["table"] not in known:
        raise ValueError(f"table must be one of {', '.join(known)}, got {found['table']!r}")
    table = known[found["table"]]
    key = tuple(found["row"]) if isinstance(found["row"], list) else found["row"]
    if not isinstance(key, tuple) or any(isinstance(part, (list, dict)) for part in key) or key not in table:
        raise ValueError(f"row must be one of the {found['table']} table's of this version, got {json.dumps(found['row'])}")
    return TunedRow(found["table"], key, tile_of(table, key, found["tile"]), found.get("receipt", {}))


def tile_of(table: TileTable, key: tuple[Any, ...], values: Any) -> Any:
    """A tile of a table from a dict of all its fields. Raises: ValueError for what cannot be one."""
    shipped = dataclasses.asdict(table[key])
    if not isinstance(values, dict) or values.keys() != shipped.keys():
        raise ValueError(f"tile must have {', '.join(shipped)}, got {json.dumps(values)[:100]}")
    for name, value in values.items():
        if type(value) is not type(shipped[name]):
            raise ValueError(f"tile: {name} must be of type {type(shipped[name]).__name__}, got {value!r}")
        if type(value) is int and (value < 1 or (name != "num_stages" and name not in ("resident", "GROUP_M") and value & (value - 1))):
            kind = "at least 1" if name in ("num_stages", "resident", "GROUP_M") else "a power of two"
            raise ValueError(f"tile: {name} must be {kind}, got {value}")
    if values.get("num_warps", 1) > 32:
        raise ValueError(f"tile: num_warps must be at most 32, got {values['num_warps']}")
    if values.get("long") != shipped.get("long"):
        raise ValueError(f"tile: long must be the shipped row's {shipped['long']}: it names another kernel")
    return table.tile(**values)


# --------------------------------------------------------------------------------------------------------------------
# Into the tables.


def install(rows: Sequence[TunedRow]) -> None:
    """Let rows stand in for shipped ones, in place of all that were installed before."""
    for name, table in tables().items():
        table.install({row.key: row.tile for row in rows if row.table == name})


def visible_gpus() -> list[Gpu]:
    """Of each kind that torch sees, one."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return list(dict.fromkeys(Gpu(gpu.name, (gpu.major, gpu.minor)) for gpu in found))


def install_from(folder: Path) -> Path | None:
    """Install this machine's rows from a folder; the file they come from, None where it has none for this kind of GPU.

    Raises: ValueError for a folder that is none, for a file that is wrong (`read`), and where GPUs of more than one kind are visible and
    there is a file for one of them: a table is one for the process.
    """
    if not folder.is_dir():
        raise ValueError(f"{VARIABLE} must be a folder, got {str(folder)!r}")
    gpus = visible_gpus()
    files = {gpu: file for gpu in gpus if (file := file_of(folder, gpu)).exists()}
    if not files:
        return None
    if len(gpus) > 1:
        kinds = ", ".join(gpu.name for gpu in gpus)
        raise ValueError(f"{VARIABLE}: the visible GPUs must be of one kind, got {kinds}: choose by CUDA_VISIBLE_DEVICES")
    ((gpu, file),) = files.items()
    rows = read(file, gpu)
    install(rows)
    log.info("%s: %d rows of tiles from %s", VARIABLE, len(rows), file)
    return file


def before(implementation: Callable) -> Callable:
    """An operator's implementation for CUDA tensors, before whose first call the user's tiles are installed; itself where the variable is
    not set."""
    if TUNE_DIR is None:
        return implementation

    @functools.wraps(implementation)
    def on_cuda(*args: Any) -> Any:
        _install_once()
        return implementation(*args)

    return on_cuda


@functools.cache  # not of what raises, which each call does again
def _install_once() -> None:
    install_from(Path(TUNE_DIR))
