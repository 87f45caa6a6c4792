"""From scores by criterion to one reward by picture, with every rule for what is missing as an argument.

Axes: n pictures, c criteria. ``scores [n, c]`` are in [0, 1] where ``valid [n, c]`` is true, and may hold anything else
elsewhere; ``weights [n, c]`` are 0 for criteria that a picture does not have.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lensmini.reduction import dense_ids, holds
from lensmini.shapes import check_shape

__all__ = ["Aggregate", "Missing", "aggregate", "criterion_advantages"]

Missing = Literal["raise", "drop_sample", "renormalise", "impute_group_mean", "drop_group"]
"""What happens to a picture of which a verdict is missing."""


class Aggregate(NamedTuple):
    """One number by picture, and whether it is known.

    Example:
        >>> Aggregate(torch.tensor([0.5]), torch.tensor([True])).valid.all()
        tensor(True)
    """

    values: Tensor
    """``[n]``, 0 where not valid: hand on the mask."""
    valid: Tensor
    """``[n]`` bool."""


def aggregate(
    scores: Tensor,
    valid: Tensor,
    weights: Tensor | None = None,
    *,
    missing: Missing,
    group: Tensor | None = None,
    min_coverage: float = 0.8,
    pitfalls: Tensor | None = None,
    required: Tensor | None = None,
) -> Aggregate:
    """Weighted mean of scores, with pitfalls turned round and gates multiplied.

    ``sum w s / sum w``, where a pitfall counts as ``1 - s``; times the score of every required criterion. The paper's own
    rule is not written; the plain mean is what it builds on (arXiv 2511.20651).

    Missing verdicts, by ``missing``:

    - ``"raise"``: an error that says how many.
    - ``"drop_sample"``: the picture has no reward.
    - ``"renormalise"``: the mean over what is valid, if that is at least ``min_coverage`` of the weight. A picture that
      lacks a hard criterion gains by it: :func:`criterion_advantages` does not have that fault.
    - ``"impute_group_mean"``: the mean of the criterion over the group's pictures that have it; shrinks the spread.
    - ``"drop_group"``: no picture of the group has a reward.

    Under every rule a picture without any weight, or with a gate that is missing (and not imputed), has no reward.

    Args:
        scores: ``[n, c]``.
        valid: ``[n, c]`` bool.
        weights: ``[n, c]``, at least 0; none are all 1.
        missing: the rule, to be chosen.
        group: ``[n]`` integers, for the rules about groups: pictures of one rubric.
        min_coverage: share of the weight, in (0, 1].
        pitfalls: ``[n, c]`` bool.
        required: ``[n, c]`` bool.

    Returns:
        Rewards in [0, 1] and which are known, differentiable in the scores.

    Raises:
        ValueError: if shapes or types differ, a rule lacks its group, a weight is negative, or (on the CPU) a valid score
            leaves [0, 1].

    Example:
        >>> scores = torch.tensor([[1.0, 0.0], [1.0, torch.nan]])
        >>> aggregate(scores, scores.isfinite(), missing="drop_sample")
        Aggregate(values=tensor([0.5000, 0.0000]), valid=tensor([ True, False]))
    """
    if missing not in ("raise", "drop_sample", "renormalise", "impute_group_mean", "drop_group"):
        raise ValueError(f"missing: expected one of the rules in its docstring, got {missing!r}")
    if not 0 < min_coverage <= 1:
        raise ValueError(f"min_coverage: expected in (0, 1], got {min_coverage}")
    known, weight, good = _read(scores, valid, weights, pitfalls)
    gates = _flags("required", required, scores) & (weight > 0)
    index = _groups(group, scores) if missing in ("impute_group_mean", "drop_group") else None
    lacking = (weight > 0) & ~known
    if missing == "raise" and not holds(~lacking):
        raise ValueError(
            f"valid: expected every verdict, {int(lacking.sum())} of {int((weight > 0).sum())} are missing"
        )
    kept = weight.sum(1) > 0
    if missing == "impute_group_mean":
        assert index is not None
        mean, count = _group_means(good, known & (weight > 0), index)
        filled = lacking & (count > 0)
        good, known = torch.where(filled, mean, good), known | filled
        lacking = lacking & ~filled
    if missing == "renormalise":
        covered = (weight * known).sum(1)
        kept = kept & (covered >= min_coverage * weight.sum(1) * (1 - 1e-6)) & (covered > 0)
    else:
        kept = kept & ~lacking.any(1)
    if missing == "drop_group":
        assert index is not None
        kept = kept & (torch.zeros_like(weight[:, 0]).index_add(0, index, lacking.any(1).to(weight.dtype))[index] == 0)
    kept = kept & ~(gates & ~known).any(1)
    used = weight * known
    mean = (used * good).sum(1) / used.sum(1).clamp_min(torch.finfo(used.dtype).tiny)
    gated = mean * torch.where(gates & known, good, 1.0).prod(1)
    return Aggregate(torch.where(kept, gated, 0.0), kept)


def criterion_advantages(
    scores: Tensor,
    valid: Tensor,
    group: Tensor,
    weights: Tensor | None = None,
    *,
    scale: Literal["none", "group"] = "none",
    std_floor: float = 0.1,
    contrast: bool = False,
    min_coverage: float = 0.0,
    pitfalls: Tensor | None = None,
) -> Aggregate:
    """Each criterion against its own mean in the group, and then the weighted mean over what is valid.

    A picture that lacks a hard criterion does not gain: what is missing is left out of a sum of differences, not of a
    mean of levels. For verdicts that are missing at random the expectation is that of complete ones up to the factor
    ``1 - 1 / valid`` of a mean that contains the picture itself.

    ``scale="group"`` divides each criterion by its std in the group, at least ``std_floor`` (GDPO, arXiv 2601.05242):
    without a floor a criterion on which one of 24 pictures differs would weigh most. ``contrast=True`` multiplies each
    weight by that std instead (POW3R, arXiv 2605.20164): criteria that no longer separate pictures stop counting.

    Args:
        scores: ``[n, c]``; columns mean the same criterion within a group.
        valid: ``[n, c]`` bool.
        group: ``[n]`` integers: pictures of one prompt and rubric.
        weights: ``[n, c]``, at least 0; none are all 1.
        scale: of each criterion.
        std_floor: least divisor, positive.
        contrast: weigh criteria by their spread.
        min_coverage: share of the weight that must be valid, in [0, 1].
        pitfalls: ``[n, c]`` bool.

    Returns:
        Advantages, for :func:`lensmini.objectives.policy.group_advantages` (to be scaled) or as they are. A picture with
        no valid verdict is not valid.

    Raises:
        ValueError: if shapes or types differ, an option is unknown, or (on the CPU) a valid score leaves [0, 1].

    Example:
        >>> scores = torch.tensor([[1.0, 0.0], [0.0, torch.nan]])
        >>> criterion_advantages(scores, scores.isfinite(), torch.tensor([4, 4])).values
        tensor([ 0.2500, -0.5000])
    """
    if scale not in ("none", "group"):
        raise ValueError(f"scale: expected 'none' or 'group', got {scale!r}")
    if not std_floor > 0 or not 0 <= min_coverage <= 1:
        raise ValueError(
            f"std_floor and min_coverage: expected positive and in [0, 1], got {std_floor}, {min_coverage}"
        )
    known, weight, good = _read(scores, valid, weights, pitfalls)
    index = _groups(group, scores)
    counted = known & (weight > 0)
    mean, _ = _group_means(good, counted, index)
    centred = torch.where(counted, good - mean, 0.0)
    if scale == "group" or contrast:
        variance, _ = _group_means(centred.square(), counted, index)
        # The root's slope at zero is infinite: constant criteria stay out of it.
        spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        if scale == "group":
            centred = centred / spread.clamp_min(std_floor)
        if contrast:
            weight = weight * spread
    used, whole = weight * known, weight.sum(1)
    values = (used * centred).sum(1) / torch.where(used.sum(1) > 0, used.sum(1), 1.0)
    kept = counted.any(1)
    if min_coverage > 0:
        kept = kept & (used.sum(1) >= min_coverage * whole * (1 - 1e-6))
    return Aggregate(torch.where(kept, values, 0.0), kept)


def _read(
    scores: Tensor, valid: Tensor, weights: Tensor | None, pitfalls: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which are known, weights, and scores turned so that high is good, 0 where unknown; float32 at least."""
    if not scores.is_floating_point():
        raise ValueError(f"scores: expected floating point, got {scores.dtype}")
    sizes = check_shape("scores", scores, "n c")
    check_shape("valid", valid, "n c", **sizes)
    if valid.dtype != torch.bool:
        raise ValueError(f"valid: expected bool, got {valid.dtype}")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weight = torch.ones_like(scores, dtype=dtype) if weights is None else weights.to(dtype)
    check_shape("weights", weight, "n c", **sizes)
    if weight.device.type == "cpu" and not holds((weight >= 0) & weight.isfinite()):
        raise ValueError("weights: expected finite numbers, at least 0")
    values = torch.where(valid, scores.to(dtype), 0.0)
    if values.device.type == "cpu" and not holds((values >= 0) & (values <= 1)):
        raise ValueError("scores: expected numbers in [0, 1] where valid is true")
    turned = torch.where(_flags("pitfalls", pitfalls, scores), 1 - values, values)
    return valid, weight, torch.where(valid, turned, 0.0)


def _flags(name: str, flags: Tensor | None, like: Tensor) -> Tensor:
    if flags is None:
        return torch.zeros_like(like, dtype=torch.bool)
    check_shape(name, flags, "n c", n=like.shape[0], c=like.shape[1])
    if flags.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool, got {flags.dtype}")
    return flags


def _groups(group: Tensor | None, scores: Tensor) -> Tensor:
    if group is None:
        raise ValueError("group: expected ids [n] for a rule about groups, got None")
    check_shape("group", group, "n", n=scores.shape[0])
    if group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group: expected integer ids, got {group.dtype}")
    return dense_ids(group)


def _group_means(values: Tensor, counted: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each column over the group's counted rows, and how many there are; for every row."""
    zeros = torch.zeros_like(values)
    total = zeros.index_add(0, index, torch.where(counted, values, 0.0))
    count = zeros.index_add(0, index, counted.to(values.dtype))
    return (total / count.clamp_min(1))[index], count[index]
