"""The machine-code reader must see what toy kernels were built to contain, and the loops of a hand-written listing."""

import json

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")

import triton.language as tl  # noqa: E402

from fastattn.testing.sass import (  # noqa: E402
    count,
    hot_loops,
    instructions,
    overlap,
    parse,
    read_card,
    resource_usage,
)
from fastattn.testing.stub_driver import stub_driver  # noqa: E402

# An outer loop around two inner ones, the second with more HGMMAs; a wait outlined behind EXIT that branches back.
LISTING = """
        .global         _kernel
_kernel:
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   FADD R5, R5, 1 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   MUFU.EX2 R50, R50 ;
        /*0070*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0090*/                   MUFU.EX2 R51, R51 ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R88, R36, gdesc[UR16].tnspB, R88 ;
        /*00b0*/                   MUFU.EX2 R52, R52 ;
        /*00c0*/                   LDL.64 R2, [R1] ;
        /*00d0*/                   HGMMA.64x64x16.F32.BF16 R88, R40, gdesc[UR16].tnspB, R88, gsb0 ;
        /*00e0*/                   MUFU.EX2 R53, R53 ;
        /*00f0*/                   MUFU.RCP R53, R53 ;
        /*0100*/              @UP0 BRA `(.L_x_2) ;
        /*0110*/               @P3 BRA `(.L_x_0) ;
        /*0120*/                   EXIT ;
.L_x_4:
        /*0130*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R3 ;
        /*0140*/              @!P1 BRA `(.L_x_4) ;
        /*0150*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*0160*/                   BRA `(.L_x_5);
"""


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, cols, ks = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + k + ks[None, :])
        b = tl.load(b_ptr + (k + ks)[:, None] * BLOCK + cols[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows[:, None] * BLOCK + cols[None, :], acc)


@triton.jit
def _softmax_between_products(q_ptr, k_ptr, v_ptr, out_ptr, n, OVERLAP: tl.constexpr, D: tl.constexpr):
    """exp2(Q·Kᵀ)·V over n keys, P·V of a block either after its own exponentials or under those of the next block."""
    BLOCK: tl.constexpr = 128
    q_desc = tl.make_tensor_descriptor(q_ptr, [n, D], [D, 1], [BLOCK, D])
    k_desc = tl.make_tensor_descriptor(k_ptr, [n, D], [D, 1], [BLOCK, D])
    v_desc = tl.make_tensor_descriptor(v_ptr, [n, D], [D, 1], [BLOCK, D])
    q = q_desc.load([0, 0])
    acc = tl.zeros((BLOCK, D), tl.float32)
    row_max = tl.zeros((BLOCK,), tl.float32)
    p = tl.zeros((BLOCK, BLOCK), tl.bfloat16).to(tl.int16, bitcast=True)
    for start in tl.range(BLOCK, n, BLOCK):
        s = tl.dot(q, k_desc.load([start, 0]).T)
        if OVERLAP:
            acc = tl.dot(p.to(tl.bfloat16, bitcast=True), v_desc.load([start - BLOCK, 0]), acc)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        weights = tl.exp2(s - new_max[:, None])
        acc = acc * tl.exp2(row_max - new_max)[:, None]
        row_max = new_max
        p = weights.to(tl.bfloat16).to(tl.int16, bitcast=True)
        if not OVERLAP:
            acc = tl.dot(p.to(tl.bfloat16, bitcast=True), v_desc.load([start, 0]), acc)
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, D)
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], acc)


def compiled_matmul(capability, **meta):
    a, b, c = torch.zeros(128, 512).half(), torch.zeros(512, 128).half(), torch.zeros(128, 128)
    with stub_driver(capability) as driver:
        _matmul[(1,)](a, b, c, 512, BLOCK=128, BLOCK_K=32, enable_fp_fusion=True, **meta)
        return driver.launches[0].compiled


def compiled_softmax(order):
    q, out = torch.zeros(1024, 128, dtype=torch.bfloat16), torch.zeros(128, 128)
    with stub_driver((9, 0)) as driver:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
        _softmax_between_products[(1,)](
            q, q, q, out, 1024, order == "overlapped", 128, num_warps=8, num_stages=2, enable_fp_fusion=True
        )
        return driver.launches[0].compiled


def test_parse():
    code = parse(LISTING)
    assert [i.address for i in code] == list(range(0, 0x170, 16))
    assert code[2].opcode == "HGMMA.64x128x16.F32.BF16" and code[2].base == "HGMMA"
    assert code[5] == (0x50, "BRA", "@!P0 BRA `(.L_x_1)", 0x20)
    assert code[7].target == 0x130 and code[0].target is None
    assert count(code, "LDL", "STL") == 1 and count(code, "MUFU.EX2") == 4 and count(code, "MUFU") == 5


def test_hot_loops_are_the_innermost_with_the_most_mma_first():
    loops = hot_loops(parse(LISTING))
    assert [(body[0].address, body[-1].address) for body in loops] == [(0x60, 0x100), (0x20, 0x50)]


def test_equal_loops_the_shorter_first():
    shorter = LISTING.replace("HGMMA.64x64x16.F32.BF16 R88, R36", "FADD R88, R36")
    assert hot_loops(parse(shorter))[0][0].address == 0x20


def test_overlap_counts_the_exponentials_under_the_carried_product():
    carried, fresh = hot_loops(parse(LISTING))
    assert overlap(carried) == 1 / 4  # of four, one stands between the two HGMMAs into R88
    assert overlap(fresh) is None


@pytest.mark.parametrize(
    "capability, mma", [((8, 0), "HMMA"), ((9, 0), "HGMMA"), ((10, 0), "UTCHMMA"), ((12, 0), "HMMA")]
)
def test_matrix_instruction_of_each_part(capability, mma):
    card = read_card(compiled_matmul(capability))
    assert list(card["mma"]) == [mma] and card["mma"][mma] > 0
    assert card["arch"] == 10 * capability[0] + capability[1]
    assert card["name"] == "_matmul" and card["num_warps"] == 4 and card["cp_async"] > 0
    assert 0 < card["hot_loop_instructions"] < card["instructions"]
    assert card["hot_loop_mma"] > 0 and card["overlap"] is None
    assert 0 < card["registers"] <= 255
    assert json.loads(json.dumps(card)) == card


def test_spills_are_seen():
    roomy, cramped = (read_card(compiled_matmul((8, 0), **meta)) for meta in ({}, {"maxnreg": 64}))
    assert roomy["stack"] == roomy["local"] == 0
    assert cramped["registers"] <= 64 and cramped["stack"] > 0 and cramped["local"] > 0


def test_overlap_and_tma_of_a_softmax_between_two_products():
    strict, overlapped = (read_card(compiled_softmax(order)) for order in ("strict", "overlapped"))
    assert strict["overlap"] == 0.0
    assert overlapped["overlap"] >= 0.5
    for card in (strict, overlapped):
        assert card["hot_loop_mma"] == 16 and card["hot_loop_ex2"] >= 64 and card["tma"] > 0 and card["stack"] == 0


def test_not_a_cubin():
    for read in (instructions, resource_usage):
        with pytest.raises(RuntimeError, match="failed on the cubin|expected one kernel"):
            read(b"nothing of the kind")
