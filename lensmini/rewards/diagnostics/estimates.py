"""Small statistics with honest intervals: shares, means, slopes, ranks and spreads inside groups.

Axes: n samples. What cannot be computed is None, so that a record is JSON without NaN.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import Tensor

from lensmini.shapes import check_shape

__all__ = [
    "average_ranks",
    "group_members",
    "line_slope",
    "mean_interval",
    "number",
    "rank_correlation",
    "t_quantile",
    "wilson_interval",
    "within_group_variance",
]


def number(value: float | Tensor | None) -> float | None:
    """A finite float, or None.

    Example:
        >>> number(torch.tensor(0.5)), number(float("nan"))
        (0.5, None)
    """
    if value is None:
        return None
    plain = float(value)
    return plain if math.isfinite(plain) else None


def wilson_interval(successes: float, total: float, *, level: float = 0.95) -> tuple[float, float] | None:
    """Interval of a share that also holds near 0 and 1: ``(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``.

    Wilson (1927). None without observations.

    Example:
        >>> low, high = wilson_interval(0, 50)
        >>> low, round(high, 3)
        (0.0, 0.071)
    """
    if total <= 0:
        return None
    if not 0 <= successes <= total:
        raise ValueError(f"successes: expected 0 to {total}, got {successes}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, extra = successes / total, z * z / total
    half = z * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    low, high = ((share + extra / 2 + sign * half) / (1 + extra) for sign in (-1, 1))
    # Both ends are exact in theory where all or none succeed; rounding must not cross them.
    return 0.0 if successes == 0 else max(low, 0.0), 1.0 if successes == total else min(high, 1.0)


@lru_cache(maxsize=1024)
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """Half width of a two-sided interval in standard errors: Student's quantile, from its finite series.

    Example:
        >>> round(t_quantile(1), 3), round(t_quantile(10), 3)
        (12.706, 2.228)
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"degrees and level: expected at least 1 and in (0, 1), got {degrees} and {level}")
    degrees = min(degrees, 2000)  # beyond it the quantile moves by less than a thousandth
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_inside(angle, degrees) < level else (low, angle)
    return math.sqrt(degrees) * math.tan(high)


def _t_inside(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)), by the series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    squared = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= squared * (k - 1) / k
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> dict[str, Any]:
    """Mean of independent values with Student's interval.

    Args:
        values: any number of them.
        level: of the interval.

    Returns:
        ``mean``, ``low``, ``high`` and ``count``; None where there are too few.

    Example:
        >>> mean_interval([1.0, 3.0])["mean"], mean_interval([1.0])["low"]
        (2.0, None)
    """
    count = len(values)
    if count == 0:
        return {"mean": None, "low": None, "high": None, "count": 0}
    mean = fmean(values)
    if count == 1:
        return {"mean": mean, "low": None, "high": None, "count": 1}
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)
    half = t_quantile(count - 1, level) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": count}


def line_slope(x: Sequence[float], y: Sequence[float], *, level: float = 0.95) -> dict[str, Any]:
    """Slope of the least-squares line with its interval under independent errors of one size.

    Args:
        x: positions.
        y: values.
        level: of the interval, Student's with ``count - 2`` degrees.

    Returns:
        ``slope``, ``low``, ``high``, ``count``; None where there are too few points or one position.

    Raises:
        ValueError: if the numbers of points differ.

    Example:
        >>> line_slope([0, 1, 2, 3], [1.0, 3.0, 5.0, 7.0])
        {'slope': 2.0, 'low': 2.0, 'high': 2.0, 'count': 4}
    """
    if len(x) != len(y):
        raise ValueError(f"y: expected one value for each of {len(x)} positions, got {len(y)}")
    nothing = {"slope": None, "low": None, "high": None, "count": len(x)}
    if len(x) < 2 or max(x) == min(x):
        return nothing
    middle, level_y = fmean(x), fmean(y)
    spread = math.fsum((a - middle) ** 2 for a in x)
    slope = math.fsum((a - middle) * (b - level_y) for a, b in zip(x, y, strict=True)) / spread
    if len(x) < 3:
        return {**nothing, "slope": slope}
    rest = math.fsum((b - level_y - slope * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
    half = t_quantile(len(x) - 2, level) * math.sqrt(rest / (len(x) - 2) / spread)
    return {"slope": slope, "low": slope - half, "high": slope + half, "count": len(x)}


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs.

    Args:
        values: ``[n]``, finite.

    Returns:
        ``[n]`` float64.

    Example:
        >>> average_ranks(torch.tensor([0.5, 0.1, 0.5]))
        tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    check_shape("values", values, "n")
    _, index, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[index]


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's correlation: Pearson's of average ranks.

    Args:
        x: ``[n]``, finite.
        y: ``[n]``, finite.

    Returns:
        In [-1, 1], or None where one of them is constant.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3]))
        1.0
    """
    check_shape("y", y, "n", n=check_shape("x", x, "n")["n"])
    if len(x) < 2 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return None
    first, second = (average_ranks(values) for values in (x, y))
    first, second = first - first.mean(), second - second.mean()
    value = float(first @ second / (first.square().sum() * second.square().sum()).sqrt())
    return min(1.0, max(-1.0, value))


def group_members(group: Tensor) -> list[Tensor]:
    """Indices of each group's samples, groups by ascending id, samples in order.

    Args:
        group: ``[n]`` integers.

    Returns:
        One index tensor for each group.

    Example:
        >>> group_members(torch.tensor([7, -1, 7]))
        [tensor([1]), tensor([0, 2])]
    """
    check_shape("group", group, "n")
    order = torch.argsort(group, stable=True)
    counts = torch.unique_consecutive(group[order], return_counts=True)[1]
    return list(order.split(counts.tolist())) if len(group) else []


def within_group_variance(values: Tensor, group: Tensor) -> tuple[float | None, int]:
    """Variance about the mean of each group, pooled: ``sum_g sum_i (x - mean_g)^2 / sum_g (n_g - 1)``.

    Unbiased where groups share one variance; groups of one tell nothing.

    Args:
        values: ``[n]``, finite.
        group: ``[n]`` integers.

    Returns:
        The variance, None without any pair, and its degrees of freedom.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> within_group_variance(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([0, 0, 7]))
        (2.0, 1)
    """
    check_shape("group", group, "n", n=check_shape("values", values, "n")["n"])
    if not len(values):
        return None, 0
    ids, index = torch.unique(group, return_inverse=True)
    plain = values.double()
    zeros = torch.zeros(len(ids), dtype=torch.float64, device=values.device)
    count = zeros.index_add(0, index, torch.ones_like(plain))
    mean = zeros.index_add(0, index, plain) / count
    degrees = len(values) - len(ids)
    if degrees < 1:
        return None, 0
    return float((plain - mean[index]).square().sum()) / degrees, degrees
