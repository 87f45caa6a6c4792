"""From one value per element to one per sample, with masks that keep what they hide out of values and gradients.

Axes: b samples, N image tokens of a packed batch, c channels.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape
from lensmini.segments import segment_sum
from lensmini.shapes import check_shape

__all__ = [
    "Reduction",
    "align_samples",
    "dense_ids",
    "element_mask",
    "hide",
    "holds",
    "known_values",
    "per_sample",
    "reduce_samples",
]

Reduction = Literal["sum", "mean"]
"""Over the elements of one sample."""


def align_samples(mask: Tensor | None, layout: Layout | None, **tensors: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Tensors of one shape in one dtype, float32 at least, with zeros where the mask hides them.

    Args:
        mask: as :func:`element_mask` takes it, or None.
        layout: the layout of packed tensors.
        tensors: by argument name, ``[b, ...]`` or ``[N, c]`` with ``layout``; the first sets the shape.

    Returns:
        The tensors in order, and the mask as :func:`element_mask` returns it.

    Raises:
        ValueError: naming the tensor whose shape or dtype does not fit.

    Example:
        >>> align_samples(torch.tensor([True, False]), None, a=torch.ones(2, 1), b=torch.ones(2, 1).bfloat16())[0][1]
        tensor([[1.],
                [0.]])
    """
    (first_name, first), *rest = tensors.items()
    dtype = torch.promote_types(first.dtype, torch.float32)
    for name, tensor in rest:
        check_same_shape(name, tensor, first_name, first)
        dtype = torch.promote_types(dtype, tensor.dtype)
    counts = element_mask(mask, first, layout=layout)
    return [hide(tensor.to(dtype), counts) for tensor in tensors.values()], counts


def known_values(name: str, value: Tensor, mask: Tensor | None, like: Tensor, layout: Layout | None) -> Tensor:
    """One number per sample, zero where the sample is masked as a whole; anything else must be finite.

    Args:
        name: argument name for the error message.
        value: ``[b]``, floating point; a masked sample's may be anything.
        mask: as :func:`element_mask` takes it, or None.
        like: ``[b, ...]``, or ``[N, c]`` with ``layout``; sets b and the least dtype.
        layout: the layout of packed tensors.

    Returns:
        ``[b]``.

    Raises:
        ValueError: if the shape differs, or (on the CPU) a value that is not masked is not finite.

    Example:
        >>> known_values("r", torch.tensor([0.5, torch.nan]), torch.tensor([True, False]), torch.ones(2, 1), None)
        tensor([0.5000, 0.0000])
    """
    num = like.shape[0] if layout is None else layout.image_offsets.shape[0] - 1
    value = per_sample(name, value, num, like.dtype)
    if mask is not None:
        if mask.shape[0] == num:
            seen = mask.flatten(1).any(1) if mask.ndim > 1 else mask
        else:  # packed, by token
            seen = reduce_samples(mask.to(value.dtype), "sum", layout=layout) > 0
        value = torch.where(seen, value, 0.0)
    if value.device.type == "cpu" and not holds(value.isfinite()):
        raise ValueError(f"{name}: expected finite numbers where the mask is true, got {value.tolist()}")
    return value


def dense_ids(group: Tensor) -> Tensor:
    """Ids of groups as small numbers: equal ids stay equal.

    Args:
        group: ``[b]``, integers.

    Returns:
        ``[b]`` int64 in [0, b). Of a shape that does not depend on the ids, so that it compiles, unlike ``torch.unique``.

    Example:
        >>> dense_ids(torch.tensor([70, -1, 70]))
        tensor([1, 0, 1])
    """
    order = torch.argsort(group, stable=True)
    ordered = group[order]
    first = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0), value=False)
    return torch.empty_like(order).scatter(0, order, first.long().cumsum(0))


def element_mask(mask: Tensor | None, like: Tensor, *, layout: Layout | None = None) -> Tensor | None:
    """A mask of samples, of positions or of elements as one that broadcasts over ``like``.

    Args:
        mask: bool, true where the value counts: ``[b]`` for whole samples, the leading axes of ``like``, or as many
            axes as ``like`` with size 1 where it repeats (``[b, 1, h, w]``); packed also ``[b]``. None for no mask.
        like: ``[b, ...]``, or ``[N, ...]`` with ``layout``.
        layout: the layout of packed tensors.

    Returns:
        A bool tensor with as many axes as ``like``, or None.

    Raises:
        ValueError: if the mask is not bool or has another shape.

    Example:
        >>> element_mask(torch.tensor([True, False]), torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool (true = counts), got {mask.dtype}")
    if layout is not None and mask.ndim == 1 and mask.shape[0] == layout.image_offsets.shape[0] - 1:
        mask = layout.expand(mask)
    shape = tuple(mask.shape)
    if shape == tuple(like.shape[: mask.ndim]) and shape:
        return mask.reshape(shape + (1,) * (like.ndim - mask.ndim))
    same_rows = mask.ndim == like.ndim and shape[:1] == tuple(like.shape[:1])
    if same_rows and all(a in (1, b) for a, b in zip(shape[1:], like.shape[1:], strict=True)):
        return mask
    raise ValueError(
        f"mask: expected one per sample, leading axes of {list(like.shape)}, or that shape with ones, got {list(shape)}"
    )


def hide(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros in place of what the mask leaves out, before any arithmetic: NaN times a zero gradient would be NaN.

    Args:
        tensor: any shape.
        mask: bool, broadcasting over ``tensor``; none returns ``tensor``.

    Returns:
        The shape and dtype of ``tensor``; no gradient flows into hidden elements.

    Example:
        >>> hide(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    return tensor if mask is None else torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype).to(tensor.device))


def per_sample(name: str, value: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """One number per sample in the dtype of the arithmetic.

    Args:
        name: argument name for the error message.
        value: ``[b]``, floating point.
        num: the number of samples b.
        dtype: at least this wide.

    Returns:
        ``[b]``.

    Raises:
        ValueError: if the shape differs or the values are not floating point.

    Example:
        >>> per_sample("r", torch.ones(2, dtype=torch.bfloat16), 2, torch.float32)
        tensor([1., 1.])
    """
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected floating point, got {value.dtype}")
    check_shape(name, value, "b", b=num)
    return value.to(torch.promote_types(value.dtype, dtype))


def reduce_samples(
    values: Tensor, reduction: Reduction, *, mask: Tensor | None = None, layout: Layout | None = None
) -> Tensor:
    """Sum, or mean, of each sample's elements.

    Each sample is reduced by itself, so that its bits do not depend on the rest of the batch. Hide masked elements
    first (:func:`hide`): here the mask only says how many elements a mean is over.

    Args:
        values: ``[b, ...]``, or ``[N, ...]`` with ``layout``; float32 at least.
        reduction: ``"sum"`` or ``"mean"``; a mean over no element is 0.
        mask: as :func:`element_mask` returns it.
        layout: the layout of packed tensors.

    Returns:
        ``[b]``.

    Raises:
        ValueError: if ``reduction`` is unknown or the number of tokens is not the layout's.

    Example:
        >>> reduce_samples(torch.tensor([[1.0, 3.0], [5.0, 0.0]]), "mean")
        tensor([2.0000, 2.5000])
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    total = _sums(values, layout)
    if reduction == "sum":
        return total
    if mask is not None:
        return total / _sums(mask.expand(values.shape).to(values.dtype), layout).clamp_min(1)
    inner = math.prod(values.shape[1:])
    return total / (max(inner, 1) if layout is None else inner * layout.image_offsets.diff())


def _sums(values: Tensor, layout: Layout | None) -> Tensor:
    if layout is None:
        check_shape("values", values, "b ...")
        if torch.compiler.is_compiling() or not len(values):
            return values.flatten(1).sum(1) if values.ndim > 1 else values
        return torch.stack([row.sum() for row in values])
    check_shape("values", values, "N ...", N=layout.image_samples.shape[0])
    if torch.compiler.is_compiling():
        rows = values.flatten(1).sum(1) if values.ndim > 1 else values
        return segment_sum(rows[:, None], layout.image_samples, layout.image_offsets)[:, 0]
    return torch.stack([piece.sum() for piece in values.split(layout.image_lengths)])


def holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere, or there is no value to look at: compiling, vmap, fake tensors.

    Looking at a tensor on a device waits for the device; callers that must not wait ask about CPU tensors only.

    Args:
        condition: bool, any shape.

    Returns:
        True if no element is known to be false.

    Example:
        >>> holds(torch.tensor([True, False]))
        False
    """
    if torch.compiler.is_compiling() or condition.device.type == "meta":
        return True
    try:
        return bool(condition.all())
    except RuntimeError:
        return True
