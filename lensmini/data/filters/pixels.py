"""Scores of a picture's pixels: area, clarity, entropy and luminance (arXiv 2605.21573, section 2.1).

Axes: b pictures, h and w pixels.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["filter_area", "filter_clarity", "filter_entropy", "filter_luminance", "pixel_scores", "to_gray"]

CLARITY_SIDE = 256
"""Pixels of the shorter side at which clarity is measured."""

Pictures = Tensor | Sequence[Tensor]


def pixel_scores(images: Pictures) -> dict[str, Tensor]:
    """All scores of pictures of any sizes, with one pass over the pixels.

    Args:
        images: uint8 ``[b, 3, h, w]``, ``[3, h, w]``, or a list of ``[3, h, w]`` of different sizes; float pictures in
            [0, 1] are rounded to uint8 first.

    Returns:
        "area", "clarity", "entropy" and "luminance", each float32 ``[b]``; see the functions of those names.

    Raises:
        ValueError: if a picture has another shape or dtype, no pixels, or values outside [0, 1].

    Example:
        >>> scores = pixel_scores([torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(3, 4, 6)])
        >>> {name: values.tolist() for name, values in scores.items() if name != "clarity"}
        {'area': [64.0, 24.0], 'entropy': [0.0, 0.0], 'luminance': [0.0, 1.0]}
    """
    rows: list[tuple[float, ...]] = []
    for image in _pictures(images):
        gray = to_gray(image)
        rows.append((float(gray.numel()), _clarity(gray), _entropy(gray), _luminance(image)))
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    return dict(zip(("area", "clarity", "entropy", "luminance"), values.unbind(1), strict=True))


def filter_area(images: Pictures) -> Tensor:
    """Pixels of each picture, float32 ``[b]``; the paper wants at least 384^2.

    Example:
        >>> filter_area(torch.zeros(2, 3, 4, 5, dtype=torch.uint8))
        tensor([20., 20.])
    """
    return torch.tensor([image.shape[1] * image.shape[2] for image in _pictures(images)], dtype=torch.float32)


def filter_clarity(images: Pictures) -> Tensor:
    r"""Variance of the Laplacian of the gray picture at a fixed scale, float32 ``[b]``.

    .. math:: \mathrm{var}(g_{y-1,x} + g_{y+1,x} + g_{y,x-1} + g_{y,x+1} - 4 g_{y,x})

    over all inner pixels, with gray levels g from 0 to 255. The picture is first resized, with antialiasing, to a
    shorter side of 256 pixels, so that the score tells what can be seen and not how many pixels it is stored in:
    a blurred picture does not become sharp by being small, nor a sharp one blurred by being large. The same picture
    stored two or three times as large scores the same to about a quarter.

    Example:
        >>> ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)
        >>> filter_clarity(ramp)
        tensor([0.])
    """
    return torch.tensor([_clarity(to_gray(image)) for image in _pictures(images)], dtype=torch.float32)


def filter_entropy(images: Pictures) -> Tensor:
    r"""Shannon entropy of the 256-bin histogram of the gray picture in bits, float32 ``[b]`` from 0 to 8.

    Example:
        >>> ramp = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
        >>> filter_entropy(ramp)
        tensor([8.])
    """
    return torch.tensor([_entropy(to_gray(image)) for image in _pictures(images)], dtype=torch.float32)


def filter_luminance(images: Pictures) -> Tensor:
    """Mean of HSV's value, the largest of the three colours, float32 ``[b]`` from 0 to 1.

    Example:
        >>> red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 2, 2)
        >>> filter_luminance(red)
        tensor([1.])
    """
    return torch.tensor([_luminance(image) for image in _pictures(images)], dtype=torch.float32)


def to_gray(image: Tensor) -> Tensor:
    """Luma of Rec. 601 in weights of 1/128: (38 R + 75 G + 15 B + 64) / 128, rounded down; within 1 of PIL's "L".

    Args:
        image: uint8 ``[3, h, w]``.

    Returns:
        uint8 ``[h, w]``.

    Example:
        >>> to_gray(torch.tensor([255, 255, 255], dtype=torch.uint8).reshape(3, 1, 1))
        tensor([[255]], dtype=torch.uint8)
    """
    # The sum stays below 2^15, so that 16 bits do: a quarter of the memory traffic of float32.
    red, green, blue = image.to(torch.int16)
    return (red.mul_(38).add_(green.mul_(75)).add_(blue.mul_(15)).add_(64) >> 7).to(torch.uint8)


def _pictures(images: Pictures) -> Iterable[Tensor]:
    if isinstance(images, Tensor) and images.ndim == 3:
        images = [images]
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{index}]: expected [3, h, w], got {list(image.shape)}")
        if image.dtype == torch.uint8:
            yield image
        elif image.is_floating_point():
            low, high = image.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(f"images[{index}]: expected values in [0, 1], got {low.item()} to {high.item()}")
            yield (image.float() * 255).round().to(torch.uint8)
        else:
            raise ValueError(f"images[{index}]: expected uint8 or floating point, got {image.dtype}")


def _clarity(gray: Tensor) -> float:
    height, width = gray.shape
    scale = CLARITY_SIDE / min(height, width)
    size = (max(CLARITY_SIDE, round(height * scale)), max(CLARITY_SIDE, round(width * scale)))
    if max(size) > 64 * CLARITY_SIDE:
        return 0.0  # a line, not a picture
    if size != (height, width):
        gray = F.interpolate(gray[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    g = gray.to(torch.int16)
    around = g[:-2, 1:-1] + g[2:, 1:-1]
    around += g[1:-1, :-2]
    around += g[1:-1, 2:]
    return torch.var((around - 4 * g[1:-1, 1:-1]).float(), correction=0).item()


def _entropy(gray: Tensor) -> float:
    counts = torch.bincount(gray.flatten(), minlength=256).double()
    shares = counts[counts > 0] / gray.numel()
    return max(0.0, -(shares * shares.log2()).sum().item())


def _luminance(image: Tensor) -> float:
    value = torch.maximum(torch.maximum(image[0], image[1]), image[2])
    return value.sum().item() / (255 * value.numel())
