"""Verdicts to learn from or to be measured by: only what is known, as questions and numbers.

Axes: n pictures, c questions of the longest list, q answers, k levels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lensmini.rewards.model.predictor import RubricRewardModel
from lensmini.rewards.rubric import Criterion, Rubric
from lensmini.rewards.verdicts import Verdict, to_matrix

__all__ = ["Judged", "KnownVerdicts", "Questions"]

_CHUNK = 64


class Judged(NamedTuple):
    """Pictures, what they were judged by, and how. What is missing or does not apply counts for nothing.

    Example:
        >>> Judged([], [], []).weights is None
        True
    """

    images: Sequence[Tensor]
    """n, as :class:`RubricRewardModel` takes them."""
    rubrics: Sequence[Rubric]
    """n, one for each picture."""
    verdicts: Sequence[Sequence[Verdict]]
    """For each picture one for each of its criteria, as :func:`lensmini.rewards.judges.judge_pictures` gives them."""
    weights: Sequence[float] | None = None
    """Of the pictures, at least 0; none are all 1. A verdict's weight is its picture's times its criterion's."""


class Questions(NamedTuple):
    """Raw answers of a model and what is known, ``[n, c]`` with padding or ``[q]`` without.

    Example:
        >>> Questions(*[torch.zeros(1, 2)] * 5).scores.shape
        torch.Size([1, 2])
    """

    raw: Tensor
    """``[..., 1 + k]`` of :meth:`RubricRewardModel.raw`."""
    scores: Tensor
    """Verdicts in [0, 1], 0 at padding."""
    valid: Tensor
    """Bool: not padding."""
    weights: Tensor
    """Positive, 0 at padding."""
    graded: Tensor
    """Bool: not a yes-or-no criterion."""


class KnownVerdicts:
    """The known verdicts of judged pictures, with the pictures' feature maps.

    A verdict that is missing, does not apply or has no weight is not asked about at all, so it cannot have an influence;
    a picture without any other is left out.

    Args:
        model: computes the features, once.
        judged: what is known.
        name: for messages.

    Attributes:
        maps: feature maps ``[d, y_i, x_i]``.
        criteria: of each picture.
        prompts: of each picture.

    Raises:
        ValueError: if numbers differ, a weight is negative or not finite, or nothing is known.

    Example:
        >>> KnownVerdicts(None, Judged([], [], []), "train")
        Traceback (most recent call last):
        ...
        ValueError: train: expected at least one known verdict of positive weight, got none
    """

    def __init__(self, model: RubricRewardModel, judged: Judged, name: str) -> None:
        counts = [len(column) for column in judged if column is not None]
        if len(set(counts)) > 1:
            raise ValueError(f"{name}: expected equally many images, rubrics, verdicts (and weights), got {counts}")
        self.criteria: list[list[Criterion]] = []
        self.prompts: list[str] = []
        self._numbers: list[list[tuple[float, float]]] = []
        kept = []
        for index, (rubric, given) in enumerate(zip(judged.rubrics, judged.verdicts, strict=True)):
            share = 1.0 if judged.weights is None else float(judged.weights[index])
            if not 0 <= share < float("inf"):
                raise ValueError(f"{name}.weights[{index}]: expected a finite number, at least 0, got {share}")
            table = to_matrix([given], [rubric])
            scores, valid, weights = (column[0].tolist() for column in table[:3])
            chosen = [column for column, known in enumerate(valid) if known and share * weights[column] > 0]
            if chosen:
                kept.append(index)
                self.criteria.append([rubric.all_criteria[column] for column in chosen])
                self.prompts.append(rubric.prompt)
                self._numbers.append([(scores[column], share * weights[column]) for column in chosen])
        if not kept:
            raise ValueError(f"{name}: expected at least one known verdict of positive weight, got none")
        chunks = [kept[first : first + _CHUNK] for first in range(0, len(kept), _CHUNK)]
        with torch.no_grad():
            self.maps = [one for part in chunks for one in model.read_images([judged.images[index] for index in part])]

    def ask(self, model: RubricRewardModel, members: Sequence[int], maps: Sequence[Tensor] | None = None) -> Questions:
        """Ask a model about some pictures, ``[n, c]``; with other feature maps if they are given."""
        criteria = [self.criteria[index] for index in members]
        maps = [self.maps[index] for index in members] if maps is None else maps
        raw, asked = model.raw(maps, criteria, [self.prompts[index] for index in members])
        pad = (0.0, 0.0)
        rows = [[*self._numbers[index], *[pad] * (asked.shape[1] - len(self._numbers[index]))] for index in members]
        graded = [[one.scale != "binary" for one in row] + [False] * (asked.shape[1] - len(row)) for row in criteria]
        scores, weights = torch.tensor(rows, dtype=raw.dtype, device=raw.device).unbind(-1)
        return Questions(raw, scores, asked, weights, torch.tensor(graded, device=raw.device))

    @torch.no_grad()
    def ask_all(self, model: RubricRewardModel) -> Questions:
        """Ask about every picture, ``[q]``, picture by picture."""
        parts = []
        for first in range(0, len(self.maps), _CHUNK):
            questions = self.ask(model, range(first, min(first + _CHUNK, len(self.maps))))
            parts.append([value[questions.valid] for value in questions])
        return Questions(*(torch.cat(column) for column in zip(*parts, strict=True)))
