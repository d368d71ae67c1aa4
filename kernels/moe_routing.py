"""Which experts a token goes to, and its way there and back: routing, a counting sort by expert, gather and combine.

Routing keeps a row's E logits in registers. Experts are chosen by integer keys, which stand to each other as the floats do and are
told apart by the expert where they are equal, in one round of a maximum and a minimum each.

The sort is by counting, for a slot's place is a sum: of the slots of the experts before its own, of those of its expert in the blocks
before its own, and of those in its block before itself. Blocks are counted, the counts are summed over blocks, slots are placed:
three launches, or one where a block has all slots, integers throughout, no atomics and so one order. Ids that name no expert count as one
more expert, the last.

Gather and combine are organised by token: K rows of another matrix lie beside one of its own, which is read or written once. Nobody
adds to what another program wrote: a token's rows are summed in fp32 in the order of k.
Floor: routing T·E·itemsize bytes forward, twice that backward; sorting 32 bytes a slot; gather and combine (K + 1)·T·H·itemsize,
combine's backward (2·K + 1)·T·H·itemsize.
"""

import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import check_grid, launch
from .primitives import LOG2E, cast, reciprocal
from .rows import vector_of, with_contiguous_rows
from .sampling import float_key, key_float

log = logging.getLogger("fastattn")

TAKEN = tl.constexpr(-2147483648)  # a key below every float's: of what is chosen already, or is no choice
NAN_KEY = tl.constexpr(2147483647)  # above every float's: torch.topk takes a NaN for the largest
TINY = tl.constexpr(1e-20)  # in the denominator of renormalised weights, as DeepSeek-V3 has it
UNROLLED = tl.constexpr(16)  # a token's rows up to this many are written out, so that their places are all fetched first


# --------------------------------------------------------------------------------------------------------------------
# Routing.


@triton.jit
def order_key(x):
    """The int32 that stands to the others as the float x does, a NaN above them all."""
    return tl.where(x == x, float_key(x), NAN_KEY)


@triton.jit
def take_best(key, number, NONE: tl.constexpr):
    """(the number of the largest key in each row, the keys without it). Of equal keys the lowest number; NONE is above all numbers."""
    best = tl.max(key, 1)
    chosen = tl.min(tl.where(key == best[:, None], number, NONE), 1)
    return chosen, tl.where(number == chosen[:, None], TAKEN, key)


@triton.jit
def keep_groups(
    key, NUM_GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys (ROWS, BLOCK) of the TOP_K_GROUPS best groups, by the largest in each or the sum of the two largest; of others TAKEN."""
    grouped = tl.reshape(key, (ROWS, GROUPS, BLOCK // GROUPS))
    group_key = tl.max(grouped, 2)
    if SUM_OF_TWO:
        place = tl.arange(0, BLOCK // GROUPS)[None, None, :]
        first = tl.min(tl.where(grouped == group_key[:, :, None], place, BLOCK), 2)
        second = tl.max(tl.where(place == first[:, :, None], TAKEN, grouped), 2)
        total = order_key(key_float(group_key) + key_float(second))
        group_key = tl.where(group_key == TAKEN, TAKEN, total)
    group = tl.arange(0, GROUPS)[None, :]
    for _ in range(TOP_K_GROUPS):
        _, group_key = take_best(group_key, group, GROUPS)
    kept = (group_key == TAKEN) & (group < NUM_GROUPS)
    return tl.reshape(tl.where(kept[:, :, None], grouped, TAKEN), (ROWS, BLOCK))


@triton.jit
def softmax_of(x):
    """exp(x − max x) / Σ exp(x − max x) of each row, in which −inf is no entry."""
    p = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def tokens_of_block(block, num_tokens, ROWS: tl.constexpr):
    """(token, in_tokens) of a block of (ROWS,) tokens, int64; those past the end are token 0, not to be stored."""
    token = block * ROWS + tl.arange(0, ROWS)
    in_tokens = token < num_tokens
    return tl.where(in_tokens, token, 0).to(tl.int64), in_tokens


@triton.jit(do_not_specialize=["num_tokens", "stride_t", "scaling_factor"])
def _moe_route_fwd_kernel(
    logits_ptr, bias_ptr, weights_ptr, indices_ptr, num_tokens, stride_t, scaling_factor, SCORE: tl.constexpr, SCORE_FIRST: tl.constexpr,
    RENORMALIZE: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """indices = the TOP_K best of s + bias, weights = s of those, over their sum, times the scaling factor: s = score(x), or of the
    chosen logits alone.

    A score rises with its logit, so where there is no bias the logits choose, and no rounding of scores makes ties. Columns are
    experts, each of GROUPS groups padded to a power of two.
    """
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    BLOCK_GROUP: tl.constexpr = BLOCK // GROUPS
    token, in_tokens = tokens_of_block(tl.program_id(0), num_tokens, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    expert = col // BLOCK_GROUP * GROUP_SIZE + col % BLOCK_GROUP
    is_expert = (col % BLOCK_GROUP < GROUP_SIZE) & (expert < NUM_EXPERTS)
    start = (token * stride_t // VECTOR * VECTOR)[:, None]  # what it is, and now the compiler knows
    x = tl.load(logits_ptr + start + expert, mask=in_tokens[:, None] & is_expert, other=float("-inf")).to(tl.float32)
    row_max, row_sum = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if SCORE_FIRST and SCORE == "softmax":
        row_max = tl.max(x, 1)
        row_sum = tl.sum(tl.exp2((x - row_max[:, None]) * LOG2E), 1)
    choice = x
    if bias_ptr is not None:
        if SCORE_FIRST:
            choice = sigmoid(x) if SCORE == "sigmoid" else tl.exp2((x - row_max[:, None]) * LOG2E) / row_sum[:, None]
        choice += tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    key = tl.where(is_expert, order_key(choice), TAKEN)
    if TOP_K_GROUPS < NUM_GROUPS:
        key = keep_groups(key, NUM_GROUPS, TOP_K_GROUPS, bias_ptr is not None and GROUP_SIZE > 1, ROWS, GROUPS, BLOCK)

    lane = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((ROWS, BLOCK_K), tl.int32)
    for k in range(TOP_K):
        best, key = take_best(key, expert, BLOCK)
        chosen = tl.where(lane == k, best[:, None], chosen)
    mask = in_tokens[:, None] & (lane < TOP_K)
    x = tl.load(logits_ptr + start + chosen, mask=mask, other=float("-inf")).to(tl.float32)
    if SCORE == "sigmoid":
        weight = sigmoid(x)
    elif SCORE_FIRST:
        weight = tl.exp2((x - row_max[:, None]) * LOG2E) / row_sum[:, None]
    else:
        weight = softmax_of(x)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, 1) + TINY)[:, None]
    at = token[:, None] * TOP_K + lane
    tl.store(weights_ptr + at, weight * scaling_factor, mask=mask)
    tl.store(indices_ptr + at, chosen.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "stride_t", "scaling_factor"])
def _moe_route_bwd_kernel(
    dweights_ptr, logits_ptr, indices_ptr, dlogits_ptr, num_tokens, stride_t, scaling_factor, SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr, RENORMALIZE: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = s·(ds − Σ s·ds), or s·(1 − s)·ds of a sigmoid. ds is dw of the chosen, renormalised (dw − Σ u·dw) / S with u = s / S and S
    the sum of their s; and 0 of the others."""
    token, in_tokens = tokens_of_block(tl.program_id(0), num_tokens, ROWS)
    expert = tl.arange(0, BLOCK)[None, :]
    mask = in_tokens[:, None] & (expert < NUM_EXPERTS)
    start = (token * stride_t // VECTOR * VECTOR)[:, None]
    x = tl.load(logits_ptr + start + expert, mask=mask, other=float("-inf")).to(tl.float32)
    ds = tl.zeros((ROWS, BLOCK), tl.float32)
    chosen = tl.zeros((ROWS, BLOCK), tl.int1)
    for k in range(TOP_K):
        at = token * TOP_K + k
        index = tl.load(indices_ptr + at, mask=in_tokens, other=-1)
        dweight = tl.load(dweights_ptr + at, mask=in_tokens, other=0.0)
        here = expert == index[:, None]
        ds = tl.where(here, dweight[:, None] * scaling_factor, ds)
        chosen = chosen | here
    if SCORE == "sigmoid":
        s = sigmoid(x)
    elif SCORE_FIRST:
        s = softmax_of(x)
    else:
        s = softmax_of(tl.where(chosen, x, float("-inf")))
    if RENORMALIZE:
        total = (tl.sum(tl.where(chosen, s, 0.0), 1) + TINY)[:, None]
        ds = tl.where(chosen, (ds - tl.sum(ds * s, 1)[:, None] / total) / total, 0.0)
    dx = s * (1.0 - s) * ds if SCORE == "sigmoid" else s * (ds - tl.sum(s * ds, 1)[:, None])
    at = (token * NUM_EXPERTS)[:, None] + expert
    tl.store(dlogits_ptr + at, cast(dx, dlogits_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------------------------
# The sort.


@triton.jit
def load_bins(indices_ptr, slot, num_slots, NUM_EXPERTS: tl.constexpr):
    """The bin of each slot: its expert, NUM_EXPERTS for an id that names none, −1 past the last slot."""
    index = tl.load(indices_ptr + slot, mask=slot < num_slots, other=0)
    bin = tl.where((index >= 0) & (index < NUM_EXPERTS), index, NUM_EXPERTS).to(tl.int32)
    return tl.where(slot < num_slots, bin, -1)


@triton.jit(do_not_specialize=["num_slots"])
def _moe_count_kernel(indices_ptr, counts_ptr, num_slots, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block's slots each bin has."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bin = load_bins(indices_ptr, slot, num_slots, NUM_EXPERTS)
    counts = tl.histogram(tl.maximum(bin, 0), BINS, mask=bin >= 0)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["num_blocks"])
def _moe_scan_kernel(
    counts_ptr, totals_ptr, num_blocks, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK: tl.constexpr
):
    """In place of each block's count of a bin, the count of all blocks before it; and each expert's total."""
    bin = tl.program_id(0) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    total = tl.zeros((BLOCK_BINS,), tl.int32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)[:, None]
        at = counts_ptr + block.to(tl.int64) * BINS + bin[None, :]
        counts = tl.load(at, mask=block < num_blocks, other=0)
        before = total[None, :] + tl.cumsum(counts, 0) - counts
        tl.store(at, before, mask=block < num_blocks)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + bin, total.to(totals_ptr.dtype.element_ty), mask=bin < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_slots"])
def _moe_place_kernel(
    indices_ptr, counts_ptr, totals_ptr, order_ptr, inverse_ptr, offsets_ptr, num_slots, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """inverse[slot] = slots of earlier bins + those of its bin in earlier blocks + those of its bin earlier in its block; order[that] =
    slot; and offsets, the running sums of the totals. Where one block has all slots, there are neither counts nor totals: the place of
    a slot is the number of those in earlier bins, or earlier in its own."""
    start = tl.program_id(0) * BLOCK
    slot = start + tl.arange(0, BLOCK)
    bin = load_bins(indices_ptr, slot, num_slots, NUM_EXPERTS)
    in_slots = bin >= 0
    place = tl.zeros((BLOCK,), tl.int32)
    if counts_ptr is not None:
        place = tl.load(counts_ptr + tl.program_id(0).to(tl.int64) * BINS + bin, mask=in_slots, other=0)
        for at in range(0, NUM_EXPERTS, STEP):
            expert = at + tl.arange(0, STEP)
            total = tl.load(totals_ptr + expert, mask=expert < NUM_EXPERTS, other=0)
            place += tl.sum(tl.where(expert[None, :] < bin[:, None], total[None, :], 0), 1)
    for at in range(0, BLOCK, STEP):
        other = start + at + tl.arange(0, STEP)
        other_bin = load_bins(indices_ptr, other, num_slots, NUM_EXPERTS)
        earlier = (other_bin[None, :] == bin[:, None]) & (other[None, :] < slot[:, None])
        if counts_ptr is None:
            earlier = earlier | ((other_bin[None, :] >= 0) & (other_bin[None, :] < bin[:, None]))
        place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(inverse_ptr + slot, place.to(tl.int64), mask=in_slots)
    tl.store(order_ptr + place, slot.to(tl.int64), mask=in_slots)
    if tl.program_id(0) == 0:
        expert = tl.arange(0, BINS)
        if counts_ptr is not None:
            total = tl.load(totals_ptr + expert, mask=expert < NUM_EXPERTS, other=0)
        else:
            total = tl.histogram(tl.maximum(bin, 0), BINS, mask=in_slots)
        tl.store(offsets_ptr + expert, tl.cumsum(total, 0), mask=expert < NUM_EXPERTS)


# --------------------------------------------------------------------------------------------------------------------
# Gather and combine.


@triton.jit
def tile_of_program(num_tokens, NUM_COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(token, in_tokens, col, mask) of a tile of ROWS tokens and BLOCK columns."""
    NUM_BLOCKS: tl.constexpr = (NUM_COLS + BLOCK - 1) // BLOCK
    token, in_tokens = tokens_of_block(tl.program_id(0) // NUM_BLOCKS, num_tokens, ROWS)
    col = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    return token, in_tokens, col, in_tokens[:, None] & (col < NUM_COLS)[None, :]


@triton.jit
def num_kept_rows(offsets_ptr, num_tokens, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """How many sorted rows belong to an expert: the others, at the tail, are those of ids that name none."""
    kept = tl.load(offsets_ptr + NUM_EXPERTS - 1).to(tl.int64)
    return tl.minimum(kept, num_tokens.to(tl.int64) * TOP_K)


@triton.jit
def add_row(
    acc, k, y_ptr, inverse_ptr, weights_ptr, token, in_tokens, num_kept, stride_y, col, mask, TOP_K: tl.constexpr, VECTOR: tl.constexpr
):
    """acc + w[t, k]·y[inverse[t·K + k]], of the rows that an expert has."""
    slot = token * TOP_K + k
    row = tl.load(inverse_ptr + slot, mask=in_tokens, other=-1)
    kept = (row >= 0) & (row < num_kept)
    start = tl.where(kept, row, 0) * stride_y // VECTOR * VECTOR
    y = tl.load(y_ptr + start[:, None] + col[None, :], mask=mask & kept[:, None], other=0.0).to(tl.float32)
    if weights_ptr is None:
        return acc + y
    else:
        weight = tl.load(weights_ptr + slot, mask=in_tokens & kept, other=0.0)
        return acc + weight[:, None] * y


@triton.jit(do_not_specialize=["num_tokens", "stride_y"])
def _moe_combine_fwd_kernel(
    y_ptr, inverse_ptr, offsets_ptr, weights_ptr, out_ptr, num_tokens, stride_y, NUM_COLS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ_k w[t, k]·y[inverse[t·K + k]], one after the other."""
    token, in_tokens, col, mask = tile_of_program(num_tokens, NUM_COLS, ROWS, BLOCK)
    num_kept = num_kept_rows(offsets_ptr, num_tokens, NUM_EXPERTS, TOP_K)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    if TOP_K <= UNROLLED:
        for k in tl.static_range(TOP_K):
            acc = add_row(acc, k, y_ptr, inverse_ptr, weights_ptr, token, in_tokens, num_kept, stride_y, col, mask, TOP_K, VECTOR)
    else:
        for k in range(TOP_K):
            acc = add_row(acc, k, y_ptr, inverse_ptr, weights_ptr, token, in_tokens, num_kept, stride_y, col, mask, TOP_K, VECTOR)
    at = (token * NUM_COLS)[:, None] + col[None, :]
    tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "stride_do", "stride_y"])
def _moe_combine_bwd_kernel(
    dout_ptr, y_ptr, inverse_ptr, offsets_ptr, weights_ptr, dy_ptr, dweights_ptr, num_tokens, stride_do, stride_y,
    NUM_COLS: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy[row] = w[t, k]·dout[t] and dw[t, k] = dout[t]·y[row], row = inverse[t·K + k]; both 0 where no expert has the row."""
    token, in_tokens = tokens_of_block(tl.program_id(0), num_tokens, ROWS)
    num_kept = num_kept_rows(offsets_ptr, num_tokens, NUM_EXPERTS, TOP_K)
    num_rows = num_tokens.to(tl.int64) * TOP_K
    dout_start = (token * stride_do // VECTOR * VECTOR)[:, None]
    for k in range(TOP_K):
        slot = token * TOP_K + k
        row = tl.load(inverse_ptr + slot, mask=in_tokens, other=-1)
        exists = (row >= 0) & (row < num_rows)
        kept = exists & (row < num_kept)
        weight = tl.load(weights_ptr + slot, mask=kept, other=0.0)[:, None]
        row = tl.where(exists, row, 0)
        y_start, dy_start = (row * stride_y // VECTOR * VECTOR)[:, None], (row * NUM_COLS)[:, None]
        dot = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, NUM_COLS, BLOCK):
            col = start + tl.arange(0, BLOCK)[None, :]
            mask = kept[:, None] & (col < NUM_COLS)
            dout = tl.load(dout_ptr + dout_start + col, mask=mask, other=0.0).to(tl.float32)
            dot += dout * tl.load(y_ptr + y_start + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dy_ptr + dy_start + col, cast(weight * dout, dy_ptr.dtype.element_ty), mask=exists[:, None] & (col < NUM_COLS))
        tl.store(dweights_ptr + slot, tl.sum(dot, 1), mask=in_tokens)


@triton.jit(do_not_specialize=["num_tokens", "stride_x"])
def _moe_gather_fwd_kernel(
    x_ptr, inverse_ptr, offsets_ptr, out_ptr, num_tokens, stride_x, NUM_COLS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[inverse[t·K + k]] = x[t], or 0 where no expert has the row: combine's transpose."""
    token, in_tokens, col, mask = tile_of_program(num_tokens, NUM_COLS, ROWS, BLOCK)
    num_kept = num_kept_rows(offsets_ptr, num_tokens, NUM_EXPERTS, TOP_K)
    num_rows = num_tokens.to(tl.int64) * TOP_K
    start = (token * stride_x // VECTOR * VECTOR)[:, None]
    x = tl.load(x_ptr + start + col[None, :], mask=mask, other=0.0)
    for k in range(TOP_K):
        row = tl.load(inverse_ptr + token * TOP_K + k, mask=in_tokens, other=-1)
        exists = (row >= 0) & (row < num_rows)
        at = (tl.where(exists, row, 0) * NUM_COLS)[:, None] + col[None, :]
        tl.store(out_ptr + at, tl.where((row < num_kept)[:, None], x, 0.0), mask=mask & exists[:, None])


# --------------------------------------------------------------------------------------------------------------------
# Launchers.


@dataclass(frozen=True)
class Tile:
    """BLOCK columns of ROWS tokens at once."""

    ROWS: int
    BLOCK: int
    num_warps: int = 4

    def meta(self) -> dict[str, int]:
        """As launch arguments."""
        return dict(ROWS=self.ROWS, BLOCK=self.BLOCK, num_warps=self.num_warps)


SORT_BLOCK, SORT_STEP = 256, 16  # static: slots a program, each compared with all of them, 16 at a time; 32 take 240 registers
SCAN_BLOCK, SCAN_BINS = 128, 16  # static: counts a program sums at once, 64 bytes of each block


def pick_route_tile(num_cols: int) -> Tile:
    """Static: 16 logits a thread, of a row in one warp where it has 128 or more. Of shorter rows 16, as 32 of them spill."""
    return Tile(min(16, max(1, 2048 // num_cols)), num_cols)


def pick_route_bwd_tile(num_cols: int) -> Tile:
    """Static: as forward, but 8 of the shorter rows."""
    return Tile(min(8, pick_route_tile(num_cols).ROWS), num_cols)


def pick_tile(num_cols: int, itemsize: int, vector: int) -> Tile:
    """Static: two 128-bit loads a thread of each of a token's rows (of fp32, four spill), and 8 elements of rows that are read one by one
    or two by two. A row's columns are shared out among programs (combine and gather) or walked (combine's backward)."""
    elements = 4096 // itemsize if vector >= 4 else 1024
    block = min(elements, max(16, triton.next_power_of_2(num_cols)))
    return Tile(elements // block, block)


def moe_route_fwd(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, score: str, order: str, num_groups: int, top_k_groups: int,
    renormalize: bool, scaling_factor: float, tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch the routing kernel over logits (T, E) of any strides, with bias (E,) fp32 or None. Returns weights (T, top_k) fp32 and
    indices (T, top_k) int64."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    logits, bias = with_contiguous_rows(logits), None if bias is None else bias.contiguous()
    groups = triton.next_power_of_2(num_groups)
    tile = tile or pick_route_tile(max(2, groups * triton.next_power_of_2(num_experts // num_groups)))
    log.debug("moe_route: %s", tile)
    launch(
        _moe_route_fwd_kernel, _grid("moe_route", num_tokens, tile.ROWS), logits.device,
        logits_ptr=logits, bias_ptr=bias, weights_ptr=weights, indices_ptr=indices, num_tokens=num_tokens, stride_t=logits.stride(0),
        scaling_factor=float(scaling_factor), SCORE=score, SCORE_FIRST=order == "score_then_topk",
        RENORMALIZE=_renormalizes(score, order, renormalize), NUM_EXPERTS=num_experts, TOP_K=top_k, NUM_GROUPS=num_groups,
        TOP_K_GROUPS=top_k_groups, VECTOR=vector_of(logits), **tile.meta(), GROUPS=groups, BLOCK_K=triton.next_power_of_2(top_k),
    )  # fmt: skip
    return weights, indices


def moe_route_bwd(
    dweights: torch.Tensor, logits: torch.Tensor, indices: torch.Tensor, score: str, order: str, renormalize: bool,
    scaling_factor: float, tile: Tile | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch routing's backward. dweights and indices are (T, top_k), of any strides. Returns dlogits in logits' dtype, contiguous."""
    num_tokens, num_experts = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logits = with_contiguous_rows(logits)
    tile = tile or pick_route_bwd_tile(max(2, triton.next_power_of_2(num_experts)))
    log.debug("moe_route: %s", tile)
    launch(
        _moe_route_bwd_kernel, _grid("moe_route", num_tokens, tile.ROWS), logits.device,
        dweights_ptr=dweights.contiguous(), logits_ptr=logits, indices_ptr=indices.contiguous(), dlogits_ptr=dlogits,
        num_tokens=num_tokens, stride_t=logits.stride(0), scaling_factor=float(scaling_factor), SCORE=score,
        SCORE_FIRST=order == "score_then_topk", RENORMALIZE=_renormalizes(score, order, renormalize), NUM_EXPERTS=num_experts,
        TOP_K=indices.shape[1], VECTOR=vector_of(logits), **tile.meta(),
    )  # fmt: skip
    return dlogits


def moe_dispatch(indices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the three kernels of the sort, or the last alone if one block has all slots, over indices (T, K) int32 or int64, whatever they
    hold. Returns order and inverse (T·K,) int64 and offsets (E,) int32."""
    indices, num_slots = indices.contiguous(), indices.numel()
    order, inverse = (torch.empty(num_slots, dtype=torch.int64, device=indices.device) for _ in range(2))
    offsets = torch.empty(num_experts, dtype=torch.int32, device=indices.device)
    counts = totals = None
    if num_slots > SORT_BLOCK:
        counts, totals = _count("moe_dispatch", indices, num_experts, torch.int32)
    launch(
        _moe_place_kernel, (max(1, triton.cdiv(num_slots, SORT_BLOCK)),), indices.device,
        indices_ptr=indices, counts_ptr=counts, totals_ptr=totals, order_ptr=order, inverse_ptr=inverse, offsets_ptr=offsets,
        num_slots=num_slots, NUM_EXPERTS=num_experts, BINS=_num_bins(num_experts), STEP=SORT_STEP, BLOCK=SORT_BLOCK, num_warps=4,
    )  # fmt: skip
    return order, inverse, offsets


def _num_bins(num_experts: int) -> int:
    return max(64, triton.next_power_of_2(num_experts + 1))


def moe_expert_counts(indices: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Launch the first two kernels of the sort over indices of any shape. Returns (E,) int64."""
    return _count("moe_expert_counts", indices.contiguous(), num_experts, torch.int64)[1]


def _count(op: str, indices: torch.Tensor, num_experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts, totals): of each bin, how many slots lie in the blocks before each block, (blocks, bins) int32; of each expert, in all."""
    num_slots = indices.numel()
    check_grid(op, num_slots + SORT_BLOCK)  # slots, which the kernels count in 32 bits
    num_blocks, bins = max(1, triton.cdiv(num_slots, SORT_BLOCK)), _num_bins(num_experts)
    counts = torch.empty(num_blocks, bins, dtype=torch.int32, device=indices.device)
    totals = torch.empty(num_experts, dtype=dtype, device=indices.device)
    launch(
        _moe_count_kernel, (num_blocks,), indices.device,
        indices_ptr=indices, counts_ptr=counts, num_slots=num_slots, NUM_EXPERTS=num_experts, BINS=bins, BLOCK=SORT_BLOCK, num_warps=4,
    )  # fmt: skip
    launch(
        _moe_scan_kernel, (triton.cdiv(num_experts + 1, SCAN_BINS),), indices.device,
        counts_ptr=counts, totals_ptr=totals, num_blocks=num_blocks, NUM_EXPERTS=num_experts, BINS=bins, BLOCK_BINS=SCAN_BINS,
        BLOCK=SCAN_BLOCK, num_warps=4,
    )  # fmt: skip
    return counts, totals


def moe_gather_fwd(
    x: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, top_k: int, tile: Tile | None = None
) -> torch.Tensor:
    """Launch the gather of x (T, H), of any strides, into (T·top_k, H) rows in sorted order, contiguous; rows that no expert has are 0."""
    num_tokens, num_cols = x.shape
    x, out = with_contiguous_rows(x), torch.empty(inverse.shape[0], num_cols, dtype=x.dtype, device=x.device)
    tile = tile or pick_tile(num_cols, x.element_size(), vector_of(x))
    log.debug("moe_gather: %s", tile)
    launch(
        _moe_gather_fwd_kernel, _grid("moe_gather", num_tokens, tile.ROWS, triton.cdiv(num_cols, tile.BLOCK)), x.device,
        x_ptr=x, inverse_ptr=inverse.contiguous(), offsets_ptr=offsets.contiguous(), out_ptr=out, num_tokens=num_tokens,
        stride_x=x.stride(0), NUM_COLS=num_cols, NUM_EXPERTS=offsets.shape[0], TOP_K=top_k, VECTOR=vector_of(x), **tile.meta(),
    )  # fmt: skip
    return out


def moe_combine_fwd(
    y: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, top_k: int, tile: Tile | None = None
) -> torch.Tensor:
    """Launch the sum of the top_k rows of each token among y (T·top_k, H), of any strides, with weights (T, top_k) fp32; None is ones.
    Returns (T, H) in y's dtype, contiguous."""
    num_tokens, num_cols = y.shape[0] // top_k, y.shape[1]
    y, out = with_contiguous_rows(y), torch.empty(num_tokens, num_cols, dtype=y.dtype, device=y.device)
    tile = tile or pick_tile(num_cols, y.element_size(), vector_of(y))
    log.debug("moe_combine: %s", tile)
    launch(
        _moe_combine_fwd_kernel, _grid("moe_combine", num_tokens, tile.ROWS, triton.cdiv(num_cols, tile.BLOCK)), y.device,
        y_ptr=y, inverse_ptr=inverse.contiguous(), offsets_ptr=offsets.contiguous(),
        weights_ptr=None if weights is None else weights.contiguous(), out_ptr=out, num_tokens=num_tokens, stride_y=y.stride(0),
        NUM_COLS=num_cols, NUM_EXPERTS=offsets.shape[0], TOP_K=top_k, VECTOR=vector_of(y), **tile.meta(),
    )  # fmt: skip
    return out


def moe_combine_bwd(
    dout: torch.Tensor, y: torch.Tensor, inverse: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch combine's backward. dout is (T, H), of any strides. Returns dy in y's dtype and dweights (T, K) fp32, contiguous."""
    (num_tokens, num_cols), top_k = dout.shape, weights.shape[1]
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dweights = torch.empty(weights.shape, dtype=torch.float32, device=y.device)
    dout, y = with_contiguous_rows(dout), with_contiguous_rows(y)
    tile = tile or pick_tile(num_cols, y.element_size(), vector_of(dout, y))
    log.debug("moe_combine: %s", tile)
    launch(
        _moe_combine_bwd_kernel, _grid("moe_combine", num_tokens, tile.ROWS), y.device,
        dout_ptr=dout, y_ptr=y, inverse_ptr=inverse.contiguous(), offsets_ptr=offsets.contiguous(), weights_ptr=weights.contiguous(),
        dy_ptr=dy, dweights_ptr=dweights, num_tokens=num_tokens, stride_do=dout.stride(0), stride_y=y.stride(0), NUM_COLS=num_cols,
        NUM_EXPERTS=offsets.shape[0], TOP_K=top_k, VECTOR=vector_of(dout, y), **tile.meta(),
    )  # fmt: skip
    return dy, dweights


def _renormalizes(score: str, order: str, renormalize: bool) -> bool:
    """A softmax of the chosen logits sums to 1 as it is."""
    return bool(renormalize) and (score, order) != ("softmax", "topk_then_score")


def _grid(op: str, num_tokens: int, rows: int, num_blocks: int = 1) -> tuple[int]:
    check_grid(op, num_tokens + rows)  # tokens, which the kernels count in 32 bits
    return check_grid(op, triton.cdiv(num_tokens, rows) * num_blocks)
