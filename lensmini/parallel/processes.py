"""Processes that work on one job: how they start, meet, fail and end."""

import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing.spawn import ProcessException

__all__ = ["Group", "LostRankError", "die_with_parent", "run_processes"]

_LOST = ("connection", "peer", "socket", "nccl", "timed out", "timeout", "gloo", "broken pipe")


class LostRankError(RuntimeError):
    """Another process of the job ended, or hangs: this one cannot go on without it.

    Example:
        >>> raise LostRankError("rank 1 of 2: ...")
        Traceback (most recent call last):
        lensmini.parallel.processes.LostRankError: rank 1 of 2: ...
    """


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


def run_processes(
    function: Callable[..., None],
    num_processes: int,
    *arguments: Any,
    timeout_minutes: float = 10.0,
    alone: bool = False,
) -> None:
    """Call ``function(group, *arguments)`` in that many processes on this machine and wait for them.

    One process means this one. Under ``torchrun`` (its environment variables are set) the call joins that job instead,
    with NCCL where the process has a GPU of its own; ``torchrun --max-restarts=N`` starts all of them again when one ends.
    SIGTERM and Ctrl-C reach every worker as SIGTERM, which may save and leave; workers die with their parent.

    Args:
        function: importable, so that a fresh process finds it.
        num_processes: at least 1.
        arguments: anything that can be pickled.
        timeout_minutes: after which a process that waits for another gives the job up.
        alone: a single process is a job too, so that :func:`make_mesh` works in it.

    Raises:
        ValueError: if num_processes is not positive, or the time is not.
        LostRankError: under ``torchrun``, if another process ended or hangs; that one's own message says why.
        RuntimeError: if a worker fails, with the traceback of the first that did; the others are ended.
        SystemExit: if a worker takes no care of SIGTERM and dies of it, with the shell's exit code for the signal.

    Example:
        >>> run_processes(lambda group, name: print(name, group.rank), 1, "worker")
        worker 0
    """
    if num_processes < 1:
        raise ValueError(f"num_processes: expected at least 1, got {num_processes}")
    if not 0 < timeout_minutes < float("inf"):
        raise ValueError(f"timeout_minutes: expected a positive number, got {timeout_minutes}")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(function, arguments, timedelta(minutes=timeout_minutes))
        return
    if num_processes == 1:
        if alone:
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        try:
            function(Group(0, 1), *arguments)
        finally:
            if alone:
                dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        context: Any = torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
            _worker,
            (num_processes, folder, os.getpid(), timeout_minutes, function, arguments),
            nprocs=num_processes,
            join=False,
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

    Example:
        >>> die_with_parent(os.getppid())
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on training.
        if os.getppid() != parent:
            os._exit(1)


@record
def _join(function: Callable[..., None], arguments: tuple[Any, ...], timeout: timedelta) -> None:
    """Be one process of a ``torchrun`` job."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The agent may be killed where it can end nobody.
        die_with_parent(os.getppid())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))  # pyright: ignore[reportPrivateImportUsage]
        store = dist.PrefixStore(agree_on_start(store, rank, world_size, timeout.total_seconds()), store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(_backend(), timeout=timeout)
    try:
        _run(function, rank, world_size, arguments)
    except RuntimeError as error:
        if not _lost_connection(error):
            raise
        raise LostRankError(
            f"rank {rank} of {world_size} lost another rank, which ended or hangs; the message of the rank that ended first "
            f"says why. This rank ends too. torchrun --max-restarts=N starts the job again, and it goes on from its last "
            f"checkpoint. Seen here: {str(error).splitlines()[0]}"
        ) from error


def agree_on_start(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:  # pyright: ignore[reportPrivateImportUsage]
    """A word that all ranks of this start of a job agree on, and no earlier start had.

    An agent of torchrun may keep its store over restarts, and what it holds from a start before would send ranks to
    addresses of the dead. So each rank asks under a word of its own, and the first rank answers until all have heard it.

    Args:
        store: that all ranks share, whatever it holds.
        rank: of this process.
        world_size: number of processes.
        seconds: to wait for the others.

    Returns:
        The word.

    Raises:
        LostRankError: if somebody does not come.

    Example:
        >>> len(agree_on_start(dist.HashStore(), 0, 1, 1.0))
        32
    """
    own, end = uuid.uuid4().hex, time.monotonic() + seconds
    missing = set(range(1, world_size)) if rank == 0 else {0}
    store.set(f"lensmini/asks/{rank}", own)
    while missing:
        if rank and store.check([f"lensmini/answer/{own}"]):
            word = store.get(f"lensmini/answer/{own}").decode()
            store.set(f"lensmini/heard/{word}/{rank}", "1")
            return word
        for other in sorted(missing) if rank == 0 else ():
            if store.check([f"lensmini/heard/{own}/{other}"]):
                missing.discard(other)
            elif store.check([f"lensmini/asks/{other}"]):
                # Perhaps the word of a start before; then it asks again under another one.
                store.set(f"lensmini/answer/{store.get(f'lensmini/asks/{other}').decode()}", own)
        if time.monotonic() > end:
            raise LostRankError(f"rank {rank} of {world_size}: ranks {sorted(missing)} did not come in {seconds:.0f} s")
        time.sleep(0.01)
    return own


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed for want of the others."""
    told = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in told for word in _LOST)


def _worker(
    rank: int,
    world_size: int,
    folder: str,
    parent: int,
    timeout_minutes: float,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    die_with_parent(parent)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
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
