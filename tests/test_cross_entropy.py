"""Cross-entropy: the kernels in the interpreter and the CPU path against float64, torch's contract, the operator, the launch path."""

from __future__ import annotations

import math

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
    runs_as_on_cuda,
    upstream,
)

import fastattn
from fastattn.reference import cross_entropy as reference

INF, NAN = float("inf"), float("nan")
OPTIONS = ["ignore_index", "weight", "label_smoothing", "z_loss", "softcap"]


def targets(shape, num_classes, ignored=0.2, ignore_index=-100):
    """Random classes, some of them ignored, the first and the last class among them."""
    target = torch.randint(num_classes, shape)
    target[torch.rand(shape) < ignored] = ignore_index
    if target.numel() > 2:
        target.view(-1)[0], target.view(-1)[-1] = 0, num_classes - 1
    return target


def everything(num_classes, **options):
    """All of the options at once."""
    return dict(weight=torch.rand(num_classes) + 0.1, label_smoothing=0.1, z_loss=0.01, softcap=3.0, return_lse=True) | options


def of(target, **options):
    """(op, oracle) as functions of the input."""
    return (
        lambda input: fastattn.cross_entropy(input, target, **options),
        lambda input: reference(input, target, **options),
    )


def check(input, target, douts=None, **options):
    op, oracle = of(target, **options)
    return check_op(f"cross_entropy {tuple(input.shape)} {list(options)}", op, oracle, {"input": input}, douts)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.

# One row of each bucket, at its top and ragged; more rows than a program takes; edges shorter than a vector; two blocks of columns.
SHAPES = [(3, 1), (70, 7), (5, 64), (40, 100), (17, 256), (3, 500), (3, 769), (2, 2048), (2, 4099), (2, 8192), (3, 40001)]


@pytest.mark.both
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    input, target = torch.randn(shape).to(dtype), targets(shape[:1], shape[1])
    check(input, target)
    check(input, target, reduction="none", **everything(shape[1]))


@pytest.mark.both
@pytest.mark.more
@pytest.mark.parametrize("num_classes", [32768, 65536, 131071, 300000])
def test_very_long_rows(num_classes):
    input, target = torch.randn(2, num_classes).to(BF16), targets((2,), num_classes)
    check(input, target)
    check(input, target, **everything(num_classes))


@pytest.mark.both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_classes", [11, 2100])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(option, num_classes, reduction):
    value = {"ignore_index": 3, "weight": torch.rand(num_classes), "label_smoothing": 0.3, "z_loss": 0.1, "softcap": 2.0}[option]
    target = targets((6,), num_classes, ignore_index=3 if option == "ignore_index" else -100)
    check(torch.randn(6, num_classes), target, reduction=reduction, **{option: value})


@pytest.mark.both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_values_and_dtypes_are_torch_s(dtype, weighted, smoothing, reduction):
    input, target = torch.randn(9, 30).to(dtype).requires_grad_(), targets((9,), 30)
    weight = torch.rand(30).to(dtype) if weighted else None
    args = target, weight
    options = dict(reduction=reduction, label_smoothing=smoothing)
    got, expected = fastattn.cross_entropy(input, *args, **options), F.cross_entropy(input, *args, **options)
    dloss = torch.randn(expected.shape).to(dtype)
    rtol = 1e-5 if dtype == F32 else 0.05
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)
    grads = [torch.autograd.grad(loss, input, dloss)[0] for loss in (got, expected)]
    torch.testing.assert_close(*grads, rtol=rtol, atol=rtol)


@pytest.mark.both
@pytest.mark.parametrize("shape", [(5,), (3, 5, 4), (2, 6, 3, 2), (2, 5, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_shape_that_torch_takes(shape, reduction):
    num_classes = shape[min(1, len(shape) - 1)]
    target = targets(shape[:1] * (len(shape) > 1) + shape[2:], num_classes, ignored=0.0)
    input = torch.randn(shape)
    results = check(input, target, reduction=reduction, **everything(num_classes))
    assert results["out1"].shape == target.shape
    assert results["out0"].shape == F.cross_entropy(input, target, reduction=reduction).shape


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_classes", [1000, 5001])
def test_constant_rows_and_common_offsets(num_classes, dtype):
    target = targets((3,), num_classes, ignored=0.0)
    check(torch.full((3, num_classes), 3.0).to(dtype), target)
    x = torch.randn(3, num_classes)
    for offset in (1e4, -1e4):
        check((x + offset).to(dtype), target, label_smoothing=0.1)


@pytest.mark.both
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_classes", [9, 1001, 5000])
def test_infinities_are_torch_s(num_classes, smoothing):
    input = torch.randn(7, num_classes)
    input[0] = -INF
    input[1, : num_classes // 2], input[2, : num_classes // 2] = -INF, -INF
    input[3, 3], input[4, num_classes - 1], input[5, 5] = INF, NAN, -INF
    target = torch.tensor([2, 1, num_classes - 1, 0, 0, 5, 0])
    grads = []
    for op in (fastattn.cross_entropy, F.cross_entropy):
        leaf = input.clone().requires_grad_()
        loss = op(leaf, target, reduction="none", label_smoothing=smoothing)
        grads += [loss.detach(), *torch.autograd.grad(loss, leaf, torch.arange(1.0, 8.0))]
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grads[1], grads[3], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.both
@pytest.mark.parametrize("num_classes", [9, 2100, 4097])
def test_ignored_rows_may_hold_anything(num_classes):
    input = torch.randn(4, num_classes)
    input[1], input[2] = -INF, NAN
    target = torch.tensor([0, -100, -100, num_classes - 1])
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "weight": torch.rand(num_classes)}):
        leaf = input.clone().requires_grad_()
        loss = fastattn.cross_entropy(leaf, target, **options)
        loss.backward()
        kept = input[[0, 3]].clone().requires_grad_()
        expected = reference(kept, target[[0, 3]], **options)
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(leaf.grad[[0, 3]], kept.grad)
        assert (leaf.grad[1:3] == 0).all()


@pytest.mark.both
def test_the_lse_of_every_row_and_its_gradient():
    input, target = torch.randn(5, 40), torch.tensor([3, -100, 0, -100, 7])
    results = check(input, target, return_lse=True)
    torch.testing.assert_close(results["out1"], torch.logsumexp(input, -1))
    leaf = input.clone().requires_grad_()
    _, lse = fastattn.cross_entropy(leaf, target, return_lse=True)
    lse.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.softmax(input, -1))
    minus = torch.full((2, 40), -INF)
    assert torch.equal(fastattn.cross_entropy(minus, target[:2], return_lse=True)[1], torch.full((2,), -INF))
    assert fastattn.cross_entropy(input.to(BF16), target, return_lse=True)[1].dtype == F32


@pytest.mark.both
@pytest.mark.parametrize("weight", [None, torch.arange(5.0)], ids=["plain", "weighted"])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (2, 5, 0)], ids=str)
def test_no_valid_target(shape, weight):
    target = torch.full(shape[:1] + shape[2:], -100)
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            input = torch.randn(shape, requires_grad=True)
            loss = fastattn.cross_entropy(input, target, weight, reduction=reduction, label_smoothing=smoothing)
            expected = F.cross_entropy(input, target, weight, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            loss.sum().backward()
            assert torch.equal(input.grad, torch.zeros(shape))


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
@pytest.mark.parametrize("num_classes", [64, 77])
def test_any_input_layout(name, num_classes):
    input = INPUT_LAYOUTS[name](torch.randn(3, 4, num_classes).to(BF16)).transpose(1, 2)  # the class dim is the second
    check(input, targets((3, 4), num_classes), **everything(num_classes))


@pytest.mark.both
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
def test_any_upstream_layout(name):
    options = everything(40, reduction="none")
    input, target = torch.randn(3, 40, 5), targets((3, 5), 40)
    op, _ = of(target, **options)
    check(input, target, upstream(op, {"input": input}, UPSTREAM_LAYOUTS[name]), **options)


@pytest.mark.both
def test_targets_of_any_layout_and_of_32_bits():
    input, target = torch.randn(6, 20), targets((6,), 20)
    expected = fastattn.cross_entropy(input, target)
    assert torch.equal(fastattn.cross_entropy(input, target.int()), expected)
    assert torch.equal(fastattn.cross_entropy(input, target.repeat_interleave(2)[::2]), expected)
    same = torch.tensor(3).expand(6)
    assert torch.equal(fastattn.cross_entropy(input, same), fastattn.cross_entropy(input, same.contiguous()))


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F16, BF16, F32, torch.float64], ids=str)
def test_weights_of_any_dtype(dtype):
    input, target, weight = torch.randn(6, 20), targets((6,), 20), torch.rand(20).to(dtype)
    got = fastattn.cross_entropy(input, target, weight, label_smoothing=0.1)
    torch.testing.assert_close(got, F.cross_entropy(input, target, weight.float(), label_smoothing=0.1))


@pytest.mark.both
def test_pure():
    check_pure(of(targets((6,), 100), **everything(100))[0], {"input": torch.randn(6, 100)})


@pytest.mark.both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_input_and_a_few_numbers_are_saved(reduction):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        input = torch.randn(8, 3000, requires_grad=True)
        fastattn.cross_entropy(input * 1.0, targets((8,), 3000), reduction=reduction)
    assert sorted(t.numel() for t in saved if t.numel() > 100) == [8 * 3000]  # the product's saved input is a number


@pytest.mark.both
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities(shape, reduction):
    target = torch.softmax(torch.randn(shape), min(1, len(shape) - 1))
    options = dict(reduction=reduction, label_smoothing=0.1)
    check(torch.randn(shape), target, **options)
    check(torch.randn(shape), target, **everything(5, **options))
    input = torch.randn(shape).to(BF16)
    got, expected = (f(input, target.to(BF16), **options) for f in (fastattn.cross_entropy, F.cross_entropy))
    truth = F.cross_entropy(input.double(), target.to(BF16).double(), **options)
    assert got.dtype == expected.dtype == BF16
    assert (got - truth).abs().max() <= (expected - truth).abs().max()  # one rounding, where torch has several


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_autocast_is_torch_s(dtype):
    input, target = torch.randn(4, 50).to(dtype).requires_grad_(), targets((4,), 50)
    with torch.autocast("cpu", BF16):
        loss = fastattn.cross_entropy(input, target)
        expected = F.cross_entropy(input, target)
        for probabilities in (fastattn.cross_entropy, F.cross_entropy):
            assert probabilities(input, torch.rand(4, 50)).dtype == F32
    assert loss.dtype == expected.dtype == F32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, input)[0] for t in (loss, expected)))


def test_random_calls():
    """Any shape, dtype and options: a sweep of the CPU path, whose chunks are made small."""
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
    from hypothesis import strategies as st

    from fastattn.cpu import cross_entropy as cpu

    @hypothesis.given(
        st.tuples(st.integers(1, 9), st.integers(1, 60)), st.sampled_from([F32, BF16]), st.sampled_from(["mean", "sum", "none"]),
        st.floats(0, 1), st.booleans(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 2.0]), st.integers(-1, 3),
    )  # fmt: skip
    def sweep(shape, dtype, reduction, smoothing, weighted, z_loss, softcap, ignore_index):
        target = targets(shape[:1], shape[1], ignore_index=ignore_index)
        weight = torch.rand(shape[1]) + 0.1 if weighted else None
        check(
            torch.randn(shape).to(dtype), target, reduction=reduction, label_smoothing=smoothing, weight=weight, z_loss=z_loss,
            softcap=softcap, ignore_index=ignore_index, return_lse=True,
        )  # fmt: skip

    whole, cpu.CHUNK = cpu.CHUNK, 100
    try:
        sweep()
    finally:
        cpu.CHUNK = whole


@pytest.mark.interpret
@pytest.mark.parametrize("num_classes", [60, 1003, 9001])
def test_program_order_does_not_matter(num_classes):
    from fastattn.testing.checker import assert_order_independent

    input, target, options = torch.randn(5, num_classes), targets((5,), num_classes), everything(num_classes, reduction="none")
    dloss, dlse = torch.randn(2, 5)

    def both():
        leaf = input.clone().requires_grad_()
        outs = fastattn.cross_entropy(leaf, target, **options)
        return *outs, torch.autograd.grad(outs, leaf, (dloss, dlse))[0]

    assert_order_independent(both)


@pytest.mark.interpret
@pytest.mark.parametrize("num_classes", [7, 64, 300, 1001, 5003])
def test_hostile_targets_lead_nowhere(num_classes):
    """Nothing outside the logits or the weights is read, under the checker, and the rows in question are NaN, no other."""
    from fastattn.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

    hostile = [num_classes, -1, 2**31 - 1, -(2**31), 2**32 + 1, -(2**32), 2**62, -(2**63)]
    target = torch.tensor([*hostile, 0, -100, num_classes - 1])
    wrong = torch.arange(len(target)) < len(hostile)
    input = torch.randn(len(target), num_classes)
    for weight, smoothing in ((None, 0.0), (torch.rand(num_classes), 0.0), (torch.rand(num_classes), 0.1)):
        options = target, weight, -100, smoothing, 0.1, 0.0
        numbers = cross_entropy_fwd(input, *options)
        numbers_of = (target, weight), (-100, smoothing, 0.1, 0.0)
        dx = cross_entropy_bwd(torch.ones(()), None, None, input, *numbers_of[0], numbers, *numbers_of[1])
        assert torch.equal(numbers[0].isnan(), wrong) and torch.equal(numbers[1].isnan(), wrong)
        assert torch.equal(dx.isnan(), wrong[:, None].expand_as(dx))
        torch.testing.assert_close(numbers[2] + numbers[3], torch.logsumexp(input, -1))


@pytest.mark.interpret
def test_logits_may_be_overwritten_with_their_gradient():
    from fastattn.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

    for num_classes, stride in ((64, 64), (61, 64), (9001, 9008), (5000, 5000)):
        input, target = torch.randn(5, stride)[:, :num_classes], targets((5,), num_classes)
        options = -100, 0.1, 0.1, 0.0
        numbers = cross_entropy_fwd(input, target, None, *options)
        rest = target, None, numbers, *options
        expected = cross_entropy_bwd(torch.ones(()), None, None, input, *rest)
        assert cross_entropy_bwd(torch.ones(()), None, None, input, *rest, out=input) is input
        assert torch.equal(input, expected)


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile_of_the_table():
    from fastattn.kernels.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
    from fastattn.kernels.row_tiles import LONG, ROW_TILES
    from fastattn.testing.budget import check_budget

    for (kernel, _, bucket), config in ROW_TILES.items():
        if not kernel.startswith("cross_entropy"):
            continue
        num_classes = 9001 if bucket == LONG else max(1, bucket - 3)
        input, target = torch.randn(3, num_classes), torch.tensor([0, -100, num_classes - 1])
        leaves = [input.to(dtype).requires_grad_() for dtype in (torch.float64, F32)]
        losses = [reference(leaf, target, reduction="none", label_smoothing=0.1) for leaf in leaves]
        grads = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
        options = target, None, -100, 0.1, 0.0, 0.0
        forward = config if kernel == "cross_entropy_fwd" else None
        numbers = cross_entropy_fwd(input, *options, config=forward)
        check_budget(f"{kernel} {bucket}", numbers[0], losses[1], losses[0])
        if kernel == "cross_entropy_bwd":
            dx = cross_entropy_bwd(torch.ones(()), None, None, input, target, None, numbers, -100, 0.1, 0.0, 0.0, config=config)
            check_budget(f"{kernel} {bucket}", dx, grads[1], grads[0])


# --------------------------------------------------------------------------------------------------------------------
# Bad input.

X, T = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        (([1.0], T), {}, TypeError, r"cross_entropy: input must be a torch.Tensor, got list"),
        ((X, [0, 1, 2]), {}, TypeError, r"cross_entropy: target must be a torch.Tensor, got list"),
        ((X.double(), T), {}, TypeError, r"cross_entropy: input must be float16, bfloat16 or float32, got torch.float64"),
        ((X[0, 0], T[0]), {}, ValueError, r"cross_entropy: input must have shape \(C,\), \(N, C\) or \(N, C, d1, …\), got \(\)"),
        ((X[:, :0], T), {}, ValueError, r"cross_entropy: input must have at least one class, got 0"),
        ((X, T.short()), {}, TypeError, r"cross_entropy: target must be int64 or int32 class indices, got torch.int16"),
        ((X, T > 0), {}, TypeError, r"cross_entropy: target must be int64 or int32 class indices, got torch.bool"),
        ((X, T[:2]), {}, ValueError, r"cross_entropy: target must have shape \(N, d1, …\) = \(3,\), got \(2,\)"),
        ((X, X.long()), {}, ValueError, r"cross_entropy: target must have shape \(N, d1, …\) = \(3,\), got \(3, 5\)"),
        ((X[0], T[:1]), {}, ValueError, r"cross_entropy: target must have shape \(N, d1, …\) = \(\), got \(1,\)"),
        ((X, T.to("meta")), {}, ValueError, r"cross_entropy: target must be on input's device cpu, got meta"),
        ((X, X[:, :2]), {}, ValueError, r"cross_entropy: target must have input's shape \(3, 5\) to hold probabilities, got \(3, 2\)"),
        ((X, X), {"ignore_index": 1}, ValueError, r"cross_entropy: ignore_index must be negative with probabilities .* got 1"),
        ((X, T, [1.0] * 5), {}, TypeError, r"cross_entropy: weight must be a torch.Tensor, got list"),
        ((X, T, torch.ones(4)), {}, ValueError, r"cross_entropy: weight must have shape \(C,\) = \(5,\), got \(4,\)"),
        ((X, T, torch.ones(5, dtype=torch.int64)), {}, TypeError, r"cross_entropy: weight must have a floating-point dtype, got torch.int64"),
        ((X, T, torch.ones(5, device="meta")), {}, ValueError, r"cross_entropy: weight must be on input's device cpu, got meta"),
        ((X, T, torch.ones(5, requires_grad=True)), {}, ValueError, r"cross_entropy: weight must not require a gradient"),
        ((X, T), {"ignore_index": 0.5}, TypeError, r"cross_entropy: ignore_index must be an int, got float"),
        ((X, T), {"reduction": "avg"}, ValueError, r"cross_entropy: reduction must be one of none, mean, sum, got 'avg'"),
        ((X, T), {"label_smoothing": 1.5}, ValueError, r"cross_entropy: label_smoothing must lie in \[0, 1\], got 1.5"),
        ((X, T), {"label_smoothing": NAN}, ValueError, r"cross_entropy: label_smoothing must lie in \[0, 1\], got nan"),
        ((X, T), {"z_loss": "1"}, TypeError, r"cross_entropy: z_loss must be a Python number, got str"),
        ((X, T), {"z_loss": INF}, ValueError, r"cross_entropy: z_loss must be finite, got inf"),
        ((X, T), {"softcap": -1.0}, ValueError, r"cross_entropy: softcap must be finite and not negative, got -1.0"),
        ((X, T + 5), {}, IndexError, r"cross_entropy: target must hold classes in \[0, 4\] or ignore_index = -100, got 5"),
        ((X, T - 1), {}, IndexError, r"cross_entropy: target must hold classes in \[0, 4\] or ignore_index = -100, got -1"),
    ],
)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        fastattn.cross_entropy(*args, **options)


# --------------------------------------------------------------------------------------------------------------------
# The operator.


@pytest.mark.both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_operator(reduction):
    input, target, weight = torch.randn(5, 33).to(BF16), targets((5,), 33), torch.rand(33)
    forward, backward = torch.ops.fastattn.cross_entropy_fwd, torch.ops.fastattn.cross_entropy_bwd
    check_operator(forward, input, target, weight, -100, reduction, 0.1, 0.1, 2.0, F32, True)
    check_operator(forward, input.view(5, 3, 11).transpose(0, 1), target[:3, None].expand(3, 5), None, -100, reduction, 0.0, 0.0, 0.0, BF16, False)
    _, lse, divisor, numbers = forward(input, target, weight, -100, reduction, 0.1, 0.1, 2.0, F32, True)
    dloss = torch.randn(5 if reduction == "none" else ())
    divisor = divisor if reduction == "mean" else None
    check_operator(backward, dloss, lse, divisor, input, target, weight, numbers, -100, 0.1, 0.1, 2.0)
    check_operator(backward, dloss, None, divisor, input, target, None, numbers, -100, 0.0, 0.0, 0.0)


@pytest.mark.both
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_lse": True}], ids=["mean", "none with lse"])
def test_transforms(options):
    check_transforms("cross_entropy", of(targets((4,), 20), **options)[0], {"input": torch.randn(4, 20)})


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    target = targets((4,), 100)
    op = lambda input, target: fastattn.cross_entropy(input, target)  # noqa: E731
    check_compiled(op, {"input": torch.randn(4, 100), "target": target}, dynamic)
    op = of(target, **everything(100, reduction="none"))[0]
    check_compiled(op, {"input": torch.randn(4, 100)}, dynamic)


@pytest.mark.interpret
def test_compiled_is_eager_on_the_kernels():
    check_compiled(of(targets((4,), 100), **everything(100))[0], {"input": torch.randn(4, 100)}, backend="aot_eager")


def test_compiled_takes_an_lse_that_is_not_used():
    """A compiled graph brings zeros for it, where eager mode brings nothing."""
    input, target = torch.randn(4, 30), targets((4,), 30)

    def loss(input):
        return fastattn.cross_entropy(input, target, return_lse=True)[0]

    leaf = input.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).backward()
    assert torch.equal(leaf.grad, torch.func.grad(loss)(input))
    assert torch.equal(leaf.grad, torch.func.grad(lambda x: fastattn.cross_entropy(x, target))(input))


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "cross_entropy")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_compiles_and_never_syncs(as_on_cuda, capability):
    logits, target, weight = torch.zeros(3, 5, 1000, dtype=BF16)[:, :4], torch.zeros(3, 4, dtype=torch.int64), torch.zeros(1000)

    def call():
        _, lse, divisor, numbers = as_on_cuda._cross_entropy_fwd(logits, target, weight, -100, "mean", 0.1, 0.1, 30.0, BF16, True)
        as_on_cuda._cross_entropy_bwd(divisor, lse, divisor, logits, target, weight, numbers, -100, 0.1, 0.1, 30.0)

    launches = launched_on(capability, call)
    assert [launch.name for launch in launches] == ["_cross_entropy_fwd_kernel", "_cross_entropy_bwd_kernel"]


def test_numbers_of_rows_and_targets_choose_no_variant(as_on_cuda):
    from fastattn.kernels.cross_entropy import _cross_entropy_bwd_kernel, _cross_entropy_fwd_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for num_rows, ignore_index in ((1, -100), (2, 0), (15, 1), (16, 16), (17, -1), (64, 64), (1000, 999)):
            input, target = torch.zeros(num_rows, 1000, dtype=BF16), torch.zeros(num_rows, dtype=torch.int64)
            _, _, divisor, numbers = as_on_cuda._cross_entropy_fwd(input, target, None, ignore_index, "mean", 0.0, 0.0, 0.0, BF16, False)
            as_on_cuda._cross_entropy_bwd(divisor, None, divisor, input, target, None, numbers, ignore_index, 0.0, 0.0, 0.0)
        assert compiled_variants(_cross_entropy_fwd_kernel) == 1
        assert compiled_variants(_cross_entropy_bwd_kernel) == 1


def test_logits_of_all_positions_but_the_last_are_not_copied(as_on_cuda, monkeypatch):
    from fastattn.kernels import cross_entropy as kernels

    seen = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, device, **args: seen.append(args))
    logits, target = torch.zeros(3, 7, 1000, dtype=BF16), torch.zeros(3, 6, dtype=torch.int64)
    fastattn.cross_entropy(logits[:, :-1].transpose(1, 2), target)
    assert seen[0]["x_ptr"].data_ptr() == logits.data_ptr() and seen[0]["ACCESS"] == "vector"
    assert math.prod(seen[0]["x_ptr"].shape) == 3 * 6 * 1000


# --------------------------------------------------------------------------------------------------------------------
# Found in review.


@pytest.mark.both
@pytest.mark.parametrize("num_cols", [5, 3000])
def test_the_lse_of_nan_is_nan(num_cols):
    x = torch.randn(3, num_cols)
    x[0] = float("nan")
    x[1] = float("-inf")
    x[1, 0] = float("nan")
    _, lse = fastattn.cross_entropy(x, torch.zeros(3, dtype=torch.int64), return_lse=True)
    assert lse[:2].isnan().all() and lse[2].isfinite()


@pytest.mark.parametrize("autocast", [False, True])
def test_probabilities_keep_their_digits(autocast):
    logits, target = torch.randn(4, 50000).bfloat16(), torch.full((4, 50000), 1 / 50000)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = fastattn.cross_entropy(logits, target)
    expected = torch.nn.functional.cross_entropy(logits.double(), target.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
