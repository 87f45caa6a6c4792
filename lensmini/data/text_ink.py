"""The ink of a line of text: fonts that have its characters, coverage, exact corners, colours that can be read.

Axes: h and w pixels.
"""

import unicodedata
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lensmini.data.text_backgrounds import luminance

__all__ = [
    "MIN_CONTRAST",
    "blend",
    "choose_colour",
    "covers",
    "default_fonts",
    "has_raqm",
    "ink",
    "inside",
    "script_of",
]

MIN_CONTRAST = 3.0
"""Ours: ratio of relative luminances, that of WCAG for large text, between a line and every pixel behind it."""


def default_fonts() -> tuple[str, ...]:
    """The fonts that come with matplotlib: DejaVu in several cuts, which know Latin, Greek, Cyrillic, Armenian and more.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> any("DejaVuSans" in font for font in default_fonts())
        True
    """
    try:
        from matplotlib import get_data_path
    except ImportError as error:
        raise ImportError("fonts: give your own, or pip install matplotlib for its own") from error
    found = sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf"))
    return tuple(str(path) for path in found if "Display" not in path.name)


def script_of(text: str) -> str:
    r"""The script of the first letter, as Unicode names it; "COMMON" for none.

    Example:
        >>> [script_of(text) for text in ("abc", "7", "\u0416", "\u03a9", "\u5b57")]
        ['LATIN', 'COMMON', 'CYRILLIC', 'GREEK', 'CJK']
    """
    for character in text:
        if unicodedata.category(character)[0] == "L":
            return unicodedata.name(character, "COMMON").split()[0]
    return "COMMON"


@lru_cache(maxsize=1)
def has_raqm() -> bool:
    """Whether Pillow can shape scripts whose letters join or change their order.

    Example:
        >>> has_raqm() in (True, False)
        True
    """
    from PIL import features

    return bool(features.check("raqm"))


@lru_cache(maxsize=64)
def characters(font: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont  # comes with matplotlib

    with TTFont(font, lazy=True, fontNumber=0) as file:
        return frozenset(file.getBestCmap() or ())


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(path, size)


def covers(font: str, text: str) -> bool:
    """Whether a font has a glyph for every character.

    Example:
        >>> covers(default_fonts()[0], "Hi"), covers(default_fonts()[0], chr(0x13000))
        (True, False)
    """
    return all(ord(character) in characters(font) or character == " " for character in text)


def ink(text: str, font: str, size: int, angle: float) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
    """Coverage of a line in a tight box, and the corners of its own rectangle in that box.

    Args:
        text: one row.
        font: path.
        size: pixels.
        angle: degrees, anticlockwise.

    Returns:
        ``[h, w]`` from 0 to 1, and four points (x, y).

    Example:
        >>> coverage, corners = ink("I", default_fonts()[0], 20, 0.0)
        >>> coverage.shape == (round(corners[2][1]), round(corners[2][0]))
        True
    """
    from PIL import Image, ImageDraw

    face = _font(font, size)
    left, top, right, bottom = face.getbbox(text)
    margin = 2
    mask = Image.new("L", (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin))
    ImageDraw.Draw(mask).text((margin - left, margin - top), text, fill=255, font=face)
    mask = mask.crop(mask.getbbox())
    across, down = mask.size
    if angle:
        mask = mask.rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)
    turn = np.deg2rad(-angle)
    middle = ((mask.width) / 2, (mask.height) / 2)
    corners = [
        (
            middle[0] + x * np.cos(turn) - y * np.sin(turn),
            middle[1] + x * np.sin(turn) + y * np.cos(turn),
        )
        for x, y in ((-across / 2, -down / 2), (across / 2, -down / 2), (across / 2, down / 2), (-across / 2, down / 2))
    ]
    coverage = np.asarray(mask, dtype=np.float32) / np.float32(255)
    return coverage, [(float(x), float(y)) for x, y in corners]


def inside(corners: list[tuple[float, float]], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Pixels whose middle is inside a convex clockwise quad or less than 1.5 pixels outside one of its sides.

    Example:
        >>> inside([(2.0, 2.0), (4.0, 2.0), (4.0, 4.0), (2.0, 4.0)], (9, 9)).sum().item()
        36
    """
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5
    found = np.ones(shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = max(np.hypot(bx - ax, by - ay), 1e-9)
        found &= ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / length >= -1.5
    return found


def choose_colour(random: Random, behind: NDArray[np.float64]) -> tuple[int, int, int] | None:
    """A colour whose contrast with the darkest and the lightest pixel behind is enough, None if none was drawn.

    Example:
        >>> choose_colour(Random(0), np.array([0.0, 1.0])) is None
        True
    """
    low, high = float(behind.min()), float(behind.max())
    for _ in range(24):
        colour = (random.randrange(256), random.randrange(256), random.randrange(256))
        own = float(luminance(np.array([[colour]], dtype=np.uint8))[0, 0])
        contrast = min((max(own, other) + 0.05) / (min(own, other) + 0.05) for other in (low, high))
        if contrast >= MIN_CONTRAST and not low < own < high:
            return colour
    return None


def blend(
    canvas: NDArray[np.uint8], ink: NDArray[np.float32], top: int, left: int, colour: tuple[int, int, int], blur: float
) -> None:
    """Lay ink of a colour over part of a canvas, in place, blurred if wished.

    Example:
        >>> canvas = np.zeros((3, 3, 3), dtype=np.uint8)
        >>> blend(canvas, np.ones((1, 1), dtype=np.float32), 1, 1, (255, 0, 0), 0.0)
        >>> canvas[1, 1].tolist(), int(canvas.sum())
        ([255, 0, 0], 255)
    """
    reach = int(np.ceil(3 * blur))
    padded: NDArray[np.float64] = np.pad(ink.astype(np.float64), reach)
    if blur:
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / blur) ** 2)
        kernel /= kernel.sum()
        # The padding is as wide as the kernel, so that what wraps around is empty.
        for axis in (0, 1):
            padded = np.sum([w * np.roll(padded, at - reach, axis) for at, w in enumerate(kernel)], axis=0)
    y, x = top - reach, left - reach
    first_y, first_x = max(0, y), max(0, x)
    last_y, last_x = min(canvas.shape[0], y + padded.shape[0]), min(canvas.shape[1], x + padded.shape[1])
    cover = padded[first_y - y : last_y - y, first_x - x : last_x - x, None]
    part = canvas[first_y:last_y, first_x:last_x].astype(np.float32)
    mixed = part + cover * (np.array(colour, dtype=np.float32) - part)
    canvas[first_y:last_y, first_x:last_x] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
