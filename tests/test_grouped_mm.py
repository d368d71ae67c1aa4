"""The grouped matrix product: the kernels in the interpreter and the CPU path against float64, hostile indices, the operators."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
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
    run,
    runs_as_on_cuda,
    upstream,
)
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import reference
from fastattn.testing.budget import check_budget

NAN = float("nan")
COUNTS = (9, 0, 17, 1, 4)  # an empty group, one of one row, one of more than a tile of 16


def ends(*counts):
    return torch.tensor(counts).cumsum(0).int()


def draw(counts=COUNTS, num_cols=33, size=40, nobody=3, dtype=F32, bias=True, gather=None, scatter=False):
    """(tensors, rows): groups of those counts, then rows of nobody. gather: from so many rows of x."""
    num_rows = sum(counts) + nobody
    tensors = {"x": torch.randn(num_rows if gather is None else gather, size), "w": torch.randn(len(counts), num_cols, size) / size**0.5}
    if bias:
        tensors["bias"] = torch.randn(len(counts), num_cols)
    rows = {"offsets": ends(*counts)}
    if gather is not None:
        rows["gather"] = torch.randint(gather, (num_rows,))
    if scatter:
        rows["scatter"] = torch.randperm(num_rows)
    return {name: t.to(dtype) for name, t in tensors.items()}, rows


def of(offsets, **rows):
    """(op, oracle) as functions of x, w and bias."""
    return (
        lambda x, w, bias=None: fastattn.grouped_mm(x, w, offsets, bias=bias, **rows),
        lambda x, w, bias=None: reference.grouped_mm(x, w, offsets, bias=bias, **rows),
    )


def check(tensors, rows, douts=None, naive=None):
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return check_op(f"grouped_mm {shapes} {sorted(rows)}", *of(**rows), tensors, douts, naive)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.


CHOICES = itertools.product(
    enumerate(["in order", "gathered", "gathered from more"]), enumerate(["in place", "scattered"]), enumerate(["plain", "bias"]),
    enumerate([F32, F16, BF16]),
)  # fmt: skip
# All of them on the CPU; on the kernels half, in which any two values meet, and the rest at length.
CASES = [
    pytest.param(*values, marks=[pytest.mark.both] * (sum(places) % 2 == 0), id="-".join(map(str, values)).replace("torch.", ""))
    for places, values in (zip(*choice) for choice in CHOICES)
]


@pytest.mark.parametrize("gather, scatter, bias, dtype", CASES)
def test_values(gather, scatter, bias, dtype):
    num_tokens = {"in order": None, "gathered": 20, "gathered from more": 50}[gather]
    tensors, rows = draw(dtype=dtype, bias=bias == "bias", gather=num_tokens, scatter=scatter == "scattered")
    result = check(tensors, rows)
    assert result["out0"].dtype == dtype and result["out0"].is_contiguous()
    nobody = rows["scatter"][-3:] if scatter == "scattered" else slice(-3, None)
    assert not result["out0"][nobody].any() and not result["dw"][1].any()


@pytest.mark.interpret
@pytest.mark.more
@pytest.mark.parametrize("gather, scatter, bias, dtype", [case.values for case in CASES if not case.marks], ids=str)
def test_the_other_values_on_the_kernels(gather, scatter, bias, dtype):
    test_values(gather, scatter, bias, dtype)


# (K, N): nothing is a multiple of anything, one of each, more than one tile of each.
@pytest.mark.both
@pytest.mark.parametrize("size, num_cols", [(1, 1), (3, 7), (7, 33), (33, 100), (40, 3), (100, 1), (1, 40), (64, 64), (8, 300)], ids=str)
def test_sizes(size, num_cols):
    check(*draw((20, 7), num_cols, size, gather=25))


NUMBERS = list(enumerate([1, 3, 7, 33, 40, 100, 130]))
# In each dtype on the CPU, on the kernels in one, all of which have each size.
EVERY_SIZE = [
    pytest.param(size, num_cols, dtype, marks=[pytest.mark.both] * ((i + j + k) % 3 == 0), id=f"{size}-{num_cols}-{str(dtype)[6:]}")
    for (i, size), (j, num_cols), (k, dtype) in itertools.product(NUMBERS, NUMBERS, enumerate([F32, F16, BF16]))
]


@pytest.mark.more
@pytest.mark.parametrize("size, num_cols, dtype", EVERY_SIZE)
def test_every_size(size, num_cols, dtype):
    check(*draw((20, 17, 70), num_cols, size, dtype=dtype, gather=60, scatter=True))


GROUPS = {
    "one": (40,),
    "all of one": (0, 40, 0, 0),
    "none at all": (0, 0, 0),
    "the last alone": (0, 0, 33),
    "one row alone": (1,),
    "one row each": (1,) * 9,
    "whole tiles": (16, 32, 64),
    "many": (0, 1, 2) * 7,
    "several tiles": (129, 3, 140),
}


@pytest.mark.both
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("nobody", [pytest.param(0, marks=pytest.mark.more), 20])
def test_groups(name, nobody):
    check(*draw(GROUPS[name], 24, 16, nobody))


@pytest.mark.both
@pytest.mark.parametrize("num_groups", [130, pytest.param(4096, marks=pytest.mark.more)])
def test_as_many_groups_as_there_may_be(num_groups):
    counts = [0] * num_groups
    counts[0] = counts[num_groups // 2] = counts[-1] = 3
    check(*draw(counts, 8, 8))


@pytest.mark.both
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_rows(num_tokens):
    """Not even a row of x to gather, or none that is gathered."""
    tensors, rows = draw((0, 0), nobody=0, scatter=True)
    for x, given in ((tensors["x"], {}), (torch.randn(num_tokens, 40), {"gather": torch.zeros(0, dtype=torch.int64)})):
        result = check(tensors | {"x": x}, rows | given)
        assert result["out0"].shape == (0, 33) and result["dx"].shape == x.shape
        assert not any(result[name].any() for name in ("dx", "dw", "dbias"))


@pytest.mark.both
@pytest.mark.parametrize("scatter", [False, True], ids=["in place", "scattered"])
def test_what_nobody_has_is_never_looked_at(scatter):
    """Rows past the last end, of x and of the upstream gradient; rows that are not gathered; matrices of empty groups."""
    tensors, rows = draw(nobody=20, gather=60, scatter=scatter)
    inside = rows["gather"][: sum(COUNTS)]
    unread = torch.ones(60, dtype=torch.bool).index_fill(0, inside, False)
    tensors["x"][unread], tensors["w"][1], tensors["bias"][1] = NAN, NAN, NAN
    dout = torch.randn(len(rows["gather"]), 33)
    dout[rows["scatter"][-20:] if scatter else slice(-20, None)] = NAN
    result = check(tensors, rows, [dout])
    assert not result["dx"][unread].any() and not result["dw"][1].any() and not result["dbias"][1].any()
    tensors, rows = draw(nobody=20, scatter=scatter)
    tensors["x"][-20:] = NAN
    assert not check(tensors, rows, [dout[: len(tensors["x"])]])["dx"][-20:].any()


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_a_row_read_often_has_its_gradients_summed_in_fp32(dtype):
    """600 ones: as bfloat16 a sum would stand still at 256."""
    x, w = torch.ones(1, 4, dtype=dtype, requires_grad=True), torch.eye(4, dtype=dtype).expand(2, 4, 4)
    out = fastattn.grouped_mm(x, w, ends(300, 300), gather=torch.zeros(600, dtype=torch.int64))
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [[600.0] * 4]


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
def test_any_layout_of_x(name):
    for size in (16, 13):
        tensors, rows = draw(size=size, dtype=BF16, gather=12)
        check(tensors | {"x": INPUT_LAYOUTS[name](tensors["x"])}, rows)


W_LAYOUTS = INPUT_LAYOUTS | {
    "every other matrix": lambda w: w.repeat_interleave(2, 0)[::2],
    "one for all": lambda w: w[:1].expand_as(w),
    "half of its rows": lambda w: torch.cat([w, w], 1)[:, w.shape[1] :],
    "half of a transposed one": lambda w: torch.cat([w, w], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, w.shape[1] :],
    "all permuted": lambda w: w.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.both
@pytest.mark.parametrize("name", W_LAYOUTS)
def test_any_layout_of_w(name):
    for num_cols, size in ((24, 16), (13, 7)):
        tensors, rows = draw(num_cols=num_cols, size=size, dtype=BF16)
        tensors |= {"w": W_LAYOUTS[name](tensors["w"]), "bias": INPUT_LAYOUTS["last dim strided"](tensors["bias"])}
        check(tensors, rows)


@pytest.mark.both
def test_any_layout_of_numbers():
    """offsets, gather and scatter with gaps between them."""
    tensors, rows = draw(gather=40, scatter=True)
    spread = {name: t.repeat_interleave(2)[::2] for name, t in rows.items()}
    assert not any(t.is_contiguous() for t in spread.values())
    assert torch.equal(check(tensors, spread)["out0"], of(**rows)[0](**tensors))


@pytest.mark.both
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
@pytest.mark.parametrize("scatter", [False, True], ids=["in place", "scattered"])
def test_any_upstream_layout(name, scatter):
    tensors, rows = draw(dtype=BF16, scatter=scatter)
    check(tensors, rows, upstream(of(**rows)[0], tensors, UPSTREAM_LAYOUTS[name]))


@pytest.mark.both
@DTYPES
def test_torch_s_own(dtype):
    """Where torch's function runs, whose sizes are multiples of 16 bytes, and whose rows of no group hold anything."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("torch has no grouped_mm")
    tensors, rows = draw(num_cols=48, size=64, nobody=0, bias=False, dtype=dtype)
    theirs = lambda x, w: F.grouped_mm(x, w.transpose(1, 2), offs=rows["offsets"])  # noqa: E731
    result = check(tensors, rows, naive=theirs)
    expected = run(theirs, tensors, [torch.ones_like(result["out0"])])["out0"]
    torch.testing.assert_close(result["out0"], expected)


def test_torch_s_own_bit_by_bit():
    """On the CPU both are one product of torch's a group."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("torch has no grouped_mm")
    tensors, rows = draw(num_cols=48, size=64, nobody=0, bias=False, dtype=BF16)
    dout = torch.randn(sum(COUNTS), 48).to(BF16)
    theirs = lambda x, w: F.grouped_mm(x, w.transpose(1, 2), offs=rows["offsets"])  # noqa: E731
    expected = run(theirs, tensors, [dout])
    for name, value in run(of(**rows)[0], tensors, [dout]).items():
        assert torch.equal(value, expected[name]), name


# --------------------------------------------------------------------------------------------------------------------
# Properties.


@pytest.mark.both
def test_rows_are_read_and_written_anywhere():
    """Gathered is as copied before, scattered as copied after; both bit for bit."""
    tensors, rows = draw(gather=20, scatter=True, dtype=BF16)
    x, w, bias = tensors.values()
    offsets, gather, scatter = rows.values()
    out = fastattn.grouped_mm(x[gather], w, offsets, bias=bias)
    assert torch.equal(fastattn.grouped_mm(x, w, offsets, bias=bias, gather=gather), out)
    assert torch.equal(fastattn.grouped_mm(x[gather], w, offsets, bias=bias, scatter=scatter)[scatter], out)
    assert torch.equal(fastattn.grouped_mm(x, w, offsets, bias=bias, gather=gather, scatter=scatter)[scatter], out)
    identity = torch.arange(len(x))
    assert torch.equal(fastattn.grouped_mm(x, w, ends(4, 4, 4, 4, 2), gather=identity), fastattn.grouped_mm(x, w, ends(4, 4, 4, 4, 2)))


@pytest.mark.both
def test_there_and_back():
    """A permutation gathered and scattered again changes nothing; one matrix for all is a linear layer."""
    x, w, order = torch.randn(30, 16), torch.randn(1, 24, 16), torch.randperm(30)
    one = {"x": x, "w": w}
    check_op(
        "grouped_mm of one matrix",
        lambda x, w: fastattn.grouped_mm(x, w.expand(3, 24, 16), ends(7, 13, 10), gather=order, scatter=order),
        lambda x, w: x @ w[0].T,
        one,
    )


@pytest.mark.both
def test_two_runs_are_one():
    tensors, rows = draw(gather=9, scatter=True, dtype=BF16)
    dout = torch.randn(len(rows["gather"]), 33).to(BF16)
    first, second = (run(of(**rows)[0], tensors, [dout]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("gather", [None, 20], ids=["in order", "gathered"])
def test_each_subset_of_gradients(gather):
    tensors, rows = draw((3, 0, 4), 9, 8, gather=gather, scatter=True)
    op, dout = of(**rows)[0], torch.randn(10, 9)
    whole = run(op, tensors, [dout])
    for wanted in itertools.product([False, True], repeat=3):
        leaves = {name: t.clone().requires_grad_(want) for (name, t), want in zip(tensors.items(), wanted)}
        out = op(**leaves)
        assert torch.equal(out, whole["out0"]) and out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(dout)
        for (name, leaf), want in zip(leaves.items(), wanted):
            assert torch.equal(leaf.grad, whole[f"d{name}"]) if want else leaf.grad is None, (name, wanted)


@pytest.mark.both
def test_pure():
    tensors, rows = draw(gather=20, scatter=True)
    check_pure(of(**rows)[0], tensors)
    tensors, rows = draw(bias=False)
    check_pure(of(**rows)[0], tensors)


@pytest.mark.both
def test_what_is_kept_for_the_backward_is_what_came_in():
    tensors, rows = draw(gather=20, scatter=True)
    leaves, kept = [t.requires_grad_() for t in tensors.values()], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        of(**rows)[0](*leaves)
    assert sorted(kept) == sorted(t.data_ptr() for t in (*leaves[:2], *rows.values()))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not of(**rows)[0](*leaves).requires_grad


@pytest.mark.both
@pytest.mark.parametrize("wanted", [("x",), ("w",), ("bias",), ("w", "bias"), ("x", "bias")], ids=str)
def test_what_one_gradient_needs_is_all_that_is_kept(wanted):
    """x for w's and w for x's; the gradients are those of all."""
    tensors, rows = draw(gather=20, scatter=True)
    dout = upstream(of(**rows)[0], tensors)
    whole = run(of(**rows)[0], tensors, dout)
    leaves, kept = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = of(**rows)[0](**leaves)
    assert (leaves["x"].data_ptr() in kept, leaves["w"].data_ptr() in kept) == ("w" in wanted, "x" in wanted)
    for name, grad in zip(wanted, torch.autograd.grad(out, [leaves[name] for name in wanted], dout), strict=True):
        assert torch.equal(grad, whole[f"d{name}"]), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_autocast(dtype):
    """In bfloat16, as a linear layer; gradients are in the parameters' dtypes."""
    tensors, rows = draw(dtype=dtype, gather=20)
    op, dout = of(**rows)[0], torch.randn(34, 33).to(BF16)
    expected = run(op, {name: t.to(BF16) for name, t in tensors.items()}, [dout])

    def cast(**tensors):
        with torch.autocast("cpu", BF16):
            return op(**tensors)

    got = run(cast, tensors, [dout])
    assert got["out0"].dtype == BF16
    for name, value in got.items():
        assert value.dtype == (BF16 if name == "out0" else dtype) and torch.equal(value, expected[name].to(value.dtype)), name


@pytest.mark.parametrize("counted", [{}, {"gather": 20}], ids=["in order", "gathered"])
def test_flops(counted):
    tensors, rows = draw(**counted)
    product = 2 * 34 * 33 * 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        of(**rows)[0](**tensors)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        of(**rows)[0](**{name: t.requires_grad_() for name, t in tensors.items()}).sum().backward()
    assert counter.get_total_flops() == 3 * product
    tensors["x"].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        of(**rows)[0](**tensors).sum().backward()
    assert counter.get_total_flops() == 2 * product


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop():
    tensors, rows = draw((5, 0, 4), 9, 8, bias=False)
    op, xs, ws = of(**rows)[0], torch.randn(3, 12, 8), torch.randn(3, 3, 9, 8)
    for args, dims in (((xs, ws), (0, 0)), ((xs, tensors["w"]), (0, None)), ((tensors["x"], ws), (None, 0))):
        singly = [[t[i] if dim == 0 else t for t, dim in zip(args, dims)] for i in range(3)]
        assert torch.equal(torch.func.vmap(op, dims)(*args), torch.stack([op(*one) for one in singly]))
        grad = torch.func.grad(lambda x, w: op(x, w).square().sum(), (0, 1))
        for got, expected in zip(torch.func.vmap(grad, dims)(*args), zip(*(grad(*one) for one in singly))):
            assert torch.equal(got, torch.stack(expected))


# --------------------------------------------------------------------------------------------------------------------
# Below the checks.


def repaired(x, offsets, gather, scatter, num_rows):
    """What the kernels make of numbers that are none, as an oracle of x, w, bias and the rows that may be used: ends rise to R and no
    further, a row gathered from outside is 0, and one scattered outside is not written."""
    ends = offsets.long().cummax(0).values.clamp(0, num_rows).int()
    rows, places = (torch.arange(num_rows) if numbers is None else numbers for numbers in (gather, scatter))
    rows = torch.where((rows >= 0) & (rows < len(x)), rows, len(x))
    written = (places >= 0) & (places < num_rows)

    def oracle(x, w, bias=None):
        out = reference.grouped_mm(torch.cat([x, torch.zeros_like(w[:1, 0])])[rows], w, ends, bias=bias)
        return torch.zeros_like(out).index_copy(0, places[written], out[written])

    return oracle


def check_launchers(tensors, offsets, gather=None, scatter=None):
    """grouped_mm_fwd and grouped_mm_bwd, called themselves."""
    from fastattn.kernels.grouped_mm import grouped_mm_bwd, grouped_mm_fwd

    x, w, bias = tensors["x"], tensors["w"], tensors.get("bias")
    num_rows = len(x if gather is None else gather)
    oracle, douts = repaired(x, offsets, gather, scatter, num_rows), [torch.randn(num_rows, w.shape[1]).to(x.dtype)]
    got = {"out0": grouped_mm_fwd(x, w, offsets, bias, gather, scatter)}
    got |= zip(("dx", "dw", "dbias"), grouped_mm_bwd(douts[0], x, w, offsets, gather, scatter, len(x), [True] * 3))
    truth, baseline = run(oracle, tensors, douts, torch.float64), run(oracle, tensors, douts)
    for name, value in truth.items():
        check_budget(f"grouped_mm {name} with {offsets} {gather} {scatter}", got[name], baseline[name], value)


HOSTILE_ENDS = {
    "decreasing": (9, 4, 30, 12, 20),
    "negative": (-5, -(2**31), 3, -1, 12),
    "all negative": (-1,) * 5,
    "past the end": (3, 40, 41, 50, 70),
    "far past the end": (5, 2**31 - 1, 2**31 - 1, 2, 2**31 - 1),
    "lowest and highest": (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1, 0),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", HOSTILE_ENDS)
def test_hostile_ends(name):
    offsets = torch.tensor(HOSTILE_ENDS[name], dtype=torch.int32)
    tensors, _ = draw(nobody=4)
    check_launchers(tensors, offsets)
    tensors, rows = draw(nobody=4, gather=20, scatter=True)
    check_launchers(tensors, offsets, rows["gather"], rows["scatter"])


@pytest.mark.interpret
@pytest.mark.parametrize("gathered, scattered", [(True, False), (False, True), (True, True)], ids=["gather", "scatter", "both"])
def test_hostile_row_numbers(gathered, scattered):
    worst = torch.tensor([-1, 2**62, -(2**63), 2**63 - 1, 20, 34, 35, 2**31, -(2**31), 2**32])
    tensors, rows = draw(gather=20 if gathered else None, scatter=scattered)
    for name in rows.keys() - {"offsets"}:
        rows[name][torch.randperm(34)[:12]] = torch.cat([worst, worst[:2]])
    if scattered:
        rows["scatter"][rows["scatter"] == 20] = -20  # which is a row of out, and may be named already
    check_launchers(tensors, **rows)


@pytest.mark.interpret
def test_x_of_no_rows_to_gather_from():
    tensors, rows = draw(gather=20)
    check_launchers(tensors | {"x": torch.zeros(0, 40)}, **rows)


@pytest.mark.interpret
def test_rows_past_2_31_elements():
    stride = 2**31 + 8
    storage = torch.UntypedStorage(2 * (stride + 16))  # reserved, not filled
    wide = torch.empty(0, dtype=F16).set_(storage, 0, (2, 16), (stride, 1))
    wide.copy_(torch.randn(2, 16))
    narrow, w = wide.contiguous(), torch.randn(2, 24, 16).to(F16)
    for rows in ({}, {"gather": torch.tensor([1, 0, 1])}):
        offsets = ends(1, 1)
        assert torch.equal(fastattn.grouped_mm(wide, w, offsets, **rows), fastattn.grouped_mm(narrow, w, offsets, **rows))
    matrices = torch.empty(0, dtype=F16).set_(storage, 0, (2, 16, 1), (stride, 1, 1))
    x = torch.randn(2, 1).to(F16)
    assert torch.equal(fastattn.grouped_mm(x, matrices, ends(1, 1)), fastattn.grouped_mm(x, matrices.contiguous(), ends(1, 1)))


@pytest.mark.interpret
def test_program_order_does_not_matter():
    from fastattn.testing.checker import assert_order_independent

    tensors, rows = draw((17, 0, 40, 3), 70, 40, gather=20, scatter=True)
    dout = torch.randn(63, 70)
    assert_order_independent(lambda: tuple(run(of(**rows)[0], tensors, [dout]).values()))


# --------------------------------------------------------------------------------------------------------------------
# Bad input.

X, W, ENDS, ROWS = torch.zeros(6, 16), torch.zeros(3, 8, 16), torch.tensor([2, 2, 5], dtype=torch.int32), torch.arange(6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=None), TypeError, r"x must be a torch.Tensor, got NoneType"),
        (dict(x=X.double()), TypeError, r"x must be float16, bfloat16 or float32, got torch.float64"),
        (dict(x=X[0]), ValueError, r"x must have shape \(T, K\) with K of 1 or more, got \(16,\)"),
        (dict(x=X[:, :0]), ValueError, r"x must have shape \(T, K\) with K of 1 or more, got \(6, 0\)"),
        (dict(w=None), TypeError, r"w must be a torch.Tensor, got NoneType"),
        (dict(w=W.half()), TypeError, r"w must have x's dtype torch.float32, got torch.float16"),
        (dict(w=W.to("meta")), ValueError, r"w must be on x's device cpu, got meta"),
        (dict(w=W[0]), ValueError, r"w must have shape \(E, N, K\), none of it 0, got \(8, 16\)"),
        (dict(w=W[:0]), ValueError, r"w must have shape \(E, N, K\), none of it 0, got \(0, 8, 16\)"),
        (dict(w=W[:, :0]), ValueError, r"w must have shape \(E, N, K\), none of it 0, got \(3, 0, 16\)"),
        (dict(w=W.transpose(1, 2)), ValueError, r"w must have shape \(E, N, K\) with x's K = 16, got \(3, 16, 8\)"),
        (dict(w=W[:1].expand(4097, 8, 16)), ValueError, r"w must have at most 4096 groups, got \(4097, 8, 16\)"),
        (dict(offsets=[2, 2, 5]), TypeError, r"offsets must be a torch.Tensor, got list"),
        (dict(offsets=ENDS.long()), TypeError, r"offsets must be an int32 tensor, got torch.int64"),
        (dict(offsets=ENDS.to("meta")), ValueError, r"offsets must be on x's device cpu, got meta"),
        (dict(offsets=ENDS[1:]), ValueError, r"offsets must have shape \(E,\) = \(3,\), got \(2,\)"),
        (dict(offsets=ENDS[None]), ValueError, r"offsets must have shape \(E,\) = \(3,\), got \(1, 3\)"),
        (dict(bias=1.0), TypeError, r"bias must be a torch.Tensor, got float"),
        (dict(bias=W[:, :, 0].half()), TypeError, r"bias must have x's dtype torch.float32, got torch.float16"),
        (dict(bias=W[:, :, 0].to("meta")), ValueError, r"bias must be on x's device cpu, got meta"),
        (dict(bias=W[0, :, 0]), ValueError, r"bias must have shape \(E, N\) = \(3, 8\), got \(8,\)"),
        (dict(gather=[0]), TypeError, r"gather must be a torch.Tensor, got list"),
        (dict(gather=ROWS.int()), TypeError, r"gather must be an int64 tensor, got torch.int32"),
        (dict(gather=ROWS.to("meta")), ValueError, r"gather must be on x's device cpu, got meta"),
        (dict(gather=ROWS[None]), ValueError, r"gather must have shape \(R,\), got \(1, 6\)"),
        (dict(scatter=[0]), TypeError, r"scatter must be a torch.Tensor, got list"),
        (dict(scatter=ROWS.int()), TypeError, r"scatter must be an int64 tensor, got torch.int32"),
        (dict(scatter=ROWS.to("meta")), ValueError, r"scatter must be on x's device cpu, got meta"),
        (dict(scatter=ROWS[None]), ValueError, r"scatter must have shape \(R,\), got \(1, 6\)"),
        (dict(scatter=ROWS[1:]), ValueError, r"scatter must have shape \(R,\) = \(6,\), got \(5,\)"),
        (dict(gather=ROWS[1:], scatter=ROWS), ValueError, r"scatter must have shape \(R,\) = \(5,\), got \(6,\)"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match="grouped_mm: " + message):
        fastattn.grouped_mm(**dict(x=X, w=W, offsets=ENDS) | change)


def numbers(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.both
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(offsets=numbers(2, 1, 5, dtype=torch.int32)), r"offsets must start at 0 or more and not decrease, got 2 then 1 at group 1"),
        (dict(offsets=numbers(-1, 2, 5, dtype=torch.int32)), r"offsets must start at 0 or more and not decrease, got 0 then -1 at group 0"),
        (dict(offsets=numbers(2, 4, 7, dtype=torch.int32)), r"offsets must end within the 6 rows, got 7"),
        (dict(gather=ROWS[:4]), r"offsets must end within the 4 rows, got 5"),
        (dict(gather=numbers(0, 1, 2, 3, 4, 6)), r"gather must hold row numbers in \[0, 6\), got 6"),
        (dict(gather=numbers(0, 1, 2, 3, 4, -1)), r"gather must hold row numbers in \[0, 6\), got -1"),
        (dict(scatter=numbers(0, 1, 2, 3, 4, 6)), r"scatter must hold row numbers in \[0, 6\), got 6"),
        (dict(scatter=numbers(0, 1, 2, 3, 4, -(2**63))), r"scatter must hold row numbers in \[0, 6\), got -9223372036854775808"),
        (dict(scatter=numbers(0, 1, 2, 3, 4, 1)), r"scatter must name no row twice, got 1 more than once"),
    ],
)  # fmt: skip
def test_bad_values(change, message):
    with pytest.raises(ValueError, match="grouped_mm: " + message):
        fastattn.grouped_mm(**dict(x=X, w=W, offsets=ENDS) | change)


# --------------------------------------------------------------------------------------------------------------------
# The operators.


@pytest.mark.parametrize("gather, scatter", [(None, False), (5, True)], ids=["in order", "gathered and scattered"])
def test_operators(gather, scatter):
    tensors, rows = draw((3, 4), 9, 16, 1, dtype=BF16, gather=gather, scatter=scatter)
    x, w, bias = tensors.values()
    offsets, *numbers = rows["offsets"], rows.get("gather"), rows.get("scatter")
    if scatter:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    check_operator(torch.ops.fastattn.grouped_mm_fwd, x, w, offsets, bias if scatter else None, *numbers)
    dout = torch.randn(8, 1).to(BF16).expand(8, 9)
    for wanted in ([True] * 3, [False, True, False]):
        check_operator(torch.ops.fastattn.grouped_mm_bwd, dout, x, w, offsets, *numbers, len(x), wanted)


@pytest.mark.both
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_that_are_not_wanted_are_empty(wanted):
    tensors, rows = draw(gather=20)
    x, w, _ = tensors.values()
    dout = torch.randn(34, 33)
    grads = torch.ops.fastattn.grouped_mm_bwd(dout, x, w, rows["offsets"], rows["gather"], None, len(x), list(wanted))
    for grad, want, shape in zip(grads, wanted, (x.shape, w.shape, w.shape[:2])):
        assert grad.shape == (shape if want else (0,))


def test_transforms():
    tensors, rows = draw((3, 0, 4), 8, 8, gather=5, scatter=True)
    # A product is linear in each: what its gradient depends on is the upstream one.
    check_transforms("grouped_mm", lambda **tensors: of(**rows)[0](**tensors).square(), tensors)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    tensors, rows = draw(gather=20, scatter=True)
    check_compiled(of(**rows)[0], tensors, dynamic)


@pytest.mark.both
@pytest.mark.more
def test_compiled_by_aot_eager_is_eager():
    for bias in (False, True):
        tensors, rows = draw((3, 0, 4), 9, 8, bias=bias)
        check_compiled(of(**rows)[0], tensors, backend="aot_eager")


def test_numbers_of_rows_are_one_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fastattn.grouped_mm, fullgraph=True, backend=counter)
    for nobody in (0, 5, 30):
        tensors, rows = draw(nobody=nobody, bias=False)
        torch._dynamo.mark_dynamic(tensors["x"], 0)
        assert torch.equal(compiled(**tensors, **rows), fastattn.grouped_mm(**tensors, **rows))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "grouped_mm")


def launch_forward(ops, num_rows, dtype=BF16, num_groups=8, num_cols=256, size=128, transposed=False, numbered=True):
    """Calls grouped_mm_fwd's implementation on tensors of so many rows; gives what the backward's takes."""
    x, w = torch.zeros(num_rows, size, dtype=dtype), torch.zeros(num_groups, num_cols, size, dtype=dtype)
    w = w.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w
    offsets, bias = torch.zeros(num_groups, dtype=torch.int32), torch.zeros(num_groups, num_cols, dtype=dtype) if numbered else None
    numbers = (torch.zeros(num_rows, dtype=torch.int64),) * 2 if numbered else (None, None)
    return ops._grouped_mm_fwd(x, w, offsets, bias, *numbers), x, w, offsets, *numbers, num_rows


def launch_both(ops, num_rows, **options):
    given = launch_forward(ops, num_rows, **options)
    ops._grouped_mm_bwd(*given, [True] * 3)
    return given


NAMES = ["_grouped_mm_kernel", "_grouped_mm_kernel", "_grouped_mm_weight_kernel", "_grouped_sum_kernel"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_never_syncs(as_on_cuda, capability):
    numbered = capability in ((8, 0), (10, 0))
    launches = launched_on(capability, lambda: launch_both(as_on_cuda, 1000, numbered=numbered))
    assert [launch.name for launch in launches] == NAMES[:2] + ["_sum_gathered_kernel"] * numbered + NAMES[2:]


def test_cuda_implementation_in_single_precision_never_syncs(as_on_cuda):
    assert [launch.name for launch in launched_on((9, 0), lambda: launch_both(as_on_cuda, 100, dtype=F32, numbered=False))] == NAMES


def test_a_transposed_w_is_read_as_it_lies(as_on_cuda):
    """Forward, and for the gradient of x, for which an upright one is a transposed one."""
    made = []
    launches = launched_on((9, 0), lambda: made.extend(launch_both(as_on_cuda, 1000, transposed=True, numbered=False)))
    for launch in launches[:2]:
        assert launch.name == NAMES[0] and launch.args["w_ptr"].data_ptr() == made[2].data_ptr()


# Odd ones, multiples of what a compiler makes something of, one, and up to tiles of 64 rows.
SOME_NUMBERS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 160, 199, 200)


def test_numbers_of_rows_choose_at_most_two_variants(as_on_cuda):
    """A few rows a group and many."""
    from fastattn.kernels.grouped_mm import _grouped_mm_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for num_rows in SOME_NUMBERS:
            launch_forward(as_on_cuda, num_rows)
        assert compiled_variants(_grouped_mm_kernel) == 2
    with stub_driver() as driver:
        given = launch_forward(as_on_cuda, 200)
        driver.forget()
        for num_rows in SOME_NUMBERS:
            *tensors, _ = given
            as_on_cuda._grouped_mm_bwd(*(t[:num_rows] if len(t) == 200 else t for t in tensors), num_rows, [True] * 3)
        assert max(len(driver.variants(launch.kernel)) for launch in driver.launches) == 2


def test_no_rows_launch_no_product(as_on_cuda):
    """Gradients of matrices and biases are 0, which is written."""
    assert [launch.name for launch in launched_on((9, 0), lambda: launch_both(as_on_cuda, 0, numbered=False))] == NAMES[2:]


@pytest.mark.parametrize("launcher", ["product", "weight", "sum", "forward", "backward"])
def test_more_rows_than_32_bits_count_are_refused(launcher):
    """By each launcher, before anything of that many rows is looked at: these have no memory."""
    pytest.importorskip("triton", reason="needs triton")
    from fastattn.kernels import grouped_mm as kernels
    from fastattn.testing.stub_driver import stub_driver

    num_rows = kernels.MOST_ROWS + 1
    x, y, w = (torch.empty(*shape, dtype=F16, device="meta") for shape in ((num_rows, 16), (num_rows, 8), (2, 8, 16)))
    offsets, bias = torch.empty(2, dtype=torch.int32, device="meta"), w[:, :, 0].contiguous()
    calls = {
        "product": lambda: kernels.launch_product("grouped_mm", x, kernels.Matrices(w), None, offsets, y, num_rows=num_rows),
        "weight": lambda: kernels.launch_weight("grouped_mm", y, x, offsets, w, num_rows=num_rows),
        "sum": lambda: kernels.launch_sum("grouped_mm", y, offsets, bias, num_rows=num_rows),
        "forward": lambda: kernels.grouped_mm_fwd(x, w, offsets, bias, None, None),
        "backward": lambda: kernels.grouped_mm_bwd(y, x, w, offsets, None, None, len(x), [True] * 3),
    }
    with stub_driver(), pytest.raises(ValueError, match=f"grouped_mm: the input must have at most {num_rows - 1} rows, got {num_rows}"):
        calls[launcher]()


def test_more_tiles_than_32_bits_count_are_refused():
    pytest.importorskip("triton", reason="needs triton")
    from fastattn.kernels.grouped_mm import MOST_ROWS, grouped_mm_fwd
    from fastattn.testing.stub_driver import stub_driver

    x, w = torch.empty(MOST_ROWS, 16, dtype=F16, device="meta"), torch.empty(2, 2**16, 16, dtype=F16, device="meta")
    with stub_driver(), pytest.raises(ValueError, match=r"grouped_mm: the input must need fewer than 2\^31 programs"):
        grouped_mm_fwd(x, w, torch.empty(2, dtype=torch.int32, device="meta"), None, None, None)


@pytest.mark.parametrize("num_rows", [1, 100, 2000, 200_000])
def test_programs_stay(as_on_cuda, num_rows):
    """As many as there are tiles, at most as many as have room together; those of matrices are one a tile of theirs."""
    from fastattn.kernels.grouped_mm import config_of
    from fastattn.testing.stub_driver import stub_driver

    with stub_driver() as driver:
        given = launch_forward(as_on_cuda, num_rows, numbered=False)
        as_on_cuda._grouped_mm_bwd(*given, [False, True, False])
        product, weight = driver.launches
        config = config_of("product", given[1], num_rows, 8, 128, True)
        tiles = (min(8, num_rows) + num_rows // config.BLOCK_M) * -(-256 // config.BLOCK_N)
        assert product.grid == (min(tiles, 132 * config.resident), 1, 1)
        config = config_of("weight", given[0], num_rows, 8, num_rows, True)
        assert weight.grid == (8 * -(-256 // config.BLOCK_M) * -(-128 // config.BLOCK_N), 1, 1)
