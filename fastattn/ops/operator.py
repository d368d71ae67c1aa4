"""How an op becomes a torch operator: schema, implementation and fake in one call, and autograd as a Function around it.

Autograd is not `register_autograd`, which gives zero JVPs, nor the bare operator in a backward, through which a double
backward drops terms without a word. It is an autograd.Function without jvp, called by `apply`, whose backward hands its
gradients to `once`: both forward-mode AD and a gradient of a gradient then raise, naming the op.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad, profiler

from . import checks, tuned

_library = torch.library.Library("fastattn", "FRAGMENT")
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_BATCHED = torch._C._parse_dispatch_key("Batched")


def define(schema: str, implementation: Callable, fake: Callable, *, torch_on_cuda: bool = False) -> None:
    """Define `fastattn::<schema>`, run by `implementation` on CPU and CUDA tensors, described by `fake` to compilers.

    The fake allocates what the implementation returns: shapes, dtypes and strides. torch_on_cuda: the implementation computes with
    torch's own ops there too, not with kernels alone.
    """
    _library.define(schema)
    name = schema.partition("(")[0]

    @functools.wraps(implementation)
    def alone(*args: Any) -> Any:
        # Of steps in torch's own ops, autograd would record each under create_graph, and autocast round some to half precision.
        if not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled():
            return implementation(*args)
        with torch.no_grad(), torch._C._DisableAutocast():
            return implementation(*args)

    on_cuda = tuned.before(alone if torch_on_cuda else implementation)
    _library.impl(name, alone, "CPU")
    _library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_library)
    setattr(operators, name, functools.partial(_call, getattr(torch.ops.fastattn, name).default, alone, on_cuda))


# What `define` has defined, to be called as torch.ops.fastattn's: `operators.<name>(…)`. The dispatcher takes longer to reach an
# implementation in Python than all else that an op does around its kernel, so it is passed by where nobody watches the call.
operators = types.SimpleNamespace()


def _call(operator: torch._ops.OpOverload, on_cpu: Callable, on_cuda: Callable, *args: Any) -> Any:
    """The operator's result."""
    if not is_watched():
        implementation = None
        for arg in args:
            if isinstance(arg, Tensor):
                # Of these the dispatcher makes plain ones, or a loop over them: views of −x, zeros without memory, and what wraps a tensor
                # up, be it for the older vmap or for a transform that it has outlived.
                if type(arg) not in _PLAIN or arg.is_neg() or arg._is_zerotensor() or not torch._C._has_storage(arg):
                    break
                implementation = implementation or (on_cuda if arg.is_cuda else on_cpu if arg.is_cpu else operator)
        else:
            if implementation is not None:
                return implementation(*args)
    return operator(*args)


def is_watched() -> bool:
    """Whether a compiler, modes, transforms, a tracer or a profiler (of all threads, too) are to see operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or profiler._is_profiler_enabled
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def differentiable(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A class decorator: gives the Function a vmap rule. To be called through `apply`, with all arguments in their places."""
    function.generate_vmap_rule = True
    return function


def apply(op: str, function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` where a gradient is wanted, else its forward alone: a Function costs as much again.

    Raises: NotImplementedError under forward-mode AD, and where torch.compile traces a torch.func transform: it would differentiate the
    forward, which has no derivative of its own, and give gradients of 0.
    """
    if forward_ad._current_level >= 0 and any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args):
        raise NotImplementedError(
            f"fastattn.{op}: forward-mode AD is not supported; use fastattn.reference.{op}"
        )
    if not torch.is_grad_enabled():
        return function.forward(*args)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed and torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(f"fastattn.{op}: torch.func transforms are not supported within torch.compile (but under no_grad)")
    if not wants_gradient(*args):
        return function.forward(*args)
    if transformed or torch.compiler.is_compiling():
        return function.apply(*args)
    # What torch's own `apply` comes to here; but it first matches arguments to the signature, for longer than all else takes.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(args))


def wants_gradient(*args: Any) -> bool:
    """Whether autograd records what is computed from the tensors among these, within torch.func's transforms or outside."""
    if torch.is_grad_enabled():
        wrapped = torch._C._are_functorch_transforms_active()
        for arg in args:  # a generator would take longer than the question
            if isinstance(arg, Tensor) and (arg.requires_grad or (wrapped and _within_requires_grad(arg))):
                return True
    return False


def _within_requires_grad(t: Tensor) -> bool:
    """Of what transforms have wrapped up in this tensor, which does not say so itself: one that vmap has batched, say."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
        if t.requires_grad:
            return True
    return False


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In the dtype that a surrounding autocast region gives a linear layer of the first one; as they are outside of any."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in checks.FLOAT_DTYPES else t for t in tensors)


def once(op: str, grads: Sequence[Tensor | None], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """A backward's gradients, made such that differentiating them again raises.

    inputs: what they were computed from, upstream gradients and saved tensors alike, at most eight.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # nothing records this backward
        return tuple(grads)
    sources = [t for t in inputs if t is not None and wants_gradient(t)]
    # The older vmap, of is_grads_batched, hides what a tensor has in it: no saying whether this is to be differentiated again.
    if any(t is not None and torch._C._dispatch_keys(t).has(_BATCHED) for t in inputs):
        raise NotImplementedError(f"fastattn.{op}: batched gradients are not supported with create_graph=True")
    if not sources:
        return tuple(grads)
    sources += [None] * (8 - len(sources))
    return tuple(None if grad is None else _Once.apply(op, grad, *sources) for grad in grads)


@differentiable
class _Once(torch.autograd.Function):
    """The identity on `grad`, which autograd takes for a function of all its tensors, and which has no derivative."""

    @staticmethod
    def forward(op, grad, a, b, c, d, e, f, g, h):  # no *sources: Dynamo counts the parameters to tell whether there is a ctx
        return grad.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"fastattn.{ctx.op}: double backward is not supported; "
            f"use fastattn.reference.{ctx.op} where a gradient of a gradient is needed"
        )
