"""The vocabulary the kernels are written in: rounding, dots, tiles in and out of memory, and the dropout mask.

What the interpreter cannot do (bfloat16 arithmetic, inline assembly) is kept behind these names, so that kernels
stay clean.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest even.

    The interpreter truncates fp32 to bf16, so there the rounding is done on the bits first.
    """
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN's payload must not carry into its sign
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in fp32. The interpreter has no bf16 arithmetic, so it multiplies in fp32 (exact products either
    way)."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def pack_bits(x):
    """A 16-bit float tile as int16, any other as it is. Carried through a loop as bits, a matmul operand stays in
    registers; carried as floats the compiler sends it through shared memory."""
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.int16, bitcast=True)
    return x


@triton.jit
def unpack_bits(x, dtype: tl.constexpr):
    """The inverse of `pack_bits`."""
    if dtype.primitive_bitwidth == 16:
        x = x.to(dtype, bitcast=True)
    return x


@triton.jit
def reciprocal(x):
    """1/x: one MUFU.RCP on the GPU (2^-23 relative error), where division costs about eight instructions."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x):
    """tanh to about 2^-22, relative for small x too: a softcap multiplies the error by its size.

    1 − 2/(e^2x + 1), which saturates to ±1 without overflow because 1/inf is 0; below 0.1, where that cancels, the Taylor
    series x − x³/3 + 2x⁵/15 (next term: 5e-8 of x).
    """
    square = x * x
    series = x + x * square * (square * (2.0 / 15.0) - 1.0 / 3.0)
    return tl.where(tl.abs(x) < 0.1, series, 1.0 - 2.0 * reciprocal(tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def tile_source(
    ptr, batch, start, num_heads, num_rows, stride_batch, stride_row, stride_head, stride_col, NUM_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Where `load_tile` reads (BLOCK_ROWS, BLOCK_COLS) tiles of one sequence, num_rows rows from row `start` of
    `batch`, for any head.

    A TMA descriptor over (heads, rows, cols), or the pointers of the tile at head 0 and row 0: either way made once,
    outside all loops.
    """
    base = ptr + tl.cast(batch, tl.int64) * stride_batch + tl.cast(start, tl.int64) * stride_row
    if USE_TMA:
        rows = tl.maximum(num_rows, 1)  # a descriptor's sizes must be positive; row 0 of an empty sequence is never asked for
        return tl.make_tensor_descriptor(
            base, [num_heads, rows, NUM_COLS], [stride_head, stride_row, 1], [1, BLOCK_ROWS, BLOCK_COLS]
        )
    else:
        rows = tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None] * stride_row
        return base + rows + tl.arange(0, BLOCK_COLS).to(tl.int64)[None, :] * stride_col


@triton.jit
def load_tile(
    source, head, row, num_rows, stride_row, stride_head, NUM_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, USE_TMA: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows row … row + BLOCK_ROWS of one head of a `tile_source`, zero outside. CHECK_ROWS=False promises that no
    row is outside."""
    if USE_TMA:
        return source.load([head, row, 0]).reshape(BLOCK_ROWS, BLOCK_COLS)
    else:
        pointers = source + tl.cast(head, tl.int64) * stride_head + tl.cast(row, tl.int64) * stride_row
        in_cols = tl.arange(0, BLOCK_COLS)[None, :] < NUM_COLS
        if CHECK_ROWS:
            return tl.load(pointers, mask=in_cols & (row + tl.arange(0, BLOCK_ROWS)[:, None] < num_rows), other=0.0)
        elif NUM_COLS != BLOCK_COLS:
            return tl.load(pointers, mask=in_cols, other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_tile(base, tile, row, num_rows, stride_row, NUM_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Round a tile to the matrix's dtype and store the part of it that lies inside."""
    rows = row + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    pointers = base + rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    tl.store(pointers, cast(tile, base.dtype.element_ty), mask=(rows < num_rows)[:, None] & (cols < NUM_COLS)[None, :])


@triton.jit
def dropout_keep(seed, stream, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The (BLOCK_ROWS, BLOCK_COLS) dropout mask at (row, col) of one head, True = kept.

    Philox-4x32-10 (Salmon et al., SC 2011) at counter (col // 4, row, stream, 0) gives the words of four columns, so
    the mask does not depend on the tile that asks for it. A word w is kept iff w ≥ p·2^32; both sides are shifted by
    2^31 to compare as int32. col % 4 == 0.
    """
    rows = row + tl.arange(0, BLOCK_ROWS)[:, None]
    groups = col // 4 + tl.arange(0, BLOCK_COLS // 4)[None, :]
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLS // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + groups, zero + rows, zero + stream, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_ROWS, BLOCK_COLS))  # column 4g + i holds w_i
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
