"""Modules over the ops. Those with the name of a torch.nn module have its constructor, state_dict and forward."""

from .attention import Attention
from .cross_entropy import CrossEntropyLoss
from .glu import GEGLU, SwiGLU
from .linear_cross_entropy import LinearCrossEntropyLoss
from .moe import MoE, MoEAux
from .multihead_attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .rotary import RotaryEmbedding
from .softmax import Softmax

__all__ = [
    "GEGLU", "Attention", "CrossEntropyLoss", "LayerNorm", "LinearCrossEntropyLoss", "MoE", "MoEAux", "MultiheadAttention", "RMSNorm",
    "RotaryEmbedding", "Softmax", "SwiGLU",
]  # fmt: skip
