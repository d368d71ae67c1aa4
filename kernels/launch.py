"""The one place where a kernel is launched, and what a launcher asks about the machine."""

import contextlib
import contextvars
import functools
from typing import NamedTuple

import torch
import triton


class Target(NamedTuple):
    """A part as tile choices see it: compute capability, and shared memory per block in bytes."""

    capability: tuple[int, int]
    shared_memory: int


def interpreted() -> bool:
    """True where kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target((properties.major, properties.minor), properties.shared_memory_per_block_optin)


def target_of(tensor: torch.Tensor) -> Target:
    """The part this tensor's kernels run on. A CPU tensor is either interpreted, as a Hopper part, or belongs to
    whatever target Triton's active driver names, so that the launch path can be exercised without a GPU."""
    if tensor.is_cuda:
        return _device_target(tensor.device.index)
    if interpreted():
        return Target((9, 0), 227 * 1024)
    driver = triton.runtime.driver.active
    arch = driver.get_current_target().arch
    return Target((arch // 10, arch % 10), driver.utils.get_device_properties(0)["max_shared_mem"])


def tma_compatible(tensor: torch.Tensor) -> bool:
    """True where a TMA descriptor can be made over (heads, rows, cols) of a (…, rows, heads, cols) tensor from any
    row of any batch: 16-byte aligned starts, strides of rows and heads that are positive multiples of 16 bytes,
    contiguous cols of which there are at most 256, nothing empty."""
    itemsize = tensor.element_size()
    *batch, row, head, col = zip(tensor.shape, tensor.stride(), strict=True)
    return (
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and col[0] <= 256
        and (col[1] == 1 or col[0] == 1)
        and all(stride > 0 and stride * itemsize % 16 == 0 for _, stride in (row, head))
        and all(size == 1 or stride * itemsize % 16 == 0 for size, stride in batch)
    )


def check_grid(op: str, programs: int) -> tuple[int]:
    """The grid of so many programs, which CUDA has for fewer than 2^31."""
    if programs >= 2**31:
        raise ValueError(f"{op}: the input must need fewer than 2^31 programs, got {programs}")
    return (programs,)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **meta) -> None:
    """Run `kernel[grid](*args, **meta)` on `device`.

    Device-side descriptors take scratch memory from Triton's allocator, a ContextVar that autograd's device threads
    do not inherit: it is set here, at each launch, in a context of the launch's own that leaves the caller's as it
    was. fp fusion is named because Triton 3.10 turns its default off and the kernels count on a·b + c being one
    instruction.
    """
    if 0 in grid:
        return
    if interpreted():
        kernel[grid](*args, **meta)
    else:
        contextvars.copy_context().run(_launch, kernel, grid, device, args, meta)


def _launch(kernel, grid, device, args, meta) -> None:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **meta)
