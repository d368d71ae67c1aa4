"""`fastattn generate`: text of a model, streamed to stdout, with the figures on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastattn.command_line import INTERRUPTED, device, silence_stdout
from fastattn.page_pool import OutOfPages

from . import checkpoints
from .generation import Event, Options, Statistics, stream
from .logits import NoDistribution
from .tokenizers import Tokenizer
from .transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FAILURES = (ValueError, ImportError, OSError, OutOfPages, NoDistribution)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, Options()
    names = ", ".join(checkpoints.NAMES)
    add("--model", required=True, metavar="DIR", help=f"a folder with config.json and safetensors, a .gguf file, or {names}")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated: they run as one batch")
    prompts.add_argument(
        "--prompts", metavar="FILE", help='a prompt a line; in a .jsonl file each line a string, or {"prompt": ...}; - is stdin'
    )
    add("--chat", action="store_true", help="put each prompt into the model's chat template")
    add("--json", action="store_true", help="an answer a line, as they end: index, prompt, text, tokens, reason")
    add("--max-new-tokens", type=int, metavar="N", default=default.max_new_tokens, help="default: %(default)s")
    add("--min-new-tokens", type=int, metavar="N", default=default.min_new_tokens, help="no end before")
    add("--temperature", type=float, metavar="T", default=default.temperature, help="0, the default, is greedy")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the fewest tokens whose probabilities reach P")
    add("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="R", default=default.repetition_penalty, help="above 1: fewer repetitions")
    add("--stop", action="append", metavar="TEXT", default=[], help="ends an answer before it; may be repeated")
    add("--seed", type=int, help="of the draws; another each time by default")
    add("--draft", metavar="DIR", help="a smaller model of the same vocabulary that guesses tokens, for the model to accept or not")
    add("--draft-tokens", type=int, metavar="K", default=default.draft_tokens, help="a guess's; default: %(default)s")
    add("--max-batch", type=int, metavar="B", default=default.max_batch, help="prompts at once, at most; default: %(default)s")
    add("--page-size", type=int, metavar="S", default=default.page_size, help="tokens of a cache page; default: %(default)s")
    add("--num-pages", type=int, metavar="N", help="of the cache; default: enough for --max-batch answers")
    add("--device", type=device, help="cuda where there is one, else cpu; or name it")
    add("--dtype", choices=DTYPES, help="of the weights; default: the file's")


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns 0, 1 for what cannot be done, 2 for bad arguments, 130 after Ctrl-C."""
    try:
        Options(**_options(arguments))
    except (ValueError, TypeError) as error:
        return _fail(error, 2)
    try:
        return _generate(arguments)
    except KeyboardInterrupt:  # before the first token: there is nothing to say of it
        return INTERRUPTED
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail("out of memory; a smaller --max-batch or fewer --num-pages take less", 1)
        if not isinstance(error, _FAILURES):
            raise
        return _fail(error, 1)


def _is_out_of_memory(error: Exception) -> bool:
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # for which torch has no class
    return on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _fail(message: object, status: int) -> int:
    print(f"fastattn generate: {str(message).removeprefix('generate: ')}", file=sys.stderr)
    return status


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `Options`, but for the draft model."""
    return {name: value for name, value in vars(arguments).items() if name in Options.__dataclass_fields__ and name != "draft"}


def _generate(arguments: argparse.Namespace) -> int:
    prompts = arguments.prompt or _read(arguments.prompts)
    model, tokenizer = _load("--model", arguments.model, arguments)
    draft, of_draft = (None, None) if arguments.draft is None else _load("--draft", arguments.draft, arguments)
    if draft is not None:
        _check_vocabularies(tokenizer, of_draft)
    asked = [_chat(tokenizer, prompt) for prompt in prompts] if arguments.chat else prompts
    generation = stream(model, asked, tokenizer, draft=draft, **_options(arguments))
    show = _as_json(prompts) if arguments.json else _as_text(prompts)
    status = 0
    try:
        for event in generation:
            show(event)
    except KeyboardInterrupt:
        print(flush=True)
        status = INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        status = 1
    finally:
        generation.close()
    print(_describe(generation.statistics, len(prompts)), file=sys.stderr)
    return status


def _read(file: str) -> list[str]:
    """The prompts of a file, without empty lines."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"--prompts must name a file with a prompt a line, {file} has none")
    if not file.endswith(".jsonl"):
        return lines
    return [_of_json(line, f"{file}, prompt {number}") for number, line in enumerate(lines, 1)]


def _of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"--prompts: {where} must be JSON: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'--prompts: {where} must be a string or {{"prompt": a string}}, got {line[:60]}')
    return prompt


def _load(option: str, name: str, arguments: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = checkpoints.load(name, device, DTYPES.get(arguments.dtype))
    if not (isinstance(model, Transformer) and model.causal):
        raise ValueError(f"{option} must be a decoder-only model, {name} is of {type(model).__name__}")
    if tokenizer is None:
        raise ValueError(f"{option} must have a tokeniser, {name} has no tokenizer.json")
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, of which the model has {model.config.vocab_size}"
        raise ValueError(f"{option} must have a tokeniser of its own vocabulary, that of {name} has {sizes}")
    return model, tokenizer


def _check_vocabularies(tokenizer: Tokenizer, of_draft: Tokenizer) -> None:
    sizes = tokenizer.vocab_size, of_draft.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"--draft must have the model's vocabulary, of {sizes[0]} tokens, got one of {sizes[1]}")
    for id in range(sizes[0]):
        theirs = [t.decode([id], special=True) for t in (tokenizer, of_draft)]
        if theirs[0] != theirs[1]:
            raise ValueError(f"--draft must have the model's vocabulary, token {id} is {theirs[0]!r} there, got {theirs[1]!r}")


def _chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if not hasattr(tokenizer, "chat"):
        raise ValueError("--chat needs a model with a chat template, this one has none")
    return tokenizer.chat(prompt)


def _as_text(prompts: list[str]) -> Callable[[Event], None]:
    """Answers in the prompts' order, under headings where there are several: the first that is not done as it comes, what comes of the
    others when it is their turn."""
    held, done, turn = {index: "" for index in range(len(prompts))}, set(), 0

    def begin() -> None:
        if len(prompts) > 1 and turn < len(prompts):
            print(f"==> {prompts[turn]} <==", flush=True)

    def show(event: Event) -> None:
        nonlocal turn
        held[event.sequence] += event.text
        if event.reason is not None:
            done.add(event.sequence)
        while turn < len(prompts):
            print(held[turn], end="", flush=True)
            held[turn] = ""
            if turn not in done:
                return
            print(flush=True)
            turn += 1
            begin()

    begin()
    return show


def _as_json(prompts: list[str]) -> Callable[[Event], None]:
    texts, counts = [""] * len(prompts), [0] * len(prompts)

    def show(event: Event) -> None:
        index = event.sequence
        texts[index] += event.text
        counts[index] += len(event.tokens)
        if event.reason is not None:
            line = {"index": index, "prompt": prompts[index], "text": texts[index], "tokens": counts[index], "reason": event.reason}
            print(json.dumps(line, ensure_ascii=False), flush=True)

    return show


def _describe(of: Statistics, num_prompts: int) -> str:
    parts = [
        f"{num_prompts} prompt{'s' * (num_prompts != 1)}, {of.new_tokens} new tokens",
        f"prefill {of.prefill_tokens} tokens, {of.prefill_rate:.1f}/s, {of.cached_tokens} found in the cache",
        f"decode {of.decode_rate:.1f} tokens/s",
        f"{of.peak_pages} of {of.num_pages} pages used",
    ]
    if of.preemptions:
        parts.append(f"{of.preemptions} times out of pages")
    if of.drafted:
        parts.append(f"{of.acceptance_rate:.0%} of {of.drafted} guesses accepted")
    return "; ".join(parts)
