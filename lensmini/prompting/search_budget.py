"""What a search may use, and what it has used.

No axes: counts and money.
"""

import math
from dataclasses import dataclass

__all__ = ["Budget", "BudgetSpentError", "Spending", "check_cost"]


class BudgetSpentError(RuntimeError):
    """The next step could cost more than is left; the search ends with what it has.

    Example:
        >>> raise BudgetSpentError("scorings: 40 more are needed")
        Traceback (most recent call last):
        lensmini.prompting.search_budget.BudgetSpentError: scorings: 40 more are needed
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Bounds that a search never exceeds: before a call the most that it can cost is set aside.

    What the final reading of the test split takes is set aside from the start.

    Raises:
        ValueError: if a bound is not positive, or money is bounded without bounds of the calls' costs.

    Example:
        >>> Budget(candidates=8, scorings=4000).proposals
        24
    """

    candidates: int
    """Candidates that are compared; the level of the tests is spread evenly over so many."""
    scorings: int | None = None
    """Scores of one item under one noise seed, the test split's included; None for no bound."""
    max_proposals: int | None = None
    """Calls of ``propose``; None for three times the candidates."""
    cost: float | None = None
    """Money, as the calls report it; None for no bound."""
    cost_of_scoring: float = 0.0
    """The most that one scoring can cost."""
    cost_of_proposal: float = 0.0
    """The most that one proposal can cost."""

    def __post_init__(self) -> None:
        counts = {"candidates": self.candidates, "scorings": self.scorings, "max_proposals": self.max_proposals}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected a positive number, got {count}")
        if self.cost is not None and not (
            self.cost > 0
            and min(self.cost_of_scoring, self.cost_of_proposal) >= 0
            and max(self.cost_of_scoring, self.cost_of_proposal) > 0
        ):
            raise ValueError(
                "cost, cost_of_scoring, cost_of_proposal: expected a positive bound and the most that a call can cost, "
                f"got {self.cost}, {self.cost_of_scoring}, {self.cost_of_proposal}"
            )

    @property
    def proposals(self) -> int:
        """Calls of ``propose``."""
        return 3 * self.candidates if self.max_proposals is None else self.max_proposals


@dataclass(slots=True)
class Spending:
    """What a search has used.

    Example:
        >>> Spending(scorings=40).scorings
        40
    """

    scorings: int = 0
    proposals: int = 0
    cost: float = 0.0


def check_cost(name: str, cost: float) -> float:
    """Check what a call says it has cost, in the budget's currency.

    Raises:
        ValueError: if it is negative or not finite, which would switch the bound on money off.

    Example:
        >>> check_cost("propose", 1)
        1.0
    """
    if not 0 <= cost < math.inf:
        raise ValueError(f"{name}: expected a cost of at least 0, got {cost}")
    return float(cost)
