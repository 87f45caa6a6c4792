"""Sum and repeat rows by sample in a way that compiles into one graph and is deterministic forwards and backwards.

Axes: b samples, N tokens of all samples laid end to end, d width. Sample i owns tokens ``offsets[i]`` to
``offsets[i + 1]``, and ``samples`` says the same token by token.
"""

import torch
from torch import Tensor

from lensmini.shapes import check_shape

__all__ = ["expand_rows", "segment_sum"]


@torch.library.custom_op("lensmini::segment_sum", mutates_args=())
def _segment_sum(values: Tensor, samples: Tensor, offsets: Tensor) -> Tensor:
    num = offsets.shape[0] - 1
    if values.device.type == "cpu":
        lengths = offsets.diff().tolist()
        dtype = torch.promote_types(values.dtype, torch.float32)
        return torch.stack([piece.sum(0, dtype=dtype) for piece in values.split(lengths)]).to(values.dtype)
    return _member_sum(values, samples, num)


def _member_sum(values: Tensor, samples: Tensor, num: int) -> Tensor:
    # A product with the 0/1 membership matrix: deterministic, and it accumulates in float32. Zero times NaN is NaN,
    # so what is not finite stays out of the product, and makes the row of its own sample NaN afterwards.
    member = samples == torch.arange(num, device=values.device)[:, None]
    finite = values.isfinite()
    sums = member.to(values.dtype) @ values.where(finite, 0)
    return sums.masked_fill((member & ~finite.all(1)).any(1)[:, None], torch.nan)


@_segment_sum.register_fake
def _(values: Tensor, samples: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, values.shape[1])


def _segment_sum_setup(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs[1:])


def _segment_sum_backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
    samples, offsets = ctx.saved_tensors
    return expand_rows(grad, samples, offsets), None, None


_segment_sum.register_autograd(_segment_sum_backward, setup_context=_segment_sum_setup)


def segment_sum(values: Tensor, samples: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows of each sample: ``out[i] = sum of values[j] over samples[j] = i``, at least in float32 inside.

    Args:
        values: ``[N, d]``.
        samples: ``[N]`` int64, ascending: the sample of each token.
        offsets: ``[b + 1]``: sample i owns tokens ``offsets[i]`` to ``offsets[i + 1]``.

    Returns:
        ``[b, d]`` in the dtype of ``values``; zero for a sample without tokens.

    Raises:
        ValueError: if the number of tokens disagrees.

    Example:
        >>> segment_sum(torch.ones(3, 2), torch.tensor([0, 0, 1]), torch.tensor([0, 2, 3]))
        tensor([[2., 2.],
                [1., 1.]])
    """
    check_shape("values", values, "N d", N=samples.shape[0])
    return _segment_sum(values, samples, offsets)


class _ExpandRows(torch.autograd.Function):
    """A gather whose backward is a deterministic segment sum instead of an atomic scatter."""

    @staticmethod
    def forward(ctx, values: Tensor, samples: Tensor, offsets: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(samples, offsets)
        return values.index_select(0, samples)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001  # pyright: ignore
        samples, offsets = ctx.saved_tensors
        rows = segment_sum(grad.flatten(1) if grad.ndim > 1 else grad[:, None], samples, offsets)
        return rows.reshape(rows.shape[0], *grad.shape[1:]), None, None


def expand_rows(values: Tensor, samples: Tensor, offsets: Tensor) -> Tensor:
    """Repeat each sample's row for its tokens: ``out[j] = values[samples[j]]``; the gradient is :func:`segment_sum`.

    Args:
        values: ``[b, ...]``.
        samples: ``[N]`` int64, ascending: the sample of each token.
        offsets: ``[b + 1]``: sample i owns tokens ``offsets[i]`` to ``offsets[i + 1]``.

    Returns:
        ``[N, ...]``.

    Raises:
        ValueError: if the number of samples disagrees.

    Example:
        >>> expand_rows(torch.tensor([5.0, 7.0]), torch.tensor([0, 0, 1]), torch.tensor([0, 2, 3]))
        tensor([5., 5., 7.])
    """
    check_shape("values", values, "b ...", b=offsets.shape[0] - 1)
    return _ExpandRows.apply(values, samples, offsets)  # pyright: ignore[reportReturnType]
