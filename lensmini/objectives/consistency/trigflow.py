"""TrigFlow and the straight path: one model, one trajectory, two ways to count noise.

Axes: b samples, N image tokens of a packed batch, c channels. TrigFlow (arXiv 2410.11081, with a data deviation of 1) mixes
by an angle in [0, pi/2]: ``x = cos(a) x0 + sin(a) noise``, its network predicts ``F = dx/da``, and the consistency function is
``f = cos(a) x - sin(a) F``. The states of both differ by a factor only.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, expand_time
from lensmini.reduction import holds
from lensmini.shapes import check_shape

__all__ = ["expand_angle", "rf_to_trig", "trig_prediction", "trig_to_rf"]


def rf_to_trig(
    noisy: Tensor, velocity: Tensor, t: Tensor, *, layout: Layout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """State, velocity and time of the straight path as TrigFlow's.

    ``a = atan2(t, 1 - t)``, ``x' = (cos a + sin a) x`` and ``F = (cos a - sin a) x + v / (cos a + sin a)``
    (arXiv 2510.08431 section 3, solved for F). At a = 0 and a = pi/2 the states are equal.

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; on the straight path.
        velocity: the shape of ``noisy``.
        t: ``[b]``, in [0, 1].
        layout: the layout of packed latents.

    Returns:
        The state and F in the shape and dtype of ``noisy``, and the angle ``[b]``, float32 at least.

    Raises:
        ValueError: if shapes differ or (on the CPU) t leaves [0, 1].

    Example:
        >>> rf_to_trig(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0.5]))
        (tensor([[1.4142]]), tensor([[0.7071]]), tensor([0.7854]))
    """
    check_same_shape("velocity", velocity, "noisy", noisy)
    expand_time(t, noisy, layout=layout)
    angle = _angle_of(t)
    cos, sin = _cos_sin(angle, noisy, layout)
    flow = (cos - sin) * noisy + velocity / (cos + sin)
    return ((cos + sin) * noisy).to(noisy.dtype), flow.to(noisy.dtype), angle


def trig_to_rf(
    noisy: Tensor, prediction: Tensor, angle: Tensor, *, layout: Layout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`rf_to_trig`.

    ``t = sin a / (cos a + sin a)``, ``x = x' / (cos a + sin a)`` and ``v = (cos a + sin a) F - (cos a - sin a) x'``.

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; TrigFlow's state.
        prediction: the shape of ``noisy``; F.
        angle: ``[b]``, in [0, pi/2].
        layout: the layout of packed latents.

    Returns:
        The state and the velocity in the shape and dtype of ``noisy``, and t ``[b]``, float32 at least.

    Raises:
        ValueError: if shapes differ or (on the CPU) an angle leaves [0, pi/2].

    Example:
        >>> trig_to_rf(*rf_to_trig(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0.25])))
        (tensor([[1.]]), tensor([[1.]]), tensor([0.2500]))
    """
    check_same_shape("prediction", prediction, "noisy", noisy)
    cos, sin = expand_angle(angle, noisy, layout=layout)
    flow = (cos + sin) * prediction - (cos - sin) * noisy
    return (noisy / (cos + sin)).to(noisy.dtype), flow.to(noisy.dtype), _time_of(angle).clamp(0, 1)


def trig_prediction(
    velocity: Callable[[Tensor, Tensor], Tensor], noisy: Tensor, angle: Tensor, *, layout: Layout | None = None
) -> Tensor:
    """F of a network that was trained on the straight path: the wrapper of rCM (arXiv 2510.08431 section 3).

    Differentiable in all arguments, and defined a little beyond both ends for the sake of finite differences.

    Args:
        velocity: the model of the straight path.
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; TrigFlow's state.
        angle: ``[b]``, in [0, pi/2].
        layout: the layout of packed latents.

    Returns:
        F, in the shape and dtype of ``noisy``.

    Raises:
        ValueError: if shapes differ or a tensor is not floating point.

    Example:
        >>> trig_prediction(lambda x, t: torch.zeros_like(x), torch.ones(1, 1), torch.tensor([0.0]))
        tensor([[1.]])
    """
    _check(angle, noisy, layout)
    cos, sin = _cos_sin(angle, noisy, layout)
    straight = noisy / (cos + sin)
    output = velocity(straight.to(noisy.dtype), _time_of(angle))
    check_same_shape("velocity", output, "noisy", noisy)
    return ((cos - sin) * straight + output / (cos + sin)).to(noisy.dtype)


def expand_angle(angle: Tensor, latents: Tensor, *, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of one angle per sample as tensors that multiply latents.

    Args:
        angle: ``[b]``, in [0, pi/2].
        latents: ``[b, ...]``, or ``[N, ...]`` with ``layout``.
        layout: the layout of packed latents.

    Returns:
        Two tensors ``[b, 1, ...]`` or ``[N, 1, ...]``; float64 if either input is, else float32.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, or (on the CPU) an angle leaves [0, pi/2] by more than
            its rounding.

    Example:
        >>> expand_angle(torch.tensor([0.0]), torch.zeros(1, 1))
        (tensor([[1.]]), tensor([[0.]]))
    """
    _check(angle, latents, layout)
    slack = torch.finfo(angle.dtype).eps * 4  # pi / 2 rounded up
    if angle.device.type == "cpu" and not holds((angle >= 0) & (angle <= math.pi / 2 + slack)):
        raise ValueError(f"angle: expected [0, pi/2] (0 clean, pi/2 noise), got {angle.tolist()}")
    return _cos_sin(angle, latents, layout)


def _check(angle: Tensor, latents: Tensor, layout: Layout | None) -> None:
    for name, tensor in (("angle", angle), ("latents", latents)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floating point, got {tensor.dtype}")
    if layout is None:
        num = check_shape("latents", latents, "b ...")["b"]
    else:
        check_shape("latents", latents, "N ...", N=layout.image_samples.shape[0])
        num = layout.image_offsets.shape[0] - 1
    check_shape("angle", angle, "b", b=num)


def _cos_sin(angle: Tensor, latents: Tensor, layout: Layout | None) -> tuple[Tensor, Tensor]:
    wide = angle.to(torch.promote_types(torch.promote_types(latents.dtype, angle.dtype), torch.float32))
    rows = wide if layout is None else layout.expand(wide)
    rows = rows.reshape(rows.shape[0], *[1] * (latents.ndim - 1))
    return rows.cos(), rows.sin()


def _angle_of(t: Tensor) -> Tensor:
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    return torch.atan2(t, 1 - t)


def _time_of(angle: Tensor) -> Tensor:
    angle = angle.to(torch.promote_types(angle.dtype, torch.float32))
    sin = angle.sin()
    return sin / (angle.cos() + sin)
