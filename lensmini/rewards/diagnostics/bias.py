"""What a judge should not care about: the size and form of a picture, and the length of its prompt.

Axes: n pictures, in groups of one prompt.
"""

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lensmini.rewards.diagnostics.estimates import (
    group_members,
    line_slope,
    mean_interval,
    rank_correlation,
    t_quantile,
)
from lensmini.shapes import check_shape

__all__ = ["length_bias", "resolution_bias", "within_group_trend"]


def within_group_trend(values: Tensor, x: Tensor, group: Tensor, *, level: float = 0.95) -> dict[str, Any]:
    """How values change with x among pictures of one prompt: hard prompts cannot pass for an effect of x.

    The slope is that of least squares with a level for each group,
    ``b = sum (x - mean_g x)(y - mean_g y) / sum (x - mean_g x)^2``; its interval allows any dependence inside a group
    (sandwich over groups, times ``G / (G - 1)``, Student's with G - 1 degrees). The rank correlation is the mean of the groups'
    own (Spearman), with the interval of a mean of groups.

    Args:
        values: ``[n]``, known ones only.
        x: ``[n]``.
        group: ``[n]`` integers.
        level: of the intervals.

    Returns:
        ``slope``, ``slope_low``, ``slope_high``, ``rank_correlation``, ``rank_low``, ``rank_high``, and the ``groups`` in
        which x differs; None where there are too few.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> values, x = torch.tensor([0.1, 0.3, 0.9, 0.7]), torch.tensor([0.0, 1.0, 3.0, 2.0])
        >>> round(within_group_trend(values, x, torch.tensor([0, 0, 8, 8]))["slope"], 4)
        0.2
    """
    num = check_shape("values", values, "n")["n"]
    check_shape("x", x, "n", n=num)
    check_shape("group", group, "n", n=num)
    moments: list[tuple[Tensor, Tensor]] = []
    ranks: list[float] = []
    for members in group_members(group):
        first, second = x[members].double(), values[members].double()
        if len(first) < 2 or bool((first == first[0]).all()):
            continue
        moments.append((first - first.mean(), second - second.mean()))
        rank = rank_correlation(first, second)
        if rank is not None:
            ranks.append(rank)
    spread = math.fsum(float(a.square().sum()) for a, _ in moments)
    slope = math.fsum(float(a @ b) for a, b in moments) / spread if spread > 0 else None
    half = None
    if slope is not None and len(moments) > 1:
        scores = [float(a @ (b - slope * a)) for a, b in moments]
        variance = math.fsum(s * s for s in scores) / spread**2 * len(moments) / (len(moments) - 1)
        half = t_quantile(len(moments) - 1, level) * math.sqrt(variance)
    rank = mean_interval(ranks, level=level)
    return {
        "slope": slope,
        "slope_low": None if slope is None or half is None else slope - half,
        "slope_high": None if slope is None or half is None else slope + half,
        "rank_correlation": rank["mean"],
        "rank_low": rank["low"],
        "rank_high": rank["high"],
        "groups": len(moments),
    }


def resolution_bias(rewards: Tensor, image_sizes: Tensor, group: Tensor, *, level: float = 0.95) -> dict[str, Any]:
    """Whether pictures of one prompt earn more because they are large, wide or long.

    Args:
        rewards: ``[n]``, known ones only.
        image_sizes: ``[n, 2]`` height and width in pixels.
        group: ``[n]`` integers.
        level: of the intervals.

    Returns:
        :func:`within_group_trend` for ``area`` (slope: reward for twice the pixels), ``aspect`` (for twice the width over
        height) and ``elongation`` (for twice the longer over the shorter side).

    Raises:
        ValueError: if shapes differ or a size is not positive.

    Example:
        >>> sizes = torch.tensor([[16, 16], [16, 32]])
        >>> resolution_bias(torch.tensor([0.2, 0.5]), sizes, torch.tensor([1, 1]))["area"]["slope"]
        0.3
    """
    num = check_shape("rewards", rewards, "n")["n"]
    check_shape("image_sizes", image_sizes, "n 2", n=num)
    if not bool((image_sizes > 0).all()):
        raise ValueError("image_sizes: expected positive heights and widths")
    height, width = image_sizes.double().log2().unbind(1)
    return {
        name: within_group_trend(rewards, x, group, level=level)
        for name, x in (("area", height + width), ("aspect", width - height), ("elongation", (width - height).abs()))
    }


def length_bias(rewards: Tensor, prompt_lengths: Tensor, group: Tensor, *, level: float = 0.95) -> dict[str, Any]:
    """Whether prompts that are long earn less: between groups, one point for each.

    A long prompt may well be harder, so this is no fault of the judge by itself; watch its change.

    Args:
        rewards: ``[n]``, known ones only.
        prompt_lengths: ``[n]`` characters or tokens.
        group: ``[n]`` integers.
        level: of the intervals.

    Returns:
        ``slope`` (reward for one more), ``slope_low``, ``slope_high``, ``rank_correlation`` with ``rank_low`` and ``rank_high``
        (Fisher's transform, Bonett and Wright's error), and ``groups``; None where there are too few.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> rewards, lengths = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([10, 20, 30])
        >>> round(length_bias(rewards, lengths, torch.arange(3))["slope"], 4)
        -0.04
    """
    num = check_shape("rewards", rewards, "n")["n"]
    check_shape("prompt_lengths", prompt_lengths, "n", n=num)
    check_shape("group", group, "n", n=num)
    points = [(prompt_lengths[m].double().mean(), rewards[m].double().mean()) for m in group_members(group)]
    x, y = (torch.tensor([float(point[axis]) for point in points], dtype=torch.float64) for axis in (0, 1))
    line = line_slope(x.tolist(), y.tolist(), level=level)
    rank = rank_correlation(x, y)
    low = high = None
    if rank is not None and len(points) > 3:
        error = math.sqrt((1 + rank * rank / 2) / (len(points) - 3))
        half = NormalDist().inv_cdf(0.5 + level / 2) * error
        centre = math.atanh(min(max(rank, -1 + 1e-12), 1 - 1e-12))
        low, high = math.tanh(centre - half), math.tanh(centre + half)
    return {
        "slope": line["slope"],
        "slope_low": line["low"],
        "slope_high": line["high"],
        "rank_correlation": rank,
        "rank_low": low,
        "rank_high": high,
        "groups": len(points),
    }
