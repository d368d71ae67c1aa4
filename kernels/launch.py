"""The one place where a kernel is launched, and what a launcher asks about the machine."""

import contextvars
import functools
from typing import Any, NamedTuple

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


def num_multiprocessors(device: torch.device) -> int:
    """How many SMs the part has; in the interpreter so few that programs which stay for many rows have many."""
    if device.type == "cuda":
        return _device_multiprocessors(device.index)
    return 1 if interpreted() else triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"]


@functools.cache
def _device_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied, as torch would on this GPU; 16-bit inputs have one way. torch refuses its older question to those
    who have answered the newer one."""
    if dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if newer == "none":
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if newer == "tf32" else "ieee"


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


def launch(kernel, grid: tuple[int, ...], device: torch.device, **args) -> None:
    """Run `kernel[grid](**args)` on `device`; every parameter of the kernel is named, and so are its options.

    Device-side descriptors (USE_TMA) take scratch memory from Triton's allocator, a ContextVar that autograd's device threads do
    not inherit: it is set here, at each such launch, in a context of the launch's own that leaves the caller's as it was.
    """
    if 0 in grid:
        return
    if interpreted():
        kernel[grid](**args)
    elif args.get("USE_TMA"):
        contextvars.copy_context().run(_launch_with_scratch, kernel, grid, device, args)
    else:
        _launch(kernel, grid, device, args)


def _launch_with_scratch(kernel, grid, device, args) -> None:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    _launch(kernel, grid, device, args)


def _launch(kernel, grid, device, args) -> None:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, grid, args)
    else:
        _run(kernel, grid, args)


# The compiled variant of each kind of call. Triton finds it anew at every call, in 15 µs; with the kind told apart here, in terms
# that are at least as fine as Triton's own, a launch takes half as long.
_variants: dict[tuple, Any] = {}
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of the compiler, as launchers give them
_parameters: dict[int, tuple[Any, list[tuple[str, bool]]]] = {}  # by a kernel's id: itself, and each name and whether it is constexpr


def _run(kernel, grid, args) -> None:
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    if id(kernel) not in _parameters:  # its own hash takes a lock
        _parameters[id(kernel)] = kernel, [(p.name, p.is_constexpr) for p in kernel.params]
    _, parameters = _parameters[id(kernel)]
    values = [args[name] for name, _ in parameters]
    knobs = triton.knobs
    kind = (
        id(kernel), device, knobs.runtime.debug, knobs.compilation.instrumentation_mode, *[args.get(name) for name in OPTIONS],
        *[value if is_constexpr else _kind(value) for value, (_, is_constexpr) in zip(values, parameters, strict=True)],
    )  # fmt: skip
    variant = _variants.get(kind)
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, kernel.pre_run_hooks
    hooked = any(getattr(hook, "calls", hook) for hook in hooks)  # a profiler, which Triton has to call
    if variant is None or hooked:
        # fp fusion is named because Triton 3.10 turns its default off and the kernels count on a·b + c being one instruction.
        variant = kernel[grid](enable_fp_fusion=True, **args)
        if not hooked:
            _variants[kind] = variant
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    variant.run(x, y, z, stream, variant.function, variant.packed_metadata, None, None, None, *values)


def _kind(value) -> object:
    """What of a run-time argument may choose a variant: a tensor's dtype and alignment; whether an int is 1, a multiple of 16, 32 bits."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return float if type(value) is float else value


def forget_variants() -> None:
    """Let go of all compiled variants, as where another driver takes over."""
    _variants.clear()
