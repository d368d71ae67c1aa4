"""The oracles: each op in naive, differentiable torch, right by inspection, in any dtype including float64."""

from fastattn.reference.append_paged_kv import append_paged_kv
from fastattn.reference.attention import attention
from fastattn.reference.cross_entropy import cross_entropy
from fastattn.reference.glu import geglu, swiglu
from fastattn.reference.grouped_mm import grouped_mm
from fastattn.reference.linear_cross_entropy import linear_cross_entropy
from fastattn.reference.merge_attention import merge_attention
from fastattn.reference.moe import moe
from fastattn.reference.moe_routing import moe_combine, moe_dispatch, moe_gather, moe_route
from fastattn.reference.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.reference.paged_attention import paged_attention
from fastattn.reference.philox import philox_keep
from fastattn.reference.rotary import apply_rotary
from fastattn.reference.sampling import sampling_probs
from fastattn.reference.softmax import softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "append_paged_kv",
    "apply_rotary",
    "attention",
    "cross_entropy",
    "geglu",
    "layer_norm",
    "grouped_mm",
    "linear_cross_entropy",
    "merge_attention",
    "moe",
    "moe_combine",
    "moe_dispatch",
    "moe_gather",
    "moe_route",
    "paged_attention",
    "philox_keep",
    "rms_norm",
    "sampling_probs",
    "softmax",
    "swiglu",
]
