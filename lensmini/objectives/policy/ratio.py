"""The clipped surrogate of PPO and GRPO, and a log-ratio that is centred whatever the noise level.

Axes: b samples.
"""

import math

import torch
from torch import Tensor

from lensmini.reduction import holds, per_sample
from lensmini.shapes import check_shape

__all__ = ["clipped_surrogate", "guarded_log_ratio"]


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, *, mask: Tensor | None = None
) -> Tensor:
    """PPO's pessimistic loss: ``max(-A rho, -A clip(rho, 1 - low, 1 + high))``, rho the ratio (arXiv 1707.06347 eq. 7).

    The gradient is zero exactly where ``A > 0`` and ``rho > 1 + high``, or ``A < 0`` and ``rho < 1 - low``. Compared in
    logarithms, so that clips of 1e-5 are resolved in float32. Assert in your loop that ``log_ratio`` is exactly 0 before
    the first update.

    Args:
        log_ratio: ``[b]``: log-probability under the policy minus that under the policy that sampled.
        advantage: ``[b]``. Detached.
        clip_low: in [0, 1].
        clip_high: at least 0. Published, both: 0.2 for true ratios of language models; 1e-4 (Flow-GRPO), 1e-5 (AWM) for
            mean-reduced ones.
        mask: ``[b]`` bool, true where the sample counts; the rest may hold anything.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ, a clip is out of range, or (on the CPU) a value that is not masked is NaN.

    Example:
        >>> clipped_surrogate(torch.tensor([0.5, 0.0]), torch.tensor([1.0, -2.0]), 0.2, 0.2)
        tensor([-1.2000,  2.0000])
    """
    if not (0 <= clip_low <= 1 and 0 <= clip_high < math.inf):
        raise ValueError(f"clip_low and clip_high: expected in [0, 1] and at least 0, got {clip_low} and {clip_high}")
    (log_ratio, advantage), _ = _numbers(mask, log_ratio=log_ratio, advantage=advantage.detach())
    low, high = math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)
    # -A rho with rho clipped on the one side where that is worse: no branch overflows that the maximum leaves out. By
    # comparison, because the gradient of clamp at its own bound differs between versions of torch.
    above, below = log_ratio > high, log_ratio < low
    bounded = torch.where(above & (advantage >= 0), high, log_ratio)
    bounded = torch.where(below & (advantage <= 0), low, bounded)
    return -advantage * bounded.exp()


def guarded_log_ratio(log_ratio: Tensor, kl: Tensor, std: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """GRPO-Guard's log-ratio: centred, and as wide at every noise level: ``(log_ratio + kl) * std`` (arXiv 2510.22319).

    A log-ratio has mean ``-kl`` under the policy that sampled, and its width grows as the step's std falls, so that one
    clip range clips late steps and spares early ones. This one has mean 0 and variance ``|mean - old mean|^2``.

    Args:
        log_ratio: ``[b]``, sum-reduced.
        kl: ``[b]``: :func:`lensmini.sampling.gaussian_kl` of the two means, with the same reduction.
        std: ``[b]``: of the step. Detached.
        mask: ``[b]`` bool, true where the sample counts.

    Returns:
        ``[b]``, float32 at least, for :func:`clipped_surrogate`; 0 where masked.

    Raises:
        ValueError: if shapes differ, or (on the CPU) a value that is not masked is NaN or a std is not positive.

    Example:
        >>> guarded_log_ratio(torch.tensor([-2.0]), torch.tensor([2.0]), torch.tensor([0.5]))
        tensor([0.])
    """
    (log_ratio, kl, std), seen = _numbers(mask, log_ratio=log_ratio, kl=kl, std=std.detach())
    if std.device.type == "cpu" and not holds((std > 0) | ~seen):
        raise ValueError(f"std: expected positive numbers where the mask is true, got {std.tolist()}")
    return (log_ratio + kl) * std


def _numbers(mask: Tensor | None, **values: Tensor) -> tuple[list[Tensor], Tensor]:
    """The values in one dtype, 0 where masked; and the mask."""
    (name, first), *_ = values.items()
    num = check_shape(name, first, "b")["b"]
    dtype = torch.float32
    for value in values.values():
        dtype = torch.promote_types(dtype, value.dtype) if value.is_floating_point() else dtype
    seen = torch.ones_like(first, dtype=torch.bool) if mask is None else mask
    check_shape("mask", seen, "b", b=num)
    if seen.dtype != torch.bool:
        raise ValueError(f"mask: expected bool (true = counts), got {seen.dtype}")
    numbers = []
    for name, value in values.items():
        number = torch.where(seen, per_sample(name, value, num, dtype), 0.0)
        if number.device.type == "cpu" and not holds(~number.isnan()):
            raise ValueError(f"{name}: expected numbers where the mask is true, got NaN: mask what is missing")
        numbers.append(number)
    return numbers, seen
