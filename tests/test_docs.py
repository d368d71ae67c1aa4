"""The code blocks of README.md and docs/ run: each page's Python blocks in order, in one namespace, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.M | re.S)  # fenced, and inline
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def _blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page):
    code = "\n".join(_blocks(page))
    for module in ("transformers", "peft"):
        if f"import {module}" in code and importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in _links(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _links(text: str) -> list[str]:
    return LINK.findall(CODE.sub("`code`", text))


def test_code_holds_no_links():
    text = "[a](a.md#part), [`b`](b.md), `k[grid](c)`\n\n```python\nk[grid](d)\n```\n\n[e](e.md), [f](#f)"
    assert _links(text) == ["a.md", "b.md", "e.md"]
