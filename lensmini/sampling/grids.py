"""Times from noise to clean: the published shift, and grids of any number of steps.

Axes: b samples, k steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empirical_mu", "time_grid"]


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """Shift of the sampling times by image size and number of steps: FLUX.2's empirical rule, as Lens uses it.

    One line in the number of tokens at 200 steps and another at 10, linear in the number of steps between and
    beyond; above 4300 tokens the 200-step line alone (the released Lens code).

    Args:
        num_tokens: image tokens of the sample (latent height times latent width), positive.
        num_steps: steps of the grid, positive.

    Returns:
        mu, for :func:`time_grid`.

    Raises:
        ValueError: if an argument is not positive.

    Example:
        >>> round(empirical_mu(4096, 20), 6), round(empirical_mu(8100, 4), 6)
        (2.198022, 1.827754)
    """
    for name, value in (("num_tokens", num_tokens), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)


def time_grid(
    num_steps: int,
    mu: float | Sequence[float] | Tensor | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times from 1 to 0, shifted towards noise: ``t = e^mu / (e^mu + 1/s - 1)`` for s = 1, ..., 1/k, and then 0.

    The exponential shift of arXiv 2403.03206 section 5.3.2 (there ``shift = e^mu``).

    Args:
        num_steps: number of steps k, positive.
        mu: the shift, usually :func:`empirical_mu`; none or 0 gives equal steps. b of them (a sequence or ``[b]``)
            give every sample its own grid, as mixed resolutions need.
        device: where to put the result, by default the CPU.

    Returns:
        ``[k + 1]``, or ``[b, k + 1]`` for several ``mu``; float32, strictly descending from exactly 1 to exactly 0.

    Raises:
        ValueError: if ``num_steps`` is not positive, or ``mu`` is not finite or has more than one axis.

    Example:
        >>> time_grid(4, empirical_mu(4096, 4))
        tensor([1.0000, 0.9674, 0.9081, 0.7672, 0.0000])
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected a positive integer, got {num_steps}")
    shifts = torch.as_tensor(0.0 if mu is None else mu, dtype=torch.float64, device="cpu")
    if shifts.ndim > 1 or not bool(shifts.isfinite().all()):
        raise ValueError(f"mu: expected one finite number or b of them, got {mu}")
    # In float64: float32 would lose digits in 1/s - 1, and the grid is rounded once, at the end.
    remaining = num_steps / torch.arange(num_steps, 0, -1, dtype=torch.float64) - 1
    scale = shifts.exp()[..., None]
    times = torch.nn.functional.pad(scale / (scale + remaining), (0, 1))
    return times.to(device=device, dtype=torch.float32)
