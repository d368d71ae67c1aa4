"""Calls of fastattn's operators that pass the dispatcher by, and everything that has to see them nonetheless."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn

pytestmark = pytest.mark.both


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 17)


@pytest.fixture
def dispatched(monkeypatch):
    """Whether f asks the dispatcher for softmax_fwd."""

    def ask(f) -> bool:
        calls = []
        (call,) = [fastattn.ops.operator.operators.softmax_fwd]
        operator, *implementations = call.args

        def counted(*args):
            calls.append(args)
            return operator(*args)

        with monkeypatch.context() as patch:
            patch.setattr(fastattn.ops.operator.operators, "softmax_fwd", type(call)(call.func, counted, *implementations))
            f()
        return bool(calls)

    return ask


def test_a_plain_call_passes_it_by(x, dispatched):
    leaf = x.clone().requires_grad_()
    parameter = torch.nn.Parameter(x)
    for call in (lambda: fastattn.softmax(x, -1), lambda: fastattn.softmax(leaf, -1).sum().backward(), lambda: fastattn.softmax(parameter, -1)):
        assert not dispatched(call)
    with torch.inference_mode():
        assert not dispatched(lambda: fastattn.softmax(x, -1))
    assert torch.equal(fastattn.softmax(x, -1), torch.ops.fastattn.softmax_fwd(x, 1, x.dtype))


def test_modes_see_operators(x, dispatched):
    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch, Function):
        seen: list[str] = []
        with mode():
            assert dispatched(lambda: fastattn.softmax(x, -1))
        assert any("softmax_fwd" in name for name in seen), mode


def test_subclasses_see_operators(x, dispatched):
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    seen: list[str] = []
    assert dispatched(lambda: fastattn.softmax(x.as_subclass(Named), -1))
    assert any("softmax_fwd" in name for name in seen)


def test_the_profiler_names_operators(x):
    for profiler in (torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), torch.autograd.profiler.profile()):
        with profiler:
            fastattn.softmax(x, -1)
        assert "fastattn::softmax_fwd" in {event.key for event in profiler.key_averages()}


def test_a_profiler_of_all_threads_names_those_of_others(x):
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=config) as profiler:
        thread = threading.Thread(target=lambda: fastattn.softmax(x, -1))
        thread.start()
        thread.join()
    assert "fastattn::softmax_fwd" in {event.key for event in profiler.key_averages()}


def test_tracers_record_operators(x):
    graph = make_fx(lambda t: fastattn.softmax(t, -1))(x)
    assert "softmax_fwd" in graph.code
    traced = torch.jit.trace(lambda t: fastattn.softmax(t, -1), x, check_trace=False)
    assert "fastattn::softmax_fwd" in str(traced.graph)


def test_transforms_see_operators(x, dispatched):
    assert dispatched(lambda: torch.vmap(lambda row: fastattn.softmax(row, -1))(x))
    with torch._subclasses.FakeTensorMode() as mode:
        assert dispatched(lambda: fastattn.softmax(mode.from_tensor(x), -1))


def test_negative_views_are_the_dispatchers(x, dispatched):
    """Such as z.conj().imag is: a plain tensor whose memory holds −x."""
    view = torch._neg_view(x)
    assert type(view) is torch.Tensor and dispatched(lambda: fastattn.softmax(view, -1))
    torch.testing.assert_close(fastattn.softmax(view, -1), torch.softmax(-x, -1))


def test_zeros_without_memory_are_the_dispatchers(dispatched):
    zeros = torch._efficientzerotensor((3, 17))
    assert type(zeros) is torch.Tensor and zeros.data_ptr() == 0
    assert dispatched(lambda: fastattn.softmax(zeros, -1))
    torch.testing.assert_close(fastattn.softmax(zeros, -1), torch.full((3, 17), 1 / 17))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_what_outlives_a_transform_is_what_it_wraps(x, grad):
    """A tensor that torch.func.grad has wrapped, of which it has let go."""
    kept = []
    torch.func.grad(lambda t: (kept.append(t), t.sum())[1])(x)
    assert type(kept[0]) is torch.Tensor and not torch._C._are_functorch_transforms_active()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fastattn.softmax(kept[0], -1), torch.softmax(x, -1))


def test_batched_gradients_are_the_dispatchers():
    """By the older vmap, in a backward that is itself a forward."""
    angles = torch.rand(5, 4)
    q, k = (torch.randn(2, 5, 3, 8, requires_grad=True) for _ in range(2))
    outs = fastattn.apply_rotary(q, k, angles.cos(), angles.sin())
    many = [torch.randn(4, *out.shape) for out in outs]
    batched = torch.autograd.grad(outs, (q, k), many, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        alone = torch.autograd.grad(outs, (q, k), [t[i] for t in many], retain_graph=True)
        for all_, one in zip(batched, alone, strict=True):
            torch.testing.assert_close(all_[i], one)


def test_other_devices_are_the_dispatchers(x, dispatched):
    result = []
    assert dispatched(lambda: result.append(fastattn.softmax(x.to("meta"), -1)))
    assert result[0].is_meta and result[0].shape == x.shape
