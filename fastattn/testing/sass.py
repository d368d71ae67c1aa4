"""What a compiled kernel is made of, read from its machine code by the tools that Triton carries.

    with stub_driver((9, 0)) as driver:
        attention_fwd(q, k, v, ...)
    card = read_card(driver.launches[0].compiled)     # {"registers": 188, "stack": 0, "mma": {"HGMMA": 48}, ...}

These are facts about a kernel, not speeds: registers, spills, shared memory, which matrix and copy instructions the
compiler chose, how long the hot loop is, and how much of its softmax runs under the matrix instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import triton

MMA = re.compile(r"(HGMMA|QGMMA|IGMMA|BGMMA|HMMA|QMMA|OMMA|IMMA|DMMA|UTC[A-Z]MMA)$")  # wgmma, mma.sync, tcgen05
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][\w.]*)[^;]*?)\s*;")
_LABEL = re.compile(r"^(\.L[\w$.]*):")
_TARGET = re.compile(r"`\((\.L[\w$.]*)\)")


class Instruction(NamedTuple):
    """One machine instruction; `target` is the address a branch goes to, None for any other."""

    address: int
    opcode: str  # with its modifiers: "HGMMA.64x128x16.F32.BF16"
    text: str  # predicate, opcode and operands
    target: int | None = None

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class KernelCard:
    """One compiled kernel in figures. A count is of instructions in the code, not of executions."""

    name: str
    arch: int
    num_warps: int
    registers: int  # a thread
    stack: int  # bytes a thread: spills, where the kernel has no local arrays
    shared: int  # bytes a block
    instructions: int
    mma: dict[str, int]  # by opcode: HMMA (mma.sync), HGMMA (wgmma), UTCHMMA (tcgen05)
    tma: int  # UTMALDG: tensor loads by TMA
    cp_async: int  # LDGSTS: asynchronous copies global → shared
    access: dict[str, int]  # global loads and stores by bits a thread: {"LDG.128": 4, "STG.16": 1}
    local: int  # LDL and STL: spill traffic
    ex2: int  # MUFU.EX2
    hot_loop_instructions: int | None  # None: no loop holds a matrix instruction
    hot_loop_mma: int | None
    hot_loop_local: int | None
    hot_loop_ex2: int | None
    overlap: float | None  # share of the hot loop's ex2 that runs under P·V; None without HGMMA or ex2


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, stack bytes a thread and statically allocated shared memory of a cubin's one kernel."""
    report = _tool("cuobjdump", cubin, "-res-usage")
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    if len(found) != 1:
        raise RuntimeError(f"resource_usage: expected one kernel in the cubin, cuobjdump printed\n{report}")
    return dict(zip(("registers", "stack", "static_shared"), map(int, found[0]), strict=True))


def instructions(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin's one kernel, in address order."""
    return parse(disassemble(cubin))


def disassemble(cubin: bytes) -> str:
    """The listing that `parse` reads."""
    return _tool("nvdisasm", cubin, "-c")


def parse(listing: str) -> list[Instruction]:
    """Instructions of an nvdisasm listing, branches resolved to addresses."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            pending.append(label[1])
        elif match := _LINE.search(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            found.append(Instruction(address, match[3], " ".join(match[2].split())))
    names = [_TARGET.search(i.text) if i.base == "BRA" else None for i in found]
    return [i._replace(target=labels.get(name[1])) if name else i for i, name in zip(found, names, strict=True)]


def is_mma(instruction: Instruction) -> bool:
    return MMA.match(instruction.base) is not None


def count(code: list[Instruction], *opcodes: str) -> int:
    """Instructions that are one of `opcodes`: "LDL" counts LDL.64, "MUFU.EX2" no other MUFU."""
    return sum(any(i.opcode == o or i.opcode.startswith(o + ".") for o in opcodes) for i in code)


def hot_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the innermost loops that hold matrix instructions, the hottest first.

    A loop is what lies between a backward branch and its target. The hottest has the most matrix instructions; of
    equals (a masked loop and an unmasked one) the shortest.
    """
    ranges = {(i.target, i.address) for i in code if i.target is not None and i.target <= i.address}
    bodies = []
    for start, end in ranges:
        body = [i for i in code if start <= i.address <= end]
        # Waits are outlined behind the kernel's end and branch back from there: no loop.
        if any(i.text == "EXIT" for i in body) or not any(map(is_mma, body)):
            continue
        bodies.append(body)
    spans = [(body[0].address, body[-1].address) for body in bodies]
    innermost = [
        body
        for body, (start, end) in zip(bodies, spans, strict=True)
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans)
    ]
    return sorted(innermost, key=lambda body: (-sum(map(is_mma, body)), len(body), body[0].address))


def overlap(loop: list[Instruction]) -> float | None:
    """Share of the loop's MUFU.EX2 that stand between the first and the last HGMMA of P·V; None without either.

    A Q·K product starts from zero (its first HGMMA reads no accumulator), while P·V adds to registers the loop carries:
    so the HGMMAs whose destination never starts afresh are P·V's. 0 is strict order, near 1 is full overlap.
    """
    products = [(n, i) for n, i in enumerate(loop) if i.base == "HGMMA"]
    fresh = {_destination(i) for _, i in products if "!UPT" in i.text}
    carried = [n for n, i in products if _destination(i) not in fresh]
    exponentials = [n for n, i in enumerate(loop) if i.opcode == "MUFU.EX2"]
    if not carried or not exponentials:
        return None
    return sum(carried[0] < n < carried[-1] for n in exponentials) / len(exponentials)


def _bits(access: Instruction) -> int:
    """Of one LDG or STG: its modifier says where they are not 32."""
    sizes = (re.fullmatch(r"[US]?(8|16|64|128|256)", modifier) for modifier in access.opcode.split("."))
    return next((int(size[1]) for size in sizes if size), 32)


def _destination(instruction: Instruction) -> str:
    return instruction.text.split(instruction.opcode, 1)[1].split(",")[0].strip()


def read_card(compiled: Any) -> dict[str, Any]:
    """The `KernelCard` of a kernel compiled by Triton for an NVIDIA part, as a dict that JSON can hold."""
    cubin = compiled.asm["cubin"]
    code = instructions(cubin)
    usage = resource_usage(cubin)
    loops = hot_loops(code)
    loop = loops[0] if loops else None
    card = KernelCard(
        name=compiled.metadata.name,
        arch=compiled.metadata.target.arch,
        num_warps=compiled.metadata.num_warps,
        registers=usage["registers"],
        stack=usage["stack"],
        shared=compiled.metadata.shared,
        instructions=sum(i.base != "NOP" for i in code),
        mma=dict(sorted(Counter(i.base for i in code if is_mma(i)).items())),
        tma=count(code, "UTMALDG"),
        cp_async=count(code, "LDGSTS"),
        access=dict(sorted(Counter(f"{i.base}.{_bits(i)}" for i in code if i.base in ("LDG", "STG")).items())),
        local=count(code, "LDL", "STL"),
        ex2=count(code, "MUFU.EX2"),
        hot_loop_instructions=None if loop is None else len(loop),
        hot_loop_mma=None if loop is None else sum(map(is_mma, loop)),
        hot_loop_local=None if loop is None else count(loop, "LDL", "STL"),
        hot_loop_ex2=None if loop is None else count(loop, "MUFU.EX2"),
        overlap=None if loop is None else _rounded(overlap(loop)),
    )
    return asdict(card)


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 3)


def _tool(name: str, cubin: bytes, *options: str) -> str:
    """Standard output of one of the binary tools, at the path Triton knows it by."""
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, *options, file.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed on the cubin ({done.returncode}): {done.stderr.strip()}")
    return done.stdout
