"""The geometry of kernels/blocks.py against the mask itself, for every small size."""

from __future__ import annotations

import itertools

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")
import triton.language as tl  # noqa: E402

from fastattn.kernels.blocks import visible_blocks  # noqa: E402

pytestmark = pytest.mark.interpret


@triton.jit
def _kernel(
    out_ptr, num_rows, num_cols, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    begin, full_begin, full_end, end = visible_blocks(
        block * ROWS, num_rows, num_cols, left, right, HAS_LEFT, HAS_RIGHT, ROWS, COLS
    )
    tl.store(out_ptr + block * 4, begin)
    tl.store(out_ptr + block * 4 + 1, full_begin)
    tl.store(out_ptr + block * 4 + 2, full_end)
    tl.store(out_ptr + block * 4 + 3, end)


def _mask(rows, cols, left, right):
    i, j = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    diagonal = i + cols - rows
    mask = torch.ones(rows, cols, dtype=torch.bool)
    if left is not None:
        mask &= j >= diagonal - left
    if right is not None:
        mask &= j <= diagonal + right
    return mask


BOUNDS = (None, -4, 0, 2, 7)


@pytest.mark.parametrize("left,right", list(itertools.product(BOUNDS, BOUNDS)), ids=str)
def test_visible_blocks_covers_the_mask_and_no_more(left, right):
    ROWS, COLS = 4, 3
    for rows, cols in itertools.product((1, 4, 5, 11), (0, 1, 3, 7, 13)):
        blocks = -(-rows // ROWS)
        got = torch.full((blocks, 4), -1, dtype=torch.int32)
        _kernel[(blocks,)](got, rows, cols, left or 0, right or 0, left is not None, right is not None, ROWS, COLS)
        mask = _mask(rows, cols, left, right)
        for b, (begin, full_begin, full_end, end) in enumerate(got.tolist()):
            tile = mask[b * ROWS : (b + 1) * ROWS]
            assert 0 <= begin <= full_begin <= full_end <= end
            for n in range(-(-cols // COLS) + 1):
                columns = tile[:, n * COLS : (n + 1) * COLS]
                where = f"rows {rows} cols {cols} row block {b} column block {n}: {begin, full_begin, full_end, end}"
                if columns.any():
                    assert begin <= n < end, where
                full = columns.shape[1] == COLS and bool(columns.all())
                if full_begin <= n < full_end:
                    assert full, where
            seen = [n for n in range(-(-cols // COLS)) if tile[:, n * COLS : (n + 1) * COLS].any()]
            assert end - begin <= (seen[-1] - seen[0] + 1 if seen else 0) or not seen, "blocks wholly masked are not visited"
