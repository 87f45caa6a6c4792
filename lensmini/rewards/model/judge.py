"""The learned reward as a judge among judges.

No axes: requests and verdicts.
"""

import time
from collections.abc import Sequence

import torch

from lensmini.rewards.judges.protocol import JudgeRequest
from lensmini.rewards.model.predictor import RubricRewardModel
from lensmini.rewards.verdicts import Verdict

__all__ = ["RewardModelJudge"]


class RewardModelJudge:
    """Verdicts of a :class:`RubricRewardModel`: expected scores, with their variance.

    A score is a probability (or a mean over levels), not a choice of yes or no, and the same at every repeat: ``repeat`` has no
    effect.

    Args:
        model: trained; it is put into evaluation mode.
        batch_size: pictures at once.

    Attributes:
        judge_id: holds the model's revision as it is now: a model that is trained on needs a new judge.

    Raises:
        ValueError: if ``batch_size`` is not positive.

    Example:
        >>> from lensmini.rewards import Criterion
        >>> from lensmini.rewards.model import FrozenFeatures, RewardModelConfig
        >>> text = lambda texts: (torch.ones(len(texts), 1, 4), torch.ones(len(texts), 1, dtype=torch.bool))
        >>> features = FrozenFeatures(image=torch.clone, text=text, identity="pixels")
        >>> model = RubricRewardModel(features, RewardModelConfig(image_dim=3, text_dim=4, width=8))
        >>> picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
        >>> asked = [JudgeRequest(image=picture, prompt="p", criterion=Criterion(id="a", text="b"))]
        >>> [(verdict.score, verdict.variance) for verdict in RewardModelJudge(model).score(asked)]
        [(0.5, 0.25)]
    """

    def __init__(self, model: RubricRewardModel, *, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.model, self.batch_size = model.eval(), batch_size
        self.judge_id = f"rubric reward model {model.revision}"

    def score(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict for each request, in their order; what cannot be answered is a missing verdict with its cause."""
        pictures: dict[tuple[str, str], list[int]] = {}
        for index, request in enumerate(requests):
            pictures.setdefault((request.image_hash, request.prompt), []).append(index)
        rows = list(pictures.values())
        verdicts: dict[int, Verdict] = {}
        for first in range(0, len(rows), self.batch_size):
            verdicts |= self._answer(requests, rows[first : first + self.batch_size])
        return [verdicts[index] for index in range(len(requests))]

    def _answer(self, requests: Sequence[JudgeRequest], rows: list[list[int]]) -> dict[int, Verdict]:
        """Verdicts of rows, each the questions about one picture; what fails is halved until what fails is one question."""
        started = time.perf_counter()
        try:
            with torch.no_grad():
                device = self.model.calibration.device
                maps = self.model.read_images([requests[row[0]].image.to(device) for row in rows])
                asked = [[requests[index].criterion for index in row] for row in rows]
                said = self.model.predict(maps, asked, [requests[row[0]].prompt for row in rows])
            scores, variances = said.scores.tolist(), said.variance.tolist()
            share = (time.perf_counter() - started) / len(rows)
            return {
                index: self._verdict(requests[index], scores[i][j], variances[i][j], share)
                for i, row in enumerate(rows)
                for j, index in enumerate(row)
            }
        except Exception as error:  # whatever one picture does to its features, the others have their verdicts
            if len(rows) > 1:
                halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            elif len(rows[0]) > 1:
                middle = len(rows[0]) // 2
                halves = [rows[0][:middle]], [rows[0][middle:]]
            else:
                reason = f"{type(error).__name__}: {error}"[:500]
                return {rows[0][0]: self._missing(requests[rows[0][0]], reason)}
        return self._answer(requests, halves[0]) | self._answer(requests, halves[1])

    def _verdict(self, request: JudgeRequest, score: float, variance: float, latency: float) -> Verdict:
        if not 0 <= score <= 1:
            return self._missing(request, f"score {score}")
        return Verdict(
            criterion_id=request.criterion.id,
            state="scored",
            score=score,
            variance=variance,
            attempts=1,
            latency_s=latency,
            judge_id=self.judge_id,
        )

    def _missing(self, request: JudgeRequest, reason: str) -> Verdict:
        name = request.criterion.id
        return Verdict(criterion_id=name, state="missing", cause="error", reason=reason, judge_id=self.judge_id)
