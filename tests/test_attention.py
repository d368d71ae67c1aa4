"""The attention kernels in Triton's interpreter: values and every gradient against float64, properties, hostile inputs.

Each interpreted launch runs under the bounds and race checker (tests/conftest.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import pytest
import torch
from attention_cases import BF16, F16, F32, FEATURES, VALUES, Case, check, run

import fastattn
from fastattn.reference import attention as reference
from fastattn.testing.budget import check_budget

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.interpret

@pytest.mark.parametrize("case", VALUES, ids=str)
def test_values(case):
    check(case)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features(case):
    check(case)


@pytest.mark.more
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_every_feature_in_every_dtype(case, dtype):
    check(dataclasses.replace(case, dtype=dtype))


@st.composite
def cases(draw, longest: int = 100):
    H_kv = draw(st.integers(1, 2))
    S_q, S_k = draw(st.integers(0, longest)), draw(st.integers(0, longest))
    B, H = draw(st.integers(1, 2)), H_kv * draw(st.integers(1, 3))
    bias_dims = [st.sampled_from((1, size)) for size in (B, H, S_q, S_k)]
    bound = st.one_of(st.none(), st.integers(-1, longest + 10))
    options = dict(causal=draw(st.booleans()), window=draw(st.tuples(bound, bound)))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from((0.3, 2.0, 30.0)))
    if draw(st.booleans()):
        options["dropout_p"] = draw(st.sampled_from((0.1, 0.5, 0.99)))
    return Case(
        B=B, S_q=S_q, S_k=S_k, H=H, H_kv=H_kv, D=draw(st.integers(1, 72)), D_v=draw(st.integers(1, 72)),
        dtype=draw(st.sampled_from((F16, BF16, F32))),
        bias=draw(st.one_of(st.none(), st.tuples(*bias_dims))),
        slopes=draw(st.booleans()), sinks=draw(st.booleans()), options=options,
    )  # fmt: skip


@hypothesis.given(cases())
@hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_shape_and_options(case):
    torch.manual_seed(0)
    check(case)


@pytest.mark.more
@hypothesis.given(cases(longest=300))
@hypothesis.settings(max_examples=50, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_shape_and_options_at_length(case):
    torch.manual_seed(0)
    check(case)


# --------------------------------------------------------------------------------------------------------------------
# Every path through the kernels, whatever the table picks for the interpreter.


def _launch_both(q, k, v, dout, options, forward_config, backward_configs):
    from fastattn.kernels.attention import attention_fwd
    from fastattn.kernels.attention_bwd import attention_bwd

    nothing = [None] * 6
    out, lse = attention_fwd(q, k, v, *nothing, *options, config=forward_config)
    dq, dk, dv, _, _ = attention_bwd(
        dout, None, q, k, v, *nothing, out, lse, *options, False, configs=backward_configs
    )
    return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (40, 0), (30, 20)], ids=str)
@pytest.mark.parametrize("overlap,split", [(False, False), (True, True)], ids=["in-order-together", "overlap-split"])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_every_path_of_the_kernels(tma, overlap, split, window):
    from fastattn.kernels.tiles import Config

    S_q, S_k, D, dtype = 90, 115, 32, F16
    q, k, v = (torch.randn(1, S, H, D).to(dtype) for S, H in ((S_q, 2), (S_k, 1), (S_k, 1)))
    dout = torch.randn(1, S_q, 2, D).to(dtype)
    options = (S_q, S_k, *window, 1 / math.sqrt(D), 0.0, 0.0)
    tile = Config(32, 16, 4, 2, tma=tma, overlap=overlap, split=split)
    backward = {"attention_bwd_dkdv": dataclasses.replace(tile, BLOCK_M=16, BLOCK_N=32), "attention_bwd_dq": tile}
    got = _launch_both(q, k, v, dout, options, tile, backward)
    tensors = dict(q=q, k=k, v=v)
    truth, naive = (run(reference, tensors, {}, dt, dout, None, window=window) for dt in (torch.float64, dtype))
    for name in got:
        check_budget(f"attention {name}", got[name], naive[name], truth[name])


def _distinct_tiles() -> list:
    if importlib.util.find_spec("triton") is None:
        return []
    from fastattn.kernels.tiles import TILES

    return sorted({(kernel, config) for (kernel, *_), config in TILES.items()}, key=str)


@pytest.mark.more
@pytest.mark.parametrize("kernel,config", _distinct_tiles(), ids=str)
def test_every_tile_of_the_table(kernel, config):
    """Whatever part and dtype a tile is for, its values are right: two heads, ragged ends, causal."""
    q, k, v = (torch.randn(1, S, H, 16).half() for S, H in ((45, 2), (61, 1), (61, 1)))
    dout = torch.randn(1, 45, 2, 16).half()
    forward, backward = (config, {}) if kernel == "attention_fwd" else (None, {kernel: config})
    got = _launch_both(q, k, v, dout, (45, 61, None, 0, 0.25, 0.0, 0.0), forward, backward)
    tensors = dict(q=q, k=k, v=v)
    truth, naive = (run(reference, tensors, {}, dt, dout, None, causal=True) for dt in (torch.float64, F16))
    for name in got:
        check_budget(f"attention {name}", got[name], naive[name], truth[name])


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_program_order_does_not_matter(order):
    from fastattn.testing.checker import checked_launches

    case = Case(B=2, S_q=150, S_k=170, H=2, H_kv=1, D=32, D_v=32, bias=(1, 2, 150, 170), sinks=True)
    tensors = case.tensors()
    dout, dlse = torch.randn(2, 150, 2, 32), torch.randn(2, 2, 150)
    expected = run(fastattn.attention, tensors, {}, case.dtype, dout, dlse, causal=True)
    with checked_launches(order=order) as record:
        got = run(fastattn.attention, tensors, {}, case.dtype, dout, dlse, causal=True)
    assert record.count > 0
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


# --------------------------------------------------------------------------------------------------------------------
# Packed sequences.


def _cu(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("with_bounds", [True, False], ids=["max_seqlen", "no-max_seqlen"])
@pytest.mark.parametrize(
    "options", [dict(causal=True), dict(window=(9, 3)), dict(softcap=2.0)], ids=["causal", "window", "softcap"]
)
def test_packed_is_a_loop_of_dense(options, with_bounds):
    lengths_q, lengths_k = (37, 0, 130, 1), (37, 20, 150, 0)
    tail = 3  # rows past cu_seqlens[-1] belong to no sequence
    tensors = dict(
        q=torch.randn(sum(lengths_q) + tail, 4, 32),
        k=torch.randn(sum(lengths_k) + tail, 2, 32),
        v=torch.randn(sum(lengths_k) + tail, 2, 24),
        sinks=torch.randn(4),
    )
    dout, dlse = torch.randn(sum(lengths_q) + tail, 4, 24), torch.randn(4, sum(lengths_q) + tail)
    cu_q, cu_k = _cu(lengths_q), _cu(lengths_k)
    bounds = dict(max_seqlen_q=130, max_seqlen_k=150) if with_bounds else {}
    packed = run(
        fastattn.attention, tensors, dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k), F32, dout, dlse, **options, **bounds
    )
    dsinks = torch.zeros(4)
    for b in range(len(lengths_q)):
        rows_q, rows_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = dict(q=tensors["q"][None, rows_q], k=tensors["k"][None, rows_k], v=tensors["v"][None, rows_k])
        dense = run(
            fastattn.attention, one | dict(sinks=tensors["sinks"]), {}, F32, dout[None, rows_q], dlse[None, :, rows_q], **options
        )
        for name, rows in (("out", rows_q), ("dq", rows_q), ("dk", rows_k), ("dv", rows_k)):
            torch.testing.assert_close(packed[name][rows], dense[name][0], rtol=0, atol=1e-6, msg=f"{name} of sequence {b}")
        torch.testing.assert_close(packed["lse"][:, rows_q], dense["lse"][0], rtol=0, atol=1e-6)
        dsinks += dense["dsinks"]
    torch.testing.assert_close(packed["dsinks"], dsinks, rtol=1e-5, atol=1e-5)
    assert not packed["out"][-tail:].any() and not packed["dq"][-tail:].any()
    assert not packed["dk"][-tail:].any() and not packed["dv"][-tail:].any()
    assert (packed["lse"][:, -tail:] == float("-inf")).all()


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_an_empty_last_sequence_reads_nothing(sinks):
    """Nothing lies behind the last key here, and a NaN lies behind the empty sequence in the middle."""
    q, k, v = torch.randn(42, 1, 32).half(), torch.randn(70, 1, 32).half(), torch.randn(70, 1, 32).half()
    v[40] = float("nan")
    bounds = dict(cu_seqlens_q=_cu((40, 1, 0, 1)), cu_seqlens_k=_cu((40, 0, 30, 0)))
    out, lse = fastattn.attention(q, k, v, sinks=torch.zeros(1) if sinks else None, **bounds, return_lse=True)
    assert out[:40].isfinite().all() and not out[40:].any()
    assert (lse[:, 40:] == (0.0 if sinks else float("-inf"))).all()


@pytest.mark.parametrize("shape", [(1, 4, 40, 50), (3, 1, 40, 50), (1, 4, 1, 50)], ids=str)
def test_packed_bias_is_indexed_inside_each_sequence(shape):
    lengths_q, lengths_k = (40, 7, 25), (50, 31, 1)
    cu = dict(cu_seqlens_q=_cu(lengths_q), cu_seqlens_k=_cu(lengths_k))
    tensors = dict(
        q=torch.randn(72, 4, 16), k=torch.randn(82, 4, 16), v=torch.randn(82, 4, 16), attn_bias=torch.randn(shape)
    )
    cu["alibi_slopes"] = torch.rand(3, 4)
    dout, dlse = torch.randn(72, 4, 16), torch.randn(4, 72)
    options = dict(max_seqlen_q=40, max_seqlen_k=50, causal=True)
    got = run(fastattn.attention, tensors, cu, F32, dout, dlse, **options)
    truth, naive = (run(reference, tensors, cu, dt, dout, dlse, **options) for dt in (torch.float64, F32))
    for name in got:
        check_budget(f"attention packed bias {name}", got[name], naive[name], truth[name])


@pytest.mark.parametrize(
    "values", [(0, 500, 10), (-5, 20, 40), (0, 2**31 - 1, -(2**31)), (30, 10, 0)], ids=str
)
def test_hostile_cu_seqlens_stay_in_bounds(values):
    """Below the value check: the launchers themselves clamp. The autouse checker refuses any access outside the tensors."""
    from fastattn.kernels.attention import attention_fwd
    from fastattn.kernels.attention_bwd import attention_bwd
    from fastattn.testing.checker import checked_launches

    cu = torch.tensor(values, dtype=torch.int32)
    q, k, v = (torch.randn(40, 2, 16) for _ in range(3))
    args = (None, None, None, None, cu, cu)
    options = (40, 40, None, 0, 0.25, 0.0, 0.0)
    with checked_launches():
        out, lse = attention_fwd(q, k, v, *args, *options)
        attention_bwd(torch.ones_like(out), None, q, k, v, *args, out, lse, *options, False)


# --------------------------------------------------------------------------------------------------------------------
# Properties, conventions, layouts.


def test_window_as_long_as_the_sequence_is_causal():
    q, k, v = (torch.randn(1, 150, 2, 32) for _ in range(3))
    assert torch.equal(fastattn.attention(q, k, v, window=(150, 0)), fastattn.attention(q, k, v, causal=True))


def test_grouped_heads_equal_repeated_heads():
    q, k, v = torch.randn(1, 70, 6, 32), torch.randn(1, 80, 2, 32), torch.randn(1, 80, 2, 32)
    repeated = fastattn.attention(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), causal=True)
    assert torch.equal(fastattn.attention(q, k, v, causal=True), repeated)


def test_a_common_offset_of_the_scores_changes_nothing_but_the_lse():
    q, k, v = (torch.randn(1, 60, 2, 32) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    shifted, shifted_lse = fastattn.attention(q, k, v, attn_bias=torch.full((1,), 1e4), return_lse=True)
    torch.testing.assert_close(shifted, out, rtol=0, atol=2e-3)  # scores near 1e4 keep 2^-10 of absolute precision
    torch.testing.assert_close(shifted_lse, lse + 1e4, rtol=1e-6, atol=0)


def test_rows_without_keys():
    q, k, v = (torch.randn(1, S, 2, 16, requires_grad=True) for S in (20, 8, 8))
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)  # rows 0 to 11 come before the first key
    assert not out[:, :12].any() and (lse[..., :12] == float("-inf")).all() and lse[..., 12:].isfinite().all()
    (out.sum() + lse[..., 12:].sum()).backward()
    assert not q.grad[:, :12].any() and all(t.grad.isfinite().all() for t in (q, k, v))


def test_rows_without_keys_do_not_read_a_nan_value():
    q, k = torch.randn(1, 20, 1, 16), torch.randn(1, 8, 1, 16)
    v = torch.full((1, 8, 1, 16), float("nan"))
    assert not fastattn.attention(q, k, v, causal=True)[:, :12].any()


def test_rows_without_keys_beside_others_do_not_read_a_nan_value():
    q, k = torch.randn(1, 20, 1, 16), torch.randn(1, 8, 1, 16)
    v = torch.full((1, 8, 1, 16), float("nan"))
    out = fastattn.attention(q, k, v, causal=True, sinks=torch.zeros(1))
    assert not out[:, :12].any() and out[:, 12:].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_rows_without_keys_take_no_gradient_of_their_lse(bad):
    """logaddexp of two such rows' LSEs, as in merging attention states, has a NaN for gradient."""
    q, k, v = (torch.randn(1, S, 1, 16, requires_grad=True) for S in (8, 4, 4))
    sinks = torch.full((1,), float("-inf"), requires_grad=True)
    _, lse = fastattn.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    lse.backward(torch.where(lse == float("-inf"), bad, 1.0))
    assert all(t.grad.isfinite().all() for t in (q, k, v, sinks)) and k.grad.any()


def test_a_finite_bias_stays_finite():
    """Masks made of finfo.min say the same of every key in a row of padding: the mean of the values, not an empty row."""
    q, k, v = (torch.randn(1, 12, 1, 16) for _ in range(3))
    bias = torch.zeros(12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), torch.finfo(F32).min)
    bias[:3] = torch.finfo(F32).min
    out, lse = fastattn.attention(q, k, v, attn_bias=bias, return_lse=True)
    torch.testing.assert_close(out, reference(q, k, v, attn_bias=bias), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, :3], v.mean(1, keepdim=True).expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-5)
    assert lse.isfinite().all()


def test_rows_without_keys_have_the_sink_as_lse():
    q, k, v = torch.randn(1, 6, 2, 16), torch.randn(1, 0, 2, 16), torch.randn(1, 0, 2, 16)
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True)
    assert not out.any()
    torch.testing.assert_close(lse, sinks.detach()[None, :, None].expand(1, 2, 6))
    lse.sum().backward()
    torch.testing.assert_close(sinks.grad, torch.full((2,), 6.0))


def test_a_bool_mask_may_hide_everything():
    q, k, v = (torch.randn(1, 10, 1, 16) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, attn_bias=torch.zeros(10, 10, dtype=torch.bool), return_lse=True)
    assert not out.any() and (lse == float("-inf")).all()


def test_the_lse_alone():
    q, k, v = (torch.randn(1, 50, 2, 16, requires_grad=True) for _ in range(3))
    _, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    lse.sum().backward()
    assert not v.grad.any() and q.grad.any() and k.grad.any()


@pytest.mark.parametrize("B,S_q,S_k", [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (1, 1, 1)], ids=str)
def test_empty_and_single(B, S_q, S_k):
    check(Case(B=B, S_q=S_q, S_k=S_k, D=16, D_v=16, dtype=F32, sinks=True, bias=(1, 2, 1, S_k)))


def test_dropout_is_the_same_in_forward_and_backward_and_reproducible():
    check(Case(S_q=70, S_k=70, options=dict(dropout_p=0.5), lse_grad=False))
    q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
    torch.manual_seed(3)
    first = fastattn.attention(q, k, v, dropout_p=0.5)
    second = fastattn.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(fastattn.attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def _layouts():
    """Views of one (1, 40, 2, 16) tensor, by name: each has a contiguous last dim and awkward strides elsewhere."""
    def padded(x):
        buffer = torch.full((1, 44, 4, 24), float("nan"), dtype=x.dtype)
        view = buffer[:, 2:42, 1:3, 5:21]  # NaN on every side: a read outside the view shows
        return view.copy_(x)

    return {
        "heads-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "padded-odd": padded,
        "expanded-batch": lambda x: x.expand(2, -1, -1, -1),
        "expanded-heads": lambda x: x[:, :, :1].expand(-1, -1, 2, -1),
    }


@pytest.mark.parametrize("layout", list(_layouts()))
def test_strides(layout):
    view = _layouts()[layout]
    q, k, v = (view(torch.randn(1, 40, 2, 16).half()) for _ in range(3))
    expected = fastattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    torch.testing.assert_close(fastattn.attention(q, k, v, causal=True), expected, rtol=0, atol=1e-3)


def test_upstream_gradients_may_be_expanded_or_transposed():
    q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
    weight = torch.randn(1, 16, 2, 40)
    for of in (lambda out: out.sum(), lambda out: (out.transpose(1, 3) * weight).sum()):
        grads = torch.autograd.grad(of(fastattn.attention(q, k, v, causal=True)), (q, k, v))
        expected = torch.autograd.grad(of(reference(q, k, v, causal=True)), (q, k, v))
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_offsets_past_2_31_elements():
    """Rows that lie more than 2^31 elements apart, in a sparse allocation that is never touched elsewhere."""
    from fastattn.kernels.attention import attention_fwd
    from fastattn.kernels.attention_bwd import attention_bwd

    stride = 2**30 + 8
    storage = torch.UntypedStorage(2 * (3 * stride + 16))  # reserved, not filled: pages appear where rows are written
    k = torch.empty(0, dtype=F16).set_(storage, 0, (1, 4, 1, 16), (4 * stride, stride, 16, 1))
    k.copy_(torch.randn(1, 4, 1, 16))
    q = torch.randn(1, 4, 1, 16).half()
    options = (4, 4, None, None, 0.25, 0.0, 0.0)
    got, _ = attention_fwd(q, k, k, *[None] * 6, *options)
    expected, lse = attention_fwd(q, k.contiguous(), k.contiguous(), *[None] * 6, *options)
    assert torch.equal(got, expected)

    stride = 2**28 + 8  # the upstream gradient may have any strides, its columns' included
    storage = torch.UntypedStorage(2 * (16 * stride + 16))
    dout = torch.empty(0, dtype=F16).set_(storage, 0, (1, 4, 1, 16), (64, 16, 16, stride))
    dout.copy_(torch.randn(1, 4, 1, 16))
    args = q, k.contiguous(), k.contiguous(), *[None] * 6, expected, lse, *options, False
    for got, want in zip(attention_bwd(dout, None, *args), attention_bwd(dout.contiguous(), None, *args), strict=True):
        assert want is None or torch.equal(got, want)
