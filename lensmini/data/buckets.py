"""Resolution buckets: the canvases training runs on, and the one that fits an image.

Axes: n images, k buckets. Sizes are pixels, height before width; an aspect is width / height.

Published tables are written W x H; every :class:`Bucket` here is ``(height, width)``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LENS_1440_BUCKETS", "LENS_BUCKETS", "LENS_RATIOS", "Bucket", "assign_buckets", "make_buckets"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A canvas of ``height`` x ``width`` pixels.

    Example:
        >>> Bucket(736, 1472).aspect, Bucket(736, 1472).tokens()
        (2.0, 4232)
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"Bucket: expected positive sides in pixels, got {self.height} x {self.width}")

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    def tokens(self, downsample: int = 16) -> int:
        """Latent tokens of the canvas, for an encoder that makes one token of ``downsample`` x ``downsample`` pixels.

        Raises:
            ValueError: if a side is no multiple of ``downsample``.

        Example:
            >>> Bucket(512, 512).tokens(), Bucket(24, 40).tokens(4)
            (1024, 60)
        """
        if downsample < 1 or self.height % downsample or self.width % downsample:
            raise ValueError(f"downsample: expected a divisor of {self.height} and {self.width}, got {downsample}")
        return (self.height // downsample) * (self.width // downsample)


LENS_RATIOS = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1))
"""The nine aspects of Lens as (width, height), from tall to wide (arXiv 2605.21573, section 3)."""

# The tall half of each table as (width, height), in the order of LENS_RATIOS; the wide half mirrors it.
_TALL = {
    512: ((352, 704), (384, 672), (416, 640), (448, 608)),
    768: ((544, 1088), (576, 1024), (640, 960), (672, 896)),
    1024: ((736, 1472), (768, 1376), (832, 1248), (864, 1152)),
    1440: ((1040, 2080), (1088, 1936), (1168, 1760), (1216, 1616)),
}


def _table(base: int) -> tuple[Bucket, ...]:
    tall = tuple(Bucket(height, width) for width, height in _TALL[base])
    wide = tuple(Bucket(bucket.width, bucket.height) for bucket in reversed(tall))
    return (*tall, Bucket(base, base), *wide)


LENS_BUCKETS = (*_table(512), *_table(768), *_table(1024))
"""The 27 training buckets of Lens (arXiv 2605.21573, section 3): bases 512, 768, 1024, each in LENS_RATIOS order."""

LENS_1440_BUCKETS = _table(1440)
"""The nine 1440 canvases of the released pipeline, in LENS_RATIOS order. They were never trained on."""


def make_buckets(
    base: int,
    *,
    ratios: Sequence[tuple[int, int]] = LENS_RATIOS,
    multiple: int = 32,
    tolerance: float = 0.06,
) -> tuple[Bucket, ...]:
    """Make one bucket per aspect ratio, all of about ``base ** 2`` pixels.

    The rule: of all sides that are multiples of ``multiple`` and whose area is within ``tolerance`` of
    ``base ** 2``, take the aspect nearest to the ratio in log; among equally near ones the nearest area in log,
    then the narrower. An aspect further off than ``tolerance`` in log is not taken. The rule is ours, the paper
    states only the result: with the defaults, bases 512, 768 and 1024 give :data:`LENS_BUCKETS` exactly. It does
    NOT give :data:`LENS_1440_BUCKETS` (for 1:2 it makes 2048 x 1024, the table has 2080 x 1040), which are the 1024
    table scaled by 1440 / 1024.

    Args:
        base: side of the square canvas in pixels.
        ratios: k pairs (width, height) of positive numbers.
        multiple: every side is a multiple of it, in pixels.
        tolerance: largest relative difference of an area from ``base ** 2``, and of an aspect from its ratio in log.

    Returns:
        k buckets, in the order of ``ratios``.

    Raises:
        ValueError: if an argument is not positive, or no canvas within the tolerance exists near a ratio.

    Example:
        >>> make_buckets(512, ratios=[(1, 2), (1, 1)])
        (Bucket(height=704, width=352), Bucket(height=512, width=512))
    """
    if base < 1 or multiple < 1 or not tolerance > 0:
        raise ValueError(f"base, multiple, tolerance: expected positive numbers, got {base}, {multiple}, {tolerance}")
    return tuple(_nearest_canvas(base, width / height, multiple, tolerance) for width, height in _checked(ratios))


def _checked(ratios: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    if not ratios or any(width <= 0 or height <= 0 for width, height in ratios):
        raise ValueError(f"ratios: expected pairs (width, height) of positive numbers, got {list(ratios)}")
    return ratios


def _nearest_canvas(base: int, aspect: float, multiple: int, tolerance: float) -> Bucket:
    area = base * base
    ideal = base / math.sqrt(aspect) / multiple
    # height^2 = area / aspect bounds the rows to look at.
    lowest = ideal * math.sqrt(max(0.0, 1 - tolerance)) * math.exp(-tolerance / 2)
    highest = ideal * math.sqrt(1 + tolerance) * math.exp(tolerance / 2)
    found: list[tuple[float, float, int, Bucket]] = []
    for row in range(max(1, math.floor(lowest)), math.ceil(highest) + 1):
        height = row * multiple
        first = max(1, math.ceil(area * (1 - tolerance) / height / multiple))
        last = math.floor(area * (1 + tolerance) / height / multiple)
        for column in range(first, last + 1):
            bucket = Bucket(height, column * multiple)
            off = abs(math.log(bucket.aspect / aspect))
            if off <= tolerance:
                size = abs(math.log(height * bucket.width / area))
                found.append((round(off, 9), round(size, 9), bucket.width, bucket))
    if not found:
        raise ValueError(
            f"tolerance: no canvas with sides in multiples of {multiple} is within {tolerance} of both the area "
            f"{base}^2 and the aspect {aspect:.4g}; raise tolerance or lower multiple"
        )
    return min(found, key=lambda item: item[:3])[3]


# Images per chunk: the float64 temporaries of one chunk stay in a core's second-level cache.
_CHUNK = 1 << 15


def assign_buckets(
    heights: ArrayLike,
    widths: ArrayLike,
    buckets: Sequence[Bucket],
    *,
    bases: Sequence[int] | None = None,
    small: Literal["error", "drop", "upscale"] = "error",
) -> NDArray[np.int64]:
    """Find each image's bucket: the nearest aspect, of the largest base that needs no upscaling.

    Inside one base the nearest bucket minimises ``|log(aspect of image / aspect of bucket)|``; a tie goes to the
    narrower. The image covers it if neither side is shorter than the bucket's. Bases are tried from the largest
    area to the smallest. An image that does not cover its nearest bucket of any base is small, even if it would
    cover another aspect of it, since that crop would throw away more.

    Args:
        heights: ``[n]`` integers, pixels.
        widths: ``[n]`` integers, pixels.
        buckets: k buckets.
        bases: k labels: buckets of equal label form a base. By default bases are told apart by area: sorted by
            area, a new base starts where the area jumps by more than a factor of 1.5.
        small: what to do with small images: raise an error, give them index -1, or give them their nearest
            bucket of the smallest base.

    Returns:
        ``[n]`` int64 indices into ``buckets``; -1 only with ``small="drop"``.

    Raises:
        ValueError: if sizes are no positive integers or differ in number, two buckets of one base share an
            aspect, or there is a small image and ``small`` is "error".

    Example:
        >>> assign_buckets([700, 1500, 100], [700, 750, 90], LENS_BUCKETS, small="drop").tolist()
        [4, 18, -1]
    """
    rows, columns = _checked_sizes("heights", heights), _checked_sizes("widths", widths)
    if rows.shape != columns.shape:
        raise ValueError(f"widths: expected as many as heights, {len(rows)}, got {len(columns)}")
    if small not in ("error", "drop", "upscale"):
        raise ValueError(f'small: expected "error", "drop" or "upscale", got {small!r}')
    groups = [_Base.build(buckets, members) for members in _bases(buckets, bases)]
    result = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), _CHUNK):
        piece = slice(start, start + _CHUNK)
        # float64 holds any pixel count exactly, and divides and compares faster than int64.
        height, width = rows[piece].astype(np.float64), columns[piece].astype(np.float64)
        aspect = width / height
        chosen = result[piece]
        chosen.fill(-1)
        # From the smallest base to the largest: a larger base that is covered overwrites a smaller one.
        for rank, group in enumerate(groups):
            count = np.zeros(len(aspect), np.uint8 if len(group.index) < 256 else np.int64)
            for boundary in group.boundaries:  # among nine sorted values, counting comparisons beats bisection
                count += (aspect > boundary).view(np.uint8)
            nearest = count.astype(np.intp)
            index = group.index.take(nearest)
            if rank == 0 and small == "upscale":
                chosen[:] = index
            else:
                covered = (height >= group.heights.take(nearest)) & (width >= group.widths.take(nearest))
                np.copyto(chosen, index, where=covered)
    if small == "error" and len(result) and result.min() < 0:
        first = int(np.argmin(result))
        raise ValueError(
            f"heights, widths: {int((result < 0).sum())} of {len(result)} images are smaller than every bucket, first "
            f'number {first} with {rows[first]} x {columns[first]} pixels; pass small="drop" or small="upscale"'
        )
    return result


@dataclass(frozen=True)
class _Base:
    """The buckets of one base from narrow to wide: their indices, sides and the aspects at which the choice turns."""

    index: NDArray[np.int64]
    heights: NDArray[np.float64]
    widths: NDArray[np.float64]
    boundaries: tuple[float, ...]

    @classmethod
    def build(cls, buckets: Sequence[Bucket], members: list[int]) -> "_Base":
        order = sorted(members, key=lambda member: buckets[member].aspect)
        chosen = [buckets[member] for member in order]
        for low, high in pairwise(chosen):
            if low.width * high.height == high.width * low.height:
                raise ValueError(f"buckets: {low} and {high} of one base share an aspect; tell them apart with bases")
        return cls(
            np.array(order, np.int64),
            np.array([bucket.height for bucket in chosen], np.float64),
            np.array([bucket.width for bucket in chosen], np.float64),
            tuple(_geometric_mean(low, high) for low, high in pairwise(chosen)),
        )


def _geometric_mean(low: Bucket, high: Bucket) -> float:
    """The aspect midway in log; exact when it is rational, so that a tie is seen as one."""
    square = low.width * high.width * low.height * high.height
    root = math.isqrt(square)
    return (root if root * root == square else math.sqrt(square)) / (low.height * high.height)


def _bases(buckets: Sequence[Bucket], bases: Sequence[int] | None) -> list[list[int]]:
    """Indices of the buckets of each base, smallest mean area first."""
    if not buckets:
        raise ValueError("buckets: expected at least one, got none")
    areas = [bucket.height * bucket.width for bucket in buckets]
    order = sorted(range(len(buckets)), key=areas.__getitem__)
    if bases is None:
        groups = [[order[0]]]
        for previous, member in pairwise(order):
            groups.append([member]) if areas[member] > 1.5 * areas[previous] else groups[-1].append(member)
        return groups
    if len(bases) != len(buckets):
        raise ValueError(f"bases: expected one label for each of {len(buckets)} buckets, got {len(bases)}")
    labelled = [[member for member in order if bases[member] == label] for label in dict.fromkeys(bases)]
    return sorted(labelled, key=lambda members: sum(areas[member] for member in members) / len(members))


def _checked_sizes(name: str, sizes: ArrayLike) -> NDArray[np.integer]:
    array = np.asarray(sizes)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise ValueError(f"{name}: expected integers of shape [n], got {array.dtype} of shape {list(array.shape)}")
    if array.size and array.min() < 1:
        raise ValueError(f"{name}: expected positive pixels, got {array.min()}")
    return array
