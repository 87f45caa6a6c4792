"""Root-mean-square normalisation.

Axes: d width.
"""

import torch
from torch import Tensor, nn

from lensmini.shapes import check_shape

__all__ = ["RMSNorm", "rms_normalise"]


def rms_normalise(hidden_states: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Divide by the root mean square over the last axis and multiply by a learned weight.

    ``y = round(x / sqrt(mean(x^2) + eps)) * weight`` (arXiv 1910.07467, eq. 4). The division is in float32 and is
    rounded to the input's dtype before the weight is applied, as in the released model.

    Args:
        hidden_states: ``[..., d]``.
        weight: ``[d]``, or any shape that broadcasts against ``[..., d]`` without enlarging it.
        eps: added to the mean square; 1e-6 in the blocks and 1e-5 on text features.

    Returns:
        ``[..., d]`` in the dtype that input and weight promote to.

    Example:
        >>> rms_normalise(torch.tensor([[3.0, -4.0]]), torch.ones(2), eps=0.0) * 12.5**0.5
        tensor([[ 3., -4.]])
    """
    values = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return values.to(hidden_states.dtype) * weight


class RMSNorm(nn.Module):
    """RMS normalisation with a learned weight: :func:`rms_normalise` as a module.

    Args:
        dim: width d of the last axis.
        eps: added to the mean square.

    Example:
        >>> RMSNorm(8)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise ``[..., d]``."""
        check_shape("hidden_states", hidden_states, "... d", d=self.weight.shape[0])
        return rms_normalise(hidden_states, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Width and epsilon for ``print(module)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
