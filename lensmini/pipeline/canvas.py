"""Sizes of pictures: which ones the released model was made for, and the nearest of them to any other.

Sizes are pixels, height before width; an aspect is written width:height, as "16:9".
"""

import math
from collections.abc import Sequence

from lensmini.data.buckets import LENS_1440_BUCKETS, LENS_BUCKETS, LENS_RATIOS

__all__ = ["bucket_size", "check_size", "nearest_size", "picture_sizes"]

MULTIPLE = 16
MAX_PIXELS = max(bucket.height * bucket.width for bucket in LENS_1440_BUCKETS)
MAX_SIDE = max(bucket.height for bucket in LENS_1440_BUCKETS)
_ASPECTS = tuple(f"{width}:{height}" for width, height in LENS_RATIOS)
_BASES = (512, 768, 1024, 1440)
_TABLE = {
    (base, aspect): (bucket.height, bucket.width)
    for (base, aspect), bucket in zip(
        [(base, aspect) for base in _BASES for aspect in _ASPECTS], (*LENS_BUCKETS, *LENS_1440_BUCKETS), strict=True
    )
}


def bucket_size(aspect_ratio: str, base: int = 1024) -> tuple[int, int]:
    """The bucket of an aspect ratio (the released pipeline's table; 512 and 768 are training buckets).

    Args:
        aspect_ratio: "W:H", one of 1:2, 9:16, 2:3, 3:4, 1:1, 4:3, 3:2, 16:9, 2:1.
        base: side of the square of about the same area: 512, 768, 1024 or 1440 pixels.

    Returns:
        (height, width) in pixels.

    Raises:
        ValueError: for another aspect ratio or base.

    Example:
        >>> bucket_size("16:9"), bucket_size("1:2", 1440)
        ((768, 1376), (2080, 1040))
    """
    if base not in _BASES:
        raise ValueError(f"base: expected one of {', '.join(map(str, _BASES))}, got {base!r}")
    if aspect_ratio not in _ASPECTS:
        raise ValueError(f"aspect_ratio: expected width:height, one of {', '.join(_ASPECTS)}, got {aspect_ratio!r}")
    return _TABLE[base, aspect_ratio]


def _is_legal(height: int, width: int) -> bool:
    fits = height % MULTIPLE == 0 and width % MULTIPLE == 0 and height * width <= MAX_PIXELS
    return fits and max(height, width) <= 2 * min(height, width) and min(height, width) > 0


def nearest_size(height: int, width: int) -> tuple[int, int]:
    """The legal size nearest to another one, in the logarithms of both sides; of equally near ones the smaller.

    Args:
        height: pixels, any integer.
        width: pixels, any integer.

    Returns:
        (height, width): multiples of 16, aspect from 1:2 to 2:1, no more pixels than 2080 x 1040.

    Example:
        >>> nearest_size(1000, 1000), nearest_size(4000, 1000), nearest_size(1024, 1024)
        ((1008, 1008), (2080, 1040), (1024, 1024))
    """
    tall, wide = math.log(max(height, 1)), math.log(max(width, 1))
    sides = range(MULTIPLE, MAX_SIDE + 1, MULTIPLE)
    logs = {side: math.log(side) for side in sides}
    legal = ((h, w) for h in sides for w in sides if _is_legal(h, w))
    return min(legal, key=lambda size: ((logs[size[0]] - tall) ** 2 + (logs[size[1]] - wide) ** 2, size))


def check_size(height: int, width: int) -> None:
    """Refuse a size that the released model was not made for.

    Legal are multiples of 16 with an aspect from 1:2 to 2:1 and at most 2080 x 1040 pixels: 1440^2 and what the table's
    own rounding adds. Odd numbers of latent positions (1040 / 16 = 65) are legal.

    Args:
        height: pixels.
        width: pixels.

    Raises:
        ValueError: naming the size, the rule that it breaks and the nearest legal size.

    Example:
        >>> check_size(1040, 2080)
        >>> check_size(1000, 1024)
        Traceback (most recent call last):
        ValueError: height, width: expected multiples of 16, got 1000 x 1024; the nearest legal size is 1008 x 1024
    """
    for side in (height, width):
        if not isinstance(side, int) or isinstance(side, bool):
            raise ValueError(f"height, width: expected whole pixels, got {height!r} x {width!r}")
    if _is_legal(height, width):
        return
    if min(height, width) <= 0:
        rule = "positive sides"
    elif height % MULTIPLE or width % MULTIPLE:
        rule = f"multiples of {MULTIPLE}"
    elif max(height, width) > 2 * min(height, width):
        rule = "an aspect from 1:2 to 2:1"
    else:
        rule = f"at most {MAX_PIXELS} pixels (2080 x 1040)"
    best = nearest_size(height, width)
    raise ValueError(
        f"height, width: expected {rule}, got {height} x {width}; the nearest legal size is {best[0]} x {best[1]}"
    )


def picture_sizes(
    num: int,
    *,
    height: int | Sequence[int] | None = None,
    width: int | Sequence[int] | None = None,
    aspect_ratio: str | Sequence[str] | None = None,
    base: int = 1024,
) -> list[tuple[int, int]]:
    """The size of each prompt's pictures, from sides or from aspect ratios; neither means a square of ``base``.

    Args:
        num: number of prompts.
        height: pixels, for all prompts or for each.
        width: pixels, for all prompts or for each.
        aspect_ratio: instead of both, "W:H" for all prompts or for each.
        base: side of the square of about the same area.

    Returns:
        For each prompt (height, width), not checked.

    Raises:
        ValueError: if both kinds are given, one side is missing, or a sequence has another length than ``num``.

    Example:
        >>> picture_sizes(2, aspect_ratio=["1:1", "2:1"]), picture_sizes(2, height=512, width=[512, 640])
        ([(1024, 1024), (736, 1472)], [(512, 512), (512, 640)])
    """
    if aspect_ratio is not None and (height is not None or width is not None):
        raise ValueError("aspect_ratio: expected it or height and width, got both")
    if (height is None) != (width is None):
        raise ValueError(f"height, width: expected both or neither, got {height!r} and {width!r}")
    if height is None or width is None:
        ratios = _for_each("aspect_ratio", "1:1" if aspect_ratio is None else aspect_ratio, num)
        return [bucket_size(ratio, base) for ratio in ratios]
    return list(zip(_for_each("height", height, num), _for_each("width", width, num), strict=True))


def _for_each(name: str, value, num: int) -> list:  # noqa: ANN001
    if isinstance(value, int | str) or not isinstance(value, Sequence):
        return [value] * num
    if len(value) != num:
        raise ValueError(f"{name}: expected one value or one for each of {num} prompts, got {len(value)}")
    return list(value)
