"""Pictures that a learned reward of the miniature world is taught with: rendered, spoilt, and painted, with verdicts.

Axes: n pictures, h and w pixels.

A verdict teaches nothing where it is always the same. So renderings are spoilt in every way that a rubric asks about, and
faded half-way between right and wrong; and a base model paints its own mistakes.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.miniature.rubrics import scene_judge, scene_rubric
from lensmini.data import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    WITHHELD_PAIRS,
    Scene,
    SceneObject,
    ScenePrompt,
    build_scene_prompts,
    render_scene,
)
from lensmini.rewards import Rubric
from lensmini.rewards.judges import judge_pictures
from lensmini.rewards.model import Judged

__all__ = ["CHANGES", "change_scene", "judge_scenes", "spoil", "spoilt_pictures", "suite"]

Pairs = Literal["seen", "withheld"]
Canvas = tuple[int, int]


class Sample(NamedTuple):
    """A prompt and a picture that was meant for it."""

    prompt: ScenePrompt
    image: Tensor
    """``[3, h, w]`` uint8."""
    kind: str
    """How it was made."""


def suite(num: int, seed: int, pairs: Pairs = "seen") -> list[ScenePrompt]:
    """The first ``num`` dense prompts of a seed, kinds interleaved."""
    return build_scene_prompts(-(-num // len(KINDS)), seed, wording="synonyms", pairs=pairs)[:num]


def judge_scenes(samples: Sequence[Sample], *, contrast: bool = False) -> Judged:
    """Verdicts of the verifier about every picture under its own prompt's rubric.

    Args:
        samples: the pictures.
        contrast: ask about the next picture's prompt too. Of its own prompt most of a picture is right, so that "yes" is a good
            answer whatever the picture; of another's most is wrong. A picture that has been read costs nothing more.

    Returns:
        Pictures, rubrics and verdicts.
    """
    images, rubrics = [one.image for one in samples], [scene_rubric(one.prompt) for one in samples]
    if contrast:
        rubrics = [_join(one, other) for one, other in zip(rubrics, [*rubrics[1:], rubrics[0]], strict=True)]
    return Judged(images, rubrics, judge_pictures(scene_judge(), images, rubrics))


def _join(one: Rubric, other: Rubric) -> Rubric:
    """A rubric with the criteria of two, each sentence once."""
    known = {criterion.text for criterion in one.all_criteria}
    more = [replace(each, id=f"other_{each.id}") for each in other.all_criteria if each.text not in known]
    return replace(one, criteria=(*one.criteria, *more))


def spoilt_pictures(
    prompts: Sequence[ScenePrompt], canvases: Sequence[Canvas], seed: int, pairs: Pairs = "seen", *, spoils: bool = True
) -> list[Sample]:
    """One rendering of each prompt's scene, spoilt in up to three ways; the same seed gives the same pictures.

    Args:
        prompts: what to render.
        canvases: heights and widths, in turn.
        seed: of all choices.
        pairs: whether changes may make objects of the withheld pairs.
        spoils: fade and spoil some of them; otherwise every picture is a clean scene.

    Returns:
        The pictures in order.
    """
    samples = []
    for index, prompt in enumerate(prompts):
        stream = random.Random(f"spoil {seed} {index}")
        height, width = canvases[index % len(canvases)]
        scene, names = prompt.scene, []
        for _ in range(stream.choice((0, 1, 1, 2, 2, 3))):
            name = stream.choice(CHANGES)
            changed = change_scene(scene, name, stream, pairs)
            if changed != scene:
                scene, names = changed, [*names, name]
        image = render_scene(scene, height, width, dtype=torch.float32)
        if spoils and names and stream.random() < 0.4:
            right = render_scene(prompt.scene, height, width, dtype=torch.float32)
            image, names = torch.lerp(image, right, stream.random()), [*names, "fade"]
        if spoils and stream.random() < 0.4:
            name = stream.choice(tuple(SPOILS))
            image, names = spoil(image, name, stream), [*names, name]
        samples.append(Sample(prompt, (image.clamp(0, 1) * 255).round().to(torch.uint8), "+".join(names) or "right"))
    return samples


CHANGES = ("colour", "shape", "move", "swap", "extra", "missing", "background", "both")
"""What may be other than asked for."""


def change_scene(scene: Scene, name: str, stream: random.Random, pairs: Pairs = "seen") -> Scene:
    """A scene that differs in one way, or the same scene where that is impossible.

    Args:
        scene: the scene.
        name: one of :data:`CHANGES`.
        stream: draws which object, and what of it.
        pairs: "seen" never makes an object of :data:`~lensmini.data.WITHHELD_PAIRS`.

    Returns:
        The other scene.
    """
    things = list(scene.objects)
    index = stream.randrange(len(things))
    one = things[index]
    free = sorted({*product(range(scene.grid), repeat=2)} - {thing.cell for thing in things})
    allowed = [pair for pair in product(COLOURS, SHAPES) if pairs == "withheld" or pair not in WITHHELD_PAIRS]
    if name == "background":
        return replace(
            scene, background=stream.choice([ground for ground in BACKGROUNDS if ground != scene.background])
        )
    if name == "missing":
        return replace(scene, objects=tuple(things[:index] + things[index + 1 :])) if len(things) > 1 else scene
    if name == "extra" and free:
        (colour, shape), (row, col) = stream.choice(allowed), stream.choice(free)
        jitter = (stream.uniform(-1, 1), stream.uniform(-1, 1))
        extra = SceneObject(shape, colour, stream.choice(list(SIZES)), row, col, jitter)
        return replace(scene, objects=(*things, extra))
    if name == "move" and free:
        row, col = stream.choice(free)
        things[index] = replace(one, row=row, col=col)
    elif name == "swap" and len(things) > 1:
        other = stream.choice([number for number in range(len(things)) if number != index])
        two = things[other]
        things[index] = replace(one, row=two.row, col=two.col)
        things[other] = replace(two, row=one.row, col=one.col)
    elif name in ("colour", "shape", "both"):
        choices = [
            (colour, shape)
            for colour, shape in allowed
            if (colour != one.colour) == (name in ("colour", "both"))
            and (shape != one.shape) == (name in ("shape", "both"))
        ]
        if choices:
            colour, shape = stream.choice(choices)
            things[index] = replace(one, colour=colour, shape=shape)
    return replace(scene, objects=tuple(things))


def spoil(image: Tensor, name: str, stream: random.Random) -> Tensor:
    """Spoil a picture ``[3, h, w]`` in 0..1 as no scene does: one of :data:`SPOILS`."""
    return SPOILS[name](image, stream)


def _noise(image: Tensor, stream: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(stream.randrange(2**31))
    return image + stream.uniform(0.02, 0.3) * torch.randn(image.shape, generator=generator)


def _blur(image: Tensor, stream: random.Random) -> Tensor:
    sigma = stream.uniform(0.5, 2.5)
    offsets = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image[None], (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]


def _patch(image: Tensor, stream: random.Random) -> Tensor:
    """A rectangle of any palette colour, which may cover part of an object or stand alone."""
    height, width = image.shape[1:]
    tall, wide = stream.randint(2, height // 2), stream.randint(2, width // 2)
    top, left = stream.randint(0, height - tall), stream.randint(0, width - wide)
    colour = torch.tensor(stream.choice([*COLOURS.values(), *BACKGROUNDS.values()])) / 255
    spoilt = image.clone()
    spoilt[:, top : top + tall, left : left + wide] = colour[:, None, None]
    return spoilt


def _shift(image: Tensor, stream: random.Random) -> Tensor:
    """The picture moved by some pixels, so that objects leave their cells or the canvas."""
    down, right = (stream.randint(-side // 4, side // 4) for side in image.shape[1:])
    padded = F.pad(image[None], (abs(right),) * 2 + (abs(down),) * 2, mode="replicate")[0]
    top, left = abs(down) - down, abs(right) - right
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


SPOILS: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "patch": _patch,
    "shift": _shift,
}
