"""Modules without state, whose forward `kernelize` binds to a model's own: for inference."""

import torch
from torch import Tensor, nn

from .norm import norm_fwd


class RMSNorm(nn.Module):
    """transformers' RMSNorm: x·rstd rounded to x's dtype, then times the weight."""

    weight: Tensor
    variance_epsilon: float
    has_backward = False
    can_torch_compile = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return norm_fwd(
            hidden_states, None, self.weight, None, None, self.variance_epsilon, 0.0, 0.0, False, True, dtype
        )[0]
