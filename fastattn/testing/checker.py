"""A bounds and race checker for interpreted kernels (TRITON_INTERPRET=1, CPU tensors).

    with checked_launches(order="reverse") as record:
        attention(q, k, v)
    assert record.count > 0

The interpreter hands every memory operation over as numpy arrays of byte addresses and mask flags, and runs the
programs of a launch one after another in one thread. Each pointer that a kernel gets carries a tag of its tensor in the
upper 16 bits, which pointer arithmetic leaves alone. So each active lane is held against the tensor it started from
before memory is touched (a run off one tensor's end into its neighbour shows too), and a shadow of the memory remembers
which program stored, loaded or atomically updated each element. What a GPU would show as a fault or a rare wrong number
is a `LaunchError` here, every time. Descriptor loads and stores end in the same masked operations and are checked too.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle

ORDERS = ("forward", "reverse", "shuffled")

_DONE_TO = {"load": "loaded", "store": "stored", "atomic": "atomically updated"}
_CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}
_NOBODY, _SEVERAL = 0, -1  # owners of an element in a shadow; program n is n + 1, so that untouched pages stay zero
_TAG_SHIFT = 48  # user space ends below
_ADDRESS = np.uint64((1 << _TAG_SHIFT) - 1)

# Taken at import: a nested checked_launches wraps these, not the wrappers of the one around it.
_call = interpreter.GridExecutor.__call__
_implicit_cvt = interpreter._implicit_cvt
_set_grid_dim = interpreter.InterpreterBuilder.set_grid_dim
_set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx
_masked_load = interpreter.InterpreterBuilder.create_masked_load
_masked_store = interpreter.InterpreterBuilder.create_masked_store
_atomic_rmw = interpreter.InterpreterBuilder.create_atomic_rmw
_atomic_cas = interpreter.InterpreterBuilder.create_atomic_cas


class LaunchError(Exception):
    """An interpreted kernel left its tensors, or two of its programs raced.

    kernel: its name; kind: "load", "store" or "atomic"; program: (x, y, z) of the offender; lanes: how many were wrong.
    """

    def __init__(self, kernel: str, kind: str, program: tuple[int, int, int], lanes: int, message: str):
        super().__init__(f"{kernel}: {kind} by program {program}: {message}")
        self.kernel, self.kind, self.program, self.lanes = kernel, kind, program, lanes


@dataclass
class Record:
    """What a `checked_launches` block has checked so far."""

    kernels: Counter[str] = field(default_factory=Counter)  # launches of each kernel
    lanes: int = 0  # active lanes of loads, stores and atomics

    @property
    def count(self) -> int:
        """Number of launches."""
        return self.kernels.total()


@dataclass
class _Region:
    """A stretch of memory that tensor arguments cover (overlapping ones are merged), with its shadow."""

    names: list[str]
    start: int
    end: int
    unit: int  # bytes an element: the smallest among its tensors
    shadows: dict[str, np.ndarray] = field(default_factory=dict)  # kind → owner of each element

    def shadow(self, kind: str) -> np.ndarray:
        if kind not in self.shadows:
            # Reserved, not committed: a tensor that spans 2^32 elements by its strides costs only the pages it touches.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
            pages = mmap.mmap(-1, 4 * ((self.end - self.start) // self.unit), flags=flags)
            self.shadows[kind] = np.frombuffer(pages, dtype=np.int32)
        return self.shadows[kind]


@dataclass
class _Span:
    """What one tensor argument reaches: the bytes from start to end; pointers into it carry `tag`."""

    name: str
    start: int
    end: int
    tag: int
    region: _Region | None = None  # None: no element


class _Launch:
    """One launch under check: its tensors by tag, and the shadow of their memory."""

    def __init__(self, kernel: str, arguments: dict[str, Any], record: Record):
        self.kernel, self.record = kernel, record
        self.program = 0
        self.grid = (1, 1, 1)
        self.spans: list[_Span] = []
        self.by_layout: dict[tuple, _Span] = {}
        units = []
        for name, tensor in _tensors(arguments):
            elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start, unit = tensor.data_ptr(), tensor.element_size()
            end = start + unit * elements if tensor.numel() else start
            span = _Span(name, start, end, tag=len(self.spans) + 1)
            if self.by_layout.setdefault(_layout(tensor), span) is span:
                self.spans.append(span)
                units.append(unit)
        self._merge(units)
        self.starts = np.array([0] + [span.start for span in self.spans], dtype=np.uint64)  # by tag; 0 is no tensor
        self.ends = np.array([0] + [span.end for span in self.spans], dtype=np.uint64)

    def _merge(self, units: list[int]) -> None:
        last = None
        for span, unit in sorted(zip(self.spans, units, strict=True), key=lambda pair: pair[0].start):
            if span.start == span.end:
                continue
            if last is None or span.start >= last.end:
                last = _Region([], span.start, span.end, unit)
            last.names.append(span.name)
            last.end, last.unit = max(last.end, span.end), min(last.unit, unit)
            span.region = last

    def tagged(self, pointer: int, tensor: torch.Tensor) -> int:
        """The address that the kernel gets to see for a tensor argument."""
        return pointer | self.by_layout[_layout(tensor)].tag << _TAG_SHIFT

    def access(self, kind: str, pointers: TensorHandle, mask: np.ndarray | None) -> TensorHandle:
        """Check and remember the active lanes of one memory operation; give the real addresses of all lanes."""
        real = TensorHandle(pointers.data & _ADDRESS, pointers.dtype)
        active = slice(None) if mask is None else np.broadcast_to(mask, pointers.data.shape).astype(bool)
        tagged, addresses = pointers.data[active].ravel(), real.data[active].ravel()
        if addresses.size == 0:
            return real
        self.record.lanes += addresses.size
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(tagged.min()), int(tagged.max())
        tag = low >> _TAG_SHIFT
        if tag == high >> _TAG_SHIFT and 0 < tag <= len(self.spans):  # the usual case: all lanes mean one tensor
            span = self.spans[tag - 1]
            if span.start <= low & int(_ADDRESS) and (high & int(_ADDRESS)) + size <= span.end:
                self._mark(kind, span.region, addresses, size)
                return real
        tags = (tagged >> np.uint64(_TAG_SHIFT)).astype(np.int64)
        tags[tags > len(self.spans)] = 0
        outside = (addresses < self.starts[tags]) | (addresses + np.uint64(size) > self.ends[tags])
        if outside.any():
            first, lanes = int(outside.argmax()), int(outside.sum())
            where = self._describe(int(tags[first]), int(addresses[first]))
            raise self._error(kind, lanes, f"{lanes} of {addresses.size} active lanes out of bounds, the first {where}")
        for tag in np.unique(tags):
            self._mark(kind, self.spans[tag - 1].region, addresses[tags == tag], size)
        return real

    def _mark(self, kind: str, region: _Region, addresses: np.ndarray, size: int) -> None:
        elements = ((addresses - np.uint64(region.start)) // np.uint64(region.unit)).astype(np.int64)
        if size > region.unit:
            elements = (elements[:, None] + np.arange(size // region.unit)).ravel()
        me = self.program + 1
        for earlier in _CONFLICTS[kind]:
            if earlier not in region.shadows:
                continue
            owners = region.shadows[earlier][elements]
            foreign = (owners != _NOBODY) & (owners != me)
            if foreign.any():
                first, lanes = int(foreign.argmax()), int(foreign.sum())
                owner = int(owners[first])
                by = "several programs" if owner == _SEVERAL else f"program {self._coordinates(owner - 1)}"
                at = f"byte {int(elements[first]) * region.unit} of {'/'.join(region.names)}"
                message = f"race: {lanes} of {elements.size} elements {_DONE_TO[earlier]} by {by}, the first at {at}"
                raise self._error(kind, lanes, message)
        shadow = region.shadow(kind)
        owners = shadow[elements]
        shadow[elements] = np.where((owners == _NOBODY) | (owners == me), np.int32(me), np.int32(_SEVERAL))

    def _coordinates(self, program: int) -> tuple[int, int, int]:
        return tuple(int(i) for i in np.unravel_index(program, self.grid))

    def _describe(self, tag: int, address: int) -> str:
        if tag == 0:
            return "through a pointer that comes from no tensor argument"
        span = self.spans[tag - 1]
        if span.region is None:
            return f"in {span.name}, which has no element"
        if address < span.start:
            return f"{span.start - address} bytes before {span.name}"
        return f"{address - span.end} bytes past the end of {span.name}"

    def _error(self, kind: str, lanes: int, message: str) -> LaunchError:
        return LaunchError(self.kernel, kind, self._coordinates(self.program), lanes, message)


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        value = getattr(value, "base", value)  # of a host TensorDescriptor or a reinterpreted tensor
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": item for i, item in enumerate(value)})


@contextmanager
def checked_launches(order: str = "forward", seed: int = 0) -> Iterator[Record]:
    """Check every interpreted launch within the block, its programs run in the given order.

    order: "forward" (the interpreter's own: z fastest), "reverse" or "shuffled" (by `seed`).
    A lane is in bounds between the first and the last element that its tensor reaches by shape and strides; the rest of
    the storage is out of bounds. Two programs race when they store one element, or one loads or stores what the other
    stores or updates atomically; atomics among themselves do not race.

    Of nested blocks the innermost checks and counts. Yields: a `Record`. Raises: LaunchError.
    """
    if order not in ORDERS:
        raise ValueError(f"checked_launches: order must be one of {', '.join(ORDERS)}, got {order!r}")
    record = Record()
    random = np.random.default_rng(seed)
    launch: _Launch | None = None
    sequence = np.zeros(1, dtype=np.int64)

    def call(executor, *args, **kwargs):
        nonlocal launch
        arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        name = executor.fn.__name__
        record.kernels[name] += 1
        launch = _Launch(name, arguments, record)
        try:
            with np.errstate(all="ignore"):  # lanes that are masked away may hold −inf − (−inf), as on a GPU
                return _call(executor, *args, **kwargs)
        except InterpreterError as error:
            if isinstance(error.__cause__, LaunchError):
                raise error.__cause__ from None
            raise
        finally:
            launch = None

    def implicit_cvt(argument):
        converted = _implicit_cvt(argument)
        if launch is not None and hasattr(argument, "data_ptr"):
            tensor = getattr(argument, "base", argument)
            converted.handle.data[0] = launch.tagged(int(converted.handle.data[0]), tensor)
        return converted

    def set_grid_dim(builder, *grid):
        nonlocal sequence
        sequence = np.arange(int(np.prod(grid)))
        if order == "reverse":
            sequence = sequence[::-1]
        elif order == "shuffled":
            random.shuffle(sequence)
        if launch is not None:
            launch.grid = grid
        _set_grid_dim(builder, *grid)

    def set_grid_idx(builder, *index):
        program = int(sequence[np.ravel_multi_index(index, builder.grid_dim)])
        if launch is not None:
            launch.program = program
        _set_grid_idx(builder, *(int(i) for i in np.unravel_index(program, builder.grid_dim)))

    def checked(kind: str, operation: Callable, pointer_at: int, mask_at: int | None) -> Callable:
        def check_then_run(builder, *args, **kwargs):
            if launch is not None:
                real = launch.access(kind, args[pointer_at], None if mask_at is None else args[mask_at].data)
                args = (*args[:pointer_at], real, *args[pointer_at + 1 :])
            return operation(builder, *args, **kwargs)

        return check_then_run

    replacements = {
        (interpreter.GridExecutor, "__call__"): call,
        (interpreter, "_implicit_cvt"): implicit_cvt,
        (interpreter.InterpreterBuilder, "set_grid_dim"): set_grid_dim,
        (interpreter.InterpreterBuilder, "set_grid_idx"): set_grid_idx,
        (interpreter.InterpreterBuilder, "create_masked_load"): checked("load", _masked_load, 0, 1),
        (interpreter.InterpreterBuilder, "create_masked_store"): checked("store", _masked_store, 0, 2),
        (interpreter.InterpreterBuilder, "create_atomic_rmw"): checked("atomic", _atomic_rmw, 1, 3),
        (interpreter.InterpreterBuilder, "create_atomic_cas"): checked("atomic", _atomic_cas, 0, None),
    }
    with ExitStack() as stack:
        for (owner, name), replacement in replacements.items():
            stack.enter_context(patch.object(owner, name, replacement))
        yield record


def assert_order_independent(run: Callable[[], Any], seed: int = 0) -> Any:
    """Run `run` with programs forward, reversed and shuffled; assert bit-identical results, and return the forward one.

    run: launches kernels on fresh outputs and returns a tensor, or a tuple or list of tensors (None entries allowed).
    Raises: AssertionError naming the order and the number of differing elements; LaunchError.
    """
    first = None
    for order in ORDERS:
        with checked_launches(order, seed) as record:
            result = run()
        assert record.count > 0, "assert_order_independent: no kernel was launched in the interpreter"
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        bits = [None if t is None else t.detach().contiguous().view(torch.uint8) for t in outputs]
        if first is None:
            first, first_bits = result, bits
            continue
        for i, (got, expected) in enumerate(zip(bits, first_bits, strict=True)):
            if got is not None and not torch.equal(got, expected):
                differing = f"{int((got != expected).sum())} of {got.numel()} bytes differ between forward and {order}"
                raise AssertionError(f"output {i} depends on the order of programs: {differing}")
    return first
