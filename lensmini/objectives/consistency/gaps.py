"""Which two times a consistency loss compares: pairs from a grid, and schedules that shrink the gap.

Axes: b samples, k steps of a grid.
"""

import math

import torch
from torch import Tensor

from lensmini.paths import check_time_range
from lensmini.shapes import check_shape

__all__ = ["curriculum_steps", "sample_time_pairs", "shrinking_gap"]


def sample_time_pairs(num: int, times: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one step of a grid for each sample, uniformly (arXiv 2303.01469 algorithm 2).

    Args:
        num: samples b.
        times: ``[k + 1]`` for all samples or ``[b, k + 1]`` (a shift that depends on the resolution), falling from noise
            to clean and usually ending in 0; on the generator's device.
        generator: source of randomness.

    Returns:
        ``t [b]`` and ``t_next [b]``, neighbours of the grid, float32 at least.

    Raises:
        ValueError: if there are fewer than two times, they do not fall, or (on the CPU) one leaves [0, 1].

    Example:
        >>> t, t_next = sample_time_pairs(4, torch.linspace(1, 0, 5), generator=torch.Generator().manual_seed(0))
        >>> t - t_next
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    check_shape("times", times, "k" if times.ndim == 1 else "b k", b=num)
    check_time_range("times", times)
    if times.shape[-1] < 2 or (times.device.type == "cpu" and not bool((times.diff(dim=-1) < 0).all())):
        raise ValueError(f"times: expected at least two, falling, got {times.tolist()}")
    grid = times.to(torch.promote_types(times.dtype, torch.float32)).expand(num, -1)
    step = torch.randint(times.shape[-1] - 1, (num, 1), generator=generator, device=generator.device)
    return grid.gather(1, step)[:, 0], grid.gather(1, step + 1)[:, 0]


def curriculum_steps(step: int, total_steps: int, *, start: int = 10, stop: int = 1280) -> int:
    """How finely to cut the trajectory: from ``start`` steps, doubling at equal intervals, up to ``stop``.

    ``min(start * 2^floor(step / K), stop)``, ``K = floor(total / (log2(floor(stop / start)) + 1))`` (iCT, arXiv 2310.14189
    section 3.4, which counts the grid's points: one more).

    Args:
        step: number of the training step, from 0.
        total_steps: how many there will be.
        start: steps of the first grid.
        stop: steps of the last one.

    Returns:
        The number k of steps; the grid has k + 1 times.

    Raises:
        ValueError: if a number is not positive, ``stop`` is below ``start``, or ``step`` is negative.

    Example:
        >>> [curriculum_steps(step, 800) for step in (0, 99, 100, 799)]
        [10, 10, 20, 1280]
    """
    if step < 0 or total_steps < 1 or not 1 <= start <= stop:
        raise ValueError(
            f"step, total_steps, start, stop: expected step >= 0, a positive total and 1 <= start <= stop, "
            f"got {step}, {total_steps}, {start}, {stop}"
        )
    interval = max(math.floor(total_steps / (math.log2(stop // start) + 1)), 1)
    doublings = min(step // interval, math.ceil(math.log2(stop / start)))
    return min(start * 2**doublings, stop)


def shrinking_gap(t: Tensor, stage: int, *, base: float = 2.0) -> Tensor:
    """The time to compare t with: ``t (1 - base^-stage)``, a gap that shrinks from all of t towards nothing.

    Easy consistency tuning (arXiv 2406.14548 section 3.2) without its noise-dependent factor, which is written for other
    noise levels. Stage 0 compares with the data themselves: plain denoising.

    Args:
        t: ``[b]``, in [0, 1].
        stage: whole number, raised in the course of training.
        base: how fast, above 1.

    Returns:
        ``[b]``, in [0, t), float32 at least.

    Raises:
        ValueError: if ``stage`` is negative, ``base`` is not above 1 or (on the CPU) a time leaves [0, 1].

    Example:
        >>> shrinking_gap(torch.tensor([0.8]), 2)
        tensor([0.6000])
    """
    if stage < 0 or not 1 < base < float("inf"):
        raise ValueError(f"stage, base: expected a stage >= 0 and a base above 1, got {stage}, {base}")
    check_shape("t", t, "b")
    check_time_range("t", t)
    return t.to(torch.promote_types(t.dtype, torch.float32)) * (1 - base**-stage)
