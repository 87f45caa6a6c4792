"""One attempt at one request: what is sent, what the answer means, and what it is taken to have cost."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lensmini.endpoint.messages import Failure, Reply, Unauthorised
from lensmini.endpoint.waiting import retry_after_s

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

__all__ = ["Attempt", "make_client", "read_reply", "send"]

NO_KEY = "no-key"
"""What local servers are sent, which ask for no key."""

MAX_DETAIL = 500
"""Longest detail of a failure, in characters."""

_NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Args:
        outcome: the reply or the failure.
        used: prompt and completion tokens that it is counted for.
        estimated: these are an estimate from above.
        again: another attempt may succeed.
        retry_after: seconds the server asks to wait.

    Example:
        >>> Attempt(Failure("timeout"), (0, 0), again=True).again
        True
    """

    outcome: Reply | Failure
    used: tuple[int, int]
    estimated: bool = False
    again: bool = False
    retry_after: float | None = None


def make_client(*, base_url: str | None, api_key: str | None, timeout_s: float) -> "AsyncOpenAI":
    """The protocol's client, which does not retry by itself.

    Args:
        base_url: of the server, up to and with ``/v1``; None for OpenAI's.
        api_key: None for a server that needs none.
        timeout_s: of one attempt.

    Raises:
        ImportError: without the openai package.

    Example:
        >>> make_client(base_url="http://127.0.0.1:8000/v1", api_key=None, timeout_s=60.0).max_retries
        0
    """
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ImportError("asking a chat server needs openai: pip install lensmini[endpoints]") from error
    return AsyncOpenAI(api_key=api_key or NO_KEY, base_url=base_url, timeout=timeout_s, max_retries=0)


async def send(
    client: "AsyncOpenAI", body: Mapping[str, Any], key: bytes, bound: tuple[int, int], timeout_s: float
) -> Attempt:
    """Send a request once.

    An answer with an error costs nothing. One that does not come may have cost everything: the server has the
    question, and bills it whether or not anybody listens.

    Args:
        client: from :func:`make_client`.
        body: the request as the server gets it.
        key: of the request; sent as ``Idempotency-Key``, so that a server that knows the header bills it once.
        bound: prompt and completion tokens it can cost at most.
        timeout_s: until the last byte of the answer.

    Raises:
        Unauthorised: if the server rejects the key.

    Example:
        >>> client = make_client(base_url="http://127.0.0.1:9/v1", api_key=None, timeout_s=5.0)
        >>> body = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        >>> asyncio.run(send(client, body, bytes(32), (9, 9), 5.0)).outcome.cause
        'connection'
    """
    import openai  # pip install lensmini[endpoints]

    rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
    try:
        async with asyncio.timeout(timeout_s):
            answer = await client.chat.completions.with_raw_response.create(
                model=body["model"],
                messages=body["messages"],
                extra_body=rest,
                extra_headers={"Idempotency-Key": key.hex()},
                timeout=timeout_s,
            )
    except openai.APIStatusError as error:
        return _status(error, client.api_key)
    except (openai.APITimeoutError, TimeoutError) as error:
        used = (0, 0) if type(error.__cause__).__name__ in _NEVER_SENT else bound
        return Attempt(Failure("timeout", f"no answer within {timeout_s:g} s"), used, used != (0, 0), again=True)
    except openai.APIConnectionError as error:
        cause = error.__cause__
        used = (0, 0) if type(cause).__name__ in _NEVER_SENT else bound
        detail = _clean(f"{type(cause).__name__}: {cause}" if cause else error.message, client.api_key)
        return Attempt(Failure("connection", detail), used, used != (0, 0), again=True)
    return read_reply(answer.http_response.content, bound)


def read_reply(content: bytes, bound: tuple[int, int]) -> Attempt:
    """What an answer without an error says.

    Args:
        content: of the answer.
        bound: prompt and completion tokens it can have cost at most, counted where it does not say.

    Returns:
        A reply; or a failure, "refused" or "invalid reply", which has its cost too.

    Example:
        >>> read_reply(b"<html>", (9, 9)).outcome.cause
        'invalid reply'
    """
    try:
        answer = json.loads(content)
        choice = answer["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason") or "stop"
        refusal = message.get("refusal") or None
        text = _text(message.get("content"))
        thoughts = message.get("reasoning_content")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}, in {content[:80]!r}"[:MAX_DETAIL]
        return Attempt(Failure("invalid reply", detail), bound, estimated=True)
    written = sum(len(part.encode("utf-8", "surrogatepass")) for part in (text, thoughts) if isinstance(part, str))
    used, estimated = _usage(answer.get("usage"), (bound[0], min(bound[1], written) if bound[1] else written))
    if reason == "content_filter" or (refusal and not text):
        return Attempt(Failure("refused", str(refusal or "content filter")[:MAX_DETAIL]), used, estimated)
    # A model that thinks up to its limit has no answer, and is paid all the same: it must not be asked again.
    if text is None and reason != "length":
        return Attempt(Failure("invalid reply", f"no text, finish_reason {reason!r}"[:MAX_DETAIL]), used, estimated)
    return Attempt(Reply(text or "", str(reason), *used, refusal=refusal and str(refusal)), used, estimated)


def _text(content: Any) -> str | None:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    if content is None or isinstance(content, str):
        return content
    raise TypeError(f"content is {type(content).__name__}")


def _usage(usage: Any, estimate: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    usage = usage if isinstance(usage, dict) else {}
    counts = []
    for name, guess in zip(("prompt_tokens", "completion_tokens"), estimate, strict=True):
        count = usage.get(name)
        good = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        counts.append((count if good else guess, not good))
    return (counts[0][0], counts[1][0]), counts[0][1] or counts[1][1]


def _status(error: "APIStatusError", api_key: str) -> Attempt:
    status, code = error.status_code, str(error.code or "")
    detail = _clean(f"{status}: {error.message}", api_key)
    if status == 401:
        # Without its cause: the request it carries holds the key.
        raise Unauthorised(detail) from None
    if code == "content_filter":
        return Attempt(Failure("refused", detail), (0, 0))
    again = status in (408, 409, 429) or status >= 500
    if status == 429:
        cause, again = "rate limit", code != "insufficient_quota"
    elif status == 408:
        cause = "timeout"
    elif again:
        cause = "server error"
    else:
        cause = "forbidden" if status == 403 else "bad request"
    wait = retry_after_s(error.response.headers, time.time()) if again else None
    return Attempt(Failure(cause, detail), (0, 0), again=again, retry_after=wait)


def _clean(detail: str, api_key: str) -> str:
    """Servers echo what they were sent."""
    return detail.replace(api_key, "[key]")[:MAX_DETAIL] if len(api_key) >= 8 else detail[:MAX_DETAIL]
