"""Reading a picture of the miniature world back, and exact answers to questions about it.

Axes: h height, w width, in pixels; k candidate colours.

The reader knows the palette and the four shapes, nothing else about what it is shown. Every region that is big enough
to be an object counts as one, so that painting more than was asked is as wrong as painting less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensmini.data.scene_captions import RELATIONS
from lensmini.data.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, area_share, cell_unit, coverage
from lensmini.shapes import check_shape

__all__ = [
    "AskBackground",
    "AskCount",
    "AskPlace",
    "AskRelation",
    "FoundObject",
    "Pattern",
    "Question",
    "SceneReading",
    "VerdictReport",
    "questions_about",
    "read_scene",
    "verify_scene",
]

_MIN_AREA = 0.05
"""Smallest region that counts as an object, in squared cell units: a quarter of the smallest object (a triangle)."""
_MIN_OVERLAP = 0.6
"""Soft intersection over union with the best template below which a region has no known shape."""
_ACROSS = (0.45, 1.1)
"""Width of an object in cell units outside which a region has no known shape."""
_MIN_GROUND = 0.2
"""Share of the canvas that one background colour must fill; four large squares leave 0.36."""
_APART = 0.5
"""Distance in cells from which one object is left of, or above, another."""


@dataclass(frozen=True, slots=True)
class FoundObject:
    """A region of one colour that the reader found."""

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
    """What the reader sees in a picture."""

    background: str | None
    """A key of BACKGROUNDS; None if none of them fills enough of the canvas."""
    objects: tuple[FoundObject, ...]
    """Every region, from the top row of pixels down."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which objects are meant; None means any."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape or "object")))

    def matches(self, thing: FoundObject) -> bool:
        """Whether the object is meant."""
        return (
            self.colour in (None, thing.colour) and self.shape in (None, thing.shape) and self.size in (None, thing.size)
        )


@dataclass(frozen=True, slots=True)
class AskCount:
    """Is the number of such objects exactly this? With the empty pattern: of all objects, the precision question."""

    number: int
    what: Pattern = Pattern()

    def __str__(self) -> str:
        return f"exactly {self.number} x {self.what}"


@dataclass(frozen=True, slots=True)
class AskPlace:
    """Is there such an object in this cell?"""

    what: Pattern
    row: int
    col: int

    def __str__(self) -> str:
        return f"{self.what} in row {self.row}, column {self.col}"


@dataclass(frozen=True, slots=True)
class AskRelation:
    """Does some such object stand in this relation (left of, right of, above, below) to some such other one?"""

    what: Pattern
    relation: str
    other: Pattern

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise ValueError(f"relation: expected one of {list(RELATIONS)}, got {self.relation!r}")

    def __str__(self) -> str:
        return f"{self.what} {self.relation} {self.other}"


@dataclass(frozen=True, slots=True)
class AskBackground:
    """Is the background of this colour?"""

    background: str

    def __str__(self) -> str:
        return f"{self.background} background"


Question = AskCount | AskPlace | AskRelation | AskBackground


@dataclass(frozen=True, slots=True)
class VerdictReport:
    """The answers to a picture's questions."""

    questions: tuple[Question, ...]
    answers: tuple[bool, ...]
    """True = right, in the order of the questions."""
    loose_answers: tuple[bool, ...]
    """The same if colours, numbers and places count but shapes and sizes do not."""
    reading: SceneReading

    @property
    def strict(self) -> bool:
        """Everything is right."""
        return all(self.answers)

    @property
    def atom(self) -> float:
        """Share of the questions that are right."""
        return sum(self.answers) / len(self.answers)

    @property
    def loose(self) -> bool:
        """Everything is right by colour."""
        return all(self.loose_answers)


def verify_scene(image: Tensor, expected: Scene | Sequence[Question], *, grid: int = 2) -> VerdictReport:
    """Read a picture and answer questions about it.

    Args:
        image: ``[3, h, w]`` RGB, uint8, or floating in 0..1 (values outside are clamped).
        expected: the questions, or a scene, for those of :func:`questions_about`.
        grid: rows and columns of cells that places refer to; a scene brings its own.

    Returns:
        The answers, and what they rest on.

    Raises:
        ValueError: if there is no question, or the image is not as above or not finite.

    Example:
        >>> from lensmini.data.scenes import render_scene, sample_scene
        >>> scene = sample_scene(generator=0)
        >>> verify_scene(render_scene(scene, 32, 32), scene).strict
        True
    """
    if isinstance(expected, Scene):
        grid, questions = expected.grid, questions_about(expected)
    else:
        questions = tuple(expected)
    if not questions:
        raise ValueError("expected: expected a scene or at least one question, got none")
    reading = read_scene(image, grid=grid)
    loose = tuple(_answer(_by_colour(question), reading) for question in questions)
    return VerdictReport(questions, tuple(_answer(question, reading) for question in questions), loose, reading)


def questions_about(scene: Scene, *, ask_size: bool = False) -> tuple[Question, ...]:
    """The questions that only a picture of exactly this scene, up to jitter, answers: number, background, each object.

    Args:
        scene: the scene.
        ask_size: whether an object's size matters too.

    Returns:
        ``2 + len(scene.objects)`` questions.

    Example:
        >>> from lensmini.data.scenes import SceneObject
        >>> [str(q) for q in questions_about(Scene("white", (SceneObject("circle", "red", "large", 0, 1),)))]
        ['exactly 1 x object', 'white background', 'red circle in row 0, column 1']
    """
    places = tuple(
        AskPlace(Pattern(thing.colour, thing.shape, thing.size if ask_size else None), thing.row, thing.col)
        for thing in scene.objects
    )
    return (AskCount(len(scene.objects)), AskBackground(scene.background), *places)


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
    for region in range(1, int(regions.max(initial=0)) + 1):
        rows, cols = np.nonzero(regions == region)
        # Two pixels of margin take in the rim, where less than half of a pixel is the object's.
        window = (slice(max(0, rows.min() - 2), rows.max() + 3), slice(max(0, cols.min() - 2), cols.max() + 3))
        label = labels[rows[0], cols[0]]
        inside = _dilated(regions[window] == region) & np.isin(labels[window], (0, label))
        soft = np.where(inside, alphas[label - 1][window], 0.0)
        if soft.sum() >= _MIN_AREA * unit**2:
            found.append(_describe(soft, (window[0].start, window[1].start), names[label - 1], unit, strides))
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
            np.copyto(other, least, where=joined)
            np.copyto(one, least, where=joined)
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
        template = coverage(candidate, (down - middle)[:, None], right - x, span)
        overlap = float(np.minimum(soft, template).sum() / np.maximum(soft, template).sum())
        if overlap > best:
            best, shape, across = overlap, candidate, span / unit
    known = best >= _MIN_OVERLAP and _ACROSS[0] <= across <= _ACROSS[1]
    size = min(SIZES, key=lambda name: abs(np.log(across / SIZES[name])))
    y, x = (y + corner[0]) / strides[0], (x + corner[1]) / strides[1]
    return FoundObject(colour, shape if known else None, size if known else None, y, x, best)


def _answer(question: Question, reading: SceneReading) -> bool:
    match question:
        case AskCount(number, what):
            return sum(map(what.matches, reading.objects)) == number
        case AskPlace(what, row, col):
            return any(what.matches(thing) and thing.cell == (row, col) for thing in reading.objects)
        case AskRelation(what, relation, other):
            pairs = permutations(reading.objects, 2)
            return any(what.matches(a) and other.matches(b) and _stands(a, relation, b) for a, b in pairs)
        case AskBackground(background):
            return reading.background == background


def _stands(one: FoundObject, relation: str, other: FoundObject) -> bool:
    right, down = one.x - other.x, one.y - other.y
    return {"left of": -right, "right of": right, "above": -down, "below": down}[relation] >= _APART


def _by_colour(question: Question) -> Question:
    """The same question with shapes and sizes left out."""
    match question:
        case AskCount(_, what) | AskPlace(what, _, _):
            return replace(question, what=Pattern(what.colour))
        case AskRelation(what, _, other):
            return replace(question, what=Pattern(what.colour), other=Pattern(other.colour))
        case AskBackground():
            return question
