"""Micro-batches of a plan in the order in which one rank computes them, read ahead by a thread where that helps."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from experiments.bank import Batch
from lensmini.data import BatchPlan

__all__ = ["Feed"]


class Feed:
    """What a rank computes from some step on.

    The order is a function of the plan: nothing has to be saved, and what was read ahead is simply thrown away.

    Args:
        plan: of the run.
        collate: from a step's number, its slot's samples and their repeats to a batch.
        rank: of this process.
        world_size: number of processes.
        start: first step.
        end: step after the last.
        ahead: micro-batches to read ahead; 0 reads when asked.
    """

    def __init__(
        self,
        plan: BatchPlan,
        collate: Callable[[int, list[int], list[int]], Batch],
        *,
        rank: int,
        world_size: int,
        start: int,
        end: int,
        ahead: int = 0,
    ) -> None:
        self.plan, self.collate, self.rank, self.world_size = plan, collate, rank, world_size
        self._wanted = self._slots(start, end)
        self._ahead, self._waiting = ahead, deque[tuple[tuple[int, int], Future[Batch]]]()
        self._pool = ThreadPoolExecutor(1) if ahead else None

    def take(self, step: int, slot: int) -> Batch:
        """The batch of a slot; slots come in the plan's order, and steps may be passed over."""
        if self._pool is None:
            return self._make(step, slot)
        while True:
            while len(self._waiting) <= self._ahead and (wanted := next(self._wanted, None)) is not None:
                self._waiting.append((wanted, self._pool.submit(self._make, *wanted)))
            key, future = self._waiting.popleft()
            if key == (step, slot):
                return future.result()

    def close(self) -> None:
        """Throw away what was read ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _slots(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for step in range(start, end):
            for slot in range(self.rank, self.plan.num_slots, self.world_size):
                yield step, slot

    def _make(self, step: int, slot: int) -> Any:
        planned = self.plan.step(step)
        return self.collate(step, planned.slot(slot).tolist(), planned.repeats(slot).tolist())
