"""Asking again where it matters: pictures of a group that tie or nearly tie, and a random sample to measure flips.

Axes: n pictures.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, variance
from typing import NamedTuple

import torch
from torch import Tensor

from lensmini.rewards.judges.protocol import Judge, JudgeRequest
from lensmini.rewards.rubric import Rubric
from lensmini.rewards.verdicts import Verdict
from lensmini.shapes import check_shape

__all__ = ["Repeated", "nearest_in_group", "repeat_near_ties"]


class Repeated(NamedTuple):
    """Verdicts after some were asked again."""

    verdicts: list[list[Verdict]]
    """For each picture as before; those asked again have the mean score, and the variance of that mean."""
    pairs: list[tuple[Verdict, Verdict]]
    """First and second answer to a random sample of all questions, for :func:`lensmini.rewards.diagnostics.flip_rate`."""
    asked: int
    """Questions that were asked again."""
    near: Tensor
    """``[n]`` bool: pictures that were judged again as a whole."""


def nearest_in_group(rewards: Tensor, group: Tensor) -> Tensor:
    """Distance of each reward to the nearest other one of its group.

    Args:
        rewards: ``[n]``; NaN where not known.
        group: ``[n]`` integers.

    Returns:
        ``[n]`` in float64; infinite where there is no other, or it is not known itself.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> nearest_in_group(torch.tensor([0.5, 0.75, 0.5, 1.0]), torch.tensor([0, 0, 0, 1]))
        tensor([0.0000, 0.2500, 0.0000,    inf], dtype=torch.float64)
    """
    check_shape("group", group, "n", **check_shape("rewards", rewards, "n"))
    values = rewards.detach().double().cpu()
    gaps = torch.full_like(values, torch.inf)
    for name in group.unique().tolist():
        rows = ((group == name).cpu() & ~values.isnan()).nonzero()[:, 0]
        order = rows[values[rows].argsort()]
        steps = values[order].diff()
        gaps[order[1:]] = torch.minimum(gaps[order[1:]], steps)
        gaps[order[:-1]] = torch.minimum(gaps[order[:-1]], steps)
    return gaps


def repeat_near_ties(
    judge: Judge,
    images: Sequence[Tensor],
    rubrics: Sequence[Rubric],
    verdicts: Sequence[Sequence[Verdict]],
    rewards: Tensor,
    group: Tensor,
    *,
    margin: float,
    repeats: int = 1,
    share: float = 0.02,
    max_questions: int | None = None,
    seed: int = 0,
) -> Repeated:
    """Judge pictures again whose rewards are within ``margin`` of another one of their group.

    A group's advantages hang on the order of its rewards; a judge that flips a verdict with probability q adds
    ``sqrt(q (1 - q) / c)`` to a mean of c binary ones, and k answers in place of one divide its variance by k. Where
    rewards are far apart that changes nothing, so only near ties are worth paying for. Which questions are asked again
    is a function of the seed and their content alone.

    Args:
        judge: who is asked, with ``repeat`` 1, 2, ... in the requests; it has to answer anew then.
        images: n tensors ``[3, h, w]`` uint8.
        rubrics: n.
        verdicts: of each picture, in the order of its criteria, as :func:`judge_pictures` gives them.
        rewards: ``[n]``; NaN where not known, and such pictures are not judged again.
        group: ``[n]`` integers: pictures of one prompt.
        margin: of rewards, at least 0; 0 repeats exact ties alone.
        repeats: further answers to each question of a near tie.
        share: of all scored verdicts, asked once more to measure flips, in [0, 1].
        max_questions: in all; the sample comes first, then pictures as a whole, the nearest ties first. None for no bound.
        seed: of the sample, and of the order among equal ties.

    Returns:
        All verdicts, and the sample's pairs. A repeat that is missing leaves what is known.

    Raises:
        ValueError: if numbers or shapes differ, an option is out of range, or the judge answers another number of
            questions.

    Example:
        >>> from lensmini.rewards import lens_rubric
        >>> from lensmini.rewards.judges import ScriptedJudge, judge_pictures
        >>> rubric, picture = (
        ...     lens_rubric("A wall.", {"style": "A photograph."}),
        ...     torch.zeros(3, 2, 2, dtype=torch.uint8),
        ... )
        >>> judge = ScriptedJudge(lambda request: 1.0 - request.repeat)
        >>> said = judge_pictures(judge, [picture, picture + 1], [rubric] * 2)
        >>> again = repeat_near_ties(
        ...     judge, [picture, picture + 1], [rubric] * 2, said, torch.ones(2), torch.zeros(2), margin=0
        ... )
        >>> again.asked, again.verdicts[0][0].score, again.verdicts[0][0].variance
        (4, 0.5, 0.25)
    """
    if not len(images) == len(rubrics) == len(verdicts) == len(rewards):
        raise ValueError(
            f"rubrics, verdicts, rewards: expected {len(images)} of each as of images, got {len(rubrics)}, "
            f"{len(verdicts)}, {len(rewards)}"
        )
    if not (margin >= 0 and repeats >= 1 and 0 <= share <= 1) or (max_questions is not None and max_questions < 0):
        raise ValueError(
            "margin, repeats, share, max_questions: expected at least 0, at least 1, in [0, 1], at least 0 or None, got "
            f"{margin}, {repeats}, {share}, {max_questions}"
        )
    first = {
        (row, column): JudgeRequest(image=image, prompt=rubric.prompt, criterion=criterion)
        for row, (image, rubric) in enumerate(zip(images, rubrics, strict=True))
        for column, criterion in enumerate(rubric.all_criteria)
    }
    if [[c.id for c in rubric.all_criteria] for rubric in rubrics] != [
        [v.criterion_id for v in v_s] for v_s in verdicts
    ]:
        raise ValueError("verdicts: expected one for each criterion of its rubric, in order")
    known = [place for place in first if verdicts[place[0]][place[1]].state == "scored"]
    luck = _luck(first, images, seed)
    gaps = nearest_in_group(rewards, group)
    # Rewards are sums of rounded numbers: what is meant to be as far as the margin is near.
    near = gaps <= margin * (1 + 1e-6) + 1e-6
    bound = len(first) * (repeats + 1) if max_questions is None else max_questions
    sample = sorted((place for place in known if luck[place] < share), key=luck.__getitem__)[:bound]
    asked = dict.fromkeys((place, 1) for place in sample)
    chosen = torch.zeros(len(images), dtype=torch.bool)
    rows = sorted(near.nonzero()[:, 0].tolist(), key=lambda row: (gaps[row].item(), luck[row, 0]))
    for row in rows:
        wanted = [(place, k) for k in range(1, repeats + 1) for place in known if place[0] == row]
        if len(asked.keys() | set(wanted)) > bound:
            break
        asked |= dict.fromkeys(wanted)
        chosen[row] = True
    answers = judge.score([replace(first[place], repeat=k) for place, k in asked])
    if len(answers) != len(asked):
        raise ValueError(f"judge: expected {len(asked)} verdicts, got {len(answers)}")
    by_place: dict[tuple[int, int], list[Verdict]] = defaultdict(list)
    pairs = []
    for (place, k), answer in zip(asked, answers, strict=True):
        by_place[place].append(answer)
        before = verdicts[place[0]][place[1]]
        if k == 1 and luck[place] < share and answer.state == "scored":
            pairs.append((before, answer))
    after = [list(row) for row in verdicts]
    for (row, column), more in by_place.items():
        after[row][column] = _combine(after[row][column], more)
    return Repeated(after, pairs, len(asked), chosen)


def _luck(
    places: dict[tuple[int, int], JudgeRequest], images: Sequence[Tensor], seed: int
) -> dict[tuple[int, int], float]:
    """A number in [0, 1) for every question, from seed and content."""
    hashes = {row: request.image_hash for (row, column), request in places.items() if column == 0}
    luck = {}
    for (row, column), request in places.items():
        text = f"{seed}/{hashes[row]}/{request.prompt}/{request.criterion.hash}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        luck[row, column] = int.from_bytes(digest[:7], "big") / 2**56
    return luck


def _combine(first: Verdict, more: Sequence[Verdict]) -> Verdict:
    """The mean of all answers there are, with the unbiased estimate of that mean's variance."""
    scores = [v.score for v in (first, *more) if v.score is not None]
    if len(scores) < 2:
        return first
    return replace(
        first,
        score=fmean(scores),
        variance=variance(scores) / len(scores),
        attempts=first.attempts + sum(v.attempts for v in more),
        cached=first.cached and all(v.cached for v in more),
    )
