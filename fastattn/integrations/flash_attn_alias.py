"""`import flash_attn` means `fastattn.flash_attn`, for code that is not to be edited.

    from fastattn.integrations import as_flash_attn

    with as_flash_attn():                           # or: alias = as_flash_attn(); …; alias.undo()
        import model_that_imports_flash_attn

Modules imported meanwhile keep what they bound. A flash_attn that is installed is as it was afterwards, and is not imported meanwhile.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from fastattn import flash_attn

NAME = "flash_attn"


def as_flash_attn() -> Alias:
    """From now on, until `undo()` of what this returns or the end of its with block, `flash_attn` and its submodules are fastattn's.

    That holds for imports, for importlib.util.find_spec, and for importlib.metadata, which knows a distribution flash-attn of the version
    that `flash_attn.__version__` says, whose interface this is: transformers, Megatron and TransformerEngine ask there before they
    import. A submodule that fastattn has none of raises ModuleNotFoundError. Calls may be nested; the last undo counts.
    """
    return Alias()


class Alias:
    """What `as_flash_attn` returns: a context manager, active already."""

    _active: set[Alias] = set()
    _before: dict[str, ModuleType] = {}
    _metadata: _Metadata

    def __init__(self) -> None:
        if not self._active:
            self._before.update(_take_modules())
            sys.modules.update(_modules())
            type(self)._metadata = _Metadata()
            sys.meta_path.insert(0, self._metadata)  # before that of an installed flash-attn
        self._active.add(self)

    def undo(self) -> None:
        """Let `flash_attn` mean what it meant. Calling it again does nothing."""
        if self not in self._active:
            return
        self._active.remove(self)
        if not self._active:
            sys.meta_path.remove(self._metadata)
            _take_modules()
            sys.modules.update(self._before)
            self._before.clear()

    def __enter__(self) -> Alias:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.undo()


def _modules() -> dict[str, ModuleType]:
    """All of fastattn.flash_attn's modules, by the names that flash-attn gives them."""
    found = pkgutil.walk_packages(flash_attn.__path__, f"{flash_attn.__name__}.")
    names = [flash_attn.__name__, *(module.name for module in found)]
    return {NAME + name.removeprefix(flash_attn.__name__): importlib.import_module(name) for name in names}


def _take_modules() -> dict[str, ModuleType]:
    """What is imported by the name now, and is no longer."""
    names = [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]
    return {name: sys.modules.pop(name) for name in names}


class _FlashAttn(Distribution):
    """The distribution flash-attn, as far as it is asked about."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {flash_attn.__version__}\nSummary: fastattn by this name\n",
            "top_level.txt": f"{NAME}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(flash_attn.__file__).parent / path


class _Metadata(DistributionFinder):
    """Finds no module and one distribution."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        name = getattr(context, "name", None)
        if name is None or name.lower().replace("-", "_").replace(".", "_") == NAME:
            yield _FlashAttn()
