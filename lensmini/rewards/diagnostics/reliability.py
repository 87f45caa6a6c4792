"""How much of the reward's variance is the judge's own noise: flips of repeated verdicts, and what they do to a reward.

Model: a judge turns each true binary verdict round with probability q, independently. Axes: r repeats, n pictures, c criteria.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lensmini.rewards.diagnostics.estimates import wilson_interval, within_group_variance
from lensmini.shapes import check_shape

__all__ = [
    "disagreement_of_flips",
    "flip_rate",
    "flip_reliability",
    "flips_by_label",
    "flips_of_disagreement",
    "judge_reliability",
    "reward_std",
    "verdict_noise",
]


def disagreement_of_flips(q: float) -> float:
    """How often two answers about the same thing differ: ``P = 2 q (1 - q)``, whatever the truth.

    Args:
        q: probability of a flip, in [0, 1].

    Returns:
        In [0, 1/2].

    Raises:
        ValueError: if ``q`` is no probability.

    Example:
        >>> round(disagreement_of_flips(0.05), 4)
        0.095
    """
    _check_probability("q", q)
    return 2 * q * (1 - q)


def flips_of_disagreement(disagreement: float) -> float:
    """The inverse: ``q = (1 - sqrt(1 - 2 P)) / 2``, the root below one half; 1/2 where two answers differ more often.

    Args:
        disagreement: P, in [0, 1].

    Returns:
        In [0, 1/2].

    Raises:
        ValueError: if ``disagreement`` is no probability.

    Example:
        >>> round(flips_of_disagreement(0.095), 4)
        0.05
    """
    _check_probability("disagreement", disagreement)
    # The form without a difference of nearly equal numbers: exact also for tiny P.
    return disagreement / (1 + math.sqrt(max(1 - 2 * disagreement, 0.0))) if disagreement < 0.5 else 0.5


def reward_std(p: float, num_criteria: int) -> float:
    """Standard deviation of a mean of independent binary verdicts: ``sqrt(p (1 - p) / c)``.

    With p a pass rate it is the reward's spread: .151, .121, .066 at .5, .8, .95 and 11 criteria. With q a flip rate in
    place of p it is what the judge adds: .042, .066, .090 at .02, .05, .10.

    Args:
        p: probability, in [0, 1].
        num_criteria: c, at least 1.

    Returns:
        The std of the reward.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> round(reward_std(0.5, 11), 3), round(reward_std(0.05, 11), 3)
        (0.151, 0.066)
    """
    _check_probability("p", p)
    if num_criteria < 1:
        raise ValueError(f"num_criteria: expected at least 1, got {num_criteria}")
    return math.sqrt(p * (1 - p) / num_criteria)


def flip_reliability(p: float, q: float) -> float:
    """Share of a reward's variance that is not the judge's noise, if true verdicts pass with p and flip with q.

    ``1 - q (1 - q) / (p' (1 - p'))`` with the pass rate that is seen, ``p' = p + q - 2 p q``. Because flips shrink the signal
    by ``1 - 2 q`` this is ``(1 - 2 q)^2 p (1 - p) / (p' (1 - p'))``: at p = .95 five flips in a hundred already leave .45.

    Args:
        p: true pass rate, in [0, 1].
        q: flip rate, in [0, 1].

    Returns:
        In [0, 1]; 0 where nothing varies.

    Raises:
        ValueError: if an argument is no probability.

    Example:
        >>> round(flip_reliability(0.95, 0.05), 2), round(flip_reliability(0.5, 0.05), 2)
        (0.45, 0.81)
    """
    _check_probability("p", p)
    _check_probability("q", q)
    seen = p + q - 2 * p * q
    return (1 - 2 * q) ** 2 * p * (1 - p) / (seen * (1 - seen)) if 0 < seen < 1 else 0.0


def flip_rate(scores: Tensor, valid: Tensor, *, level: float = 0.95) -> dict[str, Any]:
    """Flip rate of a judge from verdicts that were asked again (test-retest).

    For each verdict the share of its pairs of repeats that differ; the mean of it is P, and
    q follows by :func:`flips_of_disagreement`. The interval is Wilson's for P, one trial for each verdict (exact for two
    repeats, wide for more), carried through the same increasing function.

    Args:
        scores: ``[r, n, c]``, the same questions in each repeat; at least 0.5 passes.
        valid: ``[r, n, c]`` bool; what was not asked again is not valid.
        level: of the interval.

    Returns:
        ``q``, ``low``, ``high``, ``disagreement``, ``verdicts`` (with two answers or more) and ``pairs``; None where there
        are none.

    Raises:
        ValueError: if shapes or types differ.

    Example:
        >>> said = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
        >>> flip_rate(said, said >= 0)["disagreement"]
        0.5
    """
    _check_repeats(scores, valid)
    one_kind = torch.zeros(valid.shape[1:], dtype=torch.int64, device=valid.device)
    return flips_by_label(scores, valid, one_kind, 1, level=level)[0]


def flips_by_label(
    scores: Tensor, valid: Tensor, label: Tensor, num: int, *, level: float = 0.95
) -> list[dict[str, Any]]:
    """:func:`flip_rate` of each kind of verdict.

    Args:
        scores: ``[r, n, c]``; at least 0.5 passes.
        valid: ``[r, n, c]`` bool.
        label: ``[n, c]`` integers in [0, num), others are left out.
        num: of labels.
        level: of the intervals.

    Returns:
        One dict for each label.

    Raises:
        ValueError: if shapes or types differ.

    Example:
        >>> said = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
        >>> [kind["q"] for kind in flips_by_label(said, said >= 0, torch.tensor([[0, 1]]), 2)]
        [0.0, 0.5]
    """
    sizes = _check_repeats(scores, valid)
    check_shape("label", label, "n c", n=sizes["n"], c=sizes["c"])
    passes = (valid & (scores >= 0.5)).double().sum(0)
    count = valid.double().sum(0)
    pairs = count * (count - 1) / 2
    asked = (pairs > 0) & (label >= 0) & (label < num)
    owner = label[asked]
    start = torch.zeros(num, dtype=torch.float64, device=scores.device)
    differing = start.index_add(0, owner, (passes * (count - passes) / pairs.clamp_min(1))[asked])
    verdicts = torch.bincount(owner, minlength=num)
    compared = start.index_add(0, owner, pairs[asked])
    return [
        _flips(part, verdict, int(pair), level)
        for part, verdict, pair in zip(differing.tolist(), verdicts.tolist(), compared.tolist(), strict=True)
    ]


def verdict_noise(scores: Tensor, valid: Tensor) -> tuple[float | None, int]:
    """Variance of one verdict about its own mean over repeats, averaged: ``q (1 - q)`` for flips, any scale otherwise.

    Args:
        scores: ``[r, n, c]``.
        valid: ``[r, n, c]`` bool.

    Returns:
        The variance (``n - 1`` in the divisor of each), None without repeats; and the number of verdicts it is over.

    Raises:
        ValueError: if shapes or types differ.

    Example:
        >>> said = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
        >>> verdict_noise(said, said >= 0)
        (0.25, 2)
    """
    _check_repeats(scores, valid)
    values = torch.where(valid, scores.double(), 0.0)
    count = valid.double().sum(0)
    mean = values.sum(0) / count.clamp_min(1)
    squares = torch.where(valid, values - mean, 0.0).square().sum(0)
    repeated = count > 1
    if not bool(repeated.any()):
        return None, 0
    return float((squares / (count - 1).clamp_min(1))[repeated].mean()), int(repeated.sum())


def judge_reliability(
    rewards: Tensor,
    group: Tensor,
    noise: Tensor | float,
    *,
    weights: Tensor,
) -> dict[str, Any]:
    """Reliability of one step's rewards: ``1 - noise variance / total variance``, where a reward is a weighted mean.

    A mean with weights w has the noise ``sum w^2 noise / (sum w)^2``. What a policy learns from are differences inside
    groups, so the total that counts is the one inside groups: easy and hard prompts would make any judge look reliable.

    Args:
        rewards: ``[n]``, known ones only.
        group: ``[n]`` integers.
        noise: variance of a verdict, one for all (:func:`verdict_noise`) or ``[n, c]``.
        weights: ``[n, c]`` at least 0, 0 where there is no verdict.

    Returns:
        ``within`` and ``overall`` reliability, ``noise_std`` of a reward, ``within_std`` and ``overall_std``. An estimate
        below 0 says that noise explains everything. None where nothing varies.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> rewards, group = torch.tensor([0.4, 0.6]), torch.tensor([0, 0])
        >>> round(judge_reliability(rewards, group, 0.05, weights=torch.ones(2, 10))["within"], 3)
        0.75
    """
    num = check_shape("rewards", rewards, "n")["n"]
    check_shape("group", group, "n", n=num)
    check_shape("weights", weights, "n c", n=num)
    if isinstance(noise, Tensor):
        check_shape("noise", noise, "n c", n=num, c=weights.shape[1])
    weight = weights.double()
    whole = weight.sum(1)
    used = whole > 0
    of_reward = (weight.square() * noise).sum(1)[used] / whole[used].square()
    variance = float(of_reward.mean()) if len(of_reward) else None
    values, owner = rewards.double()[used], group[used]
    within, _ = within_group_variance(values, owner)
    overall, _ = within_group_variance(values, torch.zeros_like(owner))
    return {
        "within": _reliability(variance, within),
        "overall": _reliability(variance, overall),
        "noise_std": None if variance is None else math.sqrt(variance),
        "within_std": None if within is None else math.sqrt(within),
        "overall_std": None if overall is None else math.sqrt(overall),
    }


def _reliability(noise: float | None, total: float | None) -> float | None:
    return None if noise is None or total is None or total < 1e-12 else 1 - noise / total


def _flips(differing: float, verdicts: int, pairs: int, level: float) -> dict[str, Any]:
    interval = wilson_interval(min(differing, verdicts), verdicts, level=level)
    if interval is None:
        return {"q": None, "low": None, "high": None, "disagreement": None, "verdicts": 0, "pairs": 0}
    share = min(differing / verdicts, 1.0)
    q, low, high = (flips_of_disagreement(value) for value in (share, *interval))
    return {"q": q, "low": low, "high": high, "disagreement": share, "verdicts": verdicts, "pairs": pairs}


def _check_repeats(scores: Tensor, valid: Tensor) -> dict[str, int]:
    sizes = check_shape("scores", scores, "r n c")
    check_shape("valid", valid, "r n c", **sizes)
    if not scores.is_floating_point() or valid.dtype != torch.bool:
        raise ValueError(f"scores and valid: expected floating point and bool, got {scores.dtype} and {valid.dtype}")
    return sizes


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected in [0, 1], got {value}")
