"""Laws of the paired comparison: closed forms, exact enumeration, and how often it accepts what is not better."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.prompting import bootstrap_interval, compare_paired
from lensmini.prompting.compare import flip_p_value


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class TestFlips:
    @given(st.integers(0, 2**31), st.integers(1, 9))
    def test_it_is_the_share_of_all_sign_patterns_that_reach_the_sum(self, seed, num):
        values = torch.randint(-3, 4, (num,), generator=seeded(seed))
        patterns = torch.tensor([*product((-1, 1), repeat=num)])
        exact = (patterns @ values.abs() >= values.sum()).double().mean().item()
        values = values.float() / 3
        found = flip_p_value(values, 0.001, generator=seeded(seed + 1))
        assert found == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)

    def test_it_is_at_most_its_level_whatever_the_number_of_items(self):
        for num in (3, 8, 40):
            hits = 0
            for trial in range(400):
                values = torch.randint(-1, 2, (num,), generator=seeded(trial)).float()
                hits += flip_p_value(values, 0.05, generator=seeded(trial + 10**6)) <= 0.05
            assert hits <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)

    def test_nothing_that_differs_is_no_evidence(self):
        assert flip_p_value(torch.zeros(9), 0.05, generator=seeded(0)) == 1.0


class TestBootstrap:
    def test_bounds_of_many_gaussian_values_are_those_of_students_t(self):
        values = torch.randn(400, generator=seeded(0), dtype=torch.float64)
        low, high = bootstrap_interval(values, 0.025, generator=seeded(1))
        error = values.std() / 20
        assert low == pytest.approx(values.mean().item() - 1.966 * error.item(), abs=0.015)
        assert high == pytest.approx(values.mean().item() + 1.966 * error.item(), abs=0.015)

    def test_bounds_cover_as_often_as_they_say(self):
        missed = [0, 0]
        for trial in range(300):
            values = torch.rand(30, generator=seeded(trial), dtype=torch.float64) ** 3
            low, high = bootstrap_interval(values, 0.05, generator=seeded(trial + 1))
            missed[0] += low > 0.25
            missed[1] += high < 0.25
        assert all(2 <= number <= 300 * 0.05 + 3.5 * math.sqrt(300 * 0.05 * 0.95) for number in missed)

    def test_the_bound_on_the_side_of_a_long_tail_is_further_away(self):
        values = -torch.rand(25, generator=seeded(3), dtype=torch.float64).log()
        low, high = bootstrap_interval(values, 0.05, generator=seeded(1))
        assert high - values.mean() > 1.2 * (values.mean() - low)

    def test_bounds_move_and_scale_with_the_values(self):
        values = torch.rand(40, generator=seeded(0))
        low, high = bootstrap_interval(values, 0.05, generator=seeded(1))
        moved = bootstrap_interval(3 * values + 2, 0.05, generator=seeded(1))
        assert moved == pytest.approx((3 * low + 2, 3 * high + 2), abs=1e-5)
        turned = bootstrap_interval(-values, 0.05, generator=seeded(1))
        assert turned == pytest.approx((-high, -low), abs=1e-3)

    def test_values_that_are_equal_up_to_rounding_have_no_width(self):
        rounded = torch.full((9,), 0.3, dtype=torch.float64) + torch.tensor([0, 1, -1] * 3) * 5e-17
        assert rounded.std() > 0
        assert bootstrap_interval(rounded, 0.05, generator=seeded(0)) == (rounded.mean().item(), rounded.mean().item())
        assert bootstrap_interval(torch.full((9,), 0.5), 0.05, generator=seeded(0)) == (0.5, 0.5)

    @pytest.mark.parametrize(
        ("values", "alpha"), [([], 0.05), ([1.0], 0.05), ([1.0, math.nan], 0.05), ([0.0, 1.0], 0.5), ([0.0, 1.0], 0.0)]
    )
    def test_what_has_no_bounds_is_refused(self, values, alpha):
        with pytest.raises(ValueError, match="values|alpha"):
            bootstrap_interval(torch.tensor(values), alpha, generator=seeded(0))


class TestComparison:
    def test_three_of_a_hundred_in_one_direction_are_no_evidence(self):
        low = torch.zeros(100, 1)
        high = low.clone()
        high[:3] = 1.0
        found = compare_paired(high, low, alpha=0.05, generator=seeded(0))
        assert found.lower > 0 and found.p_value > 0.1 and not found.accepted
        high[:6] = 1.0
        assert compare_paired(high, low, alpha=0.05, generator=seeded(0)).accepted

    def test_common_noise_is_what_makes_small_differences_visible(self):
        noise = torch.randn(60, 3, generator=seeded(0))
        paired = compare_paired(noise + 0.1, noise, alpha=0.01, generator=seeded(1))
        other = compare_paired(torch.randn(60, 3, generator=seeded(2)) + 0.1, noise, alpha=0.01, generator=seeded(1))
        assert paired.accepted and paired.correlation == pytest.approx(1.0)
        assert not other.accepted and abs(other.correlation) < 0.3

    def test_seeds_of_an_item_are_not_items(self):
        # One item is better under all of 50 seeds: that is one observation.
        high, low = torch.zeros(8, 50), torch.zeros(8, 50)
        high[0] = 1.0
        assert not compare_paired(high, low, alpha=0.05, generator=seeded(0)).accepted

    @given(st.integers(0, 2**31))
    def test_missing_scores_leave_exactly_their_pairs_out(self, seed):
        generator = seeded(seed)
        high, low = torch.rand(20, 2, generator=generator), torch.rand(20, 2, generator=generator)
        gone = torch.rand(20, generator=generator) < 0.3
        gone[:2] = False
        damaged = torch.where(gone[:, None], torch.nan, high)
        found = compare_paired(damaged, low, alpha=0.05, generator=seeded(1), min_coverage=0.0)
        wanted = compare_paired(high[~gone], low[~gone], alpha=0.05, generator=seeded(1))
        assert found[:5] == wanted[:5]
        assert found.coverage == pytest.approx(1 - gone.double().mean().item())

    def test_one_missing_seed_leaves_the_others_of_its_item(self):
        high, low = torch.tensor([[1.0, 9.0], [2.0, 2.0]]), torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
        found = compare_paired(high, low, alpha=0.05, generator=seeded(0))
        assert found.difference == 1.5 and found.num_items == 2 and found.coverage == 0.75

    def test_too_few_pairs_accept_nothing(self):
        high, low = torch.ones(100, 1), torch.zeros(100, 1)
        high[:30] = torch.nan
        assert not compare_paired(high, low, alpha=0.05, generator=seeded(0)).accepted
        assert compare_paired(high, low, alpha=0.05, generator=seeded(0), min_coverage=0.7).accepted

    @pytest.mark.parametrize("num", [0, 1])
    def test_less_than_two_pairs_say_nothing(self, num):
        high = torch.full((4, 2), torch.nan)
        high[:num] = 1.0
        found = compare_paired(high, torch.zeros(4, 2), alpha=0.05, generator=seeded(0), min_coverage=0.0)
        assert not found.accepted and found.p_value == 1.0 and found.lower == -math.inf

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, -0.1])
    def test_a_level_out_of_range_is_refused(self, alpha):
        with pytest.raises(ValueError, match="alpha"):
            compare_paired(torch.zeros(4, 1), torch.zeros(4, 1), alpha=alpha, generator=seeded(0))

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match="incumbent"):
            compare_paired(torch.zeros(4, 1), torch.zeros(4, 2), alpha=0.1, generator=seeded(0))


def binary(seed, num, agree):
    """Two arms of equal quality whose 0/1 scores agree on most items."""
    generator = seeded(seed)
    low = (torch.rand(num, 3, generator=generator) < 0.4).float()
    fresh = (torch.rand(num, 3, generator=generator) < 0.4).float()
    return torch.where(torch.rand(num, 3, generator=generator) < agree, low, fresh), low


def skewed(seed, num, share):
    """Equal means: a few items lose much, many win a little."""
    generator = seeded(seed)
    loses = torch.rand(num, 1, generator=generator) < share
    return torch.where(loses, -1.0, share / (1 - share)), torch.zeros(num, 1)


def gaussian(seed, num, spread):
    generator = seeded(seed)
    return spread * torch.randn(num, 2, generator=generator), torch.zeros(num, 2)


NULLS = {
    "binary, often equal": lambda seed: binary(seed, 60, 0.9),
    "binary, independent": lambda seed: binary(seed, 60, 0.0),
    "binary, few items": lambda seed: binary(seed, 12, 0.5),
    "gaussian": lambda seed: gaussian(seed, 20, 0.3),
    "skewed": lambda seed: skewed(seed, 200, 0.2),
}


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("trials", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_what_is_not_better_is_accepted_at_most_as_often_as_the_level_says(null, trials):
    alpha = 0.05
    accepted = sum(
        compare_paired(*NULLS[null](seed), alpha=alpha, generator=seeded(seed + 10**6)).accepted
        for seed in range(trials)
    )
    assert accepted <= trials * alpha + 3 * math.sqrt(trials * alpha * (1 - alpha)), accepted / trials


def test_what_is_better_is_found():
    found = 0
    for seed in range(60):
        high, low = binary(seed, 80, 0.9)
        better = (high + (torch.rand(80, 3, generator=seeded(seed + 1)) < 0.15)).clamp(max=1)
        found += compare_paired(better, low, alpha=0.005, generator=seeded(seed)).accepted
    assert found >= 50
