"""The gated feed-forward layer.

Axes: d width, m hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lensmini.nn.tracing import needs_plain_ops
from lensmini.shapes import check_shape

__all__ = ["SwiGLU", "silu_gate"]


class SwiGLU(nn.Module):
    """Gated feed-forward layer ``w2(silu(w1 x) * (w3 x))`` without biases (arXiv 2002.05202, eq. 6).

    Args:
        dim: width d of input and output.
        hidden_dim: width m of the two halves.

    Example:
        >>> SwiGLU(8, 16)(torch.randn(5, 8)).shape
        torch.Size([5, 8])
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[..., d]`` to ``[..., d]``."""
        check_shape("hidden_states", hidden_states, "... d", d=self.w1.in_features)
        gate, value = self.w1(hidden_states), self.w3(hidden_states)
        if torch.is_grad_enabled() or needs_plain_ops():
            return self.w2(silu_gate(gate, value))
        return self.w2(F.silu(gate).mul_(value))


def silu_gate(gate: Tensor, value: Tensor) -> Tensor:
    """Multiply ``value`` by ``silu(gate) = gate * sigmoid(gate)``, keeping only the two inputs for the backward.

    Args:
        gate: any shape.
        value: the same shape.

    Returns:
        The same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> silu_gate(torch.zeros(2), torch.ones(2))
        tensor([0., 0.])
    """
    if gate.shape != value.shape:
        raise ValueError(f"value: expected the shape of gate, {list(gate.shape)}, got {list(value.shape)}")
    if needs_plain_ops():
        return F.silu(gate) * value
    return _SiluGate.apply(gate, value)  # pyright: ignore[reportReturnType]


class _SiluGate(torch.autograd.Function):
    """Autograd would keep silu(gate) as a third tensor; it is cheaper to compute it again."""

    @staticmethod
    def forward(ctx, gate: Tensor, value: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001  # pyright: ignore
        gate, value = ctx.saved_tensors
        grad_gate = grad * value
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)
