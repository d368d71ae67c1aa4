"""Gated linear units: the kernels in the interpreter and the CPU path against float64, torch's contract, the operator, the launch path."""

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
from fastattn import reference
from fastattn.ops.dispatch import INTERPRET

INF, NAN = float("inf"), float("nan")

# By name: the op, its oracle, and what it is in torch.
OPS = {
    "swiglu": (fastattn.swiglu, reference.swiglu, lambda gate, up: F.silu(gate) * up),
    "geglu_tanh": (fastattn.geglu, reference.geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    "geglu_none": (
        lambda gate, up=None: fastattn.geglu(gate, up, "none"),
        lambda gate, up=None: reference.geglu(gate, up, "none"),
        lambda gate, up: F.gelu(gate) * up,
    ),
}
EACH = pytest.mark.parametrize("name", OPS)
ACTIVATIONS = {"swiglu": "silu", "geglu_tanh": "gelu_tanh", "geglu_none": "gelu"}


def check(name, tensors, douts=None):
    op, oracle, _ = OPS[name]
    return check_op(f"{name} {tuple(tensors['gate'].shape)}", op, oracle, tensors, douts)


def separate(*shape, dtype=F32, scale=2.0):
    return {"gate": (torch.randn(shape) * scale).to(dtype), "up": torch.randn(shape).to(dtype)}


def packed(*shape, dtype=F32, scale=2.0):
    return {"gate": torch.cat(list(separate(*shape, dtype=dtype, scale=scale).values()), -1)}


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.

# Each bucket at its top and ragged, more rows than a program takes, several blocks, edges shorter than a vector.
SHAPES = [(3, 1), (40, 7), (17, 128), (5, 100), (9, 500), (2, 3, 769), (2, 2048), (2, 4099)]


@pytest.mark.both
@EACH
@DTYPES
def test_values(name, dtype):
    for shape in SHAPES if name == "swiglu" else SHAPES[2:6]:
        check(name, separate(*shape, dtype=dtype))
        check(name, packed(*shape, dtype=dtype))


@pytest.mark.both
@pytest.mark.more
@pytest.mark.parametrize("num_cols", [65536, 131071, 300000])
def test_very_long_rows(num_cols):
    check("swiglu", separate(2, num_cols, dtype=BF16))
    check("swiglu", packed(2, num_cols, dtype=F16))


@pytest.mark.both
@pytest.mark.parametrize("shape", [(0,), (0, 6), (6, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("make", [separate, packed])
def test_empty(shape, make):
    tensors = {key: t.requires_grad_() for key, t in make(*shape).items()}
    out = fastattn.swiglu(**tensors)
    out.sum().backward()
    assert out.shape == shape and all(t.grad.shape == t.shape for t in tensors.values())


@pytest.mark.both
@EACH
def test_any_rank(name):
    for shape in ((), (5,), (2, 3, 4, 5)):
        check(name, separate(*shape))
    for shape in ((5,), (2, 3, 4, 5)):
        check(name, packed(*shape))


@pytest.mark.both
def test_packed_is_separate_bit_for_bit():
    for num_cols in (8, 100, 1003, 2500):
        x = packed(5, num_cols, dtype=BF16)["gate"]
        dout = torch.randn(5, num_cols).to(BF16)
        results = []
        for leaves in ([x.clone().requires_grad_()], [t.contiguous().requires_grad_() for t in x.chunk(2, -1)]):
            out = fastattn.geglu(*leaves)
            results.append((out, torch.cat(torch.autograd.grad(out, leaves, dout), -1)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.both
def test_the_packed_form_has_one_gradient():
    x = packed(4, 64)["gate"].requires_grad_()
    fastattn.swiglu(x).sum().backward()
    assert x.grad.shape == (4, 128) and x.grad.is_contiguous()


@pytest.mark.both
@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("num_cols", [64, 77])
def test_any_input_layout(layout, num_cols):
    gate, up = separate(3, 4, num_cols, dtype=BF16).values()
    check("swiglu", {"gate": INPUT_LAYOUTS[layout](gate), "up": INPUT_LAYOUTS[layout](up)})
    check("swiglu", {"gate": INPUT_LAYOUTS[layout](gate), "up": up})
    check("swiglu", {"gate": INPUT_LAYOUTS[layout](torch.cat([gate, up], -1))})


@pytest.mark.both
def test_halves_of_a_projection_and_dims_in_any_order():
    projected = torch.randn(3, 5, 2 * 40).to(BF16)
    gate, up = projected.chunk(2, -1)
    check("swiglu", {"gate": gate, "up": up})
    check("swiglu", {"gate": gate.transpose(0, 1), "up": up.transpose(0, 1)})
    many = torch.randn(2, 3, 4, 5, 2 * 8).permute(2, 0, 3, 1, 4)  # no two strides lead to its rows
    check("swiglu", {"gate": many})
    check("swiglu", {"gate": many[..., :8], "up": many[..., 8:]})


@pytest.mark.both
@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
@pytest.mark.parametrize("make", [separate, packed])
def test_any_upstream_layout(layout, make):
    tensors = make(3, 5, 40)
    check("swiglu", tensors, upstream(fastattn.swiglu, tensors, UPSTREAM_LAYOUTS[layout]))


@pytest.mark.both
@EACH
def test_pure(name):
    check_pure(OPS[name][0], separate(3, 100))
    check_pure(OPS[name][0], packed(3, 100))


@pytest.mark.both
def test_gate_may_be_up():
    x = torch.randn(3, 40)
    op = lambda x: fastattn.swiglu(x, x)  # noqa: E731
    check_op("swiglu of x, x", op, lambda x: reference.swiglu(x, x), {"x": x})


@pytest.mark.both
def test_only_one_gradient_is_wanted():
    gate, up = separate(3, 40).values()
    up.requires_grad_()
    fastattn.swiglu(gate, up).sum().backward()
    torch.testing.assert_close(up.grad, F.silu(gate))


# --------------------------------------------------------------------------------------------------------------------
# Extremes.

LARGE = [0.0, -0.0, 1e-30, 1.0, 5.0, 9.0, 20.0, 88.0, 100.0, 1e4, 65504.0, 1e38]


@pytest.mark.both
@EACH
@DTYPES
def test_far_gates_give_exactly_zero_or_up(name, dtype):
    op, _, torch_op = OPS[name]
    far = torch.tensor([g for g in LARGE if g >= 150 or name != "swiglu" and g >= 20]).clamp(max=torch.finfo(dtype).max).to(dtype)
    up = torch.full_like(far, 0.5)
    assert torch.equal(op(far, up), far * up)
    assert torch.equal(op(-far, up), torch.zeros_like(far)) or name == "swiglu" and dtype == F32
    for gate, slope in ((far, 1.0), (-far, 0.0)):
        leaf = gate.clone().requires_grad_()
        (dgate,) = torch.autograd.grad(op(leaf, up).sum(), leaf)
        assert torch.equal(dgate, torch.full_like(gate, slope * 0.5)), (gate, dgate)


@pytest.mark.both
@EACH
@DTYPES
def test_infinities_and_nans_are_torch_s(name, dtype):
    op, oracle, torch_op = OPS[name]
    values = torch.tensor([*LARGE, INF, NAN]).to(dtype)
    values = torch.cat([values, -values])
    gate, up = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    # torch's own gelu of inf is NaN on the CPU where it is vectorised, so the kernels are held to the formula.
    expected = (oracle if INTERPRET else torch_op)(gate.float(), up.float()).to(dtype)
    # A tail that has vanished in fp32 in one of them, times inf or 1e38, is no difference of rules.
    same = ~((gate < -5) & (gate > -200) & (up.float().abs() > 1e30))
    got = op(gate, up)
    assert torch.equal(got[same].isnan(), expected[same].isnan())
    assert torch.equal(got[same].isinf(), expected[same].isinf())


@pytest.mark.both
def test_tails_keep_their_digits_under_a_large_up():
    """exp(−87) is next to nothing and 1e38 times it is not."""
    gate = torch.tensor([-80.0, -85.0, -87.0])
    check("swiglu", {"gate": gate, "up": torch.full_like(gate, 1e38)})


@pytest.mark.interpret
def test_the_normal_tail_is_relatively_accurate():
    """Where torch's 1 + erf(x/√2) has cancelled, the kernel's fit is still within half a percent."""
    gate = -torch.linspace(0.0, 12.0, 400)
    got = fastattn.geglu(gate, torch.ones_like(gate), "none").double()
    exact = gate.double() * 0.5 * torch.special.erfc(-gate.double() / math.sqrt(2))
    assert ((got - exact).abs() <= 5e-3 * exact.abs()).all()


@pytest.mark.interpret
@EACH
def test_the_gradient_of_a_far_gate_is_finite(name):
    gate = torch.tensor([1e20, 1e38, -1e20, -1e38], requires_grad=True)
    (dgate,) = torch.autograd.grad(OPS[name][0](gate, torch.ones(4)).sum(), gate)
    assert torch.equal(dgate, torch.tensor([1.0, 1.0, 0.0, 0.0]))


# --------------------------------------------------------------------------------------------------------------------
# Properties.


@pytest.mark.both
@EACH
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
def test_every_gate_there_is(name, dtype):
    """Each number of a 16-bit dtype up to 20: rounded once, from something as good as torch's fp32."""
    op, oracle, torch_op = OPS[name]
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[gate.float().abs() <= 20]
    up = torch.full_like(gate, 0.7)

    def rounded_once(gate, up):
        return torch_op(gate.float(), up.float()).to(gate.dtype) if gate.dtype == dtype else oracle(gate, up)

    check_op(name, op, oracle, {"gate": gate, "up": up}, [torch.ones_like(gate)], naive=rounded_once)


@pytest.mark.interpret
@pytest.mark.parametrize("make, shape", [(separate, (3, 1003)), (separate, (40, 60)), (packed, (40, 60)), (packed, (5, 2100))])
def test_program_order_does_not_matter(make, shape):
    from fastattn.testing.checker import assert_order_independent

    tensors = make(*shape)
    dout = torch.randn(shape)

    def both():
        leaves = {key: t.clone().requires_grad_() for key, t in tensors.items()}
        out = fastattn.swiglu(**leaves)
        return out, *torch.autograd.grad(out, list(leaves.values()), dout)

    assert_order_independent(both)


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile_of_the_table():
    from fastattn.kernels.glu import glu_bwd, glu_fwd
    from fastattn.kernels.row_tiles import LONG, ROW_TILES
    from fastattn.testing.budget import check_budget

    for (kernel, _, bucket), config in ROW_TILES.items():
        if not kernel.startswith("glu"):
            continue
        num_cols = 5001 if bucket == LONG else bucket - 3
        x, dout = torch.randn(33, 2 * num_cols), torch.randn(33, num_cols)
        for activation, (_, oracle, _) in zip(ACTIVATIONS.values(), OPS.values(), strict=True):
            results = []
            for dtype in (F32, torch.float64):
                leaf = x.to(dtype).requires_grad_()
                out = oracle(leaf)
                results.append((out.detach(), *torch.autograd.grad(out, leaf, dout.to(dtype))))
            got = glu_fwd(x, None, activation, config) if kernel == "glu_fwd" else glu_bwd(dout, x, None, activation, config)[0]
            naive, ref64 = (result[kernel == "glu_bwd"] for result in results)
            check_budget(f"{kernel} {bucket} {activation}", got, naive, ref64)


# --------------------------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([1.0],), TypeError, r"swiglu: gate must be a torch.Tensor, got list"),
        ((torch.zeros(4, dtype=torch.float64),), TypeError, r"swiglu: gate must be float16, .* got torch.float64"),
        ((torch.zeros(2, 3),), ValueError, r"swiglu: gate must have an even last dim to hold \[gate; up\] without up, got \(2, 3\)"),
        ((torch.zeros(()),), ValueError, r"swiglu: gate must have an even last dim .* got \(\)"),
        ((torch.zeros(2), 1.0), TypeError, r"swiglu: up must be a torch.Tensor, got float"),
        ((torch.zeros(2), torch.zeros(2).half()), TypeError, r"swiglu: up must have gate's dtype torch.float32, got torch.float16"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), ValueError, r"swiglu: up must be on gate's device cpu, got meta"),
        ((torch.zeros(2, 3), torch.zeros(3)), ValueError, r"swiglu: up must have gate's shape \(2, 3\), got \(3,\)"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        fastattn.swiglu(*args)
    with pytest.raises(error, match=message.replace("swiglu", "geglu")):
        fastattn.geglu(*args)


def test_unknown_approximation():
    with pytest.raises(ValueError, match=r"""geglu: approximate must be "tanh" or "none", got 'erf'"""):
        fastattn.geglu(torch.zeros(2), approximate="erf")


# --------------------------------------------------------------------------------------------------------------------
# The operator.


@pytest.mark.both
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
def test_operator(activation):
    gate, up = torch.randn(2, 5, 33).to(BF16)
    x, dout = torch.randn(5, 66).to(BF16), torch.randn(5, 33).to(BF16)
    check_operator(torch.ops.fastattn.glu_fwd, gate, up, activation)
    check_operator(torch.ops.fastattn.glu_fwd, x, None, activation)
    check_operator(torch.ops.fastattn.glu_fwd, gate.t(), up.t(), activation)
    check_operator(torch.ops.fastattn.glu_bwd, dout, gate, up, activation)


@pytest.mark.both
def test_operator_s_packed_backward():
    x, dout = torch.randn(5, 66), torch.randn(5, 33)
    check_operator(torch.ops.fastattn.glu_bwd, dout, x, None, "silu")
    check_operator(torch.ops.fastattn.glu_bwd, dout, torch.randn(66, 5).t(), None, "silu")


@pytest.mark.both
@EACH
def test_transforms(name):
    op = OPS[name][0]
    public = name.partition("_")[0]
    check_transforms(public, op, separate(3, 20))
    check_transforms(public, op, packed(3, 20))


@EACH
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(name, dynamic):
    check_compiled(OPS[name][0], separate(4, 100), dynamic)
    check_compiled(OPS[name][0], packed(4, 100), dynamic)


def test_compiled_halves_and_a_shared_tensor():
    check_compiled(lambda x: fastattn.swiglu(*x.chunk(2, -1)), {"x": torch.randn(4, 100)})
    check_compiled(lambda x: fastattn.swiglu(x, x), {"x": torch.randn(4, 100)})


@pytest.mark.interpret
def test_compiled_is_eager_on_the_kernels():
    check_compiled(fastattn.swiglu, separate(4, 100), backend="aot_eager")
    check_compiled(fastattn.geglu, packed(4, 100), backend="aot_eager")


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "glu")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_compiles_and_never_syncs(as_on_cuda, capability):
    x, dout = torch.zeros(3, 4, 2000, dtype=BF16)[:, :3], torch.zeros(3, 3, 1000, dtype=BF16)

    def call():
        for gate, up in ((x, None), (x[..., :1000].contiguous(), x[..., 1000:])):
            as_on_cuda._glu_fwd(gate, up, "silu")
            as_on_cuda._glu_bwd(dout, gate, up, "silu")

    assert [launch.name for launch in launched_on(capability, call)] == ["_glu_fwd_kernel", "_glu_bwd_kernel"] * 2


def test_row_counts_choose_no_variant(as_on_cuda):
    from fastattn.kernels.glu import _glu_fwd_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for num_rows in (1, 2, 15, 16, 17, 64, 1000):
            as_on_cuda._glu_fwd(torch.zeros(num_rows, 2000, dtype=BF16), None, "silu")
            as_on_cuda._glu_fwd(torch.zeros(num_rows, 3200, dtype=BF16), None, "silu")
        assert compiled_variants(_glu_fwd_kernel) == 1


def test_contiguous_tensors_are_one_row(as_on_cuda):
    """Whatever their shapes: short and odd rows read 128 bits as long ones do."""

    def call():
        as_on_cuda._glu_fwd(torch.zeros(8, 100, 3, dtype=BF16), torch.zeros(8, 100, 3, dtype=BF16), "silu")

    (launch,) = launched_on((9, 0), call)
    assert (launch.args["num_rows"], launch.args["num_cols"], launch.args["ACCESS"]) == (1, 2400, "vector")
    assert launch.grid == (2, 1, 1)


def test_more_than_2_31_elements_stay_64_bits(as_on_cuda):
    """One row of so many: lengths and offsets are int64 from the block's number on."""
    from fastattn.kernels.glu import _glu_fwd_kernel
    from fastattn.kernels.row_tiles import LONG, pick_row_config

    x = torch.zeros(8, dtype=BF16)
    sizes = dict(num_rows=1, inner=1, num_cols=LONG + 8, num_blocks=(LONG + 8) // 2048 + 1)
    strides = {f"stride_{name}{dim}": LONG + 8 for name in ("gate", "up", "out") for dim in "oi"}
    options = dict(ACTIVATION="silu", ACCESS="vector", **pick_row_config("glu_fwd", LONG, 2).meta())

    def call():
        _glu_fwd_kernel[(1,)](gate_ptr=x, up_ptr=x, out_ptr=x, **sizes, **strides, **options, enable_fp_fusion=True)

    (launch,) = launched_on((9, 0), call)
    assert launch.compiled.src.signature["num_cols"] == "i64"
