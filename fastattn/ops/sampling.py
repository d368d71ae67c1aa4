"""Sampling as torch operators, and the public functions. The seed of a draw is an operand, so that the operators are pure functions."""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from fastattn.cpu import sampling as cpu
from fastattn.cuda import sampling as cuda

from . import checks
from .dispatch import checks_values, chooses_cuda, describe, log, runs_kernels
from .operator import define, operators

MAX_COLUMNS = 2**22  # whose weights, in units of 2^-40, 64 bits hold the sum of
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # a temperature below is 0, above as good as uniform


def _parameters(op: str, logits: Tensor, per_row: tuple[Tensor | None, ...], numbers: tuple) -> list[float | Tensor]:
    """temperature, top_k, top_p and min_p, each as a tensor of rows where there is one, else as a number."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s: logits %s per row %s else %s", op, describe(logits), [describe(t) for t in per_row], numbers)
    temperature, _, top_p, min_p = per_row
    if temperature is not None and checks_values(temperature):
        _check_values(op, "temperature", temperature, "hold finite numbers of 0 or more", (temperature >= 0) & temperature.isfinite())
    for arg, values in (("top_p", top_p), ("min_p", min_p)):
        if values is not None and checks_values(values):
            _check_values(op, arg, values, "hold numbers in [0, 1]", (values >= 0) & (values <= 1))
    if temperature is not None and temperature.dtype == torch.float64:
        per_row = temperature.clamp(max=_HUGE), *per_row[1:]
    return [number if values is None else values for values, number in zip(per_row, numbers, strict=True)]


def _check_values(op: str, arg: str, values: Tensor, must: str, good: Tensor) -> None:
    if not good.all():
        row = good.tolist().index(False)
        checks.reject(op, arg, must, f"{values[row].item()} in row {row}")


def _sample(
    logits: Tensor, seed: Tensor, temperatures, top_ks, top_ps, min_ps, temperature, top_k, top_p, min_p, backend=None
) -> Tensor:
    parameters = _parameters("sample", logits, (temperatures, top_ks, top_ps, min_ps), (temperature, top_k, top_p, min_p))
    if not runs_kernels(logits):
        sample = cpu.sample
    elif chooses_cuda("sample", backend, cuda.is_chosen(logits), cuda.limit, logits):
        sample = cuda.sample
    else:
        from fastattn.kernels.sampling import sample  # here, so that `import fastattn` needs no Triton
    return sample(logits, seed, *parameters)


def _sampling_probs(logits: Tensor, temperatures, top_ks, top_ps, min_ps, *numbers) -> Tensor:
    parameters = _parameters("sampling_probs", logits, (temperatures, top_ks, top_ps, min_ps), numbers)
    if runs_kernels(logits):
        from fastattn.kernels.sampling import sampling_probs
    else:
        sampling_probs = cpu.sampling_probs
    return sampling_probs(logits, *parameters)


_PARAMETERS = (
    "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, float temperature, int top_k, float top_p, float min_p"
)
define(
    f"sample(Tensor logits, Tensor seed, {_PARAMETERS}, str? backend=None) -> Tensor",
    _sample,
    lambda logits, seed, *parameters: logits.new_empty(logits.shape[:1], dtype=torch.int64),
)
define(
    f"sampling_probs(Tensor logits, {_PARAMETERS}) -> Tensor",
    _sampling_probs,
    lambda logits, *parameters: logits.new_empty(logits.shape, dtype=torch.float32),
)


def _checked(op: str, logits: Tensor, temperature, top_k, top_p, min_p) -> tuple:
    """The operators' parameters: four tensors or Nones, then four numbers that keep all where there is a tensor or a None."""
    checks.check_tensor(op, "logits", logits)
    checks.check_dtype(op, "logits", logits)
    if logits.dim() != 2:
        checks.reject(op, "logits", "have shape (B, V)", checks.shape(logits))
    if not 1 <= logits.shape[1] <= MAX_COLUMNS:
        checks.reject(op, "logits", f"have between 1 and {MAX_COLUMNS} columns", checks.shape(logits))
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for arg, value in given.items():
        if isinstance(value, Tensor):
            _check_of_rows(op, arg, value, logits)
    tensors = [value if isinstance(value, Tensor) else None for value in given.values()]
    numbers = [
        1.0 if temperature is None or isinstance(temperature, Tensor) else _temperature(op, temperature),
        0 if top_k is None or isinstance(top_k, Tensor) else _top_k(op, top_k),
        1.0 if top_p is None or isinstance(top_p, Tensor) else _share(op, "top_p", top_p),
        0.0 if min_p is None or isinstance(min_p, Tensor) else _share(op, "min_p", min_p),
    ]
    return (*tensors, *numbers)


def _check_of_rows(op: str, arg: str, value: Tensor, logits: Tensor) -> None:
    if value.shape != logits.shape[:1]:
        checks.reject(op, arg, f"be a number or have shape (B,) = ({logits.shape[0]},)", checks.shape(value))
    if value.device != logits.device:
        checks.reject(op, arg, f"be on logits' device {logits.device}", value.device)
    if arg != "top_k":
        checks.check_float(op, arg, value)
    elif value.dtype not in (torch.int32, torch.int64):
        checks.reject(op, arg, "be int32 or int64", value.dtype, TypeError)


def _seed(logits: Tensor, generator: torch.Generator | None, seeds: Tensor | None) -> Tensor:
    """(1,) drawn by the generator, or (B,) those given; int64 on the logits' device."""
    if generator is not None and not isinstance(generator, torch.Generator):
        checks.reject("sample", "generator", "be a torch.Generator", type(generator).__name__, TypeError)
    if generator is not None and generator.device.type != logits.device.type:
        checks.reject("sample", "generator", f"be on logits' device {logits.device}", generator.device)
    if seeds is None:
        return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=logits.device, generator=generator)
    checks.check_tensor("sample", "seeds", seeds)
    if generator is not None:
        checks.reject("sample", "seeds", "be None with a generator", "a tensor")
    if seeds.dtype != torch.int64:
        checks.reject("sample", "seeds", "be int64", seeds.dtype, TypeError)
    if seeds.shape != logits.shape[:1]:
        checks.reject("sample", "seeds", f"have shape (B,) = ({logits.shape[0]},)", checks.shape(seeds))
    checks.check_device("sample", "seeds", seeds, "logits'", logits.device)
    return seeds.contiguous()


def _temperature(op: str, value: float) -> float:
    checks.check_number(op, "temperature", value)
    if not 0.0 <= value < math.inf:
        checks.reject(op, "temperature", "be finite and at least 0", value)
    return 0.0 if value < _TINY else min(float(value), _HUGE)  # −inf over an infinite one would be NaN


def _top_k(op: str, value: int) -> int:
    value = checks.integer(op, "top_k", value, "be an int")
    return value if 0 < value < 2**31 else 0


def _share(op: str, arg: str, value: float) -> float:
    checks.check_number(op, arg, value)
    if not 0.0 <= value <= 1.0:
        checks.reject(op, arg, "lie in [0, 1]", value)
    return float(value)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    backend: Literal["triton", "cuda"] | None = None,
) -> Tensor:
    """Draw a token from each row of logits.

    In this order, and renormalised after each: softmax of logits / temperature; the `top_k` most likely tokens; of those the fewest
    most likely whose probabilities reach `top_p`, but one at least; of those the ones at least `min_p` times as likely as the likeliest.

    Args:
        logits: (B, V), float16, bfloat16 or float32, any strides; V from 1 to 2^22. A token of −inf is never drawn.
        temperature, top_k, top_p, min_p: each a number for all rows, or a (B,) tensor on the logits' device (top_k int32 or int64, the
            others floating point) with one a row. temperature is finite and at least 0, and 0 is argmax; a top_k of 0 or less, or of V
            or more, keeps all, and so do a top_p of 1, a min_p of 0 and None; top_p and min_p lie in [0, 1].
        generator: torch's, on the logits' device; None is the device's own, which `torch.manual_seed` seeds.
        seeds: (B,) int64 on the logits' device, 0 or more, in a generator's place: a row's id follows from its logits and its seed
            alone, and not from the rows beside it.
        backend: which of two kernels runs on CUDA tensors. None: CUDA C++ for up to 16 rows, as its launch takes less of the host, where it
            is built, else Triton. What is named runs or raises.

    Returns:
        ids: (B,) int64. −1 in a row that has no distribution: one with a NaN or +inf in it, or of nothing but −inf.

    Ties, be it for the last place of top_k, of top_p or for argmax, go to the lower id: exactly min(top_k, V) tokens are kept.

    Numerics: weights in fp32; a draw inverts their cumulative sum, in 64-bit integers by the kernels (a token keeps its probability
    down to 2^-40 of the likeliest's), in float64 on the CPU. Where a cumulative probability is within rounding of top_p, either side of it
    may be the cut. Equal seeds give equal ids on one device; CPU and GPU draw differently from one distribution.

    The draw's seed is made on the logits' device, by the generator, and nothing waits for it: a CUDA graph that holds this call draws
    anew at each replay. torch.compile cannot trace a generator, and inductor makes random numbers, so the seed too, in its own way.
    There is no gradient: the logits are detached.

    Raises:
        TypeError: what is no tensor or number, dtypes. ValueError: shapes, devices, and numbers out of range. Values inside tensors are
        checked on the CPU, and on CUDA only under FASTATTN_CHECK=1; there, out of range, they draw some token of the row.
        NotImplementedError: backend="cuda" is not built.

    Source: Fan et al., arXiv 1805.04833 (top-k); Holtzman et al., arXiv 1904.09751 (top-p); Nguyen et al., arXiv 2407.01082 (min-p).

    Example:
        >>> fastattn.sample(torch.randn(4, 32000), temperature=0.8, top_k=50, top_p=torch.tensor([0.9, 0.95, 1.0, 0.5]))
    """
    parameters = _checked("sample", logits, temperature, top_k, top_p, min_p)
    checks.check_backend("sample", backend, logits, runs_kernels(logits))
    return operators.sample(logits.detach(), _seed(logits, generator, seeds), *parameters, backend)


def sampling_probs(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
) -> Tensor:
    """The distribution that `sample` draws from, by the same code.

    Args: as `sample`'s.

    Returns:
        probs: (B, V) float32, contiguous. 0 for a token that is not kept, a single 1 where the temperature is 0, NaN throughout in a row
        that has no distribution.

    There is no gradient: the logits are detached.

    Raises: as `sample`.

    Example:
        >>> fastattn.sampling_probs(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), top_k=2)
        tensor([[0.7311, 0.0000, 0.2689, 0.0000]])
    """
    parameters = _checked("sampling_probs", logits, temperature, top_k, top_p, min_p)
    return operators.sampling_probs(logits.detach(), *parameters)
