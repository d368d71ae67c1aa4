"""torch.nn.LinearCrossEntropyLoss (torch 2.13) over fastattn's linear_cross_entropy, on every torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops import checks
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class LinearCrossEntropyLoss(torch.nn.Module):
    """The constructor and the state_dict of torch 2.13's class: `linear.weight` (C, in_features), `linear.bias`, `weight` where given.

    Assign a language model's head to `linear` to train it without ever holding its logits. z_loss, softcap, return_lse and chunk_size
    are linear_cross_entropy's; with return_lse, forward returns (loss, lse).

    Raises: NotImplementedError for out_features (a loss of several dims) and for torch's chunking options; in a forward TypeError for a
    `linear` with a forward of its own (an adapter around one, say: merge it first), of which the weight alone would be read.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: None = None,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        return_lse: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if out_features:
            raise NotImplementedError(f"LinearCrossEntropyLoss: out_features must be empty, got {out_features}")
        if options is not None:
            raise NotImplementedError("LinearCrossEntropyLoss: options must be None (chunk_size is what there is to choose)")
        self.num_classes, self.reduction = num_classes, reduction
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.label_smoothing, self.z_loss, self.softcap = label_smoothing, z_loss, softcap
        self.return_lse, self.chunk_size = return_lse, chunk_size
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if getattr(self.linear.forward, "__func__", None) is not torch.nn.Linear.forward:
            got = f"{type(self.linear).__module__}.{type(self.linear).__qualname__}"
            checks.reject("LinearCrossEntropyLoss", "linear", "have torch.nn.Linear's forward, as its weight is read", got, TypeError)
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
            return_lse=self.return_lse, chunk_size=self.chunk_size,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, bias={self.linear.bias is not None}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        )
