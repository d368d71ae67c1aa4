"""How a time is taken: warmed up, cold cache, interleaved between implementations, median; and how far it can be told from another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass(frozen=True)
class Work:
    """One thing to time: `run(prepare())`, of which only `run` is timed.

    capture: what a CUDA graph records in place of `run`, where a replay needs what `run` frees: the tensors a forward pass saved.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    capture: Callable[[Any], Any] | None = None

    def once(self) -> Any:
        return self.run(self.prepare())


@dataclass(frozen=True)
class Measurement:
    """Median milliseconds over `rounds` calls, and the distance between their quartiles."""

    ms: float
    spread_ms: float
    rounds: int


def standard_error(figure: Mapping[str, Any]) -> float:
    """That of a median, as a share of it, by the quartiles: 1.253·σ/√n with σ = IQR/1.349, as for a normal distribution."""
    return 1.253 / 1.349 * figure["spread_ms"] / math.sqrt(figure["rounds"]) / figure["ms"]


def resolution(a: Mapping[str, Any], b: Mapping[str, Any], repeated: float = 0.0, errors: float = 2.0) -> float:
    """What the ratio of two figures may be off 1 by chance: `errors` standard errors of it, or `repeated`, what one implementation timed
    twice differed from itself by, where that is more."""
    return max(errors * math.hypot(standard_error(a), standard_error(b)), repeated)


class Clock:
    """Times calls on one device.

    Each call comes after a write to a buffer larger than the L2 cache, so that it starts cold whoever ran before it. On CUDA the time is
    taken by a pair of events, and the write lasts long enough for the host to queue the call behind it, so that they measure the device
    and not Python. On the CPU it is `perf_counter`'s.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        """seconds: how long to spend on one implementation, within MIN_ROUNDS and MAX_ROUNDS calls."""
        self.device, self.seconds = device, seconds
        self._on_gpu = device.type == "cuda"
        size = min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 16) if self._on_gpu else 1 << 25
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, work: Work) -> Callable[[], float]:
        """Call once; the milliseconds are read later, so that the host can run ahead of the device."""
        argument = work.prepare()
        self._flush.zero_()
        if not self._on_gpu:
            start = time.perf_counter()
            work.run(argument)
            milliseconds = (time.perf_counter() - start) * 1e3
            return lambda: milliseconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work.run(argument)
        end.record()
        return lambda: start.elapsed_time(end)

    def replay(self, work: Work) -> Work:
        """`work` recorded as a CUDA graph, which leaves the host one launch. Raises where the device cannot be left alone so long."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            work.once()  # what the first call on a stream sets up cannot be recorded
            argument = work.prepare()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            (work.capture or work.run)(argument)
        return Work(lambda kept: graph.replay(), prepare=lambda: argument)  # which has to outlive the graph

    def peak_bytes(self, work: Work) -> int | None:
        """The most that one call of `run` holds of the device's memory beyond what was there before; None where nobody counts."""
        if not self._on_gpu:
            return None
        argument = work.prepare()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work.run(argument)
        return torch.cuda.max_memory_allocated(self.device) - before

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def measure(self, works: dict[str, Work]) -> tuple[dict[str, Measurement], dict[str, str]]:
        """Time all of `works` in turn, round after round, so that a change of clocks falls on each of them alike.

        Returns the measurements, and for each one that raised instead, what it said.
        """
        rounds, failures = {}, {}
        warmup_calls = 2 if self._on_gpu else 1  # the last one tells what a round takes; on a GPU the first may compile
        for name, work in works.items():
            try:
                for _ in range(warmup_calls):
                    start = time.perf_counter()
                    self.once(work)
                    self.synchronize()
                rounds[name] = min(MAX_ROUNDS, max(MIN_ROUNDS, int(self.seconds / (time.perf_counter() - start))))
            except Exception as error:  # a peer that cannot do this shape, or runs out of memory, loses its column only
                failures[name] = describe_error(error)
                free_memory(self.device)
        times: dict[str, list[float]] = {name: [] for name in rounds}
        for number in range(max(rounds.values(), default=0)):
            pending = {name: self.once(works[name]) for name, count in rounds.items() if number < count}
            self.synchronize()
            for name, milliseconds in pending.items():
                times[name].append(milliseconds())
        return {name: _summary(values) for name, values in times.items()}, failures


def _summary(values: list[float]) -> Measurement:
    lower, median, upper = statistics.quantiles(values, n=4)
    return Measurement(median, upper - lower, len(values))


def describe_error(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}".rstrip(": ")


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_ceilings(clock: Clock, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches in this run: TFLOP/s of a large matmul of random data, GB/s (read plus written) of a large copy."""
    on_gpu = clock.device.type == "cuda"
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    source = torch.randn((1 << 28) if on_gpu else (1 << 25), device=clock.device)
    target = torch.empty_like(source)
    times, failures = clock.measure({"matmul": Work(lambda _: a @ b), "copy": Work(lambda _: target.copy_(source))})
    if failures:
        raise RuntimeError(f"the ceilings could not be measured: {failures}")
    return {
        "matmul_tflops": 2 * n**3 / times["matmul"].ms / 1e9,
        "matmul_size": n,
        "copy_gbps": 2 * source.nbytes / times["copy"].ms / 1e6,
        "copy_bytes": source.nbytes,
    }


def host_microseconds(call: Callable[[], Any], device: torch.device, calls: int = 200, batches: int = 7) -> float:
    """Microseconds a call keeps the host busy: the median over batches of calls issued without a synchronisation between them."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(10):
        call()
    wait()
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
        wait()
    return statistics.median(times)
