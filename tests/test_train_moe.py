"""The example that trains a mixture of experts: its losses are the reference loop's, and fall."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).resolve().parent.parent / "examples" / "train_moe.py"
    spec = importlib.util.spec_from_file_location("train_moe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_of(example, experts, steps, **sizes):
    losses, shares = zip(*example.train(example.make(0, "cpu", torch.float32, experts), steps, **sizes), strict=True)
    return torch.tensor(losses), shares


def test_it_learns_as_the_reference_loop_does(example):
    (ours, shares), (theirs, _) = (losses_of(example, e, 25) for e in (example.Experts, example.ReferenceExperts))
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)  # by now a token near a tie may have gone to another expert
    assert ours[-1] < 3.5 < 5 < ours[0]
    for layer in shares[-1]:
        assert layer.shape == (8,) and torch.isclose(layer.sum(), torch.tensor(1.0))


@pytest.mark.interpret
@pytest.mark.more
def test_it_learns_as_the_reference_loop_does_on_the_kernels(example):
    (ours, _), (theirs, _) = (losses_of(example, e, 3, batch=2, seqlen=16) for e in (example.Experts, example.ReferenceExperts))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_it_writes(example):
    text = example.write(example.make(0, "cpu", torch.float32), "The import ", 5)
    assert text.startswith("The import ")


def test_no_steps_are_refused(example, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_moe.py", "--steps", "0", "--compare"])
    with pytest.raises(SystemExit):
        example.main()
    assert "--steps must be 1 or more" in capsys.readouterr().err


@pytest.mark.more
def test_the_comparison(example, capsys):
    assert example.compare(60, "cpu") < 3.0  # noise is a sample of one
    assert "largest difference" in capsys.readouterr().out
