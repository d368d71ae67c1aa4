"""What the hot loop of a compiled kernel issues: the counts that occupancy and bounds (parts.py) are computed from, read off machine code.

The hot loop is the innermost one with the most matrix instructions; without any, the innermost one that moves the most global memory; and
where no loop does, the whole kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from . import sass
from .parts import QUARTERS, WARP_SIZE, Counts
from .sass import Instruction, is_mma

_TILE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")  # HGMMA.64x128x16
_WARP_TILE = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "16832": (16, 8, 32), "16864": (16, 8, 64)}
_MATRICES = re.compile(r"(?:LDSM|STSM)\.16\.MT?88(?:\.([24]))?")
_MATRIX_BYTES = 8 * 8 * 2
_WGMMA = ("HGMMA", "QGMMA", "IGMMA")
_DEPTH_BYTES = 32  # of an operand's row or column in one wgmma: 16 half, 8 tf32, 32 one-byte entries
_FP32 = {"FFMA": 1, "FADD": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMUL2": 2}
_TMA = ("UTMALDG", "UBLKCP")


def read_counts(compiled: Any) -> Counts:
    """The `Counts` of a kernel that Triton compiled for an NVIDIA part."""
    return counts_of(sass.instructions(compiled.asm["cubin"]), compiled.metadata.num_warps)


def counts_of(code: list[Instruction], warps: int) -> Counts:
    """The `Counts` of a kernel of `warps` warps."""
    body, is_loop = hot_body(code)
    opcodes = Counter(i.base for i in body)
    tma = sum(opcodes[name] for name in _TMA)
    flops = [flops_of(i, code, warps) for i in body if is_mma(i)]
    by_tma = tma_bytes(body, code) if tma else 0
    return Counts(
        warps=warps,
        loop=is_loop,
        instructions=len(body),
        mma={name: number for name, number in sorted(opcodes.items()) if sass.MMA.match(name)},
        mma_flops=None if None in flops else sum(flops),
        tma=tma,
        cp_async=opcodes["LDGSTS"],
        ex2=sass.count(body, "MUFU.EX2"),
        mufu=opcodes["MUFU"],
        ffma=opcodes["FFMA"] + 2 * opcodes["FFMA2"],
        fp32=sum(lanes * opcodes[name] for name, lanes in _FP32.items()),
        shuffles=opcodes["SHFL"],
        barriers=opcodes["BAR"] + sass.count(body, "SYNCS.PHASECHK"),
        shared_bytes=sum(shared_bytes(i, code, warps) for i in body),
        global_bytes=None if by_tma is None else by_tma + sum(map(global_bytes, body)) * warps,
    )


def hot_body(code: list[Instruction]) -> tuple[list[Instruction], bool]:
    """The hot loop's instructions, and whether it is a loop."""
    products = sass.hot_loops(code)
    if products:
        return products[0], True
    moving = [body for body in innermost_loops(code) if any(map(global_bytes, body)) or any(i.base in _TMA for i in body)]
    if moving:
        return min(moving, key=lambda body: (-sum(map(global_bytes, body)), len(body), body[0].address)), True
    return [i for i in code if i.base != "NOP"], False


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies between a backward branch and its target that hold no other such, and no end of the kernel (waits are outlined behind it)."""
    ranges = {(i.target, i.address) for i in code if i.target is not None and i.target <= i.address}
    inner = [one for one in ranges if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in ranges)]
    bodies = ([i for i in code if start <= i.address <= end] for start, end in sorted(inner))
    return [body for body in bodies if len(body) > 1 and not any(i.base == "EXIT" for i in body)]


def flops_of(product: Instruction, code: list[Instruction], warps: int) -> int | None:
    """FLOPs of a matrix instruction, all of a program's warps together, in 16-bit products' time: tf32 counts twice, one byte half.
    None where neither opcode nor operands say the size."""
    if product.base in _WGMMA and (tile := _TILE.search(product.opcode)):  # of four warps together
        m, n, k = map(int, tile.groups())
        return 2 * m * n * 16 * warps // QUARTERS if k in (8, 16, 32) else None
    shape = next((_WARP_TILE[word] for word in product.opcode.split(".") if word in _WARP_TILE), None)
    if shape is not None:
        m, n, k = shape
        wide = 2 if "TF32" in product.opcode else 1
        return 2 * m * n * k * wide * warps // (2 if product.base in ("QMMA", "IMMA") else 1)
    if tile := tcgen05_tile(product, code):  # one thread's, for all
        return 2 * tile[0] * tile[1] * 16
    return None


def tcgen05_tile(product: Instruction, code: list[Instruction]) -> tuple[int, int] | None:
    """Rows and columns of a tcgen05.mma, from the instruction descriptor (PTX ISA, "Instruction descriptor": N/8 from bit 17, M/16 from bit
    24), a constant that is moved to a uniform register before it. None where it is no constant."""
    register = re.search(r"idesc\[(UR\d+)\]", product.text)
    descriptor = register and constant_in(register[1], product, code)
    if not descriptor:
        return None
    m, n = 16 * (descriptor >> 24 & 0x1F), 8 * (descriptor >> 17 & 0x3F)
    return (m, n) if m in (64, 128, 256) and n else None


def constant_in(register: str, user: Instruction, code: list[Instruction]) -> int | None:
    """The constant that the nearest write before an instruction puts into a register of its; None for another kind of write."""
    before = (i for i in reversed(code) if i.address < user.address)
    write = next((i for i in before if _operands(i)[0] == register), None)
    found = write and re.fullmatch(r"U?MOV|IMAD\.MOV\.U32", write.opcode) and re.fullmatch(r"0x[0-9a-f]+", _operands(write)[-1])
    return int(found[0], 16) if found else None


def _operands(instruction: Instruction) -> list[str]:
    return [operand.strip() for operand in instruction.text.split(instruction.opcode, 1)[1].split(",")]


def tma_bytes(body: list[Instruction], code: list[Instruction]) -> int | None:
    """What a program's TMA loads bring in: the numbers of bytes that its mbarriers are told to expect. None where one is no constant."""
    arrivals = [i for i in body if i.opcode.startswith("SYNCS.ARRIVE.TRANS64")]
    expected = [constant_in(_operands(i)[-1], i, code) for i in arrivals]
    return None if not expected or None in expected else sum(expected)


def shared_bytes(access: Instruction, code: list[Instruction], warps: int) -> int:
    """What an instruction, of all warps, moves in or out of shared memory; operands that matrix instructions read there included."""
    if matrices := _MATRICES.match(access.opcode):
        return int(matrices[1] or 1) * _MATRIX_BYTES * warps
    if access.base in ("LDS", "STS", "LDGSTS"):
        return sass._bits(access) // 8 * WARP_SIZE * warps
    if access.base in _WGMMA and (tile := _TILE.search(access.opcode)):
        m, n, _ = map(int, tile.groups())
        from_registers = _operands(access)[1].startswith("R")
        return (n + (0 if from_registers else m)) * _DEPTH_BYTES * warps // QUARTERS
    if access.base.startswith("UTC") and (size := tcgen05_tile(access, code)):
        in_tensor_memory = _operands(access)[0].startswith("tmem")
        return (size[1] + (0 if in_tensor_memory else size[0])) * _DEPTH_BYTES
    return 0


def global_bytes(access: Instruction) -> int:
    """What one warp's instruction moves in or out of global memory, every lane active."""
    return sass._bits(access) // 8 * WARP_SIZE if access.base in ("LDG", "STG", "LDGSTS") else 0
