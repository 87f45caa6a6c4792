"""Between two streams and one joint sequence: every sample's image tokens, then its text tokens.

Axes: N image tokens, M text tokens.
"""

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.shapes import check_shape

__all__ = ["join_streams", "split_streams"]


def join_streams(image: Tensor, text: Tensor, layout: Layout) -> Tensor:
    """Lay each sample's image and text tokens next to each other.

    Args:
        image: ``[N, ...]``.
        text: ``[M, ...]`` with the same trailing axes.
        layout: the batch's layout.

    Returns:
        ``[N + M, ...]``, in the order of ``layout.joint_offsets``.

    Raises:
        ValueError: if the token counts are not the layout's.

    Example:
        >>> layout = Layout.build([(1, 2), (1, 1)], text_lengths=[1, 1])
        >>> join_streams(torch.tensor([1, 2, 3]), torch.tensor([8, 9]), layout)
        tensor([1, 2, 8, 3, 9])
    """
    check_shape("image", image, "N ...", N=layout.image_samples.shape[0])
    check_shape("text", text, "M ...", M=layout.text_samples.shape[0])
    if torch.compiler.is_compiling():
        return _permute_rows(torch.cat([image, text]), layout.joint_order, layout.joint_inverse)
    if layout.num_text_tokens == 0:
        return image
    pieces = zip(image.split(layout.image_lengths), text.split(layout.text_lengths), strict=True)
    return torch.cat([piece for pair in pieces for piece in pair])


def split_streams(joint: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`join_streams`.

    Args:
        joint: ``[N + M, ...]``.
        layout: the batch's layout.

    Returns:
        ``[N, ...]`` image tokens and ``[M, ...]`` text tokens.

    Raises:
        ValueError: if the token count is not the layout's.

    Example:
        >>> layout = Layout.build([(1, 2), (1, 1)], text_lengths=[1, 1])
        >>> split_streams(torch.tensor([1, 2, 8, 3, 9]), layout)
        (tensor([1, 2, 3]), tensor([8, 9]))
    """
    num_image, num_text = layout.image_samples.shape[0], layout.text_samples.shape[0]
    check_shape("joint", joint, "S ...", S=num_image + num_text)
    if torch.compiler.is_compiling():
        rows = _permute_rows(joint, layout.joint_inverse, layout.joint_order)
        return rows.split([num_image, num_text])  # pyright: ignore[reportReturnType]
    if layout.batch_size == 1:
        return joint[:num_image], joint[num_image:]
    lengths = [n for pair in zip(layout.image_lengths, layout.text_lengths, strict=True) for n in pair]
    pieces = joint.split(lengths)
    return torch.cat(pieces[::2]), torch.cat(pieces[1::2])


class _PermuteRows(torch.autograd.Function):
    """A gather by a permutation, whose backward is the gather by its inverse instead of an atomic scatter."""

    @staticmethod
    def forward(ctx, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(order, inverse)
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001  # pyright: ignore
        order, inverse = ctx.saved_tensors
        return _permute_rows(grad, inverse, order), None, None


def _permute_rows(values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return _PermuteRows.apply(values, order, inverse)  # pyright: ignore[reportReturnType]
