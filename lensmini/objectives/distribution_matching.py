"""Distribution matching distillation: two scores say where a student's samples should move, and at which noise levels.

Axes: b samples, N image tokens of a packed batch, c channels.

Lens-Turbo's student (arXiv 2605.21573 D.2) follows two directions: distribution matching, from a fake score that is
trained on its own samples to the teacher's, and classifier-free guidance augmentation, from the teacher without text to
the teacher with it. Both are differences of clean predictions at a re-noised student sample, constants for the gradient.
In these scores ``clean_fake - clean_real = t^2 / (1 - t) * (score_fake - score_real)``: bounded where the scores are not,
and 0 at t = 0.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, check_time_range
from lensmini.reduction import Reduction, align_samples, hide, holds, reduce_samples
from lensmini.shapes import check_shape

__all__ = [
    "Divergence",
    "NoiseLevels",
    "Normaliser",
    "Schedule",
    "cfg_augmentation_direction",
    "directional_loss",
    "divergence_weight",
    "dmd_direction",
    "noise_levels",
]

Normaliser = Literal["mean_abs", "none"]
"""What a direction is divided by: each sample's mean ``|x - clean_real|``, or nothing."""
Schedule = Literal["shared", "decoupled", "hybrid"]
"""Which noise levels the two directions are taken at."""
Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "hellinger", "neyman"]
"""Which f-divergence a weighted direction descends."""


class NoiseLevels(NamedTuple):
    """Where a student's sample is re-noised to, for each of the two directions."""

    matching: Tensor
    """``[b]``: for :func:`dmd_direction`, and for the discriminator."""
    augmentation: Tensor
    """``[b]``: for :func:`cfg_augmentation_direction`."""


def noise_levels(
    t: Tensor, uniforms: Tensor, schedule: Schedule = "hybrid", *, low: float = 0.0, high: float = 1.0
) -> NoiseLevels:
    """Noise levels of distribution matching and of guidance augmentation (Decoupled-DMD's schedules).

    - ``"shared"``: one level for both, U(low, high), as in DMD2 (arXiv 2405.14867).
    - ``"decoupled"``: one for each, U(low, high).
    - ``"hybrid"``: U(low, high) for matching, and U(low, t) for augmentation: only levels cleaner than the student's step.
      The best that Decoupled-DMD reports; there time runs the other way and the second law reads U(t, 1).

    Lens does not say which it used.

    Args:
        t: ``[b]``, in [0, 1]: the time of the student's step.
        uniforms: ``[b, 2]``, in [0, 1]: for matching and for augmentation (``"shared"`` reads the first). Their law is the
            levels' law, stretched.
        schedule: which of the three.
        low: lowest level; DMD2 keeps 0.02 from both ends.
        high: highest level. Where ``t`` is below ``low``, augmentation is at ``t``.

    Returns:
        The levels, float32 at least; no gradient.

    Raises:
        ValueError: if shapes differ, ``schedule`` is unknown, not ``0 <= low <= high <= 1``, or (on the CPU) a number
            leaves [0, 1].

    Example:
        >>> t, uniforms = torch.tensor([0.5, 1.0]), torch.tensor([[0.2, 0.5], [0.8, 0.5]])
        >>> noise_levels(t, uniforms).augmentation
        tensor([0.2500, 0.5000])
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule: expected one of {get_args(Schedule)}, got {schedule!r}")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low and high: expected 0 <= low <= high <= 1, got {low} and {high}")
    num = check_shape("t", t, "b")["b"]
    check_shape("uniforms", uniforms, "b 2", b=num)
    check_time_range("t", t)
    check_time_range("uniforms", uniforms)
    dtype = torch.promote_types(torch.promote_types(t.dtype, uniforms.dtype), torch.float32)
    time, (first, second) = t.detach().to(dtype), uniforms.detach().to(dtype).unbind(1)
    matching = low + (high - low) * first
    if schedule == "shared":
        return NoiseLevels(matching, matching.clone())
    if schedule == "decoupled":
        return NoiseLevels(matching, low + (high - low) * second)
    top = time.clamp_max(high)
    bottom = top.clamp_max(low)
    return NoiseLevels(matching, bottom + (top - bottom) * second)


def dmd_direction(
    clean_fake: Tensor,
    clean_real: Tensor,
    *,
    x: Tensor,
    normaliser: Normaliser = "mean_abs",
    floor: float,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """What to subtract from a student's samples to come closer to the teacher's distribution.

    ``(clean_fake - clean_real) / max(mean |x - clean_real|, floor)``, per sample (DMD2, arXiv 2405.14867; arXiv 2311.18828
    eq. 7-8). Without the normaliser, times ``(1 - t)^2 / t^2``, its mean over samples through :func:`directional_loss` is
    the gradient of ``KL(student || teacher)`` of the noised distributions. Published floors differ: none in DMD2 and rCM,
    1e-6 in FastGen, 0.1 in CDM (arXiv 2605.06376).

    Args:
        clean_fake: ``[b, ...]``, or ``[N, c]`` with ``layout``; the fake score's clean prediction at a re-noised ``x``.
        clean_real: the shape of ``clean_fake``; the teacher's, at the same noisy sample.
        x: the shape of ``clean_fake``; the student's clean samples.
        normaliser: ``"mean_abs"`` or ``"none"``.
        floor: least divisor, positive; not read without a normaliser.
        mask: bool, true where a sample (``[b]``) or an element counts; hidden ones may hold anything and get 0.
        layout: the layout of packed latents.

    Returns:
        The shape of ``clean_fake``, float32 at least; no gradient.

    Raises:
        ValueError: if shapes differ, an option is out of range, or (on the CPU) a direction that is not masked is not
            finite: a broken network must not look like one that agrees.

    Example:
        >>> fake, real, x = torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2)
        >>> dmd_direction(fake, real, x=x, floor=1e-6), dmd_direction(fake, real, x=x, normaliser="none", floor=1e-6)
        (tensor([[2., 1.]]), tensor([[2., 1.]]))
    """
    (fake, real), counts = align_samples(mask, layout, clean_fake=clean_fake, clean_real=clean_real)
    return _normalised("dmd_direction", fake - real, real, x, normaliser, floor, counts, layout)


def cfg_augmentation_direction(
    clean_cond: Tensor,
    clean_uncond: Tensor,
    scale: float,
    *,
    x: Tensor | None = None,
    normaliser: Normaliser = "none",
    floor: float = 1e-6,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """The part of a guided teacher's direction that guidance adds, ``-(scale - 1) (clean_cond - clean_uncond)``.

    With ``guided = uncond + scale (cond - uncond)``, exactly ``fake - guided = (fake - cond) - (scale - 1) (cond - uncond)``
    (Decoupled-DMD): matching, and this "CFG augmentation" (CA), which may be taken at another noise level. Scale 1 gives
    zero. With a normaliser it is divided like :func:`dmd_direction`, so that the two still add up when they share a level;
    Lens does not say whether its CA term is normalised.

    Args:
        clean_cond: ``[b, ...]``, or ``[N, c]`` with ``layout``; the teacher's clean prediction with text.
        clean_uncond: the shape of ``clean_cond``; without text, at the same noisy sample.
        scale: of the guidance; 5 in Lens.
        x: the shape of ``clean_cond``; the student's clean samples, for a normaliser.
        normaliser: ``"mean_abs"`` or ``"none"``.
        floor: least divisor, positive.
        mask: bool, true where a sample (``[b]``) or an element counts; hidden ones may hold anything and get 0.
        layout: the layout of packed latents.

    Returns:
        The shape of ``clean_cond``, float32 at least; no gradient.

    Raises:
        ValueError: as for :func:`dmd_direction`, or if there is a normaliser and no ``x``.

    Example:
        >>> cfg_augmentation_direction(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 5.0)
        tensor([[-4.]])
    """
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if normaliser != "none" and x is None:
        raise ValueError(f"x: expected the student's samples with normaliser={normaliser!r}, got None")
    (cond, uncond), counts = align_samples(mask, layout, clean_cond=clean_cond, clean_uncond=clean_uncond)
    samples = clean_cond if x is None else x
    added = -(scale - 1) * (cond - uncond)
    return _normalised("cfg_augmentation_direction", added, cond, samples, normaliser, floor, counts, layout)


def directional_loss(
    x: Tensor,
    direction: Tensor,
    *,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """A loss whose gradient in ``x`` is ``direction``: ``0.5 |x - sg(x - direction)|^2`` (arXiv 2405.14867).

    Its value, half the direction's mean square, says how far the scores disagree and is no measure of quality.

    Args:
        x: ``[b, ...]``, or ``[N, c]`` with ``layout``; the student's samples, with gradient.
        direction: the shape of ``x``. Detached.
        reduction: ``"mean"`` over each sample's elements, so that resolution is no weight, or ``"sum"``.
        mask: bool, true where a sample (``[b]``) or an element counts; hidden ones may hold anything.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ or ``reduction`` is unknown.

    Example:
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> directional_loss(x, torch.tensor([[2.0, 4.0]])).sum().backward()
        >>> x.grad
        tensor([[1., 2.]])
    """
    (samples, wanted), counts = align_samples(mask, layout, x=x, direction=direction.detach())
    # x - sg(x - d) with nothing to round: the first two terms are exactly zero.
    moved = samples - samples.detach() + wanted
    return reduce_samples(0.5 * moved.square(), reduction, mask=counts, layout=layout)


def divergence_weight(log_ratio: Tensor, divergence: Divergence = "reverse_kl") -> Tensor:
    """Weight of each sample's direction that makes matching descend another f-divergence (arXiv 2502.15681).

    ``f''(r) r^2`` of ``r = teacher / student`` and ``D = E_student f(r)``: 1 for ``reverse_kl`` (plain DMD), r for
    ``forward_kl``, r / (2 (1 + r)) for ``jensen_shannon``, 1 + r for ``jeffreys``, sqrt(r) / 2 for ``hellinger``
    (``(1 - sqrt r)^2``), 2 / r for ``neyman``. A trained discriminator's logit is log r (:mod:`adversarial
    <lensmini.objectives.adversarial>`).

    Args:
        log_ratio: any shape; log r. Detached.
        divergence: which.

    Returns:
        The shape of ``log_ratio``, float32 at least; no gradient.

    Raises:
        ValueError: if ``divergence`` is unknown or the ratio is not floating point.

    Example:
        >>> divergence_weight(torch.tensor([0.0, 1.0]), "forward_kl")
        tensor([1.0000, 2.7183])
    """
    if not log_ratio.is_floating_point():
        raise ValueError(f"log_ratio: expected floating point, got {log_ratio.dtype}")
    value = log_ratio.detach().to(torch.promote_types(log_ratio.dtype, torch.float32))
    if divergence == "reverse_kl":
        return torch.ones_like(value)
    if divergence == "forward_kl":
        return value.exp()
    if divergence == "jensen_shannon":
        return value.sigmoid() / 2
    if divergence == "jeffreys":
        return 1 + value.exp()
    if divergence == "hellinger":
        return (value / 2).exp() / 2
    if divergence == "neyman":
        return 2 * (-value).exp()
    raise ValueError(f"divergence: expected one of {get_args(Divergence)}, got {divergence!r}")


def _normalised(
    function: str,
    direction: Tensor,
    clean_real: Tensor,
    x: Tensor,
    normaliser: str,
    floor: float,
    counts: Tensor | None,
    layout: Layout | None,
) -> Tensor:
    if normaliser not in get_args(Normaliser):
        raise ValueError(f"normaliser: expected one of {get_args(Normaliser)}, got {normaliser!r}")
    if not 0 < floor < float("inf"):
        raise ValueError(f"floor: expected a positive number, got {floor}")
    check_same_shape("x", x, "clean_real", clean_real)
    direction = direction.detach()
    if normaliser == "mean_abs":
        apart = hide(x.detach().to(direction.dtype), counts) - clean_real.detach()
        size = reduce_samples(apart.abs(), "mean", mask=counts, layout=layout).clamp_min(floor)
        rows = size if layout is None else layout.expand(size)
        direction = direction / rows.reshape(-1, *[1] * (direction.ndim - 1))
    if direction.device.type == "cpu" and not holds(direction.isfinite()):
        raise ValueError(f"{function}: expected finite predictions where the mask is true: a network has diverged")
    return direction
