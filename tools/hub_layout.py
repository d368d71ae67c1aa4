#!/usr/bin/env python3
"""Write the Triton kernels as a kernel repository of the Hugging Face hub.

    python tools/hub_layout.py DIR [--repo-id fastattn/fastattn] [--version 1] [--backend cuda …]

DIR/build.toml and DIR/torch-ext are the source, as kernel-builder takes it; DIR/build/torch-<backend> is what it makes of a package that
has no compiled parts, and what `kernels.get_kernel` loads. The package is kernels/, under whose relative imports it does not matter what
it is called, with tools/hub/ for its __init__.py. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME, LICENSE = "fastattn", "Apache-2.0"

BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""


def write(to: Path, repo_id: str, version: int, backends: list[str]) -> None:
    """Write the repository to a folder, in place of what was there of it."""
    for folder in ("torch-ext", "build"):
        shutil.rmtree(to / folder, ignore_errors=True)
    to.mkdir(parents=True, exist_ok=True)
    quoted = ", ".join(f'"{backend}"' for backend in backends)
    toml = BUILD_TOML.format(name=NAME, version=version, license=LICENSE, backends=quoted, repo_id=repo_id)
    (to / "build.toml").write_text(toml)
    write_package(to / "torch-ext" / NAME)
    for backend in backends:
        variant = to / "build" / f"torch-{backend}"
        write_package(variant)
        (variant / "metadata.json").write_text(json.dumps(metadata(variant, version, backend), indent=2) + "\n")


def write_package(folder: Path) -> None:
    folder.mkdir(parents=True)
    for source in (ROOT / "kernels").glob("*.py"):
        shutil.copy(source, folder)
    for source in (ROOT / "tools" / "hub").glob("*.py"):  # its __init__.py, in place of the folder's own
        shutil.copy(source, folder)


def metadata(variant: Path, version: int, backend: str) -> dict:
    """What the loader reads. The id is the module's name once loaded: one for each content, so that two versions can be loaded."""
    files = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in sorted(variant.glob("*.py"))}
    content = hashlib.sha256(b"".join(name.encode() + digest for name, digest in files.items())).hexdigest()
    return {
        "name": NAME,
        "id": f"_{NAME}_{backend}_{content[:8]}",
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {name: base64.b64encode(digest).decode() for name, digest in files.items()}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the Triton kernels as a kernel repository of the Hugging Face hub.")
    parser.add_argument("dir", type=Path)
    parser.add_argument("--repo-id", default="fastattn/fastattn")
    parser.add_argument("--version", type=int, default=1, help="the kernel's, which counts breaking changes (1)")
    parser.add_argument("--backend", nargs="+", default=["cuda"], help="cuda; cpu too, for Triton's interpreter")
    options = parser.parse_args()
    write(options.dir, options.repo_id, options.version, options.backend)


if __name__ == "__main__":
    main()
