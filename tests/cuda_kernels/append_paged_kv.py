"""csrc/cuda/append_paged_kv.cu: the cases that every build is held to, small enough for the slowest, and the faults that they must see."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import (
    BF16,
    BLOCKS,
    CRASH,
    DTYPES,
    F16,
    F32,
    NAN,
    OUTSIDE,
    VECTOR,
    WRONG,
    Buffer,
    Case,
    Fault,
)
from torch import Tensor

from fastattn.reference import append_paged_kv as reference
from fastattn.testing.budget import check_budget

SOURCE, QUANTISED = "cuda/append_paged_kv.cu", "common/quantised.hpp"
INT8, FP8 = torch.int8, torch.float8_e4m3fn
INF, MOST, LEAST = float("inf"), 2**31 - 1, -(2**31)
CACHE_DTYPES = {**DTYPES, INT8: 3, FP8: 4}
SIZES = (
    "batch", "seqlen", "num_heads", "head_dim", "head_dim_v", "num_seqs", "num_pages", "page_size", "max_pages", "table_len", "rotary_dim"
)  # fmt: skip
STRIDES = ("kb", "ks", "kh", "vb", "vs", "vh", "kcp", "kcs", "kch", "vcp", "vcs", "vch", "page_table", "cos", "sin")
POINTERS = ("k", "v", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens", "cos", "sin", "k_scale", "v_scale")


class AppendPagedKvParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in POINTERS),
        *((name, c_int64) for name in SIZES),
        *((f"stride_{name}", c_int64) for name in STRIDES),
        *((name, c_int32) for name in ("dtype", "cache_dtype", "table_dtype", "interleaved")),
    ]


def ints(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def append_tensors(
    lengths: Sequence[int] = (3, 0, 9), new: int | Sequence[int] = 4, heads: int = 2, head_dim: int = 16, head_dim_v: int | None = None,
    page_size: int = 5, rotary_dim: int = 0, dtype: torch.dtype = F32, cache_dtype: torch.dtype = F32, table_dtype: torch.dtype = F32,
    scales: bool | None = None, packed_more: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """The op's arguments by name: `new` tokens for each of the sequences, or packed ones, as many as `new` lists and packed_more after
    them; caches full of other numbers; scales by default where they are quantised."""
    is_packed = not isinstance(new, int)
    generator = torch.Generator().manual_seed(1000 * head_dim + 10 * heads + page_size)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shape = (sum(new) + packed_more,) if is_packed else (len(lengths), new)
    longest = max(lengths) + (max(new) if is_packed else new)
    max_pages = -(-longest // page_size)
    num_pages = max_pages * len(lengths) + 2
    args = dict(k=draw(*shape, heads, head_dim).to(dtype), v=draw(*shape, heads, head_dim_v or head_dim).to(dtype))
    for name in "kv":
        args[f"{name}_cache"] = (3 * draw(num_pages, page_size, heads, args[name].shape[-1])).to(cache_dtype)
        if cache_dtype.itemsize == 1 if scales is None else scales:
            args[f"{name}_scale"] = 0.01 + 0.02 * torch.rand(heads, generator=generator)
    args["page_table"] = torch.randperm(num_pages, generator=generator)[: max_pages * len(lengths)].view(len(lengths), max_pages).int()
    args["cache_seqlens"] = ints(*lengths)
    if is_packed:
        args["cu_seqlens"] = torch.tensor([0, *new]).cumsum(0).int()
    if rotary_dim:
        angles = torch.rand(longest, rotary_dim // 2, generator=generator) * 6 - 3
        args |= dict(cos=angles.cos().to(table_dtype), sin=angles.sin().to(table_dtype))
    return args


def with_gaps(t: Tensor, gaps: Sequence[int]) -> Tensor:
    """The same with that many more places after each dim's last one, in memory."""
    return torch.zeros([size + gap for size, gap in zip(t.shape, gaps)], dtype=t.dtype)[tuple(map(slice, t.shape))].copy_(t)


def heads_first(t: Tensor) -> Tensor:
    """A cache whose slots lie within its heads."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def same(got: Tensor, want: Tensor) -> bool:
    """Bit for bit, or both NaN."""
    bits = [t.contiguous().view(torch.uint8).view(*t.shape, t.element_size()) for t in (got, want)]
    equal = (bits[0] == bits[1]).all(-1)
    return bool((equal | got.float().isnan() & want.float().isnan()).all())


def appended(args: dict[str, Tensor], dtype: torch.dtype | None = None, **options) -> tuple[Tensor, Tensor]:
    """The caches by the oracle; dtype casts all numbers first."""
    args = {name: t.to(dtype) if dtype and t.dtype != torch.int32 else t for name, t in args.items()}
    caches = [args.pop(name).clone(memory_format=torch.contiguous_format) for name in ("k_cache", "v_cache")]
    reference(args.pop("k"), args.pop("v"), *caches, **args, **options)
    return tuple(caches)


def places_of(args: dict[str, Tensor]) -> list[Tensor]:
    """Which elements of each cache are written."""
    ones = {name: torch.ones(args[name].shape) for name in "kv"}
    zeros = {f"{name}_cache": torch.zeros(args[f"{name}_cache"].shape) for name in "kv"}
    rest = {name: args[name] for name in ("page_table", "cache_seqlens", "cu_seqlens") if name in args}
    return [t.bool() for t in appended(ones | zeros | rest)]


def largest(dtype: torch.dtype) -> float:
    return 127.0 if dtype == INT8 else torch.finfo(dtype).max


def unit_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of dtype's numbers around those of x, float64."""
    if dtype == INT8:
        return torch.ones_like(x)
    info = torch.finfo(dtype)
    return torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x.abs().clamp(min=info.smallest_normal)).exponent - 1)


def append_case(
    name: str, args: dict[str, Tensor], *, interleaved: bool = False, leads: dict[str, int] | None = None, sparse: dict[str, int] | None = None,
    known: dict[str, Tensor] | None = None, exact: bool = False, judged: bool = True, answer: str = "", **changed: int,
) -> Case:  # fmt: skip
    """leads: elements before the first, by argument. sparse: elements from row to row of the first dim. known: what the oracle gets instead.
    exact: the values are hostile, and bits alone are compared. judged=False: nothing is, but what the buffers' guards and sanitizers see.
    changed: fields of the params."""
    k, v, cache = args["k"], args["v"], args["k_cache"]
    cache_dtype, cos, is_packed = cache.dtype, args.get("cos"), "cu_seqlens" in args
    strides = dict(zip("bsh", (0, *k.stride()) if is_packed else k.stride()))
    v_strides = dict(zip("bsh", (0, *v.stride()) if is_packed else v.stride()))
    params = AppendPagedKvParams(
        batch=1 if is_packed else k.shape[0], seqlen=k.shape[-3], num_heads=k.shape[-2], head_dim=k.shape[-1], head_dim_v=v.shape[-1],
        num_seqs=len(args["cache_seqlens"]), num_pages=cache.shape[0], page_size=cache.shape[1], max_pages=args["page_table"].shape[1],
        table_len=0 if cos is None else len(cos), rotary_dim=0 if cos is None else 2 * cos.shape[1], dtype=DTYPES[k.dtype],
        cache_dtype=CACHE_DTYPES[cache_dtype], table_dtype=DTYPES[F32 if cos is None else cos.dtype], interleaved=interleaved,
    )  # fmt: skip
    for prefix, of in (("k", strides), ("v", v_strides)):
        for dim, stride in of.items():
            setattr(params, f"stride_{prefix}{dim}", stride)
        for dim, stride in zip("psh", args[f"{prefix}_cache"].stride()):
            setattr(params, f"stride_{prefix}c{dim}", stride)
    for table in ("page_table", "cos", "sin"):
        if table in args:
            setattr(params, f"stride_{table}", args[table].stride(0))
    first_stride = dict(k="kb", v="vb", k_cache="kcp", v_cache="vcp", page_table="page_table", cos="cos", sin="sin")
    for key, stride in (sparse or {}).items():
        setattr(params, f"stride_{first_stride[key]}", stride)
    for key, value in changed.items():
        setattr(params, key, value)
    buffers = []
    for key in POINTERS:
        if key not in args:
            continue
        t = args[key].view(torch.uint8) if args[key].dtype == FP8 else args[key]
        size = t.element_size()
        buffers.append(Buffer(t, (key,), key.endswith("cache"), (leads or {}).get(key, 0) * size, (sparse or {}).get(key, 0) * size))

    def judge(k_cache: Tensor, v_cache: Tensor) -> None:
        if not judged:
            return
        given = args | (known or {})
        plain, places = appended(given, interleaved=interleaved), places_of(given)
        ref64 = None if exact else appended(given, torch.float64, interleaved=interleaved)
        for at, (key, got) in enumerate(dict(k=k_cache, v=v_cache).items()):
            got, before = got.view(cache_dtype), given[f"{key}_cache"]
            assert same(got[~places[at]], before[~places[at]]), f"{name} {key}: a slot that nothing goes to is not as it was"
            if key == "v" or cos is None:
                assert same(got, plain[at]), f"{name} {key}: not the value, divided and rounded"
            if exact or got.numel() == 0:
                continue
            truth = torch.where(places[at], ref64[at].clamp(-largest(cache_dtype) - (cache_dtype == INT8), largest(cache_dtype)), before.double())
            check_budget(f"{name} {key}", got.double(), plain[at].double(), truth)
            slack = 1e-5 * truth.abs().max().clamp(min=1.0)
            assert ((got.double() - truth).abs() <= 0.5 * unit_of(truth, cache_dtype) + slack).all(), f"{name} {key}: rounded more than once"

    return Case(name, "append_paged_kv", params, buffers, judge, answer)


def append_cases() -> list[Case]:
    """Every pair of dtypes, both pairings and every kind of sequence, at the edges of what a thread takes."""
    cases = []
    # (head_dim, head_dim_v, heads, rotary_dim): whole vectors; tails of halves, of rest and of v; more rows than a block has.
    dims = [(32, 32, 3, 32), (64, 64, 2, 32), (40, 24, 2, 40), (10, 36, 2, 6), (2, 1, 30, 2), (512, 24, 1, 512), (34, 8, 2, 34), (9, 512, 1, 8), (96, 80, 1, 66)]
    i = 0
    for dtype in (F32, F16, BF16):
        for cache_dtype in (F32, F16, BF16, INT8, FP8):
            for part in range(2):
                head_dim, head_dim_v, heads, rotary_dim = dims[(2 * i + part) % len(dims)]
                new = ((1, 0, 6), 2, (0, 3, 2))[(i + part) % 3]
                table_dtype = (F32, F16, BF16)[(i // 5 + part) % 3]
                made = append_tensors(
                    (3, 0, 9), new, heads, head_dim, head_dim_v, (1, 4, 5)[i % 3], 0 if i % 6 == 5 else rotary_dim, dtype, cache_dtype,
                    table_dtype, packed_more=2,
                )  # fmt: skip
                shape = f"{head_dim} {head_dim_v} {heads} {made['cos'].shape[1] * 2 if 'cos' in made else 0}"
                name = f"{str(dtype)[6:]} to {str(cache_dtype)[6:]}, {shape}, {'pairs' if part else 'halves'}, {new}"
                cases.append(append_case(name, made, interleaved=part == 1))
            i += 1
    return cases + layout_cases() + skipping_cases() + format_cases() + refused_cases()


def layout_cases() -> list[Case]:
    cases = []
    for cache_dtype, new in ((BF16, 3), (INT8, (2, 0, 3))):
        made = append_tensors(new=new, head_dim=32, head_dim_v=48, rotary_dim=32, dtype=BF16, cache_dtype=cache_dtype, scales=True)
        for key in ("k", "v", "k_cache", "v_cache", "cos", "sin"):
            cases.append(append_case(f"{key} alone is not aligned, {str(cache_dtype)[6:]}", made, leads={key: 1}))
            gaps = [1] * (made[key].dim() - 1) + [3 if key in ("cos", "sin") else 8]
            apart = made | {key: with_gaps(made[key], gaps)}
            cases.append(append_case(f"{key} has gaps, {str(cache_dtype)[6:]}", apart, interleaved=key in ("k", "cos")))
        odd = made | {key: with_gaps(made[key], [2] * (made[key].dim() - 1) + [1]) for key in ("k", "v", "k_cache", "v_cache")}
        cases.append(append_case(f"rows of odd stride, {str(cache_dtype)[6:]}", odd))
        turned = made | {key: heads_first(made[key]) for key in ("k_cache", "v_cache")}
        cases.append(append_case(f"heads before slots, {str(cache_dtype)[6:]}", turned))
        table = made | dict(page_table=with_gaps(made["page_table"], (0, 3)))
        cases.append(append_case(f"a page table with gaps, {str(cache_dtype)[6:]}", table))
    for only in ("k_scale", "v_scale"):
        made = append_tensors(cache_dtype=F16, scales=True)
        cases.append(append_case(f"{only} alone", {key: t for key, t in made.items() if key == only or not key.endswith("scale")}))
    many = append_tensors([i % 7 for i in range(70)], [i % 3 for i in range(70)], 1, 8, page_size=3, rotary_dim=8)
    cases.append(append_case("70 sequences", many))
    for interleaved in (False, True):  # past its end keys stay as they are, as do the oracle's where cos is 1 and sin 0
        made = append_tensors((2,), 6, 3, 24, rotary_dim=16)
        made["cos"][5:], made["sin"][5:] = 1.0, 0.0
        short = made | {key: made[key][:5].clone() for key in ("cos", "sin")}
        cases.append(append_case(f"tables that end early, interleaved {interleaved}", short, interleaved=interleaved, known=made))
    return cases


def skipping_cases() -> list[Case]:
    """Index tensors that lie."""
    cases = []
    made = append_tensors((0, 0, 3), 5, page_size=2, rotary_dim=8)
    num_pages = len(made["k_cache"])
    made |= dict(page_table=ints([0, -1, 1], [num_pages, 2, LEAST], [MOST, 3, 4]), cache_seqlens=ints(0, -2, 3))
    cases.append(append_case("pages and positions that are none", made))
    for length in (MOST, MOST - 2, LEAST, -1000, 15, 10**6):
        one = append_tensors((0, 5), 4, rotary_dim=0)
        one["cache_seqlens"][0] = length
        cases.append(append_case(f"a length of {length}", one))
    for ends in ([0, 100], [5, 3, 1], [-7, 4, 9], [MOST] * 3, [LEAST] * 4, [0, MOST, LEAST, 9], [9, 0, 9, 0, 9]):
        seqs = len(ends) - 1
        packed = append_tensors([4] * seqs, (9,) + (0,) * (seqs - 1), rotary_dim=8, cache_dtype=FP8) | dict(cu_seqlens=ints(*ends))
        packed |= dict(cos=packed["cos"][:6].clone(), sin=packed["sin"][:6].clone())
        cases.append(append_case(f"cu_seqlens {ends}", packed, judged=False))
    for ends in ([3, 9], [2, 4, 6]):  # tokens before the first sequence, and after the last
        seqs = len(ends) - 1
        packed = append_tensors([4] * seqs, (9,) + (0,) * (seqs - 1), rotary_dim=8) | dict(cu_seqlens=ints(*ends))
        cases.append(append_case(f"cu_seqlens {ends}", packed))
    large = append_tensors((16,), 4) | dict(cache_seqlens=ints(-2))  # slots of which only the first are in memory
    cases.append(append_case("a position below 0, of pages that 32 bits just count", large, page_size=2**30))
    for empty in ("no tokens", "no heads", "no pages", "no page table", "no sequences", "no sequences, packed"):
        args = append_tensors(new=0 if empty == "no tokens" else (2, 2, 2) if "packed" in empty else 3, heads=0 if empty == "no heads" else 2)
        if empty == "no pages":
            args |= {key: args[key][:0] for key in ("k_cache", "v_cache")}
        elif empty == "no page table":
            args["page_table"] = args["page_table"][:, :0]
        elif "no sequences" in empty:
            args |= {key: args[key][:0] for key in ("page_table", "cache_seqlens")}
            args |= dict(cu_seqlens=ints(0)) if "packed" in empty else {key: args[key][:0] for key in "kv"}
        cases.append(append_case(empty, args))
    return cases


def format_cases() -> list[Case]:
    """Every number that rounds in a way of its own."""
    cases = []
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(middle, torch.zeros(())), middle, torch.nextafter(middle, torch.full((), 1e3))]
    floats = torch.cat([*near, torch.arange(-130, 130, 0.25), torch.tensor([448.1, 464.0, 1e30, INF, 1e-30, 2**-10, 2**-149, 0.0, 127.5, 128.5])])
    k = torch.cat([floats, -floats, torch.tensor([NAN, -NAN])])
    k = torch.cat([k, torch.zeros(-len(k) % 64)]).view(1, -1, 1, 64)
    halves = torch.randint(0, 2**16, (1, 32, 1, 64), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    for x in (k, halves.view(BF16), halves.view(F16)):
        for cache_dtype in (F32, F16, BF16, INT8, FP8):
            for scaled in (False, True):
                args = append_tensors((0,), x.shape[1], 1, 64, page_size=7, dtype=x.dtype, cache_dtype=cache_dtype, scales=False)
                args |= dict(k=x, v=x) | (dict(k_scale=torch.tensor([0.37]), v_scale=torch.tensor([0.0])) if scaled else {})
                cases.append(append_case(f"formats, {str(x.dtype)[6:]} to {str(cache_dtype)[6:]}, scaled {scaled}", args, exact=True))
    broken = append_tensors(rotary_dim=16, head_dim=24, cache_dtype=BF16)  # each stays in its own pair
    broken["k"][0, 1, 0, 3], broken["v"][1, 0, 1, 5], broken["k"][2, 2, 1, 20] = NAN, INF, -INF
    cases.append(append_case("a NaN and infinities", broken, exact=True))
    return cases


def refused_cases() -> list[Case]:
    made = append_tensors(rotary_dim=8)
    packed = append_tensors(new=(1, 2, 3))
    wrong = [
        dict(head_dim=0), dict(head_dim_v=513), dict(rotary_dim=7), dict(rotary_dim=18), dict(rotary_dim=-2), dict(page_size=0),
        dict(num_seqs=2), dict(batch=-1), dict(seqlen=2**31), dict(seqlen=2**30), dict(table_dtype=3), dict(dtype=3), dict(cache_dtype=5),
    ]  # fmt: skip
    cases = [append_case(f"refused: {change}", made, answer="^cudaError 1$", **change) for change in wrong]
    cases.append(append_case("refused: two batches of packed tokens", packed, answer="^cudaError 1$", batch=2))
    cases.append(append_case("refused: no sin", {key: t for key, t in made.items() if key != "sin"}, answer="^cudaError 1$"))
    return cases


def far_cases() -> list[Case]:
    """Rows 2^30 elements apart: five of them wrap an index of 32 bits, signed or not. The memory between is never touched."""
    made = append_tensors((0, 1, 2, 3, 0), 2, 1, 16, page_size=1, rotary_dim=16, cache_dtype=INT8, dtype=F16)
    far = [key for key in ("k", "v", "k_cache", "v_cache", "page_table", "cos", "sin")]
    return [append_case(f"{key} 2^30 apart", made, sparse={key: 2**30}) for key in far]


CASES = append_cases()
FAR = far_cases()
FAULTS = [
    # Places.
    Fault("a page number that is none", SOURCE, "if (page < 0 || page >= p.num_pages) return;", "if (page < 0) return;", {"asan": OUTSIDE}),
    Fault("page −1", SOURCE, "if (page < 0 || page >= p.num_pages) return;", "if (page >= p.num_pages) return;", {"asan": OUTSIDE}, quick=True),
    Fault("a page past the last one", SOURCE, "page >= p.num_pages", "page > p.num_pages", {"asan": OUTSIDE}),
    Fault("a page table read past its end", SOURCE, "entry < p.max_pages ?", "entry <= p.max_pages ?", {"asan": OUTSIDE}),
    Fault("a position below 0", SOURCE, "  if (place.position < 0) return;\n", "", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("a position of 32 bits, signed", SOURCE, "p.cache_seqlens[sequence] + token}", "p.cache_seqlens[sequence] + static_cast<int>(token)}", {"asan": "signed integer overflow"}),
    Fault("tokens past the last sequence", SOURCE, "if (low == p.num_seqs) return {0, -1};", "", {"asan": OUTSIDE}),
    Fault("tokens before the first sequence", SOURCE, "if (token < 0) return {0, -1};", "", {"plain": WRONG}),
    Fault("cu_seqlens read past its end", SOURCE, "high = p.num_seqs;", "high = p.num_seqs + 1;", {"asan": OUTSIDE}),
    Fault("a token at a sequence's start is the one's before", SOURCE, "p.cu_seqlens[middle] <= token", "p.cu_seqlens[middle] < token", {"plain": WRONG}),
    Fault("a row too many", SOURCE, "row >= p.batch * p.seqlen * p.num_heads", "row > p.batch * p.seqlen * p.num_heads", {"asan": OUTSIDE}),
    Fault("rows that two blocks have", SOURCE, "blockIdx.x * blockDim.y + threadIdx.y", "blockIdx.x * (blockDim.y - 1) + threadIdx.y", {"races": BLOCKS, "plain": WRONG}),
    Fault("the head of another row", SOURCE, "head = row % num_heads, batch", "head = row / seqlen % num_heads, batch", {"plain": WRONG}),
    Fault("a slot of the wrong page", SOURCE, "int64_t slot = position % page_size;", "int64_t slot = token % page_size;", {"plain": WRONG}),
    # Columns.
    Fault("the rest overlaps what is turned", SOURCE, "const int first = rotary_dim + (thread - turning) * kColumns;", "const int first = rotary_dim + (thread - turning) * kColumns - (turning > 0);", {"plain": WRONG}),
    Fault("a half's end is the row's", SOURCE, "return {angle, half, half + angle, rotary_dim, angle};", "return {angle, rotary_dim, half + angle, rotary_dim, angle};", {"races": "race between lanes"}),
    Fault("a second half that ends with its vector", SOURCE, "return {first, head_dim, second, head_dim, -1};", "return {first, head_dim, second, second + kColumns, -1};", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    Fault("a thread too few", SOURCE, "ceil_div(head_dim - rotary_dim, 2 * kColumns);\n}", "(head_dim - rotary_dim) / (2 * kColumns);\n}", {"plain": f"{WRONG}|{CRASH}"}),
    Fault("16 bytes that are not aligned", SOURCE, "const bool aligned = is_aligned(from);", "const bool aligned = true;", {"asan": "misaligned address"}),
    Fault("16 bytes of a cache that are not aligned", SOURCE, "is_aligned(to + share.second)", "true", {"asan": "misaligned address"}),
    Fault("16 bytes of a table that are not aligned", SOURCE, "count, is_aligned(from + at)", "count, true", {"asan": "misaligned address"}),
    Fault("a vector read across the row's end", VECTOR, "  if (aligned && count >= kVectorSize<T>) {\n    vector.bits = *", "  if (aligned && count > 0) {\n    vector.bits = *", {"asan": OUTSIDE}),
    Fault("an entry stored past the row's end", VECTOR, "if (i < count) to[i]", "if (i <= count) to[i]", {"asan": OUTSIDE, "plain": f"{WRONG}|{CRASH}"}),
    # Turning.
    Fault("a position past the tables", SOURCE, "position < p.table_len", "position <= p.table_len", {"asan": OUTSIDE}),
    Fault("turned the other way", SOURCE, "const float y1 = x1 * cos - x2 * sin;\n  x2 = x2 * cos + x1 * sin;", "const float y1 = x1 * cos + x2 * sin;\n  x2 = x2 * cos - x1 * sin;", {"plain": WRONG}),
    Fault("the second column turned by the first one's result", SOURCE, "const float y1 = x1 * cos - x2 * sin;\n  x2 = x2 * cos + x1 * sin;\n  x1 = y1;", "x1 = x1 * cos - x2 * sin;\n  x2 = x2 * cos + x1 * sin;", {"plain": WRONG}),
    Fault("a second vector's angles are the first one's", SOURCE, "cos[N / 2 + i], sin[N / 2 + i]", "cos[i], sin[i]", {"plain": WRONG}),
    # Formats.
    Fault("a product with the inverse of the scale", SOURCE, "__fdiv_rn(first[i], scale)", "first[i] * __fdiv_rn(1.0f, scale)", {"plain": WRONG}),
    Fault("the other one's scale", SOURCE, "is_k ? p.k_scale : p.v_scale", "is_k ? p.v_scale : p.k_scale", {"plain": WRONG}),
    Fault("a NaN in int8", QUANTISED, "value == value ? value : 0.0f", "value", {"plain": WRONG}),
    Fault("int8 from −127", QUANTISED, "-128.0f), 127.0f)", "-127.0f), 127.0f)", {"plain": WRONG}),
    Fault("int8 cut off", QUANTISED, "static_cast<int8_t>(__float_as_uint(inside + 12582912.0f) & 0xff)", "static_cast<int8_t>(inside)", {"plain": WRONG}),
    Fault("float8 ties away from 0", QUANTISED, "bits + 0x7ffff + (bits >> 20 & 1)", "bits + 0x80000", {"plain": WRONG}),
    Fault("float8 without subnormal numbers", QUANTISED, "size < 0.015625f ? tiny : normal", "size < 0.015625f ? 0 : normal", {"plain": WRONG}),
    Fault("float8 that does not saturate", QUANTISED, "fminf(fabsf(value), 448.0f)", "fabsf(value)", {"plain": WRONG}),
    # Offsets.
    *(Fault(f"an offset of 32 bits, {where}", SOURCE, product, f"static_cast<int>({product})", {"plain": f"{WRONG}|{CRASH}"}, far=True)
      for where, product in (("k", "batch * p.stride_kb"), ("v", "batch * p.stride_vb"), ("a page", "page * p.stride_kcp"),
                             ("a page of v", "page * p.stride_vcp"), ("the page table", "sequence * p.stride_page_table"), ("cos", "position * p.stride_cos"))),
    Fault("an offset of 32 bits, unsigned", SOURCE, "position * p.stride_sin", "position * static_cast<uint32_t>(p.stride_sin)", {"plain": f"{WRONG}|{CRASH}"}, far=True),
]  # fmt: skip
