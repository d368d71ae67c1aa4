"""Transformers built on the kernels: configurations, the model, its files and its tokenisers. Importing it needs torch alone."""

from .config import PRESETS, Config
from .transformer import MLP, Block, Transformer

__all__ = ["MLP", "PRESETS", "Block", "Config", "Transformer"]
