"""What asking costs, and a budget that holds while many requests are under way."""

import threading
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Ledger", "Spent"]


@dataclass(frozen=True)
class Spent:
    """What an endpoint has used up.

    Args:
        calls: attempts sent to the server.
        cached: requests answered without a call of their own.
        prompt_tokens: billed, or estimated from above where the server did not say or the answer never came.
        completion_tokens: likewise.
        cost: both, in the currency of the prices; 0 without prices.
        estimated: calls whose tokens are such estimates.
        failures: how many requests ended in each cause.

    Example:
        >>> Spent().cost
        0.0
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    estimated: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Ledger:
    """Tokens reserved before a call, and settled after it; used by many threads.

    At any time what is settled and what is reserved together stay within the budget, so the budget holds as long as
    no call is billed more than was reserved for it.

    Args:
        max_tokens_total: most prompt and completion tokens together; None for no limit.
        max_cost: most money; needs ``prices``; None for no limit.
        prices: of a million prompt tokens, and of a million completion tokens.

    Raises:
        ValueError: for negative numbers, or a cost without prices.

    Example:
        >>> ledger = Ledger(max_tokens_total=100)
        >>> ledger.reserve(20, 50), ledger.reserve(20, 50), ledger.reserve(20, 81)
        ('reserved', 'later', 'never')
        >>> ledger.settle((20, 50), (18, 4))
        >>> ledger.reserve(20, 50), ledger.spent().prompt_tokens
        ('reserved', 18)
    """

    def __init__(
        self,
        *,
        max_tokens_total: int | None = None,
        max_cost: float | None = None,
        prices: tuple[float, float] | None = None,
    ) -> None:
        if max_tokens_total is not None and not max_tokens_total >= 0:
            raise ValueError(f"max_tokens_total: expected at least 0, got {max_tokens_total}")
        if max_cost is not None and not max_cost >= 0:
            raise ValueError(f"max_cost: expected at least 0, got {max_cost}")
        if prices is not None and (len(prices) != 2 or not all(price >= 0 for price in prices)):
            raise ValueError(f"prices: expected two numbers of at least 0, got {prices}")
        if max_cost is not None and prices is None:
            raise ValueError("prices: expected the prices per million tokens, as max_cost is given")
        self.max_tokens_total, self.max_cost, self.prices = max_tokens_total, max_cost, prices
        self._lock = threading.Lock()
        self._reserved, self._settled = (0, 0), (0, 0)
        self._calls = self._cached = self._estimated = 0
        self._failures: Counter[str] = Counter()

    @property
    def limited(self) -> bool:
        """Whether there is any budget."""
        return self.max_tokens_total is not None or self.max_cost is not None

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> str:
        """Set tokens aside: "reserved"; "later" if they may fit when others have settled; "never" otherwise."""
        with self._lock:
            wanted = (prompt_tokens, completion_tokens)
            if not self._fits(_sum(self._settled, wanted)):
                return "never"
            if not self._fits(_sum(self._settled, self._reserved, wanted)):
                return "later"
            self._reserved = _sum(self._reserved, wanted)
            return "reserved"

    def settle(self, reserved: tuple[int, int], used: tuple[int, int], *, estimated: bool = False) -> None:
        """End one call: give back what was ``reserved``, and count what it ``used``."""
        with self._lock:
            self._reserved = (self._reserved[0] - reserved[0], self._reserved[1] - reserved[1])
            self._settled = _sum(self._settled, used)
            self._estimated += estimated

    def count_call(self) -> None:
        """Count an attempt that is about to be sent."""
        with self._lock:
            self._calls += 1

    def count_outcome(self, *, cached: bool = False, cause: str | None = None) -> None:
        """Count a request that is done."""
        with self._lock:
            self._cached += cached
            if cause is not None:
                self._failures[cause] += 1

    def spent(self) -> Spent:
        """What is settled by now; what is under way is not in it."""
        with self._lock:
            prompt, completion = self._settled
            cost = self._cost(self._settled)
            failures = Counter(self._failures)
            return Spent(self._calls, self._cached, prompt, completion, cost, self._estimated, failures)

    def _cost(self, tokens: tuple[int, int]) -> float:
        # From whole token counts each time: a running sum of prices would drift.
        return (tokens[0] * self.prices[0] + tokens[1] * self.prices[1]) / 1e6 if self.prices else 0.0

    def _fits(self, tokens: tuple[int, int]) -> bool:
        return (self.max_tokens_total is None or sum(tokens) <= self.max_tokens_total) and (
            self.max_cost is None or self._cost(tokens) <= self.max_cost
        )


def _sum(*tokens: tuple[int, int]) -> tuple[int, int]:
    return sum(prompt for prompt, _ in tokens), sum(completion for _, completion in tokens)
