"""Numbers out of what a judge says, or the reason why there are none. Never an exception, never a number by default.

No axes: text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lensmini.rewards.rubric import Criterion

__all__ = ["MAX_ANSWER", "parse_answers"]

MAX_ANSWER = 20_000
"""Characters of an answer that is still read: a judge that says more has lost its thread."""
_REASONING = re.compile(r"<(think|thinking|reasoning|analysis)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"-?\d{1,9}(\.\d{1,9})?", re.ASCII)


def parse_answers(text: str, criteria: Mapping[str, Criterion]) -> dict[str, float] | str:
    """Scores by opaque id from the JSON object in an answer, or the cause why there are none.

    Reasoning blocks are removed. Of the objects that are left, those with exactly the ids that were asked for count;
    if there are several, they have to agree. Ids of other criteria, keys that come twice, NaN, digits of other scripts and
    text in place of a number make an answer unreadable; a number that is not on the criterion's scale is out of range.

    Args:
        text: the answer.
        criteria: what was asked, by the id it was asked under.

    Returns:
        Scores in [0, 1] by that id, or ``"unparsable"`` or ``"out_of_range"``.

    Example:
        >>> asked = {"x7": Criterion(id="count", text="Two cups.")}
        >>> parse_answers('I see two. {"x7": 1}', asked), parse_answers('{"x7": 2}', asked), parse_answers("1", asked)
        ({'x7': 1.0}, 'out_of_range', 'unparsable')
    """
    if len(text) > MAX_ANSWER:
        return "unparsable"
    found = [value for value in _objects(_REASONING.sub(" ", text)) if value.keys() == criteria.keys()]
    results = [_scores(value, criteria) for value in found]
    if not results:
        return "unparsable"
    return results[0] if all(result == results[0] for result in results) else "unparsable"


def _scores(value: Mapping[str, Any], criteria: Mapping[str, Criterion]) -> dict[str, float] | str:
    scores = {}
    for name, criterion in criteria.items():
        answer = value[name]
        if isinstance(answer, str) and _NUMBER.fullmatch(answer.strip()):
            answer = float(answer)
        if isinstance(answer, bool):
            if criterion.scale != "binary":
                return "unparsable"
        elif not isinstance(answer, int | float):
            return "unparsable"
        try:
            scores[name] = criterion.normalise(answer)
        except (ValueError, OverflowError):
            return "out_of_range"
    return scores


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects that do not stand inside another one, and the objects that are values of those."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse)
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                yield value
                yield from (inner for inner in value.values() if isinstance(inner, dict))
        at = text.find("{", end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
