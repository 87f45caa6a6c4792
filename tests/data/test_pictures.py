import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, ImageOps

from lensmini.data.picture_bytes import check_bytes
from lensmini.data.pictures import PICTURE_CAUSES, PICTURE_NOTES, BadPicture, encode_picture, read_picture
from tests.data.hostile import claimed_png, encode, flipped, png_chunk, smooth, text_bomb


def attempt(data, **limits):
    try:
        return pixels_of(data, **limits)
    except BadPicture as error:
        return error


def pixels_of(data, **limits):
    return read_picture(data, **limits).image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_as_pillow_turns_them(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(np.random.default_rng(orientation)), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels_of(data), np.asarray(upright))
    assert read_picture(data).plain == (orientation == 1 and kind != "TIFF")


def test_deep_grey_is_scaled_not_cut():
    values = np.linspace(0, 65_535, 300).round().astype(np.uint16).reshape(10, 30)
    expected = np.rint(values / 257)
    for kind in ("PNG", "TIFF"):
        assert np.abs(pixels_of(encode(values, kind))[..., 0] - expected).max() <= 0
    floats = (values / 65_535).astype(np.float32)
    assert np.abs(pixels_of(encode(floats, "TIFF"))[..., 1] - expected).max() <= 1


@settings(deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_transparency_lies_over_white(seed):
    rgba = np.random.default_rng(seed).integers(0, 256, (5, 9, 4), dtype=np.uint8)
    opacity = rgba[..., 3:].astype(np.float64) / 255
    expected = rgba[..., :3] * opacity + 255 * (1 - opacity)
    picture = read_picture(encode(rgba, "PNG"))
    assert np.abs(picture.image.permute(1, 2, 0).numpy() - expected).max() <= 0.5 + 1e-9
    assert "transparent" in picture.notes and not picture.plain and picture.notes <= set(PICTURE_NOTES)


def test_a_transparent_palette_entry_is_white():
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    assert pixels_of(encode(image, "PNG", transparency=2)).tolist() == [
        [[10, 20, 30], [40, 50, 60]],
        [[255, 255, 255], [100, 110, 120]],
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_cut_is_named_or_harmless(kind):
    data = encode(smooth(np.random.default_rng(5)), kind)
    whole = pixels_of(data)
    for length in range(0, len(data), max(len(data) // 60, 1)):
        got = attempt(data[:length])
        if isinstance(got, BadPicture):
            assert got.cause in PICTURE_CAUSES
            if kind in ("JPEG", "PNG", "WEBP") and length >= 12:
                assert got.cause == "truncated"
        else:
            assert kind in ("GIF", "TIFF", "BMP", "PPM") and np.array_equal(got, whole), length


@pytest.mark.parametrize("tail", [1, 2])
def test_a_jpeg_without_its_end_marker_is_truncated(tail):
    with pytest.raises(BadPicture, match="truncated"):
        check_bytes(encode(smooth(np.random.default_rng(6)), "JPEG")[:-tail], "JPEG")  # decoders may be lenient


def test_any_flipped_bit_of_a_png_is_found():
    data = encode(smooth(np.random.default_rng(7)), "PNG")
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises(BadPicture):
            read_picture(bytes(changed))


@settings(deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"]), st.integers(0, 2**31 - 1))
def test_flipped_bits_raise_nothing_else(kind, seed):
    rng = np.random.default_rng(seed)
    got = attempt(flipped(encode(smooth(rng), kind), rng), max_pixels=10**6)
    assert got.cause in PICTURE_CAUSES if isinstance(got, BadPicture) else got.size <= 3 * 10**6


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty file"),
        (b"hello", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "unsupported format"),
        (claimed_png(60_000, 60_000), "too many pixels"),
        (claimed_png(0, 10), "corrupt"),
        (text_bomb(), "chunk bomb"),
    ],
)
def test_hostile_bytes_have_their_cause(data, cause):
    with pytest.raises(BadPicture) as caught:
        read_picture(data)
    assert caught.value.cause == cause


def test_size_limits_hold_at_their_edge():
    data = encode(np.zeros((3, 12, 3), np.uint8), "PNG")
    assert pixels_of(data, max_pixels=36, max_ratio=4.0).shape == (3, 12, 3)
    for limits, cause in (({"max_pixels": 35}, "too many pixels"), ({"max_ratio": 3.9}, "too elongated")):
        with pytest.raises(BadPicture, match=cause):
            read_picture(data, **limits)


def test_the_first_frame_is_taken():
    first, second = (np.full((4, 5), value, np.uint8) for value in (30, 200))
    data = encode(Image.fromarray(first), "GIF", save_all=True, append_images=[Image.fromarray(second)])
    picture = read_picture(data)
    assert (picture.image == 30).all() and "animated" in picture.notes and not picture.plain


def test_a_profile_of_other_primaries_moves_the_colours_as_its_matrix_says():
    # Wide-gamut red primaries: pure sRGB red given as linear light in swapped primaries comes back as blue.
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)
    }
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red + 4 : red + 12], profile[blue + 4 : blue + 12] = (
        profile[blue + 4 : blue + 12],
        profile[red + 4 : red + 12],
    )
    pixels = smooth(np.random.default_rng(9))
    picture = read_picture(encode(pixels, "PNG", icc_profile=bytes(profile)))
    assert "colours converted" in picture.notes and not picture.plain
    assert np.abs(picture.image.permute(1, 2, 0).numpy().astype(int) - pixels[..., ::-1]).max() <= 2


def test_broken_profiles_are_ignored():
    pixels = smooth(np.random.default_rng(8))
    broken = read_picture(encode(pixels, "PNG", icc_profile=b"nonsense"))
    assert "profile ignored" in broken.notes and np.array_equal(broken.image.permute(1, 2, 0).numpy(), pixels)


def test_truncation_cannot_be_allowed_behind_our_back(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        read_picture(encode(np.zeros((2, 2, 3), np.uint8), "PNG"))


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_a_png_comes_back_bit_for_bit_and_the_same_every_time(height, width, seed):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    data = encode_picture(image, "png")
    picture = read_picture(data)
    assert torch.equal(picture.image, image) and picture.plain and data == encode_picture(image, "png")


def test_a_chunk_outside_the_alphabet_is_corrupt():
    data = encode(np.zeros((2, 2, 3), np.uint8), "PNG")
    with pytest.raises(BadPicture, match="corrupt"):
        read_picture(data[:33] + png_chunk(b"\0\0\0\0", b"") + data[33:])
