"""What asking costs, and the budget that it never exceeds."""

import threading
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Ledger", "Spent"]


@dataclass(slots=True)
class Spent:
    """What a client has done so far.

    Args:
        calls: requests sent, attempts that failed among them.
        replies: answers paid for.
        cached: answers that cost nothing.
        prompt_tokens: billed, of questions.
        completion_tokens: billed, of answers.
        cost: in the currency of the prices; 0 without prices.
        estimated: replies whose server named no usage, so that bytes / 4 were counted.
        failures: requests that ended without an answer, by cause.

    Example:
        >>> Spent(calls=3).tokens
        0
    """

    calls: int = 0
    replies: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    estimated: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """Billed, of questions and answers."""
        return self.prompt_tokens + self.completion_tokens


class Ledger:
    """Reserves the most that a request can cost before it is sent, and settles what it did cost.

    Args:
        max_tokens: of all questions and answers, None for no bound.
        max_cost: in the currency of ``prices``, None for no bound.
        prices: of a million tokens of questions and of answers.

    Raises:
        ValueError: if a bound is not positive, a price negative, or ``max_cost`` comes without prices.

    Example:
        >>> ledger = Ledger(max_tokens=100)
        >>> ledger.reserve(60, 30), ledger.reserve(5, 5), ledger.reserve(1, 0)
        (True, True, False)
        >>> ledger.settle((60, 30), (50, 10)), ledger.reserve(20, 10), ledger.spent.tokens
        (None, True, 60)
    """

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens_total: expected a positive integer, got {max_tokens}")
        if max_cost is not None and (prices is None or not max_cost > 0):
            raise ValueError(f"max_cost: expected a positive number and prices, got {max_cost} and {prices}")
        if prices is not None and not (len(prices) == 2 and all(price >= 0 for price in prices)):
            raise ValueError(f"prices: expected two numbers of at least 0 per million tokens, got {prices}")
        self.max_tokens, self.max_cost, self.prices = max_tokens, max_cost, prices
        self.spent = Spent()
        self._lock = threading.Lock()
        self._reserved = [0, 0]

    @property
    def bounded(self) -> bool:
        """Whether there is a budget at all."""
        return self.max_tokens is not None or self.max_cost is not None

    @property
    def waiting(self) -> bool:
        """Whether some reservation may still give back."""
        return any(self._reserved)

    def price(self, prompt: int, completion: int) -> float:
        """What tokens cost."""
        return 0.0 if self.prices is None else (prompt * self.prices[0] + completion * self.prices[1]) / 1e6

    def reserve(self, prompt: int, completion: int) -> bool:
        """Set tokens aside if the budget allows it."""
        with self._lock:
            spent = self.spent
            prompts = spent.prompt_tokens + self._reserved[0] + prompt
            completions = spent.completion_tokens + self._reserved[1] + completion
            if self.max_tokens is not None and prompts + completions > self.max_tokens:
                return False
            if self.max_cost is not None and self.price(prompts, completions) > self.max_cost:
                return False
            self._reserved[0] += prompt
            self._reserved[1] += completion
            return True

    def settle(self, reserved: tuple[int, int], used: tuple[int, int] | None, *, estimated: bool = False) -> None:
        """Give a reservation back and count what was billed; None if nothing was."""
        with self._lock:
            self._reserved[0] -= reserved[0]
            self._reserved[1] -= reserved[1]
            if used is not None:
                self.spent.replies += 1
                self.spent.estimated += estimated
                self.spent.prompt_tokens += used[0]
                self.spent.completion_tokens += used[1]
                self.spent.cost = self.price(self.spent.prompt_tokens, self.spent.completion_tokens)

    def count(self, *, calls: int = 0, cached: int = 0, failure: str | None = None) -> None:
        """Count what costs nothing."""
        with self._lock:
            self.spent.calls += calls
            self.spent.cached += cached
            if failure is not None:
                self.spent.failures[failure] += 1
