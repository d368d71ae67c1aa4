"""The experts' cards: "plain", Mixtral's; "all", gpt-oss's: transposed, interleaved, with biases and its own activation; "inference" keeps
no pre-activation; "few" and "some" tokens an expert; "odd", "odd_few", "limit" and "limit_few" as the grouped product's."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.kernels.grouped_tiles import FEW, SHALLOW, SOME
from fastattn.kernels.moe import moe_bwd, moe_fwd
from fastattn.ops.moe_routing import MAX_EXPERTS

from . import Family, Job, grouped_mm
from .grouped_mm import Case, overlapping

LAUNCHERS = {"moe_fwd": moe_fwd, "moe_bwd": moe_bwd}
TOP_K = 2
CASES = {  # a group is an expert
    "plain": Case(), "all": Case(), "inference": Case(), "few": Case(FEW), "some": Case(SOME), "odd": Case(less=1),
    "odd_few": Case(FEW, less=1), "limit": Case(groups=MAX_EXPERTS), "limit_few": Case(FEW, groups=MAX_EXPERTS),
}  # fmt: skip
# Kernels with a tile of the table, and its name there.
KERNELS = {"moe_up": "gated", "grouped_mm": "product", "moe_down_bwd": "gated_bwd", "grouped_mm_weight": "weight_gathered"}


def launch(job: Job, **override: Any) -> None:
    case, dtype = CASES[job.flags], job.dtype
    experts, num_rows, size = case.groups, case.groups * case.rows, job.size - case.less
    x, weights = overlapping(num_rows // TOP_K, size, dtype=dtype), torch.zeros(num_rows // TOP_K, TOP_K)
    plan = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64), torch.zeros(experts, dtype=torch.int32)
    gate_up, down = (overlapping(experts, *dims, dtype=dtype) for dims in ((2 * size, size), (size, size)))
    biases: tuple[torch.Tensor | None, ...] = (None, None)
    options = ("swiglu", "concatenated", False)
    if job.flags == "all":
        gate_up = overlapping(experts, size, 2 * size, dtype=dtype)
        biases, options = (gate_up[:, :, 0], down[:, :, 0]), ("clamped_swiglu", "interleaved", True)
    if job.launcher == "moe_fwd":
        keep = job.flags in ("plain", "all")
        moe_fwd(x, *plan, weights, gate_up, down, *biases, *options, keep, **override)
    else:
        pre = overlapping(num_rows, 2 * size, dtype=dtype)
        wanted = [True, True, few_experts := experts == Case().groups, few_experts, True, True]  # gradients of many would fill a machine
        moe_bwd(x, x, *plan, weights, gate_up, down, *biases, pre, *options, wanted, **override)


def tiles(job: Job) -> dict[str, str]:
    kernels = ("moe_up", "grouped_mm") if job.launcher == "moe_fwd" else ("moe_down_bwd", "grouped_mm", "grouped_mm_weight")
    rows = {kernel: KERNELS[kernel] for kernel in kernels}
    if job.flags == "all" and "moe_down_bwd" in rows:
        rows["moe_down_bwd"] = "gated_bwd_interleaved"
    found = {kernel: grouped_mm.config(job, row, CASES[job.flags]) for kernel, row in rows.items()}
    return {kernel: grouped_mm.tile(config) for kernel, config in found.items()}


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
    flags={"moe_fwd": tuple(CASES), "moe_bwd": ("plain", "all", "odd", "limit")},
    tiles=tiles,
    named=named,
    rules=grouped_mm.rules,
    is_sampled=lambda job: job.part == "sm90" and job.dtype_class == "half" and job.flags in ("plain", "few"),
    dtype_classes=lambda flags: ("half", "single") if flags in ("plain", "all", "few") else ("half",),
)
