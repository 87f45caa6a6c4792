"""The slots of a step, and mixed shapes dealt to them so that all finish together (evened out in ``exchange.py``).

Axes: n samples of a step, s slots. Longest processing time first (Graham 1969): the largest
sample next, into the slot of least FLOPs that has room under a cap on tokens.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PlannedStep", "StepTotals", "always_fits", "assign_slots"]


class StepTotals(NamedTuple):
    """What a whole step holds, over all slots and so over all ranks: what its losses are normalised by.

    Example:
        >>> StepTotals(images=2, image_tokens=80, text_tokens=9).image_tokens
        80
    """

    images: int
    """Number of samples."""
    image_tokens: int
    """Image tokens of all samples."""
    text_tokens: int
    """Text tokens of all samples, as far as the plan knows them; dropped texts count."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """The samples of one step, slot after slot.

    Example:
        >>> step = PlannedStep(0, np.array([7, 3, 9, 5]), np.array([0, 2, 3, 4, 4]))
        >>> [samples.tolist() for samples in step.share(rank=0, world_size=2)]
        [[7, 3], [5]]
    """

    step: int
    samples: NDArray[np.int64]
    """``[N]`` sample numbers."""
    offsets: NDArray[np.int64]
    """``[s + 1]``: slot i holds ``samples[offsets[i] : offsets[i + 1]]``."""

    def slot(self, index: int) -> NDArray[np.int64]:
        """Samples of one slot, counted from 0."""
        if not 0 <= index < len(self.offsets) - 1:
            raise ValueError(f"index: expected a slot from 0 to {len(self.offsets) - 2}, got {index}")
        return self.samples[self.offsets[index] : self.offsets[index + 1]]

    def repeats(self, index: int) -> NDArray[np.int64]:
        """How often each sample of a slot came before in this step; zeros, unless its bucket is smaller than its part.

        With the seed, the step and the sample number it names a sample's own noise and time.

        Example:
            >>> PlannedStep(0, np.array([7, 3, 7, 5, 7]), np.array([0, 2, 5])).repeats(1).tolist()
            [1, 0, 2]
        """
        order = np.argsort(self.samples, kind="stable")
        ordered = self.samples[order]
        counts = np.empty(len(order), np.int64)
        counts[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return counts[self.offsets[index] : self.offsets[index + 1]]

    def share(self, rank: int, world_size: int) -> list[NDArray[np.int64]]:
        """Micro-batches of one rank, in order: micro-step m is slot ``m * world_size + rank``.

        Raises:
            ValueError: if the ranks would not get equally many, or there is no such rank.
        """
        if world_size < 1 or (len(self.offsets) - 1) % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rank, world_size: expected a divisor of {len(self.offsets) - 1} slots and a rank below it, "
                f"got rank {rank} of {world_size}"
            )
        return [self.slot(index) for index in range(rank, len(self.offsets) - 1, world_size)]


def assign_slots(
    tokens: NDArray[np.int64], costs: NDArray[np.float64], num_slots: int, max_tokens: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Deal samples to slots: from most tokens to least, each to the slot of least cost in which it fits.

    Equal token counts go by cost, then by position. Sorting by tokens rather than by cost is what makes
    :func:`always_fits` a proof, and for a transformer the two orders are nearly one.

    Args:
        tokens: ``[n]`` tokens of each sample.
        costs: ``[n]`` what is to be balanced, FLOPs; positive.
        num_slots: s.
        max_tokens: most tokens of one slot; none by default.

    Returns:
        ``[n]`` the samples' positions, slot after slot, and ``[s + 1]`` where each slot begins. With n >= s no slot
        is empty.

    Raises:
        ValueError: if a sample does not fit anywhere.

    Example:
        >>> order, offsets = assign_slots(np.array([4, 1, 3, 2]), np.array([4.0, 1.0, 3.0, 2.0]), 2)
        >>> order.tolist(), offsets.tolist()
        ([0, 1, 2, 3], [0, 2, 4])
    """
    order = np.lexsort((-costs, -tokens))
    heap = [(0.0, slot) for slot in range(num_slots)]
    room = [max_tokens] * num_slots if max_tokens is not None else None
    chosen = np.empty(len(tokens), np.int64)
    for item, size, cost in zip(order.tolist(), tokens[order].tolist(), costs[order].tolist(), strict=True):
        full = []
        while room is not None and heap and room[heap[0][1]] < size:
            full.append(heapq.heappop(heap))
        if not heap:
            raise ValueError(f"max_tokens: no slot of {num_slots} has room for {size} more tokens under {max_tokens}")
        load, slot = heap[0]
        heapq.heapreplace(heap, (load + cost, slot))
        if room is not None:
            room[slot] -= size
        for entry in full:
            heapq.heappush(heap, entry)
        chosen[item] = slot
    by_slot = order[np.argsort(chosen[order], kind="stable")]
    return by_slot, np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=num_slots))])


def always_fits(
    tokens: Sequence[int], least: Sequence[int], most: Sequence[int], total: int, num_slots: int, max_tokens: int
) -> bool:
    """Whether :func:`assign_slots` must succeed on every mixture within the given counts.

    A sample of m tokens fails only if every slot already holds more than ``max_tokens - m`` tokens of samples that
    have at least m. There cannot be that many if the samples of m tokens or more, in the mixture with most of them,
    number at most ``num_slots * floor(max_tokens / largest)``, or have at most
    ``num_slots * (max_tokens - m + 1) - 1 + m`` tokens. True is a proof; false may be pessimistic.

    Args:
        tokens: most tokens of one sample, kind by kind.
        least: fewest samples of each kind in a step.
        most: most samples of each kind in a step.
        total: samples of a step.
        num_slots: slots of a step.
        max_tokens: cap of one slot.

    Returns:
        Whether all such steps fit.

    Example:
        >>> always_fits([4, 1], [0, 0], [8, 8], 8, num_slots=4, max_tokens=8)
        True
        >>> always_fits([4, 1], [0, 0], [9, 9], 9, num_slots=4, max_tokens=8)
        False
    """
    kinds = sorted((kind for kind in range(len(tokens)) if most[kind]), key=lambda kind: -tokens[kind])
    if not kinds:
        return True
    largest, spare = tokens[kinds[0]], total - sum(least)
    number = size = 0
    for kind in kinds:
        extra = min(spare, most[kind] - least[kind])
        spare -= extra
        number += least[kind] + extra
        size += (least[kind] + extra) * tokens[kind]
        by_number = number <= num_slots * (max_tokens // largest)
        by_size = size - tokens[kind] < num_slots * (max_tokens - tokens[kind] + 1)
        if tokens[kind] > max_tokens or not (by_number or by_size):
            return False
    return True
