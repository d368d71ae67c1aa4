"""Kernel cards: what the compiler makes of every row of the tile tables, kept in golden files and compared.

    fastattn cards              show what the golden files say, with the occupancy and the bound that follow; compiles nothing
    fastattn cards --json F     the same as a list of objects (card_table.py)
    fastattn cards --update     compile, without a GPU, the rows whose sources or tiles changed, and rewrite the golden files
    fastattn cards --check      compile every row and compare; a worse figure fails
    fastattn cards --changed    the same for the rows that changed and a fixed sample
    … --op softmax --arch sm_90 --only 'half 4096'      no other ops' rows, no other part's, none but these

A row (kernel, part, dtype class, size) is compiled through its real launcher under the stub driver with each of the op's sets of flags
(fastattn/testing/families/OP.py says which). tests/cards/<launcher>.json holds one card a line:

    "attention_fwd sm90 half 128 plain": {"config": "128x128 w8 s2 tma overlap", "registers": 252, "stack": 0, ...}

"loop" is what the hot loop issues (hot_loop.py). It came later than the other figures, and a card gets it when it is next compiled: by
`--update --all`, or as its sources change. Its reader is not part of the hash; wherever a row is compiled, it has to read as it did.
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
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import triton

from . import cuda_cards, sass
from .families import PARTS, Card, Family, Job, families, narrow
from .hot_loop import read_counts
from .stub_driver import stub_driver

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "cards"
TRITON = "3.9"  # the version the golden files hold for
# What a figure may grow to before it counts as worse.
SLACK = {
    "registers": lambda golden: golden + 8,  # they are handed out in eights
    "stack": lambda golden: golden,
    "local": lambda golden: golden,
    "shared": lambda golden: golden,
    "hot_loop_local": lambda golden: golden,
    "hot_loop_instructions": lambda golden: golden * 1.02,
}
PICKERS = ("pick_config", "pick_row_config", "pick_paged_config", "pick_grouped_config")  # not hashed: the row's own tile is
MAX_CHANGED = 60  # jobs whose sources changed that `--changed` still recompiles


@functools.cache
def family_of(launcher: str) -> Family:
    return next(family for family in families().values() if launcher in family.launchers)


def launchers() -> list[str]:
    return [launcher for family in families().values() for launcher in family.launchers]


def all_jobs() -> list[Job]:
    return [job for family in families().values() for job in family.jobs()]


def sample() -> list[Job]:
    """What every `--changed` recompiles: the rows with the strictest rules, and one of each other kind."""
    return [job for job in all_jobs() if family_of(job.launcher).is_sampled(job)]


def compile_cards(job: Job, **override: Any) -> dict[str, Card]:
    """The cards of one job by name, compiled for its part; `override` goes to the launcher, to try other tiles than the table's."""
    family, cards = family_of(job.launcher), {}
    tiles, about = family.tiles(job), {"hash": job_hash(job), "job": str(job), "triton": triton.__version__}
    with stub_driver(job.capability) as driver:
        family.launch(job, **override)
        for recorded in driver.launches:
            if (found := family.named(job, recorded)) is None:
                continue
            name, kernel = found
            figures = sass.read_card(recorded.compiled)
            for redundant in ("name", "arch", "num_warps"):
                del figures[redundant]
            loop = read_counts(recorded.compiled).as_json()
            cards[name] = {"config": tiles.get(kernel, "")} | about | figures | {"loop": loop}
    return cards


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


def _is_table(name: str, value: Any) -> bool:
    """Whether a dict is a constant: what is filled as calls come is in lower case."""
    return isinstance(value, dict) and name.isupper()


@functools.cache
def _sources(launcher: str) -> tuple[str, ...]:
    """The code of a launcher and of everything in fastattn.kernels it leads to, and of what calls it and reads the cards."""
    family = family_of(launcher)
    found = [_code(inspect.getsource(reader))[0] for reader in (family.launch, sass)]
    seen, pending = set(), [family.launchers[launcher]]
    while pending:
        item = pending.pop()
        plain = getattr(item, "fn", item)  # what @triton.jit wraps
        if id(plain) in seen or plain.__name__ in PICKERS:
            continue
        seen.add(id(plain))
        text, names = _code(inspect.getsource(plain))
        found.append(text)
        scope = vars(inspect.getmodule(plain))
        for name in sorted(names):
            value = scope.get(name)
            if isinstance(value, (int, float, str, list, triton.language.constexpr)) or _is_table(name, value):
                found.append(f"{name} = {value}")
            elif str(getattr(value, "__module__", "")).startswith("fastattn.kernels"):
                pending.append(value)
    return tuple(found)


def job_hash(job: Job) -> str:
    """Of the sources, the tiles and the options that the job's cards are read from."""
    tiles = [f"{kernel} {tile}" for kernel, tile in family_of(job.launcher).tiles(job).items()]
    parts = [triton.__version__, *_sources(job.launcher), str(job), *tiles]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------------------------
# What a card must satisfy, alone and against its golden one.


def job_of(card: Card) -> Job:
    launcher, part, dtype_class, size, flags = card["job"].split()
    return Job(launcher, part, dtype_class, int(size), flags)


def violations(name: str, card: Card) -> list[str]:
    """The rules a card breaks by itself, in words."""
    job = job_of(card)
    wrong = family_of(job.launcher).rules(name, card)
    if card["shared"] > job.shared_memory:
        wrong.append(f"shared memory {card['shared']} is over {job.part}'s {job.shared_memory}")
    return [f"{name}: {what}" for what in wrong]


def regressions(name: str, card: Card, golden: Card) -> list[str]:
    """Where a card is worse than its golden one, in words."""
    worse = [
        f"{name}: {figure} grew from {golden[figure]} to {card[figure]}"
        for figure, slack in SLACK.items()
        if (card[figure] or 0) > slack(golden[figure] or 0)
    ]
    fewer = card["config"] == golden["config"] and any(card["mma"].get(kind, 0) < number for kind, number in golden["mma"].items())
    if set(card["mma"]) != set(golden["mma"]) or fewer:
        worse.append(f"{name}: matrix instructions were {golden['mma']}, now {card['mma']}")
    if narrow(card) > narrow(golden):
        worse.append(f"{name}: accesses narrower than 128 bits grew from {golden['access']} to {card['access']}")
    if golden["tma"] and not card["tma"]:
        worse.append(f"{name}: TMA loads are gone")
    return worse


def changes(card: Card, golden: Card) -> list[str]:
    """Every figure that is another than the golden one, as `registers: 248 → 255`."""
    now, then = ({**c, **{f"loop {k}": v for k, v in c.get("loop", {}).items()}} for c in (card, golden))
    figures = sorted((now.keys() | then.keys()) - {"loop", "hash", "job", "triton"})
    if not golden.get("loop"):
        figures = [figure for figure in figures if not figure.startswith("loop ")]
    return [f"{figure}: {then.get(figure, 0)} → {now.get(figure, 0)}" for figure in figures if now.get(figure, 0) != then.get(figure, 0)]


# --------------------------------------------------------------------------------------------------------------------
# Golden files, and the command.


def comparable() -> str | None:
    """None where the golden files hold for this Triton, else why not."""
    if triton.__version__.split(".")[:2] == TRITON.split("."):
        return None
    return f"golden cards hold for Triton {TRITON}, this is {triton.__version__}"


def read_golden(folder: Path = GOLDEN) -> dict[str, Card]:
    """Every golden card by name. Raises: FileNotFoundError, where this is not a checkout."""
    files = [file for launcher in launchers() if (file := folder / f"{launcher}.json").exists()]
    if not files:
        raise FileNotFoundError(folder)
    return {name: card for file in files for name, card in json.loads(file.read_text()).items()}


def write_golden(cards: dict[str, Card], folder: Path = GOLDEN, only: Iterable[str] | None = None) -> None:
    """One file a launcher, one card a line, sorted: a diff shows which figure of which row moved. `only`: no other launchers' files."""
    folder.mkdir(parents=True, exist_ok=True)
    for launcher in launchers() if only is None else only:
        names = sorted(name for name, card in cards.items() if card["job"].split()[0] == launcher)
        lines = [f"{json.dumps(name)}: {json.dumps(cards[name], sort_keys=True)}" for name in names]
        (folder / f"{launcher}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def changed_jobs(golden: dict[str, Card]) -> list[Job]:
    """Jobs whose golden cards were read from other sources or tiles, or do not exist."""
    hashes: dict[str, set[str]] = {}
    for card in golden.values():
        hashes.setdefault(card["job"], set()).add(card["hash"])
    return [job for job in all_jobs() if hashes.get(str(job)) != {job_hash(job)}]


def compile_all(jobs: Iterable[Job], processes: int = 2) -> Iterator[dict[str, Card]]:
    """Compile jobs side by side, the longest first; yields the cards of each as it finishes."""
    longest_first = sorted(jobs, key=lambda job: (job.launcher, job.flags, job.dtype_class != "single", -job.size))
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for future in as_completed([pool.submit(compile_cards, job) for job in longest_first]):
            yield future.result()


def judge(cards: dict[str, Card], golden: dict[str, Card]) -> list[str]:
    """Everything wrong with freshly compiled cards."""
    wrong = []
    for name, card in sorted(cards.items()):
        wrong += violations(name, card)
        if name not in golden:
            wrong.append(f"{name}: has no golden card")
            continue
        worse = regressions(name, card, golden[name])
        if not worse and card["hash"] == golden[name]["hash"] and card["loop"] != golden[name].get("loop", card["loop"]):
            worse = [f"{name}: its hot loop reads otherwise than its card says, from the same code: see hot_loop.py"]
        if worse:
            wrong += [*worse, *(f"    {change}" for change in changes(card, golden[name]))]
    return wrong


def _show(name: str, card: Card) -> None:
    spills = f"stack {card['stack']} ({card['hot_loop_local'] or 0} in the loop)" if card["stack"] else "no spills"
    mma = " ".join(f"{kind} {number}" for kind, number in card["mma"].items()) or "no mma"
    access = " ".join(f"{kind} {number}" for kind, number in card["access"].items())
    loop = card["hot_loop_instructions"] or "-"
    figures = f"{card['registers']:3} registers  {spills:26}  shared {card['shared']:6}  {mma:10}  loop {loop}  {access}"
    print(f"{name:47} {card['config']:25} {figures}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The `cards` command; returns its exit status."""
    about = "What the compiler makes of the tile tables, without a GPU: show it, keep it in golden files, compare it with them."
    parser = argparse.ArgumentParser(prog="fastattn cards", description=about)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", action="store_true", help="compile the rows whose sources changed, and rewrite the golden files")
    mode.add_argument("--check", action="store_true", help="compile every row and compare it with the golden files")
    mode.add_argument("--changed", action="store_true", help="compare the rows whose sources changed, and a fixed sample")
    parser.add_argument("--all", action="store_true", help="with --update: compile the rows that did not change, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cards shown as a list of objects")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="their folder (default: tests/cards)")
    parser.add_argument("--op", action="append", choices=list(families()), help="an op (default: all)")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="a part (default: all)")
    parser.add_argument("--only", type=_regex, metavar="REGEX", help="rows, e.g. 'half 128 plain'")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    compiling = options.update or options.check or options.changed
    if options.json and compiling:
        parser.error("--json goes with none of --update, --check and --changed")
    if options.all and not options.update:
        parser.error("--all goes with --update")
    try:
        golden = read_golden(options.golden)
    except FileNotFoundError:
        if not options.update:
            print(f"no golden cards in {options.golden}: the repository has them, not an installation", file=sys.stderr)
            return 1
        golden = {}
    if not compiling:
        from .card_table import show

        if comparable() is not None:  # every hash is another then, and says nothing
            print(comparable())
        return show(golden, [] if comparable() else changed_jobs(golden), _selected(options), options)
    if comparable() is not None and (not options.update or options.golden == GOLDEN):
        print(f"skipped: {comparable()}")
        return 0
    wrong = _update(golden, options) if options.update else _compare(golden, options)
    return 1 if wrong else 0


def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None


ARCHS = {f"sm_{part.removeprefix('sm')}": part for part in PARTS}


def _selected(options: argparse.Namespace) -> Callable[[Job], bool]:
    """Whether a job is one of those asked for by --op, --arch and --only."""
    chosen = {launcher for op in options.op or families() for launcher in families()[op].launchers}
    parts = {ARCHS[arch] for arch in options.arch or ARCHS}
    return lambda job: job.launcher in chosen and job.part in parts and (not options.only or options.only.search(str(job)) is not None)


def _update(golden: dict[str, Card], options: argparse.Namespace) -> list[str]:
    """Rewrite the golden files; what is wrong with the cards in them."""
    selected = _selected(options)
    jobs = [job for job in (all_jobs() if options.all else changed_jobs(golden)) if selected(job)]
    existing, again = set(map(str, all_jobs())), set(map(str, jobs))
    golden = {name: card for name, card in golden.items() if card["job"] in existing - again}
    touched = [launcher for op in options.op or families() for launcher in families()[op].launchers]
    cards: dict[str, Card] = {}
    for found in compile_all(jobs, options.processes):
        cards |= found
        for name, card in found.items():
            _show(name, card)
        write_golden(golden | cards, options.golden, touched)  # after each job: an interrupted run goes on where it stopped
    golden |= cards
    write_golden(golden, options.golden, touched)
    if (reason := cuda_cards.unable()) is not None:
        print(f"left out: csrc/cuda: {reason}")
    elif not options.only:
        stale = cuda_cards.stale(cuda_cards.read(options.golden))
        wanted = [one for one in cuda_cards.selected(options.op, options.arch) if options.all or one in stale]
        cuda_cards.update(options.golden, wanted)
    return _report(len(cards), [what for name, card in sorted(golden.items()) for what in violations(name, card)])


def _compare(golden: dict[str, Card], options: argparse.Namespace) -> list[str]:
    """Compile and compare; what got worse."""
    jobs = all_jobs() if options.check else list(dict.fromkeys([*changed_jobs(golden), *sample()]))
    jobs = list(filter(_selected(options), jobs))
    cards: dict[str, Card] = {}
    for found in compile_all(jobs, options.processes):
        cards |= found
        for name, card in found.items():
            _show(name, card)
    wrong = judge(cards, golden)
    if options.check and not (options.op or options.arch or options.only):
        wrong += [f"{name}: has a golden card and is in no table" for name in sorted(set(golden) - set(cards))]
    if options.check and not options.only:
        if (reason := cuda_cards.unable()) is not None:
            print(f"left out: csrc/cuda: {reason}")
        else:
            wrong += cuda_cards.compare(options.golden, cuda_cards.selected(options.op, options.arch))
    return _report(len(cards), wrong)


def _report(compiled: int, wrong: list[str]) -> list[str]:
    problems = [what for what in wrong if not what.startswith(" ")]
    print(f"{compiled} cards compiled, {len(problems)} wrong", *wrong, sep="\n", file=sys.stderr if wrong else sys.stdout)
    return wrong
