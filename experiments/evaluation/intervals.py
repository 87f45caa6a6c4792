"""How sure a score is: resampled prompts, task by task."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["stratified_interval"]


def stratified_interval(
    groups: Sequence[Sequence[float]], *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of group means, prompts drawn again within their groups.

    Benchmarks average tasks of unequal size, and a task is no sample of anything: only its prompts are drawn again. Where
    every prompt of every group scored alike the interval has no width, which says nothing about certainty.

    Args:
        groups: for each group the score of each prompt, the mean of its pictures.
        seed: of the resamples.
        resamples: how many.
        level: of the interval.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: if a group is empty, or there is none.

    Example:
        >>> low, high = stratified_interval([[0.0, 1.0] * 50, [1.0] * 10], seed=0)
        >>> round(low, 1), round(high, 1)
        (0.7, 0.8)
    """
    if not groups or not all(map(len, groups)):
        raise ValueError(f"groups: expected at least one prompt in each, got sizes {[len(group) for group in groups]}")
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(resamples, dtype=torch.float64)
    for group in groups:
        means += _resampled_means(torch.tensor(group, dtype=torch.float64), resamples, generator) / len(groups)
    means = means.sort().values
    outside = math.floor((1 - level) / 2 * resamples)
    return means[outside].item(), means[resamples - 1 - outside].item()


def _resampled_means(values: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    return values[drawn].mean(1)
