"""How long to wait before asking again."""

import email.utils
import math
import random
from collections.abc import Mapping

__all__ = ["backoff_s", "retry_after_s"]

FIRST_S = 0.5
"""Longest wait after the first attempt; doubles with each further one."""

LONGEST_S = 30.0
"""Longest wait of our own choice."""


def backoff_s(attempt: int, *, seed: int, key: bytes, retry_after: float | None = None) -> float:
    """Seconds to wait after a failed attempt: exponential, with full jitter.

    ``U(0, min(30, 0.5 * 2^attempt))``, drawn from (seed, key, attempt) alone, so that a crowd that was turned away
    together does not come back together. It comes on top of what the server asked for.

    Args:
        attempt: 0 for the first.
        seed: of the run.
        key: of the request.
        retry_after: seconds the server asked for.

    Returns:
        Seconds, at least ``retry_after``.

    Example:
        >>> 2.0 <= backoff_s(0, seed=0, key=b"k", retry_after=2.0) <= 2.5
        True
    """
    draw = random.Random(f"{seed} {key.hex()} {attempt}").random()
    return (retry_after or 0.0) + draw * min(LONGEST_S, FIRST_S * 2.0 ** min(attempt, 60))


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """What the server asked for: ``Retry-After-Ms``, or ``Retry-After`` in seconds or as a date (RFC 9110, 10.2.3).

    Args:
        headers: of the answer, found in any case.
        now: seconds since 1970, for a date.

    Returns:
        Seconds from now, at least 0; None without such a header or if it makes no sense.

    Example:
        >>> retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=20.0)
        40.0
    """
    lower = {name.lower(): value for name, value in headers.items()}
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        if name not in lower:
            continue
        try:
            seconds = float(lower[name]) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(lower[name]).timestamp() - now
            except (ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
