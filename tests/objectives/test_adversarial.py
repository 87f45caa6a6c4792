"""Laws of the adversarial losses: what the best discriminator is, and what it then teaches the generator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.objectives import approximate_r1, discriminator_loss, generator_loss
from tests.oracle import Gaussian
from tests.strategies import seeds, tensor

DOUBLE = torch.float64
REAL, TIME = Gaussian(0.7, 0.6), 0.5


def hermite(num):
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def log_density(law, y):
    centre, variance = law.moments(torch.tensor(TIME, dtype=DOUBLE))
    variance = torch.as_tensor(variance)
    return -0.5 * (y - centre) ** 2 / variance - 0.5 * variance.log() - 0.5 * math.log(2 * math.pi)


class TestLosses:
    @given(st.lists(st.floats(-30, 30), min_size=1, max_size=5))
    def test_they_are_log_one_plus_exp(self, values):
        logits = torch.tensor(values, dtype=DOUBLE)
        expected = torch.tensor([math.log1p(math.exp(-value)) for value in values], dtype=DOUBLE)
        torch.testing.assert_close(generator_loss(logits), expected)
        both = discriminator_loss(logits, logits.flip(0))
        torch.testing.assert_close(both, expected + expected.flip(0) + logits.flip(0))

    def test_they_do_not_overflow(self):
        logits = torch.tensor([-1e4, 1e4], requires_grad=True)
        loss = generator_loss(logits) + discriminator_loss(logits, -logits)
        loss.sum().backward()
        assert loss.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()

    def test_real_is_pulled_up_and_fake_down_and_the_generator_pulls_fake_up(self):
        real, fake = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        slopes = torch.autograd.grad(discriminator_loss(real, fake).sum(), [real, fake])
        assert [slope.item() for slope in slopes] == [-0.5, 0.5]
        assert torch.autograd.grad(generator_loss(fake).sum(), fake)[0].item() == -0.5

    def test_the_best_logit_is_the_log_ratio_and_a_quadratic(self):
        # Minimise the expected loss over d(y) pointwise by Newton's method at 41 points of the noised laws.
        student = Gaussian(0.1, 0.9)
        y = torch.linspace(-2, 2, 41, dtype=DOUBLE)
        densities = [log_density(law, y).exp() for law in (REAL, student)]
        logit = torch.zeros_like(y, requires_grad=True)
        for _ in range(60):
            # The fake part of the loss is what an infinitely sure real logit leaves over, and the other way round.
            sure = torch.full_like(y, 1e6)
            loss = densities[0] * discriminator_loss(logit, -sure) + densities[1] * discriminator_loss(sure, logit)
            (slope,) = torch.autograd.grad(loss.sum(), logit, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), logit)
            logit = (logit - slope / curvature).detach().requires_grad_()
        expected = log_density(REAL, y) - log_density(student, y)
        torch.testing.assert_close(logit.detach(), expected, rtol=1e-9, atol=1e-9)
        assert expected.diff().diff().diff().abs().max() < 1e-12, "a quadratic"

    @pytest.mark.parametrize(
        ("mean", "std", "ratios"),
        [(0.1, 0.9, (0.603, 0.817)), (0.65, 0.62, (0.5047, 0.5308)), (0.699, 0.6005, (0.5001, 0.5005))],
        ids=["far", "near", "very near"],
    )
    def test_under_it_the_generators_gradient_tends_to_half_that_of_the_kl(self, mean, std, ratios):
        nodes, weights = hermite(60)
        free = torch.tensor([mean, std], dtype=DOUBLE, requires_grad=True)
        latent, noise = torch.cartesian_prod(nodes, nodes).unbind(1)
        weight = torch.cartesian_prod(weights, weights).prod(1)
        y = (1 - TIME) * (free[0] + free[1] * latent) + TIME * noise
        logit = log_density(REAL, y) - log_density(Gaussian(mean, std), y)  # a function of y, not of the generator
        (got,) = torch.autograd.grad((weight * generator_loss(logit)).sum(), free)
        kl = Gaussian(free[0], free[1]).kl(REAL, torch.tensor(TIME, dtype=DOUBLE))
        (expected,) = torch.autograd.grad(kl, free)
        digits = 1e-3 if ratios[0] > 0.6 else 1e-4
        assert (got / expected).tolist() == pytest.approx(ratios, abs=digits / 2)

    def test_masked_samples_weigh_nothing_whatever_they_hold(self):
        mask = torch.tensor([True, False])
        logits = torch.tensor([0.5, math.nan], requires_grad=True)
        for loss in (
            generator_loss(logits, mask=mask),
            discriminator_loss(logits, logits, mask=mask),
            approximate_r1(logits, 2 * logits, mask=mask),
        ):
            (slope,) = torch.autograd.grad(loss.sum(), logits)
            assert loss[1] == 0 and slope[1] == 0 and slope[0] != 0

    def test_a_broken_discriminator_is_an_error(self):
        broken = torch.tensor([0.0, math.nan])
        for call in (generator_loss, lambda x: discriminator_loss(x, x), lambda x: approximate_r1(x, x)):
            with pytest.raises(ValueError, match="diverged"):
                call(broken)
        with pytest.raises(ValueError, match="fake_logits"):
            discriminator_loss(torch.zeros(2), torch.zeros(3))
        with pytest.raises(ValueError, match="mask"):
            generator_loss(torch.zeros(2), mask=torch.ones(2))


class TestApproximateR1:
    @given(seeds(), st.floats(0.01, 2))
    def test_a_linear_discriminators_penalty_is_the_square_of_its_gradient(self, seed, alpha):
        weight = tensor((2,), seed, DOUBLE)
        nodes, weights = hermite(5)
        noise = torch.cartesian_prod(nodes, nodes)
        shares = torch.cartesian_prod(weights, weights).prod(1)
        x = tensor((2,), seed + 1, DOUBLE)
        real, perturbed = (x @ weight).expand(25), (x + alpha * noise) @ weight
        got = (shares * approximate_r1(real, perturbed)).sum()
        torch.testing.assert_close(got, alpha**2 * weight.square().sum())

    @given(seeds(), st.floats(0.05, 1))
    def test_a_quadratic_ones_has_a_curvature_term(self, seed, alpha):
        g, root = tensor((2,), seed, DOUBLE), tensor((2, 2), seed + 1, DOUBLE)
        hessian = root + root.T
        nodes, weights = hermite(7)
        noise = torch.cartesian_prod(nodes, nodes)
        shares = torch.cartesian_prod(weights, weights).prod(1)

        def logit(x):
            return x @ g + 0.5 * torch.einsum("bi,ij,bj->b", x, hessian, x)

        got = (shares * approximate_r1(logit(torch.zeros(49, 2, dtype=DOUBLE)), logit(alpha * noise))).sum()
        second = hessian.trace() ** 2 + 2 * hessian.square().sum()
        torch.testing.assert_close(got, alpha**2 * g.square().sum() + alpha**4 / 4 * second)

    def test_a_monte_carlo_estimate_agrees(self):
        g, hessian = torch.tensor([1.0, -0.5], dtype=DOUBLE), torch.tensor([[0.8, 0.3], [0.3, -1.1]], dtype=DOUBLE)
        noise = 0.5 * tensor((200_000, 2), 0, DOUBLE)
        perturbed = noise @ g + 0.5 * torch.einsum("bi,ij,bj->b", noise, hessian, noise)
        got = approximate_r1(torch.zeros_like(perturbed), perturbed).mean().item()
        exact = 0.25 * 1.25 + 0.5**4 / 4 * (0.3**2 + 2 * (0.64 + 0.18 + 1.21))
        assert got == pytest.approx(exact, rel=0.01)
