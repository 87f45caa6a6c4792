"""GenEval's rules for detected objects: which ones are there, how many, of which colour, and where.

Derived again from arXiv 2310.11513 (3 and appendix): a detection counts from a confidence of 0.3, in counting tasks of 0.9;
one object stands left of another if its centre does by more than a tenth of both widths, and mostly in that direction.
Colours and relations look only at the most confident detections, as many as were asked for.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "COLOURS",
    "CONFIDENCE",
    "COUNTING_CONFIDENCE",
    "POSITIONS",
    "Box",
    "Found",
    "NameColours",
    "Verdict",
    "box_overlap",
    "check_objects",
    "keep_confident",
    "relations_between",
]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; y grows downwards."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
_MOST = 16
_SLACK, _MOSTLY = 0.1, 0.5


class Found(NamedTuple):
    """A detected object."""

    label: str
    score: float
    box: Box


class Verdict(NamedTuple):
    """Whether a picture shows what was asked, and everything that it does not."""

    correct: bool
    reasons: tuple[str, ...]


NameColours = Callable[[Sequence[Found], str], Sequence[str]]
"""From detections of one picture and the name of their class to one of :data:`COLOURS` for each."""


def keep_confident(
    found: Iterable[Found], *, threshold: float = CONFIDENCE, max_overlap: float = 1.0, most: int = _MOST
) -> dict[str, list[Found]]:
    """The detections that count, by class, the most confident first.

    Args:
        found: detections of one picture, in any order.
        threshold: of the confidence, exclusive.
        max_overlap: of two detections of a class whose overlap reaches it the less confident one goes; 1 keeps all.
        most: detections of a class, at most.

    Returns:
        Classes that have any.

    Example:
        >>> boxes = [Found("cat", 0.2, (0, 0, 1, 1)), Found("dog", 0.4, (0, 0, 1, 1)), Found("dog", 0.8, (5, 5, 9, 9))]
        >>> {label: [one.score for one in kept] for label, kept in keep_confident(boxes).items()}
        {'dog': [0.8, 0.4]}
    """
    kept: dict[str, list[Found]] = {}
    seen: dict[str, int] = {}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score <= threshold or seen.get(one.label, 0) >= most:
            continue
        seen[one.label] = seen.get(one.label, 0) + 1
        others = kept.setdefault(one.label, [])
        if max_overlap >= 1 or all(box_overlap(one.box, other.box) < max_overlap for other in others):
            others.append(one)
    return kept


def box_overlap(one: Box, other: Box) -> float:
    """Intersection over union.

    Example:
        >>> box_overlap((0, 0, 2, 2), (1, 0, 3, 2)) == 1 / 3
        True
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union else 0.0


def relations_between(one: Box, other: Box, *, slack: float = _SLACK) -> frozenset[str]:
    """Where one object is, as seen from another.

    With the offset ``d`` of the centres and ``r = sign(d) max(|d| - slack (size + other size), 0)`` by axis, a relation holds
    if its part of ``r / |d|`` exceeds a half: none if the boxes lie on each other, two on a diagonal.

    Args:
        one: its box.
        other: the box that it is related to.
        slack: share of both sizes that the centres have to be further apart.

    Returns:
        Of :data:`POSITIONS`.

    Example:
        >>> sorted(relations_between((0, 0, 2, 2), (10, 10, 12, 12))), relations_between((0, 0, 4, 4), (0, 0, 4, 4))
        (['above', 'left of'], frozenset())
    """
    moved = []
    offsets = [(one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    for axis, offset in enumerate(offsets):
        sizes = abs(one[axis + 2] - one[axis]) + abs(other[axis + 2] - other[axis])
        moved.append(math.copysign(max(abs(offset) - slack * sizes, 0.0), offset))
    if max(map(abs, moved)) < 1e-3:
        return frozenset()
    right, down = (part / math.hypot(*offsets) for part in moved)
    shares = {"left of": -right, "right of": right, "above": -down, "below": down}
    return frozenset(name for name, share in shares.items() if share > _MOSTLY)


def check_objects(
    objects: Mapping[str, Sequence[Found]], wanted: Mapping[str, Any], name_colours: NameColours
) -> Verdict:
    """Hold the detections of a picture against a line of ``evaluation_metadata.jsonl``.

    Every entry of ``include`` must hold and none of ``exclude``. An entry asks for ``count`` objects of a ``class`` or more,
    perhaps for as many of them in a ``color``, perhaps for all of them in a ``position`` (relation, number of the entry
    that it is related to, which must hold too).

    Args:
        objects: what :func:`keep_confident` gives.
        wanted: ``include`` and, if wanted, ``exclude``.
        name_colours: asked only where a colour is.

    Returns:
        The verdict.

    Example:
        >>> dogs = {"dog": [Found("dog", 0.9, (0, 0, 4, 4)), Found("dog", 0.8, (6, 0, 9, 4))]}
        >>> wanted = {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}]}
        >>> check_objects(dogs, wanted, lambda found, name: ["red"] * len(found))
        Verdict(correct=False, reasons=('expected dog < 2, found 2',))
    """
    reasons: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for entry in wanted.get("include", ()):
        name, count = entry["class"], entry["count"]
        chosen = list(objects.get(name, ()))[:count]
        wrong = [] if len(chosen) == count else [f"expected {name} >= {count}, found {len(chosen)}"]
        if "color" in entry and not wrong:
            colours = list(name_colours(chosen, name))
            if colours.count(entry["color"]) < count:
                wrong.append(f"expected {entry['color']} {name} >= {count}, found {', '.join(colours)}")
        if "position" in entry and not wrong:
            wrong += _misplaced(name, chosen, *entry["position"], groups)  # pyright: ignore
        reasons += wrong
        groups.append(None if wrong else chosen)
    for entry in wanted.get("exclude", ()):
        name, number = entry["class"], len(objects.get(entry["class"], ()))
        if number >= entry["count"]:
            reasons.append(f"expected {name} < {entry['count']}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def _misplaced(
    name: str, chosen: Sequence[Found], relation: str, target: int, groups: Sequence[Sequence[Found] | None]
) -> list[str]:
    others = groups[target]
    if others is None:
        return [f"expected {name} {relation} what is not there"]
    for one in chosen:
        for other in others:
            found = relations_between(one.box, other.box)
            if relation not in found:
                return [f"expected {name} {relation} {other.label}, found {' and '.join(sorted(found)) or 'neither'}"]
    return []
