"""A job of many ranks in one process: real sharding and real collectives' order, with nothing sent.

What a rank of a big job would hold and send can be checked on a laptop. Numbers that come out of collectives mean nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from lensmini.parallel.processes import Group

__all__ = ["count_collectives", "expected_collectives", "local_elements", "rehearsal_job"]

KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


@contextmanager
def rehearsal_job(world_size: int, *, rank: int = 0) -> Iterator[Group]:
    """Be one rank of a job whose other ranks do not exist (torch's fake process group).

    Args:
        world_size: ranks of the pretended job.
        rank: which one this is.

    Yields:
        The group. ``make_mesh`` and ``shard_model`` work as in a real job.

    Raises:
        ValueError: if a job runs in this process already, or the rank is outside.

    Example:
        >>> from lensmini.parallel import make_mesh
        >>> with rehearsal_job(128) as group:
        ...     tuple(make_mesh(128, shard=8, device="cpu").shape)
        (16, 8)
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("rehearsal_job: expected a process without a job, one runs")
    group = Group(rank, world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield group
    finally:
        dist.destroy_process_group()


def count_collectives(step: Callable[[], object]) -> dict[str, int]:
    """How often each kind of collective is called while ``step`` runs.

    Example:
        >>> count_collectives(lambda: None)
        {}
    """
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        step()
    counts = Counter[str]()
    for operation, number in mode.get_comm_counts().items():
        name = str(operation).rpartition(".")[2]
        counts[KINDS.get(name, name)] += number
    return dict(counts)


def expected_collectives(num_blocks: int, world_size: int, shard: int) -> dict[str, int]:
    """What a forward and backward under :func:`lensmini.parallel.shard_model` calls: per block, and once for the rest.

    Parameters are gathered for the forward and again for the backward, gradients reduced and scattered once, and summed
    over copies where there are several.

    Example:
        >>> expected_collectives(48, 128, 8)
        {'all-gather': 98, 'reduce-scatter': 49, 'all-reduce': 49}
        >>> expected_collectives(48, 128, 128)
        {'all-gather': 98, 'reduce-scatter': 49}
    """
    groups = num_blocks + 1
    # A copy on every rank has nothing to gather or scatter.
    counts = {"all-gather": 2 * groups, "reduce-scatter": groups} if shard > 1 else {}
    return counts | ({"all-reduce": groups} if shard < world_size else {})


def local_elements(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each parameter the elements that this rank holds, and those of the whole.

    Example:
        >>> local_elements(nn.Linear(2, 3))
        {'weight': (6, 6), 'bias': (3, 3)}
    """
    found = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # pyright: ignore
        found[name] = (local.numel(), parameter.numel())
    return found
