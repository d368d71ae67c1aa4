"""The CUDA C++ kernels without a GPU: g++ builds them over the stand-in of csrc/cuda_on_cpu, whose checks, the sanitizers' and the values
are what they are held to here; nvcc compiles the same files for each architecture."""

from __future__ import annotations

import pytest
from cuda_cases import all_floats_case, far_norm_case, misuse_cases, norm_cases, probe_cases
from cuda_on_cpu import SEEDS, call_here, check_apart, compile_all, judge, link, load

CASES = [*probe_cases(), *norm_cases()]
IDS = [f"{i}-{case.name}".replace(" ", "_") for i, case in enumerate(CASES)]
LIGHT = [case for case in CASES if not case.heavy]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Programs by name of build, and a library for this process; each made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            objects = compile_all(name, folder)
            made[name] = link(name, objects, folder / "replay")
            if name == "plain":
                made["library"] = load(link(name, objects, folder / "kernels.so"))
        return made[name]

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
    case = all_floats_case()
    judge(case, call_here(library, case, 0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", misuse_cases(), ids=lambda case: case.name.split()[0])
def test_misuses_are_named_and_the_next_launch_is_right(library, case, seed):
    judge(case, call_here(library, case, seed))
    judge(CASES[0], call_here(library, CASES[0], seed))


def test_offsets_beyond_32_bits(build, tmp_path):
    check_apart(build("plain"), [far_norm_case()], (0, 2), tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Memory, undefined behaviour, races.


def test_address_and_undefined_behaviour(build, tmp_path):
    check_apart(build("asan"), [*LIGHT, *misuse_cases(), *LIGHT[:4]], (0, 2), tmp_path)


def test_races_and_uninitialised_shared_memory(build, tmp_path):
    check_apart(build("races"), LIGHT, (0, 2, 3), tmp_path)
