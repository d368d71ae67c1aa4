"""How long the page pool keeps the host: the C++ one and the Python one, side by side.

    python -m fastattn.benchmarks.bench_page_pool [--sequences 10000] [--pages 1000] [--out FOLDER]

It measures no tensors and needs no suite: every call is checked by tests/test_page_pool.py, and what it costs is host time. A row says
what one call does; the memcpy, of the page table's bytes as they lie, is what a full rebuild is held against.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastattn import page_pool

from .provenance import provenance
from .report import print_table

PAGE_SIZE = 100  # one token a sequence, their lengths spread evenly: every step one sequence in a hundred takes a page
POOLS = {"C++": page_pool.PagePool if page_pool.COMPILED else None, "Python": page_pool.PythonPagePool}


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of `rounds` calls."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def full_pool(pool_class: type, sequences: int, pages: int) -> tuple[Any, torch.Tensor]:
    """A pool of sequences of about `pages` pages, and their ids; room for each to grow by one page and for a hundred more."""
    pool = pool_class(sequences * (pages + 1) + 100 * pages, PAGE_SIZE)
    ids = torch.tensor([pool.allocate() for _ in range(sequences)])
    for i, id in enumerate(ids.tolist()):
        pool.extend(id, (pages - 1) * PAGE_SIZE + i % PAGE_SIZE)
    return pool, ids


def measure(pool_class: type, sequences: int, pages: int, rounds: int) -> Iterator[tuple[str, float]]:
    pool, ids = full_pool(pool_class, sequences, pages)
    as_array = memoryview(ids.numpy())
    pool.step(as_array, 0)  # the arrays take their size
    yield "decode step, 1 % of the rows take a page", milliseconds(lambda: pool.step(as_array, 1), rounds)

    orders = [memoryview(ids.roll(turn).numpy()) for turn in range(1, rounds + 1)]
    remaining = iter(orders)
    yield "full rebuild, every row another sequence", milliseconds(lambda: pool.step(next(remaining), 0), rounds)

    prompt = torch.randint(1 << 17, (pages * PAGE_SIZE,)).tolist()
    first = pool.allocate(prompt)
    pool.extend(first, prompt)
    pool.commit()
    started: list[int] = []
    yield f"allocate, a prefix of {pages - 1} pages found", milliseconds(lambda: started.append(pool.allocate(prompt)), rounds)
    yield f"fork of {pages} pages", milliseconds(lambda: started.append(pool.fork(first)), rounds)
    ending = iter(started)
    yield f"free of {pages} pages", milliseconds(lambda: pool.free(next(ending)), rounds)


def memcpy(sequences: int, pages: int, rounds: int) -> float:
    source = torch.zeros(sequences, pages, dtype=torch.int32)
    target = torch.empty_like(source).copy_(source)  # its memory is there
    return milliseconds(lambda: target.copy_(source), rounds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_page_pool", description="Host time of the page pools.")
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--pages", type=int, default=1_000, help="pages of each sequence")
    parser.add_argument("--out", type=Path, default=None, help="folder for page_pool.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # of the memcpy: a pool has one, too

    size = (options.sequences, options.pages)
    copy = memcpy(*size, rounds=30)
    found: dict[str, dict[str, float]] = {}
    for name, pool_class in POOLS.items():
        if pool_class is None:
            print("no C++ page pool here: it is built where pybind11 and a C++17 compiler are")
            continue
        for call, ms in measure(pool_class, *size, rounds=50 if name == "C++" else 3):
            found.setdefault(call, {})[name] = ms
    rows = [[call, *(f"{ms[name]:.3f}" if name in ms else "" for name in POOLS)] for call, ms in found.items()]
    rows.append(["memcpy of the page table", f"{copy:.3f}", f"{copy:.3f}"])
    title = f"page pool, {size[0]} sequences of {size[1]} pages: ms a call"
    print_table(title, ("call", *POOLS), rows)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"provenance": provenance(torch.device("cpu")), "sequences": size[0], "pages": size[1], "memcpy_ms": copy, "ms": found}
        (options.out / "page_pool.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
