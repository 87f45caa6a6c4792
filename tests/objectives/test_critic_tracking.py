"""A whole distillation step in one dimension, with the library's parts: when the fake score keeps up, nothing oscillates.

Student ``x = g + s z``, a fake score that is exact but for its mean f, real data around 0. Everything is linear, so the
step's matrix is found by applying it to a basis, and its eigenvalues are known: with a the student's gain, kappa the part
of the fake's error that the critic steps remove and mu the part that IDA removes, they depend on
``kappa_eff = 1 - (1 - kappa)(1 - mu)`` alone.
"""

import numpy as np
import pytest
import torch

from lensmini.averaging import lerp_parameters_
from lensmini.objectives import directional_loss, dmd_direction, flow_matching_loss
from lensmini.paths import clean_prediction, interpolate, velocity_target
from tests.oracle import Gaussian

DOUBLE = torch.float64
STD, TIME = 0.6, 0.5
VARIANCE = (1 - TIME) ** 2 * STD**2 + TIME**2


def hermite_pairs(num=5):
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = torch.cartesian_prod(torch.tensor(nodes), torch.tensor(nodes))
    weight = torch.cartesian_prod(torch.tensor(weights), torch.tensor(weights)).prod(1)
    return grid[:, :1], grid[:, 1:], weight / weight.sum()


LATENT, NOISE, WEIGHT = hermite_pairs()
TIMES = torch.full((len(WEIGHT),), TIME, dtype=DOUBLE)


def global_step(student: float, fake: float, *, critic_lr: float, num_critic: int, gain: float, mu: float):
    """Critic steps, then a student step, then IDA: the order of Lens."""
    g = torch.tensor(student, dtype=DOUBLE, requires_grad=True)
    f = torch.tensor(fake, dtype=DOUBLE, requires_grad=True)
    for _ in range(num_critic):
        x = (g + STD * LATENT).detach()
        noisy = interpolate(x, NOISE, TIMES)
        velocity = Gaussian(f, STD).velocity(noisy, TIMES)
        loss = (WEIGHT * flow_matching_loss(velocity, velocity_target(x, NOISE))).sum()
        (slope,) = torch.autograd.grad(loss, f)
        f = (f - critic_lr * slope).detach().requires_grad_()
    x = g + STD * LATENT
    noisy = interpolate(x.detach(), NOISE, TIMES)
    clean = [clean_prediction(noisy, Gaussian(mean, STD).velocity(noisy, TIMES), TIMES) for mean in (f, 0.0)]
    direction = dmd_direction(clean[0], clean[1], x=x, normaliser="none", floor=1.0)
    (slope,) = torch.autograd.grad((WEIGHT * directional_loss(x, direction)).sum(), g)
    new = {"mean": (g - gain * VARIANCE / TIME**2 * slope).detach()}  # the direction is t^2 / V times the error
    tracked = {"mean": f.detach().clone()}
    lerp_parameters_(tracked, new, mu)
    return new["mean"].item(), tracked["mean"].item()


def matrix(**settings):
    columns = [global_step(*start, **settings) for start in ((1.0, 0.0), (0.0, 1.0))]
    return np.array(columns).T


def kappa_of(critic_lr, num_critic):
    # The velocity's slope in f is -1 - (1 - t)(t - (1 - t) s^2) / V.
    slope = 1 + (1 - TIME) * (TIME - (1 - TIME) * STD**2) / VARIANCE
    return 1 - (1 - 2 * critic_lr * slope**2) ** num_critic


def rate_for(kappa, num_critic):
    slope = 1 + (1 - TIME) * (TIME - (1 - TIME) * STD**2) / VARIANCE
    return (1 - (1 - kappa) ** (1 / num_critic)) / (2 * slope**2)


def roots(a, kappa_eff):
    return np.roots([1, -(2 - kappa_eff - a * kappa_eff), 1 - kappa_eff])


@pytest.mark.parametrize("gain", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    ("critic_lr", "num_critic", "mu"), [(0.02, 1, 0.0), (0.02, 4, 0.0), (0.02, 4, 0.03), (0.1, 2, 0.5)]
)
def test_eigenvalues_are_those_of_the_effective_tracking(gain, critic_lr, num_critic, mu):
    kappa_eff = 1 - (1 - kappa_of(critic_lr, num_critic)) * (1 - mu)
    got = np.linalg.eigvals(matrix(critic_lr=critic_lr, num_critic=num_critic, gain=gain, mu=mu))
    expected = roots(gain, kappa_eff)
    assert sorted(got, key=lambda z: (z.real, z.imag)) == pytest.approx(
        sorted(expected.astype(complex), key=lambda z: (z.real, z.imag)), abs=1e-9
    )


def test_more_critic_steps_and_more_ida_are_the_same_help():
    # kappa_eff = 0.36 three ways: one critic step, four smaller ones, and a slower critic with IDA.
    settings = [
        {"critic_lr": rate_for(0.36, 1), "num_critic": 1, "mu": 0.0},
        {"critic_lr": rate_for(0.36, 4), "num_critic": 4, "mu": 0.0},
        {"critic_lr": rate_for(0.2, 1), "num_critic": 1, "mu": 0.2},
    ]
    sorted_values = [
        sorted(np.linalg.eigvals(matrix(gain=0.5, **one)), key=lambda z: (z.real, z.imag)) for one in settings
    ]
    for values in sorted_values[1:]:
        assert values == pytest.approx(sorted_values[0], abs=1e-9)


@pytest.mark.parametrize("gain", [0.05, 0.2, 0.6])
def test_it_is_free_of_oscillation_exactly_from_the_threshold_on(gain):
    threshold = 4 * gain / (1 + gain) ** 2
    for kappa_eff, oscillates in ((threshold * 0.98, True), (min(1.0, threshold * 1.02), False)):
        mu = 0.03
        kappa = 1 - (1 - kappa_eff) / (1 - mu)
        got = np.linalg.eigvals(matrix(critic_lr=rate_for(kappa, 4), num_critic=4, gain=gain, mu=mu))
        assert bool(abs(got.imag).max() > 1e-6) == oscillates
        if oscillates:
            assert abs(got) == pytest.approx([(1 - kappa_eff) ** 0.5] * 2, abs=1e-9)


def test_a_student_that_outruns_its_critic_spirals_in_slowly():
    fast = {"critic_lr": rate_for(0.02, 1), "num_critic": 1, "gain": 0.5}
    state, signs = (1.0, 1.0), []
    for _ in range(60):
        state = global_step(*state, mu=0.0, **fast)
        signs.append(state[0] > 0)
    assert len(set(signs)) == 2, "it overshoots"
    state = (1.0, 1.0)
    for _ in range(60):
        state = global_step(*state, mu=0.9, **fast)
    assert 0 <= state[0] < 1e-9, "with strong IDA it does not"
