"""Problems whose flow is known in closed form: Gaussian data, and mixtures of Gaussians. No library code in here.

The path is ``x_t = (1 - t) x0 + t eps`` with t = 0 clean and t = 1 noise. Written from the conditional law of
jointly Gaussian variables, in whatever dtype comes in; the tests use float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]


def per_sample(t: Tensor | float, x: Tensor) -> Tensor:
    """Times ``[b]`` (or one for all) as a tensor that multiplies ``x [b, ...]``."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim == 1 else t


@dataclass(frozen=True)
class Gaussian:
    """Clean data with independent elements ``x0 ~ N(mean, std^2)``; mean and std are numbers or broadcast to x."""

    mean: float | Tensor = 0.7
    std: float | Tensor = 0.6

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t; t must already broadcast."""
        return (1 - t) * self.mean, (1 - t) ** 2 * self.std**2 + t**2

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[eps - x0 | x_t = x]: prior mean plus Cov(eps - x0, x_t) / Var(x_t) times the deviation."""
        t = per_sample(t, x)
        centre, variance = self.moments(t)
        return -self.mean + (t - (1 - t) * self.std**2) / variance * (x - centre)

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        centre, variance = self.moments(per_sample(t, x))
        return (centre - x) / variance

    def posterior(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and variance of x0 given x_t = x."""
        t = per_sample(t, x)
        centre, variance = self.moments(t)
        return self.mean + (1 - t) * self.std**2 / variance * (x - centre), self.std**2 * t**2 / variance

    def noise_posterior_mean(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[eps | x_t = x]."""
        t = per_sample(t, x)
        centre, variance = self.moments(t)
        return t / variance * (x - centre)

    def flow(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """The ODE's solution at time r through x at time t: quantiles are carried along."""
        centre, variance = self.moments(per_sample(t, x))
        centre_r, variance_r = self.moments(per_sample(r, x))
        return centre_r + (variance_r / variance).sqrt() * (x - centre)

    def consistency(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The clean end of the ODE through x at time t."""
        centre, variance = self.moments(per_sample(t, x))
        return self.mean + self.std * (x - centre) / variance.sqrt()

    def average_velocity(self, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """Displacement along the ODE from t to r, per unit of time."""
        return (x - self.flow(x, t, r)) / (per_sample(t, x) - per_sample(r, x))

    def kl(self, other: "Gaussian", t: Tensor) -> Tensor:
        """KL(self_t || other_t) of the noised marginals, per element; t must already broadcast."""
        (mean, variance), (other_mean, other_variance) = self.moments(t), other.moments(t)
        ratio = variance / other_variance
        return 0.5 * (ratio - 1 - ratio.log() + (mean - other_mean) ** 2 / other_variance)


@dataclass(frozen=True)
class Mixture:
    """Clean data from a mixture: component k has weight ``weights[k]`` and independent ``N(means[k], stds[k]^2)``.

    ``weights [k]`` sum to 1; ``means`` and ``stds`` are ``[k, ...]`` with the trailing shape of a sample.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def responsibilities(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Posterior probability ``[b, k]`` of each component given x_t = x."""
        logs = []
        for weight, part in zip(self.weights, self.parts(), strict=True):
            centre, variance = part.moments(per_sample(t, x))
            density = -0.5 * ((x - centre) ** 2 / variance + variance.log() + math.log(2 * math.pi))
            logs.append(weight.log() + density.flatten(1).sum(1))
        return torch.stack(logs, dim=1).softmax(1)

    def parts(self) -> list[Gaussian]:
        return [Gaussian(mean, std) for mean, std in zip(self.means, self.stds, strict=True)]

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._weigh(x, t, [part.velocity(x, t) for part in self.parts()])

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._weigh(x, t, [part.score(x, t) for part in self.parts()])

    def posterior_mean(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._weigh(x, t, [part.posterior(x, t)[0] for part in self.parts()])

    def log_density(self, x: Tensor, t: Tensor | float) -> Tensor:
        """log p_t(x), ``[b]``."""
        logs = []
        for weight, part in zip(self.weights, self.parts(), strict=True):
            centre, variance = part.moments(per_sample(t, x))
            normal = torch.distributions.Normal(centre.expand_as(x), variance.sqrt().expand_as(x))
            logs.append(weight.log() + normal.log_prob(x).flatten(1).sum(1))
        return torch.logsumexp(torch.stack(logs), dim=0)

    def _weigh(self, x: Tensor, t: Tensor | float, values: list[Tensor]) -> Tensor:
        shares = self.responsibilities(x, t)
        return sum(share.reshape(-1, *[1] * (x.ndim - 1)) * v for share, v in zip(shares.T, values, strict=True))


def two_components() -> Mixture:
    """A fixed 2-component mixture in two dimensions, far from Gaussian."""
    means = torch.tensor([[1.2, -0.4], [-0.9, 0.8]], dtype=torch.float64)
    stds = torch.tensor([[0.4, 0.7], [0.5, 0.3]], dtype=torch.float64)
    return Mixture(torch.tensor([0.3, 0.7], dtype=torch.float64), means, stds)


def rk4(field: Field, x: Tensor, start: float, stop: float, num_steps: int = 2000) -> Tensor:
    """Classical Runge-Kutta solution of dx/dt = field(x, t): the reference where there is no closed form."""
    step = (stop - start) / num_steps
    batch = torch.ones(x.shape[0], dtype=x.dtype)
    for index in range(num_steps):
        t = (start + index * step) * batch
        k1 = field(x, t)
        k2 = field(x + step / 2 * k1, t + step / 2)
        k3 = field(x + step / 2 * k2, t + step / 2)
        k4 = field(x + step * k3, t + step)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
