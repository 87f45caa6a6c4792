"""Objectives that need no likelihood: re-noise a rewarded sample and match, or avoid, its velocity.

Axes: b samples, N image tokens of a packed batch, c channels. ``target`` is always the flow-matching target
``noise - latents`` of a sample of the old policy at a freshly drawn time.
"""

from typing import Literal

import torch  # noqa: F401  # for the examples
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import expand_time
from lensmini.reduction import Reduction, align_samples, hide, holds, known_values, reduce_samples

__all__ = ["matching_log_ratio", "nft_loss", "ram_target", "velocity_gap"]


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    r: Tensor,
    *,
    beta: float = 1.0,
    weight: Literal["self_normalised"] | None = None,
    t: Tensor | None = None,
    floor: float = 1e-5,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """DiffusionNFT: pull towards good samples and push away from bad ones (arXiv 2509.16117; Lens section 6).

    With ``v+ = (1 - beta) v_old + beta v`` and ``v- = (1 + beta) v_old - beta v``:

        ``r mean|v+ - target|^2 + (1 - r) mean|v- - target|^2``

    Its value at ``v = v_old`` does not depend on r, its gradient there is ``2 beta (2 r - 1) (v_old - target) / D``: log
    gradients, not values. The optimum given x is ``v_old + E[(2 r - 1)(target - v_old) | x] / beta``, so that a half
    always means "stay".

    ``weight="self_normalised"`` is the published code's: errors of the clean prediction, ``t (v - target)``, each of the
    two divided by its own detached mean absolute value. That acts as one over the RMS error in time; with few elements it
    turns the loss into an absolute one. The code also multiplies by ``advantage clip / beta``, which is left to you.

    Args:
        velocity: ``[b, ...]``, or ``[N, c]`` with ``layout``; of the policy.
        old_velocity: the shape of ``velocity``; of the policy that sampled. Detached.
        target: the shape of ``velocity``. Detached.
        r: ``[b]`` in [0, 1], from :func:`lensmini.objectives.policy.optimality`. Detached.
        beta: strength of the mixture, not zero; 1 in Lens, 0.1 published for several rewards.
        weight: none, or ``"self_normalised"``.
        t: ``[b]``, for the self-normalised form only.
        floor: the least divisor of the self-normalised form.
        mask: bool, true where a sample (``[b]``) or an element counts; hidden ones may hold anything, r included.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least, 0 where masked; each image counts once, whatever its resolution.

    Raises:
        ValueError: if shapes differ, ``beta`` is zero, ``weight`` is unknown or lacks ``t``, or (on the CPU) an r that is
            not masked leaves [0, 1].

    Example:
        >>> old, target = torch.zeros(2, 3), torch.ones(2, 3)
        >>> nft_loss(old + 0.5, old, target, torch.tensor([1.0, 0.0]))
        tensor([0.2500, 2.2500])
    """
    if not (beta == beta and 0 < abs(beta) < float("inf")):
        raise ValueError(f"beta: expected a finite number other than 0, got {beta}")
    if weight not in (None, "self_normalised"):
        raise ValueError(f"weight: expected None or 'self_normalised', got {weight!r}")
    if (weight is None) != (t is None):
        raise ValueError("t: expected the times [b] with weight='self_normalised', and None without")
    if not floor > 0:
        raise ValueError(f"floor: expected a positive number, got {floor}")
    (new, old, goal), counts = align_samples(
        mask, layout, velocity=velocity, old_velocity=old_velocity.detach(), target=target.detach()
    )
    good = known_values("r", r.detach(), mask, new, layout)
    if good.device.type == "cpu" and not holds((good >= 0) & (good <= 1)):
        raise ValueError(f"r: expected probabilities in [0, 1] where the mask is true, got {good.tolist()}")
    moved = beta * (new - old)
    errors = [old + moved - goal, old - moved - goal]
    if t is not None:
        time = hide(expand_time(t, velocity, layout=layout).to(new.dtype), counts)
        errors = [time * error for error in errors]
    losses = [reduce_samples(error.square(), "mean", mask=counts, layout=layout) for error in errors]
    if t is not None:
        sizes = [reduce_samples(error.detach().abs(), "mean", mask=counts, layout=layout) for error in errors]
        losses = [loss / size.clamp_min(floor) for loss, size in zip(losses, sizes, strict=True)]
    return good * losses[0] + (1 - good) * losses[1]


def matching_log_ratio(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """AWM's stand-in for a log-ratio: how much better than the old policy a sample is matched (arXiv 2509.25050).

    ``weight * (|old_velocity - target|^2 - |velocity - target|^2)``: positive where the policy has become likelier.
    Advantage weighted matching is :func:`lensmini.objectives.policy.clipped_surrogate` of it; with one update per rollout
    its gradient is that of advantage-weighted flow matching.

    Args:
        velocity: ``[b, ...]``, or ``[N, c]`` with ``layout``.
        old_velocity: the shape of ``velocity``, at the same time and noise. Detached.
        target: the shape of ``velocity``. Detached.
        weight: ``[b]``, for example t or t^2; none is 1.
        reduction: ``"mean"`` (published) or ``"sum"`` over each sample's elements.
        mask: bool, true where a sample (``[b]``) or an element counts.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ or ``reduction`` is unknown.

    Example:
        >>> matching_log_ratio(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2))
        tensor([1.])
    """
    (new, old, goal), counts = align_samples(
        mask, layout, velocity=velocity, old_velocity=old_velocity.detach(), target=target.detach()
    )
    gain = (old - goal).square() - (new - goal).square()
    ratio = reduce_samples(gain, reduction, mask=counts, layout=layout)
    return ratio if weight is None else known_values("weight", weight, mask, new, layout) * ratio


def velocity_gap(
    velocity: Tensor, reference_velocity: Tensor, *, mask: Tensor | None = None, layout: Layout | None = None
) -> Tensor:
    """Mean squared distance to a velocity that stays fixed: NFT's penalty (1e-4 in Lens), AWM's EMA term, RAM's loss.

    Args:
        velocity: ``[b, ...]``, or ``[N, c]`` with ``layout``.
        reference_velocity: the shape of ``velocity``: of the reference model, or a target. Detached.
        mask: bool, true where a sample (``[b]``) or an element counts.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ.

    Example:
        >>> velocity_gap(torch.ones(1, 2), torch.zeros(1, 2))
        tensor([1.])
    """
    (new, reference), counts = align_samples(
        mask, layout, velocity=velocity, reference_velocity=reference_velocity.detach()
    )
    return reduce_samples((new - reference).square(), "mean", mask=counts, layout=layout)


def ram_target(
    velocity: Tensor,
    reference_velocity: Tensor,
    target: Tensor,
    reward: Tensor,
    *,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """RAM's regression target: ``reference_velocity + reward * (target - velocity)`` (arXiv 2605.10759).

    Regress on it with :func:`velocity_gap` and samples of the current policy. Then ``E[target - velocity | x]`` is 0,
    a constant in the reward does not matter, and the fixed point is the reference tilted by ``exp(reward)`` for a
    reward that is linear on Gaussian data.

    Args:
        velocity: ``[b, ...]``, or ``[N, c]`` with ``layout``; of the policy that sampled, which is the one trained.
        reference_velocity: the shape of ``velocity``.
        target: the shape of ``velocity``.
        reward: ``[b]``, scaled: it is the exponent of the tilt.
        mask: bool, true where a sample (``[b]``) or an element counts; the rest gets 0 and must be masked in the loss.
        layout: the layout of packed latents.

    Returns:
        The shape of ``velocity``, float32 at least; no gradient.

    Raises:
        ValueError: if shapes differ, or (on the CPU) a reward that is not masked is not finite.

    Example:
        >>> ram_target(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0.5]))
        tensor([[1.5000, 1.5000]])
    """
    (new, reference, goal), _ = align_samples(
        mask,
        layout,
        velocity=velocity.detach(),
        reference_velocity=reference_velocity.detach(),
        target=target.detach(),
    )
    known = known_values("reward", reward.detach(), mask, new, layout)
    rows = known if layout is None else layout.expand(known)
    return reference + rows.reshape(-1, *[1] * (new.ndim - 1)) * (goal - new)
