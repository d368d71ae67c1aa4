"""The stub driver must compile for every part, record faithfully, and refuse what a GPU would refuse."""

import threading

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from fastattn.testing.stub_driver import (  # noqa: E402
    HostSync,
    LaunchRefused,
    StubDriver,
    compiled_variants,
    no_host_sync,
    stub_driver,
)

CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]


@triton.jit
def _double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit(do_not_specialize=["n"])
def _double_any_n(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


@triton.jit
def _descriptor_copy(x_ptr, out_ptr, rows, COLS: tl.constexpr, BLOCK: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, [rows, COLS], [COLS, 1], [BLOCK, COLS])
    out_desc = tl.make_tensor_descriptor(out_ptr, [rows, COLS], [COLS, 1], [BLOCK, COLS])
    row = tl.program_id(0) * BLOCK
    out_desc.store([row, 0], x_desc.load([row, 0]))


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, cols, ks = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + k + ks[None, :])
        b = tl.load(b_ptr + (k + ks)[:, None] * BLOCK + cols[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows[:, None] * BLOCK + cols[None, :], acc)


def launch_double(kernel=_double, n=100, **meta):
    x = torch.randn(n)
    out = torch.zeros(n)
    kernel[(triton.cdiv(n, 64),)](x, out, n, BLOCK=64, enable_fp_fusion=True, **meta)
    return x, out


def launch_matmul(num_stages):
    a, b = torch.zeros(128, 512, dtype=torch.float16), torch.zeros(512, 128, dtype=torch.float16)
    c = torch.zeros(128, 128)
    _matmul[(1,)](a, b, c, 512, BLOCK=128, BLOCK_K=64, num_stages=num_stages, num_warps=8, enable_fp_fusion=True)


def launch_descriptors():
    _descriptor_copy[(2,)](torch.zeros(64, 64), torch.zeros(64, 64), 64, COLS=64, BLOCK=32, enable_fp_fusion=True)


def set_allocator():
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))


def in_fresh_thread(run):
    """Run where Triton's allocator is unset, and give the exception, if any."""
    caught = []

    def target():
        try:
            run()
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return caught[0] if caught else None


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_for_the_part_records_and_launches_nothing(capability):
    with stub_driver(capability) as driver:
        x, out = launch_double(num_warps=2)
    (launch,) = driver.launches
    assert (launch.name, launch.grid, launch.num_warps) == ("_double", (2, 1, 1), 2)
    assert launch.args["x_ptr"] is x and launch.args["n"] == 100 and launch.args["BLOCK"] == 64
    arch = 10 * capability[0] + capability[1]
    assert launch.compiled.metadata.target.arch == arch
    assert f"sm_{arch}" in launch.compiled.asm["ptx"] and len(launch.compiled.asm["cubin"]) > 0
    assert out.count_nonzero() == 0


def test_the_former_driver_is_active_again():
    config = triton.runtime.driver
    former = config._active
    with stub_driver((8, 0)) as outer:
        with pytest.raises(ZeroDivisionError), stub_driver((9, 0)) as inner:
            assert config.active is inner
            raise ZeroDivisionError
        assert config.active is outer
    assert config._active is former and not isinstance(former, StubDriver)


def test_unknown_part():
    with pytest.raises(ValueError, match=r"capability must be one of 8.0, .*, got \(7, 5\)"), stub_driver((7, 5)):
        pass


def test_unknown_launch_option():
    with stub_driver(), pytest.raises(KeyError, match="num_stagez"):
        launch_double(num_stagez=2)


@pytest.mark.parametrize("grid, axis", [((2**31,), "x"), ((1, 65536), "y"), ((1, 1, 65536), "z"), ((1.0,), "x")])
def test_grid_limits(grid, axis):
    x = torch.zeros(64)
    with stub_driver() as driver:
        with pytest.raises(LaunchRefused, match=f"_double: grid {axis} must be an int in"):
            _double[grid](x, x, 64, BLOCK=64, enable_fp_fusion=True)
        assert driver.launches == []


def test_shared_memory_limit_is_the_parts():
    for capability in [(8, 0), (9, 0), (10, 0)]:
        with stub_driver(capability) as driver:
            launch_matmul(num_stages=5)
            assert 99 * 1024 < driver.launches[0].shared <= 163 * 1024
    for capability in [(8, 6), (8, 9), (12, 0)]:
        with stub_driver(capability), pytest.raises(OutOfResources, match="shared memory"):
            launch_matmul(num_stages=5)


def test_variants_are_counted_by_block():
    for _ in range(2):
        with stub_driver():
            for n in (1, 16, 17, 32, 33):
                launch_double(n=n)
                launch_double(_double_any_n, n=n)
            assert compiled_variants(_double) == 3  # n is 1, a multiple of 16, or neither
            assert compiled_variants(_double_any_n) == 1
            assert compiled_variants(_matmul) == 0
    with stub_driver((8, 0)):
        assert compiled_variants(_double) == 0


def test_variants_outside_a_block():
    with pytest.raises(RuntimeError):
        compiled_variants(_double)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_scratch_memory_needs_an_allocator_in_the_launching_thread(capability):
    with stub_driver(capability) as driver:
        error = in_fresh_thread(launch_descriptors)
        if capability < (9, 0):  # no TMA: descriptors are lowered to pointers, and need no scratch
            assert error is None and driver.launches[0].compiled.metadata.global_scratch_size == 0
            return
        assert isinstance(error, RuntimeError) and "no allocator was set" in str(error)

        def with_allocator():
            set_allocator()
            launch_descriptors()

        assert in_fresh_thread(with_allocator) is None
        assert driver.launches[-1].compiled.metadata.global_scratch_size > 0
        assert isinstance(in_fresh_thread(launch_descriptors), RuntimeError)  # another thread, unset again


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: int(x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.to("meta"),
        lambda x: torch.empty_like(x, device="meta").copy_(x),
        lambda x: torch.tensor([1, 2]),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
    ids=["item", "bool", "int", "tolist", "cpu", "numpy", "to", "copy_", "tensor", "nonzero", "equal"],
)
def test_host_syncs_are_refused(sync):
    with no_host_sync(), pytest.raises(HostSync):
        sync(torch.ones(()))


def test_what_stays_on_the_device_passes():
    with no_host_sync(), stub_driver():
        x = torch.ones(64)
        torch.randint(0, 2**62, (1,), device=x.device)
        y = (x + 1).to(torch.bfloat16).sum().new_empty(3).contiguous().clone()
        y.copy_(x[:3])
        launch_double()
