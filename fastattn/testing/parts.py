"""What a multiprocessor of each part holds and does in a cycle, and what follows from it for a kernel: occupancy, and a bound on its speed.

    part = PARTS["sm90"]
    occupancy(part, registers=168, shared=98304, warps=8)      # Occupancy(programs=1, warps=8, share=0.125, limited_by="registers")
    bound(counts, part, peak="tensor")                         # Bound(cycles={"tensor": 2048.0, "mufu": 1056.0, ...}, ...)

Pure arithmetic on data-sheet figures: a bound says what no run can beat, not what a run will give. A figure that comes from counts and
rates alone is no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

WARP_SIZE = 32
QUARTERS = 4  # of a multiprocessor: each has a scheduler, a fourth of the registers, and warps of its own
REGISTER_UNIT = 256  # registers are given to a warp in so many
SHARED_UNIT = 128  # bytes of shared memory, to a program
SHARED_RESERVED = 1024  # bytes of it that the system takes for each resident program


@dataclass(frozen=True)
class Part:
    """One multiprocessor, and the GPU of the part whose data sheet gives clock and bandwidth.

    Limits are those of the CUDA programming guide's table of technical specifications. Rates are a cycle's: `mma` FLOPs of 16-bit matrix
    products that accumulate in fp32, `fp32` lanes, `mufu` special functions, `issue` instructions of a warp, `shared_bytes` of shared
    memory.
    """

    name: str
    gpu: str
    multiprocessors: int
    clock_ghz: float  # boost, as the data sheet's peak rates assume it
    dram_gbps: float
    max_warps: int
    max_programs: int
    shared: int  # bytes
    mma: int
    fp32: int
    mufu: int = 16
    issue: int = QUARTERS
    shared_bytes: int = 128
    registers: int = 65536

    @property
    def dram_bytes(self) -> float:
        """A multiprocessor's share of a cycle's DRAM traffic."""
        return self.dram_gbps / (self.clock_ghz * self.multiprocessors)


# Sources. Limits (warps, programs, shared memory): CUDA C++ Programming Guide, "Technical specifications per compute capability".
# fp32, mufu: the same guide's "Throughput of native arithmetic instructions" (results per clock cycle per multiprocessor). mma: the data
# sheets' dense bf16 peak over clock and multiprocessors: A100 312 TFLOP/s, H100 SXM 989.4, B200 2250, RTX 5090 209.5 (GeForce parts
# accumulate in fp32 at half the rate of their workstation twins). shared_bytes: 32 banks of 4 bytes. Clocks, bandwidths: the data sheets.
# "sm120" is also the row of 8.6 and 8.9, which have as little shared memory, but other limits than these.
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("sm80", "A100 SXM 80 GB", 108, 1.41, 2039, max_warps=64, max_programs=32, shared=164 * 1024, mma=2048, fp32=64),
        Part("sm90", "H100 SXM 80 GB", 132, 1.83, 3352, max_warps=64, max_programs=32, shared=228 * 1024, mma=4096, fp32=128),
        Part("sm100", "B200", 148, 1.85, 8000, max_warps=64, max_programs=32, shared=228 * 1024, mma=8192, fp32=128),
        Part("sm120", "GeForce RTX 5090", 170, 2.41, 1792, max_warps=48, max_programs=24, shared=100 * 1024, mma=512, fp32=128),
    )
}


# --------------------------------------------------------------------------------------------------------------------
# Occupancy.


@dataclass(frozen=True)
class Occupancy:
    """How many programs of a kernel a multiprocessor holds, their warps, these as a share of all that it could hold, and what sets it."""

    programs: int
    warps: int
    share: float
    limited_by: str


def occupancy(part: Part, registers: int, shared: int, warps: int) -> Occupancy:
    """Of programs of `warps` warps, with `registers` a thread and `shared` bytes each, static and dynamic. Where two limits are equal, the
    first of warps, programs, registers and shared memory is named. `cuda_occupancy.h` computes the same."""
    registers_a_warp = _up(max(registers, 1) * WARP_SIZE, REGISTER_UNIT)
    warps_by_registers = QUARTERS * (part.registers // QUARTERS // registers_a_warp)
    limits = {
        "warps": part.max_warps // warps,
        "programs": part.max_programs,
        "registers": warps_by_registers // warps,
        "shared memory": part.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
    }
    limited_by = min(limits, key=lambda name: limits[name])
    programs = limits[limited_by]
    return Occupancy(programs, programs * warps, programs * warps / part.max_warps, limited_by)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# --------------------------------------------------------------------------------------------------------------------
# What the instructions of a tile take.


@dataclass(frozen=True)
class Counts:
    """What one pass through a kernel's hot loop issues, or one through the whole kernel, where nothing is repeated.

    Counts are of one warp's instructions in the code, as if each ran once: both sides of a branch count, and a wait's retries do not.
    """

    warps: int  # of a program
    loop: bool  # False: these are the whole kernel's
    instructions: int
    mma: Mapping[str, int] = field(default_factory=dict)  # by opcode
    mma_flops: int | None = 0  # a program's, tf32 products at twice their number, one-byte ones at half; None where the code does not say
    tma: int = 0  # UTMALDG, UBLKCP: copies by TMA, which one thread issues for all
    cp_async: int = 0  # LDGSTS
    ex2: int = 0  # MUFU.EX2
    mufu: int = 0  # every MUFU
    ffma: int = 0
    fp32: int = 0  # FFMA, FADD and FMUL; packed pairs as two
    shuffles: int = 0  # SHFL
    barriers: int = 0  # BAR, and waits for an mbarrier
    shared_bytes: int = 0  # that a program reads and writes in shared memory, the operands of wgmma with it, TMA's writes left out
    global_bytes: int | None = 0  # that a program's loads and stores move, every lane active; None: not known, of TMA

    def as_json(self) -> dict[str, Any]:
        """Without what is nothing, as cards are many."""
        always = ("warps", "loop", "instructions")
        found = {name: value for name, value in vars(self).items() if name in always or value is None or value}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


Peak = Literal["tensor", "fp32", "memory"]


@dataclass(frozen=True)
class Bound:
    """What a tile's instructions imply.

    cycles: of each unit, for one tile of one program; slowest: the unit that has most; percent: of the peak rate of `peak`'s unit, if all
    others work in its shadow, as several resident programs may let them; in_order_percent: of "tensor", if the rest comes after the matrix
    products, as in one program alone, but for `overlap`'s share of it.
    """

    cycles: dict[str, float]
    slowest: str
    peak: str
    percent: float | None
    in_order_percent: float | None


def bound(counts: Counts, part: Part, peak: Peak, overlap: float = 0.0) -> Bound:
    """The cycles that a tile takes each unit of a multiprocessor, and the share of `peak` that they permit.

    overlap: the share of what is not matrix product (as far as a card sees it: of the exponentials) that runs under it. A unit whose work
    is unknown (None in counts) has no cycles, and where that is `peak`'s, there is no percentage. "memory" is DRAM: for kernels that read
    each byte once.
    """
    lanes = WARP_SIZE * counts.warps
    work = {
        "tensor": (counts.mma_flops, part.mma),
        "mufu": (lanes * counts.mufu, part.mufu),
        "fp32": (lanes * counts.fp32, part.fp32),
        "issue": (counts.warps * counts.instructions, part.issue),
        "shared": (counts.shared_bytes, part.shared_bytes),
    }
    if peak == "memory":
        work["memory"] = (counts.global_bytes, part.dram_bytes)
    cycles = {unit: amount / rate for unit, (amount, rate) in work.items() if amount}
    if not cycles:
        return Bound({}, "nothing", peak, None, None)
    slowest = max(cycles, key=lambda unit: cycles[unit])
    wanted = cycles.get(peak)
    if wanted is None:
        return Bound(cycles, slowest, peak, None, None)
    in_order = None
    if peak == "tensor":
        beside = max(cycles.get(unit, 0.0) for unit in ("mufu", "fp32", "issue"))
        in_order = wanted / max(wanted + (1 - overlap) * beside, cycles[slowest]) * 100
    return Bound(cycles, slowest, peak, wanted / cycles[slowest] * 100, in_order)
