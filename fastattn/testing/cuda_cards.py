"""Cards of the kernels in csrc/cuda: what nvcc makes of each for each part, kept in tests/cards/cuda.json.

    {"norm.cu sm_90a norm_kernel<float, 1>": {"registers": 40, "stack": 0, "spills": 0, "shared": 132, "warps": 32, ...}, ...}

nvcc writes PTX, which says how many threads a kernel may have, and its ptxas the machine code, which says the rest. Figures hold for one
release of the toolkit. Shared memory is what the kernel declares; what a launch adds to it, no compiler knows.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import sass
from .hot_loop import counts_of
from .parts import PARTS, Counts, bound, occupancy

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILE = "cuda.json"
CUDA = "13.0"  # the toolkit whose code the golden file describes
ARCHS = {"sm80": "sm_80", "sm90": "sm_90a", "sm100": "sm_100a", "sm120": "sm_120"}
FLAGS = ("-std=c++17", "-O3")
DTYPES = {"float": "fp32", "__half": "fp16", "__nv_bfloat16": "bf16"}

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_BOUNDS = re.compile(r"\.entry (\w+)\([^)]*\)\s*((?:\.\w+[^\n{]*\n)*)", re.DOTALL)
_SECTION = re.compile(r"^\.text\.(\w+):", re.MULTILINE)

Card = dict[str, Any]


def sources(csrc: Path = CSRC) -> list[Path]:
    """The kernels' files; none where this is no checkout."""
    return sorted((csrc / "cuda").glob("*.cu"))


def source_hash(source: Path) -> str:
    """Of a file, the headers of its folder and of csrc/common, and the flags."""
    headers = sorted([source.with_suffix(".hpp"), *source.parents[1].glob("common/*.hpp")])
    text = [*FLAGS, *(file.read_text() for file in [source, *headers] if file.exists())]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]


def why_not(nvcc: str | None = None) -> str | None:
    """Why nothing can be compiled here, or None."""
    if (nvcc or shutil.which("nvcc")) is None:
        return "there is no nvcc"
    if shutil.which("c++filt") is None:
        return "there is no c++filt, which names the kernels"
    return None


def toolkit() -> str:
    """The release of the nvcc that is here: "13.0"."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def compile_cards(source: Path, part: str) -> dict[str, Card]:
    """The cards of a file's kernels for one part. Raises: RuntimeError with the compiler's words."""
    arch = ARCHS[part]
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "out.ptx"), Path(folder, "out.cubin")
        _call("nvcc", *FLAGS, f"-arch={arch}", "-ptx", str(source), "-o", str(ptx))
        said = _call("ptxas", "-v", f"-arch={arch}", str(ptx), "-o", str(cubin))
        listing = sass.disassemble(cubin.read_bytes())
        warps = max_warps(ptx.read_text())
    usage, code = resource_usage(said), kernels_of(listing)
    names = demangle(list(usage))
    about = {"hash": source_hash(source), "source": source.name, "part": part, "cuda": toolkit()}
    return {
        f"{source.name} {arch} {names[kernel]}": figures
        | about
        | {"warps": warps[kernel], "loop": counts_of(code[kernel], warps[kernel]).as_json()}
        for kernel, figures in usage.items()
    }


def resource_usage(said: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` prints of each kernel: registers, stack and spilled bytes a thread, declared shared memory."""
    found = {}
    for block in re.split(r"(?=ptxas info\s+: Compiling entry function)", said):
        if entry := _ENTRY.search(block):
            stack, stores, loads = map(int, _FRAME.search(block).groups())
            shared = _SHARED.search(block)
            registers = int(_REGISTERS.search(block)[1])
            found[entry[1]] = {"registers": registers, "stack": stack, "spills": stores + loads, "shared": int(shared[1]) if shared else 0}
    return found


def max_warps(ptx: str) -> dict[str, int]:
    """Of each kernel, how many warps its launch bounds permit; 32 where it has none."""
    found = {}
    for kernel, directives in _BOUNDS.findall(ptx):
        threads = re.search(r"\.maxntid (\d+)", directives)
        found[kernel] = -(-int(threads[1]) // 32) if threads else 32
    return found


def kernels_of(listing: str) -> dict[str, list[sass.Instruction]]:
    """The instructions of each kernel of an nvdisasm listing."""
    pieces = _SECTION.split(listing)[1:]
    return {kernel: sass.parse(text) for kernel, text in zip(pieces[::2], pieces[1::2], strict=True)}


def demangle(kernels: Sequence[str]) -> dict[str, str]:
    """Names as the source has them, without namespaces, return types and parameters."""
    said = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout.splitlines()
    return {kernel: short_name(name) for kernel, name in zip(kernels, said, strict=True)}


def short_name(name: str) -> str:
    """`void fastattn::(anonymous namespace)::norm_kernel<float, 1>(fastattn::NormParams)` → `norm_kernel<float, 1>`"""
    name = name.replace("(anonymous namespace)::", "").replace("fastattn::", "").removeprefix("void ")
    depth = 0
    for position, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:position]
    return name


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr


# --------------------------------------------------------------------------------------------------------------------
# The golden file.


def read(folder: Path) -> dict[str, Card]:
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else {}


def write(cards: dict[str, Card], folder: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(cards[name], sort_keys=True)}" for name in sorted(cards)]
    (folder / FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def stale(cards: dict[str, Card], csrc: Path = CSRC) -> list[tuple[Path, str]]:
    """The files and parts whose cards were read from other sources, or do not exist."""
    known = {(card["source"], card["part"], card["hash"]) for card in cards.values()}
    return [(source, part) for source in sources(csrc) for part in ARCHS if (source.name, part, source_hash(source)) not in known]


def selected(ops: Sequence[str] | None, archs: Sequence[str] | None) -> list[tuple[Path, str]]:
    """The files and parts of some ops and archs ("sm_90"), or of all."""
    return [
        (source, part)
        for source in sources()
        for part in ARCHS
        if (not ops or source.stem in ops) and (not archs or part.replace("sm", "sm_") in archs)
    ]


def entries(folder: Path, ops: Sequence[str] | None, archs: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The cards as objects, of some ops and parts or of all; and of what is left out, why."""
    golden, wanted = read(folder), {(source.name, part) for source, part in selected(ops, archs)}
    cards = {name: card for name, card in golden.items() if (card["source"], card["part"]) in wanted}
    old = {(source.name, part) for source, part in stale(golden)} & wanted
    have = {(card["source"], card["part"]) for card in cards.values()}
    reason = why_not() or "`fastattn cards --update` compiles it"
    found = [entry(name, card, (card["source"], card["part"]) in old) for name, card in sorted(cards.items())]
    return found, [f"csrc/cuda/{source} for {part}: {reason}" for source, part in sorted(old - have)]


def entry(name: str, card: Card, is_stale: bool) -> dict[str, Any]:
    """One card as an object, with the fields of card_table.entry."""
    part, counts = PARTS[card["part"]], Counts(**card["loop"])
    kernel = name.split(" ", 2)[2]
    first = kernel.partition("<")[2].split(",")[0].rstrip(">")
    return {
        "op": card["source"].removesuffix(".cu"), "name": name, "arch": card["part"].replace("sm", "sm_"), "head_dim": None, "size": None,
        "dtype": DTYPES.get(first), "flags": ["cuda"], "config": f"at most {card['warps']} warps",
        "registers": card["registers"], "spills": card["spills"], "spills_in_loop": None, "shared": card["shared"], "warps": card["warps"],
        "occupancy": asdict(occupancy(part, card["registers"], card["shared"], card["warps"])), "loop": counts.as_json(),
        "ex2_under_pv": None, "bound": asdict(bound(counts, part, "memory")), "stale": is_stale, "compiler": f"CUDA {card['cuda']}",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Compiling.


def unable() -> str | None:
    """Why the golden file can be neither written nor compared here, or None."""
    reason = why_not()
    if reason is None and toolkit() != CUDA:
        reason = f"golden cards hold for CUDA {CUDA}, this is {toolkit()}"
    return reason


def update(folder: Path, wanted: Sequence[tuple[Path, str]]) -> None:
    """Compile these and write the golden file, without the cards of files that are gone."""
    names = {source.name for source in sources()}
    cards = {name: card for name, card in read(folder).items() if card["source"] in names}
    for source, part in wanted:
        print(f"{source.name} for {ARCHS[part]}", flush=True)
        cards = {name: card for name, card in cards.items() if (card["source"], card["part"]) != (source.name, part)}
        cards |= compile_cards(source, part)
        write(cards, folder)


def compare(folder: Path, wanted: Sequence[tuple[Path, str]]) -> list[str]:
    """Compile these; what is worse than its golden card, in words: spills, registers by more than 8, shared memory, matrix instructions."""
    golden, wrong = read(folder), []
    for source, part in wanted:
        for name, card in compile_cards(source, part).items():
            if name not in golden:
                wrong.append(f"{name}: has no golden card")
                continue
            for figure, slack in (("spills", 0), ("stack", 0), ("shared", 0), ("registers", 8)):
                if card[figure] > golden[name][figure] + slack:
                    wrong.append(f"{name}: {figure} grew from {golden[name][figure]} to {card[figure]}")
            now, then = (one["loop"].get("mma", {}) for one in (card, golden[name]))
            if any(now.get(kind, 0) < number for kind, number in then.items()):
                wrong.append(f"{name}: the hot loop's matrix instructions were {then}, now {now}")
    return wrong
