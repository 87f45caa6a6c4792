"""The differences that `experiments.parity` plants, each written against our own code.

A plant alters one freshly loaded model, or replaces one of our functions inside a `with` block. Where a difference is the
same as other weights (another order of rows, a constant added to a bias), it is planted as other weights, exactly.

Axes: N image tokens, M text tokens, S joint tokens, b samples, l text tokens, h heads, d head width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor, nn

from lensmini.nn import LensTransformer, RotaryEmbedding3D, blocks
from lensmini.nn.rope import RotaryTable
from lensmini.packed import Layout

__all__ = [
    "Positions",
    "both_directions",
    "clip_streams",
    "compose",
    "drop_first_text_token",
    "every_layer_full",
    "gate_the_sum",
    "half_split_rotation",
    "keep_all_text",
    "mask_with",
    "noise_in_dead_weights",
    "query_key_eps",
    "scale_without_one",
    "shift_and_scale_exchanged",
    "streams_exchanged",
    "use_positions",
]

Plant = Callable[[LensTransformer], object]


def compose(*plants: Plant) -> Plant:
    """Several plants as one."""
    return lambda model: [plant(model) for plant in plants]


def query_key_eps(eps: float) -> Plant:
    """Another epsilon in the norms of queries and keys."""

    def change(model: LensTransformer) -> None:
        for block in _blocks(model):
            for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
                norm.eps = eps

    return change


@torch.no_grad()
def half_split_rotation(model: LensTransformer) -> None:
    """Channels i and i + d/2 form the rotated pair in place of 2i and 2i + 1: queries' and keys' rows change places."""
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    order = rearrange(torch.arange(dim), "(half pair) -> (pair half)", half=2)
    rows = torch.arange(3 * heads * dim).view(3, heads, dim).clone()
    rows[:2] = rows[:2, :, order]
    for block in _blocks(model):
        for linear in (block.attn.img_qkv, block.attn.txt_qkv):
            linear.weight.copy_(linear.weight[rows.flatten()])
            linear.bias.copy_(linear.bias[rows.flatten()])
        for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
            norm.weight.copy_(norm.weight[order])


class Positions(RotaryEmbedding3D):
    """Rotary positions with one rule changed.

    Args:
        axes_dims: widths of the three bands.
        start: of rows and columns: "-ceil(n/2)" as published, "-floor(n/2)", or "0" with text behind the longer side.
        stretch_text: spread the l text positions over [0, l] instead of [0, l - 1].
    """

    def __init__(self, axes_dims: Any, *, start: str = "-ceil(n/2)", stretch_text: bool = False) -> None:
        super().__init__(axes_dims)
        self.start, self.stretch_text = start, stretch_text

    def forward(self, layout: Layout) -> tuple[RotaryTable, RotaryTable]:
        """Tables for all image tokens and all text tokens."""
        grid = layout.grids
        first = {"-ceil(n/2)": -(grid - grid // 2), "-floor(n/2)": -(grid // 2), "0": grid * 0}[self.start]
        behind = (grid if self.start == "0" else grid // 2).amax(1)
        index = torch.arange(len(layout.image_samples)) - layout.image_offsets[layout.image_samples]
        width = grid[layout.image_samples, 1]
        rows, columns = (first[layout.image_samples] + torch.stack([index // width, index % width], 1)).unbind(1)
        text = layout.text_positions
        if self.stretch_text and len(text):
            last = int(text.max())
            text = text * ((last + 1) / max(last, 1))
        text = behind[layout.text_samples] + text
        return self._table([rows * 0, rows, columns]), self._table([text, text, text])


def use_positions(**rule: Any) -> Plant:
    """:class:`Positions` in place of the model's own; keyword arguments are its."""

    def change(model: LensTransformer) -> None:
        model.rotary = Positions(model.config.axes_dims_rope, **rule)

    return change


@torch.no_grad()
def shift_and_scale_exchanged(model: LensTransformer) -> None:
    """The six vectors are read as scale, shift, gate, scale, shift, gate."""
    for linear in _modulations(model):
        for values in (linear.weight, linear.bias):
            six = values.unflatten(0, (6, -1))
            six.copy_(six[[1, 0, 2, 4, 3, 5]])


@torch.no_grad()
def scale_without_one(model: LensTransformer) -> None:
    """``x * scale + shift``: the biases of the two scales are one less."""
    for linear in _modulations(model):
        linear.bias.unflatten(0, (6, -1))[[1, 4]] -= 1


def gate_the_sum() -> AbstractContextManager[object]:
    """``gate * (x + update)`` in place of ``x + gate * update``."""

    def gated(hidden_states: Tensor, update: Tensor, gate: Tensor, layout: Layout, stream: Any) -> Tensor:
        return (hidden_states + update) * layout.expand(gate, stream)

    return mock.patch.object(blocks, "gated_residual", gated)


def streams_exchanged(model: LensTransformer) -> None:
    """In every second block each stream runs through the other's weights, as if the block's two results were exchanged."""
    pairs = [("img_mod", "txt_mod"), ("img_norm1", "txt_norm1"), ("img_norm2", "txt_norm2"), ("img_mlp", "txt_mlp")]
    attention_pairs = [("img_qkv", "txt_qkv"), ("norm_q", "norm_added_q"), ("norm_k", "norm_added_k")]
    for block in _blocks(model)[1::2]:
        for module, names in [(block, pairs), (block.attn, attention_pairs)]:
            for image, text in names:
                one, other = getattr(module, image), getattr(module, text)
                setattr(module, image, other)
                setattr(module, text, one)
        block.attn.to_out[0], block.attn.to_add_out = block.attn.to_add_out, block.attn.to_out[0]


def clip_streams(model: LensTransformer) -> None:
    """Both streams are clipped to the range of fp16 after every block."""
    for block in _blocks(model):
        block.register_forward_hook(lambda module, args, output: tuple(x.clamp(-65504, 65504) for x in output))


@torch.no_grad()
def noise_in_dead_weights(model: LensTransformer) -> None:
    """Random numbers in the last block's text path behind the attention's keys and values."""
    dim, block = model.config.inner_dim, _blocks(model)[-1]
    tensors = [block.attn.norm_added_q.weight, block.txt_norm2.weight, *block.txt_mlp.parameters()]
    tensors += [*block.attn.to_add_out.parameters()]
    tensors += [values[:dim] for values in block.attn.txt_qkv.parameters()]
    tensors += [values[2 * dim :] for values in block.txt_mod.parameters()]
    generator = torch.Generator().manual_seed(0)
    for values in tensors:
        values.copy_(torch.randn(values.shape, generator=generator))


def mask_with(fill: float, text_mask: Tensor) -> AbstractContextManager[object]:
    """Dense attention over padded text with an additive mask: ``fill`` on the keys of masked text.

    Args:
        fill: what is added to their scores.
        text_mask: ``[b, l]``, true for a real token. The model itself must be told that all text is real.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, **options: Any) -> Tensor:
        num = len(text_mask)
        q, k, v = (rearrange(x, "(b s) h d -> b h s d", b=num) for x in (query, key, value))
        bias = torch.zeros(num, k.shape[2])
        bias[:, -text_mask.shape[1] :].masked_fill_(~text_mask, fill)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[:, None, None]
        return rearrange(scores.softmax(-1) @ v, "b h s d -> (b s) h d")

    return mock.patch.object(blocks, "packed_attention", attend)


def keep_all_text(features: list[Tensor], mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """Nothing is masked."""
    return features, torch.ones_like(mask)


def drop_first_text_token(features: list[Tensor], mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """The cut is one token late: the first token is lost and the others move up one position."""
    return [layer[:, 1:] for layer in features], mask[:, 1:]


def every_layer_full(kwargs: dict[str, Any], mask: Tensor) -> None:
    """Language model: no sliding windows, every layer causal over everything."""
    allowed = mask[:, None, None] & torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    kwargs["attention_mask"] = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def both_directions(kwargs: dict[str, Any], mask: Tensor) -> None:
    """Language model: every token attends to every real token, later ones too."""
    blocked = (~mask)[:, None, None].expand(-1, 1, mask.shape[1], -1)
    kwargs["attention_mask"] = torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo(torch.float32).min)


def _blocks(model: LensTransformer) -> list[Any]:
    return list(model.transformer_blocks)


def _modulations(model: LensTransformer) -> list[nn.Linear]:
    return [mod[1] for block in _blocks(model) for mod in (block.img_mod, block.txt_mod)]
