"""What a training run measures of itself: losses by time and bucket, speed, utilisation, waiting and memory."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lensmini.cost import ModelSize, train_flops
from lensmini.packed import Layout
from lensmini.parallel import Group

__all__ = ["Meter", "SlotLosses", "loss_table"]

TIME_BINS = 5


class SlotLosses(NamedTuple):
    """The losses of one micro-batch."""

    times: Tensor
    """``[b]``."""
    losses: Tensor
    """``[b]``."""
    grids: Tensor
    """``[b, 2]`` latent height and width."""
    samples: Sequence[int]
    """Numbers of the samples."""


def loss_table(parts: Sequence[SlotLosses], group: Group) -> dict[str, dict[str, float]]:
    """Mean losses of a step by time, in fifths, and by grid, over all ranks; every rank calls it.

    Example:
        >>> part = SlotLosses(
        ...     torch.tensor([0.1, 0.9]), torch.tensor([1.0, 2.0]), torch.tensor([[2, 3], [2, 3]]), [7, 8]
        ... )
        >>> loss_table([part], Group(0, 1))
        {'loss_by_time': {'0.0-0.2': 1.0, '0.8-1.0': 2.0}, 'loss_by_grid': {'2x3': 1.5}}
    """
    rows = []
    for part in parts:
        bins = (part.times.detach().float().cpu() * TIME_BINS).long().clamp(0, TIME_BINS - 1).tolist()
        grids = [f"{height}x{width}" for height, width in part.grids.tolist()]
        rows += list(zip(part.samples, bins, grids, part.losses.detach().float().cpu().tolist(), strict=True))
    # Sorted by sample: the sum is the same however many ranks there were.
    everything = sorted(row for rank in group.gather(rows) for row in rank)
    tables: dict[str, dict[str, list[float]]] = {"loss_by_time": defaultdict(list), "loss_by_grid": defaultdict(list)}
    for _, index, grid, loss in everything:
        tables["loss_by_time"][f"{index / TIME_BINS:.1f}-{(index + 1) / TIME_BINS:.1f}"].append(loss)
        tables["loss_by_grid"][grid].append(loss)
    return {
        name: {key: sum(values) / len(values) for key, values in sorted(table.items())}
        for name, table in tables.items()
    }


class Meter:
    """Counts one rank's work between two reports.

    FLOPs are :func:`lensmini.cost.train_flops` of what was computed (no recomputation, no encoders), utilisation is
    against the peak of all ranks, balance is mean over largest FLOPs of a rank.

    Args:
        model: sizes of the transformer.
        group: the job.
        peak: FLOP/s of one rank, if known.
    """

    def __init__(self, model: ModelSize, group: Group, peak: float | None) -> None:
        self.model, self.group, self.peak = model, group, peak
        self.begun = self.reported = time.perf_counter()
        self.cpu_begun = time.process_time()
        self._clear()

    def _clear(self) -> None:
        self.images = self.tokens = 0
        self.flops = self.waited = 0.0

    def add(self, layout: Layout) -> None:
        """Count a micro-batch."""
        image, text = layout.image_offsets.diff().cpu(), layout.text_offsets.diff().cpu()
        self.images += len(image)
        self.tokens += int(image.sum() + text.sum())
        self.flops += float(train_flops(self.model, image, text).sum())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def report(self, encoded: dict[str, float] | None = None) -> dict[str, Any]:
        """Rates since the last report, over all ranks; every rank calls it.

        Args:
            encoded: seconds that each frozen encoder took since the last report, where they run in the loop.
        """
        now = time.perf_counter()
        seconds = max(now - self.reported, 1e-9)
        mine = [self.images, self.tokens, self.flops, self.waited, _peak_memory()]
        ranks = self.group.gather(mine)
        images, tokens, flops, waited, _ = (sum(column) for column in zip(*ranks, strict=True))
        largest = max(row[2] for row in ranks)
        row: dict[str, Any] = {
            "seconds": now - self.begun,
            "cpu_seconds": time.process_time() - self.cpu_begun,
            "images_per_second": images / seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_rank": flops / seconds / len(ranks) / 1e12,
            "mfu": None if self.peak is None else flops / seconds / len(ranks) / self.peak,
            "rank_balance": flops / len(ranks) / largest if largest else None,
            "data_wait_share": waited / seconds / len(ranks),
            "peak_memory_gb": max(row[4] for row in ranks) / 1e9,
        }
        row |= {f"{name}_share": spent / seconds for name, spent in (encoded or {}).items()}
        self.reported = now
        self._clear()
        return row


def _peak_memory() -> float:
    """Bytes: of the GPU's allocator where it was used, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
