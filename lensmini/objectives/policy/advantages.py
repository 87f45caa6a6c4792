"""From rewards to advantages: each sample against the others of its prompt.

Axes: b samples of one step, all ranks together.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lensmini.reduction import dense_ids, holds
from lensmini.shapes import check_shape

__all__ = ["GroupCounts", "count_groups", "group_advantages", "optimality"]


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    mask: Tensor | None = None,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["group", "batch", "none"] = "batch",
    correction: int = 0,
    eps: float = 1e-4,
) -> Tensor:
    """How much better a sample is than its group: ``(reward - baseline) / (std + eps)``.

    Groups are named by ids, in any order, so a group may have any size and its samples any resolution. The mean
    baseline contains the sample itself and shrinks the policy gradient by ``1 - 1 / G``; leaving it out is unbiased.
    A missing reward is no number: it has advantage 0 and takes part in no mean and no std. Groups without spread, or
    with one valid member, give exactly 0.

    Published settings: Flow-GRPO and DiffusionNFT ``scale="batch", eps=1e-4``; DanceGRPO
    ``scale="group", correction=1, eps=1e-8``; Dr.GRPO ``scale="none"``; RLOO ``baseline="leave_one_out", scale="none"``.

    Args:
        rewards: ``[b]``, of all ranks; masked ones may hold anything.
        group: ``[b]``, integers; equal for samples of one prompt.
        mask: ``[b]`` bool, true where the reward is known; none if all are.
        baseline: the mean of the group's valid rewards, or of the others'.
        scale: divide by the std of the sample's group, of all valid rewards, or not at all.
        correction: 0 for the plain std, 1 for Bessel's (``torch.std``'s default); a std over too few is 0.
        eps: added to the std, at least 0.

    Returns:
        ``[b]``, the dtype of ``rewards``, float32 at least; no gradient. On the CPU bit-equal, for what is valid, to
        the advantages of the valid samples alone.

    Raises:
        ValueError: if shapes differ, ids are not integers, an option is unknown, ``eps`` or ``correction`` is negative,
            or (on the CPU) a reward that is not masked is not finite.

    Example:
        >>> rewards, group = torch.tensor([1.0, 3.0, 5.0, torch.nan]), torch.tensor([7, 7, 2, 2])
        >>> group_advantages(rewards, group, mask=rewards.isfinite(), scale="none")
        tensor([-1.,  1.,  0.,  0.])
    """
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline: expected 'mean' or 'leave_one_out', got {baseline!r}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    if correction < 0 or not 0 <= eps < float("inf"):
        raise ValueError(f"correction and eps: expected at least 0, got {correction} and {eps}")
    valid = _check(rewards, group, mask)
    if not len(rewards):
        return rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    # float64, and relative to the smallest valid reward of the group: equal rewards then differ by exactly zero.
    values = torch.where(valid, rewards.detach().double(), 0.0)
    index = dense_ids(group)
    count = torch.zeros_like(values).index_add(0, index, valid.double())
    lowest = torch.full_like(values, torch.inf).scatter_reduce(
        0, index, torch.where(valid, values, torch.inf), "amin", include_self=True
    )
    above = torch.where(valid, values - lowest[index], 0.0)
    mean = torch.zeros_like(values).index_add(0, index, above) / count.clamp_min(1)
    centred = torch.where(valid, above - mean[index], 0.0)
    if scale == "group":
        squares = torch.zeros_like(values).index_add(0, index, centred.square())
        spread = _std(squares, count, correction)[index]
    elif scale == "batch":
        total = valid.double().sum()
        smallest = torch.where(valid, values, torch.inf).min()
        height = torch.where(valid, values - smallest, 0.0)
        deviation = torch.where(valid, height - _ordered_sum(height) / total.clamp_min(1), 0.0)
        spread = _std(_ordered_sum(deviation.square()), total, correction).expand_as(values)
    else:
        spread, eps = torch.ones_like(values), 0.0
    members = count[index]
    if baseline == "leave_one_out":
        centred = torch.where(members > 1, centred * members / (members - 1).clamp_min(1), 0.0)
    advantages = torch.where(spread > 0, centred / (spread + eps), 0.0)
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32))


class GroupCounts(NamedTuple):
    """How many groups of a step can teach anything.

    Example:
        >>> count_groups(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 0, 1]))
        GroupCounts(groups=2, informative=0, constant=1, single=1, empty=0, missing=0)
    """

    groups: int
    """Groups in all."""
    informative: int
    """With rewards that differ."""
    constant: int
    """With two or more valid rewards, all equal: free compute, and the majority late in training."""
    single: int
    """With one valid reward."""
    empty: int
    """With none."""
    missing: int
    """Samples (not groups) without a reward."""


def count_groups(rewards: Tensor, group: Tensor, *, mask: Tensor | None = None) -> GroupCounts:
    """Count groups by what they can teach: what the log of a step should show.

    Args:
        rewards: ``[b]``; masked ones may hold anything.
        group: ``[b]``, integers.
        mask: ``[b]`` bool, true where the reward is known.

    Returns:
        Counts; the four kinds of groups add up to ``groups``.

    Raises:
        ValueError: as for :func:`group_advantages`.

    Example:
        >>> count_groups(torch.tensor([1.0, 2.0]), torch.tensor([5, 5])).informative
        1
    """
    valid = _check(rewards, group, mask)
    ids, index = torch.unique(group, return_inverse=True)
    start = torch.zeros(len(ids), dtype=torch.float64, device=rewards.device)
    count = start.index_add(0, index, valid.double())
    values = rewards.detach().double()
    low, high = (
        torch.full_like(start, -sign * torch.inf).scatter_reduce(
            0, index, torch.where(valid, values, -sign * torch.inf), kind, include_self=True
        )
        for sign, kind in ((-1, "amin"), (1, "amax"))
    )
    kinds = ((count > 1) & (high > low), (count > 1) & (high == low), count == 1, count == 0)
    informative, constant, single, empty = (int(kind.sum()) for kind in kinds)
    return GroupCounts(len(ids), informative, constant, single, empty, int((~valid).sum()))


def optimality(advantage: Tensor, clip: float = 5.0, *, mask: Tensor | None = None) -> Tensor:
    """DiffusionNFT's probability of being good: ``1/2 + clip(A, -c, c) / (2 c)`` (arXiv 2509.16117).

    With ``c = 5`` and advantages over the batch's std, as in the published code, a sample one std above its group has
    0.6. A half says nothing: the loss then keeps the policy where it is.

    Args:
        advantage: ``[b]``, or any shape.
        clip: c, positive.
        mask: bool in that shape, true where the advantage is known; the rest gives 1/2 and must be masked in the loss.

    Returns:
        In [0, 1], the shape of ``advantage``, float32 at least; no gradient.

    Raises:
        ValueError: if ``clip`` is not positive, shapes differ, or (on the CPU) an advantage that is not masked is NaN.

    Example:
        >>> optimality(torch.tensor([-7.0, 0.0, 1.0]))
        tensor([0.0000, 0.5000, 0.6000])
    """
    if not 0 < clip < float("inf"):
        raise ValueError(f"clip: expected a positive number, got {clip}")
    if not advantage.is_floating_point():
        raise ValueError(f"advantage: expected floating point, got {advantage.dtype}")
    values = advantage.detach().to(torch.promote_types(advantage.dtype, torch.float32))
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != advantage.shape:
            raise ValueError(f"mask: expected bool {list(advantage.shape)}, got {mask.dtype} {list(mask.shape)}")
        values = torch.where(mask, values, 0.0)
    if values.device.type == "cpu" and not holds(~values.isnan()):
        raise ValueError("advantage: expected numbers, got NaN: mask what is missing")
    return 0.5 + values.clamp(-clip, clip) / (2 * clip)


def _check(rewards: Tensor, group: Tensor, mask: Tensor | None) -> Tensor:
    if not rewards.is_floating_point():
        raise ValueError(f"rewards: expected floating point, got {rewards.dtype}")
    num = check_shape("rewards", rewards, "b")["b"]
    check_shape("group", group, "b", b=num)
    if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        raise ValueError(f"group: expected integer ids, got {group.dtype}")
    if mask is None:
        valid = torch.ones_like(rewards, dtype=torch.bool)
    else:
        check_shape("mask", mask, "b", b=num)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected bool (true = known), got {mask.dtype}")
        valid = mask
    if rewards.device.type == "cpu" and not holds(rewards.isfinite() | ~valid):
        wrong = (~rewards.isfinite() & valid).nonzero()[:, 0].tolist()
        raise ValueError(f"rewards: expected finite numbers where the mask is true, got others at {wrong[:10]}")
    return valid


def _ordered_sum(values: Tensor) -> Tensor:
    """A sum in the order of samples: zeros in between do not change its bits, as they would in a tree."""
    return torch.zeros_like(values[:1]).index_add(0, torch.zeros_like(values, dtype=torch.int64), values)[0]


def _std(squares: Tensor, count: Tensor, correction: int) -> Tensor:
    degrees = count - correction
    return torch.where(degrees > 0, squares / degrees.clamp_min(1), 0.0).sqrt()
