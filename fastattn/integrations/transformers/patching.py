"""`patch`: the norms, rotary embedding, gated MLPs, experts and loss of one transformers model on fastattn; `unpatch`: as it was.

A module's class is looked up in a table (`replacements.TABLE`, `loss.MODELS`), and the module itself gets another forward, as an attribute
of its own. Parameters, state_dict, hooks, classes and other models are not touched, and the module's attributes are read at each call:
weights may be loaded, moved, cast, sharded or wrapped by adapters afterwards.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import loss
from .loss import full_name
from .replacements import ROTARY, TABLE, with_rotary

MARK = "_fastattn_swap"  # the attribute that remembers what patch put in place, in case somebody wraps it later
LOOKS_RELEVANT = re.compile(r"(Norm|MLP|Experts)$")  # a class that a report should mention though no row is for it


@dataclass(frozen=True)
class Line:
    """`count` modules of one class. part: "norm", "rotary", "mlp", "experts" or "loss"; by: fastattn's functions, where they were swapped;
    reason: why not, where they were left."""

    part: str
    module: str
    count: int
    by: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `patch` did. `str()` is a table."""

    model: str
    swapped: tuple[Line, ...]
    left: tuple[Line, ...]

    def __str__(self) -> str:
        lines = [*self.swapped, *self.left]
        totals = [sum(line.count for line in part) for part in (self.swapped, self.left)]
        table = [f"{self.model}: {totals[0]} forwards on fastattn, {totals[1]} left"]
        width = max((len(line.module) for line in lines), default=0)
        for line in lines:
            row = f"  {line.part:<8}{line.module:<{width}}  {line.count:>4}  {line.by or 'left: ' + line.reason}"
            table.append(row)
        return "\n".join(table)


# --------------------------------------------------------------------------------------------------------------------
# What stands in a forward's place.


class Swap:
    """A module's new forward. deepcopy and pickle take it along: it then belongs to the copy."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]):
        self.module, self.function = module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The class's, which transformers and its Trainer ask a model's forward for."""
        signature = inspect.signature(type(self.module).forward)
        _, *parameters = signature.parameters.values()
        return signature.replace(parameters=parameters)


class RotarySwap(Swap):
    """The class's own forward with another rotary function, made anew where it is unpickled: it is in no module."""

    def __init__(self, module: nn.Module):
        super().__init__(module, with_rotary(type(module)))

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])


class ModelSwap(Swap):
    """A whole model's forward; `names` are its class's parameters, by position."""

    def __init__(self, module: nn.Module):
        super().__init__(module, loss.model_forward)
        self.names = list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class HeadSwap(Swap):
    """A head's forward; `request` is what the model's forward asks of it, while it runs."""

    def __init__(self, module: nn.Module):
        super().__init__(module, loss.head_forward)
        self.request = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.function(self, hidden)


def _put(module: nn.Module, swap: Swap) -> None:
    module.forward = swap
    setattr(module, MARK, swap)


# --------------------------------------------------------------------------------------------------------------------
# Patching.


def patch(model: nn.Module) -> Report:
    """Give the modules of `model` that fastattn can compute a forward that does. Calling it again changes nothing.

    model: a transformers model, or any module with some of its modules inside. The classes that are known are those of Llama, Mistral,
        Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 2 and 3 (text), gpt-oss, GPT-2, BERT, BART, T5 and ViT.

    Returns what was swapped, and what was left and why: classes of norms, MLPs and experts that no row is for (subclasses of known ones
    included), modules whose forward or attributes are not what the row was written for, and float64. Attention is not part of it: that is
    `register` and `attn_implementation`.

    Forwards and gradients are the class's, up to rounding. One thing differs in kind: in training mode a forward with labels returns its
    loss without logits (`logits=None`), unless it is called with skip_logits=False; `loss.py` says when exactly.
    """
    swapped: Counter[tuple[str, str, str]] = Counter()
    left: Counter[tuple[str, str, str]] = Counter()
    for module in model.modules():
        for part, by, reason in (_patch_module(module), _patch_loss(module)):
            if by or reason:
                (left if reason else swapped)[part, type(module).__name__, reason or by] += 1
    return Report(
        type(model).__name__,
        tuple(Line(part, name, count, by=by) for (part, name, by), count in swapped.items()),
        tuple(Line(part, name, count, reason=reason) for (part, name, reason), count in left.items()),
    )


NOTHING = ("", "", "")


def _patch_module(module: nn.Module) -> tuple[str, str, str]:
    """(part, by, reason) for one module; by without a reason means that it runs on fastattn now."""
    row = TABLE.get(full_name(type(module)))
    if row is None:
        return _unknown(module)
    reason = row.unfit(module) or _unfit(module)
    if reason is None and MARK not in vars(module):
        _put(module, RotarySwap(module) if row.forward is with_rotary else Swap(module, row.forward))
    return row.part, row.by, reason or ""


def _patch_loss(module: nn.Module) -> tuple[str, str, str]:
    if not isinstance(module, PreTrainedModel):
        return NOTHING
    head = loss.MODELS.get(full_name(type(module)))
    if head is None:
        has_loss = "labels" in inspect.signature(type(module).forward).parameters
        return ("loss", "", "no row of the table is for its loss") if has_loss else NOTHING
    by = "linear_cross_entropy, cross_entropy" if head.shifted else "linear_cross_entropy"
    if MARK in vars(module):
        return "loss", by, _unfit(module) or ""
    reason = _unfit(module) or loss.unfit_model(module, head)
    if reason is None:
        _put(module, ModelSwap(module))
        linear = module.get_submodule(head.path)
        _put(linear, HeadSwap(linear))
        if head.shifted:
            module.loss_function = loss.causal_lm_loss
    return "loss", by, reason or ""


def _unfit(module: nn.Module) -> str | None:
    """Why a module of a known class must be left, whatever the row: its forward is not the class's, or its dtype is not fastattn's."""
    forward, mark = type(module).forward, vars(module).get(MARK)
    if (forward.__module__, forward.__qualname__) != (type(module).__module__, f"{type(module).__qualname__}.forward"):
        return f"its class's forward has been replaced by {forward.__module__}.{forward.__qualname__}"
    if vars(module).get("forward") is not mark:
        return "its forward has been replaced already"
    if any(parameter.dtype == torch.float64 for parameter in module.parameters()):
        return "it is in float64"
    return None


def _unknown(module: nn.Module) -> tuple[str, str, str]:
    """A class that no row is for: mentioned where a reader of the report might think that it was swapped."""
    kind = type(module)
    for base in kind.__mro__[1:]:
        if (row := TABLE.get(full_name(base))) is not None:
            return row.part, "", f"a subclass of {base.__name__} may compute something else"
    if found := LOOKS_RELEVANT.search(kind.__name__):
        return found[1].lower(), "", "no row of the table is for its class"
    if ROTARY in getattr(getattr(kind.forward, "__code__", None), "co_names", ()):
        return "rotary", "", "no row of the table is for its class"
    return NOTHING


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: every forward is the class's again, and so is the loss function. A model that is not patched is left as it is.

    Raises: ValueError where something else has replaced or wrapped a forward since: nothing is undone then.
    """
    marked = {name: module for name, module in model.named_modules() if MARK in vars(module)}
    for name, module in marked.items():
        if vars(module).get("forward") is not vars(module)[MARK]:
            raise ValueError(
                f"unpatch: the forward of {name or 'the model'} must be the one that patch put there, "
                f"got {module.forward!r}: undo that first"
            )
    for module in marked.values():
        if isinstance(module.forward, ModelSwap) and vars(module).get("_loss_function") is loss.causal_lm_loss:
            del module._loss_function
        del module.forward
        delattr(module, MARK)
