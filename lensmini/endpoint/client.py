"""Ask many questions of a chat server at once, within bounds of time, money and concurrency."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lensmini.endpoint.cache import ReplyCache
from lensmini.endpoint.messages import ChatRequest, Failure, Reply
from lensmini.endpoint.session import Session, Settings
from lensmini.endpoint.spending import Ledger, Spent

__all__ = ["Endpoint"]

_POLL_S = 0.02


class Endpoint:
    """A model on a server that speaks the OpenAI chat protocol.

    Failed attempts are repeated with exponential back-off and full jitter, or after the time that the server asks for.
    A budget is never exceeded as far as the server's bill keeps to the protocol: before a request is sent, the most it
    can cost is set aside. An attempt whose answer got lost is sent again with the same ``Idempotency-Key``; a server
    that ignores it may bill it twice, which no client can see.

    Args:
        model: its name on the server.
        base_url: of the server, up to ``/v1``; None for OpenAI's own.
        api_key_env: environment variable with the key. It is read when something is asked, and kept nowhere. A server
            given by ``base_url`` may do without.
        concurrency: requests in flight.
        timeout_s: of one attempt.
        max_attempts: of one request.
        deadline_s: of one call of :meth:`ask`; later requests fail with the cause "deadline". None for none.
        backoff_s: the first wait is random up to this, later ones up to twice the one before, at most a minute.
        max_tokens_total: of everything this object asks; requests then need ``max_tokens``.
        max_cost: likewise, in the currency of ``prices``.
        prices: of a million tokens of questions and of answers.
        image_tokens: the most that one picture can count, for the budget.
        cache: SQLite file with all answers; None for none.

    Raises:
        ValueError: if a bound is not positive.
        ImportError: when asking, without openai and tenacity.

    Example:
        >>> endpoint = Endpoint("qwen", base_url="http://localhost:8000/v1", max_cost=5.0, prices=(0.2, 0.6))
        >>> endpoint.spent.cost
        0.0
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        max_attempts: int = 6,
        deadline_s: float | None = None,
        backoff_s: float = 1.0,
        max_tokens_total: int | None = None,
        max_cost: float | None = None,
        prices: tuple[float, float] | None = None,
        image_tokens: int = 8192,
        cache: str | Path | None = None,
    ) -> None:
        self._settings = Settings(
            model=model,
            base_url=base_url,
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_attempts=max_attempts,
            deadline_s=deadline_s,
            backoff_s=backoff_s,
            image_tokens=image_tokens,
        )
        self._ledger = Ledger(max_tokens=max_tokens_total, max_cost=max_cost, prices=prices)
        self._cache = None if cache is None else ReplyCache(cache)

    @property
    def model(self) -> str:
        """Its name on the server."""
        return self._settings.model

    @property
    def spent(self) -> Spent:
        """What everything asked so far has cost."""
        return replace(self._ledger.spent, failures=self._ledger.spent.failures.copy())

    @property
    def deadline_s(self) -> float | None:
        """Of one call of :meth:`ask`."""
        return self._settings.deadline_s

    def ask(
        self,
        requests: Iterable[ChatRequest],
        *,
        enough: Callable[[], bool] | None = None,
        deadline_s: float | None = None,
    ) -> Iterator[tuple[int, Reply | Failure]]:
        """Answers in the order in which they come.

        At most twice ``concurrency`` requests are read ahead of the answers taken, so ``requests`` may be endless.
        Equal requests in flight are asked once. Closing the iterator cancels what is in flight.

        Args:
            requests: the questions.
            enough: whether the caller can do without the rest; asked after every answer and otherwise every 20 ms. From
                then on no further request is read, and those in flight are given up with the cause "deadline".
            deadline_s: of this call, where it is sooner than the endpoint's.

        Yields:
            The request's position, from 0, and its reply or failure; each that was read exactly once.

        Raises:
            PermissionError: if the server refuses the key, or there is none; naming the environment variable.
            ValueError: if there is a budget and a request without ``max_tokens``, or ``deadline_s`` is not positive.
        """
        limits = [limit for limit in (self.deadline_s, deadline_s) if limit is not None]
        settings = replace(self._settings, deadline_s=min(limits, default=None))
        with Session(settings, self._ledger, self._cache) as session:
            waiting, exhausted, source = 0, False, enumerate(requests)
            while True:
                while not exhausted and waiting < 2 * self._settings.concurrency:
                    try:
                        index, request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    if self._ledger.bounded and request.max_tokens is None:
                        raise ValueError(f"requests[{index}]: expected max_tokens, which a budget needs, got none")
                    session.submit(index, request)
                    waiting += 1
                if not waiting:
                    return
                taken = session.take(None if enough is None else _POLL_S)
                if taken is not None:
                    waiting -= 1
                    yield taken
                if enough is not None and enough():
                    yield from session.give_up()
                    return

    def ask_all(self, requests: Sequence[ChatRequest]) -> list[Reply | Failure]:
        """Answers in the order of the requests; see :meth:`ask`."""
        found = dict(self.ask(requests))
        return [found[index] for index in range(len(requests))]

    def forget(self, request: ChatRequest) -> None:
        """Take an answer out of the cache, if there is one: for who could make nothing of it and will ask again."""
        if self._cache is not None:
            self._cache.remove(request.key(self.model))

    def close(self) -> None:
        """Let go of the cache's file."""
        if self._cache is not None:
            self._cache.close()
