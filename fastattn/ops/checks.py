"""Argument checks, made once, at the op's boundary. Each message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
MAX_WINDOW = 2**31 - 1  # what a kernel's int32 holds, and past any sequence


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def reject(op: str, arg: str, must: str, got: object, error: type[Exception] = ValueError) -> None:
    raise error(f"{op}: {arg} must {must}, got {got}")


def check_tensor(op: str, arg: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        reject(op, arg, "be a torch.Tensor", type(value).__name__, TypeError)
    if value.is_nested or value.layout != torch.strided:
        reject(op, arg, "be a dense tensor", "a nested one" if value.is_nested else value.layout, TypeError)


def check_device(op: str, arg: str, value: torch.Tensor, owner: str, device: torch.device) -> None:
    """`value` lies where another tensor does; owner: whose device that is, as "q's"."""
    if value.device != device:
        reject(op, arg, f"be on {owner} device {device}", value.device)


def check_like(op: str, arg: str, value: torch.Tensor, q: torch.Tensor, *, dtype: bool = True, owner: str = "q's") -> None:
    """`value` lies on q's device and, unless dtype=False, has q's dtype; owner: what messages call q, as "x's"."""
    check_device(op, arg, value, owner, q.device)
    if dtype and value.dtype != q.dtype:
        reject(op, arg, f"have {owner} dtype {q.dtype}", value.dtype, TypeError)


def check_choice(op: str, arg: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        reject(op, arg, "be a str", type(value).__name__, TypeError)
    if value not in choices:
        reject(op, arg, f"be one of {', '.join(map(repr, choices))}", repr(value))


def check_backend(op: str, backend: str | None, tensor: torch.Tensor, runs_kernels: bool) -> None:
    """One of two kernels may be asked for where kernels run at all."""
    if backend is not None:
        check_choice(op, "backend", backend, ("triton", "cuda"))
        if not runs_kernels:
            reject(op, "backend", f"be None for tensors on {tensor.device.type}", repr(backend))


def check_float(op: str, arg: str, value: torch.Tensor, *, or_bool: bool = False) -> None:
    if value.dtype not in (*FLOAT_DTYPES, torch.float64) and not (or_bool and value.dtype == torch.bool):
        reject(op, arg, f"have a {'bool or ' if or_bool else ''}floating-point dtype", value.dtype, TypeError)


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool, float64: bool = False) -> None:
    """q (B, S_q, H, D), k (B, S_k, H_kv, D), v (B, S_k, H_kv, D_v); packed, the first two dims are one. float64: that too will do."""
    for arg, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, arg, t)
    if q.dtype not in FLOAT_DTYPES and not (float64 and q.dtype == torch.float64):
        reject(op, "q", "be float16, bfloat16 or float32", q.dtype, TypeError)
    rank, letters = (3, "(T, H, D)") if packed else (4, "(B, S, H, D)")
    for arg, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != rank:
            why = "with cu_seqlens" if packed else "without cu_seqlens"
            reject(op, arg, f"have shape {letters} {why}", shape(t))
        if t is not q:
            check_like(op, arg, t, q)
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    head_dim, seqs = q_shape[-1], "T_k" if packed else "B, S_k"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        reject(op, "q", f"have a head_dim between 1 and {MAX_HEAD_DIM}", head_dim)
    if not 1 <= v_shape[-1] <= MAX_HEAD_DIM:
        reject(op, "v", f"have a head_dim between 1 and {MAX_HEAD_DIM}", v_shape[-1])
    if k_shape[-1] != head_dim or (not packed and k_shape[0] != q_shape[0]):
        batch = "" if packed else f" and B = {q.shape[0]}"
        reject(op, "k", f"have shape ({seqs}, H_kv, D) with D = {head_dim}{batch} to match q", shape(k))
    if v_shape[:-1] != k_shape[:-1]:
        reject(op, "v", f"have shape ({seqs}, H_kv, D_v) with k's {shape(k)[:-1]} before D_v", shape(v))
    heads, kv_heads = q_shape[-2], k_shape[-2]
    if (kv_heads == 0) != (heads == 0) or (kv_heads != 0 and heads % kv_heads != 0):
        reject(op, "k", f"have a head count that divides q's {heads}", kv_heads)


def check_cu_seqlens(op: str, arg: str, cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    check_tensor(op, arg, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        reject(op, arg, "be an int32 tensor", cu_seqlens.dtype, TypeError)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        reject(op, arg, "have shape (B + 1,)", shape(cu_seqlens))
    check_like(op, arg, cu_seqlens, q, dtype=False)


def check_cu_seqlens_values(op: str, side: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> list[int]:
    """Read cu_seqlens_{side} (this synchronises on CUDA): it starts at 0, never decreases, and stays within the packed tensor."""
    arg, values = f"cu_seqlens_{side}", cu_seqlens.tolist()
    if values[0] != 0:
        reject(op, arg, "start at 0", values[0])
    lengths = [end - start for start, end in zip(values, values[1:], strict=False)]
    for i, length in enumerate(lengths):
        if length < 0:
            reject(op, arg, "not decrease", f"{values[i]} then {values[i + 1]} at index {i + 1}")
    if values[-1] > total:
        reject(op, arg, f"end within {side}'s {total} packed tokens", values[-1])
    for i, length in enumerate(lengths):
        if length > max_seqlen:
            reject(op, arg, f"hold lengths of at most max_seqlen_{side} = {max_seqlen}", f"{length} at index {i}")
    return values


def check_broadcastable(op: str, arg: str, value: torch.Tensor, target: Sequence[int], letters: str) -> None:
    dims = shape(value)
    fits = len(dims) <= len(target) and all(
        d == 1 or d == t for d, t in zip(reversed(dims), reversed(target), strict=False)
    )
    if not fits:
        reject(op, arg, f"broadcast to {letters} = {tuple(target)}", dims)


def check_bool(op: str, arg: str, value: object) -> None:
    """A bool, or an int that serves as one."""
    if not isinstance(value, (int, torch.SymBool)):
        reject(op, arg, "be a bool", type(value).__name__, TypeError)


def integer(op: str, arg: str, value: object, must: str) -> int:
    """A Python int, or whatever counts as one (numpy's, a 0-d tensor on the CPU, a compiler's symbol), but no bool."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dim() != 0):
        got = f"a tensor of shape {shape(value)}" if isinstance(value, torch.Tensor) else type(value).__name__
        reject(op, arg, must, got, TypeError)
    try:
        return operator.index(value)
    except TypeError:
        reject(op, arg, must, type(value).__name__, TypeError)


def window_bound(op: str, arg: str, bound: object) -> int | None:
    """One side of a window: None or -1 is unbounded; an int, or flash-attn's 0-d tensor, of 0 or more counts keys."""
    if bound is None:
        return None
    bound = integer(op, arg, bound, "hold ints, 0-d tensors or None")
    if bound < -1:
        reject(op, arg, "hold bounds of -1 (unbounded) or more", bound)
    return None if bound == -1 else min(bound, MAX_WINDOW)


def check_scores(
    op: str, causal: object, window: object, softmax_scale: object, softcap: object
) -> tuple[int | None, int | None]:
    """The two sides of the window, causal among them, once all that shapes attention's scores is found to be as documented."""
    check_bool(op, "causal", causal)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        reject(op, "window", "be a pair (left, right)", window)
    left, right = (window_bound(op, "window", bound) for bound in window)
    check_softcap(op, softcap)
    if softmax_scale is not None:
        check_number(op, "softmax_scale", softmax_scale)
        if not abs(softmax_scale) <= torch.finfo(torch.float32).max:
            reject(op, "softmax_scale", "be finite", softmax_scale)
    return left, 0 if causal else right


def resolved_softmax_scale(softmax_scale: float | None, head_dim: int) -> float:
    """1/√D where none is given; and what float32 has no normal number for is 0, so that a later −inf·0 is none either."""
    softmax_scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else float(softmax_scale)
    return 0.0 if abs(softmax_scale) < torch.finfo(torch.float32).tiny else softmax_scale


def check_number(op: str, arg: str, value: object) -> None:
    """A Python number (or a compiler's symbolic one). Not a tensor: reading it would synchronise and drop its gradient."""
    if type(value) in (float, int):  # as nearly always; an abstract class takes a microsecond to ask
        return
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        reject(op, arg, "be a Python number", type(value).__name__, TypeError)


def check_softcap(op: str, softcap: object) -> None:
    """0 for none, or a positive number that float32 holds, and its inverse."""
    check_number(op, "softcap", softcap)
    if not (softcap == 0.0 or torch.finfo(torch.float32).tiny <= softcap <= torch.finfo(torch.float32).max):
        reject(op, "softcap", "be finite and not negative", softcap)


def check_probability(op: str, arg: str, p: float) -> None:
    check_number(op, arg, p)
    if not 0.0 <= p < 1.0:
        reject(op, arg, "lie in [0, 1)", p)


def check_dtype(op: str, arg: str, value: torch.Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        reject(op, arg, "be float16, bfloat16 or float32", value.dtype, TypeError)


def dimension(op: str, arg: str, dim: object, rank: int) -> int:
    """A dim of a tensor of that rank, counted from the front; a scalar has one, as torch sees it."""
    dim, rank = integer(op, arg, dim, "be an int"), max(rank, 1)
    if not -rank <= dim < rank:
        reject(op, arg, f"lie in [{-rank}, {rank - 1}]", dim, IndexError)
    return dim % rank


def autocasts_to_float32(value: torch.Tensor) -> bool:
    """Whether torch's autocast would run softmax, norms and losses of this tensor in float32: it does so on CUDA alone."""
    return value.is_cuda and torch.is_autocast_enabled("cuda")


def check_int32(
    op: str, arg: str, value: torch.Tensor, dims: Sequence[int | None], letters: str, q: torch.Tensor, owner: str = "q's"
) -> None:
    """An int32 tensor of that shape, None for any size, on q's device; owner as in `check_like`. letters may have a {} for dims: filled in
    beforehand, it would make a number of a compiler's symbol, and a graph for each."""
    check_tensor(op, arg, value)
    if value.dtype != torch.int32:
        reject(op, arg, "be an int32 tensor", value.dtype, TypeError)
    check_like(op, arg, value, q, dtype=False, owner=owner)
    if value.dim() != len(dims) or any(dim not in (None, size) for dim, size in zip(dims, value.shape, strict=True)):
        reject(op, arg, f"have shape {letters.format(tuple(dims))}", shape(value))


def check_per_head(
    op: str, arg: str, value: torch.Tensor | None, allowed: Sequence[tuple[int, ...]], letters: str, q: torch.Tensor
) -> None:
    """None, or a float tensor of one of these shapes on q's device; letters as in `check_int32`, of the last one."""
    if value is None:
        return
    check_tensor(op, arg, value)
    check_float(op, arg, value)
    check_like(op, arg, value, q, dtype=False)
    if not any(shape(value) == dims for dims in allowed):  # `in` takes a compiler's symbolic size for another
        reject(op, arg, f"have shape {letters.format(allowed[-1])}", shape(value))
