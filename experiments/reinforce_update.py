"""From rollouts and advantages to gradients: DiffusionNFT, advantage weighted matching, or the clipped surrogate.

Losses are one value by picture; they are divided by the number of pictures with a reward, of all processes, and by the
number of times. Pictures without one are masked: they move nothing, whatever they hold.

Axes: b pictures of a chunk, N image tokens of a chunk.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.reinforce_config import ReinforceConfig
from experiments.reinforce_rollout import Rollout, Sample, seed_of, trained_places
from experiments.reinforce_state import Policies
from lensmini.nn import LensTransformer
from lensmini.objectives.policy import clipped_surrogate, matching_log_ratio, nft_loss, optimality, velocity_gap
from lensmini.paths import interpolate, velocity_target
from lensmini.sampling import StochasticStep, gaussian_kl, initial_noise, replay_step

__all__ = ["Moments", "accumulate_chunk", "chosen_times", "surrogate_losses", "velocity_losses"]


@dataclass
class Moments:
    """Sums over what an update saw, to be added up over chunks and processes."""

    loss: float = 0.0
    gap: float = 0.0
    """Squared distance to the reference's velocity, or the KL of steps."""
    norms: list[float] = field(default_factory=list)
    """Of the trained velocity, one for each picture and time; empty without a distance to the reference."""
    reference_norms: list[float] = field(default_factory=list)
    """Of the reference's."""
    first_ratio: float = 0.0
    """Largest log-ratio of the first update after a rollout, which has to be exactly 0."""


def chosen_times(config: ReinforceConfig, sample: Sample, update: int) -> list[int]:
    """Which times of the sampling grid one picture is noised to in one update: each at most once.

    Example:
        >>> from experiments.reinforce_config import mini
        >>> len(chosen_times(mini(), Sample(7, 0, 0, (32, 32)), 1))
        1
    """
    places, wanted = trained_places(config), config.objective.times
    if not wanted or wanted >= len(places):
        return list(places)
    # One order for a picture's updates, so that they see different times as long as there are some.
    generator = torch.Generator().manual_seed(seed_of(config.run.seed, "times", _name(config, sample)))
    order = torch.randperm(len(places), generator=generator).tolist()
    return [places[order[(update * wanted + index) % len(places)]] for index in range(wanted)]


def accumulate_chunk(
    policies: Policies,
    rollout: Rollout,
    advantage: Tensor,
    known: Tensor,
    config: ReinforceConfig,
    *,
    update: int,
    share: float,
) -> Moments:
    """Add a chunk's gradient of one update.

    Args:
        policies: the trained one is changed by nobody here.
        rollout: the chunk.
        advantage: ``[b]``.
        known: ``[b]`` bool: pictures that have a reward.
        config: of the run.
        update: which update on this rollout, from 0.
        share: what one picture counts: one over the number of known ones of all processes.

    Returns:
        What the log wants to know.
    """
    moments, objective = Moments(), config.objective
    advantage = torch.where(known, advantage, 0.0)
    if objective.name == "grpo":
        steps = rollout.steps[update :: objective.updates]
        for step in steps:
            losses = surrogate_losses(policies, rollout, step, advantage, known, config, moments, first=update == 0)
            _backward(policies, losses.sum() * share / len(steps), moments)
        return moments
    rows = [chosen_times(config, sample, update) for sample in rollout.samples]
    for number in range(len(rows[0])):
        places = torch.tensor([row[number] for row in rows])
        losses = velocity_losses(policies, rollout, places, advantage, known, config, moments)
        _backward(policies, losses.sum() * share / len(rows[0]), moments)
    return moments


def velocity_losses(
    policies: Policies,
    rollout: Rollout,
    places: Tensor,
    advantage: Tensor,
    known: Tensor,
    config: ReinforceConfig,
    moments: Moments,
) -> Tensor:
    """``[b]`` losses of the objectives without likelihoods, each picture noised to one time of its grid.

    Args:
        policies: of the run.
        rollout: the chunk.
        places: ``[b]`` indices into each picture's times.
        advantage: ``[b]``, finite.
        known: ``[b]`` bool.
        config: of the run.
        moments: gets the norms.

    Returns:
        Losses, 0 where not known.
    """
    objective, layout, clean = config.objective, rollout.layout, rollout.latents
    t = rollout.times.gather(1, places.to(clean.device)[:, None])[:, 0]
    seeds = [
        seed_of(config.run.seed, "training", _name(config, sample), place)
        for sample, place in zip(rollout.samples, places.tolist(), strict=True)
    ]
    noise = initial_noise(seeds, clean.shape[1], layout)
    noisy, target = interpolate(clean, noise, t, layout=layout), velocity_target(clean, noise)

    def velocity(model: LensTransformer) -> Tensor:
        result = model.forward_packed(noisy, t, rollout.text_tokens, layout)
        assert isinstance(result, Tensor)
        return result

    reference: Tensor | None = None
    with torch.no_grad():
        with policies.acting("old") as model:
            old = velocity(model)
        if objective.kl:
            with policies.acting("reference") as model:
                reference = velocity(model)
    new, shared = velocity(policies.model), {"mask": known, "layout": layout}
    if objective.name == "awm":
        ratio = matching_log_ratio(new, old, target, **shared)
        losses = clipped_surrogate(ratio, advantage, objective.clip, objective.clip, mask=known)
    else:
        r = optimality(advantage, objective.advantage_clip, mask=known)
        weighting = {} if objective.weight == "none" else {"weight": "self_normalised", "t": t}
        losses = nft_loss(new, old, target, r, beta=objective.beta, **weighting, **shared)
        # As the published code has it, so that a step's size does not depend on how advantages are clipped.
        losses = losses * (objective.advantage_clip / objective.beta)
    if reference is not None:
        gap = velocity_gap(new, reference, **shared)
        losses = losses + objective.kl * gap
        moments.gap += gap.sum().item()
        for norms, tensor in ((moments.norms, new), (moments.reference_norms, reference)):
            norms += layout.mean(tensor.detach().square()).sqrt()[known].tolist()
    return losses


def surrogate_losses(
    policies: Policies,
    rollout: Rollout,
    step: StochasticStep,
    advantage: Tensor,
    known: Tensor,
    config: ReinforceConfig,
    moments: Moments,
    *,
    first: bool,
) -> Tensor:
    """``[b]`` clipped surrogate of one stochastic step, with the KL of the step to the reference.

    Args:
        policies: of the run.
        rollout: the chunk.
        step: one of its steps.
        advantage: ``[b]``, finite.
        known: ``[b]`` bool.
        config: of the run.
        moments: gets KL and ratio.
        first: whether nothing was updated since the rollout, so that the ratio is exactly 1.

    Returns:
        Losses, 0 where not known.

    Raises:
        RuntimeError: if that ratio is not 1.
    """
    objective, layout = config.objective, rollout.layout

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        result = policies.model.forward_packed(latents, t, rollout.text_tokens, layout)
        assert isinstance(result, Tensor)
        return result

    anchor = None
    if objective.kl:
        with torch.no_grad(), policies.acting("reference"):
            anchor = replay_step(velocity, step, mask=known, layout=layout).mean
    replay = replay_step(velocity, step, mask=known, layout=layout)
    log_ratio = replay.log_prob - torch.where(known, step.log_prob, 0.0)
    if first:
        moments.first_ratio = max(moments.first_ratio, log_ratio.detach().abs().max().item())
        if moments.first_ratio:
            raise RuntimeError(f"the first log-ratio after a rollout must be exactly 0, got {moments.first_ratio}")
    losses = clipped_surrogate(log_ratio, advantage, objective.clip, objective.clip, mask=known)
    if anchor is not None:
        gap = gaussian_kl(replay.mean, anchor, replay.std, mask=known, layout=layout)
        losses = losses + objective.kl * gap
        moments.gap += gap.sum().item()
    return losses


def _name(config: ReinforceConfig, sample: Sample) -> int:
    """Whose training noise a picture has: its own, or its group's."""
    return sample.group if config.objective.shared_noise else sample.number


def _backward(policies: Policies, loss: Tensor, moments: Moments) -> None:
    policies.state.begin(last=False)
    loss.backward()
    policies.state.accumulate()
    moments.loss += loss.item()
