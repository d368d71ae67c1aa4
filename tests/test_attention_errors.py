"""What `fastattn.attention` refuses, and with which words: the op, the argument, what was expected, what came."""

from __future__ import annotations

import re

import pytest
import torch

import fastattn

B, S_Q, S_K, H, H_KV, D, D_V = 2, 5, 7, 4, 2, 8, 6
T_Q, T_K = B * S_Q, B * S_K


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def dense(**changes) -> dict:
    """Good dense arguments, with these changed."""
    good = {"q": torch.zeros(B, S_Q, H, D), "k": torch.zeros(B, S_K, H_KV, D), "v": torch.zeros(B, S_K, H_KV, D_V)}
    return {**good, **changes}


def packed(**changes) -> dict:
    """Good packed arguments, with these changed."""
    good = {
        "q": torch.zeros(T_Q, H, D),
        "k": torch.zeros(T_K, H_KV, D),
        "v": torch.zeros(T_K, H_KV, D_V),
        "cu_seqlens_q": ints(0, 4, T_Q),
        "cu_seqlens_k": ints(0, S_K, T_K),
    }
    return {**good, **changes}


def zeros(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(shape, **kwargs)


# name: (arguments, exception, the message after "attention: ")
BAD = {
    # q, k, v: types, dtypes, devices
    "q a list": (dense(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    "k None": (dense(k=None), TypeError, "k must be a torch.Tensor, got NoneType"),
    "v a float": (dense(v=1.0), TypeError, "v must be a torch.Tensor, got float"),
    "q nested": (
        dense(q=torch.nested.nested_tensor([zeros(3, H, D), zeros(5, H, D)], layout=torch.jagged)),
        TypeError,
        "q must be a dense tensor, got a nested one",
    ),
    "q int32": (
        dense(q=zeros(B, S_Q, H, D, dtype=torch.int32)),
        TypeError,
        "q must be float16, bfloat16 or float32, got torch.int32",
    ),
    "all int64": (
        {arg: t.long() for arg, t in dense().items()},
        TypeError,
        "q must be float16, bfloat16 or float32, got torch.int64",
    ),
    "all float64": (
        {arg: t.double() for arg, t in dense().items()},
        TypeError,
        "q must be float16, bfloat16 or float32, got torch.float64",
    ),
    "q complex": (
        dense(q=zeros(B, S_Q, H, D, dtype=torch.complex64)),
        TypeError,
        "q must be float16, bfloat16 or float32, got torch.complex64",
    ),
    "k bfloat16": (
        dense(k=zeros(B, S_K, H_KV, D, dtype=torch.bfloat16)),
        TypeError,
        "k must have q's dtype torch.float32, got torch.bfloat16",
    ),
    "v int8": (
        dense(v=zeros(B, S_K, H_KV, D_V, dtype=torch.int8)),
        TypeError,
        "v must have q's dtype torch.float32, got torch.int8",
    ),
    "k elsewhere": (dense(k=zeros(B, S_K, H_KV, D, device="meta")), ValueError, "k must be on q's device cpu, got meta"),
    "v elsewhere": (
        dense(v=zeros(B, S_K, H_KV, D_V, device="meta")),
        ValueError,
        "v must be on q's device cpu, got meta",
    ),
    # q, k, v: ranks and shapes
    "q rank 3": (
        dense(q=zeros(S_Q, H, D)),
        ValueError,
        f"q must have shape (B, S, H, D) without cu_seqlens, got {(S_Q, H, D)}",
    ),
    "k rank 5": (
        dense(k=zeros(1, B, S_K, H_KV, D)),
        ValueError,
        f"k must have shape (B, S, H, D) without cu_seqlens, got {(1, B, S_K, H_KV, D)}",
    ),
    "q a scalar": (dense(q=zeros()), ValueError, "q must have shape (B, S, H, D) without cu_seqlens, got ()"),
    "packed q rank 4": (
        packed(q=zeros(B, S_Q, H, D)),
        ValueError,
        f"q must have shape (T, H, D) with cu_seqlens, got {(B, S_Q, H, D)}",
    ),
    "packed v rank 2": (
        packed(v=zeros(T_K, D_V)),
        ValueError,
        f"v must have shape (T, H, D) with cu_seqlens, got {(T_K, D_V)}",
    ),
    "batch": (
        dense(k=zeros(3, S_K, H_KV, D)),
        ValueError,
        f"k must have shape (B, S_k, H_kv, D) with D = {D} and B = {B} to match q, got {(3, S_K, H_KV, D)}",
    ),
    "head_dim": (
        dense(k=zeros(B, S_K, H_KV, 80)),
        ValueError,
        f"k must have shape (B, S_k, H_kv, D) with D = {D} and B = {B} to match q, got {(B, S_K, H_KV, 80)}",
    ),
    "packed head_dim": (
        packed(k=zeros(T_K, H_KV, 80)),
        ValueError,
        f"k must have shape (T_k, H_kv, D) with D = {D} to match q, got {(T_K, H_KV, 80)}",
    ),
    "v length": (
        dense(v=zeros(B, 9, H_KV, D_V)),
        ValueError,
        f"v must have shape (B, S_k, H_kv, D_v) with k's {(B, S_K, H_KV)} before D_v, got {(B, 9, H_KV, D_V)}",
    ),
    "v heads": (
        dense(v=zeros(B, S_K, 1, D_V)),
        ValueError,
        f"v must have shape (B, S_k, H_kv, D_v) with k's {(B, S_K, H_KV)} before D_v, got {(B, S_K, 1, D_V)}",
    ),
    "packed v length": (
        packed(v=zeros(9, H_KV, D_V)),
        ValueError,
        f"v must have shape (T_k, H_kv, D_v) with k's {(T_K, H_KV)} before D_v, got {(9, H_KV, D_V)}",
    ),
    "heads": (
        dense(k=zeros(B, S_K, 3, D), v=zeros(B, S_K, 3, D_V)),
        ValueError,
        f"k must have a head count that divides q's {H}, got 3",
    ),
    "more k heads": (
        dense(k=zeros(B, S_K, 8, D), v=zeros(B, S_K, 8, D_V)),
        ValueError,
        f"k must have a head count that divides q's {H}, got 8",
    ),
    "no k heads": (
        dense(k=zeros(B, S_K, 0, D), v=zeros(B, S_K, 0, D_V)),
        ValueError,
        f"k must have a head count that divides q's {H}, got 0",
    ),
    "head_dim 513": (
        dense(q=zeros(B, S_Q, H, 513), k=zeros(B, S_K, H_KV, 513)),
        ValueError,
        "q must have a head_dim between 1 and 512, got 513",
    ),
    "head_dim 0": (
        dense(q=zeros(B, S_Q, H, 0), k=zeros(B, S_K, H_KV, 0)),
        ValueError,
        "q must have a head_dim between 1 and 512, got 0",
    ),
    "v head_dim 520": (
        dense(v=zeros(B, S_K, H_KV, 520)),
        ValueError,
        "v must have a head_dim between 1 and 512, got 520",
    ),
    # cu_seqlens: form
    "cu_seqlens_q alone": (
        dense(cu_seqlens_q=ints(0, 5)),
        ValueError,
        "cu_seqlens_q and cu_seqlens_k must be given together, got only cu_seqlens_q",
    ),
    "cu_seqlens_k alone": (
        packed(cu_seqlens_q=None),
        ValueError,
        "cu_seqlens_q and cu_seqlens_k must be given together, got only cu_seqlens_k",
    ),
    "cu_seqlens a list": (packed(cu_seqlens_q=[0, 10]), TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
    "cu_seqlens int64": (
        packed(cu_seqlens_k=ints(0, S_K, T_K, dtype=torch.int64)),
        TypeError,
        "cu_seqlens_k must be an int32 tensor, got torch.int64",
    ),
    "cu_seqlens rank 2": (
        packed(cu_seqlens_q=ints(0, 4, T_Q)[None]),
        ValueError,
        "cu_seqlens_q must have shape (B + 1,), got (1, 3)",
    ),
    "cu_seqlens empty": (packed(cu_seqlens_q=ints()), ValueError, "cu_seqlens_q must have shape (B + 1,), got (0,)"),
    "cu_seqlens elsewhere": (
        packed(cu_seqlens_k=ints(0, 7, 14).to("meta")),
        ValueError,
        "cu_seqlens_k must be on q's device cpu, got meta",
    ),
    "cu_seqlens batches": (
        packed(cu_seqlens_k=ints(0, T_K)),
        ValueError,
        "cu_seqlens_k must have cu_seqlens_q's shape (3,), got (2,)",
    ),
    # cu_seqlens: values
    "cu_seqlens_q start": (packed(cu_seqlens_q=ints(1, 4, T_Q)), ValueError, "cu_seqlens_q must start at 0, got 1"),
    "cu_seqlens_k start": (packed(cu_seqlens_k=ints(-1, 4, T_K)), ValueError, "cu_seqlens_k must start at 0, got -1"),
    "cu_seqlens decrease": (
        packed(cu_seqlens_k=ints(0, 9, 7)),
        ValueError,
        "cu_seqlens_k must not decrease, got 9 then 7 at index 2",
    ),
    "cu_seqlens decrease and overrun": (
        packed(cu_seqlens_q=ints(0, 99, 7)),
        ValueError,
        "cu_seqlens_q must not decrease, got 99 then 7 at index 2",
    ),
    "cu_seqlens_q overrun": (
        packed(cu_seqlens_q=ints(0, 4, 11)),
        ValueError,
        f"cu_seqlens_q must end within q's {T_Q} packed tokens, got 11",
    ),
    "cu_seqlens_k overrun": (
        packed(cu_seqlens_k=ints(0, 4, 2**31 - 1)),
        ValueError,
        f"cu_seqlens_k must end within k's {T_K} packed tokens, got {2**31 - 1}",
    ),
    # max_seqlen
    "max_seqlen_q dense": (dense(max_seqlen_q=5), ValueError, "max_seqlen_q must be None without cu_seqlens, got 5"),
    "max_seqlen_k dense": (dense(max_seqlen_k=7), ValueError, "max_seqlen_k must be None without cu_seqlens, got 7"),
    "max_seqlen_q short": (
        packed(max_seqlen_q=5),
        ValueError,
        "cu_seqlens_q must hold lengths of at most max_seqlen_q = 5, got 6 at index 1",
    ),
    "max_seqlen_k short": (
        packed(max_seqlen_k=6),
        ValueError,
        "cu_seqlens_k must hold lengths of at most max_seqlen_k = 6, got 7 at index 0",
    ),
    "max_seqlen negative": (packed(max_seqlen_k=-1), ValueError, "max_seqlen_k must not be negative, got -1"),
    "max_seqlen a float": (packed(max_seqlen_q=7.0), TypeError, "max_seqlen_q must be an int or None, got float"),
    "max_seqlen a tensor": (
        packed(max_seqlen_q=torch.tensor([7])),
        TypeError,
        "max_seqlen_q must be an int or None, got a tensor of shape (1,)",
    ),
    # attn_bias, alibi_slopes, sinks
    "attn_bias a list": (dense(attn_bias=[0.0]), TypeError, "attn_bias must be a torch.Tensor, got list"),
    "attn_bias int": (
        dense(attn_bias=zeros(S_Q, S_K, dtype=torch.int64)),
        TypeError,
        "attn_bias must have a bool or floating-point dtype, got torch.int64",
    ),
    "attn_bias elsewhere": (
        dense(attn_bias=zeros(S_Q, S_K, device="meta")),
        ValueError,
        "attn_bias must be on q's device cpu, got meta",
    ),
    "attn_bias transposed": (
        dense(attn_bias=zeros(S_K, S_Q)),
        ValueError,
        f"attn_bias must broadcast to (B, H, S_q, S_k) = {(B, H, S_Q, S_K)}, got {(S_K, S_Q)}",
    ),
    "attn_bias kv heads": (
        dense(attn_bias=zeros(B, H_KV, S_Q, S_K)),
        ValueError,
        f"attn_bias must broadcast to (B, H, S_q, S_k) = {(B, H, S_Q, S_K)}, got {(B, H_KV, S_Q, S_K)}",
    ),
    "attn_bias rank 5": (
        dense(attn_bias=zeros(1, 1, 1, S_Q, S_K)),
        ValueError,
        f"attn_bias must broadcast to (B, H, S_q, S_k) = {(B, H, S_Q, S_K)}, got {(1, 1, 1, S_Q, S_K)}",
    ),
    "packed attn_bias": (
        packed(attn_bias=zeros(S_Q, S_K), max_seqlen_q=6, max_seqlen_k=S_K),
        ValueError,
        f"attn_bias must broadcast to (B, H, max_seqlen_q, max_seqlen_k) = {(B, H, 6, S_K)}, got {(S_Q, S_K)}",
    ),
    "alibi_slopes a float": (dense(alibi_slopes=0.5), TypeError, "alibi_slopes must be a torch.Tensor, got float"),
    "alibi_slopes int": (
        dense(alibi_slopes=zeros(H, dtype=torch.int32)),
        TypeError,
        "alibi_slopes must have a floating-point dtype, got torch.int32",
    ),
    "alibi_slopes kv heads": (
        dense(alibi_slopes=zeros(H_KV)),
        ValueError,
        f"alibi_slopes must have shape (H,) or (B, H) = {(B, H)}, got {(H_KV,)}",
    ),
    "alibi_slopes batch": (
        packed(alibi_slopes=zeros(3, H)),
        ValueError,
        f"alibi_slopes must have shape (H,) or (B, H) = {(B, H)}, got {(3, H)}",
    ),
    "alibi_slopes broadcast": (
        dense(alibi_slopes=zeros(1, H)),
        ValueError,
        f"alibi_slopes must have shape (H,) or (B, H) = {(B, H)}, got {(1, H)}",
    ),
    "alibi_slopes elsewhere": (
        dense(alibi_slopes=zeros(H, device="meta")),
        ValueError,
        "alibi_slopes must be on q's device cpu, got meta",
    ),
    "alibi_slopes learnt": (
        dense(alibi_slopes=zeros(H, requires_grad=True)),
        ValueError,
        "alibi_slopes must not require a gradient (none is computed), got requires_grad=True",
    ),
    "sinks a list": (dense(sinks=[0.0] * H), TypeError, "sinks must be a torch.Tensor, got list"),
    "sinks bool": (
        dense(sinks=zeros(H, dtype=torch.bool)),
        TypeError,
        "sinks must have a floating-point dtype, got torch.bool",
    ),
    "sinks shape": (dense(sinks=zeros(B, H)), ValueError, f"sinks must have shape (H,) = {(H,)}, got {(B, H)}"),
    "sinks elsewhere": (
        dense(sinks=zeros(H, device="meta")),
        ValueError,
        "sinks must be on q's device cpu, got meta",
    ),
    # numbers
    "causal a string": (dense(causal="no"), TypeError, "causal must be a bool, got str"),
    "softmax_scale nan": (dense(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
    "softcap below float32": (dense(softcap=1e-45), ValueError, "softcap must be finite and not negative, got 1e-45"),
    "bias float8": (
        dense(attn_bias=zeros(S_Q, S_K).to(torch.float8_e4m3fn)),
        TypeError,
        "attn_bias must have a bool or floating-point dtype, got torch.float8_e4m3fn",
    ),
    "window an int": (dense(window=3), ValueError, "window must be a pair (left, right), got 3"),
    "window of three": (dense(window=(1, 2, 3)), ValueError, "window must be a pair (left, right), got (1, 2, 3)"),
    "window left": (dense(window=(-2, 0)), ValueError, "window must hold bounds of -1 (unbounded) or more, got -2"),
    "window right": (
        dense(window=(None, -5)),
        ValueError,
        "window must hold bounds of -1 (unbounded) or more, got -5",
    ),
    "window right, causal": (
        dense(window=(0, -5), causal=True),
        ValueError,
        "window must hold bounds of -1 (unbounded) or more, got -5",
    ),
    "window floats": (dense(window=(1.0, 2)), TypeError, "window must hold ints, 0-d tensors or None, got float"),
    "window bools": (dense(window=(True, 2)), TypeError, "window must hold ints, 0-d tensors or None, got bool"),
    "window 1-d tensor": (
        dense(window=(ints(1), 2)),
        TypeError,
        "window must hold ints, 0-d tensors or None, got a tensor of shape (1,)",
    ),
    "window 0-d tensor": (
        dense(window=(torch.tensor(-3), 2)),
        ValueError,
        "window must hold bounds of -1 (unbounded) or more, got -3",
    ),
    "dropout_p 1": (dense(dropout_p=1.0), ValueError, "dropout_p must lie in [0, 1), got 1.0"),
    "dropout_p negative": (dense(dropout_p=-0.1), ValueError, "dropout_p must lie in [0, 1), got -0.1"),
    "dropout_p NaN": (dense(dropout_p=float("nan")), ValueError, "dropout_p must lie in [0, 1), got nan"),
    "dropout_p None": (dense(dropout_p=None), TypeError, "dropout_p must be a Python number, got NoneType"),
    "softcap negative": (dense(softcap=-1.0), ValueError, "softcap must be finite and not negative, got -1.0"),
    "softcap NaN": (dense(softcap=float("nan")), ValueError, "softcap must be finite and not negative, got nan"),
    "softcap inf": (dense(softcap=float("inf")), ValueError, "softcap must be finite and not negative, got inf"),
    "softcap a string": (dense(softcap="30"), TypeError, "softcap must be a Python number, got str"),
    "softcap None": (dense(softcap=None), TypeError, "softcap must be a Python number, got NoneType"),
    "softmax_scale a string": (dense(softmax_scale="x"), TypeError, "softmax_scale must be a Python number, got str"),
    "softmax_scale a tensor": (  # it would lose its gradient
        dense(softmax_scale=torch.tensor(0.1, requires_grad=True)),
        TypeError,
        "softmax_scale must be a Python number, got Tensor",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(f"attention: {message}") + "$") as caught:
        fastattn.attention(**arguments)
    assert type(caught.value) is error


def test_good_input_is_not_refused():
    assert fastattn.attention(**dense()).shape == (B, S_Q, H, D_V)
    assert fastattn.attention(**packed()).shape == (T_Q, H, D_V)


@pytest.mark.parametrize("shape", [(), (1,), (S_K,), (S_Q, 1), (S_Q, S_K), (H, 1, 1), (B, 1, S_Q, S_K), (1, 1, 1, 1)], ids=str)
def test_attn_bias_may_have_fewer_dims_and_dims_of_1(shape):
    whole = torch.zeros(shape).expand(B, H, S_Q, S_K)
    q, k, v = (torch.randn_like(t) for t in dense().values())
    bias = torch.randn(shape)
    out = fastattn.attention(q, k, v, attn_bias=bias)
    torch.testing.assert_close(out, fastattn.attention(q, k, v, attn_bias=bias + whole))


@pytest.mark.parametrize("bound", [-1, None, torch.tensor(-1), 0, torch.tensor(3), 10**9], ids=str)
def test_good_windows(bound):
    q, k, v = (torch.randn_like(t) for t in dense().values())
    value = None if bound is None else int(bound)
    out = fastattn.attention(q, k, v, window=(bound, bound))
    assert torch.equal(out, fastattn.attention(q, k, v, window=[value, value]))


def test_fixed_alibi_slopes_of_a_trained_module_pass_without_gradients():
    slopes = torch.ones(H, requires_grad=True)
    with torch.no_grad():
        assert fastattn.attention(**dense(alibi_slopes=slopes)).shape == (B, S_Q, H, D_V)


def test_all_tensors_elsewhere_are_one_device():
    """Meta tensors: shapes alone, no values."""
    tensors = {arg: t.to("meta") for arg, t in packed().items()}
    out, lse = fastattn.attention(**tensors, return_lse=True)
    assert out.is_meta and out.shape == (T_Q, H, D_V) and lse.shape == (H, T_Q)


def test_lengths_that_leave_rows_over_or_sequences_empty_are_good():
    out = fastattn.attention(**packed(cu_seqlens_q=ints(0, 0, 3), cu_seqlens_k=ints(0, 6, 6)))
    assert torch.equal(out[3:], torch.zeros_like(out[3:]))
    empty = fastattn.attention(**packed(cu_seqlens_q=ints(0), cu_seqlens_k=ints(0)))
    assert torch.equal(empty, torch.zeros_like(empty))


@pytest.mark.parametrize("name", ["q int32", "head_dim", "attn_bias transposed", "dropout_p 1", "cu_seqlens_q overrun"])
def test_compiled_calls_refuse_with_the_same_words(name):
    arguments, error, message = BAD[name]
    torch._dynamo.reset()
    with pytest.raises(error, match=re.escape(f"attention: {message}") + "$"):
        torch.compile(fastattn.attention, backend="aot_eager")(**arguments)
