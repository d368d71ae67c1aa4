"""The real launch path for any NVIDIA part, without one: Triton specialises and compiles, a recorder launches nothing.

    with stub_driver(capability=(9, 0)) as driver:
        attention_fwd(q, k, v, ...)                 # CPU tensors, TRITON_INTERPRET unset
    assert driver.launches[0].grid == (16, 8, 1)

What a GPU would refuse at the launch is refused here with the same or a clearer exception: a grid or shared memory
beyond the part's limits, an unknown launch option, scratch memory with no allocator set in the launching thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import _allocation

from fastattn.kernels.launch import forget_variants

# Shared memory a block may ask for, in bytes (CUDA programming guide, technical specifications by compute capability).
SHARED_MEMORY_LIMITS = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (12, 0): 99 * 1024,
}
GRID_LIMITS = (2**31 - 1, 65535, 65535)


class LaunchRefused(RuntimeError):
    """A launch that a GPU would not accept."""


class HostSync(RuntimeError):
    """An operation that would make the host wait for the GPU, or could not be captured in a CUDA graph."""


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int  # bytes a block
    compiled: CompiledKernel  # .asm["cubin"], .asm["ttgir"], .metadata
    args: dict[str, Any]  # every argument by name, defaults and constexprs included
    kernel: triton.JITFunction


class StubDriver:
    """What Triton asks of its active driver; made by `stub_driver`."""

    def __init__(self, capability: tuple[int, int]):
        if capability not in SHARED_MEMORY_LIMITS:
            known = ", ".join(f"{major}.{minor}" for major, minor in SHARED_MEMORY_LIMITS)
            raise ValueError(f"stub_driver: capability must be one of {known}, got {capability}")
        self.capability = capability
        self.launches: list[Launch] = []
        # Triton keeps a kernel's variants (and a device's limits) by device: one of its own keeps every stub apart.
        self._device = object()
        properties = {"max_shared_mem": SHARED_MEMORY_LIMITS[capability], "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(
            load_binary=lambda name, cubin, shared, device: (None, None, 0, 0, 1024),  # no module: nothing to unload
            get_device_properties=lambda device: properties,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_current_device(self) -> object:
        return self._device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, src: Any, metadata: Any) -> _Recorder:
        return _Recorder(self, src, metadata)

    def variants(self, kernel: triton.JITFunction) -> dict[Any, CompiledKernel]:
        """The variants of `kernel` that were compiled under this driver, by Triton's key."""
        return kernel.device_caches[self._device][0] if self._device in kernel.device_caches else {}

    def forget(self) -> None:
        """Free what was compiled under this driver."""
        forget_variants()
        for launch in self.launches:
            launch.kernel.device_caches.pop(self._device, None)


class _Recorder:
    """Stands where Triton's launcher stands: checks what the CUDA driver would, and records."""

    def __init__(self, driver: StubDriver, src: Any, metadata: Any):
        self.driver, self.src, self.metadata = driver, src, metadata

    def __call__(self, grid_x, grid_y, grid_z, stream, function, packed_metadata, launch_metadata, enter, leave, *args):
        grid, name = (grid_x, grid_y, grid_z), self.metadata.name
        for axis, blocks, limit in zip("xyz", grid, GRID_LIMITS, strict=True):
            if not isinstance(blocks, int) or not 0 <= blocks <= limit:
                raise LaunchRefused(f"{name}: grid {axis} must be an int in 0..{limit}, got {blocks!r} (grid {grid})")
        if self.metadata.global_scratch_size > 0:
            blocks = grid_x * grid_y * grid_z * getattr(self.metadata, "num_ctas", 1)
            # As Triton's own launcher does; with no allocator set in this thread it raises.
            _allocation._allocator.get()(
                blocks * self.metadata.global_scratch_size, self.metadata.global_scratch_align, stream
            )
        kernel = self.src.fn
        compiled = next(variant for variant in self.driver.variants(kernel).values() if variant.src is self.src)
        named = dict(zip(kernel.arg_names, args, strict=True))
        self.driver.launches.append(
            Launch(name, grid, self.metadata.num_warps, self.metadata.shared, compiled, named, kernel)
        )


@contextmanager
def stub_driver(capability: tuple[int, int] = (9, 0)) -> Iterator[StubDriver]:
    """Make a stub of the given part Triton's active driver; the former one, if any, is active again afterwards.

    Kernels take CPU tensors and must have been decorated without TRITON_INTERPRET. Each block starts with no compiled
    variants (Triton's cache on disk still saves compiling twice).
    Raises: ValueError for an unknown part; at a launch: LaunchRefused (grid), triton's OutOfResources (shared memory,
    threads), RuntimeError (scratch memory without an allocator).
    """
    driver = StubDriver(capability)
    former = triton.runtime.driver._active  # None where no GPU driver was ever asked for
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver.set_active(former)
        driver.forget()


def compiled_variants(kernel: triton.JITFunction) -> int:
    """How many variants of `kernel` have been compiled in the current `stub_driver` block."""
    driver = triton.runtime.driver.active
    if not isinstance(driver, StubDriver):
        raise RuntimeError("compiled_variants: must be called within stub_driver()")
    return len(driver.variants(kernel))


_SYNCING_OPS = {
    "aten::_local_scalar_dense",  # .item(), bool(), int(), float()
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::lift_fresh",  # torch.tensor(host data): on a GPU, a copy from pageable memory
}
_SYNCING_METHODS = {
    getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")
}


class _RefuseSyncingOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in _SYNCING_OPS:
            raise HostSync(f"{func} would synchronise with the GPU")
        devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
        devices |= {torch.device(kwargs["device"])} if kwargs.get("device") is not None else set()
        if func._schema.name in ("aten::_to_copy", "aten::copy_") and len(devices) > 1:
            raise HostSync(f"{func} would copy between devices: {', '.join(sorted(map(str, devices)))}")
        return func(*args, **kwargs)


class _RefuseSyncingMethods(TorchFunctionMode):
    """On CPU tensors these never reach the dispatcher (tolist, numpy, a cpu() that is a no-op)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _SYNCING_METHODS:
            raise HostSync(f"Tensor.{func.__name__} would synchronise with the GPU")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Refuse whatever would make a GPU launch path wait for the device, judged on CPU tensors.

    Call an op's implementation itself within the block: PyTorch switches its modes off inside an op they have seen.
    Raises: HostSync.
    """
    with _RefuseSyncingMethods(), _RefuseSyncingOps():
        yield
