"""What language models answer, read with care: what is good is kept, what is not is named, nothing is guessed."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lensmini.data.caption_checks import check_caption, count_words
from lensmini.endpoint import parse_json

__all__ = ["ANSWER_CAUSES", "parse_items", "parse_prompts", "parse_rubrics"]

ANSWER_CAUSES = (
    "refusal",
    "no JSON",
    "not a list",
    "not an object",
    "not a text",
    "characters",
    "cut",
    "loop",
    "too short",
    "too long",
    "repeated",
    "unknown name",
    "too few",
    "too many",
)
"""What may be wrong with an answer or a part of it."""

_LIKE_CAPTIONS = {"refusal": "refusal", "loop": "loop", "truncated": "cut"}
_NUMBERED = re.compile(r"^(.*?)(?: (\d+))?$")


def parse_prompts(text: str, *, min_words: int = 20, max_words: int = 90) -> tuple[list[str], list[str]]:
    """The prompts of an answer that should be a JSON list of texts.

    An object whose values are texts, or that holds one list, is taken too.

    Args:
        text: the answer.
        min_words: fewest words of a prompt (asked for are 30; some leave is given).
        max_words: most words of a prompt.

    Returns:
        The good prompts in their order, and a cause for everything that is wrong.

    Example:
        >>> parse_prompts('Here: ["A red bus.", 7]')[1]
        ['too short', 'not a text']
    """
    values, causes = _list(text)
    prompts: list[str] = []
    for value in values:
        if not isinstance(value, str):
            causes.append("not a text")
            continue
        prompt, words = " ".join(value.split()), count_words(value)
        wrong = _LIKE_CAPTIONS.get(check_caption(prompt, max_words=10**9) or "")
        if not _is_clean(prompt):
            causes.append("characters")
        elif words < min_words or words > max_words:
            causes.append("too short" if words < min_words else "too long")
        elif wrong is not None:
            causes.append(wrong)
        elif prompt.casefold() in (other.casefold() for other in prompts):
            causes.append("repeated")
        else:
            prompts.append(prompt)
    return prompts, causes


def parse_rubrics(
    text: str, names: Sequence[str], *, min_rubrics: int = 3, max_rubrics: int = 10, max_words: int = 40
) -> tuple[dict[str, str], list[str]]:
    """The rubrics of an answer that should be a flat JSON object from names to checks.

    Names are compared without case; a name that comes again is numbered anew, so that "count", "count 5" become "count",
    "count 2".

    Args:
        text: the answer.
        names: that are allowed.
        min_rubrics: fewer good ones than this are none.
        max_rubrics: further ones are left out.
        max_words: of a check.

    Returns:
        The good rubrics in their order, empty if there are too few, and a cause for everything that is wrong.

    Example:
        >>> parse_rubrics('{"count": "Two cats.", "Count 3": "One dog."}', ["count"], min_rubrics=1)
        ({'count': 'Two cats.', 'count 2': 'One dog.'}, [])
    """
    try:
        # Keys that come twice must not get lost.
        value = _as_pairs(parse_json(text, object_pairs_hook=_Pairs))
    except ValueError:
        return {}, ["refusal" if check_caption(text) == "refusal" else "no JSON"]
    if isinstance(value, _Pairs):
        inner = _as_pairs(value[0][1]) if len(value) == 1 else None
        pairs = inner if isinstance(inner, _Pairs) else value
    elif all(isinstance(_as_pairs(part), _Pairs) and len(part) == 1 for part in value):
        # A list of single entries says the same.
        pairs = [_as_pairs(part)[0] for part in value]
    else:
        return {}, ["not an object"]
    known = {name.casefold(): name for name in names}
    rubrics: dict[str, str] = {}
    counts: dict[str, int] = {}
    causes: list[str] = []
    for key, check in pairs:
        match = _NUMBERED.match(" ".join(str(key).split()).casefold())
        name = known.get(match.group(1)) if match else None
        if name is None:
            causes.append("unknown name")
        elif not isinstance(check, str) or not count_words(check):
            causes.append("not a text")
        elif not _is_clean(check):
            causes.append("characters")
        elif count_words(check) > max_words:
            causes.append("too long")
        elif " ".join(check.split()).casefold() in (other.casefold() for other in rubrics.values()):
            causes.append("repeated")
        elif len(rubrics) == max_rubrics:
            causes.append("too many")
        else:
            counts[name] = counts.get(name, 0) + 1
            rubrics[name if counts[name] == 1 else f"{name} {counts[name]}"] = " ".join(check.split())
    if len(rubrics) < min_rubrics:
        return {}, [*causes, "too few"]
    return rubrics, causes


def parse_items(text: str, *, max_words: int = 10) -> tuple[list[str], list[str]]:
    """Names of things from an answer that should be a JSON list; what the taxonomy's file cannot hold is left out.

    Example:
        >>> parse_items('["rye roll", 3, "a, b"]')
        (['rye roll'], ['not a text', 'not a text'])
    """
    values, causes = _list(text)
    names: list[str] = []
    for value in values:
        name = " ".join(value.split()) if isinstance(value, str) else ""
        if not count_words(name) or "," in name or name.count('"') % 2 or name.startswith("#"):
            causes.append("not a text")
        elif not _is_clean(name):
            causes.append("characters")
        elif count_words(name) > max_words:
            causes.append("too long")
        elif name.casefold() in (other.casefold() for other in names):
            causes.append("repeated")
        else:
            names.append(name)
    return names, causes


class _Pairs(list[tuple[str, Any]]):
    """An object's keys and values, also keys that come twice."""


def _as_pairs(value: Any) -> Any:
    return _Pairs(value.items()) if isinstance(value, dict) else value


def _is_clean(text: str) -> bool:
    """No half characters, no control characters, and nothing that a chat template would take for its own."""
    plain = all(unicodedata.category(character) not in ("Cs", "Cc", "Co", "Cn") for character in " ".join(text.split()))
    return plain and "<|" not in text and "|>" not in text


def _list(text: str) -> tuple[list[object], list[str]]:
    try:
        value = parse_json(text)
    except ValueError:
        return [], ["refusal" if check_caption(text) == "refusal" else "no JSON"]
    if isinstance(value, dict):
        inner = list(value.values())
        value = inner[0] if len(inner) == 1 and isinstance(inner[0], list) else inner
        if not all(isinstance(part, str) for part in value):
            return [], ["not a list"]
    return list(value), []
