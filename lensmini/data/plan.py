"""The order of samples of a whole run, as a pure function of (seed, step): nothing to save, nothing to replay.

Symbols: k step, s slots of a step, j bucket, n_j its samples, b_j images of a slot of bucket j, N samples of a step.
Samples are numbered bucket by bucket, as a :class:`SampleIndex` sorts them; a plan knows only how many there are.

A step is ``num_slots`` micro-batches. :mod:`lensmini.data.exposure` says in closed form how many units c_j(k) of a
bucket come before step k, so the step continues bucket j's endless stream of samples at position u_j c_j(k), u_j
samples being a unit. The stream is epoch after epoch of the bucket in an order of its own, computed position by
position by :mod:`lensmini.data.permute`: position q is sample q mod n_j of epoch floor(q / n_j). A batch that an epoch
leaves short goes on with the next epoch, so no sample is dropped and none comes twice before all others came once.
Ranks do not enter: ``world_size`` ranks share the slots, and any rank count sees the same steps.
"""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lensmini.cost import ModelSize, train_flops
from lensmini.data.assign import PlannedStep, StepTotals, always_fits, assign_slots
from lensmini.data.balance import PlanReport, measure_steps
from lensmini.data.exchange import even_out
from lensmini.data.exposure import Schedule, as_int, bucket_shares, make_schedule
from lensmini.data.permute import derive_key, permute, permute_windows

__all__ = ["BatchPlan"]

Mode = Literal["bucket", "packed", "same_bucket"]

# Changes whenever the same arguments would give another order, so that an old checkpoint is told apart.
_ORDER_VERSION = 2
_STREAM, _SLOTS = 1, 2
# One call with a key for every sample costs as much as a few calls with one key each.
_LOOPED_EPOCHS = 4


class BatchPlan:
    """Which samples make up step k, for every k, at any number of ranks.

    Args:
        sizes: ``[j]`` samples of each bucket; may be zero.
        tokens: ``[j]`` image tokens of one sample.
        num_slots: micro-batches of a step. The published run: 128, one per rank.
        seed: of the order.
        mode: ``"bucket"``, each slot holds one bucket and a step mixes buckets (arXiv 2605.21573, section 3);
            ``"packed"``, slots of mixed shapes that take equally long; ``"same_bucket"``, one bucket per step.
        images_per_slot: images of a slot of each bucket (24, 10 and 6 in the paper), or one number for all. With
            ``"packed"`` one number: the mean. By default as many as ``max_tokens`` surely holds.
        max_tokens: most tokens of any slot, image and text; None for no cap.
        text_tokens: most text tokens of any sample.
        text_lengths: ``[n]`` text tokens of every sample, if known; read where a step needs them, so it may be
            memory-mapped. Balances packed slots better; ``text_tokens`` must bound it.
        sources: ``[j]`` label of each bucket's source (data set, base, or both), 0 to the number of weights - 1;
            each bucket its own by default.
        weights: for each source its share of the images; inside a source all samples count the same. By default all
            samples of all buckets do: each comes once an epoch.
        model: sizes that FLOPs are counted for; without it the cost of a sample is its tokens.
        window: samples that are read near each other before others are (:func:`permute_windows`), for
            data in large shards; by default a bucket is shuffled whole.

    Raises:
        ValueError: if an argument is outside its range, or a step might not fit into ``num_slots`` slots of
            ``max_tokens``.

    Example:
        >>> plan = BatchPlan([6, 3], [16, 64], num_slots=2, images_per_slot=[2, 1], seed=0)
        >>> plan.step(1).offsets.tolist(), sorted(np.concatenate([plan.step(k).samples for k in range(3)]).tolist())
        ([0, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8])
    """

    def __init__(
        self,
        sizes: ArrayLike,
        tokens: ArrayLike,
        *,
        num_slots: int,
        seed: int,
        mode: Mode = "bucket",
        images_per_slot: int | Sequence[int] | None = None,
        max_tokens: int | None = None,
        text_tokens: int = 0,
        text_lengths: NDArray[np.integer] | None = None,
        sources: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        model: ModelSize | None = None,
        window: int | None = None,
    ) -> None:
        self.sizes, self.tokens = _counts("sizes", sizes, least=0), _counts("tokens", tokens, least=1)
        if len(self.tokens) != len(self.sizes) or not self.sizes.sum():
            raise ValueError(
                f"sizes, tokens: expected one entry per bucket and at least one sample, got {len(self.sizes)} and "
                f"{len(self.tokens)} entries and {self.sizes.sum()} samples"
            )
        if mode not in ("bucket", "packed", "same_bucket"):
            raise ValueError(f'mode: expected "bucket", "packed" or "same_bucket", got {mode!r}')
        if text_lengths is not None and len(text_lengths) != self.sizes.sum():
            raise ValueError(f"text_lengths: expected {self.sizes.sum()} entries, got {len(text_lengths)}")
        self.mode, self.text_lengths, self.model = mode, text_lengths, model
        self.num_slots = as_int("num_slots", num_slots, least=1)
        self.seed = as_int("seed", seed, least=-(2**63))
        self.text_tokens = text_tokens = as_int("text_tokens", text_tokens, least=0)
        self.max_tokens = None if max_tokens is None else as_int("max_tokens", max_tokens, least=1)
        self.window = None if window is None else as_int("window", window, least=1)
        if images_per_slot is None and max_tokens is None:
            raise ValueError("images_per_slot: expected it or max_tokens, got neither")
        labels = range(len(self.sizes)) if sources is None else sources
        self.sources = [as_int("sources", label, least=0) for label in labels]
        self.weights, self._ends = weights, np.cumsum(self.sizes)
        shares = bucket_shares(self.sizes.tolist(), self.sources, weights)
        most_tokens = [int(count) + text_tokens for count in self.tokens]
        if mode == "packed":
            self.images_per_slot = np.ones(len(self.sizes), np.int64)
            self.schedule = self._packed_schedule(shares, most_tokens, images_per_slot)
        else:
            self.images_per_slot = self._slot_images(most_tokens, images_per_slot, shares)
            rates = [share / int(images) for share, images in zip(shares, self.images_per_slot, strict=True)]
            self.schedule = make_schedule(rates, num_slots if mode == "bucket" else 1, sources=self.sources)

    def step(self, k: int) -> PlannedStep:
        """The samples of step k; the same whichever steps were asked for before.

        Raises:
            ValueError: if k is negative.
        """
        k = as_int("k", k, least=0)
        samples, offsets = self.assign(k, k + 1)
        return PlannedStep(k, samples, offsets)

    def assign(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Steps ``start`` to ``stop - 1`` at once, which is much faster than one by one.

        Args:
            start: first step.
            stop: step after the last.

        Returns:
            ``[n]`` sample numbers, slot after slot and step after step, and ``[(stop - start) * s + 1]`` where each
            slot begins.

        Raises:
            ValueError: if the steps are not ``0 <= start < stop``.
        """
        start, stop = as_int("start", start, least=0), as_int("stop", stop, least=0)
        if start >= stop:
            raise ValueError(f"start, stop: expected 0 <= start < stop, got {start}, {stop}")
        counts = self.schedule.counts_between(start, stop)
        drawn = np.diff(counts, axis=0)
        if self.mode == "same_bucket":
            buckets = np.repeat(drawn.argmax(1), self.num_slots)
            return self._fill(buckets, counts[0] * self.num_slots)
        buckets = np.repeat(np.tile(np.arange(len(self.sizes)), stop - start), drawn.reshape(-1))
        if self.mode == "bucket":
            # Which slot, and so which rank, gets which bucket: a fresh order every step.
            places = np.arange(start * self.num_slots, stop * self.num_slots).reshape(-1, self.num_slots)
            order = np.argsort(derive_key(self.seed, _SLOTS, places), axis=1)
            buckets = np.take_along_axis(buckets.reshape(order.shape), order, 1).reshape(-1)
            return self._fill(buckets, counts[0])
        samples, _ = self._fill(buckets, counts[0])
        return self._pack(samples, buckets)

    def micro_steps(self, world_size: int) -> int:
        """Micro-batches of every rank in every step.

        Raises:
            ValueError: if ``world_size`` does not divide ``num_slots``.
        """
        if world_size < 1 or self.num_slots % world_size:
            raise ValueError(f"world_size: expected a divisor of num_slots = {self.num_slots}, got {world_size}")
        return self.num_slots // world_size

    def bucket_of(self, samples: ArrayLike) -> NDArray[np.int64]:
        """Bucket of each sample number."""
        return np.searchsorted(self._ends, np.asarray(samples), side="right")

    def lengths(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image and text tokens of each sample, text as far as the plan knows it (else ``text_tokens``).

        Raises:
            ValueError: if a text is longer than ``text_tokens``.
        """
        image = self.tokens[self.bucket_of(samples)]
        if self.text_lengths is None:
            return image, np.full(len(samples), self.text_tokens)
        text = np.asarray(self.text_lengths[samples]).astype(np.int64)
        if len(text) and (text.max() > self.text_tokens or text.min() < 0):
            raise ValueError(
                f"text_lengths: expected 0 to text_tokens = {self.text_tokens}, got {text.min()} to {text.max()}"
            )
        return image, text

    def totals(self, step: PlannedStep) -> StepTotals:
        """What a step holds in all; every rank computes it alike, without communication."""
        image, text = self.lengths(step.samples)
        return StepTotals(len(image), int(image.sum()), int(text.sum()))

    def costs(self, image_tokens: NDArray[np.int64], text_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """What slots are balanced by: FLOPs of a training step, or tokens if there is no model."""
        if self.model is None:
            return (image_tokens + text_tokens).astype(np.float64)
        return train_flops(self.model, image_tokens, text_tokens)

    def report(self, steps: int | range, *, world_size: int | None = None) -> PlanReport:
        """Measure what steps would do: balance, padding, tokens, exposure (:class:`PlanReport`).

        Args:
            steps: which steps; a number means the first ones.
            world_size: ranks; one per slot by default.
        """
        world_size = self.num_slots if world_size is None else world_size
        self.micro_steps(world_size)
        chosen = range(steps) if isinstance(steps, int) else steps
        return measure_steps(self, chosen, world_size)

    def fingerprint(self) -> str:
        """32 hexadecimal digits that differ where the order differs; a checkpoint keeps them.

        Of ``text_lengths`` up to 1,024 evenly spread entries count, of ``model`` its costs.
        """
        stride = 1 if self.text_lengths is None else -(-len(self.text_lengths) // 1024)
        facts = {
            "version": _ORDER_VERSION,
            "seed": self.seed,
            "mode": self.mode,
            "num_slots": self.num_slots,
            "sizes": self.sizes.tolist(),
            "tokens": self.tokens.tolist(),
            "images": self.images_per_slot.tolist(),
            "window": self.window,
            "schedule": [self.schedule.units, self.schedule.fan, self.schedule.splits],
        }
        if self.mode == "packed":
            text = np.array([0, self.text_tokens])
            facts["cap"] = [self.max_tokens, self.text_tokens]
            facts["costs"] = [self.costs(np.full(2, count), text).tolist() for count in self.tokens]
            facts["text"] = None if self.text_lengths is None else np.asarray(self.text_lengths[::stride]).tolist()
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _fill(
        self, buckets: NDArray[np.int64], first: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give each slot the next images of its bucket's stream; ``first`` counts the slots before, bucket by bucket."""
        offsets = np.concatenate([[0], np.cumsum(self.images_per_slot[buckets])])
        samples = np.empty(offsets[-1], np.int64)
        for bucket in np.unique(buckets).tolist():
            images, slots = int(self.images_per_slot[bucket]), np.flatnonzero(buckets == bucket)
            stream = self._stream(bucket, int(first[bucket]) * images, len(slots) * images)
            samples[offsets[slots][:, None] + np.arange(images)] = stream.reshape(-1, images)
        return samples, offsets

    def _stream(self, bucket: int, start: int, length: int) -> NDArray[np.int64]:
        size, key = int(self.sizes[bucket]), derive_key(self.seed, _STREAM, bucket)
        base = int(self._ends[bucket]) - size
        epochs = range(start // size, (start + length - 1) // size + 1)
        if len(epochs) > _LOOPED_EPOCHS:
            positions = np.arange(start, start + length)
            return self._shuffle(positions % size, size, derive_key(key, positions // size)) + base
        pieces = []
        for epoch in epochs:
            here = np.arange(max(start - epoch * size, 0), min(start + length - epoch * size, size))
            pieces.append(self._shuffle(here, size, derive_key(key, epoch)))
        return np.concatenate(pieces) + base

    def _shuffle(self, positions: NDArray[np.int64], size: int, key: ArrayLike) -> NDArray[np.int64]:
        if self.window is None:
            return permute(positions, size, key)
        return permute_windows(positions, size, self.window, key)

    def _pack(
        self, samples: NDArray[np.int64], buckets: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        image, text = self.lengths(samples)
        costs, units = self.costs(image, text), self.schedule.units
        offsets = [np.zeros(1, np.int64)]
        for begin in range(0, len(samples), units):
            part = slice(begin, begin + units)
            size, cost = (image + text)[part], costs[part]
            order, ends = assign_slots(size, cost, self.num_slots, self.max_tokens)
            order, ends = even_out(order, ends, size, cost, self.max_tokens)
            samples[part] = samples[part][order]
            offsets.append(begin + ends[1:])
        return samples, np.concatenate(offsets)

    def _slot_images(
        self, most_tokens: list[int], images: int | Sequence[int] | None, shares: list[Fraction]
    ) -> NDArray[np.int64]:
        if images is None:
            chosen = [self.max_tokens // count for count in most_tokens]  # pyright: ignore[reportOptionalOperand]
        else:
            many = [images] * len(most_tokens) if np.ndim(images) == 0 else images
            chosen = [as_int("images_per_slot", count, least=0) for count in many]  # pyright: ignore
        if len(chosen) != len(most_tokens):
            raise ValueError(f"images_per_slot: expected one per bucket, {len(most_tokens)}, got {len(chosen)}")
        for bucket, (count, length, share) in enumerate(zip(chosen, most_tokens, shares, strict=True)):
            if share and images is not None and count < 1:
                raise ValueError(f"images_per_slot: expected at least 1, got {count} for bucket {bucket}")
            if share and self.max_tokens is not None and max(count, 1) * length > self.max_tokens:
                raise ValueError(
                    f"max_tokens: {max(count, 1)} images of bucket {bucket} have up to {max(count, 1) * length} tokens "
                    f"with text, a slot holds {self.max_tokens}"
                )
        return np.maximum(np.array(chosen, np.int64), 1)

    def _packed_schedule(
        self, shares: list[Fraction], most_tokens: list[int], images: int | Sequence[int] | None
    ) -> Schedule:
        if images is not None:
            if np.ndim(images):
                raise ValueError(f"images_per_slot: expected one number in mode packed, got {images}")
            images = as_int("images_per_slot", images, least=1)

        def fits(schedule: Schedule, cap: int) -> bool:
            return always_fits(most_tokens, *schedule.extremes(), schedule.units, self.num_slots, cap)

        if images is not None:
            schedule = make_schedule(shares, images * self.num_slots, sources=self.sources)
            if self.max_tokens is not None and not fits(schedule, self.max_tokens):
                enough = self.max_tokens
                while not fits(schedule, enough):
                    enough += max(1, enough // 100)
                raise ValueError(
                    f"max_tokens: {schedule.units} images a step may not fit into {self.num_slots} slots of "
                    f"{self.max_tokens} tokens; {enough} are enough"
                )
            return schedule
        cap: int = self.max_tokens  # pyright: ignore[reportAssignmentType]
        mean = sum(share * count for share, count in zip(shares, most_tokens, strict=True)) / sum(shares)
        units = int(self.num_slots * cap / mean)
        while units >= self.num_slots:
            schedule = make_schedule(shares, units, sources=self.sources)
            if fits(schedule, cap):
                return schedule
            units -= max(1, units // 128)
        raise ValueError(f"max_tokens: {self.num_slots} slots of {cap} tokens may not hold even one image each")


def _counts(name: str, values: ArrayLike, *, least: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or array.min(initial=least) < least:
        raise ValueError(f"{name}: expected integers of shape [j], at least {least}, got {array.tolist()}")
    return array.astype(np.int64)
