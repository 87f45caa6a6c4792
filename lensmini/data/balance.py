"""What a plan would cost: how evenly ranks are loaded, what padding wastes, how often each bucket is seen.

Axes: j buckets, s slots of a step.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["PlanReport", "measure_steps"]

# Steps planned at once: enough to be fast, few enough to stay small.
_STEPS = 64


class Plan(Protocol):
    """The part of a ``BatchPlan`` that measuring needs."""

    sizes: NDArray[np.int64]
    num_slots: int

    def assign(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples and slot offsets of steps."""
        ...

    def bucket_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bucket of each sample."""
        ...

    def lengths(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image and text tokens of each sample."""
        ...

    def costs(self, image_tokens: NDArray[np.int64], text_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """FLOPs of each sample."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """Means and extremes over the steps that were measured.

    Example:
        >>> from lensmini.data.plan import BatchPlan
        >>> plan = BatchPlan([8, 4], [1, 4], num_slots=2, images_per_slot=[4, 1], seed=0)
        >>> plan.report(6).exposure, plan.report(6).epochs
        ((16, 8), (2.0, 2.0))
    """

    steps: int
    """Steps measured."""
    world_size: int
    """Ranks they were measured for."""
    images: float
    """Images of a step, mean."""
    image_tokens: float
    """Image tokens of a step, mean."""
    text_tokens: float
    """Text tokens of a step, mean."""
    most_slot_tokens: int
    """Most tokens, image and text, that any slot held: what memory must suffice for."""
    balance: float
    """Useful cost over ranks x slowest, where ranks wait for each other after every micro-step: 1 is perfect."""
    worst_balance: float
    """The same for the worst step."""
    padding: float
    """Share of tokens that would be padding if samples of a slot were padded to its longest; packed batches have
    none."""
    exposure: tuple[int, ...]
    """``[j]`` images drawn from each bucket."""
    epochs: tuple[float, ...]
    """``[j]`` how often that is each bucket; zero for an empty one."""


def measure_steps(plan: Plan, steps: range, world_size: int) -> PlanReport:
    """Measure a plan over some steps; ``BatchPlan.report`` checks its arguments and calls this.

    Args:
        plan: the plan.
        steps: which steps, at least one.
        world_size: ranks, a divisor of the number of slots.

    Returns:
        The report.

    Raises:
        ValueError: if there is no step, or they are not consecutive.

    Example:
        >>> from lensmini.data.plan import BatchPlan
        >>> plan = BatchPlan([8, 4], [1, 2], num_slots=2, images_per_slot=[2, 2], seed=0)
        >>> measure_steps(plan, range(2, 5), world_size=1).balance
        1.0
    """
    if not len(steps) or steps.step != 1:
        raise ValueError(f"steps: expected at least one and consecutive ones, got {steps}")
    totals, exposure = np.zeros(5), np.zeros(len(plan.sizes), np.int64)
    useful, slowest, most = [], [], 0
    for start in range(steps.start, steps.stop, _STEPS):
        count = min(_STEPS, steps.stop - start)
        samples, offsets = plan.assign(start, start + count)
        image, text = plan.lengths(samples)
        both, begin, number = image + text, offsets[:-1], np.diff(offsets)
        in_slot = np.add.reduceat(both, begin)
        padded = np.maximum.reduceat(both, begin) * number
        totals += [len(samples), image.sum(), text.sum(), in_slot.sum(), padded.sum()]
        most = max(most, int(in_slot.max()))
        exposure += np.bincount(plan.bucket_of(samples), minlength=len(exposure))
        cost = np.add.reduceat(plan.costs(image, text), begin).reshape(count, -1, world_size)
        useful.append(cost.sum((1, 2)))
        slowest.append(world_size * cost.max(2).sum(1))
    work, time = np.concatenate(useful), np.concatenate(slowest)
    images, image_tokens, text_tokens = totals[:3] / len(steps)
    return PlanReport(
        steps=len(steps),
        world_size=world_size,
        images=float(images),
        image_tokens=float(image_tokens),
        text_tokens=float(text_tokens),
        most_slot_tokens=most,
        balance=float(work.sum() / time.sum()),
        worst_balance=float((work / time).min()),
        padding=float(1 - totals[3] / totals[4]),
        exposure=tuple(exposure.tolist()),
        epochs=tuple(np.divide(exposure, plan.sizes, out=np.zeros(len(exposure)), where=plan.sizes > 0).tolist()),
    )
