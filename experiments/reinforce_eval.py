"""Scores of a policy on prompts that training never sees, without and with guidance, and signs of hacking beside them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.miniature.rubrics import held_out_judge, request_rubric, scene_judge, scene_rubric
from experiments.miniature.world import Miniature
from experiments.painting import paint
from experiments.reinforce_config import EvalConfig, ReinforceConfig
from experiments.reinforce_rollout import encode_prompt
from lensmini.data import KINDS, ScenePrompt, build_scene_prompts, score_images
from lensmini.data.scenes import BACKGROUNDS, COLOURS
from lensmini.nn import LensTransformer, to_uint8
from lensmini.parallel import Group
from lensmini.rewards import aggregate, to_matrix
from lensmini.rewards.judges import judge_pictures

__all__ = ["diversity", "evaluate", "foreground_share", "held_out_prompts", "paint_suite"]


def held_out_prompts(config: ReinforceConfig) -> list[ScenePrompt]:
    """The prompts of the score; none of them is trained on.

    Raises:
        ValueError: if one is.
    """
    each = -(-config.eval.num_prompts // len(KINDS))
    texts: dict[str, Any] = {"form": config.prompts.form, "wording": config.prompts.wording}
    prompts = build_scene_prompts(each, config.eval.seed, **texts)
    trained = build_scene_prompts(-(-config.prompts.num_prompts // len(KINDS)), config.prompts.seed, **texts)
    same = {prompt.text for prompt in prompts} & {prompt.text for prompt in trained}
    return [prompt for prompt in prompts if prompt.text not in same]


@torch.no_grad()
def paint_suite(
    model: LensTransformer,
    world: Miniature,
    texts: Sequence[Tensor],
    canvases: Sequence[tuple[int, int]],
    seeds: Sequence[int],
    config: EvalConfig,
    *,
    guided: bool,
    chunk: int = 48,
) -> list[Tensor]:
    """One picture for each text, ``[3, h, w]`` uint8, at a canvas and a seed of its own."""
    side, pictures = world.autoencoder.downsample, dict[int, Tensor]()
    order = sorted(range(len(texts)), key=lambda index: (canvases[index], len(texts[index])))
    for first in range(0, len(order), chunk):
        chosen = order[first : first + chunk]
        latents = paint(
            model,
            [texts[index] for index in chosen],
            [(canvases[index][0] // side, canvases[index][1] // side) for index in chosen],
            [seeds[index] for index in chosen],
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale if guided else 1.0,
            mu=config.mu,
        )
        for canvas, members in itertools.groupby(range(len(chosen)), key=lambda place: canvases[chosen[place]]):
            del canvas
            places = list(members)
            images = to_uint8(world.autoencoder.decode(torch.stack([latents[place] for place in places]))).cpu()
            pictures |= {chosen[place]: image for place, image in zip(places, images, strict=True)}
    return [pictures[index] for index in range(len(texts))]


def foreground_share(picture: Tensor) -> float:
    """Share of the pixels that are nearer to an object's colour than to any background's.

    Example:
        >>> foreground_share(torch.full((3, 8, 8), 240, dtype=torch.uint8))
        0.0
    """
    palette = torch.tensor([*BACKGROUNDS.values(), *COLOURS.values()], dtype=torch.float32)
    nearest = torch.cdist(picture.flatten(1).t().float(), palette).argmin(1)
    return (nearest >= len(BACKGROUNDS)).float().mean().item()


def diversity(pictures: Sequence[Tensor]) -> float:
    """Mean distance between two pictures of one prompt and size: root mean square of 8 x 8 thumbnails in [0, 1].

    Example:
        >>> diversity([torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 8, 8), 255, dtype=torch.uint8)])
        1.0
    """
    small = [torch.nn.functional.adaptive_avg_pool2d(picture.float() / 255, 8).flatten() for picture in pictures]
    pairs = [(a - b).square().mean().sqrt().item() for a, b in itertools.combinations(small, 2)]
    return math.fsum(pairs) / len(pairs)


@torch.no_grad()
def evaluate(
    model: LensTransformer, world: Miniature, config: ReinforceConfig, group: Group, *, num_guided: int | None = None
) -> dict[str, Any]:
    """Paint and judge the held-out prompts.

    Args:
        model: with the weights to be scored.
        world: encoders.
        config: of the run.
        group: processes that share the work.
        num_guided: how many prompts, from the first on, are painted with guidance; by default all.

    Returns:
        For ``free`` (no guidance) and ``guided``: ``strict``, ``loose``, ``atom``, ``by_kind``, the answers of every prompt
        for paired comparisons, the rubric's mean by the judge that is trained on and by the held-out one,
        ``foreground``, ``background_right`` and the mean number of ``objects``; and ``diversity`` without guidance.
    """
    settings, prompts = config.eval, held_out_prompts(config)
    canvases = [
        config.rollout.canvases[(i + i // len(KINDS)) % len(config.rollout.canvases)] for i in range(len(prompts))
    ]
    mine = range(group.rank, len(prompts), group.world_size)
    texts = {index: encode_prompt(world, prompts[index].text) for index in mine}
    result: dict[str, Any] = {"num_prompts": len(prompts)}
    for name, number in (("free", len(prompts)), ("guided", num_guided or len(prompts))):
        chosen = [index for index in mine if index < number]
        arguments = ([texts[i] for i in chosen], [canvases[i] for i in chosen], chosen, settings)
        painted = paint_suite(model, world, *arguments, guided=name == "guided")
        parts = group.gather(dict(zip(chosen, painted, strict=True)))
        found = {index: picture for part in parts for index, picture in part.items()}
        pictures = [found[index] for index in sorted(found)]
        result[name] = describe_pictures(pictures, prompts[: len(found)], config.prompts.form)
    few = range(min(12, len(prompts)))
    seeds = [1_000_003 * index + copy for index in few for copy in range(settings.variety)]
    repeated = [encode_prompt(world, prompts[index].text) for index in few for _ in range(settings.variety)]
    shapes = [canvases[index] for index in few for _ in range(settings.variety)]
    pictures = paint_suite(model, world, repeated, shapes, seeds, settings, guided=False)
    sets = [pictures[i * settings.variety : (i + 1) * settings.variety] for i in few]
    result["diversity"] = math.fsum(map(diversity, sets)) / len(sets)
    return result


def describe_pictures(
    pictures: Sequence[Tensor], prompts: Sequence[ScenePrompt], form: str = "dense"
) -> dict[str, Any]:
    """Scores of one picture for each prompt, as :func:`evaluate` gives them for either guidance."""
    score = score_images(pictures, prompts)
    rubrics = [(scene_rubric if form == "dense" else request_rubric)(prompt) for prompt in prompts]
    means = []
    for judge in (scene_judge(), held_out_judge()):
        table = to_matrix(judge_pictures(judge, pictures, rubrics), rubrics)
        means.append(aggregate(table.scores, table.valid, table.weights, missing="raise").values)
    rubric, held_out = means
    right = [r.reading.background == p.scene.background for r, p in zip(score.reports, prompts, strict=True)]
    shares = [foreground_share(picture) for picture in pictures]
    return {
        "strict": score.strict,
        "loose": score.loose,
        "atom": score.atom,
        "by_kind": {kind: one.strict for kind, one in score.by_kind.items()},
        "answers": [int(report.strict) for report in score.reports],
        "rubric": rubric.mean().item(),
        "rubric_strict": (rubric == 1).float().mean().item(),
        "held_out": held_out.mean().item(),
        "held_out_strict": (held_out == 1).float().mean().item(),
        "foreground": math.fsum(shares) / len(shares),
        "background_right": sum(right) / len(right),
        "objects": sum(len(report.reading.objects) for report in score.reports) / len(score.reports),
    }
