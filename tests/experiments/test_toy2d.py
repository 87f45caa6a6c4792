"""Laws of the two-dimensional toy: its exact tilt, its base, arms that climb, and rewards that are missing."""

import json
import math
from dataclasses import replace

import pytest
import torch

from experiments.toy2d import OBJECTIVES, Toy2d, quick, run, train_arm, train_base
from experiments.toy2d_world import DIRECTIONS, STD, data_means, draw_data, draw_tilt, rewards_of, score, tilt
from tests.oracle import Mixture

TINY = replace(quick(), base_steps=40, width=16, iterations=2, eval_points=200, groups=4, group_size=8, num_steps=4)


@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("height", [-1.0, 0.0, 0.7, 1.4])
def test_the_tilt_is_the_reweighted_data(prompt, height):
    # Self-normalised importance weights on many points of the data, with a lambda found by another method.
    shares, centres = tilt(prompt, height)
    points = draw_data(torch.full((200_000,), prompt), torch.Generator().manual_seed(0)).double()
    along = points @ DIRECTIONS[prompt].double()
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ((middle * along).softmax(0) * along).sum() < height else (low, middle)
    weights = (low * along).softmax(0)
    nearest = torch.cdist(points, data_means(prompt).double()).argmin(1)
    counted = torch.zeros(len(shares), dtype=torch.float64).index_add(0, nearest, weights)
    torch.testing.assert_close(counted, shares, rtol=0, atol=0.01)
    big = shares > 0.05
    for k in big.nonzero()[:, 0].tolist():
        mean = (weights[nearest == k, None] * points[nearest == k]).sum(0) / weights[nearest == k].sum()
        torch.testing.assert_close(mean, centres[k], rtol=0, atol=0.03)


def test_samples_of_the_tilt_score_as_the_tilt():
    points = draw_tilt(1, 1.2, 20_000, torch.Generator().manual_seed(0))
    values = score(points, 1)
    assert values["height"] == pytest.approx(1.2, abs=0.02) and values["kl_to_tilt"] < 0.002
    data = score(draw_data(torch.zeros(20_000, dtype=torch.int64), torch.Generator().manual_seed(1)), 0)
    assert data["entropy"] == pytest.approx(math.log(8), abs=0.01) and data["on_support"] > 0.99


def test_prompts_have_offsets_of_their_own():
    assert rewards_of(torch.zeros(2, 2), torch.tensor([0, 1])).tolist() == [0.0, 5.0]


@pytest.mark.slow
def test_flow_matching_learns_the_closed_form():
    net = train_base(replace(Toy2d(), base_steps=5000))
    generator = torch.Generator().manual_seed(9)
    for prompt in (0, 1):
        means = data_means(prompt).double()
        exact = Mixture(torch.full((len(means),), 1 / len(means)).double(), means, torch.full_like(means, STD))
        for t in (0.3, 0.6, 0.9):
            clean = draw_data(torch.full((2000,), prompt), generator)
            x, time = (1 - t) * clean + t * torch.randn(2000, 2, generator=generator), torch.full((2000,), t)
            wanted = exact.velocity(x.double(), t)
            error = (net(x, time, torch.full((2000,), prompt)).double() - wanted).square().mean()
            assert error < 0.1 * wanted.square().mean()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_moves_when_every_reward_is_missing(objective):
    config = replace(TINY, missing=1.0)
    base = train_base(config)
    rows = []
    arm = train_arm(base, objective, config, rows.append)
    assert [row["reward"] for row in rows] == [None, None] and all(row["loss"] == 0 for row in rows)
    for before, after in zip(base.parameters(), arm.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_takes_missing_rewards_and_stays_finite(objective):
    config = replace(TINY, missing=0.3)
    base, rows = train_base(config), []
    arm = train_arm(base, objective, config, rows.append)
    assert all(parameter.isfinite().all() for parameter in arm.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), arm.parameters(), strict=True))
    assert all(0 < row["missing"] < 32 for row in rows)


@pytest.mark.slow
def test_every_objective_climbs(tmp_path):
    summary = run(Toy2d(out=tmp_path, base_steps=1500, iterations=40, stop_at=0.7, eval_points=1000))
    arms = summary["arms"]
    for objective in OBJECTIVES:
        assert arms[objective]["height"]["mean"] > arms["base"]["height"]["mean"] + 0.4
        assert arms[objective]["on_support"]["mean"] > 0.6
    assert (tmp_path / "densities.png").stat().st_size > 10_000


def test_a_run_writes_its_files_and_is_a_function_of_its_seed(tmp_path):
    summaries = [run(replace(TINY, out=tmp_path / name, num_seeds=2)) for name in ("a", "b")]
    assert summaries[0]["scores"] == summaries[1]["scores"]
    written = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert written["arms"]["nft"]["height"]["half_interval"] is not None
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert {(row["seed"], row["objective"], row["step"]) for row in rows} == {
        (seed, objective, step) for seed in (0, 1) for objective in ("nft", "grpo_ddim") for step in (0, 1)
    }
    other = run(replace(TINY, out=tmp_path / "c", seed=5))
    assert other["scores"] != summaries[0]["scores"][:1]


@pytest.mark.parametrize("changes", [{"missing": 1.5}, {"groups": 3}, {"updates": 0}])
def test_a_config_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match="expected a share"):
        replace(Toy2d(), **changes)
