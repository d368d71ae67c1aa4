"""torch.nn.Softmax over fastattn's softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.softmax import softmax


class Softmax(torch.nn.Softmax):
    """Drop-in for `torch.nn.Softmax`. dim=None picks a dim as torch does, with torch's warning."""

    def forward(self, input: Tensor) -> Tensor:
        dim = self.dim if self.dim is not None else F._get_softmax_dim("softmax", input.dim(), 3)
        return softmax(input, dim)
