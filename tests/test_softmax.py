"""Softmax: the kernels in the interpreter and the CPU path against float64, torch's contract, the operator, the launch path."""

from __future__ import annotations

import warnings

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
from fastattn.reference import softmax as reference

INF, NAN = float("inf"), float("nan")


def along(dim=-1, **options):
    """(op, oracle) along a dim, as functions of x."""
    return lambda x: fastattn.softmax(x, dim, **options), lambda x: reference(x, dim, **options)


def check(x, dim=-1, douts=None):
    op, oracle = along(dim)
    return check_op(f"softmax {tuple(x.shape)} dim={dim}", op, oracle, {"x": x}, douts)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.

# One row of each bucket, at its top and ragged; more rows than a program takes; edges shorter than a vector.
SHAPES = [(3, 1), (70, 7), (5, 64), (33, 100), (7, 256), (3, 500), (2, 3, 769), (2, 2048), (2, 4099), (1, 8192), (2, 16391), (1, 40000), (2, 40001)]


@pytest.mark.both
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype):
    check(torch.randn(shape).to(dtype))


@pytest.mark.both
@pytest.mark.more
@pytest.mark.parametrize("num_cols", [32768, 65536, 131071, 300000])
def test_very_long_rows(num_cols):
    check(torch.randn(2, num_cols).to(BF16))


@pytest.mark.both
@pytest.mark.parametrize("shape, dim", [((2, 33, 5), 1), ((40, 130), 0), ((3, 17, 2, 8), 1), ((300, 3), -2), ((1, 1, 1), 0)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_any_dim(shape, dim, dtype):
    check(torch.randn(shape).to(dtype), dim)


@pytest.mark.both
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
def test_empty(shape, dim):
    x = torch.randn(shape, requires_grad=True)
    y = fastattn.softmax(x, dim)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape


@pytest.mark.both
def test_a_scalar_has_one_entry():
    x = torch.randn((), requires_grad=True)
    y = fastattn.softmax(x, 0)
    y.backward()
    assert y.shape == () and y.item() == 1.0 and x.grad.item() == 0.0


@pytest.mark.both
@pytest.mark.parametrize("num_cols", [1000, 1003, 40001])
def test_constant_rows_and_common_offsets(num_cols):
    check(torch.full((2, num_cols), 3.0))
    x = torch.randn(2, num_cols)
    for offset in (1e4, -1e4):
        check(x + offset)
    shifted = fastattn.softmax((x * 256).round() / 256 + 1024.0, -1)  # exact sums: the very same differences
    torch.testing.assert_close(shifted, fastattn.softmax((x * 256).round() / 256, -1), rtol=1e-6, atol=0)


@pytest.mark.both
@pytest.mark.parametrize("num_cols", [9, 1001, 40000])
@pytest.mark.parametrize("dim", [-1, 0])
def test_infinities_are_torch_s(num_cols, dim):
    x = torch.randn(num_cols, 6)
    x[:, 0] = -INF
    x[: num_cols // 2, 1] = -INF
    x[3, 2], x[num_cols - 1, 3], x[5, 4] = INF, NAN, -INF
    x = x if dim == 0 else x.t().contiguous()
    got, expected = fastattn.softmax(x, dim), torch.softmax(x, dim)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
@pytest.mark.parametrize("num_cols", [64, 77])
def test_any_input_layout(name, num_cols):
    check(INPUT_LAYOUTS[name](torch.randn(3, 4, num_cols).to(BF16)))


@pytest.mark.both
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
@pytest.mark.parametrize("dim", [-1, 1])
def test_any_upstream_layout(name, dim):
    op, _ = along(dim)
    x = torch.randn(3, 5, 40)
    check(x, dim, upstream(op, {"x": x}, UPSTREAM_LAYOUTS[name]))


@pytest.mark.both
def test_pure():
    check_pure(along()[0], {"x": torch.randn(3, 100)})


@pytest.mark.both
@pytest.mark.parametrize("x_dtype", [BF16, F16])
@pytest.mark.parametrize("dim", [-1, 0])
def test_half_in_float_out_is_rounded_nowhere(x_dtype, dim):
    x = torch.randn(30, 70).to(x_dtype)
    op, oracle = along(dim, dtype=F32)
    result = check_op("softmax dtype", op, lambda x: oracle(x) if x.dtype != torch.float64 else reference(x, dim), {"x": x})
    assert result["out0"].dtype == F32 and result["dx"].dtype == x_dtype


@pytest.mark.both
def test_integers_and_narrowing_are_cast_first():
    assert torch.equal(fastattn.softmax(torch.arange(6), 0, torch.float32), fastattn.softmax(torch.arange(6.0), 0))
    x = torch.randn(4, 50)
    assert torch.equal(fastattn.softmax(x, -1, torch.bfloat16), fastattn.softmax(x.bfloat16(), -1))


@pytest.mark.both
def test_autocast_is_torch_s():
    x = torch.randn(4, 50).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # on CUDA it means float32: tests/test_rows_gpu.py
        assert fastattn.softmax(x, -1).dtype == torch.softmax(x, -1).dtype


@pytest.mark.interpret
@pytest.mark.parametrize("num_cols", [60, 1003, 40001])
def test_program_order_does_not_matter(num_cols):
    from fastattn.testing.checker import assert_order_independent

    x, dy = torch.randn(2, 5, num_cols)

    def both():
        leaf = x.clone().requires_grad_()
        y = fastattn.softmax(leaf, -1)
        return y, torch.autograd.grad(y, leaf, dy)[0]

    assert_order_independent(both)


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile_of_the_table():
    from fastattn.kernels.row_tiles import LONG, ROW_TILES
    from fastattn.kernels.softmax import softmax_bwd, softmax_fwd
    from fastattn.testing.budget import check_budget

    for (kernel, _, bucket), config in ROW_TILES.items():
        if not kernel.startswith("softmax"):
            continue
        num_cols = 9001 if bucket == LONG else max(1, bucket - 3)
        x, dy = torch.randn(2, 2, num_cols)
        y64, y32 = (reference(x.to(dtype)) for dtype in (torch.float64, F32))
        if kernel == "softmax_fwd":
            check_budget(f"{kernel} {bucket}", softmax_fwd(x, 1, F32, config), y32, y64)
        else:
            dx64, dx32 = (y * (d - (y * d).sum(-1, keepdim=True)) for y, d in ((y64, dy.double()), (y32, dy)))
            check_budget(f"{kernel} {bucket}", softmax_bwd(dy, y32, 1, F32, config), dx32, dx64)


# --------------------------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([1.0],), TypeError, r"softmax: x must be a torch.Tensor, got list"),
        ((torch.arange(3),), TypeError, r"softmax: x must be float16, bfloat16 or float32, got torch.int64"),
        ((torch.zeros(3, dtype=torch.float64),), TypeError, r"softmax: x must be float16, .* got torch.float64"),
        ((torch.zeros(3), -1, torch.int32), TypeError, r"softmax: x must be float16, .* got torch.int32"),
        ((torch.zeros(3, 4), 2), IndexError, r"softmax: dim must lie in \[-2, 1\], got 2"),
        ((torch.zeros(()), 1), IndexError, r"softmax: dim must lie in \[-1, 0\], got 1"),
        ((torch.zeros(3), 0.5), TypeError, r"softmax: dim must be an int, got float"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        fastattn.softmax(*args)


# --------------------------------------------------------------------------------------------------------------------
# The operator.


@pytest.mark.both
@pytest.mark.parametrize("dim", [1, 0])
def test_operator(dim):
    x = torch.randn(5, 33).to(BF16)
    check_operator(torch.ops.fastattn.softmax_fwd, x, dim, F32)
    check_operator(torch.ops.fastattn.softmax_bwd, torch.randn(5, 33), torch.rand(5, 33), dim, BF16)
    check_operator(torch.ops.fastattn.softmax_fwd, x.t(), dim, BF16)


@pytest.mark.both
def test_transforms():
    check_transforms("softmax", along()[0], {"x": torch.randn(3, 20)})


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "grad(vmap)"])
def test_a_transform_within_a_compiled_function_is_refused_or_right(transform):
    """Dynamo would differentiate the forward, which has no derivative of its own. Where it may break the graph, eager has the answer."""
    f, x = lambda x: fastattn.softmax(x, -1).square().sum(), torch.randn(2, 3, 20)
    of = {
        "grad": torch.func.grad, "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(f)),
        "grad(vmap)": lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum()),
    }[transform]  # fmt: skip
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="torch.func transforms are not supported within torch.compile"):
        torch.compile(of(f), fullgraph=True, backend="eager")(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(torch.compile(of(f), backend="aot_eager")(x), of(f)(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    check_compiled(along()[0], {"x": torch.randn(4, 100)}, dynamic)


@pytest.mark.interpret
def test_compiled_is_eager_on_the_kernels():
    check_compiled(along()[0], {"x": torch.randn(4, 100)}, backend="aot_eager")


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "softmax")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_compiles_and_never_syncs(as_on_cuda, capability):
    x = torch.zeros(3, 4, 1000, dtype=BF16)[:, :3]

    def call():
        y = as_on_cuda._softmax_fwd(x, 2, BF16)
        as_on_cuda._softmax_bwd(x, y, 2, BF16)

    assert [launch.name for launch in launched_on(capability, call)] == ["_softmax_fwd_kernel", "_softmax_bwd_kernel"]


def test_row_counts_choose_no_variant(as_on_cuda):
    from fastattn.kernels.softmax import _softmax_fwd_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for num_rows in (1, 2, 15, 16, 17, 64, 1000):
            as_on_cuda._softmax_fwd(torch.zeros(num_rows, 1000, dtype=BF16), 1, BF16)
        assert compiled_variants(_softmax_fwd_kernel) == 1
