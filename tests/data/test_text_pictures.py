"""Laws of drawn text: boxes around the ink, nothing outside or overlapping, readable, and the caption says all of it."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmini.data.pictures import read_picture
from lensmini.data.text_backgrounds import BACKGROUNDS, draw_background, luminance, name_colour
from lensmini.data.text_ink import MIN_CONTRAST, default_fonts, ink, script_of
from lensmini.data.text_pictures import TextSource, draw_text_picture

pytest.importorskip("matplotlib")
TEXTS = (
    "Hello",
    "Open until 9",
    "\u0427\u0430\u0439 \u0438 \u043a\u043e\u0444\u0435",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1",
    "\u0532\u0561\u0580\u0587",
    "Cr\u00e8me br\u00fbl\u00e9e",
    "50 % off!",
    "a",
)
keys = st.integers(0, 10**6).map(str)
chosen = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3)
sizes = st.tuples(st.integers(150, 260), st.integers(150, 260))


def quad_mask(quad, shape, grow=0.0):
    """Pixels whose centres are inside a clockwise quad grown by some pixels."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5
    inside = np.ones(shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(quad, [*quad[1:], quad[0]], strict=True):
        inside &= ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / np.hypot(bx - ax, by - ay) >= -grow
    return inside


def changed(picture, plain):
    """How far each pixel is from the plain background."""
    return np.abs(picture.image.permute(1, 2, 0).numpy().astype(int) - plain).max(2)


@settings(max_examples=40, deadline=None)
@given(keys, chosen, sizes)
def test_the_ink_is_in_its_quads_and_fills_them(key, texts, size):
    gray = torch.full((3, *size), 128, dtype=torch.uint8)
    picture = draw_text_picture(key, texts, height=size[0], width=size[1], background=gray, max_blur=0.0)
    ink = changed(picture, 128) > 30
    masks = [quad_mask(line.quad, size, 1.0) for line in picture.lines]
    assert not (ink & ~np.any(masks, axis=0)).any()
    assert tuple(line.text for line in picture.lines) == tuple(texts)
    for line, mask in zip(picture.lines, masks, strict=True):
        quad = np.array(line.quad)
        assert quad.min() >= 0 and (quad[:, 0] <= size[1]).all() and (quad[:, 1] <= size[0]).all()
        across, down = quad[1] - quad[0], quad[3] - quad[0]
        angle = np.rad2deg(np.arctan2(-across[1], across[0]))
        assert angle == pytest.approx(line.angle, abs=0.5) and abs(across @ down) < 1e-1 * np.hypot(*across)
        # Along both axes of the line the ink reaches the quad's ends.
        y, x = np.nonzero(ink & mask)
        for axis in (across, down):
            unit = axis / np.hypot(*axis)
            places = (np.stack([x + 0.5, y + 0.5], 1) - quad[0]) @ unit
            assert places.min() < 2 and places.max() > np.hypot(*axis) - 2
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert not (quad_mask(picture.lines[index].quad, size) & other).any() or not (one & other).all()


@settings(max_examples=30, deadline=None)
@given(keys, chosen, sizes)
def test_lines_do_not_overlap(key, texts, size):
    picture = draw_text_picture(key, texts, height=size[0], width=size[1])
    masks = [quad_mask(line.quad, size) for line in picture.lines]
    assert np.sum(masks, axis=0).max() == 1


@settings(max_examples=30, deadline=None)
@given(keys, chosen, sizes, st.sampled_from(BACKGROUNDS), st.integers(0, 1000))
def test_every_line_can_be_read_on_all_that_is_behind_it(key, texts, size, kind, seed):
    ground, _ = draw_background(kind, *size, Random(seed))
    tensor = torch.from_numpy(ground.copy()).permute(2, 0, 1).contiguous()
    picture = draw_text_picture(key, texts, height=size[0], width=size[1], background=tensor)
    behind = luminance(ground)
    for line in picture.lines:
        own = luminance(np.array([[line.colour]], dtype=np.uint8))[0, 0]
        around = behind[quad_mask(line.quad, size)]
        contrast = (np.maximum(own, around) + 0.05) / (np.minimum(own, around) + 0.05)
        assert contrast.min() >= MIN_CONTRAST


@settings(max_examples=20, deadline=None)
@given(keys, chosen)
def test_a_picture_is_a_function_of_seed_and_key(key, texts):
    one, same, other = (draw_text_picture(key, texts, height=200, width=180, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.image, same.image) and one.lines == same.lines and one.caption == same.caption
    assert not torch.equal(one.image, other.image)
    for line in one.lines:
        assert f'"{line.text}"' in one.caption and name_colour(line.colour) in one.caption
        assert (f"{abs(line.angle):.0f} degrees" in one.caption) or not line.angle
    assert ("blurred" in one.caption) == any(line.blur for line in one.lines)


def test_all_that_varies_does_vary():
    pictures = [draw_text_picture(str(n), ["Lens", "Ab"], height=160, width=160) for n in range(60)]
    lines = [line for picture in pictures for line in picture.lines]
    assert len({line.font for line in lines}) > 5 and len({line.colour for line in lines}) > 100
    assert {bool(line.angle) for line in lines} == {bool(line.blur) for line in lines} == {True, False}
    assert max(line.size for line in lines) > 2 * min(line.size for line in lines)
    grounds = {
        word
        for picture in pictures
        for word in ("plain", "gradient", "stripes", "checks", "noise")
        if word in picture.caption
    }
    assert len(grounds) == 5


def test_blur_softens_without_moving():
    gray = torch.full((3, 120, 200), 128, dtype=torch.uint8)
    soft = next(
        picture
        for picture in (draw_text_picture(str(n), ["Soft"], height=120, width=200, background=gray) for n in range(99))
        if picture.lines[0].blur > 0.7
    )
    change = changed(soft, 128).astype(float)
    y, x = np.mgrid[0:120, 0:200] + 0.5
    centre = [(change * axis).sum() / change.sum() for axis in (x, y)]
    line = soft.lines[0]
    (font,) = [font for font in default_fonts() if font.endswith(f"/{line.font}.ttf")]
    sharp, _ = ink("Soft", font, line.size, line.angle)
    inky, inkx = np.mgrid[0 : sharp.shape[0], 0 : sharp.shape[1]] + 0.5
    middle = [sum(corner[axis] for corner in soft.lines[0].quad) / 4 for axis in (0, 1)]
    for axis, grid, length in ((0, inkx, sharp.shape[1]), (1, inky, sharp.shape[0])):
        assert centre[axis] - middle[axis] == pytest.approx((sharp * grid).sum() / sharp.sum() - length / 2, abs=0.6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts"),
        ([""], r"texts\[0\]"),
        (["a\nb"], r"texts\[0\]: expected one row"),
        (["ok", "\U0001f600\U0001f469"], r"texts\[1\]: expected characters that a font has"),
        (["word " * 60], "room"),
    ],
)
def test_what_cannot_be_drawn_is_said(texts, message):
    fonts = [font for font in default_fonts() if font.endswith("DejaVuSerif.ttf")]
    with pytest.raises(ValueError, match=message):
        draw_text_picture("a", texts, height=100, width=100, fonts=fonts)


def test_scripts_that_need_shaping_are_refused_without_it(monkeypatch):
    monkeypatch.setattr("lensmini.data.text_pictures.has_raqm", lambda: False)
    for text in ("\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947"):
        with pytest.raises(ValueError, match="shape without raqm"):
            draw_text_picture("a", [text], height=100, width=100)
    assert script_of("7 \u05e9") == "HEBREW" and script_of("!") == "COMMON"


def test_it_is_a_source_like_others():
    source = TextSource(TEXTS, 10, height=96, width=128, unit_size=4, seed=3)
    units = source.units()
    assert [len(list(source.read(unit))) for unit in units] == [4, 4, 2]
    samples = [sample for unit in units for sample in source.read(unit)]
    assert len({sample.key for sample in samples}) == 10
    again = list(TextSource(TEXTS, 10, height=96, width=128, unit_size=10, seed=3).read(units[1]))
    assert [s.picture for s in again] == [s.picture for s in samples[4:8]]
    for sample in samples:
        assert read_picture(sample.picture).image.shape == (3, 96, 128)
        assert all(f'"{line["text"]}"' in sample.caption for line in sample.metadata["lines"])
    assert source.fingerprint() != TextSource(TEXTS, 10, height=96, width=128, seed=4).fingerprint()
    with pytest.raises(ValueError, match="texts"):
        TextSource([], 3, height=64, width=64)


@pytest.mark.parametrize(
    ("colour", "name"), [((128, 128, 128), "grey"), ((0, 100, 0), "dark green"), ((255, 160, 0), "orange")]
)
def test_colours_have_plain_names(colour, name):
    assert name_colour(colour) == name
    with pytest.raises(ValueError, match="kind"):
        draw_background("tartan", 4, 4, Random(0))
