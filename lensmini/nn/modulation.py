"""Per-sample modulation of packed tokens, never laid out per token.

Axes: b samples, T tokens of one stream, d width.

Each sample's shift, scale and gate stay ``[b, d]``. Forward and backward walk over runs of equally long samples as views;
the gradient of a sample's vectors is the sum over its own tokens, in a fixed order. Under the compiler the same formulas
are plain gathers that fuse, with a segment sum as their backward.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lensmini.nn.norm import rms_normalise
from lensmini.nn.tracing import needs_plain_ops
from lensmini.packed import Layout, equal_runs
from lensmini.shapes import check_shape

__all__ = ["gated_residual", "modulated_norm"]

Stream = Literal["image", "text"]


def modulated_norm(
    hidden_states: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, layout: Layout, stream: Stream, *, eps: float
) -> Tensor:
    """RMS-normalise tokens, then scale and shift them by their sample's vectors.

    ``y = norm(x) * weight * (1 + scale_i) + shift_i`` for tokens of sample i (arXiv 2212.09748, adaLN, with an RMS norm).

    Args:
        hidden_states: ``[T, d]``.
        weight: ``[d]`` of the norm.
        shift: ``[b, d]``.
        scale: ``[b, d]``; 0 leaves the normalised value.
        layout: the batch's layout.
        stream: which of the layout's streams the tokens are.
        eps: added to the mean square.

    Returns:
        ``[T, d]`` in the dtype of ``hidden_states``.

    Raises:
        ValueError: if a shape does not fit the layout.

    Example:
        >>> layout = Layout.build([(1, 2)])
        >>> zero = torch.zeros(1, 2)
        >>> modulated_norm(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.ones(2), zero, zero, layout, "image", eps=0.0)
        tensor([[1., 1.],
                [1., 1.]])
    """
    samples = layout.image_samples if stream == "image" else layout.text_samples
    sizes = check_shape("hidden_states", hidden_states, "T d", T=samples.shape[0])
    check_shape("weight", weight, "d", d=sizes["d"])
    check_shape("shift", shift, "b d", b=layout.image_offsets.shape[0] - 1, d=sizes["d"])
    check_shape("scale", scale, "b d", b=layout.image_offsets.shape[0] - 1, d=sizes["d"])
    if needs_plain_ops():
        normed = rms_normalise(hidden_states, weight, eps=eps)
        modulated = normed * (1 + layout.expand(scale, stream)) + layout.expand(shift, stream)
        return modulated.to(hidden_states.dtype)
    return _ModulatedNorm.apply(hidden_states, weight, shift, scale, layout.lengths(stream), eps)  # pyright: ignore


def gated_residual(hidden_states: Tensor, update: Tensor, gate: Tensor, layout: Layout, stream: Stream) -> Tensor:
    """Add an update to the residual stream, gated by its sample's vector: ``x + gate_i * update``.

    Args:
        hidden_states: ``[T, d]``.
        update: ``[T, d]``.
        gate: ``[b, d]``, used as it is.
        layout: the batch's layout.
        stream: which of the layout's streams the tokens are.

    Returns:
        ``[T, d]`` in the dtype of ``hidden_states``.

    Raises:
        ValueError: if a shape does not fit the layout.

    Example:
        >>> layout = Layout.build([(1, 1), (1, 1)])
        >>> gated_residual(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([[0.0], [2.0]]), layout, "image")
        tensor([[1.],
                [3.]])
    """
    samples = layout.image_samples if stream == "image" else layout.text_samples
    sizes = check_shape("hidden_states", hidden_states, "T d", T=samples.shape[0])
    check_shape("update", update, "T d", **sizes)
    check_shape("gate", gate, "b d", b=layout.image_offsets.shape[0] - 1, d=sizes["d"])
    if needs_plain_ops():
        return (hidden_states + layout.expand(gate, stream) * update).to(hidden_states.dtype)
    dtype = hidden_states.dtype
    return _GatedResidual.apply(hidden_states, update.to(dtype), gate.to(dtype), layout.lengths(stream))  # pyright: ignore


def _views(lengths: Sequence[int], tokens: Sequence[Tensor], vectors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """For each run of r equal samples: tokens as ``[r, s, d]`` and per-sample vectors as ``[r, 1, d]``."""
    for run in equal_runs(lengths):
        parts = [x[run.rows].unflatten(0, (run.count, run.length)) for x in tokens]
        yield parts + [x[run.sample : run.sample + run.count, None] for x in vectors]


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        hidden_states: Tensor,
        weight: Tensor,
        shift: Tensor,
        scale: Tensor,
        lengths: Sequence[int],
        eps: float,
    ):
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=dtype)
        inverse_rms = norm.square_().div_(hidden_states.shape[-1]).add_(eps).rsqrt_()
        gain, offset = weight.to(dtype) * (1 + scale.to(dtype)), shift.to(dtype)
        result = hidden_states * inverse_rms
        for part, gain_i, offset_i in _views(lengths, [result], [gain, offset]):
            torch.addcmul(offset_i, part, gain_i, out=part)
        ctx.save_for_backward(hidden_states, weight, scale, inverse_rms)
        ctx.lengths, ctx.shift_dtype = lengths, shift.dtype
        return result.to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205  # pyright: ignore
        hidden_states, weight, scale, inverse_rms = ctx.saved_tensors
        dtype = inverse_rms.dtype
        grad = grad.to(dtype)
        normed = hidden_states * inverse_rms
        gain = 1 + scale.to(dtype)
        grad_gain, grad_shift = torch.zeros_like(gain), torch.zeros_like(gain)
        weighted = torch.empty_like(grad)
        tokens, vectors = [grad, normed, weighted], [gain * weight, grad_gain, grad_shift]
        for grad_i, normed_i, weighted_i, gain_i, grad_gain_i, grad_shift_i in _views(ctx.lengths, tokens, vectors):
            torch.sum(torch.mul(grad_i, normed_i, out=weighted_i), dim=1, keepdim=True, out=grad_gain_i)
            torch.sum(grad_i, dim=1, keepdim=True, out=grad_shift_i)
            torch.mul(grad_i, gain_i, out=weighted_i)
        along = torch.linalg.vecdot(weighted, normed)[:, None].div_(normed.shape[-1])
        grad_hidden = weighted.addcmul_(normed, along, value=-1).mul_(inverse_rms)
        grad_weight = (grad_gain * gain).sum(0).to(weight.dtype)
        grad_scale = (grad_gain * weight.to(dtype)).to(scale.dtype)
        return grad_hidden.to(hidden_states.dtype), grad_weight, grad_shift.to(ctx.shift_dtype), grad_scale, None, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, update: Tensor, gate: Tensor, lengths: Sequence[int]):  # noqa: ANN001, ANN205
        result = torch.empty_like(hidden_states)
        for result_i, hidden_i, update_i, gate_i in _views(lengths, [result, hidden_states, update], [gate]):
            torch.addcmul(hidden_i, update_i, gate_i, out=result_i)
        ctx.save_for_backward(update, gate)
        ctx.lengths = lengths
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # noqa: ANN001, ANN205  # pyright: ignore
        update, gate = ctx.saved_tensors
        grad_update = torch.empty_like(update)
        dtype = torch.promote_types(gate.dtype, torch.float32)
        grad_gate = torch.zeros(gate.shape, dtype=dtype, device=gate.device)
        tokens = [grad_update, grad.contiguous(), update]
        for grad_update_i, grad_i, update_i, gate_i, grad_gate_i in _views(ctx.lengths, tokens, [gate, grad_gate]):
            torch.sum(torch.mul(grad_i, update_i, out=grad_update_i), dim=1, keepdim=True, dtype=dtype, out=grad_gate_i)
            torch.mul(grad_i, gate_i, out=grad_update_i)
        return grad, grad_update, grad_gate.to(gate.dtype), None
