"""flash_attn.losses.cross_entropy on `fastattn.cross_entropy`: the loss and the module, with flash-attn 2.8's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.cross_entropy import cross_entropy


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(losses, z_losses), both float32 (N,), of logits (N, V) and labels (N,); 0 where a label is ignore_index.

    logit_scale: multiplies the logits, into a float32 copy of them unless it is 1. lse_square_scale: z_losses = lse_square_scale·lse²,
    which losses include; no gradient comes through z_losses themselves. inplace_backward, and precomputed_lse: what they save is not
    saved here; the gradient is a new tensor, and the log-sum-exp is computed.

    Raises: NotImplementedError for a process_group (a vocabulary split over ranks); else as `fastattn.cross_entropy`.
    """
    if process_group is not None:
        raise NotImplementedError("cross_entropy_loss: process_group, a vocabulary split over ranks, is not supported")
    checks.check_tensor("cross_entropy_loss", "logits", logits)
    if logit_scale != 1.0:
        logits = logits.float() * logit_scale
    # An autocast region is what makes the loss of half-precision logits float32 without a copy of them.
    with torch.autocast(logits.device.type):
        losses, lse = cross_entropy(
            logits, labels, None, ignore_index, "none", label_smoothing, z_loss=lse_square_scale, return_lse=True
        )
    z_losses = (lse_square_scale * lse.detach().square()).masked_fill(labels == ignore_index, 0.0)
    return losses, z_losses


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy_loss` with a reduction: "mean" over the labels that are not ignore_index, "sum" or "none". The loss is float32.

    With return_z_loss, forward(input, target) returns (loss, z_loss), both reduced.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(f"CrossEntropyLoss: reduction must be 'mean', 'none' or 'sum', got {reduction!r}")
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.logit_scale, self.lse_square_scale = logit_scale, lse_square_scale
        self.inplace_backward, self.process_group, self.return_z_loss = inplace_backward, process_group, return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        losses = cross_entropy_loss(
            input, target, precomputed_lse, self.label_smoothing, self.logit_scale, self.lse_square_scale, self.ignore_index,
            self.inplace_backward, self.process_group,
        )  # fmt: skip
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            losses = tuple(loss.sum() / count for loss in losses)
        elif self.reduction == "sum":
            losses = tuple(loss.sum() for loss in losses)
        return losses if self.return_z_loss else losses[0]
