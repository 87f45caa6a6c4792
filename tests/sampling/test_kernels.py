"""Laws of stochastic steps: exact moments of whole chains on Gaussian data, limits, and the biases as they are known.

On Gaussian data every kernel is an affine map plus noise, so mean and variance of a chain follow a scalar recursion and
nothing is estimated.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.packed import Layout, pack
from lensmini.sampling import euler_step, sde_kernel
from tests.oracle import Gaussian
from tests.strategies import grids, seeds, tensor

KINDS = ["ddim", "flow", "dance", "cps"]
ORACLE = Gaussian(0.7, 0.6)
POINT = Gaussian(0.7, 0.0)
DOUBLE = torch.float64


def line(num_steps, start=1.0, stop=0.0):
    return torch.linspace(start, stop, num_steps + 1, dtype=DOUBLE).tolist()


def affine(problem, t, t_next, eta, kind, **options):
    """Slope, offset and std of one step, from the states 0 and 1."""
    x = torch.tensor([[0.0], [1.0]], dtype=DOUBLE)
    times = [torch.full((2,), value, dtype=DOUBLE) for value in (t, t_next)]
    mean, std = sde_kernel(x, problem.velocity(x, times[0]), *times, eta, kind, **options)
    return (mean[1] - mean[0]).item(), mean[0].item(), std[0].item()


def chain(problem, grid, eta, kind, start=(0.0, 1.0), **options):
    """Mean and variance after the last step, from those before the first."""
    mean, variance = start
    for t, t_next in pairwise(grid):
        slope, offset, std = affine(problem, t, t_next, eta, kind, **options)
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, variance


def marginal(problem, t):
    return (1 - t) * problem.mean, (1 - t) ** 2 * problem.std**2 + t**2


class TestMarginals:
    @pytest.mark.parametrize(("kind", "eta"), [("flow", 0.7), ("dance", 0.3)])
    def test_a_reverse_sde_keeps_the_mean_exactly_and_the_variance_to_first_order(self, kind, eta):
        errors = []
        for num in (10, 100, 200, 400, 800):
            mean, variance = chain(ORACLE, line(num, 0.95, 0.05), eta, kind, marginal(ORACLE, 0.95))
            wanted = marginal(ORACLE, 0.05)
            assert mean == pytest.approx(wanted[0], abs=1e-13)
            errors.append(abs(variance - wanted[1]))
        assert 0.9 < math.log2(errors[-2] / errors[-1]) < 1.1

    @pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
    def test_ddim_reaches_the_data_for_every_strength(self, eta):
        errors = []
        for num in (50, 400, 800):
            mean, variance = chain(ORACLE, line(num), eta, "ddim")
            assert mean == pytest.approx(0.7, abs=1e-12)
            errors.append(abs(variance - 0.36))
        assert 0.9 < math.log2(errors[-2] / errors[-1]) < 1.1 and errors[-1] < 6e-3

    @pytest.mark.parametrize(("eta", "limit"), [(0.2, 0.351), (0.5, 0.307), (0.8, 0.2355), (1.0, 0.180)])
    def test_cps_narrows_the_distribution_and_a_finer_grid_does_not_help(self, eta, limit):
        at = [chain(ORACLE, line(num), eta, "cps")[1] for num in (1000, 2000, 4000)]
        extrapolated = 2 * at[2] - at[1]
        assert extrapolated == pytest.approx(limit, abs=6e-4)
        assert abs(at[2] - at[1]) < abs(at[1] - at[0]) < 0.001 < 0.36 - extrapolated

    @pytest.mark.parametrize(
        ("kind", "eta", "leaves"),
        [("ddim", 0.0, 0), ("ddim", 0.8, 0), ("ddim", 1.0, 0), ("cps", 0.8, 0), ("flow", 0.7, 0.0069)],
    )
    def test_a_single_data_point_is_reached_exactly_by_those_that_end_on_the_clean_prediction(self, kind, eta, leaves):
        mean, variance = chain(POINT, line(10), eta, kind)
        assert mean == pytest.approx(0.7, abs=1e-12)
        assert variance == pytest.approx(leaves, abs=5e-5 if leaves else 1e-25)

    def test_dance_leaves_noise_too(self):
        assert chain(POINT, line(10), 0.3, "dance")[1] > 0.01


class TestFlowAtTimeOne:
    SHIFTED = [3 * t / (1 + 2 * t) for t in line(10)][:2]

    @pytest.mark.parametrize(("at_one", "variance"), [(None, 1.007), (0.99, 1.758)])
    def test_the_first_steps_variance_is_off_by_what_stands_in_for_one(self, at_one, variance):
        assert marginal(ORACLE, self.SHIFTED[1])[1] == pytest.approx(0.930, abs=5e-4)
        assert chain(ORACLE, self.SHIFTED, 0.7, "flow", at_one=at_one)[1] == pytest.approx(variance, abs=5e-4)

    @pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
    def test_refining_the_grid_does_not_remove_it(self, eta):
        assert chain(ORACLE, [1.0, 1 - 1e-7], eta, "flow")[1] == pytest.approx(1 + eta**4 / 4, abs=1e-5)

    @pytest.mark.parametrize("kind", ["ddim", "dance", "cps"])
    def test_the_others_are_regular_there(self, kind):
        slope, offset, std = affine(ORACLE, 1.0, 1 - 1e-9, 0.3, kind)
        wanted = 0.0 if kind == "dance" else math.sin(0.15 * math.pi) if kind == "cps" else 0.3
        assert std == pytest.approx(wanted, abs=1e-4)
        assert slope**2 + std**2 == pytest.approx(1, abs=1e-6) and abs(offset) < 1e-6


class TestOneStep:
    @given(seeds(), st.floats(0.02, 0.98), st.floats(0, 0.99), st.sampled_from(KINDS))
    def test_without_noise_it_is_eulers_step(self, seed, t, fraction, kind):
        x, v = tensor((2, 3), seed, DOUBLE), tensor((2, 3), seed + 1, DOUBLE)
        here, there = torch.full((2,), t, dtype=DOUBLE), torch.full((2,), t * fraction, dtype=DOUBLE)
        mean, std = sde_kernel(x, v, here, there, 0.0, kind)
        euler = euler_step(x, v, here, there)
        assert not std.any()
        if kind in ("flow", "dance"):
            assert torch.equal(mean, euler)
        else:
            torch.testing.assert_close(mean, euler, rtol=0, atol=1e-13)

    @given(seeds(), st.floats(0.02, 1.0), st.just(0.0) | st.floats(1e-3, 0.99))
    def test_full_ddim_is_the_bayes_posterior_of_the_markov_path(self, seed, t, fraction):
        # x_t = a x_s + b e with a, b fixed by the two marginals; then x_s | x_t, x0 is Gaussian by Bayes' rule.
        s = t * fraction
        x0, e = tensor((1, 4), seed, DOUBLE), tensor((1, 4), seed + 1, DOUBLE)
        x = (1 - t) * x0 + t * e
        a = (1 - t) / (1 - s)
        b2 = t**2 - a**2 * s**2
        precision = (1 / s**2 if s else math.inf) + a**2 / b2
        variance = 1 / precision if s else 0.0
        mean = variance * ((1 - s) * x0 / s**2 + a * x / b2) if s else x0
        got, std = sde_kernel(x, e - x0, torch.tensor([t], dtype=DOUBLE), torch.tensor([s], dtype=DOUBLE), 1.0)
        torch.testing.assert_close(got, mean, rtol=1e-7, atol=1e-7)
        assert std.item() == pytest.approx(math.sqrt(variance), abs=1e-7)

    @given(seeds(), st.floats(0.01, 1), st.floats(0, 0.99), st.floats(0, 1), st.sampled_from(["ddim", "cps"]))
    def test_a_known_sample_keeps_the_level_of_noise(self, seed, t, fraction, eta, kind):
        s = t * fraction
        times = [torch.tensor([value], dtype=DOUBLE) for value in (t, s)]
        x0 = tensor((1, 3), seed, DOUBLE)
        zero = torch.zeros_like(x0)
        clean, std = sde_kernel((1 - t) * x0, -x0, *times, eta, kind)  # e = 0
        torch.testing.assert_close(clean, (1 - s) * x0, rtol=0, atol=1e-12)
        noise, _ = sde_kernel(t * torch.ones_like(x0), torch.ones_like(x0) + zero, *times, eta, kind)  # x0 = 0, e = 1
        torch.testing.assert_close(noise**2 + std**2, torch.full_like(x0, s**2), rtol=0, atol=1e-12)

    @given(seeds(), st.floats(0.05, 0.95), st.floats(0.1, 0.99), st.floats(0, 2))
    def test_reverse_sdes_add_the_score_and_the_square_root_of_time(self, seed, t, fraction, eta):
        s, x = t * fraction, tensor((1, 3), seed, DOUBLE)
        times = [torch.tensor([value], dtype=DOUBLE) for value in (t, s)]
        v, score = ORACLE.velocity(x, times[0]), ORACLE.score(x, times[0])
        for kind, diffusion in (("flow", eta * math.sqrt(t / (1 - t))), ("dance", eta)):
            mean, std = sde_kernel(x, v, *times, eta, kind)
            wanted = x + (s - t) * (v - diffusion**2 / 2 * score)
            torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-10)
            assert std.item() == pytest.approx(diffusion * math.sqrt(t - s), rel=1e-12)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
    def test_a_step_of_no_length_is_finite(self, kind, t):
        x, time = tensor((2, 3), 0), torch.full((2,), t)
        mean, std = sde_kernel(x, x, time, time, 0.5, kind)
        assert mean.isfinite().all() and std.isfinite().all()
        if kind != "cps":  # which contracts and refreshes even then
            torch.testing.assert_close(mean, x, rtol=0, atol=1e-6)
            assert not std.any()

    @pytest.mark.parametrize("kind", ["ddim", "cps"])
    def test_the_last_step_has_no_noise(self, kind):
        x, t = tensor((1, 3), 0), torch.tensor([0.3])
        mean, std = sde_kernel(x, x / 2, t, torch.zeros(1), 1.0, kind)
        assert not std.any()
        torch.testing.assert_close(mean, x - 0.15 * x, rtol=0, atol=1e-6)

    @given(grids(), seeds(), st.sampled_from(KINDS))
    def test_packed_equals_every_image_alone(self, sizes, seed, kind):
        images = [tensor((3, h, w), seed + i) for i, (h, w) in enumerate(sizes)]
        flows = [tensor((3, h, w), seed - i - 1) for i, (h, w) in enumerate(sizes)]
        t = torch.linspace(0.3, 1, len(sizes))
        t_next, layout = t * torch.linspace(0.1, 0.9, len(sizes)), Layout.build(sizes)
        mean, std = sde_kernel(pack(images), pack(flows), t, t_next, 0.6, kind, layout=layout)
        assert std.shape == (layout.num_image_tokens, 1)
        for i, (rows, stds) in enumerate(
            zip(mean.split(layout.image_lengths), std.split(layout.image_lengths), strict=True)
        ):
            here = slice(i, i + 1)
            alone, spread = sde_kernel(images[i][None], flows[i][None], t[here], t_next[here], 0.6, kind)
            torch.testing.assert_close(rows, pack(alone))
            torch.testing.assert_close(stds[0, 0], spread.flatten()[0])

    def test_half_precision_states_have_float32_moments(self):
        x, v = tensor((2, 5), 0, torch.bfloat16), tensor((2, 5), 1, torch.bfloat16)
        t, t_next = torch.tensor([0.9, 0.4]), torch.tensor([0.8, 0.1])
        for kind in KINDS:
            mean, std = sde_kernel(x, v, t, t_next, 0.7, kind)
            exact = sde_kernel(x.double(), v.double(), t.double(), t_next.double(), 0.7, kind)
            assert mean.dtype == std.dtype == torch.float32
            torch.testing.assert_close(mean.double(), exact.mean, rtol=0, atol=3e-6)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"kind": "euler"}, "kind: expected 'ddim'"),
            ({"eta": 1.1}, r"eta: expected a number in \[0, 1\] for ddim"),
            ({"eta": 1.1, "kind": "cps"}, "eta"),
            ({"eta": -0.1, "kind": "flow"}, "eta"),
            ({"eta": math.nan, "kind": "dance"}, "eta"),
            ({"at_one": 0.9}, "at_one"),
            ({"at_one": 1.0, "kind": "flow"}, "at_one"),
            ({"t_next": torch.tensor([0.9])}, "t_next: expected at most t"),
            ({"t": torch.tensor([1.5])}, "t: expected times"),
            ({"t": torch.tensor([0.5, 0.6])}, r"t: expected shape \[b\]"),
            ({"velocity": torch.zeros(1, 3)}, "velocity: expected the shape of noisy"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, changes, message):
        arguments = {
            "noisy": torch.zeros(1, 2),
            "velocity": torch.zeros(1, 2),
            "t": torch.tensor([0.5]),
            "t_next": torch.tensor([0.4]),
            "eta": 0.5,
        }
        with pytest.raises(ValueError, match=message):
            sde_kernel(**{**arguments, **changes})
