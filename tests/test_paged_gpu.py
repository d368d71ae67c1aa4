"""The ops of the paged cache on a real GPU: values at GPU sizes, and what only a GPU can show: graphs, syncs, determinism.

The cases run on CPU tensors at small sizes too, so that what is written here is known to be sound before a GPU sees it.
"""

from __future__ import annotations

import pytest
import torch
from op_contract import check_op, run, upstream
from paged_cases import FEATURES, VALUES, Case, check

import fastattn
from fastattn import reference

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=lambda dtype: str(dtype)[6:])
CACHES = pytest.mark.parametrize("cache_dtype", [BF16, torch.int8, FP8], ids=lambda dtype: str(dtype)[6:])


def partials(device, dtype, num_splits, seqlen, num_heads, head_dim):
    outs, lses = torch.randn(num_splits, 2, seqlen, num_heads, head_dim), 3 * torch.randn(num_splits, 2, num_heads, seqlen)
    lses[torch.rand(lses.shape) < 0.2] = -float("inf")
    return {"outs": outs.to(device, dtype), "lses": lses.to(device)}


def tokens(device, cache_dtype, batch, new, head_dim=128, page_size=16, packed=False, rotary=False, longest=100):
    """Arguments of append_paged_kv by name; some pages are missing."""
    shape = (batch * new, 8, head_dim) if packed else (batch, new, 8, head_dim)
    max_pages = -(-(longest + new) // page_size)
    num_pages = batch * max_pages
    args = {name: torch.randn(shape).to(BF16) for name in "kv"}
    args |= {f"{name}_cache": torch.zeros(num_pages, page_size, 8, head_dim).to(cache_dtype) for name in "kv"}
    args["page_table"] = torch.randperm(num_pages).view(batch, max_pages).int().masked_fill_(torch.rand(batch, max_pages) < 0.1, -1)
    args["cache_seqlens"] = torch.randint(longest, (batch,)).int()
    if packed:
        args["cu_seqlens"] = torch.cat([torch.zeros(1), torch.randint(1, new + 1, (batch,)).cumsum(0)]).int()
    if rotary:
        angles = torch.rand(longest + new, head_dim // 2) * 6
        args |= dict(cos=angles.cos(), sin=angles.sin())
    if cache_dtype.itemsize == 1:
        args |= dict(k_scale=0.01 + torch.rand(8) / 50, v_scale=0.01 + torch.rand(8) / 50)
    return {name: t.to(device) for name, t in args.items()}


def caches_after(function, args):
    """On copies."""
    args = args | {name: args[name].clone() for name in ("k_cache", "v_cache")}
    function(**args)
    return args["k_cache"], args["v_cache"]


def check_append(args):
    """Against the CPU's reference: exact, but for rotated keys, which may round to the neighbour."""
    got = caches_after(fastattn.append_paged_kv, args)
    expected = caches_after(reference.append_paged_kv, {name: t.cpu() for name, t in args.items()})
    for name, a, b in zip("kv", got, expected):
        a, b = a.cpu().float(), b.float()
        if name == "k" and "cos" in args:
            torch.testing.assert_close(a, b, rtol=2**-3, atol=1.0 if args["k_cache"].dtype == torch.int8 else 2**-6)
        else:
            assert torch.equal(a, b)


def test_the_cases_are_sound():
    for dtype in (torch.float32, BF16):
        check_op("merge_attention", fastattn.merge_attention, reference.merge_attention, partials("cpu", dtype, 3, 5, 2, 16))
    for cache_dtype in (BF16, torch.int8, FP8):
        check_append(tokens("cpu", cache_dtype, 3, 2, head_dim=16))
        check_append(tokens("cpu", cache_dtype, 3, 4, head_dim=16, packed=True, rotary=True))


# --------------------------------------------------------------------------------------------------------------------
# Merging.


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("shape", [(2, 2000, 8, 128), (3, 1000, 5, 80), (8, 600, 3, 64), (2, 50, 3, 600), (64, 4, 4, 128), (256, 1, 16, 128), (100, 3, 5, 33)], ids=str)
def test_merge_values(shape, dtype):
    check_op("merge_attention", fastattn.merge_attention, reference.merge_attention, partials("cuda", dtype, *shape))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2000, 8, 128), (200, 1, 8, 128)], ids=str)
def test_merge_gives_the_same_bits_every_time_without_a_sync(shape):
    tensors = partials("cuda", BF16, *shape)
    douts = upstream(fastattn.merge_attention, tensors)
    first = run(fastattn.merge_attention, tensors, douts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(fastattn.merge_attention, tensors, douts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.gpu
def test_merge_of_attention_s_parts_is_attention():
    q, k, v = torch.randn(3, 2, 1024, 8, 64, device="cuda", dtype=BF16).unbind()
    parts = [fastattn.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(300), slice(300, 301), slice(301, None))]
    out, lse = fastattn.merge_attention(*zip(*parts))
    whole, whole_lse = fastattn.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Appending.


@pytest.mark.gpu
@CACHES
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_append_values(cache_dtype, packed, rotary):
    for batch, new, head_dim, page_size in ((64, 1, 128, 16), (3, 70, 128, 7), (2, 33, 80, 1), (1, 300, 256, 256)):
        check_append(tokens("cuda", cache_dtype, batch, new, head_dim, page_size, packed, rotary))


@pytest.mark.gpu
def test_float8_of_every_bf16_number():
    k = torch.arange(2**16, dtype=torch.int32, device="cuda").to(torch.int16).view(BF16).view(1, 128, 1, 512)
    caches = [torch.zeros(1, 128, 1, 512, device="cuda").to(FP8) for _ in range(2)]
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    fastattn.append_paged_kv(k, k, *caches, zero[None], zero)
    expected = k.float().clamp(-448, 448).to(FP8)
    assert ((caches[0].view(torch.uint8) == expected.view(torch.uint8)) | k.isnan()).all() and caches[0].float().isnan().eq(k.isnan()).all()


@pytest.mark.gpu
@CACHES
def test_append_never_waits_for_the_device(cache_dtype):
    args = tokens("cuda", cache_dtype, 8, 5, rotary=True)
    fastattn.append_paged_kv(**args)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastattn.append_paged_kv(**args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@CACHES
def test_a_graph_appends_where_the_lengths_say_at_its_replay(cache_dtype):
    args = tokens("cuda", cache_dtype, 8, 1, rotary=True)
    fastattn.append_paged_kv(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastattn.append_paged_kv(**args)
        args["cache_seqlens"] += 1
    for name in ("k_cache", "v_cache"):
        args[name].view(torch.uint8).zero_()
    args["cache_seqlens"].zero_()
    plain = args | {name: args[name].clone() for name in ("k_cache", "v_cache", "cache_seqlens")}
    for step in range(40):
        for name in "kv":
            args[name].copy_(torch.randn_like(args[name]))
        graph.replay()
        fastattn.append_paged_kv(**plain | {"k": args["k"], "v": args["v"]})
        plain["cache_seqlens"] += 1
        assert torch.equal(args["k_cache"].view(torch.uint8), plain["k_cache"].view(torch.uint8)), step
        assert torch.equal(args["v_cache"].view(torch.uint8), plain["v_cache"].view(torch.uint8)), step


@pytest.mark.gpu
def test_hostile_index_tensors_leave_the_neighbours_alone():
    args = tokens("cuda", BF16, 8, 5, packed=True)
    whole = torch.zeros(3, *args["k_cache"].shape, dtype=BF16, device="cuda")
    for _ in range(20):
        for name, t in args.items():
            if t.dtype == torch.int32:
                args[name] = torch.randint(-(2**31), 2**31 - 1, t.shape, device="cuda").int()
        fastattn.append_paged_kv(**args | {"k_cache": whole[1], "v_cache": whole[1]})
    assert not whole[0].any() and not whole[2].any()


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_elements():
    args = tokens("cuda", torch.int8, 2, 3, page_size=256)
    for name in ("k_cache", "v_cache"):
        args[name] = torch.zeros(10000, 256, 8, 128, dtype=torch.int8, device="cuda")
    args["page_table"] = torch.tensor([[9999], [9000]], dtype=torch.int32, device="cuda")
    args["cache_seqlens"].fill_(3)
    fastattn.append_paged_kv(**args)
    for b, page in enumerate((9999, 9000)):
        expected = (args["k"][b].float() / args["k_scale"][:, None]).round().clamp(-128, 127)
        assert torch.equal(args["k_cache"][page, 3:6].float(), expected)


# --------------------------------------------------------------------------------------------------------------------
# Attending.


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*VALUES, *FEATURES], ids=str)
def test_attention_values(case):
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, torch.int8, FP8], ids=str)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("num_splits", [0, 1, 7])
def test_attention_values_at_size(cache_dtype, page_size, num_splits):
    common = dict(page_size=page_size, H=32, H_kv=8, D=128, D_v=128, dtype=BF16, cache=cache_dtype, options=dict(num_splits=num_splits))
    check(Case((8192, 1, 5000, 0, 333), **common), "cuda")
    check(Case((3000, 900), S_q=4, **common), "cuda")
    check(Case((2000, 1500, 700), packed=(1, 1000, 700), **common), "cuda")


def decoding(batch=8, longest=2000, page_size=64):
    """(q, k_cache, v_cache, page_table, seqlens_k) on the GPU."""
    entries = -(-longest // page_size)
    caches = torch.randn(2, batch * entries, page_size, 4, 128, device="cuda", dtype=BF16)
    table = torch.randperm(batch * entries, device="cuda").view(batch, entries).int()
    return torch.randn(batch, 1, 16, 128, device="cuda", dtype=BF16), *caches, table, torch.full((batch,), longest, device="cuda").int()


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [0, 1, 5])
def test_a_graph_attends_to_the_lengths_of_its_replay(num_splits):
    *arguments, lengths = decoding()
    fastattn.paged_attention(*arguments, lengths, num_splits=num_splits)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out, lse = fastattn.paged_attention(*arguments, lengths, num_splits=num_splits, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(5):
        lengths.copy_(torch.randint(0, 2001, lengths.shape))
        graph.replay()
        plain = fastattn.paged_attention(*arguments, lengths, num_splits=num_splits, return_lse=True)
        assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])


@pytest.mark.gpu
def test_a_fixed_split_gives_the_same_bits_in_any_company():
    q, k_cache, v_cache, table, lengths = decoding()
    lengths.copy_(torch.randint(1, 2001, lengths.shape))
    together = fastattn.paged_attention(q, k_cache, v_cache, table, lengths, num_splits=4)
    for b in range(8):
        row = slice(b, b + 1)
        assert torch.equal(fastattn.paged_attention(q[row], k_cache, v_cache, table[row], lengths[row], num_splits=4), together[row])


@pytest.mark.gpu
def test_hostile_tables_and_lengths_read_nothing_outside():
    q, k_cache, v_cache, table, lengths = decoding()
    for t in (table, lengths):
        t.copy_(torch.randint(-(2**31), 2**31 - 1, t.shape))
    out, lse = fastattn.paged_attention(q, k_cache, v_cache, table, lengths, return_lse=True)
    torch.cuda.synchronize()
    assert out.isfinite().all() and not lse.isnan().any()


@pytest.mark.gpu
def test_serving_a_model_gives_the_cpu_s_tokens():
    pytest.importorskip("transformers", reason="needs transformers")
    from test_serving import prompts
    from test_transformers import tiny

    from fastattn.integrations import serving

    expected = serving.generate(tiny("llama"), prompts(), max_new_tokens=8, stop=())
    assert serving.generate(tiny("llama").cuda(), prompts(), max_new_tokens=8, stop=(), max_sequences=3) == expected
