"""Consistency baselines of the distillation, in miniature: what do they give with the recipe's teacher, data and budget?

    python -m experiments.ablations.distill_consistency                             every arm, three seeds
    python -m experiments.ablations.distill_consistency --arms meanflow --seeds 0   some
    python -m experiments.ablations.distill_consistency --only-summary              results so far

Lens does not use these losses (arXiv 2605.21573 D.2), and has no row without its recipe. Every student starts from the
teacher's weights and is scored as in ``experiments.distill``: prompts and noise are the teacher's, four calls of the
network without guidance. The rows "teacher, 4 steps" are the starting point: the same sampler before any training.
Finished runs are kept, so that the same command goes on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments import distill
from experiments.distill_config import DistillConfig, consistency_mini, meanflow_mini, rcm_mini
from experiments.distill_score import Sampler, paired_ratio, teacher_row
from experiments.distill_state import Teacher
from experiments.runs import config_hash, provenance, write_json

__all__ = ["ARMS", "ConsistencyStudy", "arm_config", "main", "summarise"]


def _discrete_segments() -> DistillConfig:
    base = consistency_mini()
    student = replace(base.student, walk="euler")
    return replace(base, student=student, consistency=replace(base.consistency, ends="segment"))


ARMS: dict[str, Callable[[], DistillConfig]] = {
    "consistency": consistency_mini,
    "consistency_segment": _discrete_segments,
    "meanflow": meanflow_mini,
    "rcm": rcm_mini,
}
"""By name: the presets of ``experiments.distill``, and discrete distillation over the student's own steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyStudy:
    """Arms and seeds."""

    out: Path = Path("runs/distill-study")
    """A directory for each run, and the results; the recipe's study has the same, so that both share the teacher's rows."""
    teacher: Path | None = None
    """By default runs/quickstart."""
    arms: tuple[str, ...] = tuple(ARMS)
    """All arms of one seed before the next seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the order of samples, noise and times."""
    num_prompts: int = 1008
    """Prompts of the score."""
    steps: dict[str, int] | None = None
    """Student steps by arm, instead of the presets'."""
    only_summary: bool = False
    """Train nothing."""

    def __post_init__(self) -> None:
        if not set(self.arms) <= set(ARMS):
            raise ValueError(f"arms: expected some of {list(ARMS)}, got {list(self.arms)}")


def arm_config(study: ConsistencyStudy, arm: str, seed: int) -> DistillConfig:
    """One run of the study."""
    config = ARMS[arm]()
    steps = (study.steps or {}).get(arm, config.run.steps)
    run = replace(config.run, out=study.out / f"{arm}-{seed}", seed=seed, steps=steps, checkpoint_every=0)
    score = replace(config.score, num_prompts=study.num_prompts)
    return replace(config, teacher=study.teacher, run=run, score=score)


def summarise(study: ConsistencyStudy) -> dict[str, Any]:
    """Every finished run against its teacher: ratios of strict scores with a bootstrap over prompts, both paired."""
    config = arm_config(study, study.arms[0], study.seeds[0])
    teacher = Teacher(config, torch.device("cpu"))
    score = config.score
    full = Sampler(num_steps=score.teacher_steps, guidance_scale=score.teacher_guidance, mu=score.mu)
    samplers = {
        "teacher, 20 guided steps": full,
        "teacher, 4 guided steps": Sampler(num_steps=4, guidance_scale=score.teacher_guidance, mu=score.mu),
        "teacher, 4 steps": Sampler(num_steps=4, mu=config.student.mu),
        "teacher, 4 steps with fresh noise": Sampler(num_steps=4, mu=config.student.mu, walk="renoise"),
    }
    rows = {name: teacher_row(config, teacher, sampler) for name, sampler in samplers.items()}
    reference = rows["teacher, 20 guided steps"]["right"]
    arms: dict[str, Any] = {}
    for arm in ARMS:
        files = [(seed, study.out / f"{arm}-{seed}" / "summary.json") for seed in study.seeds]
        found = {seed: json.loads(path.read_text()) for seed, path in files if path.exists()}
        if not found:
            continue
        students = [one["student"] for one in found.values()]
        arms[arm] = {
            "seeds": {str(seed): _short(one["student"]) for seed, one in found.items()},
            "strict": sum(row["strict"] for row in students) / len(students),
            "ratio_to_teacher": paired_ratio([row["right"] for row in students], reference)._asdict(),
            "ratio_to_start": paired_ratio(
                [row["right"] for row in students],
                rows[
                    "teacher, 4 steps" if ARMS[arm]().student.walk == "euler" else "teacher, 4 steps with fresh noise"
                ]["right"],
            )._asdict(),
            "steps": [one["step"] for one in found.values()],
            "train_cpu_seconds": [one["cpu_seconds"] for one in found.values()],
            "config_hash": config_hash(arm_config(study, arm, study.seeds[0])),
            "commit": sorted({one["provenance"]["commit"] or "?" for one in found.values()}),
        }
    return {
        "question": "How much of the guided teacher's score do consistency baselines keep in four calls without guidance?",
        "command": "python -m experiments.ablations.distill_consistency",
        "metric": f"strict score on {study.num_prompts} prompts; ratios with 95 % intervals, a bootstrap over prompts",
        "teacher": {name: _short(row) for name, row in rows.items()},
        "arms": arms,
        "provenance": provenance(),
    }


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("strict", "loose", "atom", "diversity", "calls")}


def main(study: ConsistencyStudy) -> None:
    """Train what is missing, and write ``OUT/distill_consistency.json``."""
    study.out.mkdir(parents=True, exist_ok=True)
    for seed in study.seeds:
        for arm in study.arms:
            config = arm_config(study, arm, seed)
            if not study.only_summary and not (config.run.out / "summary.json").exists():
                distill.main(config)
    result = summarise(study)
    write_json(study.out / "distill_consistency.json", result)
    for name, row in result["teacher"].items():
        print(f"{name:36} strict {row['strict']:.3f}")
    for name, row in result["arms"].items():
        ratio = row["ratio_to_teacher"]
        print(f"{name:36} strict {row['strict']:.3f}, {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")


if __name__ == "__main__":
    main(tyro.cli(ConsistencyStudy))
