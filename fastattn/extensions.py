"""The compiled implementations of single operators, where setup.py could build them: fastattn._C on the CPU, fastattn._cuda on CUDA.

An operator `<op>_cpp` or `<op>_cuda` has its schema in fastattn/cpu/<op>.py or fastattn/cuda/<op>.py, beside the code that chooses it, and
its implementation in csrc/. Nothing needs it to be built: `available` says whether it is.
"""

from __future__ import annotations

import importlib.util
import os

import torch

_library = torch.library.Library("fastattn", "FRAGMENT")


class Operators:
    """Those of one library. Loading it initialises no CUDA."""

    def __init__(self, module: str, variable: str, lacks: str | None = None) -> None:
        """variable: of the environment, names another library, as tests do, or is 0 for none. lacks: why it cannot run here."""
        self.why_not = _load(module, variable, lacks)  # None once it is loaded
        # What an operator that is not available does not do, for a caller who asks for it.
        self.nothing = f"anything: {self.why_not or 'it is an older build, or another device'}"
        self._found: set[str] = set()

    def define(self, schema: str) -> None:
        """Define `fastattn::<schema>`, which the library implements if there is one (and if it is not an older one)."""
        _library.define(schema)
        name = schema.partition("(")[0]
        if any(_is_implemented(name, key) for key in ("CPU", "CUDA")):  # CUDA's for CPU tensors, too, by the tests' build of csrc/cuda
            self._found.add(name)

    def available(self, name: str, tensor: torch.Tensor | None = None) -> bool:
        """Whether the operator of that name has its implementation, for this tensor's device: interpreted kernels run on the CPU."""
        return name in self._found and (tensor is None or _is_implemented(name, "CUDA" if tensor.is_cuda else "CPU"))


_implemented: set[tuple[str, str]] = set()


def _is_implemented(name: str, key: str) -> bool:
    if (name, key) not in _implemented and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{name}", key):
        _implemented.add((name, key))
    return (name, key) in _implemented


def _load(module: str, variable: str, lacks: str | None) -> str | None:
    library = os.environ.get(variable)
    if library == "0":
        return f"turned off by {variable}=0"
    if library is None:
        if lacks:
            return lacks
        spec = importlib.util.find_spec(module)
        library = None if spec is None else spec.origin
    if library is None:
        return "not built"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # of another torch, another CUDA or another libstdc++ than it was built for
        return f"does not load: {error}"
    return None


def in_rows(t: torch.Tensor) -> torch.Tensor:
    """t with its last dim's entries side by side, as operators take it. `contiguous` would leave the strides of empty tensors and single
    columns as they are."""
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


cpu_operators = Operators("fastattn._C", "FASTATTN_EXTENSION")
cuda_operators = Operators("fastattn._cuda", "FASTATTN_CUDA_EXTENSION", None if torch.version.cuda else "this torch has no CUDA")
