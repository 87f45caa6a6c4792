"""Flow maps by their average velocity: MeanFlow, its improved form, and the continuous consistency model at r = 0.

Axes: b samples, N image tokens of a packed batch, c channels. ``u(x, t, r)`` is the velocity that carries the state x at t
to the state at r in one step, ``x_r = x - (t - r) u``; ``du/dt`` is its derivative along the trajectory, that is along
``(v, 1, 0)`` in ``(x, t, r)``, from :func:`lensmini.objectives.consistency.directional_derivative`.
"""

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import expand_time
from lensmini.reduction import align_samples, hide, known_values, reduce_samples

__all__ = ["adaptive_weight", "mean_velocity_loss", "mean_velocity_target"]


def mean_velocity_target(
    velocity: Tensor,
    dudt: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """What the average velocity has to be: ``v - (t - r) du/dt`` (MeanFlow, arXiv 2505.13447 eq. 6).

    At ``r = t`` it is the flow-matching target. At ``r = 0`` it is the continuous consistency model of the straight path:
    with ``f = x - t F`` and ``df/dt = 0`` the network's target is ``v - t dF/dt``.

    Args:
        velocity: ``[b, ...]``, or ``[N, c]`` with ``layout``; of the teacher (distillation) or ``noise - latents``.
            Detached, like the rest.
        dudt: the shape of ``velocity``; the student's derivative along ``(velocity, 1, 0)``.
        t: ``[b]``, in [0, 1].
        r: ``[b]``, in [0, 1]; usually not above t.
        mask: bool, true where a sample (``[b]``) or an element counts; the rest gets 0 and must be masked in the loss.
        layout: the layout of packed latents.

    Returns:
        The shape of ``velocity``, float32 at least; no gradient.

    Raises:
        ValueError: if shapes differ or (on the CPU) a time leaves [0, 1].

    Example:
        >>> one = torch.ones(1, 2)
        >>> mean_velocity_target(one, one, torch.tensor([0.75]), torch.tensor([0.5]))
        tensor([[0.7500, 0.7500]])
    """
    (flow, slope), counts = align_samples(mask, layout, velocity=velocity.detach(), dudt=dudt.detach())
    return flow - hide(_span(t, r, velocity, layout), counts).to(flow.dtype) * slope


def mean_velocity_loss(
    mean_velocity: Tensor,
    dudt: Tensor,
    target: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    mask: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Improved MeanFlow: an ordinary velocity loss of ``u + (t - r) sg(du/dt)`` (arXiv 2512.02012).

    ``mean |u + (t - r) sg(du/dt) - target|^2`` has the value and the gradient of the squared distance between u and
    :func:`mean_velocity_target`. What the improved form changes is the direction of ``du/dt``: the network's own marginal
    velocity ``u(x, t, t)`` in place of ``noise - latents``, whose randomness the derivative would multiply.

    Args:
        mean_velocity: ``[b, ...]``, or ``[N, c]`` with ``layout``; u, the model's output.
        dudt: the shape of ``mean_velocity``. Detached.
        target: the shape of ``mean_velocity``; ``noise - latents`` or the teacher's velocity. Detached.
        t: ``[b]``, in [0, 1].
        r: ``[b]``, in [0, 1].
        mask: bool, true where a sample (``[b]``) or an element counts.
        layout: the layout of packed latents.

    Returns:
        ``[b]``, float32 at least, 0 where masked.

    Raises:
        ValueError: if shapes differ or (on the CPU) a time leaves [0, 1].

    Example:
        >>> one = torch.ones(1, 2)
        >>> mean_velocity_loss(one, 2 * one, one, torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([1.])
    """
    (mine, slope, goal), counts = align_samples(
        mask, layout, mean_velocity=mean_velocity, dudt=dudt.detach(), target=target.detach()
    )
    compound = mine + hide(_span(t, r, mean_velocity, layout), counts).to(mine.dtype) * slope
    return reduce_samples((compound - goal).square(), "mean", mask=counts, layout=layout)


def adaptive_weight(loss: Tensor, *, p: float = 1.0, c: float = 1e-3, mask: Tensor | None = None) -> Tensor:
    """MeanFlow's weight ``1 / (sg(loss) + c)^p``: large errors pull less (arXiv 2505.13447 section 4.3).

    The paper's loss is the sum over a sample's elements, and c = 0.001 is meant for that. For a mean over D elements
    divide c by D to weigh alike; the weights then are D^p times as large.

    Args:
        loss: ``[b]``, not negative. Detached.
        p: 0 for no weight, 0.5 for a pseudo-Huber-like one, 1 in the paper.
        c: positive, keeps a vanishing loss finite.
        mask: ``[b]`` bool, true where the loss is known; the rest gets 0.

    Returns:
        ``[b]``, float32 at least; no gradient.

    Raises:
        ValueError: if ``c`` is not positive, ``p`` is negative, or (on the CPU) a loss that is not masked is not finite.

    Example:
        >>> adaptive_weight(torch.tensor([0.0, 4.0]), p=0.5, c=1.0)
        tensor([1.0000, 0.4472])
    """
    if not (0 < c < float("inf") and 0 <= p < float("inf")):
        raise ValueError(f"c, p: expected c positive and p not negative, got {c} and {p}")
    known = known_values("loss", loss.detach(), mask, loss, None).to(torch.promote_types(loss.dtype, torch.float32))
    return hide((known + c).pow(-p), mask)


def _span(t: Tensor, r: Tensor, latents: Tensor, layout: Layout | None) -> Tensor:
    return expand_time(t, latents, layout=layout) - expand_time(r, latents, layout=layout, name="r")
