"""Which function an activation of transformers or torch is."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2CLS


def _classes(*names: str) -> set[type]:
    """Those of transformers' activations of these names; an entry is a class, or a class with its arguments."""
    found = (ACT2CLS.get(name) for name in names)
    return {entry[0] if isinstance(entry, tuple) else entry for entry in found if entry is not None}


SILU = _classes("silu", "swish") | {nn.SiLU}
GELU = _classes("gelu", "gelu_python")
GELU_TANH = _classes("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate")  # one formula


def kind_of(act: object) -> str | None:
    """"silu", "gelu", "gelu_tanh", or None for any other; by exact class, since a subclass may compute something else."""
    if act is nn.functional.silu or type(act) in SILU:
        return "silu"
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if type(act) in GELU_TANH:
        return "gelu_tanh"
    return "gelu" if type(act) in GELU else None
