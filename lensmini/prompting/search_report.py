"""The end of a search: the test split is read, and what was found is told with its lineage.

Axes: n items, s noise seeds.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from lensmini.prompting.compare import bootstrap_interval
from lensmini.prompting.search_budget import Spending
from lensmini.prompting.search_steps import Candidate, Steps, derive_seed, is_same

__all__ = ["SearchResult", "TestReading", "read_final"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TestReading:
    """What the test split says, once.

    Example:
        >>> TestReading(num_items=100, seed_mean=0.4, best_mean=0.5, difference=0.1, low=0.02, high=0.18).difference
        0.1
    """

    __test__ = False  # not a test of pytest

    num_items: int
    """Items with a score of both prompts."""
    seed_mean: float
    """Of the seed prompt."""
    best_mean: float
    """Of the best prompt, on the same items under the same noise."""
    difference: float
    """Best minus seed."""
    low: float
    """Of the 95 % interval of the difference over items; NaN if fewer than two have a score."""
    high: float
    """Likewise."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found.

    Example:
        >>> seed = Candidate(0, "Be brief.", None)
        >>> result = SearchResult(
        ...     seed,
        ...     (seed,),
        ...     TestReading(num_items=9, seed_mean=0.5, best_mean=0.5, difference=0.0, low=0.0, high=0.0),
        ...     Spending(),
        ...     "all candidates are compared",
        ... )
        >>> result.lineage == (seed,), result.report().splitlines()[0]
        (True, '# Search for a system prompt')
    """

    best: Candidate
    """The seed prompt if nothing was accepted."""
    candidates: tuple[Candidate, ...]
    """All, in order."""
    test: TestReading
    spending: Spending
    stopped: str
    """Why the search ended."""

    @property
    def lineage(self) -> tuple[Candidate, ...]:
        """From the seed prompt to the best one."""
        line = [self.best]
        while line[-1].parent is not None:
            line.append(self.candidates[line[-1].parent])
        return tuple(reversed(line))

    def report(self) -> str:
        """Markdown: the test split, every decision, the lineage with differences line by line."""
        test, spent = self.test, self.spending
        lines = [
            "# Search for a system prompt",
            "",
            f"Test split, read once ({test.num_items} items): seed prompt {test.seed_mean:.3f}, best prompt "
            f"{test.best_mean:.3f}, difference {test.difference:+.3f} (95 % {test.low:+.3f} to {test.high:+.3f}).",
            "",
            f"Ended because {self.stopped}. {spent.scorings} scorings, {spent.proposals} proposals, cost {spent.cost:g}.",
            "",
            "| candidate | from | difference | lower bound | p of flips | level | accepted |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for candidate in self.candidates[1:]:
            found = candidate.comparison
            cells = ["", "", "", ""]
            if found is not None:
                cells = [f"{found.difference:+.3f}", f"{found.lower:+.3f}", f"{found.p_value:.4f}", f"{found.alpha:g}"]
            verdict = "yes" if candidate.accepted else "no"
            lines.append(f"| {candidate.number} | {candidate.parent} | {' | '.join(cells)} | {verdict} |")
        line = self.lineage
        lines += ["", "## Lineage", "", " -> ".join(str(candidate.number) for candidate in line)]
        for before, after in pairwise(line):
            lines += ["", f"### {before.number} -> {after.number}", ""]
            lines += [after.analysis.strip(), ""] if after.analysis.strip() else []
            texts = (before.text.splitlines(), after.text.splitlines())
            lines += [
                "```diff",
                *difflib.unified_diff(*texts, str(before.number), str(after.number), lineterm=""),
                "```",
            ]
        return "\n".join([*lines, "", "## Best prompt", "", "```", self.best.text, "```", ""])


def read_final(
    steps: Steps, candidates: Sequence[Candidate], best: int, test: Sequence[Any], stopped: str
) -> SearchResult:
    """Read the test split and close the record.

    Args:
        steps: of the search.
        candidates: all.
        best: number of the best one.
        test: items.
        stopped: why the search ended.

    Returns:
        The result.

    Raises:
        ValueError: if a test item is a development item.

    Example:
        >>> from lensmini.prompting.search_log import SearchLog
        >>> from lensmini.prompting.search_budget import Budget
        >>> from lensmini.prompting.search_steps import Evaluation
        >>> good = lambda prompt, items, seeds: Evaluation([[float(len(prompt))] * len(seeds) for _ in items])
        >>> with SearchLog(None) as log:
        ...     steps = Steps(good, None, [*range(9)], 3, Budget(candidates=1), log)
        ...     both = [Candidate(0, "a", None), Candidate(1, "ab", 0)]
        ...     read_final(steps, both, 1, [9, 10, 11], "done").test.difference
        1.0
    """
    items = [*test]
    shared = sum(any(is_same(item, other) for other in steps.dev) for item in items)
    if shared:
        raise ValueError(f"test: expected items that are not in dev, got {shared} of {len(items)} that are")
    chosen = [candidates[0]] if best == 0 else [candidates[0], candidates[best]]
    scores = steps.read_test(items, [candidate.text for candidate in chosen])
    seed_scores, best_scores = scores[0], scores[-1]
    paired = seed_scores.isfinite() & best_scores.isfinite()
    known = paired.any(1)
    before = torch.where(paired, seed_scores, torch.nan)[known].nanmean(1)
    after = torch.where(paired, best_scores, torch.nan)[known].nanmean(1)
    low = high = math.nan if best else 0.0
    if best and len(before) > 1:
        generator = torch.Generator().manual_seed(derive_seed(steps.seed, "resample", "test"))
        low, high = bootstrap_interval(after - before, 0.025, generator=generator)
    means = (before.mean().item(), after.mean().item()) if len(before) else (math.nan, math.nan)
    reading = TestReading(
        num_items=len(before),
        seed_mean=means[0],
        best_mean=means[1],
        difference=means[1] - means[0],
        low=low,
        high=high,
    )
    steps.log.note({"best": best, "stopped": stopped, "num_test": len(before), "seed_mean": _finite(means[0])})
    return SearchResult(candidates[best], tuple(candidates), reading, steps.spending, stopped)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
