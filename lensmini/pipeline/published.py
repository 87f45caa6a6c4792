"""The rounding of the published bf16 pipeline: where it differs from exact arithmetic, step by step.

Axes: b samples, N image tokens of a packed batch, c channels, k steps.

The published pipeline keeps its state in the transformer's dtype. Nothing here is more accurate than
:mod:`lensmini.sampling`; it only makes published bf16 pictures comparable. In float32 both are the same but for the
last bits.
"""

import math

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, expand_time

__all__ = ["published_denormalize", "published_euler_step", "published_guide", "published_timestep"]


def published_timestep(t: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The time that the published pipeline embeds: ``1000 t`` rounded to ``dtype``, then divided by 1000 in ``dtype``.

    In bf16 this is off by up to 3.9 of 1000, and neighbouring steps of a long schedule share one value.

    Args:
        t: any shape, in [0, 1].
        dtype: the transformer's.

    Returns:
        The shape of ``t``, in ``dtype``.

    Raises:
        ValueError: if ``t`` or ``dtype`` is not floating point.

    Example:
        >>> published_timestep(torch.tensor([1.0, 0.967384])).tolist()
        [1.0, 0.96875]
    """
    if not t.is_floating_point() or not dtype.is_floating_point:
        raise ValueError(f"t and dtype: expected floating point, got {t.dtype} and {dtype}")
    return (t.to(torch.promote_types(t.dtype, torch.float32)) * 1000).to(dtype) / 1000


def published_guide(cond: Tensor, uncond: Tensor, scale: float, *, channel_dim: int, rescale: bool = True) -> Tensor:
    """:func:`lensmini.sampling.guide` with every operation rounded to the dtype of ``cond``.

    At ``scale`` 1 the roundings of ``uncond + 1 * (cond - uncond)`` stay: the result is near ``cond``, not equal to it.

    Args:
        cond: any shape with a channel axis; the velocity under the condition.
        uncond: the shape and dtype of ``cond``; the velocity without it.
        scale: guidance scale, finite.
        channel_dim: the channel axis.
        rescale: restore the norms, as the published pipeline always does.

    Returns:
        The shape and dtype of ``cond``.

    Raises:
        ValueError: if shapes or dtypes differ, ``scale`` is not finite, or there is no such axis.

    Example:
        >>> cond, uncond = torch.tensor([[3.0, 4.0]]).bfloat16(), torch.tensor([[3.0, 0.0]]).bfloat16()
        >>> published_guide(cond, uncond, 2.0, channel_dim=-1).tolist()
        [[1.75, 4.65625]]
    """
    check_same_shape("uncond", uncond, "cond", cond)
    if cond.dtype != uncond.dtype or not cond.is_floating_point():
        raise ValueError(f"uncond: expected the floating dtype of cond, got {uncond.dtype} and {cond.dtype}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not -cond.ndim <= channel_dim < cond.ndim:
        raise ValueError(f"channel_dim: expected an axis of cond {list(cond.shape)}, got {channel_dim}")
    combined = uncond + scale * (cond - uncond)
    if not rescale:
        return combined
    norm = torch.linalg.vector_norm(combined, dim=channel_dim, keepdim=True)
    ratio = torch.linalg.vector_norm(cond, dim=channel_dim, keepdim=True) / norm.clamp_min(1e-12)
    return combined * torch.where(norm > 0, ratio, 1.0)


def published_euler_step(
    noisy: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, *, layout: Layout | None = None
) -> Tensor:
    """One Euler step as the published scheduler rounds it: ``round(noisy + round(round(t_next - t) * velocity))``.

    The length of the step and the product are rounded to the dtype of ``velocity``; the sum is float32, rounded once.

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at ``t``.
        velocity: the shape of ``noisy``; the model's output at ``t``.
        t: ``[b]``, in [0, 1]; exact, not :func:`published_timestep`.
        t_next: ``[b]``, in [0, 1].
        layout: the layout of packed latents.

    Returns:
        The state at ``t_next``, in the dtype of ``velocity``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) a time leaves [0, 1].

    Example:
        >>> ones = torch.ones(1, 1).bfloat16()
        >>> published_euler_step(ones, ones, torch.tensor([1.0]), torch.tensor([0.967384])).item()
        0.96875
    """
    check_same_shape("velocity", velocity, "noisy", noisy)
    here, there = expand_time(t, noisy, layout=layout), expand_time(t_next, noisy, layout=layout, name="t_next")
    change = (there - here).to(velocity.dtype) * velocity
    return (noisy.to(here.dtype) + change).to(velocity.dtype)


def published_denormalize(latents: Tensor, mean: Tensor, var: Tensor, *, eps: float = 1e-4) -> Tensor:
    """``x * sqrt(var + eps) + mean`` with statistics and every operation rounded to the dtype of ``latents``.

    Args:
        latents: ``[b, c, h, w]`` or any shape with channels on axis 1, floating point.
        mean: ``[c]``.
        var: ``[c]``.
        eps: added to the variance.

    Returns:
        The shape and dtype of ``latents``.

    Raises:
        ValueError: if the channels disagree.

    Example:
        >>> published_denormalize(torch.ones(1, 1).bfloat16(), torch.tensor([1.0]), torch.tensor([4.0])).item()
        3.0
    """
    if latents.ndim < 2 or mean.shape != var.shape or mean.shape != latents.shape[1:2]:
        raise ValueError(
            f"mean and var: expected [c] for latents {list(latents.shape)}, got {list(mean.shape)} and {list(var.shape)}"
        )
    shape = (-1, *[1] * (latents.ndim - 2))
    std = (var.to(latents.dtype) + eps).sqrt().view(shape)
    return latents * std + mean.to(latents.dtype).view(shape)
