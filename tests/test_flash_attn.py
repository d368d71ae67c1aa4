"""The flash-attn face: names and signatures, results against fastattn.attention and the reference, and the padding helpers."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

import fastattn
from fastattn import flash_attn, reference
from fastattn.flash_attn import bert_padding
from fastattn.testing.budget import check_budget

OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": (["q", "k", "v"], OPTIONS),
    "flash_attn_kvpacked_func": (["q", "kv"], OPTIONS),
    "flash_attn_qkvpacked_func": (["qkv"], OPTIONS),
    "flash_attn_varlen_func": (["q", "k", "v", *LENGTHS], OPTIONS | {"block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *LENGTHS], OPTIONS),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_attn_2_8s(name):
    tensors, options = SIGNATURES[name]
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == [*tensors, *options]
    assert {p.name: p.default for p in parameters.values() if p.default is not p.empty} == options
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


def dense(batch=2, seqlen_q=9, seqlen_k=13, heads=4, kv_heads=2, head_dim=8, value_dim=None, dtype=torch.float32):
    shapes = [(batch, seqlen_q, heads, head_dim), (batch, seqlen_k, kv_heads, head_dim), (batch, seqlen_k, kv_heads, value_dim or head_dim)]  # fmt: skip
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def packed(lengths_q=(5, 0, 3, 9), lengths_k=(4, 6, 3, 11), heads=4, kv_heads=2, head_dim=8, dtype=torch.float32):
    """q, k, v and (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), with two tokens past the last sequence."""
    shapes = [(sum(lengths_q) + 2, heads), (sum(lengths_k) + 2, kv_heads), (sum(lengths_k) + 2, kv_heads)]
    tensors = [torch.randn(*shape, head_dim).to(dtype).requires_grad_() for shape in shapes]
    cu_seqlens = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    return tensors, (*cu_seqlens, max(lengths_q), max(lengths_k))


SETTINGS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "left-window-causal": {"causal": True, "window_size": (3, -1)},
    "none-window": {"window_size": (None, 1)},
    "scale-softcap": {"softmax_scale": 0.7, "softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]), "causal": True},
}


def as_reference(settings):
    settings = dict(settings)
    return {"window": settings.pop("window_size", (-1, -1)), **settings}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_results_and_gradients(layout, settings, dtype):
    settings = SETTINGS[settings]
    tensors, lengths = (dense(dtype=dtype), ()) if layout == "dense" else packed(dtype=dtype)
    function = flash_attn.flash_attn_func if layout == "dense" else flash_attn.flash_attn_varlen_func
    names = dict(zip(LENGTHS, lengths, strict=False))
    out, lse, mask = function(*tensors, *lengths, **settings, return_attn_probs=True)
    assert mask is None and lse.dtype == torch.float32
    assert torch.equal(out, function(*tensors, *lengths, **settings))
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    naive = reference.attention(*tensors, **names, **as_reference(settings), return_lse=True)
    ref64 = reference.attention(*doubles, **names, **as_reference(settings), return_lse=True)
    check_budget("flash_attn out", out, naive[0], ref64[0])
    check_budget("flash_attn lse", lse, naive[1], ref64[1])
    upstream = torch.randn(out.shape)
    grads = [
        torch.autograd.grad(o, leaves, upstream.to(o.dtype))
        for o, leaves in ((out, tensors), (naive[0], tensors), (ref64[0], doubles))
    ]
    for name, *results in zip(("dq", "dk", "dv"), *grads, strict=True):
        check_budget(f"flash_attn {name}", *results)


def test_positional_order():
    q, k, v = dense()
    slopes = torch.rand(4)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, True, (4, 0), 1.5, slopes, True, True)
    expected = fastattn.attention(
        q, k, v, causal=True, window=(4, 0), softmax_scale=0.3, softcap=1.5, alibi_slopes=slopes, return_lse=True
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("name", SIGNATURES)
def test_deterministic_is_passed_on(name, monkeypatch):
    seen = []
    monkeypatch.setattr(flash_attn, "attention", lambda *args, deterministic, **options: seen.append(deterministic))
    lengths = packed()[1]
    tensors = {
        "q": torch.zeros(7, 4, 8), "k": torch.zeros(7, 4, 8), "v": torch.zeros(7, 4, 8), "kv": torch.zeros(7, 2, 4, 8),
        "qkv": torch.zeros(7, 3, 4, 8), "cu_seqlens": lengths[0], "max_seqlen": 9, **dict(zip(LENGTHS, lengths, strict=True)),
    }  # fmt: skip
    if "varlen" not in name:
        tensors = {arg: t[None] if isinstance(t, torch.Tensor) else t for arg, t in tensors.items()}
    args = [tensors[arg] for arg in SIGNATURES[name][0]]
    getattr(flash_attn, name)(*args)
    getattr(flash_attn, name)(*args, deterministic=True)
    assert seen == [False, True]


def test_window_size_takes_0d_tensors():
    q, k, v = dense()
    out = flash_attn.flash_attn_func(q, k, v, window_size=(torch.tensor(3), torch.tensor(-1)))
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v, window_size=(3, -1)))


def test_lse_convention():
    """Causal with more queries than keys: the first rows see nothing. Output 0, LSE −inf (flash-attn 2 says +inf)."""
    q, k, v = dense(seqlen_q=5, seqlen_k=3)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert lse.shape == (2, 4, 5) and lse[..., :2].eq(-torch.inf).all() and lse[..., 2:].isfinite().all()
    assert out[:, :2].eq(0).all()


@pytest.mark.parametrize("settings", [{}, {"causal": True, "softcap": 3.0}], ids=["plain", "causal-softcap"])
def test_packed_variants(settings):
    def check(packed_out, packed_leaf, out, leaves, dim):
        assert torch.equal(packed_out, out)
        upstream = torch.randn(out.shape)
        grads = torch.autograd.grad(out, leaves, upstream)
        *rest, grad = torch.autograd.grad(packed_out, packed_leaf, upstream)
        assert torch.equal(grad, torch.stack(grads[len(rest) :], dim=dim))
        assert all(torch.equal(a, b) for a, b in zip(rest, grads, strict=False))

    q, k, v = dense(seqlen_q=13, kv_heads=4)
    qkv, kv = (torch.stack(ts, dim=2).detach().requires_grad_() for ts in ((q, k, v), (k, v)))
    out = flash_attn.flash_attn_func(q, k, v, **settings)
    check(flash_attn.flash_attn_qkvpacked_func(qkv, **settings), [qkv], out, (q, k, v), 2)
    out = flash_attn.flash_attn_func(q, k, v, **settings)
    check(flash_attn.flash_attn_kvpacked_func(q, kv, **settings), [q, kv], out, (q, k, v), 2)

    (q, k, v), lengths = packed(lengths_q=(5, 0, 7), lengths_k=(5, 0, 7), kv_heads=4)
    qkv, kv = (torch.stack(ts, dim=1).detach().requires_grad_() for ts in ((q, k, v), (k, v)))
    out = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **settings)
    short = (lengths[0], lengths[2])
    check(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, *short, **settings), [qkv], out, (q, k, v), 1)
    out = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **settings)
    check(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *lengths, **settings), [q, kv], out, (q, k, v), 1)


# --------------------------------------------------------------------------------------------------------------------
# Dropout and S_dmask


@pytest.mark.parametrize("settings", ["plain", "left-window-causal", "scale-softcap", "alibi"])
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_s_dmask_is_the_mask_that_was_used(layout, settings):
    settings, dropout_p = SETTINGS[settings], 0.375  # one that the CPU's 16 bits hold exactly
    tensors, lengths = (dense(), ()) if layout == "dense" else packed()
    function = flash_attn.flash_attn_func if layout == "dense" else flash_attn.flash_attn_varlen_func
    names = dict(zip(LENGTHS, lengths, strict=False))
    torch.manual_seed(11)
    out, lse, mask = function(*tensors, *lengths, dropout_p=dropout_p, **settings, return_attn_probs=True)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(out, function(*tensors, *lengths, dropout_p=dropout_p, **settings))
    assert torch.equal(after, torch.get_rng_state())  # asking for the mask draws nothing more

    assert mask.shape == ((2, 4, 9, 13) if layout == "dense" else (4, 4, 9, 11))
    assert mask.dtype == tensors[0].dtype and not mask.requires_grad
    dropped = (mask < 0).sum() / (mask != 0).sum()
    assert 0.3 < dropped < 0.5
    doubles = [t.detach().double() for t in tensors]
    options = {**names, **as_reference(settings), "dropout_p": dropout_p, "dropout_keep": mask >= 0, "return_lse": True}
    naive, ref64 = reference.attention(*tensors, **options), reference.attention(*doubles, **options)
    check_budget("flash_attn dropout out", out, naive[0], ref64[0])
    check_budget("flash_attn dropout lse", lse, naive[1], ref64[1])
    if layout == "dense":  # rows sum to one before dropout, where they see a key
        rows = mask.abs().sum(-1)
        torch.testing.assert_close(rows, (lse > -torch.inf).float())
        kept = mask.clamp(min=0) / (1 - dropout_p)
        torch.testing.assert_close(out, (kept @ tensors[2].transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2))
    else:
        lengths_q, lengths_k = lengths[0].diff(), lengths[1].diff()
        for b in range(4):
            assert mask[b, :, lengths_q[b] :].eq(0).all() and mask[b, :, :, lengths_k[b] :].eq(0).all()
            sequence = slice(lengths[0][b], lengths[0][b + 1])
            rows = mask[b, :, : lengths_q[b]].abs().sum(-1)
            torch.testing.assert_close(rows, (lse[:, sequence] > -torch.inf).float())


def test_packed_variants_return_s_dmask():
    q, k, v = dense(seqlen_q=13, kv_heads=4)
    torch.manual_seed(0)
    expected = flash_attn.flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
    for function, args in (
        (flash_attn.flash_attn_qkvpacked_func, [torch.stack((q, k, v), dim=2)]),
        (flash_attn.flash_attn_kvpacked_func, [q, torch.stack((k, v), dim=2)]),
    ):
        torch.manual_seed(0)
        results = function(*args, 0.3, return_attn_probs=True)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("name", "tensors", "error", "message"),
    [
        ("flash_attn_qkvpacked_func", [torch.zeros(2, 5, 2, 4, 8)], ValueError, r"qkv must have shape \(B, S, 3, H, D\), got \(2, 5, 2, 4, 8\)"),
        ("flash_attn_qkvpacked_func", [torch.zeros(5, 3, 4, 8)], ValueError, r"qkv must have shape \(B, S, 3, H, D\), got \(5, 3, 4, 8\)"),
        ("flash_attn_qkvpacked_func", [None], TypeError, "qkv must be a torch.Tensor, got NoneType"),
        ("flash_attn_kvpacked_func", [torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 3, 4, 8)], ValueError, r"kv must have shape \(B, S_k, 2, H_kv, D\), got \(2, 5, 3, 4, 8\)"),
        ("flash_attn_varlen_qkvpacked_func", [torch.zeros(2, 5, 3, 4, 8), None, 5], ValueError, r"qkv must have shape \(T, 3, H, D\)"),
        ("flash_attn_varlen_kvpacked_func", [torch.zeros(5, 4, 8), torch.zeros(5, 4, 8), None, None, 5, 5], ValueError, r"kv must have shape \(T_k, 2, H_kv, D\), got \(5, 4, 8\)"),
        ("flash_attn_varlen_func", [torch.zeros(5, 4, 8)] * 3 + [None, None, 5, 5], TypeError, "cu_seqlens_q must be a torch.Tensor, got NoneType"),
    ],
)  # fmt: skip
def test_bad_layouts(name, tensors, error, message):
    with pytest.raises(error, match=f"^{name}: {message}"):
        getattr(flash_attn, name)(*tensors)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "q must be float16, bfloat16 or float32, got torch.int64", {"q": torch.zeros(2, 9, 4, 8, dtype=torch.int64)}),
        (TypeError, "k must have q's dtype torch.float32, got torch.float16", {"k": torch.zeros(2, 13, 2, 8, dtype=torch.float16)}),
        (ValueError, r"q must have shape \(B, S, H, D\)", {"q": torch.zeros(9, 4, 8)}),
        (ValueError, r"k must have shape .* with D = 8", {"k": torch.zeros(2, 13, 2, 6)}),
        (ValueError, "v must have shape", {"v": torch.zeros(2, 12, 2, 8)}),
        (ValueError, "k must have a head count that divides q's 4, got 3", {"k": torch.zeros(2, 13, 3, 8), "v": torch.zeros(2, 13, 3, 8)}),
        (ValueError, "head_dim between 1 and 512, got 513", {"q": torch.zeros(2, 9, 4, 513)}),
        (ValueError, r"window must hold bounds of -1 \(unbounded\) or more, got -2", {"window_size": (-2, 0)}),
        (ValueError, r"dropout_p must lie in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
        (ValueError, "softcap must be .*not negative, got -1.0", {"softcap": -1.0}),
        (ValueError, "alibi_slopes must have shape", {"alibi_slopes": torch.zeros(3)}),
    ],
)  # fmt: skip
def test_errors_of_attention_reach_the_caller(error, message, change):
    q, k, v = dense()
    with pytest.raises(error, match=f"^attention: .*{message}"):
        flash_attn.flash_attn_func(**({"q": q, "k": k, "v": v} | change))


# --------------------------------------------------------------------------------------------------------------------
# bert_padding


def ragged_batch(trailing=(4, 8)):
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    return torch.randn(4, 5, *trailing, requires_grad=True), mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("trailing", [(), (6,), (4, 8)], ids=str)
def test_unpad_then_pad(trailing, dtype):
    hidden, mask = ragged_batch(trailing)
    packed_rows, indices, cu_seqlens, longest, seqused = bert_padding.unpad_input(hidden, mask.to(dtype))
    assert torch.equal(packed_rows, hidden[mask.bool()])
    assert indices.dtype == torch.int64 and torch.equal(indices, mask.flatten().nonzero().flatten())
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 6, 11]
    assert type(longest) is int and longest == 5
    assert seqused.dtype == torch.int32 and seqused.tolist() == [3, 0, 3, 5]
    padded = bert_padding.pad_input(packed_rows, indices, 4, 5)
    weights = mask.view(4, 5, *[1] * len(trailing))
    assert torch.equal(padded, hidden * weights)
    (grad,) = torch.autograd.grad(padded.square().sum(), hidden)
    assert torch.equal(grad, 2 * hidden * weights)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_unpad_with_unused_rows(dtype):
    hidden, mask = ragged_batch()
    mask[3, 4] = 0
    unused = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    packed_rows, indices, cu_seqlens, longest, seqused = bert_padding.unpad_input(
        hidden, mask.to(dtype), unused.to(dtype)
    )
    assert torch.equal(packed_rows, hidden[(mask + unused).bool()]) and indices.numel() == 13
    assert cu_seqlens.tolist() == [0, 4, 5, 8, 13] and longest == 5 and seqused.tolist() == [3, 0, 3, 4]


def test_index_first_axis():
    source = torch.randn(6, 4, 8, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([5, 0, 2, 2])
    assert torch.equal(bert_padding.index_first_axis(source, indices), source[indices])
    assert torch.autograd.gradcheck(bert_padding.index_first_axis, (source, indices))


def test_unpad_refuses_other_masks():
    hidden, mask = ragged_batch()
    with pytest.raises(
        ValueError, match=r"unpad_input: attention_mask must have shape \(B, S\) = \(4, 5\), got \(4, 6\)"
    ):
        bert_padding.unpad_input(hidden, torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"unpad_input: unused_mask must have shape \(B, S\) = \(4, 5\), got \(5,\)"):
        bert_padding.unpad_input(hidden, mask, torch.ones(5))


def test_padded_batch_through_varlen():
    """The way flash-attn's callers use it: unpad, attend, pad; equal to a masked dense batch."""
    qkv = torch.randn(4, 5, 3, 4, 8)
    mask = ragged_batch()[1].sort(dim=1, descending=True).values  # padded on the right
    rows, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(qkv, mask)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu_seqlens, longest)
    out = bert_padding.pad_input(out, indices, 4, 5)
    expected = fastattn.attention(*qkv.unbind(2), attn_bias=mask.bool()[:, None, None])
    torch.testing.assert_close(out, expected * mask[..., None, None])


# --------------------------------------------------------------------------------------------------------------------
# The kernels, in the interpreter


@pytest.mark.interpret
@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_s_dmask_interpreted(layout, launches):
    test_s_dmask_is_the_mask_that_was_used(layout, "left-window-causal")
    assert launches.count > 0


@pytest.mark.interpret
def test_packed_variants_interpreted(launches):
    test_packed_variants({"causal": True})
    assert launches.count > 0
