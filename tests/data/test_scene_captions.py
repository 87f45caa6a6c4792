"""Every caption is true, and a dense one complete: captions are parsed back by a small parser of this file's own."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.data import SCENE_VOCABULARY, SIZES, Scene, SceneObject, describe_scene, sample_scene
from lensmini.data.scene_captions import SYNONYMS, place_name, relations_between
from tests.strategies import seeds

NUMBER = {
    word: n for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
}
SIZE = {"small": "small", "little": "small", "large": "large", "big": "large"}
SHAPE = {
    word: shape
    for shape, words in {
        "circle": "circle circles disk disks",
        "square": "square squares box boxes",
        "triangle": "triangle triangles wedge wedges",
        "cross": "cross crosses plus pluses",
    }.items()
    for word in words.split()
}
ROW = {"top": 0, "upper": 0, "bottom": -1, "lower": -1, "middle": 1, "center": 1}
COL = {"left": 0, "right": -1, "middle": 1}
GROUND = "(?:background|backdrop|canvas)"
OPENINGS = (
    rf"(?P<n>\w+) (?P<noun>\w+) on a (?P<bg>\w+) {GROUND}",
    rf"a (?P<bg>\w+) {GROUND} with (?P<n>\w+) (?P<noun>\w+)",
    r"there (?P<be>is|are) (?P<n>\w+) (?P<noun>\w+) on (?P<bg>\w+)",
)
KINDS = (
    r"(?P<n>\w+) (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+) at (?P<places>the .*)",
    r"at (?P<places>the [\w ]+) is (?P<n>a) (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+)",
    r"in (?P<places>the [\w ]+) (?P<n>a) (?P<colour>\w+) (?P<shape>\w+) , (?P<size>\w+)",
    r"(?P<n>\w+) (?P<colour>\w+) (?P<shape>\w+) , (?P<size>\w+) : (?P<places>the .*)",
)
THING = r"the (?P<c{0}>\w+) (?P<s{0}>\w+)"
WHERE = r"(?P<rel>(?:to the )?(?:left|right) of|above|over|below|under)"
RELATIONS = (
    rf"{THING.format(1)} is {WHERE} {THING.format(2)}",
    rf"{WHERE} {THING.format(2)} is {THING.format(1)}",
)


def match(patterns, sentence):
    return next((found for p in patterns if (found := re.fullmatch(p, sentence))), None)


def cell(words, grid):
    words = words.split()[1:]
    row, col = (words[0], words[-1]) if len(words) == 2 else (words[0], "middle")
    return ROW[row] % grid, COL[col] % grid


def parse_dense(caption, grid):
    """Number, background, set of (colour, shape, size, cell), and relations of pairs."""
    opening, *sentences = caption.removesuffix(" .").split(" . ")
    start = match(OPENINGS, opening)
    assert start, opening
    plural = start["noun"].endswith("s")
    assert plural == (start["n"] != "one") and start.groupdict().get("be", None) in (None, "are" if plural else "is")
    objects, relations = [], []
    for sentence in sentences:
        if found := match(RELATIONS, sentence):
            pairs = [(found[f"c{i}"], SHAPE[found[f"s{i}"]]) for i in (1, 2)]
            relations.append((pairs[0], found["rel"].removeprefix("to the "), pairs[1]))
            continue
        found = match(KINDS, sentence)
        assert found, sentence
        places = [cell(place, grid) for place in re.split(r" , | and ", found["places"])]
        assert len(places) == (1 if found["n"] == "a" else NUMBER[found["n"]])
        assert found["shape"].endswith(("es", "ks", "rs")) or (found["shape"][-1] == "s") <= (
            len(places) > 1 or found["shape"] in ("cross", "plus")
        )
        objects += [(found["colour"], SHAPE[found["shape"]], SIZE[found["size"]], place) for place in places]
    return NUMBER[start["n"]], start["bg"], objects, relations


def holds(one, relation, other):
    return {
        "left of": one[1] < other[1],
        "right of": one[1] > other[1],
        "above": one[0] < other[0],
        "over": one[0] < other[0],
        "below": one[0] > other[0],
        "under": one[0] > other[0],
    }[relation]


@st.composite
def any_scenes(draw):
    """Scenes as nobody samples them: few kinds, so that equal ones stand beside others and sizes differ."""
    cells = draw(st.lists(st.sampled_from([(r, c) for r in (0, 1) for c in (0, 1)]), min_size=1, unique=True))
    colour, shape, size = (
        st.sampled_from(["red", "blue"]),
        st.sampled_from(["cross", "circle"]),
        st.sampled_from(list(SIZES)),
    )
    things = [SceneObject(draw(shape), draw(colour), draw(size), *cell) for cell in cells]
    return Scene(draw(st.sampled_from(["black", "white"])), tuple(things))


SAMPLED = st.builds(
    lambda seed, grid, pairs: sample_scene(
        generator=seed, grid=grid, pairs=pairs, num_objects=(1, 4) if grid == 2 else (1, 9)
    ),
    seeds(),
    st.sampled_from([2, 3]),
    st.sampled_from(["seen", "all"]),
)
SCENES = st.one_of(SAMPLED, any_scenes())


@given(SCENES, seeds(), st.sampled_from(["varied", "synonyms", "plain"]))
def test_a_dense_caption_says_everything_and_nothing_false(scene, seed, wording):
    caption = describe_scene(scene, generator=seed, wording=wording)
    number, background, objects, relations = parse_dense(caption, scene.grid)
    assert (number, background) == (len(scene.objects), scene.background)
    assert sorted(objects) == sorted((t.colour, t.shape, t.size, t.cell) for t in scene.objects)
    where = {}
    for thing in scene.objects:
        where.setdefault(thing.pair, []).append(thing.cell)
    for one, relation, other in relations:
        assert len(where[one]) == len(where[other]) == 1 and one != other
        assert holds(where[one][0], relation, where[other][0])
    unique = sum(len(cells) == 1 for cells in where.values())
    assert len(relations) in ({0} if unique < 2 else {1} if unique == 2 else {1, 2})
    assert len({frozenset((one, other)) for one, _, other in relations}) == len(relations)


@given(SCENES, seeds())
def test_a_brief_caption_is_true_and_names_at_most_two_kinds(scene, seed):
    words = describe_scene(scene, density="brief", generator=seed).split()
    named = 0
    for position, word in enumerate(words):
        if word in SHAPE and word != "a":
            named += 1
            colour, number = words[position - 1], words[position - 2] if position > 1 else ""
            pairs = [t.pair for t in scene.objects].count((colour, SHAPE[word]))
            assert pairs == NUMBER.get(number, pairs if word not in ("cross", "plus") and word[-1] == "s" else 1) > 0
    assert 1 <= named <= 2
    if "on" in words:
        assert words[words.index("on") + 1] == scene.background
    assert "at" not in words and len(words) <= 14


def test_captions_use_exactly_the_vocabulary():
    used = set()
    for seed in range(3000):
        for grid, most in ((2, 4), (3, 9)):
            scene = sample_scene(generator=seed, grid=grid, num_objects=(1, most))
            for density in ("dense", "brief"):
                used |= set(describe_scene(scene, density=density, generator=seed).split())
    assert used == set(SCENE_VOCABULARY)
    assert 70 <= len(SCENE_VOCABULARY) <= 100
    assert all(word == word.lower() and word.isascii() for word in SCENE_VOCABULARY)
    assert list(SCENE_VOCABULARY) == sorted(used)


def test_captions_are_as_short_as_promised():
    scenes = [sample_scene(generator=seed) for seed in range(2000)]
    dense, brief = (
        np.array(
            [len(describe_scene(scene, density=density, generator=seed).split()) for seed, scene in enumerate(scenes)]
        )
        for density in ("dense", "brief")
    )
    assert 30 <= dense.mean() <= 40 and dense.max() <= 75
    assert 4 <= brief.mean() <= 6 and brief.max() <= 14


def test_a_seed_decides_the_wording():
    scene = sample_scene(generator=3, num_objects=(3, 3), group_probability=0.0)
    assert describe_scene(scene, generator=7) == describe_scene(scene, generator=7)
    assert len({describe_scene(scene, generator=seed) for seed in range(50)}) > 45
    generator = torch.Generator().manual_seed(0)
    assert describe_scene(scene, generator=generator) != describe_scene(scene, generator=generator)


def test_wording_varies_words_alone_words_and_forms_or_nothing():
    plain = {way: word for word, ways in SYNONYMS.items() for way in ways}
    seen = {"varied": set(), "synonyms": set(), "plain": set()}
    scene = sample_scene(generator=5, num_objects=(1, 1))
    for wording, captions in seen.items():
        captions |= {describe_scene(scene, wording=wording, generator=seed) for seed in range(200)}
    assert len(seen["plain"]) == 1 < len(seen["synonyms"]) < len(seen["varied"])
    said = {" ".join(plain.get(word, word) for word in caption.split()) for caption in seen["synonyms"]}
    (only,) = seen["plain"]
    # "shape" and "thing" are singulars of synonyms.
    assert {text.replace("one shape", "one object").replace("one thing", "one object") for text in said} == {only}


def test_equal_seeds_of_scene_and_caption_are_not_coupled():
    # The seed's first draw decides the number of objects; were the caption's the same draw, its form would follow.
    forms = {
        (len(scene.objects), caption.split()[0] == "there")
        for scene, caption in (
            (scene, describe_scene(scene, generator=seed))
            for seed in range(300)
            for scene in [sample_scene(generator=seed)]
        )
    }
    assert forms == {(number, there) for number in (1, 2, 3, 4) for there in (True, False)}


@given(seeds())
def test_a_demanded_relation_is_told(seed):
    scene = sample_scene(generator=seed, num_objects=(2, 4), group_probability=0.0)
    one, other = scene.objects[0], scene.objects[-1]
    for relation in relations_between(one, other):
        _, _, _, told = parse_dense(
            describe_scene(scene, relation=relation, wording="plain", generator=seed), scene.grid
        )
        assert (one.pair, relation, other.pair) in told and len(told) <= 2


def test_places_have_their_names():
    assert [place_name((row, col), 2) for row in (0, 1) for col in (0, 1)] == [
        "top left",
        "top right",
        "bottom left",
        "bottom right",
    ]
    assert [place_name(cell, 3) for cell in ((0, 1), (1, 1), (1, 2), (2, 1))] == [
        "top middle",
        "middle",
        "middle right",
        "bottom middle",
    ]


@pytest.mark.parametrize("options", [{"density": "long"}, {"wording": "odd"}, {"relation": "left of"}])
def test_bad_arguments_are_named(options):
    scene = Scene("white", (SceneObject("circle", "red", "large", 0, 1), SceneObject("cross", "blue", "large", 0, 0)))
    with pytest.raises(ValueError, match=next(iter(options))):
        describe_scene(scene, generator=0, **options)
