"""The distillation study in miniature: what does Lens-Turbo's recipe keep and give, and which of its parts matter?

    python -m experiments.ablations.distill --teacher runs/rl/nft-0    every arm and the table, in the paper's order: RL first
    python -m experiments.ablations.distill --arms main ca_only        some
    python -m experiments.ablations.distill --only-summary             results so far

The paper has no distillation ablation, no seeds and no row of its model at four steps (arXiv 2605.21573, D.2). All arms
start from the same teacher and have the same number of updates; students are compared with the teacher at 20 guided steps
and with the teacher at the student's own steps without guidance, which is where they start, on the same prompts from the
same noise. Finished runs are kept, so that the same command goes on; ``OUT/distill.json`` is what
``experiments/results/distill.json`` holds, ``OUT/distill.md`` its table and ``OUT/distill.png`` teacher and students.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments import distill
from experiments.distill_config import DistillConfig, mini
from experiments.distill_score import Sampler, build_suite, load_student, paint_suite, paired_ratio, teacher_row
from experiments.distill_state import Teacher
from experiments.pictures import save_grid
from experiments.pretrain_data import SceneConfig
from experiments.runs import config_hash, latest_checkpoint, provenance, write_json

__all__ = ["ARMS", "DistillStudy", "arm_config", "main", "summarise", "write_table"]

_FAST: dict[str, dict[str, Any]] = {"optim": {"lr": 3e-4}, "critic": {"lr": 3e-4}}
"""At the preset's rate a student stays so near its start that no part can be missed; six times faster they can."""


def _fast(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: _FAST.get(name, {}) | changes.get(name, {}) for name in {**_FAST, **changes}}


ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "main": {},
    "fast": _fast(),
    "fast_ca_only": _fast(matching={"matching": False}),
    "fast_dm_only": _fast(matching={"augmentation": False}),
    "one_step": {"student": {"num_steps": 1}},
    "two_steps": {"student": {"num_steps": 2}},
    "fast_no_ida": _fast(critic={"ida": 0.0}),
    "fast_one_critic_update": _fast(critic={"updates": 1}),
    "fast_decoupled": _fast(matching={"schedule": "decoupled"}),
    "fast_shared": _fast(matching={"schedule": "shared"}),
    "fast_no_adversary": _fast(adversary={"weight": 0.0}),
    "fast_strong_adversary": _fast(adversary={"weight": 0.1}),
    "fast_strong_no_r1": _fast(adversary={"weight": 0.1, "gamma": 0.0}),
    "eight_steps": {"student": {"num_steps": 8}},
    "euler": {"student": {"walk": "euler"}},
    "before_rl": {},
}
"""What each arm changes of the preset ``mini``."""
BEFORE_RL = ("before_rl",)
"""Distilled from runs/quickstart, whatever the study's teacher is, and compared with it."""
TEACHERS = {
    "teacher, 20 guided steps": (20, None),
    "teacher, 20 steps, guidance 2.5": (20, 2.5),
    "teacher, 4 guided steps": (4, None),
    "teacher, 8 steps": (8, 1.0),
    "teacher, 4 steps": (4, 1.0),
    "teacher, 2 steps": (2, 1.0),
    "teacher, 1 step": (1, 1.0),
}
"""Steps and guidance of the teacher's rows; none is the study's guidance."""
REFERENCE = "teacher, 20 guided steps"
_SHORT = ("strict", "loose", "atom", "by_kind", "clean", "diversity", "calls", "cpu_seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillStudy:
    """Arms and seeds."""

    out: Path = Path("runs/distill-study")
    """A directory for each run, and the results."""
    teacher: Path | None = None
    """By default runs/quickstart; ``runs/rl/nft-0`` of ``experiments.ablations.rl`` for the paper's order."""
    arms: tuple[str, ...] = tuple(ARMS)
    """In this order."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the arm "main": of weights of the head, order of samples, noise and times."""
    ablation_seeds: tuple[int, ...] = (0,)
    """Of the others."""
    num_prompts: int = 1008
    """Prompts of the score."""
    steps: int | None = None
    """Student steps instead of the preset's."""
    only_summary: bool = False
    """Train nothing."""

    def __post_init__(self) -> None:
        if not set(self.arms) <= set(ARMS):
            raise ValueError(f"arms: expected some of {list(ARMS)}, got {list(self.arms)}")

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Seeds of an arm."""
        return self.seeds if arm == "main" else self.ablation_seeds


def arm_config(study: DistillStudy, arm: str, seed: int) -> DistillConfig:
    """One run of the study."""
    config = replace(mini(), teacher=None if arm in BEFORE_RL else study.teacher)
    for name, values in ARMS[arm].items():
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    steps = config.run.steps if study.steps is None else study.steps
    run = replace(config.run, out=study.out / f"{arm}-{seed}", seed=seed, steps=steps)
    return replace(config, run=run, score=replace(config.score, num_prompts=study.num_prompts))


def summarise(study: DistillStudy) -> dict[str, Any]:
    """Every finished run against the teacher: ratios of strict scores, paired by prompt and noise."""
    rows = teacher_rows(arm_config(study, "main", study.seeds[0]))
    earlier: dict[str, Any] = {}
    arms: dict[str, Any] = {}
    for arm in ARMS:
        files = [(seed, study.out / f"{arm}-{seed}" / "summary.json") for seed in study.seeds_of(arm)]
        found = {seed: json.loads(path.read_text()) for seed, path in files if path.exists()}
        if found:
            start = f"teacher, {next(iter(found.values()))['student']['calls']} steps".replace("1 steps", "1 step")
            if arm in BEFORE_RL and study.teacher is not None:
                own = earlier = teacher_rows(arm_config(study, arm, 0), (REFERENCE, start))
            else:
                own = rows
            arms[arm] = _describe(study, arm, found, own[REFERENCE]["right"], own[start]["right"])
    return {
        "question": "How much of the guided teacher's score does Lens-Turbo's recipe keep without guidance in few steps, and "
        "what do its parts contribute?",
        "command": "python -m experiments.ablations.distill",
        "metric": f"strict score on {study.num_prompts} prompts; ratios with 95 % intervals, a bootstrap over prompts, paired "
        "by prompt and noise; diversity is the mean RMS difference (of 255) of two pictures of one prompt, clean the share of "
        "pixels near a colour of the world",
        "goal": "lower end of the ratio of the four-step student to the teacher at 20 guided steps at least 0.90",
        "verdict": _verdict(arms),
        "teacher": {name: {key: row[key] for key in _SHORT} for name, row in rows.items()},
        **(
            {"teacher_before_rl": {n: {key: row[key] for key in _SHORT} for n, row in earlier.items()}}
            if earlier
            else {}
        ),
        "arms": arms,
        "provenance": provenance(),
    }


def teacher_rows(config: DistillConfig, names: Collection[str] = tuple(TEACHERS)) -> dict[str, dict[str, Any]]:
    """The teacher of a run at several steps; without guidance it walks as the student does, which is where that starts."""
    teacher, rows = Teacher(config, torch.device("cpu")), {}
    for name in names:
        steps, guidance = TEACHERS[name]
        scale = config.score.teacher_guidance if guidance is None else guidance
        walk = "euler" if steps == 20 or scale != 1 else config.student.walk
        sampler = Sampler(num_steps=steps, guidance_scale=scale, mu=config.score.mu, walk=walk)
        rows[name] = teacher_row(config, teacher, sampler)
    return rows


def _describe(
    study: DistillStudy, arm: str, found: Mapping[int, dict[str, Any]], reference: str, start: str
) -> dict[str, Any]:
    students = [one["student"] for one in found.values()]
    answers = [row["right"] for row in students]
    return {
        "changes": ARMS[arm],
        "seeds": {str(seed): {key: one["student"][key] for key in _SHORT} for seed, one in found.items()},
        "ratio_by_seed": {
            str(seed): paired_ratio([one["student"]["right"]], reference)._asdict() for seed, one in found.items()
        },
        "strict": sum(row["strict"] for row in students) / len(students),
        **{name: sum(row[name] for row in students) / len(students) for name in ("diversity", "clean")},
        "ratio": paired_ratio(answers, reference)._asdict(),
        "ratio_to_start": paired_ratio(answers, start)._asdict(),
        "steps": [one["step"] for one in found.values()],
        "train_cpu_seconds": [one["cpu_seconds"] for one in found.values()],
        "config_hash": {str(seed): config_hash(arm_config(study, arm, seed)) for seed in found},
        "commit": sorted({one["provenance"]["commit"] or "?" for one in found.values()}),
    }


def _verdict(arms: Mapping[str, Any]) -> str:
    if "main" not in arms:
        return "inconclusive: the main arm has not run"
    ratios = arms["main"]["ratio_by_seed"]
    low = min(ratio["low"] for ratio in ratios.values())
    kept = "reproduced" if low >= 0.9 else "not reproduced"
    return f"{kept}: the lowest lower end of {len(ratios)} seeds is {low:.3f}"


def write_table(result: Mapping[str, Any], path: Path) -> None:
    """The rows as Markdown."""
    lines = [
        "| row | calls | strict | of the guided teacher | of its start | diversity | clean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    before = {f"before RL: {name}": row for name, row in result.get("teacher_before_rl", {}).items()}
    for name, row in (result["teacher"] | before).items():
        lines.append(
            f"| {name} | {row['calls']} | {row['strict']:.3f} | | | {row['diversity']:.1f} | {row['clean']:.3f} |"
        )
    for name, row in result["arms"].items():
        calls = next(iter(row["seeds"].values()))["calls"]
        shown = [
            f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            for ratio in (row["ratio"], row["ratio_to_start"])
        ]
        seeds = f", {len(row['seeds'])} seeds" if len(row["seeds"]) > 1 else ""
        numbers = f"{row['strict']:.3f} | {shown[0]} | {shown[1]} | {row['diversity']:.1f} | {row['clean']:.3f}"
        lines.append(f"| {name}{seeds} | {calls} | {numbers} |")
    path.write_text("\n".join(lines) + "\n")


def draw_pictures(
    study: DistillStudy, path: Path, *, arms: tuple[str, ...] = ("main", "two_steps", "one_step")
) -> None:
    """Six prompts painted by the teacher at several steps and by the students that there are, from the same noise."""
    config = arm_config(study, "main", study.seeds[0])
    assert isinstance(config.data, SceneConfig)
    teacher = Teacher(config, torch.device("cpu"))
    suite = build_suite(replace(config.score, num_prompts=6), config.data, teacher.world)
    mu, scale = config.score.mu, config.score.teacher_guidance
    painters = [
        (f"teacher, 20 steps, guidance {scale:g}", teacher.model, Sampler(num_steps=20, guidance_scale=scale, mu=mu))
    ]
    painters += [(f"teacher, {n} steps", teacher.model, Sampler(num_steps=n, mu=mu)) for n in (4, 1)]
    for arm in arms:
        found = latest_checkpoint(study.out / f"{arm}-{study.seeds_of(arm)[0]}")
        if found is not None:
            own = arm_config(study, arm, 0).student
            sampler = Sampler(num_steps=own.num_steps, mu=own.mu, walk=own.walk)
            painters.append((f"student, {own.num_steps} steps", load_student(found[0]), sampler))
    columns = [paint_suite(model, teacher.world, suite, sampler, range(6)) for _, model, sampler in painters]
    pictures = [column[row] for row in range(6) for column in columns]
    captions = [f"{name}. {suite.prompts[row].text}" for row in range(6) for name, *_ in painters]
    save_grid(pictures, captions, path)


def main(study: DistillStudy) -> dict[str, Any]:
    """Run what is missing, arm by arm; the results are written after each."""
    study.out.mkdir(parents=True, exist_ok=True)
    wanted = [(arm, seed) for arm in study.arms for seed in study.seeds_of(arm)]
    for arm, seed in [] if study.only_summary else wanted:
        config = arm_config(study, arm, seed)
        if not (config.run.out / "summary.json").exists():
            print(f"{arm}, seed {seed}", flush=True)
            distill.main(config)
            write_json(study.out / "distill.json", summarise(study))
    result = summarise(study)
    write_json(study.out / "distill.json", result)
    write_table(result, study.out / "distill.md")
    draw_pictures(study, study.out / "distill.png")
    print((study.out / "distill.md").read_text())
    return result


if __name__ == "__main__":
    main(tyro.cli(DistillStudy))
