"""`fastattn explain`: a model and a text in, a page out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .checkpoints import load
from .explain import COMPARED, MOST_TOKENS, explain, write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help=f"what the model reads: 1 to {MOST_TOKENS} tokens")
    parser.add_argument("--model", required=True, help="a folder in Hugging Face's format, or smollm2")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page, one file")
    parser.add_argument(
        "--compare", nargs=3, default=COMPARED, metavar=("WORD", "SENTENCE", "SENTENCE"),
        help="a word, and two sentences in which its vectors are compared",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Write the page; 0 where that went well, 1 and a line on stderr where it did not."""
    try:
        model, tokenizer = load(options.model)
        if tokenizer is None:
            raise ValueError(f"explain: --model must have a tokeniser, got {options.model}, which has none")
        page = explain(model, tokenizer, options.text, name=str(options.model), compared=options.compare)
        write_page(options.out, page)
    except (ValueError, TypeError, ImportError, OSError) as error:  # CheckpointError is a ValueError
        print(f"fastattn explain: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(page) / 1e3:,.0f} kB")
    return 0
