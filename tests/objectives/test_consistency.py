"""Closed forms of consistency models and flow maps: tangents that vanish, fixed points that are solvers, orders of bias.

The oracle's data are Gaussian, N(0.7, 0.36), or a mixture; TrigFlow's versions of its velocity and consistency function are
derived again below, from the covariances of ``cos x0 + sin z``, so that the change of coordinates is under test too.
"""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.objectives import flow_matching_loss, velocity_gap
from lensmini.objectives.consistency import (
    adaptive_weight,
    consistency_loss,
    consistency_target,
    curriculum_steps,
    directional_derivative,
    mean_velocity_loss,
    mean_velocity_target,
    normalise_tangent,
    rf_to_trig,
    sample_time_pairs,
    shrinking_gap,
    tangent_warmup,
    teacher_step,
    trig_prediction,
    trig_to_rf,
    trigflow_direction,
    trigflow_tangent,
)
from lensmini.packed import Layout
from lensmini.paths import clean_prediction
from lensmini.sampling import guide
from tests.oracle import Gaussian, rk4, two_components
from tests.strategies import seeds, tensor

DOUBLE = torch.float64
MEAN, STD = 0.7, 0.6
ORACLE, MIXTURE = Gaussian(MEAN, STD), two_components()
START = torch.full((1, 1), 1.3, dtype=DOUBLE)


def uniform(seed, num, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def network(x, t):
    """The exact consistency model in the velocity network's parametrisation, ``F = (x - f) / t``."""
    return (x - ORACLE.consistency(x, t)) / t[:, None]


def largest(x):
    return x.abs().max().item()


class TestStraightPath:
    @given(seeds())
    def test_the_consistency_function_is_constant_along_the_flow(self, seed):
        x, t = tensor((5, 3), seed, DOUBLE), uniform(seed, 5, 0.05)
        along = (ORACLE.velocity(x, t), torch.ones(5, dtype=DOUBLE))
        value, slope = directional_derivative(lambda x, t: clean_prediction(x, network(x, t), t), (x, t), along)
        torch.testing.assert_close(value, ORACLE.consistency(x, t))
        assert largest(slope) <= 2e-14 * (1 + largest(x))

    @given(seeds())
    def test_at_r_zero_the_exact_network_is_its_own_target(self, seed):
        x, t = tensor((5, 3), seed, DOUBLE), uniform(seed, 5, 0.05)
        v = ORACLE.velocity(x, t)
        value, slope = directional_derivative(network, (x, t), (v, torch.ones(5, dtype=DOUBLE)))
        assert largest(mean_velocity_target(v, slope, t, torch.zeros(5, dtype=DOUBLE)) - value) < 1e-13

    @given(seeds())
    def test_the_average_velocity_is_its_own_target_and_its_compound_is_the_velocity(self, seed):
        x, t = tensor((5, 3), seed, DOUBLE), uniform(seed, 5, 0.2)
        r = t * uniform(seed + 1, 5, 0.0, 0.9)
        v, one = ORACLE.velocity(x, t), torch.ones(5, dtype=DOUBLE)
        u, slope = directional_derivative(ORACLE.average_velocity, (x, t, r), (v, one, 0 * one))
        assert largest(mean_velocity_target(v, slope, t, r) - u) < 1e-13
        assert largest(u + (t - r)[:, None] * slope - v) < 1e-13
        assert largest(mean_velocity_loss(u, slope, v, t, r)) < 1e-26

    @given(seeds())
    def test_at_r_equal_t_it_is_flow_matching(self, seed):
        v, slope, u = (tensor((4, 3), seed + i, DOUBLE) for i in range(3))
        t = uniform(seed, 4)
        assert torch.equal(mean_velocity_target(v, slope, t, t), v)
        assert torch.equal(mean_velocity_loss(u, slope, v, t, t), flow_matching_loss(u, v))

    @given(seeds())
    def test_both_forms_of_meanflow_have_one_value_and_one_gradient(self, seed):
        u, slope, v = (tensor((4, 3), seed + i, DOUBLE).requires_grad_() for i in range(3))
        t, r = uniform(seed, 4), uniform(seed + 1, 4)
        first = mean_velocity_loss(u, slope, v, t, r)
        second = velocity_gap(u, mean_velocity_target(v, slope, t, r))
        torch.testing.assert_close(first, second)
        expected = 2 / 3 * (u + (t - r)[:, None] * slope - v).detach()
        for loss in (first, second):
            gradients = torch.autograd.grad(loss.sum(), (u, slope, v), allow_unused=True)
            torch.testing.assert_close(gradients[0], expected)
            assert gradients[1] is gradients[2] is None

    def test_maps_compose_and_leave_their_ends(self):
        x, (q, t, r) = tensor((5, 2), 0, DOUBLE), (torch.full((5,), time, dtype=DOUBLE) for time in (0.9, 0.5, 0.1))

        def walk(x, t, r):
            return x - (t - r)[:, None] * ORACLE.average_velocity(x, t, r)

        torch.testing.assert_close(walk(walk(x, q, t), t, r), walk(x, q, r), rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("r", [0.0, 0.3])
    def test_a_mixture_agrees_with_runge_kutta(self, r):
        # No closed form: the exact map is a reference solution, and its derivative along the velocity has to vanish.
        x, t = tensor((4, 2), 3, DOUBLE), torch.tensor(0.7, dtype=DOUBLE)
        rows = [torch.full((4,), time, dtype=DOUBLE) for time in (0.7, r)]

        def average(x, t):
            return (x - rk4(MIXTURE.velocity, x, t, r, 80)) / (t - r)

        along = (MIXTURE.velocity(x, 0.7), torch.ones_like(t))
        u, slope = directional_derivative(average, (x, t), along, method="central", step=1e-4)
        assert largest(mean_velocity_target(along[0], slope, *rows) - u) < 1e-6
        assert largest(mean_velocity_loss(u, slope, along[0], *rows)) < 1e-12
        assert largest(mean_velocity_target(along[0], -slope, *rows) - u) > 0.1, "the slope must matter"

    @given(seeds(), st.sampled_from([0.5, 1.0, 2.0]))
    def test_the_adaptive_weight(self, seed, p):
        loss = tensor((6,), seed, DOUBLE).abs().requires_grad_()
        weight = adaptive_weight(loss, p=p, c=0.01)
        assert not weight.requires_grad
        expected = [1 / (value + 0.01) ** p for value in loss.tolist()]
        assert weight.tolist() == pytest.approx(expected)
        assert adaptive_weight(loss, p=0.0).eq(1).all()

    def test_with_power_one_an_errors_pull_does_not_depend_on_its_size(self):
        pulls = []
        for size in (1e-2, 1.0, 1e2):
            u = torch.full((1, 1), size, dtype=DOUBLE, requires_grad=True)
            loss = flow_matching_loss(u, torch.zeros(1, 1, dtype=DOUBLE))
            (adaptive_weight(loss, c=1e-12) * loss).sum().backward()
            pulls.append(u.grad.item() * size)
        assert pulls == pytest.approx([2.0, 2.0, 2.0], rel=1e-6)


def trig_moments(angle):
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return cos, sin, MEAN * cos, (STD * cos) ** 2 + sin**2


def trig_velocity(x, angle):
    """E[-sin x0 + cos z | x]: its covariance with x is cos sin (1 - s^2)."""
    cos, sin, centre, variance = trig_moments(angle)
    return -sin * MEAN + cos * sin * (1 - STD**2) / variance * (x - centre)


def trig_network(x, angle):
    """F with ``cos x - sin F = m + s (x - cos m) / sqrt(var)``."""
    cos, sin, centre, variance = trig_moments(angle)
    return (cos * x - MEAN - STD * (x - centre) / variance.sqrt()) / sin


class TestTrigFlow:
    @given(seeds())
    def test_the_change_of_coordinates_is_that_of_the_derivation(self, seed):
        x, t = tensor((5, 3), seed, DOUBLE), uniform(seed, 5, 0.02)
        state, flow, angle = rf_to_trig(x, ORACLE.velocity(x, t), t)
        torch.testing.assert_close(flow, trig_velocity(state, angle), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(t, angle.sin() / (angle.cos() + angle.sin()), rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(trig_prediction(ORACLE.velocity, state, angle), flow, rtol=1e-13, atol=1e-13)
        # The same noise ratio, and the same clean prediction: cos x - sin F = x - t v.
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        expected = x - t[:, None] * ORACLE.velocity(x, t)
        torch.testing.assert_close(cos * state - sin * flow, expected, rtol=1e-13, atol=1e-13)

    @given(seeds())
    def test_there_and_back(self, seed):
        x, v, t = tensor((5, 3), seed, DOUBLE), tensor((5, 3), seed + 1, DOUBLE), uniform(seed, 5)
        for got, want in zip(trig_to_rf(*rf_to_trig(x, v, t)), (x, v, t), strict=True):
            assert largest(got - want) <= 4e-15

    def test_the_ends_are_shared(self):
        x, v, t = tensor((2, 3), 0, DOUBLE), tensor((2, 3), 1, DOUBLE), torch.tensor([0.0, 1.0], dtype=DOUBLE)
        state, flow, angle = rf_to_trig(x, v, t)
        torch.testing.assert_close(state, x)
        torch.testing.assert_close(angle, torch.tensor([0, math.pi / 2], dtype=DOUBLE))
        torch.testing.assert_close(flow, torch.stack([x[0] + v[0], v[1] - x[1]]))
        back = trig_to_rf(state.float(), flow.float(), angle.float())
        assert back[2].tolist() == [0.0, 1.0], "the rounding of pi / 2 does not leave [0, 1]"

    @given(seeds())
    def test_the_tangent_vanishes_at_the_exact_network_in_both_variants(self, seed):
        x, angle = tensor((5, 3), seed, DOUBLE), uniform(seed, 5, 0.05, math.pi / 2)
        teacher = trig_velocity(x, angle)
        value, slope = directional_derivative(trig_network, (x, angle), trigflow_direction(teacher, angle))
        for variant in ("scm", "rcm"):
            assert largest(trigflow_tangent(value, teacher, x, slope, angle, variant=variant)) < 1e-13
            early = trigflow_tangent(value, teacher, x, slope, angle, warmup=0.3, variant=variant)
            assert largest(early) > 1e-4, "before the end of the warm-up it is not the fixed point"

    @given(seeds())
    def test_it_vanishes_for_a_wrapped_network_of_the_straight_path(self, seed):
        x, t = tensor((5, 3), seed, DOUBLE), uniform(seed, 5, 0.05, 0.98)
        state, teacher, angle = rf_to_trig(x, ORACLE.velocity(x, t), t)
        value, slope = directional_derivative(
            lambda x, a: trig_prediction(network, x, a), (state, angle), trigflow_direction(teacher, angle)
        )
        torch.testing.assert_close(value, trig_network(state, angle), rtol=1e-12, atol=1e-12)
        assert largest(trigflow_tangent(value, teacher, state, slope, angle)) < 1e-13

    @given(seeds(), st.sampled_from(["scm", "rcm"]))
    def test_after_warm_up_it_is_cos_times_the_change_of_f(self, seed, variant):
        x, angle = tensor((4, 2), seed, DOUBLE), uniform(seed, 4, 0.1, 1.5)

        def wrong(x, angle):  # any network that is not the solution
            return torch.sin(x + angle[:, None])

        teacher = trig_velocity(x, angle)
        value, slope = directional_derivative(wrong, (x, angle), trigflow_direction(teacher, angle))
        got = trigflow_tangent(value, teacher, x, slope, angle, variant=variant)

        def f(h):
            moved, there = x + h * teacher, angle + h
            return there.cos()[:, None] * moved - there.sin()[:, None] * wrong(moved, there)

        expected = angle.cos()[:, None] * (f(1e-6) - f(-1e-6)) / 2e-6
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)

    @given(seeds(), st.floats(0, 1))
    def test_where_the_variants_differ(self, seed, warmup):
        mine, teacher, x, slope = (tensor((1, 1), seed + i, DOUBLE) for i in range(4))
        angle = uniform(seed, 1, 0.0, 1.57)
        cos, sin = math.cos(angle.item()), math.sin(angle.item())
        gap, rest = mine.item() - teacher.item(), cos * sin * x.item()
        found = {
            (variant, scale): trigflow_tangent(
                mine, teacher, x, slope, angle, warmup=warmup, variant=variant, scale_derivative=scale
            ).item()
            for variant in ("scm", "rcm")
            for scale in (True, False)
        }
        pull = {"scm": cos * cos, "rcm": cos * math.sqrt(1 - warmup**2 * sin**2)}
        for (variant, scale), got in found.items():
            jump = warmup * slope.item() if scale else slope.item()
            assert got == pytest.approx(-pull[variant] * gap - warmup * rest - jump, abs=1e-12)

    @pytest.mark.parametrize(("variant", "power"), [("scm", 2), ("rcm", 1)])
    def test_before_warm_up_the_student_learns_the_teacher(self, variant, power):
        mine, teacher, x, slope = (tensor((3, 2), i, DOUBLE) for i in range(4))
        angle = uniform(0, 3, 0.1, 1.5)
        got = trigflow_tangent(mine, teacher, x, slope, angle, warmup=tangent_warmup(0), variant=variant)
        torch.testing.assert_close(got, -(angle.cos()[:, None] ** power) * (mine - teacher))

    @given(seeds())
    def test_the_gradient_of_the_loss_is_minus_two_g_times_the_networks(self, seed):
        theta = tensor((3,), seed, DOUBLE).requires_grad_()
        features, g = tensor((4, 3), seed + 1, DOUBLE), tensor((4, 2), seed + 2, DOUBLE)
        prediction = torch.stack([(features @ theta).sin(), (features @ theta).cos()], 1)
        loss = velocity_gap(prediction, prediction + g)  # the target is detached inside
        torch.testing.assert_close(loss, g.square().mean(1))
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        angle = (features @ theta).detach()
        jacobian = torch.stack([angle.cos(), -angle.sin()], 1)[..., None] * features[:, None]  # [4, 2, 3]
        torch.testing.assert_close(gradient, (-2 / 2 * g[..., None] * jacobian).sum((0, 1)))

    def test_no_gradient_leaves_a_target_or_a_tangent(self):
        leaves = [tensor((2, 3), i, DOUBLE).requires_grad_() for i in range(4)]
        t = torch.full((2,), 0.5, dtype=DOUBLE)
        for result in (
            trigflow_tangent(*leaves, t),
            normalise_tangent(leaves[0]),
            mean_velocity_target(leaves[0], leaves[1], t, t / 2),
            consistency_target(lambda x, t: leaves[1] * x, leaves[0], t),
            teacher_step(lambda x, t: leaves[1] * x, leaves[0], t, t / 2, solver="heun"),
        ):
            assert not result.requires_grad


class TestNormalisation:
    @given(seeds(), st.sampled_from([0.1, 1.0]), st.sampled_from(["rms", "l2"]))
    def test_it_is_its_formula(self, seed, c, reduction):
        g = tensor((3, 2, 4), seed, DOUBLE)
        got = normalise_tangent(g, c, reduction)
        for row, result in zip(g, got, strict=True):
            values = row.flatten().tolist()
            total = math.fsum(value**2 for value in values)
            size = math.sqrt(total / len(values)) if reduction == "rms" else math.sqrt(total)
            assert result.flatten().tolist() == pytest.approx([value / (size + c) for value in values])

    @given(seeds(), st.floats(-12, 12))
    def test_it_is_bounded_and_keeps_the_direction(self, seed, magnitude):
        g = tensor((3, 5), seed, DOUBLE) * 10**magnitude
        rms, l2 = normalise_tangent(g), normalise_tangent(g, reduction="l2")
        assert rms.square().mean(1).max() <= 1 + 1e-12 and l2.square().sum(1).max() <= 1 + 1e-12
        for result in (rms, l2):
            cosine = torch.nn.functional.cosine_similarity(result, g, eps=1e-300)
            torch.testing.assert_close(cosine, torch.ones(3, dtype=DOUBLE))
        assert normalise_tangent(0 * g).eq(0).all()

    def test_rms_does_not_know_the_resolution_and_l2_does(self):
        small = tensor((1, 4), 0, DOUBLE)
        large = small.repeat(1, 16)
        torch.testing.assert_close(normalise_tangent(large)[:, :4], normalise_tangent(small))
        length = small.norm().item()
        ratio = (normalise_tangent(large, reduction="l2")[:, :4] / normalise_tangent(small, reduction="l2")).mean()
        assert ratio.item() == pytest.approx((length + 0.1) / (4 * length + 0.1))

    def test_the_warm_up(self):
        assert [tangent_warmup(step, 1000) for step in (0, 250, 1000, 4000)] == [0.0, 0.25, 1.0, 1.0]
        assert tangent_warmup(5000) == 0.5 and tangent_warmup(0, 0) == 1.0


def affine(function):
    """Slope and offset of an affine function of one number."""
    offset = function(torch.zeros(1, 1, dtype=DOUBLE)).item()
    return function(torch.ones(1, 1, dtype=DOUBLE)).item() - offset, offset


def oracle_slope(t):
    """v(x, t) = slope x + offset."""
    return affine(lambda x: ORACLE.velocity(x, t))


def composed_euler(num_steps):
    """The N-step Euler sampler from every grid time as an affine map, composed by hand."""
    maps, slope, offset = [(1.0, 0.0)], 1.0, 0.0
    for index in range(1, num_steps + 1):
        t, h = index / num_steps, 1 / num_steps
        a, b = oracle_slope(t)
        slope, offset = slope * (1 - h * a), slope * (-h * b) + offset
        maps.append((slope, offset))
    return maps


def fixed_point(num_steps, solver):
    """Distillation solved exactly, one grid time after the other, with the library's step and target: affine maps."""
    maps = [(1.0, 0.0)]
    for index in range(1, num_steps + 1):
        t, t_next = (torch.tensor([i / num_steps], dtype=DOUBLE) for i in (index, index - 1))
        slope, offset = maps[-1]

        def velocity(x, t, slope=slope, offset=offset):  # of f = slope x + offset
            return (x - slope * x - offset) / t

        maps.append(
            affine(
                lambda x, t=t, s=t_next, velocity=velocity: consistency_target(
                    velocity, teacher_step(ORACLE.velocity, x, t, s, solver=solver), s
                )
            )
        )
    return maps


class TestDiscrete:
    def test_the_fixed_point_with_an_euler_teacher_is_the_euler_sampler(self):
        found, expected = fixed_point(8, "euler"), composed_euler(8)
        for (slope, offset), (a, b) in zip(found, expected, strict=True):
            assert slope == pytest.approx(a, abs=1e-14) and offset == pytest.approx(b, abs=1e-14)
        assert found[-1][0] * 1.3 + found[-1][1] == pytest.approx(1.35476917, abs=5e-9)

    @pytest.mark.parametrize("metric", ["pseudo_huber", "pseudo_huber_norm", "squared"])
    def test_there_the_loss_vanishes_and_nowhere_else(self, metric):
        maps = composed_euler(8)
        slopes, offsets = (torch.tensor(values, dtype=DOUBLE) for values in zip(*maps, strict=True))
        t, t_next = sample_time_pairs(64, torch.linspace(1, 0, 9, dtype=DOUBLE), generator=torch.Generator())
        x = tensor((64, 3), 0, DOUBLE)

        def student(x, t):
            index = (t * 8).round().long()
            return (x - slopes[index, None] * x - offsets[index, None]) / t[:, None]

        target = consistency_target(student, teacher_step(ORACLE.velocity, x, t, t_next), t_next)
        assert largest(consistency_loss(clean_prediction(x, student(x, t), t), target, metric=metric)) < 1e-15
        true = clean_prediction(x, network(x, t), t)
        target = consistency_target(network, teacher_step(ORACLE.velocity, x, t, t_next), t_next)
        assert consistency_loss(true, target, metric=metric).min() > 1e-9, "the true f pays the solver's error"

    @pytest.mark.parametrize(("solver", "orders"), [("euler", [0.946, 0.971, 0.985]), ("heun", [1.591, 1.833, 1.923])])
    def test_its_bias_is_the_solvers_order(self, solver, orders):
        true = ORACLE.consistency(START, torch.ones(1, dtype=DOUBLE)).item()
        errors = []
        for num_steps in (8, 16, 32, 64):
            slope, offset = fixed_point(num_steps, solver)[-1]
            errors.append(abs(slope * 1.3 + offset - true))
        found = [math.log2(a / b) for a, b in pairwise(errors)]
        assert found == pytest.approx(orders, abs=1e-3)

    @given(seeds(), st.floats(0.01, 1))
    def test_with_an_exact_teacher_the_true_function_is_right_for_any_gap(self, seed, gap):
        x, t = tensor((5, 3), seed, DOUBLE), uniform(seed, 5, 0.05)
        t_next = t * (1 - gap)
        target = consistency_target(network, ORACLE.flow(x, t, t_next), t_next)
        loss = consistency_loss(clean_prediction(x, network(x, t), t), target, metric="squared")
        assert largest(loss) < 1e-26

    @given(seeds(), st.sampled_from([math.nan, math.inf, 1e30]))
    def test_at_time_zero_the_state_is_the_prediction_bit_for_bit(self, seed, nonsense):
        x, zero = tensor((3, 2), seed), torch.zeros(3)
        assert torch.equal(consistency_target(lambda x, t: x + nonsense, x, zero), x)
        assert torch.equal(clean_prediction(x, x + 1e30, zero), x)
        wide = consistency_target(lambda x, t: x, x.bfloat16(), zero)
        assert wide.dtype == torch.float32 and torch.equal(wide, x.bfloat16().float())

    def test_heun_is_the_mean_of_both_ends(self):
        x, t, s = tensor((3, 2), 0, DOUBLE), uniform(0, 3, 0.5), uniform(1, 3, 0.0, 0.4)
        v = ORACLE.velocity(x, t)
        there = x + (s - t)[:, None] * v
        expected = x + (s - t)[:, None] * (v + ORACLE.velocity(there, s)) / 2
        torch.testing.assert_close(teacher_step(ORACLE.velocity, x, t, s, solver="heun"), expected)
        torch.testing.assert_close(teacher_step(ORACLE.velocity, x, t, s), there)

    def test_a_guided_teacher_is_a_closure(self):
        x, t, s = tensor((3, 2), 0, DOUBLE), uniform(0, 3, 0.5), uniform(1, 3, 0.0, 0.4)

        def guided(x, t):
            return guide(ORACLE.velocity(x, t), torch.zeros_like(x), 4.0, channel_dim=1, rescale=False)

        expected = x + (s - t)[:, None] * 4 * ORACLE.velocity(x, t)
        torch.testing.assert_close(teacher_step(guided, x, t, s), expected)

    def test_a_step_from_bfloat16_keeps_its_bits(self):
        # x and v are exact in bfloat16; the step of 1/1024 is not representable beside x.
        x, one = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1)
        assert teacher_step(lambda x, t: x, x, one, one - 2**-10).item() == 1 - 2**-10

    @given(seeds(), st.sampled_from([1e-3, 0.03, 2.0]))
    def test_distances_are_their_formulas(self, seed, c):
        f, g = tensor((3, 4), seed, DOUBLE), tensor((3, 4), seed + 1, DOUBLE)
        for i in range(3):
            e = [a - b for a, b in zip(f[i].tolist(), g[i].tolist(), strict=True)]
            expected = {
                "squared": sum(v * v for v in e) / 4,
                "pseudo_huber": sum(math.sqrt(v * v + c * c) - c for v in e) / 4,
                "pseudo_huber_norm": math.sqrt(sum(v * v for v in e) + 4 * c * c) - 2 * c,
            }
            for metric, value in expected.items():
                got = consistency_loss(f[i : i + 1], g[i : i + 1], metric=metric, c=c)
                assert got.item() == pytest.approx(value, rel=1e-9)

    @pytest.mark.parametrize("metric", ["pseudo_huber", "pseudo_huber_norm"])
    def test_a_small_distance_is_not_lost_in_rounding(self, metric):
        # sqrt(e^2 + c^2) - c is 0 in float32 for this e; the square over 2 c is right to seven digits.
        e, c = 1e-7, 1e-3
        assert math.sqrt(torch.tensor(c**2 + e**2).item()) - math.sqrt(torch.tensor(c**2).item()) == 0
        loss = consistency_loss(torch.full((1, 4), e), torch.zeros(1, 4), metric=metric, c=c)
        assert loss.item() == pytest.approx((1 if metric == "pseudo_huber" else 2) * e**2 / (2 * c), rel=1e-5)

    def test_the_default_is_lcms_constant_and_icts_grows_with_the_dimension(self):
        f = torch.full((1, 3072), 0.01, dtype=DOUBLE)
        assert consistency_loss(f, 0 * f).item() == pytest.approx(math.sqrt(1e-4 + 1e-6) - 1e-3)
        c = 0.00054 * math.sqrt(3072)  # 0.03, the paper's value for 32 x 32 pictures
        assert c == pytest.approx(0.03, abs=1e-4)
        expected = math.sqrt(3072 * 1e-4 + c**2) - c
        assert consistency_loss(f, 0 * f, metric="pseudo_huber_norm", c=0.00054).item() == pytest.approx(expected)

    def test_weights_multiply_and_get_no_gradient(self):
        f, weight = tensor((3, 2), 0, DOUBLE), torch.tensor([1.0, 0.0, 3.0], dtype=DOUBLE, requires_grad=True)
        f.requires_grad_()
        plain, weighed = consistency_loss(f, 0 * f), consistency_loss(f, 0 * f, weight=weight)
        torch.testing.assert_close(weighed, plain * torch.tensor([1.0, 0.0, 3.0], dtype=DOUBLE))
        weighed.sum().backward()
        assert weight.grad is None and f.grad is not None

    def test_the_target_gets_no_gradient(self):
        f, g = tensor((3, 2), 0).requires_grad_(), tensor((3, 2), 1).requires_grad_()
        for metric in ("pseudo_huber", "pseudo_huber_norm", "squared"):
            gradients = torch.autograd.grad(consistency_loss(f, g, metric=metric).sum(), (f, g), allow_unused=True)
            assert gradients[0] is not None and gradients[1] is None


class TestGaps:
    @given(seeds(), st.integers(1, 6))
    def test_pairs_are_neighbours_of_the_grid(self, seed, num_steps):
        grid = torch.cat([1 - uniform(seed, num_steps).sort().values, torch.zeros(1, dtype=DOUBLE)]).unique().flip(0)
        t, t_next = sample_time_pairs(200, grid, generator=torch.Generator().manual_seed(seed))
        pairs = set(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True))
        drawn = set(zip(t.tolist(), t_next.tolist(), strict=True))
        assert drawn <= pairs and (len(pairs) > 6 or drawn == pairs)
        again = sample_time_pairs(200, grid, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(t, again[0]) and torch.equal(t_next, again[1])

    def test_every_step_is_as_likely_and_grids_may_differ(self):
        grids = torch.stack([torch.linspace(1, 0, 5), torch.linspace(0.8, 0.4, 5)]).repeat(2000, 1)
        t, t_next = sample_time_pairs(4000, grids, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(t[::2] - t_next[::2], torch.full((2000,), 0.25))
        torch.testing.assert_close(t[1::2] - t_next[1::2], torch.full((2000,), 0.1))
        counts = torch.bincount(((1 - t[::2]) * 4).round().long(), minlength=4)
        assert counts.sum() == 2000 and (counts - 500).abs().max() < 80

    def test_the_curriculum_doubles_at_equal_intervals(self):
        # s0 = 10, s1 = 1280, K = 400,000: K' = 50,000.
        found = [curriculum_steps(50_000 * i + j, 400_000) for i in range(8) for j in (0, 49_999)]
        assert found == [n for i in range(8) for n in (10 * 2**i, 10 * 2**i)]
        assert curriculum_steps(10**9, 400_000) == 1280
        assert [curriculum_steps(step, 4, start=3, stop=10) for step in range(5)] == [3, 6, 10, 10, 10]

    def test_the_gap_shrinks_from_all_to_nothing(self):
        t = torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE)
        assert shrinking_gap(t, 0).eq(0).all()
        assert shrinking_gap(t, 3).tolist() == pytest.approx([0, 0.35, 0.875])
        assert shrinking_gap(t, 1, base=4.0).tolist() == pytest.approx([0, 0.3, 0.75])


X, T = torch.zeros(2, 3), torch.tensor([0.5, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: consistency_loss(X, X, metric="l2"), "metric: expected"),  # pyright: ignore
        (lambda: consistency_loss(X, X, c=0.0), "c: expected a positive"),
        (lambda: consistency_loss(X, X[:1]), "target: expected the shape of prediction"),
        (lambda: consistency_loss(X, X, weight=torch.tensor([1.0, math.nan])), "weight: expected finite"),
        (lambda: consistency_loss(X, X, weight=torch.ones(3)), r"weight: expected shape \[b\]"),
        (lambda: consistency_loss(X, X, mask=torch.ones(2)), "mask: expected bool"),
        (lambda: consistency_loss(X, X, layout=Layout.build([(1, 5)])), r"expected shape \[N"),
        (lambda: teacher_step(lambda x, t: x, X, T, T, solver="dpm2"), "solver: expected"),  # pyright: ignore
        (lambda: teacher_step(lambda x, t: x[:1], X, T, T), "velocity: expected the shape of noisy"),
        (lambda: teacher_step(lambda x, t: x, X, T, T - 1), "t_next: expected times"),
        (lambda: consistency_target(lambda x, t: x[:1], X, T), "velocity: expected the shape of noisy"),
        (lambda: consistency_target(lambda x, t: x, X, T + 1), "t: expected times"),
        (lambda: mean_velocity_target(X, X, T, T + 1), "r: expected times"),
        (lambda: mean_velocity_target(X, X[:1], T, T), "dudt: expected the shape of velocity"),
        (lambda: mean_velocity_loss(X, X, X[:1], T, T), "target: expected the shape of mean_velocity"),
        (lambda: mean_velocity_loss(X, X, X, T + 1, T), "t: expected times"),
        (lambda: adaptive_weight(T, c=0.0), "c, p: expected"),
        (lambda: adaptive_weight(T, p=-1.0), "c, p: expected"),
        (lambda: adaptive_weight(T / 0), "loss: expected finite"),
        (lambda: trigflow_tangent(X, X, X, X, T, variant="tcm"), "variant: expected"),  # pyright: ignore
        (lambda: trigflow_tangent(X, X, X, X, T, warmup=1.1), "warmup: expected"),
        (lambda: trigflow_tangent(X, X, X, X, T + 2), "angle: expected"),
        (lambda: trigflow_tangent(X, X, X[:1], X, T), "noisy: expected the shape of prediction"),
        (lambda: normalise_tangent(X, 0.0), "c: expected a positive"),
        (lambda: normalise_tangent(X, reduction="sum"), "reduction: expected"),  # pyright: ignore
        (lambda: tangent_warmup(-1), "step, num_steps"),
        (lambda: rf_to_trig(X, X, T + 1), "t: expected times"),
        (lambda: rf_to_trig(X, X[:1], T), "velocity: expected the shape of noisy"),
        (lambda: trig_to_rf(X, X, T - 1), "angle: expected"),
        (lambda: trig_to_rf(X, X, T.long()), "angle: expected floating"),
        (lambda: trig_prediction(lambda x, t: x[:1], X, T), "velocity: expected the shape of noisy"),
        (lambda: trigflow_direction(X, T[:1]), r"angle: expected shape \[b\]"),
        (
            lambda: sample_time_pairs(2, torch.tensor([0.0, 1.0]), generator=torch.Generator()),
            "times: expected at least",
        ),
        (lambda: sample_time_pairs(2, torch.tensor([1.0]), generator=torch.Generator()), "times: expected at least"),
        (lambda: sample_time_pairs(2, torch.tensor([2.0, 1.0]), generator=torch.Generator()), "times: expected times"),
        (lambda: curriculum_steps(-1, 10), "step, total_steps"),
        (lambda: curriculum_steps(1, 10, start=20, stop=10), "step, total_steps"),
        (lambda: shrinking_gap(T, -1), "stage, base"),
        (lambda: shrinking_gap(T, 1, base=1.0), "stage, base"),
    ],
)
def test_nonsense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "consistency.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/consistency.md", "exec"), names)
    assert len(blocks) == 1 and names["loss"].shape == (8,) and names["network"].weight.grad.any()
