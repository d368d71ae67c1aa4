"""Sampling on the CPU: in C++ where it is built; else the cut by the largest values, in chunks of rows, and the draw by inverting the
cumulative sum in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.extensions import cpu_operators, in_rows

_PARAMETERS = (
    "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, float temperature, int top_k, float top_p, float min_p"
)
cpu_operators.define(f"sample_cpp(Tensor logits, Tensor numbers, {_PARAMETERS}) -> Tensor")
cpu_operators.define(f"sampling_probs_cpp(Tensor logits, {_PARAMETERS}) -> Tensor")

_CHUNK_ELEMENTS = 1 << 22  # logits looked at together: 16 MB of each intermediate


def sample(
    logits: Tensor,
    seed: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
) -> Tensor:
    """Ids, (B,) int64, of logits (B, V); row r's uniform number is the r-th of a generator with the seed (1,), or with seeds (B,) the first
    of one with its own."""
    uniform = torch.empty(logits.shape[0], 1, dtype=torch.float64)
    for number, part in zip(seed.tolist(), uniform.split(1) if seed.numel() > 1 else [uniform]):
        part.uniform_(generator=torch.Generator().manual_seed(number))
    if cpu_operators.available("sample_cpp"):
        return torch.ops.fastattn.sample_cpp(in_rows(logits), uniform, *_compiled(temperature, top_k, top_p, min_p))
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    for rows, probs in _chunks(logits, temperature, top_k, top_p, min_p):
        cdf = probs.cumsum(1, dtype=torch.float64)
        total = cdf[:, -1:]
        # Strictly below the total, so that rounding never draws past the last token kept.
        number = torch.minimum(uniform[rows] * total, torch.nextafter(total, torch.zeros_like(total)))
        drawn = torch.searchsorted(cdf, number, right=True)
        ids[rows] = torch.where(total.isnan(), -1, drawn)[:, 0]
    return ids


def sampling_probs(
    logits: Tensor, temperature: float | Tensor, top_k: int | Tensor, top_p: float | Tensor, min_p: float | Tensor
) -> Tensor:
    """What `sample` draws from, (B, V) float32."""
    if cpu_operators.available("sampling_probs_cpp"):
        return torch.ops.fastattn.sampling_probs_cpp(in_rows(logits), *_compiled(temperature, top_k, top_p, min_p))
    probs = torch.empty(logits.shape, dtype=torch.float32)
    for rows, chunk in _chunks(logits, temperature, top_k, top_p, min_p):
        probs[rows] = chunk
    return probs


def _compiled(*parameters: float | Tensor) -> list[float | Tensor | None]:
    """Tensors of rows, and numbers that stand where there is none, as the compiled operators take them."""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32)
    tensors = [value.to(dtype).contiguous() if isinstance(value, Tensor) else None for value, dtype in zip(parameters, dtypes)]
    return [*tensors, *(1 if isinstance(value, Tensor) else value for value in parameters)]


def _chunks(logits: Tensor, *parameters: float | Tensor):
    """(slice of rows, their probabilities), a bounded number of logits at a time."""
    size = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    columns = [torch.as_tensor(value).expand(logits.shape[0])[:, None] for value in parameters]
    for start in range(0, logits.shape[0], size):
        rows = slice(start, start + size)
        yield rows, _probs(logits[rows].float(), *(column[rows] for column in columns))


def _probs(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The distribution of rows x, with parameters (rows, 1)."""
    temperature = temperature.float()
    greedy = temperature == 0
    temperature = torch.where(greedy, 1.0, temperature)
    top_k = torch.where(greedy, 1, torch.where((top_k <= 0) | (top_k > x.shape[1]), x.shape[1], top_k))
    top_p, min_p = torch.where(greedy, 1.0, top_p.float()), torch.where(greedy, 0.0, min_p.float())
    row_max = x.amax(1, keepdim=True)
    weights = torch.exp((x - row_max) / temperature)
    valid = weights.sum(1, keepdim=True).isfinite()
    if (top_k < x.shape[1]).any() or (top_p < 1).any():
        weights *= _kept(x, row_max, temperature, top_k, top_p)
    weights *= weights >= min_p
    return torch.where(valid, weights / weights.sum(1, keepdim=True), torch.nan)


def _kept(x: Tensor, row_max: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """True for the tokens of top-k and then top-p. How many those are, the largest values say; of the last value the lower ids stay."""
    values = x.topk(int(top_k.max()), dim=1).values  # of all columns it is a sort
    rank = torch.arange(values.shape[1])
    mass = torch.where(rank < top_k, torch.exp((values - row_max) / temperature), 0.0).cumsum(1, dtype=torch.float64)
    reached = 1 + (mass < top_p * mass[:, -1:]).sum(1, keepdim=True)
    count = torch.where(top_p < 1, torch.minimum(reached, top_k), top_k)
    threshold = values.gather(1, count - 1)
    ties = x == threshold
    wanted = count - ((values > threshold) & (rank < count)).sum(1, keepdim=True)
    return (x > threshold) | (ties & (ties.cumsum(1) <= wanted))
