"""Which times to train at: a logit-normal law whose centre grows with the number of image tokens.

Axes: num the number of times drawn, one per sample.
"""

from typing import overload

import torch
from torch import Tensor

from lensmini.shapes import check_shape

__all__ = ["sample_times", "training_mu"]


@overload
def training_mu(num_tokens: int) -> float: ...
@overload
def training_mu(num_tokens: Tensor) -> Tensor: ...
def training_mu(num_tokens: int | Tensor) -> float | Tensor:
    """Centre of the training times: linear from 1.0 at 256 tokens to 1.3 at 4096 (arXiv 2605.21573 section 5).

    ``1 + 0.3 * (num_tokens - 256) / 3840``, also outside that range. 512 x 512 pixels (1024 tokens) gives the 1.06
    of the paper's first stage.

    Args:
        num_tokens: image tokens of a sample; a positive integer or an integer tensor of any shape.

    Returns:
        A float, or a float32 tensor of the shape of ``num_tokens``.

    Raises:
        ValueError: if ``num_tokens`` is not a positive integer, or a tensor of another kind.

    Example:
        >>> round(training_mu(1024), 6), training_mu(torch.tensor([256, 4096]))
        (1.06, tensor([1.0000, 1.3000]))
    """
    if isinstance(num_tokens, Tensor):
        if num_tokens.is_floating_point() or num_tokens.is_complex() or num_tokens.dtype == torch.bool:
            raise ValueError(f"num_tokens: expected integers, got {num_tokens.dtype}")
        return 1.0 + 0.3 * ((num_tokens - 256).to(torch.float32) / 3840)
    if num_tokens < 1:
        raise ValueError(f"num_tokens: expected a positive number of image tokens, got {num_tokens}")
    return 1.0 + 0.3 * (num_tokens - 256) / 3840


def sample_times(
    num: int,
    *,
    mu: float | Tensor,
    std: float = 1.0,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw training times ``t = sigmoid(mu + std * z)``, z standard normal (logit-normal, arXiv 2403.03206 sec. 3.1).

    Positive ``mu`` favours noise: the median is ``sigmoid(mu)``. Equal generators give equal times on every
    ``device``, because the normals are drawn where the generator lives.

    Args:
        num: how many times to draw.
        mu: centre of the logit, a float or ``[num]``; :func:`training_mu` has the published values.
        std: standard deviation of the logit, not negative. The Lens paper does not state it; 1 is assumed.
        generator: the source of randomness.
        device: where to put the result; by default the generator's.

    Returns:
        ``[num]`` float32, strictly between 0 and 1.

    Raises:
        ValueError: if ``num`` is not positive, ``std`` is negative or not finite, or ``mu`` has another shape.

    Example:
        >>> sample_times(3, mu=1.06, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    if num < 1:
        raise ValueError(f"num: expected a positive number of times, got {num}")
    if not 0 <= std < float("inf"):
        raise ValueError(f"std: expected a finite number, not negative, got {std}")
    if isinstance(mu, Tensor):
        check_shape("mu", mu, "num", num=num)
        mu = mu.to(device=generator.device, dtype=torch.float32)
    normal = torch.randn(num, generator=generator, device=generator.device, dtype=torch.float32)
    info = torch.finfo(torch.float32)
    # The sigmoid saturates in float32; the ends themselves would divide by zero in objectives with 1/t or 1/(1-t).
    times = torch.sigmoid(mu + std * normal).clamp(info.tiny, 1 - info.eps / 2)
    return times if device is None else times.to(device)
