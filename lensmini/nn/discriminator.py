"""A small trained head on a frozen transformer's features: the discriminator of adversarial distillation.

Axes: b samples, N image tokens, M text tokens of a packed batch, d width, p width of the head.

The features come from the teacher, ``teacher.forward_packed(noisy, t, text, layout, capture_blocks=head.blocks,
early_stop=True).hidden_states``. Freeze its parameters (``requires_grad_(False)``) and run it with gradients enabled where
the student learns: what flows back to ``noisy`` is the student's adversarial gradient.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensmini.nn.initialise import initial_value
from lensmini.nn.norm import RMSNorm
from lensmini.packed import Layout
from lensmini.shapes import check_shape

__all__ = ["DiscriminatorHead"]


class DiscriminatorHead(nn.Module):
    """One logit per sample from the image tokens of several blocks of a frozen transformer.

    ``d = mean over blocks and image tokens of w_k silu(W_k norm_k(h_k))``: the mean over tokens gives every picture one
    vote, whatever its resolution, and each token already attends to its whole picture and text. Lens says that the head
    stands on the frozen teacher's features (arXiv 2605.21573 D.2), not how it is built nor on which blocks: this design is
    ours.

    Args:
        dim: width d of the transformer.
        blocks: which blocks' features are read, each with weights of its own.
        hidden_dim: width p.

    Example:
        >>> head, layout = DiscriminatorHead(8, [1, 3], hidden_dim=4), Layout.build([(2, 2), (1, 3)])
        >>> features = {1: (torch.randn(7, 8), torch.zeros(0, 8)), 3: (torch.randn(7, 8), torch.zeros(0, 8))}
        >>> head(features, layout).shape
        torch.Size([2])
    """

    def __init__(self, dim: int, blocks: Sequence[int], *, hidden_dim: int = 256) -> None:
        super().__init__()
        if not blocks or len(set(blocks)) != len(blocks) or min(blocks) < 0:
            raise ValueError(f"blocks: expected different indices from 0, got {list(blocks)}")
        self.blocks = tuple(blocks)
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in blocks)
        self.hidden = nn.ModuleList(nn.Linear(dim, hidden_dim) for _ in blocks)
        self.logits = nn.ModuleList(nn.Linear(hidden_dim, 1) for _ in blocks)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "DiscriminatorHead":
        """Fill every parameter from ``seed`` and its own name: Xavier-uniform matrices, zero biases, norms at 1.

        Args:
            seed: any integer.

        Returns:
            The head itself.

        Example:
            >>> bool(DiscriminatorHead(8, [0]).init_weights(0).hidden[0].bias.any())
            False
        """
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(f"discriminator.{name}", parameter.shape, seed=seed))
        return self

    def forward(self, hidden_states: Mapping[int, tuple[Tensor, Tensor]], layout: Layout) -> Tensor:
        """One logit per sample, positive for real.

        Args:
            hidden_states: for each block both packed streams after it, ``[N, d]`` and ``[M, d]``, as
                :class:`lensmini.nn.Captured` holds them; the text stream is not read.
            layout: where each sample's tokens stand.

        Returns:
            ``[b]``, float32 at least.

        Raises:
            ValueError: if a block is missing or its tokens are not the layout's.
        """
        missing = sorted(set(self.blocks) - set(hidden_states))
        if missing:
            raise ValueError(f"hidden_states: expected blocks {list(self.blocks)}, lacks {missing}")
        votes = []
        for block, norm, hidden, logit in zip(self.blocks, self.norms, self.hidden, self.logits, strict=True):
            image, _ = hidden_states[block]
            check_shape(f"hidden_states[{block}]", image, "N d", N=layout.image_samples.shape[0])
            votes.append(layout.mean(logit(F.silu(hidden(norm(image.to(hidden.weight.dtype)))))))  # pyright: ignore
        return torch.stack(votes).mean(0)
