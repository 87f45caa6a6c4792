"""Stochastic rollouts whose every step can be scored again: windows of noise, stored states, exact replay.

Axes: b samples, N image tokens of a packed batch, c channels, k steps.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, check_time_range
from lensmini.reduction import Reduction
from lensmini.sampling.kernels import Kernel, sde_kernel
from lensmini.sampling.likelihood import gaussian_log_prob
from lensmini.sampling.ode import Velocity, euler_step
from lensmini.shapes import check_shape

__all__ = ["Replay", "StochasticStep", "replay_step", "sample_sde", "sde_window"]


@dataclass(frozen=True, eq=False, kw_only=True)
class StochasticStep:
    """One stored step of a rollout: all that its likelihood is a function of, besides the model.

    Example:
        >>> noise, times = torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0])
        >>> _, steps = sample_sde(lambda x, t: x, noise, times, lambda step: noise, eta=0.5)
        >>> [step.index for step in steps], steps[0].log_prob.shape
        ([0], torch.Size([1]))
    """

    index: int
    """Which step of the grid."""
    noisy: Tensor
    """The state before, in the storage dtype."""
    next_noisy: Tensor
    """The state after, in the storage dtype."""
    t: Tensor
    """``[b]``."""
    t_next: Tensor
    """``[b]``."""
    log_prob: Tensor
    """``[b]``: of ``next_noisy`` as it is stored, under the model that sampled."""
    eta: float
    """Strength of the kernel's noise."""
    kind: Kernel
    """The kernel."""
    at_one: float | None
    """The kernel's stand-in for t = 1."""
    reduction: Reduction
    """Of ``log_prob``."""
    dtype: torch.dtype
    """In which the model sees the states."""


class Replay(NamedTuple):
    """A stored step under another model.

    Example:
        >>> Replay(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 1)).log_prob
        tensor([0.])
    """

    log_prob: Tensor
    """``[b]``: of the stored next state."""
    mean: Tensor
    """Of the transition, the shape of the state."""
    std: Tensor
    """Of the transition, broadcasting over ``mean``."""


def sde_window(
    iteration: int,
    num_steps: int,
    *,
    size: int = 4,
    dwell: int | Sequence[int] = 25,
    order: Literal["progressive", "random"] = "progressive",
    seed: int = 0,
) -> range:
    """The steps that are stochastic, and trained, in one iteration (MixGRPO, arXiv 2507.21802 section 3).

    A function of the iteration alone: one window for a whole group. Windows of their own would put their differences
    into the group's reward spread.

    Args:
        iteration: which iteration of training, from 0.
        num_steps: steps of the grid that may be stochastic; leave out a last step without noise.
        size: steps of the window.
        dwell: iterations at each position, one number for all or one for each of the ``num_steps - size + 1``
            positions (a falling sequence stays longer where the noise is).
        order: ``"progressive"`` moves by one step from noise to data and starts again at the end; ``"random"`` draws
            a position every ``dwell`` iterations.
        seed: of the random order.

    Returns:
        Indices of steps.

    Raises:
        ValueError: if a number is out of range, ``order`` is unknown, or there is not one dwell for each position.

    Example:
        >>> [sde_window(iteration, 9, size=4) for iteration in (0, 24, 25, 150)]
        [range(0, 4), range(0, 4), range(1, 5), range(0, 4)]
    """
    if iteration < 0 or not 1 <= size <= num_steps:
        raise ValueError(
            "iteration, size and num_steps: expected iteration >= 0 and 1 <= size <= num_steps, got "
            f"{iteration}, {size} and {num_steps}"
        )
    if order not in ("progressive", "random"):
        raise ValueError(f"order: expected 'progressive' or 'random', got {order!r}")
    positions = num_steps - size + 1
    dwells = [dwell] * positions if isinstance(dwell, int) else list(dwell)
    if len(dwells) != positions or min(dwells) < 1:
        raise ValueError(f"dwell: expected a positive integer, or one for each of {positions} positions, got {dwell}")
    if order == "random":
        if not isinstance(dwell, int):
            raise ValueError(f"dwell: expected one integer for the random order, got {dwell}")
        generator = np.random.Generator(np.random.Philox(key=seed, counter=iteration // dwell))
        start = int(generator.integers(positions))
    else:
        rest, start = iteration % sum(dwells), 0
        while rest >= dwells[start]:
            rest, start = rest - dwells[start], start + 1
    return range(start, start + size)


@torch.no_grad()
def sample_sde(
    velocity: Velocity,
    noise: Tensor,
    times: Tensor,
    step_noise: Callable[[int], Tensor],
    *,
    eta: float,
    kind: Kernel = "ddim",
    window: Collection[int] | None = None,
    storage_dtype: torch.dtype | None = None,
    reduction: Reduction = "sum",
    at_one: float | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, list[StochasticStep]]:
    """Sample with noise in a window of steps and Euler steps outside, and keep what a policy gradient needs.

    Every state is rounded to the storage dtype before the next step and before it is scored, so that
    :func:`replay_step` with the same model gives the same log-probability, bit for bit: the ratio of the first update
    is exactly 1. (A model may still answer differently in another batch shape: replay with the rollout's.)

    Args:
        velocity: the model, called with ``t [b]``.
        noise: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at the first time.
        times: ``[k + 1]`` for all samples or ``[b, k + 1]``, descending.
        step_noise: from the index of a step to standard normal noise in the shape of ``noise``; called for the window
            only. :func:`lensmini.sampling.step_noise` makes it a function of each sample's seed.
        eta: strength of the kernel's noise.
        kind: the kernel of the window's steps.
        window: indices of stochastic steps; by default all but the last, which has no noise for some kernels.
        storage_dtype: the dtype of stored states, by default that of ``noise``.
        reduction: of the log-probabilities.
        at_one: as for :func:`lensmini.sampling.sde_kernel`.
        layout: the layout of packed latents.

    Returns:
        The state at the last time, and the window's steps in order. No gradients.

    Raises:
        ValueError: if shapes or ranges are wrong, the window names a step that is not there, or a step of the window
            has no noise and therefore no density.

    Example:
        >>> noise, times = torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.25, 0.0])
        >>> clean, steps = sample_sde(lambda x, t: x, noise, times, lambda step: noise, eta=0.5, window=[1])
        >>> bool(replay_step(lambda x, t: x, steps[0]).log_prob == steps[0].log_prob)
        True
    """
    num = check_shape("noise", noise, "b ...")["b"] if layout is None else layout.batch_size
    check_shape("times", times, "k" if times.ndim == 1 else "b k", b=num)
    check_time_range("times", times)
    if times.shape[-1] < 2:
        raise ValueError(f"times: expected at least two, got {list(times.shape)}")
    grid = times.to(device=noise.device, dtype=torch.promote_types(times.dtype, torch.float32))
    num_steps = grid.shape[-1] - 1
    wanted = set(range(num_steps - 1) if window is None else window)
    if wanted - set(range(num_steps)):
        raise ValueError(f"window: expected steps 0 to {num_steps - 1}, got {sorted(wanted)}")
    stored = noise.dtype if storage_dtype is None else storage_dtype
    noisy, steps = noise.to(stored), []
    for index, (t, t_next) in enumerate(pairwise(grid.expand(num, -1).t().contiguous())):
        state = noisy.to(noise.dtype)
        output = velocity(state, t)
        if index not in wanted:
            noisy = euler_step(state, output, t, t_next, layout=layout).to(stored)
            continue
        mean, std = sde_kernel(state, output, t, t_next, eta, kind, at_one=at_one, layout=layout)
        fresh = step_noise(index)
        check_same_shape("step_noise(index)", fresh, "noise", noise)
        following = (mean + std * fresh).to(stored)
        log_prob = gaussian_log_prob(following.to(noise.dtype), mean, std, reduction, layout=layout)
        steps.append(
            StochasticStep(
                index=index,
                noisy=noisy,
                next_noisy=following,
                t=t,
                t_next=t_next,
                log_prob=log_prob,
                eta=eta,
                kind=kind,
                at_one=at_one,
                reduction=reduction,
                dtype=noise.dtype,
            )
        )
        noisy = following
    return noisy.to(noise.dtype), steps


def replay_step(
    velocity: Velocity, step: StochasticStep, *, mask: Tensor | None = None, layout: Layout | None = None
) -> Replay:
    """Score a stored step under a model, with gradients: ``replay.log_prob - step.log_prob`` is the log-ratio.

    Args:
        velocity: the model, called with the stored state and ``t [b]``.
        step: from :func:`sample_sde`.
        mask: bool, true where a sample (``[b]``) or an element counts.
        layout: the layout of packed latents, the rollout's.

    Returns:
        The log-probability, and mean and std for :func:`lensmini.sampling.gaussian_kl` against another model's mean.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> noise, times = torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0])
        >>> _, (step,) = sample_sde(lambda x, t: x, noise, times, lambda step: noise, eta=0.5)
        >>> replay_step(lambda x, t: x + 0.1, step).log_prob - step.log_prob
        tensor([-0.4400])
    """
    state, following = step.noisy.to(step.dtype), step.next_noisy.to(step.dtype)
    output = velocity(state, step.t)
    mean, std = sde_kernel(state, output, step.t, step.t_next, step.eta, step.kind, at_one=step.at_one, layout=layout)
    log_prob = gaussian_log_prob(following, mean, std, step.reduction, mask=mask, layout=layout)
    return Replay(log_prob, mean, std)
