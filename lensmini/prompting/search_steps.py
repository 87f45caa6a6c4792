"""What a search is made of: calls within a budget, splits of the development set, candidates, and the final reading.

Axes: n items, s noise seeds.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lensmini.prompting.compare import Comparison, compare_paired
from lensmini.prompting.search_budget import Budget, BudgetSpentError, Spending, check_cost
from lensmini.prompting.search_log import SearchLog

__all__ = [
    "Candidate",
    "Evaluate",
    "Evaluation",
    "Proposal",
    "ProposalRequest",
    "Propose",
    "Steps",
    "derive_seed",
    "is_same",
    "settings_of",
]


class Evaluation(NamedTuple):
    """What ``evaluate`` returns."""

    scores: Sequence[Sequence[float | None]]
    """``[n][s]``, by item and noise seed; None where a score is missing."""
    feedback: Sequence[str] = ()
    """``[n]``: what went wrong with each item, in words; empty where nothing did."""
    cost: float = 0.0
    """Money."""


class Proposal(NamedTuple):
    """What ``propose`` returns."""

    text: str | None
    """The new system prompt; None if there is none."""
    analysis: str = ""
    """Why, in words: for the record."""
    cost: float = 0.0
    """Money."""


class ProposalRequest(NamedTuple):
    """What ``propose`` gets to see: never an item of the part of the development set that decides, and no score of it."""

    system_prompt: str
    """What is to be improved."""
    failures: tuple[str, ...]
    """Feedback on it, the worst first."""
    history: tuple[tuple[str, bool], ...]
    """Every candidate compared so far, and whether it was accepted."""
    number: int
    """Of the call, from 0: for seeds."""


Evaluate = Callable[[str, Sequence[Any], Sequence[int]], Evaluation]
"""``(system_prompt, items, noise_seeds) -> Evaluation``; equal arguments may give equal or fresh scores."""
Propose = Callable[[ProposalRequest], Proposal]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A system prompt of a search.

    Example:
        >>> Candidate(0, "Be brief.", None).accepted
        True
    """

    number: int
    """0 is the seed prompt."""
    text: str
    parent: int | None
    """Number of the prompt that it was made from."""
    analysis: str = ""
    """The proposer's words."""
    comparison: Comparison | None = None
    """With its incumbent; None for the seed prompt, and where none was made."""
    accepted: bool = True


def derive_seed(seed: int, *names: object) -> int:
    """A seed in ``[0, 2^31)`` for every purpose, from one.

    Example:
        >>> derive_seed(0, "noise", 1) == derive_seed(0, "noise", 1), derive_seed(0, "a") == derive_seed(0, "b")
        (True, False)
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31


class Steps:
    """The calls of one search: checked, counted against the budget, and on record.

    Args:
        evaluate: scores a system prompt.
        propose: writes one.
        dev: development items.
        num_test: number of test items, for what is set aside.
        budget: bounds.
        log: the record.
        seed: of splits, noise seeds and resamples.
        num_seeds: s, noise seeds by item.
        feedback_share: share of the development items whose failures ``propose`` sees.
        num_failures: failures shown at once.

    Raises:
        ValueError: if a part of the development set or the test split has fewer than two items, or development items are
            equal: one of them would decide, and the proposer read the other's failure.

    Example:
        >>> good = lambda prompt, items, seeds: Evaluation([[1.0] * len(seeds) for _ in items])
        >>> with SearchLog(None) as log:
        ...     steps = Steps(good, None, [*range(9)], 3, Budget(candidates=1), log, num_seeds=2)
        ...     steps.score("Be brief.", steps.selection, [7, 8]).shape, steps.spending.scorings
        (torch.Size([6, 2]), 12)
    """

    def __init__(
        self,
        evaluate: Evaluate,
        propose: Propose | None,
        dev: Sequence[Any],
        num_test: int,
        budget: Budget,
        log: SearchLog,
        *,
        seed: int = 0,
        num_seeds: int = 3,
        feedback_share: float = 0.35,
        num_failures: int = 12,
    ) -> None:
        if num_seeds < 1 or num_failures < 1 or not 0 < feedback_share < 1:
            raise ValueError(
                "num_seeds, num_failures, feedback_share: expected positive numbers and a share in (0, 1), "
                f"got {num_seeds}, {num_failures}, {feedback_share}"
            )
        order = list(range(len(dev)))
        random.Random(derive_seed(seed, "split")).shuffle(order)
        cut = round(feedback_share * len(order))
        self.feedback, self.selection = order[:cut], order[cut:]
        if min(len(self.feedback), len(self.selection)) < 2:
            raise ValueError(f"dev: expected at least two items in either part, got {len(dev)} and {feedback_share}")
        if num_test < 2:
            raise ValueError(f"test: expected at least two items, got {num_test}")
        twice = sum(any(is_same(item, other) for other in dev[:row]) for row, item in enumerate(dev))
        if twice:
            raise ValueError(f"dev: expected items that differ, got {twice} of {len(dev)} that came before")
        self.evaluate, self.propose, self.dev = evaluate, propose, dev
        self.budget, self.log, self.seed = budget, log, seed
        self.num_seeds, self.num_failures = num_seeds, num_failures
        self.spending = Spending()
        # Seed prompt and winner.
        self._reserved = 2 * num_test * num_seeds

    def noise(self, *names: object) -> list[int]:
        """The s noise seeds of a purpose."""
        return [derive_seed(self.seed, "noise", *names, number) for number in range(self.num_seeds)]

    def afford(self, scorings: int, proposals: int = 0) -> None:
        """Make sure that so much is left besides what the test split takes.

        Raises:
            BudgetSpentError: naming what is short.
        """
        budget, spent = self.budget, self.spending
        total = spent.scorings + scorings + self._reserved
        if budget.scorings is not None and total > budget.scorings:
            raise BudgetSpentError(f"scorings: {total} would be needed, the test split included, of {budget.scorings}")
        if spent.proposals + proposals > budget.proposals:
            raise BudgetSpentError(f"proposals: all {budget.proposals} are made")
        most = spent.cost + (scorings + self._reserved) * budget.cost_of_scoring + proposals * budget.cost_of_proposal
        if budget.cost is not None and most > budget.cost * (1 + 1e-9):  # sums of prices are rounded
            raise BudgetSpentError(f"cost: up to {most:g} would be needed, the test split included, of {budget.cost:g}")

    def begin(self, scorings: int) -> None:
        """Refuse a budget that does not even cover one round of so many scorings and the test split.

        Raises:
            ValueError: naming what is short.
        """
        try:
            self.afford(scorings, proposals=1)
        except BudgetSpentError as error:
            raise ValueError(f"budget: expected enough for one round, but of {error}") from None

    def score(self, prompt: str, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """``[n, s]`` scores of development items, NaN where missing."""
        return self._score(prompt, rows, seeds)[0]

    def failures(self, prompt: str, number: int) -> tuple[Tensor, tuple[str, ...]]:
        """Scores of a prompt on the feedback part, and its worst failures in words.

        Args:
            prompt: to be looked at.
            number: of the prompt: each is looked at under noise of its own.
        """
        scores, feedback = self._score(prompt, self.feedback, self.noise("feedback", number))
        means = torch.nan_to_num(scores.nanmean(1), nan=math.inf)
        order = sorted((row for row, text in enumerate(feedback) if text), key=lambda row: (means[row].item(), row))
        return scores, tuple(feedback[row] for row in order[: self.num_failures])

    def new_text(
        self, parent: str, failures: tuple[str, ...], candidates: Sequence[Candidate], *, scorings: int = 0
    ) -> Proposal:
        """A system prompt that is none of the candidates; answers that are none are paid for and asked again.

        Args:
            parent: what is to be improved.
            failures: of it.
            candidates: all so far.
            scorings: what looking at the new one takes, which no proposal may use up.

        Raises:
            BudgetSpentError: if there is nothing left for it.
        """
        tried = {candidate.text for candidate in candidates}
        history = tuple((candidate.text, candidate.accepted) for candidate in candidates[1:])
        while True:
            self.afford(scorings, proposals=1)
            request = ProposalRequest(parent, failures, history, self.spending.proposals)
            question = {"propose": self.spending.proposals, "parent": _digest(parent)}

            def run(request: ProposalRequest = request) -> dict[str, Any]:
                if self.propose is None:
                    raise ValueError("propose: expected a callable, got None")
                found = self.propose(request)
                return found._replace(cost=check_cost("propose", found.cost))._asdict()

            found = Proposal(**self.log.call(question, run))
            self.spending.proposals += 1
            self.spending.cost += found.cost
            text = "" if found.text is None else found.text.strip()
            if text and text not in tried:
                return found._replace(text=text)

    def compare(
        self, candidate: str, incumbent: str, rows: Sequence[int], *names: object, alpha: float, screen: int = 0
    ) -> Comparison:
        """A paired comparison under noise that nobody has seen yet.

        Args:
            candidate: system prompt.
            incumbent: system prompt.
            rows: development items.
            names: of the purpose, for the noise.
            alpha: level.
            screen: if positive, so many items first; a candidate that is not better there is not looked at further, which
                can only lower the chance of accepting.
        """
        seeds = self.noise(*names)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "resample", *names))
        first = rows[:screen] if 0 < screen < len(rows) else rows
        new, old = self.score(candidate, first, seeds), self.score(incumbent, first, seeds)
        if len(first) == len(rows):
            return compare_paired(new, old, alpha=alpha, generator=generator)
        if not bool((new - old).nanmean(1).nanmean() > 0):
            # What was seen is reported and cannot be accepted.
            return compare_paired(new, old, alpha=alpha, generator=generator)._replace(accepted=False)
        rest = rows[screen:]
        new = torch.cat([new, self.score(candidate, rest, seeds)])
        old = torch.cat([old, self.score(incumbent, rest, seeds)])
        return compare_paired(new, old, alpha=alpha, generator=generator)

    def read_test(self, items: Sequence[Any], prompts: Sequence[str]) -> list[Tensor]:
        """``[n, s]`` scores of each prompt on the test items, under one and the same noise."""
        self._reserved = 0
        seeds = self.noise("test")
        return [self._call(prompt, items, [*range(len(items))], seeds, "test")[0] for prompt in prompts]

    def _score(self, prompt: str, rows: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, list[str]]:
        self.afford(len(rows) * len(seeds))
        return self._call(prompt, [self.dev[row] for row in rows], rows, seeds, "dev")

    def _call(
        self, prompt: str, items: Sequence[Any], rows: Sequence[int], seeds: Sequence[int], split: str
    ) -> tuple[Tensor, list[str]]:
        question = {"evaluate": _digest(prompt), "split": split, "rows": [*rows], "seeds": [*seeds]}

        def run() -> dict[str, Any]:
            found = self.evaluate(prompt, items, seeds)
            return {
                "scores": _checked(found, len(items), len(seeds)),
                "feedback": [*found.feedback],
                "cost": check_cost("evaluate", found.cost),
            }

        answer = self.log.call(question, run)
        self.spending.scorings += len(items) * len(seeds)
        self.spending.cost += answer["cost"]
        values = [[math.nan if value is None else value for value in row] for row in answer["scores"]]
        return torch.tensor(values, dtype=torch.float64), answer["feedback"] or [""] * len(items)


def is_same(one: Any, other: Any) -> bool:
    """Whether two items are equal; arrays, which do not say so by themselves, are if they are the same object.

    Example:
        >>> is_same({"prompt": "a fox"}, {"prompt": "a fox"}), is_same(torch.zeros(2), torch.zeros(2))
        (True, False)
    """
    try:
        return one is other or bool(one == other)
    except (RuntimeError, TypeError, ValueError):
        return False


def settings_of(steps: Steps, **more: Any) -> dict[str, Any]:
    """What decides a search besides its calls, for the head of its record.

    Example:
        >>> good = lambda prompt, items, seeds: Evaluation([[1.0] * len(seeds) for _ in items])
        >>> settings_of(Steps(good, None, [*range(9)], 3, Budget(candidates=1), SearchLog(None)), alpha=0.05)["num_dev"]
        9
    """
    own = {"seed": steps.seed, "num_seeds": steps.num_seeds, "num_failures": steps.num_failures}
    return {**own, "num_dev": len(steps.dev), "num_feedback": len(steps.feedback), **asdict(steps.budget), **more}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _checked(found: Evaluation, num: int, num_seeds: int) -> list[list[float | None]]:
    scores = [[None if value is None else float(value) for value in row] for row in found.scores]
    if len(scores) != num or any(len(row) != num_seeds for row in scores):
        sizes = f"{len(scores)} x {sorted({len(row) for row in scores})}"
        raise ValueError(f"evaluate: expected scores of {num} items under {num_seeds} seeds each, got {sizes}")
    if any(value is not None and not math.isfinite(value) for row in scores for value in row):
        raise ValueError("evaluate: expected finite scores, None where one is missing")
    if len(found.feedback) not in (0, num):
        raise ValueError(f"evaluate: expected feedback for none or all of {num} items, got {len(found.feedback)}")
    return scores
