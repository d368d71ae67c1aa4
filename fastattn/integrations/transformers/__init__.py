"""Hugging Face transformers (5.17 and newer) on fastattn.

    from fastattn.integrations import transformers as on_transformers
    on_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn", experts_implementation="fastattn")
    print(on_transformers.patch(model))          # norms, rotary embedding, gated MLPs, experts and loss of this one model

`register` patches no model code: transformers has a registry of attention functions and one of mask functions, and a name must be in both
(without the second, a model is given no mask at all, even for a padded batch), and a registry of what runs a mixture's experts.
`model.set_attn_implementation("fastattn")` and `model.set_experts_implementation("fastattn")` switch a model that is already loaded.
`patch` gives the modules of one model another forward; classes, and other models, stay as they are.

The files: `attention.py` and `experts.py` hold the functions of the registries, `continuous_batching.py` what `model.generate_batch`
calls, `replacements.py` the table of what replaces what, `loss.py` the loss without logits, and `patching.py` puts them into a model.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from . import continuous_batching as _continuous_batching
from . import experts as _experts
from .attention import attention_forward, attention_mask
from .continuous_batching import FLASH_NAME
from .experts import experts_forward
from .patching import Line, Report, patch, unpatch

__all__ = [
    "FLASH_NAME",
    "NAME",
    "Line",
    "Report",
    "attention_forward",
    "attention_mask",
    "experts_forward",
    "patch",
    "register",
    "unpatch",
    "unregister",
]

NAME = "fastattn"


class _Entries:
    """What fastattn has put into transformers' registries, and what it found there."""

    def __init__(self) -> None:
        self.undo: list[tuple[dict, str, Any, Any]] = []

    def put(self, registry: type, name: str, function: Any) -> None:
        mapping = registry._global_mapping  # a registry has a method to add to it, and none to take away
        if mapping.get(name) is not function:
            self.undo.append((mapping, name, mapping.get(name), function))
            registry.register(name, function)

    def take_back(self) -> None:
        """An entry that somebody has replaced since stays theirs."""
        while self.undo:
            mapping, name, before, function = self.undo.pop()
            if mapping.get(name) is not function:
                continue
            if before is None:
                del mapping[name]
            else:
                mapping[name] = before


_entries = _Entries()


def register(*, continuous_batching: bool = False) -> None:
    """Make "fastattn" a value of `attn_implementation` and of `experts_implementation`. Calling it again changes nothing.

    continuous_batching: also make "fastattn_flash2" (`FLASH_NAME`) a value of `attn_implementation`: the name for `model.generate_batch`,
    and for padded or packed batches without padding's work. Its "flash" is what transformers asks of a name that is to run so; behind it
    is transformers' own wrapper, over fastattn's kernels. It takes replacing one private function of transformers
    (`modeling_flash_attention_utils._lazy_imports`), and adding the name to the list of those that gpt-oss accepts.

    A transformers without a registry of experts is left without "fastattn" there: its models run their experts as they did.
    `unregister` undoes all of it.
    """
    _entries.put(AttentionInterface, NAME, attention_forward)
    _entries.put(AttentionMaskInterface, NAME, attention_mask)
    registry = getattr(_experts.hub, "ALL_EXPERTS_FUNCTIONS", None)
    if registry is not None:
        _entries.put(type(registry), NAME, experts_forward)
    if continuous_batching:
        _continuous_batching.install(_entries.put)


def unregister() -> None:
    """Undo every `register`: the registries hold what they held, and transformers' own functions are in their places.

    A model that is still set to one of the names raises at its next forward, by that name.

    Raises: RuntimeError where `_lazy_imports` has been replaced by somebody else since: undo that first.
    """
    _continuous_batching.remove()
    _entries.take_back()
