"""Captions of scenes from a small grammar with synonyms: dense ones that say everything, brief ones that do not.

Every word and every full stop, comma and colon is a token of its own between spaces, all in lower case, so that
``caption.split()`` is a tokenizer and :data:`SCENE_VOCABULARY` its vocabulary.
"""

import random
from itertools import combinations
from typing import Literal

import torch

from lensmini.data.scenes import BACKGROUNDS, COLOURS, Scene, SceneObject, as_random, pick, shuffled

__all__ = ["PLURALS", "RELATIONS", "SCENE_VOCABULARY", "SYNONYMS", "describe_scene", "place_name", "relations_between"]

Density = Literal["dense", "brief"]
Wording = Literal["varied", "synonyms", "plain"]

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disk"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "cross": ("cross", "plus"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "top": ("top", "upper"),
    "bottom": ("bottom", "lower"),
    "middle": ("middle", "center"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "background": ("background", "backdrop", "canvas"),
    "objects": ("objects", "shapes", "things"),
}
"""Ways to say a word; the first one is the plain one. Colours and numbers have one word each."""

PLURALS = {
    "object": "objects",
    "shape": "shapes",
    "thing": "things",
    "circle": "circles",
    "disk": "disks",
    "square": "squares",
    "box": "boxes",
    "triangle": "triangles",
    "wedge": "wedges",
    "cross": "crosses",
    "plus": "pluses",
}
"""Plural of every noun that is counted."""

_SINGULARS = {plural: singular for singular, plural in PLURALS.items()}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")
"""The relations between two objects, by their cells."""

_FRAME = ". , : a the of to on at is are there with and in picture some"
SCENE_VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {*_FRAME.split(), *_NUMBERS[1:], *COLOURS, *BACKGROUNDS, *PLURALS, *PLURALS.values(), "left", "right"}
        | {word for ways in SYNONYMS.values() for way in ways for word in way.split()}
    )
)
"""Every token that a caption or a prompt of any grid can hold."""


def describe_scene(
    scene: Scene,
    *,
    density: Density = "dense",
    wording: Wording = "varied",
    relation: str | None = None,
    generator: torch.Generator | int,
) -> str:
    """Describe a scene in words that are true of it.

    A dense caption tells the number of objects and the background, the size, colour, shape and place of every
    object, and one or two relations; objects that are equal up to their place share a sentence. A brief caption is
    like an alt text: at most two kinds of objects, mostly neither places nor background, and perhaps not all of them.

    Args:
        scene: what to describe.
        density: "dense" or "brief".
        wording: "varied" draws sentence forms and :data:`SYNONYMS`, "synonyms" keeps the first form of every sentence,
            "plain" the first of both (the order of the objects and the choice of relations stay random).
        relation: one of :data:`RELATIONS` that a dense caption tells for sure, of the first object to the last;
            each must be the only one of its colour and shape.
        generator: a seed, or a CPU generator that is advanced by one draw.

    Returns:
        Tokens of :data:`SCENE_VOCABULARY` separated by single spaces.

    Raises:
        ValueError: if ``density`` or ``wording`` is unknown, or ``relation`` does not hold of two such objects.

    Example:
        >>> scene = Scene("white", (SceneObject("circle", "red", "large", 0, 1),))
        >>> describe_scene(scene, wording="plain", generator=0)
        'one object on a white background . a large red circle at the top right .'
    """
    if density not in ("dense", "brief") or wording not in ("varied", "synonyms", "plain"):
        raise ValueError(
            'density, wording: expected "dense" or "brief" and "varied", "synonyms" or "plain", '
            f"got {density!r}, {wording!r}"
        )
    ends = (scene.objects[0], scene.objects[-1])
    if relation is not None and not (relation in relations_between(*ends) and {*ends} <= {*_unmistakable(scene)}):
        raise ValueError(
            "relation: expected one that holds of the first object to the last, both of a colour-shape pair of their "
            f"own, got {relation!r}"
        )
    writer = _Writer(as_random(generator, "caption"), wording, scene.grid)
    return writer.dense(scene, relation) if density == "dense" else writer.brief(scene)


def place_name(cell: tuple[int, int], grid: int) -> str:
    """The plain name of a cell, for example "top left"; on a grid of 3 "middle" stands for the second row or column.

    Example:
        >>> place_name((0, 1), 2), place_name((1, 1), 3)
        ('top right', 'middle')
    """
    rows, cols = ("top", "middle", "bottom"), ("left", "middle", "right")
    row, col = (rows[cell[0]], cols[cell[1]]) if grid == 3 else (rows[2 * cell[0]], cols[2 * cell[1]])
    return row if row == col else f"{row} {col}"


def relations_between(one: SceneObject, other: SceneObject) -> list[str]:
    """The :data:`RELATIONS` in which ``one`` stands to ``other``.

    Example:
        >>> relations_between(SceneObject("circle", "red", "large", 0, 0), SceneObject("cross", "blue", "small", 1, 1))
        ['left of', 'above']
    """
    holds = (one.col < other.col, one.col > other.col, one.row < other.row, one.row > other.row)
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


class _Writer:
    """One caption's random choices."""

    def __init__(self, stream: random.Random, wording: Wording, grid: int) -> None:
        self.stream = stream
        self.wording = wording
        self.grid = grid

    def choose(self, *ways: str) -> str:
        return pick(self.stream, ways) if self.wording == "varied" else ways[0]

    def say(self, word: str) -> str:
        return SYNONYMS[word][0] if self.wording == "plain" else pick(self.stream, SYNONYMS[word])

    def dense(self, scene: Scene, relation: str | None) -> str:
        kinds = _kinds(scene)
        sentences = [self.opening(scene), *(self.kind(things) for things in shuffled(self.stream, kinds))]
        unique = _unmistakable(scene)
        couples = shuffled(self.stream, list(combinations(unique, 2)))
        # With three objects a second relation is as likely as not: the chain stays short, tokens are what costs.
        number = 1 + (len(unique) > 2 and self.stream.random() < 0.5)
        if relation is not None:
            ends = (scene.objects[0], scene.objects[-1])
            sentences.append(self.relation(*ends, relation))
            couples = [couple for couple in couples if set(couple) != set(ends)]
            number -= 1
        for couple in couples[:number]:
            one, other = shuffled(self.stream, couple)
            sentences.append(self.relation(one, other, pick(self.stream, relations_between(one, other))))
        return " ".join(sentences)

    def opening(self, scene: Scene) -> str:
        number = _NUMBERS[len(scene.objects)]
        objects = self.say("objects")
        objects = _SINGULARS[objects] if number == "one" else objects
        is_are = "is" if number == "one" else "are"
        ground = self.say("background")
        return self.choose(
            f"{number} {objects} on a {scene.background} {ground} .",
            f"a {scene.background} {ground} with {number} {objects} .",
            f"there {is_are} {number} {objects} on {scene.background} .",
        )

    def kind(self, things: list[SceneObject]) -> str:
        size, colour, shape = self.say(things[0].size), things[0].colour, self.say(things[0].shape)
        places = [f"the {self.place(thing)}" for thing in shuffled(self.stream, things)]
        if len(places) == 1:
            return self.choose(
                f"a {size} {colour} {shape} at {places[0]} .",
                f"at {places[0]} is a {size} {colour} {shape} .",
                f"in {places[0]} a {colour} {shape} , {size} .",
            )
        number, shape = _NUMBERS[len(places)], PLURALS[shape]
        where = " , ".join(places[:-1]) + " and " + places[-1]
        return self.choose(
            f"{number} {size} {colour} {shape} at {where} .",
            f"{number} {colour} {shape} , {size} : {where} .",
        )

    def relation(self, one: SceneObject, other: SceneObject, relation: str) -> str:
        relation = self.say(relation)
        subject, landmark = (f"the {thing.colour} {self.say(thing.shape)}" for thing in (one, other))
        return self.choose(f"{subject} is {relation} {landmark} .", f"{relation} {landmark} is {subject} .")

    def place(self, thing: SceneObject) -> str:
        row, *col = place_name(thing.cell, self.grid).split()
        return " ".join([self.say(row), *col])

    def brief(self, scene: Scene) -> str:
        kinds = shuffled(self.stream, _kinds(scene, by_size=False))[:2]
        if len(kinds) == 2 and self.stream.random() < 0.3:
            kinds = kinds[:1]
        names = [self.alt_name(things) for things in kinds]
        text = self.choose("and", "with").join(f" {name} " for name in names).strip()
        text = self.choose(text, text, text, f"a picture of {text}")
        return f"{text} on {scene.background}" if self.stream.random() < 0.15 else text

    def alt_name(self, things: list[SceneObject]) -> str:
        colour, shape = things[0].colour, self.say(things[0].shape)
        if len(things) == 1:
            return self.choose(f"a {colour} {shape}", f"{colour} {shape}")
        number = _NUMBERS[len(things)]
        return self.choose(f"{number} {colour} {PLURALS[shape]}", f"some {colour} {PLURALS[shape]}")


def _unmistakable(scene: Scene) -> list[SceneObject]:
    """The objects that colour and shape alone tell from all others."""
    pairs = [thing.pair for thing in scene.objects]
    return [thing for thing in scene.objects if pairs.count(thing.pair) == 1]


def _kinds(scene: Scene, *, by_size: bool = True) -> list[list[SceneObject]]:
    """The objects, those together that differ by their place only (or, if so asked, by place and size)."""
    kinds: dict[tuple[str, ...], list[SceneObject]] = {}
    for thing in scene.objects:
        kinds.setdefault((*thing.pair, thing.size) if by_size else thing.pair, []).append(thing)
    return list(kinds.values())
