"""A scripted stand-in for a large language model in the miniature world: mechanism only, it has no intelligence of its own.

As a rewriter it knows the requests' grammar and obeys the rules that it finds, letter for letter, in its system prompt: some
of them lead to the captions that the image model was trained on, others do nothing or harm, and it does not know which. As a
proposer it reads nothing but failures and adds one rule of the pool that was not rejected yet, blindly. What it shows is
that the search finds the helpful rules and keeps the others out; not that a language model would write them.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lensmini.data import Scene, describe_scene
from lensmini.data.scene_captions import PLURALS, RELATIONS, SYNONYMS, place_name, relations_between
from lensmini.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, SceneObject

__all__ = ["BY_HAND", "RULES", "SEED_PROMPT", "read_request", "scripted_answer", "with_rules"]

SEED_PROMPT = "You rewrite requests for pictures of simple scenes."
RULES = {
    "opening": "Begin with the number of objects and the background.",
    "place": "Give every object a place.",
    "size": "Give every object a size.",
    "relation": "End with how two objects stand to each other.",
    "synonyms": "Vary the words.",
    "extra": "Add one more object for balance.",
    "colourless": "Leave the colours to the painter.",
    "twice": "Say everything twice.",
    "flowery": "Praise the picture first.",
    "no background": "Never mention a background.",
}
"""Name and text of every rule; the first four lead towards the training captions."""
BY_HAND = ("place", "size")
"""The fixed system prompt of the comparison: one guess of many, arbitrary."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_SINGULAR = {plural: noun for noun, plural in PLURALS.items()}
_SHAPE = {way: shape for shape in SHAPES for way in SYNONYMS[shape]}
_THING = re.compile(r"a (\w+) (\w+)(?: at the (top|bottom) (left|right))?")


def with_rules(*names: str) -> str:
    """The seed prompt with rules, one by line.

    Example:
        >>> with_rules("size").splitlines()[1]
        'Give every object a size.'
    """
    return "\n".join([SEED_PROMPT, *(RULES[name] for name in names)])


def scripted_answer(body: Mapping[str, Any]) -> str:
    """What the server says to a request's body: a rewrite, an analysis or a system prompt."""
    messages = body["messages"]
    data = json.loads(messages[1]["content"])
    if "failures" in data:
        return _propose(data, body.get("seed", 0), final=len(messages) > 2)
    return _rewrite(messages[0]["content"], data, body.get("seed", 0))


def read_request(text: str, stream: random.Random) -> Scene | None:
    """A scene that fulfils a request in the suites' short form; what it leaves open is drawn. None for other texts.

    Example:
        >>> scene = read_request("a red circle left of a blue square", random.Random(0))
        >>> [(thing.colour, thing.shape, thing.col) for thing in scene.objects]
        [('red', 'circle', 0), ('blue', 'square', 1)]
        >>> read_request("the circle is red", random.Random(0)) is None
        True
    """
    background = re.search(r" , on a (\w+) background$", text)
    ground = background[1] if background else stream.choice([*BACKGROUNDS])
    text = text[: background.start()] if background else text
    counted = re.fullmatch(r"(two|three|four) (\w+) (\w+)", text)
    relation = next((word for word in RELATIONS if f" {word} a " in text), None)
    if counted:
        shape = _SHAPE.get(_SINGULAR.get(counted[3], ""), "")
        found = [(counted[2], shape, None)] * _NUMBERS.index(counted[1])
    else:
        parts = re.split(f" {relation} | and | , " if relation else " and | , ", text)
        matches = [_THING.fullmatch(part) for part in parts]
        if not all(matches):
            return None
        found = [(m[1], _SHAPE.get(m[2], ""), (m[3], m[4]) if m[3] else None) for m in matches if m]
    if any(colour not in COLOURS or shape not in SHAPES for colour, shape, _ in found) or len(found) > 4:
        return None
    for _ in range(1000):
        cells = stream.sample([(0, 0), (0, 1), (1, 0), (1, 1)], len(found))
        size = stream.choice([*SIZES])
        objects = [
            SceneObject(shape, colour, size if counted else stream.choice([*SIZES]), *cell)
            for (colour, shape, _), cell in zip(found, cells, strict=True)
        ]
        fits = all(
            place is None or place == tuple(place_name(thing.cell, 2).split())
            for (_, _, place), thing in zip(found, objects, strict=True)
        )
        if fits and (relation is None or relation in relations_between(objects[0], objects[-1])):
            return Scene(ground, tuple(objects))
    return None


def _rewrite(system: str, data: Mapping[str, Any], seed: int) -> str:
    rules = {name for name, text in RULES.items() if text in system.splitlines()}
    request = data.get("facts", {}).get("request", data["request"])
    stream = random.Random(f"{seed} {request}")
    scene = read_request(request, stream)
    if scene is None or not rules:
        return request
    if "extra" in rules and len(scene.objects) < 4:
        free = [cell for cell in ((0, 0), (0, 1), (1, 0), (1, 1)) if cell not in {t.cell for t in scene.objects}]
        extra = SceneObject(stream.choice(SHAPES), stream.choice([*COLOURS]), "small", *free[0])
        scene = Scene(scene.background, (*scene.objects, extra))
    sentences = describe_scene(scene, wording="synonyms" if "synonyms" in rules else "plain", generator=seed).split(
        " ."
    )
    opening, *others = [sentence.strip() for sentence in sentences if sentence.strip()]
    kinds = [other for other in others if " at " in other]
    relations = [other for other in others if " at " not in other][:1]
    if "place" not in rules:
        kinds = [kind.split(" at ")[0] for kind in kinds]
    if "size" not in rules:
        kinds = [re.sub(r"\b(?:small|little|large|big) ", "", kind) for kind in kinds]
    parts = [opening] if "opening" in rules and "no background" not in rules else []
    parts += [*kinds, *(relations if "relation" in rules else [])]
    parts = parts * 2 if "twice" in rules else parts
    text = " . ".join(parts) + " ."
    if "colourless" in rules:
        text = re.sub(rf"\b(?:{'|'.join(COLOURS)}) ", "", text)
    return f"there is a picture with large objects : {text}" if "flowery" in rules else text


def _propose(data: Mapping[str, Any], seed: int, *, final: bool) -> str:
    if not final:
        wrong = Counter(part for text in data["failures"] for part in text.partition("wrong: ")[2].split("; ") if part)
        told = ", ".join(f"{what} ({count})" for what, count in wrong.most_common(5))
        return f"{len(data['failures'])} failures; most often wrong: {told or 'nothing named'}."
    tried = {name for version in data["rejected_versions"] for name in _rules_of(version)} - _rules_of(
        data["instructions"]
    )
    free = [name for name in RULES if name not in _rules_of(data["instructions"]) | tried]
    pool: Sequence[str] = free or [name for name in RULES if name not in _rules_of(data["instructions"])]
    added = random.Random(f"propose {seed}").choice(pool) if pool else "opening"
    return f"<system_prompt>{data['instructions']}\n{RULES[added]}</system_prompt>"


def _rules_of(text: str) -> set[str]:
    return {name for name, rule in RULES.items() if rule in text.splitlines()}
