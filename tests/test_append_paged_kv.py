"""Appending to a paged cache: the kernel in the interpreter and the CPU path against float64, the formats, hostile index tensors, the launch path."""

from __future__ import annotations

import pytest
import torch
from op_contract import BF16, DTYPES, F16, F32, INPUT_LAYOUTS, launched_on, runs_as_on_cuda

import fastattn
from fastattn import reference
from fastattn.testing.budget import check_budget

F64, INT8, FP8 = torch.float64, torch.int8, torch.float8_e4m3fn
CACHES = pytest.mark.parametrize("cache_dtype", [F32, F16, BF16, INT8, FP8], ids=["fp32", "fp16", "bf16", "int8", "fp8"])
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def call(lengths=(3, 0, 9), new=4, heads=2, head_dim=16, head_dim_v=None, page_size=5, rotary_dim=0, dtype=F32, cache_dtype=F32, scales=None):
    """Arguments by name: `new` tokens for each of sequences that have `lengths`, or packed ones, as many as `new` lists; caches full of other
    numbers; scales by default where the cache is quantised."""
    shape = (len(lengths), new) if isinstance(new, int) else (sum(new),)
    longest = max(lengths) + (new if isinstance(new, int) else max(new))
    max_pages = -(-longest // page_size)
    num_pages = max_pages * len(lengths) + 2
    args = dict(k=torch.randn(*shape, heads, head_dim).to(dtype), v=torch.randn(*shape, heads, head_dim_v or head_dim).to(dtype))
    for name in "kv":
        args[f"{name}_cache"] = (3 * torch.randn(num_pages, page_size, heads, args[name].shape[-1])).to(cache_dtype)
        if cache_dtype.itemsize == 1 if scales is None else scales:
            args[f"{name}_scale"] = 0.01 + 0.02 * torch.rand(heads)
    args["page_table"] = torch.randperm(num_pages)[: max_pages * len(lengths)].view(len(lengths), max_pages).int()
    args["cache_seqlens"] = ints(*lengths)
    if not isinstance(new, int):
        args["cu_seqlens"] = torch.tensor([0, *new]).cumsum(0).int()
    if rotary_dim:
        angles = torch.rand(longest, rotary_dim // 2) * 6 - 3
        args |= dict(cos=angles.cos(), sin=angles.sin())
    return args


def appended(function=fastattn.append_paged_kv, dtype=None, **args):
    """The caches after the call, as copies; dtype casts k, v, tables, scales and caches first."""
    args = {name: t.to(dtype) if dtype and isinstance(t, torch.Tensor) and t.dtype != torch.int32 else t for name, t in args.items()}
    caches = [clone(args.pop(name)) for name in ("k_cache", "v_cache")]
    assert function(args.pop("k"), args.pop("v"), *caches, **args) is None
    return caches


def clone(cache):
    """Strides and all."""
    copy = torch.empty(cache.untyped_storage().nbytes(), dtype=torch.uint8).copy_(torch.tensor([], dtype=torch.uint8).set_(cache.untyped_storage()))
    return copy.view(cache.dtype).as_strided(cache.shape, cache.stride(), cache.storage_offset())


def bits(t):
    return t.contiguous().view(torch.uint8)


def check(**args):
    """The op against the oracle: within the error budget, and exactly where nothing is rotated."""
    got, naive, ref64 = appended(**args), appended(reference.append_paged_kv, **args), appended(reference.append_paged_kv, F64, **args)
    for name, *caches in zip("kv", got, naive, ref64):
        cache, plain, truth = caches
        before = args[f"{name}_cache"]
        truth = torch.where(bits(plain).eq(bits(before)).view(*plain.shape, -1).all(-1), before.double(), truth)  # what was not written
        check_budget(f"append_paged_kv {name}", cache.double(), plain.double(), truth)
        if name == "v" or "cos" not in args:
            assert torch.equal(bits(cache), bits(plain)), name


# --------------------------------------------------------------------------------------------------------------------
# Values.


@pytest.mark.both
@DTYPES
@CACHES
def test_values(dtype, cache_dtype):
    types = dict(dtype=dtype, cache_dtype=cache_dtype)
    check(**call(**types))
    check(**call(new=(4, 0, 9), head_dim=24, head_dim_v=40, page_size=1, rotary_dim=24, **types))
    check(**call(new=1, lengths=(0, 14, 5), page_size=16, head_dim=10, rotary_dim=6, **types), interleaved=True)


# (head_dim, head_dim_v, heads, rotary_dim): each tile, dims that nothing divides, more rows than a program has.
@pytest.mark.both
@pytest.mark.parametrize("dims", [(64, 64, 9, 64), (128, 128, 3, 64), (80, 96, 2, 80), (1, 1, 1, 0), (7, 512, 2, 6), (512, 33, 1, 512), (2, 3, 40, 2)], ids=str)
def test_any_head_dim(dims):
    head_dim, head_dim_v, heads, rotary_dim = dims
    args = call(head_dim=head_dim, head_dim_v=head_dim_v, heads=heads, rotary_dim=rotary_dim, dtype=BF16, cache_dtype=BF16)
    for interleaved in (False, True) if rotary_dim else (False,):
        check(**args, interleaved=interleaved)


@pytest.mark.both
@pytest.mark.parametrize("page_size", [1, 2, 7, 16, 300])
@pytest.mark.parametrize("new", [1, 13, (1, 0, 20)], ids=str)
def test_any_page_size(page_size, new):
    check(**call(lengths=(0, 15, 16), new=new, page_size=page_size, head_dim=8))


@pytest.mark.both
@LAYOUTS
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_keys_are_rotated_as_apply_rotary_does(interleaved, rotary_dim):
    args = call(rotary_dim=rotary_dim, dtype=BF16, cache_dtype=BF16)
    positions = args["cache_seqlens"][:, None] + torch.arange(4)
    tables = [args[name] for name in ("cos", "sin")]
    turned, _ = fastattn.apply_rotary(args["k"], args["k"], *tables, interleaved=interleaved, positions=positions)
    plain = {name: t for name, t in args.items() if name not in ("cos", "sin")} | {"k": turned}
    for got, expected in zip(appended(**args, interleaved=interleaved), appended(**plain)):
        assert torch.equal(got, expected)


@pytest.mark.both
@pytest.mark.parametrize("table_dtype", [F16, BF16, F64], ids=str)
def test_any_dtype_of_tables(table_dtype):
    args = call(rotary_dim=8, dtype=BF16, cache_dtype=BF16)
    check(**args | {name: args[name].to(table_dtype) for name in ("cos", "sin")})


@pytest.mark.both
def test_scales_of_one_of_both_and_of_float_caches():
    args = call(scales=True, cache_dtype=BF16)
    check(**args)
    for only in ("k_scale", "v_scale"):
        check(**{name: t for name, t in args.items() if not name.endswith("scale")} | {only: args[only]})


# --------------------------------------------------------------------------------------------------------------------
# Formats.


@pytest.mark.both
def test_float8_of_every_bf16_number():
    k = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16).view(1, 128, 1, 512)
    cache = torch.zeros(1, 128, 1, 512).to(FP8)
    for scale in (None, torch.tensor([0.37])):
        got, _ = appended(k=k, v=k, k_cache=cache, v_cache=cache, page_table=ints([0]), cache_seqlens=ints(0), k_scale=scale)
        expected = (k.float() if scale is None else k.float() / scale).clamp(-448, 448).to(FP8)
        same = bits(got) == bits(expected)
        assert (same | k.isnan().view_as(same)).all() and got.float().isnan().eq(k.isnan()).all()
        assert got.float().nan_to_num(0.0).abs().max() == 448


@pytest.mark.both
def test_float8_ties_go_to_even():
    """Between each two neighbours, their middle and the two floats beside it."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([torch.nextafter(middle, torch.zeros(())), middle, torch.nextafter(middle, torch.full((), 1e3)), torch.tensor([448.1, 464.0, 1e30])])
    k = torch.cat([x, -x]).view(1, -1, 1, 1)
    cache = torch.zeros(1, k.shape[1], 1, 1).to(FP8)
    got, _ = appended(k=k, v=k, k_cache=cache, v_cache=cache, page_table=ints([0]), cache_seqlens=ints(0))
    assert torch.equal(bits(got), bits(k.clamp(-448, 448).to(FP8)))


@pytest.mark.both
def test_int8_is_torch_s_quantisation():
    x = torch.cat([torch.arange(-300, 300, 0.25), torch.tensor([1e30, -1e30, float("inf"), -float("inf")])])
    k = x.view(1, -1, 1, 1)
    cache = torch.zeros(1, k.shape[1], 1, 1, dtype=INT8)
    got, _ = appended(k=k, v=k, k_cache=cache, v_cache=cache, page_table=ints([0]), cache_seqlens=ints(0))
    expected = torch.quantize_per_tensor(x[:-4], 1.0, 0, torch.qint8).int_repr()
    assert torch.equal(got.flatten()[:-4], expected) and got.flatten()[-4:].tolist() == [127, -128, 127, -128]
    got, _ = appended(k=k * float("nan"), v=k, k_cache=cache, v_cache=cache, page_table=ints([0]), cache_seqlens=ints(0))
    assert not got.any()


# --------------------------------------------------------------------------------------------------------------------
# Properties.


@pytest.mark.both
@pytest.mark.parametrize("cache_dtype", [F32, INT8], ids=["fp32", "int8"])
def test_all_at_once_is_one_by_one(cache_dtype):
    args = call(new=6, rotary_dim=8, cache_dtype=cache_dtype)
    caches = [args["k_cache"].clone(), args["v_cache"].clone()]
    for i in range(6):
        step = args | {"k": args["k"][:, i : i + 1], "v": args["v"][:, i : i + 1], "cache_seqlens": args["cache_seqlens"] + i}
        fastattn.append_paged_kv(**step | dict(zip(("k_cache", "v_cache"), caches)))
    for got, expected in zip(appended(**args), caches):
        assert torch.equal(got, expected)


@pytest.mark.both
@pytest.mark.parametrize("new", [(4, 0, 9), (0, 0, 0), (1, 1, 1), (0, 5, 0)], ids=str)
def test_packed_is_a_loop_of_dense(new):
    args = call(new=new, rotary_dim=8)
    args |= {name: torch.cat([args[name], torch.full_like(args["k"][:2], float("nan"))]) if name in "kv" else args[name] for name in args}
    caches, ends = [args["k_cache"].clone(), args["v_cache"].clone()], args["cu_seqlens"].tolist()
    for b, (start, end) in enumerate(zip(ends, ends[1:])):  # two tokens more belong to nobody
        one = {name: t[b : b + 1] if name in ("page_table", "cache_seqlens") else t for name, t in args.items() if name != "cu_seqlens"}
        one |= {"k": args["k"][None, start:end], "v": args["v"][None, start:end]} | dict(zip(("k_cache", "v_cache"), caches))
        fastattn.append_paged_kv(**one)
    for got, expected in zip(appended(**args), caches):
        assert torch.equal(got, expected)


@pytest.mark.both
def test_many_sequences():
    new = torch.randint(0, 3, (70,)).tolist()
    check(**call(lengths=torch.randint(0, 9, (70,)).tolist(), new=new, heads=1, head_dim=4, page_size=3))


@pytest.mark.both
def test_pages_in_order_are_the_sequence():
    args = call(lengths=(3, 8), new=7)
    caches = appended(**args)
    for name, cache in zip("kv", caches):
        before, after = (t[args["page_table"].long()].flatten(1, 2) for t in (args[f"{name}_cache"], cache))
        for b, length in enumerate((3, 8)):
            assert torch.equal(after[b, length : length + 7], args[name][b])
            assert torch.equal(after[b, :length], before[b, :length]) and torch.equal(after[b, length + 7 :], before[b, length + 7 :])


@pytest.mark.both
@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
def test_any_layout_of_new_tokens_tables_and_scales(layout):
    args = call(rotary_dim=8, dtype=BF16, cache_dtype=BF16, scales=True)
    check(**{name: INPUT_LAYOUTS[layout](t) if name in ("k", "v", "cos", "sin") else t for name, t in args.items()})
    projected = torch.randn(3, 4, 6, 16).to(BF16)
    table = torch.zeros(*args["page_table"].shape, 2, dtype=torch.int32)
    table[..., 0] = args["page_table"]
    lengths = args["cache_seqlens"].repeat_interleave(2)[::2]
    check(**args | dict(k=projected[:, :, 2:4], v=projected[:, :, 4:], page_table=table[..., 0], cache_seqlens=lengths, k_scale=args["k_scale"].repeat(2)[::2]))


CACHE_LAYOUTS = {
    "heads before slots": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "keys and values of a page side by side": lambda t: torch.stack([t, t], 1)[:, 1],
    "rows of odd stride": lambda t: torch.cat([t, t[..., :1]], -1)[..., :-1],
    "offset by one": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "every other page": lambda t: t.repeat_interleave(2, 0)[::2],
}


@pytest.mark.both
@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
@pytest.mark.parametrize("cache_dtype", [BF16, INT8, FP8], ids=["bf16", "int8", "fp8"])
def test_any_layout_of_caches(layout, cache_dtype):
    args = call(rotary_dim=8, cache_dtype=cache_dtype)
    for name in ("k_cache", "v_cache"):
        raw = args[name].view(torch.uint8) if cache_dtype == FP8 else args[name]
        args[name] = CACHE_LAYOUTS[layout](raw).view(cache_dtype)
    check(**args)


@pytest.mark.both
@pytest.mark.parametrize("new", [0, (0, 0, 0)], ids=str)
def test_no_new_tokens(new):
    args = call(new=new, page_size=2)
    assert all(torch.equal(got, args[name]) for got, name in zip(appended(**args), ("k_cache", "v_cache")))


@pytest.mark.both
@pytest.mark.parametrize("change", [dict(lengths=(1,), new=2, heads=0), "no sequences", "no pages", "no page table"], ids=str)
def test_empty(change):
    args = call(**change if isinstance(change, dict) else {})
    if change == "no sequences":
        args |= {name: args[name][:0] for name in ("k", "v", "page_table", "cache_seqlens")}
    elif change == "no pages":
        args |= {name: args[name][:0] for name in ("k_cache", "v_cache")}
    elif change == "no page table":
        args["page_table"] = args["page_table"][:, :0]
    assert all(torch.equal(got, args[name]) for got, name in zip(appended(**args), ("k_cache", "v_cache")))


@pytest.mark.both
def test_offsets_beyond_two_to_the_31(tmp_path):
    """A sparse file stands for a cache whose pages lie 2^30 elements apart."""
    args = call(lengths=(0, 0), new=2, page_size=1, cache_dtype=INT8)
    args["page_table"] = ints([3, 1], [0, 2])
    plain = appended(**args)
    for name in ("k_cache", "v_cache"):
        (file := tmp_path / name).touch()
        whole = torch.from_file(str(file), shared=True, size=4 << 30, dtype=INT8)
        args[name] = whole.as_strided((4, 1, 2, 16), (1 << 30, 32, 16, 1))
    fastattn.append_paged_kv(**args)
    for name, expected in zip(("k_cache", "v_cache"), plain):
        assert torch.equal(args[name], expected[:4])


# --------------------------------------------------------------------------------------------------------------------
# Index tensors that lie.

MOST, LEAST = 2**31 - 1, -(2**31)


@pytest.mark.both
def test_a_slot_that_is_none_is_skipped():
    args = call(lengths=(0, 0, 3), new=5, page_size=2)
    num_pages = args["k_cache"].shape[0]
    args["page_table"] = ints([0, -1, 1], [num_pages, 2, LEAST], [MOST, 3, 4])
    args["cache_seqlens"] = ints(0, -2, 3)  # of five tokens, the second sequence's first two and the third's last two have no place
    check(**args)
    for cache, name in zip(appended(**args), ("k_cache", "v_cache")):
        assert torch.equal(cache[5:], args[name][5:]), "no other page is touched"
        assert torch.equal(cache[2, 0], args[name[0]][1, 4]) and torch.equal(cache[0, 1], args[name[0]][0, 1])


@pytest.mark.both
@pytest.mark.parametrize("length", [MOST, MOST - 2, LEAST, -1000, 15, 10**6])
def test_a_position_beyond_the_page_table_is_skipped(length):
    args = call(lengths=(0, 5), new=4)
    args["cache_seqlens"][0] = length
    expected = appended(**args | {name: args[name][1:] for name in ("k", "v", "page_table", "cache_seqlens")})
    if length == 15:
        assert args["page_table"].shape[1] * 5 <= 15
    for got, cache in zip(appended(**args), expected):
        assert torch.equal(got, cache)


@pytest.mark.interpret
@pytest.mark.parametrize("ends", [[0, 100], [5, 3, 1], [-7, 4, 9], [MOST] * 3, [LEAST] * 4, [0, MOST, LEAST, 9], [9, 0, 9, 0, 9], [3, 9]], ids=str)
def test_the_kernel_stays_in_bounds_whatever_cu_seqlens_hold(ends):
    from fastattn.kernels.append_paged_kv import append_paged_kv

    args = call(lengths=[4] * (len(ends) - 1), new=(9,) + (0,) * (len(ends) - 2), rotary_dim=8)
    args |= {"cu_seqlens": ints(*ends), "cos": args["cos"][:6], "sin": args["sin"][:6]}
    caches = [args[name].clone() for name in ("k_cache", "v_cache")]
    others = [args.get(name) for name in ("page_table", "cache_seqlens", "cu_seqlens", "cos", "sin", "k_scale", "v_scale")]
    append_paged_kv(args["k"], args["v"], *caches, *others, False)
    assert all(cache.isfinite().all() for cache in caches)


@pytest.mark.both
def test_packed_tokens_of_no_sequence():
    """All of them are past the last one, and there is no length to read."""
    args = call(lengths=(3,), new=(2,))
    args |= {"cu_seqlens": ints(0), "cache_seqlens": ints(), "page_table": args["page_table"][:0]}
    for got, cache in zip(appended(**args), (args["k_cache"], args["v_cache"])):
        assert torch.equal(got, cache)


@pytest.mark.interpret
def test_the_kernel_leaves_a_key_without_a_table_row_as_it_is():
    from fastattn.kernels.append_paged_kv import append_paged_kv

    args = call(lengths=(2,), new=6, rotary_dim=16)
    cos, sin = args["cos"][:5], args["sin"][:5]
    caches = [args[name].clone() for name in ("k_cache", "v_cache")]
    append_paged_kv(args["k"], args["v"], *caches, args["page_table"], args["cache_seqlens"], None, cos, sin, None, None, False)
    keys = caches[0][args["page_table"].long()].flatten(1, 2)[0, 2:8]
    turned, _ = fastattn.apply_rotary(args["k"][:, :3], args["k"][:, :3], cos, sin, positions=torch.tensor([[2, 3, 4]]))
    assert torch.equal(keys[:3], turned[0]) and torch.equal(keys[3:], args["k"][0, 3:])


@pytest.mark.interpret
@pytest.mark.parametrize("new", [8, (3, 0, 17)], ids=str)
def test_program_order_does_not_matter(new):
    from fastattn.testing.checker import assert_order_independent

    args = call(new=new, heads=9, head_dim=64, rotary_dim=32, cache_dtype=FP8)
    assert_order_independent(lambda: appended(**args, backend="triton"))


GOOD = call(rotary_dim=8, scales=True)
K, CACHE = GOOD["k"], GOOD["k_cache"]  # (3, 4, 2, 16), (num_pages, 5, 2, 16)
PACKED = dict(k=K.flatten(0, 1), v=K.flatten(0, 1), cu_seqlens=ints(0, 4, 4, 9))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(k=1.0), TypeError, r"k must be a torch.Tensor, got float"),
        (dict(v=None), TypeError, r"v must be a torch.Tensor, got NoneType"),
        (dict(k=K.double()), TypeError, r"k must be float16, bfloat16 or float32, got torch.float64"),
        (dict(k=K[0]), ValueError, r"k must have shape \(B, S_new, H_kv, D\) without cu_seqlens, got \(4, 2, 16\)"),
        (dict(cu_seqlens=ints(0, 1, 2, 3)), ValueError, r"k must have shape \(T, H_kv, D\) with cu_seqlens, got \(3, 4, 2, 16\)"),
        (dict(v=K.to("meta")), ValueError, r"v must be on k's device cpu, got meta"),
        (dict(v=K.half()), TypeError, r"v must have k's dtype torch.float32, got torch.float16"),
        (dict(v=K[:, :3]), ValueError, r"v must have k's \(3, 4, 2\) before D_v, got \(3, 3, 2, 16\)"),
        (dict(k=K[..., :0]), ValueError, r"k must have a head_dim between 1 and 512, got 0"),
        (dict(v=K.repeat(1, 1, 1, 33)), ValueError, r"v must have a head_dim between 1 and 512, got 528"),
        (dict(k_cache=[1]), TypeError, r"k_cache must be a torch.Tensor, got list"),
        (dict(v_cache=CACHE.to("meta")), ValueError, r"v_cache must be on k's device cpu, got meta"),
        (dict(k_cache=CACHE.int()), TypeError, r"k_cache must be float16, bfloat16, float32, int8 or float8_e4m3fn, got torch.int32"),
        (dict(k_cache=CACHE[..., :8]), ValueError, r"k_cache must have shape \(num_pages, page_size, H_kv, D\) with \(H_kv, D\) = \(2, 16\) to match k, got"),
        (dict(v_cache=CACHE[0]), ValueError, r"v_cache must have shape .* to match v, got \(5, 2, 16\)"),
        (dict(k_cache=CACHE.transpose(0, 3).contiguous().transpose(0, 3)), ValueError, r"k_cache must have a contiguous last dim, got strides"),
        (dict(k_cache=CACHE.clone().requires_grad_()), ValueError, r"k_cache must not require a gradient \(it is written in place\), got requires_grad=True"),
        (dict(v_cache=CACHE.half()), TypeError, r"v_cache must have k_cache's dtype torch.float32, got torch.float16"),
        (dict(v_cache=CACHE[:, :4]), ValueError, r"v_cache must have k_cache's \(num_pages, page_size\) = \(11, 5\), got \(11, 4\)"),
        (dict(k_cache=CACHE[:, :0], v_cache=CACHE[:, :0]), ValueError, r"k_cache must have a page_size of at least 1, got 0"),
        (dict(page_table=None), TypeError, r"page_table must be a torch.Tensor, got NoneType"),
        (dict(page_table=GOOD["page_table"].long()), TypeError, r"page_table must be an int32 tensor, got torch.int64"),
        (dict(page_table=GOOD["page_table"].to("meta")), ValueError, r"page_table must be on k's device cpu, got meta"),
        (dict(page_table=GOOD["page_table"][:2]), ValueError, r"page_table must have shape \(B, max_pages\) with B = 3, got \(2, 3\)"),
        (dict(cache_seqlens=3), TypeError, r"cache_seqlens must be a torch.Tensor, got int"),
        (dict(cache_seqlens=ints(1, 2)), ValueError, r"cache_seqlens must have shape \(B,\) = \(3,\), got \(2,\)"),
        (PACKED | dict(cu_seqlens=torch.zeros(4)), TypeError, r"cu_seqlens must be an int32 tensor, got torch.float32"),
        (PACKED | dict(cu_seqlens=ints()), ValueError, r"cu_seqlens must have shape \(B \+ 1,\), got \(0,\)"),
        (PACKED | dict(cu_seqlens=ints(1, 2, 3, 4)), ValueError, r"cu_seqlens must start at 0, got 1"),
        (PACKED | dict(cu_seqlens=ints(0, 3, 2, 4)), ValueError, r"cu_seqlens must not decrease, got 3 then 2 at index 2"),
        (PACKED | dict(cu_seqlens=ints(0, 3, 4, 13)), ValueError, r"cu_seqlens must end within k's 12 packed tokens, got 13"),
        (dict(sin=None), ValueError, r"cos and sin must be given together, got cos alone"),
        (dict(cos=None), ValueError, r"cos and sin must be given together, got sin alone"),
        (dict(cos=GOOD["cos"].int()), TypeError, r"cos must have a floating-point dtype, got torch.int32"),
        (dict(cos=GOOD["cos"][None]), ValueError, r"cos must have shape \(S_max, R/2\) with R/2 between 1 and D/2 = 8, got \(1, 13, 4\)"),
        (dict(cos=torch.zeros(13, 9)), ValueError, r"cos must have shape \(S_max, R/2\) with R/2 between 1 and D/2 = 8, got \(13, 9\)"),
        (dict(sin=GOOD["sin"][:, :3]), ValueError, r"sin must have cos's shape \(13, 4\), got \(13, 3\)"),
        (dict(sin=GOOD["sin"].to("meta")), ValueError, r"sin must be on k's device cpu, got meta"),
        (dict(cos=GOOD["cos"][:12], sin=GOOD["sin"][:12]), ValueError, r"cache_seqlens must leave the new positions below S_max = 12, got 9 before 4 new tokens at index 2"),
        (dict(k_scale=0.5), TypeError, r"k_scale must be a torch.Tensor, got float"),
        (dict(v_scale=torch.ones(2).half()), TypeError, r"v_scale must be float32, got torch.float16"),
        (dict(v_scale=torch.ones(3)), ValueError, r"v_scale must have shape \(H_kv,\) = \(2,\), got \(3,\)"),
        (dict(k_scale=torch.ones(2, device="meta")), ValueError, r"k_scale must be on k's device cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match="append_paged_kv: " + message):
        fastattn.append_paged_kv(**GOOD | change)


# --------------------------------------------------------------------------------------------------------------------
# The operator.


def operands(args, interleaved=False):
    names = ("k", "v", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens", "cos", "sin", "k_scale", "v_scale")
    return *(args.get(name) for name in names), interleaved


@pytest.mark.both
def test_operator():
    for args in (call(rotary_dim=8), call(new=(1, 0, 5), cache_dtype=INT8), call(cache_dtype=FP8)):
        tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if args["k_cache"].dtype != FP8:  # which torch cannot compare, as this one does
            tests.append("test_schema")
        torch.library.opcheck(torch.ops.fastattn.append_paged_kv.default, operands(args), test_utils=tests)
    schema = str(torch.ops.fastattn.append_paged_kv.default._schema)
    assert "Tensor(a!) k_cache, Tensor(b!) v_cache" in schema and schema.endswith("-> ()")


@pytest.mark.both
def test_no_gradient_is_recorded():
    args = call()
    leaves = {name: args[name].clone().requires_grad_() for name in "kv"}
    fastattn.append_paged_kv(**args | leaves)
    assert not args["k_cache"].requires_grad and not args["v_cache"].requires_grad
    with torch.inference_mode():
        check(**call())


@pytest.mark.both
def test_a_cache_saved_for_a_backward_is_not_changed_in_silence():
    args = call()
    x = torch.ones_like(args["k_cache"]).requires_grad_()
    product = x * args["k_cache"]
    fastattn.append_paged_kv(**args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    check_compiled_append(call(rotary_dim=8, cache_dtype=FP8), dynamic)
    check_compiled_append(call(new=(1, 0, 5)), dynamic)


@pytest.mark.interpret
def test_compiled_is_eager_on_the_kernel():
    check_compiled_append(call(rotary_dim=8), backend="aot_eager")


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def test_compiled_with_halves_of_one_tensor_and_lengths_that_change():
    torch._dynamo.reset()
    step, args = torch.compile(fastattn.append_paged_kv, fullgraph=True), call(new=6)
    for new in (4, 6, 1):
        args |= {name: torch.randn(3, new, 2, 16) for name in "kv"}
        caches = torch.stack([args["k_cache"], args["v_cache"]])
        if TORCH < (2, 13):
            with pytest.raises(Exception, match="append_paged_kv: v_cache must not be a part of a larger tensor under torch.compile before"):
                step(**args | dict(zip(("k_cache", "v_cache"), caches)))
            continue
        step(**args | dict(zip(("k_cache", "v_cache"), caches)))
        assert all(torch.equal(got, expected) for got, expected in zip(caches, appended(**args)))
    torch._dynamo.reset()


def test_a_compiler_that_would_write_elsewhere_is_refused():
    torch._dynamo.reset()
    args = call()
    caches = torch.stack([args["k_cache"], args["v_cache"]])
    with pytest.raises(Exception, match="append_paged_kv: v_cache must not be a part of a larger tensor whose sizes are compiled as dynamic"):
        torch.compile(fastattn.append_paged_kv, fullgraph=True, dynamic=True)(**args | dict(zip(("k_cache", "v_cache"), caches)))
    torch._dynamo.reset()


def check_compiled_append(args, dynamic=None, backend="inductor"):
    """The caches, and what reads them after the call."""
    torch._dynamo.reset()

    def step(k, v, k_cache, v_cache, **args):
        before = k_cache.float().sum(0)
        fastattn.append_paged_kv(k, v, k_cache, v_cache, **args)
        return before, k_cache.float() + v_cache.float()

    eager, compiled = ({name: clone(t) if name.endswith("cache") else t for name, t in args.items()} for _ in range(2))
    expected, got = step(**eager), torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)(**compiled)
    for a, b in zip((*expected, eager["k_cache"], eager["v_cache"]), (*got, compiled["k_cache"], compiled["v_cache"])):
        assert torch.equal(bits(a), bits(b))
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "append_paged_kv")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_is_one_launch_and_never_syncs(as_on_cuda, capability):
    calls = [call(head_dim=64, dtype=BF16, cache_dtype=cache_dtype, rotary_dim=64) for cache_dtype in (BF16, INT8, FP8)]
    calls.append(call(new=(2, 3, 0), dtype=BF16, cache_dtype=BF16))

    def run():
        for args in calls:
            as_on_cuda._append_paged_kv(*operands(args))

    assert [launch.name for launch in launched_on(capability, run)] == ["_append_paged_kv_kernel"] * 4


def test_lengths_head_counts_and_pages_choose_no_variant(as_on_cuda):
    from fastattn.kernels.append_paged_kv import _append_paged_kv_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for batch, new, heads, page_size in ((1, 1, 1, 1), (2, 16, 8, 16), (3, 15, 32, 7), (16, 1, 16, 256)):
            args = call(lengths=[3] * batch, new=new, heads=heads, head_dim=64, page_size=page_size, rotary_dim=64, dtype=BF16, cache_dtype=BF16)
            as_on_cuda._append_paged_kv(*operands(args))
        assert compiled_variants(_append_paged_kv_kernel) == 1
