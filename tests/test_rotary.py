"""Rotary embedding: the kernel in the interpreter and the CPU path against float64, other people's formulas, the operator, the launch path."""

from __future__ import annotations

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
    launched_on,
    runs_as_on_cuda,
    upstream,
)

import fastattn
from fastattn import reference

LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(seqlen, rotary_dim, *batch, dtype=F32):
    angles = torch.rand(*batch, seqlen, rotary_dim // 2) * 6 - 3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def heads(*shape, kv_heads=2, dtype=F32):
    """q of a shape (…, H, D), and k with other heads."""
    return {"q": torch.randn(shape).to(dtype), "k": torch.randn(*shape[:-2], kv_heads, shape[-1]).to(dtype)}


def check(tensors, cos, sin, douts=None, **options):
    op = lambda q, k: fastattn.apply_rotary(q, k, cos, sin, **options)  # noqa: E731
    oracle = lambda q, k: reference.apply_rotary(q, k, cos, sin, **options)  # noqa: E731
    return check_op(f"rotary {tuple(tensors['q'].shape)} R={2 * cos.shape[-1]} {options}", op, oracle, tensors, douts)


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients.

# (B, S, H, D), R: whole heads of each tile, heads rotated in part, dims and programs that nothing divides, a decode step.
SHAPES = [((2, 9, 5, 64), 64), ((1, 3, 7, 128), 128), ((1, 2, 3, 256), 256), ((1, 1, 2, 512), 512), ((2, 5, 3, 128), 64), ((1, 4, 3, 80), 40),
          ((1, 3, 3, 96), 96), ((2, 3, 1, 7), 6), ((3, 1, 4, 10), 2), ((1, 2, 3, 256), 32), ((1, 1, 2, 2), 2)]  # fmt: skip


@pytest.mark.both
@DTYPES
@LAYOUTS
def test_values(interleaved, dtype):
    for shape, rotary_dim in SHAPES:
        check(heads(*shape, dtype=dtype), *tables(shape[1], rotary_dim), interleaved=interleaved)


@pytest.mark.both
@pytest.mark.parametrize("table_dtype", [F16, BF16, F32, torch.float64], ids=str)
@DTYPES
def test_any_dtype_of_tables(table_dtype, dtype):
    cos, sin = tables(5, 12, dtype=table_dtype)
    results = check(heads(1, 5, 3, 16, dtype=dtype), cos, sin)
    assert all(t.dtype == dtype for t in results.values())


@pytest.mark.both
@LAYOUTS
def test_tables_may_be_longer_or_one_a_sequence_or_shared(interleaved):
    tensors = heads(3, 4, 2, 16)
    for batch in ((), (1,), (3,)):
        check(tensors, *tables(9, 16, *batch), interleaved=interleaved)


@pytest.mark.both
@pytest.mark.parametrize("layout", ["odd row stride", "padded rows", "last dim strided", "offset by one", "transposed", "expanded rows"])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_any_layout_of_tables(layout, rotary_dim):
    cos, sin = tables(5, rotary_dim)
    check(heads(2, 5, 3, 16), INPUT_LAYOUTS[layout](cos), sin)
    check(heads(2, 5, 3, 16), cos, INPUT_LAYOUTS[layout](sin))


@pytest.mark.both
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_positions(dtype):
    cos, sin = tables(30, 16)
    positions = torch.randint(30, (2, 7)).to(dtype)
    for given in (positions, positions[:1], positions[:, :1].expand(2, 7), positions.t().contiguous().t()):
        check(heads(2, 7, 3, 16), cos, sin, positions=given)
        check(heads(2, 7, 3, 16), *tables(30, 8, 2), positions=given, interleaved=True)
    for given in (positions[0], positions.flatten()[::2]):
        check(heads(7, 3, 16), cos, sin, positions=given)


@pytest.mark.both
def test_default_positions_count_from_zero():
    cos, sin = tables(9, 16)
    for tensors, positions in ((heads(2, 9, 3, 16), torch.arange(9).expand(2, 9)), (heads(9, 3, 16), torch.arange(9))):
        got = fastattn.apply_rotary(**tensors, cos=cos, sin=sin)
        expected = fastattn.apply_rotary(**tensors, cos=cos, sin=sin, positions=positions)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


CU_SEQLENS = [[0, 9], [0, 0, 4, 4, 9], [0, 2, 3, 8], [0], [0, 0], [0, 9, 9, 9], [0, *range(1, 10)]]


@pytest.mark.both
@LAYOUTS
@pytest.mark.parametrize("ends", CU_SEQLENS, ids=str)
def test_packed_is_a_loop_of_dense(interleaved, ends):
    tensors, (cos, sin) = heads(9, 3, 16), tables(9, 16)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    packed = fastattn.apply_rotary(**tensors, cos=cos, sin=sin, cu_seqlens=cu_seqlens, interleaved=interleaved)
    for start, end in zip(ends, ends[1:]):
        one = {name: t[None, start:end] for name, t in tensors.items()}
        dense = fastattn.apply_rotary(**one, cos=cos, sin=sin, interleaved=interleaved)
        assert all(torch.equal(p[start:end], d[0]) for p, d in zip(packed, dense))
    assert all(torch.equal(p[ends[-1] :], t[ends[-1] :]) for p, t in zip(packed, tensors.values())), "tokens past the last sequence"
    check(tensors, cos, sin, cu_seqlens=cu_seqlens, interleaved=interleaved)


@pytest.mark.both
def test_many_sequences():
    ends = torch.cat([torch.zeros(1), torch.randint(0, 3, (150,)).cumsum(0)]).int()
    total = int(ends[-1]) + 2
    check(heads(total, 2, 4), *tables(3, 4), cu_seqlens=ends)


@pytest.mark.both
@LAYOUTS
@pytest.mark.parametrize("head_dim, rotary_dim", [(64, 64), (20, 8)])
def test_slices_of_one_projection_and_heads_first(interleaved, head_dim, rotary_dim):
    projected = torch.randn(2, 5, 3 + 2 + 2, head_dim).to(BF16)
    heads_first = torch.randn(2, 7, 5, head_dim).to(BF16).transpose(1, 2)
    for whole in (projected, heads_first):
        check({"q": whole[:, :, :3], "k": whole[:, :, 3:5]}, *tables(5, rotary_dim), interleaved=interleaved)
        check({"q": whole[0, :, :3], "k": whole[0, :, 3:5]}, *tables(5, rotary_dim), interleaved=interleaved)


@pytest.mark.both
@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
def test_any_input_layout(layout):
    tensors = {name: INPUT_LAYOUTS[layout](t) for name, t in heads(2, 3, 4, 16, kv_heads=4, dtype=BF16).items()}
    check(tensors, *tables(3, 16))
    check(tensors, *tables(3, 8), interleaved=True)


@pytest.mark.both
@pytest.mark.parametrize("layout", UPSTREAM_LAYOUTS)
def test_any_upstream_layout(layout):
    tensors, (cos, sin) = heads(2, 3, 4, 16), tables(3, 16)
    douts = upstream(lambda q, k: fastattn.apply_rotary(q, k, cos, sin), tensors, UPSTREAM_LAYOUTS[layout])
    check(tensors, cos, sin, douts)


@pytest.mark.both
@pytest.mark.parametrize("shape, kv_heads", [((2, 0, 3, 8), 2), ((0, 4, 3, 8), 2), ((2, 4, 0, 8), 2), ((2, 4, 3, 8), 0), ((0, 3, 8), 2)], ids=str)
def test_empty(shape, kv_heads):
    tensors, (cos, sin) = heads(*shape, kv_heads=kv_heads), tables(4, 8)
    check(tensors, cos, sin)
    if shape[-3] == 0:
        check(tensors, cos[:0], sin[:0])


@pytest.mark.both
def test_pure():
    cos, sin = tables(3, 16)
    check_pure(lambda q, k: fastattn.apply_rotary(q, k, cos, sin), heads(2, 3, 4, 16))
    check_pure(lambda q, k: fastattn.apply_rotary(q, k, cos[:, :2], sin[:, :2]), heads(2, 3, 4, 16))


@pytest.mark.both
def test_one_of_two_results_or_gradients():
    cos, sin = tables(4, 8)
    for wanted, used in (("qk", "q"), ("qk", "k"), ("q", "qk"), ("k", "q"), ("k", "qk")):
        tensors = {name: t.requires_grad_(name in wanted) for name, t in heads(1, 4, 3, 8).items()}
        results = dict(zip("qk", fastattn.apply_rotary(**tensors, cos=cos, sin=sin)))
        loss = sum(results[name].sum() for name in used)
        if loss.requires_grad:
            loss.backward()
        for name, t in tensors.items():
            if name in wanted and name in used:
                expected, _ = reference.apply_rotary(torch.ones_like(t), torch.ones_like(t), cos, sin, inverse=True)
                torch.testing.assert_close(t.grad, expected)
            else:
                assert t.grad is None or not t.grad.any()


@pytest.mark.both
def test_q_may_be_k():
    cos, sin = tables(4, 8)
    check_op("rotary of x, x", *[lambda x, f=f: f(x, x, cos, sin) for f in (fastattn.apply_rotary, reference.apply_rotary)], {"x": torch.randn(2, 4, 3, 8)})


# --------------------------------------------------------------------------------------------------------------------
# Properties, and other people's formulas.


@pytest.mark.both
@LAYOUTS
def test_inverse_undoes(interleaved):
    tensors, (cos, sin) = heads(2, 9, 3, 64), tables(9, 32)
    forth = fastattn.apply_rotary(**tensors, cos=cos, sin=sin, interleaved=interleaved)
    back = fastattn.apply_rotary(*forth, cos, sin, interleaved=interleaved, inverse=True)
    for t, same, turned in zip(tensors.values(), back, forth):
        torch.testing.assert_close(same, t, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(turned.norm(dim=-1), t.norm(dim=-1))


@pytest.mark.both
@LAYOUTS
def test_scores_depend_on_distances_alone(interleaved):
    angles = torch.arange(40.0)[:, None] * 100.0 ** -(torch.arange(8) / 8)
    x, y = torch.randn(2, 1, 1, 1, 16)
    scores = []
    for shift in (0, 7, 30):
        at = torch.tensor([[shift], [shift + 5]])
        (turned, _), (_, other) = (
            fastattn.apply_rotary(x, y, angles.cos(), angles.sin(), positions=p[None], interleaved=interleaved) for p in at
        )
        scores.append((turned * other).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-5)


@pytest.mark.both
def test_it_is_transformers_apply_rotary_pos_emb():
    """Heads first, every angle twice in tables of a batch of one."""
    q, k = torch.randn(2, 3, 9, 64), torch.randn(2, 1, 9, 64)
    cos, sin = (torch.cat([t, t], -1) for t in tables(9, 64, 1))

    def rotate_half(x):
        return torch.cat([-x[..., 32:], x[..., :32]], -1)

    got = fastattn.apply_rotary(q.transpose(1, 2), k.transpose(1, 2), cos[..., :32], sin[..., :32])
    for x, y in zip((q, k), got):
        expected = x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)
        torch.testing.assert_close(y.transpose(1, 2), expected)


@pytest.mark.both
@LAYOUTS
def test_it_is_flash_attention_s_apply_rotary_emb(interleaved):
    """Tables (S_max, R/2), of which a batch's offset says where to begin, and the dims from R on are passed on."""
    x, (cos, sin), offset = torch.randn(2, 5, 3, 32), tables(20, 24), 7

    def rotate_half(x):
        if not interleaved:
            x1, x2 = x.chunk(2, -1)
            return torch.cat((-x2, x1), -1)
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    c, s = (t[offset : offset + 5].unsqueeze(-2) for t in (cos, sin))
    c, s = (t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (c, s))
    expected = torch.cat([x[..., :24] * c + rotate_half(x[..., :24]) * s, x[..., 24:]], -1)
    positions = torch.arange(offset, offset + 5)[None]
    got, _ = fastattn.apply_rotary(x, x, cos, sin, interleaved=interleaved, positions=positions)
    torch.testing.assert_close(got, expected)


@pytest.mark.both
@pytest.mark.more
@LAYOUTS
@pytest.mark.parametrize("seqlen", [700, 1501])
def test_long_sequences(interleaved, seqlen):
    check(heads(2, seqlen, 4, 64, dtype=BF16), *tables(seqlen, 64), interleaved=interleaved)


@pytest.mark.both
@pytest.mark.more
def test_every_head_dim():
    for head_dim in range(2, 140, 3):
        for rotary_dim in {2, head_dim // 4 * 2 or 2, head_dim // 2 * 2}:
            for interleaved in (False, True):
                check(heads(1, 2, 2, head_dim, kv_heads=1, dtype=F16), *tables(2, rotary_dim), interleaved=interleaved)


@pytest.mark.interpret
@LAYOUTS
@pytest.mark.parametrize("kind", ["dense", "positions", "packed"])
def test_program_order_does_not_matter(interleaved, kind):
    from fastattn.testing.checker import assert_order_independent

    cos, sin = tables(40, 32)
    tensors = heads(40, 4, 64) if kind == "packed" else heads(2, 20, 4, 64)
    options = {
        "dense": {},
        "positions": {"positions": torch.randint(40, (2, 20))},
        "packed": {"cu_seqlens": torch.tensor([0, 13, 13, 39], dtype=torch.int32)},
    }[kind]
    assert_order_independent(lambda: fastattn.apply_rotary(**tensors, cos=cos, sin=sin, interleaved=interleaved, **options))


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile_of_the_table():
    from fastattn.kernels.rotary import rotary
    from fastattn.kernels.row_tiles import ROW_TILES
    from fastattn.testing.budget import check_budget

    for (kernel, _, head_dim), config in ROW_TILES.items():
        if kernel != "rotary":
            continue
        for interleaved in (False, True):
            tensors, (cos, sin) = heads(2, 7, 9, head_dim - 2), tables(7, head_dim - 2)
            naive = reference.apply_rotary(**tensors, cos=cos, sin=sin, interleaved=interleaved)
            ref64 = reference.apply_rotary(*(t.double() for t in tensors.values()), cos, sin, interleaved=interleaved)
            got = rotary(*tensors.values(), cos, sin, None, None, interleaved, False, config)
            for results in zip(got, naive, ref64):
                check_budget(f"rotary {head_dim}", *results)


# --------------------------------------------------------------------------------------------------------------------
# Bad input.


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_kernel_stays_in_bounds_whatever_positions_hold(dtype, launches):
    """A token whose position lies outside the tables stays as it is."""
    from fastattn.kernels.rotary import rotary

    tensors, (cos, sin) = heads(1, 9, 3, 16), tables(5, 16)
    largest = torch.iinfo(dtype).max
    positions = torch.tensor([[0, -1, 4, 5, 6, largest, -largest - 1, largest // 2, 1]]).to(dtype)
    inside = (positions[0] >= 0) & (positions[0] < 5)
    got = rotary(*tensors.values(), cos, sin, positions, None, False, False)
    expected = reference.apply_rotary(**tensors, cos=cos, sin=sin, positions=positions.clamp(0, 4))
    for y, x, right in zip(got, tensors.values(), expected):
        torch.testing.assert_close(y[:, inside], right[:, inside])
        assert torch.equal(y[:, ~inside], x[:, ~inside])
    assert launches.count > 0


@pytest.mark.interpret
@pytest.mark.parametrize(
    "ends", [[0, 100], [5, 3, 1], [-7, 4, 9], [2**31 - 1] * 3, [-(2**31)] * 4, [0, 2**31 - 1, -(2**31), 9], [9, 0, 9, 0, 9], [3, 9]], ids=str
)
def test_the_kernel_stays_in_bounds_whatever_cu_seqlens_hold(ends):
    from fastattn.kernels.rotary import rotary

    tensors, (cos, sin) = heads(9, 3, 16), tables(5, 16)
    got = rotary(*tensors.values(), cos, sin, None, torch.tensor(ends, dtype=torch.int32), False, False)
    for y, x in zip(got, tensors.values()):
        assert y.isfinite().all()
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))  # some rotation, or none


Q, K = torch.zeros(2, 5, 3, 8), torch.zeros(2, 5, 1, 8)
COS = torch.zeros(6, 4)
PACKED = dict(q=torch.zeros(5, 3, 8), k=torch.zeros(5, 1, 8))
INT32 = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=[1.0]), TypeError, r"apply_rotary: q must be a torch.Tensor, got list"),
        (dict(k=None), TypeError, r"apply_rotary: k must be a torch.Tensor, got NoneType"),
        (dict(q=Q.double()), TypeError, r"apply_rotary: q must be float16, bfloat16 or float32, got torch.float64"),
        (dict(q=Q[0, 0]), ValueError, r"apply_rotary: q must have shape \(B, S, H, D\) or packed \(T, H, D\), got \(3, 8\)"),
        (dict(q=torch.zeros(2, 5, 3, 514)), ValueError, r"apply_rotary: q must have a head_dim between 2 and 512, got 514"),
        (dict(q=Q[..., :1]), ValueError, r"apply_rotary: q must have a head_dim between 2 and 512, got 1"),
        (dict(k=K.half()), TypeError, r"apply_rotary: k must have q's dtype torch.float32, got torch.float16"),
        (dict(k=K.to("meta")), ValueError, r"apply_rotary: k must be on q's device cpu, got meta"),
        (dict(k=K[:, :4]), ValueError, r"apply_rotary: k must have shape \(B, S, H_kv, D\) to match q \(2, 5, 3, 8\), got \(2, 4, 1, 8\)"),
        (dict(k=K[..., :6]), ValueError, r"apply_rotary: k must have shape .* got \(2, 5, 1, 6\)"),
        (PACKED | dict(k=K), ValueError, r"apply_rotary: k must have shape \(T, H_kv, D\) to match q \(5, 3, 8\), got \(2, 5, 1, 8\)"),
        (dict(cos=1.0), TypeError, r"apply_rotary: cos must be a torch.Tensor, got float"),
        (dict(sin=COS.int()), TypeError, r"apply_rotary: sin must have a floating-point dtype, got torch.int32"),
        (dict(sin=COS.to("meta")), ValueError, r"apply_rotary: sin must be on q's device cpu, got meta"),
        (dict(cos=COS.clone().requires_grad_()), ValueError, r"apply_rotary: cos must not require a gradient \(none is computed\), got requires_grad=True"),
        (dict(sin=COS.clone().requires_grad_()), ValueError, r"apply_rotary: sin must not require a gradient"),
        (dict(cos=COS[0]), ValueError, r"apply_rotary: cos must have shape \(S_max, R/2\) or \(B, S_max, R/2\) with B = 2 or 1, got \(4,\)"),
        (dict(cos=COS.expand(3, 6, 4)), ValueError, r"apply_rotary: cos must have shape .* got \(3, 6, 4\)"),
        (PACKED | dict(cos=COS[None]), ValueError, r"apply_rotary: cos must have shape \(S_max, R/2\), got \(1, 6, 4\)"),
        (dict(cos=torch.zeros(6, 5)), ValueError, r"apply_rotary: cos must have a last dim R/2 between 1 and D/2 = 4, got 5"),
        (dict(cos=COS[:, :0]), ValueError, r"apply_rotary: cos must have a last dim R/2 between 1 and D/2 = 4, got 0"),
        (dict(sin=COS[:, :2]), ValueError, r"apply_rotary: sin must have cos's shape \(6, 4\), got \(6, 2\)"),
        (dict(cos=COS[:4], sin=COS[:4]), ValueError, r"apply_rotary: cos must have at least 5 rows, one a position of q, got 4"),
        (dict(positions=1), TypeError, r"apply_rotary: positions must be a torch.Tensor, got int"),
        (dict(positions=torch.zeros(2, 5)), TypeError, r"apply_rotary: positions must be an int32 or int64 tensor, got torch.float32"),
        (dict(positions=INT32), ValueError, r"apply_rotary: positions must have shape \(B, S\) = \(2, 5\), got \(2,\)"),
        (PACKED | dict(positions=INT32), ValueError, r"apply_rotary: positions must have shape \(T,\) = \(5,\), got \(2,\)"),
        (dict(positions=INT32.to("meta")), ValueError, r"apply_rotary: positions must be on q's device cpu, got meta"),
        (dict(positions=torch.full((2, 5), 6)), ValueError, r"apply_rotary: positions must lie in \[0, S_max\) = \[0, 6\), got 6"),
        (dict(positions=torch.full((2, 5), -1)), ValueError, r"apply_rotary: positions must lie in \[0, S_max\) = \[0, 6\), got -1"),
        (PACKED | dict(positions=torch.zeros(5).int(), cu_seqlens=INT32), ValueError, r"apply_rotary: positions and cu_seqlens must not be given together, got both"),
        (dict(cu_seqlens=INT32), ValueError, r"apply_rotary: cu_seqlens must be None for q \(B, S, H, D\), got cu_seqlens"),
        (PACKED | dict(cu_seqlens=INT32.long()), TypeError, r"apply_rotary: cu_seqlens must be an int32 tensor, got torch.int64"),
        (PACKED | dict(cu_seqlens=INT32[:0]), ValueError, r"apply_rotary: cu_seqlens must have shape \(B \+ 1,\), got \(0,\)"),
        (PACKED | dict(cu_seqlens=INT32 + 1), ValueError, r"apply_rotary: cu_seqlens must start at 0, got 1"),
        (PACKED | dict(cu_seqlens=torch.tensor([0, 3, 2]).int()), ValueError, r"apply_rotary: cu_seqlens must not decrease, got 3 then 2 at index 2"),
        (PACKED | dict(cu_seqlens=torch.tensor([0, 3, 6]).int()), ValueError, r"apply_rotary: cu_seqlens must end within q's 5 packed tokens, got 6"),
        (PACKED | dict(cu_seqlens=torch.tensor([0, 3]).int(), cos=COS[:2], sin=COS[:2]), ValueError, r"apply_rotary: cu_seqlens must hold lengths of at most S_max = 2, got 3 at index 0"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        fastattn.apply_rotary(**dict(q=Q, k=K, cos=COS, sin=COS) | change)


def test_tables_may_require_a_gradient_where_none_is_recorded():
    with torch.no_grad():
        fastattn.apply_rotary(Q, K, COS.clone().requires_grad_(), COS)


# --------------------------------------------------------------------------------------------------------------------
# The operator.


@pytest.mark.both
@LAYOUTS
def test_operator(interleaved):
    q, k = heads(2, 5, 3, 16, dtype=BF16).values()
    cos, sin = tables(6, 12)
    check_operator(torch.ops.fastattn.rotary, q, k, cos, sin, None, None, interleaved, False)
    check_operator(torch.ops.fastattn.rotary, q.transpose(0, 1), k.transpose(0, 1), cos, sin, torch.zeros(5, 2).int(), None, interleaved, True)
    packed = (t.flatten(0, 1) for t in (q, k))
    check_operator(torch.ops.fastattn.rotary, *packed, cos, sin, None, torch.tensor([0, 4, 9]).int(), interleaved, False)


@pytest.mark.both
@LAYOUTS
def test_a_gradient_of_a_gradient_is_right(interleaved):
    """The op is linear, so its backward is itself, and can be differentiated as often as one likes."""
    tensors, (cos, sin) = heads(1, 4, 3, 8), tables(4, 6)

    def penalty_gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors.values()]
        loss = sum(t.pow(3).sum() for t in function(*leaves, cos, sin, interleaved=interleaved))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(t.pow(2).sum() for t in grads), leaves)

    for got, expected in zip(penalty_gradients(fastattn.apply_rotary, F32), penalty_gradients(reference.apply_rotary, torch.float64)):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.both
def test_forward_mode_raises():
    cos, sin = tables(4, 8)
    for name, t in heads(1, 4, 3, 8).items():
        fixed = heads(1, 4, 3, 8)
        with pytest.raises(NotImplementedError, match="fastattn.apply_rotary: forward-mode AD is not supported"):
            torch.func.jvp(lambda t, name=name, fixed=fixed: fastattn.apply_rotary(**fixed | {name: t}, cos=cos, sin=sin), (t,), (t,))


@LAYOUTS
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(interleaved, dynamic):
    cos, sin = tables(6, 12)

    def op(q, k, **options):
        return fastattn.apply_rotary(q, k, cos, sin, interleaved=interleaved, **options)

    check_compiled(op, heads(2, 5, 3, 16), dynamic)
    check_compiled(op, heads(2, 5, 3, 16) | {"positions": torch.randint(6, (2, 5))}, dynamic)
    check_compiled(op, heads(5, 3, 16) | {"cu_seqlens": torch.tensor([0, 2, 4]).int()}, dynamic)


def test_compiled_with_one_result_or_one_tensor():
    cos, sin = tables(6, 12)
    check_compiled(lambda q, k: fastattn.apply_rotary(q, k, cos, sin)[0], {"q": torch.randn(2, 5, 3, 16), "k": torch.arange(480.0).view(2, 5, 3, 16)})
    check_compiled(lambda x: fastattn.apply_rotary(x, x, cos, cos), {"x": torch.randn(2, 5, 3, 16)})


@pytest.mark.interpret
def test_compiled_is_eager_on_the_kernel():
    cos, sin = tables(6, 12)
    check_compiled(lambda q, k: fastattn.apply_rotary(q, k, cos, sin), heads(2, 5, 3, 16), backend="aot_eager")


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "rotary")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_is_one_launch_and_never_syncs(as_on_cuda, capability):
    q, k = heads(2, 5, 3, 64, dtype=BF16).values()
    cos, sin = tables(9, 64)

    def call():
        for options in ((None, None), (torch.zeros(2, 5, dtype=torch.int64), None)):
            as_on_cuda._rotary(q, k, cos, sin, *options, False, False)
        as_on_cuda._rotary(q[0], k[0], cos, sin, None, INT32, True, True)

    assert [launch.name for launch in launched_on(capability, call)] == ["_rotary_kernel"] * 3


def test_lengths_and_head_counts_choose_no_variant(as_on_cuda):
    from fastattn.kernels.rotary import _rotary_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for batch, seqlen, num_heads, kv_heads in ((1, 1, 1, 1), (2, 16, 8, 2), (3, 15, 32, 8), (16, 1, 16, 16)):
            q, k = heads(batch, seqlen, num_heads, 64, kv_heads=kv_heads, dtype=BF16).values()
            as_on_cuda._rotary(q, k, *tables(seqlen + 3, 64), None, None, False, False)
            projected = torch.zeros(batch, seqlen, num_heads + 2 * kv_heads, 64, dtype=BF16)
            as_on_cuda._rotary(projected[:, :, :num_heads], projected[:, :, num_heads : num_heads + kv_heads], *tables(seqlen, 64), None, None, False, False)
        assert compiled_variants(_rotary_kernel) == 1
