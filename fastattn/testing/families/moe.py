"""The experts' cards: "plain", Mixtral's; "all", gpt-oss's: transposed, interleaved, with biases and its own activation; "inference" keeps
no pre-activation; "few" and "some" tokens an expert."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.grouped_tiles import FEW, SHALLOW, SOME
from fastattn.kernels.moe import moe_bwd, moe_fwd

from . import Family, Job, grouped_mm

LAUNCHERS = {"moe_fwd": moe_fwd, "moe_bwd": moe_bwd}
TOP_K, EXPERTS = 2, 8
ROWS = {"plain": 256, "all": 256, "inference": 256, "few": FEW, "some": SOME}  # an expert
# Kernels with a tile of the table, and its name there.
KERNELS = {"moe_up": "gated", "grouped_mm": "product", "moe_down_bwd": "gated_bwd", "grouped_mm_weight": "weight_gathered"}


def launch(job: Job, **override: Any) -> None:
    num_rows, size, dtype = EXPERTS * ROWS[job.flags], job.size, job.dtype
    x, weights = torch.zeros(num_rows // TOP_K, size, dtype=dtype), torch.zeros(num_rows // TOP_K, TOP_K)
    plan = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64), torch.zeros(EXPERTS, dtype=torch.int32)
    gate_up, down = torch.zeros(EXPERTS, 2 * size, size, dtype=dtype), torch.zeros(EXPERTS, size, size, dtype=dtype)
    biases: tuple[torch.Tensor | None, ...] = (None, None)
    options = ("swiglu", "concatenated", False)
    if job.flags == "all":
        gate_up, biases, options = gate_up.view(EXPERTS, size, -1), (gate_up[:, :, 0], down[:, 0]), ("clamped_swiglu", "interleaved", True)
    if job.launcher == "moe_fwd":
        keep = job.flags in ("plain", "all")
        moe_fwd(x, *plan, weights, gate_up, down, *biases, *options, keep, **override)
    else:
        pre = torch.zeros(num_rows, 2 * size, dtype=dtype)
        moe_bwd(x, x, *plan, weights, gate_up, down, *biases, pre, *options, [True] * 6, **override)


def tiles(job: Job) -> dict[str, str]:
    kernels = ("moe_up", "grouped_mm") if job.launcher == "moe_fwd" else ("moe_down_bwd", "grouped_mm", "grouped_mm_weight")
    rows = {kernel: KERNELS[kernel] for kernel in kernels}
    if job.flags == "all" and "moe_down_bwd" in rows:
        rows["moe_down_bwd"] = "gated_bwd_interleaved"
    return {kernel: grouped_mm.tile(grouped_mm.config(job, row, ROWS[job.flags])) for kernel, row in rows.items()}


def named(job: Job, launched: Any) -> tuple[str, str] | None:
    kernel = launched.name.removeprefix("_").removesuffix("_kernel")
    if kernel == "moe_combine_fwd":
        return None  # with routing's
    if kernel == "grouped_mm_weight":
        kernel = f"{kernel}_{'up' if launched.args['a_numbers_ptr'] is None else 'down'}"
    return " ".join([kernel, *str(job).split()]), kernel.removesuffix("_up").removesuffix("_down") if "weight" in kernel else kernel


FAMILY = Family(
    launchers=LAUNCHERS,
    launch=launch,
    sizes=dict.fromkeys(LAUNCHERS, (2 * SHALLOW,)),
    flags={"moe_fwd": tuple(ROWS), "moe_bwd": ("plain", "all")},
    tiles=tiles,
    named=named,
    rules=grouped_mm.rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.flags in ("plain", "few"),
    dtype_classes=lambda flags: ("half", "single") if flags in ("plain", "all", "few") else ("half",),
)
