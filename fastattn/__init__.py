"""fastattn: exact attention and the other kernels of a transformer, in hand-written Triton, behind PyTorch's own signatures.

Importing it needs torch alone: no GPU, no compiler, no Triton. CUDA tensors run the kernels, CPU tensors run torch code of the same
contract, and TRITON_INTERPRET=1 runs the kernels on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations


def _find_checkout_packages() -> None:
    """Let a bare checkout import like an installation.

    `kernels/` and `benchmarks/` install as `fastattn.kernels` and `fastattn.benchmarks`, but lie beside this package in the
    repository, so that from a checkout that is not installed the import system cannot find them by itself.
    """
    import importlib.util
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in ("kernels", "benchmarks"):
        folder = os.path.join(root, name)
        init = os.path.join(folder, "__init__.py")
        if importlib.util.find_spec(f"fastattn.{name}") is not None or not os.path.exists(init):
            continue
        spec = importlib.util.spec_from_file_location(f"fastattn.{name}", init, submodule_search_locations=[folder])
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        globals()[name] = module


_find_checkout_packages()

from . import flash_attn, nn, reference  # noqa: E402  (the checkout's packages must be found first)
from .kv_cache import PagedKVCache  # noqa: E402
from .ops.append_paged_kv import append_paged_kv  # noqa: E402
from .ops.attention import attention  # noqa: E402
from .ops.cross_entropy import cross_entropy  # noqa: E402
from .ops.glu import geglu, swiglu  # noqa: E402
from .ops.grouped_mm import grouped_mm  # noqa: E402
from .ops.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from .ops.merge_attention import merge_attention  # noqa: E402
from .ops.moe import moe  # noqa: E402
from .ops.moe_routing import (  # noqa: E402
    MoEPlan,
    moe_combine,
    moe_dispatch,
    moe_expert_counts,
    moe_gather,
    moe_load_balancing_loss,
    moe_route,
    moe_update_bias,
    moe_z_loss,
)
from .ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm  # noqa: E402
from .ops.paged_attention import cascade_attention, paged_attention  # noqa: E402
from .ops.rotary import apply_rotary  # noqa: E402
from .ops.sampling import sample, sampling_probs  # noqa: E402
from .ops.scaled_dot_product_attention import scaled_dot_product_attention  # noqa: E402
from .ops.softmax import softmax  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "MoEPlan",
    "PagedKVCache",
    "add_layer_norm",
    "add_rms_norm",
    "append_paged_kv",
    "apply_rotary",
    "attention",
    "cascade_attention",
    "cross_entropy",
    "flash_attn",
    "geglu",
    "grouped_mm",
    "layer_norm",
    "linear_cross_entropy",
    "merge_attention",
    "moe",
    "moe_combine",
    "moe_dispatch",
    "moe_expert_counts",
    "moe_gather",
    "moe_load_balancing_loss",
    "moe_route",
    "moe_update_bias",
    "moe_z_loss",
    "nn",
    "paged_attention",
    "reference",
    "rms_norm",
    "sample",
    "sampling_probs",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
]
