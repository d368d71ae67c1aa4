"""The CUDA C++ kernels without a GPU: g++ builds them over the stand-in of csrc/cuda_on_cpu, whose checks, the sanitizers' and the values
are what they are held to here; nvcc compiles the same files for each architecture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from cuda_kernels import append_paged_kv, moe_routing, norm, paged_attention, probes, sampling, softmax
from cuda_on_cpu import (
    CSRC,
    SEEDS,
    Crash,
    Refused,
    call_here,
    check_apart,
    compile_all,
    compile_objects,
    judge,
    kernels_of,
    link,
    load,
    made_once,
)

KERNELS = (probes, append_paged_kv, moe_routing, norm, paged_attention, sampling, softmax)
CASES = [case for kernels in KERNELS for case in kernels.CASES]
FAR = [case for kernels in KERNELS for case in kernels.FAR]
IDS = [f"{i}-{case.name}".replace(" ", "_") for i, case in enumerate(CASES)]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Programs by name of build, and a library for this process; each made when first asked for."""
    made = {}

    def make(name, folder):
        objects = compile_all(name, folder)
        link(name, objects, folder / "replay")
        if name == "plain":
            link(name, objects, folder / "kernels.so")

    def get(name):
        if name not in made:
            folder = made_once(tmp_path_factory, f"cuda-{name}", lambda folder: make(name, folder))
            get.objects[name] = sorted(folder.glob("*.o"))
            made[name] = folder / "replay"
            if name == "plain":
                made["library"] = load(folder / "kernels.so")
        return made[name]

    get.objects = {}
    return get


@pytest.fixture(scope="session")
def library(build):
    build("plain")
    return build("library")


# --------------------------------------------------------------------------------------------------------------------
# Values.


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values_and_the_same_bits_in_every_order(library, case):
    answers = [call_here(library, case, seed) for seed in SEEDS]
    judge(case, answers[0])
    for seed, answer in zip(SEEDS, answers):
        assert answer == answers[0], f"seed {seed}"


def test_conversions_are_exact(library):
    case = probes.all_floats_case()
    judge(case, call_here(library, case, 0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", probes.misuse_cases(), ids=lambda case: case.name.split()[0])
def test_misuses_are_named_and_the_next_launch_is_right(library, case, seed):
    judge(case, call_here(library, case, seed))
    judge(CASES[0], call_here(library, CASES[0], seed))


def test_offsets_beyond_32_bits(build, tmp_path):
    check_apart(build("plain"), FAR, (0, 2), tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Memory, undefined behaviour, races.


@pytest.mark.more  # it takes a minute to compile
def test_address_and_undefined_behaviour(build, tmp_path):
    check_apart(build("asan"), [*CASES, *probes.misuse_cases(), *CASES[:4]], (0, 2), tmp_path)


def test_races_and_uninitialised_shared_memory(build, tmp_path):
    check_apart(build("races"), CASES, (0, 2, 3), tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# The compiler that they are for.


QUICK = ("norm.cu", "sm_90a")


@pytest.mark.parametrize(
    "source, arch",
    [
        pytest.param(source, arch, id=f"{source.name}-{arch}", marks=[] if (source.name, arch) == QUICK else pytest.mark.more)
        for source in kernels_of(CSRC)
        for arch in ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
    ],
)
def test_nvcc_spills_nothing(source, arch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    result = "-cubin" if arch == "sm_90a" else "-c"  # the host's part too, where there is time for it
    command = [nvcc, "-std=c++17", f"-arch={arch}", "-Werror=all-warnings", "-Xptxas=-v", result, str(source), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know {arch}")
    assert done.returncode == 0, done.stderr
    said = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(said) == done.stderr.count("Compiling entry function") > 0
    assert set(said) == {("0", "0", "0")}, done.stderr


# --------------------------------------------------------------------------------------------------------------------
# The checks themselves: each planted fault is caught by the checks that are there for it.

SEEDS_OF = {"plain": SEEDS, "asan": (0, 2), "races": (0, 2, 3)}
ALL = os.environ.get("FASTATTN_FAULTS") == "all"
FULL = (probes, norm)  # whose faults are all planted in any case


def planted(kernels) -> list:
    """(kernels, fault, build) of what is to be seen. Of later kernels, whose sources take longer to compile, as a sanitizer's up to a minute,
    a few, unless FASTATTN_FAULTS=all: the checks are the same."""
    pairs = [(kernels, fault, name) for fault in kernels.FAULTS for name in fault.caught]
    return pairs if ALL or kernels in FULL else [pair for pair in pairs if pair[2] != "asan"][:6]


PLANTED = [pair for kernels in KERNELS for pair in planted(kernels)]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.SOURCE)
def test_every_fault_has_its_place(kernels):
    for fault in kernels.FAULTS:
        assert (CSRC / fault.file).read_text().count(fault.old) == 1, f"{fault.name}: {fault.file} must hold its place once"
        assert fault.old != fault.new and set(fault.caught) <= set(SEEDS_OF)


@pytest.mark.parametrize(
    "kernels, fault, name",
    [pytest.param(*planted, marks=[] if planted[1].quick and planted[2] == "races" else pytest.mark.more) for planted in PLANTED],
    ids=[f"{name}-{kernels.__name__.split('.')[-1]}-{fault.name}".replace(" ", "_") for kernels, fault, name in PLANTED],
)
def test_a_planted_fault_is_caught(kernels, fault, name, build, tmp_path):
    build(name)
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / fault.file).read_text()
    (csrc / fault.file).write_text(text.replace(fault.old, fault.new))
    (changed,) = compile_objects(name, csrc, tmp_path, [csrc / kernels.SOURCE], warnings=False)
    clean = [o for o in build.objects[name] if o.name != changed.name]
    program = link(name, [changed, *clean], tmp_path / "replay")
    with pytest.raises((Crash, Refused, AssertionError)) as caught:
        check_apart(program, kernels.FAR if fault.far else kernels.CASES, SEEDS_OF[name], tmp_path)
    said = f"{caught.typename}: {caught.value}"
    assert re.search(fault.caught[name], said, re.DOTALL), said
