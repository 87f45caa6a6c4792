"""Text drawn onto backgrounds, with caption and exact boxes (arXiv 2605.21573, section 2.1: text-synthetic data).

Axes: h and w pixels, p corners.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensmini.data.pictures import encode_picture
from lensmini.data.source_samples import Dropped, RawSample, Unit
from lensmini.data.text_backgrounds import BACKGROUNDS, draw_background, luminance, name_colour
from lensmini.data.text_ink import blend, choose_colour, covers, default_fonts, has_raqm, ink, inside, script_of

__all__ = ["TextLine", "TextPicture", "TextSource", "draw_text_picture"]

_SHAPED = ("ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "THAI", "TAMIL", "SYRIAC", "KHMER", "MYANMAR", "TIBETAN", "NKO")
_TRIES = 40


class TextLine(NamedTuple):
    """A line of text in a picture."""

    text: str
    quad: tuple[tuple[float, float], ...]
    """Four corners (x, y) in pixels around its ink, clockwise as it reads from its top left, within a pixel."""
    script: str
    font: str
    size: int
    """Of the font, pixels."""
    angle: float
    """Degrees, anticlockwise."""
    colour: tuple[int, int, int]
    blur: float
    """Standard deviation in pixels; its halo is outside the quad."""


@dataclass(frozen=True, slots=True)
class TextPicture:
    """A picture with text, and all that is known of it.

    Example:
        >>> picture = draw_text_picture("a", ["Hello", "World"], height=128, width=128)
        >>> picture.image.shape, sorted(line.text for line in picture.lines), '"Hello"' in picture.caption
        (torch.Size([3, 128, 128]), ['Hello', 'World'], True)
    """

    image: Tensor
    """uint8 ``[3, h, w]``."""
    caption: str
    lines: tuple[TextLine, ...]


def draw_text_picture(
    key: str,
    texts: Sequence[str],
    *,
    height: int,
    width: int,
    seed: int = 0,
    fonts: Sequence[str] | None = None,
    background: Tensor | None = None,
    max_blur: float = 1.0,
    max_angle: float = 30.0,
) -> TextPicture:
    """Draw texts onto a background; everything about it follows from seed and key.

    Every line lies wholly inside, no two overlap, every character has a glyph, and every line has a contrast of at
    least 3 with all that is behind it. A line that finds no place becomes smaller.

    Args:
        key: of the picture.
        texts: a line each, of one row.
        height: pixels.
        width: pixels.
        seed: of the data set.
        fonts: paths to choose from; by default :func:`default_fonts`.
        background: uint8 ``[3, h, w]``; by default plain, a gradient, stripes, checks or noise.
        max_blur: standard deviation in pixels; half of the lines are sharp.
        max_angle: degrees to either side; half of the lines are level.

    Returns:
        Picture, caption and lines in the order of the texts.

    Raises:
        ValueError: if a text is empty, of several rows, has characters that no font has, or needs shaping that Pillow
            cannot do here; or if the texts find no room.

    Example:
        >>> one, other = (draw_text_picture("a", ["7"], height=64, width=64) for _ in range(2))
        >>> torch.equal(one.image, other.image)
        True
    """
    random = Random(hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogatepass")).digest())
    if min(height, width) < 16:
        raise ValueError(f"height, width: expected at least 16, got {height} and {width}")
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    fonts = default_fonts() if fonts is None else fonts
    if background is None:
        kind = random.choice(BACKGROUNDS)
        canvas, ground = draw_background(kind, height, width, random)
    else:
        if background.shape != (3, height, width) or background.dtype != torch.uint8:
            raise ValueError(f"background: expected uint8 [3, {height}, {width}], got {list(background.shape)}")
        canvas, ground = background.permute(1, 2, 0).numpy().copy(), "a picture"
    behind = luminance(canvas)
    taken = np.zeros((height, width), dtype=bool)
    lines: list[TextLine] = []
    for index, text in enumerate(texts):
        _check_text(index, text)
        usable = [font for font in fonts if covers(font, text)]
        if not usable:
            raise ValueError(f"texts[{index}]: expected characters that a font has, got {text!r}")
        line = _place(text, random, random.choice(usable), canvas, behind, taken, max_blur, max_angle)
        if line is None:
            raise ValueError(f"texts[{index}]: expected room for {text!r} in {height} x {width} pixels, found none")
        lines.append(line)
    image = torch.from_numpy(canvas).permute(2, 0, 1).contiguous()
    return TextPicture(image, _caption(lines, ground, height, width), tuple(lines))


class TextSource:
    """A source of text pictures, as folders and tars are: ``num`` samples, each a function of seed and number.

    Args:
        texts: one of them, up to three, for each picture.
        num: of pictures.
        height: pixels.
        width: pixels.
        seed: of the data set.
        fonts: as of :func:`draw_text_picture`.
        unit_size: pictures of a unit.

    Raises:
        ValueError: if there are no texts or no pictures.

    Example:
        >>> source = TextSource(["Yes", "No", "Why not?"], 3, height=96, width=96)
        >>> [sample.key for unit in source.units() for sample in source.read(unit)]
        ['text-000000000', 'text-000000001', 'text-000000002']
    """

    def __init__(
        self,
        texts: Sequence[str],
        num: int,
        *,
        height: int,
        width: int,
        seed: int = 0,
        fonts: Sequence[str] | None = None,
        unit_size: int = 256,
    ) -> None:
        if not texts or num < 1 or unit_size < 1:
            raise ValueError(
                f"texts, num, unit_size: expected texts and positive numbers, got {len(texts)}, {num}, {unit_size}"
            )
        self.texts, self.num, self.unit_size = tuple(texts), num, unit_size
        self.height, self.width, self.seed = height, width, seed
        self.fonts = default_fonts() if fonts is None else tuple(fonts)

    def units(self) -> list[Unit]:
        """Ranges of numbers."""
        starts = range(0, self.num, self.unit_size)
        ends = [min(first + self.unit_size, self.num) for first in starts]
        return [
            Unit(n, f"text-{first:09d}", ((first, end),))
            for n, (first, end) in enumerate(zip(starts, ends, strict=True))
        ]

    def fingerprint(self) -> str:
        """Changes with anything that decides the pictures."""
        names = [hashlib.sha256(Path(font).read_bytes()).hexdigest() for font in self.fonts]
        values = [self.texts, self.num, self.height, self.width, self.seed, names]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """The pictures of a unit as PNG, with captions; ``metadata["lines"]`` has texts and boxes."""
        for first, end in unit.items:
            for number in range(int(first), int(end)):
                key = f"text-{number:09d}"
                random = Random(hashlib.sha256(f"texts/{self.seed}/{number}".encode()).digest())
                chosen = [random.choice(self.texts) for _ in range(random.randint(1, 3))]
                picture = None
                while picture is None:
                    try:
                        options: dict[str, Any] = {"height": self.height, "width": self.width, "seed": self.seed}
                        picture = draw_text_picture(key, chosen, fonts=self.fonts, **options)
                    except ValueError as error:
                        # Too much text for the picture: less of it; one that cannot be drawn alone is an error.
                        if len(chosen) == 1:
                            raise ValueError(f"texts: {error}") from error
                        chosen.pop()
                lines = [{"text": line.text, "quad": line.quad, "script": line.script} for line in picture.lines]
                yield RawSample(key, encode_picture(picture.image, "png"), picture.caption, {"lines": lines})


def _check_text(index: int, text: str) -> None:
    if not text.strip() or any(unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") for character in text):
        raise ValueError(f"texts[{index}]: expected one row of visible characters, got {text!r}")
    names = {unicodedata.name(character, "").split(" ")[0] for character in text}
    if names & set(_SHAPED) and not has_raqm():
        raise ValueError(f"texts[{index}]: expected a script that Pillow can shape without raqm, got {text!r}")


def _place(
    text: str,
    random: Random,
    font: str,
    canvas: NDArray[np.uint8],
    behind: NDArray[np.float64],
    taken: NDArray[np.bool_],
    max_blur: float,
    max_angle: float,
) -> TextLine | None:
    """Draw a line where there is room for it, or say that there is none."""
    height, width = taken.shape
    size = round(min(height, width) * random.uniform(0.08, 0.3))
    angle = round(random.uniform(-max_angle, max_angle), 1) if random.random() < 0.5 else 0.0
    blur = round(random.uniform(0.3, max_blur), 2) if random.random() < 0.5 and max_blur > 0.3 else 0.0
    for attempt in range(_TRIES):
        if attempt and attempt % 4 == 0:
            size = round(size * 0.85)
        if attempt == _TRIES // 2:
            angle = 0.0
        if size < 7:
            return None
        coverage, corners = ink(text, font, size, angle)
        tall, wide = coverage.shape
        if tall + 2 > height or wide + 2 > width:
            continue
        top, left = random.randint(1, height - tall - 1), random.randint(1, width - wide - 1)
        window = (slice(top, top + tall), slice(left, left + wide))
        area = inside(corners, coverage.shape)
        if bool((taken[window] & area).any()):
            continue
        colour = choose_colour(random, behind[window][area])
        if colour is None:
            continue
        blend(canvas, coverage, top, left, colour, blur)
        taken[window] |= area
        quad = tuple((round(x + left, 2), round(y + top, 2)) for x, y in corners)
        return TextLine(text, quad, script_of(text), Path(font).stem, size, angle, colour, blur)
    return None


def _caption(lines: Sequence[TextLine], ground: str, height: int, width: int) -> str:
    """Sentences that say all of it."""
    parts = []
    for number, line in enumerate(lines):
        x, y = (sum(corner[axis] for corner in line.quad) / 4 for axis in (0, 1))
        row = ("top", "middle", "bottom")[min(2, int(3 * y / height))]
        column = ("left", "centre", "right")[min(2, int(3 * x / width))]
        place = "in the centre" if (row, column) == ("middle", "centre") else f"at the {row} {column}"
        tall = line.size / min(height, width)
        scale = "large" if tall > 0.2 else "small" if tall < 0.12 else "medium-sized"
        turned = ""
        if line.angle:
            turned = f", turned {abs(line.angle):.0f} degrees {'anticlockwise' if line.angle > 0 else 'clockwise'}"
        soft = ", slightly blurred" if line.blur else ""
        verb = "The text" if number == 0 else "Another text"
        parts.append(f'{verb} {place} reads "{line.text}" in {scale} {name_colour(line.colour)} letters{turned}{soft}.')
    return f"A picture of text on {ground}. {' '.join(parts)}"
