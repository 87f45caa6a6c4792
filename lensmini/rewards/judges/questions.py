"""Questions as data: what a check says, text in which no marker of a template can stand, pictures of a bounded size.

Axes: h and w pixels.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lensmini.rewards.rubric import Criterion

__all__ = ["as_data", "shrink", "statement"]


def statement(criterion: Criterion) -> dict[str, str]:
    """What is asked, and on which scale.

    Example:
        >>> statement(Criterion(id="count", text="Two cups."))
        {'check': 'Two cups.', 'scale': '0 or 1'}
    """
    scales = {
        "binary": "0 or 1",
        "levels": f"a whole number from 1 (not at all) to {criterion.levels} (fully)",
        "real": f"a number from {criterion.low:g} to {criterion.high:g}",
    }
    return {"check": criterion.text, "scale": scales[criterion.scale]}


def as_data(value: Any, markers: Iterable[str] = ()) -> str:
    r"""JSON in which no ``<`` stands, and no marker of a chat template; a reader of JSON sees the same text.

    Args:
        value: what JSON can hold.
        markers: further strings that must not occur, such as ``[INST]``; their first character is written as its number.

    Returns:
        One line of JSON.

    Example:
        >>> as_data({"a": "<image> [INST]"}, ["[INST]"])
        '{"a": "\\u003cimage\\u003e \\u005bINST]"}'
    """
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e")
    for marker in markers:
        # Inside a string of JSON alone: what stands between strings is ours, and no marker.
        text = text.replace(marker, f"\\u{ord(marker[0]):04x}{marker[1:]}")
    return text


def shrink(image: Tensor, max_pixels: int) -> Tensor:
    """A picture ``[3, h, w]`` uint8 with at most so many pixels, antialiased, its shape kept.

    Example:
        >>> shrink(torch.zeros(3, 64, 128, dtype=torch.uint8), 2048).shape
        torch.Size([3, 32, 64])
    """
    height, width = image.shape[-2:]
    if height * width <= max_pixels:
        return image
    factor = (max_pixels / (height * width)) ** 0.5
    size = max(1, int(height * factor)), max(1, int(width * factor))
    # float: the uint8 kernel does not take sides of one pixel in every version
    small = torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)
