"""The oracle against torch's own attention, finite differences and hand-made cases; its dropout mask against Triton's."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn import reference
from fastattn.reference.philox import philox_keep

B, S_Q, S_K, H, H_KV, D = 2, 5, 7, 4, 2, 8


def inputs(seqlen_q=S_Q, seqlen_k=S_K, dtype=torch.float64, requires_grad=False):
    shapes = (B, seqlen_q, H, D), (B, seqlen_k, H_KV, D), (B, seqlen_k, H_KV, D + 2)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def sdpa(q, k, v, **options):
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True, **options
    )
    return out.transpose(1, 2)


def test_plain_and_masked_match_torch():
    q, k, v = inputs()
    bias = torch.randn(H, S_Q, S_K, dtype=torch.float64)
    mask = torch.rand(B, 1, S_Q, S_K) > 0.3
    mask[..., 0] = True
    torch.testing.assert_close(reference.attention(q, k, v), sdpa(q, k, v))
    torch.testing.assert_close(reference.attention(q, k, v, softmax_scale=0.3), sdpa(q, k, v, scale=0.3))
    torch.testing.assert_close(reference.attention(q, k, v, attn_bias=bias), sdpa(q, k, v, attn_mask=bias))
    torch.testing.assert_close(reference.attention(q, k, v, attn_bias=mask), sdpa(q, k, v, attn_mask=mask))


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "options", "picture"),
    [
        (3, 3, {"causal": True}, "100 110 111"),
        (2, 4, {"causal": True}, "1110 1111"),
        (4, 2, {"causal": True}, "00 00 10 11"),
        (4, 4, {"window": (1, 0)}, "1000 1100 0110 0011"),
        (4, 4, {"window": (1, 3), "causal": True}, "1000 1100 0110 0011"),
        (3, 5, {"window": (0, 1)}, "00110 00011 00001"),
        (3, 3, {"window": (-1, None)}, "111 111 111"),
    ],
)
def test_what_each_row_sees(seqlen_q, seqlen_k, options, picture):
    q, k, v = inputs(seqlen_q, seqlen_k)
    mask = torch.tensor([[digit == "1" for digit in row] for row in picture.split()])
    out, lse = reference.attention(q, k, v, return_lse=True, **options)
    masked, masked_lse = reference.attention(q, k, v, attn_bias=mask, return_lse=True)
    torch.testing.assert_close(out, masked)
    torch.testing.assert_close(lse, masked_lse)
    empty = ~mask.any(dim=-1)
    assert (out[:, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
    assert lse[:, :, ~empty].isfinite().all()


def test_lse_softcap_alibi_and_sinks_by_hand():
    q, k, v = inputs()
    k_, v_ = k.repeat_interleave(H // H_KV, 2), v.repeat_interleave(H // H_KV, 2)
    slopes, sinks = torch.rand(B, H), torch.randn(H, dtype=torch.float64)
    out, lse = reference.attention(
        q, k, v, softmax_scale=0.5, softcap=2.0, alibi_slopes=slopes, sinks=sinks, return_lse=True
    )
    for b, i, h in [(0, 0, 0), (1, 4, 3), (0, 2, 1)]:
        scores = 2.0 * torch.tanh(0.5 * (k_[b, :, h] @ q[b, i, h]) / 2.0)
        scores -= slopes[b, h] * torch.tensor([abs(i + S_K - S_Q - j) for j in range(S_K)])
        denominator = scores.exp().sum() + sinks[h].exp()
        torch.testing.assert_close(lse[b, h, i], denominator.log())
        torch.testing.assert_close(out[b, i, h], (scores.exp() / denominator) @ v_[b, :, h])


def test_dropout_scales_what_is_kept():
    q, k, v = inputs()
    keep = torch.rand(B, H, S_Q, S_K) >= 0.4
    identity = torch.eye(S_K, dtype=torch.float64).expand(B, H_KV, S_K, S_K).transpose(1, 2)
    probabilities = reference.attention(q, k, identity).transpose(1, 2)
    dropped = reference.attention(q, k, identity, dropout_p=0.4, dropout_keep=keep).transpose(1, 2)
    torch.testing.assert_close(dropped, probabilities * keep / 0.6)
    drawn = reference.attention(q, k, identity, dropout_p=0.4).transpose(1, 2)
    assert ((drawn == 0) | torch.isclose(drawn, probabilities / 0.6)).all()


def test_gradients_match_finite_differences():
    q, k, v = inputs(3, 4, requires_grad=True)
    bias = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(H)

    def attend(q, k, v, bias, sinks):
        return reference.attention(
            q, k, v, window=(2, 1), softcap=3.0, attn_bias=bias, alibi_slopes=slopes, sinks=sinks, return_lse=True
        )

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, sinks))


def test_empty_rows_have_zero_gradients():
    q, k, v = inputs(5, 3, requires_grad=True)
    bias = torch.zeros(5, 3, dtype=torch.float64)
    bias[4] = -math.inf
    bias.requires_grad_()
    out, lse = reference.attention(q, k, v, causal=True, attn_bias=bias, return_lse=True)
    assert (lse[:, :, [0, 1, 4]] == -math.inf).all() and (out[:, [0, 1, 4]] == 0).all()
    (out.sum() + lse.sum()).backward()
    assert (q.grad[:, [0, 1, 4]] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v, bias))

    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    out, lse = reference.attention(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True)
    torch.testing.assert_close(lse, sinks[:, None].expand(B, H, 5))
    assert (out == 0).all()
    (grad,) = torch.autograd.grad(lse.sum(), sinks)
    torch.testing.assert_close(grad, torch.full_like(grad, B * 5))


def test_packed_is_a_loop_of_dense():
    lengths_q, lengths_k = [3, 0, 4], [2, 5, 6]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths_q, lengths_k))
    q = torch.randn(9, H, D)  # two rows past the last sequence
    k, v = torch.randn(13, H_KV, D), torch.randn(13, H_KV, D)
    bias, slopes, keep = torch.randn(3, 1, 4, 6), torch.rand(3, H), torch.rand(3, H, 4, 6) > 0.2
    out, lse = reference.attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=4, max_seqlen_k=6, causal=True, attn_bias=bias,
        alibi_slopes=slopes, dropout_p=0.2, dropout_keep=keep, return_lse=True,
    )  # fmt: skip
    assert out.shape == (9, H, D) and lse.shape == (H, 9)
    assert (out[7:] == 0).all() and (lse[:, 7:] == -math.inf).all()
    for b, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(int(cu_q[b]), int(cu_q[b + 1])), slice(int(cu_k[b]), int(cu_k[b + 1]))
        dense, dense_lse = reference.attention(
            q[None, rows], k[None, keys], v[None, keys], causal=True, attn_bias=bias[b, :, :n_q, :n_k],
            alibi_slopes=slopes[b], dropout_p=0.2, dropout_keep=keep[b : b + 1, :, :n_q, :n_k], return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(out[rows], dense[0], rtol=0, atol=0)
        torch.testing.assert_close(lse[:, rows], dense_lse[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stays_in_the_inputs_dtype(dtype):
    q, k, v = inputs(dtype=dtype)
    out, lse = reference.attention(q, k, v, sinks=torch.randn(H), alibi_slopes=torch.rand(H), return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    large = torch.full((1, 2, 1, D), 100.0, dtype=dtype)  # q k^T alone is 80000, past float16's largest
    assert reference.attention(large, large, large).isfinite().all()


def test_philox_keep_is_one_mask_whatever_the_size():
    whole = philox_keep(-12345678901234, 2, 3, 20, 101, 0.3)
    assert torch.equal(philox_keep(-12345678901234, 1, 3, 9, 30, 0.3), whole[:1, :, :9, :30])
    assert not torch.equal(philox_keep(-12345678901233, 2, 3, 20, 101, 0.3), whole)
    assert abs(whole.float().mean().item() - 0.7) < 0.02
    assert philox_keep(1, 1, 1, 3, 0, 0.5).shape == (1, 1, 3, 0) and philox_keep(1, 1, 1, 3, 5, 0.0).all()


@pytest.mark.interpret
def test_philox_keep_is_what_triton_draws():
    import triton
    import triton.language as tl

    @triton.jit
    def draw_kernel(words_ptr, seed_ptr, seqlen_q, NUM_QUADS: tl.constexpr):
        head, row = tl.program_id(0), tl.program_id(1)
        quads = tl.arange(0, NUM_QUADS)
        zero = quads * 0
        words = tl.philox(tl.load(seed_ptr), quads, zero + row, zero + head, zero)
        start = words_ptr + (head * seqlen_q + row) * NUM_QUADS * 4 + quads * 4
        for i in tl.static_range(4):
            tl.store(start + i, words[i].to(tl.int64))

    batch, num_heads, seqlen_q, num_quads = 2, 3, 5, 4
    for seed in (0, 1, -5, 2**63 - 1, -(2**63), 123456789012345):
        words = torch.zeros(batch, num_heads, seqlen_q, 4 * num_quads, dtype=torch.int64)
        draw_kernel[(batch * num_heads, seqlen_q)](words, torch.tensor([seed]), seqlen_q, num_quads)
        for p in (0.1, 0.5, 0.9):
            kept = (words & 0xFFFFFFFF) >= int(p * 2**32)
            assert torch.equal(kept, philox_keep(seed, batch, num_heads, seqlen_q, 4 * num_quads, p))


def test_no_heads():
    q, k, v = torch.randn(2, 5, 0, 8), torch.randn(2, 7, 0, 8), torch.randn(2, 7, 0, 6)
    out, lse = reference.attention(q, k, v, causal=True, return_lse=True)
    assert out.shape == (2, 5, 0, 6) and lse.shape == (2, 0, 5)
    cu_q, cu_k = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
    out, lse = reference.attention(q[0], k[0], v[0], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    assert out.shape == (5, 0, 6) and lse.shape == (0, 5)
