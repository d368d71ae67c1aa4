"""The checker must find planted faults, name them, and let clean kernels pass."""

import mmap

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")
pytest.importorskip("numpy", reason="needs numpy")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fastattn.testing.checker import LaunchError, assert_order_independent, checked_launches  # noqa: E402

pytestmark = pytest.mark.interpret


@triton.jit
def _double(x_ptr, out_ptr, n, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside | (not MASK_LOAD), other=0.0)
    tl.store(out_ptr + offs, 2 * x, mask=inside | (not MASK_STORE))


def double(x, out, mask_load=True, mask_store=True):
    _double[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), mask_load, mask_store, BLOCK=64)


@triton.jit
def _copy_rows(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + offs, tl.load(x_ptr + row * stride + offs))


@triton.jit
def _descriptor_copy(x_ptr, out_ptr, rows, out_rows, COLS: tl.constexpr, BLOCK: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, [rows, COLS], [COLS, 1], [BLOCK, COLS])
    out_desc = tl.make_tensor_descriptor(out_ptr, [out_rows, COLS], [COLS, 1], [BLOCK, COLS])
    row = tl.program_id(0) * BLOCK
    out_desc.store([row, 0], x_desc.load([row, 0]))


@triton.jit
def _host_descriptor_copy(x_desc, out_desc, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    out_desc.store([row, 0], x_desc.load([row, 0]))


@triton.jit
def _everyone_stores(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _shift(x_ptr, n):  # x[i] = x[i + 1] across programs: each reads what its neighbour writes
    i = tl.program_id(0)
    x = tl.load(x_ptr + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(x_ptr + i, x)


@triton.jit
def _atomic_sum(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.atomic_add(out_ptr, tl.load(x_ptr + i))


@triton.jit
def _atomic_then_load(out_ptr, seen_ptr):
    tl.atomic_add(out_ptr, 1)
    tl.store(seen_ptr + tl.program_id(0), tl.load(out_ptr))


@triton.jit
def _atomic_off_the_end(out_ptr):
    tl.atomic_add(out_ptr + tl.arange(0, 8), 1.0)


@triton.jit
def _widen(x_ptr, out_ptr):  # stores pairs of int16 as one int32
    i = tl.program_id(0)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + i, tl.load(x_ptr + i).to(tl.int32))


@triton.jit
def _program_ids(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out_ptr + i, 100 * x + 10 * y + z)


def test_clean_kernel_passes_and_is_counted(launches):
    x = torch.randn(100)
    out = torch.empty_like(x)
    double(x, out)
    torch.testing.assert_close(out, 2 * x)
    assert launches.count == 1 and launches.kernels == {"_double": 1}
    assert launches.lanes == 200


def test_unmasked_load():
    x = torch.randn(100)
    with pytest.raises(LaunchError, match="28 of 64 active lanes out of bounds") as caught:
        double(x, torch.empty(100), mask_load=False)
    error = caught.value
    assert (error.kernel, error.kind, error.program, error.lanes) == ("_double", "load", (1, 0, 0), 28)
    assert "_double: load by program (1, 0, 0)" in str(error)


def test_store_off_the_end():
    x = torch.randn(100)
    with pytest.raises(LaunchError, match="the first 0 bytes past the end of out_ptr") as caught:
        double(x, torch.empty(100), mask_store=False)
    assert (caught.value.kind, caught.value.lanes) == ("store", 28)


def test_the_rest_of_a_views_storage_is_out_of_bounds():
    storage = torch.randn(128)
    out = torch.empty(128)
    double(storage[:100], out[28:])
    for before_or_after in (storage[:100], storage[28:]):
        with pytest.raises(LaunchError):
            _double[(2,)](before_or_after, out, 128, True, True, BLOCK=64)
    with pytest.raises(LaunchError, match="in x_ptr, which has no element"):
        _shift[(1,)](storage[1:1], 4)


def test_a_run_into_the_neighbouring_tensor_is_out_of_bounds():
    buffer = torch.randn(200)
    with pytest.raises(LaunchError, match="28 of 64 .* the first 0 bytes past the end of x_ptr"):
        double(buffer[:100], buffer[100:], mask_load=False)


def test_expanded_and_strided_views_reach_by_their_strides():
    column = torch.randn(64, 4)[:, 1]  # 64 elements over a span of 253
    _double[(1,)](column, torch.empty(256), 253, True, True, BLOCK=256)
    with pytest.raises(LaunchError, match="1 of 254"):
        _double[(1,)](column, torch.empty(256), 254, True, True, BLOCK=256)
    expanded = torch.randn(1).expand(64)
    with pytest.raises(LaunchError, match="63 of 64"):
        double(expanded, torch.empty(64))


def test_a_span_of_billions_is_cheap():
    stride = 1 << 32
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, stride + 64, flags=flags), dtype=torch.int8)
    x = memory.as_strided((2, 64), (stride, 1))
    x.copy_(torch.arange(128).view(2, 64))
    out = torch.empty(2, 64, dtype=torch.int8)
    _copy_rows[(2,)](x, out, stride, BLOCK=64)
    assert torch.equal(out, x)
    with pytest.raises(LaunchError, match="64 of 64"):
        _copy_rows[(3,)](x, out, stride, BLOCK=64)


@pytest.mark.parametrize("rows, out_rows", [(24, 24), (40, 24), (24, 40)])
def test_device_descriptors(rows, out_rows):
    x, out = torch.randn(24, 16), torch.zeros(24, 16)

    def launch():
        _descriptor_copy[(3,)](x, out, rows, out_rows, COLS=16, BLOCK=16)

    if rows == out_rows == 24:
        launch()
        assert torch.equal(out, x)
        return
    with pytest.raises(LaunchError, match="128 of 256 active lanes out of bounds") as caught:
        launch()
    assert caught.value.kind == ("load" if rows > 24 else "store")
    assert caught.value.program == (1, 0, 0)


def test_host_descriptors():
    x, out = torch.randn(24, 16), torch.zeros(24, 16)
    described = [TensorDescriptor(t, [24, 16], [16, 1], [16, 16]) for t in (x, out)]
    _host_descriptor_copy[(2,)](*described, BLOCK=16)
    assert torch.equal(out, x)
    too_long = TensorDescriptor(x, [30, 16], [16, 1], [16, 16])
    with pytest.raises(LaunchError, match="96 of 224 active lanes out of bounds"):
        _host_descriptor_copy[(2,)](too_long, described[1], BLOCK=16)


def test_two_programs_store_one_address():
    with pytest.raises(LaunchError, match=r"store by program \(1, 0, 0\): race: 1 of 1 .* by program \(0, 0, 0\)"):
        _everyone_stores[(2,)](torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_load_store_race_is_found_in_either_order(order):
    x = torch.randn(8)
    kind = {"forward": "store", "reverse": "load"}[order]  # of what the neighbour has loaded, or has stored
    with checked_launches(order), pytest.raises(LaunchError, match="race") as caught:
        _shift[(8,)](x, 8)
    assert caught.value.kind == kind


def test_wide_stores_into_narrow_tensors_are_seen_whole():
    x = torch.arange(4, dtype=torch.int16)
    out = torch.zeros(8, dtype=torch.int16)
    _widen[(4,)](x, out)
    assert out.tolist() == [0, 0, 1, 0, 2, 0, 3, 0]
    with pytest.raises(LaunchError, match="out of bounds"):
        _widen[(4,)](x, out[:7])


def test_atomics():
    x, out = torch.ones(16), torch.zeros(1)
    _atomic_sum[(16,)](x, out)
    assert out.item() == 16
    with pytest.raises(LaunchError, match="race: 1 of 1 elements loaded"):  # by the second program's atomic
        _atomic_then_load[(4,)](torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
    with pytest.raises(LaunchError, match="2 of 8 active lanes out of bounds") as caught:
        _atomic_off_the_end[(1,)](torch.zeros(6))
    assert caught.value.kind == "atomic"


def test_overlapping_arguments_are_one_region():
    qkv = torch.randn(3, 64)
    _double[(1,)](qkv[0], qkv[1], 64, True, True, BLOCK=64)  # two slices of one buffer: no race, in bounds
    with pytest.raises(LaunchError, match="race"):
        _double[(2,)](qkv.view(-1)[:128], qkv.view(-1)[64:], 128, True, True, BLOCK=64)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_every_program_runs_once_in_any_order(order):
    out = torch.empty(2, 3, 4, dtype=torch.int32)
    with checked_launches(order, seed=3) as record:
        _program_ids[(2, 3, 4)](out)
    assert out.tolist() == [[[100 * x + 10 * y + z for z in range(4)] for y in range(3)] for x in range(2)]
    assert record.lanes == 24


def test_order_dependence_is_found():
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])

    def atomic_sum():
        out = torch.zeros(1)
        _atomic_sum[(4,)](values, out)
        return out

    with pytest.raises(AssertionError, match="output 0 depends on the order of programs"):
        assert_order_independent(atomic_sum)

    def doubled():
        out = torch.empty(4)
        double(values, out)
        return out, None

    assert torch.equal(assert_order_independent(doubled)[0], 2 * values)


def test_no_launch_is_not_a_pass():
    with pytest.raises(AssertionError, match="no kernel was launched"):
        assert_order_independent(lambda: torch.zeros(1))


def test_unknown_order():
    with pytest.raises(ValueError, match="order must be one of forward, reverse, shuffled, got 'random'"):
        with checked_launches("random"):
            pass


def test_nested_blocks_and_errors_leave_the_interpreter_as_it_was(launches):
    from triton.runtime.interpreter import GridExecutor

    outer = GridExecutor.__call__
    with pytest.raises(LaunchError), checked_launches("reverse") as inner:
        double(torch.randn(10), torch.empty(9))
    assert inner.count == 1 and launches.count == 0
    assert GridExecutor.__call__ is outer
    double(torch.randn(10), torch.empty(10))
    assert launches.count == 1


def test_other_exceptions_of_the_kernel_pass_through():
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def _broken(x_ptr):
        tl.load(x_ptr + tl.arange(0, 4)) + tl.arange(0, 8)

    with pytest.raises(InterpreterError, match="(?i)shape|broadcast"):
        _broken[(1,)](torch.zeros(4))
