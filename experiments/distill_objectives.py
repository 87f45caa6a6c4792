"""What student, fake score and discriminator of a distillation run minimise (arXiv 2605.21573 D.2), on packed batches.

Axes: b samples, N image tokens, c channels. Every loss is ``[b]`` with its parts by name for the log.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.bank import Batch
from experiments.distill_config import DistillConfig, MatchingConfig
from experiments.distill_draws import Draws
from experiments.distill_state import DistillState
from lensmini.nn import LensTransformer
from lensmini.nn.transformer import Captured
from lensmini.objectives import (
    approximate_r1,
    cfg_augmentation_direction,
    directional_loss,
    discriminator_loss,
    divergence_weight,
    dmd_direction,
    flow_matching_loss,
    generator_loss,
    noise_levels,
)
from lensmini.packed import Layout
from lensmini.paths import clean_prediction, interpolate, velocity_target
from lensmini.sampling import SimulatedStep, Velocity, backward_simulation, empirical_mu, guide, time_grid

__all__ = ["STUDENT_LOSSES", "Losses", "StudentLoss", "condition", "critic_losses", "dmd_loss", "simulate", "warm_loss"]


class Losses(NamedTuple):
    """Losses of a batch."""

    total: Tensor
    """``[b]``: what is descended."""
    parts: dict[str, Tensor]
    """``[b]`` each, for the log."""


StudentLoss = Callable[[DistillState, Batch, Draws, DistillConfig], Losses]


def condition(model: LensTransformer, batch: Batch) -> Velocity:
    """The velocity under the batch's text."""
    return lambda x, t: model.forward_packed(x, t, batch.text_tokens, batch.layout)  # pyright: ignore


def simulate(state: DistillState, batch: Batch, draws: Draws, config: DistillConfig) -> SimulatedStep:
    """Walk the student from the batch's noise to one of its steps, and predict with gradient."""
    student, layout = config.student, batch.layout
    num = student.num_steps
    shifts = [empirical_mu(length, num) if student.mu is None else student.mu for length in layout.image_lengths]
    times = time_grid(num, shifts, device=batch.noise.device)
    stop = int(draws.update * num) if student.stop == "update" else (draws.stop * num).long()
    noises = draws.walk if student.walk == "renoise" else None
    velocity = condition(state.student.compute, batch)
    return backward_simulation(velocity, batch.noise, times, stop, noises, layout=layout)


def critic_losses(state: DistillState, batch: Batch, draws: Draws, config: DistillConfig) -> Losses:
    """The fake score's and the discriminator's losses on samples of the student."""
    assert state.fake is not None
    layout = batch.layout
    with torch.no_grad():
        clean = simulate(state, batch, draws, config).clean
    t = _levels(torch.ones_like(draws.stop), draws, config.matching)[0]
    noisy = interpolate(clean, draws.matching, t, layout=layout)
    velocity = condition(state.fake.compute, batch)(noisy, t)
    fake = flow_matching_loss(velocity, velocity_target(clean, draws.matching), layout=layout)
    if state.head is None:
        return Losses(fake, {"fake": fake.detach()})
    adversary = config.adversary
    real = interpolate(batch.image_tokens, draws.real, t, layout=layout)
    with torch.no_grad():
        inputs = [noisy, real]
        if adversary.gamma:
            inputs.append(real + adversary.alpha * draws.perturbation)
        states, wide = _features(state, batch, inputs, t)
    fake_logits, real_logits, *perturbed = state.head(states, wide).chunk(len(inputs))
    known = torch.stack([logits.detach().isfinite() for logits in (fake_logits, real_logits, *perturbed)]).all(0)
    told = discriminator_loss(real_logits, fake_logits, mask=known)
    penalty = approximate_r1(real_logits, perturbed[0], mask=known) if perturbed else torch.zeros_like(told)
    parts = {"fake": fake, "discriminator": told, "r1": penalty, "real_logit": real_logits, "fake_logit": fake_logits}
    total = fake + told + adversary.gamma / 2 * penalty  # disjoint parameters: the sum is only a convenience
    return Losses(torch.where(known, total, torch.nan), {name: part.detach() for name, part in parts.items()})


def dmd_loss(state: DistillState, batch: Batch, draws: Draws, config: DistillConfig) -> Losses:
    """Lens-Turbo: ``lambda_d (L_DM + L_CA) + lambda_g L_G`` on the student's own states."""
    assert state.fake is not None
    layout, wanted, floor = batch.layout, config.matching, config.matching.floor
    step = simulate(state, batch, draws, config)
    clean, x = step.clean, step.clean.detach()
    levels = _levels(step.t, draws, wanted)
    at_matching = interpolate(x, draws.matching, levels.matching, layout=layout)
    at_augmentation = interpolate(x, draws.augmentation, levels.augmentation, layout=layout)
    with torch.no_grad():
        teacher = state.teacher.model
        real, cond, uncond = _teacher_predictions(teacher, batch, at_matching, at_augmentation, levels)
        velocity = condition(state.fake.compute, batch)(at_matching, levels.matching)
        fake = clean_prediction(at_matching, velocity, levels.matching, layout=layout)
    # What is no number is left out of the directions and makes its sample's loss one for the guard to see.
    known = _finite(layout, clean, fake, real, cond, uncond)
    common = {"x": x, "floor": floor, "mask": known, "layout": layout}
    matching = dmd_direction(fake, real, normaliser=wanted.normaliser, **common)
    augmentation = cfg_augmentation_direction(
        cond, uncond, wanted.guidance, normaliser=wanted.augmentation_normaliser, **common
    )
    parts = {
        "dm": directional_loss(clean, matching, layout=layout),
        "ca": directional_loss(clean, augmentation, layout=layout),
    }
    total = torch.zeros_like(parts["dm"])
    weight = torch.ones_like(total)
    if state.head is not None:
        noisy = interpolate(clean, draws.matching, levels.matching, layout=layout)
        states, wide = _features(state, batch, [noisy], levels.matching)
        # With constant weights: the generator's gradient must not wait in the head for its own next update.
        fixed = {name: parameter.detach() for name, parameter in state.head.named_parameters()}
        logits = torch.func.functional_call(state.head, fixed, (states, wide))
        known = known & logits.detach().isfinite()
        parts["generator"] = generator_loss(logits, mask=known)
        total = total + config.adversary.weight * parts["generator"]
        weight = divergence_weight(logits, wanted.divergence)
    if wanted.matching:
        total = total + wanted.weight * weight * parts["dm"]
    if wanted.augmentation:
        total = total + wanted.weight * parts["ca"]
    return Losses(torch.where(known, total, torch.nan), {name: part.detach() for name, part in parts.items()})


def warm_loss(state: DistillState, batch: Batch, draws: Draws, config: DistillConfig) -> Losses:
    """Not in the paper: regression on the guided teacher's mean velocity over the student's step, three Euler steps."""
    layout, num = batch.layout, config.student.num_steps
    with torch.no_grad():
        step = simulate(state, batch, draws, config)
    shifts = [empirical_mu(n, num) if config.student.mu is None else config.student.mu for n in layout.image_lengths]
    grid = time_grid(num, shifts, device=batch.noise.device)
    ends = torch.stack([row[row < t].max() for row, t in zip(grid, step.t, strict=True)])
    x, t = step.noisy, step.t
    with torch.no_grad():
        for index in range(3):
            here, there = t + (ends - t) * index / 3, t + (ends - t) * (index + 1) / 3
            velocity = _guided(state.teacher.model, batch, x, here, config.matching.guidance)
            x = x + layout.expand(there - here)[:, None] * velocity
    target = (x - step.noisy) / layout.expand(ends - t)[:, None]
    loss = flow_matching_loss(condition(state.student.compute, batch)(step.noisy, t), target, layout=layout)
    return Losses(loss, {"warm": loss.detach()})


STUDENT_LOSSES: dict[str, StudentLoss] = {"dmd": dmd_loss}
"""By ``config.method``."""


def _levels(t: Tensor, draws: Draws, config: MatchingConfig):  # noqa: ANN202
    shares = draws.levels
    if config.level_mu:
        shares = torch.sigmoid(config.level_mu + torch.logit(shares))
    return noise_levels(t, shares, config.schedule, low=config.low, high=config.high)


def _finite(layout: Layout, *tensors: Tensor) -> Tensor:
    """``[b]`` bool: whether all values of a sample are numbers."""
    return torch.stack([layout.mean(tensor.detach()).isfinite() for tensor in tensors]).all(0)


def _repeat(batch: Batch, times: int, *, without_text: int = 0) -> tuple[Tensor, Layout]:
    """Text and layout of the batch several times over, the last of them without text."""
    grids = batch.layout.grids.tolist()
    lengths, with_text = batch.layout.text_lengths, times - without_text
    text = torch.cat([batch.text_tokens] * with_text)
    layout = Layout.build(grids * times, text_lengths=[*lengths * with_text, *[0] * (len(grids) * without_text)])
    return text, layout.to(text.device)


def _teacher_predictions(teacher: LensTransformer, batch: Batch, at_matching: Tensor, at_augmentation: Tensor, levels):  # noqa: ANN001, ANN202
    """Clean predictions in one packed pass: with text at both levels, and without at the second."""
    text, layout = _repeat(batch, 3, without_text=1)
    noisy = torch.cat([at_matching, at_augmentation, at_augmentation])
    t = torch.cat([levels.matching, levels.augmentation, levels.augmentation])
    velocity = teacher.forward_packed(noisy, t, text, layout)
    return clean_prediction(noisy, velocity, t, layout=layout).chunk(3)  # pyright: ignore


def _guided(teacher: LensTransformer, batch: Batch, x: Tensor, t: Tensor, scale: float) -> Tensor:
    text, layout = _repeat(batch, 2, without_text=1)
    both = teacher.forward_packed(torch.cat([x, x]), torch.cat([t, t]), text, layout)
    cond, uncond = both.chunk(2)  # pyright: ignore
    return guide(cond, uncond, scale, channel_dim=-1)


def _features(state: DistillState, batch: Batch, inputs: list[Tensor], t: Tensor):  # noqa: ANN202
    """The frozen teacher's hidden states of several noisy versions of the batch, and their layout."""
    assert state.head is not None
    text, layout = _repeat(batch, len(inputs))
    times = torch.cat([t] * len(inputs))
    found = state.teacher.model.forward_packed(
        torch.cat(inputs), times, text, layout, capture_blocks=state.head.blocks, early_stop=True
    )
    assert isinstance(found, Captured)
    return found.hidden_states, layout
