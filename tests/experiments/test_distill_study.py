"""The distillation study runs what is missing, compares in pairs, and says what was reproduced."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.ablations import distill as study
from experiments.ablations.distill import ARMS, DistillStudy, arm_config, main, summarise
from experiments.distill_config import mini
from experiments.runs import write_json

RIGHT = {"teacher": "1100" * 30, "start": "1110" * 30, "good": "1100" * 29 + "0100", "bad": "1000" * 30}


def row(right: str, calls: int = 4) -> dict[str, Any]:
    strict = right.count("1") / len(right)
    scores = {"strict": strict, "loose": 1.0, "atom": 1.0, "clean": 0.9, "diversity": 20.0, "by_kind": {}}
    return {**scores, "calls": calls, "cpu_seconds": 1.0, "right": right}


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillStudy:
    """A study whose runs are there already."""
    for name, right in (("main-0", "good"), ("main-1", "teacher"), ("main-2", "teacher"), ("fast_ca_only-0", "bad")):
        commit = {"provenance": {"commit": "abc"}, "step": 40, "cpu_seconds": 90.0}
        write_json(tmp_path / name / "summary.json", {"student": row(RIGHT[right]), **commit})
    monkeypatch.setattr(study, "Teacher", lambda config, device: None)
    monkeypatch.setattr(study, "draw_pictures", lambda *_: None)

    def teacher_row(config, teacher, sampler):
        return row(RIGHT["teacher" if sampler.guidance_scale > 1 else "start"], sampler.calls)

    monkeypatch.setattr(study, "teacher_row", teacher_row)
    return DistillStudy(out=tmp_path)


def test_every_arm_changes_what_it_says_and_nothing_else() -> None:
    base = arm_config(DistillStudy(), "main", 0)
    for arm, changes in ARMS.items():
        config = arm_config(DistillStudy(), arm, 0)
        for part in ("data", "student", "matching", "adversary", "critic", "optim"):
            before, after = getattr(base, part), getattr(config, part)
            changed = {n for n in before.__dataclass_fields__ if getattr(before, n) != getattr(after, n)}
            assert changed == set(changes.get(part, {})), (arm, part)
        assert config.run.out.name == f"{arm}-0"
    assert base.optim == mini().optim and base.score.num_prompts >= 1000


def test_ratios_are_to_the_guided_teacher_and_to_the_start(finished: DistillStudy) -> None:
    result = summarise(finished)
    arms = result["arms"]
    assert list(arms) == ["main", "fast_ca_only"]
    assert arms["main"]["ratio_by_seed"]["1"]["low"] == 1.0
    assert arms["main"]["ratio"]["value"] == pytest.approx(1 - 1 / 60 / 3)
    assert arms["fast_ca_only"]["ratio"]["value"] == pytest.approx(0.5)
    assert arms["fast_ca_only"]["ratio_to_start"]["value"] == pytest.approx(1 / 3)
    assert result["verdict"].startswith("reproduced")
    assert "right" not in json.dumps(result["teacher"])


def test_the_student_of_the_base_is_compared_with_the_base(
    finished: DistillStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {None: "start", Path("rl"): "teacher"}
    monkeypatch.setattr(
        study, "teacher_row", lambda config, teacher, sampler: row(RIGHT[rows[config.teacher]], sampler.calls)
    )
    student = {"student": row(RIGHT["start"]), "provenance": {"commit": "abc"}, "step": 40, "cpu_seconds": 90.0}
    write_json(finished.out / "before_rl-0" / "summary.json", student)
    result = summarise(DistillStudy(out=finished.out, teacher=Path("rl")))
    assert (
        result["arms"]["before_rl"]["ratio"]["value"] == 1.0
        and result["arms"]["main"]["ratio_by_seed"]["1"]["value"] == 1.0
    )
    strict = [result[name][study.REFERENCE]["strict"] for name in ("teacher", "teacher_before_rl")]
    assert strict == [0.5, 0.75]
    study.write_table(result, finished.out / "t.md")
    assert "before RL: teacher, 20 guided steps" in (finished.out / "t.md").read_text()


def test_a_seed_below_the_goal_is_not_reproduced(finished: DistillStudy) -> None:
    path = finished.out / "main-2" / "summary.json"
    write_json(path, {**json.loads(path.read_text()), "student": row(RIGHT["bad"])})
    assert summarise(finished)["verdict"].startswith("not reproduced")


def test_the_same_command_runs_only_what_is_missing(finished: DistillStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def train(config) -> None:
        started.append(config.run.out.name)
        commit = {"provenance": {"commit": "abc"}, "step": 40, "cpu_seconds": 90.0}
        write_json(config.run.out / "summary.json", {"student": row(RIGHT["good"]), **commit})

    monkeypatch.setattr(study.distill, "main", train)
    wanted = DistillStudy(out=finished.out, arms=("main", "fast_ca_only", "fast_dm_only"))
    for _ in range(2):
        main(wanted)
    assert started == ["fast_dm_only-0"]
    table = (finished.out / "distill.md").read_text()
    assert "main, 3 seeds | 4" in table and "fast_dm_only" in table
    assert json.loads((finished.out / "distill.json").read_text())["arms"].keys() >= {"main", "fast_dm_only"}


def test_unknown_arms_are_refused() -> None:
    with pytest.raises(ValueError, match="arms"):
        DistillStudy(arms=("mian",))
