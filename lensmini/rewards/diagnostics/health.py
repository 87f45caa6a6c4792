"""Health of the policy itself: how large its velocities have become, and how different the pictures of a prompt still are.

Axes: n pictures, d features.
"""

from typing import Any

import torch
from torch import Tensor

from lensmini.rewards.diagnostics.estimates import group_members, mean_interval
from lensmini.shapes import check_shape

__all__ = ["group_diversity", "velocity_norm_ratio"]


def velocity_norm_ratio(norms: Tensor, reference_norms: Tensor, *, level: float = 0.95) -> dict[str, Any]:
    """How much longer the policy's velocities are than the reference model's: geometric mean of ``|v| / |v_ref|``.

    Growth beyond 5 to 15 per cent goes with burnt colours and lost detail while rewards still rise. At equal noise levels and
    inputs, please: norms differ between them far more than between models.

    Args:
        norms: ``[n]`` of the policy, at least 0; NaN or Inf where unknown.
        reference_norms: ``[n]`` of the reference at the same inputs.
        level: of the interval, Student's on logarithms.

    Returns:
        ``ratio``, ``low``, ``high``, ``largest``, ``samples`` and ``left_out`` (not positive or not finite).

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> velocity_norm_ratio(torch.tensor([2.0, 8.0]), torch.tensor([1.0, 16.0]))["ratio"]
        1.0
    """
    num = check_shape("norms", norms, "n")["n"]
    check_shape("reference_norms", reference_norms, "n", n=num)
    first, second = norms.detach().cpu().double(), reference_norms.detach().cpu().double()
    usable = (first > 0) & (second > 0) & first.isfinite() & second.isfinite()
    logs = (first[usable] / second[usable]).log()
    found = mean_interval(logs.tolist(), level=level)
    ends = {
        name: None if found[key] is None else float(torch.tensor(found[key], dtype=torch.float64).exp())
        for name, key in (("ratio", "mean"), ("low", "low"), ("high", "high"))
    }
    largest = float(logs.max().exp()) if len(logs) else None
    return {**ends, "largest": largest, "samples": len(logs), "left_out": num - len(logs)}


def group_diversity(features: Tensor, group: Tensor, *, level: float = 0.95) -> dict[str, Any]:
    """Mean distance between two pictures of a prompt in a feature space; first each group's mean, then theirs.

    Each group counts once, however large. Features are used as they are: normalise them for a distance of angles. Falling
    diversity under a rising reward is a policy that has found one answer to each prompt.

    Args:
        features: ``[n, d]``, finite.
        group: ``[n]`` integers.
        level: of the interval over groups.

    Returns:
        ``mean``, ``low``, ``high``, ``groups`` (of two or more) and ``by_group``: the mean distance by the group's id as text.

    Raises:
        ValueError: if shapes differ or a feature is not finite.

    Example:
        >>> found = group_diversity(torch.tensor([[0.0], [2.0], [9.0]]), torch.tensor([4, 4, 5]))
        >>> found["mean"], found["groups"], found["by_group"]
        (2.0, 1, {'4': 2.0})
    """
    sizes = check_shape("features", features, "n d")
    check_shape("group", group, "n", n=sizes["n"])
    values = features.detach().cpu().double()
    if not bool(values.isfinite().all()):
        raise ValueError("features: expected finite numbers")
    owners = group.detach().cpu()
    # pdist measures each pair itself; a distance by way of products would lose those of near twins.
    by_group = {
        str(int(owners[members[0]])): float(torch.pdist(values[members]).mean())
        for members in group_members(owners)
        if len(members) > 1
    }
    found = mean_interval(list(by_group.values()), level=level)
    return {key: found[key] for key in ("mean", "low", "high")} | {"groups": len(by_group), "by_group": by_group}
