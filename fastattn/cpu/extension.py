"""The compiled implementations of single operators, fastattn._C, where setup.py could build them.

An operator `<op>_cpp` has its schema here in Python, beside the code that chooses it, and its implementation in csrc/cpu/. Nothing
needs it to be built: `available` says whether it is.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_library = torch.library.Library("fastattn", "FRAGMENT")
_found: set[str] = set()


def _load() -> str | None:
    """None once the library is loaded, else why it is not. FASTATTN_EXTENSION names another one, as tests do, or is 0 for none."""
    library = os.environ.get("FASTATTN_EXTENSION")
    if library == "0":
        return "turned off by FASTATTN_EXTENSION=0"
    if library is None:
        spec = importlib.util.find_spec("fastattn._C")
        library = None if spec is None else spec.origin
    if library is None:
        return "not built"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # of another torch or another libstdc++ than it was built for
        return f"does not load: {error}"
    return None


why_not = _load()


def define(schema: str) -> None:
    """Define `fastattn::<schema>`, which the library implements if there is one (and if it is not an older one)."""
    _library.define(schema)
    name = schema.partition("(")[0]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{name}", "CPU"):
        _found.add(name)


def available(name: str) -> bool:
    """Whether the operator of that name has its implementation."""
    return name in _found
