"""Modules over the ops, each with the interface of the torch.nn module of its name."""

from .multihead_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
