"""Discrete consistency distillation: one solver step of the teacher, and two predictions that should agree.

Axes: b samples, N image tokens of a packed batch, c channels. One training step is

    ``noisy`` at t -> :func:`teacher_step` -> state at t_next -> :func:`consistency_target` of the average -> target
    ``clean_prediction(noisy, student(noisy, t), t)`` -> :func:`consistency_loss` against it

A model is any callable ``velocity(latents, t)``, closed over its condition; guidance is the teacher callable's matter.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, expand_time
from lensmini.reduction import align_samples, known_values, reduce_samples

__all__ = ["consistency_loss", "consistency_target", "teacher_step"]

Velocity = Callable[[Tensor, Tensor], Tensor]


def consistency_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    metric: Literal["pseudo_huber", "pseudo_huber_norm", "squared"] = "pseudo_huber",
    c: float = 1e-3,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Distance of two clean predictions from one trajectory (arXiv 2303.01469 eq. 7; arXiv 2310.04378).

    With ``e = prediction - target`` and D elements in a sample:

    - ``"squared"``: ``mean e^2``;
    - ``"pseudo_huber"``: ``mean (sqrt(e^2 + c^2) - c)``, element by element as in the code of LCM (c = 0.001);
    - ``"pseudo_huber_norm"``: ``sqrt(|e|^2 + D c^2) - sqrt(D) c``, of the whole sample as in iCT (arXiv 2310.14189
      section 3.3: 0.00054 sqrt(D), so c = 0.00054 here). It grows with sqrt(D): divide by that among mixed resolutions.

    Both are ``e^2 / 2c`` near zero and ``|e|`` far away, and are computed without the cancellation of their formula.

    Args:
        prediction: ``[b, ...]``, or ``[N, c]`` with ``layout``; the student's, best kept in float32.
        target: the shape of ``prediction``; from :func:`consistency_target`. Detached.
        metric: see above.
        c: where the pseudo-Huber distance turns from square to absolute, per element; positive.
        weight: ``[b]``, for example ``1 / (t - t_next)`` (iCT); none is 1. Detached.
        mask: bool, true where a sample (``[b]``) or an element counts; hidden ones may hold anything.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ, ``metric`` is unknown or ``c`` is not positive.

    Example:
        >>> consistency_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]]), c=4.0)
        tensor([0.5000])
    """
    if metric not in ("pseudo_huber", "pseudo_huber_norm", "squared"):
        raise ValueError(f"metric: expected 'pseudo_huber', 'pseudo_huber_norm' or 'squared', got {metric!r}")
    if not 0 < c < float("inf"):
        raise ValueError(f"c: expected a positive number, got {c}")
    (mine, goal), counts = align_samples(mask, layout, prediction=prediction, target=target.detach())
    squares = (mine - goal).square()
    if metric == "pseudo_huber_norm":
        ones = torch.ones_like(squares) if counts is None else counts.expand(squares.shape).to(squares.dtype)
        radius = c * reduce_samples(ones, "sum", layout=layout).clamp_min(1).sqrt()
        total = reduce_samples(squares, "sum", layout=layout)
        loss = total / ((total + radius.square()).sqrt() + radius)
    else:
        distance = squares if metric == "squared" else squares / ((squares + c**2).sqrt() + c)
        loss = reduce_samples(distance, "mean", mask=counts, layout=layout)
    return loss if weight is None else known_values("weight", weight.detach(), mask, mine, layout) * loss


def teacher_step(
    velocity: Velocity,
    noisy: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    solver: Literal["euler", "heun"] = "euler",
    layout: Layout | None = None,
) -> Tensor:
    """One step along the teacher's ODE, without gradient: where the target of a consistency loss is evaluated.

    ``x + (t_next - t) v(x, t)``, and for Heun the mean of that velocity and the one at the end of the step.

    Args:
        velocity: the teacher, called once or twice. For guided distillation, a guided velocity:
            ``lambda x, t: guide(cond(x, t), uncond(x, t), 4.0, channel_dim=1)``.
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at ``t``.
        t: ``[b]``, in [0, 1].
        t_next: ``[b]``, in [0, 1]; less than ``t``.
        solver: first or second order.
        layout: the layout of packed latents.

    Returns:
        The state at ``t_next``, float32 at least: with a short step, half of its bits would be lost in bfloat16.

    Raises:
        ValueError: if ``solver`` is unknown, shapes differ or (on the CPU) a time leaves [0, 1].

    Example:
        >>> teacher_step(lambda x, t: x, torch.ones(1, 1), torch.tensor([1.0]), torch.tensor([0.5]), solver="heun")
        tensor([[0.6250]])
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver: expected 'euler' or 'heun', got {solver!r}")
    with torch.no_grad():
        step = expand_time(t_next, noisy, layout=layout, name="t_next") - expand_time(t, noisy, layout=layout)
        first = velocity(noisy, t)
        check_same_shape("velocity", first, "noisy", noisy)
        there = noisy + step * first
        if solver == "euler":
            return there
        second = velocity(there.to(noisy.dtype), t_next)
        return noisy + step / 2 * (first.to(step.dtype) + second)


def consistency_target(velocity: Velocity, noisy: Tensor, t: Tensor, *, layout: Layout | None = None) -> Tensor:
    """The clean prediction of the network that sets the target, without gradient: ``x - t v(x, t)``.

    Args:
        velocity: the student's moving average (LCM), or the student itself (iCT).
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state after :func:`teacher_step`.
        t: ``[b]``, in [0, 1]; the time of that state. Where it is 0 the state is the target, bit for bit and whatever
            the network says there.
        layout: the layout of packed latents.

    Returns:
        The shape of ``noisy``, float32 at least; no gradient.

    Raises:
        ValueError: if shapes differ or (on the CPU) t leaves [0, 1].

    Example:
        >>> consistency_target(lambda x, t: 4 * x, torch.ones(1, 1), torch.tensor([0.5]))
        tensor([[-1.]])
    """
    with torch.no_grad():
        time = expand_time(t, noisy, layout=layout)
        output = velocity(noisy, t)
        check_same_shape("velocity", output, "noisy", noisy)
        return torch.where(time > 0, noisy - time * output, noisy.to(time.dtype))
