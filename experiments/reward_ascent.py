"""Does climbing a learned reward change the picture? Where a criterion fails, its log-odds are climbed, and exact judges look.

Axes: n pictures, h and w pixels, y and x latent positions.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.miniature.rubrics import held_out_judge, scene_judge, scene_rubric
from experiments.miniature.world import Miniature
from experiments.pictures import save_grid
from experiments.quickstart_score import wilson_interval
from experiments.reward_scenes import Sample
from lensmini.data import BACKGROUNDS, render_scene
from lensmini.data.scene_captions import place_name
from lensmini.rewards import Criterion, Rubric
from lensmini.rewards.judges import judge_pictures
from lensmini.rewards.model import FrozenFeatures, RubricRewardModel

__all__ = [
    "AscentConfig",
    "Case",
    "choose_cases",
    "climb",
    "compare_ascents",
    "measure_ascents",
    "pixel_gradient_error",
    "pool_ascents",
    "smoothed",
    "toward_the_right_picture",
]

ARMS = ("asked", "another", "random")
"""What is climbed: the failing criterion, another one of the same rubric, or a direction drawn at random."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AscentConfig:
    """How far is climbed, and from how many pictures."""

    num: int = 90
    """Pictures, each with one criterion that fails, categories in turn."""
    steps: int = 20
    """Steps, all of one length."""
    enough: float = 3.0
    """Log-odds at which a climb ends, so that a picture is not changed beyond what was asked; random ways never end."""
    latent_step: float = 0.05
    """Root mean square length of a step in the latents, whose own is 1."""
    pixel_step: float = 0.015
    """Root mean square length of a step in pixels, which are 0..1."""
    smooth: float = 2.5
    """Standard deviation in pixels of the blur of every direction, random ones too; 0 for none."""
    spaces: tuple[str, ...] = ("latents", "pixels")
    """Where."""


class Case(NamedTuple):
    """A picture, a criterion of its rubric that fails, and another one."""

    sample: Sample
    rubric: Rubric
    asked: Criterion
    another: Criterion
    before: list[float]
    """Verdicts of the rubric's criteria at the start."""


def choose_cases(samples: Sequence[Sample], num: int, seed: int) -> list[Case]:
    """Pictures of the first one's size on which a criterion fails, as many as there are up to ``num``.

    Kinds of criteria (colour, shape, free, number, background, whole) take turns, so that the common ones do not decide.
    """
    samples = [one for one in samples if one.image.shape == samples[0].image.shape]
    stream = random.Random(f"ascent {seed}")
    rubrics = [scene_rubric(one.prompt) for one in samples]
    verdicts = judge_pictures(scene_judge(), [one.image for one in samples], rubrics)
    piles: dict[str, list[Case]] = {}
    for sample, rubric, row in zip(samples, rubrics, verdicts, strict=True):
        scores = [float(verdict.score or 0) for verdict in row]
        failing = [index for index, score in enumerate(scores) if score == 0]
        if failing:
            index = stream.choice(failing)
            asked = rubric.all_criteria[index]
            another = stream.choice([one for one in rubric.all_criteria if one is not asked])
            piles.setdefault(asked.id.split("_")[0], []).append(Case(sample, rubric, asked, another, scores))
    for pile in piles.values():
        stream.shuffle(pile)
    chosen: list[Case] = []
    while len(chosen) < num and any(piles.values()):
        for kind in sorted(piles):
            if piles[kind] and len(chosen) < num:
                chosen.append(piles[kind].pop())
    return chosen


def climb(
    start: Tensor,
    paint: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor] | None,
    config: AscentConfig,
    length: float,
    blur: float,
    seed: int,
) -> Tensor:
    """Walk uphill, each picture by steps of one length: ``x + length B g / rms(B g)``.

    B blurs, which as a symmetric positive map keeps the walk uphill; without it most of the way goes into fine patterns that
    no judge sees.

    Args:
        start: ``[n, ...]`` latents or pixels.
        paint: from there to pictures ``[n, 3, h, w]`` in 0..1.
        value: of pictures, ``[n]``; none walks along one random direction.
        config: how many steps.
        length: root mean square of a step.
        blur: standard deviation of B in positions of ``start``.
        seed: of the random direction.

    Returns:
        The pictures at the end.
    """
    drawn = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    point = start
    for _ in range(config.steps):
        slope, open_ = drawn, torch.tensor(True)
        if value is not None:
            point = point.detach().requires_grad_(True)
            height = value(paint(point))
            (slope,) = torch.autograd.grad(height.sum(), point)
            open_ = (height.detach() < config.enough).reshape(-1, *[1] * (point.ndim - 1))
        slope = smoothed(slope, blur)
        scale = slope.square().mean(tuple(range(1, slope.ndim)), keepdim=True).sqrt().clamp_min(1e-20)
        point = point.detach() + length * open_ * slope / scale
    return paint(point.detach()).detach()


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of ``[n, c, h, w]``, zero outside; the same for ``sigma = 0``.

    Example:
        >>> smoothed(torch.ones(1, 1, 1, 1), 0.0).item()
        1.0
    """
    if not sigma:
        return maps
    sides = []
    for size in maps.shape[2:]:
        apart = torch.arange(size, dtype=maps.dtype)[:, None] - torch.arange(size, dtype=maps.dtype)
        sides.append(torch.exp(-(apart**2) / (2 * sigma**2)))
    return sides[0] @ maps @ sides[1]


def measure_ascents(
    model: RubricRewardModel,
    world: Miniature,
    samples: Sequence[Sample],
    config: AscentConfig,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Climb from every case in every way, and have both exact judges look.

    Args:
        model: whose log-odds are climbed.
        world: its autoencoder's decoder turns latents into pictures.
        samples: where cases are taken from.
        config: how many and how far.
        seed: of the choice and the random directions.
        out: gets ``ascents.png``.

    Returns:
        By space and arm: ``toward``, the share of pictures that moved toward the prompt's own rendering where the criterion
        looks, ``toward_low`` and ``toward_high`` (Wilson, 95 %) and the mean ``cosine``; ``flipped``, the share of failing
        criteria that hold afterwards, with ``low`` and ``high``; ``flipped_held_out`` by the judge that nothing was trained
        on, of those that fail there too; ``kept``, the share of other criteria that held and still do; ``believed``, the
        model's own mean score afterwards.
    """
    cases = choose_cases(samples, config.num, seed)
    found: dict[str, Any] = {}
    shown: dict[str, Tensor] = {"start": torch.stack([case.sample.image for case in cases]).float() / 255}
    for space in config.spaces:
        ends = _walk(model, world, cases, config, space, seed)
        found[space] = {arm: _look(model, cases, end, ends["start"]) for arm, end in ends.items()}
        shown |= {f"{space}: {arm}": end for arm, end in ends.items() if arm != "start"}
    _draw(cases, shown, out / "ascents.png")
    return found


def _walk(
    model: RubricRewardModel, world: Miniature, cases: Sequence[Case], config: AscentConfig, space: str, seed: int
) -> dict[str, Tensor]:
    """Pictures ``[n, 3, h, w]`` of all cases before the walk and after that of each arm."""
    images = torch.stack([case.sample.image for case in cases]).float() / 255
    point, paint, length, blur = images, lambda point: point.clamp(0, 1), config.pixel_step, config.smooth
    if space == "latents":
        with torch.no_grad():
            point = world.autoencoder.encode(2 * images - 1)
        paint = lambda point: (world.autoencoder.decode(point) + 1) / 2  # noqa: E731
        length, blur = config.latent_step, config.smooth / world.autoencoder.downsample
    # What leaves 0..1 is cut before anybody looks: the model is to see what the judges see.
    with torch.no_grad():
        ends = {"start": paint(point)}
    for arm in ARMS:
        value = None if arm == "random" else _log_odds(model, cases, arm)
        ends[arm] = climb(point, paint, value, config, length, blur, seed)
    return ends


def compare_ascents(
    model: RubricRewardModel,
    world: Miniature,
    samples: Sequence[Sequence[Sample]],
    seeds: Sequence[int],
    config: AscentConfig,
    *,
    space: str = "latents",
) -> dict[str, Any]:
    """Does climbing the asked criterion go nearer to what was asked than the controls do, case by case?

    Args:
        model: whose log-odds are climbed.
        world: its autoencoder.
        samples: for each seed where its cases are taken from.
        seeds: of cases and random directions. Take ones on which nothing was chosen.
        config: how many and how far.
        space: "latents" or "pixels".

    Returns:
        For each control (``random``, ``another``): ``nearer``, the share of cases in which the asked climb has the larger
        cosine (:func:`toward_the_right_picture`), with ``low`` and ``high`` (Wilson, 95 %), and the mean ``difference`` of
        the cosines with a bootstrap interval over cases; and the mean cosine of each arm.
    """
    cosines: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed, chosen in zip(seeds, samples, strict=True):
        cases = choose_cases(chosen, config.num, seed)
        ends = _walk(model, world, cases, config, space, seed)
        for arm in ARMS:
            rows = zip(cases, ends["start"], ends[arm], strict=True)
            cosines[arm] += [toward_the_right_picture(*row) for row in rows]
    found: dict[str, Any] = {"num": len(cosines["asked"]), "cosine": {arm: _mean(row) for arm, row in cosines.items()}}
    generator = torch.Generator().manual_seed(0)
    for control in ("random", "another"):
        apart = torch.tensor(cosines["asked"]).double() - torch.tensor(cosines[control]).double()
        share = float((apart > 0).double().mean())
        low, high = wilson_interval(share, len(apart))
        draws = torch.randint(len(apart), (4000, len(apart)), generator=generator)
        ends_of = torch.quantile(apart[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        found[control] = {"nearer": share, "low": low, "high": high, "difference": float(apart.mean())}
        found[control] |= {"difference_low": ends_of[0], "difference_high": ends_of[1]}
    return found


def pool_ascents(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All seeds' cases together: shares with their 95 % intervals (Wilson), by space and arm.

    Args:
        found: for each seed what :func:`measure_ascents` returned.

    Returns:
        ``toward``, ``flipped`` and ``flipped_held_out``, each as share, low, high and number of cases.
    """
    pooled: dict[str, Any] = {}
    for space, arms in found[0].items():
        for arm in arms:
            cells = [one[space][arm] for one in found]
            pooled.setdefault(space, {})[arm] = {}
            for name, count in (("toward", "num"), ("flipped", "num"), ("flipped_held_out", "num_held_out")):
                num = sum(cell[count] for cell in cells)
                share = sum((cell[name] or 0.0) * cell[count] for cell in cells) / max(1, num)
                low, high = wilson_interval(share, max(1, num))
                pooled[space][arm][name] = {"share": share, "low": low, "high": high, "num": num}
    return pooled


def _log_odds(model: RubricRewardModel, cases: Sequence[Case], arm: str) -> Callable[[Tensor], Tensor]:
    criteria = [(getattr(case, arm),) for case in cases]
    prompts = [case.rubric.prompt for case in cases]
    return lambda images: model.predict(model.read_images(images), criteria, prompts).logits[:, 0]


def toward_the_right_picture(case: Case, start: Tensor, end: Tensor) -> float:
    """Cosine between the way that was gone and the way to the prompt's own rendering, where the criterion looks.

    A criterion about a place looks at its cell, that about the background at the rendering's background, others everywhere.

    Args:
        case: the criterion and the prompt.
        start: ``[3, h, w]`` in 0..1.
        end: ``[3, h, w]``.

    Returns:
        From -1 to 1; about 0 for a random way, on either side equally often.
    """
    height, width = start.shape[1:]
    scene = case.sample.prompt.scene
    right = render_scene(scene, height, width, dtype=torch.float32)
    kind, _, place = case.asked.id.partition("_")
    window = torch.ones(height, width, dtype=torch.bool)
    if kind in ("colour", "shape", "free"):
        side = range(scene.grid)
        cells = {place_name((row, col), scene.grid).replace(" ", "_"): (row, col) for row, col in product(side, side)}
        row, col = cells[place]
        down, across = height // scene.grid, width // scene.grid
        window[:] = False
        window[row * down : (row + 1) * down, col * across : (col + 1) * across] = True
    elif kind == "background":
        ground = torch.tensor(BACKGROUNDS[scene.background])[:, None, None] / 255
        window = ((right - ground).abs() < 0.01).all(0)
    one, other = (end - start)[:, window].flatten(), (right - start)[:, window].flatten()
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def _look(model: RubricRewardModel, cases: Sequence[Case], images: Tensor, starts: Tensor) -> dict[str, Any]:
    pictures = list((images.detach().clamp(0, 1) * 255).round().to(torch.uint8))
    rubrics = [case.rubric for case in cases]
    places = [case.rubric.all_criteria.index(case.asked) for case in cases]
    flips, kept, others = [], [], []
    seen = judge_pictures(scene_judge(), pictures, rubrics)
    second = judge_pictures(held_out_judge(), pictures, rubrics)
    first = judge_pictures(held_out_judge(), [case.sample.image for case in cases], rubrics)
    for case, place, row, other, origin in zip(cases, places, seen, second, first, strict=True):
        flips.append(float(row[place].score or 0))
        if origin[place].score == 0:
            others.append(float(other[place].score or 0))
        kept += [float(v.score or 0) for i, v in enumerate(row) if i != place and case.before[i] == 1]
    with torch.no_grad():
        believed = torch.sigmoid(_log_odds(model, cases, "asked")(torch.stack(pictures).float() / 255))
    low, high = wilson_interval(_mean(flips) or 0.0, len(flips))
    cosines = [toward_the_right_picture(*row) for row in zip(cases, starts, images, strict=True)]
    toward = [float(cosine > 0) for cosine in cosines]
    least, most = wilson_interval(_mean(toward) or 0.0, len(toward))
    kinds = sorted({case.asked.id.split("_")[0] for case in cases})

    def by_kind(values: Sequence[float]) -> dict[str, float | None]:
        return {
            kind: _mean(
                [value for value, case in zip(values, cases, strict=True) if case.asked.id.split("_")[0] == kind]
            )
            for kind in kinds
        }

    return {
        "flipped": _mean(flips),
        "low": low,
        "high": high,
        "num": len(flips),
        "flipped_held_out": _mean(others),
        "num_held_out": len(others),
        "kept": _mean(kept),
        "believed": believed.mean().item(),
        "toward": _mean(toward),
        "toward_low": least,
        "toward_high": most,
        "cosine": _mean(cosines),
        "flipped_by_kind": by_kind(flips),
        "toward_by_kind": by_kind(toward),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _draw(cases: Sequence[Case], shown: dict[str, Tensor], path: Path, *, num: int = 12) -> None:
    """A row for each case: the picture, and where each walk from it ended."""
    pictures, captions = [], []
    for index, case in enumerate(cases[:num]):
        for name, images in shown.items():
            pictures.append((images[index].clamp(0, 1) * 255).round().to(torch.uint8))
            told = {"start": case.asked.text}.get(name, f"{name}: {case.another.text}" if "another" in name else name)
            captions.append(told)
    save_grid(pictures, captions, path, columns=len(shown))


def pixel_gradient_error(
    model: RubricRewardModel, world: Miniature, samples: Sequence[Sample], *, directions: int = 8, step: float = 1e-5
) -> float:
    """Largest relative difference between the reward's slope and central differences in the pixels, in float64.

    Args:
        model: trained.
        world: its autoencoder.
        samples: pictures and prompts.
        directions: random directions in the pixels of all pictures.
        step: of the differences.

    Returns:
        ``max |a - d| / max |d|`` over directions.
    """
    encoder = copy.deepcopy(world.autoencoder).double()
    features = FrozenFeatures(
        image=lambda images: encoder.encode(2 * images - 1), text=model.features.text, identity=model.features.identity
    )
    wide = RubricRewardModel(features, model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.requires_grad_(False)
    rubrics = [scene_rubric(one.prompt) for one in samples]
    images = [(one.image.double() / 255).requires_grad_(True) for one in samples]
    slopes = torch.autograd.grad(wide.reward(images, rubrics).sum(), images)
    generator, pairs = torch.Generator().manual_seed(0), []
    for _ in range(directions):
        moves = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in images]
        ends = [
            wide.reward([one.detach() + sign * step * move for one, move in zip(images, moves, strict=True)], rubrics)
            for sign in (1, -1)
        ]
        difference = ((ends[0] - ends[1]).sum() / (2 * step)).item()
        along = sum((slope * move).sum().item() for slope, move in zip(slopes, moves, strict=True))
        pairs.append((along, difference))
    largest = max(abs(difference) for _, difference in pairs)
    return max(abs(along - difference) for along, difference in pairs) / largest
