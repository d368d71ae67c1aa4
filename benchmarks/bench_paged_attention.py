"""Paged attention against gathering the pages first, and against every other paged kernel at hand: decoding over batch, length, page size
and the cache's dtype, chunks of a prompt, and sequences that share a prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.kv_cache import zeros

from .models import MODELS, labelled
from .suite import COPY, OURS, Builder, Forward, Suite, by_backend, find_peers, import_name

CACHES = {"": None, "int8": torch.int8, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Shape:
    """seqlen_q new tokens of each of `batch` sequences of seqlen_k keys, the first `prefix` of them on the same pages in all. `cache` is
    the caches' dtype: "" for the queries' own, or int8 or e4m3 with scales."""

    function: str
    batch: int
    seqlen_k: int
    page_size: int
    seqlen_q: int = 1
    prefix: int = 0
    cache: str = ""
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    model: str = ""

    def id(self, dtype: str) -> str:
        prefix, cache = f"-prefix{self.prefix}" * bool(self.prefix), f"-{self.cache}" * bool(self.cache)
        name = f"{self.function}-B{self.batch}-S{self.seqlen_q}x{self.seqlen_k}-page{self.page_size}{prefix}-{dtype}{cache}"
        return labelled(self.model, name)


def _shapes(batches: tuple[int, ...], lengths: tuple[int, ...], pages: tuple[int, ...], caches: tuple[str, ...] = ("",)) -> list[Shape]:
    return [Shape("decode", b, n, p, cache=c) for b in batches for n in lengths for p in pages for c in caches]


def _of_models(batches: tuple[int, ...], seqlen_k: int) -> list[Shape]:
    return [
        Shape("decode", b, seqlen_k, 16, num_heads=m.num_heads, num_kv_heads=m.num_kv_heads, head_dim=m.head_dim, model=m.name)
        for m in MODELS
        for b in batches
    ]


_TINY = [replace(s, num_heads=4, num_kv_heads=2, head_dim=16) for s in [
    *_shapes((2,), (40,), (8,), ("", "int8")), Shape("prefill", 1, 60, 16, 20), Shape("prefix", 3, 40, 8, prefix=24),
]]  # fmt: skip
PRESETS = {
    ("cpu", "tiny"): _TINY,
    ("cpu", "quick"): [
        *_shapes((1, 16), (2048,), (16, 64)), Shape("prefill", 1, 2048, 16, 256), Shape("prefix", 16, 2048, 16, prefix=1792),
    ],
    ("cpu", "full"): [
        *_shapes((1, 16), (512, 2048, 8192), (1, 4, 16, 64, 256), ("", "int8")),
        *(Shape("prefill", 1, n, 16, 512) for n in (512, 4096)),
        *(Shape("prefix", 16, n, 16, prefix=n - 256) for n in (2048, 8192)),
    ],
    ("cpu", "model"): _of_models((1, 16), 1024),
    ("cuda", "model"): _of_models((1, 64), 8192),
    ("cuda", "tiny"): _TINY,
    ("cuda", "quick"): [
        *_shapes((1, 64), (8192,), (16, 64), ("", "e4m3")), Shape("decode", 1, 131072, 64), Shape("prefill", 4, 8192, 64, 1024),
        Shape("prefix", 64, 8192, 64, prefix=7168),
    ],
    ("cuda", "full"): [
        *_shapes((1, 16, 64, 256), (1024, 8192, 32768), (1, 16, 64, 256), ("", "int8", "e4m3")),
        Shape("decode", 1, 131072, 16), Shape("decode", 1, 131072, 64),
        *(Shape("speculative", b, 8192, 64, s) for b in (1, 64) for s in (4, 16)),
        *(Shape("prefill", 4, n, 64, 1024) for n in (1024, 8192, 32768)),
        *(Shape("prefix", b, n, 64, prefix=n - 1024) for b in (16, 64) for n in (8192, 32768)),
    ],
}  # fmt: skip


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """q, both caches, the page table over shuffled pages, the lengths, and the scales of a quantised cache."""
    generator = torch.Generator(device).manual_seed(0)
    shared = shape.prefix // shape.page_size
    own = -(-(shape.seqlen_k - shape.prefix) // shape.page_size)
    num_pages = shared + shape.batch * own
    size = num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim
    caches, scales = [], []
    for _ in range(2):
        values = torch.randn(size, generator=generator, device=device, dtype=dtype)
        if shape.cache:
            scale = values.float().abs().amax((0, 1, 3)) / (127 if shape.cache == "int8" else 448)
            scaled = values / scale.to(dtype)[:, None]
            values = (scaled.round() if shape.cache == "int8" else scaled).to(CACHES[shape.cache])
            scales.append(scale)
        caches.append(zeros(*size, dtype=values.dtype, device=device).copy_(values))  # memory as a PagedKVCache has it
    order = torch.randperm(num_pages, generator=generator, device=device).to(torch.int32)
    table = torch.cat([order[:shared].expand(shape.batch, -1), order[shared:].view(shape.batch, own)], 1)
    lengths = torch.full((shape.batch,), shape.seqlen_k, dtype=torch.int32, device=device)
    q = torch.randn(shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim, generator=generator, device=device).to(dtype)
    return [q, *caches, table.contiguous(), lengths, *scales], []


def reference(shape: Shape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    q, *caches, table, lengths = inputs[:5]
    return {"out": fastattn.reference.paged_attention(q.to(dtype), *caches, table, lengths, **_scales(inputs[5:]))}


def _scales(scales: list[Tensor] | tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("k_scale", "v_scale"), scales))


def traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # each key and value once, shared ones once for all; queries in, output out
    bytes_a_key = 2 * shape.num_kv_heads * shape.head_dim * (1 if shape.cache else itemsize)
    keys = shape.prefix + shape.batch * (shape.seqlen_k - shape.prefix)
    return keys * bytes_a_key + 2 * shape.batch * shape.seqlen_q * shape.num_heads * shape.head_dim * itemsize


def flops(shape: Shape, mode: str) -> float:
    # 4·D a pair of a query and a key that it sees; the last query sees them all, each one before it one less
    pairs = shape.batch * shape.seqlen_q * (shape.seqlen_k - (shape.seqlen_q - 1) / 2)
    return 4 * pairs * shape.num_heads * shape.head_dim


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    inputs, _ = draw(Shape("decode", 2, 32, 16, num_heads=2, num_kv_heads=1, head_dim=64), dtype, device)
    dense = [torch.randn(2, 2, n, 64, device=device).to(dtype) for n in (1, 32, 32)]
    k, v = (torch.randn(2, 1, 1, 64, device=device).to(dtype) for _ in range(2))
    return {
        "fastattn.paged_attention": lambda: fastattn.paged_attention(*inputs),
        **by_backend("fastattn.paged_attention", lambda backend: fastattn.paged_attention(*inputs, backend=backend), device),
        "fastattn.append_paged_kv": lambda: fastattn.append_paged_kv(k, v, *inputs[1:4], inputs[4] - 1),
        "torch SDPA, dense": lambda: F.scaled_dot_product_attention(*dense),
    }


def panel(row: dict[str, Any]) -> tuple[str, float] | None:
    if row["function"] != "decode" or row.get("model"):
        return None
    return f"B = {row['batch']}, page {row['page_size']}{' ' + row['cache'] if row['cache'] else ''}", row["seqlen_k"]


# --------------------------------------------------------------------------------------------------------------------
# The implementations: forward(q, k_cache, v_cache, page_table, seqlens_k, *scales) -> out (B, S_q, H, D).


def build_fastattn(shape: Shape, backend: str | None = None) -> Forward:
    if shape.prefix == 0:
        return lambda *inputs: fastattn.paged_attention(*inputs[:5], **_scales(inputs[5:]), backend=backend)
    if backend is not None:
        raise NotImplementedError("cascade_attention chooses for each of its parts")
    shared = shape.prefix // shape.page_size

    def cascade(q, k_cache, v_cache, table, lengths, *scales):
        rest = lengths - shape.prefix
        return fastattn.cascade_attention(q, k_cache, v_cache, table[0, :shared], table[:, shared:], rest, **_scales(scales))

    return cascade


def build_uncascaded(shape: Shape) -> Forward:
    if shape.prefix == 0:
        raise NotImplementedError("no prefix is shared")
    return lambda *inputs: fastattn.paged_attention(*inputs[:5], **_scales(inputs[5:]))


def build_naive(shape: Shape) -> Forward:
    return lambda *inputs: fastattn.reference.paged_attention(*inputs[:5], **_scales(inputs[5:]))


def build_gather(shape: Shape) -> Forward:
    """What one writes without a kernel: all keys and values of all sequences side by side, then torch's SDPA."""

    def forward(q, k_cache, v_cache, table, lengths, *scales):
        k, v = (  # of one-byte dtypes, not every one can be indexed
            (c.view(torch.uint8) if c.dtype.itemsize == 1 else c).index_select(0, table.flatten()).view(c.dtype) for c in (k_cache, v_cache)
        )
        k, v = (t.view(shape.batch, -1, *t.shape[2:])[:, : shape.seqlen_k] for t in (k, v))
        if scales:
            k, v = (t.to(q.dtype) * scale.to(q.dtype)[:, None] for t, scale in zip((k, v), scales))
        mask = None
        if shape.seqlen_q > 1:
            rows, keys = shape.seqlen_q, shape.seqlen_k
            mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return forward


def _plain(shape: Shape, peer: str) -> None:
    if shape.cache:
        raise NotImplementedError(f"{peer} is run over unquantised caches")


def build_flash_attn(shape: Shape) -> Forward:
    _plain(shape, "flash-attn")
    function = import_name("flash_attn", "flash_attn_with_kvcache")
    return lambda q, k, v, table, lengths: function(q, k, v, cache_seqlens=lengths, block_table=table, causal=True)


def build_flashinfer(shape: Shape) -> Forward:
    """Its plan is made once, as it is once for all layers of a model."""
    _plain(shape, "FlashInfer")
    if shape.seqlen_q != 1:
        raise NotImplementedError("its decode wrapper is for one query a sequence")
    wrapper = import_name("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    planned = wrapper(workspace, "NHD", use_tensor_cores=True)
    plans: list[int] = []

    def forward(q, k_cache, v_cache, table, lengths):
        if not plans:
            pages = table.shape[1]
            starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=q.device) * pages
            last = torch.full_like(lengths, (shape.seqlen_k - 1) % shape.page_size + 1)
            planned.plan(
                starts, table.flatten(), last, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size,
                q_data_type=q.dtype, kv_data_type=k_cache.dtype,
            )  # fmt: skip
            plans.append(pages)
        return planned.run(q[:, 0], (k_cache, v_cache))[:, None]

    return forward


def build_vllm(shape: Shape) -> Forward:
    _plain(shape, "vLLM")
    function = import_name("vllm.v1.attention.ops.triton_unified_attention", "unified_attention")

    def forward(q, k_cache, v_cache, table, lengths):
        rows, out = q.flatten(0, 1), torch.empty_like(q)
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=q.device) * shape.seqlen_q
        function(
            q=rows, k=k_cache, v=v_cache, out=out.flatten(0, 1), cu_seqlens_q=starts, max_seqlen_q=shape.seqlen_q, seqused_k=lengths,
            max_seqlen_k=shape.seqlen_k, softmax_scale=shape.head_dim**-0.5, causal=True, window_size=(-1, -1), block_table=table,
            softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip
        return out

    return forward


def build_varlen(shape: Shape) -> Forward:
    """torch's own, over a block table."""
    _plain(shape, "torch varlen_attn")
    function = import_name("torch.nn.attention.varlen", "varlen_attn")

    def forward(q, k_cache, v_cache, table, lengths):
        starts_q = torch.arange(shape.batch + 1, dtype=torch.int32, device=q.device) * shape.seqlen_q
        starts_k = torch.arange(shape.batch + 1, dtype=torch.int32, device=q.device) * shape.seqlen_k
        out = function(
            q.flatten(0, 1), k_cache, v_cache, starts_q, starts_k, shape.seqlen_q, shape.seqlen_k, window_size=(-1, 0), enable_gqa=True,
            seqused_k=lengths, block_table=table,
        )  # fmt: skip
        return out.view_as(q)

    return forward


ON_CPU: dict[str, Builder] = {
    OURS: build_fastattn,
    "naive": build_naive,
    "torch": build_gather,
    "one by one": build_uncascaded,
}
ON_CUDA: dict[str, Builder] = {
    **ON_CPU,
    "FlashInfer": build_flashinfer,
    "vLLM Triton": build_vllm,
    "flash-attn": build_flash_attn,
    "torch varlen_attn": build_varlen,
}
REQUIRES = {
    "FlashInfer": ("flashinfer", "BatchDecodeWithPagedKVCacheWrapper"),
    "vLLM Triton": ("vllm.v1.attention.ops.triton_unified_attention", "unified_attention"),
    "flash-attn": ("flash_attn", "flash_attn_with_kvcache"),
    "torch varlen_attn": ("torch.nn.attention.varlen", "varlen_attn"),
}

SUITE = Suite(
    op="paged_attention",
    presets=PRESETS,
    peers=lambda device: find_peers(
        {**ON_CUDA, **by_backend(OURS, build_fastattn, device)} if device.type == "cuda" else ON_CPU, REQUIRES
    ),
    draw=draw,
    reference=reference,
    flops=flops,
    traffic=traffic,
    ceiling=COPY,
    overhead=overhead,
    panel=panel,
    x_label="keys",
    modes=("fwd",),
)
