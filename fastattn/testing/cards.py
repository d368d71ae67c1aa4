"""Kernel cards: what the compiler makes of every row of the tile table, kept in golden files and compared.

    fastattn cards              compile, without a GPU, the rows whose sources or tiles changed, and rewrite the golden files
    fastattn cards --check      compile every row and compare; a worse figure fails
    fastattn cards --changed    the same for the rows that changed and a fixed sample

A row (kernel, part, dtype class, head-dim bucket) is compiled through its real launcher under the stub driver with two flag sets: "plain"
(dense, causal) and "all" (packed, grouped heads, window on both sides, softcap, ALiBi, float bias with a gradient, sinks, dropout). A row
split into two passes gives two cards, dk and dv; the dbias kernel rides on the dq row. tests/cards/<launcher>.json holds one card a line:

    "attention_fwd sm90 half 128 plain": {"config": "128x128 w8 s2 tma overlap", "registers": 252, "stack": 0, ...}

Figures hold for one compiler, so under another Triton than the files' nothing is compared, and that is said.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from fastattn.kernels.attention import attention_fwd
from fastattn.kernels.attention_bwd import attention_bwd
from fastattn.kernels.tiles import HEAD_DIM_BUCKETS, TILES, Config, pick_config

from . import sass
from .stub_driver import SHARED_MEMORY_LIMITS, stub_driver

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "cards"
TRITON = "3.9"  # the version the golden files hold for
LAUNCHERS = {"attention_fwd": attention_fwd, "attention_bwd": attention_bwd}
PARTS = {"sm80": (8, 0), "sm90": (9, 0), "sm100": (10, 0), "sm120": (12, 0)}
DTYPES = {"half": torch.bfloat16, "single": torch.float32}
FLAGS = ("plain", "all")
# What a figure may grow to before it counts as worse.
SLACK = {
    "registers": lambda golden: golden + 8,  # they are handed out in eights
    "stack": lambda golden: golden,
    "local": lambda golden: golden,
    "shared": lambda golden: golden,
    "hot_loop_local": lambda golden: golden,
    "hot_loop_instructions": lambda golden: golden * 1.02,
}
MAX_CHANGED = 40  # jobs whose sources changed that `--changed` still recompiles

Card = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One call of a launcher, which compiles all that the cards of a table row (in backward: of two) are read from."""

    launcher: str
    part: str
    dtype_class: str
    head_dim: int
    flags: str

    def __str__(self) -> str:
        return f"{self.launcher} {self.part} {self.dtype_class} {self.head_dim} {self.flags}"

    def row(self, kernel: str) -> tuple[str, str, str, int]:
        """The key of a kernel's tile in TILES."""
        return kernel, self.part, self.dtype_class, self.head_dim

    def config(self, kernel: str) -> Config:
        """The tile that the launcher picks for this job."""
        capability = PARTS[self.part]
        limit, itemsize = SHARED_MEMORY_LIMITS[capability], DTYPES[self.dtype_class].itemsize
        return pick_config(kernel, capability, limit, self.head_dim, itemsize, self.flags == "plain")

    @property
    def kernels(self) -> list[str]:
        """The kernels with a tile of their own that the launcher launches."""
        return [kernel for kernel in dict.fromkeys(row[0] for row in TILES) if kernel.startswith(self.launcher)]

    @property
    def rows(self) -> list[str]:
        """What the names of the job's cards begin with."""
        return [" ".join([*map(str, self.row(kernel)), self.flags]) for kernel in self.kernels]

    @property
    def is_required(self) -> bool:
        """True where the rules of `violations` ask for more than fitting: plain causal half precision at head dims 64 and 128."""
        return self.flags == "plain" and self.dtype_class == "half" and self.head_dim <= 128


def all_jobs() -> list[Job]:
    return [
        Job(launcher, part, dtype_class, head_dim, flags)
        for launcher in LAUNCHERS
        for part in PARTS
        for dtype_class in DTYPES
        for head_dim in HEAD_DIM_BUCKETS
        for flags in FLAGS
    ]


def sample() -> list[Job]:
    """What every `--changed` recompiles: the rows with the strictest rules, and one of each other kind. About 40 cards."""
    others = [
        Job("attention_fwd", "sm90", "half", 128, "all"),
        Job("attention_fwd", "sm100", "half", 256, "plain"),
        Job("attention_fwd", "sm120", "half", 512, "plain"),
        Job("attention_fwd", "sm80", "single", 64, "plain"),
    ]
    return [job for job in all_jobs() if job.is_required] + others


def launch(job: Job, **override: Any) -> None:
    """Call the job's launcher on zeros; `override` goes to it as config= or configs=, to try other tiles than the table's."""
    batch, seqlen, heads, head_dim, dtype = 2, 512, 4, job.head_dim, DTYPES[job.dtype_class]
    q, k, v = (torch.zeros(batch, seqlen, heads, head_dim, dtype=dtype) for _ in range(3))
    lse = torch.zeros(batch, heads, seqlen)
    tensors: tuple[torch.Tensor | None, ...] = (None,) * 6
    window_left, softcap, dropout_p = None, 0.0, 0.0
    if job.flags == "all":
        k, v = k[:, :, : heads // 2], v[:, :, : heads // 2]
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        lse = lse.transpose(0, 1).reshape(heads, batch * seqlen)
        bias, slopes = torch.zeros(batch, heads, seqlen, seqlen, dtype=dtype), torch.zeros(heads)
        seed, cu_seqlens = torch.zeros(1, dtype=torch.int64), torch.arange(batch + 1, dtype=torch.int32) * seqlen
        tensors = (bias, slopes, slopes, seed, cu_seqlens, cu_seqlens)
        window_left, softcap, dropout_p = 100, 10.0, 0.1
    options = (seqlen, seqlen, window_left, 0, head_dim**-0.5, softcap, dropout_p)
    if job.launcher == "attention_fwd":
        attention_fwd(q, k, v, *tensors, *options, **override)
    else:
        attention_bwd(q, None, q, k, v, *tensors, q, lse, *options, job.flags == "all", **override)


def compile_cards(job: Job, **override: Any) -> dict[str, Card]:
    """The cards of one job by name, compiled for its part."""
    cards = {}
    with stub_driver(PARTS[job.part]) as driver:
        launch(job, **override)
        for recorded in driver.launches:
            kernel = recorded.name.removeprefix("_").removesuffix("_kernel")
            wanted = [name for name in ("dk", "dv") if recorded.args.get(f"WANT_{name.upper()}")]
            only = wanted if len(wanted) == 1 else []
            if kernel == "attention_bwd_dbias":
                kernel, only = "attention_bwd_dq", ["dbias"]
            if (row := job.row(kernel)) not in TILES:
                continue  # the kernel that computes delta has no tile to choose
            figures = sass.read_card(recorded.compiled)
            for redundant in ("name", "arch", "num_warps"):
                del figures[redundant]
            about = {"config": tile(job.config(kernel)), "hash": job_hash(job), "triton": triton.__version__}
            cards[" ".join([*map(str, row), job.flags, *only])] = about | figures
    return cards


def tile(config: Config) -> str:
    """A Config as it stands on a card: `128x64 w8 s2 tma`."""
    switches = [name for name in ("tma", "overlap", "split") if getattr(config, name)]
    return " ".join([f"{config.BLOCK_M}x{config.BLOCK_N} w{config.num_warps} s{config.num_stages}", *switches])


# --------------------------------------------------------------------------------------------------------------------
# What a card was read from.


def _code(source: str) -> tuple[str, set[str]]:
    """Source text without comments, docstrings and layout, and the names in it.

    By tokens: what `ast` prints depends on Python's version, and a re-wrapped line is no other code.
    """
    source = textwrap.dedent(source)
    nodes = list(ast.walk(ast.parse(source)))
    documented = (
        n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n) is not None
    )
    dropped = {(node.body[0].lineno, node.body[0].col_offset) for node in documented}
    layout = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.COMMENT: "", tokenize.NL: ""}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    text = "".join(layout.get(token.type, token.string) for token in tokens if token.start not in dropped)
    text = text.replace("{\n", "{")  # where a docstring stood
    for bracket in ")]}":
        text = text.replace("," + bracket, bracket)
    return text, {node.id for node in nodes if isinstance(node, ast.Name)}


@functools.cache
def _sources(launcher: Any) -> tuple[str, ...]:
    """The code of a launcher and of everything in fastattn.kernels it leads to, and of what calls it and reads the cards."""
    found, seen, pending = [_code(inspect.getsource(reader))[0] for reader in (launch, sass)], set(), [launcher]
    while pending:
        item = pending.pop()
        plain = getattr(item, "fn", item)  # what @triton.jit wraps
        if id(plain) in seen or plain.__name__ == "pick_config":  # the row's own tile is hashed, not the whole table
            continue
        seen.add(id(plain))
        text, names = _code(inspect.getsource(plain))
        found.append(text)
        scope = vars(inspect.getmodule(plain))
        for name in sorted(names):
            value = scope.get(name)
            if isinstance(value, (int, float, str, list, triton.language.constexpr)):
                found.append(f"{name} = {value}")
            elif str(getattr(value, "__module__", "")).startswith("fastattn.kernels"):
                pending.append(value)
    return tuple(found)


def job_hash(job: Job) -> str:
    """Of the sources, the tiles and the options that the job's cards are read from."""
    tiles = [tile(job.config(kernel)) for kernel in job.kernels]
    parts = [triton.__version__, *_sources(LAUNCHERS[job.launcher]), str(job), *tiles]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------------
# What a card must satisfy, alone and against its golden one.


def violations(name: str, card: Card) -> list[str]:
    """The rules a card breaks by itself, in words."""
    kernel, part, dtype_class, head_dim, flags, *_ = name.split()
    wrong = []
    limit = SHARED_MEMORY_LIMITS[PARTS[part]]
    if card["shared"] > limit:
        wrong.append(f"shared memory {card['shared']} is over {part}'s {limit}")
    if dtype_class == "half":
        instruction = {"sm90": "HGMMA", "sm100": "UTCHMMA"}.get(part, "HMMA")
        if not card["mma"]:
            wrong.append("no matrix instructions")
        elif int(head_dim) <= 128 and card["mma"].get(instruction, 0) == 0:
            wrong.append(f"no {instruction}, the matrix instructions are {card['mma']}")
        if "tma" in card["config"].split() and card["tma"] == 0:
            wrong.append("the tile says tma and there is no TMA load")
        if card["hot_loop_mma"] is None:
            wrong.append("no loop holds a matrix instruction")
    if flags == "plain" and dtype_class == "half" and int(head_dim) <= 128:
        if card["stack"] > 0:
            wrong.append(f"{card['stack']} bytes of spills where none are allowed")
        if kernel == "attention_fwd" and part == "sm90" and (card["overlap"] or 0.0) < 0.5:
            wrong.append(f"only {card['overlap']} of the exponentials run under P·V, 0.5 must")
    return [f"{name}: {what}" for what in wrong]


def regressions(name: str, card: Card, golden: Card) -> list[str]:
    """Where a card is worse than its golden one, in words."""
    worse = [
        f"{name}: {figure} grew from {golden[figure]} to {card[figure]}"
        for figure, slack in SLACK.items()
        if (card[figure] or 0) > slack(golden[figure] or 0)
    ]
    if set(card["mma"]) != set(golden["mma"]):
        worse.append(f"{name}: matrix instructions were {golden['mma']}, now {card['mma']}")
    if golden["tma"] and not card["tma"]:
        worse.append(f"{name}: TMA loads are gone")
    return worse


# --------------------------------------------------------------------------------------------------------------------
# Golden files, and the command.


def comparable() -> str | None:
    """None where the golden files hold for this Triton, else why not."""
    if triton.__version__.split(".")[:2] == TRITON.split("."):
        return None
    return f"golden cards hold for Triton {TRITON}, this is {triton.__version__}"


def read_golden(folder: Path = GOLDEN) -> dict[str, Card]:
    """Every golden card by name. Raises: FileNotFoundError, where this is not a checkout."""
    files = [folder / f"{launcher}.json" for launcher in LAUNCHERS]
    return {name: card for file in files for name, card in json.loads(file.read_text()).items()}


def write_golden(cards: dict[str, Card], folder: Path = GOLDEN) -> None:
    """One file a launcher, one card a line, sorted: a diff shows which figure of which row moved."""
    folder.mkdir(parents=True, exist_ok=True)
    for launcher in LAUNCHERS:
        names = sorted(name for name in cards if name.startswith(launcher))
        lines = [f"{json.dumps(name)}: {json.dumps(cards[name], sort_keys=True)}" for name in names]
        (folder / f"{launcher}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _row(name: str) -> str:
    """A card's name without the pass."""
    return " ".join(name.split()[:5])


def changed_jobs(golden: dict[str, Card]) -> list[Job]:
    """Jobs whose golden cards were read from other sources or tiles, or do not exist."""
    hashes: dict[str, set[str]] = {}
    for name, card in golden.items():
        hashes.setdefault(_row(name), set()).add(card["hash"])
    return [job for job in all_jobs() if any(hashes.get(row) != {job_hash(job)} for row in job.rows)]


def compile_all(jobs: Iterable[Job], processes: int = 2) -> Iterator[dict[str, Card]]:
    """Compile jobs side by side, the longest first; yields the cards of each as it finishes."""
    longest_first = sorted(jobs, key=lambda job: (job.launcher, job.flags, job.dtype_class != "single", -job.head_dim))
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for future in as_completed([pool.submit(compile_cards, job) for job in longest_first]):
            yield future.result()


def judge(cards: dict[str, Card], golden: dict[str, Card]) -> list[str]:
    """Everything wrong with freshly compiled cards."""
    wrong = []
    for name, card in sorted(cards.items()):
        wrong += violations(name, card)
        wrong += regressions(name, card, golden[name]) if name in golden else [f"{name}: has no golden card"]
    return wrong


def _show(name: str, card: Card) -> None:
    spills = f"stack {card['stack']} ({card['hot_loop_local'] or 0} in the loop)" if card["stack"] else "no spills"
    mma = " ".join(f"{kind} {number}" for kind, number in card["mma"].items()) or "no mma"
    loop = card["hot_loop_instructions"] or "-"
    figures = f"{card['registers']:3} registers  {spills:26}  shared {card['shared']:6}  {mma:10}  loop {loop}"
    print(f"{name:47} {card['config']:25} {figures}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The `cards` command; returns its exit status."""
    about = "Compile the tile table without a GPU, and keep or compare what the compiler made of it."
    parser = argparse.ArgumentParser(prog="fastattn cards", description=about)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare every row with the golden files")
    mode.add_argument("--changed", action="store_true", help="compare rows whose sources changed, and a fixed sample")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="their folder (default: tests/cards)")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    checking = options.check or options.changed
    if comparable() is not None and (checking or options.golden == GOLDEN):
        print(f"skipped: {comparable()}")
        return 0
    golden: dict[str, Card] = {}
    try:
        golden = read_golden(options.golden)
    except FileNotFoundError:
        if checking:
            print(f"no golden cards in {options.golden}: the repository has them, not an installation", file=sys.stderr)
            return 1
    jobs = all_jobs() if options.check else changed_jobs(golden)
    if options.changed:
        jobs = list(dict.fromkeys([*jobs, *sample()]))
    elif not checking:
        kept = {row for job in set(all_jobs()) - set(jobs) for row in job.rows}
        golden = {name: card for name, card in golden.items() if _row(name) in kept}
    cards: dict[str, Card] = {}
    for found in compile_all(jobs, options.processes):
        cards |= found
        for name, card in found.items():
            _show(name, card)
        if not checking:  # after each job, so that an interrupted run goes on where it stopped
            write_golden(golden | cards, options.golden)
    if checking:
        wrong = judge(cards, golden)
        strangers = set(golden) - set(cards) if options.check else ()
        wrong += [f"{name}: has a golden card and is in no table" for name in sorted(strangers)]
    else:
        golden |= cards
        write_golden(golden, options.golden)
        wrong = [what for name, card in sorted(golden.items()) for what in violations(name, card)]
    summary = f"{len(cards)} cards compiled, {len(wrong)} wrong"
    print(summary, *wrong, sep="\n", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0
