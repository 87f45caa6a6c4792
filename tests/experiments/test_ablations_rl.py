import json
import math
from dataclasses import replace

import pytest
import torch

from experiments import reinforce
from experiments.ablations.rl import ARMS, BARE, FULL, RlStudy, arm_config, paired, summarise
from experiments.ablations.rl_report import write_table
from experiments.ablations.rl_signal import _agreement
from experiments.reinforce_config import mini
from lensmini.parallel import Group


def test_every_arm_is_a_valid_run_of_as_many_pictures_from_the_same_base():
    configs = {arm: arm_config(RlStudy(), arm, 1) for arm in ARMS}
    budgets = {
        arm: (c.base, c.run.steps, c.rollout.groups, c.rollout.group_size, c.run.seed) for arm, c in configs.items()
    }
    for group in (FULL, BARE, set(ARMS) - {*FULL, *BARE}):
        assert len({budget for arm, budget in budgets.items() if arm in group}) == 1
    assert configs["nft"] == replace(mini(), run=replace(mini().run, out=RlStudy().out / "nft-1", seed=1, processes=1))
    assert len({str(c.run.out) for c in configs.values()}) == len(ARMS)
    with pytest.raises(ValueError, match="arms: expected some of"):
        RlStudy(arms=("ppo",))


def test_the_base_is_scored_anew_wherever_its_score_would_be_another(monkeypatch, tmp_path):
    keys = []

    def keep(root, name, key, make):
        keys.append(json.dumps(key, default=str, sort_keys=True))
        (tmp_path / "score.json").write_text("{}")
        return tmp_path, True

    monkeypatch.setattr(reinforce, "cached_stage", keep)
    monkeypatch.setattr(reinforce, "read_run", lambda path: {"config": {}, "step": 1})
    preset = mini()
    others = [
        replace(
            preset, prompts=replace(preset.prompts, form="short")
        ),  # was one with the first: a dense run's base got 0
        replace(preset, prompts=replace(preset.prompts, wording="plain")),
        replace(preset, prompts=replace(preset.prompts, num_prompts=60)),
        replace(preset, eval=replace(preset.eval, seed=1)),
        replace(preset, base_weights="model"),
    ]
    trained_otherwise = replace(preset, reward=replace(preset.reward, kind="naive"))
    for config in (preset, trained_otherwise, *others):
        reinforce.base_score(None, None, config, Group(0, 1), tmp_path)  # pyright: ignore[reportArgumentType]
    assert keys[0] == keys[1] and len(set(keys)) == 1 + len(others)


def test_paired_intervals_are_students_over_seeds_and_cover_the_mean_over_prompts():
    ones = [[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    others = [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 1]]
    result = paired(ones, others)
    by_seed = [0.25, 0.25, 0.5]
    assert result["by_seed"] == by_seed and result["mean"] == pytest.approx(1 / 3)
    std = math.sqrt(sum((x - 1 / 3) ** 2 for x in by_seed) / 2)
    half = 4.303 * std / math.sqrt(3)  # the 97.5 % point of Student's t with two degrees of freedom
    assert result["interval_seeds"] == pytest.approx([1 / 3 - half, 1 / 3 + half])
    low, high = result["interval_prompts"]
    assert 0 <= low <= 1 / 3 <= high <= 1
    assert paired(ones[:1], others[:1])["interval_seeds"] is None


def score(answers, held_out=0.5):
    part = {
        "strict": sum(answers) / len(answers),
        "answers": answers,
        "by_kind": {"single": 1.0},
        **dict.fromkeys(("loose", "rubric", "held_out_strict", "foreground", "background_right"), 0.5),
        "held_out": held_out,
    }
    return {"free": part, "guided": {**part, "answers": answers[:2]}, "diversity": 0.1, "num_prompts": len(answers)}


def test_the_summary_takes_what_is_there(tmp_path):
    study = RlStudy(out=tmp_path, seeds=(0, 1))
    before = score([0, 0, 1, 0])
    before["guided"]["answers"] = [1, 0, 1, 0]
    for arm, seed, answers in (
        ("nft", 0, [1, 0, 1, 0]),
        ("nft", 1, [1, 1, 1, 0]),
        ("nft_short", 1, [1, 1, 1, 0]),
        ("awm", 1, [0, 0, 1, 0]),
    ):
        folder = tmp_path / f"{arm}-{seed}"
        folder.mkdir()
        summary = {"before": before, "after": score(answers), "config_hash": "h", "provenance": {"commit": "c"}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "timing.jsonl").write_text('{"step": 1, "cpu_seconds": 2.0}\n{"step": 2, "cpu_seconds": 3.5}\n')
    result = summarise(study)
    nft = result["arms"]["nft"]
    assert nft["free_minus_base_free"]["by_seed"] == [0.25, 0.5] and nft["free_minus_base_guided"]["by_seed"] == [
        0.0,
        0.25,
    ]
    assert nft["train_cpu_seconds"] == [5.5, 5.5] and "answers" not in nft
    assert result["compared"]["nft_short - awm"]["by_seed"] == [0.5], "the seeds that both have"
    write_table(result, tmp_path / "table.md")
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert len(rows) == 6 and rows[3].startswith("| nft (2) | 0.625 | +0.375")


def test_agreement_is_the_cosine_by_kind():
    one = {"a.txt_norm.0.weight": torch.tensor([1.0, 0.0]), "b.img_mlp.w1.weight": torch.tensor([2.0])}
    other = {"a.txt_norm.0.weight": torch.tensor([1.0, 1.0]), "b.img_mlp.w1.weight": torch.tensor([-1.0])}
    found = _agreement(one, other)
    assert found["norms of text"] == pytest.approx(1 / math.sqrt(2)) and found["image: modulation and MLP"] == -1.0
    assert found["all"] == pytest.approx((1 - 2) / math.sqrt(5 * 3))
