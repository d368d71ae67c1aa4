"""What the compiler makes of an op's kernels, stage by stage, for any part and without a GPU.

    fastattn dump attention --part sm90 --size 128 --flags plain

writes ttir, ttgir, llir, ptx and sass of each kernel of the op to dump/, and prints its registers, spills and shared memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .families import DTYPES, PARTS, Job, families
from .sass import disassemble, read_card
from .stub_driver import stub_driver

STAGES = ("ttir", "ttgir", "llir", "ptx")


def _size(text: str) -> int:
    size = int(text) if text.isdecimal() else 0
    if not 1 <= size < 2**31:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastattn dump", description="Write the compiler's stages of an op's kernels.")
    parser.add_argument("op", choices=list(families()))
    parser.add_argument("--part", choices=sorted(PARTS), default="sm90")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="half")
    parser.add_argument("--size", type=_size, default=128, help="head dim or row length (default: 128)")
    parser.add_argument("--flags", help="options to compile with (default: the op's first set)")
    parser.add_argument("--out", type=Path, default=Path("dump"))
    options = parser.parse_args(argv)
    family = families()[options.op]
    for launcher in family.launchers:
        flags = options.flags or family.flags[launcher][0]
        if flags not in family.flags[launcher]:
            parser.error(f"--flags must be one of {', '.join(family.flags[launcher])}, got {flags!r}")
        job = Job(launcher, options.part, options.dtype, options.size, flags)
        folder = options.out / str(job).replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        with stub_driver(job.capability) as driver:
            family.launch(job)
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
