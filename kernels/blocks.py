"""Which rows and blocks a program touches: dense or packed sequences, and the blocks a mask leaves visible.

Positions are aligned to the bottom right: row i of a matrix with num_rows rows sees column j of num_cols iff

    i + offset − left ≤ j ≤ i + offset + right,    offset = num_cols − num_rows,

where a side without a bound is switched off by its HAS_ flag, and bounds may be negative. Transposed (columns
looking for the rows that see them), the same holds with the two lengths and the two bounds swapped, so forward, dQ,
dK and dV share this arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def sequence(cu_seqlens_ptr, batch, seqlen, total):
    """(start, length) of one sequence. Packed, values are clamped into the tensor, so that no content of cu_seqlens
    can make a kernel read or write outside it; `seqlen` is the longest length then."""
    if cu_seqlens_ptr is None:
        return batch * 0, batch * 0 + seqlen
    else:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch + 1), start), total)
        return start, tl.minimum(end - start, seqlen)


@triton.jit
def visible_blocks(
    row, num_rows, num_cols, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """(begin, full_begin, full_end, end): the column blocks [begin, end) hold every column that a row of [row, row +
    BLOCK_ROWS) sees, and in [full_begin, full_end) every row sees every column, so those need no mask."""
    offset = num_cols - num_rows
    last_row = tl.minimum(row + BLOCK_ROWS, num_rows) - 1
    begin = row * 0
    full_begin = begin
    end_col = num_cols
    full_end_col = num_cols
    if HAS_LEFT:
        begin = tl.maximum(row + offset - left, 0) // BLOCK_COLS
        full_begin = tl.cdiv(tl.maximum(last_row + offset - left, 0), BLOCK_COLS)
    if HAS_RIGHT:
        end_col = tl.minimum(tl.maximum(last_row + offset + right + 1, 0), num_cols)
        full_end_col = tl.minimum(tl.maximum(row + offset + right + 1, 0), num_cols)
    end = tl.maximum(tl.cdiv(end_col, BLOCK_COLS), begin)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end_col // BLOCK_COLS, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def visible(i, j, seqlen_q, seqlen_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which (query i, key j) pairs of a tile attend; i and j are index tiles that broadcast against each other."""
    diagonal = i + (seqlen_k - seqlen_q)
    mask = (j < seqlen_k) & (i < seqlen_q)
    if HAS_LEFT:
        mask = mask & (j >= diagonal - left)
    if HAS_RIGHT:
        mask = mask & (j <= diagonal + right)
    return mask
