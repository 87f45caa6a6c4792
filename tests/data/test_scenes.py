"""Laws of the miniature world: what is drawn, and what is painted."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.measure import label

from lensmini.data import (
    BACKGROUNDS,
    COLOURS,
    MINIATURE_CANVASES,
    SHAPES,
    SIZES,
    WITHHELD_PAIRS,
    Scene,
    SceneObject,
    render_scene,
    render_scenes,
    sample_scene,
)
from tests.strategies import seeds

CANVASES = [*MINIATURE_CANVASES, (28, 36), (36, 28), (20, 40), (20, 52), (32, 64), (48, 48), (64, 64)]


def one(shape="circle", colour="red", size="large", cell=(0, 0), jitter=(0.0, 0.0), background="black"):
    return Scene(background, (SceneObject(shape, colour, size, *cell, jitter),))


@given(seeds(), st.sampled_from([2, 3]), st.sampled_from(["seen", "withheld", "all"]))
def test_the_same_seed_draws_the_same_scene(seed, grid, pairs):
    scene = sample_scene(generator=seed, grid=grid, pairs=pairs)
    assert scene == sample_scene(generator=seed, grid=grid, pairs=pairs)
    assert scene.grid == grid
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    drawn = [[sample_scene(generator=generator, grid=grid) for _ in range(3)] for generator in generators]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


def test_training_never_sees_a_withheld_pair_and_sees_all_others_evenly():
    scenes = [sample_scene(generator=seed) for seed in range(6000)]
    first = Counter(scene.objects[0].pair for scene in scenes)
    every = {thing.pair for scene in scenes for thing in scene.objects}
    assert len(every) == len(first) == len(COLOURS) * len(SHAPES) - len(WITHHELD_PAIRS)
    assert every.isdisjoint(WITHHELD_PAIRS)
    assert max(first.values()) < 1.3 * 6000 / 21 and min(first.values()) > 0.7 * 6000 / 21
    # Each half of a withheld pair is seen in other pairs.
    assert {colour for colour, _ in every} == set(COLOURS) and {shape for _, shape in every} == set(SHAPES)


def test_withheld_scenes_hold_a_withheld_pair_first():
    for seed in range(300):
        scene = sample_scene(generator=seed, pairs="withheld")
        withheld = [thing.pair in WITHHELD_PAIRS for thing in scene.objects]
        assert withheld[0] and (not any(withheld[1:]) or len({thing.pair for thing in scene.objects}) == 1)
    assert WITHHELD_PAIRS & {t.pair for s in range(300) for t in sample_scene(generator=s, pairs="all").objects}


def test_numbers_groups_cells_and_backgrounds_are_drawn_as_documented():
    scenes = [sample_scene(generator=seed) for seed in range(8000)]
    numbers = Counter(len(scene.objects) for scene in scenes)
    assert sorted(numbers) == [1, 2, 3, 4] and all(abs(count - 2000) < 200 for count in numbers.values())
    several = [scene for scene in scenes if len(scene.objects) > 1]
    groups = [scene for scene in several if len({(t.pair, t.size) for t in scene.objects}) == 1]
    assert len(groups) / len(several) == pytest.approx(0.3, abs=0.03)
    assert all(len({t.pair for t in scene.objects}) == len(scene.objects) for scene in several if scene not in groups)
    for values, known in (
        ([scene.background for scene in scenes], list(BACKGROUNDS)),
        ([scene.objects[0].cell for scene in scenes], [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ([scene.objects[0].size for scene in scenes], list(SIZES)),
    ):
        counts = Counter(values)
        assert set(counts) == set(known)
        assert all(abs(count * len(known) / 8000 - 1) < 0.1 for count in counts.values())
    jitters = np.array([thing.jitter for scene in scenes for thing in scene.objects])
    assert np.abs(jitters).max() <= 1 and np.abs(jitters.mean(0)).max() < 0.02 and jitters.std() > 0.5
    fixed = [sample_scene(generator=seed, num_objects=(3, 3), group_probability=1.0) for seed in range(50)]
    assert all(len(s.objects) == 3 and len({t.pair for t in s.objects}) == 1 for s in fixed)


def supersampled(shape, across, side, fine=20):
    """Share of each pixel inside a shape around the middle of a square, by counting fine sample points."""
    points = (np.arange(side * fine) + 0.5) / fine - side / 2
    y, x = np.meshgrid(points / across, points / across, indexing="ij")
    inside = {
        "circle": y**2 + x**2 <= 0.25,
        "square": (abs(y) <= 0.5) & (abs(x) <= 0.5),
        "triangle": (y <= 0.5) & (abs(x) <= (y + 0.5) / 2),
        "cross": (abs(y) <= 0.5) & (abs(x) <= 0.18) | (abs(x) <= 0.5) & (abs(y) <= 0.18),
    }[shape]
    return inside.reshape(side, fine, side, fine).mean((1, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "share"), [("small", 0.64), ("large", 0.80)])
@pytest.mark.parametrize("side", [16, 25])
def test_an_object_covers_the_pixels_of_its_shape(shape, size, share, side):
    image = render_scene(one(shape, "blue", size), 2 * side, 2 * side, dtype=torch.float64)[:, :side, :side]
    dark, blue = (torch.tensor(rgb, dtype=torch.float64) / 255 for rgb in (BACKGROUNDS["black"], COLOURS["blue"]))
    alpha = ((image - dark[:, None, None]).sum(0) / (blue - dark).sum()).numpy()
    expected = supersampled(shape, share * side, side)
    # A distance ramp is exact along upright edges and off at corners, most at the tip of a triangle.
    assert np.abs(alpha - expected).max() < 0.4
    assert np.abs(alpha - expected).mean() < 0.01
    rim = (expected > 0.02) & (expected < 0.98)
    assert np.abs(alpha - expected)[rim].mean() < (0.035 if shape == "triangle" else 0.055)
    assert alpha.sum() == pytest.approx(expected.sum(), rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_objects_are_ten_pixels_across_on_the_square_canvas(shape, size):
    painted = (render_scene(one(shape, "pink", size, jitter=(0.3, -0.4)), 32, 32)[0] > 128).numpy()
    assert np.ptp(np.nonzero(painted)[0]) + 1 >= 9 and np.ptp(np.nonzero(painted)[1]) + 1 >= 9
    assert SIZES[size] * 16 >= 10


@given(seeds(), st.sampled_from(CANVASES))
def test_neighbours_never_touch_and_stay_inside_their_cells(seed, canvas):
    height, width = canvas
    draw = np.random.default_rng(seed)
    jitter = draw.choice([-1.0, 1.0, 0.0], (4, 2))
    shapes, sizes = draw.choice(SHAPES, 4), draw.choice(list(SIZES), 4)
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    things = [
        SceneObject(str(shape), "red", str(size), *cell, tuple(map(float, move)))
        for shape, size, cell, move in zip(shapes, sizes, cells, jitter, strict=True)
    ]
    image = render_scene(Scene("white", tuple(things)), height, width).numpy()
    painted = (image != np.array(BACKGROUNDS["white"])[:, None, None]).any(0)
    assert label(painted, connectivity=2).max() == 4
    for (row, col), thing in zip(cells, things, strict=True):
        alone = (render_scene(Scene("white", (thing,)), height, width)[1] < 128).numpy()
        ys, xs = np.nonzero(alone)
        assert (ys * 2 // height == row).all() and (xs * 2 // width == col).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_keep_their_shape_when_the_canvas_stretches(shape):
    # Cells of 12 x 20, 12 x 24 and 20 x 12 pixels have the same shorter side; whole-pixel middles allow equality.
    pieces = [
        render_scene(one(shape), 24, 40)[:, :12, 4:16],
        render_scene(one(shape), 24, 48)[:, :12, 6:18],
        render_scene(one(shape), 40, 24)[:, 4:16, :12],
        render_scene(one(shape), 24, 24)[:, :12, :12],
    ]
    assert all(torch.equal(piece, pieces[0]) for piece in pieces[1:])
    assert len(pieces[0].unique()) > 4


def test_jitter_moves_down_and_to_the_right():
    def middle(jitter):
        painted = (render_scene(one(jitter=jitter), 48, 48)[0] > 100).numpy()
        return np.argwhere(painted).mean(0)

    still, down, right = middle((0.0, 0.0)), middle((1.0, 0.0)), middle((0.0, 1.0))
    assert down[0] > still[0] + 0.5 and down[1] == pytest.approx(still[1])
    assert right[1] > still[1] + 0.5 and right[0] == pytest.approx(still[0])


@given(seeds(), st.sampled_from(CANVASES))
def test_bytes_floats_and_batches_show_the_same_picture(seed, canvas):
    scenes = [sample_scene(generator=seed + shift) for shift in range(3)]
    batch = render_scenes(scenes, *canvas)
    assert batch.dtype == torch.uint8 and batch.shape == (3, 3, *canvas)
    for scene, image in zip(scenes, batch, strict=True):
        assert torch.equal(render_scene(scene, *canvas), image)
        floating = render_scene(scene, *canvas, dtype=torch.float32)
        assert torch.equal(floating, image.float() / 255)
    assert torch.equal(render_scenes(scenes, *canvas, dtype=torch.float32), batch.float() / 255)
    assert render_scene(scenes[0], *canvas, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SceneObject("star", "red", "large", 0, 0), "shape: .*'star'"),
        (lambda: SceneObject("circle", "mauve", "large", 0, 0), "colour: .*'mauve'"),
        (lambda: SceneObject("circle", "red", "huge", 0, 0), "size: .*'huge'"),
        (lambda: SceneObject("circle", "red", "large", 0, 0, (0.0, 1.5)), "jitter"),
        (lambda: one(cell=(0, 2)), "objects"),
        (lambda: one(background="red"), "background"),
        (lambda: Scene("white", ()), "at least one"),
        (lambda: Scene("white", one().objects * 2), "different cells"),
        (lambda: replace(one(), grid=4), "grid"),
        (lambda: sample_scene(generator=0, num_objects=(0, 2)), "num_objects"),
        (lambda: sample_scene(generator=0, num_objects=(2, 5)), "num_objects"),
        (lambda: sample_scene(generator=0, pairs="new"), "pairs"),
        (lambda: render_scene(one(), 15, 64), "at least 8 pixels"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
