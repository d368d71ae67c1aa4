"""The grouped matrix product as a torch operator, and the public function."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn.cpu import grouped_mm as cpu

from . import checks
from .dispatch import checks_values, describe, log, runs_kernels
from .operator import apply, autocast, define, differentiable, once, operators

MAX_GROUPS = 4096  # whose ends a program of the kernel looks at together


def _implementation(t: Tensor):
    """The module with this device's grouped_mm_fwd and grouped_mm_bwd; kernels are imported here, so that `import fastattn` needs no
    Triton."""
    if runs_kernels(t):
        from fastattn.kernels import grouped_mm

        return grouped_mm
    return cpu


def _grouped_mm_fwd(x, w, offsets, bias, gather, scatter):
    if log.isEnabledFor(logging.INFO):
        log.info("grouped_mm_fwd: x %s w %s gather %s scatter %s", *map(describe, (x, w, gather, scatter)))
    _check_values(x, offsets, gather, scatter)
    return _implementation(x).grouped_mm_fwd(x, w, offsets, bias, gather, scatter)


def _grouped_mm_bwd(dout, x, w, offsets, gather, scatter, num_x_rows, wanted):
    if log.isEnabledFor(logging.INFO):
        log.info("grouped_mm_bwd: dout %s x %s w %s gather %s scatter %s wanted %s", *map(describe, (dout, x, w, gather, scatter)), wanted)
    return _implementation(dout).grouped_mm_bwd(dout, x, w, offsets, gather, scatter, num_x_rows, wanted)


def _grouped_mm_bwd_fake(dout, x, w, offsets, gather, scatter, num_x_rows, wanted):
    want_x, want_w, want_bias = wanted
    groups = offsets.shape[0], dout.shape[1]
    return (
        dout.new_empty((num_x_rows, w.shape[2]) if want_x else 0),
        dout.new_empty((*groups, x.shape[1]) if want_w else 0),
        dout.new_empty(groups if want_bias else 0),
    )


define(
    "grouped_mm_fwd(Tensor x, Tensor w, Tensor offsets, Tensor? bias, Tensor? gather, Tensor? scatter) -> Tensor",
    _grouped_mm_fwd,
    lambda x, w, offsets, bias, gather, scatter: x.new_empty((x if gather is None else gather).shape[0], w.shape[1]),
)
define(
    "grouped_mm_bwd(Tensor dout, Tensor? x, Tensor? w, Tensor offsets, Tensor? gather, Tensor? scatter, SymInt num_x_rows, "
    "bool[] wanted) -> (Tensor dx, Tensor dw, Tensor dbias)",
    _grouped_mm_bwd,
    _grouped_mm_bwd_fake,
    torch_on_cuda=True,
)


@register_flop_formula(torch.ops.fastattn.grouped_mm_fwd, get_raw=True)
def _grouped_mm_fwd_flops(x, w, offsets, bias, gather, scatter, **_) -> int:
    return 2 * (x if gather is None else gather).shape[0] * w.shape[1] * w.shape[2]


@register_flop_formula(torch.ops.fastattn.grouped_mm_bwd, get_raw=True)
def _grouped_mm_bwd_flops(dout, x, w, offsets, gather, scatter, num_x_rows, wanted, **_) -> int:
    return 2 * dout.numel() * sum(t.shape[-1] for t, want in zip((w, x), wanted[:2], strict=True) if want)


@differentiable
class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(x, w, offsets, bias, gather, scatter):
        return operators.grouped_mm_fwd(x, w, offsets, bias, gather, scatter)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, offsets, _, gather, scatter = inputs
        want_x, want_w, *_ = ctx.needs_input_grad
        ctx.num_x_rows = x.shape[0]
        ctx.save_for_backward(x if want_w else None, w if want_x else None, offsets, gather, scatter)

    @staticmethod
    def backward(ctx, dout):
        x, w, offsets, gather, scatter = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        grads = torch.ops.fastattn.grouped_mm_bwd(dout, x, w, offsets, gather, scatter, ctx.num_x_rows, wanted)
        dx, dw, dbias = once("grouped_mm", [g if want else None for g, want in zip(grads, wanted, strict=True)], dout, x, w)
        return dx, dw, None, dbias, None, None


def check_matrices(op: str, arg: str, w: Tensor, like: Tensor, letters: str) -> None:
    """A stack of matrices of like's dtype, on its device."""
    checks.check_tensor(op, arg, w)
    checks.check_like(op, arg, w, like, owner="x's")
    if w.dim() != 3 or min(w.shape) < 1:
        checks.reject(op, arg, f"have shape {letters}, none of it 0", checks.shape(w))


def check_bias(op: str, arg: str, bias: Tensor | None, like: Tensor, dims: tuple[int, int], letters: str) -> None:
    """None, or a row for each matrix."""
    if bias is None:
        return
    checks.check_tensor(op, arg, bias)
    checks.check_like(op, arg, bias, like, owner="x's")
    if checks.shape(bias) != dims:
        checks.reject(op, arg, f"have shape {letters} = {dims}", checks.shape(bias))


def _check_row_numbers(op: str, arg: str, rows: Tensor | None, like: Tensor) -> None:
    if rows is None:
        return
    checks.check_tensor(op, arg, rows)
    if rows.dtype != torch.int64:
        checks.reject(op, arg, "be an int64 tensor", rows.dtype, TypeError)
    checks.check_device(op, arg, rows, "x's", like.device)
    if rows.dim() != 1:
        checks.reject(op, arg, "have shape (R,)", checks.shape(rows))


def _check_values(x: Tensor, offsets: Tensor, gather: Tensor | None, scatter: Tensor | None) -> None:
    """Read offsets, gather and scatter (this synchronises on CUDA)."""
    op = "grouped_mm"
    if not checks_values(x):
        return
    num_rows, ends = (x if gather is None else gather).shape[0], offsets.tolist()
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end < start:
            checks.reject(op, "offsets", "start at 0 or more and not decrease", f"{start} then {end} at group {group}")
    if ends[-1] > num_rows:
        checks.reject(op, "offsets", f"end within the {num_rows} rows", ends[-1])
    for arg, rows, most in (("gather", gather, x.shape[0]), ("scatter", scatter, num_rows)):
        if rows is not None and num_rows and not (0 <= (least := rows.min().item()) and rows.max().item() < most):
            checks.reject(op, arg, f"hold row numbers in [0, {most})", least if least < 0 else rows.max().item())
    if scatter is not None and num_rows and scatter.bincount().max().item() > 1:
        checks.reject(op, "scatter", "name no row twice", f"{scatter.bincount().argmax().item()} more than once")


def grouped_mm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
) -> Tensor:
    """Each group of rows times a matrix of its own: out[r] = x[r]·w[e]ᵀ + bias[e] for rows offsets[e − 1] ≤ r < offsets[e].

    `torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=offsets)`, and what that has not: bias, rows read and written in any order,
    any sizes and alignment, float32 and float16, defined values in the rows that no group has, a float32 sum of a gathered row's gradients.

    Args:
        x: (R, K), any K; float16, bfloat16 or float32. With gather (T, K), any T.
        w: (E, N, K), x's dtype; E up to 4096. Read as it lies if either of its last dims is contiguous (a transposed view costs no copy).
        offsets: (E,) int32: the row at which each group ends, the first starting at 0; a group may be empty. Rows from offsets[−1] on are
            in no group.
        bias: (E, N), x's dtype; None is 0.
        gather: (R,) int64: row r is x[gather[r]]. A row may be read any number of times. None: x[r].
        scatter: (R,) int64, distinct: row r is written to out[scatter[r]]. None: to out[r].

    Returns:
        out: (R, N) in x's dtype, contiguous; 0 where no group's row is written.

    Nothing waits for the GPU. What index tensors hold is checked where they lie on the CPU; on CUDA, ends are brought into order (each at
    least the one before it, none past R), a row gathered from outside x is 0, one scattered outside out is not written, and of two
    scattered to one place either may stay.

    Numerics: products are summed in fp32 and rounded once, bias included; float32 is multiplied as torch.get_float32_matmul_precision()
    says. Gradients reach x, w and bias: dw is 0 for an empty group, a gathered row's gradients are summed in fp32 in the order of r.
    Nothing is added atomically: two runs are the same bit for bit. Under autocast x, w and bias are cast as for a linear layer, at every
    call. Double backward and forward-mode AD raise NotImplementedError. x is kept for the backward only if w wants a gradient.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else.

    Example:
        >>> x, w = torch.randn(100, 64), torch.randn(4, 128, 64)
        >>> fastattn.grouped_mm(x, w, torch.tensor([10, 10, 70, 100], dtype=torch.int32)).shape
        torch.Size([100, 128])
    """
    op = "grouped_mm"
    checks.check_tensor(op, "x", x)
    x, w, bias = autocast(x, w, bias)
    checks.check_dtype(op, "x", x)
    if x.dim() != 2 or x.shape[1] < 1:
        checks.reject(op, "x", "have shape (T, K) with K of 1 or more", checks.shape(x))
    check_matrices(op, "w", w, x, "(E, N, K)")
    num_groups, num_cols, size = w.shape
    if size != x.shape[1]:
        checks.reject(op, "w", f"have shape (E, N, K) with x's K = {x.shape[1]}", checks.shape(w))
    if num_groups > MAX_GROUPS:
        checks.reject(op, "w", f"have at most {MAX_GROUPS} groups", checks.shape(w))
    checks.check_int32(op, "offsets", offsets, [num_groups], "(E,) = {}", x, "x's")
    check_bias(op, "bias", bias, x, (num_groups, num_cols), "(E, N)")
    _check_row_numbers(op, "gather", gather, x)
    _check_row_numbers(op, "scatter", scatter, x)
    num_rows = (x if gather is None else gather).shape[0]
    if scatter is not None and scatter.shape[0] != num_rows:
        checks.reject(op, "scatter", f"have shape (R,) = ({num_rows},)", checks.shape(scatter))
    return apply(op, _GroupedMM, x, w, offsets, bias, gather, scatter)
