"""Pictures as PIL images that carry how they were made, and PNG files that keep it.

Axes: c channels, H and W pixels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from lensmini.checkpoints.files import replace_file

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["read_metadata", "save_png", "to_picture"]

KEY = "lensmini"


def to_picture(pixels: Tensor, metadata: Mapping[str, Any]) -> "Image.Image":
    r"""Make a PIL image whose ``info`` says how it was made.

    ``info["lensmini"]`` is the metadata as JSON in ASCII, ``info["parameters"]`` the same for people and for the tools
    that read that text.

    Args:
        pixels: ``[3, H, W]`` uint8.
        metadata: what JSON can hold; ``prompt`` and ``negative_prompt`` are the text, the rest settings.

    Returns:
        The image, RGB.

    Raises:
        ValueError: if shape or dtype are others, or JSON cannot hold the metadata.

    Example:
        >>> image = to_picture(torch.zeros(3, 2, 4, dtype=torch.uint8), {"prompt": "a cat", "seed": 7})
        >>> image.size, image.info["parameters"]
        ((4, 2), 'a cat\nseed: 7')
    """
    from PIL import Image

    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels: expected uint8 [3, H, W], got {pixels.dtype} {list(pixels.shape)}")
    image = Image.fromarray(rearrange(pixels.cpu(), "c H W -> H W c").contiguous().numpy())
    try:
        image.info[KEY] = json.dumps(dict(metadata), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"metadata: expected values that JSON can hold, got {dict(metadata)!r}") from error
    image.info["parameters"] = _plain_text(metadata)
    return image


def save_png(image: "Image.Image", path: str | Path) -> None:
    """Save an image of :func:`to_picture` as PNG with its metadata; the file appears whole or not at all.

    Args:
        image: any PIL image; one without metadata is saved without.
        path: the file.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save_png(to_picture(torch.zeros(3, 2, 2, dtype=torch.uint8), {"seed": 7}), f"{folder}/a.png")
        >>> read_metadata(f"{folder}/a.png")
        {'seed': 7}
    """
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    if KEY in image.info:
        chunks.add_text(KEY, image.info[KEY])
    if "parameters" in image.info:
        chunks.add_itxt("parameters", image.info["parameters"])
    path = Path(path)
    replace_file(path, lambda part: image.save(part, format="PNG", pnginfo=chunks))


def read_metadata(image: "Image.Image | str | Path") -> dict[str, Any]:
    """How a picture was made, from the image or from its PNG file.

    Args:
        image: a PIL image or a path.

    Returns:
        The metadata.

    Raises:
        ValueError: if there is none, or it is not a JSON object.

    Example:
        >>> read_metadata(to_picture(torch.zeros(3, 2, 2, dtype=torch.uint8), {"seed": 7}))["seed"]
        7
    """
    if isinstance(image, str | Path):
        from PIL import Image

        with Image.open(image) as opened:
            opened.load()
            return read_metadata(opened)
    text = image.info.get(KEY)
    if not isinstance(text, str):
        raise ValueError(f'image: expected metadata under "{KEY}", got {sorted(map(str, image.info))}')
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'image: expected a JSON object under "{KEY}", got {text[:80]!r}') from error
    if not isinstance(metadata, dict):
        raise ValueError(f'image: expected a JSON object under "{KEY}", got {text[:80]!r}')
    return metadata


def _plain_text(metadata: Mapping[str, Any]) -> str:
    lines = [str(metadata.get("prompt") or "")]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    rest = {name: value for name, value in metadata.items() if name not in ("prompt", "negative_prompt")}
    lines.append(", ".join(f"{name}: {value}" for name, value in rest.items() if value is not None))
    # A NUL would end the chunk's text, and a lone surrogate has no UTF-8; JSON keeps both.
    return "\n".join(lines).replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
