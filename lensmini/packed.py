"""The mixed-resolution batch: the tokens of every sample laid end to end, and the layout that tells them apart.

Axes: b samples, n image tokens of one sample, l text tokens of one sample, N image tokens of the whole batch,
M valid text tokens of the whole batch, c channels, e text feature width.

A packed batch does no work for padding and needs no mask: linears see ``[N, c]``, attention runs inside each
sample, and what belongs to a sample (time, modulation, loss weight) stays ``[b, ...]``.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from lensmini.segments import expand_rows, segment_sum
from lensmini.shapes import check_shape

__all__ = ["Layout", "pack", "pack_text", "unpack"]

Stream = Literal["image", "text", "joint"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Where every sample's tokens stand in a packed batch.

    Build one with :meth:`build`; the fields are then consistent by construction. Tensors move together with
    :meth:`to` and :meth:`pin_memory`; the host copies of the lengths never need a device synchronisation.

    Example:
        >>> layout = Layout.build([(2, 3), (4, 4)], text_lengths=[5, 0])
        >>> layout.image_offsets.tolist(), layout.text_offsets.tolist()
        ([0, 6, 22], [0, 5, 5])
    """

    grids: Tensor
    """``[b, 2]`` int64: latent height and width of each sample, in tokens."""
    image_offsets: Tensor
    """``[b + 1]`` int32: sample i owns image tokens ``image_offsets[i]`` to ``image_offsets[i + 1]``."""
    text_offsets: Tensor
    """``[b + 1]`` int32: the same for text tokens."""
    joint_offsets: Tensor
    """``[b + 1]`` int32: the same for the joint sequence, a sample's image tokens and then its text tokens."""
    image_samples: Tensor
    """``[N]`` int64: the sample of each image token."""
    text_samples: Tensor
    """``[M]`` int64: the sample of each text token."""
    text_positions: Tensor
    """``[M]`` int64: position in the sample's own conditioning sequence; masked slots before it are counted."""
    joint_order: Tensor
    """``[N + M]`` int64: for each joint position, its row in ``cat([image_tokens, text_tokens])``."""
    joint_inverse: Tensor
    """``[N + M]`` int64: the inverse permutation of ``joint_order``."""
    heights: tuple[int, ...]
    """Host copy: latent height of each sample."""
    image_lengths: tuple[int, ...]
    """Host copy: image tokens of each sample."""
    text_lengths: tuple[int, ...]
    """Host copy: valid text tokens of each sample."""

    @classmethod
    def build(
        cls,
        grids: Sequence[tuple[int, int]] | Tensor,
        *,
        text_lengths: Sequence[int] | None = None,
        text_mask: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "Layout":
        """Lay out samples of the given grids and text.

        Args:
            grids: b pairs (latent_height, latent_width) in tokens, or an integer tensor ``[b, 2]``.
            text_lengths: b counts of text tokens, all valid. Without it and ``text_mask`` there is no text.
            text_mask: ``[b, l]`` bool, true for a real token, any pattern. Excludes ``text_lengths``.
            device: where the tensors are put; by default that of ``text_mask``, else the CPU.

        Returns:
            The layout.

        Raises:
            ValueError: if there is no sample, a side is not a positive integer, a length is not a non-negative
                integer, both kinds of text are given, or the number of samples disagrees.
        """
        pairs = _grid_pairs(grids)
        if text_mask is not None and text_lengths is not None:
            raise ValueError("text_lengths and text_mask: expected one of them, got both")
        num = len(pairs)
        if text_mask is not None:
            mask = as_bool_mask("text_mask", text_mask)
            check_shape("text_mask", mask, "b l", b=num)
            device = text_mask.device if device is None else device
            text_samples, text_positions = mask.cpu().nonzero(as_tuple=True)
            text_counts = tuple(mask.cpu().sum(1).tolist())
        else:
            text_counts = tuple([0] * num if text_lengths is None else text_lengths)
            if len(text_counts) != num or any(int(length) != length or length < 0 for length in text_counts):
                raise ValueError(f"text_lengths: expected {num} non-negative integers, got {list(text_counts)}")
            text_counts = tuple(int(length) for length in text_counts)
            text_samples = torch.repeat_interleave(torch.arange(num), torch.tensor(text_counts))
            text_positions = torch.cat([torch.arange(length) for length in text_counts])
        image_counts = tuple(height * width for height, width in pairs)
        image_samples = torch.repeat_interleave(torch.arange(num), torch.tensor(image_counts))
        joint_order = torch.argsort(torch.cat([2 * image_samples, 2 * text_samples + 1]), stable=True)
        layout = cls(
            grids=torch.tensor(pairs, dtype=torch.int64),
            image_offsets=_offsets(image_counts),
            text_offsets=_offsets(text_counts),
            joint_offsets=_offsets([n + l for n, l in zip(image_counts, text_counts, strict=True)]),
            image_samples=image_samples,
            text_samples=text_samples,
            text_positions=text_positions,
            joint_order=joint_order,
            joint_inverse=torch.empty_like(joint_order).scatter_(0, joint_order, torch.arange(len(joint_order))),
            heights=tuple(height for height, _ in pairs),
            image_lengths=image_counts,
            text_lengths=text_counts,
        )
        return layout if device is None else layout.to(device)

    @property
    def batch_size(self) -> int:
        """Number of samples b."""
        return len(self.image_lengths)

    @property
    def num_image_tokens(self) -> int:
        """Number of image tokens N of the whole batch."""
        return sum(self.image_lengths)

    @property
    def num_text_tokens(self) -> int:
        """Number of text tokens M of the whole batch."""
        return sum(self.text_lengths)

    @property
    def joint_lengths(self) -> tuple[int, ...]:
        """Host copy: image plus text tokens of each sample."""
        return tuple(n + l for n, l in zip(self.image_lengths, self.text_lengths, strict=True))

    def lengths(self, stream: Stream) -> tuple[int, ...]:
        """Tokens of each sample in the image, text or joint stream."""
        known = {"image": self.image_lengths, "text": self.text_lengths, "joint": self.joint_lengths}
        if stream not in known:
            raise ValueError(f"stream: expected one of {[*known]}, got {stream!r}")
        return known[stream]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Layout":
        """The same layout with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Layout":
        """The same layout in pinned memory; ``torch.utils.data.DataLoader`` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> "Layout":  # noqa: ANN001
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def expand(self, per_sample: Tensor, stream: Literal["image", "text"] = "image") -> Tensor:
        """Repeat each sample's value for each of its tokens: ``[b, ...]`` to ``[N, ...]`` (or ``[M, ...]``).

        Example:
            >>> Layout.build([(1, 2), (1, 1)]).expand(torch.tensor([5.0, 7.0]))
            tensor([5., 5., 7.])
        """
        if stream not in ("image", "text"):
            raise ValueError(f"stream: expected 'image' or 'text', got {stream!r}")
        samples = self.image_samples if stream == "image" else self.text_samples
        check_shape("per_sample", per_sample, "b ...", b=self.image_offsets.shape[0] - 1)
        if torch.compiler.is_compiling():
            offsets = self.image_offsets if stream == "image" else self.text_offsets
            return expand_rows(per_sample, samples, offsets)
        rows = zip(per_sample, self.lengths(stream), strict=True)
        return torch.cat([row.expand(length, *row.shape) for row, length in rows])

    def mean(self, per_token: Tensor) -> Tensor:
        """Mean over each sample's image tokens and all trailing axes: ``[N, ...]`` to ``[b]``, at least float32.

        Example:
            >>> Layout.build([(1, 2), (1, 1)]).mean(torch.tensor([[1.0], [3.0], [7.0]]))
            tensor([2., 7.])
        """
        check_shape("per_token", per_token, "N ...", N=self.image_samples.shape[0])
        values = per_token.to(torch.promote_types(per_token.dtype, torch.float32))
        values = values.flatten(1).mean(1) if values.ndim > 1 else values
        if torch.compiler.is_compiling():
            counts = (self.image_offsets[1:] - self.image_offsets[:-1]).to(values.dtype)
            return segment_sum(values[:, None], self.image_samples, self.image_offsets)[:, 0] / counts
        return torch.stack([piece.mean() for piece in values.split(self.image_lengths)])


class EqualRun(NamedTuple):
    """Neighbouring samples of equal length: first sample, number of samples, their length and their token rows."""

    sample: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    length: int
    rows: slice


def equal_runs(lengths: Sequence[int]) -> list[EqualRun]:
    """Group neighbouring samples of equal length, so that a loop over samples becomes a loop over views.

    Samples without tokens are left out.

    Example:
        >>> [(run.sample, run.count, run.length, run.rows.start) for run in equal_runs([3, 3, 0, 5])]
        [(0, 2, 3, 0), (3, 1, 5, 6)]
    """
    runs, start, sample = [], 0, 0
    for length, group in itertools.groupby(lengths):
        count = len(list(group))
        if length:
            runs.append(EqualRun(sample, count, length, slice(start, start + count * length)))
        start, sample = start + count * length, sample + count
    return runs


def as_bool_mask(name: str, mask: Tensor) -> Tensor:
    """Read a mask of booleans, or of integers 0 and 1, as booleans; anything else is a ``ValueError``."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex() or bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"{name}: expected booleans (true = real token) or integers 0 and 1, got {mask.dtype}")
    return mask.bool()


def pack(latents: Tensor | Sequence[Tensor]) -> Tensor:
    """Lay the tokens of every image end to end, row by row.

    Args:
        latents: ``[b, c, h, w]``, or b tensors ``[c, h_i, w_i]`` of any sizes with the same c.

    Returns:
        ``[N, c]``.

    Raises:
        ValueError: if an image has another rank or number of channels.

    Example:
        >>> pack([torch.zeros(4, 2, 3), torch.zeros(4, 1, 5)]).shape
        torch.Size([11, 4])
    """
    if isinstance(latents, Tensor):
        check_shape("latents", latents, "b c h w")
        return rearrange(latents, "b c h w -> (b h w) c")
    if not latents:
        raise ValueError("latents: expected at least one image [c, h, w], got an empty sequence")
    sizes: dict[str, int] = {}
    for index, image in enumerate(latents):
        sizes = {"c": check_shape(f"latents[{index}]", image, "c h w", **sizes)["c"]}
    return torch.cat([rearrange(image, "c h w -> (h w) c") for image in latents])


def unpack(image_tokens: Tensor, layout: Layout) -> list[Tensor]:
    """The inverse of :func:`pack`: one ``[c, h_i, w_i]`` per sample.

    Args:
        image_tokens: ``[N, c]``.
        layout: the batch's layout.

    Returns:
        b tensors, each a view of ``image_tokens``.

    Raises:
        ValueError: if the number of tokens is not the layout's.

    Example:
        >>> layout = Layout.build([(2, 3), (1, 5)])
        >>> [image.shape for image in unpack(torch.zeros(11, 4), layout)]
        [torch.Size([4, 2, 3]), torch.Size([4, 1, 5])]
    """
    check_shape("image_tokens", image_tokens, "N c", N=layout.num_image_tokens)
    pieces = image_tokens.split(layout.image_lengths)
    return [
        rearrange(piece, "(h w) c -> c h w", h=height) for piece, height in zip(pieces, layout.heights, strict=True)
    ]


def pack_text(text_features: Sequence[Tensor], text_mask: Tensor) -> Tensor:
    """Stack the text layers and keep the valid tokens only, sample after sample.

    Args:
        text_features: ``num_text_layers`` tensors ``[b, l, e]``.
        text_mask: ``[b, l]`` bool, true for a real token.

    Returns:
        ``[M, num_text_layers, e]``.

    Raises:
        ValueError: if there is no layer, or shapes differ.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> pack_text([torch.zeros(2, 2, 8)] * 4, mask).shape
        torch.Size([3, 4, 8])
    """
    if not text_features:
        raise ValueError("text_features: expected at least one tensor [b, l, e], got none")
    mask = as_bool_mask("text_mask", text_mask)
    sizes = check_shape("text_mask", mask, "b l")
    for index, layer in enumerate(text_features):
        sizes = check_shape(f"text_features[{index}]", layer, "b l e", **sizes)
    return torch.stack([layer[mask] for layer in text_features], dim=1)


def _grid_pairs(grids: Sequence[tuple[int, int]] | Tensor) -> list[tuple[int, int]]:
    try:
        table = torch.as_tensor(grids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"grids: expected b pairs (height, width), got {grids}") from error
    check_shape("grids", table, "b 2")
    if table.is_floating_point() or len(table) == 0 or bool((table < 1).any()):
        raise ValueError(f"grids: expected at least one (height, width) of positive integers, got {table.tolist()}")
    return [(height, width) for height, width in table.tolist()]


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
