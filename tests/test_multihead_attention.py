"""fastattn.nn.MultiheadAttention against torch's module: results, gradients, state and surroundings."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
import random
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.nn import MultiheadAttention
from fastattn.testing.budget import check_budget

E, H, B, S_Q, S_K = 16, 4, 3, 7, 9


def pair(seed=0, **options):
    """(ours, torch's, torch's in float64) with the same weights, biases included."""
    torch.manual_seed(seed)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():  # torch starts every bias at zero, which hides a dropped one
            parameter.copy_(torch.randn(parameter.shape) / 3)
    ours = MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


def inputs_for(layout, kind, kdim, vdim):
    """query, key, value as (S, B, E), (B, S, E) or (S, E); self-attention, key is value, or all different."""

    def tensor(seqlen, size):
        shape = {"seq": (seqlen, B, size), "batch": (B, seqlen, size), "unbatched": (seqlen, size)}[layout]
        return torch.randn(shape)

    if kind == "self":
        return (tensor(S_Q, E),) * 3
    key = tensor(S_K, kdim or E)
    return tensor(S_Q, E), key, key if kind == "cross" and vdim == kdim else tensor(S_K, vdim or E)


def masks_for(layout, seqlen_k, attn, padding):
    """attn: None, "2d-bool", "3d-float", "causal", ...; padding: None, "bool", "float". No row without a key."""
    batch = 1 if layout == "unbatched" else B
    attn_mask = padding_mask = None
    if attn == "causal":
        attn_mask = ~torch.ones(S_Q, seqlen_k, dtype=torch.bool).tril()
    elif attn is not None:
        shape = (S_Q, seqlen_k) if attn.startswith("2d") else (batch * H, S_Q, seqlen_k)
        attn_mask = torch.randn(shape) if attn.endswith("float") else torch.rand(shape) > 0.7
        if attn_mask.dtype == torch.bool:
            attn_mask[..., 0] = False
    if padding is not None:
        padding_mask = torch.zeros(batch, seqlen_k, dtype=torch.bool)
        for row in range(batch):
            padding_mask[row, seqlen_k - 1 - row :] = True
        if padding == "float":
            padding_mask = torch.randn(padding_mask.shape).masked_fill(padding_mask, -math.inf)
        padding_mask = padding_mask.squeeze(0) if layout == "unbatched" else padding_mask
    return attn_mask, padding_mask


def run(module, inputs, **kwargs):
    """Outputs, then gradients of the inputs (one per distinct tensor) and of every parameter."""
    dtype = module.out_proj.weight.dtype
    leaves = {id(t): t.detach().to(dtype).requires_grad_() for t in inputs}
    kwargs = {
        name: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in kwargs.items()
    }
    out, weights = module(*(leaves[id(t)] for t in inputs), **kwargs)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-1, 1, weights.numel(), dtype=dtype).view(weights.shape)).sum()
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, [*leaves.values(), *parameters.values()])
    names = ["out", *(["weights"] if weights is not None else []), *(f"d{i}" for i in range(len(leaves))), *parameters]
    return dict(zip(names, [out, *([weights] if weights is not None else []), *grads], strict=True))


def compare(modules, inputs, **kwargs):
    ours, naive, ref64 = (run(module, inputs, **kwargs) for module in modules)
    assert ours.keys() == ref64.keys()
    for name in ours:
        check_budget(f"MultiheadAttention {name}", ours[name], naive[name], ref64[name])


GRID = list(
    itertools.product(
        ["seq", "batch", "unbatched"],
        ["self", "cross", "different"],
        [None, "2d-bool", "2d-float", "3d-bool", "3d-float", "causal"],
        [None, "bool", "float"],
        ["no-weights", "average", "per-head"],
        [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
        [(None, None), (12, 20), (12, 12)],
    )
)  # fmt: skip
SAMPLE = [case for case in random.Random(1).sample(GRID, 160) if not (case[1] == "self" and case[6] != (None, None))]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize(
    ("layout", "kind", "attn", "padding", "need", "options", "dims"),
    SAMPLE,
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_matches_torch(layout, kind, attn, padding, need, options, dims):
    modules = pair(**options, kdim=dims[0], vdim=dims[1], batch_first=layout == "batch")
    inputs = inputs_for(layout, kind, *dims)
    attn_mask, padding_mask = masks_for(layout, inputs[1].shape[1 if layout == "batch" else 0], attn, padding)
    compare(
        modules,
        inputs,
        attn_mask=attn_mask,
        key_padding_mask=padding_mask,
        is_causal=attn == "causal",
        need_weights=need != "no-weights",
        average_attn_weights=need != "per-head",
    )


def test_results_in_shape_and_evaluation():
    ours, theirs, _ = pair(batch_first=True)
    query = torch.randn(B, S_Q, E)
    for need, average, shape in ((True, True, (B, S_Q, S_Q)), (True, False, (B, H, S_Q, S_Q)), (False, True, None)):
        out, weights = ours(query, query, query, None, need, None, average)
        assert out.shape == query.shape and (weights is None) == (shape is None)
        assert weights is None or weights.shape == shape
        with torch.no_grad():  # torch's fused inference path, which this module has not
            expected, expected_weights = theirs.eval()(query, query, query, None, need, None, average)
            out, weights = ours.eval()(query, query, query, None, need, None, average)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        if need:
            torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


def test_is_a_torch_module():
    ours, theirs = MultiheadAttention(E, H), torch.nn.MultiheadAttention(E, H)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    for name in ("__init__", "forward"):
        expected = inspect.signature(getattr(torch.nn.MultiheadAttention, name)).parameters
        found = inspect.signature(getattr(MultiheadAttention, name)).parameters
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in expected.values()]
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 12, "vdim": 20}, {"add_bias_kv": True}], ids=lambda o: "-".join(o) or "plain"
)  # fmt: skip
def test_state_loads_both_ways(options):
    torch.manual_seed(1)
    ours, theirs = MultiheadAttention(E, H, **options), torch.nn.MultiheadAttention(E, H, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    other = MultiheadAttention(E, H, **options)
    other.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))


def test_initial_weights_are_torchs():
    torch.manual_seed(5)
    ours = MultiheadAttention(E, H, add_bias_kv=True)
    torch.manual_seed(5)
    theirs = torch.nn.MultiheadAttention(E, H, add_bias_kv=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_copy_pickle_dtype_device():
    ours, *_ = pair(dtype=torch.float64)
    query = torch.randn(S_Q, B, E, dtype=torch.float64)
    expected = ours(query, query, query)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert type(other) is MultiheadAttention and torch.equal(other(query, query, query)[0], expected)
    half = MultiheadAttention(E, H, dtype=torch.bfloat16)
    assert half(*[query.bfloat16()] * 3, need_weights=False)[0].dtype == torch.bfloat16
    meta = MultiheadAttention(E, H, device="meta")
    assert meta(*[query.float().to("meta")] * 3, need_weights=False)[0].shape == query.shape


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(need_weights):
    ours, theirs, _ = pair(add_bias_kv=True)
    query = torch.randn(S_Q, B, E)
    padding = masks_for("seq", S_Q, None, "bool")[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(query, query, query, padding, need_weights=need_weights)[0]
        expected = theirs(query, query, query, padding, need_weights=need_weights)[0]
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("attn_dtype", [None, torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding_dtype", [None, torch.bool, torch.float32], ids=str)
def test_autocast_dtypes_of_masks(attn_dtype, padding_dtype):
    ours, theirs, _ = pair()
    query = torch.randn(S_Q, B, E)
    attn_mask = None if attn_dtype is None else torch.randn(S_Q, S_Q).gt(1).to(attn_dtype)
    padding = None if padding_dtype is None else torch.zeros(B, S_Q, dtype=padding_dtype)
    if attn_dtype == torch.bool:
        attn_mask[:, 0] = False
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch deprecates masks of two dtypes
        found, expected = (m(query, query, query, padding, attn_mask=attn_mask) for m in (ours, theirs))
    for result, other in zip(found, expected, strict=True):
        assert result.dtype == other.dtype == torch.bfloat16
        torch.testing.assert_close(result, other, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_of_changing_lengths(dynamic):
    ours, *_ = pair(batch_first=True)

    def causal(query, mask):
        return ours(query, query, query, attn_mask=mask, is_causal=True, need_weights=False)[0]

    torch._dynamo.reset()
    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seqlen in (5, 9):
        query, mask = torch.randn(B, seqlen, E), torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
        torch.testing.assert_close(compiled(query, mask), causal(query, mask))


def test_compile_fullgraph():
    ours, *_ = pair(batch_first=True)
    query, padding = torch.randn(B, S_Q, E), masks_for("batch", S_Q, None, "bool")[1]
    for need_weights in (False, True):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        found, expected = (m(query, query, query, padding, need_weights)[0] for m in (compiled, ours))
        torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------------------
# Where it departs from torch


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_query_without_keys(kind, need_weights):
    """torch's module gives NaN here with need_weights=True; ours gives the output projection of zero, and gradients stay finite."""
    ours, theirs, _ = pair()
    query = torch.randn(S_Q, B, E, requires_grad=True)
    padding = torch.zeros(B, S_Q, dtype=torch.bool)
    padding[1] = True
    if kind == "float":
        padding = torch.zeros(B, S_Q).masked_fill(padding, -math.inf)
    out, weights = ours(query, query, query, padding, need_weights)
    torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(S_Q, E))
    if need_weights:
        assert weights[1].eq(0).all()
        assert theirs(query, query, query, padding)[0][:, 1].isnan().all()
    grads = torch.autograd.grad(out.square().sum(), [query, *ours.parameters()])
    assert all(grad.isfinite().all() for grad in grads) and grads[0][:, 1].eq(0).all()


class Sizes(TorchDispatchMode):
    """The largest floating-point result of any operator."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_matrix_without_weights(dropout):
    seqlen = 1200  # of shorter ones the CPU keeps the weights for the backward, as a constant's worth of memory
    module = MultiheadAttention(E, H, dropout=dropout, batch_first=True)
    query = torch.randn(1, seqlen, E, requires_grad=True)
    causal = ~torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    with Sizes() as sizes:
        module(query, query, query, need_weights=False)[0].sum().backward()
        module(query, query, query, need_weights=False, attn_mask=causal, is_causal=True)[0].sum().backward()
    assert sizes.largest < seqlen * seqlen


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout(need_weights):
    module = MultiheadAttention(E, H, dropout=0.4)
    query = torch.randn(S_Q, B, E)
    torch.manual_seed(2)
    first, second = (module(query, query, query, need_weights=need_weights)[0] for _ in range(2))
    torch.manual_seed(2)
    again, weights = module(query, query, query, need_weights=need_weights, average_attn_weights=False)
    assert torch.equal(first, again) and not torch.equal(first, second)
    if need_weights:  # the weights come back as they were used
        assert 0.25 < weights.eq(0).double().mean() < 0.55
    evaluated, plain = (module.eval()(query, query, query, need_weights=n)[0] for n in (need_weights, True))
    torch.testing.assert_close(evaluated, plain)
    assert not torch.allclose(first, plain)


# --------------------------------------------------------------------------------------------------------------------
# Inside torch's layers


@pytest.fixture
def fastpath():
    yield torch.backends.mha.set_fastpath_enabled
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("norm_first", [False, True])
def test_in_an_encoder_layer(norm_first, fastpath, monkeypatch):
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(E, H, batch_first=True)
    ours.self_attn.load_state_dict(theirs.self_attn.state_dict())
    calls = []
    forward = MultiheadAttention.forward
    monkeypatch.setattr(MultiheadAttention, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))

    source = torch.randn(B, S_Q, E, requires_grad=True)
    padding = masks_for("batch", S_Q, None, "bool")[1]
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S_Q)
    for kwargs in ({}, {"src_key_padding_mask": padding}, {"src_mask": causal, "is_causal": True}):
        out, expected = ours(source, **kwargs), theirs(source, **kwargs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(o.square().sum(), [source, *m.parameters()]) for o, m in ((out, ours), (expected, theirs))]  # fmt: skip
        for grad, expected_grad in zip(*grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-4)
    assert len(calls) == 3

    ours.eval(), theirs.eval()
    with torch.no_grad():  # torch's layer runs one fused operator here, and never calls its attention module
        expected = ours(source, src_key_padding_mask=padding)
        assert len(calls) == 3
        fastpath(False)
        out = ours(source, src_key_padding_mask=padding)
        assert len(calls) == 4
        torch.testing.assert_close(out[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out, theirs(source, src_key_padding_mask=padding), rtol=1e-4, atol=1e-5)


def test_in_a_decoder_layer():
    torch.manual_seed(0)
    theirs = torch.nn.TransformerDecoderLayer(E, H, 32, dropout=0.0)
    ours = copy.deepcopy(theirs)
    for name in ("self_attn", "multihead_attn"):
        setattr(ours, name, MultiheadAttention(E, H))
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    target, memory = torch.randn(S_Q, B, E), torch.randn(S_K, B, E)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S_Q)
    out, expected = (m(target, memory, tgt_mask=causal, tgt_is_causal=True) for m in (ours, theirs))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("error", "message", "shapes", "kwargs"),
    [
        (ValueError, r"query must have 2 dims \(no batch\) or 3, got \(1, 7, 3, 16\)", [(1, 7, 3, 16)] * 3, {}),
        (ValueError, r"query must have shape \(S, B, E\) with E = 16, got \(7, 3, 12\)", [(7, 3, 12)] * 3, {}),
        (ValueError, r"key must have shape \(S, B, E\) with E = 16, got \(9, 16\)", [(7, 3, 16), (9, 16), (9, 16)], {}),
        (ValueError, r"key must have shape \(S, B, E\) with B = 3 to match query, got \(9, 2, 16\)", [(7, 3, 16), (9, 2, 16), (9, 2, 16)], {}),
        (ValueError, r"value must have key's \(9, 3\) before its last dim, got \(8, 3, 16\)", [(7, 3, 16), (9, 3, 16), (8, 3, 16)], {}),
        (ValueError, r"key_padding_mask must have shape \(B, S_k\) = \(3, 9\), got \(3, 7\)", [(7, 3, 16), (9, 3, 16), (9, 3, 16)], {"key_padding_mask": torch.zeros(3, 7)}),
        (ValueError, r"key_padding_mask must have shape \(S_k,\) = \(9,\), got \(1, 9\)", [(7, 16), (9, 16), (9, 16)], {"key_padding_mask": torch.zeros(1, 9)}),
        (RuntimeError, r"attn_mask must have shape \(S_q, S_k\) = \(7, 9\) or \(B·H, S_q, S_k\) = \(12, 7, 9\), got \(3, 7, 9\)", [(7, 3, 16), (9, 3, 16), (9, 3, 16)], {"attn_mask": torch.zeros(3, 7, 9)}),
        (TypeError, "attn_mask must be bool or float, got torch.int64", [(7, 3, 16)] * 3, {"attn_mask": torch.zeros(7, 7, dtype=torch.int64)}),
        (TypeError, "key_padding_mask must be bool or float, got torch.uint8", [(7, 3, 16)] * 3, {"key_padding_mask": torch.zeros(3, 7, dtype=torch.uint8)}),
        (RuntimeError, "attn_mask must be the causal mask that is_causal=True hints at, got None", [(7, 3, 16)] * 3, {"is_causal": True}),
    ],
)  # fmt: skip
def test_refusals(error, message, shapes, kwargs):
    tensors = [torch.randn(shape) for shape in shapes]
    for need_weights in (False, True):
        with pytest.raises(error, match=f"^MultiheadAttention: {message}"):
            MultiheadAttention(16, 4)(*tensors, need_weights=need_weights, **kwargs)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.nn.MultiheadAttention(16, 4)(*tensors, **kwargs)


def test_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="MultiheadAttention: query must be a torch.Tensor, got NoneType"):
        MultiheadAttention(16, 4)(None, None, None)
    query = torch.randn(1, 1, 16)
    for name in ("attn_mask", "key_padding_mask"):
        with pytest.raises(TypeError, match=f"MultiheadAttention: {name} must be a torch.Tensor, got list"):
            MultiheadAttention(16, 4)(query, query, query, **{name: [1]})


@pytest.mark.interpret
@pytest.mark.parametrize("batch_first", [False, True])
def test_matches_torch_interpreted(batch_first, launches):
    modules = pair(batch_first=batch_first, add_bias_kv=True)
    layout = "batch" if batch_first else "seq"
    inputs = inputs_for(layout, "cross", None, None)
    attn_mask, padding = masks_for(layout, S_K, "2d-bool", "bool")
    compare(modules, inputs, need_weights=False, attn_mask=attn_mask, key_padding_mask=padding)
    assert launches.count > 0
