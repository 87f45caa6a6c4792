"""Grids of pictures with their captions underneath."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

__all__ = ["grid_image", "save_grid"]


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
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    lines = [textwrap.wrap(caption, width=cell // 7) for caption in captions]
    space = 17 * max((len(wrapped) for wrapped in lines), default=1) + 14
    columns = min(columns, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 12) + 12, rows * (cell + space) + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, wrapped) in enumerate(zip(pictures, lines, strict=True)):
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


def save_grid(pictures: Sequence[Tensor], captions: Sequence[str], path: Path, *, columns: int = 6) -> None:
    """Write :func:`grid_image` as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid_image(pictures, captions, columns=columns).save(temporary, format="PNG")
    temporary.replace(path)
