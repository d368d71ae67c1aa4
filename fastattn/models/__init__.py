"""Transformers built on the kernels: configurations, the models, their files and their tokenisers.

Importing this needs torch alone; files need safetensors, tokenizers or gguf (`pip install 'fastattn[models]'`), each where it is used.
"""

from . import tokenizers
from .checkpoints import load, save
from .config import PRESETS, Config
from .encoder import Encoder, EncoderDecoder
from .files import CheckpointError
from .tokenizers import ByteTokenizer, FileTokenizer, StreamDecoder, Tokenizer, train_bpe
from .transformer import MLP, Block, Transformer

__all__ = [
    "MLP", "PRESETS", "Block", "ByteTokenizer", "CheckpointError", "Config", "Encoder", "EncoderDecoder", "FileTokenizer", "StreamDecoder",
    "Tokenizer", "Transformer", "load", "save", "tokenizers", "train_bpe",
]  # fmt: skip
