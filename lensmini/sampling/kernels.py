"""One stochastic step of sampling as a Gaussian: four published kernels with one meaning of mean and std.

Axes: b samples, N image tokens of a packed batch, c channels.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lensmini.packed import Layout
from lensmini.paths import check_same_shape, expand_time
from lensmini.reduction import holds

__all__ = ["Kernel", "Transition", "sde_kernel"]

Kernel = Literal["ddim", "flow", "dance", "cps"]
"""Which law a stochastic step has."""


class Transition(NamedTuple):
    """A Gaussian step: the next state is ``mean + std * noise``, and nothing else.

    Example:
        >>> state, time = torch.ones(1, 2), torch.tensor([0.5])
        >>> Transition(*sde_kernel(state, state, time, time / 2, 0.0)).mean
        tensor([[0.7500, 0.7500]])
    """

    mean: Tensor
    """The shape of the state, float32 at least."""
    std: Tensor
    """``[b, 1, ...]`` or ``[N, 1]``, broadcasting over ``mean``: of this increment, whatever the kernel."""


def sde_kernel(
    noisy: Tensor,
    velocity: Tensor,
    t: Tensor,
    t_next: Tensor,
    eta: float,
    kind: Kernel = "ddim",
    *,
    at_one: float | None = None,
    layout: Layout | None = None,
) -> Transition:
    """Mean and standard deviation of the state at ``t_next`` given the state at ``t``.

    With s = ``t_next``, the clean prediction ``x0 = x - t v`` and the noise prediction ``e = x + (1 - t) v``:

    - ``"ddim"`` (arXiv 2010.02502 eq. 16 on the straight path): mean ``(1 - s) x0 + sqrt(s^2 - std^2) e`` with
      ``std = eta s sqrt(1 - (s (1 - t) / (t (1 - s)))^2)``. Keeps the marginals for every eta in [0, 1] as the grid is
      refined, ends exactly on the data (std is 0 at s = 0), regular everywhere.
    - ``"flow"`` (Flow-GRPO, arXiv 2505.05470): a step of the reverse SDE with diffusion ``eta sqrt(t / (1 - t))``.
      Biased where t = 1, where that is infinite: the time ``at_one`` stands in for 1 under the root, by default s, as in
      the published code. The first state's variance is then up to ``1 + eta^4 / 4`` times what it should be, at any
      number of steps. Leaves noise on the last step.
    - ``"dance"`` (DanceGRPO, arXiv 2505.07818): the same with constant diffusion ``eta``. Leaves noise on the last step.
    - ``"cps"`` (coefficients-preserving sampling, arXiv 2509.05952): mean ``(1 - s) x0 + s cos(eta pi/2) e`` and
      ``std = s sin(eta pi/2)``. Clean pictures, but of a narrower distribution, at any number of steps: an explorer.

    ``eta = 0`` is the Euler step of the ODE (to rounding for ``ddim`` and ``cps``, else bit for bit).

    Args:
        noisy: ``[b, ...]``, or ``[N, c]`` with ``layout``; the state at ``t``.
        velocity: the shape of ``noisy``; the model's output at ``t``. The mean is differentiable in both.
        t: ``[b]``, in [0, 1].
        t_next: ``[b]``, in [0, ``t``].
        eta: strength of the noise: in [0, 1] for ``ddim`` and ``cps``, at least 0 for the others. Published: 0.7
            ``flow``, 0.3 ``dance``, 0.8 ``cps``.
        kind: the kernel.
        at_one: ``flow`` only: the time in (0, 1) that stands for t = 1 in the diffusion.
        layout: the layout of packed latents.

    Returns:
        The transition; not rounded to the dtype of ``noisy``.

    Raises:
        ValueError: if shapes differ, a tensor is not floating point, ``kind``, ``eta`` or ``at_one`` is out of range, or
            (on the CPU) a time leaves [0, 1] or ``t_next`` is above ``t``.

    Example:
        >>> x, t, t_next = torch.ones(1, 2), torch.tensor([1.0]), torch.tensor([0.5])
        >>> mean, std = sde_kernel(x, torch.zeros(1, 2), t, t_next, eta=1.0)
        >>> mean, std
        (tensor([[0.5000, 0.5000]]), tensor([[0.5000]]))
    """
    _check(eta, kind, at_one)
    check_same_shape("velocity", velocity, "noisy", noisy)
    here, there = expand_time(t, noisy, layout=layout), expand_time(t_next, noisy, layout=layout, name="t_next")
    if t.device.type == "cpu" and not holds(t_next <= t):
        raise ValueError(f"t_next: expected at most t = {t.tolist()}, got {t_next.tolist()}")
    dtype = torch.promote_types(torch.promote_types(here.dtype, there.dtype), velocity.dtype)
    here, there, state, flow = here.to(dtype), there.to(dtype), noisy.to(dtype), velocity.to(dtype)
    gap, still = there - here, there == here
    noise = state + (1 - here) * flow
    if kind in ("flow", "dance"):
        if kind == "flow":
            corner = torch.where(here == 1, there if at_one is None else at_one, here)
            rate = torch.where(still, 0.0, eta**2 / (1 - corner))  # diffusion^2 / t
            diffusion = rate * here
        else:
            rate = torch.where(still, 0.0, eta**2 / here)
            diffusion = torch.full_like(here, eta**2)
        return Transition(state + gap * flow + gap * rate / 2 * noise, (diffusion * -gap).sqrt())
    clean = (1 - there) * (state - here * flow)
    if kind == "cps":
        angle = eta * math.pi / 2
        return Transition(clean + there * math.cos(angle) * noise, there * math.sin(angle))
    # 1 - ratio^2 as (1 - ratio)(1 + ratio), with 1 - ratio without cancellation.
    remaining = torch.where(still, 0.0, -gap / (here * (1 - there)))
    fresh = remaining * (2 - remaining)
    return Transition(clean + there * (1 - eta**2 * fresh).sqrt() * noise, eta * there * fresh.sqrt())


def _check(eta: float, kind: str, at_one: float | None) -> None:
    if kind not in ("ddim", "flow", "dance", "cps"):
        raise ValueError(f"kind: expected 'ddim', 'flow', 'dance' or 'cps', got {kind!r}")
    most = 1.0 if kind in ("ddim", "cps") else math.inf
    if not (math.isfinite(eta) and 0 <= eta <= most):
        raise ValueError(f"eta: expected a number in [0, {most:g}] for {kind}, got {eta}")
    if at_one is not None and (kind != "flow" or not 0 < at_one < 1):
        raise ValueError(f"at_one: expected a time in (0, 1), for the kernel 'flow' only, got {at_one} for {kind}")
