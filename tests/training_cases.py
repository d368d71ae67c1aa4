"""A small training run that several tests make: real text that is the same everywhere, and a model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from fastattn.models import ByteTokenizer, Config, Transformer
from fastattn.models.data import Corpus, PackedText
from fastattn.models.training import Settings, Trainer

BYTES = ByteTokenizer()
SMALL = dict(hidden_size=32, num_layers=2, num_heads=4, max_seqlen=64)

# The choices that a decoder-only model can make, in six configurations.
CONFIGS = {
    "gpt2": Config.preset("gpt2-tiny", **SMALL),
    "llama": Config.preset("llama-tiny", **SMALL),
    "mistral": Config.preset("mistral-tiny", **SMALL | dict(window=9, tied_embeddings=False)),
    "gemma": Config.preset("gemma-tiny", **SMALL | dict(window=(9, None), embedding_scale=32**0.5)),
    "moe": Config.preset("moe-tiny", **SMALL | dict(intermediate_size=32, num_experts=4)),
    "alibi-post": Config.preset("llama-tiny", **SMALL, positions="alibi", norm_position="post", activation="geglu"),
    "sinusoidal": Config.preset("llama-tiny", **SMALL, positions="sinusoidal", num_kv_heads=1),
}  # fmt: skip


def text_data(batch_tokens: int = 128, max_seqlen: int = 64) -> tuple[PackedText, PackedText]:
    """(training, validation): the paragraphs of the license, in bytes."""
    text = (Path(__file__).resolve().parent.parent / "LICENSE").read_text(encoding="utf-8")
    corpus = Corpus.of_texts(text.split("\n\n"), BYTES)
    training, validation = corpus.split(0.1)
    made = {"batch_tokens": batch_tokens, "max_seqlen": max_seqlen}
    return PackedText(corpus, training, **made), PackedText(corpus, validation, **made, shuffle=False)


def make_model(config: Config, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config)


def train(model, data, out=None, **settings) -> Trainer:
    """A trainer that has run."""
    more = {name: settings.pop(name) for name in ("validation", "tokenizer", "ranks", "resume") if name in settings}
    trainer = Trainer(model, data, Settings(**settings), out, report=lambda line: None, **more)
    trainer.run()
    return trainer
