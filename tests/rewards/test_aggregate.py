"""Laws of aggregation: monotone, blind to order, honest about what is missing; expectations by enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.rewards import aggregate, criterion_advantages
from tests.strategies import seeds

DOUBLE = torch.float64
RULES = ["drop_sample", "renormalise", "impute_group_mean", "drop_group"]


def draw(num, width, seed, missing=0.3):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (num, width), generator=generator).double() / 2
    valid = torch.rand(num, width, generator=generator) >= missing
    weights = torch.randint(0, 4, (num, width), generator=generator).double()
    group = torch.randint(0, 3, (num,), generator=generator)
    pitfalls = torch.rand(num, width, generator=generator) < 0.3
    required = torch.rand(num, width, generator=generator) < 0.1
    return scores, valid, weights, group, pitfalls, required


def slow(scores, valid, weights, group, pitfalls, required, rule, min_coverage):
    """Picture by picture, in plain numbers."""
    num, width = scores.shape
    out = []
    rows = torch.where(pitfalls, 1 - scores, scores).tolist()
    for i in range(num):
        mates = [j for j in range(num) if group[j] == group[i]]
        cells, dropped = [], False
        for k in range(width):
            w = weights[i, k].item()
            if w == 0:
                continue
            if valid[i, k]:
                cells.append((w, rows[i][k], bool(required[i, k])))
                continue
            others = [rows[j][k] for j in mates if valid[j, k] and weights[j, k] > 0]
            if rule == "impute_group_mean" and others:
                cells.append((w, sum(others) / len(others), bool(required[i, k])))
            elif rule == "renormalise" and not required[i, k]:
                cells.append((w, None, False))
            else:
                dropped = True
        if rule == "drop_group":
            dropped = dropped or any(weights[j, k] > 0 and not valid[j, k] for j in mates for k in range(width))
        whole = sum(w for w, _, _ in cells)
        covered = sum(w for w, s, _ in cells if s is not None)
        if dropped or covered == 0 or covered < min_coverage * whole - 1e-9:
            out.append(None)
            continue
        mean = sum(w * s for w, s, _ in cells if s is not None) / covered
        out.append(mean * math.prod(s for _, s, gate in cells if gate))
    return out


class TestReward:
    @given(st.integers(1, 6), st.integers(1, 5), seeds(), st.sampled_from(RULES), st.sampled_from([0.5, 0.8, 1.0]))
    def test_it_is_the_definition_picture_by_picture(self, num, width, seed, rule, coverage):
        scores, valid, weights, group, pitfalls, required = draw(num, width, seed)
        hidden = torch.where(valid, scores, math.nan)
        got = aggregate(
            hidden,
            valid,
            weights,
            missing=rule,
            group=group,
            min_coverage=coverage,
            pitfalls=pitfalls,
            required=required,
        )
        expected = slow(scores, valid, weights, group, pitfalls, required, rule, coverage)
        assert got.valid.tolist() == [value is not None for value in expected]
        wanted = torch.tensor([value or 0.0 for value in expected], dtype=DOUBLE)
        torch.testing.assert_close(got.values, wanted, rtol=1e-9, atol=1e-9)

    @given(st.integers(1, 6), st.integers(1, 5), seeds(), st.sampled_from(RULES))
    def test_a_better_score_is_never_a_worse_reward(self, num, width, seed, rule):
        scores, valid, weights, group, pitfalls, required = draw(num, width, seed, 0.1)
        options = {"missing": rule, "group": group, "pitfalls": pitfalls, "required": required}
        better = torch.where(pitfalls, scores / 2, (scores + 1) / 2)
        before, after = (aggregate(s, valid, weights, **options) for s in (scores, better))
        assert torch.equal(before.valid, after.valid)
        assert (after.values >= before.values - 1e-12).all()

    @given(st.integers(1, 6), st.integers(1, 5), seeds(), st.sampled_from(RULES))
    def test_the_order_of_criteria_and_pictures_does_not_matter(self, num, width, seed, rule):
        scores, valid, weights, group, pitfalls, required = draw(num, width, seed)
        generator = torch.Generator().manual_seed(seed)
        columns, rows = torch.randperm(width, generator=generator), torch.randperm(num, generator=generator)
        expected = aggregate(scores, valid, weights, missing=rule, group=group, pitfalls=pitfalls, required=required)
        turn = lambda x: x[rows][:, columns]  # noqa: E731
        got = aggregate(
            turn(scores),
            turn(valid),
            turn(weights),
            missing=rule,
            group=group[rows],
            pitfalls=turn(pitfalls),
            required=turn(required),
        )
        assert torch.equal(got.valid, expected.valid[rows])
        torch.testing.assert_close(got.values, expected.values[rows])

    def test_complete_binary_verdicts_give_the_plain_mean(self):
        scores = torch.tensor([[1.0] * 8 + [0.0] * 3])
        for rule in ["raise", *RULES]:
            got = aggregate(scores, scores >= 0, missing=rule, group=torch.tensor([1]))
            assert got.values.item() == pytest.approx(8 / 11) and bool(got.valid)

    def test_padding_is_not_missing(self):
        scores = torch.tensor([[1.0, 0.0, math.nan]])
        weights = torch.tensor([[1.0, 1.0, 0.0]])
        got = aggregate(scores, scores.isfinite(), weights, missing="raise")
        assert got.values.item() == 0.5

    def test_gradients_reach_valid_scores_only_and_are_finite(self):
        scores = torch.tensor([[0.5, math.nan], [math.nan, math.nan]], requires_grad=True)
        aggregate(scores, scores.isfinite(), missing="renormalise", min_coverage=0.4).values.sum().backward()
        assert scores.grad is not None and scores.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]
        scores.grad = None
        group = torch.tensor([0, 0])
        criterion_advantages(scores, scores.isfinite(), group, scale="group", contrast=True).values.sum().backward()
        assert scores.grad is not None and scores.grad.isfinite().all()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"missing": "zero"}, "missing: expected one of the rules"),
            ({"missing": "raise", "valid": torch.tensor([[True, False]])}, "valid: expected every verdict, 1 of 2"),
            ({"missing": "drop_group"}, "group: expected ids"),
            ({"missing": "drop_group", "group": torch.zeros(1)}, "group: expected integer"),
            ({"min_coverage": 0.0}, "min_coverage"),
            ({"scores": torch.tensor([[1.5, 0.0]])}, r"scores: expected numbers in \[0, 1\]"),
            ({"scores": torch.tensor([[math.nan, 0.0]])}, r"scores: expected numbers in \[0, 1\]"),
            ({"scores": torch.ones(1, 2, dtype=torch.int64)}, "scores: expected floating"),
            ({"valid": torch.ones(1, 2)}, "valid: expected bool"),
            ({"valid": torch.ones(1, 3, dtype=torch.bool)}, r"valid: expected shape \[n c\]"),
            ({"weights": -torch.ones(1, 2)}, "weights: expected finite"),
            ({"pitfalls": torch.ones(1, 2)}, "pitfalls: expected bool"),
        ],
    )
    def test_nonsense_is_refused(self, changes, message):
        arguments = {"scores": torch.zeros(1, 2), "valid": torch.ones(1, 2, dtype=torch.bool), "missing": "drop_sample"}
        with pytest.raises(ValueError, match=message):
            aggregate(**{**arguments, **changes})


def every_mask(num, width):
    """All patterns of missing verdicts of one picture or of all, with probability one half each."""
    for bits in itertools.product([True, False], repeat=num * width):
        yield torch.tensor(bits).reshape(num, width)


class TestCentred:
    @given(st.integers(1, 6), st.integers(1, 5), seeds(), st.booleans())
    def test_it_is_the_definition_criterion_by_criterion(self, num, width, seed, contrast):
        scores, valid, weights, group, pitfalls, _ = draw(num, width, seed)
        for scale in ("none", "group"):
            got = criterion_advantages(
                torch.where(valid, scores, math.nan),
                valid,
                group,
                weights,
                scale=scale,
                std_floor=0.2,
                contrast=contrast,
                pitfalls=pitfalls,
            )
            good = torch.where(pitfalls, 1 - scores, scores)
            for i in range(num):
                total, mass, seen = 0.0, 0.0, False
                for k in range(width):
                    if not valid[i, k] or weights[i, k] == 0:
                        continue
                    mates = [
                        good[j, k].item()
                        for j in range(num)
                        if group[j] == group[i] and valid[j, k] and weights[j, k] > 0
                    ]
                    mean = sum(mates) / len(mates)
                    spread = math.sqrt(sum((m - mean) ** 2 for m in mates) / len(mates))
                    weight = weights[i, k].item() * (spread if contrast else 1)
                    gap = (good[i, k].item() - mean) / (max(spread, 0.2) if scale == "group" else 1)
                    total, mass, seen = total + weight * gap, mass + weight, True
                assert bool(got.valid[i]) == seen
                assert got.values[i].item() == pytest.approx(total / mass if mass else 0.0, abs=1e-9)

    def test_verdicts_missing_at_random_leave_the_expectation_up_to_the_groups_own_mean(self):
        # Three pictures, two criteria; each verdict of the others is there or not with probability one half.
        scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=DOUBLE)
        group = torch.zeros(3, dtype=torch.int64)
        full = criterion_advantages(scores, torch.ones(3, 2, dtype=torch.bool), group).values[0].item()
        assert full == pytest.approx((1 / 3 - 2 / 3) / 2)
        # Without its own score in it, a mean over others at random is unbiased; with it, by 1 - 1 / n_valid.
        total, weight, factor = 0.0, 0, 0.0
        for mask in every_mask(2, 2):
            valid = torch.cat([torch.ones(1, 2, dtype=torch.bool), mask])
            total += criterion_advantages(scores, valid, group).values[0].item()
            counts = valid.sum(0).double()
            factor += (1 - 1 / counts).mean().item()
            weight += 1
        others = torch.tensor([1.0 - 0.5, 0.0 - 1.0], dtype=DOUBLE)  # gap to the mean of the other two
        assert total / weight == pytest.approx((factor / weight) * others.mean().item(), abs=1e-12)

    def test_lacking_a_hard_criterion_does_not_pay(self):
        # Exchangeable pictures: every assignment of pass and fail with pass rate 0.9 on the easy, 0.1 on the hard one.
        num = 3
        group = torch.zeros(num, dtype=torch.int64)
        valid = torch.ones(num, 2, dtype=torch.bool)
        lacking = valid.clone()
        lacking[0, 1] = False
        expected = {"centred": 0.0, "mean": 0.0, "whole": 0.0}
        for bits in itertools.product([0.0, 1.0], repeat=2 * num):
            scores = torch.tensor(bits, dtype=DOUBLE).reshape(num, 2)
            chance = math.prod((0.9 if b else 0.1) if k % 2 == 0 else (0.1 if b else 0.9) for k, b in enumerate(bits))
            expected["centred"] += chance * criterion_advantages(scores, lacking, group).values[0].item()
            renormalised = aggregate(scores, lacking, missing="renormalise", min_coverage=0.5).values
            expected["mean"] += chance * (renormalised[0] - renormalised.mean()).item()
            everything = aggregate(scores, valid, missing="raise").values
            expected["whole"] += chance * (everything[0] - everything.mean()).item()
        assert expected["centred"] == pytest.approx(0, abs=1e-12)
        assert expected["whole"] == pytest.approx(0, abs=1e-12)
        assert expected["mean"] > 0.2, "the fault of a mean of levels"

    def test_criteria_that_no_longer_separate_stop_counting(self):
        scores = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        valid, group = torch.ones(2, 2, dtype=torch.bool), torch.tensor([3, 3])
        plain = criterion_advantages(scores, valid, group).values
        contrast = criterion_advantages(scores, valid, group, contrast=True).values
        assert plain.tolist() == [0.25, -0.25] and contrast.tolist() == [0.5, -0.5]

    def test_the_floor_bounds_a_criterion_on_which_one_picture_differs(self):
        scores = torch.ones(24, 1)
        scores[0] = 0.0
        valid, group = torch.ones(24, 1, dtype=torch.bool), torch.zeros(24, dtype=torch.int64)
        free = criterion_advantages(scores, valid, group, scale="group", std_floor=1e-6).values[0].item()
        held = criterion_advantages(scores, valid, group, scale="group", std_floor=0.5).values[0].item()
        assert free == pytest.approx(-math.sqrt(23)) and held == pytest.approx(-23 / 24 / 0.5)

    def test_coverage_and_nonsense(self):
        scores = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
        group = torch.tensor([0, 0])
        got = criterion_advantages(scores, scores.isfinite(), group, min_coverage=0.8)
        assert got.valid.tolist() == [False, True] and got.values[0] == 0
        for options, message in (
            ({"scale": "batch"}, "scale"),
            ({"std_floor": 0.0}, "std_floor"),
            ({"min_coverage": 1.1}, "min_coverage"),
            ({"group": torch.tensor([0])}, r"group: expected shape \[n\]"),
        ):
            with pytest.raises(ValueError, match=message):
                criterion_advantages(**{"scores": scores, "valid": scores.isfinite(), "group": group, **options})
