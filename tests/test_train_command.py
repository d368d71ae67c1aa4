"""`fastattn train`, as a user calls it: what it leaves behind, and what it says when something is wrong. The examples of training, briefly."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.cli import main
from fastattn.models import Encoder, EncoderDecoder, load
from fastattn.models.training_log import read_log

pytest.importorskip("safetensors", reason="needs safetensors")
pytest.importorskip("tokenizers", reason="needs tokenizers")

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--preset", "llama-tiny", "--set", "hidden_size=32", "--set", "num_layers=1", "--batch-tokens", "64", "--seqlen", "64"]


def run(*arguments):
    return main(["train", *map(str, arguments)])


@pytest.fixture
def text():
    return ROOT / "LICENSE"


def test_what_it_leaves_behind_is_loaded_by_transformers(tmp_path, text, capsys):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    assert run("--data", text, *TINY, "--steps", 3, "--out", tmp_path, "--tokenizer", "bpe:300", "--save-every", 2) == 0
    printed = capsys.readouterr().out
    assert "step 3/3  loss 5." in printed and f"the model is in {tmp_path}" in printed
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [1, 2, 3]

    model, tokenizer = load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("a Contributor whose patent claims")["input_ids"]
    assert ids == tokenizer.encode("a Contributor whose patent claims") and tokenizer.vocab_size == 300 and len(ids) < 34
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_it_is_resumed_and_refined(tmp_path, text, capsys):
    started = ["--data", text, *TINY, "--out", tmp_path / "run", "--save-every", 2]
    assert run(*started, "--steps", 2) == 0
    assert run(*started, "--steps", 4) == 1
    assert "holds a run already: go on with --resume, or choose another folder" in capsys.readouterr().err
    assert run(*started, "--steps", 4, "--resume") == 0
    assert "resumed after step 2" in capsys.readouterr().out
    assert run(*started, "--steps", 4, "--resume") == 0  # nothing is left to do
    assert run(*started, "--steps", 3, "--resume") == 1
    assert "--steps must be at least 4, which the run in" in capsys.readouterr().err
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.csv")] == [1, 2, 3, 4]
    refined = ["--model", tmp_path / "run", "--data", text, "--batch-tokens", 64, "--seqlen", 64, "--out", tmp_path / "refined", "--lr", 1e-9]
    assert run(*refined, "--steps", 1) == 0
    for ours, theirs in zip(*(load(tmp_path / name)[0].parameters() for name in ("run", "refined")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective,kind", [("masked-token", Encoder), ("seq2seq", EncoderDecoder)])
def test_the_other_objectives(tmp_path, text, objective, kind):
    data = text
    if objective == "seq2seq":
        data = tmp_path / "pairs.tsv"
        data.write_text("".join(f"{i}\t{i + 1}\n" for i in range(50)))
    assert run("--data", data, *TINY, "--objective", objective, "--steps", 2, "--out", tmp_path / "out") == 0
    model, tokenizer = load(tmp_path / "out")
    assert type(model) is kind and tokenizer.mask_id == 258
    assert [row["step"] for row in read_log(tmp_path / "out" / "log.csv")] == [1, 2]


WRONG = {
    "no data": (["--data", "nowhere"], "nowhere must be a file or a folder, and there is none"),
    "too little": (["--batch-tokens", 100000], "training must have at least one batch of 100000 tokens, got "),
    "no text": (["--data", "{zeros}"], "zeros must be text, and holds a zero byte"),
    "empty": (["--data", "{empty}"], "must hold text, and holds none"),
    "unmatched": (["--data", ROOT / "docs", "--glob", "*.rs"], r"must hold files that match *.rs, and there is none"),
    "seqlen": (["--seqlen", 1000], "--seqlen must be at most the model's max_seqlen = 256, got 1000"),
    "vocabulary": (["--set", "vocab_size=100"], "--set vocab_size must be at least the tokeniser's 259 tokens, got 100"),
    "field": (["--set", "colour=red"], "there is no field colour"),
    "value": (["--set", "hidden_size"], "--set must be FIELD=VALUE, got 'hidden_size'"),
    "bpe": (["--tokenizer", "bpe"], "--tokenizer must be bpe:SIZE, as bpe:4096, got 'bpe'"),
    "tokenizer": (["--tokenizer", "nowhere"], "--tokenizer must be bytes, bpe:SIZE, or a file or folder that is there, got 'nowhere'"),
    "fraction": (["--validation-fraction", 1], "--validation-fraction must lie in [0, 1), got 1.0"),
    "steps": (["--steps", 0], "steps must be at least 1, got 0"),
    "pairs": (["--objective", "seq2seq"], "line 1 must be a source, a tab and a target"),
    "out": (["--out", "{empty}"], "empty"),
}


@pytest.mark.parametrize("arguments,message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(tmp_path, text, capsys, arguments, message):
    (tmp_path / "zeros").write_bytes(b"\0" * 9)
    (tmp_path / "empty").write_bytes(b"")
    places = {"{zeros}": tmp_path / "zeros", "{empty}": tmp_path / "empty"}
    given = [places.get(argument, argument) for argument in arguments]
    assert run("--data", text, *TINY, "--steps", 1, "--out", tmp_path / "out", *given) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastattn train: ") and message in error and error.count("\n") == 1


def test_ctrl_c_before_the_first_step(tmp_path, text, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastattn.models.train_command.Trainer", interrupted)
    assert run("--data", text, *TINY, "--steps", 1, "--out", tmp_path) == 130
    assert capsys.readouterr().err == "fastattn train: interrupted; whatever was saved before is whole\n"


def test_a_missing_library_is_named_before_training(tmp_path, text, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "safetensors" else find_spec(name))
    assert run("--data", text, *TINY, "--steps", 1, "--out", tmp_path) == 1
    assert "safetensors, which is not installed: pip install 'fastattn[models]'" in capsys.readouterr().err


@pytest.mark.more
def test_torchrun(tmp_path, text):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastattn", "train"]
    arguments = ["--data", text, *TINY, "--steps", 2, "--out", tmp_path, "--device", "cpu", "--tokenizer", "bpe:300"]
    done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1 and type(load(tmp_path)[0]).__name__ == "Transformer"


# --------------------------------------------------------------------------------------------------------------------
# The examples.


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dates_begin_to_be_learnt(monkeypatch):
    dates = example("translate_dates")
    learnt, held_out = dates.days()
    assert not set(learnt) & set(held_out) and len(learnt) + len(held_out) == 36525
    assert dates.pair(dates.datetime.date(2024, 3, 7), dates.FORMATS[2]) == ("Thursday, 7 March 2024", "2024-03-07")
    monkeypatch.setattr(dates, "FORMATS", dates.FORMATS[:1])
    model, _ = dates.train(40, batch_size=32)
    answers = dates.translate(model.eval(), ["March 7, 2024", "7.3.24"])
    assert all(len(answer) == 10 and answer[4] == answer[7] == "-" for answer in answers)  # the format comes first


@pytest.mark.more
def test_dates_are_learnt_to_99_percent():
    dates = example("translate_dates")
    model, held_out = dates.train(800)
    right = dates.exact(model, [dates.pair(day, format) for day in held_out[:200] for format in dates.FORMATS])
    assert sum(right) / len(right) > 0.99


def test_blanks_are_filled_in_where_they_are():
    blanks = example("fill_in_blanks")
    training, validation = blanks.text_data(seqlen=64)
    torch.manual_seed(0)
    model = blanks.make_model(64)
    filled = blanks.fill_in(model, "a b_ank, __init__")
    assert filled[:3] + filled[4:] == "a bank, __init__" and 0 <= blanks.accuracy(model, validation, 1) <= 1


def test_the_ablation_measures_each_variant(capsys, monkeypatch):
    ablation = example("ablation")
    sizes = ["--steps", "3", "--hidden-size", "16", "--layers", "1", "--batch-tokens", "128", "--seqlen", "32", "--validation-batches", "1"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *sizes])
    ablation.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(ablation.VARIANTS)
    assert all(4 < float(row.split(" | ")[3]) < 7 for row in rows)
