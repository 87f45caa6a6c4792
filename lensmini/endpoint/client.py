"""Endpoint: many questions to one chat model, in order of completion, within a deadline and a budget."""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from lensmini.endpoint.cache import request_key
from lensmini.endpoint.exchange import Exchange, Job, Settings
from lensmini.endpoint.messages import ChatRequest, Failure, Reply, Unauthorised
from lensmini.endpoint.spending import Ledger, Spent, prompt_bound

__all__ = ["Endpoint"]


class Endpoint:
    """A chat model behind an OpenAI-compatible server (hosted, vLLM, SGLang, llama.cpp, a gateway).

    408, 409, 429, 5xx, lost connections and timeouts are tried again, after exponential back-off with full jitter and
    not before the server's ``Retry-After``; other errors fail at once. Requests that are equal in everything that is
    sent are asked once; with a cache, once ever. Two processes that ask the same thing at the same time may both pay,
    unless the server honours ``Idempotency-Key``.

    Budgets are kept by reserving, before each attempt, more than it can cost, and hold over all asking of this object
    in this process. An attempt that was cut off (timeout, lost connection, closing) counts with its reservation.
    Failures are never cached; replies that were cut at ``max_tokens`` are, as they are paid.

    Args:
        model: its name at the server.
        base_url: of the server, up to and with ``/v1``; None for OpenAI's (or ``OPENAI_BASE_URL``).
        api_key_env: environment variable with the key, read when asking begins and sent to ``base_url``; servers with
            a ``base_url`` may do without, and None sends none.
        concurrency: most requests at the server at once, 1 to 1000, over all asking of this object.
        timeout_s: of one attempt.
        max_attempts: of one request.
        deadline_s: of one :meth:`ask`, from its first ``next``; None for none. What has no reply by then fails.
        max_tokens_total: most prompt and completion tokens; needs requests with ``max_tokens``.
        max_cost: most money; needs ``prices``, and requests with ``max_tokens``.
        prices: of a million prompt tokens, and of a million completion tokens.
        tokens_per_image: what a picture costs at most, for the reservations.
        cache: file of replies, shared by processes of one machine; None for none.
        cache_name: tells servers or revisions apart that go by the same model name.
        seed: of the jitter.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> endpoint = Endpoint("tiny", base_url="http://127.0.0.1:9/v1", max_attempts=1)
        >>> [outcome.cause for _, outcome in endpoint.ask([ChatRequest([{"role": "user", "content": "?"}])])]
        ['connection']
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str | None = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        max_attempts: int = 6,
        deadline_s: float | None = None,
        max_tokens_total: int | None = None,
        max_cost: float | None = None,
        prices: tuple[float, float] | None = None,
        tokens_per_image: int = 4096,
        cache: Path | str | None = None,
        cache_name: str = "",
        seed: int = 0,
    ) -> None:
        if not model:
            raise ValueError("model: expected a name, got ''")
        if not 1 <= concurrency <= 1000:
            raise ValueError(f"concurrency: expected 1 to 1000, got {concurrency}")
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s: expected more than 0, got {timeout_s}")
        if max_attempts < 1:
            raise ValueError(f"max_attempts: expected at least 1, got {max_attempts}")
        if deadline_s is not None and not deadline_s >= 0:
            raise ValueError(f"deadline_s: expected at least 0, got {deadline_s}")
        if tokens_per_image < 0:
            raise ValueError(f"tokens_per_image: expected at least 0, got {tokens_per_image}")
        self.model, self.api_key_env, self.deadline_s = model, api_key_env, deadline_s
        self.tokens_per_image, self.cache_name = tokens_per_image, cache_name
        path = None if cache is None else Path(cache)
        self._settings = Settings(base_url, concurrency, timeout_s, max_attempts, seed, path)
        self._ledger = Ledger(max_tokens_total=max_tokens_total, max_cost=max_cost, prices=prices)
        self._exchange: Exchange | None = None
        # Reentrant, as a forgotten iterator may be closed at any allocation.
        self._lock = threading.RLock()

    @property
    def spent(self) -> Spent:
        """What this object has used up by now."""
        return self._ledger.spent()

    def ask(self, requests: Iterable[ChatRequest]) -> Iterator[tuple[int, Reply | Failure]]:
        """Ask, and hand over each outcome when it is there.

        The requests are taken from the caller's thread, at most ``2 * concurrency`` ahead of what has been handed
        over, and may be endless. Closing the iterator ends what is in flight.

        Args:
            requests: any number; their pictures are in memory while they are under way.

        Yields:
            The number of the request, from 0, and its reply or its failure; one for each request.

        Raises:
            Unauthorised: if the server rejects the key, or wants one and there is none; the rest is given up.
            CacheError: if the cache cannot be read or written; the rest is given up, so that nothing is paid in vain.
            ValueError: for a request without ``max_tokens`` when there is a budget.

        Example:
            >>> list(Endpoint("tiny", base_url="http://127.0.0.1:9/v1").ask([]))
            []
        """
        source, more, pending = enumerate(requests), True, 0
        with self._running() as exchange:
            asking = exchange.open(self.deadline_s)
            try:
                while True:
                    while more and pending < 2 * self._settings.concurrency:
                        number, request = next(source, (0, None))
                        if request is None:
                            more = False
                            break
                        pending += 1
                        try:
                            job = self._job(request)
                        except _Unsendable as error:
                            asking.outcomes.put((number, Failure("bad request", str(error))))
                        else:
                            exchange.submit(asking, number, job)
                        if not asking.outcomes.empty():
                            break
                    if not pending:
                        return
                    number, outcome = exchange.take(asking)
                    pending -= 1
                    if isinstance(outcome, BaseException):
                        raise self._explained(outcome)
                    if isinstance(outcome, Failure):
                        self._ledger.count_outcome(cause=outcome.cause)
                    else:
                        self._ledger.count_outcome(cached=outcome.cached)
                    yield number, outcome
            finally:
                exchange.end(asking)

    def ask_all(self, requests: Iterable[ChatRequest]) -> list[Reply | Failure]:
        """Ask, and return the outcomes in the order of the requests; otherwise like :meth:`ask`.

        Example:
            >>> Endpoint("tiny", base_url="http://127.0.0.1:9/v1").ask_all([])
            []
        """
        outcomes = dict(self.ask(requests))
        return [outcomes[number] for number in range(len(outcomes))]

    def close(self) -> None:
        """End all asking of this object, in whatever thread; it can be asked again."""
        with self._lock:
            exchange, self._exchange = self._exchange, None
            if exchange is not None and exchange.pid == os.getpid():
                exchange.stop()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, base_url={self._settings.base_url!r})"

    @contextlib.contextmanager
    def _running(self) -> Iterator[Exchange]:
        """The thread, which lives as long as anybody asks; a forked process has its own."""
        with self._lock:
            if self._exchange is None or self._exchange.pid != os.getpid():
                exchange = Exchange(self._settings, self._ledger)
                exchange.start(self._key())
                self._exchange = exchange
            exchange = self._exchange
            exchange.users += 1
        try:
            yield exchange
        finally:
            with self._lock:
                exchange.users -= 1
                if not exchange.users and self._exchange is exchange and exchange.pid == os.getpid():
                    self._exchange = None
                    exchange.stop()

    def _key(self) -> str | None:
        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        if not key and self._settings.base_url is None:
            raise Unauthorised(f"no key in the environment variable {self.api_key_env}, and no base_url of another")
        return key

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, Unauthorised):
            return Unauthorised(f"the server rejects the key in the environment variable {self.api_key_env}: {error}")
        return error

    def _job(self, request: ChatRequest) -> Job:
        if self._ledger.limited and request.limit is None:
            raise ValueError("max_tokens: expected a number in every request, as there is a budget to keep")
        body = request.body(self.model)
        try:
            key = request_key(body, self.cache_name)
        except ValueError as error:
            raise _Unsendable(str(error)) from error
        return Job(body, key, (prompt_bound(body, self.tokens_per_image), request.limit or 0))


class _Unsendable(ValueError):
    """A request that no server could read."""
