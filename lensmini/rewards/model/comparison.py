"""A learned reward beside what it has to beat, on verdicts that neither was fitted on.

Axes: q answers, n pictures, a and b features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lensmini.rewards.model.baselines import base_rates, fit_logistic, pool_map, principal_axes
from lensmini.rewards.model.head import mean_words
from lensmini.rewards.model.judged import KnownVerdicts, Questions
from lensmini.rewards.model.metrics import accuracy, brier_score, expected_calibration_error, fit_platt
from lensmini.rewards.model.predictor import RubricRewardModel

__all__ = ["Answers", "Scorecard", "compare"]

_AXES = 64


class Scorecard(NamedTuple):
    """How good predictions are.

    Example:
        >>> Scorecard(0.9, 0.1, 0.02, 100).num
        100
    """

    accuracy: float
    brier: float
    calibration_error: float
    """Expected calibration error, 15 bins of equal width."""
    num: int
    """Known verdicts."""


class Answers(NamedTuple):
    """Known verdicts and what was predicted, one row each, picture by picture.

    Example:
        >>> Answers(torch.tensor([0.9]), torch.tensor([1.0]), torch.tensor([1.0]), ["count"], [0]).scorecard().accuracy
        1.0
    """

    scores: Tensor
    """``[q]`` predictions in [0, 1]."""
    targets: Tensor
    """``[q]`` verdicts in [0, 1]."""
    weights: Tensor
    """``[q]``."""
    categories: list[str]
    """Of the criteria."""
    pictures: list[int]
    """Which picture, among those with a known verdict: answers about one are not independent."""

    def scorecard(self, category: str | None = None) -> Scorecard:
        """All measures, of one category or of everything."""
        rows = torch.tensor([category in (None, one) for one in self.categories], device=self.scores.device)
        chosen = [value[rows] for value in (self.scores, self.targets, self.weights)]
        right, brier, gap = (float(m(*chosen)) for m in (accuracy, brier_score, expected_calibration_error))
        return Scorecard(right, brier, gap, int(rows.sum()))


@torch.no_grad()
def compare(
    model: RubricRewardModel, train: KnownVerdicts, calibration: KnownVerdicts, *held_out: KnownVerdicts
) -> list[dict[str, Answers]]:
    """What a trained model and simpler predictors say of held-out verdicts, all of them calibrated on the same ones.

    ``majority`` is one base rate, ``by_criterion`` a base rate for each criterion's text. The two logistic regressions see
    feature maps pooled over 2 x 2 parts and the mean text features, each reduced to at most 64 principal axes: ``additive``
    their sum, ``logistic`` also every product of one of each, without which a picture and a question cannot meet. The rates
    are of ``calibration``; the regressions learn from ``train`` and have scale and bias fitted on ``calibration``.

    Args:
        model: trained.
        train: what it was trained on.
        calibration: what it was calibrated on; asked as ``held_out`` is.
        held_out: what is measured, set by set.

    Returns:
        For each set answers by name: ``model``, ``uncalibrated`` and the four others.

    Example:
        >>> list(compare.__annotations__)
        ['model', 'train', 'calibration', 'held_out', 'return']
    """
    if not held_out:
        return []
    seen, simple = train.ask_all(model), _Simple(model, train)
    (left, right), ones = simple.features(train), torch.ones(len(seen.scores), 1, device=seen.scores.device)
    products = fit_logistic(left, right, seen.scores, seen.weights)
    additive = fit_logistic(torch.cat([left, right[:, 1:]], 1), ones, seen.scores, seen.weights)

    def simple_logits(data: KnownVerdicts) -> dict[str, Tensor]:
        left, right = simple.features(data)
        both = torch.cat([left, right[:, 1:]], 1)
        return {"logistic": ((left @ products) * right).sum(1), "additive": (both @ additive)[:, 0]}

    fresh, texts = calibration.ask_all(model), _texts(calibration)
    platts = {name: fit_platt(each, fresh.scores, fresh.weights) for name, each in simple_logits(calibration).items()}
    found = []
    for data in held_out:
        known, asked = data.ask_all(model), _texts(data)
        said = {
            "model": _chance(model, known, model.calibration),
            "uncalibrated": _chance(model, known, torch.tensor([1.0, 0.0, 1.0])),
            "majority": base_rates([0] * len(texts), fresh.scores, [0] * len(asked), fresh.weights),
            "by_criterion": base_rates(texts, fresh.scores, asked, fresh.weights),
        }
        for name, each in simple_logits(data).items():
            said[name] = torch.sigmoid(platts[name].scale * each + platts[name].bias)
        facts = (
            known.scores.double(),
            known.weights.double(),
            [one.category for row in data.criteria for one in row],
            [index for index, row in enumerate(data.criteria) for _ in row],
        )
        found.append({name: Answers(scores.to(facts[0]), *facts) for name, scores in said.items()})
    return found


def _texts(data: KnownVerdicts) -> list[str]:
    return [one.text for row in data.criteria for one in row]


def _chance(model: RubricRewardModel, known: Questions, calibration: Tensor) -> Tensor:
    """Expected scores ``[q]`` under a calibration."""
    scale, bias, level_scale = calibration
    marks = torch.linspace(0, 1, model.config.num_levels, dtype=known.raw.dtype, device=known.raw.device)
    graded = (level_scale * known.raw[:, 1:]).softmax(-1) @ marks
    return torch.where(known.graded, graded, torch.sigmoid(scale * known.raw[:, 0] + bias))


class _Simple:
    """Pooled pictures and texts on the principal axes of the training set."""

    def __init__(self, model: RubricRewardModel, train: KnownVerdicts) -> None:
        self.model = model
        self.image_axes = principal_axes(torch.stack([pool_map(one) for one in train.maps]), _AXES)
        self.text_axes = principal_axes(self._means(list(dict.fromkeys(_texts(train)))), _AXES)

    def features(self, data: KnownVerdicts) -> tuple[Tensor, Tensor]:
        """Of pictures ``[q, a]`` and texts ``[q, b]``, a row for each question, with a column of ones in front."""
        unique = {text: index for index, text in enumerate(dict.fromkeys(_texts(data)))}
        rows = [[index for index, row in enumerate(data.criteria) for _ in row], [unique[one] for one in _texts(data)]]
        sides = []
        for values, (mean, axes), which in zip(
            (torch.stack([pool_map(one) for one in data.maps]), self._means(list(unique))),
            (self.image_axes, self.text_axes),
            rows,
            strict=True,
        ):
            projected = ((values - mean) @ axes)[torch.tensor(which, device=values.device)]
            sides.append(torch.cat([projected.new_ones(len(projected), 1), projected], 1))
        return sides[0], sides[1]

    def _means(self, texts: list[str]) -> Tensor:
        return mean_words(*self.model.read_texts(texts))
