"""Whether two judges agree: the one that trains, and one that is held out and of another family.

Axes: n pictures, c criteria.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lensmini.rewards.diagnostics.estimates import group_members, rank_correlation
from lensmini.shapes import check_shape

__all__ = ["judge_agreement", "reward_agreement"]


def judge_agreement(
    scores: Tensor,
    valid: Tensor,
    other_scores: Tensor,
    other_valid: Tensor,
    group: Tensor,
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Any]:
    """Agreement of two judges' verdicts: accuracy, and what is left of it beyond chance.

    ``kappa = (a - e) / (1 - e)`` with a the share of equal verdicts and e the share that independent judges with the same
    pass rates would have (Cohen 1960): at a pass rate of .95 two judges agree nine times in ten by chance. Intervals are
    percentiles of a bootstrap over groups, since verdicts of one prompt are not independent.

    Args:
        scores: ``[n, c]``; at least 0.5 passes.
        valid: ``[n, c]`` bool.
        other_scores: ``[n, c]``.
        other_valid: ``[n, c]`` bool; where both are valid they are compared.
        group: ``[n]`` integers.
        generator: of the resamples.
        num_resamples: bootstrap samples.
        level: of the intervals.

    Returns:
        ``accuracy`` and ``kappa``, each with ``_low`` and ``_high``, ``pass_rate`` and ``other_pass_rate`` over the
        ``pairs``, and ``groups``. None where there is nothing to compare, for kappa where both are constant, and for
        intervals with one group.

    Raises:
        ValueError: if shapes or types differ.

    Example:
        >>> one, other = torch.tensor([[1.0], [0.0], [1.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0], [0.0]])
        >>> everywhere, generator = one >= 0, torch.Generator().manual_seed(0)
        >>> found = judge_agreement(one, everywhere, other, everywhere, torch.arange(4), generator=generator)
        >>> found["accuracy"], found["kappa"]
        (0.75, 0.5)
    """
    sizes = check_shape("scores", scores, "n c")
    for name, value in (("valid", valid), ("other_scores", other_scores), ("other_valid", other_valid)):
        check_shape(name, value, "n c", **sizes)
    check_shape("group", group, "n", n=sizes["n"])
    if valid.dtype != torch.bool or other_valid.dtype != torch.bool:
        raise ValueError(f"valid and other_valid: expected bool, got {valid.dtype} and {other_valid.dtype}")
    both = valid & other_valid
    one, other = scores >= 0.5, other_scores >= 0.5
    cells = torch.stack([(both & (one == a) & (other == b)).sum(1) for a in (True, False) for b in (True, False)], 1)
    by_group = torch.stack([cells[m].sum(0) for m in group_members(group)]).double() if len(group) else cells.double()
    by_group = by_group[by_group.sum(1) > 0]
    total = by_group.sum(0)
    accuracy, kappa = _accuracy_and_kappa(total[None])
    drawn = _resample(by_group, num_resamples, generator)
    drawn_accuracy, drawn_kappa = _accuracy_and_kappa(drawn)
    count = float(total.sum())
    return {
        **_with_interval("accuracy", accuracy, drawn_accuracy, level),
        **_with_interval("kappa", kappa, drawn_kappa, level),
        "pass_rate": float(total[0] + total[1]) / count if count else None,
        "other_pass_rate": float(total[0] + total[2]) / count if count else None,
        "pairs": int(count),
        "groups": len(by_group),
    }


def reward_agreement(
    rewards: Tensor,
    other_rewards: Tensor,
    group: Tensor,
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> dict[str, Any]:
    """Whether two judges rank the pictures of a prompt alike: mean of the groups' Spearman correlations.

    Args:
        rewards: ``[n]``, pictures that both know.
        other_rewards: ``[n]``.
        group: ``[n]`` integers.
        generator: of the bootstrap over groups.
        num_resamples: bootstrap samples.
        level: of the interval.

    Returns:
        ``rank_correlation``, ``rank_correlation_low``, ``rank_correlation_high`` and ``groups``: those in which both differ.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> rewards, other = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.4, 0.6])
        >>> found = reward_agreement(rewards, other, torch.zeros(3).long(), generator=torch.Generator())
        >>> found["rank_correlation"], found["groups"]
        (1.0, 1)
    """
    num = check_shape("rewards", rewards, "n")["n"]
    check_shape("other_rewards", other_rewards, "n", n=num)
    check_shape("group", group, "n", n=num)
    ranks = [rank_correlation(rewards[m].double(), other_rewards[m].double()) for m in group_members(group)]
    found = torch.tensor([rank for rank in ranks if rank is not None], dtype=torch.float64)
    drawn = _resample(found[:, None], num_resamples, generator)[:, 0] / max(len(found), 1)
    mean = found.mean()[None] if len(found) else torch.full((1,), math.nan, dtype=torch.float64)
    return {**_with_interval("rank_correlation", mean, drawn, level), "groups": len(found)}


def _accuracy_and_kappa(cells: Tensor) -> tuple[Tensor, Tensor]:
    """From counts ``[m, 4]`` of (pass, pass), (pass, fail), (fail, pass), (fail, fail); NaN where not defined."""
    whole = cells.sum(1)
    pp, pf, fp, ff = (cells / whole[:, None]).unbind(1)
    accuracy = pp + ff
    chance = (pp + pf) * (pp + fp) + (fp + ff) * (pf + ff)
    room = 1 - chance
    return accuracy, torch.where(room > 1e-12, (accuracy - chance) / room, math.nan)


def _resample(rows: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Sums of rows drawn with replacement ``[num, k]``; none from fewer than two."""
    if len(rows) < 2:
        return rows.new_empty(0, rows.shape[1])
    return rows[torch.randint(len(rows), (num, len(rows)), generator=generator)].sum(1)


def _with_interval(name: str, value: Tensor, drawn: Tensor, level: float) -> dict[str, float | None]:
    plain = float(value[0])
    known = drawn[drawn.isfinite()]
    low = high = None
    if math.isfinite(plain) and len(known) * 2 > len(drawn):
        tail = (1 - level) / 2
        low, high = torch.quantile(known, torch.tensor([tail, 1 - tail], dtype=known.dtype)).tolist()
    return {name: plain if math.isfinite(plain) else None, f"{name}_low": low, f"{name}_high": high}
