"""Laws of distribution matching: the surrogate descends a KL exactly, guidance splits exactly, nothing else carries gradient.

Expectations over a Gaussian generator are Gauss-Hermite sums in float64, exact for polynomials of the degrees that occur;
scores come from the oracle's closed forms.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.objectives import (
    cfg_augmentation_direction,
    directional_loss,
    divergence_weight,
    dmd_direction,
    noise_levels,
)
from lensmini.packed import Layout, pack
from lensmini.paths import clean_prediction, interpolate
from tests.oracle import Gaussian
from tests.strategies import layouts, seeds, tensor

DOUBLE = torch.float64
REAL = Gaussian(0.7, 0.6)


def hermite_pairs(num=7):
    """Nodes of two independent standard normals and their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    grid = torch.cartesian_prod(torch.tensor(nodes), torch.tensor(nodes))
    weight = torch.cartesian_prod(torch.tensor(weights), torch.tensor(weights)).prod(1)
    return grid[:, :1], grid[:, 1:], weight / weight.sum()


def uniform(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def shapes(seed):
    return [tensor((3, 4), seed + index, DOUBLE) for index in range(3)]


class TestDirection:
    @pytest.mark.parametrize("t", [0.02, 0.3, 0.5, 0.9, 0.98])
    @pytest.mark.parametrize(("mean", "std"), [(0.1, 0.9), (0.65, 0.62), (-1.5, 0.2)])
    def test_the_surrogates_gradient_is_that_of_the_kl_in_mean_and_std(self, t, mean, std):
        parameters = torch.tensor([mean, std], dtype=DOUBLE, requires_grad=True)
        latent, noise, weight = hermite_pairs()
        x = parameters[0] + parameters[1] * latent
        time = torch.full((len(x),), t, dtype=DOUBLE)
        noisy = interpolate(x, noise, time)
        fake = clean_prediction(noisy, Gaussian(mean, std).velocity(noisy, time), time)
        real = clean_prediction(noisy, REAL.velocity(noisy, time), time)
        direction = dmd_direction(fake, real, x=x, normaliser="none", floor=1e-6)
        (got,) = torch.autograd.grad((weight * directional_loss(x, direction)).sum(), parameters)
        free = torch.tensor([mean, std], dtype=DOUBLE, requires_grad=True)
        kl = Gaussian(free[0], free[1]).kl(REAL, torch.tensor(t, dtype=DOUBLE))
        (expected,) = torch.autograd.grad(kl, free)
        torch.testing.assert_close(got * (1 - t) ** 2 / t**2, expected, rtol=1e-11, atol=1e-13)

    @given(seeds(), st.floats(0.05, 0.95))
    def test_it_is_a_difference_of_velocities_and_of_scores(self, seed, t):
        x = tensor((3, 4), seed, DOUBLE)
        time = torch.full((3,), t, dtype=DOUBLE)
        one, other = Gaussian(-0.2, 0.8), REAL
        velocities = [law.velocity(x, time) for law in (one, other)]
        clean = [clean_prediction(x, velocity, time) for velocity in velocities]
        direction = dmd_direction(*clean, x=x, normaliser="none", floor=1.0)
        torch.testing.assert_close(direction, -t * (velocities[0] - velocities[1]))
        torch.testing.assert_close(direction, t**2 / (1 - t) * (one.score(x, time) - other.score(x, time)))

    @given(seeds(), st.floats(0.1, 10))
    def test_the_normalised_direction_knows_no_scale_and_no_origin(self, seed, scale):
        fake, real, x = shapes(seed)
        kept = dmd_direction(fake, real, x=x, floor=1e-9)
        torch.testing.assert_close(dmd_direction(scale * fake, scale * real, x=scale * x, floor=1e-9), kept)
        moved = [value + 3 for value in (fake, real)]
        torch.testing.assert_close(dmd_direction(*moved, x=x + 3, floor=1e-9), kept)

    @given(seeds())
    def test_the_divisor_is_each_samples_mean_distance_to_the_teachers_prediction(self, seed):
        fake, real, x = shapes(seed)
        got = dmd_direction(fake, real, x=x, floor=1e-9)
        for row in range(3):
            size = sum(abs(x[row, k] - real[row, k]) for k in range(4)) / 4
            torch.testing.assert_close(got[row], (fake[row] - real[row]) / size)

    @given(seeds())
    def test_the_floor_bounds_it_where_student_and_teacher_agree(self, seed):
        fake, real, _ = shapes(seed)
        torch.testing.assert_close(dmd_direction(fake, real, x=real, floor=0.1), (fake - real) / 0.1)
        far = real + 5
        kept = dmd_direction(fake, real, x=far, floor=0.1)
        torch.testing.assert_close(kept, dmd_direction(fake, real, x=far, floor=4.9))

    @given(seeds())
    def test_it_is_zero_exactly_where_the_scores_agree(self, seed):
        fake, _, x = shapes(seed)
        assert not dmd_direction(fake, fake.clone(), x=x, floor=1e-6).any()
        assert (dmd_direction(fake, fake + 1, x=x, floor=1e-6) != 0).all()

    @given(layouts(), seeds())
    def test_packed_samples_are_as_if_alone(self, layout, seed):
        pieces = [
            [tensor((n, 4), seed + 7 * k + i, DOUBLE) for i, n in enumerate(layout.image_lengths)] for k in range(3)
        ]
        fake, real, x = (torch.cat(piece) for piece in pieces)
        together = dmd_direction(fake, real, x=x, floor=1e-3, layout=layout)
        losses = directional_loss(x, together, layout=layout)
        alone = [
            dmd_direction(*(p[None] for p in row[:2]), x=row[2][None], floor=1e-3)[0]
            for row in zip(*pieces, strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(alone))
        torch.testing.assert_close(losses, torch.stack([0.5 * one.square().mean() for one in alone]))

    def test_arithmetic_is_float32_whatever_comes_in(self):
        fake, real, x = (value.bfloat16() for value in shapes(0))
        got = dmd_direction(fake, real, x=x, floor=1e-6)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, dmd_direction(fake.float(), real.float(), x=x.float(), floor=1e-6))

    def test_a_broken_network_is_an_error_and_a_masked_one_is_hidden(self):
        fake, real, x = shapes(1)
        for value in (math.nan, math.inf):
            broken = fake.clone()
            broken[1, 2] = value
            with pytest.raises(ValueError, match="diverged"):
                dmd_direction(broken, real, x=x, floor=1e-6)
            with pytest.raises(ValueError, match="diverged"):
                cfg_augmentation_direction(broken, real, 5.0)
            mask = torch.tensor([True, False, True])
            got = dmd_direction(broken, real, x=x, floor=1e-6, mask=mask)
            assert not got[1].any()
            torch.testing.assert_close(got[mask], dmd_direction(fake[mask], real[mask], x=x[mask], floor=1e-6))
        element = torch.ones(3, 4, dtype=torch.bool)
        element[1, 2] = False
        got = dmd_direction(broken, real, x=x, floor=1e-6, mask=element)
        size = (x[1] - real[1]).abs()[element[1]].mean()
        torch.testing.assert_close(got[1, :2], (fake - real)[1, :2] / size)

    def test_what_is_out_of_range_is_named(self):
        fake, real, x = shapes(2)
        for wrong, message in (({"floor": 0.0}, "floor"), ({"floor": 1.0, "normaliser": "rms"}, "normaliser")):
            with pytest.raises(ValueError, match=message):
                dmd_direction(fake, real, x=x, **wrong)
        with pytest.raises(ValueError, match="clean_real"):
            dmd_direction(fake, real[:1], x=x, floor=1.0)
        with pytest.raises(ValueError, match="x: expected"):
            cfg_augmentation_direction(fake, real, 5.0, normaliser="mean_abs")
        with pytest.raises(ValueError, match="scale"):
            cfg_augmentation_direction(fake, real, math.inf)


class TestGuidance:
    @given(seeds(), st.floats(-2, 10))
    def test_matching_and_augmentation_add_up_to_the_guided_direction(self, seed, scale):
        fake, cond, uncond = shapes(seed)
        x = tensor((3, 4), seed + 9, DOUBLE)
        guided = uncond + scale * (cond - uncond)
        parts = [
            dmd_direction(fake, cond, x=x, normaliser="none", floor=1.0),
            cfg_augmentation_direction(cond, uncond, scale),
        ]
        torch.testing.assert_close(sum(parts), fake - guided, rtol=1e-12, atol=1e-12)
        same = {"x": x, "normaliser": "mean_abs", "floor": 1e-6}
        parts = [dmd_direction(fake, cond, **same), cfg_augmentation_direction(cond, uncond, scale, **same)]
        size = (x - cond).abs().mean(1, keepdim=True)
        torch.testing.assert_close(sum(parts), (fake - guided) / size, rtol=1e-12, atol=1e-12)

    @given(seeds())
    def test_guidance_one_adds_nothing(self, seed):
        cond, uncond, _ = shapes(seed)
        assert not cfg_augmentation_direction(cond, uncond, 1.0).any()

    def test_descending_it_moves_towards_what_the_text_adds(self):
        x = torch.zeros(1, 1, requires_grad=True)
        direction = cfg_augmentation_direction(torch.ones(1, 1), torch.zeros(1, 1), 5.0)
        directional_loss(x, direction).sum().backward()
        assert x.grad is not None and x.grad.item() == -4


class TestLoss:
    @given(seeds())
    def test_its_gradient_is_the_direction_and_its_value_half_the_square(self, seed):
        x, direction, _ = shapes(seed)
        x.requires_grad_()
        for reduction, share in (("sum", 1), ("mean", 4)):
            loss = directional_loss(x, direction, reduction=reduction)
            torch.testing.assert_close(loss, 0.5 * direction.square().sum(1) / share)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            torch.testing.assert_close(gradient, direction / share)

    def test_a_small_direction_survives_far_from_the_origin(self):
        x = torch.full((1, 2), 1e4, requires_grad=True)
        directional_loss(x, torch.full((1, 2), 1e-5), reduction="sum").sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.full((1, 2), 1e-5))

    def test_gradient_reaches_the_student_only_through_the_surrogate(self):
        x = tensor((2, 3), 0, DOUBLE).requires_grad_()
        noisy = 0.5 * x + 0.1
        weight = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
        fake, real = weight * noisy, noisy.square()
        direction = dmd_direction(fake, real, x=x, floor=1e-6)
        augmentation = cfg_augmentation_direction(fake, real, 3.0, x=x, normaliser="mean_abs")
        assert not direction.requires_grad and not augmentation.requires_grad
        for one in (direction, fake - real):
            got = torch.autograd.grad(directional_loss(x, one, reduction="sum").sum(), [x, weight], allow_unused=True)
            torch.testing.assert_close(got[0], one.detach())
            assert got[1] is None

    def test_masked_samples_weigh_nothing_whatever_they_hold(self):
        x, direction, _ = shapes(3)
        direction[1] = math.nan
        x.requires_grad_()
        mask = torch.tensor([True, False, True])
        loss = directional_loss(x, direction, mask=mask)
        loss.sum().backward()
        assert loss[1] == 0 and x.grad is not None and not x.grad[1].any()
        torch.testing.assert_close(x.grad[mask], direction[mask] / 4)

    def test_resolution_is_no_weight(self):
        images = [torch.ones(2, 4, 4), torch.ones(2, 1, 1)]
        layout = Layout.build([(4, 4), (1, 1)])
        assert directional_loss(pack(images), pack(images), layout=layout).tolist() == [0.5, 0.5]


class TestNoiseLevels:
    @given(seeds(), st.sampled_from(["shared", "decoupled", "hybrid"]), st.floats(0, 0.4), st.floats(0.6, 1))
    def test_levels_stay_in_their_ranges(self, seed, schedule, low, high):
        t, uniforms = uniform(seed, 50), uniform(seed + 1, 50, 2)
        matching, augmentation = noise_levels(t, uniforms, schedule, low=low, high=high)
        assert ((matching >= low) & (matching <= high)).all()
        if schedule == "hybrid":
            assert (augmentation <= t).all(), "only levels cleaner than the student's step"
            assert ((augmentation >= low) | (t < low)).all()
        else:
            assert ((augmentation >= low) & (augmentation <= high)).all()

    @pytest.mark.parametrize("t", [0.25, 0.767, 1.0])
    def test_the_laws_are_uniform(self, t):
        grid = (torch.arange(1000, dtype=DOUBLE) + 0.5) / 1000
        uniforms = torch.stack([grid, grid.flip(0)], dim=1)
        time = torch.full((1000,), t, dtype=DOUBLE)
        for schedule, top in (("shared", 1.0), ("decoupled", 1.0), ("hybrid", t)):
            matching, augmentation = noise_levels(time, uniforms, schedule)
            assert matching.mean().item() == pytest.approx(0.5) and matching.var().item() == pytest.approx(
                1 / 12, rel=2e-3
            )
            assert augmentation.mean().item() == pytest.approx(top / 2)
            assert augmentation.var().item() == pytest.approx(top**2 / 12, rel=2e-3)
            joined = torch.corrcoef(torch.stack([matching, augmentation]))[0, 1].item()
            assert joined == pytest.approx(1.0 if schedule == "shared" else -1.0), "each has its own column"

    def test_what_is_out_of_range_is_named(self):
        t, uniforms = torch.rand(2), torch.rand(2, 2)
        for arguments, message in (
            ((t, uniforms, "coupled"), "schedule"),
            ((t, uniforms[:, :1]), "uniforms"),
            ((t + 1, uniforms), "t: expected"),
            ((t, uniforms - 1), "uniforms"),
        ):
            with pytest.raises(ValueError, match=message):
                noise_levels(*arguments)
        with pytest.raises(ValueError, match="low"):
            noise_levels(t, uniforms, low=0.5, high=0.4)


GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: 0.5 * (r * r.log() - (r + 1) * ((r + 1) / 2).log()),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "neyman": lambda r: (1 - r) ** 2 / r,
}


class TestDivergence:
    @pytest.mark.parametrize("name", GENERATORS)
    def test_the_weight_is_the_second_derivative_times_the_square_of_the_ratio(self, name):
        ratio = torch.logspace(-2, 2, 21, dtype=DOUBLE, requires_grad=True)
        (first,) = torch.autograd.grad(GENERATORS[name](ratio).sum(), ratio, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), ratio)
        torch.testing.assert_close(divergence_weight(ratio.log(), name), (second * ratio**2).detach())

    @pytest.mark.parametrize("name", GENERATORS)
    def test_weighted_matching_descends_that_divergence(self, name):
        # d/dm of E_student f(p_real / p_student) over the noised laws, by quadrature on a grid of points.
        t, mean, std = 0.5, 0.4, 0.75
        y = torch.linspace(-5, 6, 20_001, dtype=DOUBLE)[:, None]
        time = torch.tensor(t, dtype=DOUBLE)

        def density(law):
            centre, variance = law.moments(time)
            return torch.exp(-0.5 * (y - centre) ** 2 / variance) / (2 * math.pi * variance).sqrt()

        free = torch.tensor(mean, dtype=DOUBLE, requires_grad=True)
        student = density(Gaussian(free, torch.tensor(std, dtype=DOUBLE)))
        real = density(Gaussian(torch.tensor(0.7, dtype=DOUBLE), torch.tensor(0.6, dtype=DOUBLE)))
        step = (y[1] - y[0]).item()
        (expected,) = torch.autograd.grad((student * GENERATORS[name](real / student)).sum() * step, free)
        times = time.expand(len(y))
        fake, teacher = Gaussian(mean, std).posterior(y, times)[0], REAL.posterior(y, times)[0]
        direction = dmd_direction(fake, teacher, x=y, normaliser="none", floor=1.0)
        weight = divergence_weight((real / student).log(), name)
        got = (student.detach() * weight * direction).sum() * step * (1 - t) ** 2 / t**2
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_an_unknown_one_is_an_error(self):
        with pytest.raises(ValueError, match="divergence"):
            divergence_weight(torch.zeros(1), "total_variation")
