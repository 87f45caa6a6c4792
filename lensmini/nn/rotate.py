"""The step between projections and attention: normalise queries and keys per head, then rotate them.

Axes: T tokens, p projections (query and key), h heads, d head width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lensmini.nn.norm import rms_normalise
from lensmini.nn.rope import RotaryTable, apply_rotary
from lensmini.nn.tracing import needs_plain_ops
from lensmini.shapes import check_shape

__all__ = ["normalise_and_rotate"]


def normalise_and_rotate(heads: Tensor, weight: Tensor, table: RotaryTable, *, eps: float) -> Tensor:
    """RMS-normalise each head with its projection's weight, then rotate neighbouring channel pairs.

    ``y = (norm(x) * weight_p)_complex * exp(j angle)``: :func:`lensmini.nn.rms_normalise` and
    :func:`lensmini.nn.apply_rotary` in one step that keeps only its input for the backward.

    Args:
        heads: ``[T, p, h, d]`` projections, for example queries and keys (p = 2).
        weight: ``[p, d]`` of the norms.
        table: ``[T, d / 2]`` cosines and sines.
        eps: added to the mean square.

    Returns:
        ``[T, p, h, d]`` in the dtype of ``heads``.

    Raises:
        ValueError: if shapes disagree or d is odd.

    Example:
        >>> table = RotaryTable(torch.ones(1, 1), torch.zeros(1, 1))
        >>> normalise_and_rotate(torch.tensor([[[[3.0, 3.0]]]]), torch.ones(1, 2), table, eps=0.0)
        tensor([[[[1., 1.]]]])
    """
    sizes = check_shape("heads", heads, "T p h d")
    check_shape("weight", weight, "p d", p=sizes["p"], d=sizes["d"])
    if sizes["d"] % 2:
        raise ValueError(f"heads: expected an even head width, got shape {list(heads.shape)}")
    check_shape("table.cos", table.cos, "T pairs", T=sizes["T"], pairs=sizes["d"] // 2)
    check_shape("table.sin", table.sin, "T pairs", T=sizes["T"], pairs=sizes["d"] // 2)
    if needs_plain_ops():
        normed = rms_normalise(heads, weight[:, None], eps=eps).to(heads.dtype)
        return apply_rotary(normed.flatten(1, 2), table).unflatten(1, (sizes["p"], sizes["h"]))
    return _NormaliseAndRotate.apply(heads, weight, table.cos, table.sin, eps)  # pyright: ignore[reportReturnType]


def _rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply channel pairs by ``cos + j sin`` in one pass; ``values [T, p, h, d]`` is a fresh contiguous tensor."""
    turns = torch.complex(cos.to(values.dtype), sin.to(values.dtype))[:, None, None]
    pairs = torch.view_as_complex(values.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(turns)).flatten(-2)


class _NormaliseAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float):  # noqa: ANN001, ANN205
        dtype = torch.promote_types(heads.dtype, torch.float32)
        norm = torch.linalg.vector_norm(heads, dim=-1, keepdim=True, dtype=dtype)
        inverse_rms = norm.square_().div_(heads.shape[-1]).add_(eps).rsqrt_()
        normed = torch.mul(heads, inverse_rms).contiguous().mul_(weight[:, None].to(dtype))
        ctx.save_for_backward(heads, weight, cos, sin, inverse_rms)
        return _rotate(normed, cos, sin).to(heads.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205  # pyright: ignore
        heads, weight, cos, sin, inverse_rms = ctx.saved_tensors
        dtype = inverse_rms.dtype
        # The inverse rotation is the transpose, and a fresh copy may be rotated in place.
        grad = _rotate(grad.to(dtype, copy=True, memory_format=torch.contiguous_format), cos, -sin)
        normed = torch.mul(heads, inverse_rms).contiguous()
        grad_weight = (grad * normed).sum((0, 2)).to(weight.dtype)
        grad = grad.mul_(weight[:, None].to(dtype))
        along = torch.linalg.vecdot(grad, normed)[..., None].div_(heads.shape[-1])
        grad_heads = grad.addcmul_(normed, along, value=-1).mul_(inverse_rms)
        return grad_heads.to(heads.dtype), grad_weight, None, None, None
