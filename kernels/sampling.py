"""Drawing a token from each row of logits, and the distribution that it is drawn from, without sorting the vocabulary.

    w = exp((x − max x) / temperature)        p = w / Σ w over the tokens kept

Tokens are kept in order of x, ties to the lower id: the top_k first; of those the fewest whose mass reaches top_p of theirs; of those
the ones with w ≥ min_p. A program has one row, which it reads from memory once and from L2 after that:

1. A walk over the row gives each of BLOCK / VECTOR groups of columns its maximum and its sum of w.
2. The cut is a threshold on x, searched for between two bounds: the tokens from `hi` up are too few, those from `lo` up enough. A probe
   is a walk that counts and weighs the tokens between a threshold and hi, and writes the ids of the first CANDIDATES into a scratch.
   The first threshold is one that half to seven eighths of the groups' maxima reach, so that about as many tokens reach it as there
   are groups; most often those are enough, and fit. Else the bounds close in on each other until what lies between them fits, or is
   of one value.
3. The rest of the search takes place in registers, on those candidates alone.
4. Where the candidates hold all that is kept, the token is drawn from them, else from the whole row, by group and then within it.

Walks: 1 without a cut, 2 with min_p alone; 2 with a cut that the first probe brackets, which is any top_k up to BLOCK / 16 and a top_p
that the likeliest BLOCK / 16 tokens reach; 8 to 17 for a large top_k or a flat distribution; fewer than 70 for any input, as every
second threshold halves the 32-bit keys between the bounds. The distribution takes one more, to write it.

A draw inverts the cumulative sum of w in units of 2^-40: 64-bit integers, which add up without error in any order. So each token keeps
its probability, down to 2^-40 of the likeliest's, but for fp32's rounding of w and of its group's sum.

Floor: numel·itemsize bytes, and 4·numel more for the distribution. A walk costs 9 instructions an element, a probe 27 (sm_90). B rows
are B programs, so that B = 1 leaves all SMs but one idle: for 128k columns about 5 µs a walk and 16 µs a probe (arithmetic).
"""

import logging

import torch
import triton
import triton.language as tl

from .launch import launch
from .primitives import LOG2E
from .row_tiles import RowConfig, pick_row_config
from .rows import VECTOR, Rows, body, edge, groups, row_start

log = logging.getLogger("fastattn")

CANDIDATES = 4096  # ids in a row's scratch: 8 a thread in registers, and 16 KB a row in memory
LOWEST = tl.constexpr(-2139095040)  # the key of the lowest finite float
UNIT = tl.constexpr(1099511627776.0)  # 2^40: what w = 1 weighs in a draw
STEPS = tl.constexpr(32)  # blocks of a group's columns looked at together

SCALARS = ["top_k", "num_rows", "inner", "num_cols", "stride_xo", "stride_xi", "stride_seed"]


# --------------------------------------------------------------------------------------------------------------------
# Floats in order.


@triton.jit
def float_key(x):
    """The int32 that stands to the others as the float x does; −0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_float(key):
    """The inverse of `float_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def between(lo, hi, step):
    """A key strictly between two that are not neighbours: of the middle value, or at odd steps the middle of the keys.

    Values halve what is left of a spread of logits, keys that of a range whose ends are far off, as masks of −1e9 are.
    """
    key = float_key(0.5 * key_float(lo) + 0.5 * key_float(hi))
    key = tl.where(step % 2 == 0, key, (lo & hi) + ((lo ^ hi) >> 1))
    return tl.minimum(tl.maximum(key, lo + 1), hi - 1)


# --------------------------------------------------------------------------------------------------------------------
# A row and its walks. `row` is (x_ptr, start, first, length, num_cols, x_edge, edge_col): where it starts, where the body of it that
# 128-bit loads reach starts and how long that is, its columns, and the values and columns of its edge; `cut` is (threshold, last_tie,
# min_p), what `kept_weight` keeps.


@triton.jit
def this_row(x_ptr, index, inner, num_cols, stride_xo, stride_xi, ACCESS: tl.constexpr):
    """`row` of that index. The edge is (2·VECTOR,) columns, −inf where there is none."""
    start = row_start(index, inner, stride_xo, stride_xi)
    first, length = body(start, num_cols, ACCESS)
    if ACCESS == "edges":
        at, mask = edge(start + tl.zeros((1,), tl.int64), num_cols, tl.full((1,), True, tl.int1))
        x_edge = tl.reshape(tl.load(x_ptr + at, mask=mask, other=float("-inf")).to(tl.float32), (2 * VECTOR,))
        edge_col = tl.reshape((at - start).to(tl.int32), (2 * VECTOR,))
    else:
        x_edge, edge_col = tl.full((2 * VECTOR,), float("-inf"), tl.float32), tl.zeros((2 * VECTOR,), tl.int32)
    return x_ptr, start, first, length, num_cols, x_edge, edge_col


@triton.jit
def load_body(row, offsets):
    """x at those offsets into the body, −inf past its end."""
    x_ptr, _, first, length, _, _, _ = row
    return tl.load(x_ptr + first + offsets, mask=offsets < length, other=float("-inf")).to(tl.float32)


@triton.jit
def column_of_body(row):
    """The column at which the body starts."""
    _, start, first, _, _, _, _ = row
    return (first - start).to(tl.int32)


@triton.jit
def weight(x, row_max, scale):
    """w = exp((x − max) / temperature), scale = log2e / temperature."""
    return tl.exp2((x - row_max) * scale)


@triton.jit
def kept_weight(x, col, row_max, scale, cut, HAS_CUT: tl.constexpr):
    """w of the tokens kept, 0 of the others. A cut keeps those above the threshold, and those on it up to the column last_tie."""
    threshold, last_tie, min_p = cut
    w = weight(x, row_max, scale)
    kept = w >= min_p
    if HAS_CUT:
        kept = kept & ((x > threshold) | ((x == threshold) & (col <= last_tie)))
    return tl.where(kept, w, 0.0)


@triton.jit
def row_statistics(row, scale, BLOCK: tl.constexpr):
    """(group_max, group_sum of w, row_max, row_sum of w). A NaN or +inf in the row makes row_sum NaN, nothing but −inf makes it 0.

    A group's sum is that of exp((x − its running maximum) / temperature) until the walk ends (arXiv 1805.02867).
    """
    _, _, _, _, num_cols, x_edge, _ = row
    col = groups(BLOCK)
    group_max = tl.full((BLOCK // VECTOR,), float("-inf"), tl.float32)
    group_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for at in range(0, num_cols, BLOCK):
        x = load_body(row, at + col)
        new_max = tl.maximum(group_max, tl.max(x, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        group_sum = group_sum * weight(group_max, shift, scale) + tl.sum(weight(x, shift[:, None], scale), 1)
        group_max = new_max
    row_max = tl.maximum(tl.max(group_max, 0), tl.max(x_edge, 0)) + 0.0  # never −0: keys tell it from 0
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    group_sum = group_sum * weight(group_max, shift, scale)
    return group_max, group_sum, row_max, tl.sum(group_sum, 0) + tl.sum(weight(x_edge, shift, scale), 0)


@triton.jit
def kept_sums(row, row_max, scale, cut, HAS_CUT: tl.constexpr, BLOCK: tl.constexpr):
    """Each group's sum of w over the tokens kept."""
    _, _, _, _, num_cols, _, _ = row
    col, offset = groups(BLOCK), column_of_body(row)
    group_sum = tl.zeros((BLOCK // VECTOR,), tl.float32)
    for at in range(0, num_cols, BLOCK):
        x = load_body(row, at + col)
        group_sum += tl.sum(kept_weight(x, offset + at + col, row_max, scale, cut, HAS_CUT), 1)
    return group_sum


@triton.jit
def probe(row, ids_ptr, low, high, skip, row_max, scale, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr):
    """(count, Σ w, minimum) of the tokens low ≤ x < high. Their ids in ascending order, but for the first `skip` and as many as fit,
    are written to ids_ptr."""
    _, _, _, _, num_cols, x_edge, edge_col = row
    offset = column_of_body(row)
    tl.debug_barrier()  # until the ids of an earlier probe have been read
    col, bit = groups(BLOCK), tl.arange(0, VECTOR)[None, :]
    group_col = tl.arange(0, BLOCK // VECTOR) * VECTOR
    lane = tl.arange(0, 2 * VECTOR)
    in_edge = (x_edge >= low) & (x_edge < high)
    before = tl.sum((in_edge & (lane < VECTOR)).to(tl.int32), 0)
    count = before
    mass = tl.zeros((BLOCK // VECTOR,), tl.float32)
    least = tl.full((BLOCK // VECTOR,), float("inf"), tl.float32)
    for at in range(0, num_cols, BLOCK):
        x = load_body(row, at + col)
        inside = (x >= low) & (x < high)
        mass += tl.sum(tl.where(inside, weight(x, row_max, scale), 0.0), 1)
        least = tl.minimum(least, tl.min(tl.where(inside, x, float("inf")), 1))
        packed = tl.sum(tl.where(inside, 256 + (1 << bit), 0), 1)
        number, bits = packed >> 8, packed & 255
        total = tl.sum(number, 0)
        if (total > 0) & (count < skip + CANDIDATES):
            place = tl.cumsum(number, 0) - number + (count - skip)
            for turn in range(0, tl.max(number, 0)):  # of each group its lowest column, if one is left
                lowest = bits & -bits
                column = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127) + offset + at + group_col
                nth = place + turn
                tl.store(ids_ptr + nth, column, mask=(bits > 0) & (nth >= 0) & (nth < CANDIDATES))
                bits -= lowest
        count += total
    place = tl.cumsum(in_edge.to(tl.int32), 0) - 1 + tl.where(lane < VECTOR, 0, count - before) - skip
    tl.store(ids_ptr + place, edge_col, mask=in_edge & (place >= 0) & (place < CANDIDATES))
    count += tl.sum((in_edge & (lane >= VECTOR)).to(tl.int32), 0)
    total_mass = tl.sum(mass, 0) + tl.sum(tl.where(in_edge, weight(x_edge, row_max, scale), 0.0), 0)
    tl.debug_barrier()  # until all ids are written
    return count, total_mass, tl.minimum(tl.min(least, 0), tl.min(tl.where(in_edge, x_edge, float("inf")), 0))


@triton.jit
def load_candidates(row, ids_ptr, count, CANDIDATES: tl.constexpr):
    """(x, id) of a probe's tokens, in order of their ids; −inf past the last."""
    x_ptr, start, _, _, _, _, _ = row
    lane = tl.arange(0, CANDIDATES)
    ids = tl.load(ids_ptr + lane, mask=lane < count, other=0)
    return tl.load(x_ptr + start + ids, mask=lane < count, other=float("-inf")).to(tl.float32), ids


# --------------------------------------------------------------------------------------------------------------------
# The cut.


@triton.jit
def first_threshold(group_max, row_max):
    """A key that half to seven eighths of the groups with a token in them reach."""
    number = tl.sum((group_max > float("-inf")).to(tl.int32), 0)
    lo = float_key(tl.min(tl.where(group_max > float("-inf"), group_max, row_max), 0))
    hi = float_key(row_max) + 1
    key, reached, step = lo, number, 0
    while (hi > lo + 1) & ((8 * reached > 7 * number) | (2 * reached < number)):
        key = between(lo, hi, step)
        reached = tl.sum((group_max >= key_float(key)).to(tl.int32), 0)
        too_few = 2 * reached < number
        lo, hi = tl.where(too_few, lo, key), tl.where(too_few, key, hi)
        step += 1
    return tl.where(2 * reached < number, lo, key)


@triton.jit
def bracket(
    row, ids_ptr, row_max, scale, threshold, lo, hi, most, k, goal, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Probe until the tokens between lo and hi fit the scratch or are of one value, beginning with `threshold`.

    Enough is a count of k or a mass of `goal`. The tokens from hi up, `above` of them with a mass of `mass_above`, are not; those from
    lo up are, or are all that there are. Between the two lie `most` tokens or fewer.
    Returns (lo, hi, above, mass_above, how many lie between, their mass).
    """
    above, mass_above, count, mass = 0, 0.0, most, 0.0
    step, searching = 0, True
    while searching:
        last = (hi <= lo + 1) | (most <= CANDIDATES) | (step == 1)
        key = tl.where(last, lo, between(lo, hi, step))
        key = tl.where((step == 0) & (most > CANDIDATES), tl.minimum(tl.maximum(threshold, lo), hi - 1), key)
        count, mass, least = probe(row, ids_ptr, key_float(key), key_float(hi), 0, row_max, scale, BLOCK, CANDIDATES)
        if (above + count >= k) | (mass_above + mass >= goal) | (key == lo):
            lo = tl.where(count > 0, tl.maximum(key, float_key(least)), hi)  # none: those from hi up are all that there are but −inf
            most = count
            searching = (count > CANDIDATES) & (hi > lo + 1)
        else:
            hi = key
            above += count
            mass_above += mass
            most -= count
        step += 1
    return lo, hi, above, mass_above, count, mass


@triton.jit
def select(x, w, lo, hi, above, mass_above, count, mass, k, goal):
    """Close the bounds in on the candidates x until one token, or one value, lies between them, or count is k to the token.

    above, mass_above: of the tokens that are no candidates and lie above these; count, mass: of all from lo up.
    Returns (lo, count, mass, fewer, less), the last two the count and mass from the other bound up.
    """
    fewer, less, step = above, mass_above, 0
    while (hi > lo + 1) & (count > fewer + 1) & ((count != k) | (mass >= goal)):
        key = between(lo, hi, step)
        inside = x >= key_float(key)
        new_count = above + tl.sum(inside.to(tl.int32), 0)
        new_mass = mass_above + tl.sum(tl.where(inside, w, 0.0), 0)
        if (new_count >= k) | (new_mass >= goal):
            lo, count, mass = key, new_count, new_mass
        else:
            hi, fewer, less = key, new_count, new_mass
        step += 1
    return lo, count, mass, fewer, less


@triton.jit
def find_cut(
    row, ids_ptr, group_max, row_max, row_sum, scale, k, top_p, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Which tokens top-k and then top-p keep: those with x above `threshold`, and those on it up to the column `last_tie`.

    Returns (threshold, last_tie, candidates): the last is how many ids the scratch holds, if all that is kept is among them, else 0.
    A first search is for the count k, or without top-k for the mass; a second one, within the first one's tokens, for top_p of theirs.
    """
    _, _, _, _, num_cols, _, _ = row
    top = float_key(row_max) + 1
    start_at = tl.where(k == 1, top - 1, first_threshold(group_max, row_max))
    goal = tl.where(k < num_cols, float("inf"), top_p * row_sum)
    lo, count, mass = tl.full((), LOWEST, tl.int32), num_cols, row_sum
    threshold, last_tie, held, searching = row_max, num_cols, 0, True
    while searching:
        hi, above, mass_above = top, 0, 0.0
        if held == 0:
            lo, hi, above, mass_above, held, mass = bracket(
                row, ids_ptr, row_max, scale, start_at, lo, hi, count, k, goal, BLOCK, CANDIDATES
            )  # fmt: skip
            count, mass = above + held, mass_above + mass
            k = tl.minimum(k, count)
        x, ids = load_candidates(row, ids_ptr, held, CANDIDATES)
        w = weight(x, row_max, scale)
        lo, count, mass, fewer, less = select(x, w, lo, hi, above, mass_above, count, mass, k, goal)
        threshold, ties, wanted, kept_mass = key_float(lo), count - fewer, count - fewer, mass
        if (ties > 1) & ((count > k) | (mass >= goal)):  # all of one value
            tie_weight = weight(threshold, row_max, scale)
            wanted = tl.minimum(tl.ceil((goal - less) / tie_weight), ties.to(tl.float32)).to(tl.int32)
            wanted = tl.maximum(tl.minimum(wanted, k - fewer), 1)
            kept_mass = less + wanted.to(tl.float32) * tie_weight
        last_tie = num_cols
        if wanted < ties:
            if held <= CANDIDATES:
                is_tie = (x == threshold).to(tl.int32)
                last_tie = tl.sum(tl.where((tl.cumsum(is_tie, 0) == wanted) & (is_tie == 1), ids, 0), 0)
            else:
                probe(row, ids_ptr, threshold, key_float(lo + 1), wanted - 1, row_max, scale, BLOCK, CANDIDATES)
                last_tie = tl.load(ids_ptr)
        held = tl.where((above == 0) & (held <= CANDIDATES), held, 0)
        searching = (goal == float("inf")) & (top_p < 1.0)
        goal = top_p * kept_mass
    return threshold, last_tie, held


# --------------------------------------------------------------------------------------------------------------------
# The draw.


@triton.jit
def shares(w):
    """Weights as the integers that a draw adds up."""
    return (w * UNIT).to(tl.int64)


@triton.jit
def ticket(word, total):
    """A uniform integer in [0, total), of a uniform 64-bit one."""
    return tl.umulhi(word, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def drawn(share, number):
    """The index whose part of the cumulative sum of shares holds `number`."""
    return tl.sum((tl.cumsum(share, 0) <= number).to(tl.int32), 0)


@triton.jit
def random_words(seed_ptr, row, stride_seed):
    """Two uniform 64-bit words of a row: Philox-4x32-10 (Salmon et al., SC 2011) at counter (row, 0, 0, 0) of the one seed, or at
    counter 0 of the row's own (stride_seed 1), which is what a lone row with that seed has."""
    a, b, c, d = tl.philox(tl.load(seed_ptr + row * stride_seed), row * (1 - stride_seed), 0, 0, 0)
    return (a.to(tl.uint64) << 32) | b.to(tl.uint64), (c.to(tl.uint64) << 32) | d.to(tl.uint64)


@triton.jit
def draw_from_row(
    row, group_sum, word, second_word, row_max, scale, cut, HAS_CUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A token kept: a group by the sums of its tokens' w, or one of the edge; then a token of that group, by its share of the sum."""
    _, _, _, _, num_cols, x_edge, edge_col = row
    offset = column_of_body(row)
    share, edge_share = shares(group_sum), shares(kept_weight(x_edge, edge_col, row_max, scale, cut, HAS_CUT))
    body_total = tl.sum(share, 0)
    number = ticket(word, body_total + tl.sum(edge_share, 0))
    token = -1
    if number < body_total:
        group = drawn(share, number)
        per_sum = 1.0 / tl.sum(tl.where(tl.arange(0, BLOCK // VECTOR) == group, group_sum, 0.0), 0)
        col = group * VECTOR + tl.arange(0, STEPS)[:, None] * BLOCK + tl.arange(0, VECTOR)[None, :]
        total = tl.full((), 0, tl.int64)
        for at in range(0, num_cols, STEPS * BLOCK):
            x = load_body(row, at + col)
            w = kept_weight(x, offset + at + col, row_max, scale, cut, HAS_CUT)
            total += tl.sum(tl.sum(shares(w * per_sum), 1), 0)
        number = ticket(second_word, total)
        for at in range(0, num_cols, STEPS * BLOCK):
            x = load_body(row, at + col)
            w = kept_weight(x, offset + at + col, row_max, scale, cut, HAS_CUT)
            share_of_token = tl.reshape(shares(w * per_sum), (STEPS * VECTOR,))
            total = tl.sum(share_of_token, 0)
            if (number >= 0) & (number < total):
                index = drawn(share_of_token, number)
                token = (offset + at + group * VECTOR + index // VECTOR * BLOCK + index % VECTOR).to(tl.int32)
            number -= total
    else:
        index = drawn(edge_share, number - body_total)
        token = tl.sum(tl.where(tl.arange(0, 2 * VECTOR) == index, edge_col, 0), 0)
    return token


# --------------------------------------------------------------------------------------------------------------------
# The kernel.


@triton.jit
def of_row(value, row):
    """A parameter: itself, or this row's of a tensor."""
    value = value + 0 * row  # a tensor, where the interpreter has a number
    if value.dtype.is_ptr():
        return tl.load(value + row)
    else:
        return value


@triton.jit(do_not_specialize=SCALARS)
def _sampling_kernel(
    x_ptr, seed_ptr, ids_ptr, y_ptr, temperature, top_k, top_p, min_p, num_rows, inner, num_cols, stride_xo, stride_xi,
    stride_seed,
    ACCESS: tl.constexpr, HAS_CUT: tl.constexpr, DRAWS: tl.constexpr, ALIKE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """One row: y = a token drawn from p, or with DRAWS off p itself.

    A temperature of 0 is the top_k of 1. A row with a NaN or +inf in it, or nothing but −inf, has no distribution: −1, or NaN.
    ALIKE: rows of y are aligned as those of x are. HAS_CUT: some row may have a top_k, a top_p or a temperature of 0.
    """
    tl.static_assert(ROWS == 1)
    index = tl.program_id(0)
    row = this_row(x_ptr, index, inner, num_cols, stride_xo, stride_xi, ACCESS)
    temperature = of_row(temperature, index).to(tl.float32)
    greedy = temperature == 0.0
    scale = tl.minimum(LOG2E / tl.where(greedy, 1.0, temperature), 1e38)  # finite, so that 0·scale is 0
    min_p = tl.where(greedy, 0.0, of_row(min_p, index).to(tl.float32))
    group_max, group_sum, row_max, row_sum = row_statistics(row, scale, BLOCK)
    valid = (row_sum > 0.0) & (row_sum < float("inf"))

    threshold, last_tie, held = float("-inf"), num_cols, 0
    if HAS_CUT:
        k, top_p = of_row(top_k, index), tl.where(greedy, 1.0, of_row(top_p, index).to(tl.float32))
        k = tl.where(greedy, 1, tl.where((k <= 0) | (k > num_cols), num_cols, k).to(tl.int32))
        ids_ptr += index.to(tl.int64) * CANDIDATES
        if valid & ((k < num_cols) | (top_p < 1.0)):
            threshold, last_tie, held = find_cut(
                row, ids_ptr, group_max, row_max, row_sum, scale, k, top_p, BLOCK, CANDIDATES
            )
    cut = (threshold, last_tie, min_p)
    if (held == 0) & ((threshold > float("-inf")) | (min_p > 0.0)):
        group_sum = kept_sums(row, row_max, scale, cut, HAS_CUT, BLOCK)
    if DRAWS:
        word, second_word = random_words(seed_ptr, index, stride_seed)
        token = -1
        if valid & (held == 0):
            token = draw_from_row(row, group_sum, word, second_word, row_max, scale, cut, HAS_CUT, BLOCK)
        if HAS_CUT:
            if held > 0:
                x, ids = load_candidates(row, ids_ptr, held, CANDIDATES)
                share = shares(kept_weight(x, ids, row_max, scale, cut, HAS_CUT))
                place = drawn(share, ticket(word, tl.sum(share, 0)))
                token = tl.sum(tl.where(tl.arange(0, CANDIDATES) == place, ids, 0), 0)
        tl.store(y_ptr + index, token.to(tl.int64))
    else:
        _, start, _, length, _, x_edge, edge_col = row
        edge_kept = kept_weight(x_edge, edge_col, row_max, scale, cut, HAS_CUT)
        total = tl.sum(group_sum, 0) + tl.sum(edge_kept, 0)
        if HAS_CUT:
            if held > 0:
                x, ids = load_candidates(row, ids_ptr, held, CANDIDATES)
                total = tl.sum(kept_weight(x, ids, row_max, scale, cut, HAS_CUT), 0)
        per_total = tl.where(valid, 1.0 / total, float("nan"))
        y_start, offset = index.to(tl.int64) * num_cols, column_of_body(row)
        y_first = y_start + offset
        if ALIKE:
            y_first, _ = body(y_start, num_cols, ACCESS)
        col = groups(BLOCK)
        for at in range(0, num_cols, BLOCK):
            p = kept_weight(load_body(row, at + col), offset + at + col, row_max, scale, cut, HAS_CUT) * per_total
            tl.store(y_ptr + y_first + at + col, p, mask=at + col < length)
        if ACCESS == "edges":
            at_edge, in_edge = edge(start + tl.zeros((1,), tl.int64), num_cols, tl.full((1,), True, tl.int1))
            tl.store(y_ptr + (y_start - start) + at_edge, (edge_kept * per_total)[None, :], mask=in_edge)


# --------------------------------------------------------------------------------------------------------------------
# Launchers.


def sample(
    logits: torch.Tensor,
    seed: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    min_p: float | torch.Tensor,
    config: RowConfig | None = None,
    candidates: int = CANDIDATES,
) -> torch.Tensor:
    """Launch the kernel over logits (B, V), V from 1 to 2^22, with the parameters as numbers or (B,) tensors; a top_k of 0 or less,
    a top_p of 1 and a min_p of 0 keep all. seed is (1,) int64, or (B,), one a row. Returns ids, (B,) int64."""
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch("sample", logits, ids, seed, temperature, top_k, top_p, min_p, config, candidates)
    return ids


def sampling_probs(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    min_p: float | torch.Tensor,
    config: RowConfig | None = None,
    candidates: int = CANDIDATES,
) -> torch.Tensor:
    """The same for what `sample` draws from: probs, (B, V) float32, contiguous."""
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch("sampling_probs", logits, probs, None, temperature, top_k, top_p, min_p, config, candidates)
    return probs


def _launch(name, logits, y, seed, temperature, top_k, top_p, min_p, config, candidates) -> None:
    rows = Rows(x=logits)
    config = config or pick_row_config(name, rows.num_cols, logits.element_size())
    log.debug("%s: %s", name, config)
    if not isinstance(top_k, torch.Tensor) and not 0 < top_k < rows.num_cols:
        top_k = 0  # an int that 32 bits hold
    draws = seed is not None
    temperature, top_k, top_p, min_p = (
        value.contiguous() if isinstance(value, torch.Tensor) else value for value in (temperature, top_k, top_p, min_p)
    )
    has_cut = (
        isinstance(temperature, torch.Tensor) or temperature == 0.0
        or isinstance(top_k, torch.Tensor) or top_k > 0
        or isinstance(top_p, torch.Tensor) or top_p < 1.0
    )  # fmt: skip
    scratch = torch.empty(rows.num_rows, candidates, dtype=torch.int32, device=logits.device) if has_cut else None
    launch(
        _sampling_kernel, rows.grid(name, config.ROWS), rows.device, **rows.args(), seed_ptr=seed, ids_ptr=scratch, y_ptr=y,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        stride_seed=int(draws and seed.numel() > 1), HAS_CUT=has_cut, DRAWS=draws,
        ALIKE=not draws and rows.access != "scalar" and Rows(x=rows.tensors["x"], y=y).access == rows.access,
        CANDIDATES=candidates, **config.meta(),
    )  # fmt: skip
