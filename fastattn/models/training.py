"""Training: AdamW, warm-up and cosine, clipped gradients; checkpoints from which a run goes on as if it had never been stopped.

A step is a function of what the last one left and of its number alone: its batches, its learning rate and its random numbers
all follow from the seed and that number. So a checkpoint is the parameters, what the optimizer keeps, and the step.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checkpoints, snapshots
from .data import IGNORED, seed_of
from .files import CheckpointError
from .ranks import Ranks, as_sharded, blocks, whole
from .tokenizers import Tokenizer
from .training_log import TrainingLog, peak_flops, peak_memory_gib, progress_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TrainingError(RuntimeError):
    """Why a run ended early. The message says what is saved."""


class Interrupted(TrainingError):
    """It was asked to end, by Ctrl-C or SIGTERM."""


class Batches(Protocol):
    """What is trained on: `data.PackedText`, `data.MaskedText`, `data.PackedPairs`, or anything alike.

    batch(index): arguments of the model's `loss` by name, "labels" among them, the same at each call; len(): batches of an epoch.
    fingerprint: other for other data.
    """

    fingerprint: str

    def batch(self, index: int) -> dict[str, Any]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    steps: of the optimizer. accumulation: batches of a step, one after the other, on each rank.
    lr: at its highest, after `warmup` steps (default: a tenth of all, 100 at most); from there a cosine to final_lr · lr at the last step.
    weight_decay: of matrices (and embeddings) alone, not of norms and biases. betas, eps: AdamW's. clip: the gradient's norm, at most.
    dtype: "float32", or "bfloat16" by autocast; parameters and the optimizer's state are float32 either way.
    checkpointing: keep each layer's input alone for the backward, and compute the rest again. compile: the blocks, by torch.compile.
    seed: of random numbers in training (dropout). Data has its own, and the model is made before.
    save_every, validate_every, log_every: steps between checkpoints, validations and progress lines; each is also made at the end.
    validation_batches: at most as many, the first ones. keep: checkpoints that are kept.

    Raises: ValueError by the setting's name.
    """

    steps: int
    accumulation: int = 1
    lr: float = 1e-3
    warmup: int | None = None
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    dtype: str = "float32"
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 200
    validate_every: int = 200
    log_every: int = 10
    validation_batches: int = 20
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "save_every", "validate_every", "log_every", "validation_batches", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"train: {name} must be positive and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "final_lr", "warmup"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"train: {name} must be at least 0, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"train: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.warmup is None:
            object.__setattr__(self, "warmup", min(100, self.steps // 10))

    def learning_rate(self, step: int) -> float:
        """Of the step that comes after `step` others."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.lr * (self.final_lr + (1.0 - self.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, which decays matrices alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps)


@dataclass(frozen=True)
class Work:
    """Of some steps: how long they took, and their tokens and floating-point operations, of all ranks."""

    seconds: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.tokens + other.tokens, self.flops + other.flops)


class Trainer:
    """A model, its data, and the loop.

    Args:
        model: with `loss(**batch, reduction="sum")`: a `Transformer`, `Encoder` or `EncoderDecoder`, on ranks' device, in float32. It is
            sharded over the ranks.
        data, validation: `Batches`. settings: `Settings`.
        out: a folder for checkpoints, the log, and the model, which transformers loads from there if it has such a model; None: nothing is
            written.
        tokenizer: saved beside the model.
        ranks: of `ranks.ranks()`; by default this process alone, on the model's device.
        resume: go on from the newest checkpoint in `out`, if there is one. Without it, a folder that holds one is refused.
        report: takes the progress lines.

    Attributes: step, how many have been taken, and tokens, of how many. losses: of those that this process took, in nats a
    label, with a mixture of experts' auxiliary ones.

    torch's generators are seeded at each batch.

    Raises: CheckpointError for a folder that holds another run, and for damaged files.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        settings: Settings,
        out: str | Path | None = None,
        *,
        validation: Batches | None = None,
        tokenizer: Tokenizer | None = None,
        ranks: Ranks | None = None,
        resume: bool = False,
        report: Callable[[str], object] = print,
    ) -> None:
        self.model, self.data, self.validation, self.settings, self.tokenizer = model, data, validation, settings, tokenizer
        self.ranks = ranks or Ranks(0, 1, next(model.parameters()).device)
        self.out = None if out is None else Path(out)
        self.report = report if self.ranks.rank == 0 else lambda line: None
        self.step, self.tokens, self.losses = 0, 0, []
        self._saved: int | None = None  # the step of the newest checkpoint
        self._whole = True  # not within an update, which leaves some parameters of this step and some of the last
        self._class = type(model)  # sharding makes another
        model.train()
        model.checkpointing = settings.checkpointing
        self.ranks.shard(model, DTYPES[settings.dtype])
        self.optimizer = make_optimizer(model, settings)
        self._restore(resume)
        if settings.compile:
            for block in blocks(model):
                block.compile()

    # The loop

    def run(self) -> None:
        """Take the steps that are left.

        Raises: Interrupted on Ctrl-C or SIGTERM, after a step and its checkpoint; TrainingError where memory or the disk is full, or the
        loss is no number. What was reached by then is saved, as the message says.
        """
        with ExitStack() as stack:
            asked = stack.enter_context(_asked_to_stop())
            log = None
            if self.out is not None and self.ranks.rank == 0:
                stack.enter_context(snapshots.locked(self.out))
                log = TrainingLog(self.out, self.step)
                stack.callback(log.close)
                for what, package in log.absent.items():
                    self.report(f"without {what}: {package} is not installed (pip install 'fastattn[models]')")
            try:
                self._run(asked, log)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                advice = "choose smaller batches with more accumulation, activation checkpointing or bfloat16"
                raise TrainingError(f"out of memory in step {self.step + 1}: {advice}; {self._rescue()}") from error
            except OSError as error:
                where = error.filename or self.out
                raise TrainingError(f"{where} cannot be written: {error.strerror or error}; {self._newest()}") from error

    def _run(self, asked: Callable[[], bool], log: TrainingLog | None) -> None:
        settings = self.settings
        peak, remark = math.inf, ""
        if hasattr(self.model, "flops_per_token"):
            peak, what = peak_flops(self.ranks.device, DTYPES[settings.dtype])
            remark = f"; MFU is of {what}"
        self.report(f"{_num_parameters(self.model):,} parameters, {len(self.data):,} batches an epoch{remark}")
        since = Work()  # the last progress line
        while self.step < settings.steps:
            row, work, stop = self._step(asked())
            since += work
            row |= self._speed(work, peak)
            last, due = self.step == settings.steps, lambda every: self.step % every == 0
            if self.validation is not None and (last or due(settings.validate_every)):
                row["validation_loss"] = self.validate()
                row["validation_perplexity"] = _perplexity(row["validation_loss"])
            if log is not None:
                log.write(row)
            if last or due(settings.log_every) or self.step == 1 or stop:
                self.report(progress_line(row | self._speed(since, peak), settings.steps))
                since = Work()
            if last or due(settings.save_every) or stop:
                self.save()
                if log is not None:
                    log.plot()
            if stop and not last:
                raise Interrupted(f"interrupted after step {self.step}; {self._newest()}")

    def _speed(self, work: Work, peak: float) -> dict[str, float | None]:
        used = work.flops / work.seconds / (peak * self.ranks.world)
        memory = peak_memory_gib(self.ranks.device)
        return {"tokens_per_second": work.tokens / work.seconds, "mfu": used or None, "memory_gib": memory}

    def _step(self, asked: bool) -> tuple[dict[str, Any], Work, bool]:
        """One step of the optimizer: (its row of the log, what it was, whether any rank was asked to stop)."""
        settings, ranks, start = self.settings, self.ranks, time.perf_counter()
        first = (self.step * settings.accumulation) * ranks.world + ranks.rank
        indices = [first + i * ranks.world for i in range(settings.accumulation)]
        batches = [self.data.batch(index) for index in indices]
        tokens, flops = sum(map(_num_tokens, batches)), sum(self._flops(batch) for batch in batches)
        labels, tokens, flops, stop = ranks.sum(sum(map(_num_labels, batches)), tokens, flops, asked)

        rate = settings.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=ranks.device)
        for index, batch in zip(indices, batches):
            torch.manual_seed(seed_of(settings.seed, index))
            loss = self._loss(batch)
            # Ranks' gradients are averaged, and labels are counted over all of them.
            (loss * (ranks.world / max(labels, 1.0))).backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        (loss,) = ranks.sum(total.item() / max(labels, 1.0))
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise TrainingError(
                f"the loss is {loss:g} and the gradient's norm {norm.item():g} in step {self.step + 1}, which was not taken: try a lower "
                f"learning rate, a longer warm-up, or float32; {self._rescue(together=True)}"
            )
        self._whole = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + int(tokens)
        self._whole = True
        self.losses.append(loss)
        row = {"step": self.step, "tokens": self.tokens, "loss": loss, "lr": rate, "grad_norm": norm.item()}
        return row, Work(time.perf_counter() - start, tokens, flops), stop > 0

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        """Summed over the labels."""
        device, dtype = self.ranks.device, DTYPES[self.settings.dtype]
        batch = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return self.model.loss(**batch, reduction="sum")

    def _flops(self, batch: dict[str, Any]) -> float:
        """By the batch's mean length of sequences; 0 for a model that does not say."""
        of_token = getattr(self.model, "flops_per_token", None)
        if of_token is None:
            return 0.0
        tokens = _num_tokens(batch)
        return tokens * of_token(max(1, tokens // (len(batch["cu_seqlens"]) - 1)) if "cu_seqlens" in batch else batch["tokens"].shape[-1])

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the first validation batches, in nats a label; ranks share them."""
        self.model.eval()
        count = min(len(self.validation), self.settings.validation_batches)
        total = labels = 0.0
        for first in range(0, count, self.ranks.world):
            index = first + self.ranks.rank
            batch = self.validation.batch(min(index, count - 1))  # every rank takes part in gathering parameters
            loss = self._loss(batch).item()
            if index < count:
                total, labels = total + loss, labels + _num_labels(batch)
        self.model.train()
        self.ranks.reshard(self.model)
        total, labels = self.ranks.sum(total, labels)
        return total / max(labels, 1.0)

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint, and the model for others to load."""
        if self.out is None or self._saved == self.step:
            return
        parameters = dict(self.model.named_parameters())
        first = self.ranks.rank == 0
        model = {name: whole(p, first) for name, p in parameters.items()}
        states = {name: self.optimizer.state[p] for name, p in parameters.items()}
        optimizer = {name: {key: whole(value, first) for key, value in of_one.items()} for name, of_one in states.items()}
        if first:  # the model before the checkpoint: of a run that is killed in between, the step is taken again
            described = self.model if self.ranks.world == 1 else self._class(self.model.config, device="meta")
            checkpoints.save(described, self.out, self.tokenizer, state=model)
            state = {"step": self.step, "tokens": self.tokens, "run": self._identity(), "settings": dataclasses.asdict(self.settings)}
            snapshots.save(self.out / "checkpoints", self.step, state | {"model": model, "optimizer": optimizer}, self.settings.keep)
        self._saved = self.step
        self.ranks.wait()

    def _identity(self) -> dict[str, str]:
        """What a run that goes on must have in common with the one before."""
        batches = self.settings.accumulation * self.ranks.world
        return {"model": f"{self._class.__name__}, {self.model.config!r}", "data": self.data.fingerprint, "batches a step": str(batches)}

    def _restore(self, resume: bool) -> None:
        found = [] if self.out is None else snapshots.snapshots(self.out / "checkpoints")
        if not found:
            return
        if not resume:
            raise CheckpointError(f"train: {self.out} holds a run already: resume it, or choose another folder")
        state = snapshots.load(found[-1])
        for name, ours in self._identity().items():
            if state["run"][name] != ours:
                differ = f"its {name} was\n  {state['run'][name]}\nand is\n  {ours}"
                raise CheckpointError(f"train: the run in {self.out} cannot be resumed: {differ}")
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(as_sharded(state["model"][name], p))
                self.optimizer.state[p] = {key: as_sharded(value, p) for key, value in state["optimizer"][name].items()}
        self.step, self.tokens, self._saved = state["step"], state["tokens"], state["step"]
        self.report(f"resumed after step {self.step} from {found[-1]}")

    def _rescue(self, together: bool = False) -> str:
        """Save what there is, where that is whole and no other rank would have to take part, or all do so `together`; say what is saved."""
        self.optimizer.zero_grad(set_to_none=True)
        finite = all(bool(torch.isfinite(p).all()) for p in self.model.parameters()) if self.ranks.world == 1 else True
        if self._whole and finite and (together or self.ranks.world == 1) and self.step:
            try:
                self.save()
            except OSError as error:
                return f"saving step {self.step} failed too: {error}; {self._newest()}"
        return self._newest()

    def _newest(self) -> str:
        if self.out is None or self._saved is None:
            return "nothing is saved"
        return f"step {self._saved} is saved in {self.out}"


def _num_labels(batch: dict[str, Any]) -> int:
    return int((batch["labels"] != IGNORED).sum())


def _num_tokens(batch: dict[str, Any]) -> int:
    return sum(batch[name].numel() for name in ("tokens", "source", "target") if name in batch)


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C or SIGTERM has come. A second one ends the process as it would without us."""
    asked, old = [], {}
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda: False
        return

    def note(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, old[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, note)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
