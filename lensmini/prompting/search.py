"""Training-free search for a system prompt: failures in words, a proposal, a paired comparison (arXiv 2605.21573, section 7).

The paper describes the loop and publishes neither its scoring nor its stopping rule. Here every acceptance is a test, and the
tests together keep one level: the chance that a search accepts anything, when nothing is better, is at most ``alpha``.
That takes four things. (1) The level is spread evenly over the candidates that the budget allows. (2) Each comparison
draws noise of its own and scores incumbent and candidate under it, so that no incumbent lives on past luck. (3) The items
that decide are not those whose failures the proposer reads. (4) The proposer learns of those items one bit by candidate;
on the path to a first false acceptance all these bits are "rejected", so its candidates do not depend on them.

Axes: n items, s noise seeds.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lensmini.prompting.compare import Comparison
from lensmini.prompting.search_budget import Budget, BudgetSpentError
from lensmini.prompting.search_log import SearchLog
from lensmini.prompting.search_report import SearchResult, read_final
from lensmini.prompting.search_steps import Candidate, Evaluate, Propose, Steps, derive_seed, settings_of

__all__ = ["search_pareto_front", "search_system_prompt"]


def search_system_prompt(
    seed_prompt: str,
    evaluate: Evaluate,
    propose: Propose,
    *,
    dev: Sequence[Any],
    test: Sequence[Any],
    budget: Budget,
    seed: int = 0,
    alpha: float = 0.05,
    num_seeds: int = 3,
    feedback_share: float = 0.35,
    num_failures: int = 12,
    screen: int = 0,
    patience: int | None = None,
    log: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Search with a single incumbent, as the paper does; its candidates follow one another.

    Round k: the incumbent's failures on the feedback items -> a proposal -> incumbent and candidate on the deciding items
    under the noise of round k -> the candidate is the new incumbent iff :func:`compare_paired` accepts it at ``alpha``
    divided by ``budget.candidates``.

    Args:
        seed_prompt: the first incumbent.
        evaluate: scores a system prompt on items under noise seeds: rewrites, paints and judges.
        propose: writes a new system prompt from failures.
        dev: development items, of any type; what is logged is their position.
        test: test items. Only its length is asked for before the search is over; then it is read once.
        budget: of candidates, scorings, proposals and money; never exceeded.
        seed: of splits, noise and resamples.
        alpha: chance of accepting anything if nothing is better.
        num_seeds: noise seeds by item.
        feedback_share: share of ``dev`` whose failures the proposer reads; the rest decides.
        num_failures: failures that it reads at once.
        screen: items that a candidate has to be better on before the others are scored; 0 for none.
        patience: rounds without an acceptance that end the search; None for the whole budget.
        log: JSON lines with every step; with the same log a stopped search goes on where it was.

    Returns:
        The best prompt, its lineage, and what the test split says.

    Raises:
        ValueError: if arguments do not fit together, development items are equal, the log is of another search, the budget
            does not cover one round, an evaluation is malformed, or test items are development items too (found when it
            is read).

    Example:
        >>> from lensmini.prompting import Evaluation, Proposal
        >>> def evaluate(prompt, items, seeds):
        ...     return Evaluation([[len(prompt) / 9 + item + 0.01 * (seed % 7) for seed in seeds] for item in items])
        >>> result = search_system_prompt(
        ...     "a",
        ...     evaluate,
        ...     lambda request: Proposal(request.system_prompt + "b"),
        ...     dev=[*range(30)],
        ...     test=[*range(30, 40)],
        ...     budget=Budget(candidates=3),
        ... )
        >>> result.best.text, [candidate.accepted for candidate in result.candidates]
        ('abbb', [True, True, True, True])
    """
    _check_level(alpha)
    level = alpha / budget.candidates
    with SearchLog(log) as record:
        options = {"seed": seed, "num_seeds": num_seeds, "feedback_share": feedback_share, "num_failures": num_failures}
        steps = Steps(evaluate, propose, dev, len(test), budget, record, **options)
        candidates, incumbent, failures = [Candidate(0, seed_prompt, None)], 0, None
        record.note(
            {"search": "incumbent", "seed_prompt": seed_prompt, **settings_of(steps, alpha=alpha, screen=screen)}
        )
        deciding = 2 * len(steps.selection) * num_seeds
        stopped = f"all {budget.candidates} candidates are compared"
        since = 0
        steps.begin(deciding + len(steps.feedback) * num_seeds)
        try:
            while len(candidates) <= budget.candidates:
                if patience is not None and since >= patience:
                    stopped = f"{patience} candidates in a row were rejected"
                    break
                current = candidates[incumbent].text
                if failures is None:
                    steps.afford(deciding + len(steps.feedback) * num_seeds, proposals=1)
                    failures = steps.failures(current, incumbent)[1]
                proposal = steps.new_text(current, failures, candidates, scorings=deciding)
                number = len(candidates)
                found = steps.compare(
                    str(proposal.text), current, steps.selection, "round", number, alpha=level, screen=screen
                )
                candidate = Candidate(
                    number, str(proposal.text), incumbent, proposal.analysis, found, accepted=found.accepted
                )
                candidates.append(candidate)
                record.note({"candidate": number, "parent": incumbent, **_facts(found)})
                since = 0 if found.accepted else since + 1
                if found.accepted:
                    incumbent, failures = number, None
        except BudgetSpentError as error:
            stopped = str(error)
        return read_final(steps, candidates, incumbent, test, stopped)


def search_pareto_front(
    seed_prompt: str,
    evaluate: Evaluate,
    propose: Propose,
    *,
    dev: Sequence[Any],
    test: Sequence[Any],
    budget: Budget,
    seed: int = 0,
    alpha: float = 0.05,
    num_seeds: int = 3,
    feedback_share: float = 0.5,
    num_failures: int = 12,
    log: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Search with a pool of prompts that are each the best at something (GEPA, arXiv 2507.19457).

    Prompts are scored on the feedback items, all under the same noise. A parent is drawn from the prompts that are best on
    some item, in proportion to the number of such items; a candidate joins the pool if it is strictly best on one. None of
    that is a test. At the end the prompt with the highest mean (over the items of which it has a score) is compared with the
    seed prompt on the deciding items, which nothing has touched until then, once, at level ``alpha``; if that does not accept
    it, the seed prompt stays.

    Args:
        seed_prompt: first of the pool.
        evaluate: as of :func:`search_system_prompt`.
        propose: likewise.
        dev: likewise.
        test: likewise.
        budget: likewise.
        seed: of splits, noise, parents and resamples.
        alpha: level of the one test.
        num_seeds: noise seeds by item.
        feedback_share: share of ``dev`` that is searched on; the rest decides.
        num_failures: failures that the proposer reads at once.
        log: JSON lines with every step.

    Returns:
        The best prompt, its lineage, and what the test split says. ``accepted`` of a candidate says that it joined the pool.

    Raises:
        ValueError: as of :func:`search_system_prompt`.

    Example:
        >>> from lensmini.prompting import Evaluation, Proposal
        >>> def evaluate(prompt, items, seeds):
        ...     return Evaluation([[len(prompt) / 9 + item + 0.01 * (seed % 7) for seed in seeds] for item in items])
        >>> search_pareto_front(
        ...     "a",
        ...     evaluate,
        ...     lambda request: Proposal(request.system_prompt + "b"),
        ...     dev=[*range(30)],
        ...     test=[*range(30, 40)],
        ...     budget=Budget(candidates=3),
        ... ).best.text
        'abbb'
    """
    _check_level(alpha)
    with SearchLog(log) as record:
        options = {"seed": seed, "num_seeds": num_seeds, "feedback_share": feedback_share, "num_failures": num_failures}
        steps = Steps(evaluate, propose, dev, len(test), budget, record, **options)
        record.note({"search": "pareto", "seed_prompt": seed_prompt, **settings_of(steps, alpha=alpha)})
        deciding = 2 * len(steps.selection) * num_seeds
        each = len(steps.feedback) * num_seeds
        steps.begin(deciding + 2 * each)
        candidates = [Candidate(0, seed_prompt, None)]
        # Always the noise of prompt 0, so that scores can be compared item by item.
        scores, failures = steps.failures(seed_prompt, 0)
        pool = {0: (torch.nan_to_num(scores.nanmean(1), nan=-math.inf), failures)}
        stopped = f"all {budget.candidates} candidates are scored"
        try:
            while len(candidates) <= budget.candidates:
                number = len(candidates)
                parent = _draw_parent(pool, derive_seed(seed, "parent", number))
                proposal = steps.new_text(
                    candidates[parent].text, pool[parent][1], candidates, scorings=deciding + each
                )
                scores, failures = steps.failures(str(proposal.text), 0)
                means = torch.nan_to_num(scores.nanmean(1), nan=-math.inf)
                best = torch.stack([values for values, _ in pool.values()]).amax(0)
                joins = bool((means > best).any())
                if joins:
                    pool[number] = (means, failures)
                candidates.append(Candidate(number, str(proposal.text), parent, proposal.analysis, accepted=joins))
                record.note(
                    {"candidate": number, "parent": parent, "joins": joins, "mean": _number(_mean_of_known(means))}
                )
        except BudgetSpentError as error:
            stopped = str(error)
        champion = max(pool, key=lambda number: (_mean_of_known(pool[number][0]), -number))
        if champion:
            found = steps.compare(candidates[champion].text, seed_prompt, steps.selection, "champion", alpha=alpha)
            candidates[champion] = replace(candidates[champion], comparison=found)
            record.note({"champion": champion, **_facts(found)})
            champion = champion if found.accepted else 0
        return read_final(steps, candidates, champion, test, stopped)


def _check_level(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: expected a level in (0, 0.5), got {alpha}")


def _mean_of_known(means: torch.Tensor) -> float:
    """Mean over the items that have a score; what is missing is not the prompt's fault."""
    known = means[means.isfinite()]
    return known.mean().item() if len(known) else -math.inf


def _draw_parent(pool: dict[int, tuple[torch.Tensor, tuple[str, ...]]], seed: int) -> int:
    """A number of the pool, as likely as the number of items on which it is best."""
    numbers = [*pool]
    means = torch.stack([pool[number][0] for number in numbers])
    wins = (means == means.amax(0)).sum(1).double()
    drawn = torch.multinomial(wins, 1, generator=torch.Generator().manual_seed(seed))
    return numbers[int(drawn)]


def _facts(found: Comparison) -> dict[str, Any]:
    return {name: value if isinstance(value, bool) else _number(value) for name, value in found._asdict().items()}


def _number(value: float) -> float | None:
    """As JSON can hold it."""
    return value if math.isfinite(value) else None
