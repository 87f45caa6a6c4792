"""Several processes that train one model: the only file that knows ``torch.distributed``.

Everyone else takes ``rank`` and ``world_size`` as numbers, and a :class:`Group` where tensors have to meet.
"""

import ctypes
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

__all__ = ["Group", "run_processes"]


class Group:
    """The processes of one job. A group of one does nothing, so scripts need no special case.

    Args:
        rank: number of this process.
        world_size: number of processes.

    Example:
        >>> Group(0, 1).gather([1, 2])
        [[1, 2]]
    """

    def __init__(self, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size = {world_size}, got {rank}")
        self.rank, self.world_size = rank, world_size

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, in place; every process gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of the ranks. The values are trusted: they come from this job."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def run_processes(function: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Call ``function(group, *arguments)`` in that many processes on this machine and wait for them.

    One process means this one. Under ``torchrun`` (its environment variables are set) the call joins that job instead.
    SIGTERM and Ctrl-C reach every worker as SIGTERM, which may save and leave; workers die with their parent.

    Args:
        function: importable, so that a fresh process finds it.
        num_processes: at least 1.
        arguments: anything that can be pickled.

    Raises:
        ValueError: if num_processes is not positive.
        RuntimeError: if a worker fails, with the traceback of the first that did; the others are ended.
        SystemExit: if a worker takes no care of SIGTERM and dies of it, with the shell's exit code for the signal.

    Example:
        >>> run_processes(lambda group, name: print(name, group.rank), 1, "worker")
        worker 0
    """
    if num_processes < 1:
        raise ValueError(f"num_processes: expected at least 1, got {num_processes}")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        _run(function, dist.get_rank(), dist.get_world_size(), arguments)
        return
    if num_processes == 1:
        function(Group(0, 1), *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        context: Any = torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
            _worker, (num_processes, folder, os.getpid(), function, arguments), nprocs=num_processes, join=False
        )
        asked: list[int] = []

        def forward(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            for process in context.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)

        previous = [(number, signal.signal(number, forward)) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            while not context.join():
                pass
        except ProcessException:
            failure, codes = Path(folder, "failure"), [process.exitcode for process in context.processes]
            if asked and not failure.exists():
                raise SystemExit(128 + asked[0]) from None
            text = failure.read_text() if failure.exists() else "none of them could say why"
            raise RuntimeError(f"workers ended with exit codes {codes}; the first failure:\n{text}") from None
        finally:
            for number, handler in previous:
                signal.signal(number, handler)


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent ends, however that happens; elsewhere nothing.

    Args:
        parent: process id of the parent, which may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on training.
        if os.getppid() != parent:
            os._exit(1)


def _worker(
    rank: int, world_size: int, folder: str, parent: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    die_with_parent(parent)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        _run(function, rank, world_size, arguments)
    except Exception:
        # Whoever fails first is the cause: the others only lose their connection to it.
        with suppress(FileExistsError), Path(folder, "failure").open("x") as file:
            file.write(f"worker {rank}: {traceback.format_exc()}")
        raise


def _run(function: Callable[..., None], rank: int, world_size: int, arguments: tuple[Any, ...]) -> None:
    function(Group(rank, world_size), *arguments)
    # Without a barrier a process that leaves first makes the others abort.
    dist.barrier()
    dist.destroy_process_group()
