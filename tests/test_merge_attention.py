"""Merging attention results: the kernels in the interpreter and the CPU path against float64, the algebra, the operator, the launch path."""

from __future__ import annotations

import functools

import pytest
import torch
from op_contract import (
    BF16,
    DTYPES,
    F16,
    F32,
    INPUT_LAYOUTS,
    UPSTREAM_LAYOUTS,
    check_compiled,
    check_op,
    check_operator,
    check_pure,
    check_transforms,
    launched_on,
    runs_as_on_cuda,
    upstream,
)

import fastattn
from fastattn import reference

INF, NAN = float("inf"), float("nan")


def partials(num_splits, *shape, dtype=F32):
    """outs of a shape (B, S, H, D) or (T, H, D), and LSEs whose weights differ by some powers of ten."""
    *batch, seqlen, num_heads, _ = shape
    return {"outs": torch.randn(num_splits, *shape).to(dtype), "lses": 3 * torch.randn(num_splits, *batch, num_heads, seqlen)}


def check(tensors, douts=None, op=fastattn.merge_attention):
    name = f"merge_attention {tuple(tensors['outs'].shape)}"
    return check_op(name, op, reference.merge_attention, tensors, douts)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.

# (N, B, S, H, D) or (N, T, H, D): one part, two, a walk's last ragged one, more than a tile has; head dims of each tile, odd ones, one
# of several blocks; rows that fill programs and that do not.
SHAPES = [(1, 1, 1, 1, 1), (2, 2, 9, 3, 64), (3, 1, 5, 2, 128), (5, 1, 3, 2, 80), (4, 70, 1, 7), (70, 3, 2, 33), (3, 2, 2, 512), (2, 1, 7, 2, 600)]


@pytest.mark.both
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    check(partials(*shape, dtype=dtype))


@pytest.mark.both
@pytest.mark.more
@pytest.mark.parametrize("num_splits", [2, 64, 65, 600])
def test_many_parts(num_splits):
    check(partials(num_splits, 1, 3, 1, 128, dtype=BF16))
    check(partials(min(num_splits, 65), 1100, 1, 2))


@pytest.mark.both
@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 8), (0, 3, 2, 8), (2, 0, 3, 2, 8), (2, 1, 0, 2, 8), (2, 1, 3, 0, 8), (2, 0, 1, 8)], ids=str)
def test_empty(shape):
    tensors = partials(*shape)
    result = check(tensors)
    assert result["out0"].shape == shape[1:] and not result["out0"].any()
    assert result["out1"].shape == tensors["lses"].shape[1:] and (result["out1"] == -INF).all()


@pytest.mark.both
@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
def test_any_input_layout(layout):
    for shape in ((2, 2, 3, 4, 16), (6, 1, 2, 2, 16)):
        tensors = partials(*shape, dtype=BF16)
        check({name: INPUT_LAYOUTS[layout](t) for name, t in tensors.items()})


@pytest.mark.both
@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
def test_any_upstream_layout(layout):
    tensors = partials(3, 2, 3, 4, 16)
    check(tensors, upstream(fastattn.merge_attention, tensors, UPSTREAM_LAYOUTS[layout]))


@pytest.mark.both
@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_one_of_two_results_or_gradients(which):
    tensors = partials(3, 1, 4, 2, 8)
    for wanted in (("outs", "lses"), ("outs",), ("lses",)):
        grads = []
        for op in (fastattn.merge_attention, reference.merge_attention):
            leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in tensors.items()}
            op(**leaves)[which].pow(2).sum().backward() if wanted != ("outs",) or which == 0 else None
            grads.append({name: t.grad if t.grad is not None else torch.zeros_like(t) for name, t in leaves.items()})
        for name in tensors:
            torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.both
def test_pure():
    check_pure(fastattn.merge_attention, partials(3, 2, 3, 4, 16))


@pytest.mark.both
@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_list_is_stacked(sequence):
    tensors = partials(3, 2, 3, 4, 16)
    expected, got = fastattn.merge_attention(**tensors), fastattn.merge_attention(*(sequence(t.unbind()) for t in tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.interpret
def test_partials_in_float_are_rounded_once():
    from fastattn.kernels.merge_attention import merge_attention_fwd

    tensors = partials(7, 1, 5, 1, 64)
    for dtype in (F16, BF16):
        out, lse = merge_attention_fwd(*tensors.values(), dtype)
        exact, same = merge_attention_fwd(*tensors.values(), F32)
        assert torch.equal(out, exact.to(dtype)) and torch.equal(lse, same)


# --------------------------------------------------------------------------------------------------------------------
# The algebra.


@pytest.mark.both
@pytest.mark.parametrize("splits", [(40,), (0, 13, 27, 0), (1,) * 40], ids=str)
def test_attention_over_parts_merges_to_attention(splits):
    """Values, and gradients through the parts: a key's is the same wherever the keys are cut."""
    tensors = {"q": torch.randn(2, 3, 2, 16), "k": torch.randn(2, 40, 2, 16), "v": torch.randn(2, 40, 2, 16)}

    def merged(q, k, v):
        parts = [reference.attention(q, *kv, return_lse=True) for kv in zip(k.split(splits, 1), v.split(splits, 1))]
        return fastattn.merge_attention(*zip(*parts))

    whole = functools.partial(reference.attention, return_lse=True)
    check_op(f"attention in {len(splits)} parts", merged, whole, tensors)


@pytest.mark.both
def test_it_is_associative():
    (outs, lses), close = partials(5, 1, 2, 2, 16).values(), functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    whole = fastattn.merge_attention(outs, lses)
    for cut in range(6):
        parts = [fastattn.merge_attention(outs[s], lses[s]) for s in (slice(cut), slice(cut, None))]
        for got, expected in zip(fastattn.merge_attention(*zip(*parts)), whole):
            close(got, expected)


@pytest.mark.both
@pytest.mark.parametrize("num_splits", [4, 70])
def test_order_does_not_matter(num_splits):
    outs, lses = partials(num_splits, 1, 2, 2, 16).values()
    order = torch.randperm(num_splits)
    for got, expected in zip(fastattn.merge_attention(outs[order], lses[order]), fastattn.merge_attention(outs, lses)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_one_part_is_itself_and_minus_infinity_the_identity(dtype):
    outs, lses = partials(1, 2, 3, 2, 16, dtype=dtype).values()
    nothing = torch.zeros_like(outs), torch.full_like(lses, -INF)
    for tensors in ((outs, lses), *(tuple(map(torch.cat, zip(*pair))) for pair in (((outs, lses), nothing), (nothing, (outs, lses))))):
        out, lse = fastattn.merge_attention(*tensors)
        assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


@pytest.mark.both
def test_equal_parts_are_their_mean():
    outs = torch.randn(8, 2, 3, 2, 16)
    out, lse = fastattn.merge_attention(outs, torch.zeros(8, 2, 2, 3))
    torch.testing.assert_close(out, outs.mean(0))
    torch.testing.assert_close(lse, torch.full_like(lse, 8.0).log())


@pytest.mark.both
def test_a_common_offset_moves_the_lse_alone():
    outs, lses = partials(6, 1, 2, 2, 16).values()
    lses = (lses * 64).round() / 64  # exact sums
    out, lse = fastattn.merge_attention(outs, lses)
    for offset in (1024.0, -1024.0, 2.0**17):
        shifted, shifted_lse = fastattn.merge_attention(outs, lses + offset)
        torch.testing.assert_close(shifted, out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shifted_lse.double(), lse.double() + offset, rtol=1e-6, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Parts without keys, and bad input.


@pytest.mark.both
@pytest.mark.parametrize("garbage", [0.0, NAN, INF, -INF])
@pytest.mark.parametrize("num_splits", [3, 9])
def test_what_has_no_keys_is_never_looked_at(garbage, num_splits):
    tensors = partials(num_splits, 2, 2, 2, 40)
    tensors["lses"][torch.rand(tensors["lses"].shape) < 0.4] = -INF
    tensors["lses"][:, 0, 0, 0] = -INF  # a row of nothing else
    dead = tensors["lses"] == -INF
    tensors["outs"][dead.transpose(-1, -2)] = garbage
    result = check(tensors)
    assert not result["out0"][0, 0, 0].any() and result["out1"][0, 0, 0] == -INF
    assert not result["douts"][dead.transpose(-1, -2)].any() and not result["dlses"][dead].any()


@pytest.mark.both
@pytest.mark.parametrize("value", [INF, NAN])
def test_infinite_and_nan_lses_stay_in_their_rows(value):
    outs, lses = partials(3, 1, 4, 2, 8).values()
    clean, clean_lse = fastattn.merge_attention(outs, lses)
    lses[1, 0, 1, 2] = value
    out, lse = fastattn.merge_attention(outs, lses)
    assert out[0, 2, 1].isnan().all() and (lse[0, 1, 2] == value or lse[0, 1, 2].isnan())
    out[0, 2, 1], lse[0, 1, 2] = clean[0, 2, 1], clean_lse[0, 1, 2]
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)


@pytest.mark.interpret
@pytest.mark.parametrize("num_splits, seqlen", [(3, 20), (6, 2)])
def test_program_order_does_not_matter(num_splits, seqlen):
    from fastattn.testing.checker import assert_order_independent

    tensors, dout, dlse = partials(num_splits, 2, seqlen, 1, 40), torch.randn(2, seqlen, 1, 40), torch.randn(2, 1, seqlen)

    def both():
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        results = fastattn.merge_attention(*leaves)
        return *results, *torch.autograd.grad(results, leaves, (dout, dlse))

    assert_order_independent(both)


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile():
    from fastattn.kernels.merge_attention import FEW_ROWS, merge_attention_fwd, pick_tile
    from fastattn.testing.budget import check_budget

    tiles = {pick_tile(rows, splits, head_dim) for rows in (1, FEW_ROWS + 1) for splits in (1, 100) for head_dim in (8, 32, 64, 500)}
    for tile in tiles:
        for shape in SHAPES[1:5]:
            outs, lses = partials(*shape).values()
            naive, ref64 = reference.merge_attention(outs, lses), reference.merge_attention(outs.double(), lses.double())
            for results in zip(merge_attention_fwd(outs, lses, F32, tile), naive, ref64):
                check_budget(f"merge_attention {tile}", *results)


OUTS, LSES = torch.zeros(2, 3, 5, 4, 8), torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((1.0, LSES), TypeError, r"merge_attention: outs must be a torch.Tensor, got float"),
        ((OUTS, None), TypeError, r"merge_attention: lses must be a torch.Tensor, got NoneType"),
        ((OUTS.double(), LSES), TypeError, r"merge_attention: outs must be float16, bfloat16 or float32, got torch.float64"),
        ((OUTS[0, 0], LSES), ValueError, r"merge_attention: outs must have shape \(N, B, S, H, D\) or packed \(N, T, H, D\), got \(5, 4, 8\)"),
        ((OUTS[..., :0], LSES), ValueError, r"merge_attention: outs must have a head_dim of at least 1, got 0"),
        ((OUTS, LSES.half()), TypeError, r"merge_attention: lses must be float32, got torch.float16"),
        ((OUTS, LSES.to("meta")), ValueError, r"merge_attention: lses must be on outs' device cpu, got meta"),
        ((OUTS, LSES.transpose(2, 3)), ValueError, r"merge_attention: lses must have shape \(N, B, H, S\) = \(2, 3, 4, 5\) to match outs, got \(2, 3, 5, 4\)"),
        ((OUTS[0], LSES), ValueError, r"merge_attention: lses must have shape \(N, H, T\) = \(3, 4, 5\) to match outs, got \(2, 3, 4, 5\)"),
        ((list(OUTS), LSES[:1]), ValueError, r"merge_attention: lses must have shape .* got \(1, 3, 4, 5\)"),
    ],
)  # fmt: skip
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        fastattn.merge_attention(*args)


# --------------------------------------------------------------------------------------------------------------------
# The operator.


@pytest.mark.both
def test_operator():
    outs, lses = partials(3, 2, 5, 4, 8, dtype=BF16).values()
    out, lse = fastattn.merge_attention(outs, lses)
    check_operator(torch.ops.fastattn.merge_attention_fwd, outs, lses)
    check_operator(torch.ops.fastattn.merge_attention_fwd, outs.transpose(0, 1), lses.transpose(0, 1))
    check_operator(torch.ops.fastattn.merge_attention_fwd, *(t.flatten(0, 1) for t in (outs, lses)))
    check_operator(torch.ops.fastattn.merge_attention_bwd, out, None, outs, lses)
    check_operator(torch.ops.fastattn.merge_attention_bwd, out, lse, outs, lses)


@pytest.mark.both
def test_transforms():
    check_transforms("merge_attention", fastattn.merge_attention, partials(3, 1, 4, 2, 8))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    check_compiled(fastattn.merge_attention, partials(3, 2, 5, 4, 8), dynamic)
    check_compiled(lambda outs, lses: fastattn.merge_attention(outs, lses)[0], partials(2, 5, 4, 8), dynamic)


@pytest.mark.interpret
def test_compiled_is_eager_on_the_kernels():
    check_compiled(fastattn.merge_attention, partials(3, 2, 5, 4, 8), backend="aot_eager")


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "merge_attention")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_is_one_launch_and_never_syncs(as_on_cuda, capability):
    outs, lses = torch.zeros(32, 1, 16, 4, 64, dtype=BF16), torch.zeros(32, 1, 4, 16)

    def call():
        out, lse = as_on_cuda._merge_attention_fwd(outs, lses)
        as_on_cuda._merge_attention_bwd(out, lse, outs, lses)

    assert [launch.name for launch in launched_on(capability, call)] == ["_merge_attention_fwd_kernel", "_merge_attention_bwd_kernel"]


def test_at_most_two_variants_over_parts_lengths_and_batches(as_on_cuda):
    """One for many rows, one for few rows in many parts."""
    from fastattn.kernels.merge_attention import _merge_attention_bwd_kernel, _merge_attention_fwd_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for num_splits, batch, seqlen, heads in ((2, 1, 1, 1), (2, 2, 16, 8), (3, 8, 200, 2), (16, 1, 1, 16), (17, 1, 33, 1), (256, 3, 1, 5), (40, 1, 1500, 1)):
            outs, lses = torch.zeros(num_splits, batch, seqlen, heads, 64, dtype=BF16), torch.zeros(num_splits, batch, heads, seqlen)
            out, lse = as_on_cuda._merge_attention_fwd(outs, lses)
            as_on_cuda._merge_attention_bwd(out, lse, outs, lses)
        assert compiled_variants(_merge_attention_fwd_kernel) == 2
        assert compiled_variants(_merge_attention_bwd_kernel) == 1


def test_few_rows_in_many_parts_make_many_programs_of_few_steps():
    pytest.importorskip("triton", reason="needs triton")
    from fastattn.kernels.merge_attention import pick_tile

    tile = pick_tile(num_rows=16, num_splits=256, head_dim=128)
    assert 16 // tile.ROWS * 128 // tile.BLOCK_D == 64 and 256 // tile.SPLITS == 4


def test_more_rows_than_32_bits_count_are_refused():
    pytest.importorskip("triton", reason="needs triton")
    from fastattn.kernels.merge_attention import _launch

    outs, lses = torch.empty(1, dtype=BF16).expand(2, 2**31 - 10, 1, 1), torch.empty(1).expand(2, 1, 2**31 - 10)
    with pytest.raises(ValueError, match=r"merge_attention: the input must need fewer than 2\^31 programs, got 2147483702"):
        _launch(None, None, outs, lses)
