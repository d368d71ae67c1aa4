"""Every way of installing gives the same import names, in the checkout and outside; the hub's `kernels` stays itself.

An environment here is a virtual environment without pip that sees this process's site-packages through a path file:
torch need not be installed again, and an editable installation of fastattn that this process may run on is not seen.
"""

from __future__ import annotations

import os
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
NOT_SOURCE = (".git", ".venv*", "build", "dist", "dump", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")

# Stands for Hugging Face's package: what matters is whose `kernels` is found.
HUB_KERNELS = "MARK = 'the hub package'\n"

REPORT_IMPORTS = """
import os, fastattn, fastattn.kernels, fastattn.benchmarks, fastattn.cli
import fastattn.ops.attention, fastattn.flash_attn.bert_padding, fastattn.integrations
from fastattn.kernels import tiles
for module in (fastattn, fastattn.kernels, fastattn.benchmarks):
    print(module.__name__, os.path.realpath(module.__file__), sep="=")
import kernels
assert kernels.MARK == "the hub package", kernels.__file__
"""


def run(*command: str | Path, cwd: Path) -> str:
    argv = [str(part) for part in command]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH", "TRITON_INTERPRET")}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


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
    """Import everything in a fresh process; where the three packages came from."""
    return {
        name: Path(origin).parent
        for name, _, origin in (line.partition("=") for line in run(python, "-c", REPORT_IMPORTS, cwd=cwd).splitlines())
    }


def in_place(checkout: Path) -> dict[str, Path]:
    return {
        "fastattn": checkout / "fastattn",
        "fastattn.kernels": checkout / "kernels",
        "fastattn.benchmarks": checkout / "benchmarks",
    }


def sources(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}


def test_wheel_holds_every_module_under_its_import_name(archives):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if name.endswith(".py")}
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    beside = {f"fastattn/{name}" for folder in ("kernels", "benchmarks") for name in sources(folder)}
    assert names == sources("fastattn") | beside
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert {line for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        f"Provides-Extra: {extra}" for extra in ("bench", "hf", "test")
    }


def test_sdist_holds_what_a_build_and_a_test_run_need(archives):
    with tarfile.open(archives["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    folders = ("fastattn", "kernels", "benchmarks", "tests", "examples")
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt", "csrc/README.md"}
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
    pip_install(environment, checkout if mode == "normal" else archives[mode], cwd=tmp_path)
    outside = origins(environment, tmp_path)
    installed = outside["fastattn"]
    assert tmp_path in installed.parents
    assert outside == {
        "fastattn": installed,
        "fastattn.kernels": installed / "kernels",
        "fastattn.benchmarks": installed / "benchmarks",
    }
    # The root of a checkout on sys.path wins over the installation, and must do so as a whole.
    assert origins(environment, checkout) == in_place(checkout)
    assert "bench" in run(environment.with_name("fastattn"), "--help", cwd=tmp_path)
    shutil.rmtree(checkout / "build", ignore_errors=True)


@pytest.mark.more
@pytest.mark.parametrize("mode", ["default", "compat", "strict"])
def test_editable(mode, environment, checkout, tmp_path):
    settings = () if mode == "default" else ("--config-settings", f"editable_mode={mode}")
    pip_install(environment, *settings, "-e", checkout, cwd=tmp_path)
    assert origins(environment, checkout) == in_place(checkout)
    if mode == "strict":  # outside, a folder of links to the files
        assert origins(environment, tmp_path)["fastattn.kernels"].name == "kernels"
    else:
        assert origins(environment, tmp_path) == in_place(checkout)
    shutil.rmtree(checkout / "build", ignore_errors=True)
