"""Laws of the reader and of the verdict: truth passes on every canvas, each single mistake fails."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.filters import gaussian
from skimage.measure import label

from lensmini.data import (
    BACKGROUNDS,
    COLOURS,
    MINIATURE_CANVASES,
    SHAPES,
    AskBackground,
    AskCount,
    AskPlace,
    AskRelation,
    Pattern,
    Scene,
    SceneObject,
    questions_about,
    read_scene,
    render_scene,
    sample_scene,
    verify_scene,
)
from lensmini.data.scene_reader import _regions
from tests.strategies import seeds, tensor

CANVASES = [*MINIATURE_CANVASES, (28, 36), (36, 28), (20, 40), (32, 64), (48, 48), (64, 64)]


def spoiled(image, spoil, seed):
    if spoil == "blur":
        return torch.from_numpy(gaussian(image.numpy(), sigma=0.8, channel_axis=0))
    noise = tensor(image.shape, seed) * 15 / 255
    return image + noise if spoil == "noise" else image


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("spoil", ["none", "noise", "blur"])
def test_the_truth_passes_on_every_canvas(canvas, spoil):
    scenes = [sample_scene(generator=seed, pairs="all") for seed in range(100)]
    images = [spoiled(render_scene(s, *canvas, dtype=torch.float32), spoil, seed) for seed, s in enumerate(scenes)]
    reports = [
        verify_scene(image, questions_about(scene, ask_size=True)) for image, scene in zip(images, scenes, strict=True)
    ]
    assert np.mean([report.strict for report in reports]) >= 0.99
    assert np.mean([report.loose for report in reports]) >= 0.99


def test_the_truth_passes_on_a_grid_of_three():
    scenes = [sample_scene(generator=seed, grid=3, num_objects=(1, 9)) for seed in range(60)]
    assert np.mean([verify_scene(render_scene(scene, 48, 64), scene).strict for scene in scenes]) >= 0.98


@given(seeds(), st.sampled_from(CANVASES))
def test_a_reading_finds_the_objects_where_they_are(seed, canvas):
    scene = sample_scene(generator=seed, pairs="all")
    reading = read_scene(render_scene(scene, *canvas))
    assert reading.background == scene.background
    found = sorted((thing.cell, thing.colour, thing.shape, thing.size) for thing in reading.objects)
    assert found == sorted((thing.cell, thing.colour, thing.shape, thing.size) for thing in scene.objects)
    assert all(thing.overlap > 0.8 for thing in reading.objects)


def mutants(scene):
    """Every kind of single mistake: its name, the wrong scene, and whether colours alone give it away."""
    thing, *rest = scene.objects
    cells = [(row, col) for row in (0, 1) for col in (0, 1) if (row, col) not in {t.cell for t in scene.objects}]
    for colour in COLOURS:
        if colour != thing.colour:
            yield "colour", replace(scene, objects=(replace(thing, colour=colour), *rest)), True
    for shape in SHAPES:
        if shape != thing.shape:
            yield "shape", replace(scene, objects=(replace(thing, shape=shape), *rest)), False
    for background in BACKGROUNDS:
        if background != scene.background:
            yield "background", replace(scene, background=background), True
    if rest:
        yield "missing", replace(scene, objects=tuple(rest)), True
    for row, col in cells:
        yield "moved", replace(scene, objects=(replace(thing, row=row, col=col), *rest)), True
        yield "extra", replace(scene, objects=(*scene.objects, SceneObject("circle", "pink", "small", row, col))), True
        yield "twice", replace(scene, objects=(*scene.objects, replace(thing, row=row, col=col))), True


@pytest.mark.parametrize("seed", range(12))
def test_every_single_mistake_fails(seed):
    scene = sample_scene(generator=seed, num_objects=(1, 3))
    seen = set()
    for name, wrong, by_colour in mutants(scene):
        report = verify_scene(render_scene(wrong, 32, 32), scene)
        assert not report.strict, name
        assert report.loose != by_colour, name
        assert 0 <= report.atom < 1
        seen.add(name)
    assert seen >= {"colour", "shape", "background", "moved", "extra", "twice"}


def test_a_wrong_size_fails_only_if_it_is_asked():
    scene = Scene("gray", (SceneObject("cross", "blue", "large", 0, 1),))
    image = render_scene(replace(scene, objects=(replace(scene.objects[0], size="small"),)), 32, 32)
    assert verify_scene(image, scene).strict
    report = verify_scene(image, questions_about(scene, ask_size=True))
    assert not report.strict and report.loose


RED, BLUE = Pattern("red", "circle"), Pattern("blue", "square")
PICTURE = render_scene(
    Scene(
        "black",
        (
            SceneObject("circle", "red", "large", 0, 0),
            SceneObject("circle", "red", "small", 1, 0),
            SceneObject("square", "blue", "large", 1, 1),
        ),
    ),
    40,
    40,
)


@pytest.mark.parametrize(
    ("question", "strict", "loose"),
    [
        (AskCount(3), True, True),
        (AskCount(2), False, False),
        (AskCount(4), False, False),
        (AskCount(2, RED), True, True),
        (AskCount(1, RED), False, False),
        (AskCount(2, Pattern("red", "square")), False, True),
        (AskCount(0, Pattern("red", "square")), True, False),
        (AskCount(1, Pattern("red", "circle", "small")), True, False),
        (AskCount(2, Pattern(size="large")), True, False),
        (AskPlace(RED, 0, 0), True, True),
        (AskPlace(RED, 1, 0), True, True),
        (AskPlace(RED, 1, 1), False, False),
        (AskPlace(Pattern("blue", "cross"), 1, 1), False, True),
        (AskRelation(RED, "left of", BLUE), True, True),
        (AskRelation(BLUE, "left of", RED), False, False),
        (AskRelation(BLUE, "right of", RED), True, True),
        (AskRelation(RED, "above", BLUE), True, True),
        (AskRelation(RED, "below", BLUE), False, False),
        (AskRelation(RED, "above", RED), True, True),
        (AskRelation(RED, "left of", RED), False, False),
        (AskRelation(Pattern("red", "cross"), "left of", BLUE), False, True),
        (AskRelation(Pattern("green"), "left of", BLUE), False, False),
        (AskBackground("black"), True, True),
        (AskBackground("gray"), False, False),
    ],
    ids=str,
)
def test_each_question_is_answered(question, strict, loose):
    report = verify_scene(PICTURE, [question])
    assert (report.strict, report.atom, report.loose) == (strict, float(strict), loose)
    assert str(question)


def test_counts_of_two_shapes_of_one_colour_add_up_by_colour():
    scene = Scene("gray", (SceneObject("circle", "red", "large", 0, 0), SceneObject("cross", "red", "small", 0, 1)))
    asked = [AskCount(1, Pattern(thing.colour, thing.shape)) for thing in scene.objects]
    assert verify_scene(render_scene(scene, 32, 32), asked).loose_answers == (True, True)
    swapped = replace(scene, objects=(replace(scene.objects[0], shape="square"), scene.objects[1]))
    report = verify_scene(render_scene(swapped, 32, 32), asked)
    assert report.answers == (False, True) and report.loose
    fewer = replace(scene, objects=scene.objects[:1])
    assert verify_scene(render_scene(fewer, 32, 32), asked).loose_answers == (False, False)


def test_the_answers_keep_the_questions_order():
    report = verify_scene(PICTURE, [AskCount(3), AskCount(9), AskBackground("black"), AskBackground("white")])
    assert report.answers == (True, False, True, False) and report.atom == 0.5 and not report.strict


@given(seeds(), st.integers(3, 24), st.integers(3, 24), st.integers(1, 4))
def test_regions_are_the_four_connected_components(seed, height, width, num):
    labels = np.random.default_rng(seed).integers(0, num + 1, (height, width))
    expected = label(labels, connectivity=1, background=0)
    assert np.array_equal(_regions(labels), expected)


def test_a_winding_region_is_one():
    spiral = np.zeros((15, 15), np.int64)
    spiral[::2] = 1
    spiral[1::4, -1] = 1
    spiral[3::4, 0] = 1
    assert _regions(spiral).max() == 1
    assert _regions(1 - spiral).max() == 7


def transposed(reading):
    return {(t.colour, t.shape, t.size, t.cell[::-1]) for t in reading.objects}


@given(seeds())
def test_a_transposed_picture_reads_transposed(seed):
    scene = sample_scene(generator=seed)
    scene = replace(scene, objects=tuple(t for t in scene.objects if t.shape != "triangle") or scene.objects[:1])
    if any(thing.shape == "triangle" for thing in scene.objects):
        return
    image = render_scene(scene, 24, 40)
    straight, turned = read_scene(image), read_scene(image.transpose(1, 2).contiguous())
    assert {(t.colour, t.shape, t.size, t.cell) for t in turned.objects} == transposed(straight)
    assert turned.background == straight.background


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_blended_edges_are_no_objects_of_another_colour(background, colour):
    # A strip of every mix of the two, as wide as an object is.
    mix = torch.linspace(0, 1, 24)
    ground, paint = (torch.tensor(rgb) / 255 for rgb in (BACKGROUNDS[background], COLOURS[colour]))
    image = ground[:, None, None].expand(3, 48, 48).clone()
    image[:, 6:14, 10:34] = (ground[:, None] + mix * (paint - ground)[:, None])[:, None]
    reading = read_scene(image)
    assert reading.background == background
    assert [thing.colour for thing in reading.objects] == [colour]


def test_two_halves_of_different_colour_are_two_objects():
    scene = Scene("white", (SceneObject("square", "red", "large", 0, 0),))
    image = render_scene(scene, 32, 32)
    image[:, 8:16, :16] = render_scene(Scene("white", (replace(scene.objects[0], colour="blue"),)), 32, 32)[
        :, 8:16, :16
    ]
    assert sorted(thing.colour for thing in read_scene(image).objects) == ["blue", "red"]
    assert not verify_scene(image, [AskCount(1)]).strict


def test_a_patch_of_another_background_is_an_object_and_a_speckle_is_none():
    scene = Scene("black", (SceneObject("circle", "green", "large", 0, 0),))
    image = render_scene(scene, 32, 32)
    image[:, 22, 22] = 255
    image[0, 28, 3:5] = 225
    assert verify_scene(image, scene).strict
    image[:, 20:28, 20:28] = 128
    report = verify_scene(image, scene)
    assert not report.strict and not report.loose
    assert [thing.colour for thing in report.reading.objects] == ["green", "gray"]


def test_objects_far_out_of_size_or_form_have_no_shape():
    disk = read_scene(render_scene(Scene("black", (SceneObject("circle", "red", "large", 0, 0),)), 96, 96), grid=3)
    big = read_scene(render_scene(Scene("black", (SceneObject("circle", "red", "large", 0, 0),)), 96, 96)[:, :48, :48])
    assert [thing.shape for thing in disk.objects] == [None] and [thing.shape for thing in big.objects] == [None]
    bar = torch.zeros(3, 32, 32)
    bar[0, 4:7, 2:30] = 0.9
    assert [(thing.colour, thing.shape, thing.size) for thing in read_scene(bar).objects] == [("red", None, None)]


@pytest.mark.parametrize("seed", range(5))
def test_pictures_of_nothing_pass_nothing(seed):
    scene = sample_scene(generator=seed)
    for image in (torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)), torch.full((3, 32, 32), 0.3)):
        assert not verify_scene(image, scene).strict
    order = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(seed))
    shuffled = render_scene(scene, 32, 32).flatten(1)[:, order].reshape(3, 32, 32)
    assert not verify_scene(shuffled, scene).strict


def test_a_canvas_of_one_object_colour_has_no_background():
    red = torch.tensor(COLOURS["red"], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    reading = read_scene(red)
    assert reading.background is None and [(t.colour, t.shape) for t in reading.objects] == [("red", None)]


@given(seeds())
def test_bytes_and_floats_read_alike_and_overshoot_is_clamped(seed):
    scene = sample_scene(generator=seed)
    as_bytes = render_scene(scene, 32, 32)
    before = as_bytes.clone()
    # Dividing by 255 and back may move a value by one unit in the last place of float32, no more.
    for image in (as_bytes.float() / 255, as_bytes.double() / 255):
        found = read_scene(image)
        assert [(t.colour, t.shape, t.cell) for t in found.objects] == [
            (t.colour, t.shape, t.cell) for t in read_scene(as_bytes).objects
        ]
    stretched = (as_bytes.float() / 255 - 0.5) * 3 + 0.5
    assert read_scene(stretched) == read_scene(stretched.clamp(0, 1))
    assert torch.equal(as_bytes, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read_scene(torch.zeros(1, 32, 32)), r"image: expected shape \[3 h w\]"),
        (lambda: read_scene(torch.full((3, 32, 32), float("nan"))), "finite"),
        (lambda: read_scene(torch.zeros(3, 32, 32, dtype=torch.int64)), "uint8"),
        (lambda: read_scene(torch.zeros(3, 12, 32)), "at least 8 pixels"),
        (lambda: verify_scene(torch.zeros(3, 32, 32), []), "at least one question"),
        (lambda: AskRelation(RED, "beside", BLUE), "relation"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
