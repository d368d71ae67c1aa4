"""csrc/cuda/paged_attention.cu: the cases that every build is held to, small enough for the slowest, and the faults that they must see."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from cuda_on_cpu import (
    BF16,
    BLOCKS,
    CRASH,
    DTYPES,
    F16,
    F32,
    LANES,
    NAN,
    NOTHING,
    OUTSIDE,
    REDUCE,
    THREADS,
    WARPS,
    WRONG,
    Buffer,
    Case,
    Fault,
    nothing,
)
from paged_cases import NOWHERE
from paged_cases import Case as Call
from torch import Tensor

from fastattn import reference
from fastattn.testing.budget import check_budget

SOURCE = "cuda/paged_attention.cu"
NO_BOUND = 2**63 - 1
POINTERS = (
    "q", "k_cache", "v_cache", "page_table", "seqlens_k", "cu_seqlens_q", "leftpad", "alibi_slopes", "sinks", "k_scale", "v_scale", "out", "lse",
    "partial_out", "partial_lse", "counters",
)  # fmt: skip
SIZES = (
    "batch", "seqlen_q", "total_q", "num_heads", "num_kv_heads", "head_dim", "num_pages", "page_size", "max_pages", "stride_qb", "stride_qs",
    "stride_qh", "stride_kp", "stride_ks", "stride_kh", "stride_vp", "stride_vs", "stride_vh", "stride_table", "stride_slopes", "window_left",
    "window_right",
)  # fmt: skip


class PagedAttentionParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in POINTERS),
        *((name, c_int64) for name in SIZES),
        *((name, c_float) for name in ("softmax_scale", "softcap")),
        *((name, c_int32) for name in ("dtype", "num_splits", "tile_rows")),
    ]


def tile_rows_of(rows: int, head_dim: int, dtype: torch.dtype) -> int:
    """As paged_attention_tile_rows: 16 are the tensor cores'."""
    more = (16,) if head_dim <= 128 and dtype != F32 else (4, 8)
    return next((n for n in (1, 2, *more) if rows <= n), more[-1])


def paged_case(
    call: Call, *, name: str = "", tensors: list[Tensor] | None = None, splits: int = 1, tile_rows: int = 0, options: dict | None = None,
    truth: list[Tensor] | None = None, leads: dict[str, int] | None = None, sparse: dict[str, int] | None = None, answer: str = "",
    **fields: int,
) -> Case:  # fmt: skip
    """A launch of what `call` draws, or of `tensors` in their place: q, both caches, page table, lengths. truth: those that the oracle is given
    where the kernel's are hostile. leads: how many bytes after a multiple of 16 a buffer begins; sparse: elements from page to page of a
    cache. fields: of the params, in the place of what they should be."""
    torch.manual_seed(sum(map(ord, str(call))))
    drawn, drawn_options = call.arguments()
    q, k_cache, v_cache, table, lengths = tensors or drawn
    options = dict(drawn_options if options is None else options)
    packed, dtype = "cu_seqlens_q" in options, q.dtype
    batch, total = len(table), q.shape[0] if packed else q.shape[0] * q.shape[1]
    num_heads, head_dim = q.shape[-2:]
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    seqlen_q = options.get("max_seqlen_q", q.shape[0] if packed else q.shape[1])
    rows = seqlen_q * num_heads // num_kv_heads
    tile_rows = tile_rows or tile_rows_of(rows, head_dim, dtype)
    tiles = batch * num_kv_heads * -(-rows // tile_rows)
    left, right = options.get("window", (None, None))
    slopes = options.get("alibi_slopes")
    strides = dict(zip(("stride_kp", "stride_ks", "stride_kh"), k_cache.stride()), stride_qh=q.stride(-2), stride_qs=q.stride(-3))
    strides |= dict(zip(("stride_vp", "stride_vs", "stride_vh"), v_cache.stride()), stride_qb=0 if packed else q.stride(0))
    sparse = sparse or {}
    strides |= {f"stride_{name[0]}p": stride for name, stride in sparse.items()}  # of k_cache and v_cache
    values = dict(
        batch=batch, seqlen_q=seqlen_q, total_q=total, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        num_pages=num_pages, page_size=page_size, max_pages=table.shape[1], stride_table=table.stride(0),
        stride_slopes=slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        window_left=NO_BOUND if left is None else left,
        window_right=0 if options.get("causal", True) else NO_BOUND if right is None else right,
        softmax_scale=options.get("softmax_scale", head_dim**-0.5), softcap=options.get("softcap", 0.0), dtype=DTYPES[dtype],
        num_splits=splits, tile_rows=tile_rows, **strides,
    )  # fmt: skip
    params = PagedAttentionParams(**(values | fields))

    # Packed, rows of no sequence are the caller's to fill.
    out = torch.zeros(q.shape, dtype=dtype) if packed else nothing(*q.shape, dtype=dtype)
    lse = torch.full((num_heads, total), -torch.inf) if packed else nothing(batch, num_heads, seqlen_q)
    read = dict(q=q, k_cache=k_cache, v_cache=v_cache, page_table=table, seqlens_k=lengths)
    read |= {key: options[key] for key in ("cu_seqlens_q", "alibi_slopes", "sinks", "k_scale", "v_scale") if key in options}
    buffers = [Buffer(t, (key,), False, sparse=sparse.get(key, 0) * t.element_size()) for key, t in read.items()]
    written = dict(out=out, lse=lse)
    if splits > 1:
        work = splits, tile_rows
        written |= dict(partial_out=nothing(tiles, *work, head_dim), partial_lse=nothing(tiles, *work), counters=torch.zeros(tiles, dtype=torch.int32))
    buffers += [Buffer(t, (key,), True) for key, t in written.items()]
    for buffer in buffers:
        buffer.lead = (leads or {}).get(buffer.fields[0], 0)
    name = name or f"{call} splits {splits} tile {tile_rows}"

    def judge(out: Tensor, lse: Tensor, counters: Tensor | None = None, **_: Tensor) -> None:
        assert counters is None or not counters.any(), f"{name}: a counter is not 0 again"
        (given, *rest), known = truth or (q, k_cache, v_cache, table, lengths), {key: t for key, t in options.items() if key != "max_seqlen_q"}
        ref64 = reference.paged_attention(given.double(), *rest, **known, return_lse=True)
        naive = reference.paged_attention(given, *rest, **known, return_lse=True)
        for what, got, plain, exact in zip(("out", "lse"), (out, lse), naive, ref64, strict=True):
            check_budget(f"{name} {what}", got, plain, exact)

    return Case(name, "paged_attention", params, buffers, judge, answer)


def value_cases() -> list[Case]:
    """Each tile of each dtype, a row's lanes full and not, pages of one row, ragged and larger than all, splits without keys, every option."""
    cases = []
    for i, dtype in enumerate((F16, BF16, F32)):
        for j, (H, S_q) in enumerate(((2, 1), (4, 1), (4, 2), (10, 1))):  # rows of a group: 1, 2, 4, 5
            D = (64, 128, 96, 64)[(i + j) % 4] if dtype != F32 else (32, 64, 128, 40)[j]
            call = Call((17, 0, 90), S_q=S_q, H=H, D=D, D_v=D, dtype=dtype, page_size=(16, 1, 7, 200)[(i + j) % 4])
            cases.append(paged_case(call, splits=(1, 3)[(i + j) % 2], tile_rows=(1, 2, 4, 8)[j] if dtype == F32 else 0))
    for dtype, D, S_q, H, page_size in ((F16, 128, 1, 16, 16), (BF16, 64, 3, 12, 5), (F16, 80, 4, 24, 1), (BF16, 128, 16, 2, 64), (F16, 8, 2, 16, 3)):
        call = Call((17, 0, 150), S_q=S_q, H=H, D=D, D_v=D, dtype=dtype, page_size=page_size)
        cases.append(paged_case(call, splits=3 if page_size % 2 else 1))
    call = Call((50, 9), S_q=6, dtype=BF16, slopes=(2, 4), sinks=True, options=dict(softcap=5.0, window=(12, 2), causal=False))
    cases.append(paged_case(call, splits=2))
    cases.append(paged_case(Call((40, 30, 0, 9), packed=(1, 13, 2, 0), page_size=8), splits=2))
    call = Call((150,), H=1, H_kv=1, dtype=BF16)
    cases.append(paged_case(call, splits=4))
    for H in (2, 3, 9):
        cases.append(paged_case(Call((33, 20), H=H, H_kv=1, D=256, D_v=256, dtype=(F16, BF16)[H % 2]), splits=2))
    cases.append(paged_case(Call((60,), H=3, H_kv=1, S_q=5, dtype=F32), splits=2))  # two tiles, the second with 7 rows
    cases.append(paged_case(Call((3,), S_q=6, H=2, H_kv=1), splits=2))  # queries that see no key
    cases.append(paged_case(Call((40, 30, 0, 9), packed=(1, 3, 2, 0), page_size=8), splits=2))
    cases.append(paged_case(Call((40, 30), packed=(1, 3), dtype=F32), splits=1, tile_rows=4))
    window = dict(window=(20, None))
    cases.append(paged_case(Call((90, 10), options=window), splits=2))
    cases.append(paged_case(Call((90, 10), S_q=4, options=dict(window=(9, 5), causal=False), dtype=F32), splits=3))
    cases.append(paged_case(Call((50,), S_q=4, options=dict(causal=False))))
    cases.append(paged_case(Call((50,), S_q=4, options=dict(window=(0, 0)))))
    cases.append(paged_case(Call((50, 70), S_q=2, slopes=(2, 4), dtype=F32, options=dict(softcap=5.0), sinks=True), splits=2))
    cases.append(paged_case(Call((50, 0), slopes=(4,), sinks=True, dtype=BF16), splits=1))
    cases.append(paged_case(Call((50, 0), sinks=True), splits=3))
    cases.append(paged_case(Call((30,), S_q=2, dtype=F32, options=dict(k_scale=torch.tensor([0.5, 2.0]), v_scale=torch.tensor([3.0, -1.0])))))
    cases.append(paged_case(Call((30,), S_q=2, options=dict(softmax_scale=-0.2))))
    cases.append(paged_case(Call((30,), S_q=2, dtype=F32, options=dict(softmax_scale=0.0))))
    return cases


def drawn(call: Call) -> tuple[list[Tensor], dict]:
    torch.manual_seed(sum(map(ord, str(call))))
    return call.arguments()


def layout_cases() -> list[Case]:
    """Strides with gaps, keys and values in one tensor, pointers at other places than multiples of 16."""
    cases = []
    call = Call((60, 20), S_q=2, dtype=F16, page_size=8)
    (q, k, v, table, lengths), _ = drawn(call)
    both = torch.full((*k.shape[:3], 2, 80), NAN, dtype=k.dtype)
    both[..., 0, :64], both[..., 1, :64] = k, v
    wide = nothing(*q.shape, dtype=q.dtype, gap=3).transpose(1, 2).contiguous().transpose(1, 2)[..., :64]
    wide.copy_(q)
    tensors = [wide, both[..., 0, :64], both[..., 1, :64], torch.cat([table, torch.full_like(table, NOWHERE)], 1)[:, : table.shape[1]], lengths]
    cases.append(paged_case(call, name="strides with gaps", tensors=tensors, splits=2))
    for lead in (2, 8):
        cases.append(paged_case(call, name=f"q and out {lead} bytes off", leads=dict(q=lead, out=lead), splits=2))
    for name in ("k_cache", "v_cache"):
        cases.append(paged_case(call, name=f"{name} 8 bytes off", leads={name: 8}, answer="^cudaError 1$"))
    cases.append(paged_case(call, name="partial_out 8 bytes off", leads=dict(partial_out=8), splits=2, answer="^cudaError 1$"))
    wrong = dict(
        stride_ks=129, stride_vp=1028, stride_kh=68, dtype=7, tile_rows=4, num_splits=0, page_size=0, head_dim=60, num_kv_heads=3, batch=-1, seqlen_q=2**30,
    )  # fmt: skip
    for name, value in wrong.items():
        cases.append(paged_case(call, name=f"{name} = {value}", answer="^cudaError 1$", **{name: value}))
    cases.append(paged_case(call, name="257 splits", answer="^cudaError 1$", num_splits=257))
    cases.append(paged_case(call, name="no memory for two splits", answer="^cudaError 1$", num_splits=2))
    for name in ("batch", "seqlen_q"):
        cases.append(paged_case(call, name=f"{name} = 0", **{name: 0}))
        cases[-1].judge = is_untouched
    return cases


def is_untouched(out: Tensor, lse: Tensor) -> None:
    assert out.isnan().all() and lse.isnan().all()


def hostile_cases(call: Call) -> list[Case]:
    """What users' index tensors may hold, and numbers that are none. call: of (40, 33) keys in pages of 4."""
    cases = []
    (q, k, v, table, lengths), _ = drawn(call)
    add = lambda name, *tensors, **rest: cases.append(paged_case(call, name=f"{name}, {call.dtype}", tensors=[*tensors], **rest))  # noqa: E731
    # Keys of a page that is none are masked: as if those keys were not there, for queries that see all others.
    for page in (-1, -(2**31), len(k), 2**31 - 1):
        bad, shorter = table.clone(), table.clone()
        bad[0, 4] = page
        shorter[0, 4:-1] = table[0, 5:]
        add(f"page {page}", q, k, v, bad, lengths, truth=[q, k, v, shorter, lengths - torch.tensor([4, 0], dtype=torch.int32)], splits=2)
    add("no page at all", q, k, v, torch.full_like(table, -5), lengths, truth=[q, k, v, table, lengths * 0], splits=2)
    full = table[:, : 40 // 4].clone()
    full[1, 9] = 0  # any page: its rows are read
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.25)
    for low, high in ((-1, 41), (-(2**31), 2**31 - 1)):
        given = torch.tensor([high, low], dtype=torch.int32)
        truth = [q, k, v, full, torch.tensor([40, 0], dtype=torch.int32)]
        add(f"lengths {low} and {high}", q, k, v, full, given, truth=truth, splits=2)
    add("a cache without pages", q, k[:0], v[:0], full, lengths, truth=[q, k, v, full, lengths * 0])
    add("a table without entries", q, k, v, full[:, :0], lengths, truth=[q, k, v, full, lengths * 0])
    for name, place, value in (("key", 1, NAN), ("value", 2, NAN), ("value", 2, torch.inf)):
        tensors = [t.clone() for t in (q, k, v, full, lengths)]
        tensors[place][full[0, 3], 2, 0, 5] = value
        add(f"a {name} of {value}", *tensors, splits=2)
    return cases


def late_page_case(call: Call) -> Case:
    """No page at the end of a sequence that a warp takes several stages for. call: of one sequence, in pages of 8."""
    (q, k, v, table, lengths), _ = drawn(call)
    bad, shorter, entry = table.clone(), table.clone(), int(lengths) // 8 - 2
    bad[0, entry] = -1
    shorter[0, entry:-1] = table[0, entry + 1 :]
    return paged_case(call, name=f"a late page, {call.dtype}", tensors=[q, k, v, bad, lengths], truth=[q, k, v, shorter, lengths - 8])


def hostile_starts() -> list[Case]:
    cases = []
    packed = Call((20, 20), packed=(2, 3), dtype=F32)
    (q, *rest), options = drawn(packed)
    for starts in ((0, -1, 5), (7, 3, 2), (-(2**31), 2**31 - 1, 0), (2**31 - 1, 2**31 - 1, -4)):
        options = dict(options, cu_seqlens_q=torch.tensor(starts, dtype=torch.int32))
        case = paged_case(packed, name=f"cu_seqlens_q {starts}", tensors=[q, *rest], options=options, splits=2)
        case.judge = lambda **_: None  # no answer is right, but nothing outside is touched
        cases.append(case)
    return cases


def leftpad_case() -> Case:
    """The first places of a sequence hold nothing: those of a page that is none, and NaN on the next."""
    call = Call((24, 21), S_q=2, page_size=4)
    (q, k, v, table, lengths), _ = drawn(call)
    pad, entries = 6, [int(page) for page in table[0, :6]]
    k_spare, v_spare = (torch.cat([t, torch.full((8, *t.shape[1:]), NAN, dtype=t.dtype)]) for t in (k, v))
    moved = torch.full((2, 8), NOWHERE, dtype=torch.int32)
    moved[1, :7] = table[1, :7]
    moved[0] = torch.tensor([-9, *range(len(k), len(k) + 7)])
    for j in range(24):
        place = pad + j
        for spare, t in ((k_spare, k), (v_spare, v)):
            spare[moved[0, place // 4], place % 4] = t[entries[j // 4], j % 4]
    given = [q, k_spare, v_spare, moved, lengths + torch.tensor([pad, 0], dtype=torch.int32)]
    case = paged_case(call, name="leftpad", tensors=given, truth=[q, k, v, table, lengths], splits=2)
    case.buffers.append(Buffer(torch.tensor([pad, -3], dtype=torch.int32), ("leftpad",), False))
    return case


def far_case() -> Case:
    """Pages 2^30 elements apart: five of them wrap an index of 32 bits, signed or not. The memory between is never touched."""
    call = Call((20,), H=2, H_kv=1, page_size=4, D=64)
    (q, k, v, table, lengths), _ = drawn(call)
    return paged_case(call, name="pages 2^30 apart", sparse=dict(k_cache=2**30, v_cache=2**30), splits=2)


HOSTILE = Call((40, 33), S_q=2, page_size=4, dtype=F32), Call((40, 33), S_q=2, H=12, page_size=4, dtype=BF16)
CASES = [*value_cases(), *layout_cases(), *(case for call in HOSTILE for case in hostile_cases(call)), *hostile_starts(), leftpad_case()]
CASES += [late_page_case(Call((203,), H=2, H_kv=1, page_size=8, dtype=F32)), late_page_case(Call((333,), H=6, H_kv=1, page_size=8))]
FAR = [far_case()]
FAULTS = [
    # Copies and stages.
    Fault("keys read before they are there", SOURCE, "products[kRows * kPasses];\n    cp_async::wait<3>();", "products[kRows * kPasses];", {"races": NOTHING, "plain": WRONG}),
    Fault("a wait for keys too weak by one group", SOURCE, "scores[kKeys / 8][4] = {};\n    cp_async::wait<3>();", "scores[kKeys / 8][4] = {};\n    cp_async::wait<4>();", {"races": NOTHING}),
    Fault("no empty group at the end", SOURCE, "exists ? 16 : 0);\n    }\n  }\n  cp_async::commit();",
          "exists ? 16 : 0);\n    }\n    cp_async::commit();\n  }", {"plain": WRONG, "races": NOTHING}),
    Fault("others' keys read without a barrier", SOURCE, "    __syncwarp();         // all lanes' copies\n#pragma unroll\n    for (int k = 0; k < kDim", "#pragma unroll\n    for (int k = 0; k < kDim",
          {"races": f"{NOTHING}|{LANES}"}),
    Fault("keys overwritten while others read them", SOURCE, "    __syncwarp();  // no lane reads these keys any more\n", "", {"races": f"{NOTHING}|{LANES}"}),
    Fault("values overwritten while others read them", SOURCE, "    __syncwarp();  // no lane reads these values any more\n", "", {"races": f"{NOTHING}|{LANES}"}),
    Fault("queries read before all are there", SOURCE, "  __syncthreads();  // all queries\n", "", {"races": f"{NOTHING}|{WARPS}"}),
    Fault("parts laid where a warp still reads its stages", SOURCE, "    state.row_sum[warp][my_row] = row_sum;\n  }\n  __syncthreads();", "    state.row_sum[warp][my_row] = row_sum;\n  }\n", {"races": f"{NOTHING}|{THREADS}"}),
    Fault("dynamic shared memory without the queries", SOURCE, "16 * (size_t{kMmaChunks} + kMmaRows * lanes)", "16 * size_t{kMmaChunks}", {"asan": OUTSIDE}),
    # Blocks that wait for none and merge what all have left.
    Fault("no fence before the count", SOURCE, "    __threadfence();  // what the block", "    // what the block", {"races": BLOCKS}, quick=True),
    Fault("no fence after the count", SOURCE, "    __threadfence();  // and what the others", "    // and what the others", {"races": BLOCKS}),
    Fault("counted before all is stored", SOURCE, "  __syncthreads();  // all of the block's part", "  // all of the block's part", {"races": f"{BLOCKS}|{THREADS}"}),
    Fault("a counter that stays", SOURCE, "atomicInc(a.counters + w.tile, last) == last", "atomicAdd(a.counters + w.tile, 1u) == last", {"plain": f"{WRONG}.*a counter is not 0 again"}),
    Fault("splits without keys are waited for", SOURCE, "static_cast<unsigned>(w.num_active - 1)", "static_cast<unsigned>(a.num_splits - 1)", {"plain": WRONG}),
    Fault("weights read before all are there", SOURCE, "  __syncthreads();  // the weights of all rows\n", "", {"races": f"{NOTHING}|{WARPS}"}),
    Fault("sums read before all are there", SOURCE, "      __syncthreads();  // the sums of all parts\n", "", {"races": f"{NOTHING}|{WARPS}"}),
    Fault("a sink a split", SOURCE, "a.sinks != nullptr && w.split == 0", "a.sinks != nullptr", {"plain": WRONG}),
    # Memory.
    Fault("a page is not checked", SOURCE, "return page >= 0 && page < a.num_pages ? page : -1;", "return page;", {"asan": f"{OUTSIDE}|SEGV", "plain": f"{CRASH}|{WRONG}"}),
    Fault("a page too many", SOURCE, "page < a.num_pages ? page", "page <= a.num_pages ? page", {"asan": OUTSIDE}),
    Fault("an entry past the table", SOURCE, "if (j >= w.end) return -1;", "if (j > w.end) return -1;", {"asan": OUTSIDE}),
    Fault("a length longer than the table", SOURCE, "leftpad) - leftpad, a.capacity - leftpad)", "leftpad) - leftpad, kMostKeys)", {"asan": f"{OUTSIDE}|SEGV"}),
    Fault("a start below the first token", SOURCE, "min(max(static_cast<int64_t>(a.cu_seqlens_q[batch]), int64_t{0}), a.total_q)", "min(static_cast<int64_t>(a.cu_seqlens_q[batch]), a.total_q)", {"asan": f"{OUTSIDE}|SEGV"}),
    Fault("a stop past the last token", SOURCE, "min(max(static_cast<int64_t>(a.cu_seqlens_q[batch + 1]), start), a.total_q)", "max(static_cast<int64_t>(a.cu_seqlens_q[batch + 1]), start)", {"asan": f"{OUTSIDE}|SEGV"}),
    Fault("a chunk past the row", SOURCE, "in_row = col < a.head_dim;", "in_row = true;", {"asan": OUTSIDE, "plain": WRONG}),
    Fault("16 bytes of out that is not aligned", SOURCE, "is_aligned(a.out)", "true", {"asan": "misaligned address"}),
    Fault("an offset of 32 bits, signed", SOURCE, "page * cache.page_stride", "page * static_cast<int32_t>(cache.page_stride)", {"plain": f"{CRASH}|{WRONG}", "asan": "signed integer overflow"}, far=True),
    Fault("an offset of 32 bits, unsigned", SOURCE, "page * cache.page_stride", "static_cast<unsigned>(page * cache.page_stride)", {"plain": f"{CRASH}|{WRONG}"}, far=True),
    # Values.
    Fault("a query sees one key more", SOURCE, "min(diagonal + a.right, w.end - 1)", "min(diagonal + a.right + 1, w.end - 1)", {"plain": WRONG}),
    Fault("a window is one key wider", SOURCE, "first_key(diagonal - a.left)", "first_key(diagonal - a.left - 1)", {"plain": WRONG}),
    Fault("keys of no page count", SOURCE, "return exists && j >= first_key", "return j >= first_key", {"plain": WRONG}),
    Fault("keys of no page, a stage late", SOURCE, "      }\n    }\n    exists = exists_next;\n", "      }\n    }\n", {"plain": WRONG}),
    Fault("keys of no page, a stage late on CUDA cores", SOURCE, "new_max = fmaxf(new_max, weights[o]);\n    }\n    exists = exists_next;\n",
          "new_max = fmaxf(new_max, weights[o]);\n    }\n", {"plain": WRONG}),
    Fault("−∞ − −∞", SOURCE, "return maximum == -INFINITY ? 0.0f : maximum;", "return maximum;", {"plain": WRONG}),
    Fault("values do not fade", SOURCE, "acc[r][i] *= factor;", "acc[r][i] *= 1.0f;", {"plain": WRONG}),
    Fault("a fade that only some lanes see", SOURCE, "__any_sync(kFullMask, new_max != row_max)", "new_max != row_max", {"plain": "Refused: .*(__shfl|is here)"}),
    Fault("keys and entries of a tile swapped", SOURCE, "lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2)", "lane / 8 % 2 * 8 + lane % 8, 2 * k + lane / 16)", {"plain": WRONG}),
    Fault("chunks are not where they are read", SOURCE, "swizzled<kLanes>(k * 16 + lane % 16, n + lane / 16)", "(k * 16 + lane % 16) * kLanes + n + lane / 16", {"plain": WRONG}),
    Fault("a sum given to the wrong lanes", REDUCE, "upper ? low : high, kDistance", "upper ? high : low, kDistance", {"plain": WRONG}),
    Fault("leftpad moves keys but not pages", SOURCE, "a.page_divider.quotient(j + w.leftpad)", "a.page_divider.quotient(j)", {"plain": f"{WRONG}|{CRASH}"}),
]  # fmt: skip
