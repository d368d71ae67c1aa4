"""Sampling's cards: rows aligned and odd, with a cut and without ("whole"). There is one tile for any vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastattn.kernels.sampling import sample, sampling_probs

from . import Card, Job
from .rows import num_cols, row_family

LAUNCHERS = {"sample": sample, "sampling_probs": sampling_probs}


def launch(job: Job, **override: Any) -> None:
    logits = torch.zeros(8, num_cols(job), dtype=job.dtype)
    parameters = (0.7, 0, 1.0, 0.1) if job.flags.endswith("whole") else (0.7, 50, 0.9, 0.1)
    if job.launcher == "sample":
        sample(logits, torch.zeros(1, dtype=torch.int64), *parameters, **override)
    else:
        sampling_probs(logits, *parameters, **override)


def named(job: Job, launched: Any) -> tuple[str, str]:
    return str(job), job.launcher  # one kernel does both


def rules(name: str, card: Card) -> list[str]:
    """Parameters, ids and candidates are narrow accesses by nature; a walk is two or four loads of 128 bits."""
    launcher, _, _, _, flags = name.split()
    wrong = [f"{card['stack']} bytes of spills where none are allowed"] if card["stack"] > 0 else []
    walks = (4 if flags.endswith("cut") else 2) + (launcher == "sampling_probs")
    if (loads := card["access"].get("LDG.128", 0)) < 2 * walks:
        wrong.append(f"{loads} loads of 128 bits where {walks} walks make {2 * walks}")
    return wrong


FLAGS = ("aligned-cut", "odd-cut", "aligned-whole", "odd-whole")
FAMILY = replace(row_family(LAUNCHERS, launch, FLAGS, rules), named=named)
