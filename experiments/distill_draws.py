"""The random numbers of an update: a function of (seed, update, picture), whatever the rank and the batch mates.

Axes: b samples, N image tokens, c channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from experiments.bank import Batch, random_stream

__all__ = ["Draws", "draw"]

_STREAM = 0x64697374
"""Keeps these numbers apart from those that :meth:`FeatureBank.collate` draws for the same picture."""


class Draws(NamedTuple):
    """What one update of student or critic needs besides the batch's own noise."""

    stop: Tensor
    """``[b]`` in [0, 1): which step of the student's grid, as a share."""
    update: float
    """In [0, 1): the same for the whole update."""
    levels: Tensor
    """``[b, 2]`` in [0, 1): noise levels of matching and augmentation."""
    matching: Tensor
    """``[N, c]`` standard normal: re-noises the student's samples for matching, fake score and discriminator."""
    augmentation: Tensor
    """``[N, c]``: for guidance augmentation."""
    real: Tensor
    """``[N, c]``: for the discriminator's reals."""
    perturbation: Tensor
    """``[N, c]``: of the noised reals, for the gradient penalty."""
    walk: list[Tensor]
    """``[N, c]`` each: between the student's steps."""


def draw(batch: Batch, seed: int, update: int, *, num_walk: int) -> Draws:
    """Draw for every sample of a batch.

    Args:
        batch: whose samples and shapes.
        seed: of the run.
        update: number of the update, the critic's and the student's counted together.
        num_walk: noises for the student's walk; 0 without fresh noise.

    Returns:
        The numbers, on the batch's device.
    """
    shares, noises = [], []
    for picture, length in zip(batch.pictures, batch.layout.image_lengths, strict=True):
        stream = random_stream(_STREAM, seed, update, picture)
        shares.append(torch.rand(3, generator=stream))
        noises.append(torch.randn(4 + num_walk, length, batch.noise.shape[1], generator=stream))
    table = torch.stack(shares).to(batch.noise.device)
    common = torch.rand((), generator=random_stream(_STREAM, seed, update)).item()
    matching, augmentation, real, perturbation, *walk = torch.cat(noises, dim=1).to(batch.noise.device)
    return Draws(table[:, 0], common, table[:, 1:], matching, augmentation, real, perturbation, walk)
