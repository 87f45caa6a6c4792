"""Laws of stochastic rollouts: exact replay, exact policy gradients of whole chains, windows, and noise by seed."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.objectives.policy import clipped_surrogate
from lensmini.packed import Layout, pack
from lensmini.sampling import (
    euler_step,
    initial_noise,
    replay_step,
    sample_ode,
    sample_sde,
    sde_kernel,
    sde_window,
    step_noise,
    time_grid,
)
from tests.oracle import Gaussian
from tests.strategies import grids, seeds, tensor

KINDS = ["ddim", "flow", "dance", "cps"]
ETAS = {"ddim": 0.8, "flow": 0.7, "dance": 0.3, "cps": 0.5}
DOUBLE = torch.float64


def model(seed=0, channels=3):
    weight = tensor((channels, channels), seed) / 2

    def velocity(x, t):
        rows = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return torch.tanh(torch.einsum("bc...,cd->bd...", x, weight.to(x.dtype))) * (1 + rows)

    return velocity


class TestReplay:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("storage", [None, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_the_ratio_of_an_unchanged_model_is_exactly_one(self, kind, storage, reduction):
        noise = initial_noise([3, 4], 3, (2, 4))
        clean, steps = sample_sde(
            model(),
            noise,
            time_grid(6, 1.0),
            lambda step: step_noise([3, 4], step, 3, (2, 4)),
            eta=ETAS[kind],
            kind=kind,
            storage_dtype=storage,
            reduction=reduction,
        )
        assert [step.index for step in steps] == [0, 1, 2, 3, 4] and clean.dtype == torch.float32
        for step in steps:
            assert step.noisy.dtype == step.next_noisy.dtype == (storage or torch.float32)
            replay = replay_step(model(), step)
            assert torch.equal(replay.log_prob, step.log_prob)
            assert not torch.equal(replay_step(model(1), step).log_prob, step.log_prob)
            # It is the density of the state as it is stored.
            expected = torch.distributions.Normal(replay.mean, replay.std).log_prob(step.next_noisy.float())
            expected = expected.flatten(1).sum(1) if reduction == "sum" else expected.flatten(1).mean(1)
            torch.testing.assert_close(step.log_prob, expected, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(a.next_noisy, b.noisy) for a, b in pairwise(steps))

    def test_the_last_noisy_state_and_the_clean_one_follow_from_it(self):
        noise, times = tensor((2, 3), 0), time_grid(4)
        clean, steps = sample_sde(model(), noise, times, lambda step: tensor((2, 3), step), eta=0.5)
        torch.testing.assert_close(clean, sample_ode(model(), steps[-1].next_noisy, times[-2:]))

    def test_nothing_that_is_kept_has_a_gradient_and_a_replay_has(self):
        shift = torch.zeros((), requires_grad=True)
        _, (step,) = sample_sde(
            lambda x, t: x + shift, tensor((1, 2), 0), time_grid(2), lambda _: tensor((1, 2), 1), eta=0.5
        )
        assert not any(t.requires_grad for t in (step.noisy, step.next_noisy, step.log_prob))
        assert torch.autograd.grad(replay_step(lambda x, t: x + shift, step).log_prob.sum(), shift)[0] != 0

    @given(grids(min_size=2), seeds())
    def test_packed_rollouts_equal_every_image_alone(self, sizes, seed):
        names = [seed + index for index in range(len(sizes))]
        layout = Layout.build(sizes)
        times = time_grid(4, [0.1 * index for index in range(len(sizes))])
        flat = lambda x, t: torch.tanh(x) * (1 + t[layout.image_samples, None])  # noqa: E731
        together, steps = sample_sde(
            flat,
            initial_noise(names, 3, layout),
            times,
            lambda step: step_noise(names, step, 3, layout),
            eta=0.7,
            layout=layout,
        )
        for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
            alone, kept = sample_sde(
                lambda x, t: torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1)),
                initial_noise([name], 3, size),
                times[index],
                lambda step, name=name, size=size: step_noise([name], step, 3, size),
                eta=0.7,
            )
            torch.testing.assert_close(together.split(layout.image_lengths)[index], pack(alone), rtol=0, atol=1e-5)
            for a, b in zip(steps, kept, strict=True):
                torch.testing.assert_close(a.log_prob[index : index + 1], b.log_prob, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"window": [4]}, "window: expected steps 0 to 3"),
            ({"window": [-1]}, "window: expected steps 0 to 3"),
            ({"window": [3]}, "std: expected positive"),
            ({"eta": 0.0}, "std: expected positive"),
            ({"times": torch.ones(1)}, "times: expected at least two"),
            ({"times": torch.ones(3, 5)}, r"times: expected shape"),
            ({"step_noise": lambda step: torch.zeros(2, 4)}, r"step_noise\(index\): expected the shape of noise"),
        ],
    )
    def test_a_rollout_that_could_not_be_scored_is_refused(self, options, message):
        arguments = {"times": time_grid(4), "step_noise": lambda step: torch.zeros(2, 3), "eta": 0.5}
        with pytest.raises(ValueError, match=message):
            sample_sde(model(), torch.zeros(2, 3), **{**arguments, **options})

    def test_an_empty_window_is_the_ode(self):
        noise = tensor((2, 3), 0)
        clean, steps = sample_sde(model(), noise, time_grid(5), lambda step: noise, eta=0.5, window=())
        assert steps == [] and torch.equal(clean, sample_ode(model(), noise, time_grid(5)))


class TestWholeChain:
    """Six DDIM steps on Gaussian data, a velocity with a shift of its own at each step, and the reward x_K.

    Three nodes for each of six noises are exact: everything is a polynomial of degree two.
    """

    ORACLE = Gaussian(0.7, 0.6)
    TIMES = torch.linspace(0.98, 0.02, 7, dtype=DOUBLE)
    EXPECTED = (-0.0512, -0.0902, -0.1375, -0.1834, -0.1987, -0.1646)

    def gradient(self, window, centre=0.0):
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
        index = torch.cartesian_prod(*[torch.arange(3)] * len(window)).reshape(-1, len(window))
        draws, weight = nodes[index], weights[index].prod(1)
        start = torch.full((len(index), 1), 0.4, dtype=DOUBLE)
        shifts = torch.zeros(6, dtype=DOUBLE, requires_grad=True)
        names = {round(t, 9): k for k, t in enumerate(self.TIMES.tolist())}

        def velocity(x, t):
            return self.ORACLE.velocity(x, t) + shifts[names[round(t[0].item(), 9)]]

        column = {step: k for k, step in enumerate(window)}
        last, steps = sample_sde(
            velocity, start, self.TIMES, lambda k: draws[:, column[k], None], eta=0.7, window=window
        )
        reward = last[:, 0] - centre
        loss = torch.zeros((), dtype=DOUBLE)
        for step in steps:
            log_ratio = replay_step(velocity, step).log_prob - step.log_prob
            loss = loss + (weight * clipped_surrogate(log_ratio, reward, 0.2, 0.2)).sum()
        return -torch.autograd.grad(loss, shifts)[0]

    def test_every_steps_score_term_is_that_steps_part_of_the_exact_gradient(self):
        terms = self.gradient(range(6))
        assert terms.tolist() == pytest.approx(list(self.EXPECTED), abs=6e-5)
        assert terms.sum().item() == pytest.approx(-0.8257, abs=1e-4)
        # Against the path itself: the mean of x_K moves by exactly these amounts.
        shifts = torch.zeros(6, dtype=DOUBLE, requires_grad=True)
        mean = torch.full((1, 1), 0.4, dtype=DOUBLE)
        for k in range(6):
            t, s = self.TIMES[k : k + 1], self.TIMES[k + 1 : k + 2]
            mean = sde_kernel(mean, self.ORACLE.velocity(mean, t) + shifts[k], t, s, 0.7).mean
        (exact,) = torch.autograd.grad(mean.sum(), shifts)
        torch.testing.assert_close(terms, exact, rtol=1e-10, atol=1e-12)

    def test_a_constant_in_the_reward_changes_nothing_in_expectation(self):
        torch.testing.assert_close(self.gradient(range(6), 3.0), self.gradient(range(6)), rtol=1e-9, atol=1e-11)

    def test_a_window_gives_its_own_terms_and_no_others(self):
        # Outside the window the steps are the ODE's, which changes what the later steps do with a change.
        terms = self.gradient(range(2, 4))
        assert not terms[:2].any() and not terms[4:].any()
        shifts = torch.zeros(6, dtype=DOUBLE, requires_grad=True)
        mean = torch.full((1, 1), 0.4, dtype=DOUBLE)
        for k in range(6):
            t, s = self.TIMES[k : k + 1], self.TIMES[k + 1 : k + 2]
            flow = self.ORACLE.velocity(mean, t) + shifts[k]
            mean = sde_kernel(mean, flow, t, s, 0.7).mean if k in (2, 3) else euler_step(mean, flow, t, s)
        (exact,) = torch.autograd.grad(mean.sum(), shifts)
        torch.testing.assert_close(terms[2:4], exact[2:4], rtol=1e-10, atol=1e-12)


class TestStorage:
    def test_rounding_the_next_state_widens_it_by_the_rounding_error_and_no_more(self):
        # E[(x - mean)^2] / std^2 is 1; in bfloat16 states near 1 are 2^-7 apart, which adds 2^-14 / 12 / std^2.
        num, std = 200_000, 0.02
        x = torch.full((num, 1), 1.25, dtype=torch.float32)
        t, t_next = torch.ones(num), torch.full((num,), 0.98)
        noise = torch.randn(num, 1, generator=torch.Generator().manual_seed(0))
        _, (step,) = sample_sde(
            lambda x, t: 0 * x,
            x,
            torch.stack([t, t_next], 1),
            lambda _: noise,
            eta=std / math.sqrt(0.02),
            kind="dance",
            window=[0],
            storage_dtype=torch.bfloat16,
        )
        replay = replay_step(lambda x, t: 0 * x, step)
        measured = ((step.next_noisy.float() - replay.mean) / replay.std).square().mean().item()
        assert measured == pytest.approx(1 + 2**-14 / 12 / std**2, abs=0.01)
        assert torch.equal(replay.log_prob, step.log_prob)


class TestWindow:
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30), st.integers(0, 500))
    def test_it_slides_from_noise_to_data_and_starts_again(self, num_steps, size, dwell, iteration):
        if size > num_steps:
            with pytest.raises(ValueError, match="size"):
                sde_window(iteration, num_steps, size=size)
            return
        window = sde_window(iteration, num_steps, size=size, dwell=dwell)
        assert list(window) == [(iteration // dwell) % (num_steps - size + 1) + k for k in range(size)]

    def test_positions_may_have_dwells_of_their_own(self):
        starts = [sde_window(i, 5, size=3, dwell=[4, 2, 1]).start for i in range(14)]
        assert starts == [0, 0, 0, 0, 1, 1, 2] * 2

    def test_the_random_order_is_uniform_and_a_function_of_seed_and_iteration(self):
        starts = [sde_window(i, 9, size=4, dwell=1, order="random", seed=5).start for i in range(6000)]
        assert starts == [sde_window(i, 9, size=4, dwell=1, order="random", seed=5).start for i in range(6000)]
        assert starts != [sde_window(i, 9, size=4, dwell=1, order="random", seed=6).start for i in range(6000)]
        counts = Counter(starts)
        assert counts.keys() == set(range(6)) and all(abs(n - 1000) < 150 for n in counts.values())
        held = [sde_window(i, 9, size=4, dwell=10, order="random").start for i in range(100)]
        assert all(len(set(held[k : k + 10])) == 1 for k in range(0, 100, 10)) and len(set(held)) > 1

    @pytest.mark.parametrize(
        "options", [{"dwell": 0}, {"dwell": [1, 2]}, {"order": "sideways"}, {"order": "random", "dwell": [1] * 6}]
    )
    def test_nonsense_is_refused(self, options):
        with pytest.raises(ValueError, match="dwell|order"):
            sde_window(0, 9, size=4, **options)


class TestStepNoise:
    def test_it_belongs_to_seed_and_step_alone_and_shares_nothing_with_its_neighbours(self):
        shape = (16, 16)
        first = step_noise([1, 2, 3], 0, 4, shape)
        assert torch.equal(first[1:2], step_noise([2], 0, 4, shape))
        packed = step_noise([1, 2], 0, 4, Layout.build([(3, 5), shape]))
        assert torch.equal(packed[15:], pack(first[1:2]))
        draws = [step_noise([seed], step, 4, shape) for seed in range(4) for step in range(4)]
        draws += [initial_noise([seed], 4, shape) for seed in range(4)]
        table = torch.stack(draws).flatten(1)
        correlation = torch.corrcoef(table) - torch.eye(len(draws))
        assert correlation.abs().max() < 5 / math.sqrt(1024)
        assert table.mean().abs() < 0.05 and (table.std() - 1).abs() < 0.02

    @pytest.mark.parametrize(("names", "step"), [([-1], 0), ([1], -1)])
    def test_negative_numbers_are_refused(self, names, step):
        with pytest.raises(ValueError, match="seeds and step"):
            step_noise(names, step, 1, (1, 1))
