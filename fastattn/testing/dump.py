"""What the compiler makes of an op's kernels, stage by stage, for any part and without a GPU.

    fastattn dump attention --part sm90 --head-dim 128 --flags plain

writes ttir, ttgir, llir, ptx and sass of each kernel of the op to dump/, and prints its registers, spills and shared memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import cards
from .sass import disassemble, read_card
from .stub_driver import stub_driver

STAGES = ("ttir", "ttgir", "llir", "ptx")


def _head_dim(text: str) -> int:
    head_dim = int(text) if text.isdecimal() else 0
    if not 1 <= head_dim <= 512:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 512, got {text!r}")
    return head_dim


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastattn dump", description="Write the compiler's stages of an op's kernels.")
    ops = sorted({launcher.rsplit("_", 1)[0] for launcher in cards.LAUNCHERS})
    parser.add_argument("op", choices=ops)
    parser.add_argument("--part", choices=sorted(cards.PARTS), default="sm90")
    parser.add_argument("--dtype", choices=sorted(cards.DTYPES), default="half")
    parser.add_argument("--head-dim", type=_head_dim, default=128, metavar="1..512")
    parser.add_argument("--flags", choices=cards.FLAGS, default="plain")
    parser.add_argument("--out", type=Path, default=Path("dump"))
    options = parser.parse_args(argv)
    for launcher in (name for name in cards.LAUNCHERS if name.startswith(options.op)):
        job = cards.Job(launcher, options.part, options.dtype, options.head_dim, options.flags)
        folder = options.out / str(job).replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        with stub_driver(cards.PARTS[options.part]) as driver:
            cards.launch(job)
            for index, launched in enumerate(driver.launches):
                name = f"{index}{launched.name}"
                for stage in STAGES:
                    (folder / f"{name}.{stage}").write_text(launched.compiled.asm[stage], encoding="utf-8")
                (folder / f"{name}.sass").write_text(disassemble(launched.compiled.asm["cubin"]), encoding="utf-8")
                card = read_card(launched.compiled)
                print(
                    f"{launched.name}: {card['registers']} registers, {card['stack']} bytes of stack, "
                    f"{card['shared']} bytes of shared memory"
                )
        print(f"written to {folder}/")
    return 0
