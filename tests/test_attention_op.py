"""The attention operator as PyTorch sees it: registration, strides, autograd, transforms, compilation, FLOPs, logging.

On CPU tensors without the interpreter; tests/test_attention_op_interpret.py repeats what depends on the kernels.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.extensions import cpu_operators
from fastattn.ops.attention import attend, draw_seed, dropout_keep
from fastattn.testing.budget import check_budget

CU_SEQLENS_Q = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
CU_SEQLENS_K = torch.tensor([0, 5, 7, 12], dtype=torch.int32)
PACKED = {"cu_seqlens_q": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K, "max_seqlen_q": 6, "max_seqlen_k": 7}


def dense_inputs(batch=2, seqlen_q=5, seqlen_k=7, heads=4, kv_heads=2, head_dim=8, v_head_dim=6, dtype=torch.float32):
    """q, k, v, contiguous, without gradients."""
    q = torch.randn(batch, seqlen_q, heads, head_dim, dtype=dtype)
    k = torch.randn(batch, seqlen_k, kv_heads, head_dim, dtype=dtype)
    return q, k, torch.randn(batch, seqlen_k, kv_heads, v_head_dim, dtype=dtype)


def packed_inputs(dtype=torch.float32):
    """q, k, v for PACKED, with rows to spare at the end of each."""
    return tuple(t[0].to(dtype) for t in dense_inputs(1, 10, 13))


def learnt(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


def permuted(t: torch.Tensor) -> torch.Tensor:
    """The same values, dense, laid out as (B, H, S, D) or (H, T, D)."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2)


def layout(t: torch.Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# Registration: schema, fake implementation, strides.


def operator_arguments(case: str, keep_weights: bool = False) -> tuple:
    """The positional arguments of fastattn::attention_fwd; packed calls keep no weights."""
    if case == "packed":
        q, k, v = packed_inputs()
        return q, k, v, None, None, None, None, CU_SEQLENS_Q, CU_SEQLENS_K, 6, 7, 2, 0, 0.3, 0.0, 0.0, False
    q, k, v = dense_inputs()
    if case == "permuted":
        q, k, v = map(permuted, (q, k, v))
    if case == "every tensor":
        bias, slopes, sinks, seed = torch.randn(1, 4, 5, 7), torch.rand(2, 4), torch.randn(4), draw_seed(q.device)
        return q, k, v, bias, slopes, sinks, seed, None, None, 5, 7, 4, 1, 0.3, 5.0, 0.25, keep_weights
    if case == "bool bias":
        return q, k, v, torch.rand(2, 1, 1, 7) < 0.7, None, None, None, None, None, 5, 7, None, None, 0.3, 0.0, 0.0, keep_weights
    return q, k, v, None, None, None, None, None, None, 5, 7, None, 0, 0.3, 0.0, 0.0, keep_weights


CASES = ["contiguous", "permuted", "packed", "bool bias", "every tensor"]


def backward_arguments(case: str, dlse: bool = True, keep_weights: bool = False) -> tuple:
    """The positional arguments of fastattn::attention_bwd after the forward of the same case."""
    *arguments, keep_weights = operator_arguments(case, keep_weights)
    out, lse, weights = torch.ops.fastattn.attention_fwd(*arguments, keep_weights)
    dout = torch.randn_like(out)
    if case == "permuted":
        dout = permuted(dout)
    dlse = torch.randn_like(lse) if dlse else None
    bias_grad = case == "every tensor"
    return dout, dlse, *arguments[:9], out, lse, weights if keep_weights else None, *arguments[9:], bias_grad


KEEP = pytest.mark.parametrize("keep_weights", [False, True], ids=["", "kept"])


@KEEP
@pytest.mark.parametrize("case", CASES)
def test_opcheck_forward(case, keep_weights):
    torch.library.opcheck(torch.ops.fastattn.attention_fwd.default, operator_arguments(case, keep_weights))


@KEEP
@pytest.mark.parametrize("dlse", [False, True], ids=["dout", "dout-dlse"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_backward(case, dlse, keep_weights):
    torch.library.opcheck(torch.ops.fastattn.attention_bwd.default, backward_arguments(case, dlse, keep_weights))


def assert_fake_layout(direction: str, case: str, keep_weights: bool = False) -> None:
    """The fake implementation's outputs have the shapes, strides and dtypes of the real one's: inductor counts on it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    op = torch.ops.fastattn.attention_fwd if direction == "forward" else torch.ops.fastattn.attention_bwd
    make = operator_arguments if direction == "forward" else backward_arguments
    arguments = make(case, keep_weights=keep_weights)
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    assert [layout(t) for t in fake] == [layout(t) for t in real]
    assert all(t.is_contiguous() for t in real)


@KEEP
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_fake_and_real_outputs_have_the_same_layout(direction, case, keep_weights):
    assert_fake_layout(direction, case, keep_weights)


# --------------------------------------------------------------------------------------------------------------------
# Strides: of the inputs and of the upstream gradients.


def naive(function_dtype, tensors, upstream, **options):
    """(out, lse, *grads) of the reference in a dtype."""
    tensors = learnt(*(t.to(function_dtype) for t in tensors))
    out, lse = fastattn.reference.attention(*tensors, return_lse=True, **options)
    grads = torch.autograd.grad((out, lse), tensors, [t.to(dtype) for t, dtype in zip(upstream, (out.dtype, lse.dtype))])
    return out, lse, *grads


def check_against_reference(tensors, dout, dlse, **options):
    """attention on these very q, k, v and upstream gradients, forward and backward, within the error budget."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = fastattn.attention(*tensors, return_lse=True, **options)
    results = (out, lse, *torch.autograd.grad((out, lse), tensors, (dout, dlse)))
    baseline = naive(tensors[0].dtype, tensors, (dout, dlse), **options)
    truth = naive(torch.float64, tensors, (dout, dlse), **options)
    for name, *values in zip(("out", "lse", "dq", "dk", "dv"), results, baseline, truth, strict=True):
        check_budget(f"attention {name}", *values)


INPUT_LAYOUTS = {
    "contiguous": lambda t: t,
    "heads first": permuted,
    "batch last": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "slice of a larger last dim": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every other row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "last dim strided": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded over the batch": lambda t: t[:1].expand_as(t),
    "expanded over the heads": lambda t: t[:, :, :1].expand_as(t),
}


@pytest.mark.parametrize("name", INPUT_LAYOUTS)
def test_any_input_strides(name):
    q, k, v = dense_inputs()
    check_against_reference(map(INPUT_LAYOUTS[name], (q, k, v)), torch.randn(2, 5, 4, 6), torch.randn(2, 4, 5), causal=True)


def test_mixed_input_strides():
    names = ("last dim strided", "heads first", "every other row")
    tensors = [INPUT_LAYOUTS[name](t) for name, t in zip(names, dense_inputs(), strict=True)]
    check_against_reference(tensors, torch.randn(2, 5, 4, 6), torch.randn(2, 4, 5), window=(3, 0), softcap=4.0)


def test_q_k_v_as_slices_of_one_projection():
    q, k, v = torch.randn(2, 6, 3, 4, 8).unbind(2)
    check_against_reference((q, k, v), torch.randn(2, 6, 4, 8), torch.randn(2, 4, 6), causal=True)


UPSTREAM_LAYOUTS = {
    "expanded scalar": lambda shape: torch.ones(()).expand(shape),
    "expanded over the last dim": lambda shape: torch.randn(*shape[:-1], 1).expand(shape),
    "expanded over the batch": lambda shape: torch.randn(1, *shape[1:]).expand(shape),
    "last dim strided": lambda shape: torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2),
    "reversed dims": lambda shape: torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", UPSTREAM_LAYOUTS)
def test_any_upstream_strides(name, packed):
    make = UPSTREAM_LAYOUTS[name]
    tensors = packed_inputs() if packed else dense_inputs()
    shapes = ((10, 4, 6), (4, 10)) if packed else ((2, 5, 4, 6), (2, 4, 5))
    if packed:  # the LSE of unused rows is −inf whatever comes: their gradient must not matter
        check_against_reference(tensors, make(shapes[0]), make(shapes[1]), causal=True, **PACKED)
    else:
        check_against_reference(tensors, make(shapes[0]), make(shapes[1]))


def test_sum_of_a_transposed_output_backward():
    q, k, v = learnt(*dense_inputs())
    fastattn.attention(q, k, v).transpose(1, 2).reshape(2, 4, -1).sum().backward()
    expected = learnt(q, k, v)
    fastattn.attention(*expected).sum().backward()
    for t, like in zip((q, k, v), expected, strict=True):
        assert torch.equal(t.grad, like.grad)


# --------------------------------------------------------------------------------------------------------------------
# Autograd.


def test_no_graph_without_gradients():
    tensors = dense_inputs()
    out = fastattn.attention(*tensors)
    assert not out.requires_grad
    with torch.no_grad():
        assert not fastattn.attention(*learnt(*tensors)).requires_grad
    with torch.inference_mode():
        inferred, lse = fastattn.attention(*learnt(*tensors), return_lse=True)
    assert inferred.is_inference() and lse.is_inference()
    assert torch.equal(inferred, out)


@pytest.mark.parametrize("which", ["q", "k", "v", "attn_bias", "sinks"])
def test_only_the_gradient_that_was_asked_for(which):
    arguments = dict(zip("qkv", dense_inputs(), strict=True), attn_bias=torch.randn(4, 1, 7), sinks=torch.randn(4))
    everything = {name: t.clone().requires_grad_() for name, t in arguments.items()}
    fastattn.attention(**everything).square().sum().backward()
    arguments[which] = arguments[which].clone().requires_grad_()
    fastattn.attention(**arguments).square().sum().backward()
    torch.testing.assert_close(arguments[which].grad, everything[which].grad)


def assert_gradients_in_their_own_dtypes() -> None:
    """q, k, v in bfloat16, a float32 bias and float16 sinks: each gradient comes in its tensor's dtype and shape."""
    tensors = learnt(*dense_inputs(dtype=torch.bfloat16), torch.randn(4, 1, 7), torch.randn(4, dtype=torch.float16))
    *_, bias, sinks = tensors
    fastattn.attention(*tensors[:3], attn_bias=bias, sinks=sinks).square().sum().backward()
    assert [layout(t.grad) for t in tensors] == [layout(t) for t in tensors]
    exact = learnt(*(t.float() for t in tensors))
    fastattn.reference.attention(*exact[:3], attn_bias=exact[3], sinks=exact[4]).square().sum().backward()
    for t, like in zip(tensors, exact, strict=True):
        torch.testing.assert_close(t.grad.float(), like.grad, atol=0.05, rtol=0.05)


def test_gradients_come_in_their_own_dtypes():
    assert_gradients_in_their_own_dtypes()


def test_backward_twice_gives_the_same():
    tensors = learnt(*dense_inputs())
    loss = fastattn.attention(*tensors, causal=True).square().sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, tensors)))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (2, 1), "softcap": 3.0}, {"alibi_slopes": torch.tensor([0.5, 0.3, 0.2, 0.1])}, PACKED],
    ids=["plain", "causal", "window-softcap", "alibi", "packed"],
)
def test_gradient_of_the_lse_alone(options):
    tensors = packed_inputs() if options is PACKED else dense_inputs()

    def gradients(attention, dtype):
        q, k, v = learnt(*(t.to(dtype) for t in tensors))
        out, lse = attention(q, k, v, return_lse=True, **options)
        weights = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).reshape(lse.shape)
        return torch.autograd.grad((lse.masked_fill(lse == -math.inf, 0.0) * weights).sum(), (q, k, v), allow_unused=True)

    dq, dk, dv = gradients(fastattn.attention, torch.float32)
    reference = fastattn.reference.attention
    (naive_dq, naive_dk, _), (dq64, dk64, _) = (gradients(reference, dtype) for dtype in (torch.float32, torch.float64))
    check_budget("attention dq", dq, naive_dq, dq64)
    check_budget("attention dk", dk, naive_dk, dk64)
    assert torch.equal(dv, torch.zeros_like(tensors[2]))


def test_gradient_of_the_lse_reaches_bias_and_sinks():
    """With logits s and sink σ, ∂lse/∂s = P and ∂lse/∂σ = 1 − ΣP: summed over everything, one a row."""
    q, k, v = dense_inputs()
    bias, sinks = learnt(torch.randn(5, 7), torch.randn(4))
    _, lse = fastattn.attention(q, k, v, attn_bias=bias, sinks=sinks, return_lse=True)
    lse.sum().backward()
    torch.testing.assert_close(bias.grad.sum() + sinks.grad.sum(), torch.tensor(float(lse.numel())))
    _, plain = fastattn.attention(q, k, v, attn_bias=bias.detach(), return_lse=True)
    torch.testing.assert_close(sinks.grad, torch.exp(sinks.detach()[:, None] - lse.detach()).sum((0, 2)))
    torch.testing.assert_close(lse, torch.logaddexp(plain, sinks[:, None]))


class Recorder(TorchDispatchMode):
    """Calls of fastattn's operators, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            self.calls.append((func.name().removeprefix("fastattn::"), args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out-lse"])
def test_an_unused_lse_costs_nothing(return_lse):
    """Its gradient is not a tensor of zeros but None, and a forward without gradients runs one operator."""
    tensors = learnt(*dense_inputs())
    with Recorder() as recorder:
        out = fastattn.attention(*tensors, return_lse=return_lse)
        (out[0] if return_lse else out).sum().backward()
    assert [name for name, _ in recorder.calls] == ["attention_fwd", "attention_bwd"]
    assert recorder.calls[1][1][1] is None
    with Recorder() as recorder:
        fastattn.attention(*dense_inputs())
    assert [name for name, _ in recorder.calls] == ["attention_fwd"]


@pytest.mark.parametrize("case", CASES)
def test_kept_weights_change_no_gradient(case):
    torch.manual_seed(1)
    expected = torch.ops.fastattn.attention_bwd(*backward_arguments(case))
    torch.manual_seed(1)
    for grad, like in zip(torch.ops.fastattn.attention_bwd(*backward_arguments(case, keep_weights=True)), expected, strict=True):
        torch.testing.assert_close(grad, like, rtol=1e-5, atol=1e-5)


def test_weights_are_kept_where_a_backward_comes(monkeypatch):
    monkeypatch.setattr(cpu_operators, "_found", set())

    def kept(*tensors, **options) -> bool:
        """Whether the forward was told to keep weights, and so the graph holds a tensor of S_q x S_k."""
        held = []
        with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
            out = fastattn.attention(*tensors, **options)
        if out.requires_grad:
            out.sum().backward()
        (_, arguments), *_ = recorder.calls
        assert arguments[-1] == any(t.shape[-3:] == (4, tensors[0].shape[1], tensors[1].shape[1]) for t in held)
        return arguments[-1]

    q, k, v = dense_inputs(1, 40, 50)
    packed = {"cu_seqlens_q": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K}
    assert kept(*learnt(q, k, v), softcap=5.0) and kept(*learnt(q, k, v), dropout_p=0.1)
    assert not kept(*learnt(q, k, v)) and not kept(q, k, v, softcap=5.0)
    with torch.no_grad():
        assert not kept(*learnt(q, k, v), softcap=5.0)
    assert not kept(*learnt(*packed_inputs()), softcap=5.0, **packed)
    assert kept(*learnt(q, k, v), attn_bias=torch.zeros(40, 50, requires_grad=True))
    assert not kept(*learnt(q, k, v), attn_bias=torch.zeros(40, 50))
    assert not kept(*learnt(*dense_inputs(1, 600, 500)), softcap=5.0)


def test_an_unused_lse_costs_nothing_compiled(fresh_dynamo):
    """A compiled graph hands zeros over for the gradient of an output that nobody used; the operator must not see them."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    dlse = []

    def backward_compiler(graph_module, _):
        nodes = graph_module.graph.find_nodes(op="call_function", target=torch.ops.fastattn.attention_bwd.default)
        dlse.extend(node.args[1] for node in nodes)
        return make_boxed_func(graph_module.forward)

    backend = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward), bw_compiler=backward_compiler)
    torch.compile(fastattn.attention, backend=backend, fullgraph=True)(*learnt(*dense_inputs())).sum().backward()
    assert dlse == [None]


@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_gradient_penalty_raises(which):
    """The case that `once_differentiable` gets wrong without a word: the upstream gradient itself needs no gradient."""
    tensors = learnt(*dense_inputs())
    x = tensors[which]
    penalty = torch.autograd.grad(fastattn.attention(*tensors).sum(), x, create_graph=True)[0].pow(2).sum()
    with pytest.raises(NotImplementedError, match="fastattn.attention: double backward is not supported"):
        (x.sum() + penalty).backward()


def test_second_derivative_raises_with_respect_to_the_upstream_gradient_too():
    tensors, dout = learnt(*dense_inputs()), torch.ones(2, 5, 4, 6, requires_grad=True)
    dq = torch.autograd.grad(fastattn.attention(*tensors), tensors[0], dout, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="fastattn.attention: double backward is not supported"):
        torch.autograd.grad(dq.sum(), dout)


def test_hessian_raises():
    q, k, v = dense_inputs()
    with pytest.raises(NotImplementedError, match="double backward|forward.mode AD"):
        torch.func.hessian(lambda x: fastattn.attention(x, k, v).sum())(q)


@pytest.mark.parametrize("which", ["q", "k", "v", "attn_bias", "sinks", "alibi_slopes"])
def test_forward_mode_raises(which):
    arguments = dict(zip("qkv", dense_inputs(), strict=True))
    arguments |= {"attn_bias": torch.randn(5, 7), "sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
    message = "fastattn.attention: forward-mode AD is not supported"

    def function(x):
        return fastattn.attention(**{**arguments, which: x})

    x = arguments[which]
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(function)(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=message):
            function(dual)
        assert function(x).shape == (2, 5, 4, 6)  # no tangent, nothing to refuse


# --------------------------------------------------------------------------------------------------------------------
# torch.func, checkpointing, export.


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("in_dims", "options"),
    [
        ((0, 0, 0), {"causal": True}),
        ((0, None, None), {}),
        ((None, 0, 0), {"window": (2, 2)}),
        ((1, 0, 2), {"softcap": 5.0}),
        ((0, 0, 0), PACKED),
    ],
    ids=["all", "q", "kv", "dims-102", "packed"],
)
def test_vmap_is_a_loop(in_dims, options):
    tensors = packed_inputs() if options is PACKED else dense_inputs()
    stacked = [t if d is None else torch.randn(*t.shape[:d], 3, *t.shape[d:]) for t, d in zip(tensors, in_dims, strict=True)]

    def loss(q, k, v):
        out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
        return out.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()

    function = torch.func.grad_and_value(loss, argnums=(0, 1, 2))
    grads, values = torch.func.vmap(function, in_dims)(*stacked)
    for i in range(3):
        one = [t if d is None else t.select(d, i) for t, d in zip(stacked, in_dims, strict=True)]
        expected_grads, expected = function(*one)
        torch.testing.assert_close(values[i], expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad[i], expected_grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradient_of_vmap_with_bias_and_sinks():
    """Gradients outside the vmap: an unbatched bias gets the sum over the batch."""
    q, k, v = (torch.randn(3, *t.shape) for t in dense_inputs())
    bias, sinks = learnt(torch.randn(5, 7), torch.randn(3, 4))

    def function(q, k, v, sinks):
        return fastattn.attention(q, k, v, attn_bias=bias, sinks=sinks)

    mapped = torch.func.vmap(function)(q, k, v, sinks)
    looped = torch.stack([function(*one) for one in zip(q, k, v, sinks, strict=True)])
    torch.testing.assert_close(mapped, looped)
    expected = torch.autograd.grad(looped.square().sum(), (bias, sinks))
    for grad, expected_grad in zip(torch.autograd.grad(mapped.square().sum(), (bias, sinks)), expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_asks_how_to_draw_the_dropout_mask():
    q, k, v = dense_inputs()
    stacked = v.expand(2, *v.shape)

    def function(v):
        return fastattn.attention(q, k, v, dropout_p=0.5)

    same, different = (torch.func.vmap(function, randomness=how)(stacked) for how in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(function)(stacked)


def test_func_grad_and_vjp_are_backward():
    tensors = dense_inputs()
    leaves = learnt(*tensors)
    out = fastattn.attention(*leaves, causal=True)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dout)
    _, vjp = torch.func.vjp(lambda *t: fastattn.attention(*t, causal=True), *tensors)
    assert all(map(torch.equal, vjp(dout), expected))
    grads = torch.func.grad(lambda *t: (fastattn.attention(*t, causal=True) * dout).sum(), argnums=(0, 1, 2))(*tensors)
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_checkpoint_repeats_the_dropout_mask(use_reentrant):
    def function(q, k, v):
        return fastattn.attention(q, k, v, causal=True, dropout_p=0.4)

    plain, recomputed = learnt(*dense_inputs()), []
    torch.manual_seed(1)
    out = function(*plain)
    out.square().sum().backward()
    recomputed = learnt(*plain)
    torch.manual_seed(1)
    again = torch.utils.checkpoint.checkpoint(function, *recomputed, use_reentrant=use_reentrant)
    torch.rand(3)  # other random numbers in between must not matter
    again.square().sum().backward()
    assert torch.equal(out, again)
    assert all(torch.equal(t.grad, like.grad) for t, like in zip(recomputed, plain, strict=True))


class Attention(torch.nn.Module):
    """Causal attention as a module, for export."""

    def forward(self, q, k, v):
        return fastattn.attention(q, k, v, causal=True, softcap=5.0)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_dynamic_lengths(strict):
    seqlen_q, seqlen_k = torch.export.Dim("seqlen_q", min=2, max=512), torch.export.Dim("seqlen_k", min=2, max=512)
    shapes = ({1: seqlen_q}, {1: seqlen_k}, {1: seqlen_k})
    program = torch.export.export(Attention(), dense_inputs(), dynamic_shapes=shapes, strict=strict)
    assert torch.ops.fastattn.attention_fwd.default in {node.target for node in program.graph.nodes}
    for lengths in ((5, 7), (12, 3), (33, 64)):
        tensors = dense_inputs(2, *lengths)
        assert torch.equal(program.module()(*tensors), Attention()(*tensors))


# --------------------------------------------------------------------------------------------------------------------
# Dropout's mask.


def test_dropout_follows_manual_seed():
    tensors = dense_inputs()
    torch.manual_seed(3)
    first, second = (fastattn.attention(*tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, fastattn.attention(*tensors, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone():
    tensors = dense_inputs()
    state = torch.get_rng_state()
    fastattn.attention(*tensors)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_dropout_keep_is_the_mask(packed):
    """With equal scores and v the identity, out is the mask itself, scaled."""
    batch, seqlen, heads, p = 2, 16, 3, 0.3
    q = torch.zeros(batch, seqlen, heads, seqlen)
    k, v = torch.zeros(batch, seqlen, 1, seqlen), torch.eye(seqlen).expand(batch, seqlen, seqlen)[:, :, None]
    options = {}
    if packed:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32)
        options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
    seed = draw_seed(q.device)
    out, lse = attend(q, k, v, dropout_p=p, dropout_seed=seed, **options)
    keep = dropout_keep(seed, batch, heads, seqlen, seqlen, p)
    expected = keep.transpose(1, 2) / ((1 - p) * seqlen)
    torch.testing.assert_close(out.reshape(expected.shape), expected)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(seqlen)))
    assert abs(keep.double().mean().item() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / keep.numel())


def assert_same_mask_in_backward(attention, v: torch.Tensor) -> None:
    """out is linear in v, so ⟨out, dout⟩ = ⟨v, dv⟩, provided that both directions use one mask."""
    out = attention(v)
    dout = torch.randn_like(out)
    dv = torch.autograd.grad(out, v, dout)[0]
    torch.testing.assert_close((out * dout).sum(), (v * dv).sum())


def test_dropout_mask_is_one_in_forward_and_backward():
    q, k, v = dense_inputs()
    assert_same_mask_in_backward(lambda v: fastattn.attention(q, k, v, dropout_p=0.5), v.requires_grad_())


# --------------------------------------------------------------------------------------------------------------------
# Autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_follows_the_region(dtype):
    q, k, v = learnt(*dense_inputs())
    with torch.autocast("cpu", dtype):
        out, lse = fastattn.attention(q, k.to(torch.bfloat16), v, return_lse=True)
        with torch.autocast("cpu", enabled=False):
            assert fastattn.attention(q, k, v).dtype == torch.float32
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected = fastattn.attention(q.to(dtype), k.to(torch.bfloat16).to(dtype), v.to(dtype))
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == torch.float32


def test_autocast_rounds_nothing_in_between():
    q, k, v = learnt(*(t.bfloat16() for t in dense_inputs()))
    with torch.autocast("cpu", torch.bfloat16):
        inside = fastattn.attention(q, k, v, softcap=2.0)
        grads = torch.autograd.grad(inside.sum(), (q, k, v))
    outside = fastattn.attention(q, k, v, softcap=2.0)
    assert torch.equal(inside, outside)
    assert all(map(torch.equal, grads, torch.autograd.grad(outside.sum(), (q, k, v))))


def test_autocast_leaves_errors_alone():
    q, k, v = dense_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="attention: k must have q's dtype torch.bfloat16, got torch.int64"):
            fastattn.attention(q, k.long(), v)
        with pytest.raises(TypeError, match="attention: q must be float16, bfloat16 or float32, got torch.float64"):
            fastattn.attention(q.double(), k, v)


# --------------------------------------------------------------------------------------------------------------------
# torch.compile.


@pytest.fixture
def no_recompilation(fresh_dynamo):
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request, fresh_dynamo):
    if request.param == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        pytest.skip("needs a C++ compiler: inductor")
    return request.param


def model(q, k, v, bias, sinks, softmax_scale, softcap):
    """Attention among pointwise work and layouts of its own, whose strides a compiler must hand over as they are."""
    q = (q * 2).transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = fastattn.attention(
        q, k.sin(), v, causal=True, softmax_scale=softmax_scale, softcap=softcap, attn_bias=bias, sinks=sinks,
        return_lse=True,
    )  # fmt: skip
    return out.transpose(1, 2).reshape(out.shape[0], -1).cos(), lse + 1


def test_compiled_is_eager(backend):
    """fullgraph, forward and backward, lengths and float options changing between calls."""
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for seqlen_q, seqlen_k, scale, softcap in ((5, 7, 0.1, 3.0), (9, 4, 0.1, 3.0), (6, 17, 0.37, 50.0)):
        tensors = (*dense_inputs(2, seqlen_q, seqlen_k), torch.randn(seqlen_q, seqlen_k), torch.randn(4))
        ours, expected = (learnt(*tensors) for _ in range(2))
        results, expected_results = compiled(*ours, scale, softcap), model(*expected, scale, softcap)
        for result, expected_result in zip(results, expected_results, strict=True):
            assert layout(result) == layout(expected_result)
            torch.testing.assert_close(result, expected_result)
        sum(t.square().sum() for t in results).backward()
        sum(t.square().sum() for t in expected_results).backward()
        for name, t, like in zip(("q", "k", "v", "attn_bias", "sinks"), ours, expected, strict=True):
            torch.testing.assert_close(t.grad, like.grad, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_lengths_do_not_recompile(no_recompilation, packed):
    compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True)
    for lengths in ((5, 7), (16, 8), (3, 100), (64, 64), (129, 17)):
        tensors = dense_inputs(1, *lengths)
        options = {"causal": True, "window": (8, 0)}
        if packed:
            tensors = [t[0] for t in tensors]
            options |= {f"cu_seqlens_{name}": torch.tensor([0, 2, s], dtype=torch.int32) for name, s in zip("qk", lengths)}
        tensors = learnt(*tensors)
        for t in tensors:
            torch._dynamo.mark_dynamic(t, 0 if packed else 1)
        out = compiled(*tensors, **options)
        torch.testing.assert_close(out, fastattn.attention(*tensors, **options))
        out.sum().backward()


def test_dynamic_batch_and_max_seqlen_do_not_recompile(no_recompilation):
    compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, longest in ((9, 5), (2, 9), (5, 6)):  # first, sizes unlike any other: equal ones would be taken as one
        q, k, v = (t.flatten(0, 1) for t in dense_inputs(batch, longest, longest))
        cu_seqlens = torch.arange(0, (batch + 1) * longest, longest, dtype=torch.int32)
        options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        torch.testing.assert_close(compiled(q, k, v, **options), fastattn.attention(q, k, v, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_keeps_weights_of_short_calls(fresh_dynamo, dtype):
    """One graph serves lengths on either side of what is kept, with a guard between them."""
    compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (20, 33, 256, 300, 530, 600):
        tensors = learnt(*dense_inputs(1, seqlen, seqlen, dtype=dtype))
        out, expected = compiled(*tensors, softcap=3.0), fastattn.attention(*tensors, softcap=3.0)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, *(torch.autograd.grad(o.float().square().sum(), tensors) for o in (out, expected))))


def test_compiled_dropout_draws_a_fresh_mask_each_call(backend):
    """A seed frozen into the graph would repeat one mask for ever."""
    q, k, v = dense_inputs()
    compiled = torch.compile(fastattn.attention, backend=backend, fullgraph=True)

    def attention(v):
        return compiled(q, k, v, dropout_p=0.5)

    torch.manual_seed(5)
    first, second = attention(v), attention(v)
    torch.manual_seed(5)
    assert torch.equal(first, attention(v))
    assert not torch.equal(first, second)
    assert_same_mask_in_backward(attention, v.clone().requires_grad_())


def test_compiled_lse_gradient_alone(fresh_dynamo):
    compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True)
    ours, expected = (learnt(*dense_inputs()) for _ in range(2))
    with torch.no_grad():
        for t, like in zip(expected, ours, strict=True):
            t.copy_(like)
    compiled(*ours, return_lse=True)[1].sum().backward()
    fastattn.attention(*expected, return_lse=True)[1].sum().backward()
    for t, like in zip(ours, expected, strict=True):
        torch.testing.assert_close(t.grad, like.grad)


def test_compiled_autocast_follows_the_region(fresh_dynamo):
    compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True)
    tensors = learnt(*dense_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(*tensors)
        assert out.dtype == torch.bfloat16 and torch.equal(out, fastattn.attention(*tensors))
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_compiled_gradient_penalty_raises(fresh_dynamo):
    compiled = torch.compile(fastattn.attention, backend="aot_eager", fullgraph=True)
    x, k, v = learnt(*dense_inputs())
    with pytest.raises((RuntimeError, NotImplementedError), match="double backward"):
        penalty = torch.autograd.grad(compiled(x, k, v).sum(), x, create_graph=True)[0].pow(2).sum()
        (x.sum() + penalty).backward()


# --------------------------------------------------------------------------------------------------------------------
# FLOPs.


def counted(function) -> tuple[int, int]:
    """(forward, backward) FLOPs, as PyTorch's counter has them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        out = function()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    return forward, counter.get_total_flops()


def visible(seqlen_q, seqlen_k, left=None, right=None) -> int:
    """How many keys all rows see, counted one by one."""
    pairs = ((j - (i + seqlen_k - seqlen_q)) for i in range(seqlen_q) for j in range(seqlen_k))
    return sum((left is None or -left <= d) and (right is None or d <= right) for d in pairs)


@pytest.mark.parametrize("seqlens", [(5, 7), (7, 5), (1, 9), (0, 3), (3, 0), (16, 16)], ids=str)
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (2, None), (3, 0), (1, 2), (0, 0), (20, 20)], ids=str)
def test_flops_count_visible_pairs(seqlens, left, right):
    """2 FLOPs a multiply-add: Q·Kᵀ and P·V; backward S, dQ, dK over D and dP, dV over D_v."""
    tensors = learnt(*dense_inputs(2, *seqlens))
    pairs = 2 * 4 * visible(*seqlens, left, right)
    forward, backward = counted(lambda: fastattn.attention(*tensors, window=(left, right)))
    assert forward == 2 * pairs * (8 + 6)
    assert backward == 2 * pairs * (3 * 8 + 2 * 6)


@pytest.mark.parametrize("shift", [-9, -3, -1, 0, 2])
def test_flops_of_negative_windows(shift):
    """torch's top-left causal mask is window_right = S_q − S_k, which may be negative."""
    q, k, v = learnt(*dense_inputs())
    forward, _ = counted(lambda: attend(q, k, v, window_right=shift)[0])
    assert forward == 2 * 8 * visible(5, 7, None, shift) * (8 + 6)


def test_flops_of_packed_sequences():
    tensors = learnt(*packed_inputs())
    options = {"cu_seqlens_q": CU_SEQLENS_Q, "cu_seqlens_k": CU_SEQLENS_K}
    pairs = 4 * (visible(3, 5, None, 0) + visible(0, 2, None, 0) + visible(5, 5, None, 0))
    forward, backward = counted(lambda: fastattn.attention(*tensors, causal=True, **options))
    assert (forward, backward) == (2 * pairs * (8 + 6), 2 * pairs * (3 * 8 + 2 * 6))


def test_flops_of_kept_weights():
    """S is not computed again, except for softcap's tanh."""
    bias, pairs = torch.zeros(5, 7, requires_grad=True), 2 * 4 * 5 * 7
    _, backward = counted(lambda: fastattn.attention(*learnt(*dense_inputs()), attn_bias=bias))
    assert backward == 2 * pairs * (2 * 8 + 2 * 6)
    _, backward = counted(lambda: fastattn.attention(*learnt(*dense_inputs()), attn_bias=bias, softcap=2.0))
    assert backward == 2 * pairs * (3 * 8 + 2 * 6)


def test_flops_of_fake_tensors():
    """A model's FLOPs without its memory; packed lengths are unknown there, so the longest counts for each."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = fastattn.attention(*learnt(*dense_inputs()), causal=True).shape
    expected = 2 * 8 * visible(5, 7, None, 0) * (8 + 6)
    with FakeTensorMode() as mode:
        tensors = learnt(*map(mode.from_tensor, dense_inputs()))
        forward, _ = counted(lambda: fastattn.attention(*tensors, causal=True))
        assert forward == expected and fastattn.attention(*tensors, causal=True).shape == real
        tensors = learnt(*map(mode.from_tensor, packed_inputs()))
        options = {name: mode.from_tensor(o) if isinstance(o, torch.Tensor) else o for name, o in PACKED.items()}
        forward, _ = counted(lambda: fastattn.attention(*tensors, **options))
        assert forward == 2 * 4 * 3 * 6 * 7 * (8 + 6)


# --------------------------------------------------------------------------------------------------------------------
# Small promises.


def test_deterministic_false_is_accepted_and_right():
    ours, expected = learnt(*dense_inputs()), None
    out = fastattn.attention(*ours, deterministic=False)
    out.sum().backward()
    expected = learnt(*ours)
    fastattn.attention(*expected).sum().backward()
    for t, like in zip(ours, expected, strict=True):
        torch.testing.assert_close(t.grad, like.grad)


def logged(level: str | None, interpret: bool) -> str:
    """What a call writes to stderr in a process with this FASTATTN_LOG."""
    code = (
        "import torch, fastattn\n"
        "q, k, v = (torch.ones(1, 5, 2, 16, requires_grad=True) for _ in range(3))\n"
        "fastattn.attention(q, k, v, causal=True).sum().backward()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("FASTATTN_LOG", "TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment |= {} if level is None else {"FASTATTN_LOG": level}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line for line in done.stderr.splitlines() if line.startswith("fastattn:"))


def test_log_level_1_names_each_call():
    assert logged(None, interpret=False) == ""
    lines = logged("1", interpret=False).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["attention_fwd", "attention_bwd"]
    assert "q float32(1, 5, 2, 16)" in lines[0] and "window_right=0" in lines[0] and "softmax_scale=0.25" in lines[0]


def test_log_level_2_names_each_tile():
    pytest.importorskip("triton", reason="needs triton: the kernels' tiles")
    pytest.importorskip("numpy", reason="needs numpy: the interpreter")
    text = logged("2", interpret=True)
    assert "q float32(1, 5, 2, 16)" in text
    assert text.count("block_m=") >= 2 or text.count("BLOCK_M=") >= 2
    assert "BLOCK_M" not in logged("1", interpret=True)


@pytest.mark.parametrize("shared", ["q is k is v", "k is v", "cu_seqlens"])
def test_compiled_with_one_tensor_in_two_places(shared):
    x, y = (torch.randn(10, 2, 16, requires_grad=True) for _ in range(2))
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)

    def call(x, y, cu):
        q, k, v = {"q is k is v": (x, x, x), "k is v": (x, y, y), "cu_seqlens": (x, y, x * 2)}[shared]
        return fastattn.attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    grads, expected = (torch.autograd.grad(f(x, y, cu).sum(), (x, y), allow_unused=True) for f in (compiled, call))
    for got, want in zip(grads, expected, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_integers_of_other_kinds():
    x, cu = torch.randn(10, 2, 16), torch.tensor([0, 4, 10], dtype=torch.int32)
    expected = fastattn.attention(x, x, x, window=(2, 0), cu_seqlens_q=cu, cu_seqlens_k=cu)
    longest = cu.diff().max()
    for integer in (longest, longest.numpy()[()] if importlib.util.find_spec("numpy") else 6):
        window = (torch.tensor(2), 0)
        got = fastattn.attention(
            x, x, x, window=window, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=integer, max_seqlen_k=integer
        )
        assert torch.equal(got, expected)
    assert torch.equal(
        fastattn.attention(x[None], x[None], x[None], window=(2**70, None)), fastattn.attention(x[None], x[None], x[None])
    )


def test_float32_follows_either_way_of_asking_torch_for_tf32():
    code = """
import torch, fastattn
torch.backends.cuda.matmul.fp32_precision = "tf32"  # from here on torch refuses to say float32_matmul_precision
from fastattn.kernels.launch import precision_of
assert precision_of(torch.float32) == "tf32" and precision_of(torch.float16) == "ieee"
"""
    pytest.importorskip("triton", reason="needs triton")
    subprocess.run([sys.executable, "-c", code], check=True)
