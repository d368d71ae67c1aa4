"""What every differentiable op is held to, in one place: the error budget, layouts, purity, derivatives, compilers, the launch path.

An op under test is a function of named tensors, `f(**tensors) -> tensor or tuple of tensors`. Tests marked `both` run twice: in the
interpreter's process on the kernels, under the bounds and race checker, and in the other on the CPU path.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.testing.budget import check_budget

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])

Op = Callable[..., "Tensor | tuple[Tensor, ...]"]


def outputs(result: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def upstream(op: Op, tensors: dict[str, Tensor], layout: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    """Random gradients of op's outputs, in their dtypes."""
    return [layout(torch.randn(t.shape).to(t.dtype)) for t in outputs(op(**tensors))]


def run(op: Op, tensors: dict[str, Tensor], douts: list[Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs, and the gradient of each floating tensor. dtype casts those first; None takes them as they lie, strides and all."""
    leaves = {}
    for name, t in tensors.items():
        t = t.detach() if dtype is None or not t.is_floating_point() else t.detach().to(dtype)
        leaves[name] = t.requires_grad_() if t.is_floating_point() else t
    outs = outputs(op(**leaves))
    learnt = {name: t for name, t in leaves.items() if t.is_floating_point()}
    loss = [(out, dout.to(out.dtype)) for out, dout in zip(outs, douts, strict=True) if out.requires_grad]
    grads = torch.autograd.grad([out for out, _ in loss], list(learnt.values()), [dout for _, dout in loss], allow_unused=True)
    results = {f"out{i}": out.detach() for i, out in enumerate(outs)}
    return results | {f"d{name}": grad for name, grad in zip(learnt, grads, strict=True) if grad is not None}


def check_op(
    name: str, op: Op, oracle: Op, tensors: dict[str, Tensor], douts: list[Tensor] | None = None, naive: Op | None = None
) -> dict[str, Tensor]:
    """`op` against `oracle` in float64, output by output and gradient by gradient, within twice the error of `oracle` in the tensors'
    own dtypes (or of `naive`, where that computation is something else, torch's own say). Returns op's results."""
    douts = upstream(op, tensors) if douts is None else douts
    got = run(op, tensors, douts)
    truth, baseline = run(oracle, tensors, douts, torch.float64), run(naive or oracle, tensors, douts)
    assert got.keys() == truth.keys(), f"{name}: gradients of {got.keys()}, the oracle has {truth.keys()}"
    for key, value in got.items():
        check_budget(f"{name} {key}", value, baseline[key], truth[key])
    return got


# Layouts of a (…, N) input, all with N contiguous but the last two.
INPUT_LAYOUTS = {
    "contiguous": lambda t: t,
    "padded rows": lambda t: torch.cat([t, t[..., : 8 if t.shape[-1] >= 8 else 1]], -1)[..., : t.shape[-1]],
    "odd row stride": lambda t: torch.cat([t, t[..., :1]], -1)[..., : t.shape[-1]],
    "offset by one": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "rows swapped": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 2 else t,
    "every other row": lambda t: t.repeat_interleave(2, dim=-2)[..., ::2, :] if t.dim() > 1 else t,
    "expanded rows": lambda t: t[..., :1, :].expand_as(t) if t.dim() > 1 else t,
    "last dim strided": lambda t: t.unsqueeze(-1).repeat_interleave(2, -1)[..., 0],
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
}
UPSTREAM_LAYOUTS = {
    "expanded scalar": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape),
    "expanded over columns": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
    "expanded over rows": INPUT_LAYOUTS["expanded rows"],
    "transposed": INPUT_LAYOUTS["transposed"],
    "odd row stride": INPUT_LAYOUTS["odd row stride"],
}


def check_pure(op: Op, tensors: dict[str, Tensor]) -> None:
    """Neither an input nor an upstream gradient is written to, forward or backward, and no output shares an input's memory."""
    douts = upstream(op, tensors)
    before = [t.clone() for t in (*tensors.values(), *douts)]
    results = run(op, tensors, douts)
    for old, new in zip(before, (*tensors.values(), *douts), strict=True):
        assert torch.equal(old, new)
    inputs = {t.untyped_storage().data_ptr() for t in (*tensors.values(), *douts) if t.numel()}
    for name, t in results.items():
        assert not t.numel() or t.untyped_storage().data_ptr() not in inputs, f"{name} shares memory with an input"


def check_transforms(name: str, op: Op, tensors: dict[str, Tensor]) -> None:
    """Under vmap outputs and gradients are a loop's. A gradient penalty and a JVP raise by name, for each tensor that has a gradient:
    silence would be a wrong number."""
    check_vmap(op, tensors)
    check_hidden_second_derivatives(name, op, tensors)
    floating = [key for key, t in tensors.items() if t.is_floating_point()]
    for key in floating:
        leaves = {k: t.detach().clone().requires_grad_(k == key) if t.is_floating_point() else t for k, t in tensors.items()}
        total = sum(t.float().sum() for t in outputs(op(**leaves)))
        (grad,) = torch.autograd.grad(total, leaves[key], create_graph=True)
        with pytest.raises(NotImplementedError, match=f"fastattn.{name}: double backward is not supported"):
            (leaves[key].float().sum() + grad.float().pow(2).sum()).backward()
        fixed = {k: t for k, t in tensors.items() if k != key}
        with pytest.raises(NotImplementedError, match=f"fastattn.{name}: forward-mode AD is not supported"):
            torch.func.jvp(lambda t, key=key, fixed=fixed: op(**fixed, **{key: t}), (tensors[key],), (tensors[key],))


def check_vmap(op: Op, tensors: dict[str, Tensor]) -> None:
    """Mapped over all floating tensors, and differentiated outside the map, where nothing within it knows that a gradient is wanted."""
    batch = {key: torch.stack([t, t.flip(0)]).requires_grad_() for key, t in tensors.items() if t.is_floating_point()}
    fixed = {key: t for key, t in tensors.items() if key not in batch}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        mapped = outputs(torch.func.vmap(lambda one: op(**fixed, **one))(batch))
        singly = zip(*(outputs(op(**fixed, **{key: t[i] for key, t in batch.items()})) for i in range(2)), strict=True)
        looped = [torch.stack(outs) for outs in singly]
        learnt = [i for i, out in enumerate(looped) if out.requires_grad]
        douts = [torch.randn_like(looped[i]) for i in learnt]
        got, expected = (torch.autograd.grad([outs[i] for i in learnt], list(batch.values()), douts) for outs in (mapped, looped))
    for mine, theirs in zip((*mapped, *got), (*looped, *expected), strict=True):
        torch.testing.assert_close(mine, theirs)


def check_hidden_second_derivatives(name: str, op: Op, tensors: dict[str, Tensor]) -> None:
    """A gradient of a gradient raises, or is right, where transforms hide from a backward that there will be one: taken within vmap and
    differentiated outside, or batched."""
    batch = {key: torch.stack([t, t.flip(0)]).requires_grad_() for key, t in tensors.items() if t.is_floating_point()}
    fixed = {key: t for key, t in tensors.items() if key not in batch}

    def penalty(one: dict[str, Tensor]) -> Tensor:
        grads = torch.func.grad(lambda one: sum(t.float().sum() for t in outputs(op(**fixed, **one))))(one)
        return sum(grad.float().pow(2).sum() for grad in grads.values())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss = torch.func.vmap(penalty)(batch).sum() + sum(t.float().sum() for t in batch.values())
        with pytest.raises(NotImplementedError, match=f"fastattn.{name}: double backward is not supported"):
            loss.backward()
        leaves = {key: t.detach().clone().requires_grad_() for key, t in tensors.items() if t.is_floating_point()}
        outs = [t for t in outputs(op(**fixed, **leaves)) if t.requires_grad]
        batched = [torch.randn(2, *t.shape).to(t.dtype) for t in outs]
        with pytest.raises(NotImplementedError, match=f"fastattn.{name}: batched gradients are not supported"):
            torch.autograd.grad(outs, list(leaves.values()), batched, is_grads_batched=True, create_graph=True)


def check_compiled(op: Op, tensors: dict[str, Tensor], dynamic: bool | None = None, backend: str = "inductor") -> None:
    """Under torch.compile(fullgraph=True) outputs and gradients are eager's, bit for bit, and so are their layouts."""
    torch._dynamo.reset()
    douts = upstream(op, tensors)
    compiled = torch.compile(lambda **kwargs: op(**kwargs), fullgraph=True, dynamic=dynamic, backend=backend)
    eager, got = run(op, tensors, douts), run(compiled, tensors, douts)
    for name, value in eager.items():
        assert torch.equal(got[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
    torch._dynamo.reset()


def layout(t: Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype


def check_operator(operator, *args) -> None:
    """torch.library.opcheck, and a fake whose results are laid out as the real ones: inductor counts on it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.library.opcheck(operator.default, args)
    real = outputs(operator(*args))
    with FakeTensorMode() as mode:
        fake = outputs(operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)))
    assert [layout(t) for t in fake] == [layout(t) for t in real]
    assert all(t.is_contiguous() for t in real)


def runs_as_on_cuda(monkeypatch: pytest.MonkeyPatch, op: str):
    """The op's module, whose implementations choose as they do for CUDA tensors: kernels run, values are not looked at."""
    pytest.importorskip("triton", reason="needs triton")
    module = importlib.import_module(f"fastattn.ops.{op}")
    monkeypatch.setattr(module, "runs_kernels", lambda tensor: True)
    if hasattr(module, "checks_values"):
        monkeypatch.setattr(module, "checks_values", lambda tensor: False)
    return module


def launched_on(capability: tuple[int, int], call: Callable[[], object]) -> list:
    """The launches of `call` under the stub driver of a part, none of which may wait for a GPU: call an op's implementation itself."""
    from fastattn.testing.stub_driver import no_host_sync, stub_driver

    with stub_driver(capability) as driver, no_host_sync():
        call()
        return list(driver.launches)
