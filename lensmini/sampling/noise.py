"""Noise that belongs to its seed, whatever else is in the batch.

Axes: b samples, N image tokens of a packed batch, c channels, h and w latent height and width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from lensmini.packed import Layout

__all__ = ["initial_noise", "step_noise"]


def initial_noise(
    seeds: Sequence[int],
    channels: int,
    grid: tuple[int, int] | Layout,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise from one seed per sample: a seed gives the same noise alone and in any batch.

    Drawn on the CPU in token order ``[h * w, c]``, the order of published seeds, and then arranged.

    Args:
        seeds: b seeds.
        channels: latent channels c.
        grid: latent height and width of every sample, for dense noise; or a layout, for packed noise.
        dtype: floating dtype to draw in. Another dtype is another draw; published seeds used the transformer's.
        device: where to put the result; by default the CPU, or the layout's device.

    Returns:
        ``[b, c, h, w]`` for a pair, ``[N, c]`` for a layout.

    Raises:
        ValueError: if there is no seed, a size is not positive, or the layout has another number of samples.

    Example:
        >>> noise = initial_noise([0, 1], 4, (2, 3))
        >>> noise.shape, bool((noise[1:] == initial_noise([1], 4, (2, 3))).all())
        (torch.Size([2, 4, 2, 3]), True)
    """
    lengths = grid.image_lengths if isinstance(grid, Layout) else (grid[0] * grid[1],) * len(seeds)
    if not seeds or len(seeds) != len(lengths):
        raise ValueError(f"seeds: expected one per sample ({len(lengths) or 'at least one'}), got {len(seeds)}")
    if channels < 1 or (not isinstance(grid, Layout) and min(grid) < 1):
        raise ValueError(f"channels and grid: expected positive sizes, got {channels} and {grid}")
    tokens = [
        torch.randn(length, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        for seed, length in zip(seeds, lengths, strict=True)
    ]
    if isinstance(grid, Layout):
        return torch.cat(tokens).to(grid.image_offsets.device if device is None else device)
    return rearrange(torch.stack(tokens), "b (h w) c -> b c h w", h=grid[0]).contiguous().to(device)


def step_noise(
    seeds: Sequence[int],
    step: int,
    channels: int,
    grid: tuple[int, int] | Layout,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise of one stochastic step: a function of each sample's seed and the step, never of the batch.

    Args:
        seeds: b seeds, not negative; the same as for :func:`initial_noise`, which this noise is independent of.
        step: index of the step, from 0.
        channels: latent channels c.
        grid: latent height and width of every sample, for dense noise; or a layout, for packed noise.
        dtype: floating dtype to draw in.
        device: where to put the result.

    Returns:
        ``[b, c, h, w]`` for a pair, ``[N, c]`` for a layout.

    Raises:
        ValueError: if a seed or the step is negative, or as for :func:`initial_noise`.

    Example:
        >>> both, one = step_noise([4, 5], 2, 8, (2, 3)), step_noise([5], 2, 8, (2, 3))
        >>> bool((both[1:] == one).all()), bool((one == step_noise([5], 3, 8, (2, 3))).any())
        (True, False)
    """
    if step < 0 or any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds and step: expected no negative number, got {list(seeds)} and {step}")
    # Mixed by numpy's seed sequence, so that neighbouring seeds and steps share nothing; 63 bits for torch.
    mixed = [int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]) >> 1 for seed in seeds]
    return initial_noise(mixed, channels, grid, dtype=dtype, device=device)
