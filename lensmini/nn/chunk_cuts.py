"""How tokens are cut for :mod:`lensmini.nn.chunked`: groups of samples, chunks of a size, pieces that share modulation.

Axes: s tokens of one sample.
"""

# pyright: reportOptionalMemberAccess=false

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Chunk", "Piece", "cut_groups", "cut_stream"]


class Piece(NamedTuple):
    """Part of one sample's tokens, or ``samples`` whole samples of one shape, inside a chunk."""

    rows: slice
    """Rows of the chunk."""
    sample: int
    """The first sample."""
    samples: int
    """How many; 1 unless they are whole."""
    length: int
    """Tokens of each."""
    position: int
    """Where the first token stands in its sample's own stream."""


class Chunk(NamedTuple):
    """Tokens of one stream that go through a block together."""

    rows: slice
    pieces: list[Piece]


def cut_groups(lengths: Sequence[int], size: int) -> list[slice]:
    """Put neighbouring samples together while they have at most ``size`` tokens; a longer one stands alone.

    Args:
        lengths: for each sample its tokens.
        size: tokens of a group; 1 is a group for each sample.

    Returns:
        The samples of each group, in order.

    Raises:
        ValueError: if ``size`` is not positive.

    Example:
        >>> cut_groups([2, 3, 9, 1], 5)
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    if size < 1:
        raise ValueError(f"group_tokens: expected at least 1, got {size}")
    groups: list[slice] = []
    used = 0
    for sample, length in enumerate(lengths):
        if groups and used + length <= size:
            groups[-1] = slice(groups[-1].start, sample + 1)
        else:
            groups.append(slice(sample, sample + 1))
            used = 0
        used += length
    return groups


def cut_stream(pairs: Sequence[tuple[int, int]], lengths: Sequence[int], size: int) -> list[Chunk]:
    """Cut one stream into chunks of ``size`` tokens, and each chunk into pieces that share their modulation.

    Args:
        pairs: for each sample its image and text tokens; only neighbours that agree in both share a piece.
        lengths: for each sample its tokens in this stream.
        size: tokens of a chunk; the last may have fewer.

    Returns:
        The chunks, covering all tokens in order.

    Example:
        >>> [[piece.length for piece in chunk.pieces] for chunk in cut_stream([(3, 0), (5, 0)], [3, 5], 4)]
        [[3, 1], [4]]
    """
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    start = used = 0
    for sample, length in enumerate(lengths):
        position = 0
        while position < length:
            take = min(length - position, size - used)
            last = pieces[-1] if pieces else None
            whole = take == length and last is not None and last.length == lengths[last.sample] == length
            if whole and last.sample + last.samples == sample and pairs[last.sample] == pairs[sample]:
                rows = slice(last.rows.start, used + take)
                pieces[-1] = last._replace(rows=rows, samples=last.samples + 1)
            else:
                pieces.append(Piece(slice(used, used + take), sample, 1, take, position))
            used, position = used + take, position + take
            if used == size:
                chunks.append(Chunk(slice(start, start + used), pieces))
                start, used, pieces = start + used, 0, []
    if pieces:
        chunks.append(Chunk(slice(start, start + used), pieces))
    return chunks
