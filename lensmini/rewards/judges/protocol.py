"""What is asked of a judge, and the protocol that all judges have.

Axes: h and w pixels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lensmini.rewards.rubric import Criterion, Rubric
from lensmini.rewards.verdicts import Verdict

__all__ = ["Judge", "JudgeRequest", "JudgeUnavailableError", "judge_pictures"]


class JudgeUnavailableError(RuntimeError):
    """So many of the last questions failed that a run had better stop than train on noise.

    Example:
        >>> raise JudgeUnavailableError("60 of the last 100 questions failed")
        Traceback (most recent call last):
        lensmini.rewards.judges.protocol.JudgeUnavailableError: 60 of the last 100 questions failed
    """


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One question: does this picture meet this criterion?

    Example:
        >>> picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> request = JudgeRequest(image=picture, prompt="A wall.", criterion=Criterion(id="a", text="It is black."))
        >>> len(request.image_hash)
        64
    """

    image: Tensor
    """``[3, h, w]`` uint8: pixels alone, so that no file can carry words along."""
    prompt: str
    """What the picture was asked to show."""
    criterion: Criterion
    """What is judged."""
    repeat: int = 0
    """Asks the same again where it is another number."""

    def __post_init__(self) -> None:
        if (
            self.image.ndim != 3
            or self.image.shape[0] != 3
            or self.image.dtype != torch.uint8
            or not self.image.numel()
        ):
            raise ValueError(f"image: expected uint8 [3, h, w], got {self.image.dtype} {list(self.image.shape)}")

    @cached_property
    def image_hash(self) -> str:
        """SHA-256 of the pixels and their arrangement."""
        size = ",".join(str(side) for side in self.image.shape)
        return hashlib.sha256(size.encode() + b";" + self.image.cpu().contiguous().numpy().tobytes()).hexdigest()


class Judge(Protocol):
    """Anything that answers questions."""

    @property
    def judge_id(self) -> str:
        """Model, revision and instructions: what decides its answers."""
        ...

    def score(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict for each request, in their order; what fails is a missing verdict with its cause."""
        ...


def judge_pictures(judge: Judge, images: Sequence[Tensor], rubrics: Sequence[Rubric]) -> list[list[Verdict]]:
    """All verdicts of n pictures under their rubrics, for :func:`lensmini.rewards.to_matrix`.

    Args:
        judge: whom to ask.
        images: n tensors ``[3, h, w]`` uint8, of any sizes.
        rubrics: n, one for each picture; pictures of one prompt share one.

    Returns:
        For each picture one verdict for each of its criteria.

    Raises:
        ValueError: if the numbers differ, a picture is none, or the judge answers another number of questions.
        JudgeUnavailableError: if the judge says so.

    Example:
        >>> from lensmini.rewards import lens_rubric
        >>> from lensmini.rewards.judges import ProgramJudge
        >>> bright = ProgramJudge(lambda request: float(request.image.float().mean() > 100), judge_id="bright")
        >>> rubric = lens_rubric("A white wall.", {"colour accuracy": "It is bright."})
        >>> said = judge_pictures(bright, [torch.full((3, 4, 4), 255, dtype=torch.uint8)], [rubric])
        >>> [(v.criterion_id, v.score) for v in said[0]]
        [('colour_accuracy', 1.0), ('structural_integrity', 1.0)]
    """
    if len(images) != len(rubrics):
        raise ValueError(f"rubrics: expected one for each of {len(images)} images, got {len(rubrics)}")
    requests = [
        JudgeRequest(image=image, prompt=rubric.prompt, criterion=criterion)
        for image, rubric in zip(images, rubrics, strict=True)
        for criterion in rubric.all_criteria
    ]
    verdicts = iter(_checked(judge.score(requests), requests))
    return [[next(verdicts) for _ in rubric.all_criteria] for rubric in rubrics]


def _checked(verdicts: Sequence[Verdict], requests: Sequence[JudgeRequest]) -> list[Verdict]:
    asked, answered = [r.criterion.id for r in requests], [v.criterion_id for v in verdicts]
    if asked != answered:
        raise ValueError(f"judge: expected {len(asked)} verdicts in the order of the questions, got {len(answered)}")
    return list(verdicts)
