"""How good probabilities are, and two numbers that make them honest.

Axes: n answers, k levels, b bins.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lensmini.reduction import holds
from lensmini.shapes import check_shape

__all__ = [
    "BrierParts",
    "Platt",
    "accuracy",
    "brier_decomposition",
    "brier_score",
    "expected_calibration_error",
    "fit_platt",
    "fit_temperature",
]

Binning = Literal["equal_width", "equal_mass"]


class BrierParts(NamedTuple):
    """Murphy's parts of a Brier score.

    Example:
        >>> BrierParts(*torch.tensor([0.0, 0.25, 0.25])).reliability
        tensor(0.)
    """

    reliability: Tensor
    """Mean squared distance between what is said and what happens, lower is better."""
    resolution: Tensor
    """How far apart what happens is between predictions, higher is better."""
    uncertainty: Tensor
    """Variance of what happens: the Brier score of always saying the base rate."""


class Platt(NamedTuple):
    """A calibration: probabilities are ``sigmoid(scale * logit + bias)``.

    Example:
        >>> Platt(torch.tensor(0.5), torch.tensor(0.0)).scale
        tensor(0.5000)
    """

    scale: Tensor
    """Positive, so that no two answers change places; one over the temperature."""
    bias: Tensor
    """In log-odds."""


def accuracy(probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of answers on the right side of one half; an answer of exactly one half is half right.

    Args:
        probabilities: ``[n]`` in [0, 1].
        targets: ``[n]`` in [0, 1], judged by their side too; those of exactly one half have none and do not count.
        weights: ``[n]``, at least 0; none are all 1.

    Returns:
        Scalar; NaN if nothing counts.

    Raises:
        ValueError: if shapes differ or (on the CPU) a number leaves its range.

    Example:
        >>> accuracy(torch.tensor([0.9, 0.4, 0.5]), torch.tensor([1.0, 1.0, 0.0]))
        tensor(0.5000)
    """
    said, true, weight = _read(probabilities, targets, weights)
    right = 0.5 + 0.5 * torch.sign(said - 0.5) * torch.sign(true - 0.5)
    weight = torch.where(true == 0.5, 0.0, weight)
    return (weight * right).sum() / weight.sum()


def brier_score(probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared distance ``(p - y)^2`` (Brier 1950).

    Args:
        probabilities: ``[n]`` in [0, 1].
        targets: ``[n]`` in [0, 1].
        weights: ``[n]``, at least 0; none are all 1.

    Returns:
        Scalar, differentiable; NaN if nothing counts.

    Raises:
        ValueError: if shapes differ or (on the CPU) a number leaves its range.

    Example:
        >>> brier_score(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.0]))
        tensor(0.1250)
    """
    said, true, weight = _read(probabilities, targets, weights)
    return (weight * (said - true).square()).sum() / weight.sum()


def brier_decomposition(probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> BrierParts:
    """The Brier score of yes-or-no targets in parts: ``score = reliability - resolution + uncertainty`` (Murphy 1973).

    Answers are grouped by their exact value, which makes the equation exact; round them first for a coarser view.

    Args:
        probabilities: ``[n]`` in [0, 1].
        targets: ``[n]``, 0 or 1.
        weights: ``[n]``, at least 0; none are all 1.

    Returns:
        The parts.

    Raises:
        ValueError: if shapes differ or (on the CPU) a number leaves its range or a target is neither 0 nor 1.

    Example:
        >>> brier_decomposition(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
        BrierParts(reliability=tensor(0.), resolution=tensor(0.), uncertainty=tensor(0.2500))
    """
    said, true, weight = _read(probabilities, targets, weights)
    if true.device.type == "cpu" and not holds((true == 0) | (true == 1)):
        raise ValueError("targets: expected 0 or 1")
    values, index = said.unique(return_inverse=True)
    mass, happened = _bins(weight, true, index, len(values))
    total = weight.sum()
    rate, base = happened / mass.clamp_min(1e-30), (weight * true).sum() / total
    return BrierParts(
        (mass * (values - rate).square()).sum() / total,
        (mass * (rate - base).square()).sum() / total,
        base * (1 - base),
    )


def expected_calibration_error(
    probabilities: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    num_bins: int = 15,
    binning: Binning = "equal_width",
) -> Tensor:
    """Mean distance between what is said and what happens, over bins of probability: ``sum_b w_b |p_b - y_b|``.

    The estimate is biased upwards by about ``sqrt(p (1 - p) / n_b)`` in each bin, so compare it at equal n.

    Args:
        probabilities: ``[n]`` in [0, 1], of "yes" rather than of the likelier answer.
        targets: ``[n]`` in [0, 1].
        weights: ``[n]``, at least 0; none are all 1.
        num_bins: at least 1; empty ones do not count.
        binning: bins of equal width, or of equally many answers.

    Returns:
        Scalar; NaN if nothing counts.

    Raises:
        ValueError: if shapes differ, an option is unknown, or (on the CPU) a number leaves its range.

    Example:
        >>> said = torch.tensor([0.25, 0.25, 0.25, 0.25])
        >>> expected_calibration_error(said, torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor(0.)
    """
    if num_bins < 1 or binning not in ("equal_width", "equal_mass"):
        raise ValueError(f"num_bins, binning: expected at least 1 and a known name, got {num_bins}, {binning!r}")
    said, true, weight = _read(probabilities, targets, weights)
    if binning == "equal_width":
        index = (said * num_bins).long().clamp_max(num_bins - 1)
    else:
        rank = torch.empty_like(said, dtype=torch.long)
        rank[said.argsort()] = torch.arange(len(said), device=said.device)
        index = rank * num_bins // max(1, len(said))
    _, happened = _bins(weight, true, index, num_bins)
    _, claimed = _bins(weight, said, index, num_bins)
    return (claimed - happened).abs().sum() / weight.sum()


def fit_platt(logits: Tensor, targets: Tensor, weights: Tensor | None = None, *, bias: bool = True) -> Platt:
    """Scale and bias of log-odds with the least cross-entropy on answers that were not trained on (Platt 1999).

    Without a bias it is temperature scaling (Guo et al., 1706.04599). A penalty of 1e-5 on the squared logarithm of the
    scale and on the squared bias keeps both finite where the targets can be told apart without a mistake.

    Args:
        logits: ``[n]``, finite.
        targets: ``[n]`` in [0, 1].
        weights: ``[n]``, at least 0; none are all 1.
        bias: fit one; otherwise it is 0.

    Returns:
        Scalars on the device of the logits, float32 or wider.

    Raises:
        ValueError: if shapes differ, nothing counts, or (on the CPU) a number leaves its range.

    Example:
        >>> logits = torch.tensor([4.0, 4.0, 4.0, -4.0])
        >>> platt = fit_platt(logits, torch.tensor([1.0, 1.0, 0.0, 0.0]), bias=False)
        >>> bool(platt.scale < 1)
        True
    """
    _, true, weight = _read(torch.sigmoid(logits), targets, weights)
    wide = logits.detach().double()
    _check_some(weight, wide)

    def loss(parameters: Tensor) -> Tensor:
        shift = parameters[1] if bias else 0.0
        each = F.binary_cross_entropy_with_logits(parameters[0].exp() * wide + shift, true.double(), reduction="none")
        return (weight * each).sum() / weight.sum()

    scale, shift = _minimise(loss, wide.new_zeros(2))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return Platt(scale.exp().to(dtype), (shift if bias else torch.zeros_like(shift)).to(dtype))


def fit_temperature(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """One over the temperature that gives distributions over levels the least cross-entropy.

    Args:
        logits: ``[n, k]``, finite.
        targets: ``[n, k]`` distributions.
        weights: ``[n]``, at least 0; none are all 1.

    Returns:
        Scalar scale: distributions are ``softmax(scale * logits)``.

    Raises:
        ValueError: if shapes differ, nothing counts, or (on the CPU) a number leaves its range.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
        >>> bool(fit_temperature(logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]])) < 0.1)
        True
    """
    sizes = check_shape("logits", logits, "n k")
    check_shape("targets", targets, "n k", **sizes)
    _, _, weight = _read(targets.sum(1).clamp(0, 1), targets.sum(1).clamp(0, 1), weights)
    wide, true = logits.detach().double(), targets.detach().double()
    _check_some(weight, wide)

    def loss(parameters: Tensor) -> Tensor:
        each = -(true * F.log_softmax(parameters[0].exp() * wide, dim=1)).sum(1)
        return (weight * each).sum() / weight.sum()

    return _minimise(loss, wide.new_zeros(1))[0].exp().to(torch.promote_types(logits.dtype, torch.float32))


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The least of a smooth function of few numbers, with a penalty that keeps it finite."""
    with torch.enable_grad():
        point = start.clone().requires_grad_(True)
        optimiser = torch.optim.LBFGS(
            [point], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = loss(point) + 1e-5 * point.square().sum()
            value.backward()
            return value

        optimiser.step(closure)
    return point.detach()


def _bins(weight: Tensor, values: Tensor, index: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    zeros = weight.new_zeros(num_bins)
    return zeros.index_add(0, index, weight), zeros.index_add(0, index, weight * values)


def _check_some(weight: Tensor, logits: Tensor) -> None:
    if not len(weight) or not math.isfinite(float(logits.sum())) or not float(weight.sum()) > 0:
        raise ValueError(f"logits, weights: expected finite numbers and some weight, got {len(weight)} answers")


def _read(probabilities: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All three in one dtype, float32 at least, with every rule checked."""
    if not probabilities.is_floating_point():
        raise ValueError(f"probabilities: expected floating point, got {probabilities.dtype}")
    sizes = check_shape("probabilities", probabilities, "n")
    check_shape("targets", targets, "n", **sizes)
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    said, true = probabilities.to(dtype), targets.to(dtype)
    weight = torch.ones_like(said) if weights is None else weights.to(dtype)
    check_shape("weights", weight, "n", **sizes)
    if said.device.type == "cpu":
        for name, values in (("probabilities", said), ("targets", true)):
            if not holds((values >= 0) & (values <= 1)):
                raise ValueError(f"{name}: expected numbers in [0, 1]")
        if not holds((weight >= 0) & weight.isfinite()):
            raise ValueError("weights: expected finite numbers, at least 0")
    return said, true, weight
