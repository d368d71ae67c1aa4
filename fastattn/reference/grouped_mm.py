"""The oracle of the grouped matrix product: a loop over groups, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mm(
    x: Tensor, w: Tensor, offsets: Tensor, *, bias: Tensor | None = None, gather: Tensor | None = None, scatter: Tensor | None = None
) -> Tensor:
    """Row r of group e, offsets[e − 1] ≤ r < offsets[e], is x[gather[r]]·w[e]ᵀ + bias[e], and lies at scatter[r]; other rows are 0."""
    rows = x if gather is None else x[gather]
    parts, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        part = rows[start:end] @ w[e].T
        parts.append(part if bias is None else part + bias[e])
        start = end
    parts.append(rows.new_zeros(len(rows) - start, w.shape[1]))
    out = torch.cat(parts)
    return out if scatter is None else torch.zeros_like(out).index_copy(0, scatter, out)
