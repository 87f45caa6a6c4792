"""The buffers of :mod:`lensmini.nn.chunked`, shared by all blocks, steps and groups of samples.

Axes: b samples, d width, h heads, m hidden width of the feed-forward layers; r samples of one shape, s joint tokens of each.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lensmini.nn.chunk_cuts import Chunk, Piece, cut_groups, cut_stream
from lensmini.packed import Layout, equal_runs

__all__ = ["Group", "Workspace"]

CHUNK_TOKENS = 512
"""With both halves of the feed-forward layer, 6 MB at a width of 512 and 17 MB at 1536: inside a third-level cache."""
GROUP_TOKENS = 2048
"""Queries, keys and values of a group are 12 MB at a width of 512; longer samples are groups of their own."""
LINE = 16
"""Numbers of float32 in a cache line."""


class Group(NamedTuple):
    """Neighbouring samples that go through a block together, and how their tokens are cut."""

    samples: slice
    image_rows: slice
    text_rows: slice
    image_lengths: tuple[int, ...]
    image_chunks: list[Chunk]
    text_chunks: list[Chunk]
    joint: list[tuple[Tensor, Tensor, Tensor]]
    """Queries, keys and values ``[r, h, s, d / h]`` of each run of samples that agree in both lengths."""
    run_images: list[int]
    """Image tokens of each run's samples."""
    run_of: list[tuple[int, int]]
    """For each sample its run and its place in it."""

    def at_joint(self, tensor_of_run: Sequence[Tensor], piece: Piece, *, text: bool, dim: int) -> Tensor:
        """The part of a run's tensor that belongs to a piece; ``dim`` is the axis of tokens."""
        run, place = self.run_of[piece.sample]
        start = piece.position + (self.image_lengths[piece.sample] if text else 0)
        return tensor_of_run[run][place : place + piece.samples].narrow(dim, start, piece.length)


class Workspace:
    """The buffers that all blocks and groups share, and how one layout is cut.

    Args:
        layout: the batch's layout.
        dim: width d.
        num_heads: heads h.
        mlp_dim: hidden width m.
        dtype: of weights and tokens.
        device: where they are.
        chunk_tokens: tokens of a chunk.
        group_tokens: image and text tokens of a group of samples (:func:`lensmini.nn.chunk_cuts.cut_groups`).

    Raises:
        ValueError: if a number of tokens is not positive or d is not a multiple of h.

    Example:
        >>> space = Workspace(Layout.build([(2, 3), (4, 4)], text_lengths=[4, 0]), 32, 2, 85, group_tokens=12)
        >>> [group.joint[0][0].shape for group in space.groups]
        [torch.Size([1, 2, 10, 16]), torch.Size([1, 2, 16, 16])]
    """

    def __init__(
        self,
        layout: Layout,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunk_tokens: int = CHUNK_TOKENS,
        group_tokens: int = GROUP_TOKENS,
    ) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        self.layout, self.num_heads = layout, num_heads
        samples = cut_groups(layout.joint_lengths, group_tokens)
        new = {"dtype": dtype, "device": device}
        tokens = max(sum(layout.joint_lengths[part]) for part in samples)
        storage = torch.empty(3 * tokens * dim, **new)
        self.groups = [_group(layout, part, storage, (num_heads, dim // num_heads), chunk_tokens) for part in samples]
        chunks = [chunk for group in self.groups for chunk in (*group.image_chunks, *group.text_chunks)]
        rows = max(chunk.rows.stop - chunk.rows.start for chunk in chunks)
        widths = {"normed": dim, "update": dim, "qkv": 3 * dim, "gate": mlp_dim, "value": mlp_dim}
        # Rows begin at a cache line: a product into rows of 1365 numbers takes 1.14 to 1.3 times as long.
        self.buffers = {name: torch.empty(rows, -(-w // LINE) * LINE, **new)[:, :w] for name, w in widths.items()}


def _group(layout: Layout, samples: slice, storage: Tensor, head: tuple[int, int], chunk_tokens: int) -> Group:
    images, texts = layout.image_lengths[samples], layout.text_lengths[samples]
    pairs = list(zip(images, texts, strict=True))
    # Neighbours that agree in both lengths attend together.
    numbers = {pair: index + 1 for index, pair in enumerate(dict.fromkeys(pairs))}
    joint, run_images, run_of, used = [], [], [], 0
    for index, run in enumerate(equal_runs([numbers[pair] for pair in pairs])):
        shape = (run.count, head[0], sum(pairs[run.sample]), head[1])
        size = math.prod(shape)
        joint.append(tuple(storage[used + i * size : used + (i + 1) * size].view(shape) for i in range(3)))
        run_images.append(images[run.sample])
        run_of += [(index, place) for place in range(run.count)]
        used += 3 * size
    starts = [sum(lengths[: samples.start]) for lengths in (layout.image_lengths, layout.text_lengths)]
    rows = [slice(start, start + sum(own)) for start, own in zip(starts, (images, texts), strict=True)]
    cuts = [cut_stream(pairs, lengths, chunk_tokens) for lengths in (images, texts)]
    return Group(samples, *rows, images, *cuts, joint, run_images, run_of)  # pyright: ignore
