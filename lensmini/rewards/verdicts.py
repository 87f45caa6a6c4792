"""What a judge says: a score, "does not apply", or "not known, because"; and verdicts as tensors.

Axes: n pictures, c criteria of the longest rubric.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lensmini.rewards.rubric import Rubric

__all__ = ["CAUSES", "ScoreTable", "Verdict", "to_matrix"]

CAUSES = (
    "timeout",
    "connection",
    "http",
    "rate_limit",
    "refusal",
    "unparsable",
    "out_of_range",
    "image_error",
    "budget",
    "deadline",
    "injection",
    "unavailable",
    "error",
)
"""Why a verdict may be missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One answer about one picture and one criterion. What is not known has a cause and never a number.

    Example:
        >>> Verdict(criterion_id="count", state="missing", cause="timeout").score is None
        True
        >>> Verdict(criterion_id="count", state="missing", cause="timeout", score=0.0)
        Traceback (most recent call last):
        ...
        ValueError: score of count: expected None for a verdict that is missing, got 0.0
    """

    criterion_id: str
    """Of the criterion."""
    state: Literal["scored", "not_applicable", "missing"]
    """Whether there is a score, none is due, or none could be had."""
    score: float | None = None
    """In [0, 1], high for a high answer (a pitfall that is there has 1)."""
    variance: float | None = None
    """Of the score, from answer probabilities or repeats."""
    cause: str | None = None
    """One of ``CAUSES``, where the state is missing."""
    reason: str = ""
    """The judge's words, or the error's."""
    attempts: int = 0
    """Requests that were made."""
    latency_s: float = 0.0
    """Of the last of them."""
    judge_id: str = ""
    """Who answered."""
    cached: bool = False
    """Whether the answer was known already."""

    def __post_init__(self) -> None:
        if self.state not in ("scored", "not_applicable", "missing"):
            raise ValueError(
                f"state of {self.criterion_id}: expected scored, not_applicable or missing, got {self.state!r}"
            )
        if self.state == "scored":
            number = self.score
            if not isinstance(number, int | float) or not 0 <= number <= 1:  # NaN is not either
                raise ValueError(f"score of {self.criterion_id}: expected a number in [0, 1], got {number}")
        elif self.score is not None or self.variance is not None:
            raise ValueError(
                f"score of {self.criterion_id}: expected None for a verdict that is {self.state}, got {self.score}"
            )
        if self.variance is not None and not (math.isfinite(self.variance) and self.variance >= 0):
            raise ValueError(f"variance of {self.criterion_id}: expected at least 0, got {self.variance}")
        if (self.state == "missing") != (self.cause is not None) or (self.cause and self.cause not in CAUSES):
            raise ValueError(
                f"cause of {self.criterion_id}: expected one of {CAUSES} where missing, else None, got {self.cause!r}"
            )


class ScoreTable(NamedTuple):
    """Verdicts as tensors, columns in the order of each rubric's criteria, short rubrics padded.

    Example:
        >>> ScoreTable(*[torch.zeros(1, 2)] * 5, {}).scores.shape
        torch.Size([1, 2])
    """

    scores: Tensor
    """``[n, c]`` float32; NaN where not valid, so that a forgotten mask shows."""
    valid: Tensor
    """``[n, c]`` bool."""
    weights: Tensor
    """``[n, c]`` float32; 0 where the criterion does not apply or is padding."""
    pitfalls: Tensor
    """``[n, c]`` bool: a high score is bad."""
    required: Tensor
    """``[n, c]`` bool: gates."""
    causes: dict[str, int]
    """Missing verdicts by cause."""


def to_matrix(verdicts: Sequence[Sequence[Verdict]], rubrics: Sequence[Rubric]) -> ScoreTable:
    """Verdicts of n pictures under their rubrics as tensors for :func:`lensmini.rewards.aggregate`.

    Args:
        verdicts: for each picture, exactly one for each criterion of its rubric, in any order.
        rubrics: n, one for each picture.

    Returns:
        The table.

    Raises:
        ValueError: if a picture has a verdict too many, too few, or of another rubric.

    Example:
        >>> from lensmini.rewards import lens_rubric
        >>> rubric = lens_rubric("Two cups.", {"object count": "Exactly two."})
        >>> said = [Verdict(criterion_id="structural_integrity", state="scored", score=1.0)]
        >>> said += [Verdict(criterion_id="object_count", state="missing", cause="refusal")]
        >>> table = to_matrix([said], [rubric])
        >>> table.scores, table.causes
        (tensor([[nan, 1.]]), {'refusal': 1})
    """
    if len(verdicts) != len(rubrics) or not rubrics:
        raise ValueError(f"verdicts: expected one sequence for each of {len(rubrics)} rubrics, got {len(verdicts)}")
    width = max(len(rubric.all_criteria) for rubric in rubrics)
    shape = len(rubrics), width
    scores, weights = torch.full(shape, math.nan), torch.zeros(shape)
    valid, pitfalls, required = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    causes: Counter[str] = Counter()
    for row, (given, rubric) in enumerate(zip(verdicts, rubrics, strict=True)):
        by_id = {verdict.criterion_id: verdict for verdict in given}
        wanted = [criterion.id for criterion in rubric.all_criteria]
        if sorted(wanted) != sorted(verdict.criterion_id for verdict in given):
            raise ValueError(
                f"verdicts[{row}]: expected one for each of {wanted}, got {[verdict.criterion_id for verdict in given]}"
            )
        for column, criterion in enumerate(rubric.all_criteria):
            verdict = by_id[criterion.id]
            if verdict.state == "missing":
                causes[str(verdict.cause)] += 1
            if verdict.score is not None:
                scores[row, column], valid[row, column] = verdict.score, True
            if verdict.state != "not_applicable":
                weights[row, column] = criterion.weight
                pitfalls[row, column] = criterion.polarity == "pitfall"
                required[row, column] = criterion.required
    return ScoreTable(scores, valid, weights, pitfalls, required, dict(causes))
