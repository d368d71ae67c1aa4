"""The import directions of the architecture, read from the source; what `import fastattn` needs, in fresh processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BESIDE = {"kernels": "fastattn.kernels", "benchmarks": "fastattn.benchmarks"}

# What a package may import besides the standard library and itself. The kernels' dropout mask is the one thing of the
# reference that what stands above the code it judges may share, as the judge of both is Triton's own generator.
ALLOWED = {
    "fastattn.kernels": {"torch", "triton"},
    "fastattn.reference": {"torch"},
    "fastattn.extensions": {"torch"},
    "fastattn.cpu": {"torch", "fastattn.extensions"},
    "fastattn.cuda": {"torch", "fastattn.extensions"},
    "fastattn.ops": {"torch", "fastattn.kernels", "fastattn.cpu", "fastattn.cuda", "fastattn.reference.philox"},
    "fastattn.flash_attn": {"torch", "fastattn.ops", "fastattn.reference"},
    "fastattn.nn": {"torch", "fastattn.ops", "fastattn.reference", "fastattn.kv_cache"},
    "fastattn.page_pool": {"fastattn._page_pool"},
    "fastattn.kv_cache": {"torch", "fastattn.ops", "fastattn.page_pool"},
    "fastattn.command_line": {"torch"},
    "fastattn.scheduler": {"torch", "fastattn.kv_cache", "fastattn.page_pool"},
    "fastattn.models": {
        "torch", "safetensors", "tokenizers", "gguf", "matplotlib", "fastattn.ops", "fastattn.nn", "fastattn.kv_cache", "fastattn.page_pool",
        "fastattn.scheduler", "fastattn.command_line",
    },
    "fastattn.integrations": {
        "torch", "transformers", "fastattn.ops", "fastattn.flash_attn", "fastattn.nn", "fastattn.kv_cache", "fastattn.scheduler",
    },
}  # fmt: skip


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Every module of a package, or the one module: (import name, file)."""
    folders = {name: folder for folder, name in BESIDE.items()}
    folder = ROOT / folders.get(package, package.replace(".", "/"))
    if not folder.is_dir():
        yield package, folder.with_suffix(".py")
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join((package, *parts)).removesuffix(".__init__"), path


def imported(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import in a file, those inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            # `from .. import ops` imports fastattn.ops; `from .. import attention` a public name of fastattn.
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if base == "fastattn" and is_package(name) else base


def is_package(name: str) -> bool:
    return name.removeprefix("fastattn.") in BESIDE or (ROOT / name.replace(".", "/")).is_dir()


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_downward_only(package):
    found = list(modules(package))
    assert found, f"{package} has no modules"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in found
        for line, name in imported(module, path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(within(name, allowed) for allowed in {package, *ALLOWED[package]})
    ]
    assert not wrong, f"{package} may import {sorted(ALLOWED[package])}:\n" + "\n".join(wrong)


def test_every_package_has_a_rule():
    packages = {f"fastattn.{path.parent.name}" for path in (ROOT / "fastattn").glob("*/__init__.py")}
    packages |= {f"fastattn.{path.stem}" for path in (ROOT / "fastattn").glob("*.py")}
    # Tools for tests and benchmarks stand beside the layers, and the command above them: nothing below imports them, which the rules
    # above hold.
    beside = {"fastattn.testing", "fastattn.__init__", "fastattn.__main__", "fastattn.cli"}
    assert packages - beside | {"fastattn.kernels"} == set(ALLOWED)


def test_kernels_know_no_autograd_library_or_environment():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} .{node.attr}"
        for _, path in modules("fastattn.kernels")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"autograd", "library", "environ", "getenv"}
    ]
    assert not found, "\n".join(found)


def run_python(code: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


COLD_IMPORT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "numpy", "rich", "matplotlib", "transformers", "safetensors", "tokenizers", "gguf"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
sdpa = torch.nn.functional.scaled_dot_product_attention
import fastattn

assert not torch.cuda.is_initialized()
assert sdpa is torch.nn.functional.scaled_dot_product_attention, "the import patched torch"
q = torch.randn(1, 5, 2, 16, requires_grad=True)
out = fastattn.attention(q, q, q, causal=True)
out.sum().backward()
expected = sdpa(*[q.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
torch.testing.assert_close(out, expected)

from fastattn.models import Config, Transformer

tokens = torch.tensor([[1, 2, 3]])
Transformer(Config.preset("moe-tiny", num_layers=1)).loss(tokens, tokens).backward()
print("cold import works")
"""


def test_import_needs_torch_alone():
    done = run_python(COLD_IMPORT)
    assert done.returncode == 0 and "cold import works" in done.stdout, done.stderr


def test_import_is_lazy():
    """What one command or one integration uses is not imported for everyone."""
    heavy = "rich matplotlib transformers torch._dynamo pytest fastattn.testing fastattn.integrations fastattn.models".split()
    done = run_python(f"import sys, fastattn; print(sorted(sys.modules.keys() & {heavy}))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
