"""From an image of any size to a bucket's canvas: scale to cover it, then crop.

Axes: c channels, h height, w width, in pixels.
"""

from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lensmini.data.buckets import Bucket
from lensmini.shapes import check_shape

__all__ = ["crop_fraction", "resize_and_crop"]


def crop_fraction(height: int, width: int, bucket: Bucket) -> float:
    """Share of an image's area that :func:`resize_and_crop` cuts off.

    Args:
        height: pixels of the image.
        width: pixels of the image.
        bucket: the canvas.

    Returns:
        A share in [0, 1), ``1 - min(r, 1 / r)`` for the two aspects' ratio r.

    Raises:
        ValueError: if a side is not positive.

    Example:
        >>> crop_fraction(512, 1024, Bucket(512, 512))
        0.5
    """
    if height < 1 or width < 1:
        raise ValueError(f"height, width: expected positive pixels, got {height} x {width}")
    ratio = Fraction(width * bucket.height, height * bucket.width)
    return float(1 - min(ratio, 1 / ratio))


def resize_and_crop(
    image: Tensor,
    bucket: Bucket,
    *,
    crop: Literal["center", "random"] = "center",
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scale an image by one factor until it covers the bucket, antialiased, and crop what stands over.

    The aspect is kept up to the rounding of the longer side to a whole pixel. A bicubic kernel overshoots at
    edges: uint8 values are clamped to 0..255, floating values are left as they come.

    Args:
        image: ``[c, h, w]``, uint8 or floating point.
        bucket: the canvas; larger than the image means upscaling.
        crop: where the window stands in the scaled image: in the middle, or anywhere with equal probability.
        mode: interpolation kernel.
        generator: source of the random window; required by ``crop="random"``. Must be a CPU generator.

    Returns:
        ``[c, bucket.height, bucket.width]``, dtype and device of ``image``.

    Raises:
        ValueError: if the shape, dtype or an option is not as above.

    Example:
        >>> resize_and_crop(torch.zeros(3, 90, 200, dtype=torch.uint8), Bucket(32, 48)).shape
        torch.Size([3, 32, 48])
    """
    sizes = check_shape("image", image, "c h w")
    if min(sizes.values()) < 1 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(f"image: expected a non-empty uint8 or floating image, got {image.dtype} {list(image.shape)}")
    if crop not in ("center", "random") or mode not in ("bicubic", "bilinear"):
        raise ValueError(
            f'crop, mode: expected "center" or "random" and "bicubic" or "bilinear", got {crop!r}, {mode!r}'
        )
    if crop == "random" and generator is None:
        raise ValueError('generator: expected a torch.Generator with crop="random", got None')
    scale = max(Fraction(bucket.height, sizes["h"]), Fraction(bucket.width, sizes["w"]))
    # One of the two is exact; rounding the other down never uncovers the canvas.
    height, width = round(sizes["h"] * scale), round(sizes["w"] * scale)
    top, left = height - bucket.height, width - bucket.width
    if crop == "center":
        top, left = top // 2, left // 2
    else:
        top, left = (int(torch.randint(extra + 1, (), generator=generator)) for extra in (top, left))
    scaled = image if (height, width) == image.shape[1:] else _resize(image, (height, width), mode)
    return scaled[:, top : top + bucket.height, left : left + bucket.width].contiguous()


def _resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Antialiased resize; uint8 on the CPU has its own kernel, every other case computes in at least float32."""
    native = image.dtype in (torch.float32, torch.float64) or (
        image.dtype == torch.uint8 and image.device.type == "cpu"
    )
    source = image if native else image.float()
    scaled = F.interpolate(source[None], size=size, mode=mode, antialias=True, align_corners=False)[0]
    if native:
        return scaled
    return (scaled.round().clamp(0, 255) if image.dtype == torch.uint8 else scaled).to(image.dtype)
