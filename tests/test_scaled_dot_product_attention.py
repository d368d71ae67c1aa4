"""The SDPA face against torch's own function: values, gradients, argument forms and refusals."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import scaled_dot_product_attention as sdpa
from fastattn.ops.attention import draw_seed, dropout_keep
from fastattn.testing.budget import check_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ids(value) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def qkv(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def torch_math(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def naive(query, key, value, mask=None, *, is_causal=False, scale=None, enable_gqa=False):
    """The formula in the inputs' own dtype. (torch's math path computes half precision in float32, which is no baseline.)"""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else (scores + mask).to(query.dtype)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ value


def check_against_torch(inputs, mask=None, **kwargs):
    """Output and every gradient of `sdpa` within the budget, judged by torch's math path in float64."""

    def run(function, dtype):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        attn_mask = mask
        if mask is not None and mask.is_floating_point():
            attn_mask = mask.detach().to(dtype or mask.dtype).requires_grad_(mask.requires_grad)
        out = function(*leaves, attn_mask, **kwargs)
        if attn_mask is not None and attn_mask.requires_grad:
            leaves.append(attn_mask)
        grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        return [out, *grads]

    with torch.no_grad():
        upstream = torch.randn(torch_math(*inputs, mask, **kwargs).shape)
    out = run(sdpa, None)
    assert out[0].dtype == inputs[0].dtype
    for name, *results in zip(
        ("out", "dq", "dk", "dv", "dmask"), out, run(naive, None), run(torch_math, torch.float64), strict=False
    ):
        check_budget(f"scaled_dot_product_attention {name}", *results)


CASES = {  # query, key, value shapes and options
    "plain": [(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 16), {}],
    "causal": [(2, 4, 33, 16), (2, 4, 47, 16), (2, 4, 47, 16), {"is_causal": True}],
    "causal-long-queries": [(1, 2, 47, 8), (1, 2, 21, 8), (1, 2, 21, 8), {"is_causal": True}],
    "scale": [(1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), {"scale": 0.3}],
    "negative-scale": [(1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 4), {"scale": -0.3}],
    "gqa": [(2, 6, 9, 8), (2, 2, 13, 8), (2, 2, 13, 8), {"enable_gqa": True}],
    "gqa-dv": [(2, 6, 9, 8), (2, 2, 13, 8), (2, 2, 13, 5), {"enable_gqa": True}],
    "gqa-k-v-heads-differ": [(2, 6, 9, 8), (2, 2, 13, 8), (2, 3, 13, 8), {"enable_gqa": True}],
    "gqa-3d": [(6, 9, 8), (2, 13, 8), (2, 13, 8), {"enable_gqa": True}],
    "gqa-ranks-differ": [(2, 6, 9, 8), (2, 13, 8), (2, 13, 8), {"enable_gqa": True}],
    "dv": [(2, 4, 9, 16), (2, 4, 13, 16), (2, 4, 13, 7), {}],
    "dv-causal": [(2, 4, 9, 16), (2, 4, 13, 16), (2, 4, 13, 24), {"is_causal": True}],
    "dv-causal-long-queries": [(2, 4, 13, 16), (2, 4, 9, 16), (2, 4, 9, 24), {"is_causal": True}],
    "2d": [(9, 8), (13, 8), (13, 8), {}],
    "2d-causal": [(9, 8), (13, 8), (13, 8), {"is_causal": True}],
    "3d": [(3, 9, 8), (3, 13, 8), (3, 13, 8), {"is_causal": True}],
    "5d": [(2, 3, 2, 9, 8), (2, 3, 2, 13, 8), (2, 3, 2, 13, 8), {}],
    "broadcast-heads": [(2, 4, 9, 8), (2, 1, 13, 8), (2, 1, 13, 8), {}],
    "broadcast-batch": [(1, 4, 9, 8), (3, 4, 13, 8), (1, 1, 13, 8), {}],
    "broadcast-ranks": [(4, 9, 8), (2, 1, 13, 8), (13, 8), {}],
    "one-query": [(2, 4, 1, 8), (2, 4, 30, 8), (2, 4, 30, 8), {}],
    "no-keys": [(2, 4, 3, 8), (2, 4, 0, 8), (2, 4, 0, 8), {}],
    "no-queries": [(2, 4, 0, 8), (2, 4, 5, 8), (2, 4, 5, 8), {}],
    "no-batch": [(0, 4, 3, 8), (0, 4, 5, 8), (0, 4, 5, 8), {}],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", CASES)
def test_matches_torch(case, dtype):
    *shapes, options = CASES[case]
    check_against_torch(qkv(*shapes, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "learned"])
@pytest.mark.parametrize(
    ("query", "key", "mask"),
    [
        ((2, 4, 9, 8), (2, 4, 13, 8), (9, 13)),
        ((2, 4, 9, 8), (2, 4, 13, 8), (1, 13)),
        ((2, 4, 9, 8), (2, 4, 13, 8), (9, 1)),
        ((2, 4, 9, 8), (2, 4, 13, 8), (4, 9, 13)),
        ((2, 4, 9, 8), (2, 4, 13, 8), (2, 1, 1, 13)),
        ((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 9, 13)),
        ((9, 8), (13, 8), (9, 13)),
        ((9, 8), (13, 8), (13,)),
        ((3, 9, 8), (3, 13, 8), (3, 1, 13)),
        ((2, 3, 4, 9, 8), (2, 3, 4, 13, 8), (9, 13)),
        ((2, 3, 4, 9, 8), (2, 3, 4, 13, 8), (3, 1, 9, 13)),
        ((2, 3, 4, 9, 8), (2, 3, 4, 13, 8), (2, 1, 4, 1, 13)),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_float_masks(query, key, mask, grad, dtype):
    check_against_torch(qkv(query, key, key, dtype=dtype), torch.randn(mask).to(dtype).requires_grad_(grad))


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("mask", [(9, 13), (4, 9, 13), (2, 1, 1, 13), (2, 4, 9, 13)], ids=str)
def test_bool_masks(mask, value_dim):
    check_against_torch(qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, value_dim)), torch.rand(mask) > 0.4)


@pytest.mark.parametrize("value_dim", [8, 5])
def test_float32_mask_for_half_precision(value_dim):
    inputs = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, value_dim), dtype=torch.bfloat16)
    check_against_torch(inputs, torch.randn(9, 13))


def test_float64_is_torchs():
    query, key, value = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 5), dtype=torch.float64)
    assert torch.equal(sdpa(query, key, value), F.scaled_dot_product_attention(query, key, value))
    bias = causal_lower_right(9, 13)
    torch.testing.assert_close(sdpa(query, key, value, bias), F.scaled_dot_product_attention(query, key, value, bias))


@pytest.mark.parametrize("strides", ["transposed", "expanded", "last-dim"])
def test_strides(strides):
    query, key, value = (torch.randn(2, 4, 12, 8) for _ in range(3))
    if strides == "transposed":
        query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    elif strides == "expanded":
        key, value = (t[:1, :1].expand(2, 4, -1, -1) for t in (key, value))
    else:
        query, key, value = (t.mT.contiguous().mT for t in (query, key, value))
    check_against_torch([query, key, value], is_causal=True)


# --------------------------------------------------------------------------------------------------------------------
# Argument forms


def test_argument_forms():
    query, key, value = qkv((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8))
    mask = torch.randn(9, 9)
    expected = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.2, enable_gqa=False)
    assert torch.equal(expected, sdpa(query, key, value, mask, 0.0, False, scale=0.2, enable_gqa=False))
    keywords = {"query": query, "key": key, "value": value, "attn_mask": mask, "dropout_p": 0.0, "is_causal": False}
    assert torch.equal(expected, sdpa(**keywords, scale=0.2, enable_gqa=False))
    assert torch.equal(sdpa(query, key, value, None, 0, True), sdpa(query, key, value, is_causal=True))
    assert torch.equal(sdpa(query, key, value, scale=torch.tensor(0.25)), sdpa(query, key, value, scale=0.25))
    with pytest.raises(TypeError, match="positional"):
        sdpa(query, key, value, None, 0.0, False, 0.2)
    with pytest.raises(TypeError, match="positional"):
        F.scaled_dot_product_attention(query, key, value, None, 0.0, False, 0.2)
    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(inspect.signature(sdpa).parameters) == names


def causal_bias(function, *size) -> CausalBias:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of NaN rows for S_q > S_k
        return function(*size)


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("seqlens", [(9, 9), (9, 13), (13, 9)], ids=str)
@pytest.mark.parametrize("function", [causal_upper_left, causal_lower_right])
def test_causal_bias_never_becomes_a_matrix(function, seqlens, value_dim, monkeypatch):
    seqlen_q, seqlen_k = seqlens
    diagonal = 0 if function is causal_upper_left else seqlen_k - seqlen_q
    visible = torch.ones(seqlens, dtype=torch.bool).tril(diagonal)
    bias = causal_bias(function, *seqlens)
    monkeypatch.setattr(CausalBias, "_materialize", None)
    inputs = qkv((2, 4, seqlen_q, 8), (2, 2, seqlen_k, 8), (2, 2, seqlen_k, value_dim))
    out = sdpa(*inputs, bias, enable_gqa=True)
    assert type(out) is torch.Tensor
    ref64 = torch_math(*(t.double() for t in inputs), visible, enable_gqa=True)
    check_budget("causal bias out", out, naive(*inputs, visible, enable_gqa=True), ref64)
    upstream = torch.randn(out.shape)
    grads, expected = (torch.autograd.grad(o, inputs, upstream.to(o.dtype)) for o in (out, ref64))
    for grad, ref in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, ref, rtol=1e-4, atol=1e-5)


def test_causal_upper_left_of_any_size():
    query, key, value = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8))
    expected = sdpa(query, key, value, is_causal=True)
    assert torch.equal(sdpa(query, key, value, causal_upper_left(4, 4)), expected)
    assert torch.equal(F.scaled_dot_product_attention(query, key, value, causal_upper_left(4, 4)), expected)


# --------------------------------------------------------------------------------------------------------------------
# Rows that see nothing, dropout


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_row_without_keys_is_zero(kind, value_dim):
    visible = torch.rand(9, 13) > 0.3
    visible[2] = visible[7] = False
    mask = visible if kind == "bool" else torch.zeros(9, 13).masked_fill(~visible, -math.inf)
    inputs = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, value_dim))
    out = sdpa(*inputs, mask)
    assert out[:, :, [2, 7]].eq(0).all() and out[:, :, [0, 1, 3]].ne(0).all()
    dq, dk, dv = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert dq[:, :, [2, 7]].eq(0).all()
    assert dk.isfinite().all() and dv.isfinite().all()
    check_against_torch(inputs, mask)  # torch's math path has the same convention


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_dropout_uses_the_operators_mask(is_causal):
    inputs = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8))
    torch.manual_seed(7)
    out = sdpa(*inputs, dropout_p=0.3, is_causal=is_causal)
    torch.manual_seed(7)
    keep = dropout_keep(draw_seed(torch.device("cpu")), 2, 4, 9, 13, 0.3)
    assert 0.6 < keep.double().mean() < 0.8

    def dropped(query, key, value):
        scores = query @ key.mT / math.sqrt(8)
        if is_causal:
            scores = scores.masked_fill(~torch.ones(9, 13, dtype=torch.bool).tril(), -math.inf)
        return (scores.softmax(-1) * keep / 0.7) @ value

    doubles = [t.detach().double().requires_grad_() for t in inputs]
    naive, ref64 = dropped(*inputs), dropped(*doubles)
    check_budget("dropout out", out, naive, ref64)
    upstream = torch.randn(out.shape)
    for name, *grads in zip(
        ("dq", "dk", "dv"),
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(naive, inputs, upstream),
        torch.autograd.grad(ref64, doubles, upstream.double()),
        strict=True,
    ):
        check_budget(f"dropout {name}", *grads)


def test_dropout_is_reproducible_and_fresh():
    inputs = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8))
    torch.manual_seed(3)
    first, second = sdpa(*inputs, dropout_p=0.5), sdpa(*inputs, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, sdpa(*inputs, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_dropout_of_everything():
    inputs = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8))
    out = sdpa(*inputs, dropout_p=1.0)
    assert out.eq(0).all() and F.scaled_dot_product_attention(*inputs, dropout_p=1.0).eq(0).all()
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(out.sum(), inputs))


# --------------------------------------------------------------------------------------------------------------------
# Which code runs on the CPU


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


FLASH, OURS = "aten::_scaled_dot_product_flash_attention_for_cpu", "fastattn::attention_fwd"


@pytest.mark.parametrize(
    ("op", "shapes", "mask", "options"),
    [
        (FLASH, [(2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8)], None, {"is_causal": True}),
        (FLASH, [(2, 4, 9, 8), (2, 2, 13, 8), (2, 2, 13, 8)], (2, 1, 1, 13), {"enable_gqa": True}),
        (FLASH, [(9, 8), (13, 8), (13, 8)], (9, 13), {}),
        (FLASH, [(4, 9, 8), (4, 13, 8), (4, 13, 8)], (4, 9, 13), {}),
        (FLASH, [(2, 2, 4, 9, 8), (2, 2, 4, 13, 8), (2, 2, 4, 13, 8)], None, {}),
        (FLASH, [(2, 4, 9, 8), (13, 8), (1, 4, 13, 8)], None, {}),
        (OURS, [(2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 5)], None, {}),
        (OURS, [(2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8)], None, {"dropout_p": 0.2}),
        (OURS, [(2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8)], causal_lower_right(9, 13), {}),
        (OURS, [(2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, 8)], torch.zeros(9, 13, requires_grad=True), {}),
    ],
    ids=["plain", "gqa-mask", "2d", "3d", "5d", "broadcast", "dv", "dropout", "lower-right", "learned-mask"],
)
def test_no_call_reaches_torchs_math_path(op, shapes, mask, options):
    mask = torch.randn(mask) if isinstance(mask, tuple) else mask
    with Recorded() as recorded:
        sdpa(*qkv(*shapes), mask, **options)
    assert op in recorded.ops
    assert not {name for name in recorded.ops if "softmax" in name or "mm" in name}


def test_last_dim_stride_keeps_off_torchs_math_path():
    query, key, value = (torch.randn(2, 4, 8, 9).mT for _ in range(3))
    with Recorded() as recorded:
        sdpa(query, key, value)
    assert OURS in recorded.ops and not {name for name in recorded.ops if "softmax" in name}


def test_empty_head_dims():
    query, key, value = torch.randn(2, 4, 9, 0), torch.randn(2, 4, 13, 0), torch.randn(2, 4, 13, 8)
    torch.testing.assert_close(sdpa(query, key, value), F.scaled_dot_product_attention(query, key, value))
    assert sdpa(torch.randn(2, 4, 9, 8), value, key).shape == (2, 4, 9, 0)


def test_meta_tensors():
    query, key, value = (torch.randn(2, 4, 9, 8, device="meta") for _ in range(3))
    assert sdpa(query, key, value).shape == (2, 4, 9, 8)
    assert sdpa(query, key, value[..., :5]).shape == (2, 4, 9, 5)


def test_autocast():
    query, key, value = (torch.randn(2, 4, 9, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value_ in (value, value[..., :5]):
            for mask in (None, torch.randn(9, 9), torch.randn(9, 9).half()):
                out = sdpa(query, key.half(), value_, mask)
                expected = F.scaled_dot_product_attention(query, key.half(), value_, mask)
                assert out.dtype == expected.dtype == torch.bfloat16
                torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        assert sdpa(query.double(), key.double(), value.double()).dtype == torch.float64


def test_subclasses_and_modes_see_this_function():
    class Tagged(torch.Tensor):
        seen = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(TorchFunctionMode):
        seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    query, key, value = (torch.randn(2, 4, 9, 8) for _ in range(3))
    expected = sdpa(query, key, value, is_causal=True)
    out = sdpa(query.as_subclass(Tagged), key, value, is_causal=True)
    assert type(out) is Tagged and sdpa in Tagged.seen and torch.equal(out.as_subclass(torch.Tensor), expected)
    with Mode():
        assert torch.equal(sdpa(query, key, value, causal_upper_left(9, 9)), expected)
    assert sdpa in Mode.seen
    assert type(sdpa(torch.nn.Parameter(query), key, value)) is torch.Tensor


@pytest.mark.parametrize("value_dim", [8, 5])
def test_compile_fullgraph(value_dim):
    def loss(query, key, value, mask):
        out = sdpa(query, key, value, mask, scale=0.3) + sdpa(query, key, value, is_causal=True)
        return out.square().sum()

    inputs = qkv((2, 4, 9, 8), (2, 4, 13, 8), (2, 4, 13, value_dim))
    mask = torch.randn(9, 13)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*inputs, mask), inputs) for f in (compiled, loss)]
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_compile_of_changing_lengths(value_dim, dynamic):
    def causal(query, key, value):
        return sdpa(query, key, value, is_causal=True) + sdpa(query, key, value, scale=0.3)

    torch._dynamo.reset()
    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (5, 9, 12):
        inputs = qkv((2, 4, seqlen, 8), (2, 4, seqlen, 8), (2, 4, seqlen, value_dim))
        torch.testing.assert_close(compiled(*inputs), causal(*inputs))


@pytest.mark.parametrize("value_dim", [8, 5])
def test_export_with_dynamic_lengths(value_dim):
    class Causal(torch.nn.Module):
        def forward(self, query, key, value):
            return sdpa(query, key, value, is_causal=True)

    def inputs(seqlen):
        return [torch.randn(2, 4, seqlen, dim) for dim in (8, 8, value_dim)]

    lengths = {2: torch.export.Dim("seqlen", min=2, max=64)}
    program = torch.export.export(Causal(), tuple(inputs(5)), dynamic_shapes=(lengths,) * 3)
    others = inputs(9)
    torch.testing.assert_close(program.module()(*others), sdpa(*others, is_causal=True))


# --------------------------------------------------------------------------------------------------------------------
# Refusals. torch=True: torch's CPU function refuses the same call with the same exception type; False: one of its paths lets it
# through (or computes nonsense), and its documentation does not.

Q, K = (2, 4, 9, 8), (2, 4, 13, 8)
REFUSED = {
    "dtype": (RuntimeError, "key must have query's dtype torch.float32, got torch.float64", True, [Q, (K, "float64"), K], {}),
    "integers": (RuntimeError, "query must be float16, .* got torch.int32", True, [(Q, "int32"), (K, "int32"), (K, "int32")], {}),
    "complex": (NotImplementedError, "query must be float16, .* got torch.complex64", True, [(Q, "cfloat"), (K, "cfloat"), (K, "cfloat")], {}),
    "device": (RuntimeError, "value must be on query's device cpu, got meta", True, [Q, K, (K, "meta")], {}),
    "1d": (RuntimeError, r"query must have at least 2 dims, got \(8,\)", True, [(8,), K, K], {}),
    "head-dim": (RuntimeError, r"key must have shape \(..., S_k, D\) with D = 8 to match query, got \(2, 4, 13, 7\)", True, [Q, (2, 4, 13, 7), K], {}),
    "lengths": (RuntimeError, r"value must have shape \(..., S_k, D_v\) with S_k = 13 to match key, got \(2, 4, 12, 8\)", False, [Q, K, (2, 4, 12, 8)], {}),
    "heads": (RuntimeError, r"leading dims that broadcast together \(enable_gqa=True lets heads differ\), got \(2, 4, 9, 8\), \(2, 2, 13, 8\)", True, [Q, (2, 2, 13, 8), (2, 2, 13, 8)], {}),
    "batch": (RuntimeError, "leading dims that broadcast together", True, [Q, (3, 4, 13, 8), K], {}),
    "gqa-heads": (RuntimeError, "key must have a head count that divides query's 4 with enable_gqa, got 3", True, [Q, (2, 3, 13, 8), (2, 3, 13, 8)], {"enable_gqa": True}),
    "gqa-more-kv-heads": (RuntimeError, "key must have a head count that divides query's 2", True, [(2, 2, 9, 8), K, K], {"enable_gqa": True}),
    "gqa-2d": (IndexError, r"query must have a head dim with enable_gqa, got shape \(9, 8\)", True, [(9, 8), (13, 8), (13, 8)], {"enable_gqa": True}),
    "mask-integers": (RuntimeError, "attn_mask must be bool, float32 or of query's dtype torch.float32, got torch.int64", True, [Q, K, K], {"attn_mask": ((9, 13), "int64")}),
    "mask-dtype": (RuntimeError, "attn_mask must be bool, float32 or of query's dtype", True, [Q, K, K], {"attn_mask": ((9, 13), "float16")}),
    "mask-shape": (RuntimeError, r"attn_mask must broadcast to \(..., H, S_q, S_k\) = \(2, 4, 9, 13\), got \(9, 12\)", True, [Q, K, K], {"attn_mask": ((9, 12), "float32")}),
    "mask-heads": (RuntimeError, "attn_mask must broadcast", True, [Q, K, K], {"attn_mask": ((3, 9, 13), "float32")}),
    "mask-larger-batch": (RuntimeError, "attn_mask must broadcast", True, [(1, 4, 9, 8), (1, 4, 13, 8), (1, 4, 13, 8)], {"attn_mask": ((2, 4, 9, 13), "float32")}),
    "mask-rank": (RuntimeError, "attn_mask must broadcast", True, [Q, K, K], {"attn_mask": ((1, 2, 4, 9, 13), "float32")}),
    "mask-1d": (IndexError, r"attn_mask must have at least 2 dims, got \(13,\)", True, [Q, K, K], {"attn_mask": ((13,), "float32")}),
    "mask-device": (RuntimeError, "attn_mask must be on query's device cpu, got meta", False, [Q, K, K], {"attn_mask": ((9, 13), "meta")}),
    "mask-and-causal": (RuntimeError, "attn_mask must be None with is_causal=True, got a Tensor", False, [Q, K, K], {"attn_mask": ((9, 13), "float32"), "is_causal": True}),
    "mask-and-causal-dv": (RuntimeError, "attn_mask must be None with is_causal=True", True, [Q, K, (2, 4, 13, 5)], {"attn_mask": ((9, 13), "float32"), "is_causal": True}),
    "dropout-negative": (RuntimeError, r"dropout_p must lie in \[0, 1\], got -0.1", True, [Q, K, K], {"dropout_p": -0.1}),
    "dropout-large": (RuntimeError, r"dropout_p must lie in \[0, 1\], got 1.5", True, [Q, K, K], {"dropout_p": 1.5}),
    "dropout-nan": (RuntimeError, r"dropout_p must lie in \[0, 1\], got nan", True, [Q, K, K], {"dropout_p": math.nan}),
    "dropout-type": (TypeError, "dropout_p must be a float, got str", True, [Q, K, K], {"dropout_p": "0.1"}),
    "dropout-none": (TypeError, "dropout_p must be a float, got NoneType", True, [Q, K, K], {"dropout_p": None}),
    "dropout-tensor": (TypeError, "dropout_p must be a float, got Tensor", True, [Q, K, K], {"dropout_p": torch.zeros(2)}),
    "scale-complex": (TypeError, "scale must be a float, got complex", True, [Q, K, K], {"scale": 1j}),
    "scale-type": (TypeError, "scale must be a float, got str", True, [Q, K, K], {"scale": "1"}),
    "causal-type": (TypeError, "is_causal must be a bool, got int", True, [Q, K, K], {"is_causal": 1}),
    "gqa-type": (TypeError, "enable_gqa must be a bool, got int", True, [Q, K, K], {"enable_gqa": 1}),
    "query-type": (TypeError, "query must be a torch.Tensor, got list", True, [[1.0], K, K], {}),
    "value-none": (TypeError, "value must be a torch.Tensor, got NoneType", True, [Q, K, None], {}),
    "mask-type": (TypeError, "attn_mask must be a torch.Tensor, got int", True, [Q, K, K], {"attn_mask": 3}),
}  # fmt: skip


def tensor_of(spec):
    """A shape, or (shape, dtype or device), as a tensor; anything else as it is."""
    if not isinstance(spec, tuple):
        return spec
    shape, kind = spec if isinstance(spec[0], tuple) else (spec, "float32")
    return torch.ones(shape, device="meta") if kind == "meta" else torch.ones(shape).to(getattr(torch, kind))


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_torch_refuses(case):
    error, message, torch_refuses, specs, options = REFUSED[case]
    tensors = [tensor_of(spec) for spec in specs]
    if isinstance(options.get("attn_mask"), tuple):
        options = options | {"attn_mask": tensor_of(options["attn_mask"])}
    with pytest.raises(error, match=f"^scaled_dot_product_attention: .*{message}") as caught:
        sdpa(*tensors, **options)
    assert caught.type is error
    if torch_refuses:
        with pytest.raises(error):
            F.scaled_dot_product_attention(*tensors, **options)


@pytest.mark.parametrize("function", [causal_upper_left, causal_lower_right])
def test_causal_bias_with_is_causal_is_refused(function):
    tensors = qkv(Q, K, K)
    with pytest.raises(RuntimeError, match="attn_mask must be None with is_causal=True, got a CausalBias"):
        sdpa(*tensors, function(9, 13), is_causal=True)


def test_causal_lower_right_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match=r"causal_lower_right of \(S_q, S_k\) = \(9, 13\), got \(4, 13\)"):
        sdpa(*qkv(Q, K, K), causal_lower_right(4, 13))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout):
    nested = torch.nested.nested_tensor([torch.randn(4, 5, 8), torch.randn(4, 5, 8)], layout=layout)
    with pytest.raises(NotImplementedError, match="query must not be a nested tensor .* cu_seqlens"):
        sdpa(nested, nested, nested)


def test_double_backward_raises():
    for value_dim, error, message in ((8, RuntimeError, "not implemented"), (5, NotImplementedError, "not supported")):
        query, key, value = qkv(Q, K, (2, 4, 13, value_dim))
        (dq,) = torch.autograd.grad(sdpa(query, key, value).sum(), query, create_graph=True)
        with pytest.raises(error, match=message) as caught:  # torch's kernel, then our operator
            torch.autograd.grad(query.sum() + dq.square().sum(), query)
        assert caught.type is error


# --------------------------------------------------------------------------------------------------------------------
# The kernels, in the interpreter


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("causal", torch.float32),
        ("causal-long-queries", torch.bfloat16),
        ("gqa-k-v-heads-differ", torch.float32),
        ("dv-causal", torch.float16),
        ("broadcast-ranks", torch.float32),
        ("5d", torch.float32),
        ("no-keys", torch.float32),
    ],
    ids=ids,
)
def test_matches_torch_interpreted(case, dtype, launches):
    *shapes, options = CASES[case]
    check_against_torch(qkv(*shapes, dtype=dtype), **options)
    assert launches.count > 0


@pytest.mark.interpret
def test_masks_interpreted():
    inputs = qkv((2, 4, 9, 16), (2, 4, 13, 16), (2, 4, 13, 16))
    check_against_torch(inputs, torch.rand(2, 1, 9, 13) > 0.4)
    check_against_torch(inputs, torch.randn(4, 1, 13, requires_grad=True))


@pytest.mark.interpret
def test_kernel_limits_interpreted():
    with pytest.raises(TypeError, match="query must be float16, bfloat16 or float32 on cpu, got torch.float64"):
        sdpa(*qkv(Q, K, K, dtype=torch.float64))
    with pytest.raises(ValueError, match="query must have a head dim between 1 and 512 on cpu, got 513"):
        sdpa(*qkv((1, 1, 2, 513), (1, 1, 2, 513), (1, 1, 2, 8)))
    with pytest.raises(ValueError, match="value must have a head dim between 1 and 512 on cpu, got 513"):
        sdpa(*qkv((1, 1, 2, 8), (1, 1, 2, 8), (1, 1, 2, 513)))


def test_is_public():
    assert fastattn.scaled_dot_product_attention is sdpa
