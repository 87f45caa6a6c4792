"""The learned reward's script: spoilt scenes are what they say, climbing is climbing, and the smallest run is whole."""

import json
import math
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.miniature.rubrics import scene_judge, scene_rubric
from experiments.reward_ascent import (
    AscentConfig,
    choose_cases,
    climb,
    compare_ascents,
    pixel_gradient_error,
    smoothed,
    toward_the_right_picture,
)
from experiments.reward_model import _together, advantage, open_world, prepare_reward_model, run, smallest
from experiments.reward_scenes import CHANGES, SPOILS, change_scene, judge_scenes, spoil, spoilt_pictures, suite
from lensmini.data import WITHHELD_PAIRS, render_scene, sample_scene
from lensmini.rewards.judges import judge_pictures
from lensmini.rewards.model import Answers
from tests.experiments.tiny_run import prepare
from tests.strategies import seeds


class TestSpoiltScenes:
    @given(seeds(), st.sampled_from(CHANGES))
    def test_a_change_is_the_one_it_is_called_and_makes_no_withheld_pair(self, seed, name):
        scene = sample_scene(generator=seed)
        changed = change_scene(scene, name, random.Random(seed))
        before, after = set(scene.objects), set(changed.objects)
        assert not {thing.pair for thing in changed.objects} & WITHHELD_PAIRS
        if changed == scene:
            assert len(scene.objects) in (1, 4) or len({(*t.pair, t.size) for t in scene.objects}) == 1
            return
        assert (changed.background != scene.background) == (name == "background")
        assert len(after) - len(before) == {"extra": 1, "missing": -1}.get(name, 0)
        if name in ("colour", "shape", "both"):
            (old,), (new,) = before - after, after - before
            assert old.cell == new.cell and old.size == new.size
            assert (old.colour != new.colour, old.shape != new.shape) == (name != "shape", name != "colour")
        if name in ("move", "swap"):
            look = lambda scene: sorted((t.pair, t.size) for t in scene.objects)  # noqa: E731
            assert look(changed) == look(scene)
            assert ({t.cell for t in changed.objects} == {t.cell for t in scene.objects}) == (name == "swap")

    @pytest.mark.parametrize("name", SPOILS)
    def test_spoiling_changes_a_picture_and_not_its_size(self, name):
        image = render_scene(sample_scene(generator=1), 24, 40, dtype=torch.float32)
        kept = image.clone()
        spoilt = [spoil(image, name, random.Random(seed)) for seed in (0, 1, 0)]
        assert torch.equal(image, kept) and all(one.shape == image.shape and one.isfinite().all() for one in spoilt)
        assert torch.equal(spoilt[0], spoilt[2]) and not torch.equal(spoilt[0], spoilt[1])
        assert any(not torch.equal(one, image) for one in spoilt)

    def test_without_spoils_there_are_only_scenes(self):
        samples = spoilt_pictures(suite(30, 0), [(32, 32)], 0, spoils=False)
        assert {name for one in samples for name in one.kind.split("+")} <= {*CHANGES, "right"}
        assert len({one.kind for one in samples}) > 5

    def test_verdicts_vary_for_every_kind_of_criterion(self):
        samples = spoilt_pictures(suite(120, 0), [(32, 32), (24, 40)], 0)
        judged = judge_scenes(samples)
        again = spoilt_pictures(suite(120, 0), [(32, 32), (24, 40)], 0)
        assert all(torch.equal(one.image, other.image) for one, other in zip(samples, again, strict=True))
        scores = {}
        for rubric, row in zip(judged.rubrics, judged.verdicts, strict=True):
            for criterion, verdict in zip(rubric.all_criteria, row, strict=True):
                scores.setdefault(criterion.id.split("_")[0], []).append(verdict.score)
        assert set(scores) == {"colour", "shape", "free", "number", "background", "whole"}
        assert all(0.03 < sum(values) / len(values) < 0.97 for values in scores.values()), scores
        right = [index for index, one in enumerate(samples) if one.kind == "right"]
        assert right and all(verdict.score == 1 for index in right for verdict in judged.verdicts[index])


class TestClimbing:
    def test_a_linear_value_is_climbed_along_its_slope(self):
        slope = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        start = torch.zeros(2, 3, 4, 4)
        config = AscentConfig(steps=5, enough=1e9)
        end = climb(start, lambda x: x, lambda x: (x * slope).sum((1, 2, 3)), config, 0.1, 0.0, 0)
        rms = slope.square().mean((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(end, 5 * 0.1 * slope / rms)

    def test_a_climb_ends_where_it_is_high_enough(self):
        config = AscentConfig(steps=50, enough=1.0)
        end = climb(torch.zeros(1, 1, 1, 1), lambda x: x, lambda x: 2 * x.flatten(), config, 0.1, 0.0, 0)
        assert 2 * end.item() == pytest.approx(1.0, abs=0.2 + 1e-6)

    def test_a_random_direction_is_as_long(self):
        start = torch.zeros(2, 3, 4, 4)
        end = climb(start, lambda x: x, None, AscentConfig(steps=7), 0.1, 0.0, 0)
        torch.testing.assert_close(end.square().mean((1, 2, 3)).sqrt(), torch.full((2,), 0.7))

    def test_blur_is_symmetric_and_positive_so_that_the_way_stays_uphill(self):
        unit = torch.eye(20).reshape(20, 1, 4, 5)
        matrix = smoothed(unit, 1.3).reshape(20, 20)
        torch.testing.assert_close(matrix, matrix.T)
        assert torch.linalg.eigvalsh(matrix.double()).min() > -1e-6
        assert matrix[0, 1].item() == pytest.approx(math.exp(-1 / (2 * 1.3**2)))

    def test_the_way_to_the_right_picture_is_a_cosine_where_the_criterion_looks(self):
        samples = spoilt_pictures(suite(120, 0), [(32, 32)], 0)
        for case in choose_cases(samples, 18, 0):
            start = case.sample.image.float() / 255
            right = render_scene(case.sample.prompt.scene, 32, 32, dtype=torch.float32)
            if torch.equal(start, right):
                continue
            assert toward_the_right_picture(case, start, start + 0.1 * (right - start)) == pytest.approx(1, abs=1e-5)
            assert toward_the_right_picture(case, start, start - 0.1 * (right - start)) == pytest.approx(-1, abs=1e-5)
            if case.asked.id.startswith(("colour", "shape", "free")):
                row, col = "bottom" in case.asked.id, "right" in case.asked.id
                elsewhere = start.clone()
                elsewhere[:, 16 * (not row) : 16 * (not row) + 16, 16 * (not col) : 16 * (not col) + 16] += 1
                assert toward_the_right_picture(case, start, elsewhere) == 0

    def test_cases_fail_and_kinds_take_turns(self):
        samples = spoilt_pictures(suite(120, 0), [(32, 32)], 0)
        cases = choose_cases(samples, 18, 0)
        kinds = [case.asked.id.split("_")[0] for case in cases]
        assert len(cases) == 18 and len(set(kinds)) >= 5
        assert len(set(kinds[: len(set(kinds))])) == len(set(kinds))
        for case in cases:
            verdicts = judge_pictures(scene_judge(), [case.sample.image], [scene_rubric(case.sample.prompt)])[0]
            assert {v.criterion_id: v.score for v in verdicts}[case.asked.id] == 0
            assert case.asked != case.another and case.before == [v.score for v in verdicts]

    def test_the_comparison_tells_a_climb_that_goes_there_from_ways_that_do_not(self, monkeypatch):
        seen = []

        def walk(model, world, cases, config, space, seed):
            start = torch.stack([case.sample.image for case in cases]).float() / 255
            right = torch.stack([render_scene(c.sample.prompt.scene, 32, 32, dtype=torch.float32) for c in cases])
            seen.append((seed, len(cases)))
            aside = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
            return {"start": start, "asked": right, "another": start - 0.1 * (right - start), "random": start + aside}

        monkeypatch.setattr("experiments.reward_ascent._walk", walk)
        samples = [spoilt_pictures(suite(40, seed), [(32, 32)], seed, spoils=False) for seed in (1, 2)]
        found = compare_ascents(None, None, samples, [1, 2], AscentConfig(num=10))  # pyright: ignore
        assert found["num"] == 20 and seen == [(1, 10), (2, 10)]
        assert found["cosine"]["asked"] == pytest.approx(1, abs=1e-5)
        assert found["another"]["difference"] == pytest.approx(2, abs=1e-4) and found["another"]["nearer"] == 1
        assert (
            0.7 < found["random"]["difference_low"] < found["random"]["difference"] < found["random"]["difference_high"]
        )


def test_means_and_intervals_by_hand():
    got = _together([{"a": [1.0, 2.0]}, {"a": [2.0, 2.0]}, {"a": [3.0, 2.0], "b": 1}])
    assert got["a"][0] == {"mean": 2.0, "half_interval": pytest.approx(4.303 / 3**0.5)}
    assert got["a"][1]["half_interval"] == 0 and set(got) == {"a"}
    assert _together([4.0]) == {"mean": 4.0, "half_interval": None}


@pytest.mark.slow
def test_the_smallest_run_is_whole_and_its_stage_is_found_again(tmp_path):
    prepare(tmp_path)
    config = replace(smallest(), out=tmp_path / "a")
    summary = run(config)
    assert (tmp_path / "a" / "ascents.png").exists()
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["config_hash"] == summary["config_hash"]
    arms = summary["arms"]
    for split, name in product(("held_out", "withheld"), ("model", "majority", "by_criterion", "logistic", "additive")):
        assert 0 <= arms[split][name]["all"]["accuracy"]["mean"] <= 1
    assert {*arms["ascents"]} == {"latents", "pixels"} and {*arms["ascents"]["pixels"]} == {
        "start",
        "asked",
        "another",
        "random",
    }
    assert arms["ascents"]["pixels"]["start"]["flipped"]["mean"] == 0
    assert 0 <= arms["fresh_ascents"]["random"]["nearer"]["mean"] <= 1
    assert arms["gradient_error"]["mean"] < 1e-6
    world = open_world(config, tmp_path)
    stages = sorted(tmp_path.glob("reward-model-*"))
    one, other = (prepare_reward_model(config, world, tmp_path, quiet=True) for _ in range(2))
    assert sorted(tmp_path.glob("reward-model-*")) == stages and one.revision == other.revision
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert prepare_reward_model(replace(config, seed=1), world, tmp_path, quiet=True).revision != one.revision
    samples = spoilt_pictures(suite(2, 0), [(16, 16), (16, 24)], 0)
    assert pixel_gradient_error(one, world, samples) < 1e-6


def test_an_advantage_is_a_difference_of_means_and_resamples_whole_pictures():
    facts = (torch.tensor([1.0, 1, 0, 1, 1, 0]).double(), torch.ones(6), ["a"] * 6, [0, 0, 0, 1, 1, 1])
    good = Answers(torch.tensor([0.9, 0.9, 0.1, 0.9, 0.9, 0.1]).double(), *facts)
    bad = Answers(torch.tensor([0.9, 0.9, 0.1, 0.1, 0.1, 0.9]).double(), *facts)
    found = advantage(good, bad)
    assert found["accuracy"] == pytest.approx(0.5) and found["brier"] == pytest.approx(0.4)
    # Of two pictures the second differs in everything: a resample has it never, once or twice.
    assert found["accuracy_low"] == 0 and found["accuracy_high"] == pytest.approx(1)
    assert advantage(bad, good)["accuracy"] == pytest.approx(-0.5)
