"""The `fastattn` command, apart from `bench` (test_bench.py)."""

import re
import subprocess
import sys
import types

import pytest
import torch

import fastattn
from fastattn import cli
from fastattn.benchmarks.suite import OPS
from fastattn.cli import main


def test_info_names_versions_and_the_code_that_runs(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^fastattn +{re.escape(fastattn.__version__)}, commit ", printed, re.MULTILINE)
    assert torch.__version__ in printed
    assert "torch code" in printed
    assert "naive, SDPA" in printed


def test_verify_passes_on_every_option_of_attention(capsys):
    assert main(["verify", "attention", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for case in (
        "causal",
        "window",
        "softcap",
        "ALiBi",
        "bool bias",
        "float bias",
        "sinks",
        "GQA",
        "varlen",
        "dropout",
    ):
        assert case in printed
    assert "31 of 31 cases within the error budget" in printed


def test_verify_holds_every_op(capsys):
    others = [op for op in OPS if op != "attention"]
    assert main(["verify", *others, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for op in others:
        assert re.search(rf"^ *{op} .* ok .* \d+% *$", printed, re.MULTILINE), op


def test_verify_in_half_precision(capsys):
    assert main(["verify", "--device", "cpu", "--dtype", "bf16", "fp16", "--only", "^(plain|causal|everything)$"]) == 0
    assert "6 of 6 cases" in capsys.readouterr().out


def test_verify_is_red_on_a_wrong_answer(capsys, monkeypatch):
    right = fastattn.attention

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out, lse + 1e-3

    monkeypatch.setattr(fastattn, "attention", wrong)
    assert main(["verify", "--device", "cpu", "--only", "^plain$"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: lse" in printed and re.search(r"lse \(of .* [\d.e+-]+ +[\d.e+-]+ +\d{4,}%", printed)
    assert "0 of 1 cases" in printed


def test_verify_goes_on_after_an_exception(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("attention: no")

    monkeypatch.setattr(fastattn, "attention", broken)
    assert main(["verify", "--device", "cpu", "--only", "^(plain|dropout)$"]) == 1
    printed = capsys.readouterr().out
    assert "ValueError: attention: no" in printed
    assert "1 of 2 cases" in printed


def test_verify_only_must_match():
    with pytest.raises(SystemExit, match="--only must match a case: plain"):
        main(["verify", "--only", "no such case"])
    with pytest.raises(SystemExit, match="OP must be all or some of attention, .*, got 'atention'"):
        main(["verify", "atention"])


def test_warmup_has_nothing_to_do_on_a_cpu(capsys):
    assert main(["warmup", "--device", "cpu"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_what_warmup_calls_is_there():
    """Its calls are for a GPU; their arguments are good anywhere."""
    for work, size in ((cli._warm_attention, 16), (cli._warm_decoding, 16), (cli._warm_rows, 24), (cli._warm_logits, 70)):
        work(torch.device("cpu"), torch.float32, size)


@pytest.mark.gpu
def test_warmup_compiles_on_a_gpu(capsys):
    assert main(["warmup"]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16 attention D128" in printed and "float16 logits of 128256" in printed


@pytest.mark.parametrize("command", ["cards", "dump"])
def test_compiler_commands_take_their_own_arguments(command, monkeypatch):
    received = []
    module = types.SimpleNamespace(main=received.append)
    monkeypatch.setitem(sys.modules, f"fastattn.testing.{command}", module)
    assert main([command, "--check", "x"]) == 0
    assert received == [["--check", "x"]]


def test_bad_arguments_exit_with_2(capsys):
    for arguments in ([], ["no-such-command"], ["bench", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "invalid choice: 'int8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("verify --only (", "--only: must be a regular expression, got '('"),
        ("bench --shape (", "--shape: must be a regular expression, got '('"),
        ("bench --peers (", "--peers: must be a regular expression, got '('"),
        ("bench --base /no/such.json", "--base: must be a file to read, got '/no/such.json': No such file or directory"),
        *((f"{command} --device gpu", "--device: must be cpu, cuda or") for command in ("bench", "verify", "warmup")),
        ("verify --device mps", "--device: must be cpu, cuda or cuda:N, got 'mps'"),
        *((f"{command} --device cuda", "must be a device that is here") for command in ("bench", "verify", "warmup")),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(f"fastattn {arguments.split()[0]}: argument --") and message in printed.err
    assert printed.err.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastattn {fastattn.__version__}\n"


@pytest.mark.parametrize("size", [0, -1, "x"])
def test_dump_refuses_a_size_that_is_none(size, capsys):
    pytest.importorskip("triton", reason="needs triton")
    with pytest.raises(SystemExit) as stop:
        main(["dump", "attention", f"--size={size}"])
    assert stop.value.code == 2
    assert "--size: must be a positive integer" in capsys.readouterr().err


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastattn", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for command in ("bench", "info", "verify", "warmup", "cards"):
        assert command in done.stdout


def test_a_reader_that_left_and_a_disk_that_is_full_are_said_in_a_line():
    done = subprocess.run(f"{sys.executable} -m fastattn cards --op softmax | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""
    done = subprocess.run(f"{sys.executable} -m fastattn cards --op softmax > /dev/full", shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("fastattn cards: ") and "Traceback" not in done.stderr
