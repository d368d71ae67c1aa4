"""Kernel cards as people and programs read them: golden cards with the occupancy and the bound that follow from their figures.

One object a kernel, for `fastattn cards --json` (docs/cards.md describes each field) and for the printed table. Nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from . import cuda_cards
from .cards import family_of, job_of
from .families import Card, Job, families
from .parts import PARTS, Counts, bound, occupancy

DTYPES = {"half": "bf16", "single": "fp32"}
HEAD_DIM_OPS = ("append_paged_kv", "attention", "merge_attention", "paged_attention", "rotary")  # whose size is a head dim
LONGEST = 1 << 31  # a row's size where it stands for any
# What a set of flags compiles in, where its name does not say it; nothing for NO_FLAGS.
OPTIONS = {
    ("attention", "all"): ("varlen", "gqa", "window", "softcap", "alibi", "bias", "sinks", "dropout"),
    ("paged_attention", "decode_all"): ("decode", "varlen", "gather", "window", "softcap", "alibi", "sinks"),
    ("paged_attention", "prefill_all"): ("prefill", "varlen", "gather", "window", "softcap", "alibi", "sinks"),
}
NO_FLAGS = ("plain", "aligned")


def entry(name: str, card: Card, is_stale: bool) -> dict[str, Any]:
    """One golden card as an object."""
    job = job_of(card)
    op = next(op for op, family in families().items() if family is family_of(job.launcher))
    flags = OPTIONS.get((op, job.flags), () if job.flags in NO_FLAGS else (job.flags,))
    counts = Counts(**card["loop"]) if "loop" in card else None
    warps = counts.warps if counts else _warps(card["config"])
    overlap = card["overlap"]
    return {
        "op": op,
        "name": name,
        "arch": job.part.replace("sm", "sm_"),
        "head_dim": job.size if op in HEAD_DIM_OPS else None,
        "size": None if job.size == LONGEST else job.size,
        "dtype": DTYPES.get(job.dtype_class, job.dtype_class),
        "flags": list(flags),
        "config": card["config"],
        "registers": card["registers"],
        "spills": card["stack"],
        "spills_in_loop": card["hot_loop_local"],
        "shared": card["shared"],
        "warps": warps,
        "occupancy": asdict(occupancy(PARTS[job.part], card["registers"], card["shared"], warps)) if warps else None,
        "loop": counts.as_json() if counts else None,
        "ex2_under_pv": None if overlap is None else round(overlap * card["hot_loop_ex2"]),
        "bound": asdict(bound(counts, PARTS[job.part], peak_of(op, job, counts), overlap or 0.0)) if counts else None,
        "stale": is_stale,
        "compiler": f"Triton {card['triton']}",
    }


def peak_of(op: str, job: Job, counts: Counts) -> str:
    """What bounds a kernel that has nothing else to wait for: matrix products, or reading each byte once."""
    products = op in ("attention", "grouped_mm", "moe") or (op == "paged_attention" and job.flags.startswith("prefill"))
    few_rows = "few" in job.flags  # of each matrix that is read
    if not products or few_rows:
        return "memory"
    if counts.mma_flops != 0:
        return "tensor"
    return "fp32" if counts.ffma and counts.loop else "memory"


def _warps(config: str) -> int | None:
    found = re.search(r"\bw(\d+)\b", config)
    return int(found[1]) if found else None


def entries(golden: dict[str, Card], changed: Iterable[Job], selected: Callable[[Job], bool]) -> list[dict[str, Any]]:
    """Those of the jobs selected."""
    stale = set(map(str, changed))
    return [entry(name, card, card["job"] in stale) for name, card in sorted(golden.items()) if selected(job_of(card))]


# --------------------------------------------------------------------------------------------------------------------
# The command's output.


def show(golden: dict[str, Card], changed: list[Job], selected: Callable[[Job], bool], options: argparse.Namespace) -> int:
    """Print a table, or write the list of objects; what is left out is said. Always 0."""
    changed = [job for job in changed if selected(job)]
    found = entries(golden, changed, selected)
    compiled, left_out = cuda_cards.entries(options.golden, options.op, options.arch) if not options.only else ([], [])
    found += compiled
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} cards: {options.json}")
    else:
        print_table(found)
    without = sum(one["loop"] is None for one in found)
    if without:
        print(f"{without} cards without loop counts, and so without a bound: `fastattn cards --update --all` reads them")
    if changed:
        print(f"{len(changed)} jobs have other sources or tiles than their cards, which are marked stale: `fastattn cards --update`")
    for reason in left_out:
        print(f"left out: {reason}")
    return 0


COLUMNS = (
    "card", "tile", "registers", "spills", "shared", "occupancy", "instructions", "mma", "tma", "ex2", "ffma", "shuffles", "barriers",
    "slowest unit", "bound",
)  # fmt: skip


def print_table(found: list[dict[str, Any]]) -> None:
    from fastattn.benchmarks.report import print_table

    rows = [[*map(str, cells(one))] for one in found]
    print_table(f"{len(found)} kernel cards", COLUMNS, rows, left=2)
    print(
        "occupancy: resident warps, their share of the limit, and what sets it. instructions to barriers: of one warp, in the hot loop,\n"
        "or in a kernel without one (k). ex2: of them under P·V. bound: the share of the matrix, fp32 or DRAM peak that is left if all\n"
        "else runs in its shadow; in brackets, one after the other. Read off machine code and data sheets: not measured."
    )


def cells(one: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    loop, limits, limit = one["loop"] or {}, one["occupancy"], one["bound"]
    mma = " ".join(f"{kind} {number}" for kind, number in loop.get("mma", {}).items())
    ex2 = loop.get("ex2", "")
    if one["ex2_under_pv"] is not None:
        ex2 = f"{ex2} ({one['ex2_under_pv']} under P·V)"
    share = "" if not limit or limit["percent"] is None else f"{limit['percent']:.0f}% of {limit['peak']}"
    if limit and limit["in_order_percent"] is not None:
        share += f" ({limit['in_order_percent']:.0f}%)"
    return [
        one["name"] + (" [stale]" if one["stale"] else ""),
        one["config"],
        one["registers"],
        f"!{one['spills']}" if one["spills"] else 0,
        one["shared"],
        f"{limits['warps']} warps, {limits['share']:.0%}, {limits['limited_by']}" if limits else "",
        f"{loop['instructions']}{'' if loop['loop'] else 'k'}" if loop else "",
        mma,
        *(loop.get(name, "" if not loop else 0) for name in ("tma",)),
        ex2,
        *(loop.get(name, "" if not loop else 0) for name in ("ffma", "shuffles", "barriers")),
        f"{limit['slowest']} {limit['cycles'].get(limit['slowest'], 0):.0f} cycles" if limit else "",
        share,
    ]
