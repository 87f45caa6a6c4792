"""Laws of the few-step walk: exact with the exact student on any grid, Euler without fresh noise, one step of gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.packed import Layout, pack
from lensmini.sampling import backward_simulation, empirical_mu, few_step_sample, sample_ode, time_grid
from tests.oracle import Gaussian
from tests.strategies import layouts, seeds, tensor

DOUBLE = torch.float64
ORACLE = Gaussian(0.7, 0.6)


def exact_student(x, t):
    """The velocity whose clean prediction is the consistency function."""
    return (x - ORACLE.consistency(x, t)) / t[:, None]


def smooth(layout=None):
    def velocity(x, t):
        rows = t if layout is None else layout.expand(t)
        return torch.tanh(x) * (1 + rows.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype))

    return velocity


def grids(max_steps=4):
    inner = st.lists(st.floats(0.02, 0.98), min_size=0, max_size=max_steps - 1, unique=True)
    return inner.map(lambda times: torch.tensor([1.0, *sorted(times, reverse=True), 0.0], dtype=DOUBLE))


class TestFewSteps:
    @given(grids())
    def test_with_the_exact_consistency_function_mean_and_variance_are_the_datas_on_any_grid(self, times):
        # The walk is affine in the initial and every fresh noise, all independent: its moments follow from a basis.
        num = len(times) - 1
        rows = torch.cat([torch.zeros(1, num, dtype=DOUBLE), torch.eye(num, dtype=DOUBLE)])
        result = few_step_sample(exact_student, rows[:, :1], times, [rows[:, k : k + 1] for k in range(1, num)])
        mean, slopes = result[0], result[1:] - result[0]
        assert mean.item() == pytest.approx(0.7, abs=1e-12)
        assert slopes.square().sum().item() == pytest.approx(0.36, abs=1e-12)

    @given(seeds(), grids())
    def test_without_fresh_noise_it_is_euler_bit_for_bit(self, seed, times):
        noise = tensor((3, 4), seed)
        assert torch.equal(few_step_sample(smooth(), noise, times), sample_ode(smooth(), noise, times))

    def test_one_step_is_the_clean_prediction(self):
        noise = tensor((2, 3), 0)
        for noises in (None, []):
            result = few_step_sample(lambda x, t: 2 * x, noise, torch.tensor([1.0, 0.0]), noises)
            torch.testing.assert_close(result, -noise)

    @given(seeds())
    def test_noise_is_asked_for_by_step_and_only_where_it_counts(self, seed):
        asked = []
        noise, times = tensor((2, 3), seed), torch.tensor([1.0, 0.8, 0.4, 0.0])
        fresh = [tensor((2, 3), seed + 1 + k) for k in range(3)]

        def draw(step):
            asked.append(step)
            return fresh[step]

        result = few_step_sample(smooth(), noise, times, draw)
        assert asked == [0, 1]
        x = noise
        for index in range(3):
            t, t_next = times[index].item(), times[index + 1].item()
            clean = x - t * torch.tanh(x) * (1 + t)
            x = (1 - t_next) * clean + t_next * fresh[index]
        torch.testing.assert_close(result, x)
        torch.testing.assert_close(result, few_step_sample(smooth(), noise, times, fresh))

    @given(layouts(), seeds())
    def test_packed_samples_with_their_own_grids_are_as_if_alone(self, layout, seed):
        num = layout.batch_size
        times = time_grid(3, [0.3 * k for k in range(num)])
        draws = [[tensor((n, 2), seed + 10 * k + i) for i, n in enumerate(layout.image_lengths)] for k in range(3)]
        noise, *fresh = (torch.cat(pieces) for pieces in draws)
        for noises in (None, fresh):
            together = few_step_sample(smooth(layout), noise, times, noises, layout=layout)
            pieces = []
            for i in range(num):
                own = None if noises is None else [draws[k][i][None] for k in (1, 2)]
                pieces.append(few_step_sample(smooth(), draws[0][i][None], times[i], own)[0])
            torch.testing.assert_close(together, torch.cat(pieces))

    def test_the_released_four_step_grid(self):
        times = time_grid(4, empirical_mu(4096, 4))
        assert times.tolist() == pytest.approx([1.0, 0.967, 0.908, 0.767, 0.0], abs=5e-4)

    @pytest.mark.parametrize("times", [[1.0], [1.0, 0.5], [0.5, 1.0, 0.0], [1.0, -0.1], [1.0, math.nan, 0.0]])
    def test_a_grid_that_does_not_descend_to_zero_is_an_error(self, times):
        for sample in (few_step_sample, lambda *a: backward_simulation(*a, 0)):
            with pytest.raises(ValueError, match="times"):
                sample(smooth(), torch.zeros(1, 2), torch.tensor(times))

    def test_noise_of_another_shape_is_an_error(self):
        with pytest.raises(ValueError, match=r"noises\[0\]"):
            few_step_sample(smooth(), torch.zeros(2, 3), torch.tensor([1.0, 0.5, 0.0]), [torch.zeros(1, 3)])


class TestBackwardSimulation:
    @given(seeds(), st.integers(0, 3), st.booleans())
    def test_it_meets_the_states_of_the_sampler(self, seed, stop, own_noise):
        noise, times = tensor((2, 3), seed), time_grid(4, 0.8)
        noises = None if own_noise else [tensor((2, 3), seed + 1 + k) for k in range(3)]
        seen = []

        def watched(x, t):
            seen.append((x, t))
            return smooth()(x, t)

        result = few_step_sample(watched, noise, times, noises)
        step = backward_simulation(smooth(), noise, times, stop, noises)
        assert torch.equal(step.noisy, seen[stop][0]) and torch.equal(step.t, seen[stop][1])
        if stop == 3:
            assert torch.equal(step.clean, result)

    @given(layouts(), seeds(), st.booleans())
    def test_every_sample_stops_at_its_own_step(self, layout, seed, own_noise):
        num = layout.batch_size
        stops = torch.randint(4, (num,), generator=torch.Generator().manual_seed(seed))
        times = time_grid(4, [0.2 * k for k in range(num)])
        draws = [[tensor((n, 2), seed + 10 * k + i) for i, n in enumerate(layout.image_lengths)] for k in range(4)]
        noise, *fresh = (torch.cat(pieces) for pieces in draws)
        noises = None if own_noise else fresh
        together = backward_simulation(smooth(layout), noise, times, stops, noises, layout=layout)
        for i, (clean, noisy) in enumerate(
            zip(*(x.split(layout.image_lengths) for x in (together.clean, together.noisy)), strict=True)
        ):
            own = None if own_noise else [draws[k][i][None] for k in (1, 2, 3)]
            alone = backward_simulation(smooth(), draws[0][i][None], times[i], int(stops[i]), own)
            torch.testing.assert_close(clean, alone.clean[0])
            torch.testing.assert_close(noisy, alone.noisy[0])
            assert together.t[i] == times[i, stops[i]]

    def test_only_the_last_step_carries_gradient(self):
        weight = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
        times, noise = torch.tensor([1.0, 0.8, 0.4, 0.0], dtype=DOUBLE), tensor((2, 3), 0, DOUBLE)
        step = backward_simulation(lambda x, t: weight * x, noise, times, torch.tensor([2, 0]))
        assert not step.noisy.requires_grad
        (slope,) = torch.autograd.grad(step.clean.sum(), weight)
        # clean = noisy - t w noisy: through all steps it would be a cubic in w.
        assert slope.item() == pytest.approx(-(step.t[:, None] * step.noisy).sum().item())

    def test_nobody_walks_further_than_the_furthest(self):
        calls = []

        def counted(x, t):
            calls.append(t)
            return x

        for stop, number in ((0, 1), (2, 3), (torch.tensor([1, 0]), 2)):
            calls.clear()
            backward_simulation(counted, torch.zeros(2, 1), time_grid(4), stop)
            assert len(calls) == number

    @pytest.mark.parametrize("stop", [-1, 4, torch.tensor([0, 4]), torch.tensor([0]), torch.tensor([0.0, 1.0])])
    def test_a_step_that_is_not_there_is_an_error(self, stop):
        with pytest.raises(ValueError, match="stop"):
            backward_simulation(smooth(), torch.zeros(2, 3), time_grid(4), stop)

    def test_mixed_sizes_in_one_call(self):
        images = [tensor((2, 3, 3), 0), tensor((2, 1, 4), 1)]
        layout = Layout.build([(3, 3), (1, 4)])
        step = backward_simulation(smooth(layout), pack(images), time_grid(4), torch.tensor([3, 1]), layout=layout)
        assert step.clean.shape == (13, 2) and step.t.shape == (2,)
