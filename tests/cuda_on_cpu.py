"""Kernels of csrc/cuda built by g++ over the stand-in of csrc/cuda_on_cpu: builds, cases, calls in this process and in one of their own."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SEEDS = (0, 1, 2, 3, 4)  # threads ascending, descending, and three times shuffled
GUARD = 64  # bytes before and after a buffer in this process, which nobody may write

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = {F32: 0, F16: 1, BF16: 2}
NAN = float("nan")

# no-strict-aliasing: nvcc has none either.
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@dataclass(frozen=True)
class Build:
    """Flags of all sources, and of the kernels alone."""

    all: Sequence[str]
    kernels: Sequence[str] = ()
    link: Sequence[str] = ()
    runtime: Sequence[str] = ("runtime.cpp", "exports.cpp", "replay.cpp")


BUILDS = {
    "plain": Build(["-O2"]),
    "asan": Build(["-O1", *SANITIZE], link=SANITIZE),
    # The kernels' accesses call races.cpp; libtsan is not linked.
    "races": Build(
        ["-O1", "-DCUDA_ON_CPU_RACES"], ["-fsanitize=thread"], runtime=("runtime.cpp", "exports.cpp", "replay.cpp", "races.cpp")
    ),
}


def _call(command: Sequence[str], timeout: float = 300) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip(f"needs the sanitizers' libraries: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def kernels_of(csrc: Path) -> list[Path]:
    return [*sorted((csrc / "cuda").glob("*.cu")), csrc / "cuda_on_cpu" / "probes.cu"]


def compile_objects(
    name: str, csrc: Path, folder: Path, sources: Sequence[Path], warnings: bool = True, flags: Sequence[str] = ()
) -> list[Path]:
    """Object files of one build, side by side in `folder`."""
    build = BUILDS[name]
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    objects = []
    for source in sources:
        is_kernel = source.suffix == ".cu"
        target = folder / (source.name + ".o")
        mine = [*(build.kernels if is_kernel else ()), *([] if warnings else ["-w"])]
        _call([compiler, *FLAGS, "-DFASTATTN_CUDA_ON_CPU", *build.all, *mine, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        objects.append(target)
    return objects


def link(name: str, objects: Sequence[Path], target: Path) -> Path:
    """The replay program, or, where target ends in .so, a library for ctypes."""
    shared = ["-shared"] if target.suffix == ".so" else []
    named = [str(o) for o in objects if not (shared and o.name == "replay.cpp.o")]
    _call([shutil.which("g++"), *shared, *BUILDS[name].link, *named, "-o", str(target), "-ldl"])
    return target


def compile_all(name: str, folder: Path, csrc: Path = CSRC) -> list[Path]:
    return compile_objects(name, csrc, folder, [*kernels_of(csrc), *(csrc / "cuda_on_cpu" / s for s in BUILDS[name].runtime)])


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, the same one for all of pytest's processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = tmp_path_factory.mktemp(name)
            make(partial)
            partial.rename(folder)
    return folder


def build_operators(folder: Path, *flags: str) -> Path:
    """csrc/cuda's operators of torch, for CPU tensors."""
    from torch.utils.cpp_extension import include_paths, library_paths

    kernels = compile_objects("plain", CSRC, folder, [*kernels_of(CSRC)[:-1], CSRC / "cuda_on_cpu" / "runtime.cpp"], flags=flags)
    target = folder / "operators.so"
    command = [shutil.which("g++"), *FLAGS, "-O2", "-shared", "-DFASTATTN_CUDA_ON_CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    _call([*command, str(CSRC / "cuda" / "bindings.cpp"), *map(str, kernels), "-o", str(target), "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"])
    return target


def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.cuda_on_cpu_call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64]
    lib.cuda_on_cpu_call.restype = ctypes.c_char_p
    return lib


# --------------------------------------------------------------------------------------------------------------------
# Cases.


class Refused(Exception):
    """What a launcher answered: an error code, or a misuse that the runtime found."""


def span(t: Tensor) -> int:
    """How many of its elements' places lie from t's first to its last."""
    return 0 if t.numel() == 0 else 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))


@dataclass
class Buffer:
    """The memory of a tensor, gaps between its rows and all, and the fields of the params struct that point to it.

    lead: how many bytes after a multiple of 16 it begins. sparse: rows lie far apart, and what is between them is never touched.
    """

    tensor: Tensor
    fields: tuple[str, ...]
    written: bool
    lead: int = 0
    sparse: int = 0  # bytes from row to row, of a tensor that holds the rows packed

    def bytes(self) -> bytes:
        t = self.tensor
        return ctypes.string_at(t.data_ptr(), span(t) * t.element_size()) if t.numel() else b""

    def tensor_of(self, data: bytes) -> Tensor:
        """A tensor such as `tensor`, of memory that a kernel has written to. What lies between its rows must be as it was."""
        t = self.tensor
        if t.numel() == 0:
            return t.clone()
        flat, before = (torch.frombuffer(bytearray(d), dtype=t.dtype) for d in (data, self.bytes()))
        gaps = torch.ones(flat.shape, dtype=torch.bool)
        gaps.as_strided(t.shape, t.stride()).fill_(False)
        raw, raw_before = (d.view(torch.uint8).view(-1, t.element_size()) for d in (flat, before))
        assert torch.equal(raw[gaps], raw_before[gaps]), f"{self.fields[0]}: written between its rows"
        return flat.as_strided(t.shape, t.stride())


@dataclass
class Case:
    """A call of a launcher, and the judge of what it wrote: `judge(**tensors)` of the written buffers' first fields."""

    name: str
    op: str
    params: ctypes.Structure
    buffers: list[Buffer]
    judge: Callable[..., None]
    answer: str = ""  # a pattern of what a launch that must be refused answers

    def offset(self, name: str) -> int:
        return getattr(type(self.params), name).offset


def nothing(*shape: int, dtype: torch.dtype = F32, gap: int = 0) -> Tensor:
    """NaN, or the largest int: what a kernel must overwrite. gap: that many elements more between rows."""
    fill = NAN if dtype.is_floating_point else torch.iinfo(dtype).max
    rows = torch.full((*shape[:-1], shape[-1] + gap), fill, dtype=dtype)
    return rows[..., : shape[-1]]


def spread(t: Tensor, gap: int) -> Tensor:
    """The same rows with gaps of NaN between them."""
    rows = nothing(*t.shape, dtype=t.dtype, gap=gap)
    rows.copy_(t)
    return rows


@dataclass
class Answer:
    message: str
    data: list[bytes] = field(default_factory=list)  # of the written buffers


def call_here(library: ctypes.CDLL, case: Case, seed: int) -> Answer:
    """In this process, on fresh copies of the case's buffers with guards around them."""
    params = type(case.params).from_buffer_copy(case.params)
    memory = []
    for buffer in case.buffers:
        assert not buffer.sparse
        data = buffer.bytes()
        room = ctypes.create_string_buffer(b"\xa5" * (len(data) + buffer.lead + 2 * GUARD + 16))
        address = (ctypes.addressof(room) + GUARD + 15) // 16 * 16 + buffer.lead
        start = address - ctypes.addressof(room)
        ctypes.memmove(address, data, len(data))
        for name in buffer.fields:
            setattr(params, name, address)
        memory.append((room, start, len(data)))
    message = library.cuda_on_cpu_call(case.op.encode(), ctypes.addressof(params), ctypes.sizeof(params), seed)
    answer = Answer((message or b"").decode())
    for buffer, (room, start, size) in zip(case.buffers, memory):
        around = room.raw[:start] + room.raw[start + size : -1]
        assert around == b"\xa5" * len(around), f"{case.name}: {buffer.fields[0]}: written outside"
        if buffer.written:
            answer.data.append(room.raw[start : start + size])
        else:
            assert room.raw[start : start + size] == buffer.bytes(), f"{case.name}: an input, {buffer.fields[0]}, is written to"
    return answer


def _words(*numbers: int) -> bytes:
    return struct.pack(f"{len(numbers)}Q", *numbers)


def recorded(case: Case, seed: int) -> bytes:
    """The case as replay.cpp reads it."""
    op, params = case.op.encode(), bytes(case.params)
    parts = [_words(len(op)), op, _words(len(params)), params, _words(seed, len(case.buffers))]
    for buffer in case.buffers:
        data = buffer.bytes()
        rows = len(buffer.tensor) if buffer.sparse else 1
        pointers = [word for name in buffer.fields for word in (case.offset(name), 0)]
        parts += [_words(rows, len(data) // rows, buffer.sparse, buffer.lead, len(buffer.fields), *pointers, buffer.written), data]
    return b"".join(parts)


class Crash(Exception):
    """What a process that died has said."""


def call_apart(program: Path, runs: Sequence[tuple[Case, int]], folder: Path, timeout: float = 120) -> list[Answer]:
    """In a process of their own: the answers of (case, seed) one by one. Crash where it does not return them all."""
    cases, answers = folder / "cases", folder / "answers"
    cases.write_bytes(b"".join(recorded(case, seed) for case, seed in runs))
    env = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "PATH": "/usr/bin:/bin"}
    try:
        done = subprocess.run([program, cases, answers], capture_output=True, text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        raise Crash(f"still running after {timeout} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error:" in line.lower() or line.startswith("SUMMARY")]
        raise Crash(f"exit {done.returncode}: " + ("; ".join(said) or done.stderr[-2000:] or "without a word"))
    data, at, results = answers.read_bytes(), 0, []

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    for case, _ in runs:
        answer = Answer(take(*struct.unpack("Q", take(8))).decode())
        answer.data = [take(len(buffer.bytes())) for buffer in case.buffers if buffer.written]
        results.append(answer)
    return results


def judge(case: Case, answer: Answer) -> None:
    """Refused unless the launch went as the case says; AssertionError where what it wrote is wrong."""
    if case.answer:
        assert re.search(case.answer, answer.message), f"{case.name}: must answer {case.answer!r}, got {answer.message!r}"
        return
    if answer.message:
        raise Refused(f"{case.name}: {answer.message}")
    written = [buffer for buffer in case.buffers if buffer.written]
    case.judge(**{buffer.fields[0]: buffer.tensor_of(data) for buffer, data in zip(written, answer.data)})


def check_apart(program: Path, cases: Sequence[Case], seeds: Sequence[int], folder: Path) -> None:
    """Every case under every seed in a process of its own: right, and the same bits each time. Crash, Refused or AssertionError."""
    runs = [(case, seed) for case in cases for seed in seeds]
    answers = call_apart(program, runs, folder)
    for at, (case, seed) in enumerate(runs):
        judge(case, answers[at])
        first = answers[at - at % len(seeds)]
        assert answers[at].data == first.data, f"{case.name}: other bits with seed {seed} than with {seeds[0]}"


# --------------------------------------------------------------------------------------------------------------------
# Faults, and what the checks say of them.

REDUCE, VECTOR = "common/reduce.hpp", "common/vector.hpp"
WARPS, LANES, BLOCKS, NOTHING = "race between warps", "race between lanes of a warp", "race between blocks", "holds nothing yet"
THREADS = f"{LANES}|{WARPS}"
OUTSIDE, CRASH = "(heap-buffer-overflow|out of bounds)", "Crash: "
WRONG = "AssertionError: "


@dataclass(frozen=True)
class Fault:
    """`old`, which `file` has once, becomes `new`. caught: by build, a pattern of what its run must end with."""

    name: str
    file: str
    old: str
    new: str
    caught: dict[str, str] = field(hash=False)
    quick: bool = False  # run by `make test`, not in `make test-more` alone
    far: bool = False  # seen by rows gigabytes apart
