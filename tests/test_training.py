"""The trainer: the losses of plain torch, runs that go on bit for bit wherever they were stopped, and what it says when something fails."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from plain_transformer import PlainTransformer
from training_cases import BYTES, CONFIGS, SMALL, make_model, text_data, train

from fastattn.models import CheckpointError, Config, Encoder, EncoderDecoder, load
from fastattn.models.data import MaskedText, PackedPairs
from fastattn.models.ranks import ranks
from fastattn.models.snapshots import locked, snapshots
from fastattn.models.training import Interrupted, Settings, Trainer, TrainingError, make_optimizer
from fastattn.models.training_log import COLUMNS, PEAKS, peak_flops, progress_line, read_log

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden_losses.json").read_text())
DROPOUT = Config.preset("llama-tiny", **SMALL, dropout=0.1)

# --------------------------------------------------------------------------------------------------------------------
# The losses.


@pytest.mark.parametrize("name", CONFIGS)
def test_the_losses_are_plain_torchs_and_the_golden_ones(name):
    data, _ = text_data()
    model = make_model(CONFIGS[name])
    plain = PlainTransformer(CONFIGS[name], dict(model.named_parameters()))
    ours, theirs = (torch.tensor(train(m, data, steps=20, lr=3e-3).losses) for m in (model, plain))
    # Weights that are one rounding off give losses that are 1e-6 off by then.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)
    # On another machine a matrix product adds up in another order, and draws are rounded in another way.
    torch.testing.assert_close(ours, torch.tensor(GOLDEN[name]), rtol=0, atol=1e-4)
    assert ours[-1] < 4.5 < 5.4 < ours[0]


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["gpt2", "gemma", "moe"])
def test_the_losses_on_the_kernels_are_plain_torchs(name, launches):
    data, _ = text_data(batch_tokens=24, max_seqlen=16)
    model = make_model(CONFIGS[name])
    plain = PlainTransformer(CONFIGS[name], dict(model.named_parameters()))
    ours, theirs = (train(m, data, steps=2, lr=3e-3).losses for m in (model, plain))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=5e-6)
    assert launches.count > 20


def test_accumulated_batches_are_one_large_step():
    data, _ = text_data()

    class Joined:
        """Two of data's batches as one."""

        fingerprint = "joined"

        def batch(self, index):
            a, b = data.batch(2 * index), data.batch(2 * index + 1)
            joined = {name: torch.cat([a[name], b[name]]) for name in ("tokens", "labels")}
            return joined | {"cu_seqlens": torch.cat([a["cu_seqlens"], b["cu_seqlens"][1:] + 128]), "max_seqlen": 64}

        def __len__(self):
            return len(data) // 2

    twice = train(make_model(CONFIGS["llama"]), data, steps=4, accumulation=2)
    once = train(make_model(CONFIGS["llama"]), Joined(), steps=4)
    torch.testing.assert_close(torch.tensor(twice.losses), torch.tensor(once.losses), rtol=0, atol=5e-6)


def test_activation_checkpointing_changes_nothing():
    data, _ = text_data()
    plain, checkpointed = (train(make_model(DROPOUT), data, steps=3, checkpointing=on) for on in (False, True))
    assert plain.losses == checkpointed.losses


def test_bfloat16_is_near_and_keeps_float32_weights():
    data, _ = text_data()
    full, half = (train(make_model(CONFIGS["llama"]), data, steps=10, lr=3e-3, dtype=dtype) for dtype in ("float32", "bfloat16"))
    torch.testing.assert_close(torch.tensor(half.losses), torch.tensor(full.losses), rtol=0, atol=0.02)
    assert half.losses != full.losses
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert {p.grad is None for p in half.model.parameters()} == {True}


@pytest.mark.more
def test_compiled_blocks_are_near():
    data, _ = text_data()
    eager, compiled = (train(make_model(CONFIGS["llama"]), data, steps=4, compile=on) for on in (False, True))
    torch.testing.assert_close(torch.tensor(compiled.losses), torch.tensor(eager.losses), rtol=0, atol=1e-4)


def test_the_learning_rate_rises_and_falls():
    settings = Settings(steps=100, warmup=10, lr=2.0, final_lr=0.25)
    rates = [settings.learning_rate(step) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0 and rates[-1] == pytest.approx(0.5)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] + rates[55] == pytest.approx(2.5)  # half way between 2.0 and 0.5 in the middle
    assert Settings(steps=50).warmup == 5 and Settings(steps=5000).warmup == 100


def test_matrices_alone_decay():
    model = make_model(CONFIGS["gpt2"])
    matrices, others = make_optimizer(model, Settings(steps=1, weight_decay=0.3)).param_groups
    assert {p.dim() for p in matrices["params"]} == {2} and matrices["weight_decay"] == 0.3
    assert {p.dim() for p in others["params"]} == {1} and others["weight_decay"] == 0.0
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_validation_is_the_mean_over_held_out_labels():
    data, validation = text_data()
    trainer = train(make_model(CONFIGS["moe"]), data, steps=1, validation=validation)
    total = labels = 0
    for i in range(len(validation)):
        batch = validation.batch(i)
        logits = trainer.model.eval()(batch["tokens"], cu_seqlens=batch["cu_seqlens"], max_seqlen=64)
        total += torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        labels += int((batch["labels"] != -100).sum())
    assert trainer.validate() == pytest.approx(total / labels, abs=1e-5) and trainer.model.training


# --------------------------------------------------------------------------------------------------------------------
# The other objectives.


def test_an_encoder_learns_what_is_masked():
    text, _ = text_data()
    data = MaskedText(text, mask_id=BYTES.mask_id, eos_id=BYTES.eos_id, vocab_size=BYTES.vocab_size, masked=0.3)
    torch.manual_seed(0)
    losses = train(Encoder(CONFIGS["llama"]), data, steps=25, lr=1e-2).losses
    assert losses[0] > 5.4 and sum(losses[-3:]) / 3 < 3.6


def test_an_encoder_decoder_learns_to_reverse():
    draw = random.Random(0)
    pairs = [(letters, letters[::-1]) for letters in ([draw.randrange(97, 105) for _ in range(3)] for _ in range(600))]
    data = PackedPairs(pairs[:500], batch_size=50, bos_id=256, eos_id=256)
    torch.manual_seed(0)
    # Where a token stands in the source is in its embedding: the decoder's attention to the source has no rotary embedding.
    model = EncoderDecoder(Config(vocab_size=257, hidden_size=32, num_layers=1, num_heads=4, max_seqlen=16, positions="learned", init_std=0.1))
    held_out = PackedPairs(pairs[500:], batch_size=100, bos_id=256, eos_id=256, shuffle=False)
    trainer = train(model, data, steps=150, lr=1e-2, validation=held_out)
    assert trainer.validate() < 0.1
    sources = torch.tensor([source for source, _ in pairs[500:]])
    answers = model.eval().generate(sources, bos_id=256, eos_id=256, max_new_tokens=5)
    assert sum(answer == target for answer, (_, target) in zip(answers, pairs[500:])) > 90


# --------------------------------------------------------------------------------------------------------------------
# Stopped and resumed.


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def column(folder, name="loss"):
    with open(folder / "log.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    data, validation = text_data()
    more = {"save_every": 3, "validate_every": 4, "validation": validation}
    whole = train(make_model(DROPOUT), data, tmp_path / "whole", steps=8, **more)
    # Stopped after step 5, by its callback: the steps since the checkpoint of step 3 are lost, and taken again.
    first = Trainer(make_model(DROPOUT), data, Settings(steps=8, save_every=3, log_every=1), tmp_path / "parts", report=stop_at(5))
    with pytest.raises(KeyError):
        first.run()
    second = train(make_model(DROPOUT, seed=1), data, tmp_path / "parts", steps=8, resume=True, **more)
    assert len(second.losses) == 5 and same(whole.model, second.model)
    assert column(tmp_path / "parts") == column(tmp_path / "whole") == [repr(loss) for loss in whole.losses]
    assert column(tmp_path / "parts", "tokens")[-1] == "1024"
    assert [path.name for path in snapshots(tmp_path / "parts" / "checkpoints")] == ["step-00000006.pt", "step-00000008.pt"]


def stop_at(step):
    def report(line):
        if line.startswith(f"step {step}/"):
            raise KeyError(step)

    return report


def endless(folder):
    """A run that is long enough to be killed; what it reaches is the same whenever that happens."""
    data, _ = text_data()
    train(make_model(DROPOUT), data, folder, steps=40, save_every=2, resume=True)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import, which they find done. (They have the path of tests alone by themselves.)
    lasting = ["fastattn.models.training", "matplotlib.figure", "safetensors.torch", "torch.utils.tensorboard", "torch._dynamo"]
    context.set_forkserver_preload(lasting)
    return context


def test_killed_at_any_moment_it_loses_nothing_that_was_saved(tmp_path, processes):
    endless(tmp_path / "whole")
    random_moments = random.Random(0)
    saved, kills = 0, 0
    while saved < 40:
        process = processes.Process(target=endless, args=(tmp_path / "killed",))
        process.start()
        found = snapshots(tmp_path / "killed" / "checkpoints")
        begun = time.monotonic()
        while process.is_alive() and snapshots(tmp_path / "killed" / "checkpoints") == found and time.monotonic() < begun + 60:
            time.sleep(0.01)
        if kills < 6:
            time.sleep(random_moments.uniform(0.0, 0.15))
            process.kill()
        process.join(120)
        kills += process.exitcode == -signal.SIGKILL
        newest = snapshots(tmp_path / "killed" / "checkpoints")[-1]
        step = torch.load(newest, weights_only=True)["step"]  # whole, whatever was being written
        assert step >= saved and newest.name == f"step-{step:08d}.pt"
        saved = step
        assert json.loads((tmp_path / "killed" / "config.json").read_text())
    assert kills >= 4
    assert column(tmp_path / "killed") == column(tmp_path / "whole")
    models = [load(tmp_path / name)[0] for name in ("killed", "whole")]
    assert same(*models)
    assert not list((tmp_path / "killed").rglob(".*.tmp"))


def test_ctrl_c_ends_it_after_a_step_and_its_checkpoint(tmp_path):
    data, _ = text_data()

    def report(line):
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(make_model(DROPOUT), data, Settings(steps=9, log_every=1), tmp_path, report=report)
    with pytest.raises(Interrupted, match="interrupted after step 4; step 4 is saved in "):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(make_model(DROPOUT), data, tmp_path, steps=9, resume=True)
    assert trainer.losses + resumed.losses == train(make_model(DROPOUT), data, steps=9).losses


class Spoilt:
    """Data whose batch number `at` has something wrong with it."""

    def __init__(self, data, at, spoil):
        self.data, self.at, self.spoil, self.fingerprint = data, at, spoil, "spoilt"

    def batch(self, index):
        if index == self.at:
            self.spoil()
        return self.data.batch(index)

    def __len__(self):
        return len(self.data)


def test_a_loss_that_is_no_number_is_not_learnt_from(tmp_path):
    data, _ = text_data()
    model = make_model(CONFIGS["llama"])
    clean = train(make_model(CONFIGS["llama"]), data, steps=3, warmup=0)
    broken = []

    def spoil():
        broken.append(model.norm.register_forward_hook(lambda module, args, out: out * math.nan))

    trainer = Trainer(model, Spoilt(data, 3, spoil), Settings(steps=9, warmup=0), tmp_path, report=lambda line: None)
    message = r"the loss is nan and the gradient's norm nan in step 4, which was not taken: try a lower .*; step 3 is saved in "
    with pytest.raises(TrainingError, match=message):
        trainer.run()
    broken[0].remove()
    assert len(column(tmp_path)) == 3 and trainer.step == 3
    state = torch.load(snapshots(tmp_path / "checkpoints")[-1], weights_only=True)
    assert all(torch.equal(state["model"][name], p) and p.isfinite().all() for name, p in model.named_parameters())
    assert len(clean.losses) == len(trainer.losses)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=["cuda", "cpu"])  # fmt: skip
def test_out_of_memory_says_what_to_do_and_loses_nothing(tmp_path, error):
    data, _ = text_data()

    def spoil():
        raise error

    trainer = Trainer(make_model(CONFIGS["llama"]), Spoilt(data, 2, spoil), Settings(steps=9), tmp_path, report=lambda line: None)
    with pytest.raises(TrainingError, match="out of memory in step 3: choose smaller batches .*; step 2 is saved in "):
        trainer.run()
    assert load(tmp_path)[0].config == CONFIGS["llama"]


def test_other_errors_are_not_taken_for_memory(tmp_path):
    data, _ = text_data()

    def spoil():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        train(make_model(CONFIGS["llama"]), Spoilt(data, 0, spoil), tmp_path, steps=9)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    data, _ = text_data()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def spoil():  # from here on no file can grow past 100 kB, and a checkpoint has 400
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    trainer = Trainer(make_model(CONFIGS["llama"]), Spoilt(data, 3, spoil), Settings(steps=9, save_every=2), tmp_path, report=lambda line: None)
    try:
        with pytest.raises(TrainingError, match=r"cannot be written: .*; step 2 is saved in "):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert load(tmp_path)[0].config == CONFIGS["llama"]
    resumed = train(make_model(CONFIGS["llama"]), Spoilt(data, -1, spoil), tmp_path, steps=9, save_every=2, resume=True)
    assert trainer.losses[:2] + resumed.losses == train(make_model(CONFIGS["llama"]), data, steps=9).losses


def test_what_cannot_be_resumed_is_refused(tmp_path):
    data, _ = text_data()
    train(make_model(CONFIGS["llama"]), data, tmp_path, steps=2, save_every=1)
    with pytest.raises(CheckpointError, match="holds a run already: resume it, or choose another folder"):
        train(make_model(CONFIGS["llama"]), data, tmp_path, steps=3)
    with pytest.raises(CheckpointError, match=r"cannot be resumed: its model was\n  Transformer, Config\("):
        train(make_model(CONFIGS["gpt2"]), data, tmp_path, steps=3, resume=True)
    with pytest.raises(CheckpointError, match="its data was"):
        train(make_model(CONFIGS["llama"]), text_data(100)[0], tmp_path, steps=3, resume=True)
    with pytest.raises(CheckpointError, match="its batches a step was\n  1\nand is\n  2"):
        train(make_model(CONFIGS["llama"]), data, tmp_path, steps=3, resume=True, accumulation=2)
    newest = snapshots(tmp_path / "checkpoints")[-1]
    os.truncate(newest, 1000)
    with pytest.raises(CheckpointError, match=r"step-00000002.pt is damaged .* remove it to resume from the one before it"):
        train(make_model(CONFIGS["llama"]), data, tmp_path, steps=3, resume=True)
    newest.unlink()
    assert train(make_model(CONFIGS["llama"]), data, tmp_path, steps=3, resume=True).step == 3
    with locked(tmp_path), pytest.raises(CheckpointError, match="another process is training into"):
        train(make_model(CONFIGS["llama"]), data, tmp_path, steps=4, resume=True)


# --------------------------------------------------------------------------------------------------------------------
# Several ranks.


def of_ranks(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    data, validation = text_data()
    with ranks("cpu") as those:
        trainer = train(make_model(DROPOUT), data, folder, steps=5, ranks=those, validation=validation, tokenizer=BYTES)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps([trainer.losses, [type(p).__name__ for p in trainer.model.parameters()]]))


def test_two_ranks_train_as_one(tmp_path):
    processes = multiprocessing.get_context("spawn")  # gloo's threads and a forked process do not go together
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [processes.Process(target=of_ranks, args=(rank, port, tmp_path / "two")) for rank in (0, 1)]
    for process in both:
        process.start()
    data, validation = text_data()
    one = train(make_model(DROPOUT), data, tmp_path / "one", steps=5, accumulation=2, validation=validation)
    for process in both:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    losses, kinds = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert set(kinds) == {"DTensor"}  # sharded
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(one.losses), rtol=0, atol=5e-6)
    rows = [read_log(tmp_path / name / "log.csv")[-1] for name in ("one", "two")]
    assert rows[0]["validation_loss"] == pytest.approx(rows[1]["validation_loss"], abs=5e-6)
    for ours, theirs in zip(*(load(tmp_path / name)[0].parameters() for name in ("one", "two")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # Adam divides by gradients near 0
    # One process goes on with what two began.
    resumed = [train(make_model(DROPOUT), data, tmp_path / name, steps=6, accumulation=2, resume=True) for name in ("one", "two")]
    states = [torch.load(snapshots(tmp_path / name / "checkpoints")[0], weights_only=True) for name in ("one", "two")]
    for name, ours in states[0]["optimizer"].items():
        for key, value in ours.items():
            torch.testing.assert_close(states[1]["optimizer"][name][key], value, rtol=0, atol=1e-5)
    assert len(resumed[1].losses) == 1 and resumed[0].losses == pytest.approx(resumed[1].losses, abs=5e-6)


# --------------------------------------------------------------------------------------------------------------------
# The log.


def test_the_log_has_every_figure(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    data, validation = text_data()
    lines = []
    Trainer(make_model(CONFIGS["llama"]), data, Settings(steps=4, validate_every=2, log_every=2), tmp_path, validation=validation, report=lines.append).run()
    rows = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(tuple(row) == COLUMNS for row in rows)
    for row in rows:
        assert 5 < row["loss"] < 6 and row["tokens"] == 128 * row["step"] and 0 < row["mfu"] < 1 and row["tokens_per_second"] > 0
        assert 0.1 < row["memory_gib"] < 50 and row["grad_norm"] > 0 and 0 < row["lr"] <= 1e-3
        assert (row["validation_loss"] is None) == (row["step"] % 2 == 1)
    assert rows[-1]["validation_perplexity"] == pytest.approx(math.exp(rows[-1]["validation_loss"]))
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1/4", "2/4", "4/4"]
    assert all(word in lines[-1] for word in ("loss", "lr", "tokens/s", "MFU", "GiB", "perplexity"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"validation_perplexity" in events.read_bytes()


def test_a_log_without_tensorboard_and_matplotlib_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = []
    Trainer(make_model(CONFIGS["llama"]), text_data()[0], Settings(steps=1), tmp_path, report=lines.append).run()
    assert "without the TensorBoard log: tensorboard is not installed" in lines[0] and "without loss.png: matplotlib" in lines[1]
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "loss.png").exists() and len(column(tmp_path)) == 1


def test_figures_of_devices(monkeypatch):
    device = torch.device("cuda")
    for name, peak in (("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(device, torch.bfloat16)[0] == peak * 1e12 and peak in PEAKS.values()
    flops, what = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < flops < 1e14 and "measured here" in what
    row = {"step": 7, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1234.5, "mfu": None, "memory_gib": 1.0}
    assert progress_line(row, 1000) == "step    7/1000  loss 2.0000  lr 1.00e-03  |gradient| 1.00  1,234 tokens/s  1.00 GiB"


def test_settings_are_checked():
    for wrong, message in {
        "steps": (0, "train: steps must be at least 1, got 0"),
        "lr": (0.0, "train: lr must be positive and finite, got 0.0"),
        "clip": (math.nan, "train: clip must be positive and finite, got nan"),
        "weight_decay": (-1.0, "train: weight_decay must be at least 0, got -1.0"),
        "warmup": (-1, "train: warmup must be at least 0, got -1"),
        "dtype": ("float8", "train: dtype must be one of float32, bfloat16, got 'float8'"),
    }.items():
        with pytest.raises(ValueError, match=message[1]):
            Settings(**{"steps": 1} | {wrong: message[0]})


def test_a_kill_between_the_model_and_its_checkpoint_loses_neither(tmp_path, monkeypatch):
    """The model is written first: the step is then taken again, and written again."""
    from fastattn.models import training

    data, _ = text_data()
    saved = training.snapshots.save

    def killed(folder, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        saved(folder, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.snapshots, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(make_model(CONFIGS["llama"]), data, tmp_path, steps=3, save_every=1)
    train(make_model(CONFIGS["llama"]), data, tmp_path, steps=3, resume=True)
    whole = train(make_model(CONFIGS["llama"]), data, tmp_path / "whole", steps=3)
    for ours, theirs in zip(load(tmp_path)[0].parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_of_another_class_is_another_run(tmp_path):
    data, _ = text_data()
    train(make_model(CONFIGS["llama"]), data, tmp_path, steps=1)
    with pytest.raises(CheckpointError, match="its model was"):
        train(Encoder(CONFIGS["llama"]), data, tmp_path, steps=2, resume=True)
