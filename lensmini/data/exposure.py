"""Which bucket is drawn how often before a given step: a closed form, so that seeking costs O(number of buckets).

Symbols: k step, U units per step (a unit is what is drawn whole: the batch of a slot, of a step, or one sample),
j bucket, r_j its share of the units, c_j(k) units of bucket j before step k.

Wanted are integers c_j(k) with sum_j c_j(k) = U k that never decrease in k and stay near r_j U k, without walking
through the steps before. Three pieces give them, in exact integer arithmetic:

1. A split in two. If a node of a binary tree has received c units and a share p of them goes left, the left child has
   received floor(p c + 1/2) and the right one the rest. Both never decrease in c, so down the tree none decreases
   in k. A rounding is off by 1/2 at most, and a child with a part w / w_v of its ancestor v's weight inherits that
   part of v's deviation: |c_j - r_j U k| <= 1/2 sum_v w_j / w_v, over the nodes v from the leaf to below the root.
2. The tree over sources is grown from the heaviest, each next put where that bound stays smallest: it is below 1 for
   up to four sources and has been below 1.2 in trials with more. Below a source its buckets form a Huffman tree,
   whose weights grow like Fibonacci numbers toward the root, so a leaf's bound is 1.7 at most.
3. A fan. With U r_s >= 1 for every source, c_s = floor(P_s U k + 1/2) - floor(P_(s-1) U k + 1/2) with cumulative
   shares P does not decrease from step to step either, and is off by 1 at most, however many sources there are.

Expected exposure is exact in the long run: c_j(k) / (U k) tends to r_j, which is a ratio of integers, never rounded.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from operator import index
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Schedule", "as_int", "bucket_shares", "make_schedule"]

Tree: TypeAlias = "int | tuple[Tree, Tree]"

# Growing a tree by insertion costs the cube of the number of leaves.
_GROWN_LEAVES = 12


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many units of each bucket come before any step; made by :func:`make_schedule`.

    Example:
        >>> schedule = make_schedule([1, 2, 1], 4)
        >>> schedule.counts(10**15), schedule.deviation
        ([1000000000000000, 2000000000000000, 1000000000000000], 1.0)
    """

    num_buckets: int
    units: int
    """Units per step, U."""
    fan: tuple[tuple[int, int], ...]
    """Node and cumulative weight, up to the total; one entry if the root is a tree."""
    splits: tuple[tuple[int, int, int, int, int], ...]
    """Parent, left child, right child, weight of the left one, weight of the parent; from the root down."""
    deviation: float
    """Most units by which any source can differ from its share before any step."""

    def counts(self, step: int) -> list[int]:
        """Units of each bucket before that step, exact for any step; they sum to ``step * units``."""
        step = as_int("step", step, least=0)
        count = [0] * (self.num_buckets + len(self.splits))
        total, previous = self.fan[-1][1], 0
        for node, cumulative in self.fan:
            edge = (2 * cumulative * step * self.units + total) // (2 * total)
            count[node], previous = edge - previous, edge
        for parent, left, right, part, weight in self.splits:
            count[left] = (2 * count[parent] * part + weight) // (2 * weight)
            count[right] = count[parent] - count[left]
        return count[: self.num_buckets]

    def counts_between(self, start: int, stop: int) -> NDArray[np.int64]:
        """:meth:`counts` before the steps from ``start`` to ``stop``, both included: ``[stop - start + 1, buckets]``."""
        start, stop = as_int("start", start, least=0), as_int("stop", stop, least=0)
        if start > stop:
            raise ValueError(f"start, stop: expected 0 <= start <= stop, got {start}, {stop}")
        total = self.fan[-1][1]
        if 2 * total * (stop * self.units + 1) >= 2**63:
            return np.array([self.counts(step) for step in range(start, stop + 1)])
        drawn = np.arange(start, stop + 1) * self.units
        count = np.zeros((self.num_buckets + len(self.splits), len(drawn)), np.int64)
        previous = np.zeros(len(drawn), np.int64)
        for node, cumulative in self.fan:
            edge = (2 * cumulative * drawn + total) // (2 * total)
            count[node], previous = edge - previous, edge
        for parent, left, right, part, weight in self.splits:
            count[left] = (2 * part * count[parent] + weight) // (2 * weight)
            count[right] = count[parent] - count[left]
        return count[: self.num_buckets].T

    def extremes(self) -> tuple[list[int], list[int]]:
        """Fewest and most units of each bucket in one step, over all steps (bounds, not always attained)."""
        least = [0] * (self.num_buckets + len(self.splits))
        most = least.copy()
        total, previous = self.fan[-1][1], 0
        for node, cumulative in self.fan:
            part, previous = (cumulative - previous) * self.units, cumulative
            # A difference of two roundings: anything less than 2 away from its mean, unless it is all there is.
            slack = 1 if len(self.fan) > 1 else 0
            least[node] = max(0, part // total - slack)
            most[node] = min(self.units, -(-part // total) + slack)
        for parent, left, right, part, weight in self.splits:
            for child, share in ((left, part), (right, weight - part)):
                least[child] = least[parent] * share // weight
                most[child] = -(-most[parent] * share // weight)
        return least[: self.num_buckets], most[: self.num_buckets]


def as_int(name: str, value: Any, *, least: int) -> int:
    """A Python integer, which never overflows, from any integer type.

    Args:
        name: what the value is, for the message.
        value: int, numpy integer or whatever else counts as an integer.
        least: smallest value allowed.

    Returns:
        The same number.

    Raises:
        ValueError: if it is no integer or less than ``least``.

    Example:
        >>> as_int("step", np.int64(3), least=0) * 10**30 == 3 * 10**30
        True
    """
    try:
        number = index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def make_schedule(rates: Sequence[Fraction | int], units: int, *, sources: Sequence[int] | None = None) -> Schedule:
    """Plan how units are shared among buckets, step after step.

    Args:
        rates: for each bucket its share of the units, not negative; only ratios matter. Zero: never drawn.
        units: units per step, at least 1.
        sources: for each bucket the label of its source, whose deviation :attr:`Schedule.deviation` bounds;
            each bucket its own by default.

    Returns:
        The schedule.

    Raises:
        ValueError: if a rate is negative or all are zero, or lengths differ, or ``units`` is not positive.

    Example:
        >>> schedule = make_schedule([1, 3], 2)
        >>> [schedule.counts(step) for step in range(5)]
        [[0, 0], [0, 2], [1, 3], [1, 5], [2, 6]]
    """
    units = as_int("units", units, least=1)
    labels = list(range(len(rates))) if sources is None else list(sources)
    if len(labels) != len(rates):
        raise ValueError(f"sources: expected one label for each of {len(rates)} buckets, got {len(labels)}")
    if any(rate < 0 for rate in rates) or not any(rates):
        raise ValueError(f"rates: expected shares that are not negative and not all zero, got {list(rates)}")
    exact = [Fraction(rate) for rate in rates]
    denominator = lcm(*(rate.denominator for rate in exact))
    weights = [int(rate * denominator) for rate in exact]
    members: dict[int, list[int]] = {}
    for bucket, weight in enumerate(weights):
        if weight:
            members.setdefault(labels[bucket], []).append(bucket)
    builder = _Builder(weights)
    heads = [builder.join(_huffman(buckets, weights)) for buckets in members.values()]
    total = sum(weights)
    if all(builder.weights[head] * units >= total for head in heads):
        cumulative, fan = 0, []
        for head in heads:
            cumulative += builder.weights[head]
            fan.append((head, cumulative))
        deviation = 1.0 if len(heads) > 1 else 0.0
    else:
        tree = _grow(heads, builder.weights) if len(heads) <= _GROWN_LEAVES else _huffman(heads, builder.weights)
        deviation = max(_path_sums(tree, builder.weights)[1].values()) / 2
        fan = [(builder.join(tree), total)]
    return Schedule(len(weights), units, tuple(fan), tuple(reversed(builder.splits)), deviation)


def bucket_shares(sizes: Sequence[int], sources: Sequence[int], weights: Sequence[float] | None) -> list[Fraction]:
    """Share of the images of each bucket, exactly: a source's weight, divided over its buckets by their samples.

    Args:
        sizes: samples of each bucket.
        sources: label of each bucket's source, an index of ``weights``.
        weights: share of each source, not negative; None to count all samples of all buckets alike.

    Returns:
        A share for each bucket; only ratios matter.

    Raises:
        ValueError: if lengths or labels do not match, a weight is negative or not finite, all are zero, or a source
            with a weight has no samples.

    Example:
        >>> [str(share) for share in bucket_shares([10, 30, 7], [0, 0, 1], [0.5, 0.5])]
        ['1/8', '3/8', '1/2']
    """
    if len(sources) != len(sizes):
        raise ValueError(f"sources: expected one label for each of {len(sizes)} buckets, got {len(sources)}")
    if weights is None:
        return [Fraction(count) for count in sizes]
    if any(not 0 <= source < len(weights) for source in sources):
        raise ValueError(f"sources: expected labels 0 to {len(weights) - 1}, one for each weight, got {sources}")
    if any(not 0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ValueError(f"weights: expected shares that are not negative and not all zero, got {list(weights)}")
    held = [sum(count for count, label in zip(sizes, sources, strict=True) if label == s) for s in range(len(weights))]
    for source, (weight, count) in enumerate(zip(weights, held, strict=True)):
        if weight and not count:
            raise ValueError(f"weights: source {source} has weight {weight} and no samples")
    return [
        Fraction(float(weights[source])) * count / held[source] if count else Fraction(0)
        for count, source in zip(sizes, sources, strict=True)
    ]


class _Builder:
    """Numbers the inner nodes of trees after the buckets, children before parents."""

    def __init__(self, weights: list[int]) -> None:
        self.weights = list(weights)
        self.splits: list[tuple[int, int, int, int, int]] = []

    def join(self, tree: Tree) -> int:
        if isinstance(tree, int):
            return tree
        left, right = self.join(tree[0]), self.join(tree[1])
        node = len(self.weights)
        self.weights.append(self.weights[left] + self.weights[right])
        self.splits.append((node, left, right, self.weights[left], self.weights[node]))
        return node


def _huffman(leaves: Sequence[int], weights: Sequence[int]) -> Tree:
    heap: list[tuple[int, int, Tree]] = [(weights[leaf], rank, leaf) for rank, leaf in enumerate(leaves)]
    heapq.heapify(heap)
    rank = len(heap)
    while len(heap) > 1:
        (first, _, left), (second, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (first + second, rank, (left, right)))
        rank += 1
    return heap[0][2]


def _grow(leaves: Sequence[int], weights: Sequence[int]) -> Tree:
    heaviest, *others = sorted(leaves, key=lambda leaf: -weights[leaf])
    tree: Tree = heaviest
    for leaf in others:
        tree = min(_insertions(tree, leaf), key=lambda grown: max(_path_sums(grown, weights)[1].values()))
    return tree


def _insertions(tree: Tree, leaf: int) -> list[Tree]:
    """The tree with a leaf put beside any one of its nodes."""
    grown: list[Tree] = [(tree, leaf)]
    if not isinstance(tree, int):
        grown += [(left, tree[1]) for left in _insertions(tree[0], leaf)]
        grown += [(tree[0], right) for right in _insertions(tree[1], leaf)]
    return grown


def _path_sums(tree: Tree, weights: Sequence[int]) -> tuple[int, dict[int, float]]:
    """Weight of a tree, and for each leaf j the sum of w_j / w_v over its ancestors and itself below the root."""
    if isinstance(tree, int):
        return weights[tree], {tree: 0.0}
    sums: dict[int, float] = {}
    total = 0
    for child in tree:
        weight, below = _path_sums(child, weights)
        total += weight
        sums.update({leaf: value + weights[leaf] / weight for leaf, value in below.items()})
    return total, sums
