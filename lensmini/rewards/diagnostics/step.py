"""One record for one step of reinforcement learning: everything about its rewards that is cheap to know.

Axes: n pictures of all ranks, c criteria of the longest rubric, r further judgements of the same pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lensmini.rewards.aggregate import aggregate
from lensmini.rewards.diagnostics.bias import length_bias, resolution_bias
from lensmini.rewards.diagnostics.controls import describe_controls
from lensmini.rewards.diagnostics.criteria import (
    Causes,
    Names,
    Table,
    correlate_criteria,
    describe_coverage,
    describe_criteria,
    read_table,
)
from lensmini.rewards.diagnostics.estimates import group_members, rank_correlation, within_group_variance
from lensmini.rewards.diagnostics.health import group_diversity, velocity_norm_ratio
from lensmini.rewards.diagnostics.reliability import flip_rate, judge_reliability, verdict_noise
from lensmini.shapes import check_shape

__all__ = ["describe_groups", "describe_step", "reward_histogram"]


def describe_step(
    scores: Tensor,
    valid: Tensor,
    group: Tensor,
    *,
    step: int | None = None,
    weights: Tensor | None = None,
    pitfalls: Tensor | None = None,
    criterion_ids: Names | None = None,
    categories: Names | None = None,
    causes: Mapping[str, int] | Causes | None = None,
    rewards: Tensor | None = None,
    reward_valid: Tensor | None = None,
    heldout_rewards: Tensor | None = None,
    heldout_valid: Tensor | None = None,
    repeat_scores: Tensor | None = None,
    repeat_valid: Tensor | None = None,
    variances: Tensor | None = None,
    image_sizes: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    velocity_norms: Tensor | None = None,
    reference_norms: Tensor | None = None,
    features: Tensor | None = None,
    controls: Mapping[str, Sequence[float | None]] | None = None,
    latencies_s: Sequence[float] | Tensor | None = None,
    cost: float | None = None,
) -> dict[str, Any]:
    """Describe the rewards of one step as a dict of plain numbers: JSON, no NaN, None for what cannot be computed.

    The tensors of :func:`lensmini.rewards.to_matrix` go in as they are. Only ``scores``, ``valid`` and ``group`` are
    needed; each further argument adds its part. The parts, and what they mean, are those of :func:`describe_criteria`,
    :func:`describe_coverage`, :func:`correlate_criteria`, :func:`describe_groups`, :func:`flip_rate`,
    :func:`judge_reliability`, :func:`resolution_bias`, :func:`length_bias`, :func:`velocity_norm_ratio`,
    :func:`group_diversity` and :func:`describe_controls`.

    Args:
        scores: ``[n, c]`` in [0, 1] where valid; anything elsewhere.
        valid: ``[n, c]`` bool.
        group: ``[n]`` integers: pictures of one prompt and rubric.
        step: the number of the step, which alarms and pages need.
        weights: ``[n, c]``, 0 where a picture does not have the criterion.
        pitfalls: ``[n, c]`` bool, where a high score is bad.
        criterion_ids: c names, or for each picture those of its rubric in order.
        categories: of the criteria, in the same form.
        causes: of missing verdicts: counts by cause, or for each picture and column.
        rewards: ``[n]`` what the policy learns from; by default :func:`lensmini.rewards.aggregate` that renormalises.
        reward_valid: ``[n]`` bool; by default where rewards are finite.
        heldout_rewards: ``[n]`` of a judge that trains nothing, for the same pictures.
        heldout_valid: ``[n]`` bool; by default where they are finite.
        repeat_scores: ``[n, c]`` or ``[r, n, c]``: the judge asked again.
        repeat_valid: the same shape, bool, true where it was asked again and answered; by default where finite.
        variances: ``[n, c]`` of verdicts, NaN where unknown; used where nothing was asked again.
        image_sizes: ``[n, 2]`` height and width in pixels.
        prompt_lengths: ``[n]`` characters or tokens.
        velocity_norms: ``[n]`` of the policy; with ``reference_norms``.
        reference_norms: ``[n]`` of the reference model at the same inputs.
        features: ``[n, d]`` of the pictures.
        controls: rewards of control pictures by kind, None where missing.
        latencies_s: seconds of the judge's calls.
        cost: of the step, in any unit.

    Returns:
        ``step``, ``samples``, ``reward``, ``heldout``, ``groups``, ``coverage``, ``criteria``, ``categories``,
        ``correlation``, ``flips``, ``reliability``, ``resolution``, ``prompt_length``, ``velocity_norm``, ``diversity``,
        ``controls``, ``judge``. An optional part that was not given is None.

    Raises:
        ValueError: if shapes or types differ.

    Example:
        >>> scores = torch.tensor([[1.0, 0.0], [1.0, torch.nan]])
        >>> record = describe_step(
        ...     scores, scores.isfinite(), torch.tensor([0, 0]), step=3, criterion_ids=["count", "text"]
        ... )
        >>> record["criteria"]["count"]["pass_rate"], record["coverage"]["fraction"], record["reward"]["missing"]
        (1.0, 0.75, 1)
    """
    table = read_table(scores, valid, group, weights=weights, pitfalls=pitfalls)
    num = len(table.group)
    if rewards is None:
        # Pitfalls are turned round in the table already.
        found = aggregate(table.good, table.known, table.weights, missing="renormalise")
        rewards, reward_valid = found.values, found.valid
    reward, known = _read_rewards("rewards", rewards, reward_valid, num)
    owners = table.group
    repeats, flips = _read_repeats(table, pitfalls, repeat_scores, repeat_valid), None
    noise: Tensor | float | None = None
    if repeats is not None:
        flips, (noise, _) = flip_rate(*repeats), verdict_noise(*repeats)
    elif variances is not None:
        noise = _fill_variances(table, variances)
    used = table.weights * table.known
    reliability = None
    if noise is not None:
        part = noise[known] if isinstance(noise, Tensor) else noise
        reliability = judge_reliability(reward[known], owners[known], part, weights=used[known])
    norms = None
    if velocity_norms is not None and reference_norms is not None:
        norms = velocity_norm_ratio(velocity_norms, reference_norms)
    diversity = None
    if features is not None:
        diversity = group_diversity(features, owners)
        del diversity["by_group"]
    return {
        "step": step,
        "samples": num,
        "reward": _describe_rewards(reward, known, owners),
        "heldout": _describe_heldout(reward, known, owners, heldout_rewards, heldout_valid),
        "groups": describe_groups(reward, known, owners),
        "coverage": describe_coverage(table, causes),
        "criteria": describe_criteria(table, criterion_ids, causes=_by_picture(causes), repeats=repeats),
        "categories": None
        if categories is None
        else describe_criteria(table, categories, causes=_by_picture(causes), repeats=repeats),
        "correlation": correlate_criteria(table, criterion_ids),
        "flips": flips,
        "reliability": reliability,
        "resolution": None
        if image_sizes is None
        else resolution_bias(reward[known], image_sizes.cpu()[known], owners[known]),
        "prompt_length": None
        if prompt_lengths is None
        else length_bias(reward[known], prompt_lengths.cpu()[known], owners[known]),
        "velocity_norm": norms,
        "diversity": diversity,
        "controls": None if controls is None else describe_controls(controls),
        "judge": _describe_judge(latencies_s, cost),
    }


def describe_groups(rewards: Tensor, valid: Tensor, group: Tensor) -> dict[str, Any]:
    """How many groups can teach anything.

    Args:
        rewards: ``[n]``; anything where not valid.
        valid: ``[n]`` bool.
        group: ``[n]`` integers.

    Returns:
        ``total``; of these ``informative`` (rewards differ), ``constant`` (two or more, all equal), ``single`` and
        ``empty``; and ``constant_share`` of those with two or more.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> known = torch.ones(3, dtype=torch.bool)
        >>> describe_groups(torch.tensor([1.0, 1.0, 0.5]), known, torch.tensor([0, 0, 1]))
        {'total': 2, 'informative': 0, 'constant': 1, 'single': 1, 'empty': 0, 'constant_share': 1.0}
    """
    num = check_shape("rewards", rewards, "n")["n"]
    check_shape("valid", valid, "n", n=num)
    check_shape("group", group, "n", n=num)
    kinds = dict.fromkeys(("informative", "constant", "single", "empty"), 0)
    members = group_members(group)
    for rows in members:
        values = rewards[rows][valid[rows]]
        plural = "constant" if len(values) and bool((values == values[0]).all()) else "informative"
        kinds[("empty", "single")[len(values)] if len(values) < 2 else plural] += 1
    compared = kinds["informative"] + kinds["constant"]
    return {"total": len(members), **kinds, "constant_share": kinds["constant"] / compared if compared else None}


def reward_histogram(rewards: Tensor, *, bins: int = 20, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    """Counts of rewards in equal bins, the last of which holds its upper end.

    Args:
        rewards: ``[n]``, known ones only.
        bins: number of them.
        low: lower end of the first.
        high: upper end of the last.

    Returns:
        ``edges`` (bins + 1), ``counts``, and how many are ``below`` and ``above``.

    Raises:
        ValueError: if there is no bin or no width.

    Example:
        >>> reward_histogram(torch.tensor([0.0, 0.5, 1.0]), bins=2)
        {'edges': [0.0, 0.5, 1.0], 'counts': [1, 2], 'below': 0, 'above': 0}
    """
    if bins < 1 or not low < high:
        raise ValueError(f"bins, low and high: expected at least 1 and low < high, got {bins}, {low}, {high}")
    values = rewards.detach().cpu().double()
    check_shape("rewards", values, "n")
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    inside = values[(values >= low) & (values <= high)]
    index = (torch.bucketize(inside, edges, right=True) - 1).clamp_max(bins - 1)
    return {
        "edges": edges.tolist(),
        "counts": torch.bincount(index, minlength=bins).tolist(),
        "below": int((values < low).sum()),
        "above": int((values > high).sum()),
    }


def _read_rewards(name: str, rewards: Tensor, valid: Tensor | None, num: int) -> tuple[Tensor, Tensor]:
    check_shape(name, rewards, "n", n=num)
    values = rewards.detach().cpu().double()
    known = values.isfinite() if valid is None else valid.detach().cpu()
    check_shape(f"validity of {name}", known, "n", n=num)
    if known.dtype != torch.bool or not bool(values[known].isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers where valid, and validity as bool")
    return values, known


def _describe_rewards(rewards: Tensor, known: Tensor, group: Tensor) -> dict[str, Any]:
    values = rewards[known]
    within, _ = within_group_variance(values, group[known])
    return {
        "mean": float(values.mean()) if len(values) else None,
        "std": float(values.std()) if len(values) > 1 else None,
        "within_std": None if within is None else within**0.5,
        "valid": len(values),
        "missing": len(rewards) - len(values),
        "histogram": reward_histogram(values),
    }


def _describe_heldout(
    rewards: Tensor, known: Tensor, group: Tensor, heldout: Tensor | None, valid: Tensor | None
) -> dict[str, Any] | None:
    """Both judges on the pictures that both know, so that their difference is theirs and not the pictures'."""
    if heldout is None:
        return None
    other, answered = _read_rewards("heldout_rewards", heldout, valid, len(rewards))
    both = known & answered
    values, train = other[both], rewards[both]
    ranks = [rank_correlation(train[m], values[m]) for m in group_members(group[both])]
    kept = [rank for rank in ranks if rank is not None]
    return {
        "mean": float(values.mean()) if len(values) else None,
        "train_mean": float(train.mean()) if len(values) else None,
        "gap": float((train - values).mean()) if len(values) else None,
        "rank_correlation": sum(kept) / len(kept) if kept else None,
        "valid": len(values),
    }


def _read_repeats(
    table: Table, pitfalls: Tensor | None, scores: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The step's own verdicts and those asked again, as repeats ``[1 + r, n, c]``."""
    if scores is None:
        return None
    again = scores.detach().cpu().double()
    again = again[None] if again.ndim == 2 else again
    known = again.isfinite() if valid is None else valid.detach().cpu()
    known = known[None] if known.ndim == 2 else known
    sizes = check_shape("repeat_scores", again, "r n c", n=table.good.shape[0], c=table.good.shape[1])
    check_shape("repeat_valid", known, "r n c", **sizes)
    turned = again if pitfalls is None else torch.where(pitfalls.detach().cpu(), 1 - again, again)
    return torch.cat([table.good[None], turned]), torch.cat([table.known[None], known & table.due])


def _fill_variances(table: Table, variances: Tensor) -> Tensor | None:
    """Variances of verdicts, the mean of what is known where one is not."""
    check_shape("variances", variances, "n c", n=table.good.shape[0], c=table.good.shape[1])
    values = variances.detach().cpu().double()
    known = table.known & values.isfinite()
    return torch.where(known, values, values[known].mean()) if bool(known.any()) else None


def _describe_judge(latencies_s: Sequence[float] | Tensor | None, cost: float | None) -> dict[str, Any] | None:
    if latencies_s is None and cost is None:
        return None
    seconds = torch.as_tensor(latencies_s if latencies_s is not None else [], dtype=torch.float64).cpu()
    at = (
        torch.quantile(seconds, torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist() if len(seconds) else [None] * 2
    )
    return {"latency_p50": at[0], "latency_p95": at[1], "calls": len(seconds), "cost": cost}


def _by_picture(causes: Mapping[str, int] | Causes | None) -> Causes | None:
    return None if isinstance(causes, Mapping) else causes
