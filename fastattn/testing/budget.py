"""The error budget: one rule for every op, forward and gradient.

    max|out − ref64|  ≤  2 · max|naive − ref64|  +  1e-5 · max(1, max|ref64|)

ref64 is the naive reference computed in float64 from the same (already rounded) inputs, and naive is the same reference
in the dtype under test: the op may be at most twice as wrong as plain PyTorch is in that dtype.
"""

from __future__ import annotations

import torch

BASELINE_FACTOR = 2.0  # how many times the naive error an op may have
ABSOLUTE_SLACK = 1e-5  # fp32 noise where the naive computation happens to be exact


def check_budget(name: str, out: torch.Tensor, naive: torch.Tensor, ref64: torch.Tensor) -> None:
    """Assert that `out` keeps within the error budget.

    name: op and tensor, as the failure should name them, e.g. "attention dq".
    out: the result under test; naive: the reference in the test's dtype; ref64: the reference in float64.
    All three have one shape; devices may differ.

    Where ref64 is not finite (the LSE of a row with no visible key is −inf), out must equal it; where ref64 is finite,
    a non-finite out never passes, whatever naive is there.

    Raises: AssertionError with both errors and the coordinate of the largest one; TypeError unless ref64 is float64.
    """
    if ref64.dtype != torch.float64:
        raise TypeError(f"check_budget: ref64 must be torch.float64, got {ref64.dtype}")
    if not out.shape == naive.shape == ref64.shape:
        raise AssertionError(
            f"{name}: shapes differ: out {tuple(out.shape)}, naive {tuple(naive.shape)}, ref64 {tuple(ref64.shape)}"
        )
    if out.numel() == 0:
        return
    out, naive, ref64 = (t.detach().to("cpu", torch.float64) for t in (out, naive, ref64))

    finite = ref64.isfinite()
    differs = ~finite & (out != ref64) & ~(out.isnan() & ref64.isnan())
    if differs.any():
        at = _first(differs)
        share = f"{int(differs.sum())} of {out.numel()} such elements"
        raise AssertionError(f"{name}: must be {ref64[at]:g} at {at}, got {out[at]:g} ({share})")
    broken = finite & ~out.isfinite()
    if broken.any():
        at = _first(broken)
        share = f"{int(broken.sum())} of {out.numel()} such elements"
        raise AssertionError(f"{name}: {out[at]:g} at {at} where the reference is {ref64[at]:g} ({share})")

    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (out - ref64).abs(), zero)
    naive_error = torch.where(finite & naive.isfinite(), (naive - ref64).abs(), zero).max().item()
    scale = max(1.0, torch.where(finite, ref64.abs(), zero).max().item())
    budget = BASELINE_FACTOR * naive_error + ABSOLUTE_SLACK * scale
    worst = error.max().item()
    if worst > budget:
        at = _first(error == worst)
        values = f"got {out[at]:.6g}, naive {naive[at]:.6g}, float64 {ref64[at]:.6g}"
        raise AssertionError(
            f"{name}: error {worst:.3e} exceeds the budget {budget:.3e} "
            f"(naive error {naive_error:.3e}, scale {scale:.3e}); largest at {at}: {values}"
        )


def _first(flags: torch.Tensor) -> tuple[int, ...]:
    """Coordinate of the first True, () for a 0-d tensor."""
    return tuple(flags.nonzero()[0].tolist())
