"""The grouped matrix product on the CPU: one of torch's matrix products a group, on slices that are read and written in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and their rows."""
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end


def grouped_mm_fwd(x: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None, gather: Tensor | None, scatter: Tensor | None) -> Tensor:
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    out = x.new_empty(num_rows, w.shape[1])
    out = zeroed_tail(out, offsets) if scatter is None else out.zero_()
    for group, rows in groups(offsets):
        inputs = x[rows] if gather is None else x.index_select(0, gather[rows])
        if scatter is not None:
            out[scatter[rows]] = product(inputs, w, bias, group)
        else:
            product(inputs, w, bias, group, out=out[rows])
    return out


def zeroed_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """0 in the rows that no group has; the products write the others."""
    rows[int(offsets[-1]) :] = 0.0
    return rows


def product(x: Tensor, w: Tensor, bias: Tensor | None, group: int, out: Tensor | None = None) -> Tensor:
    """x·w[group]ᵀ + bias[group], computed in out's dtype where that is another than theirs."""
    w, bias = w[group].t(), None if bias is None else bias[group]
    if out is not None and out.dtype != x.dtype:
        x, w, bias = x.to(out.dtype), w.to(out.dtype), None if bias is None else bias.to(out.dtype)
    return torch.mm(x, w, out=out) if bias is None else torch.addmm(bias, x, w, out=out)


def grouped_mm_bwd(
    dout: Tensor, x: Tensor | None, w: Tensor | None, offsets: Tensor, gather: Tensor | None, scatter: Tensor | None, num_x_rows: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    want_x, want_w, want_bias = wanted
    num_groups, num_cols = offsets.shape[0], dout.shape[1]
    dx = dout.new_zeros((num_x_rows, w.shape[2]) if want_x else 0, dtype=dout.dtype if gather is None else torch.float32)
    dw = dout.new_zeros((num_groups, num_cols, x.shape[1]) if want_w else 0)
    dbias = dout.new_zeros((num_groups, num_cols) if want_bias else 0)
    for group, rows in groups(offsets):
        dy = dout[rows] if scatter is None else dout.index_select(0, scatter[rows])
        if want_x and gather is None:
            torch.mm(dy, w[group], out=dx[rows])
        elif want_x:
            dx.index_add_(0, gather[rows], torch.mm(dy, w[group]).float())
        if want_w:
            torch.mm(dy.t(), x[rows] if gather is None else x.index_select(0, gather[rows]), out=dw[group])
        if want_bias:
            dbias[group] = dy.sum(0, dtype=torch.float32)
    return dx.to(dout.dtype), dw, dbias
