"""Painting and judging prompts of the miniature world with a trained model."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from experiments.miniature.world import Miniature
from experiments.painting import paint
from lensmini.data import ScenePrompt, SuiteScore, score_images
from lensmini.nn import LensTransformer, to_uint8
from lensmini.parallel import Group

__all__ = ["SamplingSettings", "paint_prompts", "score_suite"]


class SamplingSettings(Protocol):
    """How pictures are sampled."""

    @property
    def num_steps(self) -> int: ...
    @property
    def guidance_scale(self) -> float: ...
    @property
    def mu(self) -> float | None: ...


@torch.no_grad()
def paint_prompts(
    model: LensTransformer,
    world: Miniature,
    prompts: Sequence[str],
    canvases: Sequence[tuple[int, int]],
    settings: SamplingSettings,
    *,
    seeds: Sequence[int] | None = None,
    rescale: bool = True,
    chunk: int = 24,
) -> list[Tensor]:
    """Paint one picture per prompt.

    Args:
        model: the transformer.
        world: text encoder and autoencoder.
        prompts: what to paint.
        canvases: pixel sizes (height, width); prompt i gets the one of number i modulo their count.
        settings: steps, guidance and time shift.
        seeds: of each picture's noise; by default its number.
        rescale: restore the norms after guidance.
        chunk: pictures sampled at once; it does not change them.

    Returns:
        For each prompt ``[3, height, width]`` uint8.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    side = world.autoencoder.downsample
    sizes = [canvases[index % len(canvases)] for index in range(len(prompts))]
    # Equal shapes next to each other run as one; every picture keeps its own seed.
    order = sorted(range(len(prompts)), key=lambda index: (sizes[index], len(prompts[index].split())))
    pictures: dict[int, Tensor] = {}
    for first in range(0, len(order), chunk):
        chosen = order[first : first + chunk]
        features, mask = world.encoder([prompts[index] for index in chosen])
        stacked = torch.stack(features, dim=2)
        latents = paint(
            model,
            [row[keep] for row, keep in zip(stacked, mask, strict=True)],
            [(sizes[index][0] // side, sizes[index][1] // side) for index in chosen],
            [seeds[index] for index in chosen],
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            mu=settings.mu,
            rescale=rescale,
        )
        for index, latent in zip(chosen, latents, strict=True):
            pictures[index] = to_uint8(world.autoencoder.decode(latent[None]))[0]
    return [pictures[index] for index in range(len(prompts))]


def score_suite(
    model: LensTransformer,
    world: Miniature,
    prompts: Sequence[ScenePrompt],
    canvases: Sequence[tuple[int, int]],
    settings: SamplingSettings,
    group: Group | None = None,
    *,
    rescale: bool = True,
) -> tuple[SuiteScore, list[Tensor]]:
    """Paint a suite of prompts, shared out over the processes, and judge it exactly.

    Returns:
        The score and the pictures, the same in every process.
    """
    group = Group(0, 1) if group is None else group
    mine = range(group.rank, len(prompts), group.world_size)
    painted = paint_prompts(
        model,
        world,
        [prompts[index].text for index in mine],
        [canvases[index % len(canvases)] for index in mine] or canvases,
        settings,
        seeds=list(mine),
        rescale=rescale,
    )
    found = {
        index: picture
        for part in group.gather(dict(zip(mine, painted, strict=True)))
        for index, picture in part.items()
    }
    pictures = [found[index] for index in range(len(prompts))]
    return score_images(pictures, prompts), pictures
