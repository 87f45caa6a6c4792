"""Fair timing: contestants take turns in one process, and only ratios of their medians are claims."""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import torch

__all__ = ["geometric_mean", "interleaved", "machine", "report"]


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each contestant, one call each per round, in an order that rotates.

    Args:
        contestants: what to time, by name.
        rounds: timed calls of each.
        warmup: untimed calls of each before.
        clock: seconds; ``time.process_time`` counts what this process computed, on a machine that others use too.
    """
    names = list(contestants)
    for name in names:
        for _ in range(warmup):
            contestants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = clock()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive ratios."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def machine() -> str:
    """What the figures were measured on, in words."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def report(name: str, *, ratio: float, goal: float, better: str, holds: bool, details: Mapping[str, object]) -> None:
    """Print the result as the last line, in the form that all benchmarks share."""
    result = {"name": name, "ratio": round(ratio, 4), "goal": goal, "better": better, "holds": holds}
    print(json.dumps({**result, "details": {"machine": machine(), **details}}))
