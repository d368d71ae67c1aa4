"""Sampling: the distribution against sorting in float64, draws against the distribution, in the interpreter and on the CPU path."""

from __future__ import annotations

import math

import pytest
import torch
from op_contract import BF16, DTYPES, F16, F32, INPUT_LAYOUTS, check_operator, launched_on, runs_as_on_cuda

import fastattn
from fastattn.reference import sampling_probs as reference
from fastattn.reference.philox import philox_4x32
from fastattn.testing.budget import check_budget

INF, NAN = float("inf"), float("nan")
WHOLE = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)  # a launcher's parameters that keep all


def check_probs(probs, logits, **options):
    """probs within the budget of the reference in float64, and of its support."""
    truth = reference(logits.double(), **options)
    check_budget(f"probs {options}", probs, reference(logits.float(), **options), truth)
    assert torch.equal(probs > 0, truth > 1e-40), f"{options}: kept {(probs > 0).sum(1)} tokens, the reference {(truth > 1e-40).sum(1)}"
    assert probs.dtype == F32 and probs.is_contiguous()
    return probs


def check(logits, **options):
    return check_probs(fastattn.sampling_probs(logits, **options), logits, **options)


def support(logits, **options):
    """Each row's kept ids."""
    return [row.nonzero()[:, 0].tolist() for row in fastattn.sampling_probs(logits, **options)]


# --------------------------------------------------------------------------------------------------------------------
# The distribution.

OPTIONS = [
    dict(),
    dict(temperature=0.5),
    dict(top_k=5),
    dict(top_p=0.6),
    dict(min_p=0.05),
    dict(temperature=1.5, top_k=40, top_p=0.8),
    dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.1),
    dict(top_p=0.95, min_p=0.02),
]


def name_of(options):
    return " ".join(f"{name}={value}" for name, value in options.items()) or "whole"


@pytest.mark.both
@pytest.mark.parametrize("num_cols", [1, 9, 1001])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_distribution(options, num_cols):
    check(3 * torch.randn(2, num_cols), **options)


@pytest.mark.both
@DTYPES
@pytest.mark.parametrize("num_cols", [5000, 4999])
def test_dtypes_and_more_tokens_than_the_scratch_holds(num_cols, dtype):
    check((2 * torch.randn(1, num_cols)).to(dtype), top_k=300, top_p=0.9)


@pytest.mark.interpret
@pytest.mark.parametrize("num_cols, dtype", [(149, BF16), (152, F32)], ids=["odd-bf16", "aligned-fp32"])
@pytest.mark.parametrize(
    "options", [dict(top_k=3), dict(top_k=60), dict(top_k=60, top_p=0.7), dict(top_p=0.9), dict(temperature=4.0, top_p=0.95, min_p=0.3)],
    ids=name_of,
)  # fmt: skip
def test_search_that_needs_many_probes(num_cols, dtype, options):
    """Blocks and a scratch so small that the bounds have to be closed in on, and tokens are drawn by groups."""
    from fastattn.kernels.row_tiles import RowConfig
    from fastattn.kernels.sampling import sample, sampling_probs

    small, parameters = dict(config=RowConfig(1, 64, 1, long=True), candidates=8), (WHOLE | options).values()
    logits = torch.randn(1, num_cols).to(dtype)
    probs = check_probs(sampling_probs(logits, *parameters, **small), logits, **options)
    ids = sample(logits, torch.tensor([3]), *parameters, **small)
    assert probs[0, ids[0]] > 0


@pytest.mark.both
@pytest.mark.more
@pytest.mark.parametrize("num_cols, dtype", [(50257, BF16), (300000, F32)], ids=str)
@pytest.mark.parametrize("options", [dict(top_k=50, top_p=0.9), dict(top_p=0.9)], ids=name_of)
def test_vocabularies(num_cols, options, dtype):
    logits = (3 * torch.randn(1, num_cols)).to(dtype)
    probs = check(logits, **options)
    assert probs[0, fastattn.sample(logits, **options)[0]] > 0


@pytest.mark.both
def test_parameters_of_each_row():
    logits = torch.randn(6, 50)
    rows = dict(
        temperature=torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0, 0.0]),
        top_k=torch.tensor([3, 0, 7, -1, 100, 50]),
        top_p=torch.tensor([0.5, 0.9, 1.0, 0.7, 0.0, 1.0]),
        min_p=torch.tensor([0.0, 0.1, 0.0, 0.05, 0.0, 1.0]),
    )
    probs = check(logits, **rows)
    for row in range(6):
        options = {name: values[row].item() for name, values in rows.items()}
        torch.testing.assert_close(probs[row], fastattn.sampling_probs(logits[row : row + 1], **options)[0], rtol=1e-6, atol=1e-8)
    assert probs[0].max() == probs[4].max() == probs[5].max() == 1.0
    ids = fastattn.sample(logits, **rows)
    assert (probs.gather(1, ids[:, None]) > 0).all()
    assert ids[[0, 4, 5]].tolist() == logits.argmax(1)[[0, 4, 5]].tolist()


@pytest.mark.both
@pytest.mark.parametrize("dtypes", [(F32, torch.int32), (F16, torch.int64), (BF16, torch.int32), (torch.float64, torch.int64)], ids=str)
def test_dtypes_of_parameters(dtypes):
    logits, (real, integer) = torch.randn(2, 30), dtypes
    rows = dict(temperature=torch.tensor([0.5, 2.0]).to(real), top_p=torch.tensor([0.75, 0.5]).to(real))
    check(logits, **rows, top_k=torch.tensor([4, 2**31 - 1]).to(integer))


@pytest.mark.both
def test_parameters_of_any_stride():
    logits, temperature = torch.randn(3, 20), torch.tensor([0.5, 9.0, 1.0, 9.0, 2.0, 9.0])[::2]
    assert torch.equal(fastattn.sampling_probs(logits, temperature=temperature), fastattn.sampling_probs(logits, temperature=temperature.clone()))
    one = torch.tensor(0.5).expand(3)
    check(logits, temperature=one, top_p=one)


@pytest.mark.both
def test_ties_go_to_the_lower_id():
    same = torch.full((1, 12), 2.0)
    assert support(same, top_k=5) == [[0, 1, 2, 3, 4]]
    assert support(same, top_p=0.25) == [[0, 1, 2]]
    assert support(same, top_k=8, top_p=0.5) == [[0, 1, 2, 3]]
    assert support(same, temperature=0.0) == [[0]]
    assert fastattn.sample(same, temperature=0.0).tolist() == [0]
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0, -0.0, 1.0, 0.0, 1.0]])
    assert support(logits, top_k=3) == [[0, 1, 3]]
    assert support(logits, top_k=4) == [[0, 1, 3, 5]]
    assert support(logits, top_k=6) == [[0, 1, 2, 3, 5, 7]]  # 0 and −0 are one value
    assert support(logits, top_k=7) == [[0, 1, 2, 3, 4, 5, 7]]
    assert support(-logits, temperature=0.0) == [[2]]


@pytest.mark.both
def test_more_ties_than_the_scratch_holds():
    num_cols = 4603
    logits = torch.zeros(1, num_cols)
    logits[0, 10] = 1.0
    assert support(logits, top_k=4500) == [list(range(4500))]
    assert support(logits, top_k=7) == [[0, 1, 2, 3, 4, 5, 10]]
    assert len(support(logits, top_p=0.96)[0]) == math.ceil(0.96 * (num_cols - 1 + math.e) - math.e) + 1


@pytest.mark.both
@pytest.mark.parametrize("left", [1, 40])
def test_a_long_row_of_which_a_mask_leaves_fewer_than_top_k(left):
    """As guided decoding has them: all that is finite is above the first threshold, and not enough."""
    logits = torch.full((1, 6000), -torch.inf)
    logits[0, 100 : 100 + left] = torch.linspace(3.0, 1.0, left)
    for top_p in (1.0, 0.6):
        probs = check(logits, top_k=50, top_p=top_p)
        assert probs[0, 100] > 0 and fastattn.sample(logits, top_k=50, top_p=top_p).item() in range(100, 100 + left)


@pytest.mark.both
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_exactly_top_k_of_many_equal_values(dtype):
    logits = torch.randn(2, 2000).to(dtype)
    for top_k in (1, 50, 1999):
        probs = check(logits, top_k=top_k)
        assert (probs > 0).sum(1).tolist() == [top_k, top_k]


@pytest.mark.both
def test_extremes_of_top_p_and_min_p():
    logits = torch.randn(2, 40)
    whole = fastattn.sampling_probs(logits)
    for options in (dict(top_p=1.0), dict(top_p=1), dict(top_k=0), dict(top_k=-1), dict(top_k=40), dict(top_k=2**40), dict(min_p=0.0)):
        assert torch.equal(fastattn.sampling_probs(logits, **options), whole)
    best = [[i] for i in logits.argmax(1).tolist()]
    for options in (dict(top_p=0.0), dict(top_p=1e-30), dict(min_p=1.0), dict(top_k=1), dict(temperature=0), dict(temperature=1e-42)):
        assert support(logits, **options) == best
    assert len(support(logits, top_p=1 - 1e-7)[0]) == 40


@pytest.mark.both
def test_one_token_always_stays():
    logits = torch.tensor([[0.0, 1.0, 1.0, -5.0]])
    assert support(logits, min_p=1.0) == [[1, 2]]
    assert support(logits, top_p=0.0, min_p=1.0) == [[1]]
    assert fastattn.sampling_probs(logits[:, :1]).tolist() == [[1.0]]


@pytest.mark.both
def test_minus_infinity_is_never_drawn():
    logits = torch.randn(3, 60)
    logits[:, ::2] = -INF
    logits[1, :58] = -INF
    for options in (dict(), dict(top_k=45), dict(top_p=0.99), dict(top_k=45, top_p=0.5), dict(temperature=5.0, min_p=0.0)):
        check(logits, **options)
    assert fastattn.sample(logits, temperature=100.0, top_k=50).tolist()[1] == 59


@pytest.mark.both
def test_a_row_without_a_distribution():
    logits = torch.randn(5, 33)
    logits[0, 7], logits[1, 32], logits[2] = NAN, INF, -INF
    for options in (dict(), dict(top_k=3), dict(temperature=0.0), dict(top_p=0.5, min_p=0.5)):
        probs, ids = fastattn.sampling_probs(logits, **options), fastattn.sample(logits, **options)
        assert probs[:3].isnan().all() and ids[:3].tolist() == [-1, -1, -1]
        check_probs(probs[3:], logits[3:], **options)
        assert (ids[3:] >= 0).all()


@pytest.mark.both
def test_values_at_the_ends_of_their_ranges():
    for logits in (
        torch.tensor([[65504.0, -65504.0, 65504.0, 6e-8, -6e-8, 0.0]]).half(),
        torch.tensor([[3.4028234e38, -3.4028234e38, 1.0, 3.4028233e38]]),
        torch.tensor([[-3.4028234e38, -3.4028234e38, -3.4028234e38]]),
        torch.tensor([[-1e9, -1e9, 0.5, -1e9, 0.25]]),
    ):
        for options in (dict(), dict(top_k=2), dict(top_k=3, top_p=0.9), dict(temperature=1e30, top_p=0.55)):
            check(logits, **options)


@pytest.mark.both
@pytest.mark.parametrize("temperature", [1e39, torch.tensor([1e39], dtype=torch.float64)], ids=["number", "of rows"])
def test_a_temperature_that_float32_does_not_hold(temperature):
    """As good as uniform over what can be drawn at all."""
    logits = torch.tensor([[3.0, -INF, 0.0, -INF, -60000.0]])
    for options, share in ((dict(), 1 / 3), (dict(top_k=2), 0.5), (dict(top_p=0.5), 0.5)):
        probs = fastattn.sampling_probs(logits, temperature=temperature, **options)
        kept = probs[probs > 0]
        assert torch.allclose(kept, torch.full_like(kept, share)) and len(kept) == round(1 / share) and probs[0, 1] == probs[0, 3] == 0
        assert int(fastattn.sample(logits, temperature=temperature, **options)) in (0, 2, 4)


@pytest.mark.both
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_changes_nothing(offset):
    logits = (64 * torch.randn(1, 500)).round() / 64
    for options in (dict(), dict(top_k=20), dict(top_p=0.7)):
        torch.testing.assert_close(fastattn.sampling_probs(logits + offset, **options), fastattn.sampling_probs(logits, **options), rtol=1e-6, atol=0)


@pytest.mark.both
@pytest.mark.parametrize("name", INPUT_LAYOUTS)
def test_any_layout(name):
    for num_cols in (64, 77):
        logits = INPUT_LAYOUTS[name](torch.randn(3, num_cols).to(BF16))
        before = logits.clone()
        check(logits, top_k=9)
        assert torch.equal(logits, before)


@pytest.mark.interpret
def test_offsets_past_2_31_elements():
    stride = 2**31 + 8
    storage = torch.UntypedStorage(2 * (stride + 16))  # reserved, not filled
    logits = torch.empty(0, dtype=F16).set_(storage, 0, (2, 16), (stride, 1))
    logits.copy_(torch.randn(2, 16))
    check(logits, top_k=4)
    assert torch.equal(fastattn.sample(logits, temperature=0.0), logits.argmax(1))


@pytest.mark.both
def test_empty():
    logits = torch.randn(0, 30)
    assert fastattn.sample(logits, top_k=3).shape == (0,) and fastattn.sample(logits).dtype == torch.int64
    assert fastattn.sampling_probs(logits, temperature=torch.ones(0)).shape == (0, 30)


# Multiples of 1/8 bring ties; the reference's own sums decide a top_p that falls on a boundary, so none is drawn that could.
def random_case(data, st):
    num_rows, num_cols = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    logits = (8 * data.draw(st.sampled_from([0.3, 2.0])) * torch.randn(num_rows, num_cols)).round() / 8
    if data.draw(st.booleans()):
        logits[torch.rand(logits.shape) < 0.3] = -INF
        logits[:, data.draw(st.integers(0, num_cols - 1))] = 0.5
    options = {}
    for name, values in (
        ("temperature", st.sampled_from([0.0, 0.7, 1.3])),
        ("top_k", st.integers(-1, 45)),
        ("top_p", st.floats(0.0, 1.0, width=32)),
        ("min_p", st.floats(0.0, 1.0, width=32)),
    ):
        if data.draw(st.booleans()):
            one = data.draw(st.booleans())
            drawn = [data.draw(values) for _ in range(1 if one else num_rows)]
            options[name] = drawn[0] if one else torch.tensor(drawn)
    return logits, options


def on_a_boundary(logits, options):
    """Whether rounding may decide: another support at a top_p or min_p moved by 1e-6."""
    exact = reference(logits.double(), **options) > 0
    for name in options.keys() & {"top_p", "min_p"}:
        for factor in (1 - 1e-6, 1 + 1e-6):
            if not torch.equal(exact, reference(logits.double(), **options | {name: options[name] * factor}) > 0):
                return True
    return False


def check_random_cases(examples):
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(data=st.data())
    def any_case(data):
        logits, options = random_case(data, st)
        hypothesis.assume(not on_a_boundary(logits, options))
        check(logits, **options)

    any_case()


@pytest.mark.interpret
def test_random_cases_on_the_kernels():
    check_random_cases(10)


def test_random_cases():
    check_random_cases(200)


@pytest.mark.interpret
@pytest.mark.more
def test_more_random_cases_on_the_kernels():
    check_random_cases(40)


# --------------------------------------------------------------------------------------------------------------------
# The draw.


def check_frequencies(ids, probs):
    """Pearson's chi-square of ids drawn from probs (V,), against the value that one in a million exceeds (Wilson and Hilferty)."""
    expected = probs.double() * ids.numel()
    counts = ids.bincount(minlength=probs.numel())
    assert (counts[probs == 0] == 0).all()
    rare = (expected > 0) & (expected < 5)  # together, as one class
    kept = (expected >= 5).nonzero()[:, 0].tolist()
    classes = [(counts[i].item(), expected[i].item()) for i in kept] + [(counts[rare].sum().item(), expected[rare].sum().item())]
    classes = [(count, mean) for count, mean in classes if mean > 0]
    chi_square, freedom = sum((count - mean) ** 2 / mean for count, mean in classes), len(classes) - 1
    if freedom:
        limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
        assert chi_square < limit, f"chi-square {chi_square:.1f} of {freedom} degrees, limit {limit:.1f}"


DRAWS = [dict(), dict(temperature=2.0), dict(top_k=4), dict(top_p=0.8), dict(top_k=20, top_p=0.9, min_p=0.05), dict(min_p=0.2)]


@pytest.mark.parametrize("options", DRAWS, ids=name_of)
def test_frequencies(options):
    logits = torch.randn(1, 50)
    ids = fastattn.sample(logits.expand(50_000, 50), **options)
    check_frequencies(ids, fastattn.sampling_probs(logits, **options)[0])


@pytest.mark.interpret
@pytest.mark.parametrize("options", [dict(), dict(top_k=4, top_p=0.9)], ids=name_of)
def test_frequencies_of_the_kernels(options):
    logits = torch.tensor([[1.0, -1.0, 0.5, 2.0, 0.0, 1.5]])
    ids = fastattn.sample(logits.expand(60, 6), **options)
    check_frequencies(ids, fastattn.sampling_probs(logits, **options)[0])


@pytest.mark.interpret
@pytest.mark.more
@pytest.mark.parametrize("options", DRAWS[::2], ids=name_of)
def test_more_frequencies_of_the_kernels(options):
    logits = torch.randn(1, 50)
    ids = fastattn.sample(logits.expand(200, 50), **options)
    check_frequencies(ids, fastattn.sampling_probs(logits, **options)[0])


def words_of(seed, num_rows):
    """The two uniform 64-bit words of each row, as Python ints."""
    zero = torch.zeros(num_rows, dtype=torch.int64)
    words = torch.stack(philox_4x32((seed & 0xFFFFFFFF, seed >> 32), (torch.arange(num_rows), zero, zero, zero)), 1).tolist()
    return [(a << 32 | b, c << 32 | d) for a, b, c, d in words]


def inverted(weights, word):
    """The index at which the cumulative sum of integer weights passes word / 2^64 of it."""
    number, total = word * sum(weights) >> 64, 0
    for index, weight in enumerate(weights):
        total += weight
        if number < total:
            return index


@pytest.mark.interpret
@pytest.mark.parametrize("num_cols", [24, 29])
def test_a_draw_from_the_candidates_inverts_their_cumulative_sum(num_cols):
    from fastattn.kernels.sampling import sample

    logits, seed = torch.randn(8, num_cols), 2**61 - 12345
    kept = reference(logits, top_k=10) > 0
    weights = (torch.exp((logits - logits.amax(1, keepdim=True)).double()) * 2.0**40 * kept).long().tolist()
    expected = [inverted(row, word) for row, (word, _) in zip(weights, words_of(seed, 8), strict=True)]
    assert sample(logits, torch.tensor([seed]), *(WHOLE | dict(top_k=10)).values()).tolist() == expected


@pytest.mark.interpret
@pytest.mark.parametrize("num_cols", [200, 203])
def test_a_draw_from_a_whole_row_is_by_group_and_then_within_it(num_cols):
    """Columns c with the same c % 64 // 8 are a group; those that 128-bit loads do not reach are one each, after the groups."""
    from fastattn.kernels.row_tiles import RowConfig
    from fastattn.kernels.sampling import sample

    logits, seed = 2 * torch.randn(8, num_cols), 77
    exact = torch.exp((logits - logits.amax(1, keepdim=True)).double()).tolist()
    expected = []
    for row, (word, second) in enumerate(words_of(seed, 8)):
        before = -(row * num_cols) % 8
        body = range(before, before + (num_cols - before) // 8 * 8)
        edge = [[c] for c in range(num_cols) if c not in body]
        groups = [[c for c in body if (c - before) % 64 // 8 == g] for g in range(8)] + edge
        sums = [sum(exact[row][c] for c in group) for group in groups]
        group = groups[inverted([int(total * 2.0**40) for total in sums], word)]
        total = sum(exact[row][c] for c in group)
        expected.append(group[inverted([int(exact[row][c] / total * 2.0**40) for c in group], second)])
    got = sample(logits, torch.tensor([seed]), *WHOLE.values(), config=RowConfig(1, 64, 1, long=True))
    assert got.tolist() == expected


def test_the_inversion_has_the_right_frequencies():
    """What the two tests above hold the kernels to, over many rows: Philox's words are uniform enough."""
    weights = [2**40, 2**39, 2**38, 2**30]
    ids = torch.tensor([inverted(weights, word) for word, _ in words_of(5, 20_000)])
    check_frequencies(ids, torch.tensor(weights) / sum(weights))


@pytest.mark.both
def test_seeds():
    logits = torch.randn(1, 200).expand(6, 200)
    generator = torch.Generator().manual_seed(5)
    first, second = fastattn.sample(logits, generator=generator), fastattn.sample(logits, generator=generator)
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) > 3  # rows draw independently
    assert torch.equal(fastattn.sample(logits, generator=generator.manual_seed(5)), first)
    assert torch.equal(fastattn.sample(logits, generator=generator), second)
    torch.manual_seed(9)
    third = fastattn.sample(logits, top_p=0.9)
    torch.manual_seed(9)
    assert torch.equal(fastattn.sample(logits, top_p=0.9), third)


@pytest.mark.both
@pytest.mark.parametrize("options", [{}, dict(top_k=10, temperature=0.8)], ids=["whole", "cut"])
def test_a_row_with_a_seed_of_its_own_draws_what_it_would_alone(options):
    logits, seeds = torch.randn(6, 200), torch.tensor([3, 2**62 - 1, 0, 3, 5, 6])
    logits[3] = logits[0]
    ids = fastattn.sample(logits, seeds=seeds, **options)
    assert ids[3] == ids[0] and len(set(ids.tolist())) > 2
    order = [4, 0, 3]
    assert torch.equal(fastattn.sample(logits[order], seeds=seeds[order], **options), ids[order])
    for row in range(6):
        assert torch.equal(fastattn.sample(logits[row : row + 1], seeds=seeds[row : row + 1], **options), ids[row : row + 1])


def test_seeds_of_rows_draw_from_the_distribution():
    logits, seeds = torch.randn(1, 50), torch.arange(5000)  # neighbouring numbers are unrelated seeds
    ids = fastattn.sample(logits.expand(5000, 50), seeds=seeds, top_k=9)
    check_frequencies(ids, fastattn.sampling_probs(logits, top_k=9)[0])


def test_errors_of_seeds():
    logits, seeds = torch.randn(3, 20), torch.arange(3)
    for wrong, error, message in (
        ([1, 2, 3], TypeError, "sample: seeds must be a torch.Tensor, got list"),
        (seeds.int(), TypeError, "sample: seeds must be int64, got torch.int32"),
        (seeds[:2], ValueError, r"sample: seeds must have shape \(B,\) = \(3,\), got \(2,\)"),
        (seeds.to("meta"), ValueError, "sample: seeds must be on logits' device cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            fastattn.sample(logits, seeds=wrong)
    with pytest.raises(ValueError, match="sample: seeds must be None with a generator, got a tensor"):
        fastattn.sample(logits, seeds=seeds, generator=torch.Generator())


@pytest.mark.both
def test_greedy_draws_need_no_luck():
    logits = torch.randn(3, 100)
    for options in (dict(temperature=0.0), dict(top_k=1), dict(top_p=0.0), dict(temperature=0.0, top_k=5, top_p=0.3, min_p=0.2)):
        assert torch.equal(fastattn.sample(logits, **options), logits.argmax(1))


@pytest.mark.both
def test_unlikely_tokens_keep_their_probability():
    """Of a million equal small weights under one large one, as a running sum in float32 would lose them."""
    logits = torch.full((1, 5000), -20.0)
    logits[0, 0] = 0.0  # the others: 5000·exp(−20) = 1e-5 of the mass
    probs = fastattn.sampling_probs(logits)
    torch.testing.assert_close(probs[0, 1:].double(), torch.full((4999,), math.exp(-20) / (1 + 4999 * math.exp(-20)), dtype=torch.float64), rtol=1e-5, atol=0)
    logits[0, 0] = -INF
    assert 0 < torch.ops.fastattn.sample(logits, torch.tensor([1]), *[None] * 4, *WHOLE.values()).item() < 5000


@pytest.mark.both
def test_no_gradient():
    logits = torch.randn(2, 10, requires_grad=True)
    assert not fastattn.sampling_probs(logits).requires_grad and not fastattn.sample(logits).requires_grad


@pytest.mark.interpret
def test_program_order_does_not_matter():
    from fastattn.kernels.sampling import sample, sampling_probs
    from fastattn.testing.checker import assert_order_independent

    logits, parameters = torch.randn(3, 1003), (WHOLE | dict(top_k=30, top_p=0.9)).values()
    assert_order_independent(lambda: (sample(logits, torch.tensor([4]), *parameters), sampling_probs(logits, *parameters)))


@pytest.mark.interpret
@pytest.mark.more
def test_every_tile_of_the_table():
    from fastattn.kernels.row_tiles import ROW_TILES
    from fastattn.kernels.sampling import sample, sampling_probs

    for (kernel, _, _), config in ROW_TILES.items():
        for options in (dict(), dict(top_k=700), dict(top_p=0.9)):
            for num_cols in (20000, 20001):
                logits, parameters = torch.randn(1, num_cols), (WHOLE | options).values()
                if kernel == "sampling_probs":
                    check_probs(sampling_probs(logits, *parameters, config=config), logits, **options)
                elif kernel == "sample":
                    ids = sample(logits, torch.tensor([8]), *parameters, config=config)
                    assert reference(logits.double(), **options)[0, ids[0]] > 0


# --------------------------------------------------------------------------------------------------------------------
# Bad input.

X = torch.zeros(4, 10)


@pytest.mark.parametrize("op", ["sample", "sampling_probs"])
@pytest.mark.parametrize(
    "logits, options, error, message",
    [
        ([1.0], {}, TypeError, r"logits must be a torch.Tensor, got list"),
        (X.long(), {}, TypeError, r"logits must be float16, bfloat16 or float32, got torch.int64"),
        (X.double(), {}, TypeError, r"logits must be float16, bfloat16 or float32, got torch.float64"),
        (X[0], {}, ValueError, r"logits must have shape \(B, V\), got \(10,\)"),
        (X[:, :0], {}, ValueError, r"logits must have between 1 and 4194304 columns, got \(4, 0\)"),
        (X[:, :1].expand(4, 2**22 + 1), {}, ValueError, r"logits must have between 1 and 4194304 columns, got \(4, 4194305\)"),
        (X, dict(temperature=-0.5), ValueError, r"temperature must be finite and at least 0, got -0.5"),
        (X, dict(temperature=NAN), ValueError, r"temperature must be finite and at least 0, got nan"),
        (X, dict(temperature=INF), ValueError, r"temperature must be finite and at least 0, got inf"),
        (X, dict(temperature="hot"), TypeError, r"temperature must be a Python number, got str"),
        (X, dict(top_p=1.5), ValueError, r"top_p must lie in \[0, 1\], got 1.5"),
        (X, dict(top_p=NAN), ValueError, r"top_p must lie in \[0, 1\], got nan"),
        (X, dict(top_p=True), TypeError, r"top_p must be a Python number, got bool"),
        (X, dict(min_p=-0.1), ValueError, r"min_p must lie in \[0, 1\], got -0.1"),
        (X, dict(min_p=NAN), ValueError, r"min_p must lie in \[0, 1\], got nan"),
        (X, dict(top_k=2.5), TypeError, r"top_k must be an int, got float"),
        (X, dict(top_k=NAN), TypeError, r"top_k must be an int, got float"),
        (X, dict(top_k=True), TypeError, r"top_k must be an int, got bool"),
        (X, dict(top_k=torch.ones(4)), TypeError, r"top_k must be int32 or int64, got torch.float32"),
        (X, dict(top_k=torch.ones(3, dtype=torch.int64)), ValueError, r"top_k must be a number or have shape \(B,\) = \(4,\), got \(3,\)"),
        (X, dict(temperature=torch.ones(())), ValueError, r"temperature must be a number or have shape \(B,\) = \(4,\), got \(\)"),
        (X, dict(min_p=torch.ones(4, 1)), ValueError, r"min_p must be a number or have shape \(B,\) = \(4,\), got \(4, 1\)"),
        (X, dict(top_p=torch.ones(4, dtype=torch.int64)), TypeError, r"top_p must have a floating-point dtype, got torch.int64"),
        (X, dict(top_p=torch.ones(4, device="meta")), ValueError, r"top_p must be on logits' device cpu, got meta"),
        (X, dict(temperature=torch.tensor([1.0, 1.0, -2.0, 1.0])), ValueError, r"temperature must hold finite numbers of 0 or more, got -2.0 in row 2"),
        (X, dict(temperature=torch.tensor([1.0, INF, 1.0, 1.0])), ValueError, r"temperature must hold finite numbers of 0 or more, got inf in row 1"),
        (X, dict(top_p=torch.tensor([1.0, 1.0, 1.0, NAN])), ValueError, r"top_p must hold numbers in \[0, 1\], got nan in row 3"),
        (X, dict(min_p=torch.tensor([2.0, 1.0, 1.0, 1.0])), ValueError, r"min_p must hold numbers in \[0, 1\], got 2.0 in row 0"),
    ],
)
def test_bad_input(op, logits, options, error, message):
    with pytest.raises(error, match=f"^{op}: {message}"):
        getattr(fastattn, op)(logits, **options)


def test_bad_generator():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"sample: generator must be on logits' device cpu, got cuda"):
        fastattn.sample(X, generator=Elsewhere())
    with pytest.raises(TypeError, match=r"sample: generator must be a torch.Generator, got int"):
        fastattn.sample(X, generator=3)


@pytest.mark.interpret
def test_hostile_values_that_nobody_checks(monkeypatch):
    """As on CUDA: any values inside tensors end, stay within the row, and leave other rows alone."""
    from fastattn.ops import sampling

    monkeypatch.setattr(sampling, "checks_values", lambda tensor: False)
    logits, hostile = torch.randn(1, 50), torch.tensor([NAN, INF, -INF, -1.0, 3.0, 0.5])
    for name in ("temperature", "top_p", "min_p"):
        ids = fastattn.sample(logits.expand(6, 50), **{name: hostile})
        assert ((ids >= -1) & (ids < 50)).all()
        probs = fastattn.sampling_probs(logits.expand(6, 50), **{name: hostile})
        assert torch.equal(probs[5], fastattn.sampling_probs(logits, **{name: hostile[5:]})[0])


# --------------------------------------------------------------------------------------------------------------------
# The operators.


@pytest.mark.both
def test_operators():
    logits, seed, rows = torch.randn(3, 20).to(BF16), torch.tensor([7]), torch.tensor([0.5, 0.9, 1.0])
    check_operator(torch.ops.fastattn.sample, logits, seed, rows, torch.tensor([1, 0, 3]), None, rows, 1.0, 0, 0.9, 0.0)
    check_operator(torch.ops.fastattn.sample, logits, torch.tensor([7, 8, 9]), *[None] * 4, 1.0, 5, 1.0, 0.0)
    check_operator(torch.ops.fastattn.sampling_probs, logits.t().contiguous().t(), *[None] * 4, 0.8, 5, 1.0, 0.0)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled_is_eager(dynamic):
    def probs(logits, rows):
        return fastattn.sampling_probs(logits, temperature=0.7, top_k=9, top_p=rows)

    function = compiled(probs, dynamic=dynamic)
    for num_rows in (4, 5):
        logits, rows = torch.randn(num_rows, 100), torch.rand(num_rows)
        assert torch.equal(function(logits, rows), probs(logits, rows))


@pytest.mark.both
def test_compiled_draws():
    def draw(logits):
        return fastattn.sample(logits * 1.0, temperature=0.7, top_k=9)

    function, logits = compiled(draw, backend="aot_eager"), torch.randn(6, 100)
    torch.manual_seed(3)
    eager = draw(logits)
    torch.manual_seed(3)
    assert torch.equal(function(logits), eager)


def test_inductor_draws_by_a_seed_of_its_own():
    function, logits = compiled(lambda logits: fastattn.sample(logits, top_k=4)), torch.randn(1, 30)
    ids = function(logits.expand(5000, 30))
    check_frequencies(ids, fastattn.sampling_probs(logits, top_k=4)[0])
    torch.manual_seed(3)
    first = function(logits.expand(5000, 30))
    torch.manual_seed(3)
    assert torch.equal(function(logits.expand(5000, 30)), first) and not torch.equal(ids, first)


# --------------------------------------------------------------------------------------------------------------------
# The launch path.


@pytest.fixture
def as_on_cuda(monkeypatch):
    return runs_as_on_cuda(monkeypatch, "sampling")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_cuda_implementation_compiles_and_never_syncs(as_on_cuda, capability):
    logits, seed, rows = torch.zeros(3, 1000, dtype=BF16), torch.zeros(1, dtype=torch.int64), torch.ones(3)

    def call():
        as_on_cuda._sample(logits, seed, rows, rows.long(), None, None, 1.0, 0, 0.9, 0.0)
        as_on_cuda._sampling_probs(logits, rows, rows.long(), None, None, 1.0, 0, 0.9, 0.0)
        as_on_cuda._sample(logits, seed, *[None] * 4, 1.0, 0, 1.0, 0.0)

    assert [launch.name for launch in launched_on(capability, call)] == ["_sampling_kernel"] * 3


def test_sizes_and_parameters_choose_no_variant(as_on_cuda):
    from fastattn.kernels.sampling import _sampling_kernel
    from fastattn.testing.stub_driver import compiled_variants, stub_driver

    with stub_driver():
        for num_rows, top_k, top_p in ((1, 1, 0.5), (2, 2, 1.0), (15, 16, 0.25), (16, 64, 0.0), (17, 50, 1.0), (1000, 999, 0.1)):
            logits = torch.zeros(num_rows, 1000, dtype=BF16)
            as_on_cuda._sample(logits, torch.zeros(1, dtype=torch.int64), *[None] * 4, 0.7, top_k, top_p, 0.0)
        assert compiled_variants(_sampling_kernel) == 1


def test_numbers_that_keep_all_take_the_kernel_without_a_cut(as_on_cuda):
    from fastattn.testing.stub_driver import stub_driver

    with stub_driver() as driver:
        for top_k, top_p in ((0, 1.0), (1000, 1.0), (5000, 1.0), (999, 1.0), (0, 0.5)):
            as_on_cuda._sampling_probs(torch.zeros(2, 1000), *[None] * 4, 1.0, top_k, top_p, 0.1)
        assert [launch.args["HAS_CUT"] for launch in driver.launches] == [False, False, False, True, True]
