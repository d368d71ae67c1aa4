"""The oracles: each op in naive, differentiable torch, right by inspection, in any dtype including float64."""

from fastattn.reference.attention import attention
from fastattn.reference.cross_entropy import cross_entropy
from fastattn.reference.linear_cross_entropy import linear_cross_entropy
from fastattn.reference.philox import philox_keep
from fastattn.reference.softmax import softmax

__all__ = ["attention", "cross_entropy", "linear_cross_entropy", "philox_keep", "softmax"]
