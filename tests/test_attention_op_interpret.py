"""The operator over the Triton kernels, in the interpreter: what tests/test_attention_op.py asks of the CPU code, asked of them."""

from __future__ import annotations

import math

import pytest
import torch
from test_attention_op import (
    CASES,
    PACKED,
    assert_fake_layout,
    assert_gradients_in_their_own_dtypes,
    assert_same_mask_in_backward,
    backward_arguments,
    check_against_reference,
    dense_inputs,
    learnt,
    operator_arguments,
    packed_inputs,
    permuted,
)

import fastattn
from fastattn.ops.attention import attend, draw_seed, dropout_keep

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fake_and_real_outputs_have_the_same_layout(direction, case, launches):
    assert_fake_layout(direction, case)
    assert launches.count > 0


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastattn.attention_fwd.default, operator_arguments("every tensor"), test_utils=tests)
    torch.library.opcheck(torch.ops.fastattn.attention_bwd.default, backward_arguments("every tensor"), test_utils=tests)


def test_mixed_input_and_upstream_strides():
    q, k, v = dense_inputs()
    k = torch.cat([k, k], -1)[..., :8]
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    dout, dlse = torch.randn(6, 4, 5, 2).permute(3, 2, 1, 0), torch.randn(4, 1).expand(2, 4, 5)
    check_against_reference((permuted(q), k, v), dout, dlse, causal=True)


def test_expanded_inputs_and_upstream():
    q, k, v = dense_inputs()
    tensors = (q, k[:1].expand_as(k), v[:, :, :1].expand_as(v))
    check_against_reference(tensors, torch.ones(()).expand(2, 5, 4, 6), torch.ones(()).expand(2, 4, 5))


def test_gradient_of_the_lse_alone():
    tensors = learnt(*packed_inputs())
    _, lse = fastattn.attention(*tensors, return_lse=True, causal=True, **PACKED)
    assert torch.equal(lse[:, 8:], torch.full_like(lse[:, 8:], -math.inf))
    dq, dk, dv = torch.autograd.grad(lse.masked_fill(lse == -math.inf, 0.0).sum(), tensors)
    reference = learnt(*tensors)
    _, lse = fastattn.reference.attention(*reference, return_lse=True, causal=True, **PACKED)
    expected = torch.autograd.grad(lse.masked_fill(lse == -math.inf, 0.0).sum(), reference, allow_unused=True)
    torch.testing.assert_close(dq, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dk, expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(dv, torch.zeros_like(dv))


def test_gradients_come_in_their_own_dtypes():
    assert_gradients_in_their_own_dtypes()


def test_dropout_keep_is_the_mask():
    batch, seqlen, heads, p = 2, 16, 3, 0.3
    q = torch.zeros(batch, seqlen, heads, seqlen)
    k, v = torch.zeros(batch, seqlen, 1, seqlen), torch.eye(seqlen).expand(batch, seqlen, seqlen)[:, :, None]
    seed = draw_seed(q.device)
    out, _ = attend(q, k, v, dropout_p=p, dropout_seed=seed)
    expected = dropout_keep(seed, batch, heads, seqlen, seqlen, p).transpose(1, 2) / ((1 - p) * seqlen)
    torch.testing.assert_close(out, expected)


def test_dropout_mask_is_one_in_forward_and_backward():
    q, k, v = dense_inputs()
    assert_same_mask_in_backward(lambda v: fastattn.attention(q, k, v, dropout_p=0.5), v.requires_grad_())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_is_a_loop():
    stacked = [torch.randn(2, *t.shape) for t in dense_inputs(1)]
    function = torch.func.grad(lambda q, k, v: fastattn.attention(q, k, v, causal=True).square().sum(), argnums=(0, 1, 2))
    mapped = torch.func.vmap(function)(*stacked)
    for i in range(2):
        for grad, expected in zip(mapped, function(*(t[i] for t in stacked)), strict=True):
            assert torch.equal(grad[i], expected)


def test_compiled_is_eager():
    torch._dynamo.reset()
    compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True)
    ours = learnt(*dense_inputs())
    expected = learnt(*ours)
    compiled(*ours, causal=True, softcap=3.0).square().sum().backward()
    fastattn.attention(*expected, causal=True, softcap=3.0).square().sum().backward()
    for t, like in zip(ours, expected, strict=True):
        assert torch.equal(t.grad, like.grad)
