"""The miniature world: scenes of coloured shapes on a grid, drawn from a seed and rendered at any size.

Axes: b scenes, h height, w width, in pixels. Rows count from the top, columns from the left.

The cell grid stretches with the canvas, objects keep their shape: an object's size is a share of the shorter side of
a cell. Neighbours always stand at least two pixels apart, so that they can be told apart and counted exactly.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "MINIATURE_CANVASES",
    "SHAPES",
    "SIZES",
    "WITHHELD_PAIRS",
    "Scene",
    "SceneObject",
    "render_scene",
    "render_scenes",
    "sample_scene",
]

SHAPES = ("circle", "square", "triangle", "cross")
"""The four shapes."""

COLOURS = {
    "red": (225, 35, 35),
    "green": (35, 170, 60),
    "blue": (45, 75, 225),
    "yellow": (245, 215, 40),
    "pink": (245, 105, 205),
    "cyan": (45, 215, 225),
}
"""The six object colours as RGB, 0..255."""

BACKGROUNDS = {"black": (15, 15, 15), "gray": (128, 128, 128), "white": (242, 242, 242)}
"""The three backgrounds as RGB, 0..255."""

SIZES = {"small": 0.64, "large": 0.80}
"""Width of an object as a share of the shorter side of a cell: 10.2 and 12.8 pixels at 32 x 32 with a 2 x 2 grid."""

WITHHELD_PAIRS = frozenset({("red", "cross"), ("cyan", "square"), ("yellow", "triangle")})
"""Colour-shape pairs that training never shows, each half of which it shows in other pairs: for generalisation."""

MINIATURE_CANVASES = ((32, 32), (24, 40), (40, 24), (24, 48), (48, 24))
"""Default training canvases (height, width) of the miniature: about 1000 pixels, ratios from 1:2 to 2:1."""

Pairs = Literal["seen", "withheld", "all"]

_MARGIN = 2.0
"""Pixels that stay free between neighbours, half of it at the border."""
_SWAY = 0.12
"""Largest displacement of an object from the middle of its cell, as a share of the cell's side."""
_ARM = 0.36
"""Width of a cross's arm as a share of its span."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: what it is and where it stands.

    Example:
        >>> SceneObject("circle", "red", "large", row=0, col=1).pair
        ('red', 'circle')
    """

    shape: str
    """One of :data:`SHAPES`."""
    colour: str
    """A key of :data:`COLOURS`."""
    size: str
    """A key of :data:`SIZES`."""
    row: int
    """Cell row, 0 at the top."""
    col: int
    """Cell column, 0 at the left."""
    jitter: tuple[float, float] = (0.0, 0.0)
    """Displacement down and to the right, -1..1 of the room that the cell leaves."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, COLOURS),
            ("size", self.size, SIZES),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
        if not all(-1 <= value <= 1 for value in self.jitter):
            raise ValueError(f"jitter: expected values in [-1, 1], got {self.jitter}")

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column."""
        return self.row, self.col


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and objects in different cells of a ``grid`` x ``grid`` grid.

    Example:
        >>> Scene("white", (SceneObject("circle", "red", "large", 0, 1),)).grid
        2
    """

    background: str
    """A key of :data:`BACKGROUNDS`."""
    objects: tuple[SceneObject, ...]
    """One to ``grid ** 2`` objects."""
    grid: int = 2
    """Rows and columns of cells, 2 or 3."""

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background: expected one of {list(BACKGROUNDS)}, got {self.background!r}")
        if self.grid not in (2, 3):
            raise ValueError(f"grid: expected 2 or 3, got {self.grid}")
        cells = [thing.cell for thing in self.objects]
        if not cells or len(set(cells)) < len(cells) or not all(0 <= i < self.grid for cell in cells for i in cell):
            raise ValueError(
                f"objects: expected at least one, in different cells of a grid of {self.grid}, got {cells}"
            )


Item = TypeVar("Item")


def as_random(generator: torch.Generator | int, purpose: str) -> random.Random:
    """Python's number stream, seeded by an integer or by the next draw of a torch generator.

    ``purpose`` keeps streams apart: a scene and its caption may be given the same seed.
    """
    seed = generator if isinstance(generator, int) else int(torch.randint(2**62, (), generator=generator))
    return random.Random(f"{purpose} {seed}")


def pick(stream: random.Random, items: Sequence[Item]) -> Item:
    """One of ``items``; uses ``random()`` only, the one method whose values Python promises to keep."""
    return items[int(stream.random() * len(items))]


def shuffled(stream: random.Random, items: Sequence[Item]) -> list[Item]:
    """A random order of ``items``."""
    return [items[index] for _, index in sorted((stream.random(), index) for index in range(len(items)))]


@lru_cache
def pair_pool(pairs: Pairs) -> tuple[tuple[str, str], ...]:
    """The colour-shape pairs that training sees, the withheld ones, or all, in one fixed order."""
    every = tuple(product(COLOURS, SHAPES))
    if pairs == "all":
        return every
    if pairs not in ("seen", "withheld"):
        raise ValueError(f'pairs: expected "seen", "withheld" or "all", got {pairs!r}')
    return tuple(pair for pair in every if (pair in WITHHELD_PAIRS) == (pairs == "withheld"))


def sample_scene(
    *,
    generator: torch.Generator | int,
    grid: int = 2,
    num_objects: tuple[int, int] = (1, 4),
    pairs: Pairs = "seen",
    group_probability: float = 0.3,
) -> Scene:
    """Draw a scene: everything uniform, cells without replacement.

    The objects of a scene have different colour-shape pairs, except in a group, whose objects are equal up to their
    place: groups are what teaches counting.

    Args:
        generator: a seed, or a CPU generator that is advanced by one draw.
        grid: rows and columns of cells, 2 or 3.
        num_objects: fewest and most objects.
        pairs: "seen" keeps :data:`WITHHELD_PAIRS` out, "all" does not; in "withheld" scenes the first object (in
            a group, every one) is of a withheld pair and any other is not.
        group_probability: share of groups among the scenes of two or more objects.

    Returns:
        The scene.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> scene = sample_scene(generator=0)
        >>> scene == sample_scene(generator=0), WITHHELD_PAIRS.isdisjoint(thing.pair for thing in scene.objects)
        (True, True)
    """
    fewest, most = num_objects
    if grid not in (2, 3) or not 1 <= fewest <= most <= grid**2 or not 0 <= group_probability <= 1:
        raise ValueError(
            "grid, num_objects, group_probability: expected 2 or 3, 1 <= fewest <= most <= grid^2, and a probability, "
            f"got {grid}, {num_objects}, {group_probability}"
        )
    stream = as_random(generator, "scene")
    number = fewest + int(stream.random() * (most - fewest + 1))
    first = pick(stream, pair_pool(pairs))
    if number > 1 and stream.random() < group_probability:
        return arrange_scene(stream, [first] * number, grid=grid)
    others = [pair for pair in pair_pool("all" if pairs == "all" else "seen") if pair != first]
    return arrange_scene(stream, [first, *shuffled(stream, others)[: number - 1]], grid=grid)


def arrange_scene(stream: random.Random, pairs: Sequence[tuple[str, str]], *, grid: int = 2) -> Scene:
    """Put objects of the given colour-shape pairs into random cells; size (one per pair) and background are random."""
    background = pick(stream, list(BACKGROUNDS))
    sizes = {pair: pick(stream, list(SIZES)) for pair in dict.fromkeys(pairs)}
    cells = shuffled(stream, list(product(range(grid), range(grid))))
    things = []
    for (colour, shape), (row, col) in zip(pairs, cells, strict=False):
        jitter = (2 * stream.random() - 1, 2 * stream.random() - 1)
        things.append(SceneObject(shape, colour, sizes[colour, shape], row, col, jitter))
    return Scene(background, tuple(things), grid)


def cell_unit(height: int, width: int, grid: int) -> float:
    """Shorter side of a cell in pixels, the unit of :data:`SIZES`."""
    unit = min(height, width) / grid
    if unit < 8:
        raise ValueError(f"height, width: expected cells of at least 8 pixels a side, got {height} x {width} / {grid}")
    return unit


def coverage(shape: str, down: NDArray[np.float32], right: NDArray[np.float32], across: float) -> NDArray[np.float32]:
    """Share of each pixel that an object covers, from its signed distance: ``clip(1/2 - distance, 0, 1)``.

    Args:
        shape: one of :data:`SHAPES`.
        down: pixel centres relative to the middle of the object's bounding box, broadcast with ``right``.
        right: the same for the other axis.
        across: width and height of the bounding box, pixels.

    Returns:
        Values in [0, 1] of the broadcast shape.
    """
    half = across / 2
    aside = np.abs(right)
    if shape == "circle":
        distance = np.hypot(down, right) - half
    elif shape == "square":
        distance = np.maximum(np.abs(down), aside) - half
    elif shape == "triangle":  # apex above the middle of the base; 5 ** 0.5 normalises the side's normal (2, 1)
        distance = np.maximum((2 * aside - down - half) / 5**0.5, down - half)
    else:
        above, arm = np.abs(down), _ARM * half
        distance = np.minimum(np.maximum(above - half, aside - arm), np.maximum(above - arm, aside - half))
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32, copy=False)


def area_share(shape: str) -> float:
    """Area of an object as a share of its bounding box."""
    return {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5, "cross": _ARM * (2 - _ARM)}[shape]


def render_scene(scene: Scene, height: int, width: int, *, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Paint a scene, anti-aliased.

    Args:
        scene: what to paint.
        height: pixels of the canvas; a cell must have at least 8 a side.
        width: the same.
        dtype: uint8 for values 0..255, or a floating type for 0..1.

    Returns:
        ``[3, height, width]`` RGB on the CPU.

    Raises:
        ValueError: if the canvas is too small.

    Example:
        >>> image = render_scene(Scene("white", (SceneObject("circle", "red", "large", 0, 1),)), 32, 32)
        >>> image[:, 8, 24].tolist(), image[:, 24, 8].tolist()
        ([225, 35, 35], [242, 242, 242])
    """
    image = torch.from_numpy(_paint(scene, height, width))
    return image if dtype == torch.uint8 else (image.float() / 255).to(dtype)


def render_scenes(scenes: Iterable[Scene], height: int, width: int, *, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Paint b scenes on equal canvases: ``[b, 3, height, width]``, each as :func:`render_scene` does.

    Example:
        >>> render_scenes([sample_scene(generator=seed) for seed in range(2)], 24, 40).shape
        torch.Size([2, 3, 24, 40])
    """
    images = torch.from_numpy(np.stack([_paint(scene, height, width) for scene in scenes]))
    return images if dtype == torch.uint8 else (images.float() / 255).to(dtype)


def _paint(scene: Scene, height: int, width: int) -> NDArray[np.uint8]:
    unit = cell_unit(height, width, scene.grid)
    canvas = np.empty((3, height, width), np.float32)
    canvas[:] = _rgb(scene.background)
    for thing in scene.objects:
        across = SIZES[thing.size] * unit
        down, top = _pixels(thing.row, thing.jitter[0], height, scene.grid, across)
        right, left = _pixels(thing.col, thing.jitter[1], width, scene.grid, across)
        window = canvas[:, top : top + len(down), left : left + len(right)]
        window += coverage(thing.shape, down[:, None], right, across) * (_rgb(thing.colour) - window)
    return np.rint(canvas).astype(np.uint8)


def _pixels(cell: int, jitter: float, side: int, grid: int, across: float) -> tuple[NDArray[np.float32], int]:
    """Pixel centres near an object relative to its middle, along one axis, and the first of those pixels."""
    stride = side / grid
    room = max(0.0, min(_SWAY * stride, (stride - across - _MARGIN) / 2))
    middle = (cell + 0.5) * stride + jitter * room
    first = max(0, math.floor(middle - across / 2 - 0.5))
    last = min(side, math.ceil(middle + across / 2 + 0.5))
    return np.arange(first + 0.5, last, dtype=np.float32) - np.float32(middle), first


@lru_cache
def _rgb(name: str) -> NDArray[np.float32]:
    return np.array({**COLOURS, **BACKGROUNDS}[name], np.float32)[:, None, None]
