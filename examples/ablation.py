"""What each choice of an architecture is worth, on real text: one small model, changed in one thing at a time, trained alike.

    python examples/ablation.py                            # some minutes on one quiet core; needs torch alone
    python examples/ablation.py --steps 1000 --device cuda --hidden-size 512 --only rotary "experts.*"

Prints a Markdown table: the loss on held-out text, and how long a step takes. The text is Python's reference manual, which every Python
carries (pydoc_data.topics), read as bytes. A loss is of one seed: differences of a hundredth are none.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time

import torch

from fastattn.models import ByteTokenizer, Config, Transformer
from fastattn.models.data import Corpus, PackedText
from fastattn.models.training import Settings, Trainer

TOKENIZER = ByteTokenizer()

# What differs from the first line: rotary positions, as many key heads as heads, no window, one feed-forward layer.
VARIANTS: dict[str, dict] = {
    "rotary, multi-head, dense": {},
    "learned positions": {"positions": "learned"},
    "sinusoidal positions": {"positions": "sinusoidal"},
    "ALiBi": {"positions": "alibi"},
    "grouped-query, 2 of 4 key heads": {"num_kv_heads": 2},
    "multi-query, 1 of 4 key heads": {"num_kv_heads": 1},
    "window of 32": {"window": 32},
    "window of 32 in every other layer": {"window": (32, None)},
    "layer norm, GELU, biases (GPT-2's)": {"norm": "layer", "activation": "gelu", "bias": True},
    "post-norm": {"norm_position": "post"},
    "experts, 2 of 8, of half the width": {"num_experts": 8, "top_k": 2, "intermediate_size": "half"},
}


def text_data(batch_tokens: int, seqlen: int, seed: int = 0) -> tuple[PackedText, PackedText]:
    from pydoc_data.topics import topics

    corpus = Corpus.of_texts((topics[name] for name in sorted(topics)), TOKENIZER)
    training, validation = corpus.split(0.1, seed)
    made = {"batch_tokens": batch_tokens, "max_seqlen": seqlen, "seed": seed}
    return PackedText(corpus, training, **made), PackedText(corpus, validation, **made, shuffle=False)


def config_of(changes: dict, hidden_size: int, num_layers: int, seqlen: int) -> Config:
    base = Config(vocab_size=TOKENIZER.vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=4, max_seqlen=seqlen)
    if changes.get("intermediate_size") == "half":
        changes = changes | {"intermediate_size": base.intermediate_size // 2}
    fields = base.to_dict() | {"intermediate_size": None} | changes
    return Config.from_dict(fields)


def measure(config: Config, data: tuple[PackedText, PackedText], settings: Settings, device: str) -> tuple[str, ...]:
    """A row of the table: parameters, losses, perplexity, time of a step."""
    torch.manual_seed(settings.seed)
    model = Transformer(config).to(device)
    clock = Clock(data[0])
    trainer = Trainer(model, clock, settings, report=lambda line: None)
    trainer.run()
    trainer.validation = data[1]
    validation = trainer.validate()
    last = statistics.mean(trainer.losses[-10:])
    return (
        f"{model.num_parameters() / 1e6:.2f} M", f"{last:.3f}", f"{validation:.3f}", f"{math.exp(validation):.2f}",
        f"{clock.median() * 1e3:.0f}",
    )  # fmt: skip


class Clock:
    """The data, which notes when each batch is asked for: that is once a step."""

    def __init__(self, data: PackedText) -> None:
        self.data, self.fingerprint, self.times = data, data.fingerprint, []

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: int) -> dict:
        self.times.append(time.perf_counter())
        return self.data.batch(index)

    def median(self) -> float:
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--validation-batches", type=int, default=1000, help="at most as many; by default all that is held out")
    parser.add_argument("--only", nargs="+", default=[""], metavar="REGEX", help="variants to train, by name")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps must be 3 or more")
    data = text_data(options.batch_tokens, options.seqlen)
    settings = Settings(steps=options.steps, lr=3e-3, dtype=options.dtype, validation_batches=options.validation_batches)
    print("| model | parameters | training loss | validation loss | perplexity a byte | ms a step |\n|---|---|---|---|---|---|")
    for name, changes in VARIANTS.items():
        if any(re.search(pattern, name) for pattern in options.only):
            config = config_of(changes, options.hidden_size, options.layers, options.seqlen)
            print("| " + " | ".join((name, *measure(config, data, settings, options.device))) + " |", flush=True)
    sizes = f"{options.layers} layers of {options.hidden_size}, {options.dtype} on {options.device}"
    print(f"\n{options.steps} steps of {options.batch_tokens} bytes in pieces of {options.seqlen}; {sizes}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
