"""Judges that are functions, scripts, or made of other judges.

No axes: requests and verdicts.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lensmini.rewards.judges.protocol import Judge, JudgeRequest
from lensmini.rewards.verdicts import Verdict

__all__ = ["EnsembleJudge", "FallbackJudge", "ProgramJudge", "ScriptedJudge"]


class ProgramJudge:
    """A function as a judge: a detector, an OCR comparison, the verifier of rendered scenes. Free and the same every time.

    Args:
        function: from a request to an answer on the criterion's scale, or None where it does not apply.
        judge_id: names the function and its version.

    Example:
        >>> import torch
        >>> from lensmini.rewards import Criterion
        >>> judge = ProgramJudge(lambda request: 1 / 0, judge_id="broken")
        >>> picture = torch.zeros(3, 2, 2, dtype=torch.uint8)
        >>> judge.score([JudgeRequest(image=picture, prompt="p", criterion=Criterion(id="a", text="b"))])[0].cause
        'error'
    """

    def __init__(self, function: Callable[[JudgeRequest], float | None], *, judge_id: str) -> None:
        self.function, self.judge_id = function, judge_id

    def score(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict for each request; an exception of the function is a missing verdict."""
        return [self._one(request) for request in requests]

    def _one(self, request: JudgeRequest) -> Verdict:
        name = request.criterion.id
        try:
            answer = self.function(request)
        except Exception as error:  # whatever a detector does, the other pictures have their verdicts
            reason = f"{type(error).__name__}: {error}"[:500]
            return _missing(name, "error", reason, self.judge_id)
        if answer is None:
            return Verdict(criterion_id=name, state="not_applicable", judge_id=self.judge_id)
        try:
            score = request.criterion.normalise(answer)
        except (ValueError, TypeError) as error:
            return _missing(name, "out_of_range", str(error)[:500], self.judge_id)
        return Verdict(criterion_id=name, state="scored", score=score, judge_id=self.judge_id, attempts=1)


class ScriptedJudge:
    """Verdicts from a table, for tests and rehearsals: by criterion id, a score, or the cause why there is none.

    Args:
        table: from a criterion's id to a score in [0, 1] or one of :data:`lensmini.rewards.CAUSES`; or a function of the
            request with such values.
        judge_id: its name.

    Example:
        >>> import torch
        >>> from lensmini.rewards import Criterion
        >>> picture = torch.zeros(3, 2, 2, dtype=torch.uint8)
        >>> asked = [JudgeRequest(image=picture, prompt="p", criterion=Criterion(id=name, text="b")) for name in "ab"]
        >>> [
        ...     v.score if v.score is not None else v.cause
        ...     for v in ScriptedJudge({"a": 0.5, "b": "timeout"}).score(asked)
        ... ]
        [0.5, 'timeout']
    """

    def __init__(
        self, table: Mapping[str, float | str] | Callable[[JudgeRequest], float | str], *, judge_id: str = "scripted"
    ) -> None:
        self.table, self.judge_id = table, judge_id

    def score(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """What the table says; ``error`` where it says nothing."""
        verdicts = []
        for request in requests:
            name = request.criterion.id
            value = self.table(request) if callable(self.table) else self.table.get(name, "error")
            if isinstance(value, str):
                verdicts.append(_missing(name, value, "scripted", self.judge_id))
            else:
                verdicts.append(Verdict(criterion_id=name, state="scored", score=value, judge_id=self.judge_id))
        return verdicts


class FallbackJudge:
    """The first judge, and for what it does not know the next one, and so on.

    Args:
        judges: in order of preference.

    Raises:
        ValueError: if there is none.

    Example:
        >>> FallbackJudge(ScriptedJudge({}, judge_id="a"), ScriptedJudge({}, judge_id="b")).judge_id
        'fallback(a, b)'
    """

    def __init__(self, *judges: Judge) -> None:
        if not judges:
            raise ValueError("judges: expected at least one, got none")
        self.judges = judges

    @property
    def judge_id(self) -> str:
        """The judges in order."""
        return f"fallback({', '.join(judge.judge_id for judge in self.judges)})"

    def score(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """The first verdict that is not missing, or the last one that is."""
        verdicts = list(self.judges[0].score(requests))
        for judge in self.judges[1:]:
            open_ = [index for index, verdict in enumerate(verdicts) if verdict.state == "missing"]
            if open_:
                for index, verdict in zip(open_, judge.score([requests[i] for i in open_]), strict=True):
                    verdicts[index] = verdict
        return verdicts


class EnsembleJudge:
    """The median of several judges, with their spread as variance.

    Args:
        judges: each asked everything.
        min_judges: scores that are needed; fewer and the verdict is missing, with the first cause.

    Raises:
        ValueError: if there are fewer judges than that.

    Example:
        >>> import torch
        >>> from lensmini.rewards import Criterion
        >>> picture = torch.zeros(3, 2, 2, dtype=torch.uint8)
        >>> asked = [JudgeRequest(image=picture, prompt="p", criterion=Criterion(id="a", text="b"))]
        >>> EnsembleJudge(*[ScriptedJudge({"a": s}) for s in (0.0, 1.0, 1.0)]).score(asked)[0].score
        1.0
    """

    def __init__(self, *judges: Judge, min_judges: int = 1) -> None:
        if not 1 <= min_judges <= len(judges):
            raise ValueError(f"judges: expected at least min_judges = {min_judges} and 1, got {len(judges)}")
        self.judges, self.min_judges = judges, min_judges

    @property
    def judge_id(self) -> str:
        """The judges and how many are needed."""
        return f"median of {self.min_judges}+({', '.join(judge.judge_id for judge in self.judges)})"

    def score(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """The median of the scores there are."""
        columns = [judge.score(requests) for judge in self.judges]
        return [self._combine(list(row)) for row in zip(*columns, strict=True)]

    def _combine(self, row: list[Verdict]) -> Verdict:
        scores = [verdict.score for verdict in row if verdict.score is not None]
        if len(scores) >= self.min_judges:
            return Verdict(
                criterion_id=row[0].criterion_id,
                state="scored",
                score=statistics.median(scores),
                variance=statistics.pvariance(scores),
                judge_id=self.judge_id,
                attempts=sum(verdict.attempts for verdict in row),
                latency_s=max(verdict.latency_s for verdict in row),
                cached=all(verdict.cached for verdict in row),
            )
        if all(verdict.state == "not_applicable" for verdict in row):
            return replace(row[0], judge_id=self.judge_id)
        first = next((verdict for verdict in row if verdict.state == "missing"), None)
        cause = "error" if first is None else str(first.cause)
        return _missing(row[0].criterion_id, cause, "too few judges", self.judge_id)


def _missing(name: str, cause: str, reason: str, judge_id: str) -> Verdict:
    return Verdict(criterion_id=name, state="missing", cause=cause, reason=reason, judge_id=judge_id)
