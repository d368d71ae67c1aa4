"""Linear cross-entropy: chunks of logits over the kernels and over the CPU path against float64, memory, the operators, the launch path."""

from __future__ import annotations

import itertools
import subprocess
import sys

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
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.reference import linear_cross_entropy as reference

NAN = float("nan")


def draw(num_tokens=11, hidden=16, num_classes=40, bias=False, dtype=F32, ignored=0.2, ignore_index=-100):
    """(tensors, target): logits of the order of 1."""
    tensors = {"input": torch.randn(num_tokens, hidden), "linear_weight": torch.randn(num_classes, hidden) / hidden**0.5}
    if bias:
        tensors["linear_bias"] = torch.randn(num_classes)
    target = torch.randint(num_classes, (num_tokens,))
    target[torch.rand(num_tokens) < ignored] = ignore_index
    target[0] = num_classes - 1
    return {name: t.to(dtype) for name, t in tensors.items()}, target


def everything(num_classes, **options):
    return dict(weight=torch.rand(num_classes) + 0.1, label_smoothing=0.1, z_loss=0.01, softcap=3.0) | options


def of(target, chunk_size=None, **options):
    """(op, oracle) as functions of input, linear_weight and linear_bias."""
    return (
        lambda input, linear_weight, linear_bias=None: fastattn.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, chunk_size=chunk_size, **options
        ),
        lambda input, linear_weight, linear_bias=None: reference(
            input, linear_weight, target, linear_bias=linear_bias, **options
        ),
    )


def check(tensors, target, douts=None, **options):
    op, oracle = of(target, **options)
    return check_op(f"linear_cross_entropy {options}", op, oracle, tensors, douts)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.


@pytest.mark.both
@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 33), (20, 64, 300), (300, 16, 77), (3, 8, 5003)], ids=str)
def test_values(shape, reduction, dtype):
    tensors, target = draw(*shape, dtype=dtype)
    check(tensors, target, reduction=reduction)


@pytest.mark.both
@DTYPES
@pytest.mark.parametrize("return_lse", [False, True], ids=["loss", "loss and lse"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_all_options(bias, return_lse, dtype):
    tensors, target = draw(20, 24, 100, bias, dtype)
    for reduction in ("mean", "sum", "none"):
        results = check(tensors, target, reduction=reduction, chunk_size=8, **everything(100, return_lse=return_lse))
        assert results["out0"].dtype == dtype
        assert {f"d{name}" for name in tensors} <= results.keys()


@pytest.mark.both
@pytest.mark.parametrize("chunk_size", [1, 3, 10, 11, 1000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_chunk_size(chunk_size, reduction):
    tensors, target = draw(11, bias=True, dtype=BF16, ignore_index=2)
    check(tensors, target, chunk_size=chunk_size, reduction=reduction, ignore_index=2, label_smoothing=0.1)


@pytest.mark.both
def test_many_chunks_add_up_in_float32():
    """A bfloat16 weight gradient summed over 24 chunks: as bfloat16 it would stand still."""
    tensors, target = draw(24, 8, 10, dtype=BF16, ignored=0.0)
    tensors["input"] = tensors["input"].abs()
    target[:] = 3
    results, whole = (check(tensors, target, [torch.ones(())], chunk_size=size, reduction="sum") for size in (1, 24))
    torch.testing.assert_close(results["dlinear_weight"], whole["dlinear_weight"])


@pytest.mark.both
def test_products_are_cross_entropy_of_a_linear_layer():
    """Of whole numbers, where nothing is rounded before the softmax: the very same numbers."""
    input, weight = torch.randint(-4, 5, (9, 6)).float(), torch.randint(-4, 5, (30, 6)).float()
    target = torch.randint(30, (9,))
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}):
        got = fastattn.linear_cross_entropy(input, weight, target, chunk_size=4, **options)
        assert torch.equal(got, fastattn.cross_entropy(input @ weight.t(), target, **options))


@pytest.mark.both
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (2, 1, 3, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_shape(shape, reduction):
    tensors, target = {"input": torch.randn(shape), "linear_weight": torch.randn(7, 5)}, torch.randint(7, shape[:-1])
    results = check(tensors, target, reduction=reduction, return_lse=True)
    assert results["out0"].shape == (target.shape if reduction == "none" else ()) and results["out1"].shape == target.shape


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
def test_any_input_layout(name):
    tensors, _ = draw(12, 16, 40)
    tensors = {"input": tensors["input"].view(3, 4, 16), "linear_weight": tensors["linear_weight"]}
    target = torch.randint(40, (3, 4))
    check({key: INPUT_LAYOUTS[name](t) for key, t in tensors.items()}, target)


@pytest.mark.both
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
def test_any_upstream_layout(name):
    tensors, _ = draw(12, 16, 40)
    tensors["input"], target = tensors["input"].view(3, 4, 16), torch.randint(40, (3, 4))
    options = dict(reduction="none", return_lse=True, chunk_size=5)
    check(tensors, target, upstream(of(target, **options)[0], tensors, UPSTREAM_LAYOUTS[name]), **options)


@pytest.mark.both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_valid_target(num_tokens, reduction):
    tensors, _ = draw(3, bias=True)
    leaves = [t.requires_grad_() for t in tensors.values()]
    target = torch.full((num_tokens,), -100)
    loss = fastattn.linear_cross_entropy(leaves[0][:num_tokens], leaves[1], target, linear_bias=leaves[2], reduction=reduction)
    expected = F.cross_entropy(torch.zeros(num_tokens, 40), target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for grad in torch.autograd.grad(loss.sum(), leaves):
        assert (grad == 0).all()


@pytest.mark.both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_subset_of_gradients(reduction):
    tensors, target = draw(bias=True)
    op, oracle = of(target, reduction=reduction)
    whole = check(tensors, target, reduction=reduction)
    for wanted in itertools.product([False, True], repeat=3):
        leaves = {
            name: t.clone().requires_grad_(want) for (name, t), want in zip(tensors.items(), wanted, strict=True)
        }
        loss = op(**leaves)
        assert loss.requires_grad == any(wanted) and torch.equal(loss, whole["out0"])
        if any(wanted):
            loss.sum().backward()
        for (name, leaf), want in zip(leaves.items(), wanted, strict=True):
            assert (leaf.grad is not None) == want, name
            if want:
                torch.testing.assert_close(leaf.grad, torch.autograd.grad(oracle(**leaves).sum(), leaf)[0])


@pytest.mark.both
def test_without_gradients_there_is_one_matmul(monkeypatch):
    tensors, target = draw(32)
    tensors["linear_weight"].requires_grad_()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fastattn.linear_cross_entropy(*tensors.values(), target)
    assert counter.get_total_flops() == 2 * 32 * 16 * 40
    with FlopCounterMode(display=False) as counter:
        fastattn.linear_cross_entropy(*tensors.values(), target).backward()
    assert counter.get_total_flops() == 2 * 2 * 32 * 16 * 40  # the input wants no gradient
    with FlopCounterMode(display=False) as counter:
        fastattn.linear_cross_entropy(*tensors.values(), target, reduction="none").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 16 * 40  # the logits are made again


@pytest.mark.both
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_lse": True}], ids=str)
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(options):
    tensors, target = draw(bias=True)
    leaves = [t.requires_grad_() for t in tensors.values()]
    outs = of(target, **options)[0](*leaves)
    total = sum(out.sum() for out in (outs if isinstance(outs, tuple) else (outs,)))
    first = torch.autograd.grad(3.0 * total, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(3.0 * total, leaves, retain_graph=True)
    third = torch.autograd.grad(total, leaves)
    for one, copy, two, scaled in zip(first, kept, second, third, strict=True):
        assert torch.equal(one, copy) and torch.equal(one, two)
        torch.testing.assert_close(scaled * 3.0, one)


@pytest.mark.both
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_lse": True}], ids=["mean", "none with lse"])
def test_pure(options):
    tensors, target = draw(bias=True)
    check_pure(of(target, chunk_size=4, **options)[0], tensors)


@pytest.mark.both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_survive_a_loss_scale(reduction):
    """A mean's gradients are far below what float16 holds until the loss scale is on them."""
    tensors, target = draw(60, 16, 200, dtype=F16)
    for t in tensors.values():
        t.mul_(0.1)
    op, oracle = of(target, reduction=reduction)
    dloss = torch.tensor(1024.0) if reduction == "mean" else torch.full((60,), 20.0)
    results = check_op("loss scale", op, oracle, tensors, [dloss.to(F16)])
    assert (results["dlinear_weight"] != 0).float().mean() > 0.99


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=["mean", "none"])
def test_autocast_is_torch_s(options, dtype):
    tensors, target = draw(bias=True, dtype=dtype)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with torch.autocast("cpu", BF16):
        got = fastattn.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
        expected = F.cross_entropy(F.linear(*leaves), target, **options)
    assert got.dtype == expected.dtype == F32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(loss.sum(), leaves) for loss in (got, expected)), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 brought linear_cross_entropy")
@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_values_and_dtypes_are_torch_s(dtype):
    tensors, target = draw(9, bias=True, dtype=dtype)
    input, weight, bias = (t.requires_grad_() for t in tensors.values())
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1, "ignore_index": 3, "weight": torch.rand(40).to(dtype)}):
        got, expected = (f(input, weight, target.clamp(min=0), linear_bias=bias, **options) for f in (fastattn.linear_cross_entropy, F.linear_cross_entropy))
        tolerance = 1e-5 if dtype == F32 else 0.05
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(*(torch.autograd.grad(loss.sum(), (input, weight, bias)) for loss in (got, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.both
def test_the_default_chunk():
    from fastattn.ops.linear_cross_entropy import default_chunk

    assert [default_chunk(n) for n in (0, 1, 512, 2048, 2049, 8192, 10000, 1 << 20)] == [256, 256, 256, 256, 384, 1024, 1280, 4096]
    tensors, target = draw(600, 4, 9)  # three chunks
    check(tensors, target)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("dtype, logits", [("float32", 256), pytest.param("bfloat16", 128, marks=pytest.mark.more)])
def test_memory_is_under_a_quarter_of_a_linear_layer_and_cross_entropy(dtype, logits):
    """Peak memory beyond the inputs, forward and backward, each in its own process."""
    code = """
import sys, torch, torch.nn.functional as F, fastattn
def peak():  # of this program: getrusage's counts what the process was before it became this one
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def ours(x, w, t, **options):
    fastattn.linear_cross_entropy(x, w, t, **options).sum().backward()
def theirs(x, w, t):
    F.cross_entropy(F.linear(x, w), t).backward()
which, dtype = sys.argv[1], getattr(torch, sys.argv[2])
call = {"theirs": theirs, "ours": ours, "none": lambda *args: ours(*args, reduction="none")}[which]
x, w = torch.randn(4096, 16).to(dtype).requires_grad_(), torch.randn(16384, 16).to(dtype).requires_grad_()
t = torch.randint(16384, (4096,))
call(x[:8].detach().requires_grad_(), w[:8].detach().requires_grad_(), torch.zeros(8, dtype=torch.int64))
before = peak()
call(x, w, t)
print(peak() - before)
"""

    def used(which, dtype):
        command = [sys.executable, "-c", code, which, dtype]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    theirs = used("theirs", dtype)
    assert theirs > 1.9 * logits
    assert used("ours", dtype) < theirs / 4
    assert used("none", dtype) < theirs / 4


@pytest.mark.interpret
def test_program_order_does_not_matter():
    from fastattn.testing.checker import assert_order_independent

    tensors, target = draw(10, 8, 1003, bias=True)

    def both():
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        loss = of(target, chunk_size=4)[0](*leaves)
        return loss[None], *torch.autograd.grad(loss, leaves)

    assert_order_independent(both)


# --------------------------------------------------------------------------------------------------------------------
# Bad input.

X, W, T = torch.zeros(3, 5), torch.zeros(7, 5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        (([1.0], W, T), {}, TypeError, r"linear_cross_entropy: input must be a torch.Tensor, got list"),
        ((X, None, T), {}, TypeError, r"linear_cross_entropy: linear_weight must be a torch.Tensor, got NoneType"),
        ((X, W, [0]), {}, TypeError, r"linear_cross_entropy: target must be a torch.Tensor, got list"),
        ((X[0, 0], W, T[0]), {}, ValueError, r"linear_cross_entropy: input must have shape \(…, H\), got \(\)"),
        ((X.double(), W.double(), T), {}, TypeError, r"linear_cross_entropy: input must be float16, bfloat16 or float32, got torch.float64"),
        ((X, W.half(), T), {}, TypeError, r"linear_cross_entropy: linear_weight must have input's dtype torch.float32 .* got torch.float16"),
        ((X, W[:, :4], T), {}, ValueError, r"linear_cross_entropy: linear_weight must have shape \(C, H\) with input's H = 5, got \(7, 4\)"),
        ((X, W[0], T), {}, ValueError, r"linear_cross_entropy: linear_weight must have shape \(C, H\) with input's H = 5, got \(5,\)"),
        ((X, W[:0], T), {}, ValueError, r"linear_cross_entropy: input must have at least one class, got 0"),
        ((X, W, T[:2]), {}, ValueError, r"linear_cross_entropy: target must have shape \(…\) = \(3,\), got \(2,\)"),
        ((X, W, T.short()), {}, TypeError, r"linear_cross_entropy: target must be int64 or int32 class indices, got torch.int16"),
        ((X, W, torch.zeros(3, 7)), {}, NotImplementedError, r"linear_cross_entropy: target must hold class indices; for probabilities use"),
        ((X, W, T + 7), {}, IndexError, r"linear_cross_entropy: target must hold classes in \[0, 6\] or ignore_index = -100, got 7"),
        ((X, W, T), {"linear_bias": torch.zeros(5)}, ValueError, r"linear_cross_entropy: linear_bias must have shape \(C,\) = \(7,\), got \(5,\)"),
        ((X, W, T), {"linear_bias": torch.zeros(7).half()}, TypeError, r"linear_cross_entropy: linear_bias must have input's dtype"),
        ((X, W, T), {"weight": torch.ones(5)}, ValueError, r"linear_cross_entropy: weight must have shape \(C,\) = \(7,\), got \(5,\)"),
        ((X, W, T), {"reduction": "avg"}, ValueError, r"linear_cross_entropy: reduction must be one of none, mean, sum, got 'avg'"),
        ((X, W, T), {"label_smoothing": 2.0}, ValueError, r"linear_cross_entropy: label_smoothing must lie in \[0, 1\], got 2.0"),
        ((X, W, T), {"softcap": NAN}, ValueError, r"linear_cross_entropy: softcap must be finite and not negative, got nan"),
        ((X, W, T), {"chunk_size": 0}, ValueError, r"linear_cross_entropy: chunk_size must be positive, got 0"),
        ((X, W, T), {"chunk_size": 1.5}, TypeError, r"linear_cross_entropy: chunk_size must be an int or None, got float"),
    ],
)
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        fastattn.linear_cross_entropy(*args, **options)


# --------------------------------------------------------------------------------------------------------------------
# The operators.


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_operators(dtype):
    tensors, target = draw(6, 8, 20, bias=True, dtype=dtype)
    input, weight, bias = tensors.values()
    forward, scale, backward = (getattr(torch.ops.fastattn, f"linear_cross_entropy_{name}") for name in ("fwd", "scale", "bwd"))
    for reduction, wanted, b in (("mean", [True] * 3, bias), ("sum", [False, True, False], None), ("none", [False] * 3, bias)):
        check_operator(forward, input, weight, b, target, torch.rand(20), -100, reduction, 0.1, 0.1, 2.0, F32, True, 4, wanted)
    _, lse, divisor, numbers, *grads = forward(input, weight, bias, target, None, -100, "mean", 0.0, 0.0, 0.0, dtype, True, None, [True] * 3)
    for grad in grads:
        check_operator(scale, torch.tensor(2.0), divisor, grad, dtype)
        check_operator(scale, torch.tensor(2.0).to(dtype), None, grad, F32)
    for dloss, wanted in ((torch.randn(6), [True] * 3), (torch.tensor(2.0), [True, False, False])):
        check_operator(backward, dloss, lse, divisor, input, weight, bias, target, None, numbers, -100, 0.0, 0.0, 0.0, 4, wanted)


@pytest.mark.both
@pytest.mark.parametrize("options", [{}, {"reduction": "none", "return_lse": True}], ids=["mean", "none with lse"])
def test_transforms(options):
    tensors, target = draw(bias=True)
    check_transforms("linear_cross_entropy", of(target, **options)[0], tensors)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    tensors, target = draw(bias=True)
    op = lambda input, linear_weight, target: fastattn.linear_cross_entropy(input, linear_weight, target)  # noqa: E731
    check_compiled(op, {"input": tensors["input"], "linear_weight": tensors["linear_weight"], "target": target}, dynamic)
    check_compiled(of(target, chunk_size=4, **everything(40, reduction="none", return_lse=True))[0], tensors, dynamic)


@pytest.mark.interpret
def test_compiled_is_eager_on_the_kernels():
    tensors, target = draw(bias=True)
    check_compiled(of(target, chunk_size=4)[0], tensors, backend="aot_eager")


@pytest.mark.both
def test_functional_gradients():
    tensors, target = draw()
    grads = torch.func.grad(lambda x, w: fastattn.linear_cross_entropy(x, w, target), argnums=(0, 1))(*tensors.values())
    expected = torch.func.grad(lambda x, w: reference(x, w, target), argnums=(0, 1))(*tensors.values())
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.both
def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    tensors, target = draw()
    leaves = [t.requires_grad_() for t in tensors.values()]
    op = of(target)[0]
    expected = torch.autograd.grad(op(*leaves), leaves)
    for ours, theirs in zip(torch.autograd.grad(checkpoint(op, *leaves, use_reentrant=False), leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    from fastattn.ops import linear_cross_entropy

    runs_as_on_cuda(monkeypatch, "cross_entropy")
    return linear_cross_entropy


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_compiles_and_never_syncs(as_on_cuda, capability):
    tensors, target = draw(20, 8, 1003, bias=True, dtype=BF16)

    def call():
        inputs = *tensors.values(), target, None
        _, lse, divisor, numbers, dinput, *_ = as_on_cuda._linear_cross_entropy_fwd(
            *inputs, -100, "mean", 0.0, 0.0, 0.0, BF16, True, 10, [True] * 3
        )
        as_on_cuda._linear_cross_entropy_scale(divisor, divisor, dinput, BF16)
        as_on_cuda._linear_cross_entropy_bwd(divisor, lse, divisor, *inputs, numbers, -100, 0.0, 0.0, 0.0, 10, [True] * 3)

    launches = launched_on(capability, call)
    assert [launch.name for launch in launches] == [*["_cross_entropy_fwd_kernel", "_cross_entropy_bwd_kernel"] * 2, *["_cross_entropy_bwd_kernel"] * 2]


def test_logits_of_an_odd_vocabulary_lie_aligned(as_on_cuda, monkeypatch):
    from fastattn.kernels import cross_entropy as kernels

    seen = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, device, **args: seen.append(args))
    tensors, target = draw(20, 8, 1003, dtype=BF16)
    as_on_cuda._linear_cross_entropy_fwd(*tensors.values(), None, target, None, -100, "sum", 0.0, 0.0, 0.0, BF16, False, None, [True, True, False])
    for args in seen:
        assert args["ACCESS"] == "edges" and args["x_ptr"].stride() == (1008, 1) and args["x_ptr"].data_ptr() % 16 == 0
    assert seen[1]["dx_ptr"] is seen[1]["x_ptr"]  # the gradient takes the logits' place


# --------------------------------------------------------------------------------------------------------------------
# Found in review.


@pytest.mark.parametrize("size", [1e-6, 1 / 500, 1e5])
def test_class_weights_of_any_size_cost_no_digits_in_half_precision(size):
    """dlogits are rounded before the mean divides them: by then they must be of the order of 1."""
    hidden, head, target = torch.randn(64, 32).half(), (torch.randn(500, 32) / 6).half(), torch.randint(500, (64,))
    weight = size * (0.5 + torch.rand(500))
    truth = hidden.double().requires_grad_()
    torch.nn.functional.cross_entropy(truth @ head.double().t(), target, weight.double()).backward()
    hidden.requires_grad_()
    fastattn.linear_cross_entropy(hidden, head, target, weight=weight, chunk_size=16).backward()
    assert (hidden.grad.double() - truth.grad).norm() < 2e-3 * truth.grad.norm()


def test_weights_that_are_all_zero_give_what_torch_gives():
    hidden, head, target = torch.randn(8, 4, requires_grad=True), torch.randn(10, 4), torch.randint(10, (8,))
    loss = fastattn.linear_cross_entropy(hidden, head, target, weight=torch.zeros(10))
    loss.backward()
    assert loss.isnan() and hidden.grad.isnan().all()


def test_no_hidden_size():
    loss = fastattn.linear_cross_entropy(torch.zeros(3, 2, 0), torch.zeros(10, 0), torch.zeros(3, 2, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(10.0).log())
