"""Cases of `fastattn.paged_attention` and the check that judges them: shared by the tests of the CPU path, the interpreter and the GPU."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import fastattn
from fastattn.reference import paged_attention as reference
from fastattn.testing.budget import check_budget

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
INT8, E4M3 = torch.int8, torch.float8_e4m3fn
NOWHERE = 2**31 - 1  # the page of a table's entries that nothing may read


def pages_of(*tensors: Tensor, lengths: Tensor, page_size: int, spare: int = 2) -> tuple[list[Tensor], Tensor]:
    """(B, S, H_kv, D) tensors as caches of shuffled pages, and the page table. Whatever no sequence uses is NaN, or the largest integer:
    the pages of nobody, the rows past a sequence's last, and so are the table's entries."""
    batch, seqlen = tensors[0].shape[:2]
    counts = [-(-int(length) // page_size) for length in lengths]
    table = torch.full((batch, max(1, -(-seqlen // page_size) + 1)), NOWHERE, dtype=torch.int32)
    free = torch.randperm(sum(counts) + spare).tolist()
    caches = []
    for t in tensors:
        cache = torch.empty(len(free), page_size, *t.shape[2:], dtype=F32).fill_(float("nan") if t.is_floating_point() else 127)
        caches.append(cache.to(t.dtype))
    for b, count in enumerate(counts):
        pages = [free.pop() for _ in range(count)]
        table[b, :count] = torch.tensor(pages, dtype=torch.int32)
        for entry, page in enumerate(pages):
            rows = min(page_size, int(lengths[b]) - entry * page_size)
            for t, cache in zip(tensors, caches, strict=True):
                source = t[b, entry * page_size :][:rows]
                cache[page, :rows].view(torch.uint8).copy_(source.contiguous().view(torch.uint8))
    return caches, table


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `lengths` are the keys of each sequence, `packed` the queries of each where they differ, else every one has S_q."""

    lengths: tuple[int, ...] = (5, 130, 77)
    S_q: int = 1
    packed: tuple[int, ...] | None = None
    page_size: int = 16
    H: int = 4
    H_kv: int = 2
    D: int = 64
    D_v: int = 64
    dtype: torch.dtype = F16
    cache: torch.dtype | None = None
    slopes: tuple[int, ...] | None = None
    sinks: bool = False
    options: dict = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        queries = f"packed{self.packed}" if self.packed else f"S{self.S_q}"
        shape = f"{queries}x{self.lengths}-page{self.page_size}-H{self.H}x{self.H_kv}-D{self.D}x{self.D_v}-{str(self.dtype)[6:]}"
        extras = [str(self.cache)[6:] if self.cache else "", f"alibi{self.slopes}" if self.slopes else "", "sinks" if self.sinks else ""]
        extras += [f"{name}={value}" for name, value in self.options.items()]
        return "-".join([shape, *filter(None, extras)]).replace(" ", "")

    def arguments(self) -> tuple[list[Tensor], dict]:
        """(q, k_cache, v_cache, page_table, seqlens_k) and the keyword arguments."""
        batch, lengths = len(self.lengths), torch.tensor(self.lengths, dtype=torch.int32)
        k, v = (torch.randn(batch, max(self.lengths), self.H_kv, d) for d in (self.D, self.D_v))
        options = dict(self.options)
        if self.cache == INT8:
            k, v = ((t * 40).round().clamp(-127, 127) for t in (k, v))
        if self.cache is not None:
            options["k_scale"], options["v_scale"] = (torch.rand(self.H_kv) * (0.05 if self.cache == INT8 else 2.0) for _ in range(2))
        k, v = (t.to(self.cache or self.dtype) for t in (k, v))
        (k_cache, v_cache), table = pages_of(k, v, lengths=lengths, page_size=self.page_size)
        if self.packed is None:
            q = torch.randn(batch, self.S_q, self.H, self.D)
        else:
            q = torch.randn(sum(self.packed) + 2, self.H, self.D)  # with two rows that are no sequence's
            options["cu_seqlens_q"] = torch.tensor([0, *torch.tensor(self.packed).cumsum(0)], dtype=torch.int32)
            options["max_seqlen_q"] = max(self.packed)
        if self.slopes is not None:
            options["alibi_slopes"] = torch.rand(self.slopes)
        if self.sinks:
            options["sinks"] = torch.randn(self.H)
        return [q.to(self.dtype), k_cache, v_cache, table, lengths], options


def check(case: Case, device: str = "cpu") -> None:
    """fastattn.paged_attention against the float64 reference, within the budget that the reference in the case's dtype sets."""
    (q, *rest), options = case.arguments()
    move = lambda t: t.to(device) if isinstance(t, Tensor) else t  # noqa: E731
    got = fastattn.paged_attention(*map(move, (q, *rest)), **{name: move(t) for name, t in options.items()}, return_lse=True)
    truth = reference(q.double(), *rest, **options, return_lse=True)
    naive = reference(q, *rest, **options, return_lse=True)
    assert got[0].dtype == case.dtype and got[1].dtype == F32
    for name, *values in zip(("out", "lse"), got, naive, truth, strict=True):
        check_budget(f"paged_attention {case} {name}", *values)


# Decode, speculation and prefill; pages of one row, ragged, whole blocks, larger than all; groups that divide a tile and do not; head
# dims below, at and between powers of two, D_v ≠ D; empty sequences.
VALUES = [
    *(Case(dtype=dtype) for dtype in (F16, BF16, F32)),
    *(Case(S_q=5, H=8, dtype=dtype) for dtype in (F16, BF16, F32)),
    *(Case(S_q=40, dtype=dtype, page_size=64) for dtype in (F16, BF16, F32)),
    *(Case(S_q=S_q, page_size=page_size) for S_q in (1, 20) for page_size in (1, 7, 64, 128, 200)),
    Case((0, 0, 3), S_q=2),
    Case((3, 130, 77), S_q=70),
    Case((300,), S_q=300, H=2, H_kv=1, dtype=BF16),
    Case(packed=(1, 0, 30)),
    Case((40, 30, 0, 64), packed=(1, 30, 2, 7), dtype=BF16, page_size=64),
    Case(H=3, H_kv=1, S_q=7),
    Case(H=40, H_kv=1, S_q=2),
    Case(H=10, H_kv=2, S_q=30, D=40, D_v=24),
    Case((20, 50), D=7, D_v=3, dtype=BF16),
    Case((20, 50), H=2, D=192, D_v=128),
    Case((20, 50), H=2, D=300, D_v=512, S_q=3),
    Case((20, 50), D=1, D_v=1, dtype=F32),
]
FEATURES = [
    *(Case(cache=cache, dtype=dtype, S_q=S_q, page_size=page_size)
      for cache in (INT8, E4M3) for dtype, S_q, page_size in ((F16, 1, 16), (BF16, 30, 64), (F32, 3, 64))),
    Case(options=dict(window=(20, None))),
    Case(S_q=30, options=dict(window=(20, None))),
    Case(S_q=30, page_size=64, options=dict(window=(20, 5), causal=False)),
    Case(S_q=6, options=dict(causal=False)),
    Case(S_q=30, options=dict(window=(None, 3), causal=False), dtype=BF16),
    Case(S_q=3, options=dict(window=(0, 0))),
    Case(S_q=5, options=dict(softcap=5.0)),
    Case(options=dict(softcap=0.5), dtype=F32),
    Case(S_q=5, slopes=(4,)),
    Case(S_q=5, slopes=(3, 4), options=dict(causal=False), page_size=64),
    Case(sinks=True),
    Case((0, 2, 70), sinks=True, S_q=4, options=dict(num_splits=2)),
    Case(options=dict(num_splits=3)),
    Case((300, 20), S_q=30, options=dict(num_splits=4), dtype=BF16),
    Case(packed=(3, 1, 20), options=dict(num_splits=2, window=(50, None)), sinks=True),
    Case(S_q=3, options=dict(softmax_scale=-0.2)),
    Case(S_q=3, options=dict(softmax_scale=0.0), dtype=F32),
    Case(S_q=3, options=dict(softmax_scale=1e-50), dtype=F32),
    Case((90, 40, 7), packed=(20, 3, 1), H=6, D=40, D_v=24, dtype=BF16, cache=INT8, slopes=(3, 6), sinks=True,
         options=dict(num_splits=3, softcap=4.0, window=(30, 2), causal=False)),
]  # fmt: skip
