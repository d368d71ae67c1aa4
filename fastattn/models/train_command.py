"""`fastattn train`: a model of a preset, or of a folder, trained on a file or folder of text."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from fastattn.command_line import INTERRUPTED, device, silence_stdout

from . import checkpoints, tokenizers
from .config import PRESETS, Config
from .data import Corpus, DataError, MaskedText, PackedPairs, PackedText, generator, read_pairs, read_text, text_files
from .encoder import Encoder, EncoderDecoder
from .files import CheckpointError
from .ranks import Ranks, ranks
from .snapshots import snapshots
from .tokenizers import Tokenizer
from .training import DTYPES, Batches, Interrupted, Settings, Trainer, TrainingError, is_out_of_memory
from .transformer import Transformer

MODELS = {"next-token": Transformer, "masked-token": Encoder, "seq2seq": EncoderDecoder}
_DEFAULTS = {name: field.default for name, field in Settings.__dataclass_fields__.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(group: Any, name: str, help: str, **options: Any) -> None:
        default = options.get("default")
        shown = f" ({default})" if default not in (None, "", []) else ""
        group.add_argument(name, help=help + shown, **options)

    data = parser.add_argument_group("data")
    add(data, "--data", "a text file, or a folder of them; for seq2seq a file of lines: source, tab, target", type=Path, required=True)
    add(data, "--glob", "of a folder, the files to read", default="**/*")
    add(data, "--tokenizer", "bytes, bpe:SIZE to learn one from the data, or a tokenizer.json or its folder", default=None, metavar="NAME")
    add(data, "--objective", "what is learnt", choices=list(MODELS), default="next-token")
    add(data, "--validation-fraction", "of the data, held out", type=float, default=0.05, metavar="F")

    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group(required=True)
    add(which, "--preset", f"of {', '.join(PRESETS)}; the vocabulary is the tokeniser's", choices=list(PRESETS), metavar="NAME")
    add(which, "--model", "go on with the weights of this folder (and its tokeniser)", type=Path, metavar="DIR")
    changed = {"action": "append", "default": [], "metavar": "FIELD=VALUE"}
    add(model, "--set", "change a field of the preset's Config, as hidden_size=64; may be repeated", **changed)

    training = parser.add_argument_group("training")
    add(training, "--steps", "of the optimizer", type=int, required=True)
    add(training, "--out", "the folder of checkpoints, log, and the model at the end", type=Path, required=True)
    add(training, "--resume", "go on with the run in --out, where there is one", action="store_true")
    add(training, "--batch-tokens", "tokens of a batch (seq2seq: pairs × 32)", type=int, default=4096, metavar="T")
    add(training, "--seqlen", "longer documents are cut to pieces of it; default: the model's max_seqlen", type=int, metavar="S")
    for name in ("accumulation", "lr", "final_lr", "weight_decay", "clip", "seed", "save_every", "validate_every", "log_every"):
        default = _DEFAULTS[name]
        add(training, f"--{name.replace('_', '-')}", _HELP[name], type=type(default), default=default)
    add(training, "--warmup", "steps of growing learning rate; default: a tenth, 100 at most", type=int)
    add(training, "--device", "cuda where there is one, else cpu", type=device, default=None)
    add(training, "--dtype", "what is computed in; parameters are float32", choices=list(DTYPES), default="float32")
    add(training, "--checkpoint-activations", "compute each layer again in the backward, for memory", action="store_true")
    add(training, "--compile", "torch.compile the blocks", action="store_true")


_HELP = {
    "accumulation": "batches of a step",
    "lr": "highest learning rate",
    "final_lr": "the last learning rate, over the highest",
    "weight_decay": "of matrices",
    "clip": "the gradient's largest norm",
    "seed": "of weights, of the order of data, of the split",
    "save_every": "steps between checkpoints",
    "validate_every": "steps between validations",
    "log_every": "steps between lines",
}


def run(options: argparse.Namespace) -> int:
    """0; 1 with a message on stderr for bad data or files, and for a run that ended early; 130 where it was interrupted."""
    try:
        with ranks(options.device) as those:
            _train(options, those)
    except Interrupted as error:
        return _fail(f"{error}: go on with --resume", INTERRUPTED)
    except KeyboardInterrupt:  # before the first step, or a second one
        return _fail("interrupted; whatever was saved before is whole", 130)
    except (DataError, CheckpointError, TrainingError, ValueError, TypeError, ImportError, OSError) as error:
        return _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("out of memory before the first step: choose a smaller model", 1)
    return 0


def _say(line: str) -> None:
    """A line of progress; where nobody can read any more, a run goes on without."""
    try:
        print(line, flush=True)
    except OSError:
        silence_stdout()


def _fail(error: object, status: int) -> int:
    print(f"fastattn train: {str(error).removeprefix('train: ')}", file=sys.stderr)
    return status


def _train(options: argparse.Namespace, those: Ranks) -> None:
    if importlib.util.find_spec("safetensors") is None:  # before hours of training, rather than after
        raise ImportError("the model is saved by safetensors, which is not installed: pip install 'fastattn[models]'")
    if not 0.0 <= options.validation_fraction < 1.0:
        raise ValueError(f"--validation-fraction must lie in [0, 1), got {options.validation_fraction}")
    settings = Settings(
        checkpointing=options.checkpoint_activations, compile=options.compile, dtype=options.dtype, steps=options.steps,
        warmup=options.warmup, **{name: getattr(options, name) for name in _HELP},
    )  # fmt: skip
    if snapshots(options.out / "checkpoints") and not options.resume:
        raise CheckpointError(f"{options.out} holds a run already: go on with --resume, or choose another folder")
    model, tokenizer = _model(options, those)
    data, validation = _data(options, those, model.config, tokenizer)
    trainer = Trainer(
        model, data, settings, options.out, validation=validation, tokenizer=tokenizer, ranks=those, resume=options.resume,
        report=_say,
    )  # fmt: skip
    if trainer.step > options.steps:
        raise ValueError(f"--steps must be at least {trainer.step}, which the run in {options.out} has taken already, got {options.steps}")
    trainer.run()
    if those.rank == 0:
        print(f"the model is in {options.out}")


def _model(options: argparse.Namespace, those: Ranks) -> tuple[Any, Tokenizer]:
    wanted = MODELS[options.objective]
    if options.model is not None:
        if options.set:
            raise ValueError("--set must go with --preset, and --model has a config already")
        model, tokenizer = checkpoints.load(options.model, those.device, torch.float32)
        if type(model) is not wanted:
            raise ValueError(f"--objective {options.objective} must have a model of class {wanted.__name__}, got {type(model).__name__}")
        if options.tokenizer is not None or tokenizer is None:
            tokenizer = _tokenizer(options, those)
        if tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, got a model of {model.config.vocab_size}"
            raise ValueError(f"--model must have a vocabulary of at least the tokeniser's {sizes}")
        return model, tokenizer
    tokenizer = _tokenizer(options, those)
    changes = dict(map(_change, options.set))
    config = Config.preset(options.preset, **{"vocab_size": tokenizer.vocab_size} | changes)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"--set vocab_size must be at least the tokeniser's {tokenizer.vocab_size} tokens, got {config.vocab_size}")
    torch.manual_seed(options.seed)
    return wanted(config).to(those.device), tokenizer


def _change(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set must be FIELD=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word


def _tokenizer(options: argparse.Namespace, those: Ranks) -> Tokenizer:
    """The run's own, where it is resumed; else what --tokenizer says. One that is learnt is learnt by rank 0, and kept."""
    if not (options.resume and tokenizers.has_tokenizer(options.out)):
        if those.rank == 0:
            _new_tokenizer(options).save(options.out)
        those.wait()
    return tokenizers.load(options.out)


def _new_tokenizer(options: argparse.Namespace) -> Tokenizer:
    name = options.tokenizer or "bytes"
    kind, _, size = name.partition(":")
    if name == "bytes":
        return tokenizers.ByteTokenizer()
    if kind == "bpe":
        if not size.isdigit():
            raise ValueError(f"--tokenizer must be bpe:SIZE, as bpe:4096, got {name!r}")
        files = text_files(options.data, options.glob, options.out)
        return tokenizers.train_bpe((text for text, _ in read_text(files)), int(size))
    if not Path(name).exists():
        raise DataError(f"--tokenizer must be bytes, bpe:SIZE, or a file or folder that is there, got {name!r}")
    return tokenizers.load(name)


def _data(options: argparse.Namespace, those: Ranks, config: Config, tokenizer: Tokenizer) -> tuple[Batches, Batches | None]:
    """(training, validation or None)"""
    seqlen = config.max_seqlen if options.seqlen is None else options.seqlen
    if config.positions != "alibi" and seqlen > config.max_seqlen:
        raise ValueError(f"--seqlen must be at most the model's max_seqlen = {config.max_seqlen}, got {seqlen}")
    if options.objective == "seq2seq":
        return _pairs(options, seqlen, tokenizer)
    files = text_files(options.data, options.glob, options.out)
    cache = options.out / "tokens"
    if those.rank == 0:
        Corpus.cached(files, tokenizer, cache)
    those.wait()
    corpus = Corpus.cached(files, tokenizer, cache)
    made = {"batch_tokens": options.batch_tokens, "max_seqlen": seqlen, "seed": options.seed}
    spans = corpus.split(options.validation_fraction, options.seed)
    texts = [PackedText(corpus, spans[0], **made)]
    if options.validation_fraction:
        texts.append(PackedText(corpus, spans[1], **made, shuffle=False))
    if options.objective == "masked-token":
        if tokenizer.mask_id is None:
            raise ValueError("--objective masked-token must have a tokeniser with a mask token, and this one has none")
        special = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
        texts = [MaskedText(text, **special) for text in texts]
    return texts[0], texts[1] if texts[1:] else None


def _pairs(options: argparse.Namespace, seqlen: int, tokenizer: Tokenizer) -> tuple[Batches, Batches | None]:
    if None in (tokenizer.bos_id, tokenizer.eos_id):
        raise ValueError("--objective seq2seq must have a tokeniser with tokens for begin and end, and this one lacks one")
    pairs = read_pairs(options.data, lambda text: tokenizer.encode(text, special=False))
    for number, pair in enumerate(pairs, 1):
        if max(map(len, pair)) >= seqlen:
            raise DataError(f"data: {options.data}, line {number} must have less than {seqlen} tokens a side, got {max(map(len, pair))}")
    order = torch.randperm(len(pairs), generator=generator("split", options.seed)).tolist()
    left = round(len(pairs) * (1.0 - options.validation_fraction))
    made = {"batch_size": max(1, options.batch_tokens // 32), "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "seed": options.seed}
    training = PackedPairs([pairs[i] for i in order[:left]], **made)
    held_out = [pairs[i] for i in order[left:]]
    return training, PackedPairs(held_out, **made, shuffle=False) if held_out else None
