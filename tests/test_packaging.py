"""Every way of installing gives the same import names, in the checkout and outside, with the page pool compiled where that can be; the
hub's `kernels` stays itself.

An environment here is a virtual environment without pip that sees this process's site-packages through a path file:
torch need not be installed again, and an editable installation of fastattn that this process may run on is not seen.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = (".git", ".venv*", "build", "dist", "dump", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so")

# Stands for Hugging Face's package: what matters is whose `kernels` is found.
HUB_KERNELS = "MARK = 'the hub package'\n"

REPORT_IMPORTS = """
import os, fastattn, fastattn.kernels, fastattn.benchmarks, fastattn.cli, fastattn.page_pool
import fastattn.ops.attention, fastattn.flash_attn.bert_padding, fastattn.integrations
from fastattn.kernels import tiles
for module in (fastattn, fastattn.kernels, fastattn.benchmarks):
    print(module.__name__, os.path.realpath(module.__file__), sep="=")
compiled = fastattn.page_pool.compiled
print("fastattn._page_pool", compiled and os.path.realpath(compiled.__file__), sep="=")
import kernels
assert kernels.MARK == "the hub package", kernels.__file__
"""


def run(*command: str | Path, cwd: Path, stderr: bool = False, **variables: str) -> str:
    """The standard output of a command that succeeds, and its standard error too if asked for."""
    argv = [str(part) for part in command]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH", "TRITON_INTERPRET")}
    done = subprocess.run(argv, cwd=cwd, env=env | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr if stderr else done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, since building writes into the tree."""
    copy = tmp_path_factory.mktemp("checkout") / "fastattn"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def archives(checkout: Path) -> dict[str, Path]:
    """The wheel and the source archive."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77")
    backend = "import setuptools.build_meta as build; build.build_wheel('dist'); build.build_sdist('dist')"
    run(sys.executable, "-c", backend, cwd=checkout)
    (wheel,) = (checkout / "dist").glob("*.whl")
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    shutil.rmtree(checkout / "build")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh environment's Python, with a stand-in for the hub's `kernels` installed."""
    venv.create(tmp_path / "env", symlinks=os.name != "nt")
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "outer.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(HUB_KERNELS)
    return python


def pip_install(python: Path, *what: str | Path, cwd: Path) -> None:
    pytest.importorskip("pip", reason="needs pip")
    offline = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, *what, cwd=cwd)


def origins(python: Path, cwd: Path) -> dict[str, Path]:
    """Import everything in a fresh process; which folder each package came from, and the compiled page pool if there was one."""
    lines = [line.partition("=") for line in run(python, "-c", REPORT_IMPORTS, cwd=cwd).splitlines()]
    return {name: Path(origin).parent for name, _, origin in lines if origin != "None"}


def in_place(checkout: Path, compiled: bool = False) -> dict[str, Path]:
    packages = {
        "fastattn": checkout / "fastattn",
        "fastattn.kernels": checkout / "kernels",
        "fastattn.benchmarks": checkout / "benchmarks",
    }
    return packages | ({"fastattn._page_pool": checkout / "fastattn"} if compiled else {})


def need_compiler() -> None:
    pytest.importorskip("pybind11", reason="needs pybind11")
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"  # as setuptools chooses
    if shutil.which(shlex.split(command)[0]) is None:
        pytest.skip("needs a C++17 compiler")


def check_tag(wheel: Path) -> None:
    """A module for one Python makes a wheel for that Python: tagged otherwise, it would be installed where it cannot be imported."""
    *_, python, abi, platform = wheel.stem.split("-")
    with zipfile.ZipFile(wheel) as archive:
        modules = [Path(name).name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
    pythons = {module.split(".")[1].split("-")[1] for module in modules if "cpython-" in module}
    assert not pythons or (python, abi) == ("cp" + min(pythons),) * 2, f"{wheel.name} holds {modules}"
    assert (platform == "any") == (not modules), f"{wheel.name} holds {modules}"


def sources(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}


def test_wheel_holds_every_module_under_its_import_name(archives):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if name.endswith(".py")}
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
        assert "fastattn/benchmarks/report.html.j2" in wheel.namelist()
    beside = {f"fastattn/{name}" for folder in ("kernels", "benchmarks") for name in sources(folder)}
    assert names == sources("fastattn") | beside
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert {line for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        f"Provides-Extra: {extra}" for extra in ("bench", "hf", "models", "test", "wheel")
    }


def compiled_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name.removesuffix(sysconfig.get_config_var("EXT_SUFFIX")) for name in archive.namelist() if name.endswith((".so", ".pyd"))}


def test_wheel_is_tagged_for_the_python_of_its_page_pool(archives):
    need_compiler()
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in archives["wheel"].name
    assert compiled_in(archives["wheel"]) == {"fastattn/_page_pool", "fastattn/_C"}
    check_tag(archives["wheel"])


@pytest.mark.parametrize("tag", ["cp310-abi3-linux_x86_64", "cp312-cp312-linux_x86_64", "py3-none-any"])
def test_a_wheel_for_other_pythons_than_its_page_pools_is_refused(tag, tmp_path):
    wheel = tmp_path / f"fastattn-0.1.0-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fastattn/_page_pool.cpython-311-x86_64-linux-gnu.so", b"")
    with pytest.raises(AssertionError, match="holds"):
        check_tag(wheel)


UNBUILT = "there is no C++17 compiler with Python's headers, or it cannot link"
LEFT_OUT = {
    "fastattn/_page_pool": "fastattn: left out the compiled page pool, for which the Python one stands in: ",
    "fastattn/_C": "fastattn: left out the compiled CPU operators, for which torch's own ops stand in: ",
}
# What is not there when the wheel is built: how so, what is left out, and why.
WITHOUT = {
    "pybind11": ("sys.modules['pybind11'] = None", {}, ["fastattn/_page_pool"], "pybind11 is not installed"),
    "torch": (
        "sys.modules['torch'] = None", {}, ["fastattn/_C"], "torch is not installed where this is built (pip install --no-build-isolation)"
    ),
    "compiler": ("", {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}, LEFT_OUT, UNBUILT),
    "linker": ("", {"LDFLAGS": "-lthere_is_no_such_library"}, LEFT_OUT, UNBUILT),
}  # fmt: skip


@pytest.mark.parametrize("missing", WITHOUT)
def test_wheel_without_what_cannot_be_compiled(missing, checkout, tmp_path):
    """It says so; and with nothing compiled in it, it is for every Python."""
    need_compiler()
    before, variables, left_out, reason = WITHOUT[missing]
    build = f"import sys; {before}\nimport setuptools.build_meta as build; build.build_wheel({str(tmp_path)!r})"
    output = run(sys.executable, "-c", build, cwd=checkout, stderr=True, **variables)
    for name, message in LEFT_OUT.items():
        assert (f"{message}{reason}\n" in output) == (name in left_out)
    (wheel,) = tmp_path.glob("*.whl")
    assert compiled_in(wheel) == LEFT_OUT.keys() - set(left_out)
    assert wheel.name.endswith("-py3-none-any.whl") == (len(left_out) == 2)
    check_tag(wheel)
    shutil.rmtree(checkout / "build")


def test_sdist_holds_what_a_build_and_a_test_run_need(archives):
    with tarfile.open(archives["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("fastattn", "kernels", "benchmarks", "tests", "examples")
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt", "csrc/README.md"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.?pp")}
    assert wanted.union(*map(sources, folders)) <= names


def test_root_on_the_path_leaves_the_hubs_kernels_alone(environment, checkout):
    """`python -c`, `python -m pytest` and plain scripts put the repository's root first on sys.path."""
    run(environment, "-c", "import kernels; assert kernels.MARK == 'the hub package'", cwd=checkout)
    probe = checkout / "tests" / "probe_kernels.py"
    probe.write_text("import kernels\n\ndef test_mark():\n    assert kernels.MARK == 'the hub package'\n")
    options = ("-q", "-p", "no:cacheprovider", "--noconftest")
    assert "1 passed" in run(environment, "-m", "pytest", *options, probe, cwd=checkout)


def test_without_the_hubs_kernels_the_name_is_an_empty_namespace(checkout):
    code = """
import kernels
assert kernels.__file__ is None and list(kernels.__path__) == [], kernels
try:
    import kernels.attention
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the kernels imported a second time, under a wrong name")
"""
    # -S: no site-packages, where the real one may be installed.
    run(sys.executable, "-S", "-c", code, cwd=checkout)


def test_transformers_takes_the_namespace_for_no_installation(checkout):
    pytest.importorskip("transformers", reason="needs transformers")
    code = """
import importlib.metadata
from transformers.utils import is_kernels_available
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    assert not is_kernels_available()
"""
    run(sys.executable, "-c", code, cwd=checkout)


@pytest.mark.more
def test_checkout_without_an_installation(environment, checkout):
    assert origins(environment, checkout) == in_place(checkout)


@pytest.mark.more
@pytest.mark.parametrize("mode", ["normal", "wheel", "sdist"])
def test_installed(mode, environment, checkout, archives, tmp_path):
    need_compiler()
    pip_install(environment, checkout if mode == "normal" else archives[mode], cwd=tmp_path)
    outside = origins(environment, tmp_path)
    installed = outside["fastattn"]
    assert tmp_path in installed.parents
    assert outside == {
        "fastattn": installed,
        "fastattn.kernels": installed / "kernels",
        "fastattn.benchmarks": installed / "benchmarks",
        "fastattn._page_pool": installed,
    }
    # The root of a checkout on sys.path wins over the installation, and must do so as a whole.
    assert origins(environment, checkout) == in_place(checkout)
    assert "bench" in run(environment.with_name("fastattn"), "--help", cwd=tmp_path)
    shutil.rmtree(checkout / "build", ignore_errors=True)


@pytest.mark.more
@pytest.mark.parametrize("mode", ["default", "compat", "strict"])
def test_editable(mode, environment, checkout, tmp_path):
    need_compiler()
    settings = () if mode == "default" else ("--config-settings", f"editable_mode={mode}")
    pip_install(environment, *settings, "-e", checkout, cwd=tmp_path)
    assert origins(environment, checkout) == in_place(checkout, compiled=True)
    outside = origins(environment, tmp_path)
    if mode == "strict":  # outside, a folder of links to the files, and of what was built
        assert outside["fastattn.kernels"].name == "kernels" and "fastattn._page_pool" in outside
    else:
        assert outside == in_place(checkout, compiled=True)
    shutil.rmtree(checkout / "build", ignore_errors=True)
    for built in (checkout / "fastattn").glob("*.so"):
        built.unlink()
