"""Text features in eight bits, with the scales that give them back.

Axes: T text tokens, k text layers, e width.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from lensmini.shapes import check_shape

__all__ = ["Scaling", "dequantise_features", "quantise_features", "relative_error"]

Scaling = Literal["token", "layer"]
"""One scale for every token of every layer, or one for each layer."""
_LARGEST = 448.0


def quantise_features(features: Tensor, *, scaling: Scaling = "token") -> tuple[Tensor, Tensor]:
    r"""Round to ``float8_e4m3fn`` after dividing by a scale that brings the largest value to 448.

    .. math:: s = \max |x| / 448, \qquad q = \mathrm{fp8}(x / s)

    Magnitudes of language models grow from layer to layer, so no scale spans two layers. A scale for each token costs
    4 / e bytes a value. It matters where tokens of a layer differ by more than about ten thousand times: up to there the
    format's own exponent carries the small ones, at the same error of 2.6 %.

    Args:
        features: ``[T, k, e]``, finite.
        scaling: "token" or "layer".

    Returns:
        ``[T, k, e]`` float8 and float32 scales, ``[T, k]`` or ``[1, k]``; a scale of nothing but zeros is 1.

    Raises:
        ValueError: if a value is not finite, or ``scaling`` another.

    Example:
        >>> codes, scales = quantise_features(torch.tensor([[[0.5, -7.0]]]))
        >>> dequantise_features(codes, scales)
        tensor([[[ 0.5000, -7.0000]]])
    """
    check_shape("features", features, "T k e")
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling: expected one of {get_args(Scaling)}, got {scaling!r}")
    wide = features.float()
    if not bool(wide.isfinite().all()):
        raise ValueError("features: expected finite values, got NaN or infinity")
    if wide.numel() == 0:
        return wide.to(torch.float8_e4m3fn), wide.new_ones(wide.shape[0] if scaling == "token" else 1, wide.shape[1])
    largest = wide.abs().amax(2)
    if scaling == "layer":
        largest = largest.amax(0, keepdim=True)
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (wide / scales[..., None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return codes, scales


def dequantise_features(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The features again: codes times scales.

    Args:
        codes: ``[T, k, e]`` of :func:`quantise_features`.
        scales: ``[T, k]`` or ``[1, k]``.
        dtype: of the result.

    Returns:
        ``[T, k, e]``.

    Example:
        >>> dequantise_features(torch.ones(2, 1, 3).to(torch.float8_e4m3fn), torch.full((1, 1), 2.0))[0]
        tensor([[2., 2., 2.]])
    """
    sizes = check_shape("codes", codes, "T k e")
    if scales.ndim != 2 or scales.shape[0] not in (1, sizes["T"]) or scales.shape[1] != sizes["k"]:
        raise ValueError(f"scales: expected [{sizes['T']} or 1, {sizes['k']}], got {list(scales.shape)}")
    return (codes.float() * scales[..., None]).to(dtype)


def relative_error(features: Tensor, restored: Tensor) -> Tensor:
    """Root of the mean squared error over that of the features, for each layer, float32 ``[k]``.

    Example:
        >>> relative_error(torch.ones(2, 1, 3), 1.1 * torch.ones(2, 1, 3))
        tensor([0.1000])
    """
    wide = features.double()
    error = (restored.double() - wide).square().mean((0, 2)).sqrt()
    return (error / wide.square().mean((0, 2)).sqrt().clamp_min(torch.finfo(torch.float64).tiny)).float()
