"""Tokenisers: bytes, byte-pair encoding learnt from text, files of Hugging Face; text as it streams."""

from __future__ import annotations

import json
import random

import pytest

from fastattn.models import ByteTokenizer, CheckpointError, FileTokenizer, StreamDecoder, tokenizers, train_bpe

library = pytest.importorskip("tokenizers", reason="needs tokenizers")

TEXT = "The quick brown fox jumps over the lazy dog. Les élèves mangent, 日本語, 🙂🏽 and ﷽!\n\tdef f(x): return x + 1  # done\r\n"


@pytest.fixture(scope="module")
def bpe():
    from pydoc_data.topics import topics

    return train_bpe([topics["yield"], topics["lambda"], TEXT], 600)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_text_comes_back(tokenizer):
    for text in (TEXT, "", " ", "\x00\x7f", "a" * 100):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
    special = [tokenizer.bos_id, *tokenizer.encode("a"), tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert tokenizer.decode(special) == "a"
    assert tokenizer.decode(special, special=True) == "<|endoftext|>a<|endoftext|><|pad|><|mask|>"


def test_bpe_merges_what_is_frequent(bpe):
    assert bpe.vocab_size == 600
    assert len(bpe.encode(" expression")) == 1
    assert len(bpe.encode(TEXT)) < len(TEXT.encode())
    assert train_bpe(["ab"], 400).vocab_size < 265  # there is no more to be merged


@pytest.mark.parametrize("read", ["here", "transformers"])
def test_saved_tokenisers_are_read(read, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    text = TEXT + "<|endoftext|>x"
    if read == "here":
        again = tokenizers.load(tmp_path)
        assert type(again) is type(tokenizer) and again.vocab_size == tokenizer.vocab_size
        assert again.encode(text) == tokenizer.encode(text)
        assert (again.bos_id, again.eos_id, again.pad_id, again.mask_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
        return
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size)


def test_bytes_need_no_library(tmp_path, monkeypatch):
    ByteTokenizer().save(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert tokenizers.load(tmp_path).encode("A\xe9") == [65, 195, 169]
    with pytest.raises(ImportError, match=r"fastattn.models needs tokenizers: pip install 'fastattn\[models\]'"):
        train_bpe(["a"], 300)


def test_files_of_hugging_face(bpe, tmp_path):
    """Special tokens as words, as records, and in their own file; a template as its own file; GPT-2's two files; a post-processor."""
    bpe.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>"}))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    read = tokenizers.load(tmp_path)
    assert (read.bos_id, read.eos_id, read.pad_id) == (None, 0, 1)
    assert read.chat("Hi") == [*bpe.encode("Hi"), 0]
    assert tokenizers.load(tmp_path / "tokenizer.json").encode(TEXT) == bpe.encode(TEXT)

    processed = library.Tokenizer.from_str(bpe.tokenizer.to_str())
    processed.post_processor = library.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    starts = FileTokenizer(processed, {"bos": "<|endoftext|>"})
    assert starts.encode("Hi") == [0, *bpe.encode("Hi")] and starts.encode("Hi", special=False) == bpe.encode("Hi")

    old = tmp_path / "gpt2"
    old.mkdir()
    bpe.tokenizer.model.save(str(old))
    assert sorted(p.name for p in old.iterdir()) == ["merges.txt", "vocab.json"]
    assert tokenizers.load(old).encode(TEXT) == bpe.encode(TEXT)


@pytest.mark.parametrize("window", [16, 1])
def test_streams_break_no_character(window, tokenizer, monkeypatch):
    """Real text, and ids in any order, most of which are no UTF-8: joined, what is pushed is the text of all of them."""
    monkeypatch.setattr(StreamDecoder, "_WINDOW", window)
    draw = random.Random(0)
    streams = [tokenizer.encode(TEXT * 3)] + [[draw.randrange(tokenizer.vocab_size) for _ in range(60)] for _ in range(30)]
    streams += [[draw.choice([0xF0, 0x9F, 0x99, 0x82, 0xE6, 0x97, 65]) for _ in range(40)] for _ in range(30)]
    for ids in streams:
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(id) for id in ids] + [decoder.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(id) for id in streams[0]]
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda bpe: train_bpe(["a"], 258), ValueError, "train_bpe: vocab_size must be at least 259, .*, got 258"),
        (lambda bpe: train_bpe(iter(["", ""]), 300), ValueError, "train_bpe: texts must hold at least one that is not empty, got none"),
        (lambda bpe: ByteTokenizer().decode([259]), ValueError, r"ByteTokenizer: ids must lie in \[0, 259\), got 259"),
        (lambda bpe: FileTokenizer(bpe.tokenizer, {"eos": "<eos>"}), ValueError, "FileTokenizer: eos must be a token of the vocabulary, got '<eos>'"),
        (lambda bpe: bpe.chat("Hi"), ValueError, "FileTokenizer.chat: the tokeniser must have a chat template, and this one has none"),
        (lambda bpe: tokenizers.load("nowhere/tokenizer.json"), CheckpointError, "load: nowhere must hold a tokenizer.json, or a vocab.json and a merges.txt"),
    ],
)
def test_bad_input(call, error, message, bpe):
    with pytest.raises(error, match=message):
        call(bpe)
