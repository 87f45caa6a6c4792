"""What a learned reward has to beat: the base rate, and logistic regression on pooled features.

Axes: n answers, a and b features.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lensmini.shapes import check_shape

__all__ = ["base_rates", "fit_logistic", "pool_map", "principal_axes"]


def base_rates(
    keys: Sequence[Hashable], targets: Tensor, asked: Sequence[Hashable], weights: Tensor | None = None
) -> Tensor:
    """The mean target of each key, and the mean of all for a key that was not seen.

    Args:
        keys: n, for example criteria's texts.
        targets: ``[n]``.
        asked: m keys.
        weights: ``[n]``; none are all 1.

    Returns:
        ``[m]`` float64.

    Raises:
        ValueError: if the numbers differ or nothing has weight.

    Example:
        >>> base_rates(["a", "a", "b"], torch.tensor([1.0, 0.0, 1.0]), ["a", "c"])
        tensor([0.5000, 0.6667], dtype=torch.float64)
    """
    check_shape("targets", targets, "n", n=len(keys))
    weight = torch.ones(len(keys)).double() if weights is None else weights.double().cpu()
    if not float(weight.sum()) > 0:
        raise ValueError("weights: expected some weight")
    sums: dict[Hashable, list[float]] = {}
    for key, value, one in zip(keys, targets.tolist(), weight.tolist(), strict=True):
        total = sums.setdefault(key, [0.0, 0.0])
        total[0] += one * value
        total[1] += one
    overall = float((weight * targets.double().cpu()).sum() / weight.sum())
    rates = {key: happened / mass for key, (happened, mass) in sums.items() if mass > 0}
    return torch.tensor([rates.get(key, overall) for key in asked], dtype=torch.float64)


def pool_map(feature_map: Tensor, side: int = 2) -> Tensor:
    """Means over the ``side`` x ``side`` parts of a feature map ``[d, y, x]``, as ``[side^2 d]``.

    Example:
        >>> pool_map(torch.arange(4.0).reshape(1, 2, 2))
        tensor([0., 1., 2., 3.])
    """
    check_shape("feature_map", feature_map, "d y x")
    return F.adaptive_avg_pool2d(feature_map, side).flatten()


def principal_axes(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Mean ``[a]`` and at most ``most`` principal axes ``[a, r]``, scaled so that projections have variance 1.

    Args:
        values: ``[n, a]``.
        most: axes at most; those without variance are left out.

    Returns:
        Mean and axes: features are ``(values - mean) @ axes``.

    Example:
        >>> mean, axes = principal_axes(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), 2)
        >>> mean, axes.abs()
        (tensor([1., 1.]), tensor([[1.],
                [0.]]))
    """
    check_shape("values", values, "n a")
    mean = values.mean(0)
    _, spread, axes = torch.linalg.svd((values - mean).double(), full_matrices=False)
    spread = spread / len(values) ** 0.5
    kept = min(most, int((spread > 1e-6 * spread.max().clamp_min(1e-12)).sum()))
    return mean, (axes[:kept] / spread[:kept, None]).T.to(values.dtype)


def fit_logistic(
    left: Tensor,
    right: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    penalty: float = 1e-3,
    steps: int = 100,
) -> Tensor:
    """Logistic regression on all products of two sets of features: log-odds are ``left_i^T W right_i``.

    With a column of ones in both, that is pictures, criteria and their interaction; with one column of ones as ``right``
    it is plain logistic regression on ``left``. Minimises ``mean BCE + penalty / 2 |W|^2`` by LBFGS, in
    float32 or the wider dtype of ``left``.

    Args:
        left: ``[n, a]``.
        right: ``[n, b]``.
        targets: ``[n]`` in [0, 1].
        weights: ``[n]``; none are all 1.
        penalty: at least 0.
        steps: of LBFGS, at most.

    Returns:
        W ``[a, b]``.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> ones = torch.ones(4, 1)
        >>> fit_logistic(ones, ones, torch.tensor([1.0, 1.0, 1.0, 0.0]), penalty=0.0)  # log 3
        tensor([[1.0986]])
    """
    sizes = check_shape("left", left, "n a")
    check_shape("right", right, "n b", n=sizes["n"])
    check_shape("targets", targets, "n", n=sizes["n"])
    dtype = torch.promote_types(left.dtype, torch.float32)
    one, other, true = (value.detach().to(dtype) for value in (left, right, targets))
    weight = torch.ones_like(true) if weights is None else weights.to(dtype)
    with torch.enable_grad():
        matrix = one.new_zeros(one.shape[1], other.shape[1]).requires_grad_(True)
        optimiser = torch.optim.LBFGS(
            [matrix], max_iter=steps, tolerance_grad=1e-7, tolerance_change=1e-11, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            logits = ((one @ matrix) * other).sum(1)
            each = F.binary_cross_entropy_with_logits(logits, true, reduction="none")
            loss = (weight * each).sum() / weight.sum() + penalty / 2 * matrix.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    return matrix.detach()
