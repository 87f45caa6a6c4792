"""What a step asks for, in which order, and the pictures that the sampling policy makes of it.

Everything random is a function of seed, step and the picture's number, whatever else is sampled beside it; how pictures
are put into chunks is a function of the settings, so that any number of processes computes the same shapes.

Axes: b pictures of a chunk, N image tokens of a chunk, M text tokens of a chunk, c channels, k text layers, e text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.miniature.world import Miniature
from experiments.reinforce_config import ReinforceConfig, RolloutConfig
from lensmini.data.permute import derive_key, permute
from lensmini.nn import Autoencoder, LensTransformer, to_uint8
from lensmini.packed import Layout, unpack
from lensmini.parallel import Group
from lensmini.sampling import (
    StochasticStep,
    empirical_mu,
    initial_noise,
    sample_ode,
    sample_sde,
    sde_window,
    step_noise,
    time_grid,
)

__all__ = [
    "Rollout",
    "Sample",
    "decode",
    "encode_prompt",
    "my_chunks",
    "roll_out",
    "seed_of",
    "step_samples",
    "trained_places",
    "window_of",
]

PURPOSES = {"prompts": 1, "noise": 2, "training": 3, "times": 4}


class Sample(NamedTuple):
    """One picture that is to be made."""

    number: int
    """Of all pictures of the run."""
    group: int
    """Of all groups of the run: pictures of one prompt in one step."""
    prompt: int
    """Index of the prompt."""
    canvas: tuple[int, int]
    """Height and width in pixels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout:
    """A chunk of pictures, packed, and what training needs of how they were made."""

    samples: list[Sample]
    layout: Layout
    """Of images and texts."""
    text_tokens: Tensor
    """``[M, k, e]``."""
    times: Tensor
    """``[b, steps + 1]``: the grid of each picture."""
    latents: Tensor
    """``[N, c]``, clean."""
    steps: list[StochasticStep]
    """For the surrogate: the window's steps."""


def seed_of(seed: int, purpose: str, *numbers: int) -> int:
    """A seed for one purpose, not negative.

    Example:
        >>> seed_of(0, "noise", 5) == seed_of(0, "noise", 5), seed_of(0, "noise", 5) == seed_of(0, "training", 5)
        (True, False)
    """
    return int(derive_key(seed, PURPOSES[purpose], *numbers)) >> 1


def step_samples(rollout: RolloutConfig, num_prompts: int, step: int, seed: int) -> list[Sample]:
    """All pictures of a step: every prompt comes once before any comes again; shapes are dealt out in turn.

    Args:
        rollout: groups, their size and the canvases.
        num_prompts: prompts that there are.
        step: from 0.
        seed: of the run.

    Returns:
        ``groups * group_size`` samples, group by group.

    Example:
        >>> small = RolloutConfig(groups=2, group_size=2, canvases=((8, 8), (4, 16)))
        >>> [(s.number, s.group, s.canvas) for s in step_samples(small, 5, 1, 0)]
        [(4, 2, (4, 16)), (5, 2, (8, 8)), (6, 3, (4, 16)), (7, 3, (8, 8))]
    """
    size, shapes, samples = rollout.group_size, len(rollout.canvases), []
    for group in range(step * rollout.groups, (step + 1) * rollout.groups):
        epoch, place = divmod(group, num_prompts)
        prompt = int(permute(place, num_prompts, derive_key(seed, PURPOSES["prompts"], epoch)))
        # Where a group is no multiple of the canvases the next one goes on, so that all shapes come equally often; equal
        # ones stand together, which is faster.
        first, kinds = group * size, rollout.shapes_per_group
        places = range(first, first + size) if not kinds else [group * kinds + m * kinds // size for m in range(size)]
        dealt = sorted(rollout.canvases[place % shapes] for place in places)
        samples += [Sample(first + member, group, prompt, canvas) for member, canvas in enumerate(dealt)]
    return samples


def my_chunks(samples: Sequence[Sample], chunk: int, group: Group) -> list[list[Sample]]:
    """The chunks of this process: neighbours, so that groups stay together as far as they can.

    Example:
        >>> samples = step_samples(RolloutConfig(groups=1, group_size=5, canvases=((8, 8),)), 1, 0, 0)
        >>> [[s.number for s in part] for part in my_chunks(samples, 2, Group(1, 2))]
        [[4]]
    """
    chunks = [list(samples[first : first + chunk]) for first in range(0, len(samples), chunk)]
    each = -(-len(chunks) // group.world_size)
    return chunks[group.rank * each : (group.rank + 1) * each]


@torch.no_grad()
def encode_prompt(world: Miniature, text: str) -> Tensor:
    """``[l, k, e]`` features of one prompt, encoded by itself, so that they depend on nothing else."""
    features, mask = world.encoder([text])
    return torch.stack(features, dim=2)[0][mask[0]]


@torch.no_grad()
def roll_out(
    model: LensTransformer,
    samples: Sequence[Sample],
    texts: Sequence[Tensor],
    config: ReinforceConfig,
    *,
    downsample: int,
    step: int,
    device: torch.device,
) -> Rollout:
    """Sample a chunk without guidance: by the second-order multistep solver, or stochastically for the surrogate.

    Args:
        model: with the sampling policy's weights.
        samples: of one chunk.
        texts: for each sample ``[l, k, e]``.
        config: of the run.
        downsample: pixels per side of a latent position.
        step: of the run, from 0.
        device: of the model.

    Returns:
        Latents, and the stochastic steps if the objective needs them.
    """
    settings, objective = config.rollout, config.objective
    grids = [(height // downsample, width // downsample) for height, width in (s.canvas for s in samples)]
    layout = Layout.build(grids, text_lengths=[len(text) for text in texts], device=device)
    text_tokens = torch.cat([text.to(device, model.img_in.weight.dtype) for text in texts])
    shifts = [empirical_mu(h * w, settings.num_steps) if settings.mu is None else settings.mu for h, w in grids]
    times = time_grid(settings.num_steps, shifts, device=device)
    seeds = [seed_of(config.run.seed, "noise", sample.number) for sample in samples]
    noise = initial_noise(seeds, model.config.in_channels, layout)

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        result = model.forward_packed(latents, t, text_tokens, layout)
        assert isinstance(result, Tensor)
        return result

    steps: list[StochasticStep] = []
    if objective.name == "grpo":
        latents, steps = sample_sde(
            velocity,
            noise,
            times,
            partial(step_noise, seeds, channels=model.config.in_channels, grid=layout),
            eta=objective.eta,
            kind=objective.kernel,
            window=window_of(config, step),
            layout=layout,
        )
    else:
        latents = sample_ode(velocity, noise, times, step="dpm2", layout=layout)
    return Rollout(
        samples=list(samples), layout=layout, text_tokens=text_tokens, times=times, latents=latents, steps=steps
    )


def trained_places(config: ReinforceConfig) -> range:
    """Places of the sampling grid that are trained on; for the surrogate without the last step, which may have no noise."""
    whole = config.rollout.num_steps - (1 if config.objective.name == "grpo" else 0)
    first, last = config.objective.places or (0, whole)
    return range(min(first, whole - 1), min(last, whole))


def window_of(config: ReinforceConfig, step: int) -> range:
    """The stochastic steps of an iteration, moving over the places that are trained on."""
    places = trained_places(config)
    window = sde_window(step, len(places), size=config.objective.window, dwell=config.objective.dwell)
    return range(places.start + window.start, places.start + window.stop)


@torch.no_grad()
def decode(autoencoder: Autoencoder, rollout: Rollout) -> list[Tensor]:
    """``[3, h, w]`` uint8 for each picture of a chunk, on the CPU; equal shapes are decoded together."""
    latents = unpack(rollout.latents, rollout.layout)
    pictures: dict[int, Tensor] = {}
    for canvas in dict.fromkeys(sample.canvas for sample in rollout.samples):
        members = [index for index, sample in enumerate(rollout.samples) if sample.canvas == canvas]
        decoded = to_uint8(autoencoder.decode(torch.stack([latents[index] for index in members]))).cpu()
        pictures |= dict(zip(members, decoded, strict=True))
    return [pictures[index] for index in range(len(rollout.samples))]
