"""Hypothesis draws shapes and seeds; tensors come from a seeded generator, so that a failure is small and repeats."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from lensmini.packed import Layout

Grid = tuple[int, int]


def tensor(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values of the given shape, drawn in float64 so that every dtype rounds the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def seeds() -> st.SearchStrategy[int]:
    """Seeds of a generator."""
    return st.integers(0, 2**31 - 1)


def grids(min_size: int = 1, max_size: int = 4, max_side: int = 5) -> st.SearchStrategy[list[Grid]]:
    """The (height, width) of each sample of a batch, any mixture."""
    side = st.integers(1, max_side)
    return st.lists(st.tuples(side, side), min_size=min_size, max_size=max_size)


@st.composite
def text_masks(draw: st.DrawFn, batch_size: int, max_length: int = 6) -> Tensor:
    """A bool mask ``[b, l]`` of any pattern: holes, padding on either side, rows that are all false, even l = 0."""
    length = draw(st.integers(0, max_length))
    patterns = st.one_of(
        st.lists(st.booleans(), min_size=length, max_size=length),
        st.integers(0, length).map(lambda valid: [slot < valid for slot in range(length)]),
    )
    rows = draw(st.lists(patterns, min_size=batch_size, max_size=batch_size))
    return torch.tensor(rows, dtype=torch.bool).reshape(batch_size, length)


@st.composite
def layouts(draw: st.DrawFn, max_size: int = 4, max_side: int = 5, max_text: int = 6) -> Layout:
    """The layout of a batch of mixed grids, with text given by a mask, by lengths or not at all."""
    pairs = draw(grids(max_size=max_size, max_side=max_side))
    kind = draw(st.sampled_from(["mask", "lengths", "none"]))
    if kind == "mask":
        return Layout.build(pairs, text_mask=draw(text_masks(len(pairs), max_text)))
    if kind == "lengths":
        lengths = st.lists(st.integers(0, max_text), min_size=len(pairs), max_size=len(pairs))
        return Layout.build(pairs, text_lengths=draw(lengths))
    return Layout.build(pairs)
