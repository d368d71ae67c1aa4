"""Attention over a paged key/value cache as a torch operator, and the public functions."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fastattn.cpu import paged_attention as cpu
from fastattn.cuda import paged_attention as cuda

from . import checks
from .attention import check_attention, visible_pairs, with_contiguous_cols
from .dispatch import checks_values, chooses_cuda, describe, log, runs_kernels
from .merge_attention import merge_attention
from .operator import apply, define, differentiable, operators

OP = "paged_attention"
MAX_SPLITS, MAX_KEYS = 256, 2**30


def _paged_attention(
    q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, leftpad, max_seqlen_q,
    window_left, window_right, softmax_scale, softcap, num_splits, backend=None,
):  # fmt: skip
    if checks_values(q):
        index = dict(cu_seqlens_q=cu_seqlens_q, leftpad=leftpad, max_seqlen_q=max_seqlen_q, window_left=window_left)
        check_paged_values(OP, q, k_cache, page_table, seqlens_k, **index)
    q, page_table = map(with_contiguous_cols, (q, page_table))
    small = seqlens_k, cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, leftpad
    small = (None if t is None else t.contiguous() for t in small)
    inputs = q, k_cache, v_cache, page_table, *small, max_seqlen_q, window_left, window_right, softmax_scale, softcap, num_splits
    if not runs_kernels(q):
        paged_attention = cpu.paged_attention
    elif chooses_cuda(
        OP, backend, cuda.is_chosen(q, k_cache, cu_seqlens_q, max_seqlen_q, num_splits), cuda.limit, q, k_cache, v_cache
    ):
        paged_attention = cuda.paged_attention
    else:
        from fastattn.kernels.paged_attention import paged_attention  # here, so that `import fastattn` needs no Triton
    if log.isEnabledFor(logging.INFO):
        log.info(
            "paged_attention: q %s k_cache %s page_table %s max_seqlen_q=%d num_splits=%d, by %s",
            *map(describe, (q, k_cache, page_table)), max_seqlen_q, num_splits, paged_attention.__module__,
        )  # fmt: skip
    return paged_attention(*inputs)


def _paged_attention_fake(q, k_cache, v_cache, page_table, *rest):
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(*q.shape[:-1], v_cache.shape[-1]), q.new_empty(lse_shape, dtype=torch.float32)


define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seqlens_k, Tensor? cu_seqlens_q, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor? leftpad, SymInt max_seqlen_q, "
    "SymInt? window_left, SymInt? window_right, float softmax_scale, float softcap, int num_splits, str? backend=None) -> "
    "(Tensor out, Tensor lse)",
    _paged_attention,
    _paged_attention_fake,
)


@register_flop_formula(torch.ops.fastattn.paged_attention, get_raw=True)
def _paged_attention_flops(q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, *rest, **_) -> int:
    """Of both products over the visible pairs. Lengths that cannot be read (fake and meta tensors) count as the table's capacity."""
    max_seqlen_q, left, right = rest[5:8]
    unread = seqlens_k.is_meta or isinstance(seqlens_k, FakeTensor)
    batch, capacity = page_table.shape[0], page_table.shape[1] * k_cache.shape[1]
    seqlens_q = [max_seqlen_q] * batch if unread or cu_seqlens_q is None else cu_seqlens_q.diff().tolist()
    lengths = zip(seqlens_q, [capacity] * batch if unread else seqlens_k.tolist())
    pairs = q.shape[-2] * sum(visible_pairs(*both, left, right) for both in lengths)
    return 2 * pairs * (q.shape[-1] + v_cache.shape[-1])


@differentiable
class _PagedAttention(torch.autograd.Function):
    """Without a derivative, and saying so: a cache holds keys and values apart from the graph that made them."""

    @staticmethod
    def forward(
        q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, leftpad, options
    ):
        return operators.paged_attention(
            q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, leftpad, *options
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "fastattn.paged_attention has no gradient: keys and values in a cache are apart from the graph that made them; "
            "train with fastattn.attention, and call this under torch.no_grad()"
        )


# --------------------------------------------------------------------------------------------------------------------
# Checks.


def _check_caches(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    letters = "(num_pages, page_size, H_kv, D)"
    for arg, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_tensor(op, arg, cache)
        if cache.dtype not in (q.dtype, torch.int8, torch.float8_e4m3fn):
            checks.reject(op, arg, f"have q's dtype {q.dtype}, or be int8 or float8_e4m3fn", cache.dtype, TypeError)
        checks.check_like(op, arg, cache, q, dtype=False)
        if cache.dim() != 4:
            checks.reject(op, arg, f"have shape {letters}", checks.shape(cache))
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            checks.reject(op, arg, "have a contiguous last dim (a cache is not copied)", f"strides {cache.stride()}")
    if v_cache.dtype != k_cache.dtype:
        checks.reject(op, "v_cache", f"have k_cache's dtype {k_cache.dtype}", v_cache.dtype, TypeError)
    if k_cache.shape[-1] != q.shape[-1]:
        checks.reject(op, "k_cache", f"have shape {letters} with D = {q.shape[-1]} to match q", checks.shape(k_cache))
    if v_cache.shape[:-1] != k_cache.shape[:-1]:
        must = f"have shape (num_pages, page_size, H_kv, D_v) with k_cache's {checks.shape(k_cache)[:-1]} before D_v"
        checks.reject(op, "v_cache", must, checks.shape(v_cache))
    for arg, head_dim in (("q", q.shape[-1]), ("v_cache", v_cache.shape[-1])):
        if not 1 <= head_dim <= checks.MAX_HEAD_DIM:
            checks.reject(op, arg, f"have a head_dim between 1 and {checks.MAX_HEAD_DIM}", head_dim)
    heads, kv_heads = q.shape[-2], k_cache.shape[-2]
    if kv_heads == 0 or heads % kv_heads != 0:
        checks.reject(op, "k_cache", f"have a head count that divides q's {heads}", kv_heads)
    if k_cache.shape[1] == 0:
        checks.reject(op, "k_cache", "have pages of at least one row", checks.shape(k_cache))


def check_paged_values(
    op: str, q: Tensor, k_cache: Tensor, page_table: Tensor, seqlens_k: Tensor, *, cu_seqlens_q: Tensor | None = None,
    leftpad: Tensor | None = None, max_seqlen_q: int = 0, window_left: int | None = None,
    names: tuple[str, str] = ("page_table", "seqlens_k"),
) -> None:  # fmt: skip
    """Read the index tensors (this synchronises on CUDA): lengths fit the table, and every entry that counts is a page. `names`: what the
    caller calls those two."""
    (num_pages, page_size), max_pages = k_cache.shape[:2], page_table.shape[1]
    seqlens_q: int | Tensor = max_seqlen_q
    if cu_seqlens_q is not None:
        starts = checks.check_cu_seqlens_values(op, "q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        seqlens_q = torch.tensor(starts).diff().to(seqlens_k.device)
    if seqlens_k.numel() == 0:
        return
    capacity = min(max_pages * page_size, MAX_KEYS)
    low, high = (int(bound) for bound in seqlens_k.aminmax())
    if low < 0 or high > capacity:
        checks.reject(op, names[1], f"lie in [0, max_pages · page_size] = [0, {capacity}]", low if low < 0 else high)
    if leftpad is not None and bool(((leftpad < 0) | (leftpad > seqlens_k)).any()):
        checks.reject(op, "cache_leftpad", "lie between 0 and its sequence's length", leftpad.tolist())
    entries = page_table[:, : -(-high // page_size)]
    if entries.numel() == 0:
        return
    least, most = (int(page) for page in entries.aminmax())
    if 0 <= least and most < num_pages:  # so are all of them, used or not
        return
    lengths = seqlens_k.long()
    first = torch.zeros_like(lengths) if leftpad is None else leftpad.long()
    if window_left is not None:  # what lies before every window is not read
        first = torch.maximum(first, lengths - seqlens_q - window_left)
    place = torch.arange(entries.shape[1], device=page_table.device) * page_size
    used = (place < lengths[:, None]) & (place + page_size > first[:, None])
    wrong = used & ((entries < 0) | (entries >= num_pages))
    if bool(wrong.any()):
        b, entry = (int(index) for index in wrong.nonzero()[0])
        got = f"{int(page_table[b, entry])} at [{b}, {entry}]"
        checks.reject(op, names[0], f"hold pages in [0, num_pages) = [0, {num_pages}) wherever it is used", got)


def check_paged(
    op: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[int, int | None, int | None]:
    """max_seqlen_q and the two sides of the window, once everything is found to be as `paged_attention` documents."""
    packed = cu_seqlens_q is not None
    checks.check_tensor(op, "q", q)
    checks.check_dtype(op, "q", q)
    if q.dim() != (3 if packed else 4):
        letters = "(T, H, D) with cu_seqlens_q" if packed else "(B, S_q, H, D) without cu_seqlens_q"
        checks.reject(op, "q", f"have shape {letters}", checks.shape(q))
    _check_caches(op, q, k_cache, v_cache)
    checks.check_int32(op, "page_table", page_table, (None, None), "(B, max_pages)", q)
    batch, heads, kv_heads = page_table.shape[0], q.shape[-2], k_cache.shape[-2]
    if packed:
        checks.check_int32(op, "cu_seqlens_q", cu_seqlens_q, (batch + 1,), "(B + 1,) = {} to match page_table", q)
        bound = q.shape[0] if max_seqlen_q is None else checks.integer(op, "max_seqlen_q", max_seqlen_q, "be an int or None")
        if not torch.compiler.is_compiling() and bound < 0:
            checks.reject(op, "max_seqlen_q", "not be negative", bound)
    else:
        if max_seqlen_q is not None:
            checks.reject(op, "max_seqlen_q", "be None without cu_seqlens_q", max_seqlen_q)
        if q.shape[0] != batch:
            checks.reject(op, "page_table", f"have shape (B, max_pages) with B = {q.shape[0]} to match q", checks.shape(page_table))
        bound = q.shape[1]
    checks.check_int32(op, "seqlens_k", seqlens_k, (batch,), "(B,) = {}", q)
    checks.check_per_head(op, "alibi_slopes", alibi_slopes, ((heads,), (batch, heads)), "(H,) or (B, H) = {}", q)
    checks.check_per_head(op, "sinks", sinks, ((heads,),), "(H,) = {}", q)
    for arg, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        checks.check_per_head(op, arg, scale, ((kv_heads,),), "(H_kv,) = {}", q)
    left, right = checks.check_scores(op, causal, window, softmax_scale, softcap)
    splits = checks.integer(op, "num_splits", num_splits, "be an int")
    if not 0 <= splits <= MAX_SPLITS:
        checks.reject(op, "num_splits", f"lie in [0, {MAX_SPLITS}]", splits)
    return bound, left, right


# --------------------------------------------------------------------------------------------------------------------
# The public functions.


def as_cache(
    op: str, k: Tensor, v: Tensor, cu_seqlens_k: Tensor | None, max_seqlen_k: int | None, seqused_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k_cache, v_cache and page_table of keys in a dense batch or a packed one, for faces that let a sequence use the first of them only.

    Dense (B, S_k, H_kv, D): a row of the batch is a page. Packed (T_k, H_kv, D) with cu_seqlens_k: a token is, and B·max_seqlen_k int32
    say which (B·T_k where it is None). seqused_k: how many of its keys each sequence uses.

    Raises: as `check_attention`; ValueError for more than there are, where values are looked at.
    """
    check_attention(op, k, k, v, cu_seqlens_q=cu_seqlens_k, cu_seqlens_k=cu_seqlens_k)
    if seqused_k is not None and cu_seqlens_k is not None and checks_values(k):
        lengths = cu_seqlens_k.diff()
        if seqused_k.shape == lengths.shape and bool((seqused_k > lengths).any()):
            checks.reject(op, "seqused_k", f"not exceed the lengths {lengths.tolist()}", seqused_k.tolist())
    if cu_seqlens_k is None:
        return k, v, torch.arange(k.shape[0], dtype=torch.int32, device=k.device)[:, None]
    places = torch.arange(k.shape[0] if max_seqlen_k is None else max_seqlen_k, dtype=torch.int32, device=k.device)
    return k[:, None], v[:, None], cu_seqlens_k[:-1, None] + places


def _autocast(q: Tensor, k_cache: Tensor) -> Tensor:
    """q as an autocast region has it: in the dtype of the caches, which are not copied, or over quantised ones in the region's."""
    device = q.device.type
    if q.is_meta or not torch.is_autocast_enabled(device) or q.dtype not in checks.FLOAT_DTYPES:
        return q
    return q.to(k_cache.dtype if k_cache.dtype in checks.FLOAT_DTYPES else torch.get_autocast_dtype(device))


def attend_paged(
    q, k_cache, v_cache, page_table, seqlens_k, *, cu_seqlens_q=None, alibi_slopes=None, sinks=None, k_scale=None, v_scale=None,
    leftpad=None, max_seqlen_q=None, window_left=None, window_right=None, softmax_scale=None, softcap=0.0, num_splits=0, backend=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`paged_attention` below its checks, for the faces with other conventions: (out, lse).

    leftpad: (B,) int32; the first leftpad[b] places of sequence b hold nothing: its keys are places leftpad[b] to seqlens_k[b].
    """
    softmax_scale = checks.resolved_softmax_scale(softmax_scale, q.shape[-1])
    if max_seqlen_q is None:
        max_seqlen_q = q.shape[0 if cu_seqlens_q is not None else 1]
    tensors = cu_seqlens_q, alibi_slopes, sinks, k_scale, v_scale, leftpad
    options = max_seqlen_q, window_left, window_right, softmax_scale, float(softcap), int(num_splits), backend
    return apply(OP, _PagedAttention, q, k_cache, v_cache, page_table, seqlens_k, *tensors, options)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: Literal["triton", "cuda"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest queries of B sequences over keys and values that lie in pages of a shared cache.

    Decoding (S_q = 1), speculative decoding (S_q = 2 to 16) and the prefill of a prompt in chunks are this one call: the queries are the
    last S_q positions of each sequence, and their own keys and values are in the cache already (`append_paged_kv` puts them there).

    Args:
        q: (B, S_q, H, D), or packed (T, H, D) with cu_seqlens_q; float16, bfloat16 or float32, last dim contiguous or copied.
        k_cache, v_cache: (num_pages, page_size, H_kv, D) and (…, D_v), H a multiple of H_kv; any page_size from 1; q's dtype, int8 or
            float8_e4m3fn; any strides with a contiguous last dim (a slice of a larger cache, say).
        page_table: (B, max_pages) int32. Key n of sequence b is row n % page_size of page page_table[b, n // page_size]. Pages may be in
            any order, and shared. Entries from ⌈seqlens_k[b] / page_size⌉ on, and those wholly before a window, are never read.
        seqlens_k: (B,) int32, how many keys each sequence has, the new ones included: from 0 to 2^30.
        cu_seqlens_q: (B + 1,) int32, starting at 0: sequence b's queries are rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q.
        max_seqlen_q: an upper bound of the packed lengths; None takes the total token count. Never a host sync.
        causal: query i sees key j iff j ≤ i + seqlens_k[b] − S_q: aligned to the bottom right, so that the last query sees every key.
        window, softmax_scale, softcap, alibi_slopes, sinks: as in `fastattn.attention`.
        k_scale, v_scale: (H_kv,) float; multiply what is read from the caches.
        num_splits: into how many parts each sequence's keys are divided, for programs that run side by side, up to 256. 0 chooses, by
            the shapes alone. A given number makes a sequence's result the same bits whatever else is in the batch, at some cost in speed
            (on CPU tensors too, where the keys are divided by memory, and the number itself changes nothing).
        return_lse: also return the log-sum-exp of the scores.
        backend: which of two kernels runs on CUDA tensors. None: CUDA C++ where S_q·H/H_kv is at most 16, if it is built and does what is
            asked (`fastattn.cuda.paged_attention.limit`), but not in a packed batch of a given num_splits; else Triton. What is named
            runs or raises.

    Returns:
        out: q's shape with D_v as its last dim, q's dtype. A query that sees no key is 0; so are rows past cu_seqlens_q[-1].
        lse (with return_lse): natural logarithm, float32, (B, H, S_q) or (H, T); −inf for a query that sees no key (the sink's logit with
            sinks).

    There is no gradient: a backward raises. Under autocast q is cast to the caches' dtype, over quantised caches to the region's. Values of
    page_table, seqlens_k and cu_seqlens_q are checked on the CPU, and on CUDA only under FASTATTN_CHECK=1 (it synchronises); unchecked,
    lengths are clamped to the table and keys of a page out of range are masked.

    Raises:
        TypeError: a dtype or type that is not as above. ValueError: anything else. NotImplementedError: a backward; backend="cuda"
        is not built, or does not do this.

    Sources: Kwon et al., arXiv 2309.06180 (paged attention); Dao et al., "Flash-Decoding" (2023) (split keys); Ainslie et al.,
    arXiv 2305.13245 (grouped queries).

    Example:
        >>> k_cache, v_cache = torch.randn(2, 100, 16, 8, 64).unbind(0)          # 100 pages of 16 keys
        >>> page_table = torch.tensor([[7, 3, 90], [4, 0, 0]], dtype=torch.int32)
        >>> seqlens_k = torch.tensor([40, 9], dtype=torch.int32)
        >>> out = fastattn.paged_attention(torch.randn(2, 1, 32, 64), k_cache, v_cache, page_table, seqlens_k)
    """
    if isinstance(q, Tensor) and isinstance(k_cache, Tensor):
        q = _autocast(q, k_cache)
    max_seqlen_q, window_left, window_right = check_paged(
        OP, q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, causal=causal, window=window,
        softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        num_splits=num_splits,
    )  # fmt: skip
    checks.check_backend(OP, backend, q, runs_kernels(q))
    out, lse = attend_paged(
        q, k_cache, v_cache, page_table, seqlens_k, cu_seqlens_q=cu_seqlens_q, alibi_slopes=alibi_slopes, sinks=sinks, k_scale=k_scale,
        v_scale=v_scale, max_seqlen_q=max_seqlen_q, window_left=window_left, window_right=window_right, softmax_scale=softmax_scale,
        softcap=softcap, num_splits=num_splits, backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def cascade_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_pages: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`paged_attention` of B sequences that begin with the same pages, which are read once for all of them.

    All queries together attend to the prefix as one sequence, each sequence attends to the rest of its own, and `merge_attention` puts
    the two together: for B sequences with a long prefix, close to B times fewer bytes.

    Args:
        q: (B, S_q, H, D).
        prefix_pages: (P,) int32, the full pages that all sequences begin with: P · page_size keys, visible to every query.
        page_table, seqlens_k: (B, max_pages) and (B,) int32: the pages and keys that follow the prefix, the new ones included. Every
            sequence has at least S_q keys there, since queries see the whole prefix and are causal over what follows.
        The caches and options are `paged_attention`'s.

    Returns: out (B, S_q, H, D_v), and lse (B, H, S_q) with return_lse.

    Raises: what `paged_attention` raises.

    Source: Ye et al., "Cascade inference" (FlashInfer, 2024); arXiv 2501.01005.
    """
    checks.check_tensor("cascade_attention", "q", q)
    if q.dim() != 4:
        checks.reject("cascade_attention", "q", "have shape (B, S_q, H, D)", checks.shape(q))
    checks.check_tensor("cascade_attention", "k_cache", k_cache)
    if k_cache.dim() != 4:
        checks.reject("cascade_attention", "k_cache", "have shape (num_pages, page_size, H_kv, D)", checks.shape(k_cache))
    checks.check_int32("cascade_attention", "prefix_pages", prefix_pages, (None,), "(P,)", q)
    batch, seqlen_q, heads, head_dim = q.shape
    options = dict(softmax_scale=softmax_scale, softcap=softcap, k_scale=k_scale, v_scale=v_scale, return_lse=True)
    length = torch.full((1,), prefix_pages.shape[0] * k_cache.shape[1], dtype=torch.int32, device=q.device)
    together = q.reshape(1, batch * seqlen_q, heads, head_dim)
    of_prefix = paged_attention(together, k_cache, v_cache, prefix_pages[None], length, causal=False, **options)
    of_rest = paged_attention(q, k_cache, v_cache, page_table, seqlens_k, sinks=sinks, **options)
    outs = of_prefix[0].view(batch, seqlen_q, heads, -1), of_rest[0]
    lses = of_prefix[1].view(heads, batch, seqlen_q).transpose(0, 1), of_rest[1]
    out, lse = merge_attention(outs, lses)
    return (out, lse) if return_lse else out
