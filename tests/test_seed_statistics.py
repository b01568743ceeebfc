"""Statistics over seeds, against tables, closed forms and SciPy's own paired test."""

import math

import numpy as np
import pytest
import scipy.stats

from experiments.reporting import seed_statistics

# Student's t at 0.975 by degrees of freedom, from a printed table.
TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 29: 2.045}


def test_describe():
    """1, 2, 3, 4: variance (2.25 + 0.25 + 0.25 + 2.25) / 3; t at 3 degrees of freedom 3.182446."""
    found = seed_statistics.describe([1.0, 2.0, 3.0, 4.0])
    assert (found.n, found.mean) == (4, 2.5)
    assert found.std == pytest.approx(math.sqrt(5 / 3))
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert found.ci95 == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)
    single = seed_statistics.describe([0.5])
    assert (single.n, single.mean, single.std, single.ci95) == (1, 0.5, None, None)
    with pytest.raises(ValueError, match="at least one value"):
        seed_statistics.describe([])


@pytest.mark.parametrize(("freedom", "t"), TABLE.items())
def test_half_width_has_the_t_of_a_table(freedom, t):
    n = freedom + 1
    assert seed_statistics.half_width(1.0, n) * math.sqrt(n) == pytest.approx(t, abs=5e-4)


def test_p_of_two_pairs_is_that_of_the_cauchy_distribution():
    """1 degree of freedom: P(|T| > t) = 1 - 2/pi atan(t). Of 1 and 3, t = 2 sqrt(2) / sqrt(2)."""
    found = seed_statistics.describe_differences([1.0, 3.0])
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert found.differences == (1.0, 3.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_p_of_three_pairs_has_a_closed_form(sign):
    """2 degrees of freedom: P(|T| > t) = 1 - t / sqrt(2 + t^2); here t = 0.03 sqrt(3) / 0.02."""
    found = seed_statistics.describe_differences([sign * x for x in (0.03, 0.01, 0.05)])
    t = 1.5 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))


@pytest.mark.parametrize("n", [2, 5, 30])
def test_p_agrees_with_scipys_test(n):
    one, other = np.random.default_rng(n).normal(size=(2, n))
    _, found = seed_statistics.compare(dict(enumerate(one)), dict(enumerate(other)))
    assert found.p == pytest.approx(scipy.stats.ttest_rel(one, other).pvalue, rel=1e-9)


def test_the_interval_leaves_out_0_where_p_is_below_a_twentieth():
    """t * std / sqrt(n) is 4.302653 / sqrt(3) for std 1; means just beyond and just within."""
    half = 4.302653 / math.sqrt(3)
    for mean, low in ((half + 1e-3, True), (half - 1e-3, False)):
        found = seed_statistics.describe_differences([mean - 1, mean, mean + 1])
        assert (found.p < 0.05) == low
        assert (found.ci95[0] > 0) == low


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.25, 0.0), (-0.25, 0.0)])
def test_equal_differences_have_a_p_without_a_warning(value, p):
    found = seed_statistics.describe_differences([value] * 4)
    assert (found.p, found.std, found.ci95) == (p, 0.0, (value, value))


def test_a_single_pair_has_no_p():
    found = seed_statistics.describe_differences([0.25])
    assert (found.n, found.mean, found.std, found.ci95, found.p) == (1, 0.25, None, None, None)


def test_pairs_are_the_seeds_that_both_have():
    seeds, found = seed_statistics.compare({2: 0.5, 0: 1.0, 7: 9.0}, {0: 0.25, 2: 0.5, 1: 4.0})
    assert seeds == [0, 2]
    assert found.differences == (0.75, 0.0)
    assert seed_statistics.compare({0: 1.0}, {1: 1.0}) is None
