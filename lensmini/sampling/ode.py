"""Solvers of the probability-flow ODE ``dx/dt = velocity(x, t)``.

Axes: b samples, N image tokens of a packed batch, c channels, k steps.

A model is any callable ``velocity(latents, t)``, closed over its condition, with ``t [b]``. States are dense
``[b, ...]`` or packed ``[N, c]`` with ``layout=``, keep their dtype from step to step and are never changed in place;
arithmetic is float32 at least. Nothing here switches gradients off: sample inside ``torch.no_grad()`` unless the
gradient through the trajectory is wanted.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, check_time_range, clean_prediction, expand_time
from lensmini.shapes import check_shape

__all__ = ["Velocity", "dpm2", "euler_step", "heun_step", "sample_ode"]

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A model: ``velocity(latents, t)`` with ``t [b]``, the result in the shape of ``latents``."""


def euler_step(noisy: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, *, layout: Layout | None = None) -> Tensor:
    """One explicit Euler step, ``noisy + (t_next - t) * velocity``: first order.

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at ``t``.
        velocity: the shape of ``noisy``; the model's output at ``t``.
        t: ``[b]``, in [0, 1].
        t_next: ``[b]``, in [0, 1]; less than ``t`` when sampling.
        layout: the layout of packed latents.

    Returns:
        The state at ``t_next``, in the shape and dtype of ``noisy``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) a time leaves [0, 1].

    Example:
        >>> euler_step(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1.0]), torch.tensor([0.75]))
        tensor([[0.7500, 0.7500]])
    """
    check_same_shape("velocity", velocity, "noisy", noisy)
    here, there = expand_time(t, noisy, layout=layout), expand_time(t_next, noisy, layout=layout, name="t_next")
    return (noisy + (there - here) * velocity).to(noisy.dtype)


def heun_step(velocity: Velocity, noisy: Tensor, t: Tensor, t_next: Tensor, *, layout: Layout | None = None) -> Tensor:
    """One step of Heun's method, two evaluations of the model: second order.

    Euler to ``t_next``, then again from ``t`` with the mean velocity of both ends (arXiv 2206.00364 algorithm 1).

    Args:
        velocity: the model.
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at ``t``.
        t: ``[b]``, in [0, 1].
        t_next: ``[b]``, in [0, 1].
        layout: the layout of packed latents.

    Returns:
        The state at ``t_next``, in the shape and dtype of ``noisy``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) a time leaves [0, 1].

    Example:
        >>> heun_step(lambda x, t: x, torch.ones(1, 1), torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([[0.6250]])
    """
    first = velocity(noisy, t)
    second = velocity(euler_step(noisy, first, t, t_next, layout=layout), t_next)
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return euler_step(noisy, (first.to(dtype) + second.to(dtype)) / 2, t, t_next, layout=layout)


def dpm2(
    noisy: Tensor,
    velocity: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    previous: tuple[Tensor, Tensor] | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """One step of DPM-Solver++(2M), one evaluation of the model per step: second order.

    The multistep midpoint solver of arXiv 2211.01095 (algorithm 2, without thresholding), which DiffusionNFT's code
    calls ``dpm2``. Written for the straight path (alpha = 1 - t, sigma = t) it is an Euler step plus a correction
    from the clean predictions x0 of this and of the previous step:

        ``x + (t' - t) v + (1 - t'/t) * h / (2 h_previous) * (x0 - x0_previous)``

    with h the step in ``log((1 - t) / t)``. The correction is dropped, which leaves Euler, on the first step and
    wherever a logarithm is infinite: on the last step (``t' = 0``) and right after a step from t = 1. Grids that
    reach those ends have error h^2 log(1/h).

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at ``t``.
        velocity: the shape of ``noisy``; the model's output at ``t``.
        t: ``[b]``, in [0, 1].
        t_next: ``[b]``, in [0, 1].
        previous: clean prediction (the shape of ``noisy``) and time ``[b]`` of the step before, none at the start.
        layout: the layout of packed latents.

    Returns:
        The state at ``t_next``, in the shape and dtype of ``noisy``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) a time leaves [0, 1].

    Example:
        >>> t, t_next = torch.tensor([0.5]), torch.tensor([0.25])
        >>> dpm2(torch.ones(1, 1), torch.ones(1, 1), t, t_next, previous=(torch.zeros(1, 1), torch.tensor([0.75])))
        tensor([[0.8750]])
    """
    if previous is None:
        return euler_step(noisy, velocity, t, t_next, layout=layout)
    clean_previous, t_previous = previous
    check_same_shape("velocity", velocity, "noisy", noisy)
    check_same_shape("previous[0]", clean_previous, "noisy", noisy)
    here, there = expand_time(t, noisy, layout=layout), expand_time(t_next, noisy, layout=layout, name="t_next")
    before = expand_time(t_previous, noisy, layout=layout, name="previous[1]")
    ratio = (there.logit() - here.logit()) / (here.logit() - before.logit())
    weight = (1 - there / here) * ratio / 2
    correction = torch.where(weight.isfinite(), weight, 0.0) * (noisy - here * velocity - clean_previous)
    return (noisy + (there - here) * velocity + correction).to(noisy.dtype)


def sample_ode(
    velocity: Velocity,
    noise: Tensor,
    times: Tensor,
    *,
    step: Literal["euler", "heun", "dpm2"] = "euler",
    layout: Layout | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Walk the ODE along a grid of times, from the state at the first to the state at the last.

    Args:
        velocity: the model, called with ``t [b]`` in float32 (float64 if ``times`` is).
        noise: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at the first time.
        times: ``[k + 1]`` for all samples, or ``[b, k + 1]``; in [0, 1], any direction. Usually :func:`time_grid`.
        step: the solver; ``"heun"`` evaluates the model twice a step, the others once.
        layout: the layout of packed latents.
        callback: called after each step with its index and the new state.

    Returns:
        The state at the last time, in the shape and dtype of ``noise`` (to which every step is rounded).

    Raises:
        ValueError: if ``step`` is unknown, shapes differ, a tensor is not floating point, there are fewer than two
            times, or (on the CPU) one leaves [0, 1].

    Example:
        >>> sample_ode(lambda x, t: torch.ones_like(x), torch.zeros(1, 2), torch.tensor([1.0, 0.5, 0.0]), step="heun")
        tensor([[-1., -1.]])
    """
    if step not in ("euler", "heun", "dpm2"):
        raise ValueError(f"step: expected 'euler', 'heun' or 'dpm2', got {step!r}")
    num = check_shape("noise", noise, "b ...")["b"] if layout is None else layout.batch_size
    check_shape("times", times, "k" if times.ndim == 1 else "b k", b=num)
    if times.shape[-1] < 2:
        raise ValueError(f"times: expected at least two, got {list(times.shape)}")
    check_time_range("times", times)
    grid = times.to(device=noise.device, dtype=torch.promote_types(times.dtype, torch.float32))
    noisy, previous = noise, None
    for index, (t, t_next) in enumerate(pairwise(grid.expand(num, -1).t().contiguous())):
        if step == "euler":
            noisy = euler_step(noisy, velocity(noisy, t), t, t_next, layout=layout)
        elif step == "heun":
            noisy = heun_step(velocity, noisy, t, t_next, layout=layout)
        else:
            output = velocity(noisy, t)
            clean = clean_prediction(noisy, output, t, layout=layout)
            noisy = dpm2(noisy, output, t, t_next, previous=previous, layout=layout)
            previous = clean, t
        if callback is not None:
            callback(index, noisy)
    return noisy
