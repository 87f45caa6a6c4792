"""Ablation studies: arms change what they say, verdicts follow the rule, equal costs are equal, runs are shared and kept."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import pretrain
from experiments.ablations import all as suite
from experiments.ablations import captions, guidance_rescale, timestep_shift
from experiments.ablations.study import Arm, Claim, Study, StudyConfig, arm_parts, changed, full_parts, main
from experiments.ablations.study_cost import step_flops
from experiments.ablations.study_report import decide, describe_full, describe_mini, judge_claim

STUDIES: Mapping[str, Study] = {one.name: one for one in (captions.STUDY, guidance_rescale.STUDY, timestep_shift.STUDY)}
by_study = pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)


def options(out: Path, **changes: Any) -> StudyConfig:
    return replace(StudyConfig(out=out), **changes)


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if hasattr(value, "__dataclass_fields__"):
        parts = [
            leaves(getattr(value, field), f"{name}.{field}" if name else field) for field in value.__dataclass_fields__
        ]
        return {key: one for part in parts for key, one in part.items()}
    return {name: value}


@by_study
def test_an_arm_changes_what_it_says_and_nothing_else(study: Study, tmp_path: Path) -> None:
    preset = leaves(study.base())
    free = {"run.out", "run.seed", "run.steps", "run.sample_every", "run.processes", "init_from", "init_weights"}
    for arm, design in study.arms.items():
        if design.existing is None:
            found = leaves(arm_parts(study, options(tmp_path / "s"), arm, 1)[-1])
            assert {key for key in preset if found[key] != preset[key]} - free <= set(design.changes), arm


def test_arms_that_compute_the_same_share_a_run_and_others_do_not(tmp_path: Path) -> None:
    both = [arm_parts(STUDIES[name], options(tmp_path / name), arm, 0)[-1].run.out for name, arm in SAME]
    assert both[0] == both[1]
    others = [
        arm_parts(captions.STUDY, options(tmp_path / "c"), arm, seed)[-1].run.out
        for arm in ("dense", "brief")
        for seed in (0, 1)
    ]
    assert len(set(others)) == 4


SAME = (("captions", "dense"), ("timestep_shift", "trained_1.8"))


def test_equal_compute_is_equal_to_a_step(tmp_path: Path) -> None:
    dense, brief = (
        arm_parts(captions.STUDY, options(tmp_path), arm, 0)[-1] for arm in ("dense", "brief_equal_compute")
    )
    totals = [config.run.steps * step_flops(config) for config in (dense, brief)]
    assert abs(totals[0] - totals[1]) <= step_flops(brief) and brief.run.steps > dense.run.steps


def test_a_run_in_two_parts_has_the_steps_of_one_and_starts_from_the_first(tmp_path: Path) -> None:
    arm = Arm(changes={"data.density": "brief"}, first={"data.density": "dense"}, first_share=0.25)
    study = replace(captions.STUDY, arms={"x": arm}, claims=())
    first, last = arm_parts(study, options(tmp_path, steps=100), "x", 0)
    assert (first.run.steps, last.run.steps) == (25, 75) and last.init_from == first.run.out / "step-000025"
    assert (first.data.density, last.data.density) == ("dense", "brief")  # pyright: ignore


@by_study
def test_the_full_scale_has_a_price(study: Study) -> None:
    told = describe_full(study, tuple(study.arms))
    trained = [arm for arm, design in study.arms.items() if design.existing is None]
    assert "A100-hours" in told and all(f"\n{arm}: " in told for arm in study.arms)
    for arm in trained:
        assert full_parts(study, arm)[-1].run.steps > 100_000


@by_study
def test_the_miniature_is_described_before_it_runs(study: Study, tmp_path: Path) -> None:
    if any(design.existing is None for design in study.arms.values()):
        trained = [arm for arm, design in study.arms.items() if design.existing is None]
        assert all(arm in describe_mini(study, options(tmp_path), trained) for arm in trained)


class TestRule:
    claim = Claim(text="a over b", ours=("a", "x"), others=("b", "x"), margin=0.05)

    @given(
        seeds=st.tuples(st.floats(-1, 1), st.floats(-1, 1)), prompts=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
        kind=st.sampled_from(["greater", "equal"]),
    )  # fmt: skip
    def test_it_says_what_its_words_say(self, seeds: Any, prompts: Any, kind: Any) -> None:
        claim, ends = replace(self.claim, kind=kind), [sorted(seeds), sorted(prompts)]
        gap = {"interval_seeds": ends[0], "interval_prompts": ends[1], "levels": [0.4, 0.3]}
        above, below = all(low > 0 for low, _ in ends), all(high < 0 for _, high in ends)
        within = all(low > -0.05 and high < 0.05 for low, high in ends)
        if kind == "greater":
            expected = "supported" if above else "refuted" if all(high < 0.05 for _, high in ends) else "undecided"
        else:
            expected = "supported" if within else "refuted" if above or below else "undecided"
        assert judge_claim(claim, gap) == expected

    def test_one_seed_and_scores_at_the_floor_decide_nothing(self) -> None:
        gap = {"interval_seeds": [0.1, 0.2], "interval_prompts": [0.1, 0.2], "levels": [0.4, 0.3]}
        assert judge_claim(self.claim, gap) == "supported"
        assert judge_claim(self.claim, {**gap, "interval_seeds": None}) == "undecided"
        assert judge_claim(self.claim, {**gap, "levels": [0.04, 0.0]}) == "undecided"

    @given(st.lists(st.tuples(st.sampled_from(["supported", "refuted", "undecided"]), st.booleans()), max_size=5))
    def test_the_verdict_is_of_the_deciding_claims(self, rows: list[tuple[str, bool]]) -> None:
        claims = [replace(self.claim, deciding=deciding) for _, deciding in rows]
        deciding = [found for found, counts in rows if counts]
        expected = "inconclusive"
        if deciding and all(found == "supported" for found in deciding):
            expected = "reproduced"
        elif "refuted" in deciding:
            expected = "not reproduced"
        assert decide(claims, [found for found, _ in rows]) == expected


def test_wrong_designs_and_orders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a field of SceneConfig, got 'densty'"):
        changed(pretrain.mini(), {"data.densty": "brief"})
    with pytest.raises(ValueError, match="claims: expected arms of"):
        replace(captions.STUDY, arms={"dense": Arm()})
    with pytest.raises(ValueError, match="arms: expected some of"):
        main(captions.STUDY, options(tmp_path, arms=("dens",)))
    with pytest.raises(ValueError, match="full: expected arms that train"):
        main(guidance_rescale.STUDY, options(tmp_path, full=True))
    with pytest.raises(ValueError, match="expected a finished run"):
        main(guidance_rescale.STUDY, options(tmp_path, checkpoint=tmp_path / "none"))


def test_the_suite_knows_every_study_and_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []

    def run(command: list[str]) -> SimpleNamespace:
        called.append(command[2])
        return SimpleNamespace(returncode=int(command[2].endswith("captions")))

    monkeypatch.setattr(suite.subprocess, "run", run)
    assert suite.main(suite.AllConfig(dry_run=True)) == [] and not called
    assert "hours on two cores" in capsys.readouterr().out
    assert suite.main(suite.AllConfig()) == ["captions"]
    assert called == [one.arguments[0] for one in suite.COMMANDS.values()]
    assert all(importlib.util.find_spec(module) for module in called)
    scripts = {path.stem for path in Path(suite.__file__).parent.glob("*.py") if "cli(STUDY)" in path.read_text()}
    assert scripts == set(STUDIES) <= set(suite.COMMANDS)
    with pytest.raises(ValueError, match="only: expected some of"):
        suite.AllConfig(only=("nothing",))


@pytest.mark.slow
def test_the_whole_of_it_runs_goes_on_and_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = options(tmp_path / "captions", smallest=True, arms=("dense", "brief"), seeds=(0, 1))
    trained: list[Path] = []
    kept = pretrain.main

    def train(config: Any) -> Any:
        trained.append(config.run.out)
        return kept(config)

    monkeypatch.setattr(pretrain, "main", train)
    main(captions.STUDY, replace(small, arms=("dense",), seeds=(0,)))
    assert len(trained) == 1
    result = main(captions.STUDY, small)
    assert len(trained) == len(set(trained)) == 4
    assert main(captions.STUDY, replace(small, only_summary=True))["arms"].keys() == result["arms"].keys()
    assert len(trained) == 4 and json.loads((tmp_path / "captions" / "captions.json").read_text())["verdict"]
    claim = next(row for row in result["claims"] if row["text"] == "descriptions: dense over brief, equal steps")
    assert claim["gaps"]["strict"]["seeds"] == [0, 1] and claim["judgement"] == "undecided"
    assert (tmp_path / "captions" / "pictures-described.png").exists()
    shift = main(timestep_shift.STUDY, options(tmp_path / "shift", smallest=True, arms=("trained_1.8",), seeds=(0,)))
    assert shift["arms"]["trained_1.8"]["seeds"]["0"]["runs"] == [trained[0].name] and len(trained) == 4
