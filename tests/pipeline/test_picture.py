"""Metadata survives the file, whatever it holds; a broken file or none is one clear error."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lensmini.pipeline.picture import read_metadata, save_png, to_picture

PIXELS = (torch.arange(3 * 4 * 6) * 3).to(torch.uint8).view(3, 4, 6)
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False), ANY_TEXT)


@given(st.dictionaries(ANY_TEXT, VALUES.filter(lambda value: value not in (float("inf"), -float("inf"))), max_size=5))
@settings(max_examples=40)
def test_any_metadata_and_every_pixel_survive_the_file(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("png") / "x.png"
    save_png(to_picture(PIXELS, metadata), path)
    assert read_metadata(path) == metadata
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), PIXELS.permute(1, 2, 0).numpy())


def test_people_can_read_it_too(tmp_path):
    notes = {
        "prompt": "eine W\u00fcste, \u56db\u3064\nfrom above",
        "negative_prompt": "blurry",
        "seed": 7,
        "none": None,
    }
    save_png(to_picture(PIXELS, notes), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        expected = "eine W\u00fcste, \u56db\u3064\nfrom above\nNegative prompt: blurry\nseed: 7"
        assert image.info["parameters"] == expected


def test_an_error_leaves_no_file_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    save_png(to_picture(PIXELS, {"seed": 1}), tmp_path / "x.png")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(to_picture(PIXELS, {"seed": 2}), tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert read_metadata(tmp_path / "x.png") == {"seed": 1}


@pytest.mark.parametrize("text", [None, "{", "[1]", "[" * 100_000])
def test_foreign_files_are_one_clear_error(tmp_path, text):
    chunks = PngInfo()
    if text is not None:
        chunks.add_text("lensmini", text)
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png", pnginfo=chunks)
    with pytest.raises(ValueError, match="image: expected"):
        read_metadata(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("pixels", "metadata"),
    [(PIXELS.float(), {}), (PIXELS[:1], {}), (PIXELS, {"x": {1}}), (PIXELS, {"x": float("nan")})],
)
def test_what_is_no_picture_is_refused(pixels, metadata):
    with pytest.raises(ValueError, match="expected|JSON|Out of range"):
        to_picture(pixels, metadata)
