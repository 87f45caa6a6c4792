"""JSON out of what language models say."""

import json
import re
from collections.abc import Callable
from typing import Any

__all__ = ["parse_json"]

_FENCE = re.compile(r"```[a-zA-Z]*\s*\n?(.*?)```", re.DOTALL)


def parse_json(text: str, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    r"""The object or list that an answer holds: bare, in a code fence, inside prose, or with small mistakes.

    Small mistakes (trailing commas, single quotes, a missing bracket) are mended by ``json_repair`` if it is installed.
    What is mended is still to be checked by whoever knows what it should say.

    Args:
        text: the answer.
        object_pairs_hook: as of :func:`json.loads`, for who has to see keys that come twice; not for what is mended.

    Returns:
        A dictionary or a list, or what the hook makes of an object; not empty.

    Raises:
        ValueError: if there is none, with the beginning of the text.

    Example:
        >>> parse_json('Sure! ```json\n{"a": [1, 2]}\n```')
        {'a': [1, 2]}
    """
    stripped = text.strip()
    starts = [at for at in (stripped.find("{"), stripped.find("[")) if at >= 0]
    ends = max(stripped.rfind("}"), stripped.rfind("]")) + 1
    spans = [stripped, *(found.strip() for found in _FENCE.findall(stripped))]
    spans += [stripped[min(starts) : ends]] if starts and ends > min(starts) else []
    for span in spans:
        try:
            value = json.loads(span, object_pairs_hook=object_pairs_hook)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict | list) and value:
            return value
    if starts:
        value = _repair(spans[1] if len(spans) > 2 else stripped[min(starts) :])
        if isinstance(value, dict | list) and value:
            return value
    raise ValueError(f"answer: expected a JSON object or list, got {text[:200]!r}")


def _repair(text: str) -> Any:
    try:
        from json_repair import loads  # in lensmini[endpoints]
    except ImportError:
        return None
    try:
        return loads(text)
    except (ValueError, RecursionError):
        return None
