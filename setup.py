"""Maps the repository's folders onto import names, and builds what csrc/ holds; everything else about the package is in pyproject.toml.

`kernels/` installs as fastattn.kernels and `benchmarks/` as fastattn.benchmarks, since top-level packages of those
names would shadow other people's. The page pool needs pybind11 and a C++17 compiler, and no torch; without them the
wheel is pure Python (py3-none-any) and complete, since a Python pool stands in. pybind11 has no limited API, so a wheel
with the compiled one is tagged for one Python version, never abi3.
"""

import os
import sys
import sysconfig
import tempfile

from setuptools import Extension, find_packages, setup

BESIDE = {"fastattn.kernels": "kernels", "fastattn.benchmarks": "benchmarks"}

PROBE = """
#include <Python.h>
#include <optional>
std::optional<int> found = PY_VERSION_HEX;
"""


def page_pool() -> list[Extension]:
    """The page pool as an extension, or nothing, and a line that says why."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return without_page_pool("pybind11 is not installed")
    sources = ["csrc/page_pool/bindings.cpp", "csrc/page_pool/page_pool.cpp"]
    flags = ["-O3", "-DNDEBUG"]  # no -march: a wheel runs on other machines than the one that built it
    extension = Pybind11Extension(
        "fastattn._page_pool", sources, depends=["csrc/page_pool/page_pool.hpp"], cxx_std=17, extra_compile_args=flags
    )
    if not compiles(PROBE, extension.extra_compile_args):
        return without_page_pool("there is no C++17 compiler with Python's headers")
    return [extension]


def without_page_pool(why: str) -> list[Extension]:
    print(f"fastattn: left out the compiled page pool, for which the Python one stands in: {why}", file=sys.stderr)
    return []


def compiles(code: str, flags: list[str]) -> bool:
    from distutils.ccompiler import new_compiler  # setuptools' own copy
    from distutils.errors import CCompilerError, DistutilsPlatformError
    from distutils.sysconfig import customize_compiler

    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.cpp")
        with open(source, "w") as file:
            file.write(code)
        try:
            compiler = new_compiler()
            customize_compiler(compiler)
            include = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
            compiler.compile([source], output_dir=folder, include_dirs=include, extra_postargs=flags)
        except (CCompilerError, DistutilsPlatformError):
            return False
    return True


packages = find_packages(include=["fastattn", "fastattn.*"])
for name, folder in BESIDE.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=BESIDE, ext_modules=page_pool())
