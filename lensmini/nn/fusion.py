"""Several layers of a language model joined into one text stream.

Axes: M text tokens, k text layers, e text feature width, d model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lensmini.nn.norm import RMSNorm, rms_normalise
from lensmini.shapes import check_shape

__all__ = ["MultiLayerTextFusion", "fuse_text_layers"]

TEXT_NORM_EPS = 1e-5


def fuse_text_layers(text_tokens: Tensor, norms: Sequence[RMSNorm] | nn.ModuleList, projection: nn.Linear) -> Tensor:
    """Normalise each layer with its own weight, lay the layers side by side and project them together.

    ``y = W [norm_1(x_1); ...; norm_k(x_k)] + bias`` (arXiv 2605.21573, section 2). The norms matter: magnitudes of a
    language model's residual stream grow by two orders from early to late layers.

    Args:
        text_tokens: ``[M, k, e]``.
        norms: k RMS norms of width e, in the order of the layers.
        projection: linear from ``k * e`` to d.

    Returns:
        ``[M, d]``.

    Raises:
        ValueError: if text_tokens has another number of layers or another width.

    Example:
        >>> fusion = MultiLayerTextFusion(2, 8, 16)
        >>> fuse_text_layers(torch.randn(5, 2, 8), fusion.txt_norm, fusion.txt_in).shape
        torch.Size([5, 16])
    """
    weight = torch.stack([norm.weight for norm in norms])  # pyright: ignore
    check_shape("text_tokens", text_tokens, "M k e", k=weight.shape[0], e=weight.shape[1])
    normed = rms_normalise(text_tokens.to(projection.weight.dtype), weight, eps=norms[0].eps)  # pyright: ignore
    return projection(normed.flatten(1))


class MultiLayerTextFusion(nn.Module):
    """:func:`fuse_text_layers` with its parameters.

    Args:
        num_layers: text layers k.
        text_dim: width e of each layer.
        dim: width d of the result.

    Example:
        >>> MultiLayerTextFusion(4, 8, 16)(torch.randn(5, 4, 8)).shape
        torch.Size([5, 16])
    """

    def __init__(self, num_layers: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.txt_norm = nn.ModuleList(RMSNorm(text_dim, eps=TEXT_NORM_EPS) for _ in range(num_layers))
        self.txt_in = nn.Linear(num_layers * text_dim, dim)

    def forward(self, text_tokens: Tensor) -> Tensor:
        """Fuse ``[M, k, e]`` into ``[M, d]``."""
        return fuse_text_layers(text_tokens, self.txt_norm, self.txt_in)
