"""Statistics over seeds: mean and spread of a method, paired differences between two methods."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.special  # not scipy.stats, which takes half a second to import

SIGNIFICANT = 0.01
"""A difference is called one where the p of the paired t-test is below this."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean, sample standard deviation and 95 % confidence interval of the mean (Student's t).

    Attributes:
      n: how many values there are.
      mean: their mean.
      std: their sample standard deviation; None for a single value.
      ci95: lower and upper end of the interval; None for a single value.
    """

    n: int
    mean: float
    std: float | None
    ci95: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class PairedStatistics(Statistics):
    """Statistics of differences, with the two-sided p of the paired t-test.

    Attributes:
      p: how probable a mean so far from 0 is where there is no difference; None for a single pair.
      differences: the differences themselves.
    """

    p: float | None
    differences: tuple[float, ...]


def describe(values: Sequence[float]) -> Statistics:
    """Statistics of at least one value; spread and interval are None for a single one.

    Args:
      values: one a run.

    Returns:
      Mean, sample standard deviation and 95 % confidence interval of the mean.

    Raises:
      ValueError: there is no value.

    Example:
      >>> describe([1.0, 2.0, 3.0]).std
      1.0
    """
    if not values:
        raise ValueError("values=[] has no mean; it must have at least one value")
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Statistics(n, mean, None, None)
    std = statistics.stdev(values)
    half = half_width(std, n)
    return Statistics(n, mean, std, (mean - half, mean + half))


def describe_given(values: Sequence[float | None]) -> dict[str, Any]:
    """Statistics as JSON has them, of those values that are not None.

    Args:
      values: one a run.

    Returns:
      `n` (how many are not None), `mean` and `std` (None where there are too few), and `values`.

    Example:
      >>> describe_given([None, 1.0, 3.0])["mean"]
      2.0
    """
    given = [value for value in values if value is not None]
    if not given:
        return {"n": 0, "mean": None, "std": None, "values": list(values)}
    described = describe(given)
    return {"n": described.n, "mean": described.mean, "std": described.std, "values": list(values)}


def half_width(std: float, n: int) -> float:
    """Half the width of the 95 % confidence interval of a mean (Student's t).

    Args:
      std: sample standard deviation.
      n: number of values, at least 2.

    Returns:
      The distance from the mean to either end.

    Example:
      >>> round(half_width(std=1.0, n=4), 4)
      1.5912
    """
    return float(scipy.special.stdtrit(n - 1, 0.975)) * std / math.sqrt(n)


def describe_differences(differences: Sequence[float]) -> PairedStatistics:
    """Statistics of paired differences, and the two-sided p of the paired t-test.

    Where all differences are the same number, p is the limit of ever smaller spread: 0, or 1 where
    that number is 0. SciPy's own test has no number for that, and warns.

    Args:
      differences: one a pair.

    Returns:
      Mean, spread, interval and p; the latter three are None for a single pair.

    Raises:
      ValueError: there is no difference.

    Example:
      >>> gain = describe_differences([0.03, 0.01, 0.05])
      >>> round(gain.mean, 4), round(gain.p, 4)
      (0.03, 0.1217)
    """
    described = describe(differences)
    p = None
    if described.std is not None:
        if described.std == 0:
            p = 0.0 if described.mean else 1.0
        else:
            t = abs(described.mean) * math.sqrt(described.n) / described.std
            p = 2 * float(scipy.special.stdtr(described.n - 1, -t))
    return PairedStatistics(
        described.n, described.mean, described.std, described.ci95, p, tuple(differences)
    )


def compare(
    one: Mapping[int, float], other: Mapping[int, float]
) -> tuple[list[int], PairedStatistics] | None:
    """The paired differences `one - other` over the seeds that both have.

    Args:
      one: values by seed.
      other: those of the method to compare with.

    Returns:
      The seeds and the statistics of their differences; None where there is no common seed.

    Example:
      >>> seeds, found = compare({0: 0.9, 1: 0.5, 2: 1.0}, {1: 0.25, 2: 0.5, 3: 0.0})
      >>> seeds, found.mean
      ([1, 2], 0.375)
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    return seeds, describe_differences([one[seed] - other[seed] for seed in seeds])
