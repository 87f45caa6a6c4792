"""JSON out of a model's answer, which may think aloud, fence it, or leave it unfinished."""

import json
import re
from typing import Any

__all__ = ["parse_json"]

MAX_TRIES = 256
"""Places in a text where JSON might begin that are tried; a hostile answer has a million."""

MAX_REPAIR = 65_536
"""Longest text to repair, in characters: the time to do so may grow faster than the text."""

_REASONING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)```", re.DOTALL)


def parse_json(text: str, *, repair: bool = True) -> Any:
    """The JSON value in an answer.

    In this order: the whole text; the last fenced block that is JSON; the last object (else array) that stands
    anywhere in it; what ``json_repair`` makes of the text from its first bracket on, where it is installed. Blocks
    of reasoning are left out. A repaired value may lack what was cut off: check its fields before you believe it.

    Args:
        text: the answer.
        repair: also accept what had to be repaired.

    Returns:
        Any JSON value if it is the whole text, else a dict or a list. NaN and infinities are no JSON.

    Raises:
        ValueError: with an excerpt, if there is none.

    Example:
        >>> parse_json('Here you are:\\n```json\\n{"score": 1}\\n```\\nBye.')
        {'score': 1}
    """
    answer = _REASONING.sub("", text).strip()
    for candidate in (answer, *reversed([block.strip() for block in _FENCE.findall(answer)])):
        try:
            return _DECODER.decode(candidate)
        except (ValueError, RecursionError):
            continue
    found = _last_value(answer)
    if found is None and repair:
        found = _repaired(answer)
    if found is None:
        excerpt = text if len(text) <= 160 else f"{text[:80]} ... {text[-80:]}"
        raise ValueError(f"text: expected JSON, got {len(text)} characters: {excerpt!r}")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _last_value(answer: str) -> Any:
    """The last object outside other values, or the last array if there is no object."""
    found: dict[type, Any] = {}
    place, tries = 0, 0
    while tries < MAX_TRIES and (start := re.compile(r"[{\[]").search(answer, place)):
        try:
            value, place = _DECODER.raw_decode(answer, start.start())
            found[type(value)] = value
        except (ValueError, RecursionError):
            place, tries = start.start() + 1, tries + 1
    return found.get(dict, found.get(list))


def _repaired(answer: str) -> Any:
    start = re.search(r"[{\[]", answer)
    if start is None or len(answer) > MAX_REPAIR:
        return None
    try:
        from json_repair import repair_json  # pip install lensmini[endpoints]
    except ImportError:
        return None
    try:
        value = json.loads(repair_json(answer[start.start() :]), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) and value else None
