"""Appending to a paged cache as a torch operator, and the public function."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from fastattn.cpu import append_paged_kv as cpu
from fastattn.cuda import append_paged_kv as cuda

from . import checks
from .dispatch import checks_values, chooses_cuda, describe, log, runs_kernels
from .operator import define, operators

OP = "append_paged_kv"
CACHE_DTYPES = (*checks.FLOAT_DTYPES, torch.int8, torch.float8_e4m3fn)


def _append_paged_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cache_seqlens: Tensor, cu_seqlens: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, interleaved: bool,
    backend: str | None = None,
) -> None:  # fmt: skip
    if checks_values(k):
        _check_values(k, cache_seqlens, cu_seqlens, cos)
    if not runs_kernels(k):
        append_paged_kv = cpu.append_paged_kv
    elif chooses_cuda(OP, backend, cuda.is_chosen(k), cuda.limit, k, cos, sin):
        append_paged_kv = cuda.append_paged_kv
    else:
        from fastattn.kernels.append_paged_kv import append_paged_kv  # here, so that `import fastattn` needs no Triton
    if log.isEnabledFor(logging.INFO):
        given = map(describe, (k, v, k_cache, cos))
        log.info("append_paged_kv: k %s v %s k_cache %s cos %s, by %s", *given, append_paged_kv.__module__)
    append_paged_kv(k, v, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens, cos, sin, k_scale, v_scale, interleaved)
    torch.autograd.graph.increment_version((k_cache, v_cache))  # what was saved for a backward is no longer what it was


# Inductor takes a mutated input's storage offset for 0 where it is symbolic (pytorch#198068), and older ones where it is a number, too.
_KEEPS_OFFSETS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def _fake(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> None:
    for arg, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        offset = cache.storage_offset()
        if not _KEEPS_OFFSETS and not isinstance(offset, torch.SymInt) and offset != 0:
            raise NotImplementedError(
                f"{OP}: {arg} must not be a part of a larger tensor under torch.compile before torch 2.13; give keys and values tensors of"
                " their own"
            )
        if isinstance(offset, torch.SymInt):  # better no graph than a wrong one
            raise NotImplementedError(
                f"{OP}: {arg} must not be a part of a larger tensor whose sizes are compiled as dynamic; mark them as static, or give"
                " keys and values tensors of their own"
            )


define(
    "append_paged_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor cache_seqlens,"
    " Tensor? cu_seqlens, Tensor? cos, Tensor? sin, Tensor? k_scale, Tensor? v_scale, bool interleaved, "
    "str? backend=None) -> ()",
    _append_paged_kv,
    _fake,
)


# --------------------------------------------------------------------------------------------------------------------
# Checks.


def _check_values(k: Tensor, cache_seqlens: Tensor, cu_seqlens: Tensor | None, cos: Tensor | None) -> None:
    """Read cu_seqlens, and with tables cache_seqlens (this synchronises on CUDA): they lie in the packed tensor and in the tables."""
    if cu_seqlens is None:
        lengths = [k.shape[1]] * k.shape[0]
    else:
        ends = cu_seqlens.tolist()
        lengths = [end - start for start, end in zip(ends, ends[1:])]
        if ends[0] != 0:
            checks.reject(OP, "cu_seqlens", "start at 0", ends[0])
        for i, length in enumerate(lengths):
            if length < 0:
                checks.reject(OP, "cu_seqlens", "not decrease", f"{ends[i]} then {ends[i + 1]} at index {i + 1}")
        if ends[-1] > k.shape[0]:
            checks.reject(OP, "cu_seqlens", f"end within k's {k.shape[0]} packed tokens", ends[-1])
    if cos is not None:
        for b, (cached, length) in enumerate(zip(cache_seqlens.tolist(), lengths)):
            if length and cached + length > cos.shape[0]:
                must = f"leave the new positions below S_max = {cos.shape[0]}"
                checks.reject(OP, "cache_seqlens", must, f"{cached} before {length} new tokens at index {b}")


def _check_new(k: Tensor, v: Tensor, packed: bool) -> None:
    for arg, t in (("k", k), ("v", v)):
        checks.check_tensor(OP, arg, t)
    checks.check_dtype(OP, "k", k)
    letters = "(T, H_kv, D) with cu_seqlens" if packed else "(B, S_new, H_kv, D) without cu_seqlens"
    if k.dim() != (3 if packed else 4):
        checks.reject(OP, "k", f"have shape {letters}", checks.shape(k))
    checks.check_device(OP, "v", v, "k's", k.device)
    if v.dtype != k.dtype:
        checks.reject(OP, "v", f"have k's dtype {k.dtype}", v.dtype, TypeError)
    if v.shape[:-1] != k.shape[:-1]:
        checks.reject(OP, "v", f"have k's {checks.shape(k)[:-1]} before D_v", checks.shape(v))
    for arg, t in (("k", k), ("v", v)):
        if not 1 <= t.shape[-1] <= checks.MAX_HEAD_DIM:
            checks.reject(OP, arg, f"have a head_dim between 1 and {checks.MAX_HEAD_DIM}", t.shape[-1])


def _check_caches(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    for arg, cache, x in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        checks.check_tensor(OP, arg, cache)
        checks.check_device(OP, arg, cache, "k's", k.device)
        if cache.dtype not in CACHE_DTYPES:
            checks.reject(OP, arg, "be float16, bfloat16, float32, int8 or float8_e4m3fn", cache.dtype, TypeError)
        if cache.dim() != 4 or cache.shape[2:] != x.shape[-2:]:
            letters = f"(num_pages, page_size, H_kv, D) with (H_kv, D) = {checks.shape(x)[-2:]}"
            checks.reject(OP, arg, f"have shape {letters} to match {arg[0]}", checks.shape(cache))
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            checks.reject(OP, arg, "have a contiguous last dim", f"strides {cache.stride()}")
        if cache.requires_grad:
            checks.reject(OP, arg, "not require a gradient (it is written in place)", "requires_grad=True")
    if v_cache.dtype != k_cache.dtype:
        checks.reject(OP, "v_cache", f"have k_cache's dtype {k_cache.dtype}", v_cache.dtype, TypeError)
    if v_cache.shape[:2] != k_cache.shape[:2]:
        checks.reject(OP, "v_cache", f"have k_cache's (num_pages, page_size) = {checks.shape(k_cache)[:2]}", checks.shape(v_cache)[:2])
    if k_cache.shape[1] < 1:
        checks.reject(OP, "k_cache", "have a page_size of at least 1", k_cache.shape[1])


def _check_places(k: Tensor, page_table: Tensor, cache_seqlens: Tensor, cu_seqlens: Tensor | None) -> None:
    for arg, t in (("page_table", page_table), ("cache_seqlens", cache_seqlens), ("cu_seqlens", cu_seqlens)):
        if arg == "cu_seqlens" and t is None:
            continue
        checks.check_tensor(OP, arg, t)
        if t.dtype != torch.int32:
            checks.reject(OP, arg, "be an int32 tensor", t.dtype, TypeError)
        checks.check_device(OP, arg, t, "k's", k.device)
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1):
        checks.reject(OP, "cu_seqlens", "have shape (B + 1,)", checks.shape(cu_seqlens))
    batch = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if page_table.dim() != 2 or page_table.shape[0] != batch:
        checks.reject(OP, "page_table", f"have shape (B, max_pages) with B = {batch}", checks.shape(page_table))
    if cache_seqlens.shape != (batch,):
        checks.reject(OP, "cache_seqlens", f"have shape (B,) = ({batch},)", checks.shape(cache_seqlens))


def _check_tables(k: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if (cos is None) != (sin is None):
        checks.reject(OP, "cos and sin", "be given together", "cos alone" if sin is None else "sin alone")
    if cos is None:
        return
    for arg, t in (("cos", cos), ("sin", sin)):
        checks.check_tensor(OP, arg, t)
        checks.check_float(OP, arg, t)
        checks.check_device(OP, arg, t, "k's", k.device)
    if cos.dim() != 2 or not 2 <= 2 * cos.shape[-1] <= k.shape[-1]:
        checks.reject(OP, "cos", f"have shape (S_max, R/2) with R/2 between 1 and D/2 = {k.shape[-1] // 2}", checks.shape(cos))
    if sin.shape != cos.shape:
        checks.reject(OP, "sin", f"have cos's shape {checks.shape(cos)}", checks.shape(sin))


def _check_scale(arg: str, scale: Tensor | None, k: Tensor) -> None:
    if scale is None:
        return
    checks.check_tensor(OP, arg, scale)
    if scale.dtype != torch.float32:
        checks.reject(OP, arg, "be float32", scale.dtype, TypeError)
    checks.check_device(OP, arg, scale, "k's", k.device)
    if scale.shape != (k.shape[-2],):
        checks.reject(OP, arg, f"have shape (H_kv,) = ({k.shape[-2]},)", checks.shape(scale))


def append_paged_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: Literal["triton", "cuda"] | None = None,
) -> None:
    """New keys and values into a paged cache, in place, in one launch; keys rotated on the way where tables are given, and both quantised
    where the cache is.

    New token i of sequence b goes to position p = cache_seqlens[b] + i: slot p % page_size of page page_table[b, p // page_size].

    Args:
        k: (B, S_new, H_kv, D), or packed (T, H_kv, D) with cu_seqlens, D from 1 to 512; float16, bfloat16 or float32.
        v: (B, S_new, H_kv, D_v), or packed (T, H_kv, D_v), of k's dtype. k and v may have any strides with a contiguous last dim (slices
            of one projection); other last-dim strides cost a copy. No gradient is recorded for them.
        k_cache, v_cache: (num_pages, page_size, H_kv, D) and (num_pages, page_size, H_kv, D_v), any page size, of one dtype: float16,
            bfloat16, float32, int8 or float8_e4m3fn. Written in place; any strides with a contiguous last dim (heads before slots, keys
            and values of a page side by side). They cannot require a gradient.
        page_table: (B, max_pages) int32, any row stride: the pages of each sequence in order. A token is skipped where its page is −1 or
            any other number that is no page, or where its position is negative or beyond max_pages·page_size. Two tokens in one slot
            leave either of them there, element by element.
        cache_seqlens: (B,) int32: the sequences' lengths before the new tokens. It is read, not advanced.
        cu_seqlens: (B + 1,) int32, starting at 0: sequence b's new tokens are cu_seqlens[b] to cu_seqlens[b + 1]. Tokens past the last
            sequence are skipped. Values are checked on the CPU, and on CUDA only under FASTATTN_CHECK=1 (it synchronises).
        cos, sin: (S_max, R/2), any float dtype: row p rotates the first R ≤ D columns of a key at position p, as `apply_rotary` does. On
            the CPU the new positions have to lie in the tables; on CUDA a key whose position does not is stored as it is.
        interleaved: the pairs are columns (0, 1), (2, 3), … (GPT-J), not (0, R/2), (1, R/2 + 1), … (GPT-NeoX, Llama).
        k_scale, v_scale: (H_kv,) float32: what is stored is the value divided by its head's scale. None is 1.
        backend: which of two kernels runs on CUDA tensors. None: CUDA C++ for up to 64 tokens, as its launch takes less of the host, where
            it is built and does what is asked (`fastattn.cuda.append_paged_kv.limit`), else Triton. What is named runs or raises.

    Numerics: fp32 inside, one rounding, to nearest even. int8 and float8_e4m3fn saturate, at −128 and 127, and ±448. A NaN is a NaN, and 0
    in int8.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else, such as a cache that requires a gradient.
        NotImplementedError: backend="cuda" is not built, or does not do this.

    Source: Kwon et al., arXiv 2309.06180 (paged caches).

    Example:
        >>> k, v = torch.randn(2, 1, 3, 8, 64).unbind()  # one sequence, three new tokens
        >>> k_cache, v_cache = torch.zeros(2, 10, 16, 8, 64).unbind()  # ten pages of 16
        >>> page_table, cache_seqlens = torch.tensor([[7, 2]], dtype=torch.int32), torch.tensor([15], dtype=torch.int32)
        >>> fastattn.append_paged_kv(k, v, k_cache, v_cache, page_table, cache_seqlens)  # page 7's last slot, page 2's first two
    """
    _check_new(k, v, cu_seqlens is not None)
    _check_caches(k, v, k_cache, v_cache)
    _check_places(k, page_table, cache_seqlens, cu_seqlens)
    _check_tables(k, cos, sin)
    _check_scale("k_scale", k_scale, k)
    _check_scale("v_scale", v_scale, k)
    checks.check_backend(OP, backend, k, runs_kernels(k))
    tensors = (None if t is None else t.detach() for t in (cos, sin, k_scale, v_scale))
    operators.append_paged_kv(
        k.detach(), v.detach(), k_cache, v_cache, page_table, cache_seqlens, cu_seqlens, *tensors, bool(interleaved), backend
    )
