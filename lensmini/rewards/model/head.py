"""The trained part of a learned reward: questions that look at a picture.

Axes: n pictures, d channels of a feature map of y by x positions, u texts, l tokens, e text width, c questions of a picture,
m queries of a question, s tokens of its memory (image, then prompt), w width, k levels.

A criterion becomes m queries; they attend to the picture's positions, which say where they are, and to the prompt. Pooled
features could not answer "at the top left".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from lensmini.shapes import check_shape

__all__ = ["RewardHead", "RewardModelConfig", "mean_words"]

_FREQUENCIES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelConfig:
    """Sizes of the head.

    Example:
        >>> RewardModelConfig(image_dim=16, text_dim=32).num_levels
        9
    """

    image_dim: int
    """Channels d of the frozen image features."""
    text_dim: int
    """Width e of the frozen text features."""
    width: int = 256
    """Of the head."""
    num_heads: int = 4
    """Of its attention; divides the width."""
    num_layers: int = 3
    """Looks at the picture, one after the other."""
    num_queries: int = 2
    """Queries m of a criterion."""
    context_blocks: int = 0
    """Convolutions over the feature map first: for features that see one patch each, such as an autoencoder's."""
    num_levels: int = 9
    """Levels k between 0 and 1 of the distribution over a graded criterion: nine half points in Z-Reward (2606.09076)."""
    use_prompt: bool = True
    """Show the prompt to criteria that need it. Not where every criterion is complete without: it invites guessing."""
    seed: int = 0
    """Of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("image_dim", "text_dim", "width", "num_heads", "num_layers", "num_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of width={self.width}, got {self.num_heads}")
        if self.context_blocks < 0 or self.num_levels < 2:
            raise ValueError(
                f"context_blocks, num_levels: expected at least 0 and 2, got {self.context_blocks}, {self.num_levels}"
            )


class RewardHead(nn.Module):
    """From frozen features to one raw answer by question: a logit, and k logits over levels.

    Inputs are standardised by channel with buffers that :func:`lensmini.rewards.fit_reward_model` measures: ``image_mean`` and
    ``image_std`` of feature maps, ``text_mean`` and ``text_std`` of the words of criteria, ``topic_mean`` and ``topic_std`` of
    criteria's mean words. The last matter most: criteria differ in few of their words, so their means are nearly equal before.

    Args:
        config: sizes, and the seed of the initial weights; the last layer starts at zero, so every answer at one half.

    Example:
        >>> head = RewardHead(RewardModelConfig(image_dim=3, text_dim=4, width=8, num_heads=2))
        >>> memory, seen = head.read_images([torch.zeros(3, 2, 2), torch.zeros(3, 2, 3)])
        >>> queries = head.read_criteria(torch.zeros(1, 5, 4), torch.ones(1, 5, dtype=torch.bool))
        >>> head(queries[torch.tensor([[0], [0]])], memory, seen[:, None]).shape
        torch.Size([2, 1, 10])
    """

    image_mean: Tensor
    image_std: Tensor
    text_mean: Tensor
    text_std: Tensor
    topic_mean: Tensor
    topic_std: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        with torch.device("meta"):  # the default initialisation would draw from the global generator
            self.image_in = nn.Linear(config.image_dim, width)
            self.place_in = nn.Linear(4 * _FREQUENCIES, width)
            self.context = nn.ModuleList(_ContextBlock(width) for _ in range(config.context_blocks))
            self.text_in = nn.Linear(config.text_dim, width)
            self.prompt_mark = nn.Parameter(torch.empty(width))
            self.queries = nn.Parameter(torch.empty(config.num_queries, width))
            self.topic_in = nn.Linear(config.text_dim, width)
            self.ask = _Attention(width, heads)
            self.memory_norm = nn.LayerNorm(width)
            self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(config.num_layers))
            self.norm_out = nn.LayerNorm(width)
            self.out = nn.Linear(width, 1 + config.num_levels)
        self.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(config.seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                std = module.weight[0].numel() ** -0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (self.prompt_mark, self.queries):
            nn.init.normal_(parameter, generator=generator)
        nn.init.zeros_(self.out.weight)
        for name, size in (("image", config.image_dim), ("text", config.text_dim), ("topic", config.text_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def read_images(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens of pictures, each with its place; equal sizes run together.

        Args:
            maps: n feature maps ``[d, y_i, x_i]``, of any sizes.

        Returns:
            ``[n, s, w]`` padded to the longest, and the mask ``[n, s]``, true for a position of the picture.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, one in enumerate(maps):
            check_shape(f"maps[{index}]", one, "d y x", d=len(self.image_mean))
            groups.setdefault(tuple(one.shape), []).append(index)
        rows: list[Tensor] = [self.queries] * len(maps)
        for (_, height, width), members in groups.items():
            stacked = torch.stack([maps[index] for index in members]).to(self.image_mean.dtype)
            x = rearrange(stacked, "n d y x -> n y x d")
            x = self.image_in((x - self.image_mean) / self.image_std) + self._places(height, width)
            for block in self.context:
                x = block(x)
            flat = rearrange(x, "n y x w -> n (y x) w")
            if len(groups) == 1:
                return flat, flat.new_ones(flat.shape[:2], dtype=torch.bool)
            for index, row in zip(members, flat, strict=True):
                rows[index] = row
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]

    def read_prompts(self, features: Tensor, mask: Tensor) -> Tensor:
        """``[u, l, w]`` tokens of prompts ``[u, l, e]``, to stand behind the picture's."""
        return self._words(features, mask) + self.prompt_mark

    def read_criteria(self, features: Tensor, mask: Tensor) -> Tensor:
        """``[u, m, w]`` queries of criteria ``[u, l, e]`` with masks ``[u, l]``."""
        words = self._words(features, mask)
        seeds = repeat(self.queries, "m w -> u m w", u=len(words))
        topic = self.topic_in((mean_words(features, mask).to(words.dtype) - self.topic_mean) / self.topic_std)
        return topic[:, None] + self.ask(seeds, words, mask[:, None])

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Let questions look at their pictures.

        Args:
            queries: ``[n, c, m, w]``.
            memory: ``[n, s, w]``.
            mask: ``[n, c, s]`` or ``[n, 1, s]``, true for what a question may look at; at least one token each.

        Returns:
            ``[n, c, 1 + k]`` logits: of "yes", and over levels.
        """
        sizes = check_shape("queries", queries, "n c m w")
        memory = self.memory_norm(memory)
        mask = mask.expand(-1, sizes["c"], -1).repeat_interleave(sizes["m"], 1)
        for layer in self.layers:
            queries = layer(queries, memory, mask)
        return self.out(self.norm_out(queries).mean(2))

    def _words(self, features: Tensor, mask: Tensor) -> Tensor:
        sizes = check_shape("text features", features, "u l e", e=len(self.text_mean))
        check_shape("text mask", mask, "u l", u=sizes["u"], l=sizes["l"])
        # Whatever stands in padding, even NaN, must not reach a product.
        kept = torch.where(mask[..., None], features.to(self.text_mean.dtype), 0.0)
        return self.text_in((kept - self.text_mean) / self.text_std)

    def _places(self, height: int, width: int) -> Tensor:
        """``[y, x, w]`` of waves over the picture, each side counted from 0 to 1 whatever its length."""
        like = self.image_mean
        waves = math.pi * 2.0 ** torch.arange(_FREQUENCIES, dtype=like.dtype, device=like.device)
        sides = []
        for size in (height, width):
            centres = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size
            angles = centres[:, None] * waves
            sides.append(torch.cat([angles.sin(), angles.cos()], 1))
        down, right = repeat(sides[0], "y f -> y x f", x=width), repeat(sides[1], "x f -> y x f", y=height)
        return self.place_in(torch.cat([down, right], -1))


def mean_words(features: Tensor, mask: Tensor) -> Tensor:
    """``[u, e]`` mean over the real tokens of texts ``[u, l, e]``.

    Example:
        >>> mean_words(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """
    return torch.where(mask[..., None], features, 0.0).sum(1) / mask.sum(1, keepdim=True)


class _Attention(nn.Module):
    """Queries ``[b, q, w]`` look at ``[b, s, w]``; mask ``[b, q or 1, s]``.

    What is found is multiplied by a gate of the query: whether a colour is the one that was asked for is a product of the two.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.gate, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        query = rearrange(self.query(x), "b q (h f) -> b h q f", h=self.num_heads)
        key, value = rearrange(self.key_value(memory), "b s (two h f) -> two b h s f", two=2, h=self.num_heads)
        seen = None if mask is None else mask[:, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out(rearrange(found, "b h q f -> b q (h f)") * (1 + self.gate(x)))


class _Layer(nn.Module):
    """The queries of a question among themselves, then at the picture, then each alone."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.among, self.look = _Attention(width, num_heads), _Attention(width, num_heads)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        n, c, m, _ = queries.shape
        x = rearrange(queries, "n c m w -> (n c) m w")
        if m > 1:
            normed = self.norms[0](x)
            x = x + self.among(normed, normed)
        x = rearrange(x, "(n c) m w -> n (c m) w", n=n)
        x = x + self.look(self.norms[1](x), memory, mask)
        x = x + self.narrow(F.gelu(self.wide(self.norms[2](x))))
        return rearrange(x, "n (c m) w -> n c m w", c=c)


class _ContextBlock(nn.Module):
    """A residual 3 x 3 convolution on ``[n, y, x, w]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv, self.out = (
            nn.LayerNorm(width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        around = self.conv(rearrange(self.norm(x), "n y x w -> n w y x"))
        return x + self.out(F.gelu(rearrange(around, "n w y x -> n y x w")))
