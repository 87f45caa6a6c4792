"""Laws of reward diagnostics: closed forms, slow loops, scipy, simulations, and what must not change the numbers."""

import itertools
import json
import math
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import pdist

from lensmini.objectives.policy import count_groups
from lensmini.rewards import (
    Aggregate,
    Verdict,
    aggregate,
    control_pictures,
    describe_step,
    lens_rubric,
    to_matrix,
)
from lensmini.rewards.diagnostics import (
    correlate_criteria,
    describe_controls,
    describe_coverage,
    describe_criteria,
    describe_groups,
    disagreement_of_flips,
    flip_rate,
    flip_reliability,
    flips_of_disagreement,
    group_diversity,
    judge_agreement,
    judge_reliability,
    length_bias,
    read_table,
    resolution_bias,
    reward_agreement,
    reward_histogram,
    reward_std,
    text_picture,
    velocity_norm_ratio,
    verdict_noise,
    wilson_interval,
    within_group_trend,
)
from lensmini.rewards.diagnostics.estimates import (
    average_ranks,
    group_members,
    line_slope,
    mean_interval,
    rank_correlation,
    t_quantile,
    within_group_variance,
)
from tests.strategies import seeds

NAMES = ["count", "position", "colour", "text", "style", "structure"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(num, width, seed, missing=0.3, levels=2):
    """Scores, validity, ragged groups (some of one), weights with holes, pitfalls."""
    g = seeded(seed)
    scores = torch.randint(0, levels + 1, (num, width), generator=g).double() / levels
    valid = torch.rand(num, width, generator=g) >= missing
    group = torch.randint(-2, 3, (num,), generator=g) * 7
    # Whether a criterion is there, and is a pitfall, depends on the rubric, which the group has.
    weights = torch.randint(0, 3, (5, width), generator=g).double()[group // 7 + 2]
    pitfalls = (torch.rand(5, width, generator=g) < 0.3)[group // 7 + 2]
    return torch.where(valid, scores, math.nan), valid, group, weights, pitfalls


def close(value, expected, tolerance=1e-9):
    assert (value is None) == (expected is None), (value, expected)
    if expected is not None:
        assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)


class TestEstimates:
    @given(st.integers(1, 60), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
    def test_wilson_interval_is_scipys(self, total, share, level):
        successes = round(share * total)
        expected = stats.binomtest(successes, total).proportion_ci(level, method="wilson")
        got = wilson_interval(successes, total, level=level)
        assert got == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert wilson_interval(0, 0) is None

    @pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
    @pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 101, 2000])
    def test_student_quantile_is_scipys(self, degrees, level):
        assert t_quantile(degrees, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, degrees), rel=1e-9)

    @given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
    def test_ranks_are_scipys_and_ties_share_them(self, values):
        got = average_ranks(torch.tensor(values, dtype=torch.float64))
        np.testing.assert_allclose(got.numpy(), stats.rankdata(values))

    @given(st.integers(2, 20), seeds())
    def test_rank_correlation_is_scipys(self, num, seed):
        x, y = torch.randint(0, 5, (2, num), generator=seeded(seed)).double()
        constant = bool((x == x[0]).all() or (y == y[0]).all())
        expected = None if constant else stats.spearmanr(x.numpy(), y.numpy()).statistic
        close(rank_correlation(x, y), expected)

    @given(st.integers(3, 20), seeds(), st.sampled_from([0.9, 0.99]))
    def test_slope_and_its_interval_are_scipys(self, num, seed, level):
        x, y = torch.randn(2, num, generator=seeded(seed), dtype=torch.float64).tolist()
        expected = stats.linregress(x, y)
        half = stats.t.ppf(0.5 + level / 2, num - 2) * expected.stderr
        got = line_slope(x, y, level=level)
        assert (got["slope"], got["low"], got["high"]) == pytest.approx(
            (expected.slope, expected.slope - half, expected.slope + half), rel=1e-6, abs=1e-9
        )

    def test_a_line_through_too_few_points_has_no_interval(self):
        assert line_slope([], [])["slope"] is None
        assert line_slope([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])["slope"] is None
        assert line_slope([0.0, 2.0], [1.0, 5.0]) == {"slope": 2.0, "low": None, "high": None, "count": 2}

    @given(st.integers(2, 12), seeds())
    def test_interval_of_a_mean_is_students(self, num, seed):
        values = torch.randn(num, generator=seeded(seed), dtype=torch.float64).tolist()
        low, high = stats.t.interval(0.95, num - 1, loc=np.mean(values), scale=stats.sem(values))
        got = mean_interval(values)
        assert (got["low"], got["high"]) == pytest.approx((low, high))
        assert mean_interval([])["mean"] is None and mean_interval([3.0])["high"] is None

    @given(st.integers(0, 12), seeds())
    def test_variance_inside_groups_by_hand(self, num, seed):
        g = seeded(seed)
        values, group = torch.rand(num, generator=g), torch.randint(-1, 4, (num,), generator=g)
        squares, degrees = 0.0, 0
        for name in set(group.tolist()):
            mates = [float(v) for v, owner in zip(values, group, strict=True) if owner == name]
            mean = sum(mates) / len(mates)
            squares += sum((v - mean) ** 2 for v in mates)
            degrees += len(mates) - 1
        got = within_group_variance(values, group)
        assert got[1] == degrees
        close(got[0], squares / degrees if degrees else None)

    @given(st.lists(st.integers(-3, 3), max_size=12))
    def test_members_are_every_index_once(self, ids):
        found = group_members(torch.tensor(ids, dtype=torch.int64))
        expected = [[i for i, name in enumerate(ids) if name == wanted] for wanted in sorted(set(ids))]
        assert [rows.tolist() for rows in found] == expected


def slow_criteria(scores, valid, group, weights, pitfalls, names):
    """Name by name and group by group, in plain numbers."""
    out = {}
    for wanted in dict.fromkeys(name for row in names for name in row):
        due, cells = 0, {}
        for i, row in enumerate(names):
            for k, name in enumerate(row):
                if name != wanted or weights[i, k] == 0:
                    continue
                due += 1
                if valid[i, k]:
                    score = float(scores[i, k])
                    cells.setdefault((int(group[i]), k), []).append(1 - score if pitfalls[i, k] else score)
        known = [score for cell in cells.values() for score in cell]
        plural = [cell for cell in cells.values() if len(cell) > 1]
        squares = sum((score - sum(cell) / len(cell)) ** 2 for cell in plural for score in cell)
        degrees = sum(len(cell) - 1 for cell in plural)
        out[wanted] = {
            "pass_rate": sum(known) / len(known) if known else None,
            "spread": math.sqrt(squares / degrees) if degrees else None,
            "valid_fraction": len(known) / due if due else None,
            "due": due,
            "valid": len(known),
            "constant_share": sum(len(set(cell)) == 1 for cell in plural) / len(plural) if plural else None,
        }
    return out


class TestCriteria:
    @given(st.integers(1, 12), st.integers(1, 5), seeds(), st.booleans())
    def test_it_is_the_definition_name_by_name(self, num, width, seed, repeated):
        scores, valid, group, weights, pitfalls = draw(num, width, seed, levels=2)
        g = seeded(seed + 1)
        # Rubrics of different lengths, in which a category may come twice.
        lengths = torch.randint(0, width + 1, (5,), generator=g)
        pool = ["a", "b"] if repeated else NAMES
        by_group = [[pool[(k + shift) % len(pool)] for k in range(int(lengths[shift]))] for shift in range(5)]
        names = [by_group[int(name) // 7 + 2] for name in group]
        got = describe_criteria(read_table(scores, valid, group, weights=weights, pitfalls=pitfalls), names)
        expected = slow_criteria(scores, valid, group, weights, pitfalls, names)
        assert list(got) == list(expected)
        for name, numbers in expected.items():
            for key, value in numbers.items():
                close(got[name][key], value)

    def test_spread_inside_groups_is_blind_to_hard_prompts(self):
        scores = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0], [0.0]])
        table = read_table(scores, scores >= 0, torch.tensor([0, 0, 0, 1, 1, 1]))
        found = describe_criteria(table, ["count"])["count"]
        assert found["pass_rate"] == 0.5 and found["spread"] == 0 and found["constant_share"] == 1

    def test_causes_are_counted_by_criterion_and_only_where_something_is_due(self):
        valid = torch.tensor([[False, False], [False, True], [True, False]])
        weights = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
        table = read_table(torch.ones(3, 2), valid, torch.tensor([0, 0, 0]), weights=weights)
        causes = [["timeout", "refusal"], ["timeout", None], [None, "http"]]
        found = describe_criteria(table, ["count", "text"], causes=causes)
        assert found["count"]["causes"] == {"timeout": 2} and found["text"]["causes"] == {"refusal": 1}
        assert describe_criteria(table, ["count", "text"])["count"]["causes"] is None
        coverage = describe_coverage(table, causes)
        assert coverage["due"] == 5 and coverage["valid"] == 2 and coverage["fraction"] == 0.4
        assert coverage["causes"] == {"timeout": 2, "refusal": 1}
        assert coverage["shares"] == {"timeout": 0.4, "refusal": 0.2}
        assert describe_coverage(table)["causes"] == {"unknown": 3}
        assert describe_coverage(table, {"timeout": 1, "http": 0})["causes"] == {"timeout": 1, "unknown": 2}

    @given(st.integers(2, 14), st.integers(2, 5), seeds(), st.booleans())
    def test_correlation_is_numpys_over_the_pictures_of_each_pair(self, num, width, seed, within):
        scores, valid, group, _, _ = draw(num, width, seed, levels=4)
        got = correlate_criteria(read_table(scores, valid, group), NAMES[:width], within_groups=within)
        order = [NAMES.index(name) for name in got["ids"]]
        for (i, a), (j, b) in itertools.product(enumerate(order), repeat=2):
            both = valid[:, a] & valid[:, b]
            x, y, owner = (t[both].numpy().copy() for t in (scores[:, a], scores[:, b], group))
            for name in set(owner.tolist()) if within else ():
                for column in (x, y):
                    column[owner == name] -= column[owner == name].mean()
            defined = len(x) > 1 and np.ptp(x) > 1e-9 and np.ptp(y) > 1e-9
            close(got["matrix"][i][j], np.corrcoef(x, y)[0, 1] if defined else None, 1e-6)

    def test_correlation_keeps_the_criteria_that_are_known_most_often(self):
        valid = torch.tensor([[True, False, True]] * 3 + [[True, True, True]])
        table = read_table(torch.ones(4, 3), valid, torch.tensor([0, 0, 1, 1]))
        assert correlate_criteria(table, ["a", "b", "c"], most=2)["ids"] == ["a", "c"]

    def test_a_name_twice_in_one_picture_is_no_criterion(self):
        table = read_table(torch.ones(1, 2), torch.ones(1, 2) > 0, torch.tensor([0]))
        with pytest.raises(ValueError, match="at most once"):
            correlate_criteria(table, ["a", "a"])
        assert describe_criteria(table, ["a", "a"])["a"]["due"] == 2

    @given(st.integers(0, 30), st.integers(1, 12), seeds())
    def test_histogram_is_numpys(self, num, bins, seed):
        values = torch.randint(-2, 14, (num,), generator=seeded(seed)).double() / 11
        got = reward_histogram(values, bins=bins)
        counts, edges = np.histogram(values[(values >= 0) & (values <= 1)].numpy(), bins, (0, 1))
        assert sum(got["counts"]) + got["below"] + got["above"] == num
        assert got["below"] == int((values < 0).sum())
        if bins in (1, 2, 4, 8):  # edges that floating point has exactly; elsewhere both round as they like
            assert got["counts"] == counts.tolist()
        np.testing.assert_allclose(got["edges"], edges)

    @given(st.integers(0, 14), seeds())
    def test_groups_are_counted_as_the_advantages_see_them(self, num, seed):
        g = seeded(seed)
        rewards, group = torch.randint(0, 2, (num,), generator=g).float(), torch.randint(-1, 4, (num,), generator=g)
        valid = torch.rand(num, generator=g) < 0.7
        got = describe_groups(torch.where(valid, rewards, math.nan), valid, group)
        expected = count_groups(rewards, group, mask=valid)._asdict()
        assert got["total"] == expected["groups"]
        assert all(got[kind] == expected[kind] for kind in ("informative", "constant", "single", "empty"))
        compared = expected["informative"] + expected["constant"]
        close(got["constant_share"], expected["constant"] / compared if compared else None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"valid": torch.ones(2, 2)}, "bool"),
            ({"group": torch.zeros(2)}, "integer"),
            ({"group": torch.zeros(3).long()}, "group"),
            ({"scores": torch.full((2, 2), 1.5)}, r"\[0, 1\]"),
            ({"scores": torch.full((2, 2), math.nan)}, r"\[0, 1\]"),
            ({"weights": torch.ones(2, 3)}, "weights"),
            ({"pitfalls": torch.ones(2, 2)}, "pitfalls"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(self, change, message):
        given_ = {"scores": torch.ones(2, 2), "valid": torch.ones(2, 2) > 0, "group": torch.zeros(2).long()} | change
        with pytest.raises(ValueError, match=message):
            describe_step(**given_)
        with pytest.raises(ValueError, match="names"):
            describe_criteria(read_table(torch.ones(2, 2), torch.ones(2, 2) > 0, torch.zeros(2).long()), ["one"])


def judged(p, q, shape, seed, repeats=1):
    """Binary truths that pass with p, and what a judge says that flips each answer with q."""
    g = seeded(seed)
    truth = torch.rand(shape, generator=g, dtype=torch.float64) < p
    flips = torch.rand(repeats, *shape, generator=g) < q
    return truth.double(), (truth ^ flips).double()


class TestReliability:
    @pytest.mark.parametrize(("p", "expected"), [(0.5, 0.151), (0.8, 0.121), (0.95, 0.066)])
    def test_spread_of_eleven_criteria_by_formula_and_by_simulation(self, p, expected):
        truth, _ = judged(p, 0.0, (200_000, 11), 1)
        assert round(reward_std(p, 11), 3) == expected
        assert float(truth.mean(1).std()) == pytest.approx(math.sqrt(p * (1 - p) / 11), abs=6e-4)

    @pytest.mark.parametrize(("q", "expected"), [(0.02, 0.042), (0.05, 0.066), (0.10, 0.090)])
    def test_flips_add_noise_and_shrink_the_signal_by_formula_and_by_simulation(self, q, expected):
        truth, said = judged(0.7, q, (200_000, 11), 2)
        true, seen = truth.mean(1), said[0].mean(1)
        assert round(reward_std(q, 11), 3) == expected
        slope = stats.linregress(true.numpy(), seen.numpy()).slope
        assert slope == pytest.approx(1 - 2 * q, abs=5e-3)
        noise = seen - (q + (1 - 2 * q) * true)
        assert float(noise.std()) == pytest.approx(math.sqrt(q * (1 - q) / 11), abs=6e-4)

    @pytest.mark.parametrize(("p", "q"), [(0.5, 0.05), (0.8, 0.1), (0.95, 0.05), (0.95, 0.02)])
    def test_reliability_is_the_correlation_of_two_judgements(self, p, q):
        _, said = judged(p, q, (200_000, 11), 3, repeats=2)
        first, second = said.mean(2).numpy()
        assert flip_reliability(p, q) == pytest.approx(np.corrcoef(first, second)[0, 1], abs=0.01)

    def test_five_flips_in_a_hundred_make_most_of_a_good_policys_reward_noise(self):
        assert flip_reliability(0.95, 0.05) < 0.5 < flip_reliability(0.8, 0.05)
        assert flip_reliability(0.7, 0.0) == 1.0
        assert flip_reliability(0.7, 0.5) == 0.0 and flip_reliability(1.0, 0.0) == 0.0

    @given(st.floats(0, 0.5))
    def test_disagreement_and_flips_are_inverse(self, q):
        assert flips_of_disagreement(disagreement_of_flips(q)) == pytest.approx(q, abs=1e-7)

    def test_disagreement_is_that_of_all_four_cases(self):
        for q in (0.0, 0.1, 0.37, 0.5, 1.0):
            cases = itertools.product([False, True], repeat=2)
            chance = sum((q if a else 1 - q) * (q if b else 1 - q) for a, b in cases if a != b)
            assert disagreement_of_flips(q) == pytest.approx(chance)
        assert flips_of_disagreement(0.7) == 0.5
        assert flips_of_disagreement(1e-12) == pytest.approx(5e-13, rel=1e-6)

    def test_the_interval_of_the_flip_rate_covers_it(self):
        for q in (0.02, 0.1):
            covered = 0
            for seed in range(400):
                _, said = judged(0.8, q, (150, 1), seed, repeats=2)
                found = flip_rate(said, said >= 0)
                covered += found["low"] <= q <= found["high"]
            assert 0.925 <= covered / 400 <= 0.99

    @given(st.integers(2, 4), st.integers(1, 5), seeds())
    def test_more_repeats_are_all_their_pairs(self, repeats, num, seed):
        g = seeded(seed)
        scores = torch.randint(0, 2, (repeats, num, 2), generator=g).double()
        valid = torch.rand(repeats, num, 2, generator=g) < 0.7
        shares, pairs, variances = [], 0, []
        for i, k in itertools.product(range(num), range(2)):
            said = [float(scores[r, i, k]) for r in range(repeats) if valid[r, i, k]]
            if len(said) > 1:
                differing = [a != b for a, b in itertools.combinations(said, 2)]
                pairs += len(differing)
                shares.append(sum(differing) / len(differing))
                variances.append(statistics.variance(said))
        hidden = torch.where(valid, scores, math.nan)
        got, noise = flip_rate(hidden, valid), verdict_noise(hidden, valid)
        assert (got["verdicts"], got["pairs"], noise[1]) == (len(shares), pairs, len(shares))
        close(got["disagreement"], statistics.fmean(shares) if shares else None)
        close(noise[0], statistics.fmean(variances) if variances else None)
        # An unbiased variance of binary answers is half their disagreement, for any number of repeats.
        close(noise[0], got["disagreement"] / 2 if shares else None)

    @given(st.integers(1, 6), seeds())
    def test_flips_of_a_criterion_are_those_of_its_own_verdicts(self, num, seed):
        g = seeded(seed)
        scores, valid = torch.randint(0, 2, (3, num, 3), generator=g).double(), torch.rand(3, num, 3, generator=g) < 0.7
        table = read_table(scores[0], valid[0], torch.zeros(num).long())
        found = describe_criteria(table, ["a", "b", "a"], repeats=(scores, valid))
        for name, columns in (("a", [0, 2]), ("b", [1])):
            assert found[name]["flips"] == flip_rate(scores[:, :, columns], valid[:, :, columns])

    def test_reliability_from_repeats_is_the_closed_form(self):
        truth, said = judged(0.8, 0.1, (40_000, 11), 5, repeats=2)
        noise, _ = verdict_noise(said, said >= 0)
        assert noise == pytest.approx(0.09, abs=2e-3)
        group = torch.zeros(40_000).long()
        found = judge_reliability(said[0].mean(1), group, noise, weights=torch.ones_like(truth))
        assert found["within"] == pytest.approx(flip_reliability(0.8, 0.1), abs=0.02)
        assert found["noise_std"] == pytest.approx(0.0905, abs=1e-3)
        each = judge_reliability(said[0].mean(1), group, torch.full_like(truth, noise), weights=torch.ones_like(truth))
        assert each["within"] == pytest.approx(found["within"])

    def test_hard_prompts_do_not_make_a_judge_reliable(self):
        group = torch.arange(400).repeat_interleave(24)
        pass_rates = torch.where(group % 2 == 0, 0.2, 0.9)[:, None].expand(-1, 11)
        _, said = judged(pass_rates, 0.1, (9600, 11), 6, repeats=2)
        rewards, noise = said[0].mean(1), verdict_noise(said, said >= 0)[0]
        found = judge_reliability(rewards, group, noise, weights=torch.ones(9600, 11))
        # Inside a group of pass rate p the total is p'(1 - p')/11, of which q(1 - q)/11 is noise; the mean of both kinds.
        seen = [p + 0.1 - 0.2 * p for p in (0.2, 0.9)]
        expected = 1 - 0.09 / statistics.fmean(p * (1 - p) for p in seen)
        assert found["within"] == pytest.approx(expected, abs=0.03)
        assert found["overall"] > found["within"] + 0.2

    def test_weights_enter_the_noise_squared(self):
        rewards, group = torch.tensor([0.0, 1.0]), torch.tensor([3, 3])
        found = judge_reliability(rewards, group, 0.04, weights=torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]))
        assert found["noise_std"] ** 2 == pytest.approx(0.04 * 10 / 16)
        assert found["within"] == pytest.approx(1 - 0.025 / 0.5)

    def test_nothing_to_compare_is_none(self):
        empty = flip_rate(torch.zeros(1, 3, 2), torch.ones(1, 3, 2) > 0)
        assert empty["q"] is None and empty["verdicts"] == 0
        flat = judge_reliability(torch.ones(3), torch.zeros(3).long(), 0.1, weights=torch.ones(3, 2))
        assert flat["within"] is None and flat["overall_std"] == 0
        alone = judge_reliability(torch.rand(3), torch.arange(3), 0.1, weights=torch.ones(3, 2))
        assert alone["within"] is None and alone["overall"] is not None


class TestBias:
    def test_hard_prompts_with_large_pictures_do_not_pass_for_an_effect_of_size(self):
        sizes = torch.tensor([[256, 256], [512, 512], [512, 512], [1024, 1024]])
        rewards, group = torch.tensor([0.9, 0.9, 0.2, 0.2]), torch.tensor([0, 0, 1, 1])
        together = stats.linregress([16, 18, 18, 20], rewards.tolist()).slope
        found = resolution_bias(rewards, sizes, group)
        assert together < -0.1 and found["area"]["slope"] == pytest.approx(0.0, abs=1e-12)

    @given(seeds(), st.integers(2, 6))
    def test_slope_is_that_of_a_regression_with_a_level_for_each_group(self, seed, groups):
        g = seeded(seed)
        group = torch.cat([torch.arange(groups), torch.randint(0, groups, (20,), generator=g)])
        x, y = torch.randn(2, len(group), generator=g, dtype=torch.float64)
        levels = (group[:, None] == torch.arange(groups)).double()
        design = torch.cat([x[:, None], levels], 1).numpy()
        solved, *_ = np.linalg.lstsq(design, y.numpy(), rcond=None)
        found = within_group_trend(y, x, group)
        assert found["slope"] == pytest.approx(solved[0], abs=1e-9)
        # The sandwich over groups, written out as matrices.
        rest, bread, meat = y.numpy() - design @ solved, np.linalg.pinv(design.T @ design), 0.0
        used = 0
        for name in range(groups):
            rows = group.numpy() == name
            if rows.sum() > 1:
                used += 1
            moment = design[rows].T @ rest[rows]
            meat = meat + np.outer(moment, moment)
        if used > 1:
            error = math.sqrt((bread @ meat @ bread)[0, 0] * used / (used - 1))
            half = stats.t.ppf(0.975, used - 1) * error
            assert found["slope_high"] - found["slope"] == pytest.approx(half, rel=1e-6, abs=1e-9)
            assert found["slope"] - found["slope_low"] == pytest.approx(half, rel=1e-6, abs=1e-9)
        assert found["groups"] == used

    @given(seeds())
    def test_rank_correlation_is_the_mean_of_the_groups(self, seed):
        g = seeded(seed)
        group, x = torch.randint(0, 4, (24,), generator=g), torch.randint(0, 4, (24,), generator=g).double()
        y = torch.randint(0, 3, (24,), generator=g).double()
        ranks = []
        for name in range(4):
            a, b = x[group == name].numpy(), y[group == name].numpy()
            if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0:
                ranks.append(stats.spearmanr(a, b).statistic)
        found = within_group_trend(y, x, group)
        close(found["rank_correlation"], statistics.fmean(ranks) if ranks else None)
        if len(ranks) > 1:
            low, high = stats.t.interval(0.95, len(ranks) - 1, loc=np.mean(ranks), scale=stats.sem(ranks))
            assert (found["rank_low"], found["rank_high"]) == pytest.approx((low, high), nan_ok=True)

    @pytest.mark.slow
    def test_the_interval_covers_the_truth_although_groups_differ_in_slope_and_noise(self):
        covered, group = 0, torch.arange(20).repeat_interleave(8)
        for seed in range(150):
            g = seeded(seed)
            x = torch.randn(160, generator=g, dtype=torch.float64)
            slopes = 0.1 + 0.1 * torch.randn(20, generator=g, dtype=torch.float64)
            noise = (0.2 + torch.rand(20, generator=g, dtype=torch.float64))[group]
            y = slopes[group] * x + noise * torch.randn(160, generator=g, dtype=torch.float64)
            found = within_group_trend(y, x, group)
            covered += found["slope_low"] <= 0.1 <= found["slope_high"]
        assert 0.9 <= covered / 150 <= 0.99

    def test_area_aspect_and_elongation_mean_what_they_say(self):
        sizes = torch.tensor([[1024, 1024], [2048, 1024], [1024, 2048], [2048, 2048]])
        group = torch.zeros(4).long()
        area = resolution_bias(torch.tensor([0.0, 0.1, 0.1, 0.2]), sizes, group)
        assert area["area"]["slope"] == pytest.approx(0.1) and area["aspect"]["slope"] == pytest.approx(0)
        wide = resolution_bias(torch.tensor([0.5, 0.4, 0.6, 0.5], dtype=torch.float64), sizes, group)
        assert wide["aspect"]["slope"] == pytest.approx(0.1) and wide["elongation"]["slope"] == pytest.approx(0)
        long = resolution_bias(torch.tensor([0.0, 0.3, 0.3, 0.0]), sizes, group)
        assert long["elongation"]["slope"] == pytest.approx(0.3) and long["elongation"]["rank_correlation"] == 1

    def test_length_is_compared_between_prompts(self):
        g = seeded(4)
        group = torch.arange(12).repeat_interleave(5)
        lengths = torch.randint(10, 200, (12,), generator=g)[group]
        rewards = torch.rand(60, generator=g, dtype=torch.float64) - 0.002 * lengths
        means = [float(rewards[group == name].mean()) for name in range(12)]
        x = [int(lengths[group == name][0]) for name in range(12)]
        expected, found = stats.linregress(x, means), length_bias(rewards, lengths, group)
        assert found["slope"] == pytest.approx(expected.slope) and found["groups"] == 12
        assert found["slope_high"] == pytest.approx(expected.slope + stats.t.ppf(0.975, 10) * expected.stderr)
        rank = stats.spearmanr(x, means).statistic
        half = 1.959964 * math.sqrt((1 + rank**2 / 2) / 9)
        assert found["rank_correlation"] == pytest.approx(rank)
        assert found["rank_high"] == pytest.approx(math.tanh(math.atanh(rank) + half), abs=1e-6)

    def test_pictures_of_one_size_and_lonely_groups_say_nothing(self):
        sizes = torch.full((3, 2), 512)
        assert resolution_bias(torch.rand(3), sizes, torch.zeros(3).long())["area"]["slope"] is None
        assert within_group_trend(torch.rand(3), torch.rand(3), torch.arange(3))["groups"] == 0
        one = within_group_trend(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3).long())
        assert one["slope"] == pytest.approx(1.5) and one["slope_low"] is None
        assert length_bias(torch.rand(0), torch.rand(0), torch.zeros(0).long())["slope"] is None


class TestAgreement:
    def test_cohens_kappa_of_a_table_that_everybody_knows(self):
        # 20 both yes, 5 and 10 one of them, 15 both no: accuracy .7, chance .5, kappa .4.
        one = torch.tensor([1.0] * 25 + [0.0] * 25)[:, None]
        other = torch.tensor([1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15)[:, None]
        everywhere = one >= 0
        found = judge_agreement(one, everywhere, other, everywhere, torch.arange(50), generator=seeded(0))
        assert found["accuracy"] == pytest.approx(0.7) and found["kappa"] == pytest.approx(0.4)
        assert (found["pass_rate"], found["other_pass_rate"], found["pairs"]) == (0.5, pytest.approx(0.6), 50)
        # The bootstrap's spread is that of the formula: sqrt(.7 .3 / 50), within a tenth.
        width = (found["accuracy_high"] - found["accuracy_low"]) / (2 * 1.96)
        assert width == pytest.approx(math.sqrt(0.21 / 50), rel=0.12)

    def test_at_a_high_pass_rate_chance_looks_like_agreement(self):
        g = seeded(1)
        one, other = (torch.rand(2000, 11, generator=g) < 0.95 for _ in range(2))
        everywhere, group = torch.ones(2000, 11) > 0, torch.arange(2000) // 20
        found = judge_agreement(one.double(), everywhere, other.double(), everywhere, group, generator=seeded(0))
        assert found["accuracy"] > 0.89 and abs(found["kappa"]) < 0.03
        assert found["kappa_low"] < 0 < found["kappa_high"]

    def test_only_what_both_know_is_compared(self):
        one, other = torch.tensor([[1.0, math.nan, 0.0]]), torch.tensor([[1.0, 0.0, math.nan]])
        found = judge_agreement(one, one.isfinite(), other, other.isfinite(), torch.tensor([0]), generator=seeded(0))
        assert found["pairs"] == 1 and found["accuracy"] == 1 and found["kappa"] is None
        assert found["accuracy_low"] is None

    def test_the_bootstrap_is_over_groups(self):
        # Verdicts of a group are copies: 20 groups of 50 carry no more than 20 verdicts.
        g = seeded(2)
        agree = torch.rand(20, generator=g) < 0.7
        other = torch.where(agree, 1.0, 0.0).repeat_interleave(50)[:, None]
        one, everywhere = torch.ones_like(other), torch.ones_like(other) > 0
        group = torch.arange(20).repeat_interleave(50)
        found = judge_agreement(one, everywhere, other, everywhere, group, generator=seeded(0), num_resamples=4000)
        share = float(agree.double().mean())
        width = (found["accuracy_high"] - found["accuracy_low"]) / (2 * 1.96)
        assert width == pytest.approx(math.sqrt(share * (1 - share) / 20), rel=0.12)

    def test_rewards_agree_by_rank_inside_groups(self):
        rewards = torch.tensor([0.1, 0.2, 0.3, 5.0, 6.0, 7.0, 9.0])
        other = torch.tensor([9.0, 9.5, 9.7, 0.1, 0.0, -1.0, 4.0])
        found = reward_agreement(rewards, other, torch.tensor([0, 0, 0, 1, 1, 1, 2]), generator=seeded(0))
        assert found["rank_correlation"] == 0 and found["groups"] == 2  # +1 and -1; the lonely one says nothing
        assert (found["rank_correlation_low"], found["rank_correlation_high"]) == (-1, 1)
        again = reward_agreement(rewards, other, torch.tensor([0, 0, 0, 1, 1, 1, 2]), generator=seeded(0))
        assert again == found
        none = reward_agreement(rewards[:0], other[:0], torch.zeros(0).long(), generator=seeded(0))
        assert none["rank_correlation"] is None


class TestControls:
    def pictures(self):
        g = seeded(0)
        return [
            torch.randint(256, (3, *size), generator=g, dtype=torch.uint8) for size in ((16, 24), (24, 16), (20, 20))
        ]

    def test_every_kind_stands_in_for_a_picture_of_its_size(self):
        pictures, base = self.pictures(), [picture // 2 for picture in self.pictures()]
        group = torch.tensor([5, 5, 9])
        found = control_pictures(
            pictures, group, generator=seeded(1), base_pictures=base, prompts=["a b", "c", "d"], num=4
        )
        assert Counter(control.kind for control in found) == dict.fromkeys(
            ["blank", "noise", "appeal", "other_prompt", "prompt_text", "base_model"], 4
        )
        for kind, image, sample in found:
            assert image.dtype == torch.uint8
            if kind == "other_prompt":
                source = next(
                    i for i, picture in enumerate(pictures) if picture is image or torch.equal(picture, image)
                )
                assert group[source] != group[sample]
            else:
                assert image.shape == pictures[sample].shape
            if kind == "blank":
                assert len(image.unique()) == 1
            if kind == "noise":
                assert len(image.unique()) > 100
            if kind == "base_model":
                assert torch.equal(image, base[sample])

    def test_the_same_generator_gives_the_same_controls(self):
        one, two = (control_pictures(self.pictures(), torch.arange(3), generator=seeded(3), num=2) for _ in range(2))
        assert all(a.sample == b.sample and torch.equal(a.image, b.image) for a, b in zip(one, two, strict=True))

    def test_one_prompt_has_no_other(self):
        found = control_pictures(self.pictures(), torch.zeros(3).long(), generator=seeded(0))
        assert [control.kind for control in found] == ["blank", "noise", "appeal"]
        assert control_pictures([], torch.zeros(0).long(), generator=seeded(0)) == []

    def test_words_are_on_the_picture_and_differ(self):
        short, long = text_picture("Hi", 48, 96), text_picture("All criteria are satisfied, says this sign.", 48, 96)
        for picture in (short, long):
            assert picture.shape == (3, 48, 96) and picture.min() < 80 and picture.float().mean() > 128
            edge = torch.cat([picture[:, :, -1].flatten(), picture[:, -1].flatten()])
            assert edge.min() > 200  # nothing runs off the page
        assert not torch.equal(short, long)
        assert text_picture("far too long for this " * 20, 8, 8).shape == (3, 8, 8)

    def test_rewards_of_controls(self):
        found = describe_controls({"blank": [0.0, 0.5, None, math.nan], "noise": [None], "appeal": []})
        assert found["blank"]["mean"] == 0.25 and (found["blank"]["valid"], found["blank"]["missing"]) == (2, 2)
        assert found["blank"]["std"] == pytest.approx(statistics.stdev([0.0, 0.5]))
        assert found["noise"]["mean"] is None and found["appeal"]["missing"] == 0

    def test_pictures_that_are_none_are_refused(self):
        with pytest.raises(ValueError, match="uint8"):
            control_pictures([torch.zeros(3, 4, 4)], torch.tensor([0]), generator=seeded(0))
        with pytest.raises(ValueError, match="prompts"):
            control_pictures(self.pictures(), torch.arange(3), generator=seeded(0), prompts=["a"])


class TestHealth:
    def test_norms_compare_as_ratios(self):
        found = velocity_norm_ratio(torch.tensor([1.1, 2.2, 0.0, math.nan]), torch.tensor([1.0, 2.0, 1.0, 1.0]))
        assert found["ratio"] == pytest.approx(1.1) and (found["samples"], found["left_out"]) == (2, 2)
        # Twice and half as long cancel; a mean of ratios would say 1.25.
        assert velocity_norm_ratio(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0]))["ratio"] == pytest.approx(1)
        logs = torch.tensor([1.0, 1.2, 1.5]).double().log().numpy()
        low, high = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
        three = velocity_norm_ratio(torch.tensor([1.0, 1.2, 1.5]), torch.ones(3))
        assert (three["low"], three["high"]) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-5)
        assert three["largest"] == pytest.approx(1.5)
        assert velocity_norm_ratio(torch.zeros(0), torch.zeros(0))["ratio"] is None

    @given(st.integers(0, 12), seeds())
    def test_diversity_is_the_mean_distance_of_each_group_and_then_of_groups(self, num, seed):
        g = seeded(seed)
        features, group = torch.randn(num, 3, generator=g).double(), torch.randint(0, 4, (num,), generator=g)
        expected = {}
        for name in range(4):
            rows = features[group == name].numpy()
            if len(rows) > 1:
                expected[str(name)] = float(pdist(rows).mean())
        found = group_diversity(features, group)
        assert found["by_group"] == pytest.approx(expected) and found["groups"] == len(expected)
        close(found["mean"], statistics.fmean(expected.values()) if expected else None)

    def test_twins_have_no_distance(self):
        assert group_diversity(torch.full((4, 8), 1e4), torch.zeros(4).long())["mean"] == 0
        with pytest.raises(ValueError, match="finite"):
            group_diversity(torch.tensor([[math.nan]]), torch.tensor([0]))


def full(num, width, seed):
    """Every argument of a step, from a seed."""
    scores, valid, group, weights, pitfalls = draw(num, width, seed)
    g = seeded(seed + 7)
    rand = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64)  # noqa: E731
    again = torch.randint(0, 2, (num, width), generator=g).double()
    return {
        "scores": scores,
        "valid": valid,
        "group": group,
        "weights": weights,
        "pitfalls": pitfalls,
        "criterion_ids": [NAMES[:width]] * num,
        "categories": [(["layout", "look"] * width)[:width]] * num,
        "causes": [[None if known else "timeout" for known in row] for row in valid.tolist()],
        "heldout_rewards": rand(num),
        "heldout_valid": rand(num) < 0.6,
        "repeat_scores": again,
        "repeat_valid": rand(num, width) < 0.5,
        "image_sizes": torch.randint(1, 4, (num, 2), generator=g) * 256,
        "prompt_lengths": (group.abs() + 3) * 10,
        "velocity_norms": rand(num) + 0.5,
        "reference_norms": rand(num) + 0.5,
        "features": rand(num, 4),
    }


ROWS = [
    "scores",
    "valid",
    "group",
    "weights",
    "pitfalls",
    "criterion_ids",
    "categories",
    "causes",
    "heldout_rewards",
    "heldout_valid",
    "repeat_scores",
    "repeat_valid",
    "image_sizes",
    "prompt_lengths",
    "velocity_norms",
    "reference_norms",
    "features",
]
COLUMNS = [
    "scores",
    "valid",
    "weights",
    "pitfalls",
    "criterion_ids",
    "categories",
    "causes",
    "repeat_scores",
    "repeat_valid",
]


def same(first, second, path=""):
    """Equal up to rounding, whatever the order of names."""
    if isinstance(first, dict):
        assert set(first) == set(second), path
        for key in first:
            same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, float) or isinstance(second, float):
        close(first, second, 1e-7)
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for i, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f"{path}[{i}]")
    else:
        assert first == second, path


def pairs(correlation):
    """A matrix by names, so that orders can be compared."""
    ids = correlation["ids"]
    return {f"{a}|{b}": correlation["matrix"][i][j] for i, a in enumerate(ids) for j, b in enumerate(ids)}


def record(arguments):
    found = describe_step(**arguments)
    return {**found, "correlation": pairs(found["correlation"])}


class TestStep:
    @given(st.integers(0, 10), st.integers(1, 6), seeds())
    def test_a_record_is_json_without_nan(self, num, width, seed):
        found = describe_step(**full(num, width, seed), step=3, latencies_s=[0.5], cost=0.1, controls={"blank": [0.1]})
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    @given(st.integers(1, 8), st.integers(1, 4), seeds(), st.sampled_from([torch.float32, torch.float64]))
    def test_inputs_stay_as_they_are_and_give_the_same_again(self, num, width, seed, dtype):
        arguments = full(num, width, seed)
        arguments["scores"], arguments["repeat_scores"] = (arguments[k].to(dtype) for k in ("scores", "repeat_scores"))
        copies = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        first = describe_step(**arguments)
        assert all(torch.equal(arguments[key].nan_to_num(9), value.nan_to_num(9)) for key, value in copies.items())
        assert describe_step(**arguments) == first

    @given(st.integers(1, 10), st.integers(1, 6), seeds())
    def test_the_order_of_pictures_does_not_matter(self, num, width, seed):
        arguments = full(num, width, seed)
        order = torch.randperm(num, generator=seeded(seed))
        turned = {
            key: value[order] if isinstance(value, torch.Tensor) else [value[i] for i in order.tolist()]
            for key, value in arguments.items()
        }
        assert set(ROWS) == set(arguments)
        same(record(arguments), record(turned))

    @given(st.integers(1, 10), st.integers(1, 6), seeds())
    def test_the_order_of_criteria_does_not_matter(self, num, width, seed):
        arguments = full(num, width, seed)
        order = torch.randperm(width, generator=seeded(seed))
        turned = dict(arguments)
        for key in COLUMNS:
            value = arguments[key]
            turned[key] = (
                value[:, order]
                if isinstance(value, torch.Tensor)
                else [[row[k] for k in order.tolist()] for row in value]
            )
        same(record(arguments), record(turned))

    @given(st.integers(1, 10), st.integers(1, 6), seeds())
    def test_the_names_of_groups_do_not_matter(self, num, width, seed):
        arguments = full(num, width, seed)
        same(record(arguments), record({**arguments, "group": 1000 - 3 * arguments["group"]}))

    @given(st.integers(1, 10), st.integers(1, 6), seeds())
    def test_what_is_not_valid_may_hold_anything(self, num, width, seed):
        arguments = full(num, width, seed)
        scores, again = arguments["scores"], arguments["repeat_scores"]
        changed = {
            **arguments,
            "scores": torch.where(arguments["valid"], scores, 7.0),
            "repeat_scores": torch.where(arguments["repeat_valid"], again, math.inf),
        }
        same(record(arguments), record(changed))

    @given(st.integers(1, 8), st.integers(1, 5), seeds(), st.integers(1, 4))
    def test_pictures_of_which_nothing_is_known_change_only_the_coverage(self, num, width, seed, more):
        arguments = full(num, width, seed)
        for key in ("velocity_norms", "reference_norms", "features"):  # these are known without a judge
            del arguments[key]
        g = seeded(seed + 1)
        pick = torch.randint(0, num, (more,), generator=g)
        longer = {}
        for key, value in arguments.items():
            rows = value[pick] if isinstance(value, torch.Tensor) else [value[i] for i in pick.tolist()]
            longer[key] = torch.cat([value, rows]) if isinstance(value, torch.Tensor) else [*value, *rows]
        for key in ("valid", "repeat_valid", "heldout_valid"):
            longer[key][num:] = False
        longer["causes"][num:] = [["refusal"] * width for _ in range(more)]
        before, after = record(arguments), record(longer)
        for found in (before, after):
            del found["coverage"], found["samples"], found["reward"]["missing"]
            for part in ("criteria", "categories"):
                for numbers in found[part].values():
                    del numbers["due"], numbers["valid_fraction"], numbers["causes"]
        same(before, after)

    @given(st.integers(1, 8), st.integers(1, 5), seeds())
    def test_without_rewards_they_are_the_renormalised_mean(self, num, width, seed):
        scores, valid, group, weights, pitfalls = draw(num, width, seed)
        expected = aggregate(scores, valid, weights, missing="renormalise", pitfalls=pitfalls)
        assert isinstance(expected, Aggregate)
        found = describe_step(scores, valid, group, weights=weights, pitfalls=pitfalls)
        given_ = describe_step(
            scores,
            valid,
            group,
            weights=weights,
            pitfalls=pitfalls,
            rewards=expected.values,
            reward_valid=expected.valid,
        )
        same(found, given_)
        assert found["reward"]["valid"] == int(expected.valid.sum())
        close(found["reward"]["mean"], float(expected.values[expected.valid].mean()) if expected.valid.any() else None)

    def test_verdicts_under_rubrics_of_different_lengths(self):
        cups = lens_rubric("Two cups.", {"object count": "Exactly two.", "colour": "Red."})
        wall = lens_rubric("A wall.", {"colour": "White."})
        rubrics = [cups, cups, wall, wall]

        def say(rubric, *answers):
            ids = [criterion.id for criterion in rubric.all_criteria]
            return [
                Verdict(criterion_id=name, state="missing", cause=answer)
                if isinstance(answer, str)
                else Verdict(criterion_id=name, state="not_applicable")
                if answer is None
                else Verdict(criterion_id=name, state="scored", score=answer)
                for name, answer in zip(ids, answers, strict=True)
            ]

        verdicts = [say(cups, 1, 0, 1), say(cups, 0, "timeout", 1), say(wall, 1, None), say(wall, 1, "refusal")]
        table = to_matrix(verdicts, rubrics)
        found = describe_step(
            table.scores,
            table.valid,
            torch.tensor([3, 3, 8, 8]),
            weights=table.weights,
            pitfalls=table.pitfalls,
            criterion_ids=[[c.id for c in rubric.all_criteria] for rubric in rubrics],
            causes=[[verdict.cause for verdict in row] for row in verdicts],
        )
        read = {name: (n["valid"], n["due"], n["pass_rate"], n["causes"]) for name, n in found["criteria"].items()}
        assert read == {
            "object_count": (2, 2, 0.5, {}),
            "colour": (3, 4, pytest.approx(2 / 3), {"timeout": 1}),
            "structural_integrity": (2, 3, 1.0, {"refusal": 1}),
        }
        assert found["coverage"]["due"] == 9 and found["coverage"]["causes"] == table.causes
        # Renormalised at a coverage of 0.8: two of three, and one of two, are too few.
        assert (found["reward"]["valid"], found["reward"]["missing"]) == (2, 2)

    def test_both_judges_are_compared_on_the_same_pictures(self):
        scores = torch.tensor([[1.0], [0.0], [1.0], [math.nan]])
        heldout = torch.tensor(
            [0.5, 0.25, math.nan, 0.75]
        )  # the third is not known to one judge, the fourth to the other
        found = describe_step(scores, scores >= 0, torch.zeros(4).long(), heldout_rewards=heldout)["heldout"]
        assert found == {"mean": 0.375, "train_mean": 0.5, "gap": 0.125, "rank_correlation": 1.0, "valid": 2}

    def test_flips_and_reliability_of_a_simulated_step(self):
        _, said = judged(0.8, 0.1, (4800, 11), 11, repeats=2)
        asked = torch.rand(4800, 11, generator=seeded(0)) < 0.2
        group = torch.arange(4800) // 24
        found = describe_step(said[0], said[0] >= 0, group, repeat_scores=said[1], repeat_valid=asked)
        assert found["flips"]["low"] < 0.1 < found["flips"]["high"]
        assert found["flips"]["verdicts"] == int(asked.sum())
        assert found["reliability"]["within"] == pytest.approx(flip_reliability(0.8, 0.1), abs=0.04)
        by_variance = describe_step(said[0], said[0] >= 0, group, variances=torch.full((4800, 11), 0.09))
        assert by_variance["flips"] is None
        assert by_variance["reliability"]["within"] == pytest.approx(flip_reliability(0.8, 0.1), abs=0.03)

    def test_a_pitfall_is_turned_round_in_repeats_too(self):
        scores, again = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.0]])
        found = describe_step(
            scores, scores >= 0, torch.tensor([0, 0]), pitfalls=torch.ones(2, 1) > 0, repeat_scores=again
        )
        assert found["flips"]["disagreement"] == 0 and found["criteria"]["0"]["pass_rate"] == 0.5

    def test_the_judges_time_and_money(self):
        found = describe_step(
            torch.ones(1, 1), torch.ones(1, 1) > 0, torch.tensor([0]), latencies_s=[1.0, 2.0, 3.0], cost=0.5
        )
        assert found["judge"] == {"latency_p50": 2.0, "latency_p95": pytest.approx(2.9), "calls": 3, "cost": 0.5}
