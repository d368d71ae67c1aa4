"""Occupancy against published numbers, bounds against examples counted by hand, and the reader of hot loops against a listing."""

import dataclasses

import pytest

pytest.importorskip("triton", reason="needs triton")

from fastattn.testing import hot_loop, sass
from fastattn.testing.parts import PARTS, Counts, bound, occupancy

# --------------------------------------------------------------------------------------------------------------------
# Occupancy.


@pytest.mark.parametrize(
    "threads, registers, share, programs",
    [(128, 37, 0.75, 12), (320, 37, 0.625, 4)],
    ids=["128 threads", "320 threads"],
)
def test_occupancy_of_the_best_practices_guide(threads, registers, share, programs):
    """CUDA C++ Best Practices Guide, "Calculating occupancy": 37 registers give 75 % at 128 threads a block, and 63 % at 320, of a part with
    65536 registers and 64 warps."""
    found = occupancy(PARTS["sm80"], registers, 0, threads // 32)
    assert (found.programs, found.share, found.limited_by) == (programs, share, "registers")


@pytest.mark.parametrize(
    "part, registers, shared, warps, programs",
    [
        ("sm80", 40, 1000, 12, 4), ("sm80", 128, 49152, 8, 2), ("sm80", 255, 98304, 4, 1),
        ("sm90", 24, 0, 1, 32), ("sm90", 32, 16384, 3, 13), ("sm90", 168, 98304, 4, 2),
        ("sm90", 252, 164864, 8, 1), ("sm100", 96, 49152, 8, 2), ("sm100", 200, 0, 12, 0),
        ("sm120", 32, 0, 1, 24), ("sm120", 37, 0, 12, 4), ("sm120", 64, 98304, 8, 1),
        ("sm120", 128, 16384, 4, 4), ("sm120", 255, 0, 16, 0),
    ],
)  # fmt: skip
def test_occupancy_is_cuda_occupancy_hs(part, registers, shared, warps, programs):
    """Values that cuda_occupancy.h of CUDA 13.0 computes, for the same limits."""
    assert occupancy(PARTS[part], registers, shared, warps).programs == programs


def test_each_limit_is_named():
    part = PARTS["sm90"]
    assert occupancy(part, 32, 0, 1) == dataclasses.replace(occupancy(part, 32, 0, 1), programs=32, warps=32, share=0.5, limited_by="programs")
    assert occupancy(part, 32, 0, 32).limited_by == "warps" and occupancy(part, 32, 0, 32).share == 1.0
    assert occupancy(part, 255, 0, 8).limited_by == "registers"
    assert occupancy(part, 32, 100 * 1024, 4) == dataclasses.replace(occupancy(part, 32, 0, 4), programs=2, warps=8, share=0.125, limited_by="shared memory")


def test_what_does_not_fit_has_no_programs():
    assert occupancy(PARTS["sm90"], 255, 0, 16).programs == 0
    assert occupancy(PARTS["sm120"], 32, 100 * 1024, 4).programs == 0


# --------------------------------------------------------------------------------------------------------------------
# Bounds.


def test_rates_are_those_of_the_data_sheets():
    peaks = {"sm80": 312, "sm90": 989.4, "sm100": 2250, "sm120": 209.5}  # TFLOP/s, dense bf16
    for name, tflops in peaks.items():
        part = PARTS[name]
        assert part.mma * part.multiprocessors * part.clock_ghz / 1e3 == pytest.approx(tflops, rel=0.01)
        assert part.dram_bytes * part.multiprocessors * part.clock_ghz == pytest.approx(part.dram_gbps)


def test_an_attention_tile_by_hand():
    """128 queries by 128 keys, D = 128, eight warps of an H100: two products of 2·128³ FLOPs at 4096 a cycle are 2048 cycles; 128·128
    exponentials at 16 a cycle 1024; 500 instructions a warp, 8 warps, 4 a cycle: 1000."""
    counts = Counts(warps=8, loop=True, instructions=500, mma_flops=2 * 2 * 128**3, ex2=64, mufu=64, fp32=192)
    found = bound(counts, PARTS["sm90"], "tensor", overlap=0.0)
    assert found.cycles == {"tensor": 2048.0, "mufu": 1024.0, "issue": 1000.0, "fp32": 384.0}
    assert (found.slowest, found.percent) == ("tensor", 100.0)
    assert found.in_order_percent == pytest.approx(100 * 2048 / 3072)
    assert bound(counts, PARTS["sm90"], "tensor", overlap=1.0).in_order_percent == 100.0
    # A B200 multiplies twice as fast and has as many special function units: they hold it to as much time.
    blackwell = bound(counts, PARTS["sm100"], "tensor")
    assert (blackwell.cycles["tensor"], blackwell.percent) == (1024.0, 100.0)
    narrow = dataclasses.replace(counts, mma_flops=2 * 2 * 128 * 128 * 64)  # D = 64: half the products, as many exponentials
    assert bound(narrow, PARTS["sm90"], "tensor").percent == 100.0
    assert bound(narrow, PARTS["sm100"], "tensor") == dataclasses.replace(
        bound(narrow, PARTS["sm100"], "tensor"), slowest="mufu", percent=50.0, in_order_percent=pytest.approx(100 / 3)
    )


def test_a_row_by_hand():
    """4096 bf16 columns read and written by four warps of an H100: 16384 bytes at 3352 / (1.83·132) a cycle are 1181 cycles, and 367
    instructions a warp 367."""
    counts = Counts(warps=4, loop=False, instructions=367, mufu=33, fp32=100, global_bytes=16384)
    found = bound(counts, PARTS["sm90"], "memory")
    assert found.cycles["memory"] == pytest.approx(16384 * 1.83 * 132 / 3352) and found.cycles["issue"] == 367.0
    assert (found.slowest, found.percent, found.in_order_percent) == ("memory", 100.0, None)
    slow = dataclasses.replace(counts, instructions=2400)
    assert bound(slow, PARTS["sm90"], "memory").slowest == "issue"
    assert bound(slow, PARTS["sm90"], "memory").percent == pytest.approx(100 * found.cycles["memory"] / 2400)


def test_what_is_not_known_bounds_nothing():
    counts = Counts(warps=4, loop=True, instructions=100, mma={"UTCHMMA": 8}, mma_flops=None, global_bytes=None)
    for peak in ("tensor", "memory"):
        found = bound(counts, PARTS["sm100"], peak)
        assert found.percent is None and found.cycles == {"issue": 100.0}
    assert bound(Counts(warps=1, loop=False, instructions=0), PARTS["sm90"], "memory").slowest == "nothing"


def test_fp32_bounds_what_has_no_matrix_instruction():
    counts = Counts(warps=8, loop=True, instructions=640, ffma=512, fp32=512)
    assert bound(counts, PARTS["sm90"], "fp32").cycles == {"fp32": 1024.0, "issue": 1280.0}
    assert bound(counts, PARTS["sm90"], "fp32").percent == 80.0
    assert bound(counts, PARTS["sm80"], "fp32").percent == 100.0  # an A100 has half the lanes


def test_counts_survive_json():
    counts = Counts(warps=8, loop=True, instructions=5, mma={"HGMMA": 2}, mma_flops=None, ex2=3)
    assert counts.as_json() == {"warps": 8, "loop": True, "instructions": 5, "mma": {"HGMMA": 2}, "mma_flops": None, "ex2": 3}
    assert Counts(**counts.as_json()) == counts


# --------------------------------------------------------------------------------------------------------------------
# The reader.

ATTENTION = """
.L_x_0:
        /*0000*/                   UTMALDG.4D [UR8], [UR6] ;
        /*0004*/               @P0 IMAD.MOV.U32 R12, RZ, RZ, 0x4800 ;
        /*0008*/               @P0 SYNCS.ARRIVE.TRANS64 RZ, [R13+URZ+0xd800], R12 ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R3 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   MUFU.EX2 R50, R50 ;
        /*0050*/                   MUFU.RCP R50, R50 ;
        /*0060*/                   FFMA R51, R50, R51, R52 ;
        /*0070*/                   FFMA2 R54, R50, R51, R52 ;
        /*0080*/                   FADD.FTZ R51, R50, R51 ;
        /*0090*/                   SHFL.BFLY PT, R51, R50, 0x1, 0x1f ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R88, R36, gdesc[UR16].tnspB, R88, gsb0 ;
        /*00b0*/                   STSM.16.M88.4 [R5], R24 ;
        /*00c0*/                   LDS.128 R8, [R5] ;
        /*00d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00e0*/              @!P0 BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
"""


def test_counts_of_a_listing():
    counts = hot_loop.counts_of(sass.parse(ATTENTION), warps=8)
    assert counts == Counts(
        warps=8, loop=True, instructions=17, mma={"HGMMA": 3},
        mma_flops=2 * (2 * 2 * 64 * 128 * 16 + 2 * 64 * 64 * 16),  # two warp groups
        tma=1, ex2=1, mufu=2, ffma=3, fp32=4, shuffles=1, barriers=2,
        # wgmma: 64 rows and 128 columns of 32 bytes, twice; 64 columns, the rows being in registers; four matrices of 128 bytes and 16 bytes
        # a lane for each of eight warps
        shared_bytes=2 * (2 * 192 + 64) * 32 + 8 * (4 * 128 + 16 * 32),
        global_bytes=0x4800,
    )  # fmt: skip
    unknown = hot_loop.counts_of(sass.parse(ATTENTION.replace("0x4800", "R4")), warps=8)
    assert unknown == dataclasses.replace(counts, global_bytes=None)


def test_a_loop_without_products_is_the_one_that_moves_most():
    listing = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   EXIT ;
"""
    counts = hot_loop.counts_of(sass.parse(listing), warps=2)
    assert (counts.loop, counts.instructions, counts.global_bytes) == (True, 3, (16 + 2) * 32 * 2)
    straight = "\n".join(line for line in listing.splitlines() if "BRA" not in line)
    assert hot_loop.counts_of(sass.parse(straight), 2) == Counts(warps=2, loop=False, instructions=5, global_bytes=(16 + 16 + 2) * 64)


@pytest.mark.parametrize(
    "text, flops",
    [
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", 2 * 16 * 8 * 8 * 2),
        ("QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4", 2 * 16 * 8 * 32 // 2),
        ("HGMMA.64x256x8.F32.TF32 R4, gdesc[UR4], R4", 2 * 64 * 256 * 16 // 4),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], !UPT", None),
    ],
)
def test_flops_of_an_instruction(text, flops):
    """Of one warp; tf32 counts for the time that it takes, twice that of 16 bits."""
    (instruction,) = sass.parse(f"        /*0000*/                   {text} ;")
    found = hot_loop.flops_of(instruction, [instruction], warps=4)
    assert found == (None if flops is None else 4 * flops)


def test_tcgen05_says_its_size_in_a_descriptor():
    listing = """
        /*0000*/                   UMOV UR17, 0x40004040 ;
        /*0010*/                   UMOV UR17, 0x8210490 ;
        /*0020*/                   UMOV UR171, 0x1 ;
        /*0030*/                   UTCHMMA tmem[UR23], gdesc[UR28], tmem[UR4], tmem[UR16], idesc[UR17], UPT ;
        /*0040*/                   UTCHMMA gdesc[UR24], gdesc[UR28], tmem[UR4], tmem[UR16], idesc[UR17], UPT ;
        /*0050*/                   UIADD3 UR17, UR17, 0x1, URZ ;
        /*0060*/                   UTCHMMA gdesc[UR24], gdesc[UR28], tmem[UR4], tmem[UR16], idesc[UR17], UPT ;
"""
    code = sass.parse(listing)
    products = [i for i in code if i.base == "UTCHMMA"]
    assert [hot_loop.tcgen05_tile(i, code) for i in products] == [(128, 128), (128, 128), None]
    assert [hot_loop.flops_of(i, code, warps=8) for i in products] == [2 * 128 * 128 * 16] * 2 + [None]
    assert [hot_loop.shared_bytes(i, code, warps=8) for i in products] == [128 * 32, 256 * 32, 0]
