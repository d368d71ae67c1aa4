"""A paged key/value cache: the tensors of every layer, the page pool that says what lies where, and each step's index tensors."""

from __future__ import annotations

import ctypes
import mmap
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import checks
from .ops.append_paged_kv import append_paged_kv
from .ops.paged_attention import paged_attention
from .page_pool import PagePool, PoolStep, integer, integers

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn)
_HUGE_PAGE = 1 << 21
ARRAYS = ("page_table", "cache_seqlens", "seqlens_k", "cu_seqlens_q", "slots", "positions")


def zeros(*size: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.zeros, on the CPU in huge pages where the system has them: decoding reads rows from all over a cache, and a quarter of its time
    went into translating their addresses."""
    cache = torch.empty(size, dtype=dtype, device=device)
    if cache.device.type == "cpu" and type(cache) is Tensor and hasattr(mmap, "MADV_HUGEPAGE"):
        begin = -(-cache.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        length = cache.data_ptr() + cache.nbytes - begin
        if length >= _HUGE_PAGE:  # advice before the first touch, which a kernel may refuse
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length // mmap.PAGESIZE * mmap.PAGESIZE), mmap.MADV_HUGEPAGE)
    return cache.zero_()


@dataclass(frozen=True)
class Step:
    """The index tensors of one step, int32 on the cache's device: B sequences, T new tokens. The cache's next step overwrites them.

    page_table: (B, max_pages) the pages of each sequence, in order; entries past its last page mean nothing.
    cache_seqlens, seqlens_k: (B,) lengths without and with the new tokens. cu_seqlens_q: (B + 1,) sums of the new tokens, from 0.
    slots: (T,) where each new token's key and value go: page · page_size + offset. positions: (T,) where it stands in its sequence.
    max_seqlen_q: the most new tokens of one sequence, as an int.
    """

    page_table: Tensor
    cache_seqlens: Tensor
    seqlens_k: Tensor
    cu_seqlens_q: Tensor
    slots: Tensor
    positions: Tensor
    max_seqlen_q: int


class PagedKVCache:
    """Keys and values of many sequences in pages, the same pages in every layer.

    Args:
        num_layers, num_pages, page_size, num_kv_heads, head_dim: positive; num_pages · page_size, the tokens it holds, is below 2**31.
        dtype: torch.float16, bfloat16, float32, int8 or float8_e4m3fn.
        device: where the tensors lie.
        head_dim_v: the values' head dim, None for head_dim.
        k_scale, v_scale: (num_layers, num_kv_heads) float32: what is stored, times its head's scale, is the key or value. None is 1.
        share_prefixes: let sequences with the same first tokens share pages; it needs the tokens' ids (see `allocate`).

    Attributes:
        k_cache, v_cache: a list of tensors, one a layer: (num_pages, page_size, num_kv_heads, head_dim), values with head_dim_v.
        current: the `Step` that `append` and `attend` work on. None before the first, once `commit` or a further `step` has ended it, and
            where it no longer holds, since a sequence of its was freed, truncated or extended. pool: the `fastattn.page_pool.PagePool`.

    A serving loop:
        >>> cache = PagedKVCache(32, 1000, 16, 8, 128, dtype=torch.bfloat16, device="cuda")
        >>> a = cache.allocate(prompt)                       # starts on whatever prefix of the prompt is already there
        >>> step = cache.step([a], len(prompt) - cache.length(a), prompt[cache.length(a):])
        >>> # in each layer: cache.append(layer, k, v), then out = cache.attend(layer, q)
        >>> step = cache.step([a], 1, [next_token])          # and so on; cache.free(a) at the end

    On the CPU a step's tensors are the pool's own arrays. On CUDA they are persistent tensors, updated on the current stream without
    waiting for the device, and of the page table only the entries that changed travel; they move to other addresses when a step is larger
    than all before it.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name. fastattn.page_pool.OutOfPages: too few free pages; nothing was taken.
        Whatever `step` and `extend` raise, every sequence is as it was, and the call can be made again. A cache is not to be copied.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        head_dim_v: int | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        share_prefixes: bool = True,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "head_dim_v": head_dim_v}
        for name, size in sizes.items():
            if integer("PagedKVCache", name, size) < 1:
                checks.reject("PagedKVCache", name, "be at least 1", size)
        if dtype not in DTYPES:
            checks.reject("PagedKVCache", "dtype", f"be one of {', '.join(map(str, DTYPES))}", dtype, TypeError)
        self.pool = PagePool(num_pages, page_size, share_prefixes=share_prefixes)
        self.num_layers, self.num_kv_heads, self.head_dim, self.head_dim_v = map(int, sizes.values())
        with torch.inference_mode(False):  # a cache made in inference mode can be written outside of it, too
            # Zeros: whatever an empty page held, times an attention weight of 0, would have to be finite.
            pages = (num_pages, page_size, num_kv_heads)
            self.k_cache = [zeros(*pages, head_dim, dtype=dtype, device=device) for _ in range(num_layers)]
            self.v_cache = [zeros(*pages, head_dim_v, dtype=dtype, device=device) for _ in range(num_layers)]
        self.dtype, self.device = dtype, self.k_cache[0].device
        self.k_scale, self.v_scale = self._checked_scale("k_scale", k_scale), self._checked_scale("v_scale", v_scale)
        self.current: Step | None = None
        self._batch: set[int] = set()  # ids of the last step
        self._unwritten: set[int] = set()  # layers that lack the last step's tokens
        self._copies: list[tuple[int, int]] = []  # pages that are still to be copied
        self._mirror = _Mirror(self.pool, self.device)

    def __reduce__(self) -> str:
        raise TypeError("a PagedKVCache cannot be copied or pickled")

    def _checked_scale(self, name: str, scale: Tensor | None) -> Tensor | None:
        if scale is None:
            return None
        checks.check_tensor("PagedKVCache", name, scale)
        if scale.dtype != torch.float32:
            checks.reject("PagedKVCache", name, "be float32", scale.dtype, TypeError)
        wanted = (self.num_layers, self.num_kv_heads)
        if scale.shape != wanted:
            checks.reject("PagedKVCache", name, f"have shape (num_layers, num_kv_heads) = {wanted}", checks.shape(scale))
        return scale.to(self.device)

    # The pool's calls

    @property
    def num_pages(self) -> int:
        return self.pool.num_pages

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    @property
    def num_free(self) -> int:
        """Pages still to be had, those included that only keep an ended sequence's prefix."""
        return self.pool.num_free

    def allocate(self, tokens: Iterable[int] | None = None) -> int:
        """A new sequence's id. With its tokens (1-D ints: a list, an array, a CPU tensor) it starts on the full pages that already hold
        its beginning, all but one token at most: `length` says how many tokens need no computing. Nothing else is reserved."""
        return self.pool.allocate(tokens)

    def length(self, id: int) -> int:
        """Tokens of a sequence, those of the current step included."""
        return self.pool.length(id)

    def free(self, id: int) -> None:
        """End a sequence. Its full pages keep their contents for later sequences with the same prefix until their room is needed."""
        self.pool.free(id)
        self._outdate(id)

    def fork(self, id: int) -> int:
        """A new sequence with the same tokens, on the same pages until one of the two writes into a shared one."""
        return self.pool.fork(id)

    def truncate(self, id: int, length: int) -> None:
        """Forget a sequence's tokens from `length` on."""
        self.pool.truncate(id, length)
        self._outdate(id)

    def commit(self) -> None:
        """Say that every layer holds the keys and values of all tokens so far, so that their full pages can be shared. This ends the step.

        The next `step` does so itself if every layer's `append` has been called. To be called, then, before a `free` of pages that are
        worth keeping, and by whoever writes without `append`: with `fastattn.append_paged_kv` itself, or by replaying a CUDA graph.
        """
        self._unwritten.clear()
        self._end_step()

    def extend(self, id: int, new: int) -> None:
        """Make room for a number of new tokens of one sequence without a step. Nothing says what they are, or when they are written:
        after them a sequence's pages are shared no more."""
        new = integer("PagedKVCache.extend", "new", new)
        self._copy_pages()
        self._copies += self.pool.extend(id, new)
        self._outdate(id)
        if self._copies:  # of pages that the current step, too, may be about to write
            self.current = None
        try:
            self._copy_pages()
        except BaseException:
            self.pool.truncate(id, self.pool.length(id) - new)
            raise

    def step(self, ids: Iterable[int], new: int | Iterable[int] = 1, tokens: Iterable[int] | None = None) -> Step:
        """Make room for the new tokens of a batch, and say where everything is.

        Args:
            ids: (B,) sequences, each once.
            new: new tokens of each sequence, or one number for all; 0 is allowed.
            tokens: (T,) their ids, one sequence's after another's. After a token without one a sequence's pages are shared no more.

        Calling it ends the step before: what that appended is shared from here on if every layer's `append` was called for it, or `commit`,
        and never if not (a forward pass that raised). Pages that a fork shares and this step writes into are copied first, in every
        layer. Where it raises, OutOfPages for one, every sequence is as it was.
        """
        ids = integers("PagePool.step", "ids", ids)
        self._end_step()
        self._copy_pages()
        made = self.pool.step(ids, new, tokens)
        self._copies += made.copies
        try:
            self._copy_pages()
            self.current = self._mirror.update(made)
        except BaseException:
            self._take_back(ids)
            raise
        self._batch = set(ids)
        self._unwritten = set(range(self.num_layers)) if made.total_q else set()
        return self.current

    def _end_step(self) -> None:
        if self._unwritten:
            self.pool.abandon()
        else:
            self.pool.commit()
        self._unwritten.clear()
        self.current = None

    def _outdate(self, id: int) -> None:
        """The current step's slots are no longer this sequence's, and may be another's soon."""
        if operator.index(id) in self._batch:
            self.current = None

    def _take_back(self, ids: list[int]) -> None:
        """Undo the pool's step."""
        lengths = torch.frombuffer(self.pool.cache_seqlens, dtype=torch.int32).tolist()
        for id, length in zip(ids, lengths):
            self.pool.truncate(id, length)

    def _copy_pages(self) -> None:
        """Copy the pages that are to be. Where that raises they stay to be copied, before any page is taken anew."""
        if not self._copies:
            return
        with torch.inference_mode(False), torch.no_grad():
            sources, targets = _to_device(torch.tensor(self._copies).T.contiguous(), self.device)
            for cache in (*self.k_cache, *self.v_cache):
                content = cache.view(torch.uint8)  # not every device copies float8 by index
                content[targets] = content[sources]  # all are read before one is written
        self._copies = []

    # The ops on the current step

    def append(
        self,
        layer_idx: int,
        k: Tensor,
        v: Tensor,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        interleaved: bool = False,
    ) -> None:
        """Write the current step's keys and values of one layer: packed (T, H_kv, D), or (B, S, H_kv, D) where every sequence got S tokens.
        `fastattn.append_paged_kv` says what cos and sin do."""
        step, cu_seqlens = self._step_for("append", layer_idx, "k", k)
        append_paged_kv(
            k, v, self.k_cache[layer_idx], self.v_cache[layer_idx], step.page_table, step.cache_seqlens, cu_seqlens=cu_seqlens,
            cos=cos, sin=sin, interleaved=interleaved, **self._scales(layer_idx),
        )  # fmt: skip
        self._unwritten.discard(layer_idx)

    def attend(self, layer_idx: int, q: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the current step's queries to everything cached in one layer: packed (T, H, D), or (B, S, H, D) where every sequence
        got S tokens. `options` are those of `fastattn.paged_attention`, whose result it returns."""
        step, cu_seqlens_q = self._step_for("attend", layer_idx, "q", q)
        max_seqlen_q = None if cu_seqlens_q is None else step.max_seqlen_q
        return paged_attention(
            q, self.k_cache[layer_idx], self.v_cache[layer_idx], step.page_table, step.seqlens_k, cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, **self._scales(layer_idx), **options,
        )  # fmt: skip

    def _step_for(self, op: str, layer_idx: int, name: str, tensor: Tensor) -> tuple[Step, Tensor | None]:
        """The current step, and cu_seqlens if the tensor is packed."""
        if not 0 <= integer(f"PagedKVCache.{op}", "layer_idx", layer_idx) < self.num_layers:
            checks.reject(f"PagedKVCache.{op}", "layer_idx", f"be between 0 and {self.num_layers - 1}", layer_idx)
        if self.current is None:
            raise RuntimeError(f"PagedKVCache.{op}: there is no current step: call step first")
        step, shape = self.current, checks.shape(tensor)
        batch, total, longest = len(step.seqlens_k), len(step.slots), step.max_seqlen_q
        if len(shape) == 3 and shape[0] == total:
            return step, step.cu_seqlens_q
        if len(shape) == 4 and shape[:2] == (batch, longest) and batch * longest == total:
            return step, None
        dense = f", or ({batch}, {longest}, H, D)" if batch * longest == total else ""
        checks.reject(f"PagedKVCache.{op}", name, f"have shape ({total}, H, D){dense} in this step", shape)

    def _scales(self, layer_idx: int) -> dict[str, Tensor | None]:
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: None if scale is None else scale[layer_idx] for name, scale in scales.items()}


class _Mirror:
    """The pool's arrays as tensors on a device, brought up to date after each step."""

    def __init__(self, pool: PagePool, device: torch.device) -> None:
        self._pool, self._device = pool, device
        self._in_place = device.type == "cpu"  # the pool's arrays are the step's tensors
        self._sources: dict[str, Any] = {}  # the pool's arrays, each of which it replaces when it is too small
        self._host: dict[str, Tensor] = {}  # the same memory
        self._tensors: dict[str, Tensor] = {}
        self._number = 0  # of the pool's step that the tensors show

    def update(self, made: PoolStep) -> Step:
        with torch.inference_mode(False):
            self._follow_growth()
            if not self._in_place:
                self._upload(made)
        self._number = made.number
        sizes = self._sizes(made)
        return Step(**{name: self._tensors[name][: sizes[name]] for name in ARRAYS}, max_seqlen_q=made.max_seqlen_q)

    @staticmethod
    def _sizes(made: PoolStep) -> dict[str, int]:
        batch, total = made.batch, made.total_q
        return dict(zip(ARRAYS, (batch, batch, batch, batch + 1, total, total), strict=True))

    def _follow_growth(self) -> None:
        for name in (*ARRAYS, "changes"):
            source = getattr(self._pool, name)
            if source is not self._sources.get(name):
                host = torch.frombuffer(source, dtype=torch.int32).view(source.shape)
                # Zeros, as the pool's own: the page table's unused entries count as unchanged.
                self._tensors[name] = host if self._in_place else torch.zeros_like(host, device=self._device)
                self._host[name], self._sources[name] = host, source

    def _upload(self, made: PoolStep) -> None:
        """Copies from pinned memory that is never written again: torch keeps it until the device has read it, so nobody waits."""
        missed = made.number != self._number + 1  # a step whose upload raised: what it changed counts, too
        changes = None if missed else made.num_changes
        sizes = self._sizes(made)
        if changes is None:
            sizes["page_table"] = len(self._host["page_table"])
        else:
            del sizes["page_table"]
            sizes["changes"] = changes
        used = {name: self._host[name][:size] for name, size in sizes.items()}
        staged = _to_device(torch.cat([part.flatten() for part in used.values()]), self._device)
        for (name, part), copy in zip(used.items(), staged.split([part.numel() for part in used.values()])):
            self._tensors[name][: len(part)] = copy.view(part.shape)
        if changes:
            index, value = self._tensors["changes"][:changes].unbind(1)
            self._tensors["page_table"].view(-1)[index.long()] = value


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
