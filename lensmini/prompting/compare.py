"""Is one system prompt better than another? Paired over items and noise, with what is missing left out.

Axes: n items, s noise seeds, r resamples.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lensmini.shapes import check_shape

__all__ = ["Comparison", "bootstrap_interval", "compare_paired", "flip_p_value"]

_CHUNK = 1 << 22


class Comparison(NamedTuple):
    """A paired comparison; positive is in favour of the candidate."""

    difference: float
    """Mean over items of the mean over seeds; NaN if there is no pair."""
    lower: float
    """Bootstrap lower bound of the difference, at one-sided level ``alpha``."""
    p_value: float
    """Of the sign-flip test."""
    alpha: float
    """Level of both."""
    num_items: int
    """Items with a pair."""
    coverage: float
    """Share of the pairs that are there."""
    correlation: float
    """Of the two arms over pairs; common noise makes it positive, and the variance of the difference smaller."""
    accepted: bool
    """Whether the lower bound is above 0, the flips agree and enough pairs are there."""


def compare_paired(
    candidate: Tensor, incumbent: Tensor, *, alpha: float, generator: torch.Generator, min_coverage: float = 0.8
) -> Comparison:
    """Compare scores of the same items under the same noise, and accept only what is not explained by chance.

    Items are what is resampled, since the seeds of an item share its difficulty; a pair with a missing score is no pair.
    The lower bound is that of :func:`bootstrap_interval`. A bootstrap knows only the differences it has seen: where a few
    items differ and all in one direction, its bound is above 0 long before that is evidence (three of a hundred suffice
    at 5 %, where a fair coin does the same once in eight). So the exact test of :func:`flip_p_value` has to agree.

    Args:
        candidate: ``[n, s]`` floating point, NaN where missing.
        incumbent: ``[n, s]``, likewise.
        alpha: one-sided level, in (0, 0.5).
        generator: of the resamples, on the CPU.
        min_coverage: least share of pairs; below it nothing is accepted.

    Returns:
        The comparison.

    Raises:
        ValueError: if shapes differ or the level is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> low = torch.rand(60, 3, generator=generator)
        >>> compare_paired(low + 0.2, low, alpha=0.01, generator=generator).accepted
        True
        >>> compare_paired(low.flip(0), low, alpha=0.01, generator=generator).accepted
        False
    """
    sizes = check_shape("candidate", candidate, "n s")
    check_shape("incumbent", incumbent, "n s", **sizes)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: expected a level in (0, 0.5), got {alpha}")
    candidate, incumbent = candidate.double(), incumbent.double()
    paired = candidate.isfinite() & incumbent.isfinite()
    coverage = paired.double().mean().item() if paired.numel() else 0.0
    gaps = torch.where(paired, candidate - incumbent, 0.0).sum(1)
    counts = paired.sum(1)
    differences = gaps[counts > 0] / counts[counts > 0]
    num = len(differences)
    if num < 2:
        value = differences.mean().item() if num else math.nan
        return Comparison(value, -math.inf, 1.0, alpha, num, coverage, math.nan, accepted=False)
    lower, _ = bootstrap_interval(differences, alpha, generator=generator)
    p_value = flip_p_value(differences, alpha, generator=generator)
    both = torch.stack([candidate[paired], incumbent[paired]])
    correlation = both.corrcoef()[0, 1].item() if bool((both.std(1) > 0).all()) else math.nan
    accepted = lower > 0 and p_value <= alpha and coverage >= min_coverage
    return Comparison(differences.mean().item(), lower, p_value, alpha, num, coverage, correlation, accepted)


def bootstrap_interval(values: Tensor, alpha: float, *, generator: torch.Generator) -> tuple[float, float]:
    """Studentised bootstrap bounds of a mean (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5).

    ``mean - q_{1 - alpha} se`` and ``mean - q_{alpha} se``, with q the quantiles of ``(mean* - mean) / se*``.

    Args:
        values: ``[n]`` floating point, at least two.
        alpha: level of each bound, in (0, 0.5).
        generator: of the resamples; there are enough that 20 lie beyond each quantile, at least 2,000.

    Returns:
        Lower and upper bound; both are the mean where all values are equal.

    Raises:
        ValueError: if there are fewer than two values, one is not finite, or the level is out of range.

    Example:
        >>> low, high = bootstrap_interval(torch.arange(100.0), 0.025, generator=torch.Generator().manual_seed(0))
        >>> round(low), round(high)
        (44, 55)
    """
    check_shape("values", values, "n")
    values = values.double()
    if len(values) < 2 or not bool(values.isfinite().all()):
        raise ValueError(f"values: expected at least two, all finite, got {values[:8].tolist()}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: expected a level in (0, 0.5), got {alpha}")
    num, resamples = len(values), max(2000, math.ceil(20 / alpha))
    mean, error = values.mean(), values.std() / math.sqrt(num)
    if error <= 1e-9 * values.abs().amax():  # equal, up to rounding
        return mean.item(), mean.item()
    parts = []
    for rows in _row_chunks(resamples, num):
        drawn = values[torch.randint(num, (rows, num), generator=generator)]
        spread = drawn.std(1) / math.sqrt(num)
        gap = drawn.mean(1) - mean
        # A resample of equal values is infinitely far from the mean, in its direction.
        parts.append(torch.where(spread > 0, gap / spread.clamp_min(1e-300), torch.sign(gap) * math.inf))
    ratios = torch.cat(parts).sort().values
    beyond = max(1, math.floor(alpha * resamples))
    high, low = ratios[resamples - beyond].item(), ratios[beyond - 1].item()
    return (mean - high * error).item(), (mean - low * error).item()


def flip_p_value(values: Tensor, alpha: float, *, generator: torch.Generator) -> float:
    """One-sided p-value of a positive mean when every value might as well have the other sign (Fisher, 1935).

    ``(1 + #{sum* >= sum}) / (1 + r)`` over random signs: at most its level for any n if the two arms are exchangeable.

    Args:
        values: ``[n]`` differences.
        alpha: level that matters, for the number of resamples: 20 beyond it, at least 2,000.
        generator: of the signs.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> round(flip_p_value(torch.tensor([1.0, 1.0, 1.0] + [0.0] * 97), 0.05, generator=generator), 1)
        0.1
    """
    values = values.double()
    values = values[values != 0]
    resamples = max(2000, math.ceil(20 / alpha))
    if not len(values):
        return 1.0
    total, reached = values.sum(), 0
    slack = 1e-6 * values.abs().sum()  # equal sums of rounded scores are equal
    for rows in _row_chunks(resamples, len(values)):
        signs = torch.randint(2, (rows, len(values)), generator=generator, dtype=torch.int8).double() * 2 - 1
        reached += int((signs @ values >= total - slack).sum())
    return (1 + reached) / (1 + resamples)


def _row_chunks(rows: int, width: int) -> list[int]:
    size = max(1, _CHUNK // max(1, width))
    return [min(size, rows - first) for first in range(0, rows, size)]
