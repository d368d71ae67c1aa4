"""What the row kernels share: how rows may lie, and how many are few."""

from __future__ import annotations

from torch import Tensor

# Read and written in well under a microsecond by any part there is code for (a GPU of 1 TB/s: 1 us), while a launch takes several.
LAUNCH_BOUND_BYTES = 1 << 19


def are_few(x: Tensor) -> bool:
    """Where launching takes longer than the rows: C++ needs a fraction of what Python does to launch."""
    return x.numel() * x.element_size() <= LAUNCH_BOUND_BYTES


def lie_at_one_stride(t: Tensor) -> bool:
    """Whether t (…, N) is rows of consecutive entries at one stride."""
    if t.is_contiguous():
        return True
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return False
    outer = [(size, stride) for size, stride in zip(t.shape[:-1], t.stride()) if size != 1]
    return all(before[1] == size * stride for before, (size, stride) in zip(outer, outer[1:]))
