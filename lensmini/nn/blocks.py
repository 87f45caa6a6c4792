"""The double-stream block: two token streams that meet in one attention.

Axes: N image tokens, M text tokens, b samples, d width, h heads.
"""

import torch
from torch import Tensor, nn

from lensmini.nn.attention import AttentionBackend, packed_attention
from lensmini.nn.heads import join_heads
from lensmini.nn.joint import split_streams
from lensmini.nn.mlp import SwiGLU
from lensmini.nn.modulation import Stream, gated_residual, modulated_norm
from lensmini.nn.norm import RMSNorm
from lensmini.nn.rope import RotaryTable
from lensmini.nn.tracing import needs_plain_ops, plain_ops
from lensmini.packed import Layout
from lensmini.shapes import check_shape

__all__ = ["DualStreamBlock", "JointAttention"]


class JointAttention(nn.Module):
    """Attention over the image and text tokens of each sample, with projections of their own per stream.

    Queries and keys are RMS-normalised per head (arXiv 2302.05442), then rotated; all tokens of a sample attend to all.

    Args:
        dim: width d.
        num_heads: heads h; ``d / h`` is the head width.
        eps: epsilon of the query and key norms.

    Raises:
        ValueError: if d is not a multiple of h.

    Example:
        >>> from lensmini.nn.rope import RotaryEmbedding3D
        >>> layout = Layout.build([(2, 2)], text_lengths=[3])
        >>> tables = RotaryEmbedding3D((4, 6, 6))(layout)
        >>> image, text = JointAttention(32, 2)(torch.randn(4, 32), torch.randn(3, 32), tables, layout)
        >>> image.shape, text.shape
        (torch.Size([4, 32]), torch.Size([3, 32]))
    """

    def __init__(self, dim: int, num_heads: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.img_qkv = nn.Linear(dim, 3 * dim)
        self.txt_qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = RMSNorm(dim // num_heads, eps=eps)
        self.norm_k = RMSNorm(dim // num_heads, eps=eps)
        self.norm_added_q = RMSNorm(dim // num_heads, eps=eps)
        self.norm_added_k = RMSNorm(dim // num_heads, eps=eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        rotary: tuple[RotaryTable, RotaryTable],
        layout: Layout,
        *,
        backend: AttentionBackend = "auto",
        skip_text: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            image: ``[N, d]``.
            text: ``[M, d]``.
            rotary: tables of the image and of the text tokens.
            layout: the batch's layout.
            backend: of :func:`lensmini.nn.packed_attention`.
            skip_text: leave out the text stream's result.

        Returns:
            ``[N, d]``, and ``[M, d]`` or None.
        """
        image_heads, text_heads = (
            project(hidden).unflatten(-1, (3, self.num_heads, -1))
            for project, hidden in ((self.img_qkv, image), (self.txt_qkv, text))
        )
        image_weight, text_weight = (
            torch.stack([norm.weight for norm in norms])
            for norms in ((self.norm_q, self.norm_k), (self.norm_added_q, self.norm_added_k))
        )
        query, key, value = join_heads(
            image_heads, text_heads, image_weight, text_weight, rotary, layout, eps=self.norm_q.eps
        )
        lengths = None if torch.compiler.is_compiling() else layout.joint_lengths
        attended = packed_attention(query, key, value, layout.joint_offsets, lengths=lengths, backend=backend)
        image_part, text_part = split_streams(attended.flatten(1), layout)
        return self.to_out[0](image_part), None if skip_text else self.to_add_out(text_part)


class DualStreamBlock(nn.Module):
    """One block of the transformer: joint attention, then a gated feed-forward layer per stream.

    Both are modulated by time: ``x += gate * f(norm(x) * (1 + scale) + shift)`` with six vectors per stream, sample and
    block (arXiv 2403.03206, figure 2; Lens has no pooled text in them).

    Args:
        dim: width d.
        num_heads: attention heads h.
        mlp_dim: hidden width of the feed-forward layers; ``floor(8 / 3 * d)`` by default.
        eps: epsilon of all norms in the block.

    Example:
        >>> from lensmini.nn.rope import RotaryEmbedding3D
        >>> layout = Layout.build([(2, 2)], text_lengths=[3])
        >>> tables = RotaryEmbedding3D((4, 6, 6))(layout)
        >>> block = DualStreamBlock(32, 2)
        >>> image, text = block(torch.randn(4, 32), torch.randn(3, 32), torch.randn(1, 32), tables, layout)
        >>> image.shape, text.shape
        (torch.Size([4, 32]), torch.Size([3, 32]))
    """

    def __init__(self, dim: int, num_heads: int, *, mlp_dim: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        mlp_dim = 8 * dim // 3 if mlp_dim is None else mlp_dim
        self.attn = JointAttention(dim, num_heads, eps=eps)
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.img_norm1 = RMSNorm(dim, eps=eps)
        self.img_norm2 = RMSNorm(dim, eps=eps)
        self.txt_norm1 = RMSNorm(dim, eps=eps)
        self.txt_norm2 = RMSNorm(dim, eps=eps)
        self.img_mlp = SwiGLU(dim, mlp_dim)
        self.txt_mlp = SwiGLU(dim, mlp_dim)

    def modulation(self, temb: Tensor) -> tuple[Tensor, Tensor]:
        """The six vectors of each stream, ``[b, 6, d]``: shift, scale, gate of attention, then of the feed-forward layer."""
        return self.img_mod(temb).unflatten(-1, (6, -1)), self.txt_mod(temb).unflatten(-1, (6, -1))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        temb: Tensor | None,
        rotary: tuple[RotaryTable, RotaryTable],
        layout: Layout,
        *,
        modulation: tuple[Tensor, Tensor] | None = None,
        backend: AttentionBackend = "auto",
        skip_text: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Update both streams.

        Args:
            image: ``[N, d]``.
            text: ``[M, d]``.
            temb: ``[b, d]`` embedding of time; may be None if ``modulation`` is given.
            rotary: tables of the image and of the text tokens.
            layout: the batch's layout.
            modulation: precomputed result of :meth:`modulation`.
            backend: of :func:`lensmini.nn.packed_attention`; "math" makes the whole block differentiable any number of times.
            skip_text: stop the text stream after it served as keys and values. In a model's last block nothing reads it.

        Returns:
            ``[N, d]`` and ``[M, d]``; the text as it came if ``skip_text``.

        Raises:
            ValueError: if a shape does not fit, or neither ``temb`` nor ``modulation`` is given.
        """
        if modulation is None:
            if temb is None:
                raise ValueError("temb: expected [b, d], or modulation instead, got neither")
            check_shape("temb", temb, "b d", b=layout.image_offsets.shape[0] - 1, d=image.shape[-1])
            modulation = self.modulation(temb)
        for name, vectors in zip(("image", "text"), modulation, strict=True):
            check_shape(f"{name} modulation", vectors, "b 6 d", b=layout.image_offsets.shape[0] - 1, d=image.shape[-1])
        if backend == "math" and not needs_plain_ops():
            with plain_ops():
                return self._update(image, text, modulation, rotary, layout, backend=backend, skip_text=skip_text)
        return self._update(image, text, modulation, rotary, layout, backend=backend, skip_text=skip_text)

    def _update(
        self,
        image: Tensor,
        text: Tensor,
        modulation: tuple[Tensor, Tensor],
        rotary: tuple[RotaryTable, RotaryTable],
        layout: Layout,
        *,
        backend: AttentionBackend,
        skip_text: bool,
    ) -> tuple[Tensor, Tensor]:
        image_mod, text_mod = (vectors.unbind(1) for vectors in modulation)
        image_in = _norm(self.img_norm1, image, image_mod[0], image_mod[1], layout, "image")
        text_in = _norm(self.txt_norm1, text, text_mod[0], text_mod[1], layout, "text")
        image_out, text_out = self.attn(image_in, text_in, rotary, layout, backend=backend, skip_text=skip_text)
        image = gated_residual(image, image_out, image_mod[2], layout, "image")
        image_in = _norm(self.img_norm2, image, image_mod[3], image_mod[4], layout, "image")
        image = gated_residual(image, self.img_mlp(image_in), image_mod[5], layout, "image")
        if text_out is not None:
            text = gated_residual(text, text_out, text_mod[2], layout, "text")
            text_in = _norm(self.txt_norm2, text, text_mod[3], text_mod[4], layout, "text")
            text = gated_residual(text, self.txt_mlp(text_in), text_mod[5], layout, "text")
        return image, text


def _norm(norm: RMSNorm, hidden: Tensor, shift: Tensor, scale: Tensor, layout: Layout, stream: Stream) -> Tensor:
    return modulated_norm(hidden, norm.weight, shift, scale, layout, stream, eps=norm.eps)
