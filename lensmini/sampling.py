"""From noise to a sample: time grids, guidance and solvers of the probability-flow ODE ``dx/dt = velocity(x, t)``.

Axes: b samples, N image tokens of a packed batch, c channels, h and w latent height and width, k steps.

Time runs from 1 (noise) to 0 (clean). A model is any callable ``velocity(latents, t)``, closed over its condition,
with ``t [b]``. States are dense ``[b, ...]`` or packed ``[N, c]`` with ``layout=``, keep their dtype from step to
step and are never changed in place; arithmetic is float32 at least. Nothing here switches gradients off: sample
inside ``torch.no_grad()`` unless the gradient through the trajectory is wanted.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, check_time_range, clean_prediction, expand_time
from lensmini.shapes import check_shape

__all__ = [
    "Velocity",
    "dpm2",
    "empirical_mu",
    "euler_step",
    "guide",
    "heun_step",
    "initial_noise",
    "sample_ode",
    "time_grid",
]

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A model: ``velocity(latents, t)`` with ``t [b]``, the result in the shape of ``latents``."""


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """Shift of the sampling times by image size and number of steps: FLUX.2's empirical rule, as Lens uses it.

    One line in the number of tokens at 200 steps and another at 10, linear in the number of steps between and
    beyond; above 4300 tokens the 200-step line alone (the released Lens code).

    Args:
        num_tokens: image tokens of the sample (latent height times latent width), positive.
        num_steps: steps of the grid, positive.

    Returns:
        mu, for :func:`time_grid`.

    Raises:
        ValueError: if an argument is not positive.

    Example:
        >>> round(empirical_mu(4096, 20), 6), round(empirical_mu(8100, 4), 6)
        (2.198022, 1.827754)
    """
    for name, value in (("num_tokens", num_tokens), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)


def time_grid(
    num_steps: int,
    mu: float | Sequence[float] | Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times from 1 to 0, shifted towards noise: ``t = e^mu / (e^mu + 1/s - 1)`` for s = 1, ..., 1/k, and then 0.

    The exponential shift of arXiv 2403.03206 section 5.3.2 (there ``shift = e^mu``).

    Args:
        num_steps: number of steps k, positive.
        mu: the shift, usually :func:`empirical_mu`; none or 0 gives equal steps. b of them (a sequence or ``[b]``)
            give every sample its own grid, as mixed resolutions need.
        device: where to put the result, by default the CPU.

    Returns:
        ``[k + 1]``, or ``[b, k + 1]`` for several ``mu``; float32, strictly descending from exactly 1 to exactly 0.

    Raises:
        ValueError: if ``num_steps`` is not positive, or ``mu`` is not finite or has more than one axis.

    Example:
        >>> time_grid(4, empirical_mu(4096, 4))
        tensor([1.0000, 0.9674, 0.9081, 0.7672, 0.0000])
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected a positive integer, got {num_steps}")
    shifts = torch.as_tensor(0.0 if mu is None else mu, dtype=torch.float64, device="cpu")
    if shifts.ndim > 1 or not bool(shifts.isfinite().all()):
        raise ValueError(f"mu: expected one finite number or b of them, got {mu}")
    # In float64: float32 would lose digits in 1/s - 1, and the grid is rounded once, at the end.
    remaining = num_steps / torch.arange(num_steps, 0, -1, dtype=torch.float64) - 1
    scale = shifts.exp()[..., None]
    times = torch.nn.functional.pad(scale / (scale + remaining), (0, 1))
    return times.to(device=device, dtype=torch.float32)


def guide(cond: Tensor, uncond: Tensor, scale: float, *, channel_dim: int, rescale: bool = True) -> Tensor:
    """Classifier-free guidance that keeps each token's norm, as the released Lens pipeline combines its two halves.

    ``combined = uncond + scale * (cond - uncond)`` (arXiv 2207.12598), then every token's channel vector gets the
    length it has in ``cond``: ``combined * |cond| / max(|combined|, 1e-12)``; an exactly zero vector stays zero.

    Args:
        cond: any shape with a channel axis; the velocity under the condition.
        uncond: the shape of ``cond``; the velocity without it.
        scale: guidance scale, finite. 1 returns ``cond`` bit for bit, whatever ``uncond`` holds.
        channel_dim: the channel axis: 1 for ``[b, c, h, w]``, -1 for tokens ``[..., c]``.
        rescale: restore the norms; without it, the plain combination.

    Returns:
        The shape and dtype of ``cond``; never the tensor ``cond`` itself.

    Raises:
        ValueError: if the shapes differ, ``scale`` is not finite, or there is no such axis.

    Example:
        >>> guide(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]), 2.0, channel_dim=-1).norm()
        tensor(5.)
    """
    check_same_shape("uncond", uncond, "cond", cond)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not -cond.ndim <= channel_dim < cond.ndim:
        raise ValueError(f"channel_dim: expected an axis of cond {list(cond.shape)}, got {channel_dim}")
    if scale == 1:
        return cond.clone()
    dtype = torch.promote_types(torch.promote_types(cond.dtype, uncond.dtype), torch.float32)
    wanted, without = cond.to(dtype), uncond.to(dtype)
    combined = without + scale * (wanted - without)
    if rescale:
        norm = torch.linalg.vector_norm(combined, dim=channel_dim, keepdim=True)
        ratio = torch.linalg.vector_norm(wanted, dim=channel_dim, keepdim=True) / norm.clamp_min(1e-12)
        combined = combined * torch.where(norm > 0, ratio, 1.0)
    return combined.to(cond.dtype)


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
        >>> sample_ode(lambda x, t: torch.ones_like(x), torch.zeros(1, 2), time_grid(4), step="heun")
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


def initial_noise(
    seeds: Sequence[int],
    channels: int,
    grid: tuple[int, int] | Layout,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise from one seed per sample: a seed gives the same noise alone and in any batch.

    Drawn on the CPU in token order ``[h * w, c]``, the order of published seeds, and then arranged.

    Args:
        seeds: b seeds.
        channels: latent channels c.
        grid: latent height and width of every sample, for dense noise; or a layout, for packed noise.
        dtype: floating dtype to draw in. Another dtype is another draw; published seeds used the transformer's.
        device: where to put the result; by default the CPU, or the layout's device.

    Returns:
        ``[b, c, h, w]`` for a pair, ``[N, c]`` for a layout.

    Raises:
        ValueError: if there is no seed, a size is not positive, or the layout has another number of samples.

    Example:
        >>> noise = initial_noise([0, 1], 4, (2, 3))
        >>> noise.shape, bool((noise[1:] == initial_noise([1], 4, (2, 3))).all())
        (torch.Size([2, 4, 2, 3]), True)
    """
    lengths = grid.image_lengths if isinstance(grid, Layout) else (grid[0] * grid[1],) * len(seeds)
    if not seeds or len(seeds) != len(lengths):
        raise ValueError(f"seeds: expected one per sample ({len(lengths) or 'at least one'}), got {len(seeds)}")
    if channels < 1 or (not isinstance(grid, Layout) and min(grid) < 1):
        raise ValueError(f"channels and grid: expected positive sizes, got {channels} and {grid}")
    tokens = [
        torch.randn(length, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        for seed, length in zip(seeds, lengths, strict=True)
    ]
    if isinstance(grid, Layout):
        return torch.cat(tokens).to(grid.image_offsets.device if device is None else device)
    return rearrange(torch.stack(tokens), "b (h w) c -> b c h w", h=grid[0]).contiguous().to(device)
