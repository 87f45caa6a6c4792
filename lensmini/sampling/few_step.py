"""Sampling in a few large steps: predict the clean sample, noise it again to the next level.

Axes: b samples, N image tokens of a packed batch, c channels, k steps.

A student of consistency or distribution matching distillation is made for this walk. Fresh noise at every level makes it
stochastic; without it the noise that the model itself predicts is used again, which is the Euler step of the ODE on the
same grid and what the released Lens-Turbo pipeline does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, check_time_range, clean_prediction, interpolate
from lensmini.reduction import holds
from lensmini.sampling.ode import Velocity, euler_step
from lensmini.shapes import check_shape

__all__ = ["Noises", "SimulatedStep", "backward_simulation", "few_step_sample"]

Noises = Callable[[int], Tensor] | Sequence[Tensor] | None
"""Fresh noise for each step but the last, by index; None uses the model's own noise again."""


class SimulatedStep(NamedTuple):
    """A student's step as training sees it."""

    clean: Tensor
    """The shape of the state: the clean prediction; carries the gradient of this one step."""
    noisy: Tensor
    """The shape of the state: what the student was given; no gradient."""
    t: Tensor
    """``[b]``: the time of the step."""


def few_step_sample(
    velocity: Velocity,
    noise: Tensor,
    times: Tensor,
    noises: Noises = None,
    *,
    layout: Layout | None = None,
) -> Tensor:
    """Sample by predicting clean and noising again: ``x' = (1 - t') (x - t v) + t' noise`` (arXiv 2303.01469 algorithm 1).

    With the exact consistency function every grid gives the data's distribution. With ``noises=None`` the noise is the
    model's own, ``x + (1 - t) v``, and a step is :func:`lensmini.sampling.euler_step`, bit for bit.

    Args:
        velocity: the model, called with ``t [b]``.
        noise: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at the first time.
        times: ``[k + 1]`` for all samples or ``[b, k + 1]``, descending to 0: ``time_grid(4, empirical_mu(tokens, 4))`` is
            the released four-step grid.
        noises: ``noises(i)`` or ``noises[i]`` in the shape of ``noise``, for the step from time i; not read for the last.
            :func:`lensmini.sampling.step_noise` makes it a function of each sample's seed.
        layout: the layout of packed latents.

    Returns:
        The last clean prediction, in the shape and dtype of ``noise``.

    Raises:
        ValueError: if shapes differ, there are fewer than two times, or (on the CPU) they leave [0, 1], ascend or do not
            end at 0.

    Example:
        >>> few_step_sample(
        ...     lambda x, t: x, torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0]), lambda step: torch.ones(1, 2)
        ... )
        tensor([[0.2500, 0.2500]])
    """
    grid = _grid(times, noise, layout)
    noisy = noise
    for index in range(grid.shape[0] - 1):
        noisy = _step(velocity(noisy, grid[index]), noisy, grid, index, noises, layout)
    return noisy


def backward_simulation(
    velocity: Velocity,
    noise: Tensor,
    times: Tensor,
    stop: int | Tensor,
    noises: Noises = None,
    *,
    layout: Layout | None = None,
) -> SimulatedStep:
    """Walk the student to one of its own steps and predict from there (DMD2's backward simulation, arXiv 2405.14867).

    Trains the student on states that it meets when it samples, not on noised data. The steps before ``stop`` run without
    gradient; the prediction at ``stop`` is the only one that carries it.

    Args:
        velocity: the student, called with ``t [b]``.
        noise: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at the first time.
        times: ``[k + 1]`` or ``[b, k + 1]``, descending to 0.
        stop: the step to stop at, 0 to k - 1: one for all, or ``[b]`` integers. Samples that stop early wait while the
            others walk on.
        noises: as for :func:`few_step_sample`.
        layout: the layout of packed latents.

    Returns:
        Clean prediction, state and time of the step ``stop``.

    Raises:
        ValueError: as for :func:`few_step_sample`, or if (on the CPU) ``stop`` is no step of the grid.

    Example:
        >>> times, stop = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0, 1])
        >>> step = backward_simulation(lambda x, t: x, torch.ones(2, 1), times, stop, lambda step: torch.ones(2, 1))
        >>> step.t, step.clean.flatten()
        (tensor([1.0000, 0.5000]), tensor([0.0000, 0.2500]))
    """
    grid = _grid(times, noise, layout)
    num_steps, num = grid.shape[0] - 1, grid.shape[1]
    stops = torch.full((num,), stop, device=noise.device) if isinstance(stop, int) else stop.to(noise.device)
    check_shape("stop", stops, "b", b=num)
    if stops.is_floating_point() or stops.dtype == torch.bool:
        raise ValueError(f"stop: expected integers, got {stops.dtype}")
    known = isinstance(stop, int) or stops.device.type == "cpu"
    if known and not holds((stops >= 0) & (stops < num_steps)):
        raise ValueError(f"stop: expected steps 0 to {num_steps - 1}, got {stops.tolist()}")
    noisy, furthest = noise.detach(), num_steps - 1
    if not torch.compiler.is_compiling() and stops.device.type != "meta":
        furthest = int(stops.max())  # the one look at the device: nobody has to walk further
    with torch.no_grad():
        for index in range(furthest):
            # Those who have arrived are evaluated again at their own time, and stay.
            here = grid[torch.minimum(stops, torch.full_like(stops, index)), torch.arange(num, device=noise.device)]
            following = _step(velocity(noisy, here), noisy, grid, index, noises, layout)
            walking = stops > index
            rows = walking if layout is None else layout.expand(walking)
            noisy = torch.where(rows.reshape(-1, *[1] * (noisy.ndim - 1)), following, noisy)
    t = grid[stops, torch.arange(num, device=noise.device)]
    return SimulatedStep(clean_prediction(noisy, velocity(noisy, t), t, layout=layout), noisy, t)


def _grid(times: Tensor, noise: Tensor, layout: Layout | None) -> Tensor:
    """``[k + 1, b]``."""
    num = check_shape("noise", noise, "b ...")["b"] if layout is None else layout.image_offsets.shape[0] - 1
    check_shape("times", times, "k" if times.ndim == 1 else "b k", b=num)
    if times.shape[-1] < 2:
        raise ValueError(f"times: expected at least two, got {list(times.shape)}")
    check_time_range("times", times)
    if times.device.type == "cpu" and not (holds(times.diff() <= 0) and holds(times[..., -1] == 0)):
        raise ValueError(f"times: expected a grid that descends to 0, got {times.tolist()}")
    grid = times.to(device=noise.device, dtype=torch.promote_types(times.dtype, torch.float32))
    return grid.expand(num, -1).t().contiguous()


def _step(velocity: Tensor, noisy: Tensor, grid: Tensor, index: int, noises: Noises, layout: Layout | None) -> Tensor:
    """The state at ``grid[index + 1]`` from that at ``grid[index]``."""
    t, t_next = grid[index], grid[index + 1]
    if noises is None:
        return euler_step(noisy, velocity, t, t_next, layout=layout)
    clean = clean_prediction(noisy, velocity, t, layout=layout)
    if index == grid.shape[0] - 2:
        return clean
    fresh = noises(index) if callable(noises) else noises[index]
    check_same_shape(f"noises[{index}]", fresh, "noise", noisy)
    return interpolate(clean, fresh, t_next, layout=layout)
