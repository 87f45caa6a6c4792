"""The event loop behind an endpoint, in a thread of its own, so that whoever asks stays synchronous."""

import asyncio
import os
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensmini.endpoint.cache import ReplyCache
from lensmini.endpoint.messages import Failure, Reply
from lensmini.endpoint.spending import Ledger
from lensmini.endpoint.waiting import backoff_s
from lensmini.endpoint.wire import make_client, send

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["Asking", "Exchange", "Job", "Settings"]

MAX_WAIT_S = 300.0
"""A server that asks for a longer wait is out of quota, and the request fails."""

CLOSE_S = 10.0
"""How long whoever closes waits for the thread."""


@dataclass(frozen=True)
class Settings:
    """How an exchange asks; the fields are those of ``Endpoint``.

    Example:
        >>> Settings(base_url=None, concurrency=4, timeout_s=60.0, max_attempts=5, seed=0, cache=None).concurrency
        4
    """

    base_url: str | None
    concurrency: int
    timeout_s: float
    max_attempts: int
    seed: int
    cache: Path | None


@dataclass(frozen=True)
class Job:
    """A request ready to be sent: its body, its key, and the most tokens it can cost.

    Example:
        >>> Job({"model": "m"}, bytes(32), (40, 8)).bound
        (40, 8)
    """

    body: Mapping[str, Any]
    key: bytes
    bound: tuple[int, int]


@dataclass
class Asking:
    """One caller's requests under way: where the outcomes go, and until when.

    Example:
        >>> Asking().outcomes.empty()
        True
    """

    deadline: float | None = None
    outcomes: queue.SimpleQueue[tuple[int, Reply | Failure | BaseException]] = field(default_factory=queue.SimpleQueue)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass(eq=False)
class _Flight:
    """Equal requests share one flight, which ends early when nobody waits for it any more."""

    task: asyncio.Task[Reply | Failure]
    waiting: int = 0


class Exchange:
    """A thread with an event loop, the server's client, the cache and the requests in flight.

    Args:
        settings: how to ask.
        ledger: where calls are reserved and settled.

    Example:
        >>> settings = Settings(base_url="http://x/v1", concurrency=1, timeout_s=1, max_attempts=1, seed=0, cache=None)
        >>> exchange = Exchange(settings, Ledger())
        >>> exchange.start(api_key=None)
        >>> exchange.stop()
    """

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.users, self.pid = 0, os.getpid()
        self._settings, self._ledger = settings, ledger
        self._ready, self._error = threading.Event(), None
        self._flights: dict[bytes, _Flight] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pause_until = 0.0
        self._stopping = False
        self._thread = threading.Thread(name="lensmini-endpoint", daemon=True)

    def start(self, api_key: str | None) -> None:
        """Start the thread; errors of the client or the cache come up here."""
        # The key goes to the client alone, which holds it as long as the thread runs.
        self._thread = threading.Thread(target=self._run, args=(api_key,), name="lensmini-endpoint", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def stop(self) -> None:
        """End everything in flight, commit what has been paid, and join the thread."""
        self._ready.wait()
        self._call(self._stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)

    def open(self, deadline_s: float | None) -> Asking:
        """Begin a caller's asking; its deadline counts from now."""
        return Asking(None if deadline_s is None else self._loop.time() + deadline_s)

    def submit(self, asking: Asking, number: int, job: Job) -> None:
        """Ask; the outcome comes under ``number``."""
        if not self._call(self._begin, asking, number, job):
            asking.outcomes.put((number, _closed()))

    def take(self, asking: Asking) -> tuple[int, Reply | Failure | BaseException]:
        """Wait for the next outcome of something that was submitted."""
        while True:
            try:
                return asking.outcomes.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and asking.outcomes.empty():
                    raise _closed() from None

    def end(self, asking: Asking) -> None:
        """Give up what is still under way for this caller."""
        done = threading.Event()
        if self._call(self._abandon, asking, done) and threading.current_thread() is not self._thread:
            done.wait(CLOSE_S)

    def _call(self, function: Any, *args: Any) -> bool:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _run(self, api_key: str | None) -> None:
        asyncio.run(self._main(api_key))

    async def _main(self, api_key: str | None) -> None:
        settings, self._loop = self._settings, asyncio.get_running_loop()
        self._finished, self._settled = asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._cache: ReplyCache | None = None
        # One thread: waiting for another process's write must not stop the loop.
        with ThreadPoolExecutor(1, thread_name_prefix="lensmini-replies") as self._disk:
            try:
                self._client: AsyncOpenAI = make_client(
                    base_url=settings.base_url, api_key=api_key, timeout_s=settings.timeout_s
                )
                if settings.cache is not None:
                    self._cache = await self._loop.run_in_executor(self._disk, ReplyCache, settings.cache)
            except BaseException as error:
                self._error = error
                return
            finally:
                self._ready.set()
            await self._finished.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._client.close()
            if self._cache is not None:
                # Behind every reply that waits to be put, as there is one thread.
                await self._loop.run_in_executor(self._disk, self._cache.close)

    def _stop(self) -> None:
        self._stopping = True
        self._finished.set()

    def _begin(self, asking: Asking, number: int, job: Job) -> None:
        if self._stopping:
            asking.outcomes.put((number, _closed()))
            return
        task = self._spawn(self._serve(asking, number, job))
        asking.tasks.add(task)
        task.add_done_callback(asking.tasks.discard)

    def _abandon(self, asking: Asking, done: threading.Event) -> None:
        for task in asking.tasks:
            task.cancel()
        waiting = asyncio.gather(*asking.tasks, return_exceptions=True)
        waiting.add_done_callback(lambda _: done.set())

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, asking: Asking, number: int, job: Job) -> None:
        try:
            outcome = await self._outcome(job, asking.deadline)
        except asyncio.CancelledError:
            asking.outcomes.put((number, _closed()))
            raise
        except BaseException as error:
            outcome = error
        asking.outcomes.put((number, outcome))

    async def _outcome(self, job: Job, deadline: float | None) -> Reply | Failure:
        if deadline is not None and self._loop.time() >= deadline:
            return Failure("deadline", "not begun")
        flight = self._flights.get(job.key)
        first = flight is None
        if flight is None:
            flight = self._flights[job.key] = _Flight(self._spawn(self._fly(job)))
        flight.waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                outcome = await asyncio.shield(flight.task)
        except TimeoutError:
            return Failure("deadline", "no reply in time")
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                flight.task.cancel()
                if self._flights.get(job.key) is flight:
                    del self._flights[job.key]
        return replace(outcome, cached=True) if isinstance(outcome, Reply) and not first else outcome

    async def _fly(self, job: Job) -> Reply | Failure:
        if self._cache is not None:
            reply = await self._loop.run_in_executor(self._disk, self._cache.get, job.key)
            if reply is not None:
                return reply
        async with self._slots:
            for attempt in range(self._settings.max_attempts):
                await self._wait_for_server(job)
                if not await self._reserve(job):
                    return Failure("budget", f"up to {job.bound[0]} + {job.bound[1]} tokens do not fit")
                ended = await self._send(job)
                wait = backoff_s(attempt, seed=self._settings.seed, key=job.key, retry_after=ended.retry_after)
                if not ended.again or attempt + 1 == self._settings.max_attempts or wait > MAX_WAIT_S:
                    break
                await asyncio.sleep(wait)
        return ended.outcome

    async def _send(self, job: Job) -> Any:
        used, estimated = job.bound, True
        self._ledger.count_call()
        try:
            ended = await send(self._client, job.body, job.key, job.bound, self._settings.timeout_s)
            used, estimated = ended.used, ended.estimated
        except asyncio.CancelledError:
            raise
        except BaseException:
            used, estimated = (0, 0), False
            raise
        finally:
            self._ledger.settle(job.bound, used, estimated=estimated)
            self._settled.set()
        if ended.retry_after is not None and ended.retry_after <= MAX_WAIT_S:
            # The limit is the key's, not the request's: nobody goes before it is over.
            self._pause_until = max(self._pause_until, self._loop.time() + ended.retry_after)
        if self._cache is not None and isinstance(ended.outcome, Reply):
            # Paid: it is kept even if nobody waits any more.
            await asyncio.shield(self._loop.run_in_executor(self._disk, self._cache.put, job.key, ended.outcome))
        return ended

    async def _wait_for_server(self, job: Job) -> None:
        while (wait := self._pause_until - self._loop.time()) > 0:
            await asyncio.sleep(wait + backoff_s(0, seed=self._settings.seed, key=job.key))

    async def _reserve(self, job: Job) -> bool:
        while (answer := self._ledger.reserve(*job.bound)) == "later":
            self._settled.clear()
            await self._settled.wait()
        return answer == "reserved"


def _closed() -> RuntimeError:
    return RuntimeError("endpoint: closed while asking")
