"""From the projections of two streams to the queries, keys and values of one attention.

Axes: N image tokens, M text tokens, S = N + M joint tokens, h heads, d head width; r samples of one shape, s tokens of each.

In eager mode normalised and rotated queries and keys are written straight to their places in the joint sequence, and their
gradients straight to those of the projections, instead of being concatenated and split.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lensmini.nn.joint import join_streams
from lensmini.nn.norm import rms_normalise
from lensmini.nn.rope import RotaryTable, apply_rotary
from lensmini.nn.tracing import needs_plain_ops
from lensmini.packed import Layout, equal_runs
from lensmini.shapes import check_shape

__all__ = ["join_heads"]


def join_heads(
    image: Tensor,
    text: Tensor,
    image_weight: Tensor,
    text_weight: Tensor,
    rotary: tuple[RotaryTable, RotaryTable],
    layout: Layout,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and rotate queries and keys of both streams, and lay them and the values out in joint order.

    ``q = (norm(x_q) * weight_q)_complex * exp(j angle)`` per head, keys alike, values as they are:
    :func:`lensmini.nn.rms_normalise`, :func:`lensmini.nn.apply_rotary` and :func:`~lensmini.nn.joint.join_streams` in one
    step, which keeps only its input for the backward.

    Args:
        image: ``[N, 3, h, d]`` queries, keys and values of the image tokens.
        text: ``[M, 3, h, d]`` of the text tokens.
        image_weight: ``[2, d]`` of the norms of image queries and keys.
        text_weight: ``[2, d]`` of the text's.
        rotary: tables ``[N, d / 2]`` and ``[M, d / 2]`` of cosines and sines.
        layout: the batch's layout.
        eps: added to the mean square.

    Returns:
        Queries, keys and values ``[S, h, d]`` in the dtype of ``image``.

    Raises:
        ValueError: if shapes or dtypes disagree or d is odd.

    Example:
        >>> layout = Layout.build([(1, 1)], text_lengths=[1])
        >>> table = RotaryTable(torch.ones(1, 1), torch.zeros(1, 1))
        >>> image, text, weight = torch.full((1, 3, 1, 2), 3.0), torch.full((1, 3, 1, 2), 5.0), torch.ones(2, 2)
        >>> query, _, value = join_heads(image, text, weight, weight, (table, table), layout, eps=0.0)
        >>> query.flatten().tolist(), value.flatten().tolist()
        ([1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 5.0, 5.0])
    """
    sizes = check_shape("image", image, "N qkv h d", N=layout.image_samples.shape[0], qkv=3)
    check_shape("text", text, "M qkv h d", M=layout.text_samples.shape[0], qkv=3, h=sizes["h"], d=sizes["d"])
    if sizes["d"] % 2:
        raise ValueError(f"image: expected an even head width, got shape {list(image.shape)}")
    if image.dtype != text.dtype:
        raise ValueError(f"text: expected the dtype of image, {image.dtype}, got {text.dtype}")
    for name, heads, weight, table in (
        ("image", image, image_weight, rotary[0]),
        ("text", text, text_weight, rotary[1]),
    ):
        check_shape(f"{name}_weight", weight, "p d", p=2, d=sizes["d"])
        check_shape(f"rotary cos of {name}", table.cos, "T pairs", T=heads.shape[0], pairs=sizes["d"] // 2)
        check_shape(f"rotary sin of {name}", table.sin, "T pairs", T=heads.shape[0], pairs=sizes["d"] // 2)
    if needs_plain_ops():
        streams = []
        for heads, weight, table in ((image, image_weight, rotary[0]), (text, text_weight, rotary[1])):
            query_key, value = heads.split([2, 1], dim=1)
            normed = rms_normalise(query_key, weight[:, None], eps=eps).to(heads.dtype)
            rotated = apply_rotary(normed.flatten(1, 2), table).unflatten(1, (2, -1))
            streams.append((rotated, value[:, 0]))
        query, key = join_streams(streams[0][0], streams[1][0], layout).unbind(1)
        return query, key, join_streams(streams[0][1], streams[1][1], layout)
    tables = [part for table in rotary for part in (table.cos, table.sin)]
    return _JoinHeads.apply(image, text, image_weight, text_weight, *tables, layout, eps)  # pyright: ignore


def _views(
    layout: Layout, image: list[Tensor], text: list[Tensor], joint: list[Tensor]
) -> Iterator[tuple[int, list[Tensor]]]:
    """For each run of samples of one shape and each stream (0 image, 1 text): the stream's tensors as ``[r, s, ...]``,
    then the joint ones.
    """
    pairs = list(zip(layout.image_lengths, layout.text_lengths, strict=True))
    # Samples that agree in both lengths are consecutive in all three orders.
    numbers = {pair: index + 1 for index, pair in enumerate(dict.fromkeys(pairs))}
    starts = [0, 0, 0]
    for run in equal_runs([numbers[pair] for pair in pairs]):
        lengths = pairs[run.sample]
        whole = sum(lengths)
        at_joint = [x[starts[2] : starts[2] + run.count * whole].unflatten(0, (run.count, whole)) for x in joint]
        for which, (stream, length) in enumerate(zip((image, text), lengths, strict=True)):
            if length:
                rows = slice(starts[which], starts[which] + run.count * length)
                here = slice(0, length) if which == 0 else slice(lengths[0], whole)
                yield (
                    which,
                    [x[rows].unflatten(0, (run.count, length)) for x in stream] + [x[:, here] for x in at_joint],
                )
            starts[which] += run.count * length
        starts[2] += run.count * whole


def _inverse_rms(heads: Tensor, eps: float) -> Tensor:
    """``[T, 2, h, 1]`` of queries and keys."""
    dtype = torch.promote_types(heads.dtype, torch.float32)
    norm = torch.linalg.vector_norm(heads[:, :2], dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(heads.shape[-1]).add_(eps).rsqrt_()


def _turns(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """``[T, 1, d / 2]`` complex."""
    return torch.complex(cos.to(dtype), sin.to(dtype))[:, None]


def _pairs(values: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers: a view."""
    return torch.view_as_complex(values.unflatten(-1, (-1, 2)))


class _JoinHeads(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        image: Tensor,
        text: Tensor,
        image_weight: Tensor,
        text_weight: Tensor,
        image_cos: Tensor,
        image_sin: Tensor,
        text_cos: Tensor,
        text_sin: Tensor,
        layout: Layout,
        eps: float,
    ):
        scales = [_inverse_rms(heads, eps) for heads in (image, text)]
        dtype = scales[0].dtype
        weights = [weight.to(dtype) for weight in (image_weight, text_weight)]
        image_parts = [image, scales[0], _turns(image_cos, image_sin, dtype)]
        text_parts = [text, scales[1], _turns(text_cos, text_sin, dtype)]
        joint = [image.new_empty((len(image) + len(text), *image.shape[2:])) for _ in range(3)]
        for which, (heads, scale, turns, *targets) in _views(layout, image_parts, text_parts, joint):
            for index in (0, 1):
                target = targets[index]
                direct = target.dtype == dtype
                normed = torch.mul(heads[:, :, index], scale[:, :, index], out=target if direct else None)
                _pairs(normed.mul_(weights[which][index])).mul_(turns)
                if not direct:
                    target.copy_(normed)
            targets[2].copy_(heads[:, :, 2])
        tables = (image_cos, image_sin, text_cos, text_sin)
        ctx.save_for_backward(image, text, image_weight, text_weight, *tables, *scales)
        ctx.layout = layout
        return tuple(joint)

    @staticmethod
    @once_differentiable
    def backward(ctx, *joint_grads: Tensor):  # noqa: ANN001, ANN205  # pyright: ignore
        image, text, *norms, image_cos, image_sin, text_cos, text_sin, image_scale, text_scale = ctx.saved_tensors
        dtype = image_scale.dtype
        weights = [weight.to(dtype) for weight in norms]
        results = [torch.empty_like(heads, memory_format=torch.contiguous_format) for heads in (image, text)]
        grad_weights = [torch.zeros_like(weight) for weight in weights]
        image_parts = [image, image_scale, _turns(image_cos, -image_sin, dtype), results[0]]
        text_parts = [text, text_scale, _turns(text_cos, -text_sin, dtype), results[1]]
        grads = [grad.contiguous() for grad in joint_grads]
        for which, (heads, scale, turns, result, *incoming) in _views(ctx.layout, image_parts, text_parts, grads):
            for index in (0, 1):
                # The inverse rotation is the transpose.
                grad = torch.view_as_real(_pairs(incoming[index].to(dtype)) * turns).flatten(-2)
                normed = heads[:, :, index] * scale[:, :, index]
                grad_weights[which][index] += (grad * normed).sum((0, 1, 2))
                grad.mul_(weights[which][index])
                along = torch.linalg.vecdot(grad, normed)[..., None].div_(heads.shape[-1])
                grad.addcmul_(normed, along, value=-1)
                target = result[:, :, index]
                if target.dtype == dtype:
                    torch.mul(grad, scale[:, :, index], out=target)
                else:
                    target.copy_(grad.mul_(scale[:, :, index]))
            result[:, :, 2].copy_(incoming[2])
        grad_weights = [grad.to(weight.dtype) for grad, weight in zip(grad_weights, norms, strict=True)]
        return *results, *grad_weights, None, None, None, None, None, None
