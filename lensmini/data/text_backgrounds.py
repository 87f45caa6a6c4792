"""Backgrounds for drawn text, and names of colours."""

import colorsys
from random import Random

import numpy as np
from numpy.typing import NDArray

__all__ = ["BACKGROUNDS", "draw_background", "luminance", "name_colour"]

BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "noise")
"""What text can stand on, besides pictures."""

_HUES = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "red")
_ENDS = (15, 42, 68, 165, 195, 255, 290, 345, 361)


def draw_background(kind: str, height: int, width: int, random: Random) -> tuple[NDArray[np.uint8], str]:
    """A background and its description.

    The two colours of a background are close in lightness, so that text of one colour can be read on both.

    Args:
        kind: one of ``BACKGROUNDS``.
        height: pixels.
        width: pixels.
        random: draws colours, angles and scales.

    Returns:
        uint8 ``[h, w, 3]`` and a phrase.

    Raises:
        ValueError: for another kind.

    Example:
        >>> image, words = draw_background("plain", 4, 6, Random(0))
        >>> image.shape, words.startswith("a plain ")
        ((4, 6, 3), True)
    """
    if kind not in BACKGROUNDS:
        raise ValueError(f"kind: expected one of {BACKGROUNDS}, got {kind!r}")
    first = tuple(random.randrange(256) for _ in range(3))
    second = tuple(min(255, max(0, value + random.randint(-40, 40))) for value in first)
    one, other = (np.array(colour, dtype=np.float64) for colour in (first, second))
    names = name_colour(first), name_colour(second)
    both = names[0] if names[0] == names[1] else f"{names[0]} and {names[1]}"
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    turn = random.uniform(0, np.pi)
    along = x * np.cos(turn) + y * np.sin(turn)
    if kind == "plain":
        share = np.zeros((height, width))
        words = f"a plain {names[0]} background"
    elif kind == "gradient":
        share = (along - along.min()) / max(np.ptp(along), 1e-9)
        words = f"a {both} gradient"
    elif kind == "stripes":
        share = (np.floor(along / random.uniform(6, 30)) % 2).astype(np.float64)
        words = f"{both} stripes"
    elif kind == "checks":
        cell = random.uniform(8, 40)
        share = ((np.floor(x / cell) + np.floor(y / cell)) % 2).astype(np.float64)
        words = f"{both} checks"
    else:
        share = np.random.default_rng(random.getrandbits(64)).random((height, width))
        words = f"{both} noise"
    image = one + share[..., None] * (other - one)
    return np.rint(image).astype(np.uint8), words


def luminance(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Relative luminance of sRGB as WCAG defines it, 0 to 1.

    Args:
        image: uint8 ``[h, w, 3]``.

    Returns:
        ``[h, w]``.

    Example:
        >>> luminance(np.array([[[255, 255, 255], [0, 0, 0]]], dtype=np.uint8)).round(6).tolist()
        [[1.0, 0.0]]
    """
    table = np.arange(256) / 255
    table = np.where(table <= 0.03928, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    linear = table[image]
    return 0.2126 * linear[..., 0] + 0.7152 * linear[..., 1] + 0.0722 * linear[..., 2]


def name_colour(colour: tuple[int, ...]) -> str:
    """A plain English name of an sRGB colour.

    Example:
        >>> [
        ...     name_colour(colour)
        ...     for colour in ((255, 0, 0), (10, 10, 12), (250, 250, 250), (20, 30, 90), (200, 220, 255))
        ... ]
        ['red', 'black', 'white', 'dark blue', 'light blue']
    """
    hue, light, saturation = colorsys.rgb_to_hls(*(value / 255 for value in colour))
    if light < 0.08:
        return "black"
    if light > 0.95:
        return "white"
    if saturation < 0.12:
        return "dark grey" if light < 0.35 else "light grey" if light > 0.7 else "grey"
    name = next(name for name, end in zip(_HUES, _ENDS, strict=True) if 360 * hue < end)
    if name == "orange" and light < 0.4:
        return "brown"
    return f"dark {name}" if light < 0.3 else f"light {name}" if light > 0.75 else name
