"""The error budget must fail what is wrong, and say where."""

import pytest
import torch

from fastattn.testing.budget import check_budget

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def triple():
    ref64 = torch.randn(3, 5, dtype=torch.float64)
    naive = ref64.to(torch.bfloat16)
    return naive.clone(), naive, ref64


def test_naive_itself_passes(triple):
    check_budget("op out", *triple)


def test_twice_the_naive_error_passes_and_more_fails(triple):
    _, naive, ref64 = triple
    worst = (naive.double() - ref64).abs().max()
    out = ref64.clone()
    out[1, 2] += 2 * worst
    check_budget("op out", out, naive, ref64)
    out[1, 2] += 1e-2
    with pytest.raises(AssertionError, match=r"op out: error .* exceeds .*naive error .*largest at \(1, 2\)"):
        check_budget("op out", out, naive, ref64)


def test_exact_naive_leaves_absolute_slack():
    ref64 = torch.full((4,), 100.0, dtype=torch.float64)
    check_budget("op out", ref64 + 0.9e-3, ref64.float(), ref64)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check_budget("op out", ref64 + 1.1e-3, ref64.float(), ref64)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_never_passes_even_where_naive_is_non_finite(triple, bad):
    out, naive, ref64 = triple
    out[2, 4] = naive[2, 4] = bad
    with pytest.raises(AssertionError, match=r"op out: .* at \(2, 4\) where the reference is"):
        check_budget("op out", out, naive, ref64)


def test_a_non_finite_naive_buys_no_slack(triple):
    out, naive, ref64 = triple
    naive[0, 0] = INF
    out[0, 0] = ref64[0, 0] + 1.0
    with pytest.raises(AssertionError, match=r"largest at \(0, 0\)"):
        check_budget("op out", out, naive, ref64)


def test_infinities_of_the_reference_are_demanded():
    ref64 = torch.tensor([0.5, -INF], dtype=torch.float64)
    check_budget("op lse", ref64.float(), ref64.float(), ref64)
    for wrong in (INF, NAN, -1e30):
        with pytest.raises(AssertionError, match=r"op lse: must be -inf at \(1,\)"):
            check_budget("op lse", torch.tensor([0.5, wrong]), ref64.float(), ref64)


def test_shapes_and_dtypes(triple):
    out, naive, ref64 = triple
    with pytest.raises(AssertionError, match="shapes differ"):
        check_budget("op out", out[:2], naive, ref64)
    with pytest.raises(TypeError, match="ref64 must be torch.float64"):
        check_budget("op out", out, naive, naive)
    check_budget("op out", out[:0], naive[:0], ref64[:0])
    check_budget("op out", out[0, 0], naive[0, 0], ref64[0, 0])
