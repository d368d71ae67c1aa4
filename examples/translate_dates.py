"""An encoder-decoder that learns to write dates in another format, from examples alone, to more than 99 % of dates it has never seen.

    python examples/translate_dates.py                     # minutes on one core; needs torch alone
    python examples/translate_dates.py "1 May 1999" "Tuesday, July 4, 2023"

Sources are in one of five formats, as people write them, targets are ISO 8601:

    "March 7, 2024"  "7 Mar 2024"  "Thursday, 7 March 2024"  "03/07/2024"  "7.3.24"   →   "2024-03-07"

It is teacher-forced: the decoder reads the target's characters and learns, at each, the next one. Questions are answered
without the target, by the likeliest character after each. A tenth of all days from 1950 to 2049 is never seen in training.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import time

import torch

from fastattn.models import ByteTokenizer, Config, EncoderDecoder
from fastattn.models.data import PackedPairs
from fastattn.models.training import Settings, Trainer

TOKENIZER = ByteTokenizer()
FORMATS = (
    "{d:%B} {d.day}, {d.year}", "{d.day} {d:%b} {d.year}", "{d:%A}, {d.day} {d:%B} {d.year}", "{d:%m/%d/%Y}", "{d.day}.{d.month}.{d:%y}",
)  # fmt: skip


def days(seed: int = 0) -> tuple[list[datetime.date], list[datetime.date]]:
    """(those to learn from, those held out)"""
    first, last = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
    every = [first + datetime.timedelta(n) for n in range((last - first).days + 1)]
    random.Random(seed).shuffle(every)
    return every[len(every) // 10 :], every[: len(every) // 10]


def pair(day: datetime.date, format: str) -> tuple[str, str]:
    return format.format(d=day), day.isoformat()


def encode(pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    return [(TOKENIZER.encode(source), TOKENIZER.encode(target)) for source, target in pairs]


def make_model(hidden_size: int = 64, num_layers: int = 2) -> EncoderDecoder:
    # Learned positions: where a character stands must be in what the encoder hands over, since attention to it knows no positions.
    config = Config(
        vocab_size=TOKENIZER.vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=4, max_seqlen=48, positions="learned",
        init_std=0.1,
    )  # fmt: skip
    return EncoderDecoder(config)


def translate(model: EncoderDecoder, sources: list[str]) -> list[str]:
    rows = [torch.tensor(TOKENIZER.encode(source)) for source in sources]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=TOKENIZER.pad_id)
    answers = model.generate(
        padded, source_mask=padded != TOKENIZER.pad_id, bos_id=TOKENIZER.bos_id, eos_id=TOKENIZER.eos_id, max_new_tokens=12
    )
    return [TOKENIZER.decode(answer) for answer in answers]


def exact(model: EncoderDecoder, pairs: list[tuple[str, str]]) -> list[bool]:
    """Which of the pairs it translates exactly."""
    was_training, answers = model.training, []
    model.eval()
    for start in range(0, len(pairs), 500):
        answers += translate(model, [source for source, _ in pairs[start : start + 500]])
    model.train(was_training)
    return [answer == target for answer, (_, target) in zip(answers, pairs)]


def train(steps: int, batch_size: int = 64, lr: float = 3e-3, seed: int = 0) -> tuple[EncoderDecoder, list[datetime.date]]:
    """A trained model, and the days that it has not seen."""
    learnt, held_out = days(seed)
    pairs = encode([pair(day, format) for day in learnt for format in FORMATS])
    data = PackedPairs(pairs, batch_size=batch_size, bos_id=TOKENIZER.bos_id, eos_id=TOKENIZER.eos_id, seed=seed)
    torch.manual_seed(seed)
    model = make_model()
    settings = Settings(steps=steps, lr=lr, warmup=min(50, steps // 4), final_lr=0.02, weight_decay=0.01, log_every=100)
    Trainer(model, data, settings).run()
    return model, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dates", nargs="*", default=["March 7, 2024", "Tuesday, 4 July 2023", "31.12.49", "1 May 1999"])
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    start = time.process_time()
    model, held_out = train(options.steps)
    trained = time.process_time()
    total = []
    for format in FORMATS:
        right = exact(model, [pair(day, format) for day in held_out])
        total += right
        example = pair(held_out[0], format)[0]
        print(f"{sum(right) / len(right):8.2%} of {len(right)} held-out days as in {example!r}")
    print(f"{sum(total) / len(total):8.2%} of all {len(total)}, exactly; {trained - start:.0f} CPU-seconds of training")
    for source, answer in zip(options.dates, translate(model.eval(), options.dates)):
        print(f"{source}  →  {answer}")
    sys.exit(sum(total) / len(total) <= 0.99)


if __name__ == "__main__":
    main()
