"""Runs that are interrupted, and the count of samples that an interruption gets wrong.

A resuming rule is a function ``(state, num_steps, num_ranks) -> (steps, state)``: from a saved state (None: a new run)
it shows that many steps, each a list of sample numbers, and returns what a checkpoint after them would hold. Needs
nothing but Python, so that it also runs in an environment that holds a peer's pins.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SCENARIOS", "Run", "Scenario", "count_wrong"]

Run = Callable[[Any, int, int], tuple[list[list[Any]], Any]]


@dataclass(frozen=True)
class Scenario:
    """Segments of one run: steps shown and the ranks that showed them; a crash and a resume between any two."""

    name: str
    segments: tuple[tuple[int, int], ...]

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return sum(steps for steps, _ in self.segments)


SCENARIOS = (
    Scenario("1 resume", ((5, 8), (19, 8))),
    Scenario("2 resumes", ((5, 8), (6, 8), (13, 8))),
    Scenario("3 resumes", ((5, 8), (6, 8), (7, 8), (6, 8))),
    Scenario("8 -> 4 -> 16 ranks", ((7, 8), (9, 4), (8, 16))),
)
"""All of 24 steps. The first segment's ranks are those of the uninterrupted run."""


def count_wrong(run: Run, scenario: Scenario, expected: Sequence[Sequence[Hashable]] | None = None) -> int:
    """Samples that the uninterrupted run shows in a step and the interrupted one does not show in that step.

    Inside a step the order does not count: an optimiser step is a sum. A sample shown k times is k samples.

    Args:
        run: the resuming rule, which is handed its own state back.
        scenario: where it is interrupted.
        expected: steps of the uninterrupted run; by default the rule's own, on the first segment's ranks.
    """
    if expected is None:
        expected, _ = run(None, scenario.num_steps, scenario.segments[0][1])
    shown, state = [], None
    for num_steps, num_ranks in scenario.segments:
        steps, state = run(state, num_steps, num_ranks)
        shown += steps
    if len(shown) != len(expected):
        raise ValueError(f"run: expected {len(expected)} steps, got {len(shown)}")
    return sum((Counter(wanted) - Counter(got)).total() for wanted, got in zip(expected, shown, strict=True))
