"""The adversarial half of distillation: softplus losses, and a gradient penalty from finite differences.

Axes: b samples. A logit is positive where the discriminator thinks a sample real.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lensmini.reduction import holds, per_sample
from lensmini.shapes import check_shape

__all__ = ["approximate_r1", "discriminator_loss", "generator_loss"]


def generator_loss(fake_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The student's loss ``softplus(-d(fake)) = log(1 + exp(-d))`` (non-saturating, arXiv 1406.2661; Lens, D.2).

    Under the best discriminator, ``d = log p_real - log p_fake``, its gradient is that of distribution matching weighted
    by ``sigmoid(-d)``: half the gradient of the KL where the two distributions are close.

    Args:
        fake_logits: ``[b]``: of the student's samples, differentiable with respect to them.
        mask: ``[b]`` bool, true where the sample counts; the rest may hold anything.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ, or (on the CPU) a logit that is not masked is NaN.

    Example:
        >>> generator_loss(torch.tensor([0.0, 2.0]))
        tensor([0.6931, 0.1269])
    """
    ((fake,), seen) = _logits(mask, fake_logits=fake_logits)
    return _shown(F.softplus(-fake), seen)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The discriminator's loss ``softplus(-d(real)) + softplus(d(fake))`` (Lens, arXiv 2605.21573 D.2).

    Its minimiser is ``d = log p_real - log p_fake``. Noise real and fake samples to the same level, or it sees the level.

    Args:
        real_logits: ``[b]``.
        fake_logits: ``[b]``; hand in logits of detached samples.
        mask: ``[b]`` bool, true where the pair counts.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ, or (on the CPU) a logit that is not masked is NaN.

    Example:
        >>> discriminator_loss(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.3863])
    """
    (real, fake), seen = _logits(mask, real_logits=real_logits, fake_logits=fake_logits)
    return _shown(F.softplus(-real) + F.softplus(fake), seen)


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """R1 without a second derivative: ``(d(x) - d(x + alpha e))^2``, e standard normal (APT, arXiv 2501.08316).

    Multiply by ``gamma / 2``; Lens has gamma 1 and alpha 0.1 and perturbs the noised real sample. In expectation it is
    ``alpha^2 |w|^2`` for a linear d with gradient w, and ``alpha^2 |g|^2 + alpha^4 (tr(H)^2 + 2 |H|^2) / 4`` for a quadratic
    one: at alpha 0.1 the second term also holds curvature down.

    Args:
        real_logits: ``[b]``.
        perturbed_logits: ``[b]``: of the same samples, plus noise.
        mask: ``[b]`` bool, true where the sample counts.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ, or (on the CPU) a logit that is not masked is NaN.

    Example:
        >>> approximate_r1(torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([0.2500])
    """
    (real, perturbed), seen = _logits(mask, real_logits=real_logits, perturbed_logits=perturbed_logits)
    return _shown((real - perturbed).square(), seen)


def _logits(mask: Tensor | None, **logits: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The logits in one dtype, 0 where masked; and the mask."""
    (name, first), *rest = logits.items()
    num, dtype = check_shape(name, first, "b")["b"], torch.float32
    for _, other in rest:
        dtype = torch.promote_types(dtype, other.dtype) if other.is_floating_point() else dtype
    dtype = torch.promote_types(dtype, first.dtype) if first.is_floating_point() else dtype
    if mask is not None:
        check_shape("mask", mask, "b", b=num)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected bool (true = counts), got {mask.dtype}")
    values = []
    for name, value in logits.items():
        value = per_sample(name, value, num, dtype)
        value = value if mask is None else torch.where(mask, value, 0.0)
        if value.device.type == "cpu" and not holds(~value.isnan()):
            raise ValueError(
                f"{name}: expected numbers where the mask is true, got NaN: the discriminator has diverged"
            )
        values.append(value)
    return values, mask


def _shown(losses: Tensor, mask: Tensor | None) -> Tensor:
    return losses if mask is None else torch.where(mask, losses, 0.0)
