"""The Lens transformer: packed tokens of any mixture of resolutions to a velocity.

Axes: b samples, c channels, h and w latent height and width, N image tokens, M text tokens, l text length,
k text layers, e text feature width, d width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lensmini.nn.attention import AttentionBackend
from lensmini.nn.blocks import DualStreamBlock
from lensmini.nn.config import LensConfig
from lensmini.nn.embeddings import TimestepEmbedding
from lensmini.nn.fusion import TEXT_NORM_EPS, fuse_text_layers
from lensmini.nn.initialise import initial_value
from lensmini.nn.norm import RMSNorm
from lensmini.nn.rope import RotaryEmbedding3D
from lensmini.packed import Layout, pack, pack_text, unpack
from lensmini.shapes import check_shape

__all__ = ["Captured", "LensTransformer", "Modulation", "OutputNorm"]

OUTPUT_NORM_EPS = 1e-6


class Modulation(NamedTuple):
    """All that time contributes to a forward pass, for b samples (or b steps of a schedule)."""

    image: Tensor
    """``[num_layers, b, 6, d]``."""
    text: Tensor
    """``[num_layers, b, 6, d]``."""
    output: Tensor
    """``[b, 2, d]``: scale, then shift."""


class Captured(NamedTuple):
    """Result of a forward pass that captured hidden states."""

    velocity: Tensor | list[Tensor] | None
    """The velocity, or None after an early stop."""
    hidden_states: dict[int, tuple[Tensor, Tensor]]
    """For each captured block, both packed streams after it: ``[N, d]`` and ``[M, d]``."""


class OutputNorm(nn.Module):
    """The final modulated layer norm: ``layer_norm(x) * (1 + scale_i) + shift_i``, scale first, no affine parameters.

    Args:
        dim: width d.

    Example:
        >>> OutputNorm(8)(torch.randn(4, 8), torch.zeros(1, 2, 8), Layout.build([(2, 2)])).shape
        torch.Size([4, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def modulation(self, temb: Tensor) -> Tensor:
        """``[b, d]`` embedding of time to ``[b, 2, d]`` scale and shift."""
        return self.linear(F.silu(temb)).unflatten(-1, (2, -1))

    def forward(self, hidden_states: Tensor, modulation: Tensor, layout: Layout) -> Tensor:
        """Normalise and modulate ``[N, d]`` image tokens."""
        scale, shift = modulation.unbind(1)
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=OUTPUT_NORM_EPS)
        return (normed * (1 + layout.expand(scale)) + layout.expand(shift)).to(hidden_states.dtype)


class LensTransformer(nn.Module):
    """The double-stream diffusion transformer of Lens (arXiv 2605.21573, section 2).

    Its parameters have the released checkpoints' names and shapes. A new instance is filled by torch's defaults; call
    :meth:`init_weights` to train from scratch, or load a checkpoint.

    Args:
        config: sizes.

    Example:
        >>> config = LensConfig(
        ...     num_layers=1,
        ...     num_attention_heads=2,
        ...     attention_head_dim=16,
        ...     axes_dims_rope=(4, 6, 6),
        ...     in_channels=16,
        ...     out_channels=4,
        ...     enc_hidden_dim=8,
        ...     selected_layer_index=(1, 3),
        ... )
        >>> model = LensTransformer(config)
        >>> features, mask = [torch.randn(2, 5, 8)] * 2, torch.ones(2, 5, dtype=torch.bool)
        >>> model(torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.9]), features, mask).shape
        torch.Size([2, 16, 4, 6])
    """

    def __init__(self, config: LensConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.inner_dim
        self.rotary = RotaryEmbedding3D(config.axes_dims_rope)
        self.time_text_embed = TimestepEmbedding(dim)
        self.txt_norm = nn.ModuleList(
            RMSNorm(config.enc_hidden_dim, eps=TEXT_NORM_EPS) for _ in config.selected_layer_index
        )
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.num_text_layers * config.enc_hidden_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            DualStreamBlock(dim, config.num_attention_heads, mlp_dim=config.mlp_dim) for _ in range(config.num_layers)
        )
        self.norm_out = OutputNorm(dim)
        self.proj_out = nn.Linear(dim, config.output_dim)

    @torch.no_grad()
    def init_weights(
        self, seed: int, *, gate: float = 0.0, device: torch.device | str | None = None
    ) -> "LensTransformer":
        """Fill every parameter for training from scratch, each from ``seed`` and its own name alone.

        The paper does not state its initialisation; this is adaLN-zero (arXiv 2212.09748): Xavier-uniform linears with
        zero biases, norms at 1, and zero modulations and output layer, so that every block starts as the identity and the
        velocity as 0. Values are drawn on the CPU in float32: they do not depend on device, dtype, sharding or order.

        Args:
            seed: any integer.
            gate: bias of the blocks' gates. 0 is adaLN-zero; a small value such as 0.1 lets gradients into short runs at once.
            device: where parameters that are still on the meta device are put; the CPU by default.

        Returns:
            The model itself.

        Example:
            >>> config = LensConfig(
            ...     num_layers=1, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
            ... )
            >>> with torch.device("meta"):
            ...     model = LensTransformer(config)
            >>> bool(model.init_weights(0).proj_out.weight.any())
            False
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            self.to_empty(device=device or "cpu")
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed=seed, gate=gate))
        return self

    def modulation(self, t: Tensor) -> Modulation:
        """Precompute what time contributes, for one batch of times or for all steps of a schedule.

        Args:
            t: ``[b]`` in [0, 1].

        Returns:
            Tensors that ``forward`` and ``forward_packed`` take as ``modulation=``.
        """
        temb = self.time_text_embed(t)
        pairs = [block.modulation(temb) for block in self.transformer_blocks]  # pyright: ignore
        image, text = (torch.stack(vectors) for vectors in zip(*pairs, strict=True))
        return Modulation(image, text, self.norm_out.modulation(temb))

    def unused_parameters(self) -> tuple[str, ...]:
        """Names of the parameters behind the last block's attention on the text side: nothing reads their result.

        They belong to the released checkpoints, have no influence and get no gradient, which DDP has to be told.

        Example:
            >>> config = LensConfig(
            ...     num_layers=2, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
            ... )
            >>> with torch.device("meta"):
            ...     LensTransformer(config).unused_parameters()[0]
            'transformer_blocks.1.attn.to_add_out.weight'
        """
        last = f"transformer_blocks.{self.config.num_layers - 1}"
        dead = tuple(f"{last}.{part}." for part in ("attn.to_add_out", "txt_norm2", "txt_mlp"))
        return tuple(name for name, _ in self.named_parameters() if name.startswith(dead))

    def compile_blocks(self, **options: object) -> "LensTransformer":
        """Compile every block in place; all blocks and all mixtures of resolutions share one graph.

        Args:
            options: passed on to ``torch.compile``; ``dynamic=True`` and ``fullgraph=True`` unless given.
        """
        for block in self.transformer_blocks:
            block.compile(**{"dynamic": True, "fullgraph": True, **options})
        return self

    def forward(
        self,
        latents: Tensor | Sequence[Tensor],
        t: Tensor | None,
        text_features: Sequence[Tensor] | None = None,
        text_mask: Tensor | None = None,
        *,
        modulation: Modulation | None = None,
        capture_blocks: Sequence[int] = (),
        early_stop: bool = False,
        backend: AttentionBackend = "auto",
    ) -> Tensor | list[Tensor] | Captured:
        """Predict the velocity ``noise - clean``.

        Args:
            latents: ``[b, c, h, w]``, or b tensors ``[c, h_i, w_i]`` of any sizes: patchified, normalised, noised.
            t: ``[b]``, 0 is clean and 1 is noise.
            text_features: k tensors ``[b, l, e]``, one per text layer; None together with ``text_mask`` means no text.
            text_mask: ``[b, l]`` bool, true for a real token, any pattern. Masked features have no influence.
            modulation: result of :meth:`modulation`; ``t`` is then not read.
            capture_blocks: blocks (negative from the end) whose hidden states are returned, see :class:`Captured`.
            early_stop: do not run anything after the last captured block.
            backend: of :func:`lensmini.nn.packed_attention`.

        Returns:
            The velocity in the form and dtype of ``latents``; with ``capture_blocks`` a :class:`Captured`.

        Raises:
            ValueError: naming the argument whose shape, dtype or number does not fit.
        """
        image_tokens = pack(latents)
        grids = [latents.shape[2:]] * len(latents) if isinstance(latents, Tensor) else [x.shape[1:] for x in latents]
        if (text_features is None) != (text_mask is None):
            raise ValueError("text_features and text_mask: expected both or neither")
        if text_features is None or text_mask is None:
            shape = (0, self.config.num_text_layers, self.config.enc_hidden_dim)
            text_tokens = image_tokens.new_zeros(shape)
            layout = Layout.build(grids, device=image_tokens.device)  # pyright: ignore
        else:
            if len(text_features) != self.config.num_text_layers:
                expected = f"{self.config.num_text_layers} tensors [b, l, e]"
                raise ValueError(f"text_features: expected {expected}, got {len(text_features)}")
            check_shape("text_mask", text_mask, "b l", b=len(grids))
            text_tokens = pack_text(text_features, text_mask)
            layout = Layout.build(grids, text_mask=text_mask, device=image_tokens.device)  # pyright: ignore
        result = self.forward_packed(
            image_tokens,
            t,
            text_tokens,
            layout,
            modulation=modulation,
            capture_blocks=capture_blocks,
            early_stop=early_stop,
            backend=backend,
        )
        tokens = result.velocity if isinstance(result, Captured) else result
        velocity: Tensor | list[Tensor] | None = None
        if isinstance(latents, Tensor) and isinstance(tokens, Tensor):
            velocity = rearrange(tokens, "(b h w) c -> b c h w", b=len(latents), h=latents.shape[2])
        elif isinstance(tokens, Tensor):
            velocity = unpack(tokens, layout)
        return Captured(velocity, result.hidden_states) if isinstance(result, Captured) else velocity  # pyright: ignore

    def forward_packed(
        self,
        image_tokens: Tensor,
        t: Tensor | None,
        text_tokens: Tensor,
        layout: Layout,
        *,
        modulation: Modulation | None = None,
        capture_blocks: Sequence[int] = (),
        early_stop: bool = False,
        backend: AttentionBackend = "auto",
    ) -> Tensor | Captured:
        """The native form of :meth:`forward`.

        Args:
            image_tokens: ``[N, c]``.
            t: ``[b]``, 0 is clean and 1 is noise; may be None with ``modulation``.
            text_tokens: ``[M, k, e]``, valid tokens only.
            layout: where each sample's tokens stand.
            modulation: result of :meth:`modulation`.
            capture_blocks: blocks whose hidden states are returned.
            early_stop: do not run anything after the last captured block.
            backend: of :func:`lensmini.nn.packed_attention`.

        Returns:
            ``[N, output_dim]`` in the dtype of ``image_tokens``; with ``capture_blocks`` a :class:`Captured`.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        config = self.config
        num_samples = layout.image_offsets.shape[0] - 1
        check_shape("image_tokens", image_tokens, "N c", N=layout.image_samples.shape[0], c=config.in_channels)
        text_sizes = {"M": layout.text_samples.shape[0], "k": config.num_text_layers, "e": config.enc_hidden_dim}
        check_shape("text_tokens", text_tokens, "M k e", **text_sizes)
        captured_blocks = self._captured(capture_blocks, early_stop=early_stop)
        temb = None
        if modulation is None:
            if t is None:
                raise ValueError("t: expected [b], or modulation instead, got neither")
            check_shape("t", t, "b", b=num_samples)
            temb = self.time_text_embed(t)
        else:
            sizes = {"layers": config.num_layers, "b": num_samples, "d": config.inner_dim}
            check_shape("modulation.image", modulation.image, "layers b 6 d", **sizes)
            check_shape("modulation.text", modulation.text, "layers b 6 d", **sizes)
        image = self.img_in(image_tokens.to(self.img_in.weight.dtype))
        text = fuse_text_layers(text_tokens, self.txt_norm, self.txt_in)
        rotary = self.rotary(layout)
        last, hidden_states = config.num_layers - 1, {}
        for index, block in enumerate(self.transformer_blocks):
            vectors = None if modulation is None else (modulation.image[index], modulation.text[index])
            # Nothing reads the text after the last block, unless it is captured there.
            skip_text = index == last and index not in captured_blocks
            image, text = block(
                image, text, temb, rotary, layout, modulation=vectors, backend=backend, skip_text=skip_text
            )
            if index in captured_blocks:
                hidden_states[index] = (image, text)
                if early_stop and index == max(captured_blocks):
                    return Captured(None, hidden_states)
        output = self.norm_out.modulation(temb) if modulation is None else modulation.output  # pyright: ignore
        velocity = self.proj_out(self.norm_out(image, output, layout)).to(image_tokens.dtype)
        return Captured(velocity, hidden_states) if captured_blocks else velocity

    def _captured(self, capture_blocks: Sequence[int], *, early_stop: bool) -> set[int]:
        num_layers = self.config.num_layers
        if any(not -num_layers <= index < num_layers for index in capture_blocks):
            raise ValueError(f"capture_blocks: expected indices of {num_layers} blocks, got {list(capture_blocks)}")
        if early_stop and not capture_blocks:
            raise ValueError("early_stop: expected capture_blocks with it, got none")
        return {index % num_layers for index in capture_blocks}
