"""The kernel repository for the Hugging Face hub: it holds the kernels whole, needs nothing beside them, and loads by any name."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.name for folder in ("kernels", "tools/hub") for path in (ROOT / folder).glob("*.py")}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, ROOT / "tools" / "hub_layout.py", folder, "--version", "3", "--backend", "cuda", "cpu"]
    for _ in range(2):  # a second time over the first
        subprocess.run(command, check=True)
    return folder


def interpreted(code: str, cwd: Path, **environment: str) -> None:
    """Run a script in a process of its own, where neither the checkout nor an installation of fastattn is wanted."""
    for module in ("triton", "numpy"):
        pytest.importorskip(module, reason=f"needs {module}: the interpreter")
    forbid = "import sys\nsys.modules['fastattn'] = None\n"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment
    done = subprocess.run([sys.executable, "-c", forbid + code], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_is_every_kernel_and_imports_nothing_by_name_but_torch_and_triton(layout):
    for package in (layout / "torch-ext" / "fastattn", layout / "build" / "torch-cuda", layout / "build" / "torch-cpu"):
        assert {path.name for path in package.iterdir()} - {"metadata.json", "__pycache__"} == MODULES
        for path in package.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                assert {name.split(".")[0] for name in names} <= {"torch", "triton"} | sys.stdlib_module_names, path


def test_every_content_has_an_id_of_its_own(layout, tmp_path):
    def identity(folder: Path, backend: str) -> str:
        return json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text())["id"]

    assert identity(layout, "cuda") != identity(layout, "cpu")
    spec = importlib.util.spec_from_file_location("hub_layout", ROOT / "tools" / "hub_layout.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.write(tmp_path, "fastattn/fastattn", 3, ["cuda"])
    assert identity(tmp_path, "cuda") == identity(layout, "cuda")
    variant = tmp_path / "build" / "torch-cuda"
    (variant / "softmax.py").write_text("")
    assert tool.metadata(variant, 3, "cuda")["id"] != identity(layout, "cuda")


# As the hub's loader does, and beside itself under another name.
LOAD = """
import importlib.metadata
import importlib.util
def load(name):
    spec = importlib.util.spec_from_file_location(name, "build/torch-cpu/__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
kernels = [load("_fastattn_cpu_1"), load("_fastattn_cpu_2")]
"""

USE = """
import torch
for kernel in kernels:
    x, weight = torch.randn(5, 70), torch.randn(70)
    torch.testing.assert_close(kernel.softmax.softmax_fwd(x, 1, x.dtype), x.softmax(1))
    norm = kernel.layers.RMSNorm()
    norm.weight, norm.variance_epsilon = weight, 1e-6
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (70,), weight, 1e-6))
"""


def test_loads_by_any_name_and_runs(layout):
    interpreted(LOAD + USE, layout)


# With the hub's own package, whose parser judges build.toml, and whose digests metadata.json has to match.
HUB = """
from pathlib import Path
from kernels import LocalLayerRepository, Mode, get_kernel, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

assert len(Build.open("LAYOUT").general.backends) == 2
for backend in ("cpu", "cuda"):
    variant = Path("LAYOUT", "build", "torch-" + backend)
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.version == 3
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
kernels = [get_kernel("fastattn/fastattn", version=3)]
"""

KERNELIZE = """
@use_kernel_forward_from_hub("RMSNorm")
class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.randn(70)), 1e-6
    def forward(self, x):
        raise AssertionError("the model's own")

model = torch.nn.Sequential(Norm())
mapping = {"RMSNorm": {"cpu": LocalLayerRepository(Path("LAYOUT"), layer_name="RMSNorm")}}
with use_kernel_mapping(mapping, inherit_mapping=False):
    kernelize(model, mode=Mode.INFERENCE, device="cpu")
x = torch.randn(4, 70)
with torch.no_grad():
    torch.testing.assert_close(model(x), torch.nn.functional.rms_norm(x, (70,), model[0].weight, 1e-6))
"""


@pytest.mark.more
def test_the_hubs_loader_takes_it(layout, tmp_path):
    # Not `import kernels`: with the root on the path, and without the package, that is an empty namespace.
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the hub's `kernels` is not installed: each transformers allows other versions of it")
    code = (HUB + USE + KERNELIZE).replace("LAYOUT", str(layout))
    interpreted(code, tmp_path, LOCAL_KERNELS=f"fastattn/fastattn={layout}", HF_HUB_OFFLINE="1")
