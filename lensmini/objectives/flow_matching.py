"""The pre-training objective: mean squared error of the velocity, one value per sample.

Axes: b samples, N image tokens of a packed batch, c channels.
"""

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape
from lensmini.shapes import check_shape

__all__ = ["flow_matching_loss"]


def flow_matching_loss(velocity: Tensor, target: Tensor, *, layout: Layout | None = None) -> Tensor:
    """Mean of ``(velocity - target)^2`` over each sample's elements (arXiv 2210.02747; arXiv 2605.21573 section 5).

    The mean is taken inside each sample, so that an image's resolution is not a weight. Reduce over the batch that
    all ranks share, or the gradient depends on how the batch was split.

    Args:
        velocity: ``[b, ...]``, or ``[N, c]`` with ``layout``; the model's output.
        target: the shape of ``velocity``; usually :func:`lensmini.paths.velocity_target`.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float64 if an input is, else float32.

    Raises:
        ValueError: if the shapes differ (also if they would broadcast) or a tensor is not floating point.

    Example:
        >>> flow_matching_loss(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2))
        tensor([5., 0.])
    """
    check_same_shape("target", target, "velocity", velocity)
    check_shape("velocity", velocity, "b ...")
    dtype = torch.promote_types(torch.promote_types(velocity.dtype, target.dtype), torch.float32)
    squared = (velocity.to(dtype) - target.to(dtype)).square()
    if layout is not None:
        return layout.mean(squared)
    return squared.flatten(1).mean(1) if squared.ndim > 1 else squared
