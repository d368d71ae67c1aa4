"""Maps the repository's folders onto import names, and builds what csrc/ holds; everything else about the package is in pyproject.toml.

`kernels/` installs as fastattn.kernels and `benchmarks/` as fastattn.benchmarks, since top-level packages of those
names would shadow other people's. The page pool needs pybind11 and a C++17 compiler, and no torch; the CPU operators need
torch and the compiler, and run under any torch from 2.10 on. Without them the wheel is pure Python (py3-none-any) and
complete, since a Python pool and torch's own ops stand in. pybind11 has no limited API, so a wheel with the compiled pool
is tagged for one Python version, never abi3. The CUDA operators need nvcc too, but no GPU and no CUDA build of torch.

Environment variables of a build, beside the compilers' own CC, CXX, CFLAGS and LDFLAGS:

    FASTATTN_CUDA=0        leave the CUDA operators out; 1: build them whatever torch this is, and fail where they cannot be built
    FASTATTN_CUDA_ARCHS    what they are compiled for, "80;90a;100a;120" where nvcc knows these; and PTX of the lowest
    CUDA_HOME              the CUDA toolkit, where it is not the one that nvcc on the path belongs to
    MAX_JOBS               how many sources ninja compiles at a time
"""

import glob
import os
import re
import shutil
import subprocess
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
    why = no_torch() or (None if compiles(Extension) else NO_COMPILER)
    if why:
        return without(what, why)
    return [
        Extension(
            "fastattn._C",
            sorted(glob.glob("csrc/cpu/*.cpp")),
            depends=glob.glob("csrc/cpu/*.hpp") + glob.glob("csrc/cpu/*.inl"),
            # Functions choose an instruction set when they run; errno and traps, for which nobody asks, would keep them scalar.
            extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
            optional=True,  # a compiler that cannot build them is no reason not to install
            **over_torch(),
        )
    ]


def cuda_operators() -> list[Extension]:
    """fastattn._cuda, the same for CUDA tensors: where torch has CUDA, or they are asked for, as for a wheel that others install."""
    asked = os.environ.get("FASTATTN_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"fastattn: FASTATTN_CUDA must be 0 or 1, got {asked!r}")
    home = cuda_home()
    why = "turned off by FASTATTN_CUDA=0" if asked == "0" else no_torch()
    why = why or (None if asked == "1" or torch_has_cuda() else "this torch has no CUDA (FASTATTN_CUDA=1 builds them for another)")
    why = why or (None if home else "there is no nvcc, and no CUDA_HOME that has one")
    why = why or (None if compiles(Extension) else NO_COMPILER)
    if why:
        if asked == "1":
            sys.exit(f"fastattn: FASTATTN_CUDA=1, but the CUDA operators cannot be built: {why}")
        return without("compiled CUDA operators, for which Triton's kernels stand in", why)

    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home  # torch takes a script that calls nvcc for nvcc itself
    torch_ = over_torch()
    # A plain Extension: CUDAExtension links what a CPU build of torch lacks. No symbol is libtorch's own, so that a linker would drop it,
    # but in a CUDA build of torch it is what brings libtorch_cuda, whose symbols these are.
    torch_["include_dirs"] += [os.path.join(home, "include")]
    torch_["library_dirs"] += [os.path.join(home, "lib64"), os.path.join(home, "lib")]
    torch_["libraries"] += ["cudart"]
    torch_["define_macros"] += [("USE_CUDA", None)]
    # What torch's build turns off in the toolkit's half-precision types, the kernels use.
    half = [f"-U__CUDA_NO_{name}__" for name in ("HALF_CONVERSIONS", "HALF_OPERATORS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")]
    return [
        Extension(
            "fastattn._cuda",
            ["csrc/cuda/bindings.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))],
            depends=glob.glob("csrc/cuda/*.hpp") + glob.glob("csrc/common/*.hpp"),
            extra_compile_args={
                "cxx": ["-std=c++17", "-O3", "-Wno-psabi"],
                "nvcc": ["-std=c++17", "-O3", "--threads=2", *half, *architectures(home)],
            },
            extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
            optional=asked != "1",
            **torch_,
        )
    ]


def no_torch() -> str | None:
    """Why nothing can be built over torch's stable ABI, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed where this is built (pip install --no-build-isolation)"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"they need torch 2.10, this is {torch.__version__}"
    return "they need GCC or Clang" if os.name == "nt" else None


def torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def over_torch() -> dict:
    """What an extension over torch's stable ABI, that of 2.10, is compiled and linked with."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return {
        "include_dirs": include_paths(),
        "library_dirs": library_paths(),
        "libraries": ["torch", "torch_cpu", "c10"],
        "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000")],
        "language": "c++",
    }


def cuda_home() -> str | None:
    """The folder of the CUDA toolkit. nvcc on the path may be a script that calls it, so it is asked."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME")
    if home is None and nvcc is not None:
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"TOP=(\S+)", said)
        home = os.path.normpath(top[1] if top else os.path.join(os.path.realpath(nvcc), "..", ".."))
    return home if home and os.path.exists(os.path.join(home, "bin", "nvcc")) else None


def architectures(home: str) -> list[str]:
    """nvcc's flags: machine code for each architecture, and of the lowest one PTX, which later parts compile when they load it."""
    wanted = os.environ.get("FASTATTN_CUDA_ARCHS")
    archs = [arch.strip() for arch in (wanted or "80;90a;100a;120").split(";") if arch.strip()]
    if not wanted:
        nvcc = os.path.join(home, "bin", "nvcc")
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        unknown = [arch for arch in archs if f"sm_{arch.rstrip('af')}" not in known]
        if unknown:
            without(f"compiled CUDA operators for {', '.join(unknown)}", f"{nvcc} does not know them")
        archs = [arch for arch in archs if arch not in unknown]
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        sys.exit(f"fastattn: FASTATTN_CUDA_ARCHS must be such as '80;90a', got {wanted!r}")
    lowest = min(archs, key=lambda arch: int(arch.rstrip("af"))).rstrip("af")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*codes, f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]


def build_command(extensions: list[Extension]) -> dict:
    """The build_ext that drives nvcc, where there is something for it: torch's."""
    if all(extension.name != "fastattn._cuda" for extension in extensions):
        return {}
    from distutils.errors import CompileError  # setuptools' own copy

    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except RuntimeError as error:  # ninja's, which setuptools would not take for an optional extension's
                raise CompileError(str(error)) from error

    return {"build_ext": Build}


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

extensions = page_pool() + operators() + cuda_operators()
setup(packages=packages, package_dir=BESIDE, ext_modules=extensions, cmdclass=build_command(extensions))
