"""Classifier-free guidance: two velocities become one.

Axes: c channels; the rest is the caller's.
"""

import math

import torch
from torch import Tensor

from lensmini.paths import check_same_shape

__all__ = ["guide"]


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
