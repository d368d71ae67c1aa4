"""Text to token ids and back: byte-pair encoding and any other `tokenizer.json` through the `tokenizers` library, bytes without it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .files import CheckpointError, optional, read_json, write_atomically

END, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"  # the special tokens of what is made here
_NAMES = ("bos", "eos", "pad", "mask")


class Tokenizer(Protocol):
    """What training and generation need of a tokeniser.

    vocab_size: one more than the largest id. bos_id, eos_id, pad_id, mask_id: of special tokens, None where there is none.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    mask_id: int | None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text. special: with the special tokens that its template adds (a Llama tokeniser's first one, say). Those that are
        written out in the text are read as tokens where a file of Hugging Face says so."""

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; what is no UTF-8 becomes U+FFFD. special: with special tokens written out."""

    def save(self, folder: str | Path) -> None:
        """Write the files that `load`, and transformers' AutoTokenizer, read."""


class ByteTokenizer:
    """Each byte of UTF-8 is a token: ids 0 to 255; then the end of a text 256 (bos_id and eos_id), padding 257, a mask 258.

    In a text, "<|endoftext|>" is thirteen bytes like any others; transformers, which reads what `save` writes, takes it for the token.
    """

    vocab_size = 259
    bos_id = eos_id = 256
    pad_id, mask_id = 257, 258
    _SPECIAL = {256: END, 257: PAD, 258: MASK}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        pieces = bytearray()
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"ByteTokenizer: ids must lie in [0, {self.vocab_size}), got {id}")
            pieces += bytes([id]) if id < 256 else self._SPECIAL[id].encode() if special else b""
        return pieces.decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        """As byte-pair encoding without a pair, so that transformers reads the same ids."""
        special = [
            {"id": id, "content": text, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
            for id, text in self._SPECIAL.items()
        ]  # fmt: skip
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocab = {char: byte for byte, char in enumerate(_byte_characters())} | {text: id for id, text in self._SPECIAL.items()}
        content = {
            "version": "1.0", "added_tokens": special, "pre_tokenizer": level, "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }  # fmt: skip
        folder = Path(folder)
        write_atomically(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False).encode())
        _write_config(folder, {"bos": END, "eos": END, "pad": PAD, "mask": MASK}, None, fastattn_tokenizer="bytes")


class FileTokenizer:
    """A tokeniser of the `tokenizers` library, and which of its tokens mean what.

    Args:
        tokenizer: the library's. special: tokens by "bos", "eos", "pad" and "mask", None where there is none. chat_template: Jinja text.
    """

    def __init__(self, tokenizer: Any, special: dict[str, str | None] | None = None, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.special = {name: (special or {}).get(name) for name in _NAMES}
        for name, token in self.special.items():
            if token is not None and tokenizer.token_to_id(token) is None:
                raise ValueError(f"FileTokenizer: {name} must be a token of the vocabulary, got {token!r}")
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (
            None if token is None else tokenizer.token_to_id(token) for token in self.special.values()
        )
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the model answers: what the user says, or a list of {"role": …, "content": …}.

        Raises: ValueError where the model has no chat template.
        """
        if self.chat_template is None:
            raise ValueError("FileTokenizer.chat: the tokeniser must have a chat template, and this one has none")
        jinja2 = optional("jinja2.sandbox")
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)

        def raise_exception(message: str) -> None:  # what templates call it
            raise ValueError(f"FileTokenizer.chat: {message}")

        environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        template = environment.from_string(self.chat_template)
        tokens = {f"{name}_token": token or "" for name, token in self.special.items()}
        return self.encode(template.render(messages=messages, add_generation_prompt=True, **tokens), special=False)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        write_atomically(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True).encode())
        _write_config(folder, self.special, self.chat_template)


def _write_config(folder: Path, special: dict[str, str | None], chat_template: str | None, **more: str) -> None:
    config: dict[str, Any] = {f"{name}_token": token for name, token in special.items() if token is not None}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **more}
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False).encode())


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Byte-pair encoding learnt from texts: up to vocab_size tokens, of which 256 are the bytes and three special.

    Any text can be encoded, and decodes to itself. Short texts have fewer pairs than asked for: the result's `vocab_size` counts them.

    Raises: ValueError for vocab_size below 259 or no text; ImportError without the `tokenizers` library.
    """
    if vocab_size < 259:
        raise ValueError(f"train_bpe: vocab_size must be at least 259, the bytes and three special tokens, got {vocab_size}")
    library = optional("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD, MASK], initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    seen = False

    def read() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text)
            yield text

    tokenizer.train_from_iterator(read(), trainer)
    if not seen:
        raise ValueError("train_bpe: texts must hold at least one that is not empty, got none")
    return FileTokenizer(tokenizer, {"bos": END, "eos": END, "pad": PAD, "mask": MASK})


def load(path: str | Path) -> Tokenizer:
    """The tokeniser of a folder with a tokenizer.json (or GPT-2's vocab.json and merges.txt), or of such a file.

    Raises: CheckpointError, a ValueError, for files that are missing or cannot be read, by name; ImportError without `tokenizers`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    config = read_json(folder / "tokenizer_config.json", {})
    if config.get("fastattn_tokenizer") == "bytes":
        return ByteTokenizer()
    return FileTokenizer(_read(file, folder), _special(folder, config), _chat_template(folder, config))


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "merges.txt").exists()


def _read(file: Path, folder: Path) -> Any:
    library = optional("tokenizers")
    try:
        if file.exists():
            return library.Tokenizer.from_file(str(file))
        if (folder / "merges.txt").exists():
            return byte_level(library.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises no narrower one
        raise CheckpointError(f"load: {file} must be a tokeniser that `tokenizers` reads: {error}") from error
    raise CheckpointError(f"load: {folder} must hold a tokenizer.json, or a vocab.json and a merges.txt")


def byte_level(model: Any, *, split_digits: bool = False) -> Any:
    """A tokeniser that splits text into words as GPT-2 does, and then each into tokens of a BPE model over bytes."""
    library = optional("tokenizers")
    tokenizer = library.Tokenizer(model)
    split = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        split = library.pre_tokenizers.Sequence([library.pre_tokenizers.Digits(individual_digits=True), split])
    tokenizer.pre_tokenizer, tokenizer.decoder = split, library.decoders.ByteLevel()
    return tokenizer


def _special(folder: Path, config: dict[str, Any]) -> dict[str, str | None]:
    config = read_json(folder / "special_tokens_map.json", {}) | config
    found = {name: config.get(f"{name}_token") for name in _NAMES}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class StreamDecoder:
    """Text as its tokens come, whole characters at a time: what `push` and `finish` return, joined, is the text of all ids.

    Example:
        >>> decoder = StreamDecoder(tokenizer)
        >>> for id in ids: print(decoder.push(id), end="")
        >>> print(decoder.finish())
    """

    _WINDOW = 16  # ids that are decoded again with each new one, so that a long answer costs no more at its end

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of these ids' text that have been returned

    def push(self, id: int) -> str:
        """The text that this id completes; empty within a character."""
        self._ids.append(id)
        text = self.tokenizer.decode(self._ids)
        whole = text.removesuffix("\ufffd")  # the beginning of a character decodes to one such, and so does what never becomes one
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        if whole == text and len(self._ids) > self._WINDOW:
            self._ids = [id]
            self._shown = len(self.tokenizer.decode(self._ids))
        return new

    def finish(self) -> str:
        """What is left, where the ids end within a character."""
        new = self.tokenizer.decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return new


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary: itself, or one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
