"""Own scores by what the prompts and pictures are: category, folder, length of the text, size of the picture; diversity.

Every part is scored by the same function as the whole, so that the parts of a set add up to it. Axes: h and w pixels.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.evaluation.layouts import load_pictures, picture_files
from experiments.evaluation.prompt_files import Benchmark, BenchmarkPrompt
from experiments.reinforce_eval import diversity

__all__ = ["Breakdowns", "break_down", "mean_diversity", "missing_pictures"]

_BY: dict[Benchmark, tuple[str, ...]] = {
    "geneval": ("size",),
    "oneig": ("size",),
    "longtext": ("category", "length", "size"),
    "cvtg": ("folder", "size"),
}
Row = dict[str, float]
Breakdowns = dict[str, dict[str, Row]]
"""Rows by what is split by and by its values."""


def break_down(
    benchmark: Benchmark,
    lines: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Mapping[str, Any]],
    score: Callable[[Sequence[Mapping[str, Any]]], Row],
) -> Breakdowns:
    """Scores of the parts of a benchmark.

    Args:
        benchmark: which one.
        lines: one for each picture, with ``key`` and ``size`` ("HxW").
        facts: for each key what the prompt file says.
        score: of any lines, the row of numbers.

    Returns:
        By "size" and, where the prompt file says it, "category", "length", "folder": for each value its row and
        ``pictures``. Where all have one value there is nothing to
        compare, and only the size says so.

    Example:
        >>> lines = [{"key": "0", "size": "8x8", "right": 1.0}, {"key": "1", "size": "4x8", "right": 0.0}]
        >>> break_down("geneval", lines, {}, lambda some: {"right": sum(line["right"] for line in some) / len(some)})
        {'size': {'4x8': {'right': 0.0, 'pictures': 1}, '8x8': {'right': 1.0, 'pictures': 1}}}
    """
    found: Breakdowns = {}
    for name in _BY[benchmark]:
        parts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for line in lines:
            value = line["size"] if name == "size" else facts[line["key"]].get(name)
            if value is not None:
                parts[str(value)].append(line)
        if name == "size" or len(parts) > 1:
            found[name] = {value: {**score(some), "pictures": len(some)} for value, some in sorted(parts.items())}
    return found


def mean_diversity(
    benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], images: Path, number: int, model: str
) -> dict[str, float]:
    """How far apart the pictures of one prompt are, on average over prompts and by group.

    :func:`experiments.reinforce_eval.diversity`: root mean square distance of 8 x 8 thumbnails. It sees layout and colour,
    not style, and is not OneIG's (DreamSim): for comparing two runs of one benchmark, no more.

    Args:
        benchmark: which one.
        prompts: of it.
        images: folder of the layout.
        number: pictures of each prompt.
        model: folder in OneIG's layout.

    Returns:
        By group and "all"; prompts with fewer than two pictures are left out, and so are groups without any other.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt in prompts if number > 1 else ():
        pictures: list[Tensor] = [part for _, part in load_pictures(benchmark, prompt, images, number, model)]
        if len(pictures) > 1:
            groups[prompt.group].append(diversity(pictures))
    every = [value for values in groups.values() for value in values]
    means = {group: math.fsum(values) / len(values) for group, values in sorted(groups.items())}
    return {**means, "all": math.fsum(every) / len(every)} if every else {}


def missing_pictures(
    benchmark: Benchmark, prompts: Sequence[BenchmarkPrompt], images: Path, number: int, model: str
) -> int:
    """Files of the layout that are not there; of OneIG's grids each is one.

    Example:
        >>> missing_pictures("longtext", [BenchmarkPrompt("0007", "", "", {})], Path("nowhere"), 4, "lens")
        4
    """
    names = [name for prompt in prompts for name in picture_files(benchmark, prompt, number, model)]
    return sum(not (images / name).is_file() for name in names)
