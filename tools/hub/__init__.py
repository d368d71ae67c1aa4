"""fastattn's Triton kernels and their launchers. No autograd: a forward and its backward are functions of their own.

    kernel.attention.attention_fwd, kernel.softmax.softmax_fwd, kernel.norm.norm_fwd, …: each module's docstrings say what they compute
    kernel.layers: modules that `kernelize` puts in the place of a model's
"""

from . import (
    append_paged_kv,
    attention,
    attention_bwd,
    cross_entropy,
    glu,
    grouped_mm,
    layers,
    merge_attention,
    moe,
    moe_routing,
    norm,
    norm_bwd,
    paged_attention,
    rotary,
    sampling,
    softmax,
)

__all__ = [
    "append_paged_kv",
    "attention",
    "attention_bwd",
    "cross_entropy",
    "glu",
    "grouped_mm",
    "layers",
    "merge_attention",
    "moe",
    "moe_routing",
    "norm",
    "norm_bwd",
    "paged_attention",
    "rotary",
    "sampling",
    "softmax",
]
