"""What to carry to a GPU machine that has no network, so that the benchmark finds its peers there.

    python tools/peers.py                       the wheels, with their sizes, and what has none
    python tools/peers.py --download FOLDER     fetch them here, for that machine's Python (pip, PyPI)

There: `python -m pip install --no-index --no-deps --find-links FOLDER …`, or `--target` beside that Python; then `make gpu`, which
names what it did not find.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """wheels: what to fetch, at versions that go together; dependencies are listed too, but for those that torch brings. None: see note."""

    name: str
    ops: str
    wheels: tuple[str, ...]
    note: str = ""


CUTE = (
    *(f"nvidia-cutlass-dsl{part}==4.8.1" for part in ("", "-libs-base", "-libs-cu13")), "apache-tvm-ffi", "torch-c-dlpack-ext", "einops",
    "quack-kernels==0.6.5",
)  # fmt: skip
PEERS = (
    Peer("flash-attn 4", "attention", ("flash-attn-4==4.0.0b36", *CUTE), "one wheel is 92 MB"),
    Peer("QuACK", "softmax, norm, cross_entropy, linear_cross_entropy", CUTE),
    Peer("SonicMoE", "moe", ("sonic-moe==0.1.2.post1", *CUTE)),
    Peer("Liger", "softmax, norm, rotary, glu, cross_entropy, linear_cross_entropy, moe", ("liger-kernel==0.8.5",), "1 MB"),
    Peer("FlashInfer", "attention, paged_attention, norm, glu, sampling", ("flashinfer-python==0.7.2.post1",), "62 MB; needs nvcc there"),
    Peer("xformers", "attention", ("xformers==0.0.35",), "3 MB"),
    Peer("flash-attn 2, flash-attn 3", "attention, rotary", (), "no wheel: built from source against the machine's torch"),
    Peer("apex", "norm", (), "no wheel: built from source"),
    Peer("ScatterMoE", "grouped_mm, moe", (), "no wheel: pure Python, from its repository"),
    Peer("vLLM", "attention, paged_attention, norm, glu, moe", (), "its wheel pins a torch of its own: an environment apart"),
    Peer("torch: SDPA's backends, FlexAttention, varlen_attn, grouped_mm, torch.compile", "attention, moe, row ops", (), "there already"),
)


def download(folder: Path, python: str, platforms: list[str]) -> int:
    """Every wheel for that Python; 1 where one could not be had, after trying the others."""
    failed = 0
    for wheel in dict.fromkeys(wheel for peer in PEERS for wheel in peer.wheels):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--implementation=cp"]
        command += [f"--python-version={python}", *(f"--platform={p}" for p in platforms), "--dest", str(folder), wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{wheel}: {'ok' if done.returncode == 0 else done.stderr.strip().splitlines()[-1]}", flush=True)
        failed += done.returncode != 0
    return int(failed > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--download", type=Path, metavar="FOLDER", default=None)
    parser.add_argument("--python", default="3.12", help="of the GPU machine (3.12)")
    parser.add_argument("--platform", nargs="+", default=["manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "any"])
    options = parser.parse_args(arguments)
    if options.download:
        return download(options.download, options.python, options.platform)
    for peer in PEERS:
        print(f"{peer.name}: {peer.ops}\n    {' '.join(peer.wheels) or 'nothing to carry'}{peer.note and f'  ({peer.note})'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
