"""Maps the repository's folders onto import names, and builds what csrc/ holds; everything else about the package is in pyproject.toml.

`kernels/` installs as fastattn.kernels and `benchmarks/` as fastattn.benchmarks, since top-level packages of those
names would shadow other people's. The page pool needs pybind11 and a C++17 compiler, and no torch; without them the
wheel is pure Python (py3-none-any) and complete, since a Python pool stands in. pybind11 has no limited API, so a wheel
with the compiled one is tagged for one Python version, never abi3.
"""

import os
import sys
import tempfile

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
        return without_page_pool("pybind11 is not installed")
    # No -march: a wheel runs on other machines than the one that built it.
    options = {"cxx_std": 17, "extra_compile_args": ["-O3", "-DNDEBUG"]}
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write(PROBE)
        if not builds(Pybind11Extension("probe", [source], **options), folder):
            return without_page_pool("there is no C++17 compiler with Python's headers, or it cannot link")
    sources = ["csrc/page_pool/bindings.cpp", "csrc/page_pool/page_pool.cpp"]
    return [Pybind11Extension("fastattn._page_pool", sources, depends=["csrc/page_pool/page_pool.hpp"], **options)]


def without_page_pool(why: str) -> list[Extension]:
    print(f"fastattn: left out the compiled page pool, for which the Python one stands in: {why}", file=sys.stderr)
    return []


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

setup(packages=packages, package_dir=BESIDE, ext_modules=page_pool())
