"""Log-density and Kullback-Leibler divergence of Gaussian steps, one value per sample.

Axes: b samples, N image tokens of a packed batch, c channels, D elements of one sample.
"""

import math

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape
from lensmini.reduction import Reduction, element_mask, hide, holds, reduce_samples
from lensmini.shapes import check_shape

__all__ = ["gaussian_kl", "gaussian_log_prob"]


def gaussian_log_prob(
    sample: Tensor,
    mean: Tensor,
    std: Tensor,
    reduction: Reduction = "sum",
    *,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Log-density of ``sample`` under ``N(mean, std^2)`` with independent elements.

    ``"sum"`` is the true log-density. ``"mean"`` divides it by D, as the published GRPO code does: its ratios are the
    D-th root of the true ones, so clip ranges (1e-4 against 0.2) are not transferable, the expected ratio is below 1
    (``exp(-(K / D) (1 - 1 / D))`` for a step KL of K), and in a batch of mixed resolutions every image has an exponent
    of its own. Hand in the sample as it was stored: round first, then score.

    Args:
        sample: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state that was taken. Differentiable: detach a sample
            that was drawn from ``mean`` in the same graph, or the two gradients cancel.
        mean: the shape of ``sample``.
        std: ``[b]``, or broadcasting over ``sample`` as :func:`lensmini.sampling.sde_kernel` returns it; positive.
        reduction: ``"sum"`` or ``"mean"`` over the elements of each sample.
        mask: bool, true where an element counts: ``[b]``, leading axes of ``sample``, or its shape with ones.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least; 0 for a sample that is masked as a whole.

    Raises:
        ValueError: if shapes differ, or ``std`` is not positive at an element that counts: a step without noise
            (``eta = 0``, or ``ddim`` and ``cps`` at ``t_next = 0``) has no density.

    Example:
        >>> zero = torch.zeros(1, 3)
        >>> gaussian_log_prob(zero, zero, torch.ones(1)), gaussian_log_prob(zero, zero, torch.ones(1), "mean")
        (tensor([-2.7568]), tensor([-0.9189]))
    """
    check_same_shape("mean", mean, "sample", sample)
    counts = element_mask(mask, sample, layout=layout)
    spread = _spread(std, sample, counts, layout)
    difference = hide(_wide(sample, spread), counts) - hide(_wide(mean, spread), counts)
    density = -0.5 * (difference / spread).square() - hide(spread.log() + 0.5 * math.log(2 * math.pi), counts)
    return reduce_samples(density, reduction, mask=counts, layout=layout)


def gaussian_kl(
    mean_p: Tensor,
    mean_q: Tensor,
    std: Tensor,
    reduction: Reduction = "sum",
    *,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """KL divergence of two Gaussian steps of one std: ``|mean_p - mean_q|^2 / (2 std^2)``.

    With the std of the increment it is linear in the length of the step, so that its sum over a path is the path's KL
    and does not depend on the grid. (Published code divides by the diffusion coefficient instead.) It serves as KL
    penalty, trust region and loss of on-policy distillation between step distributions.

    Args:
        mean_p: ``[b, ...]``, or ``[N, c]`` with ``layout``.
        mean_q: the shape of ``mean_p``; gradients flow into both.
        std: ``[b]``, or broadcasting over ``mean_p``; positive.
        reduction: ``"sum"`` (the divergence) or ``"mean"`` over the elements of each sample.
        mask: bool, true where an element counts.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least.

    Raises:
        ValueError: if shapes differ, or ``std`` is not positive at an element that counts.

    Example:
        >>> gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.5]))
        tensor([4.])
    """
    check_same_shape("mean_q", mean_q, "mean_p", mean_p)
    counts = element_mask(mask, mean_p, layout=layout)
    spread = _spread(std, mean_p, counts, layout)
    difference = hide(_wide(mean_p, spread), counts) - hide(_wide(mean_q, spread), counts)
    return reduce_samples((difference / spread).square() / 2, reduction, mask=counts, layout=layout)


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, like.dtype))


def _spread(std: Tensor, sample: Tensor, counts: Tensor | None, layout: Layout | None) -> Tensor:
    """The standard deviation, broadcasting over the sample; 1 where masked."""
    if not std.is_floating_point():
        raise ValueError(f"std: expected floating point, got {std.dtype}")
    dtype = torch.promote_types(torch.promote_types(std.dtype, sample.dtype), torch.float32)
    if std.ndim == 1:
        num = sample.shape[0] if layout is None else layout.image_offsets.shape[0] - 1
        check_shape("std", std, "b", b=num)
        rows = std if layout is None else layout.expand(std)
        std = rows.reshape(rows.shape[0], *[1] * (sample.ndim - 1))
    elif std.ndim != sample.ndim or any(a not in (1, b) for a, b in zip(std.shape, sample.shape, strict=True)):
        raise ValueError(f"std: expected [b], or broadcasting over {list(sample.shape)}, got {list(std.shape)}")
    spread = std.to(dtype)
    if counts is not None:
        spread = torch.where(counts, spread, 1.0)
    if not holds(spread > 0):
        raise ValueError(
            "std: expected positive standard deviations; a step without noise (eta 0, or the last step of ddim and cps) "
            f"has no density, got {spread.min().item():g}"
        )
    return spread
