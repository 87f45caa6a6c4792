"""The embedding of time.

Axes: b batch, d width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensmini.shapes import check_shape

__all__ = ["TimestepEmbedding", "timestep_sinusoid"]

NUM_TRAIN_TIMESTEPS = 1000
"""The released model embeds 1000 t; the factor lives here, so that t stays in [0, 1] everywhere else."""


def timestep_sinusoid(t: Tensor, dim: int = 256, *, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of time, cosines first.

    ``[cos(1000 t f_k), sin(1000 t f_k)]`` with ``f_k = max_period^(-k / (dim / 2))`` (arXiv 1706.03762, section 3.5).

    Args:
        t: ``[b]``, in [0, 1]; 0 is clean and 1 is noise.
        dim: even number of features.
        max_period: longest period over 2 pi, in units of 1000 t.

    Returns:
        ``[b, dim]``, at least float32.

    Raises:
        ValueError: if t is not a floating ``[b]`` tensor or dim is odd.

    Example:
        >>> timestep_sinusoid(torch.tensor([0.0]), 4)
        tensor([[1., 1., 0., 0.]])
    """
    check_shape("t", t, "b")
    if dim % 2 or dim < 2:
        raise ValueError(f"dim: expected an even positive number, got {dim}")
    if not t.is_floating_point():
        raise ValueError(f"t: expected a floating dtype, got {t.dtype}")
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    exponents = torch.arange(dim // 2, dtype=t.dtype, device=t.device) * (-math.log(max_period) / (dim // 2))
    angles = NUM_TRAIN_TIMESTEPS * t[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Time to a vector of the model's width: sinusoid, linear, SiLU, linear.

    Args:
        dim: width d of the result.
        num_frequencies: features of the sinusoid.

    Example:
        >>> TimestepEmbedding(16)(torch.tensor([0.0, 0.5, 1.0])).shape
        torch.Size([3, 16])
    """

    def __init__(self, dim: int, *, num_frequencies: int = 256) -> None:
        super().__init__()
        linears = {"linear_1": nn.Linear(num_frequencies, dim), "linear_2": nn.Linear(dim, dim)}
        self.timestep_embedder = nn.ModuleDict(linears)

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t [b]`` in [0, 1] as ``[b, d]`` in the dtype of the weights; the sinusoid is float32."""
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        features = timestep_sinusoid(t, first.in_features)  # pyright: ignore
        return second(F.silu(first(features.to(first.weight.dtype))))  # pyright: ignore
