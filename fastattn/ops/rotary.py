"""Rotary position embedding as a torch operator, and the public function."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fastattn.cpu import rotary as cpu

from . import checks
from .dispatch import checks_values, describe, log, runs_kernels
from .operator import apply, define, differentiable, operators

OP = "apply_rotary"


def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    if log.isEnabledFor(logging.INFO):
        log.info("rotary: q %s k %s cos %s interleaved=%s inverse=%s", *map(describe, (q, k, cos)), interleaved, inverse)
    if checks_values(q):
        _check_values(q, cos, positions, cu_seqlens)
    if runs_kernels(q):
        from fastattn.kernels.rotary import rotary  # here, so that `import fastattn` needs no Triton

        return rotary(q, k, cos, sin, positions, cu_seqlens, interleaved, inverse)
    return cpu.rotary(q, k, cos, sin, positions, cu_seqlens, interleaved, inverse)


define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens, bool interleaved, bool inverse)"
    " -> (Tensor, Tensor)",
    _rotary,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


@differentiable
class _Rotary(torch.autograd.Function):
    """A rotation, which is linear: its backward is the rotation by −angle, and that one's backward is itself again."""

    @staticmethod
    def forward(q, k, cos, sin, positions, cu_seqlens, interleaved, inverse):
        return operators.rotary(q, k, cos, sin, positions, cu_seqlens, interleaved, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, *tensors, ctx.interleaved, ctx.inverse = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dq, dk):
        some = dk if dq is None else dq
        if some is None:
            return (None,) * 8
        wanted = ctx.needs_input_grad[0] and dq is not None, ctx.needs_input_grad[1] and dk is not None
        dq, dk = (some[..., :0, :] if not want else grad for want, grad in zip(wanted, (dq, dk)))  # no heads, no work
        grads = apply(OP, _Rotary, dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
        return *(grad if want else None for want, grad in zip(wanted, grads)), *[None] * 6


# --------------------------------------------------------------------------------------------------------------------
# Checks.


def _check_values(q: Tensor, cos: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Read the positions, or cu_seqlens (this synchronises on CUDA): they lie in the tables and in the packed tensor."""
    table_len = cos.shape[-2]
    if positions is not None and positions.numel():
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high >= table_len:
            checks.reject(OP, "positions", f"lie in [0, S_max) = [0, {table_len})", low if low < 0 else high)
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if ends[0] != 0:
            checks.reject(OP, "cu_seqlens", "start at 0", ends[0])
        for i, (start, end) in enumerate(zip(ends, ends[1:])):
            if end < start:
                checks.reject(OP, "cu_seqlens", "not decrease", f"{start} then {end} at index {i + 1}")
            if end - start > table_len:
                checks.reject(OP, "cu_seqlens", f"hold lengths of at most S_max = {table_len}", f"{end - start} at index {i}")
        if ends[-1] > q.shape[0]:
            checks.reject(OP, "cu_seqlens", f"end within q's {q.shape[0]} packed tokens", ends[-1])


def _check(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    for arg, t in (("q", q), ("k", k)):
        checks.check_tensor(OP, arg, t)
    checks.check_dtype(OP, "q", q)
    if q.dim() not in (3, 4):
        checks.reject(OP, "q", "have shape (B, S, H, D) or packed (T, H, D)", checks.shape(q))
    packed, head_dim = q.dim() == 3, q.shape[-1]
    if not 2 <= head_dim <= checks.MAX_HEAD_DIM:
        checks.reject(OP, "q", f"have a head_dim between 2 and {checks.MAX_HEAD_DIM}", head_dim)
    checks.check_like(OP, "k", k, q)
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != head_dim:
        letters = "(T, H_kv, D)" if packed else "(B, S, H_kv, D)"
        checks.reject(OP, "k", f"have shape {letters} to match q {checks.shape(q)}", checks.shape(k))
    batch, seqlen = (1, q.shape[0]) if packed else q.shape[:2]
    for arg, t in (("cos", cos), ("sin", sin)):
        checks.check_tensor(OP, arg, t)
        checks.check_float(OP, arg, t)
        checks.check_like(OP, arg, t, q, dtype=False)
        if t.requires_grad and torch.is_grad_enabled():
            checks.reject(OP, arg, "not require a gradient (none is computed)", "requires_grad=True")
    if cos.dim() not in ((2,) if packed else (2, 3)) or (cos.dim() == 3 and cos.shape[0] not in (1, batch)):
        shapes = "(S_max, R/2)" if packed else f"(S_max, R/2) or (B, S_max, R/2) with B = {batch} or 1"
        checks.reject(OP, "cos", f"have shape {shapes}", checks.shape(cos))
    if not 2 <= 2 * cos.shape[-1] <= head_dim:
        checks.reject(OP, "cos", f"have a last dim R/2 between 1 and D/2 = {head_dim // 2}", cos.shape[-1])
    if sin.shape != cos.shape:
        checks.reject(OP, "sin", f"have cos's shape {checks.shape(cos)}", checks.shape(sin))
    if positions is not None:
        _check_positions(q, positions, cu_seqlens, packed, batch, seqlen)
    elif cu_seqlens is not None:
        if not packed:
            checks.reject(OP, "cu_seqlens", "be None for q (B, S, H, D)", "cu_seqlens")
        checks.check_cu_seqlens(OP, "cu_seqlens", cu_seqlens, q)
    elif cos.shape[-2] < seqlen:
        checks.reject(OP, "cos", f"have at least {seqlen} rows, one a position of q", cos.shape[-2])


def _check_positions(
    q: Tensor, positions: Tensor, cu_seqlens: Tensor | None, packed: bool, batch: int, seqlen: int
) -> None:
    checks.check_tensor(OP, "positions", positions)
    if cu_seqlens is not None:
        checks.reject(OP, "positions and cu_seqlens", "not be given together", "both")
    if positions.dtype not in (torch.int32, torch.int64):
        checks.reject(OP, "positions", "be an int32 or int64 tensor", positions.dtype, TypeError)
    checks.check_like(OP, "positions", positions, q, dtype=False)
    shapes = [(seqlen,)] if packed else [(batch, seqlen), (1, seqlen)]
    if tuple(positions.shape) not in shapes:
        letters = "(T,)" if packed else "(B, S)"
        checks.reject(OP, "positions", f"have shape {letters} = {shapes[0]}", checks.shape(positions))


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, in one launch, out of place.

    Each pair of columns (x₁, x₂) of a head becomes (x₁·cos − x₂·sin, x₂·cos + x₁·sin), with the table row of the token's position.

    Args:
        q: (B, S, H, D), or packed (T, H, D), D from 2 to 512; float16, bfloat16 or float32.
        k: (B, S, H_kv, D), or packed (T, H_kv, D), of q's dtype; any number of heads. q and k may have any strides with a contiguous
            last dim (slices of one projection, heads-first layouts transposed); other last-dim strides cost a copy.
        cos, sin: (S_max, R/2), or one table a sequence, (B, S_max, R/2), where B may be 1; any float dtype. The first R ≤ D columns
            of each head are rotated, the others stay as they are. No gradient.
        interleaved: the pairs are columns (0, 1), (2, 3), … (GPT-J), not (0, R/2), (1, R/2 + 1), … (GPT-NeoX, Llama: what
            transformers calls rotate_half, whose tables hold every angle twice: pass `cos[..., : R // 2]`).
        positions: (B, S), where B may be 1, or (T,), int32 or int64: each token's row of the tables. The default is 0, 1, … in each
            sequence. Values are checked on the CPU, and on CUDA only under FASTATTN_CHECK=1 (it synchronises).
        cu_seqlens: (N + 1,) int32, starting at 0: sequence n of a packed batch is tokens cu_seqlens[n] to cu_seqlens[n + 1], and its
            positions start at 0. Tokens past the last sequence stay as they are. Checked as positions are.
        inverse: rotate by −angle, which undoes it.

    Returns:
        (q, k) rotated: new contiguous tensors of the same shapes and dtype. On CUDA a token whose position lies outside the tables
        stays as it is.

    Numerics: fp32 inside, one rounding. The backward is the inverse rotation, by the same kernel; it can be differentiated again.
    Forward-mode AD raises NotImplementedError.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else, such as tables shorter than S, positions and
        cu_seqlens together, or cos or sin that requires a gradient.

    Source: Su et al., arXiv 2104.09864.

    Example:
        >>> q, k = torch.randn(2, 128, 8, 64), torch.randn(2, 128, 2, 64)
        >>> angles = torch.arange(128)[:, None] / 10000 ** (torch.arange(0, 64, 2) / 64)
        >>> q, k = fastattn.apply_rotary(q, k, angles.cos(), angles.sin())
    """
    _check(q, k, cos, sin, positions, cu_seqlens)
    if k is q:  # one tensor in two places breaks a compiled autograd.Function
        k = k.view_as(k)
    if sin is cos:
        sin = sin.view_as(sin)
    return apply(OP, _Rotary, q, k, cos, sin, positions, cu_seqlens, bool(interleaved), bool(inverse))
