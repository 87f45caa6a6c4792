"""Reading a picture of the miniature world: its background, and every object with colour, shape, size and place.

Axes: h height, w width, in pixels; k candidate colours.

The reader knows the palette and the four shapes, nothing else about what it is shown. Every region that is big enough
to be an object counts as one, so that painting more than was asked is as wrong as painting less.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensmini.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, area_share, cell_unit, coverage
from lensmini.shapes import check_shape

__all__ = ["FoundObject", "SceneReading", "read_scene"]

_MIN_AREA = 0.05
"""Smallest region that counts as an object, in squared cell units: a quarter of the smallest object (a triangle)."""
_MIN_OVERLAP = 0.6
"""Soft intersection over union with the best template below which a region has no known shape."""
_ACROSS = (0.45, 1.1)
"""Width of an object in cell units outside which a region has no known shape."""
_MIN_GROUND = 0.2
"""Share of the canvas that one background colour must fill; four large squares leave 0.36."""


@dataclass(frozen=True, slots=True)
class FoundObject:
    """A region of one colour that the reader found.

    Example:
        >>> FoundObject("red", "circle", "large", y=0.5, x=1.6, overlap=0.9).cell
        (0, 1)
    """

    colour: str
    """A key of COLOURS, or of BACKGROUNDS for a patch of another background colour."""
    shape: str | None
    """One of SHAPES; None if the region is like none of them, or far too big or too small."""
    size: str | None
    """A key of SIZES; None without a shape."""
    y: float
    """Centre of mass in cells from the top."""
    x: float
    """Centre of mass in cells from the left."""
    overlap: float
    """Soft intersection over union with the best shape, 0..1."""

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column."""
        return int(self.y), int(self.x)


@dataclass(frozen=True, slots=True)
class SceneReading:
    """What the reader sees in a picture.

    Example:
        >>> read_scene(torch.ones(3, 32, 32)) == SceneReading("white", ())
        True
    """

    background: str | None
    """A key of BACKGROUNDS; None if none of them fills enough of the canvas."""
    objects: tuple[FoundObject, ...]
    """Every region, from the top row of pixels down."""


def read_scene(image: Tensor, *, grid: int = 2) -> SceneReading:
    """Find the background and the objects of a picture.

    Each pixel is taken as a mix of the background and one colour, ``(1 - a) * background + a * colour``; the colour
    with the smallest residual claims it if a is at least one half, so that a blended edge is not mistaken for a third
    colour. Regions of one colour are joined over shared pixel sides, and a region's shape is the template of the
    same area and centre of mass with the largest soft intersection over union.

    Args:
        image: ``[3, h, w]`` RGB, uint8, or floating in 0..1 (values outside are clamped).
        grid: rows and columns of cells.

    Returns:
        The reading.

    Raises:
        ValueError: if the image is not as above, not finite or too small.

    Example:
        >>> read_scene(torch.zeros(3, 32, 32))
        SceneReading(background='black', objects=())
    """
    sizes = check_shape("image", image, "3 h w")
    height, width = sizes["h"], sizes["w"]
    unit = cell_unit(height, width, grid)
    pixels = _pixels(image)
    background = _background(pixels)
    names, alphas, labels = _unmix(pixels, background or "black")
    strides = (height / grid, width / grid)
    regions = _regions(labels)
    found = []
    counts = np.bincount(regions.ravel())
    for region in np.flatnonzero(counts >= _MIN_AREA * unit**2):
        if region == 0:
            continue
        rows, cols = np.nonzero(regions == region)
        # Two pixels of margin take in the rim, where less than half of a pixel is the object's.
        top, left = max(0, int(rows.min()) - 2), max(0, int(cols.min()) - 2)
        window = (slice(top, int(rows.max()) + 3), slice(left, int(cols.max()) + 3))
        label = labels[rows[0], cols[0]]
        inside = _dilated(regions[window] == region) & ((labels[window] == 0) | (labels[window] == label))
        soft = np.where(inside, alphas[label - 1][window], 0.0)
        found.append(_describe(soft, (top, left), names[label - 1], unit, strides))
    return SceneReading(background, tuple(found))


def _pixels(image: Tensor) -> NDArray[np.float32]:
    """``[3, h, w]`` values 0..255."""
    if image.dtype == torch.uint8:
        return image.detach().cpu().numpy().astype(np.float32)
    if not image.is_floating_point() or not bool(image.isfinite().all()):
        raise ValueError(f"image: expected uint8, or finite floating values in 0..1, got {image.dtype}")
    return (image.detach().float().cpu().clamp(0, 1) * 255).numpy()


def _background(pixels: NDArray[np.float32]) -> str | None:
    """The background that most pixels are nearest to, of all palette colours."""
    palette = _palette((*BACKGROUNDS, *COLOURS))
    distance = (palette**2).sum(1)[:, None] - 2 * palette @ pixels.reshape(3, -1)
    counts = np.bincount(distance.argmin(0), minlength=len(palette))[: len(BACKGROUNDS)]
    share = counts.max() / pixels[0].size
    return list(BACKGROUNDS)[int(counts.argmax())] if share >= _MIN_GROUND else None


def _unmix(
    pixels: NDArray[np.float32], background: str
) -> tuple[tuple[str, ...], NDArray[np.float32], NDArray[np.int64]]:
    """Candidate colours, ``[k, h, w]`` how much of each a pixel holds, ``[h, w]`` 1 + the colour it is, or 0."""
    names = (*COLOURS, *(name for name in BACKGROUNDS if name != background))
    ground = _palette((background,))[0]
    toward = _palette(names) - ground
    squares = (toward**2).sum(1)[:, None]
    dots = toward @ (pixels.reshape(3, -1) - ground[:, None])
    alphas = np.clip(dots / squares, 0, 1)
    best = (alphas * (alphas * squares - 2 * dots)).argmin(0)
    labels = np.where(np.take_along_axis(alphas, best[None], 0)[0] >= 0.5, best + 1, 0)
    return names, alphas.reshape(-1, *pixels.shape[1:]), labels.reshape(pixels.shape[1:])


@lru_cache
def _palette(names: tuple[str, ...]) -> NDArray[np.float32]:
    return np.array([{**COLOURS, **BACKGROUNDS}[name] for name in names], np.float32)


def _regions(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the 4-connected regions of equal non-zero labels 1, 2, ... in reading order; 0 stays 0."""
    shape = labels.shape
    # Every pixel points at an earlier pixel of its region until all point at the first one.
    parent = np.arange(labels.size).reshape(shape)
    down, right = labels[1:] == labels[:-1], labels[:, 1:] == labels[:, :-1]
    while True:
        before = parent
        parent = parent.copy()
        for joined, one, other in ((down, parent[:-1], parent[1:]), (right, parent[:, :-1], parent[:, 1:])):
            least = np.minimum(one, other)
            np.minimum(one, least, out=one, where=joined)
            np.minimum(other, least, out=other, where=joined)
        parent = parent.ravel()[parent]
        if np.array_equal(parent, before):
            break
    _, numbers = np.unique(np.where(labels > 0, parent, -1), return_inverse=True)
    numbers = numbers.reshape(shape)
    return numbers if (labels == 0).any() else numbers + 1


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and every pixel that touches it by a side or a corner."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    wide = tall.copy()
    wide[:, 1:] |= tall[:, :-1]
    wide[:, :-1] |= tall[:, 1:]
    return wide


def _blurred(soft: NDArray[np.float32]) -> NDArray[np.float32]:
    """Blurred by (1, 2, 1) / 4 along both axes; what lies outside is empty."""
    tall = soft / 2
    tall[1:] += soft[:-1] / 4
    tall[:-1] += soft[1:] / 4
    wide = tall / 2
    wide[:, 1:] += tall[:, :-1] / 4
    wide[:, :-1] += tall[:, 1:] / 4
    return wide.astype(np.float32, copy=False)


def _describe(
    soft: NDArray[np.float32], corner: tuple[int, int], colour: str, unit: float, strides: tuple[float, float]
) -> FoundObject:
    area = soft.sum()
    down = np.arange(soft.shape[0], dtype=np.float32) + 0.5
    right = np.arange(soft.shape[1], dtype=np.float32) + 0.5
    y, x = float(soft.sum(1) @ down / area), float(soft.sum(0) @ right / area)
    best, shape, across = 0.0, None, 0.0
    for candidate in SHAPES:
        span = float(np.sqrt(area / area_share(candidate)))
        # A triangle's centre of mass lies a sixth of its height below the middle of its box.
        middle = y - span / 6 if candidate == "triangle" else y
        crisp = coverage(candidate, (down - middle)[:, None], right - x, span)
        # A blurred square is nearer to a crisp circle than to a crisp square, so blurred templates compete too.
        for template in (crisp, _blurred(crisp)):
            overlap = float(np.minimum(soft, template).sum() / np.maximum(soft, template).sum())
            if overlap > best:
                best, shape, across = overlap, candidate, span / unit
    known = best >= _MIN_OVERLAP and _ACROSS[0] <= across <= _ACROSS[1]
    size = min(SIZES, key=lambda name: abs(np.log(across / SIZES[name])))
    y, x = (y + corner[0]) / strides[0], (x + corner[1]) / strides[1]
    return FoundObject(colour, shape if known else None, size if known else None, y, x, best)
