"""Which size an image is trained at, as other projects document it: one call per image.

Small functions of ours, written for the benchmarks from what the projects publish (guides, references, papers) and none of
their code; they say what such a rule does and costs, not how fast a project's own program is. Sizes are (width, height) in
pixels; an aspect is width over height unless a rule says otherwise.
"""

import math
from collections.abc import Callable

import numpy as np

__all__ = [
    "kohya_rule",
    "nemo_rule",
    "nemo_sizes",
    "novelai_rule",
    "novelai_sizes",
    "pixart_rule",
    "sdxl_sizes",
    "stepped_sizes",
]

Size = tuple[int, int]
Rule = Callable[[int, int], Size]

# Short side to long sides: the tall half of the 40 sizes in the appendix of SDXL (arXiv 2307.01952), which PixArt took over.
SDXL_TALL = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
}
NEMO_RATIOS = (
    (1, 2),
    (9, 16),
    (2, 3),
    (3, 4),
    (4, 5),
    (1, 1),
    (5, 4),
    (4, 3),
    (3, 2),
    (16, 10),
    (5, 3),
    (16, 9),
    (2, 1),
    (21, 9),
)


def stepped_sizes(area: int, least: int, most: int, step: int) -> list[Size]:
    """Every width in steps with the largest height in steps under an area, and the same turned around; no size twice."""
    sides = range(least, most + 1, step)
    pairs = [(side, min(most, area // side // step * step)) for side in sides]
    wide = [(width, height) for width, height in pairs if height >= least]
    return sorted({*wide, *((height, width) for width, height in wide)}, key=lambda size: (size[0] / size[1], size))


def kohya_rule(area: int = 1024**2, least: int = 256, most: int = 2048, step: int = 64) -> Rule:
    """The training guide of sd-scripts: sizes in steps (``bucket_reso_steps``) within the area of the resolution and between
    ``min_bucket_reso`` and ``max_bucket_reso``; the nearest aspect, of equal ones the larger area.
    """
    sizes = stepped_sizes(area, least, most, step)

    def rule(width: int, height: int) -> Size:
        ratio = width / height
        return min(sizes, key=lambda size: (abs(size[0] / size[1] - ratio), area - size[0] * size[1]))

    return rule


def novelai_sizes() -> list[Size]:
    """The README of novelai-aspect-ratio-bucketing: steps of 64 from 256 to 1024 within 512 x 768, and 512 x 512."""
    return sorted({*stepped_sizes(512 * 768, 256, 1024, 64), (512, 512)}, key=lambda size: (size[0] / size[1], size))


def novelai_rule() -> Rule:
    """The same README: ``argmin(abs(bucket_aspects - image_aspect))`` with numpy, image by image.

    The README's own run assigns 5,310,617 images in 15.47 s: 0.34 million a second on its machine.
    """
    sizes = novelai_sizes()
    aspects = np.array([width / height for width, height in sizes])

    def rule(width: int, height: int) -> Size:
        return sizes[int(np.abs(aspects - width / height).argmin())]

    return rule


def sdxl_sizes() -> list[Size]:
    """The 40 (width, height) of the SDXL paper; 704 x 1344 has no counterpart there."""
    narrow = [(long, short) for short, longs in SDXL_TALL.items() for long in longs]
    return [*narrow, (1024, 1024), *((short, long) for long, short in narrow if (long, short) != (1344, 704))]


def pixart_rule() -> Rule:
    """PixArt (arXiv 2310.00426) and Sana: a dictionary from height over width, to two digits, and its nearest key."""
    table = {round(height / width, 2): (width, height) for width, height in sdxl_sizes()}

    def rule(width: int, height: int) -> Size:
        ratio = height / width
        return table[min(table, key=lambda key: abs(key - ratio))]

    return rule


def nemo_sizes(budget: int = 1024**2, quantum: int = 64) -> list[Size]:
    """NeMo AutoModel's API reference (MultiTierBucketCalculator): 14 ratios w / h = r within a budget of pixels,
    h = sqrt(budget / r), sides rounded to multiples of 64; where rounding leaves the budget, the longer side is one step less.
    """
    sizes = []
    for across, down in NEMO_RATIOS:
        height = math.sqrt(budget * down / across)
        sides = [max(quantum, round(side / quantum) * quantum) for side in (height * across / down, height)]
        while sides[0] * sides[1] > budget:
            sides[sides[1] > sides[0]] -= quantum
        sizes.append((sides[0], sides[1]))
    return list(dict.fromkeys(sizes))


def nemo_rule() -> Rule:
    """The nearest aspect among NeMo's sizes."""
    sizes = [(width / height, (width, height)) for width, height in nemo_sizes()]

    def rule(width: int, height: int) -> Size:
        ratio = width / height
        return min(sizes, key=lambda entry: abs(entry[0] - ratio))[1]

    return rule
