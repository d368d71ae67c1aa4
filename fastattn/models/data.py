"""Text to packed batches of tokens: files, documents, a corpus in memory or mapped from a file, a split, and batches by their number.

A batch is T tokens without padding: whole documents one behind the other, with cu_seqlens, so that none sees another; the
first and the last may be parts. Which tokens batch i holds follows from the seed and i alone: a position in the data is one
integer, and needs no state.
"""

from __future__ import annotations

import array
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_atomically
from .tokenizers import END, Tokenizer

IGNORED = -100  # a label where there is nothing to learn
_PIECE = 1 << 20  # characters that are tokenised at a time


class DataError(ValueError):
    """Data that cannot be trained on: missing, unreadable, no text, or too little of it."""


# --------------------------------------------------------------------------------------------------------------------
# Documents.


def text_files(path: str | Path, glob: str = "**/*", besides: Path | None = None) -> list[Path]:
    """The file, or the folder's files whose path within it matches `glob`, in the order of their names, hidden ones left out, and those of
    the folder `besides`, where a run that reads them writes.

    Raises: DataError where there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"data: {path} must be a file or a folder, and there is none")
    found = sorted(file for file in path.glob(glob) if file.is_file())
    visible = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if besides is not None:
        visible = [file for file in visible if besides.resolve() not in file.resolve().parents]
    if not visible:
        raise DataError(f"data: {path} must hold files that match {glob}, and there is none")
    return visible


def read_text(files: Iterable[Path]) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends behind it): pieces of about a million characters, which end with a line or a document. A file is a
    document, or several with <|endoftext|> between them.

    Raises: DataError for what cannot be read, or is not UTF-8 text.
    """
    for file in files:
        try:
            with open(file, encoding="utf-8", newline="") as opened:
                while lines := opened.readlines(_PIECE):
                    text = "".join(lines)
                    if "\0" in text:
                        raise DataError(f"data: {file} must be text, and holds a zero byte")
                    *whole, rest = text.split(END)
                    yield from ((part, True) for part in whole)
                    yield rest, False
                yield "", True
        except UnicodeDecodeError as error:
            raise DataError(f"data: {file} must be text in UTF-8, and holds the byte {error.object[error.start]:#04x}") from error
        except OSError as error:
            raise DataError(f"data: {file} cannot be read: {error.strerror}") from error


# --------------------------------------------------------------------------------------------------------------------
# A corpus.


class Corpus:
    """All documents' tokens, one behind the other.

    Attributes: tokens (N,) int32, in memory or mapped from a file. ends (D,) int64: where each document ends. fingerprint: of both.
    """

    def __init__(self, tokens: Tensor, ends: Tensor, fingerprint: str) -> None:
        self.tokens, self.ends, self.fingerprint = tokens, ends, fingerprint

    @classmethod
    def of_texts(cls, texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
        """In memory, of one document a text."""
        tokens, ends, sha256 = array.array("i"), [], hashlib.sha256()
        for ids, is_last in _encoded(((text, True) for text in texts), tokenizer):
            tokens.extend(ids)
            sha256.update(ids.tobytes())
            if is_last:
                ends.append(len(tokens))
        _check(ends)
        return cls(torch.frombuffer(tokens, dtype=torch.int32), torch.tensor(ends), _fingerprint(sha256, ends))

    @classmethod
    def cached(cls, files: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> Corpus:
        """Mapped from a file in `folder`, which is written unless it is there, of the same files and tokeniser.

        Raises: DataError as `read_text`, and where there is no token; OSError for a full disk.
        """
        seen = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        key = hashlib.sha256(repr((seen, tokenizer_fingerprint(tokenizer))).encode()).hexdigest()[:16]
        tokens_file, ends_file, meta_file = (folder / f"{key}.{end}" for end in ("tokens", "ends", "json"))
        if not meta_file.exists():  # it comes last: what it describes is whole
            written: dict[str, Any] = {}
            write_atomically(tokens_file, lambda path: written.update(_write(path, files, tokenizer)))
            ends = array.array("q", written.pop("ends"))
            write_atomically(ends_file, ends.tobytes())
            write_atomically(meta_file, json.dumps(written).encode())
        meta = json.loads(meta_file.read_text())
        sizes = (tokens_file.stat().st_size, ends_file.stat().st_size)
        if sizes != (4 * meta["tokens"], 8 * meta["documents"]):
            raise DataError(f"data: {tokens_file} and {ends_file} must have {meta['tokens']} tokens and {meta['documents']} documents")
        tokens = torch.from_file(str(tokens_file), size=meta["tokens"], dtype=torch.int32)
        return cls(tokens, torch.from_file(str(ends_file), size=meta["documents"], dtype=torch.int64), meta["fingerprint"])

    def split(self, validation_fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(training, validation): the [start, end) of tokens of each, (…, 2) int64.

        Documents are drawn by the seed, and the last ones are held out, that fraction of all tokens; one of them may be cut in two, and
        where there is one document alone, its end is what is held out.
        """
        spans = torch.stack([torch.cat([self.ends.new_zeros(1), self.ends[:-1]]), self.ends], 1)
        spans = spans[torch.randperm(len(spans), generator=generator("split", seed))]
        ends = (spans[:, 1] - spans[:, 0]).cumsum(0)
        left = round(len(self.tokens) * (1.0 - validation_fraction))
        cut = int(torch.searchsorted(ends, left, right=True))  # documents that lie before it
        training, validation = spans[:cut], spans[cut:].clone()
        within = left - (int(ends[cut - 1]) if cut else 0)
        if cut < len(spans) and within:
            part = torch.stack([validation[0, 0], validation[0, 0] + within])
            training, validation[0, 0] = torch.cat([training, part[None]]), part[1]
        return training, validation


def _encoded(pieces: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[tuple[array.array, bool]]:
    """Pieces' ids; before a document's what the tokeniser puts there, and behind it the end of a text. Empty documents are left out."""
    before = tokenizer.encode("", special=True)[:1]
    before = before if before == [tokenizer.bos_id] else []
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    begun = False
    for text, is_last in pieces:
        ids = array.array("i", tokenizer.encode(text, special=False))
        if ids and not begun:
            ids, begun = array.array("i", before) + ids, True
        if begun and is_last:
            ids.extend(after)
        if begun:
            yield ids, is_last
        begun = begun and not is_last


def _write(path: Path, files: Iterable[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    ends, total, sha256 = [], 0, hashlib.sha256()
    with open(path, "wb") as file:
        for ids, is_last in _encoded(read_text(files), tokenizer):
            ids.tofile(file)
            sha256.update(ids.tobytes())
            total += len(ids)
            if is_last:
                ends.append(total)
    _check(ends)
    return {"tokens": total, "documents": len(ends), "fingerprint": _fingerprint(sha256, ends), "ends": ends}


def _check(ends: list[int]) -> None:
    if not ends:
        raise DataError("data: must hold text, and holds none")


def _fingerprint(sha256: Any, ends: list[int]) -> str:
    sha256.update(array.array("q", ends).tobytes())
    return sha256.hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Of the file that the tokeniser saves: the same for one that encodes the same."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def generator(*numbers: int | str) -> torch.Generator:
    """A generator on the CPU, whose draws follow from these."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def seed_of(*numbers: int | str) -> int:
    """A seed for torch, other for each sequence of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


# --------------------------------------------------------------------------------------------------------------------
# Batches.


class PackedText:
    """Next-token prediction: batches of T tokens, packed.

    Args:
        corpus; spans: (…, 2) of its tokens, as `Corpus.split` gives them.
        batch_tokens: T. max_seqlen: longer documents are cut to pieces of it.
        shuffle: in each epoch the pieces come in another order, drawn by the seed, and what is left over after the last whole batch is not
            used. False, for validation: in order, with a last batch that may be shorter.

    Raises: DataError where there is less than a batch (shuffle=False: less than two tokens).
    """

    def __init__(
        self, corpus: Corpus, spans: Tensor, *, batch_tokens: int, max_seqlen: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        for name, value in (("batch_tokens", batch_tokens), ("max_seqlen", max_seqlen)):
            if value < 2:
                raise ValueError(f"PackedText: {name} must be at least 2, got {value}")
        self.tokens, self.batch_tokens, self.max_seqlen = corpus.tokens, batch_tokens, min(max_seqlen, batch_tokens)
        self.seed, self.shuffle = seed, shuffle
        drawn = hashlib.sha256(spans.contiguous().numpy().tobytes()).hexdigest()[:16]
        self.fingerprint = f"{corpus.fingerprint} {drawn} {batch_tokens} {max_seqlen} {seed}"
        self.starts, self.lengths, self.last = cut(spans, max_seqlen)
        self.num_tokens = int(self.lengths.sum())
        needed = batch_tokens if shuffle else 2
        if self.num_tokens < needed:
            what = f"training must have at least one batch of {batch_tokens}" if shuffle else "validation must have at least 2"
            raise DataError(f"data: {what} tokens, got {self.num_tokens}: give more text, or choose smaller batches")
        self._order: tuple[int, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.num_tokens // self.batch_tokens if self.shuffle else -(-self.num_tokens // self.batch_tokens)

    def batch(self, index: int) -> dict[str, Any]:
        """Batch number `index`, counted from 0 on through all epochs: arguments of `Transformer.loss`.

        tokens, labels: (T,) int64; labels[i] follows tokens[i], −100 at the last token of a document. cu_seqlens: (N + 1,) int32.
        max_seqlen: no sequence is longer.
        """
        epoch, index = divmod(index, len(self))
        order, ends = self._epoch(epoch)
        low, high = index * self.batch_tokens, min((index + 1) * self.batch_tokens, self.num_tokens)
        first, behind = int(torch.searchsorted(ends, low, right=True)), int(torch.searchsorted(ends, high)) + 1
        pieces = order[first:behind]
        starts, stops = self.starts[pieces].clone(), self.starts[pieces] + self.lengths[pieces]
        is_last = self.last[pieces].clone()
        starts[0] += low - (int(ends[first - 1]) if first else 0)  # the batch before has what comes before
        too_many = int(ends[behind - 1]) - high
        stops[-1] -= too_many
        is_last[-1] &= too_many == 0

        lengths = stops - starts
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        places = torch.arange(high - low) + torch.repeat_interleave(starts - cu_seqlens[:-1], lengths)
        labels = self.tokens[(places + 1).clamp(max=len(self.tokens) - 1)].long()
        labels[cu_seqlens[1:][is_last] - 1] = IGNORED
        return {
            "tokens": self.tokens[places].long(), "labels": labels, "cu_seqlens": cu_seqlens.int(), "max_seqlen": self.max_seqlen,
        }  # fmt: skip

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order of pieces, and where each ends."""
        if self._order is None or self._order[0] != epoch:
            count = len(self.lengths)
            order = torch.randperm(count, generator=generator(self.seed, epoch)) if self.shuffle else torch.arange(count)
            self._order = epoch, order, self.lengths[order].cumsum(0)
        return self._order[1:]


def cut(spans: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spans as pieces of at most max_seqlen tokens: (starts, lengths, whether a piece is its span's last), each (P,)."""
    counts = (spans[:, 1] - spans[:, 0] + max_seqlen - 1) // max_seqlen
    of_span = torch.repeat_interleave(torch.arange(len(spans)), counts)
    number = torch.arange(len(of_span)) - (counts.cumsum(0) - counts)[of_span]  # of the piece in its span
    starts = spans[of_span, 0] + number * max_seqlen
    stops = torch.minimum(starts + max_seqlen, spans[of_span, 1])
    return starts, stops - starts, stops == spans[of_span, 1]


class MaskedText:
    """Masked-token prediction, the encoder's objective: `text`'s batches, some of whose tokens are to be found out.

    Of the tokens that are no ends of a text, a share `masked` is drawn, by the seed and the batch's number; of these 80 % are replaced by
    the mask, 10 % by any token, and 10 % stay (Devlin et al., arXiv 1810.04805). labels are the tokens that were there, −100 elsewhere.
    """

    def __init__(self, text: PackedText, *, mask_id: int, eos_id: int | None, vocab_size: int, masked: float = 0.15) -> None:
        if not 0.0 < masked < 1.0:
            raise ValueError(f"MaskedText: masked must lie in (0, 1), got {masked}")
        self.text, self.mask_id, self.eos_id, self.vocab_size, self.masked = text, mask_id, eos_id, vocab_size, masked
        self.fingerprint = f"masked {masked} {mask_id} {vocab_size} {text.fingerprint}"

    def __len__(self) -> int:
        return len(self.text)

    def batch(self, index: int) -> dict[str, Any]:
        batch = self.text.batch(index)
        tokens, draw = batch["tokens"], generator("mask", self.text.seed, index)
        chosen = (torch.rand(tokens.shape, generator=draw) < self.masked) & (tokens != self.eos_id)
        how, others = torch.rand(tokens.shape, generator=draw), torch.randint(self.vocab_size, tokens.shape, generator=draw)
        shown = torch.where(how < 0.8, self.mask_id, torch.where(how < 0.9, others, tokens))
        return batch | {"tokens": torch.where(chosen, shown, tokens), "labels": tokens.where(chosen, IGNORED)}


class PackedPairs:
    """Teacher-forced sequence to sequence: batches of `batch_size` (source, target) pairs of ids, packed.

    A batch is the arguments of `EncoderDecoder.loss`. The decoder reads bos_id and the target, and learns the target and eos_id.

    Raises: DataError for fewer pairs than a batch (shuffle=False: for none), or a source without a token.
    """

    def __init__(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int, bos_id: int, eos_id: int, seed: int = 0,
        shuffle: bool = True,
    ) -> None:  # fmt: skip
        if len(pairs) < (batch_size if shuffle else 1):
            raise DataError(f"data: there must be at least {batch_size if shuffle else 1} pairs, got {len(pairs)}")
        if empty := [number for number, (source, _) in enumerate(pairs) if not source]:
            raise DataError(f"data: a source must have a token, and that of pair {empty[0]} has none")
        self.pairs, self.batch_size, self.bos_id, self.eos_id = pairs, batch_size, bos_id, eos_id
        self.seed, self.shuffle = seed, shuffle
        self.max_seqlens = max(len(source) for source, _ in pairs), max(len(target) for _, target in pairs) + 1
        content = repr([(list(source), list(target)) for source, target in pairs])
        self.fingerprint = f"pairs {hashlib.sha256(content.encode()).hexdigest()} {batch_size} {seed}"

    def __len__(self) -> int:
        return len(self.pairs) // self.batch_size if self.shuffle else -(-len(self.pairs) // self.batch_size)

    def batch(self, index: int) -> dict[str, Any]:
        epoch, index = divmod(index, len(self))
        count = len(self.pairs)
        order = torch.randperm(count, generator=generator(self.seed, epoch)) if self.shuffle else torch.arange(count)
        pairs = [self.pairs[i] for i in order[index * self.batch_size : (index + 1) * self.batch_size].tolist()]
        pairs.sort(key=lambda pair: (len(pair[0]), len(pair[1])))  # the CPU attends to sequences of equal lengths at once
        source, cu_seqlens_source = pack([source for source, _ in pairs])
        target, cu_seqlens_target = pack([[self.bos_id, *target] for _, target in pairs])
        labels, _ = pack([[*target, self.eos_id] for _, target in pairs])
        return {
            "source": source, "target": target, "labels": labels, "cu_seqlens_source": cu_seqlens_source,
            "cu_seqlens_target": cu_seqlens_target, "max_seqlen_source": self.max_seqlens[0], "max_seqlen_target": self.max_seqlens[1],
        }  # fmt: skip


def pack(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(T,) int64 ids of all rows, one behind the other, and their cu_seqlens (N + 1,) int32."""
    lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int32)
    return torch.tensor([id for row in rows for id in row], dtype=torch.int64), lengths.cumsum(0, dtype=torch.int32)


def read_pairs(path: str | Path, encode: Callable[[str], list[int]]) -> list[tuple[list[int], list[int]]]:
    """(source, target) ids of a file whose lines are a source, a tab and a target.

    Raises: DataError by the line's number.
    """
    text = "".join(piece for piece, _ in read_text(text_files(path)))
    pairs = []
    lines = text.split("\n")  # and at nothing else, as str.splitlines would: U+2028 may be in a text
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        source, tab, target = line.removesuffix("\r").partition("\t")
        if not (source and tab):
            raise DataError(f"data: {path}, line {number} must be a source, a tab and a target, got {line[:60]!r}")
        pairs.append((encode(source), encode(target)))
    return pairs
