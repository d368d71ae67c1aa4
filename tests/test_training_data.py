"""Text to batches: what is read, how it is split and packed, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch

from fastattn.models import ByteTokenizer
from fastattn.models.data import (
    IGNORED,
    Corpus,
    DataError,
    MaskedText,
    PackedPairs,
    PackedText,
    generator,
    read_pairs,
    read_text,
    text_files,
)  # fmt: skip

BYTES = ByteTokenizer()
EOS = BYTES.eos_id
TEXTS = ["a", "Grüße\n" * 7, "0123456789" * 9, "x" * 33, "", "The end.", "yz" * 16]


@pytest.fixture
def corpus():
    return Corpus.of_texts(TEXTS, BYTES)


def spans_of(corpus):
    return corpus.split(0.0)[0]


def sequences(batch):
    ends = batch["cu_seqlens"].tolist()
    assert ends[0] == 0 and ends[-1] == len(batch["tokens"]) == len(batch["labels"]) and sorted(set(ends)) == ends
    return [(batch["tokens"][a:b].tolist(), batch["labels"][a:b].tolist()) for a, b in zip(ends, ends[1:])]


def test_a_corpus_is_its_documents_each_with_an_end(corpus):
    ends = corpus.ends.tolist()
    documents = [corpus.tokens[a:b].tolist() for a, b in zip([0, *ends], ends)]
    assert documents == [[*text.encode(), EOS] for text in TEXTS if text]


@pytest.mark.parametrize("batch_tokens,max_seqlen", [(16, 16), (50, 12), (32, 1000), (7, 3)])
def test_an_epoch_has_each_token_once_with_the_one_that_follows_it(corpus, batch_tokens, max_seqlen):
    data = PackedText(corpus, spans_of(corpus), batch_tokens=batch_tokens, max_seqlen=max_seqlen, shuffle=False)
    tokens = torch.cat([data.batch(i)["tokens"] for i in range(len(data))])
    labels = torch.cat([data.batch(i)["labels"] for i in range(len(data))])
    # Not shuffled, an epoch is the documents in the order of the split.
    whole = torch.cat([corpus.tokens[a:b] for a, b in spans_of(corpus).tolist()]).long()
    assert torch.equal(tokens, whole)
    expected = torch.cat([whole[1:], torch.tensor([IGNORED])]).where(whole != EOS, IGNORED)
    assert torch.equal(labels, expected)


def test_no_sequence_holds_two_documents_or_is_too_long(corpus):
    data = PackedText(corpus, spans_of(corpus), batch_tokens=40, max_seqlen=12)
    for i in range(3 * len(data)):
        batch = data.batch(i)
        assert batch["tokens"].shape == (40,) and batch["cu_seqlens"].dtype == torch.int32 and batch["max_seqlen"] == 12
        for tokens, labels in sequences(batch):
            assert len(tokens) <= 12 and EOS not in tokens[:-1]
            assert labels[:-1] == tokens[1:] and (labels[-1] == IGNORED) == (tokens[-1] == EOS)


def test_batches_follow_from_the_seed_and_their_number(corpus):
    def batches(seed, order):
        data = PackedText(corpus, spans_of(corpus), batch_tokens=16, max_seqlen=16, seed=seed)
        made = {i: data.batch(i)["tokens"] for i in order}
        return torch.stack([made[i] for i in sorted(made)])

    many = range(40)
    assert torch.equal(batches(0, many), batches(0, reversed(many)))  # over several epochs, in any order
    assert not torch.equal(batches(0, many), batches(1, many))
    epoch = len(PackedText(corpus, spans_of(corpus), batch_tokens=16, max_seqlen=16))
    assert not torch.equal(batches(0, range(epoch)), batches(0, range(epoch, 2 * epoch)))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("texts", [TEXTS, ["one document alone, " * 20]], ids=["documents", "one"])
def test_a_split_is_disjoint_whole_and_of_the_size_asked_for(texts, fraction):
    corpus = Corpus.of_texts(texts, BYTES)
    training, validation = corpus.split(fraction, seed=3)
    places = [place for a, b in [*training.tolist(), *validation.tolist()] for place in range(a, b)]
    assert sorted(places) == list(range(len(corpus.tokens)))
    held_out = sum(b - a for a, b in validation.tolist())
    assert held_out == len(corpus.tokens) - round(len(corpus.tokens) * (1 - fraction))
    cut = [a for a, b in validation.tolist() if a and a not in corpus.ends]
    assert len(cut) <= 1  # one document is cut in two at most


def test_what_is_held_out_is_not_learnt():
    corpus = Corpus.of_texts(["abcdefghij" * 10], BYTES)
    training, _ = corpus.split(0.25)
    (last,) = PackedText(corpus, training, batch_tokens=76, max_seqlen=100)._epoch(0)[0].tolist()
    labels = PackedText(corpus, training, batch_tokens=76, max_seqlen=100).batch(last)["labels"]
    assert labels[-1] == IGNORED


def test_a_cached_corpus_is_the_one_in_memory(tmp_path, corpus):
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / ("deep" if i % 2 else ".") / f"{i}.txt").write_text(text, encoding="utf-8")
    files = sorted(text_files(folder), key=lambda file: file.name)
    for _ in range(2):  # written, then found
        cached = Corpus.cached(files, BYTES, tmp_path / "cache")
        assert torch.equal(cached.tokens, corpus.tokens) and torch.equal(cached.ends, corpus.ends)
        assert cached.fingerprint == corpus.fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 3
    files[0].write_text("other")
    assert Corpus.cached(files, BYTES, tmp_path / "cache").fingerprint != corpus.fingerprint
    assert len(text_files(folder, "deep/*.txt")) == 3


def test_a_cache_that_was_cut_short_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    Corpus.cached([tmp_path / "a.txt"], BYTES, tmp_path / "cache")
    (tokens,) = (tmp_path / "cache").glob("*.tokens")
    os.truncate(tokens, 8)
    with pytest.raises(DataError, match=r"\.tokens .* must have 5 tokens"):
        Corpus.cached([tmp_path / "a.txt"], BYTES, tmp_path / "cache")


def test_a_file_may_hold_several_documents_and_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("fastattn.models.data._PIECE", 8)
    (tmp_path / "a.txt").write_text("one\r\n\ntwo three four\nfive<|endoftext|>six\n<|endoftext|>", encoding="utf-8", newline="")
    pieces = list(read_text([tmp_path / "a.txt"]))
    assert len(pieces) > 4
    documents, open_ = [], ""
    for text, is_last in pieces:
        open_ += text
        if is_last:
            documents.append(open_)
            open_ = ""
    assert documents == ["one\r\n\ntwo three four\nfive", "six\n", ""]


class WithBegin(ByteTokenizer):
    """Puts a token before each text, as Llama's does."""

    bos_id = 257

    def encode(self, text, *, special=True):
        return [257] * special + super().encode(text)


def test_what_a_tokeniser_puts_before_a_text_begins_each_document():
    corpus = Corpus.of_texts(["ab", "c"], WithBegin())
    assert corpus.tokens.tolist() == [257, 97, 98, EOS, 257, 99, EOS]


def test_masked_text(corpus):
    text = PackedText(corpus, spans_of(corpus), batch_tokens=100, max_seqlen=50)
    data = MaskedText(text, mask_id=BYTES.mask_id, eos_id=EOS, vocab_size=BYTES.vocab_size, masked=0.3)
    chosen = masked = kept = 0
    for i in range(200):
        plain, batch = text.batch(i), data.batch(i)
        asked = batch["labels"] != IGNORED
        assert torch.equal(batch["tokens"][~asked], plain["tokens"][~asked])
        assert torch.equal(batch["labels"][asked], plain["tokens"][asked])
        assert not (plain["tokens"][asked] == EOS).any()
        chosen += int(asked.sum())
        masked += int((batch["tokens"][asked] == BYTES.mask_id).sum())
        kept += int((batch["tokens"][asked] == plain["tokens"][asked]).sum())
    assert torch.equal(data.batch(7)["labels"], data.batch(7)["labels"])
    assert abs(chosen / 20000 - 0.3) < 0.03 and abs(masked / chosen - 0.8) < 0.03 and abs(kept / chosen - 0.1) < 0.03


def test_packed_pairs():
    pairs = [([i, i + 1], [9] * (i % 3)) for i in range(10)]
    data = PackedPairs(pairs, batch_size=4, bos_id=100, eos_id=101)
    seen = []
    for i in range(len(data)):
        batch = data.batch(i)
        ends_source, ends_target = batch["cu_seqlens_source"].tolist(), batch["cu_seqlens_target"].tolist()
        assert len(ends_source) == len(ends_target) == 5
        for n in range(4):
            source = batch["source"][ends_source[n] : ends_source[n + 1]].tolist()
            target, labels = (batch[name][ends_target[n] : ends_target[n + 1]].tolist() for name in ("target", "labels"))
            assert target[0] == 100 and labels == [*target[1:], 101] and len(target) <= batch["max_seqlen_target"]
            seen.append((source, target[1:]))
    assert len(seen) == 8 and all(pair in pairs for pair in seen) and len({tuple(source) for source, _ in seen}) == 8
    whole = PackedPairs(pairs, batch_size=4, bos_id=100, eos_id=101, shuffle=False)
    assert len(whole) == 3 and len(whole.batch(2)["cu_seqlens_source"]) == 3


def test_generators_differ_by_what_they_are_of():
    draws = [torch.randint(2**31, (4,), generator=generator(*key)).tolist() for key in ((0,), (1,), (0, 1), (1, 0), ("a", 0))]
    assert len({tuple(draw) for draw in draws}) == 5
    assert draws[2] == torch.randint(2**31, (4,), generator=generator(0, 1)).tolist()


# --------------------------------------------------------------------------------------------------------------------
# What is refused.


def write(path, content):
    path.write_bytes(content)
    return path


BAD_FILES = {
    "zero byte": (b"PK\0\0", "must be text, and holds a zero byte"),
    "no UTF-8": (b"abc\xff\xfe", "must be text in UTF-8, and holds the byte 0xff"),
    "empty": (b"", "must hold text, and holds none"),
    "separators alone": (b"<|endoftext|>" * 3, "must hold text, and holds none"),
}


@pytest.mark.parametrize("content,message", BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    file = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=message):
        Corpus.cached([file], BYTES, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".tmp"]


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere must be a file or a folder, and there is none"):
        text_files(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / ".hidden", b"text")
    with pytest.raises(DataError, match=r"folder must hold files that match \*\*/\*, and there is none"):
        text_files(tmp_path / "folder")
    with pytest.raises(DataError, match="folder cannot be read: Is a directory"):
        list(read_text([tmp_path / "folder"]))


def test_too_little_is_refused(corpus):
    spans = spans_of(corpus)
    with pytest.raises(DataError, match=f"training must have at least one batch of 1000 tokens, got {len(corpus.tokens)}"):
        PackedText(corpus, spans, batch_tokens=1000, max_seqlen=10)
    with pytest.raises(DataError, match="validation must have at least 2 tokens, got 1"):
        PackedText(corpus, torch.tensor([[0, 1]]), batch_tokens=10, max_seqlen=10, shuffle=False)
    with pytest.raises(DataError, match="training must have at least one batch of 10 tokens, got 0"):
        PackedText(corpus, spans[:0], batch_tokens=10, max_seqlen=10)
    with pytest.raises(ValueError, match="PackedText: max_seqlen must be at least 2, got 1"):
        PackedText(corpus, spans, batch_tokens=10, max_seqlen=1)
    with pytest.raises(ValueError, match=r"MaskedText: masked must lie in \(0, 1\), got 1.0"):
        MaskedText(None, mask_id=0, eos_id=0, vocab_size=9, masked=1.0)
    with pytest.raises(DataError, match="there must be at least 2 pairs, got 1"):
        PackedPairs([([1], [2])], batch_size=2, bos_id=0, eos_id=1)
    with pytest.raises(DataError, match="a source must have a token, and that of pair 1 has none"):
        PackedPairs([([1], []), ([], [2])], batch_size=2, bos_id=0, eos_id=1)


def test_pairs_of_a_file(tmp_path):
    file = write(tmp_path / "pairs.tsv", b"one\tuno\ntwo\t\n")
    assert read_pairs(file, BYTES.encode) == [(list(b"one"), list(b"uno")), (list(b"two"), [])]
    for line in (b"no tab\n", b"\tno source\n"):
        write(file, b"one\tuno\n" + line)
        with pytest.raises(DataError, match="line 2 must be a source, a tab and a target"):
            read_pairs(file, BYTES.encode)


def test_another_split_is_other_data():
    corpus = Corpus.of_texts(["a text of some length, over and over " * 20] * 8, BYTES)
    made = [PackedText(corpus, corpus.split(share)[0], batch_tokens=32, max_seqlen=16).fingerprint for share in (0.1, 0.5, 0.1)]
    assert made[0] == made[2] != made[1]


def test_what_a_run_writes_is_not_its_own_data(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert [path.name for path in text_files(tmp_path, besides=tmp_path / "run")] == ["a.txt"]


def test_a_pair_ends_with_its_line_and_nothing_else(tmp_path):
    (tmp_path / "pairs.tsv").write_text("a\u2028b\tc\r\nd\te\n", encoding="utf-8", newline="")
    assert read_pairs(tmp_path / "pairs.tsv", lambda text: [text]) == [(["a\u2028b"], ["c"]), (["d"], ["e"])]
