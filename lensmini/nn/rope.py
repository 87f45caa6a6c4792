"""Rotary positions over frame, row and column, centred on the image.

Axes: N image tokens, M text tokens, h heads, d head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lensmini.packed import Layout
from lensmini.shapes import check_shape

__all__ = ["RotaryEmbedding3D", "RotaryTable", "apply_rotary"]


class RotaryTable(NamedTuple):
    """Cosines and sines of the rotation of every token, ``[tokens, d / 2]`` float32 each."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding3D(nn.Module):
    """Rotation angles of image and text tokens (arXiv 2104.09864, eq. 15, on three axes).

    The ``d / 2`` angles are three bands: frame, row, column, with frequencies ``theta^(-2 k / axis_dim)`` each. Image
    positions are centred: row y of h has position ``y - ceil(h / 2)``, likewise columns; the frame is 0. Text token j
    has the one position ``max(floor(h / 2), floor(w / 2)) + j`` in all bands, so text follows the image on the diagonal.

    Args:
        axes_dims: even widths of the three bands; their sum is the head width d.
        theta: base of the frequencies.

    Raises:
        ValueError: if a width is odd or not positive.

    Example:
        >>> image, text = RotaryEmbedding3D((4, 6, 6))(Layout.build([(2, 3)], text_lengths=[5]))
        >>> image.cos.shape, text.sin.shape
        (torch.Size([6, 8]), torch.Size([5, 8]))
    """

    def __init__(self, axes_dims: Sequence[int] = (8, 28, 28), *, theta: float = 10_000.0) -> None:
        super().__init__()
        if len(axes_dims) != 3 or any(dim < 2 or dim % 2 for dim in axes_dims):
            raise ValueError(f"axes_dims: expected three even positive widths, got {tuple(axes_dims)}")
        self.axes_dims = tuple(axes_dims)
        self.theta = theta

    def forward(self, layout: Layout) -> tuple[RotaryTable, RotaryTable]:
        """Tables for all image tokens and all text tokens of a packed batch."""
        height, width = layout.grids.unbind(1)
        index = torch.arange(layout.image_samples.shape[0], device=height.device)
        index = index - layout.image_offsets[layout.image_samples]
        width_of_token = width[layout.image_samples]
        rows = index // width_of_token - (height - height // 2)[layout.image_samples]
        columns = index % width_of_token - (width - width // 2)[layout.image_samples]
        start = torch.maximum(height // 2, width // 2)[layout.text_samples]
        text = start + layout.text_positions
        image_table = self._table([torch.zeros_like(rows), rows, columns])
        return image_table, self._table([text, text, text])

    def _table(self, positions: Sequence[Tensor]) -> RotaryTable:
        bands = []
        for position, dim in zip(positions, self.axes_dims, strict=True):
            frequencies = [self.theta ** (-2 * k / dim) for k in range(dim // 2)]
            bands.append(position[:, None].float() * torch.tensor(frequencies, device=position.device))
        angles = torch.cat(bands, dim=1)
        return RotaryTable(angles.cos(), angles.sin())


def apply_rotary(heads: Tensor, table: RotaryTable) -> Tensor:
    """Rotate neighbouring channel pairs: ``(x_2i + j x_2i+1) * exp(j angle_i)``, at least in float32.

    Args:
        heads: ``[tokens, h, d]`` queries or keys.
        table: ``[tokens, d / 2]`` cosines and sines.

    Returns:
        ``[tokens, h, d]`` in the dtype of ``heads``.

    Raises:
        ValueError: if the table does not fit.

    Example:
        >>> table = RotaryTable(torch.zeros(1, 1), torch.ones(1, 1))
        >>> apply_rotary(torch.tensor([[[1.0, 2.0]]]), table)
        tensor([[[-2.,  1.]]])
    """
    sizes = check_shape("heads", heads, "tokens h d")
    if sizes["d"] % 2:
        raise ValueError(f"heads: expected an even head width, got shape {list(heads.shape)}")
    check_shape("table.cos", table.cos, "tokens pairs", tokens=sizes["tokens"], pairs=sizes["d"] // 2)
    check_shape("table.sin", table.sin, "tokens pairs", tokens=sizes["tokens"], pairs=sizes["d"] // 2)
    dtype = torch.promote_types(heads.dtype, torch.float32)
    real, imaginary = heads.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.cos.to(dtype)[:, None], table.sin.to(dtype)[:, None]
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return rotated.flatten(-2).to(heads.dtype)
