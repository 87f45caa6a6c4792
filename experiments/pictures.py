"""Grids of pictures with their captions underneath."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["grid_image", "readable", "save_grid"]

_MAX_LINES = 16
_NO_CHARACTER = "\uffff"


def grid_image(pictures: Sequence[Tensor], captions: Sequence[str], *, columns: int = 6, cell: int = 200):  # noqa: ANN201
    """A PIL image: every picture enlarged into its cell with hard pixels, its caption wrapped underneath.

    Args:
        pictures: ``[3, h_i, w_i]`` uint8, any sizes.
        captions: one per picture.
        columns: cells per row.
        cell: side of the space for a picture, in pixels.

    Returns:
        The grid, a ``PIL.Image.Image``.
    """
    from PIL import Image, ImageDraw

    fonts = _fonts(13)
    texts = [readable(caption, fonts) for caption in captions]
    lines = [textwrap.wrap(text, width=cell // 7, max_lines=_MAX_LINES, placeholder=" ...") for text, _ in texts]
    space = 17 * max((len(wrapped) for wrapped in lines), default=1) + 14
    columns = min(columns, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 12) + 12, rows * (cell + space) + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, wrapped, (_, font)) in enumerate(zip(pictures, lines, texts, strict=True)):
        left, top = 12 + index % columns * (cell + 12), 12 + index // columns * (cell + space)
        image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
        scale = cell / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        corner = (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2)
        sheet.paste(image.resize(size, Image.Resampling.NEAREST), corner)
        draw.rectangle(
            (corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1]), outline=(200, 200, 200)
        )
        for number, line in enumerate(wrapped):
            draw.text((left, top + cell + 4 + 17 * number), line, fill=(40, 40, 40), font=font)
    return sheet


def readable(text: str, fonts: Sequence[Any]) -> tuple[str, Any]:
    """A text as a font can write it: what none of the fonts has is spelt out as an escape, never left as a box.

    Args:
        text: in any script.
        fonts: of Pillow, the preferred one first.

    Returns:
        The text and the first font that has all of it, else the one that has most of it.

    Example:
        >>> from PIL import ImageFont
        >>> readable("a box " + chr(0x5BAB), [ImageFont.load_default(size=13)])[0].removesuffix("5bab")[:-2]
        'a box '
    """
    text = " ".join(text.split())
    missing = [_missing(font, text) for font in fonts]
    best = min(range(len(fonts)), key=lambda index: sum(map(text.count, missing[index])))
    escapes = {ord(character): character.encode("unicode_escape").decode() for character in missing[best]}
    return text.translate(escapes), fonts[best]


def _missing(font: Any, text: str) -> set[str]:
    from PIL import ImageFont

    # One character at a time and unshaped: a shaped mark without its letter draws a circle that hides the box.
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)

    def drawn(character: str) -> tuple[tuple[int, int], bytes]:
        mask = plain.getmask(character)
        return mask.size, bytes(mask)

    box = drawn(_NO_CHARACTER)
    return {one for one in set(text) - {" "} if not one.isprintable() or drawn(one) == box}


def _fonts(size: int) -> list[Any]:
    from PIL import ImageFont

    fonts: list[Any] = [ImageFont.load_default(size=size)]
    try:
        import matplotlib

        # Pillow's own font has little more than ASCII; this one has Cyrillic, Greek and more.
        fonts.append(ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size=size - 1))
    except (ImportError, OSError):
        pass
    return fonts


def save_grid(pictures: Sequence[Tensor], captions: Sequence[str], path: Path, *, columns: int = 6) -> None:
    """Write :func:`grid_image` as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid_image(pictures, captions, columns=columns).save(temporary, format="PNG")
    temporary.replace(path)
