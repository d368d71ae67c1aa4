"""An encoder that fills in blanks: trained to find masked characters of real text from those on both sides.

    python examples/fill_in_blanks.py                      # minutes on one core; needs torch alone
    python examples/fill_in_blanks.py "The imp_rt st_tement is e_ecuted in t_o steps."

The text is Python's own reference manual, which every Python carries (pydoc_data.topics), read as bytes. A tenth of it is held
out, and what is printed of accuracy is of blanks in that tenth.
"""

from __future__ import annotations

import argparse

import torch

from fastattn.models import ByteTokenizer, Config, Encoder
from fastattn.models.data import Corpus, MaskedText, PackedText
from fastattn.models.training import Settings, Trainer

TOKENIZER = ByteTokenizer()
SENTENCES = (
    "The imp_rt st_tement is e_ecuted in t_o steps.",
    "A func_ion defin_tion defines a user-defined fun_tion ob_ect.",
    "If the ob_ect is a cl_ss instance, its __init__() m_thod is ca_led.",
)  # fmt: skip


def text_data(batch_tokens: int = 1024, seqlen: int = 128, seed: int = 0) -> tuple[MaskedText, MaskedText]:
    """(training, validation): the manual's sections, a character in seven masked."""
    from pydoc_data.topics import topics

    corpus = Corpus.of_texts((topics[name] for name in sorted(topics)), TOKENIZER)
    training, validation = corpus.split(0.1, seed)
    made = {"batch_tokens": batch_tokens, "max_seqlen": seqlen, "seed": seed}
    masked = {"mask_id": TOKENIZER.mask_id, "eos_id": TOKENIZER.eos_id, "vocab_size": TOKENIZER.vocab_size}
    texts = PackedText(corpus, training, **made), PackedText(corpus, validation, **made, shuffle=False)
    return MaskedText(texts[0], **masked), MaskedText(texts[1], **masked)


def make_model(seqlen: int = 128) -> Encoder:
    return Encoder(Config.preset("llama-tiny", num_layers=3, max_seqlen=seqlen))


@torch.no_grad()
def fill_in(model: Encoder, text: str) -> str:
    """The text, with the likeliest character for each "_" that stands within a word."""
    tokens = torch.tensor([TOKENIZER.encode(text)])
    blank = torch.tensor([[char == "_" and text[i - 1 : i] != "_" and text[i + 1 : i + 2] != "_" for i, char in enumerate(text)]])
    likeliest = model.eval()(tokens.where(~blank, TOKENIZER.mask_id))[..., :256].argmax(-1)
    return TOKENIZER.decode(tokens.where(~blank, likeliest)[0].tolist())


@torch.no_grad()
def accuracy(model: Encoder, data: MaskedText, batches: int = 20) -> float:
    """The share of masked characters that it finds."""
    right = count = 0
    model.eval()
    for index in range(min(batches, len(data))):
        batch = data.batch(index)
        blank = batch["tokens"] == TOKENIZER.mask_id
        found = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"], max_seqlen=batch["max_seqlen"]).argmax(-1)
        right += int((found == batch["labels"])[blank].sum())
        count += int(blank.sum())
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="ASCII text with _ for each blank")
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    if not all(sentence.isascii() for sentence in options.sentences):
        parser.error("sentences must be ASCII: a blank is one byte")
    training, validation = text_data()
    torch.manual_seed(0)
    model = make_model()
    settings = Settings(steps=options.steps, lr=3e-3, log_every=100, validate_every=options.steps)
    Trainer(model, training, settings, validation=validation).run()
    print(f"{accuracy(model, validation):.1%} of the blanks in held-out text found")
    for sentence in options.sentences:
        print(f"{sentence}\n{fill_in(model, sentence)}")


if __name__ == "__main__":
    main()
