"""New keys and values into a paged cache, at a decode step of a batch and at a prefill: as they are, rotated, and quantised to fp8."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn

from .models import MODELS, labelled
from .rows import Variant, row_suite
from .suite import Forward, by_backend

PAGE_SIZE, CACHED = 16, 40  # CACHED tokens stand in each sequence before
FP8 = torch.float8_e4m3fn
NAIVE_TOKENS = 64  # that the token-by-token reference is timed on


@dataclass(frozen=True)
class Shape:
    """`new` tokens for each of `batch` sequences; num_cols is the head dim."""

    function: str
    batch: int
    new: int
    num_cols: int
    num_kv_heads: int = 8
    model: str = ""

    def id(self, dtype: str) -> str:
        return labelled(self.model, f"{self.function}-B{self.batch}-S{self.new}-D{self.num_cols}-{dtype}")


def _draw(shape: Shape, randn: Callable[..., Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """k, v, both caches, page table, lengths; and cos and sin, or the scale of both."""
    batch, device = shape.batch, randn.device
    new = [randn(batch, shape.new, shape.num_kv_heads, shape.num_cols, learnt=False) for _ in range(2)]
    max_pages = -(-(CACHED + shape.new) // PAGE_SIZE)
    pages = torch.randperm(batch * max_pages, generator=randn.generator, device=device).int().view(batch, max_pages)
    cache_dtype = FP8 if shape.function == "append_fp8" else new[0].dtype
    size = batch * max_pages, PAGE_SIZE, shape.num_kv_heads, shape.num_cols
    caches = [torch.zeros(size, device=device).to(cache_dtype) for _ in range(2)]
    inputs = [*new, *caches, pages, torch.full((batch,), CACHED, dtype=torch.int32, device=device)]
    if shape.function == "append_rotary":
        angles = torch.arange(CACHED + shape.new, device=device)[:, None] * 10000.0 ** -(
            torch.arange(0, shape.num_cols, 2, device=device) / shape.num_cols
        )
        inputs += [angles.cos(), angles.sin()]
    elif shape.function == "append_fp8":
        inputs.append(torch.full((shape.num_kv_heads,), 0.01, device=device))
    return inputs, []


def _options(function: str, rest: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = {"append": (), "append_rotary": ("cos", "sin"), "append_fp8": ("k_scale",)}[function]
    options = dict(zip(names, rest, strict=True))
    return options | ({"v_scale": rest[0]} if function == "append_fp8" else {})


def _ours(function: str) -> Forward:
    def forward(k, v, k_cache, v_cache, page_table, lengths, *rest, **backend):
        fastattn.append_paged_kv(k, v, k_cache, v_cache, page_table, lengths, **_options(function, rest), **backend)
        return k_cache, v_cache

    return forward


def _reference(function: str) -> Forward:
    def forward(k, v, k_cache, v_cache, page_table, lengths, *rest):
        caches = [cache.to(FP8) if function == "append_fp8" else cache.clone() for cache in (k_cache, v_cache)]
        fastattn.reference.append_paged_kv(k, v, *caches, page_table, lengths, **_options(function, rest))
        return tuple(cache.to(k.dtype) for cache in caches)  # float64 where that is the truth

    return forward


def _slots(page_table: Tensor, lengths: Tensor, new: int) -> Tensor:
    """The slot of each new token, counted over all pages."""
    positions = lengths[:, None] + torch.arange(new, device=lengths.device)
    pages = page_table.gather(1, positions // PAGE_SIZE)
    return (pages.long() * PAGE_SIZE + positions % PAGE_SIZE).flatten()


def _torch(function: str) -> Forward:
    """What one writes first: rotate, scale and cast, then scatter."""

    def forward(k, v, k_cache, v_cache, page_table, lengths, *rest):
        if function == "append_rotary":
            positions = lengths[:, None] + torch.arange(k.shape[1], device=k.device)
            cos, sin = (torch.cat([t, t], -1)[positions].unsqueeze(2) for t in rest)
            first, second = k.chunk(2, -1)
            k = (k * cos + torch.cat([-second, first], -1) * sin).to(k.dtype)
        slots = _slots(page_table, lengths, k.shape[1])
        for x, cache in ((k, k_cache), (v, v_cache)):
            if function == "append_fp8":
                x = (x / rest[0][:, None]).clamp(-448, 448).to(FP8).view(torch.uint8)
                cache = cache.view(torch.uint8)
            cache.flatten(0, 1)[slots] = x.flatten(0, 1)
        return k_cache, v_cache

    return forward


def _flashinfer(function: Callable) -> Forward:
    @functools.cache  # a serving engine prepares this once a step, for all layers
    def prepared(page_table: Tensor, lengths: Tensor, new: int) -> tuple[Tensor, ...]:
        batch, max_pages = page_table.shape
        batches = torch.arange(batch, device=lengths.device).repeat_interleave(new).int()
        positions = (lengths[:, None] + torch.arange(new, device=lengths.device)).flatten().int()
        indptr = torch.arange(batch + 1, device=lengths.device).int() * max_pages
        return batches, positions, page_table.flatten(), indptr, ((lengths + new - 1) % PAGE_SIZE + 1).int()

    def forward(k, v, k_cache, v_cache, page_table, lengths):
        batches, positions, indices, indptr, last = prepared(page_table, lengths, k.shape[1])
        function(k.flatten(0, 1), v.flatten(0, 1), batches, positions, (k_cache, v_cache), indices, indptr, last)
        return k_cache, v_cache

    return forward


def _vllm(dtype: str) -> Callable[[Callable], Forward]:
    def wrap(function: Callable) -> Forward:
        slots = functools.cache(_slots)  # as above

        def forward(k, v, k_cache, v_cache, page_table, lengths, scale=None):
            caches = [cache.view(torch.uint8) if dtype == "fp8" else cache for cache in (k_cache, v_cache)]
            scale = lengths.new_ones((), dtype=torch.float32) if scale is None else scale[0]
            function(k.flatten(0, 1), v.flatten(0, 1), *caches, slots(page_table, lengths, k.shape[1]), dtype, scale, scale)
            return k_cache, v_cache

        return forward

    return wrap


FLASHINFER = "flashinfer.page", "append_paged_kv_cache", _flashinfer
VLLM = "vllm._custom_ops", "reshape_and_cache_flash"
OTHERS = {  # neither rotates
    "append": {"FlashInfer": FLASHINFER, "vLLM": (*VLLM, _vllm("auto"))},
    "append_rotary": {},
    "append_fp8": {"vLLM": (*VLLM, _vllm("fp8"))},
}


def _of(function: str) -> Variant:
    return Variant(
        draw=_draw,
        reference=_reference(function),
        ours=_ours(function),
        torch=_torch(function),
        others=OTHERS[function],
        has_backends=True,
    )


def _traffic(shape: Shape, mode: str, itemsize: int) -> float:
    # k and v read, and written in the cache's dtype
    return 2 * _elements(shape) * (itemsize + (1 if shape.function == "append_fp8" else itemsize))


def _flops(shape: Shape, mode: str) -> float:
    # nothing; two products and a sum of each key's element; a product and two comparisons of each element
    return {"append": 0, "append_rotary": 3, "append_fp8": 6}[shape.function] * _elements(shape)


def _elements(shape: Shape) -> int:
    return shape.batch * shape.new * shape.num_kv_heads * shape.num_cols


def _refuse(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    if shape.batch * shape.new > NAIVE_TOKENS:
        raise NotImplementedError(f"token by token, at most {NAIVE_TOKENS} of them are timed")


def _shapes(*sizes: tuple[int, int], dims: tuple[int, ...]) -> list[Shape]:
    return [Shape(name, batch, new, d) for name in OTHERS for batch, new in sizes for d in dims]


def _model_shapes(*sizes: tuple[int, int]) -> list[Shape]:
    return [
        Shape("append_rotary", batch, new, model.head_dim, model.num_kv_heads, model.name) for model in MODELS for batch, new in sizes
    ]


PRESETS = {
    ("cpu", "model"): _model_shapes((16, 1)),
    ("cuda", "model"): _model_shapes((64, 1), (1, 2048)),
    ("cpu", "tiny"): _shapes((2, 1), (1, 20), dims=(16,)),
    ("cpu", "quick"): _shapes((16, 1), (1, 512), dims=(128,)),
    ("cpu", "full"): _shapes((1, 1), (64, 1), (1, 2048), dims=(64, 128)),
    ("cuda", "tiny"): _shapes((2, 1), (1, 20), dims=(64,)),
    ("cuda", "quick"): _shapes((64, 1), (1, 2048), dims=(128,)),
    ("cuda", "full"): _shapes((1, 1), (16, 1), (256, 1), (1, 2048), (4, 2048), dims=(64, 128)),
}


def overhead(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    k = torch.randn(2, 1, 2, 64, device=device).to(dtype)
    k_cache, v_cache = torch.zeros(2, 4, PAGE_SIZE, 2, 64, device=device, dtype=dtype).unbind()
    table, lengths = torch.arange(4, device=device).int().view(2, 2), torch.zeros(2, device=device).int()
    return {
        "fastattn.append_paged_kv": lambda: _ours("append")(k, k, k_cache, v_cache, table, lengths),
        **by_backend("fastattn.append_paged_kv", functools.partial(_ours("append"), k, k, k_cache, v_cache, table, lengths), device),
        "torch": lambda: _torch("append")(k, k, k_cache, v_cache, table, lengths),
    }


SUITE = row_suite(
    "append_paged_kv", {name: _of(name) for name in OTHERS}, PRESETS, overhead, modes=("fwd",), traffic=_traffic, flops=_flops,
    refuse=_refuse, x_label="tokens", panel=lambda row: (f"{row['function']}, D = {row['num_cols']}", row["batch"] * row["new"]),
)  # fmt: skip
