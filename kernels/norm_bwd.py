"""Layer norm and RMS norm, with a residual added on the way or not: backward.

With x̂ = (h − mean)·rstd from the saved statistics, g = dy∘(weight + weight_offset) and dh the new residual's own gradient:

    dresidual = rstd·(g − x̂·c₁ − c₂) + dh,   c₁ = mean g∘x̂,   c₂ = mean g (0 for RMS norm)
    dx = dresidual, or where dropout kept: dresidual/(1 − dropout_p)
    dweight = Σ dy∘x̂,   dbias = Σ dy   over all rows

Programs stay for many rows and add up dweight and dbias in registers, in fp32; each writes its sums once, and they are summed in
turn: the same bits at every run, as the number of programs follows from shapes and part. Whole rows fit beside these sums up to 8192
or 16384 columns, if x̂, dy and the weight are read again (from L1) rather than kept while c₁ and c₂ are reduced. Longer rows have
a kernel for c₁ and c₂, and then a program for every BLOCK of columns. Floor: 3·numel·itemsize bytes, 5 with a residual and dh;
with longer rows two more.

Where rows start anywhere ("edges"), those VECTOR apart start alike: a program takes such rows alone, so that a lane of a row's
aligned body is the same column in all of them.
"""

import logging

import torch
import triton
import triton.language as tl

from .launch import check_grid, launch, num_multiprocessors
from .norm import SIZES, load_weight
from .primitives import cast, dropout_keep
from .row_tiles import LONG, RowConfig, pick_row_config
from .rows import VECTOR, Rows, body, edge, row_start

log = logging.getLogger("fastattn")

STRIDES = [f"stride_{name}{dim}" for name in ("dy", "dh", "h", "dx") for dim in "oi"]


@triton.jit
def load_step(
    dy_ptr, h_ptr, weight_ptr, dy_at, h_at, mask, col, in_cols, mean, rstd, weight_offset, SUBTRACT_MEAN: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """(x̂, dy, g) of a tile in fp32; dy and g are 0 where it is masked."""
    x_hat = tl.load(h_ptr + h_at, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if SUBTRACT_MEAN:
        x_hat -= mean[:, None]
    dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    g = dy
    if weight_ptr is not None:
        g *= load_weight(weight_ptr, col, in_cols, weight_offset, CAST_BEFORE_WEIGHT, POLICY)
    return x_hat * rstd[:, None], dy, g


@triton.jit
def store_gradients(dh_ptr, dresidual_ptr, dx_ptr, dh_at, dx_at, mask, gradient, keep, dropout_scale):
    """dresidual and dx of a tile, whichever is wanted, from the gradient that came through the norm."""
    if dh_ptr is not None:
        gradient += tl.load(dh_ptr + dh_at, mask=mask, other=0.0).to(tl.float32)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + dx_at, cast(gradient, dresidual_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        if keep is not None:
            gradient = tl.where(keep, gradient * dropout_scale, 0.0)
        tl.store(dx_ptr + dx_at, cast(gradient, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "num_blocks", *STRIDES, "dropout_threshold"])
def _norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, seed_ptr, stats_ptr, coefficients_ptr, dresidual_ptr, dx_ptr, dweight_ptr, dbias_ptr, num_rows,
    inner, num_cols, num_blocks, stride_dyo, stride_dyi, stride_dho, stride_dhi, stride_ho, stride_hi, stride_dxo, stride_dxi,
    weight_offset, dropout_threshold, dropout_scale,
    SUBTRACT_MEAN: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, ACCESS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of one BLOCK of columns in all the rows of a program, ROWS at a time, and the sums of dweight and dbias there.

    Without coefficients the block is the whole row, and c₁ and c₂ are reduced here. dresidual lies where dx lies.
    """
    APART: tl.constexpr = VECTOR if ACCESS == "edges" else 1
    block, split, num_splits = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks, tl.num_programs(0) // num_blocks
    cols = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    lane = split % APART + tl.arange(0, 1)  # a row that starts as all of this program do
    start = row_start(lane, inner, stride_ho, stride_hi)
    first, length = body(start, num_cols, ACCESS)
    in_cols = cols < length[:, None]
    col = cols
    if ACCESS == "edges":
        col = (first - start).to(tl.int32)[:, None] + cols
        at_lane, edge_of_block = edge(start, num_cols, block + tl.zeros((1,), tl.int32) == 0)
        col_edge = (at_lane - start[:, None]).to(tl.int32)
    dweight, dbias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    dweight_edge, dbias_edge = tl.zeros((ROWS, 2 * VECTOR), tl.float32), tl.zeros((ROWS, 2 * VECTOR), tl.float32)
    for at in range(split // APART * ROWS, tl.cdiv(num_rows, APART), num_splits // APART * ROWS):
        row = (at + tl.arange(0, ROWS)) * APART + split % APART
        in_rows = row < num_rows
        row = tl.where(in_rows, row, 0)
        mask = in_cols & in_rows[:, None]
        dy_start, h_start = row_start(row, inner, stride_dyo, stride_dyi), row_start(row, inner, stride_ho, stride_hi)
        dh_start, dx_start = row_start(row, inner, stride_dho, stride_dhi), row_start(row, inner, stride_dxo, stride_dxi)
        dy_at, h_at = body(dy_start, num_cols, ACCESS)[0][:, None] + cols, body(h_start, num_cols, ACCESS)[0][:, None] + cols
        rstd = tl.load(stats_ptr + row, mask=in_rows, other=0.0)
        mean = rstd
        if SUBTRACT_MEAN:
            mean = tl.load(stats_ptr + tl.cast(num_rows, tl.int64) + row, mask=in_rows, other=0.0)
        if ACCESS == "edges":
            h_edge, mask_edge = edge(h_start, num_cols, in_rows & (block + tl.zeros((ROWS,), tl.int32) == 0))
            dy_edge, _ = edge(dy_start, num_cols, in_rows)
            x_hat_edge, dy_of_edge, g_edge = load_step(
                dy_ptr, h_ptr, weight_ptr, dy_edge, h_edge, mask_edge, col_edge, edge_of_block, mean, rstd, weight_offset, SUBTRACT_MEAN,
                CAST_BEFORE_WEIGHT, "",
            )  # fmt: skip
        c2 = tl.zeros((ROWS,), tl.float32)
        if coefficients_ptr is not None:
            c1 = tl.load(coefficients_ptr + row, mask=in_rows, other=0.0)
            if SUBTRACT_MEAN:
                c2 = tl.load(coefficients_ptr + tl.cast(num_rows, tl.int64) + row, mask=in_rows, other=0.0)
        else:
            x_hat, dy, g = load_step(
                dy_ptr, h_ptr, weight_ptr, dy_at, h_at, mask, col, in_cols, mean, rstd, weight_offset, SUBTRACT_MEAN, CAST_BEFORE_WEIGHT,
                "evict_last",
            )  # fmt: skip
            c1 = tl.sum(g * x_hat, 1)
            if SUBTRACT_MEAN:
                c2 = tl.sum(g, 1)
            if ACCESS == "edges":
                c1 += tl.sum(g_edge * x_hat_edge, 1)
                if SUBTRACT_MEAN:
                    c2 += tl.sum(g_edge, 1)
            c1, c2 = c1 / num_cols, c2 / num_cols
        # The same loads again, under another policy: else the compiler would keep the first ones' registers over the reduction.
        x_hat, dy, g = load_step(
            dy_ptr, h_ptr, weight_ptr, dy_at, h_at, mask, col, in_cols, mean, rstd, weight_offset, SUBTRACT_MEAN, CAST_BEFORE_WEIGHT,
            "evict_first",
        )  # fmt: skip
        if dweight_ptr is not None:
            dweight += dy * x_hat
        if dbias_ptr is not None:
            dbias += dy
        keep = None
        if seed_ptr is not None:
            keep = dropout_keep(tl.load(seed_ptr), 0, at, block * BLOCK, dropout_threshold, ROWS, BLOCK)
        gradient = rstd[:, None] * (g - x_hat * c1[:, None] - c2[:, None])
        dh_at, dx_at = body(dh_start, num_cols, ACCESS)[0][:, None] + cols, body(dx_start, num_cols, ACCESS)[0][:, None] + cols
        store_gradients(dh_ptr, dresidual_ptr, dx_ptr, dh_at, dx_at, mask, gradient, keep, dropout_scale)
        if ACCESS == "edges":
            dh_edge, _ = edge(dh_start, num_cols, in_rows)
            dx_edge, _ = edge(dx_start, num_cols, in_rows)
            gradient = rstd[:, None] * (g_edge - x_hat_edge * c1[:, None] - c2[:, None])
            store_gradients(dh_ptr, dresidual_ptr, dx_ptr, dh_edge, dx_edge, mask_edge, gradient, None, dropout_scale)
            if dweight_ptr is not None:
                dweight_edge += dy_of_edge * x_hat_edge
            if dbias_ptr is not None:
                dbias_edge += dy_of_edge
    sums, _ = body(split.to(tl.int64) * num_cols, num_cols, "vector" if ACCESS == "vector" else "scalar")
    if dweight_ptr is not None:
        tl.store(dweight_ptr + sums + col, tl.sum(dweight, 0)[None, :], mask=in_cols)
        if ACCESS == "edges":
            tl.store(dweight_ptr + sums + col_edge, tl.sum(dweight_edge, 0)[None, :], mask=edge_of_block)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + sums + col, tl.sum(dbias, 0)[None, :], mask=in_cols)
        if ACCESS == "edges":
            tl.store(dbias_ptr + sums + col_edge, tl.sum(dbias_edge, 0)[None, :], mask=edge_of_block)


@triton.jit(do_not_specialize=[*SIZES, "stride_dyo", "stride_dyi", "stride_ho", "stride_hi"])
def _norm_bwd_coefficients_kernel(
    dy_ptr, h_ptr, weight_ptr, stats_ptr, coefficients_ptr, num_rows, inner, num_cols, stride_dyo, stride_dyi, stride_ho, stride_hi,
    weight_offset, SUBTRACT_MEAN: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, ACCESS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """c₁ = mean g∘x̂ and c₂ = mean g of one long row."""
    row = tl.program_id(0) + tl.arange(0, 1)
    dy_start, h_start = row_start(row, inner, stride_dyo, stride_dyi), row_start(row, inner, stride_ho, stride_hi)
    dy_first, length = body(dy_start, num_cols, ACCESS)
    h_first, _ = body(h_start, num_cols, ACCESS)
    rstd = tl.load(stats_ptr + row)
    mean = rstd
    if SUBTRACT_MEAN:
        mean = tl.load(stats_ptr + tl.cast(num_rows, tl.int64) + row)
    cols = tl.arange(0, BLOCK)[None, :]
    c1, c2 = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, BLOCK), tl.float32)
    for at in range(0, num_cols, BLOCK):
        mask = at + cols < length[:, None]
        col = at + cols
        if ACCESS == "edges":
            col += (h_first - h_start).to(tl.int32)[:, None]
        x_hat, dy, g = load_step(
            dy_ptr, h_ptr, weight_ptr, dy_first[:, None] + at + cols, h_first[:, None] + at + cols, mask, col, mask, mean, rstd,
            weight_offset, SUBTRACT_MEAN, CAST_BEFORE_WEIGHT, "",
        )  # fmt: skip
        c1 += g * x_hat
        c2 += g
    c1, c2 = tl.sum(c1, 1), tl.sum(c2, 1)
    if ACCESS == "edges":
        h_edge, mask = edge(h_start, num_cols, row < num_rows)
        dy_edge, _ = edge(dy_start, num_cols, row < num_rows)
        x_hat, dy, g = load_step(
            dy_ptr, h_ptr, weight_ptr, dy_edge, h_edge, mask, (h_edge - h_start[:, None]).to(tl.int32), mask, mean, rstd,
            weight_offset, SUBTRACT_MEAN, CAST_BEFORE_WEIGHT, "",
        )  # fmt: skip
        c1, c2 = c1 + tl.sum(g * x_hat, 1), c2 + tl.sum(g, 1)
    tl.store(coefficients_ptr + row, c1 / num_cols)
    if SUBTRACT_MEAN:
        tl.store(coefficients_ptr + tl.cast(num_rows, tl.int64) + row, c2 / num_cols)


# --------------------------------------------------------------------------------------------------------------------
# Launcher.

COEFFICIENTS = dict(BLOCK=2048, num_warps=8)  # static: 32 to 48 registers, so that 5 programs or more share an SM
RESIDENT_WARPS = 16  # of a multiprocessor, at the 128 registers a thread that the tiles keep to: so many stay for many rows
MAX_UNALIGNED = 4096  # columns of a row that is not "vector": in wider ones, edges beside sums would spill


def norm_bwd(
    dy: torch.Tensor, dh: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    dropout_seed: torch.Tensor | None, stats: torch.Tensor, dropout_p: float, weight_offset: float, subtract_mean: bool,
    cast_before_weight: bool, add: bool, dtype: torch.dtype, weight_grad: bool, bias_grad: bool, config: RowConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Launch the backward kernels over rows h (…, N), what `norm_fwd` normalised; dy, dh: its shape, any strides.

    Returns dx in `dtype`, dresidual in h's where there was a residual (`add`), dweight and dbias (N,) where wanted. dx is None where
    it is the same as dresidual.
    """
    shared = add and dropout_p == 0.0 and dtype == h.dtype
    dresidual = torch.empty(h.shape, dtype=h.dtype, device=h.device) if add else None
    dx = None if shared else torch.empty(h.shape, dtype=dtype, device=h.device)
    tensors = dict(dy=dy, h=h, dx=dresidual if shared else dx) | ({} if dh is None else dict(dh=dh))
    rows = Rows(**tensors)
    if rows.access == "edges" and (dropout_p > 0.0 or not _start_alike(rows)):
        rows.access = "scalar"  # a mask comes in fours of columns, which an edge would split
    sums_wanted = weight_grad or bias_grad
    kernel = "layer_norm_bwd" if subtract_mean or dropout_p > 0.0 or not sums_wanted else "rms_norm_bwd"
    too_wide = sums_wanted and rows.access != "vector" and rows.num_cols > MAX_UNALIGNED
    config = config or pick_row_config(kernel, LONG if too_wide else rows.num_cols, max(t.element_size() for t in tensors.values()))
    log.debug("%s: %s", kernel, config)

    common = dict(stats_ptr=stats, weight_offset=weight_offset, SUBTRACT_MEAN=subtract_mean, CAST_BEFORE_WEIGHT=cast_before_weight)
    common["weight_ptr"] = None if weight is None else weight.contiguous()
    args = dict(dh_ptr=None, stride_dho=0, stride_dhi=0) | rows.args() | common
    coefficients = torch.empty_like(stats) if config.long else None
    if config.long:
        names = set(_norm_bwd_coefficients_kernel.arg_names)
        launch(
            _norm_bwd_coefficients_kernel, rows.grid("norm", 1), rows.device, coefficients_ptr=coefficients,
            **{name: value for name, value in args.items() if name in names}, **COEFFICIENTS,
        )  # fmt: skip
    num_blocks = triton.cdiv(rows.num_cols, config.BLOCK) if config.long else 1
    splits = _splits(rows, config, num_blocks, sums_wanted)
    dweight, dbias = (
        torch.empty((splits, rows.num_cols), dtype=torch.float32, device=h.device) if wanted else None
        for wanted in (weight_grad, bias_grad)
    )
    launch(
        _norm_bwd_kernel, check_grid("norm", splits * num_blocks if rows.num_cols else 0), rows.device, **(args | dict(dx_ptr=dx)),
        seed_ptr=dropout_seed if dropout_p > 0.0 else None, coefficients_ptr=coefficients, dresidual_ptr=dresidual,
        dweight_ptr=dweight, dbias_ptr=dbias, num_blocks=num_blocks, dropout_threshold=int(dropout_p * 2**32) - 2**31,
        dropout_scale=1.0 / (1.0 - dropout_p), **config.meta(),
    )  # fmt: skip
    return dx, dresidual, _summed(dweight, weight), _summed(dbias, bias)


def _start_alike(rows: Rows) -> bool:
    """Whether rows VECTOR apart start alike where all tensors do: not if a row count that VECTOR does not divide ends in a gap."""
    outer, inner = next(iter(rows.strides.values()))
    return rows.num_rows <= rows.inner or (outer - rows.inner * inner) % VECTOR.value == 0


def _splits(rows: Rows, config: RowConfig, num_blocks: int, sums_wanted: bool) -> int:
    """Among how many programs the rows are split: one for each tile of them, but no more than stay resident where sums are kept."""
    splits = triton.cdiv(rows.num_rows, config.ROWS)
    if sums_wanted:
        resident = num_multiprocessors(rows.device) * max(1, RESIDENT_WARPS // config.num_warps)
        splits = max(1, min(splits, resident // num_blocks))
    return triton.cdiv(splits, VECTOR.value) * VECTOR.value if rows.access == "edges" else splits


def _summed(sums: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if sums is None else sums.sum(0).to(parameter.dtype)
