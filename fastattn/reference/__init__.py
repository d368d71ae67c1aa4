"""The oracles: each op in naive, differentiable torch, right by inspection, in any dtype including float64."""

from fastattn.reference.attention import attention
from fastattn.reference.philox import philox_keep
from fastattn.reference.softmax import softmax

__all__ = ["attention", "philox_keep", "softmax"]
