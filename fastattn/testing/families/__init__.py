"""What is compiled for the kernel cards, one file an op: its launchers, how they are called, the tiles they pick, the rules they keep."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..stub_driver import SHARED_MEMORY_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OPS = (
    "append_paged_kv", "attention", "cross_entropy", "glu", "grouped_mm", "merge_attention", "moe", "moe_routing", "norm",
    "paged_attention", "rotary", "sampling", "softmax",
)  # fmt: skip
PARTS = {"sm80": (8, 0), "sm90": (9, 0), "sm100": (10, 0), "sm120": (12, 0)}
DTYPES = {"half": torch.bfloat16, "single": torch.float32}

Card = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One call of a launcher, for one part; every kernel that it launches gives a card.

    size: the head dim or row length at the top of a bucket of the tile table; flags: a set of options, by name.
    """

    launcher: str
    part: str
    dtype_class: str
    size: int
    flags: str

    def __str__(self) -> str:
        return f"{self.launcher} {self.part} {self.dtype_class} {self.size} {self.flags}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_class]

    @property
    def capability(self) -> tuple[int, int]:
        return PARTS[self.part]

    @property
    def shared_memory(self) -> int:
        return SHARED_MEMORY_LIMITS[self.capability]


@dataclass(frozen=True)
class Family:
    """The launchers of one op.

    launchers: by name; launch(job, **override) calls one on zeros, `override` going to it as other tiles than the table's;
    sizes, flags: what to compile it with; dtype_classes(flags): in what; tiles(job): the text of the tile of each kernel it launches
    that has one, which cards carry and their hash covers; named(job, launch): the name of a recorded launch's card, None for no card;
    rules(name, card): what the card breaks by itself; is_sampled(job): whether every `make test` compiles it.
    """

    launchers: Mapping[str, Callable]
    launch: Callable[..., None]
    sizes: Mapping[str, tuple[int, ...]]
    flags: Mapping[str, tuple[str, ...]]
    tiles: Callable[[Job], Mapping[str, str]]
    named: Callable[[Job, Any], tuple[str, str] | None]
    rules: Callable[[str, Card], list[str]]
    is_sampled: Callable[[Job], bool]
    dtype_classes: Callable[[str], tuple[str, ...]] = field(default=lambda flags: tuple(DTYPES))

    def jobs(self) -> list[Job]:
        return [
            Job(launcher, part, dtype_class, size, flags)
            for launcher in self.launchers
            for part in PARTS
            for flags in self.flags[launcher]
            for dtype_class in self.dtype_classes(flags)
            for size in self.sizes[launcher]
        ]


def families() -> dict[str, Family]:
    return {op: importlib.import_module(f"{__name__}.{op}").FAMILY for op in OPS}


def narrow(card: Card) -> int:
    """How many of a kernel's global loads and stores move less than 128 bits a thread."""
    return sum(number for access, number in card["access"].items() if not access.endswith(".128"))
