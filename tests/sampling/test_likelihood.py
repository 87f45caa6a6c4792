"""Laws of Gaussian steps: real densities, expected ratios, KL with the right length of step, and what padding may do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from lensmini.objectives.policy import clipped_surrogate, group_advantages, guarded_log_ratio
from lensmini.packed import Layout
from lensmini.sampling import gaussian_kl, gaussian_log_prob, sde_kernel
from tests.oracle import Gaussian
from tests.strategies import seeds, tensor

DOUBLE = torch.float64


def hermite(num):
    """Nodes and weights of the standard normal: exact for polynomials of degree 2 num - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


class TestDensity:
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), seeds())
    def test_the_sum_is_the_log_density(self, shape, seed):
        x, mean = tensor(shape, seed, DOUBLE), tensor(shape, seed + 1, DOUBLE)
        std = tensor((shape[0],), seed + 2, DOUBLE).exp()
        spread = std.reshape(-1, *[1] * (len(shape) - 1))
        expected = Normal(mean, spread).log_prob(x).reshape(shape[0], -1)
        torch.testing.assert_close(gaussian_log_prob(x, mean, std), expected.sum(1))
        torch.testing.assert_close(gaussian_log_prob(x, mean, spread), expected.sum(1))
        torch.testing.assert_close(gaussian_log_prob(x, mean, std, reduction="mean"), expected.mean(1))

    def test_the_expected_ratio_is_one_only_for_the_sum(self):
        # D = 64 elements, a step KL of K = 3: the mean reduction gives exp(-(K / D)(1 - 1 / D)).
        generator = torch.Generator().manual_seed(0)
        num, size, kl = 100_000, 64, 3.0
        std = torch.full((num,), 0.5, dtype=DOUBLE)
        old = torch.zeros(num, size, dtype=DOUBLE)
        new = old + 0.5 * math.sqrt(2 * kl / size)
        assert gaussian_kl(new[:1], old[:1], std[:1]).item() == pytest.approx(kl)
        x = old + 0.5 * torch.randn(num, size, generator=generator, dtype=DOUBLE)
        ratio = (gaussian_log_prob(x, new, std, "mean") - gaussian_log_prob(x, old, std, "mean")).exp()
        expected = math.exp(-(kl / size) * (1 - 1 / size))
        assert expected == pytest.approx(0.9549, abs=5e-5)
        assert ratio.mean().item() == pytest.approx(expected, abs=5e-4)
        # The sum, by quadrature over one element.
        nodes, weights = hermite(40)
        mean, shifted = torch.zeros(40, 1, dtype=DOUBLE), torch.full((40, 1), 0.4, dtype=DOUBLE)
        spread = torch.full((40,), 0.5, dtype=DOUBLE)
        sample = 0.5 * nodes[:, None]
        log_ratio = gaussian_log_prob(sample, shifted, spread) - gaussian_log_prob(sample, mean, spread)
        assert (weights * log_ratio.exp()).sum().item() == pytest.approx(1, abs=1e-12)

    def test_resolution_enters_the_sum_as_it_must_and_not_the_mean(self):
        layout = Layout.build([(2, 2), (2, 4)])
        std = torch.tensor([0.3, 0.3], dtype=DOUBLE)
        x = torch.full((12, 3), 0.2, dtype=DOUBLE)
        ratios = {}
        for reduction in ("sum", "mean"):
            new = gaussian_log_prob(x, 0.1 * x, std, reduction, layout=layout)
            ratios[reduction] = (new - gaussian_log_prob(x, 0 * x, std, reduction, layout=layout)).exp()
        torch.testing.assert_close(ratios["sum"][1], ratios["sum"][0] ** 2)
        torch.testing.assert_close(ratios["mean"][1], ratios["mean"][0])

    def test_a_step_without_noise_has_no_density(self):
        x, t = torch.zeros(2, 3), torch.tensor([0.5, 0.4])
        mean, std = sde_kernel(x, x, t, torch.tensor([0.2, 0.0]), 0.7)
        for function in (gaussian_log_prob, gaussian_kl):
            with pytest.raises(ValueError, match="std: expected positive"):
                function(x, mean, std)
            kept = function(x, mean, std, mask=torch.tensor([True, False]))
            assert torch.equal(kept[:1], function(x[:1], mean[:1], std[:1])) and kept[1] == 0

    def test_a_reparametrised_sample_cancels_the_gradient_and_a_detached_one_does_not(self):
        mean = torch.zeros(1, 2, requires_grad=True)
        sample = mean + 0.5 * tensor((1, 2), 0)
        (live,) = torch.autograd.grad(gaussian_log_prob(sample, mean, torch.tensor([0.5])).sum(), mean)
        (held,) = torch.autograd.grad(gaussian_log_prob(sample.detach(), mean, torch.tensor([0.5])).sum(), mean)
        assert not live.any() and held.all()

    @pytest.mark.parametrize(
        ("std", "message"),
        [
            (torch.ones(3), r"std: expected shape \[b\]"),
            (torch.ones(2, 4), "std: expected .*broadcasting"),
            (torch.ones(2, 1, 1), "std: expected .*broadcasting"),
            (torch.ones(2, dtype=torch.int64), "std: expected floating"),
            (torch.tensor([1.0, math.nan]), "std: expected positive"),
            (torch.tensor([1.0, -1.0]), "std: expected positive"),
        ],
    )
    def test_wrong_deviations_are_refused(self, std, message):
        with pytest.raises(ValueError, match=message):
            gaussian_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), std)

    def test_an_unknown_reduction_is_refused(self):
        with pytest.raises(ValueError, match="reduction"):
            gaussian_log_prob(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), "none")  # pyright: ignore


class TestDivergence:
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=3), seeds())
    def test_it_is_the_divergence_of_two_normals(self, shape, seed):
        p, q = tensor(shape, seed, DOUBLE), tensor(shape, seed + 1, DOUBLE)
        std = tensor((shape[0],), seed + 2, DOUBLE).exp()
        spread = std.reshape(-1, *[1] * (len(shape) - 1))
        expected = kl_divergence(Normal(p, spread), Normal(q, spread)).reshape(shape[0], -1)
        torch.testing.assert_close(gaussian_kl(p, q, std), expected.sum(1))
        torch.testing.assert_close(gaussian_kl(p, q, std, "mean"), expected.mean(1))

    @given(seeds(), st.floats(0.05, 0.95), st.floats(0.1, 0.95), st.floats(0.1, 1))
    def test_a_steps_divergence_has_its_closed_form_for_every_kernel(self, seed, t, fraction, a):
        s = t * fraction
        x, v, dv = (tensor((1, 5), seed + i, DOUBLE) for i in range(3))
        times = [torch.tensor([value], dtype=DOUBLE) for value in (t, s)]
        gap, size = t - s, dv.square().sum().item()
        ddim = 1 - (s * (1 - t) / (t * (1 - s))) ** 2
        expected = {
            "flow": gap / 2 * (1 - t) / t * (1 / a + a / 2) ** 2 * size,
            "dance": gap / 2 * (1 / a + a * (1 - t) / (2 * t)) ** 2 * size,
            "ddim": (s * math.sqrt(1 - a**2 * ddim) * (1 - t) - (1 - s) * t) ** 2 * size / (2 * a**2 * s**2 * ddim),
            "cps": (s * math.cos(a * math.pi / 2) * (1 - t) - (1 - s) * t) ** 2
            * size
            / (2 * (s * math.sin(a * math.pi / 2)) ** 2),
        }
        for kind, value in expected.items():
            mean, std = sde_kernel(x, v, *times, a, kind)
            other, _ = sde_kernel(x, v + dv, *times, a, kind)
            assert gaussian_kl(other, mean, std).item() == pytest.approx(value, rel=1e-6), kind

    @pytest.mark.parametrize("kind", ["flow", "dance"])
    def test_it_is_linear_in_the_length_of_the_step(self, kind):
        x, v = tensor((1, 4), 0, DOUBLE), tensor((1, 4), 1, DOUBLE)
        t = torch.tensor([0.8], dtype=DOUBLE)
        per_time = []
        for gap in (0.2, 0.1, 0.01):
            mean, std = sde_kernel(x, v, t, t - gap, 0.5, kind)
            per_time.append(gaussian_kl(mean, sde_kernel(x, v + 0.3, t, t - gap, 0.5, kind).mean, std).item() / gap)
        assert per_time == pytest.approx([per_time[0]] * 3, rel=1e-9)

    def test_distillation_on_the_students_path_has_the_closed_form_and_its_gradient(self):
        # Student and teacher know Gaussians of different means: the sum over a path, by quadrature over its start.
        teacher, eta = Gaussian(0.2, 0.6), 0.5
        shift = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
        nodes, weights = hermite(20)
        total, expected = torch.zeros((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
        same = torch.zeros((), dtype=DOUBLE)
        for t, s in [(0.9, 0.7), (0.7, 0.5), (0.5, 0.2)]:
            times = [torch.full((20,), value, dtype=DOUBLE) for value in (t, s)]
            variance = (1 - t) ** 2 * 0.36 + t**2
            x = ((1 - t) * 0.7 + math.sqrt(variance) * nodes)[:, None]
            student = Gaussian(shift, 0.6).velocity(x, times[0])
            mean, std = sde_kernel(x, student, *times, eta, "dance")
            other = sde_kernel(x, teacher.velocity(x, times[0]), *times, eta, "dance").mean
            total = total + (weights * gaussian_kl(mean, other, std)).sum()
            same = same + gaussian_kl(mean, mean, std).sum()
            # Velocities of equal spread differ by a constant: -d - (t - (1 - t) s^2) / V (1 - t) d.
            gap = (shift - 0.2) * (-1 - (t - (1 - t) * 0.36) / variance * (1 - t))
            expected = expected + (t - s) / 2 * (1 / eta + eta * (1 - t) / (2 * t)) ** 2 * gap**2
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
        assert same == 0
        (got,), (wanted,) = torch.autograd.grad(total, shift), torch.autograd.grad(expected, shift)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)


class TestPolicyGradient:
    STD, CENTRE, PLACE = 0.5, 1.1, 0.3

    def rewards(self, x):
        return -((x - self.CENTRE) ** 2)

    def test_at_the_old_policy_the_surrogate_has_the_gradient_of_the_expected_reward(self):
        nodes, weights = hermite(8)
        x = self.PLACE + self.STD * nodes
        reward = self.rewards(x)
        mean = (weights * reward).sum()
        spread = (weights * (reward - mean) ** 2).sum().sqrt()
        theta = torch.tensor(self.PLACE, dtype=DOUBLE, requires_grad=True)
        std = torch.full((8,), self.STD, dtype=DOUBLE)
        old = gaussian_log_prob(x[:, None], torch.full((8, 1), self.PLACE, dtype=DOUBLE), std)
        log_ratio = gaussian_log_prob(x[:, None], theta.expand(8, 1), std) - old
        assert not log_ratio.any(), "on-policy ratios are exactly one"
        loss = (weights * clipped_surrogate(log_ratio, (reward - mean) / spread, 1e-4, 1e-4)).sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        exact = -2 * (self.PLACE - self.CENTRE) / spread  # of the expected reward, which the loss is minus
        torch.testing.assert_close(gradient, -exact, rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize(("baseline", "gradient"), [("leave_one_out", 1.6), ("mean", 1.2)])
    def test_a_mean_that_contains_the_sample_shrinks_the_gradient_by_one_in_the_group(self, baseline, gradient):
        # All groups of four from three nodes each: exact, for a quadratic reward has degree three times the score.
        nodes, weights = hermite(3)
        index = torch.cartesian_prod(*[torch.arange(3)] * 4)
        x = (self.PLACE + self.STD * nodes)[index].flatten()
        weight = weights[index].prod(1).repeat_interleave(4) / 4
        group = torch.arange(81).repeat_interleave(4)
        advantage = group_advantages(self.rewards(x), group, baseline=baseline, scale="none")
        theta = torch.tensor(self.PLACE, dtype=DOUBLE, requires_grad=True)
        std = torch.full_like(x, self.STD)
        log_prob = gaussian_log_prob(x[:, None], theta.expand(len(x), 1), std)
        loss = (weight * clipped_surrogate(log_prob - log_prob.detach(), advantage, 0.2, 0.2)).sum()
        (got,) = torch.autograd.grad(loss, theta)
        assert -got.item() == pytest.approx(gradient, abs=1e-12)

    def test_the_guarded_ratio_is_centred_and_equally_wide_at_every_noise(self):
        nodes, weights = hermite(12)
        for std in (0.01, 0.3, 4.0):
            spread = torch.full((12,), std, dtype=DOUBLE)
            x, old = std * nodes[:, None], torch.zeros(12, 1, dtype=DOUBLE)
            theta = torch.tensor(0.002, dtype=DOUBLE, requires_grad=True)
            new = theta.expand(12, 1)
            log_ratio = gaussian_log_prob(x, new, spread) - gaussian_log_prob(x, old, spread)
            guarded = guarded_log_ratio(log_ratio, gaussian_kl(new, old, spread), spread)
            assert (weights * guarded).sum().item() == pytest.approx(0, abs=1e-12)
            assert (weights * guarded**2).sum().item() == pytest.approx(0.002**2, rel=1e-9)
            # It is linear in the policy's mean: its gradient is the noise that was drawn.
            (gradient,) = torch.autograd.grad((guarded * nodes * weights).sum(), theta)
            assert gradient.item() == pytest.approx(1.0, rel=1e-9)
