"""The norms: the kernels in the interpreter and the CPU path against float64, whose order of roundings it is, dropout, the operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_contract import (
    BF16,
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
    outputs,
    runs_as_on_cuda,
    upstream,
)

import fastattn
from fastattn import reference
from fastattn.ops.attention import draw_seed
from fastattn.ops.dispatch import INTERPRET
from fastattn.ops.norm import dropout_keep

INF, NAN = float("inf"), float("nan")
NAMES = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
HAS_MEAN, ADDS = {n: "layer" in n for n in NAMES}, {n: n.startswith("add") for n in NAMES}


def make(name, shape, dtype=F32, *, weight_dtype=None, residual_dtype=None, normalized=1, x=None):
    """The tensors an op takes, by name."""
    tensors = {"x": torch.randn(shape).to(dtype) if x is None else x}
    if ADDS[name]:
        tensors["residual"] = torch.randn(shape).to(residual_dtype or dtype)
    tensors["weight"] = torch.randn(shape[-normalized:]).to(weight_dtype or dtype)
    if HAS_MEAN[name]:
        tensors["bias"] = torch.randn(shape[-normalized:]).to(weight_dtype or dtype)
    return tensors


def pair(name, normalized_shape, **options):
    """(op, oracle) as functions of named tensors."""
    op, oracle = getattr(fastattn, name), getattr(reference, name)
    return (
        lambda **tensors: op(**tensors, normalized_shape=normalized_shape, **options),
        lambda **tensors: oracle(**tensors, normalized_shape=normalized_shape, **options),
    )


def check(name, tensors, douts=None, normalized=1, **options):
    op, oracle = pair(name, tensors["x"].shape[-normalized:], **options)
    return check_op(f"{name} {tuple(tensors['x'].shape)}", op, oracle, tensors, douts)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.

# One row of each bucket, at its top and ragged; more rows than programs stay; edges shorter than a vector.
SHAPES = [(3, 1), (70, 8), (9, 100), (2, 3, 123), (7, 256), (3, 500), (3, 769), (3, 1000), (2, 2048), (1, 4096)]
VALUES = [(name, shape, (F32, BF16, F16)[(i + j) % 3]) for i, shape in enumerate(SHAPES) for j, name in enumerate(NAMES)]


@pytest.mark.both
@pytest.mark.parametrize("name, shape, dtype", VALUES, ids=lambda v: str(v).removeprefix("torch."))
def test_values(name, shape, dtype):
    check(name, make(name, shape, dtype))


@pytest.mark.both
@pytest.mark.parametrize("name, num_cols", [("layer_norm", 4104), ("add_rms_norm", 8208)])
def test_long_rows(name, num_cols):
    check(name, make(name, (2, num_cols)))


@pytest.mark.both
@pytest.mark.more
@pytest.mark.parametrize("name", ["add_layer_norm", "rms_norm"])
@pytest.mark.parametrize("num_rows, num_cols", [(3, 4097), (9, 8192), (2, 16384), (1, 32771), (2, 65536), (1, 300000)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_more_long_rows(name, num_rows, num_cols, dtype):
    check(name, make(name, (num_rows, num_cols), dtype))


@pytest.mark.both
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "dtype, weight_dtype, residual_dtype",
    [(BF16, F32, F32), (F16, BF16, F16), (F32, BF16, BF16), (BF16, F16, F16)],
    ids=str,
)
def test_mixed_dtypes(name, dtype, weight_dtype, residual_dtype):
    result = check(name, make(name, (4, 64), dtype, weight_dtype=weight_dtype, residual_dtype=residual_dtype))
    assert result["out0"].dtype == dtype == result["dx"].dtype and result["dweight"].dtype == weight_dtype
    if ADDS[name]:
        assert result["out1"].dtype == residual_dtype == result["dresidual"].dtype


def test_mixed_dtypes_are_torch_s():
    x, weight = torch.randn(4, 60).to(BF16), torch.randn(60)
    assert F.layer_norm(x, (60,), weight, weight).dtype == fastattn.layer_norm(x, 60, weight, weight).dtype
    for x_dtype in (F16, BF16, F32):
        for weight_dtype in (F16, BF16, F32):
            x, weight = torch.randn(4, 60).to(x_dtype), torch.randn(60).to(weight_dtype)
            assert F.rms_norm(x, (60,), weight).dtype == fastattn.rms_norm(x, 60, weight).dtype == x_dtype


@pytest.mark.both
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("without", [("weight", "bias"), ("bias",), ("weight",)], ids="+".join)
def test_parameters_are_optional(name, without):
    tensors = make(name, (3, 40))
    check(name, {key: t for key, t in tensors.items() if key not in without})


@pytest.mark.both
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_several_dims_are_normalised_together(name):
    check(name, make(name, (2, 3, 4, 5), normalized=2), normalized=2)
    tensors = make(name, (2, 3, 12))
    tensors["x"] = tensors["x"].transpose(0, 1)
    tensors = {key: t[:, 0, :].t() if t.dim() == 3 else t.unsqueeze(1)[:, 0] for key, t in tensors.items()}
    op, _ = pair(name, torch.Size((2,)))
    transposed = {key: t if t.dim() > 1 else t[:2] for key, t in tensors.items()}
    assert outputs(op(**{k: t[..., :2] for k, t in transposed.items()}))[0].shape == (12, 2)


@pytest.mark.both
@pytest.mark.parametrize("shape, normalized", [((0, 5), 1), ((5, 0), 1), ((0,), 1), ((2, 0, 3), 1), ((2, 0, 3), 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_empty(name, shape, normalized):
    tensors = {key: t.requires_grad_() for key, t in make(name, shape, normalized=normalized).items()}
    op, _ = pair(name, shape[-normalized:])
    sum(out.sum() for out in outputs(op(**tensors))).backward()
    for key, t in tensors.items():
        assert t.grad.shape == t.shape and not t.grad.any(), key


@pytest.mark.both
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("num_cols", [1, 123, 1000, 4104])
def test_rows_that_lose_digits(name, num_cols):
    """A common offset of 1e4, constant rows, rows that eps outweighs, an outlier in front."""
    rows = torch.randn(5, num_cols)
    rows[0] += 1e4
    rows[1] = -1e4 / 3
    rows[2] *= 1e-20
    rows[3, 0] = 1e6
    tensors = make(name, (5, num_cols), x=rows)
    if ADDS[name]:
        tensors["residual"] = rows.flip(0) * 0.5
    results = check(name, tensors)
    if name == "layer_norm":
        torch.testing.assert_close(results["out0"][1], tensors["bias"], rtol=0, atol=1e-6)


@pytest.mark.both
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("num_cols", [9, 1000, 9000])
def test_infinities_are_torch_s(name, num_cols):
    x = torch.randn(5, num_cols)
    x[0, 0], x[1, 3], x[2, num_cols - 1] = INF, -INF, NAN
    x[3, 1], x[3, 2] = INF, -INF
    got, expected = getattr(fastattn, name)(x, num_cols), getattr(F, name)(x, (num_cols,))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.both
@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("name, num_cols", [("layer_norm", 64), ("add_rms_norm", 77)])
def test_any_input_layout(layout, name, num_cols):
    tensors = make(name, (3, 4, num_cols), BF16)
    check(name, {key: INPUT_LAYOUTS[layout](t) if t.dim() == 3 else t for key, t in tensors.items()})


@pytest.mark.both
@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
@pytest.mark.parametrize("name, num_cols", [("add_layer_norm", 40), ("rms_norm", 77)])
def test_any_upstream_layout(layout, name, num_cols):
    tensors = make(name, (3, 5, num_cols))
    op, _ = pair(name, num_cols)
    check(name, tensors, upstream(op, tensors, UPSTREAM_LAYOUTS[layout]))


@pytest.mark.both
@pytest.mark.parametrize("head_dim", [64, 77])
def test_heads_of_a_packed_projection(head_dim):
    qkv = torch.randn(2, 5, 3, 4, head_dim).to(BF16)
    weight = torch.randn(head_dim).to(BF16)
    check("rms_norm", {"x": qkv[:, :, 1], "weight": weight})
    check("rms_norm", {"x": qkv.transpose(1, 3)[:, :, 1].transpose(1, 2), "weight": weight})


@pytest.mark.interpret
def test_heads_of_a_packed_projection_are_not_copied():
    from fastattn.kernels.rows import Rows

    q = torch.randn(2, 5, 3, 4, 64)[:, :, 1]
    rows = Rows(x=q, y=torch.empty(q.shape))
    assert rows.tensors["x"] is q and rows.access == "vector" and rows.num_rows == 40


@pytest.mark.both
@pytest.mark.parametrize("name", NAMES)
def test_pure(name):
    check_pure(pair(name, 48)[0], make(name, (3, 48)))


@pytest.mark.both
def test_x_as_its_own_residual():
    x, weight = torch.randn(4, 30), torch.randn(30)
    op, oracle = pair("add_rms_norm", 30)
    check_op(
        "add_rms_norm(x, x)",
        lambda x, weight: op(x=x, residual=x, weight=weight),
        lambda x, weight: oracle(x=x, residual=x, weight=weight),
        {"x": x, "weight": weight},
    )


@pytest.mark.both
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("learnt", [("x",), ("weight",), ("bias",), ("residual",), ("x", "bias")], ids="+".join)
def test_any_of_the_gradients_alone(name, learnt):
    tensors = make(name, (4, 32))
    if any(key not in tensors for key in learnt):
        return
    op, oracle = pair(name, 32)
    fixed = {key: t for key, t in tensors.items() if key not in learnt}
    chosen = {key: t for key, t in tensors.items() if key in learnt}
    results = check_op(
        f"{name} {learnt}",
        lambda **tensors: op(**fixed, **tensors),
        lambda **tensors: oracle(**{k: t.to(next(iter(tensors.values())).dtype) for k, t in fixed.items()}, **tensors),
        chosen,
    )
    assert {key for key in results if key.startswith("d")} == {f"d{key}" for key in learnt}


@pytest.mark.both
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_either_result_alone(name, used, dropout_p):
    op, oracle = with_mask(name, (4, 32), dropout_p)
    check_op(f"{name}[{used}]", lambda **t: op(**t)[used], lambda **t: oracle(**t)[used], make(name, (4, 32), BF16))


try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    pass
else:

    @pytest.mark.both
    @settings(max_examples=6 if INTERPRET else 60)
    @given(
        name=st.sampled_from(NAMES),
        rows=st.lists(st.integers(1, 4), min_size=0, max_size=2),
        num_cols=st.integers(1, 200),
        dtypes=st.tuples(*[st.sampled_from([F32, BF16, F16])] * 3),
        offset=st.sampled_from([0.0, 1.0, 0.5]),
        cast=st.booleans(),
        layout=st.sampled_from(["contiguous", "odd row stride", "last dim strided", "padded rows"]),
    )
    def test_any_shape_and_options(name, rows, num_cols, dtypes, offset, cast, layout):
        dtype, weight_dtype, residual_dtype = dtypes
        torch.manual_seed(num_cols)
        options = {} if HAS_MEAN[name] else dict(weight_offset=offset, cast_before_weight=cast)
        tensors = make(name, (*rows, num_cols), dtype, weight_dtype=weight_dtype, residual_dtype=residual_dtype)
        tensors["x"] = INPUT_LAYOUTS[layout](tensors["x"])
        check(name, tensors, **options)


# --------------------------------------------------------------------------------------------------------------------
# Whose order of roundings.


def llama(x, weight, eps):  # transformers' LlamaRMSNorm.forward
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def gemma(x, weight, eps):  # transformers' GemmaRMSNorm.forward
    output = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (output * (1.0 + weight.float())).type_as(x)


def torch_s(x, weight, eps):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


ORDERS = {
    "torch": (torch_s, {}),
    "llama": (llama, dict(cast_before_weight=True)),
    "gemma": (gemma, dict(weight_offset=1.0)),
}


@pytest.mark.both
@pytest.mark.parametrize("whose", ORDERS)
@pytest.mark.parametrize("dtype, weight_dtype", [(BF16, BF16), (F16, F16), (BF16, F32), (F16, BF16)], ids=str)
@pytest.mark.parametrize("num_cols", [512, 16384])
def test_roundings_bit_for_bit(whose, dtype, weight_dtype, num_cols):
    """On integers, whose squares add up exactly in any order, so that roundings alone decide."""
    formula, options = ORDERS[whose]
    x = torch.randint(-7, 8, (6, num_cols)).to(dtype)
    weight = torch.randn(num_cols).to(weight_dtype)
    expected = formula(x, weight, 1e-6)
    got = fastattn.rms_norm(x, num_cols, weight, 1e-6, **options)
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    others = [f(x, weight, 1e-6).float() for other, (f, _) in ORDERS.items() if other != whose]
    assert not any(torch.equal(got.float(), other) for other in others)  # or the case would show nothing
    residual = torch.randint(-7, 8, x.shape).to(dtype)
    y, h = fastattn.add_rms_norm(x, residual, num_cols, weight, 1e-6, **options)
    assert torch.equal(h, residual + x) and torch.equal(y, formula(residual + x, weight, 1e-6))


def test_torch_s_rms_norm_bit_for_bit():
    x = torch.randint(-7, 8, (6, 512)).to(BF16)
    weight = torch.randn(512).to(BF16)
    assert torch.equal(fastattn.rms_norm(x, 512, weight, 1e-6), F.rms_norm(x, (512,), weight, 1e-6))


@pytest.mark.both
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_eps_none_is_float32_s(dtype):
    x = torch.randint(-7, 8, (6, 512)).to(dtype) * 2.0**-12  # squares of about eps
    got, eps = fastattn.rms_norm(x, 512), torch.finfo(torch.float32).eps
    assert torch.equal(got, fastattn.rms_norm(x, 512, eps=eps))
    torch.testing.assert_close(got, F.rms_norm(x, (512,)))
    assert not torch.equal(got, fastattn.rms_norm(x, 512, eps=2 * eps))


@pytest.mark.both
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_what_is_normalised_is_the_rounded_sum(dtype):
    x, residual = torch.randn(4, 96).to(dtype), torch.randn(4, 96).to(BF16)
    for name in ("layer_norm", "rms_norm"):
        y, h = getattr(fastattn, "add_" + name)(x, residual, 96)
        assert torch.equal(h, (residual + x).to(BF16))
        torch.testing.assert_close(y.float(), getattr(fastattn, name)(h.float(), 96).to(dtype).float(), rtol=1e-2, atol=1e-6)


@pytest.mark.both
def test_autocast_is_torch_s():
    x, weight = torch.randn(4, 50).bfloat16(), torch.randn(50)
    plain = fastattn.rms_norm(x, 50, weight)
    with torch.autocast("cpu", torch.bfloat16):  # on CUDA it means float32
        assert fastattn.layer_norm(x, 50, weight, weight).dtype == F.layer_norm(x, (50,), weight, weight).dtype == BF16
        assert fastattn.layer_norm(x.float(), 50).dtype == F.layer_norm(x.float(), (50,)).dtype == F32
        assert torch.equal(fastattn.rms_norm(x, 50, weight), plain)


# --------------------------------------------------------------------------------------------------------------------
# Dropout.


def with_mask(name, shape, dropout_p):
    """(op, oracle) under one mask: the op draws its seed from a generator reset at each call."""
    torch.manual_seed(5)
    seed = draw_seed(torch.device("cpu"))
    keep = dropout_keep(seed, torch.Size(shape[:-1]).numel(), shape[-1], dropout_p).view(shape) if dropout_p else None
    _, oracle = pair(name, shape[-1], dropout_p=dropout_p, dropout_keep=keep) if dropout_p else pair(name, shape[-1])

    def op(**tensors):
        torch.manual_seed(5)
        return getattr(fastattn, name)(**tensors, normalized_shape=shape[-1], dropout_p=dropout_p)

    return op, oracle


@pytest.mark.both
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("shape", [(40, 24), (3, 2, 77), (2, 1000), (2, 4104)], ids=str)
def test_dropout(name, shape):
    op, oracle = with_mask(name, shape, 0.3)
    for dtype, residual_dtype in ((F32, F32), (BF16, F32)) if shape[-1] < 1000 else ((F32, F32),):
        tensors = make(name, shape, dtype, residual_dtype=residual_dtype)
        with torch.random.fork_rng():
            check_op(f"{name} dropout {shape}", op, oracle, tensors)


@pytest.mark.both
def test_dropout_rate_and_reproducibility():
    x, zero = torch.ones(64, 512), torch.zeros(64, 512)
    torch.manual_seed(3)
    _, h = fastattn.add_rms_norm(x, zero, 512, dropout_p=0.25)
    _, other = fastattn.add_rms_norm(x, zero, 512, dropout_p=0.25)
    torch.manual_seed(3)
    _, again = fastattn.add_rms_norm(x, zero, 512, dropout_p=0.25)
    assert torch.equal(h, again) and not torch.equal(h, other)
    assert set(h.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((h == 0).float().mean().item() - 0.25) < 0.01
    assert abs((h == 0)[:, ::7].float().mean().item() - 0.25) < 0.02 and ((h == 0) != (other == 0)).float().mean() > 0.3


@pytest.mark.interpret
def test_the_mask_does_not_depend_on_the_tile():
    from fastattn.kernels.norm import norm_fwd
    from fastattn.kernels.row_tiles import RowConfig

    x, zero, seed = torch.ones(5, 200), torch.zeros(5, 200), torch.tensor([1 << 40])
    expected = dropout_keep(seed, 5, 200, 0.5)
    for config in (RowConfig(1, 256, 1), RowConfig(8, 256, 4), RowConfig(1, 64, 1, long=True), RowConfig(1, 256, 1, long=True)):
        _, h, _ = norm_fwd(x, zero, None, None, seed, 1e-5, 0.5, 0.0, True, False, F32, config)
        assert torch.equal(h != 0, expected), config


# --------------------------------------------------------------------------------------------------------------------
# The kernels by themselves.


@pytest.mark.interpret
@pytest.mark.parametrize("num_cols", [64, 99, 4104])
def test_program_order_does_not_matter(num_cols):
    from fastattn.testing.checker import assert_order_independent

    x, dy = torch.randn(2, 3, num_cols)
    weight = torch.randn(num_cols)

    def both():
        leaves = [t.clone().requires_grad_() for t in (x, weight, weight)]
        y = fastattn.layer_norm(leaves[0], num_cols, *leaves[1:])
        return y, *torch.autograd.grad(y, leaves, dy)

    assert_order_independent(both)


def check_tiles(name, num_cols, fwd=None, bwd=None, num_rows=4, **options):
    """An op's kernels, launched with these tiles, against the oracle."""
    from fastattn.kernels.norm import norm_fwd
    from fastattn.kernels.norm_bwd import norm_bwd
    from fastattn.testing.budget import check_budget

    tensors = make(name, (num_rows, num_cols), **options)
    x, residual, weight, bias = (tensors.get(key) for key in ("x", "residual", "weight", "bias"))
    mean, adds = HAS_MEAN[name], ADDS[name]
    y, h, stats = norm_fwd(x, residual, weight, bias, None, 1e-5, 0.0, 0.0, mean, False, x.dtype, fwd)
    dy, dh = torch.randn(2, num_rows, num_cols).to(x.dtype)
    dh = dh if adds else None
    grads = norm_bwd(
        dy, dh, h if adds else x, weight, bias, None, stats, 0.0, 0.0, mean, False, adds, x.dtype, True, mean, bwd
    )
    results = {"out0": y, "out1": h, "dx": grads[0], "dresidual": grads[1], "dweight": grads[2], "dbias": grads[3]}
    _, oracle = pair(name, num_cols, eps=1e-5)
    from op_contract import run

    douts = [dy, dh] if adds else [dy]
    truth, naive = run(oracle, tensors, douts, torch.float64), run(oracle, tensors, douts)
    for key, value in results.items():
        if value is not None:
            check_budget(f"{name} {num_cols} {fwd} {bwd} {key}", value, naive[key], truth[key])


@pytest.mark.interpret
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_cols", [312, 313])
def test_long_tiles_on_any_access(name, num_cols):
    from fastattn.kernels.row_tiles import RowConfig

    check_tiles(name, num_cols, RowConfig(1, 128, 1, long=True), RowConfig(2, 256, 1, long=True), num_rows=6)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("num_cols, num_rows", [(48, 1), (48, 20), (49, 1), (49, 50), (3, 20)])
def test_programs_that_stay_for_many_rows(name, num_cols, num_rows):
    from fastattn.kernels.row_tiles import RowConfig

    check_tiles(name, num_cols, None, RowConfig(2, 64, 8), num_rows)


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile_of_the_table():
    from fastattn.kernels.row_tiles import LONG, ROW_TILES

    for (kernel, _, bucket), config in ROW_TILES.items():
        if "norm" in kernel:
            num_cols = 9000 if bucket == LONG else max(1, bucket - 3 if bucket <= 1024 else bucket - 8)
            names = {"norm_fwd": ("add_layer_norm", "rms_norm"), "rms_norm_bwd": ("add_rms_norm",)}.get(kernel, ("layer_norm",))
            for name in names:
                check_tiles(name, num_cols, **{kernel.rpartition("_")[2]: config}, num_rows=3)


@pytest.mark.interpret
def test_the_number_of_programs_follows_from_shapes_and_part():
    from fastattn.kernels.norm_bwd import RESIDENT_WARPS, _splits
    from fastattn.kernels.row_tiles import RowConfig
    from fastattn.kernels.rows import Rows

    def splits(num_rows, num_cols, config, num_blocks=1, sums_wanted=True):
        return _splits(Rows(x=torch.empty(num_rows, num_cols)), config, num_blocks, sums_wanted)

    assert splits(10_000, 64, RowConfig(1, 64, 4)) == RESIDENT_WARPS // 4
    assert splits(10_000, 64, RowConfig(1, 64, 4), sums_wanted=False) == 10_000
    assert splits(3, 64, RowConfig(2, 64, 4)) == 2
    assert splits(10_000, 63, RowConfig(1, 64, 32)) == 8
    assert splits(0, 64, RowConfig(1, 64, 4)) == 1
    assert splits(10_000, 4096, RowConfig(8, 256, 4, long=True), num_blocks=16) == 1


# --------------------------------------------------------------------------------------------------------------------
# Bad input.

X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: fastattn.layer_norm([1.0], 1), TypeError, r"layer_norm: x must be a torch.Tensor, got list"),
        (lambda: fastattn.layer_norm(X.long(), 4), TypeError, r"layer_norm: x must be float16, .* got torch.int64"),
        (lambda: fastattn.rms_norm(X.double(), 4), TypeError, r"rms_norm: x must be float16, .* got torch.float64"),
        (lambda: fastattn.layer_norm(X, 5), ValueError, r"layer_norm: x must have a shape that ends in normalized_shape = \(5,\), got \(2, 4\)"),
        (lambda: fastattn.layer_norm(X, (3, 2, 4)), ValueError, r"layer_norm: x must have a shape that ends in .*\(3, 2, 4\)"),
        (lambda: fastattn.layer_norm(torch.zeros(()), 1), ValueError, r"layer_norm: x must have a shape that ends in"),
        (lambda: fastattn.layer_norm(X, ()), ValueError, r"layer_norm: normalized_shape must name at least one dim, got \(\)"),
        (lambda: fastattn.layer_norm(X, 4.0), TypeError, r"layer_norm: normalized_shape must be an int or a sequence of ints, got float"),
        (lambda: fastattn.layer_norm(X, 4, X), ValueError, r"layer_norm: weight must have normalized_shape = \(4,\), got \(2, 4\)"),
        (lambda: fastattn.layer_norm(X, 4, X[0], X[0, :3]), ValueError, r"layer_norm: bias must have normalized_shape = \(4,\), got \(3,\)"),
        (lambda: fastattn.rms_norm(X, 4, 1.0), TypeError, r"rms_norm: weight must be a torch.Tensor, got float"),
        (lambda: fastattn.rms_norm(X, 4, X[0].long()), TypeError, r"rms_norm: weight must be float16, .* got torch.int64"),
        (lambda: fastattn.rms_norm(X, 4, X[0].to("meta")), ValueError, r"rms_norm: weight must be on x's device cpu, got meta"),
        (lambda: fastattn.rms_norm(X, 4, eps="1"), TypeError, r"rms_norm: eps must be a Python number, got str"),
        (lambda: fastattn.rms_norm(X, 4, weight_offset=None), TypeError, r"rms_norm: weight_offset must be a Python number, got NoneType"),
        (lambda: fastattn.add_rms_norm(X, None, 4), TypeError, r"add_rms_norm: residual must be a torch.Tensor, got NoneType"),
        (lambda: fastattn.add_rms_norm(X, X[0], 4), ValueError, r"add_rms_norm: residual must have x's shape \(2, 4\), got \(4,\)"),
        (lambda: fastattn.add_layer_norm(X, X.long(), 4), TypeError, r"add_layer_norm: residual must be float16, .* got torch.int64"),
        (lambda: fastattn.add_layer_norm(X, X.to("meta"), 4), ValueError, r"add_layer_norm: residual must be on x's device cpu, got meta"),
        (lambda: fastattn.add_layer_norm(X, X, 4, dropout_p=1.0), ValueError, r"add_layer_norm: dropout_p must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --------------------------------------------------------------------------------------------------------------------
# The operators.


@pytest.mark.both
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_operators(subtract_mean, dropout_p):
    x, residual = torch.randn(2, 2, 24).to(BF16)
    weight, seed = torch.randn(24), torch.tensor([7])
    options = dropout_p, 0.0, subtract_mean, False
    ops = torch.ops.fastattn
    check_operator(ops.norm_fwd, x.t().contiguous().t(), residual, weight, weight, seed, 1e-5, *options, BF16)
    _, h, stats = ops.norm_fwd(x, residual, weight, weight, seed, 1e-5, *options, BF16)
    check_operator(ops.norm_bwd, x, residual, h, weight, weight, seed, stats, *options, True, BF16, True, True)
    if dropout_p == 0.0:
        check_operator(ops.norm_fwd, x, None, weight, None, None, 1e-5, 0.0, 1.0, subtract_mean, True, F32)
        check_operator(ops.norm_bwd, x, None, h, weight, None, None, stats, *options, False, BF16, True, False)


@pytest.mark.both
@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    check_transforms(name, pair(name, 16)[0], make(name, (3, 16)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(name, dynamic):
    """eps among them: it must reach the kernel as it does in eager."""
    check_compiled(pair(name, 100, eps=1e-3)[0], make(name, (4, 100), BF16), dynamic)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_compiled_is_eager_on_the_kernels(name):
    check_compiled(pair(name, 100, eps=1e-3)[0], make(name, (4, 100)), backend="aot_eager")


@pytest.mark.both
def test_compiled_dropout_draws_eager_s_mask():
    def op(**tensors):
        return fastattn.add_rms_norm(**tensors, normalized_shape=40, dropout_p=0.5)

    tensors = make("add_rms_norm", (3, 40))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = op(**tensors)
    torch.manual_seed(1)
    assert all(map(torch.equal, compiled(**tensors), expected))


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "norm")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_compiles_and_never_syncs(as_on_cuda, capability):
    x = torch.zeros(3, 4, 1000, dtype=BF16)[:, :3]
    weight, seed = torch.zeros(1000), torch.zeros(1, dtype=torch.int64)
    options = 0.1, 0.0, True, False

    def call():
        y, h, stats = as_on_cuda._norm_fwd(x, x, weight, weight, seed, 1e-5, *options, BF16)
        as_on_cuda._norm_bwd(y, y, h, weight, weight, seed, stats, *options, True, BF16, True, True)

    assert [launch.name for launch in launched_on(capability, call)] == ["_norm_fwd_kernel", "_norm_bwd_kernel"]


def test_long_rows_launch_path(as_on_cuda):
    x, weight, stats = torch.zeros(3, 40_000, dtype=BF16), torch.zeros(40_000), torch.zeros(1, 3)

    def call():
        as_on_cuda._norm_fwd(x, None, weight, None, None, 1e-5, 0.0, 0.0, False, False, BF16)
        as_on_cuda._norm_bwd(x, None, x, weight, None, None, stats, 0.0, 0.0, False, False, False, BF16, True, False)

    names = [launch.name for launch in launched_on((9, 0), call)]
    assert names == ["_norm_fwd_long_kernel", "_norm_bwd_coefficients_kernel", "_norm_bwd_kernel"]


def test_neither_row_counts_nor_probabilities_choose_a_variant(as_on_cuda):
    from fastattn.kernels.norm import _norm_fwd_kernel
    from fastattn.kernels.norm_bwd import _norm_bwd_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    options = 0.0, 0.0, True, False
    with stub_driver():
        for num_rows in (1, 2, 15, 16, 17, 64, 1000):
            x = torch.zeros(num_rows, 1000, dtype=BF16)
            y, _, stats = as_on_cuda._norm_fwd(x, None, x[0], x[0], None, 1e-5 * num_rows, *options, BF16)
            as_on_cuda._norm_bwd(y, None, x, x[0], x[0], None, stats, *options, False, BF16, True, True)
        assert compiled_variants(_norm_fwd_kernel) == 1 and compiled_variants(_norm_bwd_kernel) == 1
        seed = torch.zeros(1, dtype=torch.int64)
        for dropout_p in (0.1, 0.25, 0.5):
            _, h, _ = as_on_cuda._norm_fwd(x, x, None, None, seed, 1e-5, dropout_p, *options[1:], BF16)
            as_on_cuda._norm_bwd(x, None, h, None, None, seed, stats, dropout_p, *options[1:], True, BF16, False, False)
        assert compiled_variants(_norm_fwd_kernel) == 2 and compiled_variants(_norm_bwd_kernel) == 2
