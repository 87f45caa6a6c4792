"""What a command costs: CPU seconds and memory of all its processes."""

import os
import resource
import threading
from collections import defaultdict
from pathlib import Path

__all__ = ["MemoryWatch", "cpu_seconds", "process_age", "tree_memory"]


def cpu_seconds() -> float:
    """User and system CPU seconds of this process and of all its children that have ended and were waited for."""
    return sum(os.times()[:4])


def process_age() -> float:
    """Wall seconds since this process began, imports included; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def tree_memory() -> int | None:
    """Bytes in use by this process and its descendants, shared pages divided among them; None without ``/proc``.

    Example:
        >>> import sys
        >>> sys.platform != "linux" or tree_memory() > 2**20
        True
    """
    children, total = defaultdict(list), 0
    try:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except (OSError, IndexError, ValueError):
                    continue
                children[parent].append(int(entry.name))
    except OSError:
        return None
    waiting = [os.getpid()]
    while waiting:
        process = waiting.pop()
        waiting += children[process]
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total or None


class MemoryWatch:
    """Samples :func:`tree_memory` in a thread while its block runs.

    Args:
        interval: seconds between samples.

    Example:
        >>> with MemoryWatch() as watch:
        ...     pass
        >>> watch.peak()[0] > 1
        True
    """

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = interval
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def peak(self) -> tuple[float, str]:
        """The most megabytes so far, and what was measured."""
        if self._peak:
            return self._peak / 1e6, f"sum over processes, shared pages counted once, every {self._interval:g} s"
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return max(resource.getrusage(one).ru_maxrss for one in who) * 1024 / 1e6, "largest single process"

    def _run(self) -> None:
        while True:
            self._peak = max(self._peak, tree_memory() or 0)
            if self._done.wait(self._interval):
                return
