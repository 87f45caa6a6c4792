"""Laws of asking again: near ties by definition, a mean with its variance, a budget, and nothing that depends on order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensmini.rewards import Criterion, Rubric
from lensmini.rewards.diagnostics import flip_rate
from lensmini.rewards.judges import ScriptedJudge, judge_pictures, nearest_in_group, repeat_near_ties


def rubric_of(num, prompt="A wall."):
    criteria = tuple(Criterion(id=f"c{n}", text=f"Check {n}.") for n in range(num))
    return Rubric(prompt_id=f"p{num}", prompt=prompt, criteria=criteria)


def picture(number):
    return torch.tensor([number // 256, number % 256, 0], dtype=torch.uint8)[:, None, None].expand(3, 2, 2).contiguous()


def number(request):
    return int(request.image[0, 0, 0]) * 256 + int(request.image[1, 0, 0])


class Recorder:
    """Answers from a table of (picture, criterion, repeat), and what it was asked."""

    judge_id = "recorder"

    def __init__(self, answer):
        self.asked, self.answer = [], answer

    def score(self, requests):
        self.asked += [(number(r), int(r.criterion.id[1:]), r.repeat) for r in requests]
        table = ScriptedJudge(lambda r: self.answer(number(r), int(r.criterion.id[1:]), r.repeat))
        return table.score(requests)


def noisy(picture_number, criterion, repeat):
    """A pure function that looks random."""
    return float(hash((picture_number, criterion, repeat, 17)) % 100 < 80)


def run(rewards, group, answer=noisy, *, numbers=None, criteria=3, **options):
    numbers = list(range(len(rewards))) if numbers is None else numbers
    images, rubrics = [picture(n) for n in numbers], [rubric_of(criteria)] * len(numbers)
    said = judge_pictures(Recorder(answer), images, rubrics)
    judge = Recorder(answer)
    settings = {"margin": 0.05, "share": 0.0, **options}
    result = repeat_near_ties(judge, images, rubrics, said, torch.tensor(rewards), torch.tensor(group), **settings)
    return said, result, judge.asked


REWARDS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.9, math.nan]), st.integers(0, 2)), min_size=1, max_size=9
)


class TestNear:
    @given(REWARDS)
    def test_the_distance_is_that_of_a_loop(self, drawn):
        rewards, group = ([row[k] for row in drawn] for k in (0, 1))
        expected = [
            min(
                (abs(a - b) for j, (b, h) in enumerate(drawn) if i != j and g == h and not math.isnan(a + b)),
                default=math.inf,
            )
            for i, (a, g) in enumerate(drawn)
        ]
        found = nearest_in_group(torch.tensor(rewards, dtype=torch.float64), torch.tensor(group))
        assert found.tolist() == pytest.approx(expected)

    @given(REWARDS)
    def test_near_ties_and_no_others_are_judged_again_as_a_whole(self, drawn):
        rewards, group = ([row[k] for row in drawn] for k in (0, 1))
        near = nearest_in_group(torch.tensor(rewards), torch.tensor(group)) <= 0.0501
        _, result, asked = run(rewards, group, repeats=2)
        assert sorted(asked) == [(n, c, k) for n in range(len(drawn)) if near[n] for c in range(3) for k in (1, 2)]
        assert torch.equal(result.near, near) and result.asked == len(asked)

    def test_rounded_sums_as_far_apart_as_the_margin_are_near(self):
        rewards = torch.tensor([sum([1.0 / 11] * 7), 8 / 11, 10 / 11])
        _, result, _ = run(rewards.tolist(), [0, 0, 0], margin=1 / 11)
        assert result.near.tolist() == [True, True, False]
        _, result, _ = run([0.5, 0.5, 0.51], [0, 0, 0], margin=0.0)
        assert result.near.tolist() == [True, True, False]

    def test_a_reward_that_is_not_known_is_nobodys_neighbour(self):
        _, result, asked = run([math.nan, math.nan, 0.5], [0, 0, 0])
        assert asked == [] and not result.near.any()


class TestCombination:
    def test_the_mean_of_all_answers_and_the_variance_of_that_mean(self):
        answers = {0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}
        said, result, _ = run([0.5, 0.5], [0, 0], lambda n, c, k: answers[k], repeats=3)
        for row in result.verdicts:
            for verdict in row:
                assert verdict.score == 0.75
                assert verdict.variance == pytest.approx(4 / 3 * 0.75 * 0.25 / 4)  # s^2 / k, s^2 with k - 1
                assert verdict.state == "scored" and verdict.criterion_id == said[0][row.index(verdict)].criterion_id

    def test_an_answer_that_is_missing_leaves_what_is_known(self):
        answers = {0: 1.0, 1: "timeout", 2: 0.0}
        _, result, _ = run([0.5, 0.5], [0, 0], lambda n, c, k: answers[k], repeats=2)
        assert {v.score for row in result.verdicts for v in row} == {0.5}
        said, result, _ = run([0.5, 0.5], [0, 0], lambda n, c, k: "timeout" if k else 1.0, repeats=2)
        assert result.verdicts == said and result.pairs == []

    def test_what_was_missing_or_not_asked_again_stays_as_it_was(self):
        def answer(n, c, k):
            return "refusal" if c == 1 and k == 0 else 1.0

        said, result, asked = run([0.5, 0.5, 0.9], [0, 0, 0], answer)
        assert {c for _, c, _ in asked} == {0, 2} and result.verdicts[2] == said[2]
        assert [row[1] for row in result.verdicts] == [row[1] for row in said]

    def test_repeats_divide_the_noise(self):
        """Flips with q = 0.2 of verdicts that are all 1: the variance of a mean of k answers is q (1 - q) / k."""
        generator = torch.Generator().manual_seed(0)
        flips = (torch.rand(400, 4, 4, generator=generator) > 0.2).double()
        _, result, _ = run([0.5] * 400, [0] * 400, lambda n, c, k: flips[n, c, k].item(), criteria=4, repeats=3)
        scores = torch.tensor([[v.score for v in row] for row in result.verdicts], dtype=torch.float64)
        estimates = torch.tensor([[v.variance for v in row] for row in result.verdicts], dtype=torch.float64)
        assert scores.var().item() == pytest.approx(0.16 / 4, rel=0.1)
        assert estimates.mean().item() == pytest.approx(0.16 / 4, rel=0.1)


class TestSample:
    def test_its_share_is_that_of_all_verdicts_and_its_flips_are_the_judges(self):
        generator = torch.Generator().manual_seed(1)
        flips = (torch.rand(600, 5, 2, generator=generator) > 0.1).double()
        _, result, asked = run(
            [n * 1.0 for n in range(600)], [0] * 600, lambda n, c, k: flips[n, c, k].item(), criteria=5, share=0.3
        )
        assert len(asked) == len(result.pairs) == result.asked and not result.near.any()
        assert len(asked) == pytest.approx(900, abs=4 * (3000 * 0.3 * 0.7) ** 0.5)
        for (n, c, k), (first, second) in zip(asked, result.pairs, strict=True):
            assert (first.score, second.score) == (flips[n, c, 0], flips[n, c, 1]) and k == 1
        scores = torch.tensor([[p[side].score for p in result.pairs] for side in (0, 1)])[..., None]
        found = flip_rate(scores, scores >= 0)
        assert found["low"] < 0.1 < found["high"] and found["verdicts"] == len(result.pairs)

    def test_a_near_tie_of_the_sample_is_asked_once_and_counts_for_both(self):
        _, alone, sample = run([0.1, 0.5, 0.9], [0, 0, 0], share=0.5)
        _, both, asked = run([0.5, 0.5, 0.9], [0, 0, 0], share=0.5)
        assert set(asked) == set(sample) | {(n, c, 1) for n in (0, 1) for c in range(3)}
        assert len(asked) == len(set(asked)) and both.pairs == alone.pairs and 0 < len(sample) < 9

    def test_the_seed_decides_and_nothing_else_does(self):
        samples = [set(run([0.1, 0.5, 0.9], [0, 0, 0], share=0.5, seed=seed)[2]) for seed in (0, 0, 1, 2)]
        assert samples[0] == samples[1] and len({frozenset(sample) for sample in samples}) == 3
        turned = run([0.9, 0.1, 0.5], [0, 0, 0], share=0.5, numbers=[2, 0, 1])[2]
        assert set(turned) == samples[0]


class TestBudget:
    @given(st.integers(0, 30), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 2))
    def test_it_is_never_exceeded_and_the_nearest_come_first(self, bound, share, repeats):
        rewards = [0.1, 0.14, 0.5, 0.5, 0.52, 0.9]
        _, result, asked = run(rewards, [0] * 6, margin=0.05, share=share, repeats=repeats, max_questions=bound)
        assert len(asked) == len(set(asked)) == result.asked <= bound
        gaps = nearest_in_group(torch.tensor(rewards), torch.zeros(6))
        if result.near.any():
            left_out = (gaps <= 0.0501) & ~result.near
            assert not left_out.any() or gaps[result.near].max() <= gaps[left_out].min()
            again = {
                (n, c, k) for n in result.near.nonzero()[:, 0].tolist() for c in range(3) for k in range(1, repeats + 1)
            }
            assert again <= set(asked), "a picture is judged again as a whole or not at all"

    def test_the_sample_comes_first(self):
        whole = run([0.5] * 4, [0] * 4, share=0.5)
        part = run([0.5] * 4, [0] * 4, share=0.5, max_questions=len(whole[1].pairs))
        assert part[1].pairs == whole[1].pairs and not part[1].near.all()

    @pytest.mark.parametrize(
        "options", [{"margin": -0.1}, {"margin": math.nan}, {"repeats": 0}, {"share": 1.5}, {"max_questions": -1}]
    )
    def test_nonsense_is_refused(self, options):
        with pytest.raises(ValueError, match="margin, repeats, share, max_questions: expected"):
            run([0.5, 0.5], [0, 0], **options)

    def test_what_does_not_fit_together_is_refused(self):
        images, rubrics = [picture(n) for n in range(2)], [rubric_of(2)] * 2
        judge = Recorder(noisy)
        said = judge_pictures(judge, images, rubrics)
        for images_, said_, rewards, word in (
            (images[:1], said, torch.ones(2), "rubrics, verdicts, rewards"),
            (images, said, torch.ones(3), "rubrics, verdicts, rewards"),
            (images, [row[::-1] for row in said], torch.ones(2), "verdicts: expected one for each criterion"),
        ):
            with pytest.raises(ValueError, match=word):
                repeat_near_ties(judge, images_, rubrics, said_, rewards, torch.zeros(2), margin=0.0)
        with pytest.raises(ValueError, match="group"):
            nearest_in_group(torch.zeros(2), torch.zeros(3))
