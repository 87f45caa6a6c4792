"""Laws of NFT, AWM and RAM: identities, gradients, and optima that are exact tilts of Gaussian data.

Expectations are Gauss-Hermite sums in float64; a loss that is quadratic in its parameters is minimised by one Newton
step through autograd, so that the whole function is under test: signs, beta, times and reductions.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.functional import hessian, jacobian

from lensmini.averaging import lerp_parameters_
from lensmini.objectives.policy import (
    clipped_surrogate,
    decay_ramp,
    matching_log_ratio,
    nft_decay,
    nft_loss,
    ram_target,
    velocity_gap,
)
from lensmini.packed import Layout
from tests.oracle import Gaussian
from tests.strategies import seeds, tensor

DOUBLE = torch.float64
ORACLE = Gaussian(0.7, 0.6)
BETAS = [0.1, 0.5, 1.0, 3.0]


def hermite(num):
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def minimise(loss, num):
    """The minimiser of a quadratic function of ``num`` parameters."""
    start = torch.zeros(num, dtype=DOUBLE)
    curvature = hessian(loss, start)
    assert torch.allclose(curvature, hessian(loss, start + 1)), "the loss must be quadratic"
    return start - torch.linalg.solve(curvature, jacobian(loss, start))


def fields(seed, shape=(3, 4)):
    return [tensor(shape, seed + index, DOUBLE) for index in range(3)]


def uniform(seed, num):
    return torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class TestNft:
    @given(seeds(), st.sampled_from(BETAS))
    def test_the_loss_is_its_expansion_around_the_old_policy(self, seed, beta):
        v, old, target = fields(seed)
        r = uniform(seed, 3)
        signal = (2 * r - 1)[:, None]
        expected = (old - target) ** 2 + 2 * signal * beta * (v - old) * (old - target) + (beta * (v - old)) ** 2
        torch.testing.assert_close(nft_loss(v, old, target, r, beta=beta), expected.mean(1))

    @given(seeds(), st.sampled_from(BETAS))
    def test_at_the_old_policy_the_value_knows_no_reward_and_the_gradient_does(self, seed, beta):
        _, old, target = fields(seed)
        v, r = old.clone().requires_grad_(), uniform(seed, 3)
        loss = nft_loss(v, old, target, r, beta=beta)
        torch.testing.assert_close(loss, ((old - target) ** 2).mean(1))
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        torch.testing.assert_close(gradient, 2 * beta * (2 * r - 1)[:, None] * (old - target) / 4)
        half = torch.full((3,), 0.5, dtype=DOUBLE)
        for options in ({}, {"weight": "self_normalised", "t": r}):
            (still,) = torch.autograd.grad(nft_loss(v, old, target, half, beta=beta, **options).sum(), v)
            assert not still.any(), "a half means stay"

    @given(seeds(), st.sampled_from(BETAS))
    def test_there_it_has_the_gradient_of_advantage_weighted_matching(self, seed, beta):
        _, old, target = fields(seed)
        v, r = old.clone().requires_grad_(), uniform(seed, 3)
        (nft,) = torch.autograd.grad(nft_loss(v, old, target, r, beta=beta).sum(), v)
        surrogate = clipped_surrogate(matching_log_ratio(v, old, target), 2 * r - 1, 1e-5, 1e-5)
        (awm,) = torch.autograd.grad(surrogate.sum(), v)
        torch.testing.assert_close(nft, beta * awm)

    @given(seeds(), st.sampled_from(BETAS))
    def test_the_optimum_at_a_point_moves_by_the_signed_surprise_also_for_a_stale_policy(self, seed, beta):
        target, r = tensor((50, 1), seed, DOUBLE), uniform(seed, 50)
        old = torch.full((50, 1), 0.3, dtype=DOUBLE)  # one x, many targets; not their mean
        best = minimise(lambda p: nft_loss(p.expand(50, 1), old, target, r, beta=beta).mean(), 1)
        expected = 0.3 + ((2 * r - 1)[:, None] * (target - 0.3)).mean() / beta
        assert best.item() == pytest.approx(expected.item(), abs=1e-10)

    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.95])
    def test_a_linear_reward_tilts_gaussian_data_exactly(self, beta, t):
        # r = 1/2 + k (x0 - m): the fixed target is the velocity of N(m + 2 k s^2 / beta, s^2), at every t at once.
        k, m, s = 0.2, 0.7, 0.6
        nodes, weights = hermite(5)
        grid, noise = torch.cartesian_prod(nodes, nodes).unbind(1)
        weight = torch.cartesian_prod(weights, weights).prod(1)
        x0 = m + s * grid
        x, time = ((1 - t) * x0 + t * noise)[:, None], torch.full((25,), t, dtype=DOUBLE)
        old, target, r = ORACLE.velocity(x, time), (noise - x0)[:, None], 0.5 + k * (x0 - m)

        def loss(p):
            return (weight * nft_loss(p[0] + p[1] * x, old, target, r, beta=beta)).sum()

        offset, slope = minimise(loss, 2)
        tilted = Gaussian(m + 2 * k * s**2 / beta, s)
        at = [tilted.velocity(torch.full((1, 1), value, dtype=DOUBLE), t).item() for value in (0.0, 1.0)]
        assert [offset.item(), (offset + slope).item()] == pytest.approx(at, abs=1e-12)

    @pytest.mark.parametrize("x", [-1.0, 0.2, 1.4])
    @pytest.mark.parametrize("t", [0.2, 0.6, 0.9])
    def test_a_bump_reward_moves_towards_the_tilted_posterior(self, x, t):
        kap, centre, width, beta = 0.9, 1.0, 0.5, 0.7
        a, b2 = (value.item() for value in ORACLE.posterior(torch.tensor([[x]], dtype=DOUBLE), t))
        nodes, weights = hermite(80)
        x0 = a + math.sqrt(b2) * nodes
        r = kap * torch.exp(-((x0 - centre) ** 2) / (2 * width**2))
        target, old = ((x - x0) / t)[:, None], torch.full((80, 1), (x - a) / t, dtype=DOUBLE)
        best = minimise(lambda p: (weights * nft_loss(p.expand(80, 1), old, target, r, beta=beta)).sum(), 1).item()
        mean_r = kap * width / math.sqrt(width**2 + b2) * math.exp(-((a - centre) ** 2) / (2 * (width**2 + b2)))
        that = (a * width**2 + centre * b2) / (width**2 + b2)
        v_old = (x - a) / t
        assert best == pytest.approx(v_old + 2 / beta * mean_r * ((x - that) / t - v_old), abs=1e-9)

    @given(seeds(), st.floats(0.05, 1))
    def test_the_clean_predictions_error_is_t_times_the_velocitys(self, seed, t):
        # With a floor above every error the self-normalised loss is t^2 times the plain one, over the floor.
        v, old, target = fields(seed)
        r, time = uniform(seed, 3), torch.full((3,), t, dtype=DOUBLE)
        got = nft_loss(v, old, target, r, beta=0.5, weight="self_normalised", t=time, floor=1e3)
        torch.testing.assert_close(got * 1e3, t**2 * nft_loss(v, old, target, r, beta=0.5))

    @given(seeds(), st.sampled_from(BETAS), st.floats(0.05, 1))
    def test_the_two_errors_are_normalised_apart_by_their_own_constant_size(self, seed, beta, t):
        v, old, target = fields(seed)
        v.requires_grad_()
        r, time = uniform(seed, 3), torch.full((3,), t, dtype=DOUBLE)
        loss = nft_loss(v, old, target, r, beta=beta, weight="self_normalised", t=time)
        x_t, x0 = tensor((3, 4), seed + 9, DOUBLE), None
        x0 = x_t - t * target  # the clean sample of this target
        expected = torch.zeros(3, dtype=DOUBLE)
        for sign, share in ((1, r), (-1, 1 - r)):
            mixed = (1 - sign * beta) * old + sign * beta * v
            error = x_t - t * mixed - x0
            size = error.detach().abs().mean(1).clamp_min(1e-5)
            expected = expected + share * (error**2).mean(1) / size
        torch.testing.assert_close(loss, expected)
        got, wanted = (torch.autograd.grad(each.sum(), v, retain_graph=True)[0] for each in (loss, expected))
        torch.testing.assert_close(got, wanted)

    @given(seeds(), st.sampled_from(BETAS))
    def test_with_one_element_that_is_an_absolute_error(self, seed, beta):
        v, old, target = fields(seed, (3, 1))
        v.requires_grad_()
        t, one = torch.full((3,), 0.4, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
        loss = nft_loss(v, old, target, one, beta=beta, weight="self_normalised", t=t)
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        sign = (old + beta * (v.detach() - old) - target).sign()
        torch.testing.assert_close(gradient, 2 * sign * 0.4 * beta)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"beta": 0.0}, "beta"),
            ({"beta": math.nan}, "beta"),
            ({"r": torch.tensor([0.5, 1.1])}, r"r: expected probabilities in \[0, 1\]"),
            ({"r": torch.tensor([0.5, math.nan])}, "r: expected finite"),
            ({"r": torch.tensor([0.5])}, r"r: expected shape \[b\]"),
            ({"weight": "adaptive"}, "weight"),
            ({"weight": "self_normalised"}, "t: expected the times"),
            ({"t": torch.tensor([0.5, 0.5])}, "t: expected the times"),
            ({"weight": "self_normalised", "t": torch.tensor([0.5, 2.0])}, "t: expected times"),
            ({"floor": 0.0}, "floor"),
            ({"target": torch.zeros(2, 4)}, "target: expected the shape of velocity"),
            ({"old_velocity": torch.zeros(1, 3)}, "old_velocity: expected the shape of velocity"),
            ({"mask": torch.ones(2)}, "mask: expected bool"),
            ({"mask": torch.ones(3, dtype=torch.bool)}, "mask: expected one per sample"),
        ],
    )
    def test_nonsense_is_refused(self, changes, message):
        arguments = {name: torch.zeros(2, 3) for name in ("velocity", "old_velocity", "target")}
        with pytest.raises(ValueError, match=message):
            nft_loss(**{**arguments, "r": torch.tensor([0.5, 0.5]), **changes})


class TestMatching:
    @given(seeds(), st.sampled_from(["mean", "sum"]))
    def test_the_stand_in_is_the_gain_in_squared_error(self, seed, reduction):
        v, old, target = fields(seed)
        weight = uniform(seed, 3)
        gain = (old - target) ** 2 - (v - target) ** 2
        expected = weight * (gain.mean(1) if reduction == "mean" else gain.sum(1))
        torch.testing.assert_close(matching_log_ratio(v, old, target, weight, reduction=reduction), expected)
        assert not matching_log_ratio(old, old, target).any()

    @given(seeds())
    def test_the_gap_is_a_mean_square(self, seed):
        v, reference, _ = fields(seed)
        torch.testing.assert_close(velocity_gap(v, reference), ((v - reference) ** 2).mean(1))

    def test_only_the_trained_velocity_gets_a_gradient(self):
        for function, extra in (
            (nft_loss, {"r": torch.tensor([0.9, 0.2], dtype=DOUBLE)}),
            (nft_loss, {"r": torch.tensor([0.9, 0.2], dtype=DOUBLE), "weight": "self_normalised", "t": torch.ones(2)}),
            (matching_log_ratio, {}),
        ):
            v, old, target = (x.requires_grad_() for x in fields(0, (2, 3)))
            extra = {k: e.requires_grad_() if k == "r" else e for k, e in extra.items()}
            function(v, old, target, **extra).sum().backward()
            assert v.grad is not None and old.grad is None and target.grad is None
            assert "r" not in extra or extra["r"].grad is None
        v, reference, target = (x.requires_grad_() for x in fields(0, (2, 3)))
        velocity_gap(v, reference).sum().backward()
        assert v.grad is not None and reference.grad is None
        reward = torch.ones(2, dtype=DOUBLE, requires_grad=True)
        assert not ram_target(v, reference, target, reward).requires_grad


class TestRam:
    @pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("constant", [0.0, 5.0])
    def test_its_fixed_point_on_policy_is_the_tilt(self, t, constant):
        # The velocity of N(m + k s^2, s^2), on samples of that Gaussian: the mean target is the velocity itself.
        k = 0.5
        policy = Gaussian(0.7 + k * 0.36, 0.6)
        for x in (-0.5, 0.4, 1.6):
            point = torch.tensor([[x]], dtype=DOUBLE)
            a, b2 = (value.item() for value in policy.posterior(point, t))
            nodes, weights = hermite(8)
            x0 = a + math.sqrt(b2) * nodes
            v = policy.velocity(point, t).expand(8, 1)
            reference = ORACLE.velocity(point, t).expand(8, 1)
            target = ram_target(v, reference, ((x - x0) / t)[:, None], k * x0 + constant)
            assert (weights * target[:, 0]).sum().item() == pytest.approx(v[0].item(), abs=1e-12)

    def test_a_reward_that_is_not_finite_is_refused_unless_masked(self):
        x, reward = torch.ones(2, 3), torch.tensor([1.0, math.nan])
        with pytest.raises(ValueError, match="reward: expected finite"):
            ram_target(x, x, x, reward)
        assert ram_target(x, x, x, reward, mask=torch.tensor([True, False]))[1].eq(0).all()


class TestResolution:
    def test_every_image_counts_once_whatever_its_size(self):
        # The same residual everywhere: the same loss for 4 and for 64 tokens, and the same gradient in total.
        layout = Layout.build([(2, 2), (8, 8)])
        v = torch.full((68, 3), 0.5, dtype=DOUBLE, requires_grad=True)
        old, target = torch.zeros_like(v), torch.ones_like(v)
        r = torch.full((2,), 0.8, dtype=DOUBLE)
        for loss in (
            nft_loss(v, old, target, r, layout=layout),
            nft_loss(v, old, target, r, weight="self_normalised", t=r, layout=layout),
            matching_log_ratio(v, old, target, layout=layout),
            velocity_gap(v, old, layout=layout),
        ):
            torch.testing.assert_close(loss[0], loss[1])
            (gradient,) = torch.autograd.grad(loss.sum(), v)
            small, large = (part.sum() for part in gradient.split(layout.image_lengths))
            torch.testing.assert_close(small, large)


class TestSchedules:
    def test_the_published_decays(self):
        assert [nft_decay(i, 0) for i in (0, 10, 500)] == [0, 0, 0]
        assert [nft_decay(i) for i in (0, 1, 180, 500, 900)] == pytest.approx([0, 0.001, 0.18, 0.5, 0.5])
        assert [nft_decay(i, 2) for i in (0, 75, 76, 175, 300)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999])
        assert [decay_ramp(i, start=1, rate=0.3, limit=0.5) for i in (0, 1, 2, 3)] == pytest.approx([0, 0, 0.3, 0.5])

    @pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
    def test_n_mixes_with_one_decay_have_a_closed_form(self, decay):
        old, new = [tensor((5,), 0, DOUBLE)], [tensor((5,), 1, DOUBLE)]
        start = old[0].clone()
        for _ in range(7):
            lerp_parameters_(old, new, 1 - decay)
        torch.testing.assert_close(old[0], new[0] + decay**7 * (start - new[0]))

    @pytest.mark.parametrize(
        "call",
        [
            lambda: nft_decay(-1),
            lambda: nft_decay(1, 3),  # pyright: ignore
            lambda: decay_ramp(1, start=-1, rate=0.1, limit=0.5),
            lambda: decay_ramp(1, start=0, rate=math.nan, limit=0.5),
            lambda: decay_ramp(1, start=0, rate=0.1, limit=1.5),
        ],
    )
    def test_nonsense_is_refused(self, call):
        with pytest.raises(ValueError, match="kind|step"):
            call()
