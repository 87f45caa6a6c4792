"""One rank's share of a plan, as the ``batch_sampler`` of an ordinary ``torch.utils.data.DataLoader``."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from lensmini.data.plan import BatchPlan

__all__ = ["BucketBatchSampler"]


class BucketBatchSampler(Sampler[list[int]]):
    """Micro-batches of one rank, from a step on: lists of sample numbers.

    Step k gives ``num_slots / world_size`` of them, the slots ``rank``, ``rank + world_size``, ...: the same number
    on every rank. It keeps nothing between batches, so it does not matter how many a loader has fetched ahead: to
    resume, on any number of ranks, make a new one with the trainer's next step as ``start_step``.

    Args:
        plan: the order of samples.
        rank: this process, in [0, world_size).
        world_size: number of processes, a divisor of the plan's ``num_slots``.
        start_step: the first step.
        num_steps: how many steps; without end by default.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> plan = BatchPlan([4, 4], [16, 16], num_slots=2, images_per_slot=2, seed=0)
        >>> [len(batch) for batch in BucketBatchSampler(plan, rank=1, world_size=2, start_step=3, num_steps=2)]
        [2, 2]
    """

    def __init__(
        self, plan: BatchPlan, rank: int, world_size: int, start_step: int = 0, *, num_steps: int | None = None
    ) -> None:
        self.micro_steps = plan.micro_steps(world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, got {rank}")
        if start_step < 0 or (num_steps is not None and num_steps < 0):
            raise ValueError(f"start_step, num_steps: expected at least 0, got {start_step}, {num_steps}")
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.start_step, self.num_steps = start_step, num_steps

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            for samples in self.plan.step(step).share(self.rank, self.world_size):
                yield samples.tolist()
            step += 1

    def __len__(self) -> int:
        """Number of micro-batches; a sampler without end has none."""
        if self.num_steps is None:
            raise TypeError("BucketBatchSampler without num_steps has no end and no length")
        return self.num_steps * self.micro_steps
