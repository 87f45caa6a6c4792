"""Tangents of continuous consistency training in TrigFlow: sCM and rCM, with all that differs in sight.

Axes: b samples, N image tokens of a packed batch, c channels. With ``f = cos(a) x - sin(a) F`` and the trajectory
``dx/da = F_teacher``, the student's target is its own detached output plus a tangent,

    ``loss = mean |F - sg(F + g)|^2``  (:func:`lensmini.objectives.velocity_gap` of ``F`` and ``F + g``),

where g is ``cos(a) df/da``, warmed up and normalised: zero exactly at the consistency function, and the loss's gradient is
``-2 g dF/dtheta / D``. On the straight path the same is :func:`lensmini.objectives.consistency.mean_velocity_target` at r = 0.

| | sCM (arXiv 2410.11081) | rCM (arXiv 2510.08431) |
| --- | --- | --- |
| weight of ``F - F_teacher`` | ``cos^2`` | ``cos sqrt(1 - r^2 sin^2)``: ``cos`` at the start, ``cos^2`` at r = 1 |
| normalisation | RMS (or L2) + 0.1 | L2 + 0.1 |
| warm-up | 10,000 steps | 1,000 steps, none for its largest model |
| at r = 0 | regression on the teacher | regression on the teacher |
"""

from typing import Literal

import torch  # noqa: F401  # for the examples
from torch import Tensor

from lensmini.objectives.consistency.trigflow import expand_angle
from lensmini.packed import Layout
from lensmini.reduction import align_samples, hide, reduce_samples

__all__ = ["normalise_tangent", "tangent_warmup", "trigflow_direction", "trigflow_tangent"]


def trigflow_direction(teacher: Tensor, angle: Tensor, *, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
    """Along what the student is differentiated: ``cos(a) sin(a) (F_teacher, 1)`` in (state, angle).

    The factor is part of the direction so that the derivative stays small at both ends (arXiv 2410.11081 section 4.2).

    Args:
        teacher: ``[b, ...]``, or ``[N, c]`` with ``layout``; ``F_teacher = dx/da`` of the teacher, guided if wanted.
        angle: ``[b]``, in [0, pi/2].
        layout: the layout of packed latents.

    Returns:
        The tangent of the state in the shape and dtype of ``teacher``, and that of the angle ``[b]`` in its dtype.

    Raises:
        ValueError: if shapes differ or (on the CPU) an angle leaves [0, pi/2].

    Example:
        >>> trigflow_direction(torch.ones(1, 1), torch.tensor([torch.pi / 4]))
        (tensor([[0.5000]]), tensor([0.5000]))
    """
    cos, sin = expand_angle(angle, teacher, layout=layout)
    return (cos * sin * teacher).to(teacher.dtype), angle.cos() * angle.sin()


def trigflow_tangent(
    prediction: Tensor,
    teacher: Tensor,
    noisy: Tensor,
    derivative: Tensor,
    angle: Tensor,
    *,
    warmup: float = 1.0,
    variant: Literal["scm", "rcm"] = "scm",
    scale_derivative: bool = True,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """How the student's F should change for f to stay constant along the teacher's trajectory.

    With ``J = cos sin dF/da`` and r the warm-up,

    - ``"scm"``: ``g = -cos^2 (F - F_teacher) - r (cos sin x + J)``;
    - ``"rcm"``: ``g = -cos sqrt(1 - r^2 sin^2) (F - F_teacher) - r (cos sin x + J)``.

    At r = 1 both are ``cos df/da``.

    Args:
        prediction: ``[b, ...]``, or ``[N, c]`` with ``layout``; the student's F. All inputs are detached.
        teacher: the shape of ``prediction``; the teacher's F.
        noisy: the shape of ``prediction``; TrigFlow's state x.
        derivative: the shape of ``prediction``; J, the student's derivative along :func:`trigflow_direction`.
        angle: ``[b]``, in [0, pi/2].
        warmup: r in [0, 1], from :func:`tangent_warmup`.
        variant: whose weight.
        scale_derivative: whether r multiplies J, as it does in both published codes. False leaves J at full strength from
            the first step.
        mask: bool, true where a sample (``[b]``) or an element counts; the rest gets 0. rCM masks samples whose derivative
            is not finite.
        layout: the layout of packed latents.

    Returns:
        g, the shape of ``prediction``, float32 at least; no gradient.

    Raises:
        ValueError: if shapes differ, ``variant`` is unknown, ``warmup`` leaves [0, 1] or (on the CPU) an angle leaves
            [0, pi/2].

    Example:
        >>> one, angle = torch.ones(1, 1), torch.tensor([torch.pi / 4])
        >>> [trigflow_tangent(one, 3 * one, one, one, angle, warmup=0.5, variant=v).item() for v in ("scm", "rcm")]
        [0.25, 0.5729]
    """
    if variant not in ("scm", "rcm"):
        raise ValueError(f"variant: expected 'scm' or 'rcm', got {variant!r}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup: expected a number in [0, 1], got {warmup}")
    (mine, goal, state, slope), counts = align_samples(
        mask,
        layout,
        prediction=prediction.detach(),
        teacher=teacher.detach(),
        noisy=noisy.detach(),
        derivative=derivative.detach(),
    )
    cos, sin = (factor.to(mine.dtype) for factor in expand_angle(angle, prediction, layout=layout))
    pull = cos.square() if variant == "scm" else cos * (1 - warmup**2 * sin.square()).sqrt()
    rest = warmup * cos * sin * state + (warmup if scale_derivative else 1.0) * slope
    return hide(-pull * (mine - goal) - rest, counts)


def normalise_tangent(
    tangent: Tensor,
    c: float = 0.1,
    reduction: Literal["rms", "l2"] = "rms",
    *,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Bound each sample's tangent: ``g / (|g| + c)`` (arXiv 2410.11081 section 4.2).

    ``|g|`` is the root of the mean square, the same for every resolution, or the length of the whole sample (rCM), which
    makes every element of a larger image's tangent smaller. Use the sum of squares as the loss with the second.

    Args:
        tangent: ``[b, ...]``, or ``[N, c]`` with ``layout``. Detached.
        c: positive; far below it the tangent is only scaled.
        reduction: ``"rms"`` or ``"l2"``.
        mask: bool, true where a sample (``[b]``) or an element counts; the rest gets 0.
        layout: the layout of packed latents.

    Returns:
        The shape of ``tangent``, float32 at least; no gradient.

    Raises:
        ValueError: if ``reduction`` is unknown or ``c`` is not positive.

    Example:
        >>> normalise_tangent(torch.tensor([[3.0, 4.0]]), c=5.0, reduction="l2")
        tensor([[0.3000, 0.4000]])
    """
    if reduction not in ("rms", "l2"):
        raise ValueError(f"reduction: expected 'rms' or 'l2', got {reduction!r}")
    if not 0 < c < float("inf"):
        raise ValueError(f"c: expected a positive number, got {c}")
    (values,), counts = align_samples(mask, layout, tangent=tangent.detach())
    how = "mean" if reduction == "rms" else "sum"
    size = reduce_samples(values.square(), how, mask=counts, layout=layout).sqrt()
    rows = size if layout is None else layout.expand(size)
    return values / (rows.reshape(rows.shape[0], *[1] * (values.ndim - 1)) + c)


def tangent_warmup(step: int, num_steps: int = 10_000) -> float:
    """The warm-up r of the unstable part of a tangent: ``min(1, step / num_steps)`` (arXiv 2410.11081 section 4.2).

    Args:
        step: number of the training step, from 0.
        num_steps: 10,000 in sCM, 1,000 in rCM; 0 for none.

    Returns:
        r in [0, 1].

    Raises:
        ValueError: if a number is negative.

    Example:
        >>> tangent_warmup(250, 1000)
        0.25
    """
    if step < 0 or num_steps < 0:
        raise ValueError(f"step, num_steps: expected numbers that are not negative, got {step} and {num_steps}")
    return min(1.0, step / num_steps) if num_steps else 1.0
