"""Paged attention: the kernel in the interpreter and the CPU path against float64, its properties, hostile tables, the launch path."""

from __future__ import annotations

import pytest
import torch
from op_contract import check_operator, launched_on, layout
from paged_cases import BF16, E4M3, F16, F32, FEATURES, INT8, NOWHERE, VALUES, Case, check, pages_of
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.reference import paged_attention as reference

NAN = float("nan")


def paged(q, k_cache, v_cache, page_table, seqlens_k, **options):
    return fastattn.paged_attention(q, k_cache, v_cache, page_table, seqlens_k, **options, return_lse=True)


def assert_same(got, expected, tolerance=2e-6):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------------------------------
# Values.


@pytest.mark.both
@pytest.mark.parametrize("case", VALUES, ids=str)
def test_values(case):
    check(case)


@pytest.mark.both
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_feature_values(case):
    check(case)


@pytest.mark.both
@pytest.mark.parametrize("S_q", [1, 9, 33])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": (20, 3), "causal": False}], ids=str)
def test_paged_is_contiguous_is_dense(S_q, options):
    """One page a sequence, pages of 16 rows, and `fastattn.attention` of the same keys."""
    lengths = torch.tensor([100, 100], dtype=torch.int32)
    q, k, v = torch.randn(2, S_q, 4, 64), torch.randn(2, 100, 2, 64), torch.randn(2, 100, 2, 64)
    caches, table = pages_of(k, v, lengths=lengths, page_size=16)
    got = paged(q, *caches, table, lengths, **options)
    one_page = paged(q, k, v, torch.arange(2, dtype=torch.int32)[:, None], lengths, **options)
    dense = fastattn.attention(q, k, v, **{"causal": True, **options}, return_lse=True)
    assert_same(got, one_page)
    assert_same(got, dense)


@pytest.mark.both
@pytest.mark.parametrize("packed", [None, (1, 4, 30)], ids=str)
def test_splits_change_nothing(packed):
    arguments, options = Case((150, 130, 77), S_q=2, H=2, H_kv=1, packed=packed, dtype=F32, sinks=True).arguments()
    one = paged(*arguments, **options, num_splits=1)
    for num_splits in (2, 3, 17):
        assert_same(paged(*arguments, **options, num_splits=num_splits), one)


@pytest.mark.interpret
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_fixed_split_gives_the_same_bits_in_any_company(num_splits):
    (q, *caches, table, lengths), options = Case((150, 130, 300), packed=(1, 5, 40), dtype=F32).arguments()
    starts = options["cu_seqlens_q"].tolist()
    out, lse = paged(q, *caches, table, lengths, **options, num_splits=num_splits)
    for b in range(3):
        rows = slice(starts[b], starts[b + 1])
        alone = dict(cu_seqlens_q=torch.tensor([0, starts[b + 1] - starts[b]], dtype=torch.int32))
        out_, lse_ = paged(q[rows], *caches, table[b : b + 1], lengths[b : b + 1], **alone, num_splits=num_splits)
        assert torch.equal(out_, out[rows]) and torch.equal(lse_, lse[:, rows])
    # of equally many queries, as in decoding, whatever the batch
    q = q[:3, None]
    out, lse = paged(q, *caches, table, lengths, num_splits=num_splits)
    for b in range(3):
        out_, lse_ = paged(q[b : b + 1], *caches, table[b : b + 1], lengths[b : b + 1], num_splits=num_splits)
        assert torch.equal(out_[0], out[b]) and torch.equal(lse_[0], lse[b])


@pytest.mark.both
@pytest.mark.parametrize("num_splits", [8, pytest.param(40, marks=pytest.mark.more)])
def test_nor_does_the_number_of_rows_change_a_bit(num_splits):
    """With those of 40 sequences, the splits are merged in larger tiles."""
    lengths = torch.full((40,), 253, dtype=torch.int32)
    cache, table = torch.randn(16, 16, 1, 16), torch.arange(16, dtype=torch.int32).expand(40, -1)
    q = torch.randn(40, 1, 32, 16)
    together = paged(q, cache, cache, table, lengths, num_splits=num_splits)
    for b in (0, 39):
        row = slice(b, b + 1)
        alone = paged(q[row], cache, cache, table[row], lengths[row], num_splits=num_splits)
        assert torch.equal(alone[0], together[0][row]) and torch.equal(alone[1], together[1][row])


@pytest.mark.parametrize("page_size", [16, 5000])
def test_a_fixed_split_on_the_cpu_gives_the_same_bits_in_any_company(page_size):
    arguments, _ = Case((3900, *[3000] * 7), H=8, page_size=page_size, dtype=F32).arguments()
    together = paged(*arguments, num_splits=4)
    q, *caches, table, lengths = arguments
    for b in range(3):
        row = slice(b, b + 1)
        alone = paged(q[row], *caches, table[row], lengths[row], num_splits=4)
        assert torch.equal(alone[0], together[0][row]) and torch.equal(alone[1], together[1][row])


@pytest.mark.both
def test_pages_may_repeat_and_be_shared():
    k_cache, v_cache = torch.randn(2, 4, 16, 2, 64).unbind(0)
    table = torch.tensor([[1, 1, 3], [1, 2, 1]], dtype=torch.int32)
    arguments = torch.randn(2, 3, 4, 64), k_cache, v_cache, table, torch.tensor([40, 35], dtype=torch.int32)
    assert_same(paged(*arguments), reference(*arguments, return_lse=True))


@pytest.mark.both
@pytest.mark.parametrize("S_q, B", [(0, 2), (1, 0), (0, 0)])
def test_nothing_to_do(S_q, B):
    cache = torch.randn(3, 16, 2, 64)
    table, lengths = torch.zeros(B, 2, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
    out, lse = paged(torch.randn(B, S_q, 4, 64), cache, cache, table, lengths)
    assert out.shape == (B, S_q, 4, 64) and lse.shape == (B, 4, S_q)
    cu_seqlens = torch.zeros(B + 1, dtype=torch.int32)
    out, lse = paged(torch.randn(5, 4, 64), cache, cache, table, lengths, cu_seqlens_q=cu_seqlens)
    assert torch.equal(out, torch.zeros(5, 4, 64)) and (lse == -torch.inf).all()


@pytest.mark.both
@pytest.mark.parametrize("table_width", [0, 1])
def test_empty_sequences_in_an_empty_cache(table_width):
    cache, q = torch.randn(0, 16, 2, 64), torch.randn(2, 1, 4, 64)
    table, lengths = torch.full((2, table_width), NOWHERE, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    out, lse = paged(q, cache, cache, table, lengths)
    assert torch.equal(out, torch.zeros_like(q)) and (lse == -torch.inf).all()


@pytest.mark.both
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("S_q", [1, 40])
def test_entries_before_every_window_are_not_read(page_size, S_q):
    (q, *caches, table, lengths), options = Case((300, 200), S_q=S_q, page_size=page_size, options=dict(window=(30, 0))).arguments()
    expected = paged(q, *caches, table, lengths, **options)
    for b, length in enumerate(lengths.tolist()):
        before = (length - S_q - 30) // page_size
        assert before > 0
        for cache in caches:
            cache[table[b, :before].long()] = NAN
        table[b, :before] = -7
    assert_same(paged(q, *caches, table, lengths, **options), expected, 0.0)


@pytest.mark.both
def test_strides():
    """A layer's slice of one cache for all of them, heads first, a wider table, queries cut from one projection."""
    (q, k_cache, v_cache, table, lengths), _ = Case(S_q=3, dtype=F32).arguments()
    expected = paged(q, k_cache, v_cache, table, lengths)
    both = torch.stack([k_cache, v_cache], 1).transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.cat([table, table], 1)[:, : table.shape[1]]
    q = torch.cat([q, q], -1)[..., :64]
    assert not q.is_contiguous() and not wide.is_contiguous()
    assert_same(paged(q, both[:, 0], both[:, 1], wide, lengths), expected)
    turned, (table_, lengths_) = q.transpose(-1, -2).contiguous().transpose(-1, -2), (t.repeat_interleave(2, -1)[..., ::2] for t in (table, lengths))
    assert_same(paged(turned, k_cache, v_cache, table_, lengths_), expected)
    scales = torch.rand(4)
    strided, plain = (paged(q, k_cache, v_cache, table, lengths, k_scale=s, v_scale=s) for s in (scales[::2], scales[::2].clone()))
    assert_same(strided, plain, 0.0)


@pytest.mark.both
@pytest.mark.parametrize("page_size", [16, 128])
def test_leftpad(page_size):
    """Below the public call: the first places of a sequence hold nothing, and positions count from there."""
    from fastattn.ops.paged_attention import attend_paged

    lengths, pads = torch.tensor([60, 90, 8], dtype=torch.int32), torch.tensor([7, 0, 8], dtype=torch.int32)
    q, k, v = torch.randn(3, 5, 4, 64), torch.randn(3, 90, 2, 64), torch.randn(3, 90, 2, 64)
    for b, pad in enumerate(pads.tolist()):
        k[b, :pad], v[b, :pad] = NAN, NAN
    caches, table = pages_of(k, v, lengths=lengths, page_size=page_size)
    out, lse = attend_paged(q, *caches, table, lengths, leftpad=pads, window_left=30, window_right=0)
    for b, (length, pad) in enumerate(zip(lengths.tolist(), pads.tolist(), strict=True)):
        rows = q[b : b + 1], k[b : b + 1, pad:length], v[b : b + 1, pad:length]
        expected = fastattn.reference.attention(*rows, causal=True, window=(30, 0), return_lse=True)
        assert_same((out[b : b + 1], lse[b : b + 1]), expected)


@pytest.mark.both
def test_cascade_is_the_plain_result():
    prefix, lengths = torch.tensor([5, 2, 8], dtype=torch.int32), torch.tensor([20, 3, 40, 4], dtype=torch.int32)
    k_cache, v_cache = torch.randn(2, 20, 16, 2, 64).unbind(0)
    table = torch.randperm(12)[:12].view(4, 3).int() + 8
    q, sinks = torch.randn(4, 3, 4, 64), torch.randn(4)
    options = dict(sinks=sinks, softcap=3.0, return_lse=True)
    got = fastattn.cascade_attention(q, k_cache, v_cache, prefix, table, lengths, **options)
    whole = torch.cat([prefix.expand(4, -1), table], 1)
    expected = fastattn.paged_attention(q, k_cache, v_cache, whole, lengths + 48, **options)
    assert_same(got, expected)
    assert_same([fastattn.cascade_attention(q, k_cache, v_cache, prefix, table, lengths, sinks=sinks, softcap=3.0)], got[:1], 0.0)


def test_cascade_checks_its_own_arguments():
    cache, table = torch.randn(4, 16, 2, 64), torch.zeros(1, 1, dtype=torch.int32)
    lengths, prefix = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cascade_attention: q must have shape \(B, S_q, H, D\), got \(1, 4, 64\)"):
        fastattn.cascade_attention(torch.randn(1, 4, 64), cache, cache, prefix, table, lengths)
    with pytest.raises(ValueError, match=r"cascade_attention: prefix_pages must have shape \(P,\), got \(1, 1\)"):
        fastattn.cascade_attention(torch.randn(1, 1, 4, 64), cache, cache, prefix[None], table, lengths)


# --------------------------------------------------------------------------------------------------------------------
# Hostile values, below the check: the launcher itself, under the bounds checker.


def launch(q, k_cache, v_cache, table, lengths, cu_seqlens_q=None, leftpad=None, max_seqlen_q=None, num_splits=1):
    from fastattn.kernels.paged_attention import paged_attention

    options = q.shape[-1] ** -0.5, 0.0, num_splits
    max_seqlen_q = max_seqlen_q or q.shape[0 if cu_seqlens_q is not None else 1]
    return paged_attention(
        q, k_cache, v_cache, table, lengths, cu_seqlens_q, None, None, None, None, leftpad, max_seqlen_q, None, 0, *options
    )


@pytest.mark.interpret
@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("S_q", [1, 20])
def test_keys_of_a_page_out_of_range_are_masked(page_size, num_splits, S_q):
    lengths = torch.tensor([300, 64], dtype=torch.int32)
    q, k, v = torch.randn(2, S_q, 4, 64), torch.randn(2, 300, 2, 64), torch.randn(2, 300, 2, 64)
    caches, table = pages_of(k, v, lengths=lengths, page_size=page_size)
    mask = torch.ones(2, 1, S_q, 300, dtype=torch.bool).tril(300 - S_q)
    mask[1] = torch.ones(S_q, 300, dtype=torch.bool).tril(64 - S_q)
    for entry, page in ((0, -1), (2, caches[0].shape[0]), (3, NOWHERE), (-1, -(2**31))):
        at = entry % (-(-300 // page_size))
        table[0, at] = page
        mask[0, ..., at * page_size : (at + 1) * page_size] = False
    got = launch(q, *caches, table, lengths, num_splits=num_splits)
    assert_same(got, fastattn.reference.attention(q, k, v, attn_bias=mask, return_lse=True))


@pytest.mark.interpret
@pytest.mark.parametrize("page_size", [8, 64, 512])
def test_no_length_makes_it_read_outside(page_size):
    caches = [torch.randn(3, page_size, 2, 64) for _ in range(2)]
    table = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0]], dtype=torch.int32)[:, : 1 if page_size == 512 else 2]
    capacity = table.shape[1] * page_size
    for lengths in ([-5, 2**31 - 1, -(2**31), capacity + 1], [capacity] * 4):
        lengths = torch.tensor(lengths, dtype=torch.int32)
        q, expected = torch.randn(4, 3, 4, 64), lengths.clamp(0, capacity)
        assert_same(launch(q, *caches, table, lengths, num_splits=2), reference(q, *caches, table, expected, return_lse=True))
        for pads in ([-9, 2**31 - 1, 5, capacity], [2**31 - 1, -(2**31), 0, 1]):
            launch(q, *caches, table, lengths, leftpad=torch.tensor(pads, dtype=torch.int32))


@pytest.mark.interpret
@pytest.mark.parametrize("cu_seqlens", [[0, 50, 60, 70], [-4, 2, 2**31 - 1, -9], [9, 0, 0, 0]], ids=str)
def test_no_cu_seqlens_makes_it_read_outside(cu_seqlens):
    (q, *caches, table, lengths), _ = Case(packed=(2, 3, 4)).arguments()
    launch(q, *caches, table, lengths, torch.tensor(cu_seqlens, dtype=torch.int32), max_seqlen_q=5, num_splits=2)


@pytest.mark.interpret
def test_no_bound_on_the_queries_makes_it_read_outside():
    arguments, options = Case(packed=(2, 3, 4), dtype=F32).arguments()
    expected = paged(*arguments, **options)
    for bound in (2**28 + 1000, 2**31 - 1):
        assert_same(paged(*arguments, **options | {"max_seqlen_q": bound}), expected)


@pytest.mark.interpret
@pytest.mark.parametrize("num_splits", [1, 3])
def test_program_order_does_not_matter(num_splits):
    from fastattn.testing.checker import assert_order_independent

    arguments, options = Case(packed=(1, 7, 40)).arguments()
    assert_order_independent(lambda: paged(*arguments, **options, num_splits=num_splits))


@pytest.mark.interpret
def test_windows_of_any_size():
    (q, *caches, table, lengths), _ = Case(S_q=40, dtype=F32).arguments()
    expected = paged(q, *caches, table, lengths, causal=False)
    for window in ((2**31 - 1, 2**31 - 1), (2**40, 2**40), (150, 150)):
        assert_same(paged(q, *caches, table, lengths, causal=False, window=window), expected, 0.0)


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile_of_the_table():
    from fastattn.kernels.paged_attention import paged_attention
    from fastattn.kernels.paged_tiles import PAGED_TILES

    for (_, dtype_class, bucket, _), config in dict.fromkeys(PAGED_TILES.items()):
        for page_size in (16, 128):
            cache = INT8 if dtype_class == "quantized" else None
            D = bucket - 3
            case = Case((150, 40), S_q=6, D=D, D_v=D, cache=cache, page_size=page_size, dtype=F32 if dtype_class == "single" else F16)
            arguments, options = case.arguments()
            scales = options.get("k_scale"), options.get("v_scale")
            got = paged_attention(*arguments, None, None, None, *scales, None, 6, 50, 0, D**-0.5, 0.0, 2, config)
            expected = reference(arguments[0].double(), *arguments[1:], **options, window=(50, 0), return_lse=True)
            torch.testing.assert_close(got[0].double(), expected[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-3, atol=2e-3)


# --------------------------------------------------------------------------------------------------------------------
# The CPU path.


class LargestAllocation(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("page_size", [1, 16, 4096])
@pytest.mark.parametrize("cache", [None, INT8])
def test_memory_does_not_grow_with_the_length(page_size, cache):
    largest = []
    for length in (4096, 16384):
        arguments, options = Case((length, length // 2), page_size=page_size, H=8, cache=cache, dtype=F32).arguments()
        with LargestAllocation() as seen:
            fastattn.paged_attention(*arguments, **options)
        largest.append(seen.bytes)
    table = arguments[3].numel() * 8  # its pages as int64, the one thing that is read in whole
    assert largest[1] <= max(largest[0], table)
    assert largest[1] < 8 << 20


@pytest.mark.parametrize("slopes", [None, (8,)])
def test_memory_does_not_grow_with_queries_times_keys(slopes):
    for length in (2048, 6000):
        arguments, options = Case((length,), S_q=length, H=8, H_kv=1, D=16, D_v=16, slopes=slopes, dtype=F32).arguments()
        with LargestAllocation() as seen:
            fastattn.paged_attention(*arguments, **options)
        assert seen.bytes < 20 << 20


@pytest.mark.parametrize("lengths", [(1,), (512,), (513,), (1500, 3, 700), (600,) * 3], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 500, 512, 513, 4096])
def test_chunks(lengths, page_size):
    check(Case(lengths, S_q=2, page_size=page_size, dtype=F32, options=dict(window=(900, 0))))


# --------------------------------------------------------------------------------------------------------------------
# Errors.


def arguments_and(**changes):
    cache = torch.randn(4, 16, 2, 64)
    arguments = dict(
        q=torch.randn(2, 3, 4, 64),
        k_cache=cache,
        v_cache=cache,
        page_table=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        seqlens_k=torch.tensor([20, 32], dtype=torch.int32),
    )
    return arguments | changes


PACKED = dict(q=torch.randn(6, 4, 64), cu_seqlens_q=torch.tensor([0, 2, 6], dtype=torch.int32))
ERRORS = [
    (TypeError, r"q must be a torch.Tensor, got int", dict(q=3)),
    (TypeError, r"q must be float16, bfloat16 or float32, got torch.float64", dict(q=torch.randn(2, 3, 4, 64).double())),
    (ValueError, r"q must have shape \(B, S_q, H, D\) without cu_seqlens_q, got \(6, 4, 64\)", dict(q=torch.randn(6, 4, 64))),
    (ValueError, r"q must have shape \(T, H, D\) with cu_seqlens_q, got \(2, 3, 4, 64\)", dict(cu_seqlens_q=PACKED["cu_seqlens_q"])),
    (TypeError, r"k_cache must have q's dtype torch.float32, or be int8 or float8_e4m3fn, got torch.float16", dict(k_cache=torch.randn(4, 16, 2, 64).half())),
    (TypeError, r"v_cache must have k_cache's dtype torch.float32, got torch.int8", dict(v_cache=torch.zeros(4, 16, 2, 64, dtype=INT8))),
    (ValueError, r"k_cache must have shape \(num_pages, page_size, H_kv, D\), got \(4, 16, 128\)", dict(k_cache=torch.randn(4, 16, 128))),
    (ValueError, r"k_cache must have shape \(num_pages, page_size, H_kv, D\) with D = 64 to match q, got \(4, 16, 2, 32\)", dict(k_cache=torch.randn(4, 16, 2, 32))),
    (ValueError, r"v_cache must have shape \(num_pages, page_size, H_kv, D_v\) with k_cache's \(4, 16, 2\) before D_v, got \(4, 8, 2, 64\)", dict(v_cache=torch.randn(4, 8, 2, 64))),
    (ValueError, r"v_cache must have a contiguous last dim \(a cache is not copied\), got strides", dict(v_cache=torch.randn(4, 16, 2, 128)[..., ::2])),
    (ValueError, r"q must have a head_dim between 1 and 512, got 513", dict(q=torch.randn(2, 3, 4, 513), k_cache=torch.randn(4, 16, 2, 513))),
    (ValueError, r"v_cache must have a head_dim between 1 and 512, got 0", dict(v_cache=torch.randn(4, 16, 2, 0))),
    (ValueError, r"k_cache must have a head count that divides q's 4, got 3", dict(k_cache=torch.randn(4, 16, 3, 64), v_cache=torch.randn(4, 16, 3, 64))),
    (ValueError, r"k_cache must have pages of at least one row, got \(4, 0, 2, 64\)", dict(k_cache=torch.randn(4, 0, 2, 64), v_cache=torch.randn(4, 0, 2, 64))),
    (TypeError, r"page_table must be an int32 tensor, got torch.int64", dict(page_table=torch.zeros(2, 2, dtype=torch.int64))),
    (ValueError, r"page_table must have shape \(B, max_pages\), got \(2,\)", dict(page_table=torch.zeros(2, dtype=torch.int32))),
    (ValueError, r"page_table must have shape \(B, max_pages\) with B = 2 to match q, got \(3, 2\)", dict(page_table=torch.zeros(3, 2, dtype=torch.int32))),
    (ValueError, r"seqlens_k must have shape \(B,\) = \(2,\), got \(3,\)", dict(seqlens_k=torch.zeros(3, dtype=torch.int32))),
    (ValueError, r"seqlens_k must lie in \[0, max_pages · page_size\] = \[0, 32\], got 33", dict(seqlens_k=torch.tensor([1, 33], dtype=torch.int32))),
    (ValueError, r"seqlens_k must lie in .*, got -1", dict(seqlens_k=torch.tensor([-1, 3], dtype=torch.int32))),
    (ValueError, r"page_table must hold pages in \[0, num_pages\) = \[0, 4\) wherever it is used, got 4 at \[1, 1\]", dict(page_table=torch.tensor([[0, 9], [1, 4]], dtype=torch.int32), seqlens_k=torch.tensor([16, 17], dtype=torch.int32))),
    (ValueError, r"page_table must hold .*, got -1 at \[0, 0\]", dict(page_table=torch.tensor([[-1, 9], [1, 4]], dtype=torch.int32), seqlens_k=torch.tensor([1, 0], dtype=torch.int32))),
    (ValueError, r"cu_seqlens_q must have shape \(B \+ 1,\) = \(3,\) to match page_table, got \(2,\)", PACKED | dict(cu_seqlens_q=torch.tensor([0, 6], dtype=torch.int32))),
    (ValueError, r"cu_seqlens_q must start at 0, got 1", PACKED | dict(cu_seqlens_q=torch.tensor([1, 2, 6], dtype=torch.int32))),
    (ValueError, r"cu_seqlens_q must hold lengths of at most max_seqlen_q = 3, got 4 at index 1", PACKED | dict(max_seqlen_q=3)),
    (ValueError, r"max_seqlen_q must not be negative, got -1", PACKED | dict(max_seqlen_q=-1)),
    (ValueError, r"max_seqlen_q must be None without cu_seqlens_q, got 3", dict(max_seqlen_q=3)),
    (ValueError, r"alibi_slopes must have shape \(H,\) or \(B, H\) = \(2, 4\), got \(3,\)", dict(alibi_slopes=torch.rand(3))),
    (ValueError, r"sinks must have shape \(H,\) = \(4,\), got \(2,\)", dict(sinks=torch.rand(2))),
    (ValueError, r"k_scale must have shape \(H_kv,\) = \(2,\), got \(4,\)", dict(k_scale=torch.rand(4))),
    (TypeError, r"v_scale must have a floating-point dtype, got torch.int64", dict(v_scale=torch.ones(2, dtype=torch.int64))),
    (TypeError, r"causal must be a bool, got str", dict(causal="yes")),
    (ValueError, r"window must be a pair \(left, right\), got 3", dict(window=3)),
    (ValueError, r"window must hold bounds of -1 \(unbounded\) or more, got -2", dict(window=(-2, 0))),
    (ValueError, r"softcap must be finite and not negative, got -1.0", dict(softcap=-1.0)),
    (ValueError, r"softmax_scale must be finite, got inf", dict(softmax_scale=float("inf"))),
    (ValueError, r"num_splits must lie in \[0, 256\], got 257", dict(num_splits=257)),
    (TypeError, r"num_splits must be an int, got float", dict(num_splits=1.5)),
]  # fmt: skip


@pytest.mark.parametrize("window", [(2**31 - 1, None), (None, None), (40, 0)])
def test_no_window_hides_a_page_that_is_used(window):
    cache, lengths = torch.randn(3, 16, 1, 16), torch.tensor([2], dtype=torch.int32)
    for page in (-1, 77):
        with pytest.raises(ValueError, match=rf"paged_attention: page_table must hold pages in .*, got {page} at \[0, 0\]"):
            fastattn.paged_attention(torch.randn(1, 5, 1, 16), cache, cache, torch.tensor([[page]], dtype=torch.int32), lengths, window=window)


@pytest.mark.parametrize("error, message, changes", ERRORS, ids=[message[:50] for _, message, _ in ERRORS])
def test_errors(error, message, changes):
    with pytest.raises(error, match=f"^paged_attention: {message}"):
        fastattn.paged_attention(**arguments_and(**changes))


@pytest.mark.both
@pytest.mark.parametrize("learnt", ["q", "k_cache", "v_cache", "sinks", "alibi_slopes", "k_scale", "v_scale"])
def test_a_backward_raises(learnt):
    """Whichever tensor wants a gradient: none is dropped without a word."""
    arguments = arguments_and(sinks=torch.zeros(4), alibi_slopes=torch.ones(4), k_scale=torch.ones(2), v_scale=torch.ones(2))
    arguments[learnt].requires_grad_()
    out = fastattn.paged_attention(**arguments)
    with pytest.raises(NotImplementedError, match="fastattn.paged_attention has no gradient"):
        out.sum().backward()
    with torch.no_grad():
        assert not fastattn.paged_attention(**arguments).requires_grad


# --------------------------------------------------------------------------------------------------------------------
# The operator and compilers.


def operator_arguments(case):
    (q, *rest), options = case.arguments()
    tensors = [options.get(name) for name in ("cu_seqlens_q", "alibi_slopes", "sinks", "k_scale", "v_scale")]
    return q, *rest, *tensors, None, options.get("max_seqlen_q", case.S_q), 50, 0, 0.125, 0.0, 2


OPERATOR_CASES = [Case(dtype=F32), Case(packed=(3, 1, 20), sinks=True, slopes=(4,)), Case(S_q=5, cache=INT8)]


@pytest.mark.both
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=str)
def test_operator(case):
    check_operator(torch.ops.fastattn.paged_attention, *operator_arguments(case))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: paged(*args, window=(50, None)), fullgraph=True, dynamic=dynamic)
    for case in (Case(S_q=2, dtype=F32), Case((30, 40), S_q=3, dtype=F32)):
        arguments, _ = case.arguments()
        got, expected = compiled(*arguments), paged(*arguments, window=(50, None))
        assert all(torch.equal(a, b) and layout(a) == layout(b) for a, b in zip(got, expected, strict=True))


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = arguments_and()
    with FlopCounterMode(display=False) as counter:
        fastattn.paged_attention(**arguments)
    pairs = (18 + 19 + 20) + (30 + 31 + 32)
    assert counter.get_total_flops() == 2 * 4 * pairs * (64 + 64)


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


def cuda(arguments):
    """The implementation registered for CUDA tensors."""
    from fastattn.kernels.paged_attention import paged_attention

    return paged_attention(*arguments)


PARTS = [(8, 0), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("capability", PARTS)
@pytest.mark.parametrize("case", [*OPERATOR_CASES, Case(cache=E4M3, dtype=BF16), Case(S_q=30, page_size=64)], ids=str)
def test_cuda_launches(capability, case):
    from fastattn.testing.stub_driver import SHARED_MEMORY_LIMITS

    arguments = operator_arguments(case)
    launches = launched_on(capability, lambda: cuda(arguments))
    assert [launch.name for launch in launches] == ["_paged_attention_kernel", "_merge_attention_fwd_kernel"]
    assert all(launch.shared <= SHARED_MEMORY_LIMITS[capability] for launch in launches)


@pytest.mark.parametrize("page_size", [16, 64])
def test_cuda_variants_are_few(page_size):
    """A decode step and a prefill are a variant each: no length, count or batch size, nor how they are split, chooses another."""

    def calls():
        for S_q in (1, 2, 3, 7, 16, 17, 64, 100, 200):
            for B in (1, 2, 8):
                cache = torch.randn(70, page_size, 2, 64, dtype=BF16)
                table, lengths = torch.zeros(B, 3 + 4 * B, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
                for num_splits in (0, 1, 5):
                    q = torch.randn(B, S_q, 4, 64, dtype=BF16)
                    cuda((q, cache, cache, table, lengths, *[None] * 6, S_q, None, 0, 0.125, 0.0, num_splits))

    launches = launched_on((9, 0), calls)
    variants = {launch.compiled.hash for launch in launches if launch.name == "_paged_attention_kernel"}
    assert len(variants) <= 2


def test_the_host_s_time_is_reported(capsys, monkeypatch):
    """Of a decode step, in launches of an empty kernel with six arguments. A figure to watch: only a compilation a call would fail it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    import statistics
    import time

    import triton

    from fastattn.testing.stub_driver import stub_driver

    @triton.jit
    def empty(a, b, c, d, e, f):
        pass

    def microseconds(call):
        times = []
        for _ in range(200):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    q, cache = torch.randn(64, 1, 32, 128, dtype=BF16), torch.randn(2, 64, 8, 128, dtype=BF16)
    table, lengths = torch.zeros(64, 128, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with stub_driver((9, 0)):
        launch = microseconds(lambda: empty[(1,)](q, cache, table, 1, 2, 3))
        steps = {n: microseconds(lambda n=n: cuda((q, cache, cache, table, lengths, *[None] * 6, 1, None, 0, 0.1, 0.0, n))) for n in (1, 4)}
    with capsys.disabled():
        for n, step in steps.items():
            print(f"\npaged_attention, {n} splits: {step:.0f} µs of host time, {step / launch:.1f} launches of an empty kernel", end="")
    assert max(steps.values()) < 50 * launch


def test_a_contiguous_cache_of_any_length_is_one_variant():
    def calls():
        for length in (1, 17, 64, 100, 4096):
            cache, table = torch.randn(2, length, 2, 64, dtype=BF16), torch.zeros(2, 1, dtype=torch.int32)
            q, lengths = torch.randn(2, 1, 4, 64, dtype=BF16), torch.zeros(2, dtype=torch.int32)
            cuda((q, cache, cache, table, lengths, *[None] * 6, 1, None, 0, 0.125, 0.0, 0))

    launches = launched_on((9, 0), calls)
    assert len({launch.compiled.hash for launch in launches if launch.name == "_paged_attention_kernel"}) == 1


def test_scales_of_any_float_dtype_compile():
    (q, *rest), _ = Case(cache=INT8, dtype=BF16).arguments()
    for dtype in (torch.float64, F16):
        scale = torch.ones(2, dtype=dtype)
        arguments = q, *rest, None, None, None, scale, scale, None, 1, None, 0, 0.125, 0.0, 1
        assert len(launched_on((9, 0), lambda arguments=arguments: cuda(arguments))) == 1


def test_too_many_programs_are_refused():
    q = torch.randn(1, 1, 1, 8).expand(2**23, 1, 1, 8)
    cache, table = torch.randn(1, 16, 1, 8), torch.zeros(1, 2, dtype=torch.int32).expand(2**23, 2)
    lengths = torch.zeros(1, dtype=torch.int32).expand(2**23)
    with pytest.raises(ValueError, match=r"paged_attention: the input must need fewer than 2\^31 programs"):
        launched_on((9, 0), lambda: cuda((q, cache, cache, table, lengths, *[None] * 6, 1, None, 0, 1.0, 0.0, 256)))


# --------------------------------------------------------------------------------------------------------------------
# Tiles and splits, which are pure.


def test_splits_fill_the_part():
    from fastattn.kernels.paged_tiles import MAX_SPLITS, MIN_BLOCKS_PER_SPLIT, pick_splits

    assert pick_splits(512, 264, 128) == 1  # 64 sequences of 8 heads: 1.94 waves
    assert 0.85 <= pick_splits(8, 264, 2048) * 8 / 264 <= 1.0  # one sequence: most of one wave
    assert pick_splits(1, 264, 10**6) == 218 <= MAX_SPLITS  # 0.85 of what the most would give
    assert pick_splits(0, 264, 100) == 1
    for programs in (1, 7, 64, 300, 5000):
        for blocks in (0, 1, 3, 4, 9, 1000):
            n = pick_splits(programs, 264, blocks)
            assert 1 <= n <= max(1, min(blocks // MIN_BLOCKS_PER_SPLIT, MAX_SPLITS))


def test_tiles_go_by_rows_and_by_the_cache():
    from fastattn.kernels.paged_tiles import LARGEST, PAGED_TILES, pick_paged_config

    sm90 = (9, 0), 227 * 1024
    assert pick_paged_config(*sm90, 100, 2, 2, 16) == PAGED_TILES["sm90", "half", 128, 16]
    assert pick_paged_config(*sm90, 100, 2, 1, 17) == PAGED_TILES["sm90", "quantized", 128, LARGEST]
    assert pick_paged_config(*sm90, 512, 4, 1, 1) == PAGED_TILES["sm90", "single", 512, 16]
    with pytest.raises(RuntimeError, match="needs compute capability 8.0"):
        pick_paged_config((7, 5), 64 * 1024, 64, 2, 2, 1)

