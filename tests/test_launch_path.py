"""The launch path as a GPU would see it, without one: real argument specialisation and compilation under the stub driver, nothing runs."""

import ast
import threading
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")

from fastattn.kernels import attention, attention_bwd, launch, tiles  # noqa: E402
from fastattn.ops import attention as ops  # noqa: E402
from fastattn.testing.stub_driver import (  # noqa: E402
    SHARED_MEMORY_LIMITS,
    LaunchRefused,
    compiled_variants,
    no_host_sync,
    stub_driver,
)

KERNELS = ("attention_fwd", "attention_bwd_dkdv", "attention_bwd_dq")
SMALL = tiles.Config(16, 16, 4, 1, tma=True)  # quick to compile; which variants there are does not depend on the tile
PLAIN = (None,) * 6  # no bias, slopes, sinks, seed, cu_seqlens


def call(q, k, v, config=SMALL, backward=True):
    """Launch the causal forward kernel and, on its results, the backward kernels."""
    options = (q.shape[1], k.shape[1], None, 0, 0.125, 0.0, 0.0)
    out, lse = attention.attention_fwd(q, k, v, *PLAIN, *options, config=config)
    if backward:
        configs = dict.fromkeys(KERNELS, config)
        attention_bwd.attention_bwd(out, None, q, k, v, *PLAIN, out, lse, *options, False, configs=configs)


def dense(batch=2, seqlen=64, heads=4, head_dim=64, kv_heads=None, dtype=torch.bfloat16):
    kv_heads = heads if kv_heads is None else kv_heads
    return tuple(torch.zeros(batch, seqlen, h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))


@pytest.fixture
def launches_only(monkeypatch):
    """Stand in for the launch helper: records (kernel, grid, arguments) and compiles nothing."""
    recorded = []

    def record(kernel, grid, device, *args, **meta):
        recorded.append((kernel.__name__, grid, meta))

    for module in (attention, attention_bwd):
        monkeypatch.setattr(module, "launch", record)
    return recorded


# --------------------------------------------------------------------------------------------------------------------
# The functions registered for CUDA.


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Let the op's implementation choose as it does for CUDA tensors: kernels run, values are not looked at."""
    monkeypatch.setattr(ops, "runs_kernels", lambda tensor: True)
    monkeypatch.setattr(ops, "checks_values", lambda tensor: False)


def test_registered_for_cuda():
    for name in ("fastattn::attention_fwd", "fastattn::attention_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@pytest.mark.parametrize("capability", SHARED_MEMORY_LIMITS, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_cuda_implementation_compiles_and_never_syncs(as_on_cuda, capability):
    """The plain op with the table's tiles on every part: within shared memory (Triton refuses the launch otherwise) and grid limits."""
    q, k, v = dense(seqlen=200, kv_heads=2)
    options = (200, 200, None, 0, 0.125, 0.0, 0.0)
    with stub_driver(capability) as driver, no_host_sync():
        out, lse, _ = ops._attention_fwd(q, k, v, *PLAIN, *options, False)
        ops._attention_bwd(out, None, q, k, v, *PLAIN, out, lse, None, *options, False)
    assert {made.name for made in driver.launches} == {
        "_attention_fwd_kernel", "_attention_bwd_delta_kernel", "_attention_bwd_dkdv_kernel", "_attention_bwd_dq_kernel",
    }  # fmt: skip
    for made in driver.launches:
        assert made.shared <= SHARED_MEMORY_LIMITS[capability]
        assert made.compiled.metadata.target.arch == 10 * capability[0] + capability[1]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_everything_on_never_syncs(as_on_cuda, launches_only, packed):
    batch, seqlen, heads = 2, 32, 4
    q, k, v = dense(batch, seqlen, heads, kv_heads=2)
    bias = torch.zeros(1, heads, seqlen, 1)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * seqlen if packed else None
    seed = ops.draw_seed(q.device)
    tensors = (bias, torch.zeros(heads), torch.zeros(heads, dtype=torch.bfloat16), seed, cu_seqlens, cu_seqlens)
    options = (seqlen, seqlen, 10, 5, 0.125, 30.0, 0.1)
    if packed:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    with stub_driver(), no_host_sync():
        out, lse, _ = ops._attention_fwd(q, k, v, *tensors, *options, False)
        *_, dbias, dsinks = ops._attention_bwd(out, lse, q, k, v, *tensors, out, lse, None, *options, True)
    assert dbias.shape == bias.shape and dbias.dtype == bias.dtype
    assert dsinks.shape == (heads,) and dsinks.dtype == torch.bfloat16
    assert [name for name, _, _ in launches_only].count("_attention_bwd_dbias_kernel") == 1


# --------------------------------------------------------------------------------------------------------------------
# Grids.


def test_grid_holds_more_than_65535_programs():
    q, k, v = dense(batch=70000, seqlen=1, heads=1, head_dim=16)
    with stub_driver() as driver:
        call(q, k, v, backward=False)
    assert driver.launches[0].grid == (70000, 1, 1)


def test_grid_limit_is_an_error_of_ours():
    with pytest.raises(ValueError, match=r"attention: the input must need fewer than 2\^31 programs, got 2147483648"):
        attention.check_grid("attention", 2**31)
    assert attention.check_grid("attention", 2**31 - 1) == (2**31 - 1,)
    with stub_driver(), pytest.raises(LaunchRefused, match="grid x"):  # what it stands for
        q, k, v = dense()
        attention.launch(attention_bwd._attention_bwd_delta_kernel, (2**31,), q.device, **delta_arguments(q))


def delta_arguments(q):
    lse = torch.zeros(2, 4, 64)
    strides = {f"stride_{name}": 1 for name in ("dob", "dos", "doh", "dod", "dlse_b", "dlse_h", "dlse_s")}
    pointers = dict(out_ptr=q, dout_ptr=q, lse_ptr=lse, dlse_ptr=None, delta_ptr=lse, lse2_ptr=lse)
    return dict(**pointers, **strides, num_rows=64, num_heads=4, num_blocks=2, HEAD_DIM_V=64, BLOCK_M=32, BLOCK_DV=64)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0)], ids=["no-batch", "no-rows"])
def test_nothing_to_do_launches_nothing(shape):
    with stub_driver() as driver:
        call(*dense(*shape))
    assert driver.launches == []


# --------------------------------------------------------------------------------------------------------------------
# Compiled variants. One costs a user seconds in the middle of serving: lengths and batch sizes must not choose one.


def test_at_most_two_variants_over_lengths_and_batches():
    """Causal D = 64: the second variant is S = 1, which has no causal edge."""
    kernels = [
        attention._attention_fwd_kernel,
        attention_bwd._attention_bwd_delta_kernel,
        attention_bwd._attention_bwd_dkdv_kernel,
        attention_bwd._attention_bwd_dq_kernel,
    ]
    with stub_driver():
        for seqlen in range(1, 201):
            batches = range(1, 9) if seqlen in (1, 2, 15, 16, 17, 64, 128, 200) else (1, 1 + seqlen % 8)
            for batch in batches:
                call(*dense(batch, seqlen, heads=2))
        assert {kernel.__name__: compiled_variants(kernel) for kernel in kernels} == dict(
            _attention_fwd_kernel=2,
            _attention_bwd_delta_kernel=1,
            _attention_bwd_dkdv_kernel=2,
            _attention_bwd_dq_kernel=2,
        )


def scaled(*tensors, factor=2.0, size=None, **options):
    """Launch a kernel of no fame over tensors, out = x·factor; gives the variant that was launched."""
    x, out = tensors
    launch.launch(
        _scale_kernel, (1,), x.device, x_ptr=x, out_ptr=out, size=x.numel() if size is None else size, factor=factor, BLOCK=64,
        **{"num_warps": 1} | options,
    )  # fmt: skip
    return triton.runtime.driver.active.launches[-1]


@triton.jit
def _scale_kernel(x_ptr, out_ptr, size, factor, BLOCK: triton.language.constexpr):
    i = triton.language.arange(0, BLOCK)
    triton.language.store(out_ptr + i, triton.language.load(x_ptr + i, mask=i < size, other=0.0) * factor, mask=i < size)


def test_a_call_of_another_kind_gets_another_variant():
    """What a variant was compiled for must hold at each launch of it: dtype, 16-byte alignment, sizes that are multiples of 16, the
    compiler's options."""
    with stub_driver() as driver:
        x = torch.zeros(65)
        first = scaled(x[:64], x[:64])
        for again in (scaled(x[:64], x[:64]), scaled(x[:64], x[:64], factor=3.0), scaled(x[:48], x[:64])):
            assert again.compiled is first.compiled
        others = [
            scaled(x[1:65], x[:64]), scaled(x[:64], x[1:65]), scaled(x.half()[:64], x[:64]), scaled(x[:40], x[:64]),
            scaled(x[:1], x[:64]), scaled(x[:64], x[:64], size=2**40), scaled(x[:64], x[:64], num_warps=2),
            scaled(x[:64], x[:64], num_stages=2), scaled(x[:64], x[:64], maxnreg=64),
        ]  # fmt: skip
        assert len({id(made.compiled) for made in [first, *others]}) == 10
        assert len(driver.launches) == 4 + len(others)
        for launch_, offset in ((others[0], 4), (others[1], 4)):
            assert launch_.args["x_ptr"].data_ptr() + launch_.args["out_ptr"].data_ptr() == 2 * x.data_ptr() + offset


@pytest.mark.parametrize("hook, place", [("launch_enter_hook", 8), ("launch_exit_hook", 9)])
def test_a_profiler_s_hook_is_called_at_every_launch(monkeypatch, hook, place):
    called = []
    x = torch.zeros(64)
    with stub_driver():
        scaled(x, x)
        monkeypatch.setattr(triton.knobs.runtime, hook, called.append)
        monkeypatch.setattr(
            "fastattn.testing.stub_driver._Recorder.__call__", lambda *args: called.append(args[place])
        )  # its place in what Triton's launchers are given
        scaled(x, x)
        scaled(x, x)
    assert called == [called[0]] * 2 and called[0] is not None


def test_a_variant_compiled_for_debugging_is_not_kept(monkeypatch):
    x = torch.zeros(64)
    with stub_driver():
        normal = scaled(x, x).compiled
        monkeypatch.setattr(triton.knobs.runtime, "debug", True)
        assert scaled(x, x).compiled is not normal
        monkeypatch.setattr(triton.knobs.runtime, "debug", False)
        assert scaled(x, x).compiled is normal


@pytest.mark.parametrize("shape", [(2**31 - 1, 1), (1, 2**31 - 1)], ids=str)
def test_more_than_32_bits_count_is_refused(shape):
    from fastattn.kernels import softmax
    from fastattn.kernels.rows import Rows

    x = torch.empty(1, dtype=torch.float16).expand(shape)
    with pytest.raises(ValueError, match="softmax: the input must have at most 2147352576 (rows|columns), got 2147483647"):
        Rows(x=x).grid("softmax", 1)
    with pytest.raises(ValueError, match="softmax: x must have dims of at most 2147352576 here, got 2147483647"):
        softmax._launch_strided(None, 0, x=x)


# --------------------------------------------------------------------------------------------------------------------
# Threads and descriptors.


def test_launches_from_a_fresh_thread():
    """Autograd's device threads have no Triton allocator; descriptors need one at the launch."""
    caught = []

    def backward():
        try:
            call(*dense())
        except Exception as error:
            caught.append(error)

    with stub_driver() as driver:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert caught == []
    assert driver.launches[0].args["USE_TMA"] and driver.launches[0].compiled.metadata.global_scratch_size > 0


def sliced_head():
    q, k, v = dense(head_dim=128)
    return q[..., :64], k[..., :64], v[..., :64]


def offset_by(elements):
    q, k, v = dense()
    flat = torch.zeros(k.numel() + elements, dtype=k.dtype)[elements:]
    return q, flat.view(k.shape), v


def odd_head_dim():
    return dense(head_dim=33)


def one_head_of_odd_stride():
    q, k, v = dense()
    return q, torch.zeros(2, 64, 4, 65, dtype=k.dtype)[..., :64], v


def expanded_heads():
    q, k, v = dense(kv_heads=1)
    return q, k.expand(2, 64, 4, 64), v.expand(2, 64, 4, 64)


def packed_qkv():
    return tuple(torch.zeros(2, 64, 3, 4, 64, dtype=torch.bfloat16).unbind(2))


def empty_keys():
    q, _, _ = dense()
    _, k, v = dense(seqlen=0)
    return q, k, v


def heads_first():
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense())


@pytest.mark.parametrize(
    "make, allowed",
    [
        (dense, True), (sliced_head, True), (packed_qkv, True), (heads_first, True), (lambda: offset_by(8), True),
        (lambda: dense(head_dim=40), True), (lambda: offset_by(1), False), (lambda: offset_by(7), False), (odd_head_dim, False),
        (lambda: dense(head_dim=36), False), (one_head_of_odd_stride, False), (expanded_heads, False), (empty_keys, False),
        (lambda: dense(head_dim=512), False),
    ],
    ids=[
        "contiguous", "sliced", "packed-qkv", "heads-first", "offset-16-bytes", "D40", "offset-2-bytes", "offset-14-bytes", "D33", "D36",
        "odd-stride", "expanded", "empty", "D512",
    ],
)  # fmt: skip
def test_descriptors_only_where_the_layout_permits(launches_only, make, allowed):
    q, k, v = make()
    with stub_driver():
        call(q, k, v, backward=False)
    ((_, _, arguments),) = launches_only
    assert arguments["USE_TMA"] is allowed


@pytest.mark.parametrize("make", [packed_qkv, lambda: offset_by(1), expanded_heads, empty_keys])
def test_both_paths_compile(make):
    q, k, v = make()
    with stub_driver() as driver:
        call(q, k, v, backward=False)
    (launch,) = driver.launches
    assert (launch.compiled.metadata.global_scratch_size > 0) == launch.args["USE_TMA"]


def test_upstream_gradients_that_cannot_be_described(launches_only):
    """An expanded dout (from out.sum()) takes the pointer path."""
    q, k, v = dense()
    lse = torch.zeros(2, 4, 64)
    dout = torch.zeros((), dtype=q.dtype).expand(q.shape)
    with stub_driver(), no_host_sync():
        attention_bwd.attention_bwd(dout, None, q, k, v, *PLAIN, q, lse, 64, 64, None, 0, 0.125, 0.0, 0.0, False)
    delta, *others = (arguments for _, _, arguments in launches_only)
    assert "USE_TMA" not in delta and not any(arguments["USE_TMA"] for arguments in others)


# --------------------------------------------------------------------------------------------------------------------
# The tile table.


def test_every_row_is_there_and_no_other():
    parts, dtype_classes = ("sm80", "sm90", "sm100", "sm120"), ("half", "single")
    expected = {(k, p, t, d) for k in KERNELS for p in parts for t in dtype_classes for d in tiles.HEAD_DIM_BUCKETS}
    assert set(tiles.TILES) == expected


@pytest.mark.parametrize("row", tiles.TILES, ids=lambda row: "-".join(map(str, row)))
def test_row_is_sane(row):
    kernel, part, dtype_class, _ = row
    config = tiles.TILES[row]
    for block in (config.BLOCK_M, config.BLOCK_N):
        assert block in (8, 16, 32, 64, 128, 256)
    assert config.num_warps in (4, 8) and config.num_stages >= 1
    assert not config.tma or part in ("sm90", "sm100")
    assert not config.overlap or kernel == "attention_fwd"
    assert not config.split or kernel == "attention_bwd_dkdv"


@pytest.mark.parametrize(
    "capability, shared_memory, part",
    [
        ((8, 0), 163, "sm80"), ((8, 6), 99, "sm120"), ((8, 9), 99, "sm120"), ((9, 0), 227, "sm90"), ((10, 0), 227, "sm100"),
        ((10, 3), 227, "sm100"), ((12, 0), 99, "sm120"), ((12, 1), 99, "sm120"),
    ],
)  # fmt: skip
def test_rows_of_a_part(capability, shared_memory, part):
    assert tiles.part_of(capability, shared_memory * 1024) == part
    for head_dim, bucket in [(1, 64), (64, 64), (65, 128), (129, 256), (512, 512)]:
        for itemsize, dtype_class in ((2, "half"), (4, "single")):
            for kernel in KERNELS:
                picked = tiles.pick_config(kernel, capability, shared_memory * 1024, head_dim, itemsize)
                assert picked is tiles.TILES[kernel, part, dtype_class, bucket]


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_older_parts_are_refused_by_name(monkeypatch, capability):
    message = rf"needs compute capability 8.0 \(Ampere\) or newer, this GPU has {capability[0]}\.{capability[1]}"
    monkeypatch.setattr(attention, "target_of", lambda tensor: (capability, 64 * 1024))
    with pytest.raises(RuntimeError, match=message):
        call(*dense(), config=None)


# --------------------------------------------------------------------------------------------------------------------


def launched(path):
    """Line numbers of `kernel[grid](...)`: in kernels/ any call of a subscript, elsewhere of a name that says it is a kernel."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = ast.unparse(node.func.value)
            if "kernels" in path.parts or name.endswith("kernel"):
                yield node.lineno


def test_kernels_are_launched_in_one_place():
    root = Path(__file__).parents[1]
    files = [path for folder in ("kernels", "fastattn", "benchmarks") for path in sorted((root / folder).rglob("*.py"))]
    assert {path.relative_to(root).as_posix() for path in files for _ in launched(path)} == {"kernels/launch.py"}
