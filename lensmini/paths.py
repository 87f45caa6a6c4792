"""The straight path between data and noise, and the one time convention: t = 0 is clean, t = 1 is noise.

Axes: b samples, N image tokens of a packed batch, c channels, h and w latent height and width.

Every function takes dense latents ``[b, ...]`` (``[b, c, h, w]`` for images), or packed ones ``[N, c]`` with
``layout=``. Arithmetic with t is done in float32 at least; the result has the dtype of the first argument.
Papers and schedulers that count time the other way round have to be converted by the caller.
"""

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.shapes import check_shape

__all__ = [
    "check_same_shape",
    "check_time_range",
    "clean_prediction",
    "expand_time",
    "interpolate",
    "noise_prediction",
    "velocity_target",
]


def interpolate(latents: Tensor, noise: Tensor, t: Tensor, *, layout: Layout | None = None) -> Tensor:
    """The noisy latents ``(1 - t) * latents + t * noise`` (rectified flow, arXiv 2209.03003 eq. 1).

    Args:
        latents: ``[b, ...]``, or ``[N, c]`` with ``layout``; clean.
        noise: the shape of ``latents``; standard normal.
        t: ``[b]``, in [0, 1]; 0 returns ``latents``, 1 returns ``noise``.
        layout: the layout of packed latents.

    Returns:
        The shape and dtype of ``latents``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) t leaves [0, 1].

    Example:
        >>> interpolate(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([0.25, 1.0])).flatten()
        tensor([0.2500, 1.0000])
    """
    check_same_shape("noise", noise, "latents", latents)
    time = expand_time(t, latents, layout=layout)
    return ((1 - time) * latents + time * noise).to(latents.dtype)


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model is trained to predict: the path's derivative in time, ``noise - latents``.

    Args:
        latents: any shape; clean.
        noise: the shape of ``latents``.

    Returns:
        The shape and dtype of ``latents``.

    Raises:
        ValueError: if shapes differ or a tensor is not floating point.

    Example:
        >>> velocity_target(torch.tensor([1.0]), torch.tensor([3.0]))
        tensor([2.])
    """
    check_same_shape("noise", noise, "latents", latents)
    return (noise - latents).to(latents.dtype)


def clean_prediction(noisy: Tensor, velocity: Tensor, t: Tensor, *, layout: Layout | None = None) -> Tensor:
    """The clean end of the path through ``noisy``: ``noisy - t * velocity``.

    Given the true marginal velocity this is the posterior mean of the clean latents. At t = 0 it is ``noisy``,
    bit for bit.

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``.
        velocity: the shape of ``noisy``; the model's output.
        t: ``[b]``, in [0, 1].
        layout: the layout of packed latents.

    Returns:
        The shape and dtype of ``noisy``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) t leaves [0, 1].

    Example:
        >>> clean_prediction(torch.tensor([[1.0]]), torch.tensor([[4.0]]), torch.tensor([0.5]))
        tensor([[-1.]])
    """
    check_same_shape("velocity", velocity, "noisy", noisy)
    return (noisy - expand_time(t, noisy, layout=layout) * velocity).to(noisy.dtype)


def noise_prediction(noisy: Tensor, velocity: Tensor, t: Tensor, *, layout: Layout | None = None) -> Tensor:
    """The noise end of the path through ``noisy``: ``noisy + (1 - t) * velocity``.

    The score of the noisy marginal is minus this over t (arXiv 2403.03206 section 2, in our direction of time).

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``.
        velocity: the shape of ``noisy``; the model's output.
        t: ``[b]``, in [0, 1].
        layout: the layout of packed latents.

    Returns:
        The shape and dtype of ``noisy``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) t leaves [0, 1].

    Example:
        >>> noise_prediction(torch.tensor([[1.0]]), torch.tensor([[4.0]]), torch.tensor([0.5]))
        tensor([[3.]])
    """
    check_same_shape("velocity", velocity, "noisy", noisy)
    return (noisy + (1 - expand_time(t, noisy, layout=layout)) * velocity).to(noisy.dtype)


def expand_time(t: Tensor, latents: Tensor, *, layout: Layout | None = None, name: str = "t") -> Tensor:
    """One time per sample as a tensor that multiplies latents.

    Args:
        t: ``[b]``, in [0, 1].
        latents: ``[b, ...]``, or ``[N, ...]`` with ``layout``.
        layout: the layout of packed latents.
        name: argument name for the error message.

    Returns:
        ``[b, 1, ...]`` or ``[N, 1, ...]``, with as many axes as ``latents``; float64 if either input is, else
        float32.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) t leaves [0, 1].

    Example:
        >>> expand_time(torch.tensor([0.0, 0.5]), torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    if not latents.is_floating_point():
        raise ValueError(f"latents: expected floating point, got {latents.dtype}")
    if layout is None:
        num = check_shape("latents", latents, "b ...")["b"]
    else:
        check_shape("latents", latents, "N ...", N=layout.image_samples.shape[0])
        num = layout.image_offsets.shape[0] - 1
    check_shape(name, t, "b", b=num)
    check_time_range(name, t)
    dtype = torch.promote_types(torch.promote_types(latents.dtype, t.dtype), torch.float32)
    rows = t.to(dtype) if layout is None else layout.expand(t.to(dtype))
    return rows.reshape(rows.shape[0], *[1] * (latents.ndim - 1))


def check_time_range(name: str, t: Tensor) -> None:
    """Refuse integer times, and times outside [0, 1] where looking costs no device synchronisation.

    Args:
        name: argument name for the error message.
        t: any shape; times.

    Raises:
        ValueError: if t is not floating point, or is on the CPU and leaves [0, 1] (NaN included).

    Example:
        >>> check_time_range("t", torch.tensor([0.0, 1.0]))
    """
    if not t.is_floating_point():
        raise ValueError(f"{name}: expected floating point times in [0, 1], got {t.dtype}")
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        inside = bool(((t >= 0) & (t <= 1)).all())
    except RuntimeError:  # under torch.func.vmap or a fake tensor there is no value to look at
        return
    if not inside:
        raise ValueError(f"{name}: expected times in [0, 1] (0 clean, 1 noise), got {t.tolist()}")


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two floating point tensors have one shape: a broadcast here is always a mistake.

    Args:
        name: argument name of ``tensor`` for the error message.
        tensor: any shape.
        other_name: argument name of ``other``.
        other: the tensor that sets the shape.

    Raises:
        ValueError: if the shapes differ or a tensor is not floating point.

    Example:
        >>> check_same_shape("noise", torch.zeros(2, 3), "latents", torch.ones(2, 3))
    """
    for each, value in ((name, tensor), (other_name, other)):
        if not value.is_floating_point():
            raise ValueError(f"{each}: expected floating point, got {value.dtype}")
    if tensor.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name} {list(other.shape)}, got {list(tensor.shape)}")
