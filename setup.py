"""Maps the repository's folders onto import names, and builds what csrc/ holds; everything else about the package is in pyproject.toml.

`kernels/` installs as fastattn.kernels and `benchmarks/` as fastattn.benchmarks, since top-level packages of those
names would shadow other people's. The page pool needs pybind11 and a C++17 compiler, and no torch; the CPU operators need
torch and the compiler, and run under any torch from 2.10 on. Without them the wheel is pure Python (py3-none-any) and
complete, since a Python pool and torch's own ops stand in. pybind11 has no limited API, so a wheel with the compiled pool
is tagged for one Python version, never abi3.
"""

import glob
import os
import sys
import tempfile
from collections.abc import Callable

from setuptools import Distribution, Extension, find_packages, setup

BESIDE = {"fastattn.kernels": "kernels", "fastattn.benchmarks": "benchmarks"}

PROBE = """
#include <Python.h>
#include <optional>
std::optional<int> found = PY_VERSION_HEX;
PyMODINIT_FUNC PyInit_probe() { return nullptr; }
"""


def page_pool() -> list[Extension]:
    """The page pool as an extension, or nothing, and a line that says why."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return without("compiled page pool, for which the Python one stands in", "pybind11 is not installed")
    # No -march: a wheel runs on other machines than the one that built it.
    options = {"cxx_std": 17, "extra_compile_args": ["-O3", "-DNDEBUG"]}
    if not compiles(lambda name, sources: Pybind11Extension(name, sources, **options)):
        return without("compiled page pool, for which the Python one stands in", NO_COMPILER)
    sources = ["csrc/page_pool/bindings.cpp", "csrc/page_pool/page_pool.cpp"]
    return [Pybind11Extension("fastattn._page_pool", sources, depends=["csrc/page_pool/page_pool.hpp"], **options)]


def operators() -> list[Extension]:
    """fastattn._C, CPU implementations of single operators over LibTorch's stable ABI, or nothing, and a line that says why.

    Built against any torch from 2.10 on it runs under any other.
    """
    what = "compiled CPU operators, for which torch's own ops stand in"
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        return without(what, "torch is not installed where this is built (pip install --no-build-isolation)")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return without(what, f"they need torch 2.10, this is {torch.__version__}")
    if os.name == "nt":
        return without(what, "they need GCC or Clang")
    if not compiles(Extension):
        return without(what, NO_COMPILER)
    return [
        Extension(
            "fastattn._C",
            sorted(glob.glob("csrc/cpu/*.cpp")),
            depends=glob.glob("csrc/cpu/*.hpp") + glob.glob("csrc/cpu/*.inl"),
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            # Functions choose an instruction set when they run; errno and traps, for which nobody asks, would keep them scalar.
            extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
            language="c++",
            optional=True,  # a compiler that cannot build them is no reason not to install
        )
    ]


NO_COMPILER = "there is no C++17 compiler with Python's headers, or it cannot link"


def without(what: str, why: str) -> list[Extension]:
    print(f"fastattn: left out the {what}: {why}", file=sys.stderr)
    return []


def compiles(extension: Callable[[str, list[str]], Extension]) -> bool:
    """Whether a small extension made this way compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write(PROBE)
        probe = extension("probe", [source])
        if "-std=c++17" not in (probe.extra_compile_args or []):
            probe.extra_compile_args = [*(probe.extra_compile_args or []), "-std=c++17"]
        return builds(probe, folder)


def builds(extension: Extension, folder: str) -> bool:
    """Whether an extension compiles and links, the way that setuptools builds them."""
    from distutils.errors import CCompilerError, DistutilsPlatformError  # setuptools' own copy

    from setuptools.command.build_ext import build_ext

    command = build_ext(Distribution({"ext_modules": [extension]}))
    command.build_temp = command.build_lib = folder
    try:
        command.ensure_finalized()
        command.run()
    except (CCompilerError, DistutilsPlatformError):
        return False
    return True


packages = find_packages(include=["fastattn", "fastattn.*"])
for name, folder in BESIDE.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=BESIDE, ext_modules=page_pool() + operators())
