"""The oracle of linear cross-entropy: a linear layer, then cross-entropy of all its logits."""

from __future__ import annotations

import torch

from fastattn.reference.cross_entropy import cross_entropy


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """cross_entropy(input·linear_weightᵀ + linear_bias, target, …) of input (…, H) and target (…)."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    loss, lse = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), target.reshape(-1), weight, ignore_index, reduction, label_smoothing,
        z_loss=z_loss, softcap=softcap, return_lse=True,
    )  # fmt: skip
    loss = loss.reshape(target.shape) if reduction == "none" else loss
    return (loss, lse.reshape(target.shape)) if return_lse else loss
