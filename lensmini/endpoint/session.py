"""One round of questions: an event loop in a thread of its own, attempts, waits and what they cost."""

import asyncio
import os
import queue
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from lensmini.endpoint.cache import ReplyCache
from lensmini.endpoint.messages import ChatRequest, Failure, Reply
from lensmini.endpoint.spending import Ledger

__all__ = ["Session", "Settings"]

_RETRIED = {408: "timeout", 409: "server error", 425: "server error", 429: "rate limit"}
_FINAL = ("bad request", "deadline", "budget")
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Which server and how it is asked; see :class:`lensmini.endpoint.Endpoint`.

    Example:
        >>> Settings("qwen", "http://localhost:8000/v1").concurrency
        16
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout_s: float = 120.0
    max_attempts: int = 6
    deadline_s: float | None = None
    backoff_s: float = 1.0
    image_tokens: int = 8192

    def __post_init__(self) -> None:
        positive = {"concurrency": self.concurrency, "timeout_s": self.timeout_s, "max_attempts": self.max_attempts}
        positive |= {"deadline_s": 1 if self.deadline_s is None else self.deadline_s, "image_tokens": self.image_tokens}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not self.model or self.backoff_s < 0:
            raise ValueError(f"model, backoff_s: expected a name and at least 0, got {self.model!r}, {self.backoff_s}")


class _Attempt(Exception):
    """An attempt that failed and may be repeated."""

    def __init__(self, cause: str, detail: str, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.cause, self.detail, self.wait_s = cause, detail, wait_s


class Session:
    """One call of ``ask``: an event loop in a thread of its own, so that it works inside other loops too.

    Args:
        settings: the server and the bounds.
        ledger: counts and bounds what is spent.
        cache: where replies are kept.

    Example:
        >>> with Session(Settings("m", "http://localhost:9/v1", max_attempts=1), Ledger(), None) as session:
        ...     session.submit(7, ChatRequest([{"role": "user", "content": "Why?"}]))
        ...     index, outcome = session.take()
        >>> index, outcome.cause
        (7, 'connection')
    """

    def __init__(self, settings: Settings, ledger: Ledger, cache: ReplyCache | None) -> None:
        self.settings, self.ledger, self.cache = settings, ledger, cache
        self.key = os.environ.get(settings.api_key_env)
        if not self.key and settings.base_url is None:
            raise PermissionError(f"expected a key in the environment variable {settings.api_key_env}, found none")
        self.until = None if settings.deadline_s is None else time.monotonic() + settings.deadline_s
        self.done: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
        self.futures: dict[Future[Any], int] = {}
        self.flying: dict[str, asyncio.Future[Reply | Failure]] = {}

    def __enter__(self) -> "Session":
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="lensmini.endpoint", daemon=True)
        self.thread.start()
        try:
            self._run(self._begin())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for future in list(self.futures):
            future.cancel()
        try:
            self._run(self._end())
        finally:
            self._stop()

    def submit(self, index: int, request: ChatRequest) -> None:
        """Begin with a request."""
        future = asyncio.run_coroutine_threadsafe(self._answer(request), self.loop)
        self.futures[future] = index
        future.add_done_callback(lambda done: self.done.put((index, done)))

    def take(self, timeout_s: float | None = None) -> tuple[int, Reply | Failure] | None:
        """Wait for the next outcome of any request; None if there is none in time."""
        try:
            index, future = self.done.get(timeout=timeout_s)
        except queue.Empty:
            return None
        del self.futures[future]
        outcome = future.result()
        if isinstance(outcome, Failure):
            self.ledger.count(failure=outcome.cause)
        return index, outcome

    def give_up(self) -> Iterator[tuple[int, Reply | Failure]]:
        """What has come already, and failures for all that is still on its way."""
        for future, index in list(self.futures.items()):
            late = future.cancel()
            outcome = Failure("deadline", "enough others were answered") if late else future.result()
            if isinstance(outcome, Failure):
                self.ledger.count(failure=outcome.cause)
            yield index, outcome

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _begin(self) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise ImportError("asking a server needs openai: pip install lensmini[endpoints]") from error
        # The client wants some key; a local server does not look at it.
        self.client: Any = AsyncOpenAI(api_key=self.key or "none", base_url=self.settings.base_url, max_retries=0)
        self.slots = asyncio.Semaphore(self.settings.concurrency)

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()

    async def _answer(self, request: ChatRequest) -> Reply | Failure:
        key = request.key(self.settings.model)
        if key in self.flying:
            outcome = await asyncio.shield(self.flying[key])
            return self._free(outcome) if isinstance(outcome, Reply) else outcome
        promise = self.flying[key] = self.loop.create_future()
        try:
            outcome = await self._look_up_or_ask(key, request)
            promise.set_result(outcome)
            return outcome
        except BaseException as error:
            if isinstance(error, Exception):
                promise.set_exception(error)
                promise.exception()  # nobody else may be waiting for it
            else:
                promise.cancel()
            raise
        finally:
            del self.flying[key]

    def _free(self, reply: Reply) -> Reply:
        self.ledger.count(cached=1)
        return replace(reply, cached=True)

    async def _look_up_or_ask(self, key: str, request: ChatRequest) -> Reply | Failure:
        if self.cache is not None:
            found = await asyncio.to_thread(self.cache.get, key)
            if found is not None:
                return self._free(found)
        bound = (request.prompt_bound(self.settings.image_tokens), request.max_tokens or 0)
        async with self.slots:
            if not await self._reserve(bound):
                return Failure("budget", f"the most it can cost, {bound[0]} + {bound[1]} tokens, is more than is left")
            used = None
            estimated = False
            try:
                reply, estimated = await self._persist(key, request)
                used = (reply.prompt_tokens, reply.completion_tokens)
                if self.cache is not None:
                    # Paid for: kept even if the caller goes away just now.
                    await asyncio.shield(asyncio.to_thread(self.cache.put, key, reply))
                return reply
            except _Attempt as error:
                return Failure(error.cause, error.detail)
            finally:
                self.ledger.settle(bound, used, estimated=estimated)

    async def _reserve(self, bound: tuple[int, int]) -> bool:
        while not self.ledger.reserve(*bound):
            if not self.ledger.waiting:
                return False
            # What others set aside, perhaps in another thread, may come back.
            await asyncio.sleep(0.01)
        return True

    async def _persist(self, key: str, request: ChatRequest) -> tuple[Reply, bool]:
        """Attempts until one succeeds."""
        try:
            from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
            from tenacity.wait import wait_random_exponential
        except ImportError as error:
            raise ImportError("asking a server needs tenacity: pip install lensmini[endpoints]") from error
        jitter = wait_random_exponential(multiplier=self.settings.backoff_s, max=_LONGEST_WAIT_S)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked = error.wait_s if isinstance(error, _Attempt) else None
            return jitter(state) if asked is None else asked

        async def pause(seconds: float) -> None:
            left = self._left()
            if left is not None and seconds >= left:
                raise _Attempt("deadline", f"the next attempt would be in {seconds:.1f} s, and {left:.1f} s are left")
            await asyncio.sleep(seconds)

        retrying = AsyncRetrying(
            wait=wait,
            sleep=pause,
            stop=stop_after_attempt(self.settings.max_attempts),
            retry=retry_if_exception(lambda error: isinstance(error, _Attempt) and error.cause not in _FINAL),
            reraise=True,
        )
        return await retrying(self._send, key, request)

    def _left(self) -> float | None:
        return None if self.until is None else self.until - time.monotonic()

    async def _send(self, key: str, request: ChatRequest) -> tuple[Reply, bool]:
        """One attempt."""
        import openai

        left = self._left()
        if left is not None and left <= 0:
            raise _Attempt("deadline", f"{self.settings.deadline_s} s have passed")
        limit = self.settings.timeout_s if left is None else min(left, self.settings.timeout_s)
        self.ledger.count(calls=1)
        try:
            async with asyncio.timeout(limit):
                answer = await self.client.chat.completions.create(
                    model=self.settings.model,
                    **request.parameters(),
                    extra_body=dict(request.extra) or None,
                    extra_headers={"Idempotency-Key": key},
                    timeout=limit,
                )
            return _read_reply(answer, request)
        except (TimeoutError, openai.APITimeoutError):
            cause = "deadline" if limit < self.settings.timeout_s else "timeout"
            raise _Attempt(cause, f"no answer in {limit:.1f} s") from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except openai.APIConnectionError as error:
            raise _Attempt("connection", _short(error.__cause__ or error)) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise _Attempt("invalid reply", _short(error)) from None

    def _status_error(self, error: Any) -> Exception:
        status = int(error.status_code)
        detail = f"status {status}: {_short(error)}"
        if status in (401, 403):
            where = self.settings.base_url or "the server"
            return PermissionError(
                f"{where}: refused the key in the environment variable {self.settings.api_key_env} (status {status})"
            )
        if status in _RETRIED or status >= 500:
            return _Attempt(_RETRIED.get(status, "server error"), detail, _retry_after(error.response.headers))
        return _Attempt("bad request", detail)


def _read_reply(answer: Any, request: ChatRequest) -> tuple[Reply, bool]:
    """The reply, and whether its tokens are an estimate."""
    choice = answer.choices[0]
    text, refusal = choice.message.content or "", getattr(choice.message, "refusal", None) or ""
    if not isinstance(text, str):
        raise ValueError(f"expected text, got {type(text).__name__}")
    usage = getattr(answer, "usage", None)
    counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    known = all(type(count) is int and count >= 0 for count in counts)
    if not known:
        counts = (request.prompt_bound(1024) // 4, len(text.encode("utf-8", "replace")) // 4 + 1)
    return Reply(text, str(choice.finish_reason or "stop"), *counts, refusal=str(refusal)), not known  # pyright: ignore


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait, at most an hour."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * scale
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError):
                continue
        if seconds == seconds:
            return min(max(seconds, 0.0), 3600.0)
    return None


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
