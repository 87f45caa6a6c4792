"""Before a study: what its arms cost. After it: scores, claims with their intervals, verdict, table and pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.ablations.rl import paired
from experiments.ablations.study import Claim, Study, StudyConfig, arm_parts, check_gates, full_parts, preset
from experiments.ablations.study_cost import GPUS, count_parameters, full_cost, step_flops, train_cpu_seconds
from experiments.ablations.study_exams import NUM_SHOWN, Answers, Exam, clipped, open_answers, saturation
from experiments.estimate import table
from experiments.estimate_rows import RentConfig
from experiments.pictures import save_grid
from experiments.pretrain_config import PretrainConfig
from experiments.quickstart_score import Suite, judge
from experiments.runs import cached_stage, config_dict, config_hash, provenance, write_json
from experiments.training import read_run
from lensmini.data import KINDS, render_scene

__all__ = [
    "RULE",
    "decide",
    "describe_full",
    "describe_mini",
    "exam_limits",
    "judge_claim",
    "summarise",
    "write_result",
]

RULE = (
    "A difference has two 95 % intervals: Student's t over seeds, and a bootstrap over prompts of the mean over seeds, paired "
    "by seed, prompt and noise. That one side is greater is supported if both lie above 0, else refuted if both lie below the "
    "claim's margin. That two sides are equal is supported if both lie within the margin either way, else refuted if both lie "
    "on the same side of 0. Everything else is undecided, and so are fewer than two seeds, and shares of right answers of "
    "which neither side reaches 0.05. Reproduced: every deciding claim is supported. Not reproduced: one is refuted. "
    "Inconclusive: neither."
)
"""Fixed before any study ran."""
_FLOOR = 0.05
_SCORES = ("strict", "loose", "atom", "saturation", "clipped")
_CEILING = 0.9
"""Canvases on which perfect pictures lose more than this leaves through the autoencoder are named in the result."""


def judge_claim(claim: Claim, gap: Mapping[str, Any]) -> str:
    """What a difference says about a claim, by :data:`RULE`.

    Args:
        claim: with its kind and margin.
        gap: of ``paired``: ``interval_seeds`` (or None) and ``interval_prompts``, with ``levels``, both sides' means.

    Returns:
        "supported", "refuted" or "undecided".

    Example:
        >>> claim = Claim(text="a helps", ours=("a", "x"), others=("b", "x"))
        >>> judge_claim(claim, {"interval_seeds": [0.02, 0.2], "interval_prompts": [0.05, 0.15], "levels": [0.4, 0.3]})
        'supported'
    """
    floor = _FLOOR if claim.score in ("strict", "loose") else 0.0
    if gap["interval_seeds"] is None or max(gap["levels"]) < floor:
        return "undecided"
    lows, highs = zip(gap["interval_seeds"], gap["interval_prompts"], strict=True)
    if claim.kind == "greater":
        return "supported" if min(lows) > 0 else "refuted" if max(highs) < claim.margin else "undecided"
    if min(lows) > -claim.margin and max(highs) < claim.margin:
        return "supported"
    return "refuted" if min(lows) > 0 or max(highs) < 0 else "undecided"


def decide(claims: Sequence[Claim], judgements: Sequence[str]) -> str:
    """The verdict of a study: reproduced, not reproduced or inconclusive, by :data:`RULE`."""
    deciding = [found for claim, found in zip(claims, judgements, strict=True) if claim.deciding]
    if deciding and set(deciding) == {"supported"}:
        return "reproduced"
    return "not reproduced" if "refuted" in deciding else "inconclusive"


def summarise(study: Study, options: StudyConfig) -> dict[str, Any]:
    """Everything that is known so far.

    Returns:
        The result in the form of all results: question, command, arms with the scores of each seed and intervals, claims,
        verdict, what limits the scores, gates, settings tried, provenance.
    """
    base = preset(study, options)
    exams = study.exams(base, options.prompts_per_kind)
    found: dict[str, dict[int, dict[str, Answers]]] = {}
    for arm in study.arms:
        for seed in options.seeds:
            config = arm_parts(study, options, arm, seed)[-1]
            known = {name: open_answers(config, exam, seed) for name, exam in exams.items()}
            if all(known.values()):
                found.setdefault(arm, {})[seed] = {name: one for name, one in known.items() if one is not None}
    claims = [_describe_claim(claim, exams, found) for claim in study.claims]
    limits, gates = {}, {}
    for arm in found:
        config = arm_parts(study, options, arm, options.seeds[0])[-1]
        key = f"autoencoder-{config_hash(config.miniature.autoencoder)}"
        if key not in limits:
            limits[key] = exam_limits(config, exams, options.out.parent)
            gates |= {arm: check_gates(config, options.out.parent)[1]}
    flags = f" --steps {options.steps}" if options.steps else ""
    return {
        "name": study.name,
        "question": study.question,
        "paper": study.paper,
        "command": f"python -m experiments.ablations.{study.name}{flags}",
        "metric": f"share of {len(KINDS) * options.prompts_per_kind} prompts painted without a mistake (strict)",
        "rule": RULE,
        "verdict": decide(study.claims, [row["judgement"] for row in claims]),
        "claims": claims,
        "arms": {arm: _describe_arm(study, options, arm, rows, exams) for arm, rows in found.items()},
        "limits": limits,
        "gates": gates,
        "tried": list(study.tried),
        "remarks": list(study.remarks),
        **({} if study.measures is None or not found else {"measures": study.measures(study, options)}),
        "smallest": options.smallest,
        "provenance": provenance(),
    }


def _describe_claim(
    claim: Claim, exams: Mapping[str, Exam], found: Mapping[str, Mapping[int, Mapping[str, Answers]]]
) -> dict[str, Any]:
    (arm, exam), (other_arm, other_exam) = claim.ours, claim.others
    if exams[exam].asked != exams[other_exam].asked:
        raise ValueError(f"claims: expected exams of the same questions, got {exam!r} and {other_exam!r}")
    row = {**config_dict(claim), "gaps": {}, "judgement": "undecided"}
    seeds = [seed for seed in found.get(arm, {}) if seed in found.get(other_arm, {})]
    for score in dict.fromkeys([claim.score, "strict", "loose"]) if seeds else ():
        ours = [getattr(found[arm][seed][exam], score) for seed in seeds]
        others = [getattr(found[other_arm][seed][other_exam], score) for seed in seeds]
        levels = [_mean([_mean(answers) for answers in side]) for side in (ours, others)]
        row["gaps"][score] = {**paired(ours, others), "levels": levels, "seeds": seeds}
    if seeds:
        row["judgement"] = judge_claim(claim, row["gaps"][claim.score])
    return row


def _describe_arm(
    study: Study, options: StudyConfig, arm: str, rows: Mapping[int, Mapping[str, Answers]], exams: Mapping[str, Exam]
) -> dict[str, Any]:
    parts = {seed: arm_parts(study, options, arm, seed) for seed in rows}
    first = next(iter(parts.values()))
    seeds = {
        str(seed): {
            "exams": {name: _scores(answers, exams[name]) for name, answers in row.items()},
            "runs": [config.run.out.name for config in parts[seed]],
            "config_hash": config_hash(parts[seed][-1]),
            "commit": read_run(parts[seed][-1].run.out / f"step-{parts[seed][-1].run.steps:06d}")["provenance"][
                "commit"
            ],
            "train_cpu_seconds": math.fsum(train_cpu_seconds(config) for config in parts[seed]),
            "exam_cpu_seconds": math.fsum(answers.cpu_seconds for answers in row.values()),
        }
        for seed, row in rows.items()
    }
    means = {
        name: {score: math.fsum(row["exams"][name][score] for row in seeds.values()) / len(seeds) for score in _SCORES}
        for name in exams
    }
    return {
        "changes": config_dict(study.arms[arm].changes),
        "first": config_dict(study.arms[arm].first),
        "steps": [config.run.steps for config in first],
        "flops": math.fsum(config.run.steps * step_flops(config) for config in first),
        "mean": means,
        "seeds": seeds,
    }


def _scores(answers: Answers, exam: Exam) -> dict[str, Any]:
    kinds = [one.kind for one in exam.prompts]
    labels = ["{}x{}".format(*canvas) for canvas in exam.canvases]
    low, high = _interval(answers.strict)
    return {
        **{name: _mean(getattr(answers, name)) for name in _SCORES},
        "interval": [low, high],
        "by_kind": {name: _by(answers, kinds, name) for name in ("strict", "loose")},
        "by_canvas": {name: _by(answers, labels, name) for name in ("strict", "loose")},
    }


def _by(answers: Answers, labels: Sequence[str], score: str) -> dict[str, float]:
    pairs = list(zip(labels, getattr(answers, score), strict=True))
    return {label: _mean([one for other, one in pairs if other == label]) for label in dict.fromkeys(labels)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _interval(answers: Sequence[int]) -> tuple[float, float]:
    one = paired([answers], [[0] * len(answers)])["interval_prompts"]
    return one[0], one[1]


def exam_limits(config: PretrainConfig, exams: Mapping[str, Exam], root: Path) -> dict[str, Any]:
    """What perfect pictures score in each exam: themselves, for the wrong prompts, and through the autoencoder, by canvas too.

    Args:
        config: whose autoencoder.
        exams: by name; those that differ in the sampler alone are measured once.
        root: where it is kept.

    Returns:
        By exam the numbers, and under ``limited`` the canvases where the autoencoder leaves less than 0.9.
    """
    found = {name: _exam_limits(config, exam, root) for name, exam in exams.items()}
    low = {
        f"{name} {canvas}": value
        for name, row in found.items()
        for canvas, value in row["autoencoder_by_canvas"].items()
        if value < _CEILING
    }
    return {**found, "limited": low}


def _exam_limits(config: PretrainConfig, exam: Exam, root: Path) -> dict[str, Any]:
    """What perfect pictures score, themselves, for the wrong prompts, and through the autoencoder, by canvas too."""
    key = {"autoencoder": config.miniature.autoencoder, "asked": exam.asked}

    def make(directory: Path) -> None:
        world, _ = check_gates(config, root)
        perfect = [render_scene(one.scene, *canvas) for one, canvas in zip(exam.prompts, exam.canvases, strict=True)]
        score = judge(Suite(list(exam.prompts), list(exam.canvases)), perfect, world.autoencoder)
        kept = ("strict", "loose", "chance_strict", "chance_loose", "autoencoder_strict", "autoencoder_loose")
        canvases = {name: one["autoencoder_strict"] for name, one in score["by_canvas"].items()}
        write_json(
            directory / "limits.json",
            {
                **{name: score[name] for name in kept},
                "saturation": _mean([saturation(picture) for picture in perfect]),
                "clipped": _mean([clipped(picture) for picture in perfect]),
                "autoencoder_by_canvas": canvases,
            },
        )

    path, _ = cached_stage(root, "exam-limits", key, make, quiet=True)
    return json.loads((path / "limits.json").read_text())


def write_result(study: Study, options: StudyConfig, result: Mapping[str, Any]) -> None:
    """``NAME.json``, ``table.md`` and, once there are answers, ``pictures-EXAM.png``."""
    write_json(options.out / f"{study.name}.json", result)
    (options.out / "table.md").write_text(_table(result))
    exams = study.exams(preset(study, options), options.prompts_per_kind)
    for name in study.shown or tuple(exams)[:1]:
        _draw(study, options, name, exams[name], list(result["arms"]))


def _table(result: Mapping[str, Any]) -> str:
    arms, exams = result["arms"], list(next(iter(result["arms"].values()))["mean"]) if result["arms"] else []
    lines = [
        f"| arm (seeds) | steps | CPU-s | {' | '.join(f'{name}: strict (loose)' for name in exams)} |",
        "| --- | --- | --- |" + " --- |" * len(exams),
    ]
    for name, arm in arms.items():
        cpu = _mean([row["train_cpu_seconds"] for row in arm["seeds"].values()])
        scores = [f"{arm['mean'][exam]['strict']:.3f} ({arm['mean'][exam]['loose']:.2f})" for exam in exams]
        steps = " + ".join(map(str, arm["steps"]))
        lines.append(f"| {name} ({len(arm['seeds'])}) | {steps} | {cpu:.0f} | {' | '.join(scores)} |")
    lines += ["", "| claim | difference | over seeds | over prompts | found |", "| --- | --- | --- | --- | --- |"]
    for claim in result["claims"]:
        gap = claim["gaps"].get(claim["score"])
        cells = ["", "", ""] if gap is None else [f"{gap['mean']:+.3f}", *map(_ends, _intervals(gap))]
        found = claim["judgement"] if claim["deciding"] else f"{claim['judgement']} (not deciding)"
        lines.append(f"| {claim['text']} | {' | '.join(cells)} | {found} |")
    return "\n".join([*lines, "", f"Verdict: {result['verdict']}.", ""])


def _intervals(gap: Mapping[str, Any]) -> tuple[Any, Any]:
    return gap["interval_seeds"], gap["interval_prompts"]


def _ends(interval: Sequence[float] | None) -> str:
    return "" if interval is None else "{:+.3f} to {:+.3f}".format(*interval)


def _draw(study: Study, options: StudyConfig, name: str, exam: Exam, arms: Sequence[str]) -> None:
    columns = []
    for arm in arms:
        known = [open_answers(arm_parts(study, options, arm, seed)[-1], exam, seed) for seed in options.seeds]
        columns += [(arm, next(one for one in known if one is not None))]
    if not columns:
        return
    painted = [load_file(answers.directory / "shown.safetensors") for _, answers in columns]
    pictures, captions = list[torch.Tensor](), list[str]()
    for index in range(min(NUM_SHOWN, len(exam.prompts))):
        for (arm, answers), shown in zip(columns, painted, strict=True):
            pictures.append(shown[f"{index:02d}"])
            verdict = "right" if answers.strict[index] else "wrong"
            captions.append(f"{arm} [{verdict}]. {exam.prompts[index].text}")
    save_grid(pictures, captions, options.out / f"pictures-{name}.png", columns=len(columns))


def describe_mini(study: Study, options: StudyConfig, arms: Sequence[str]) -> str:
    """A row for each arm of the miniature: parameters, steps of its parts, FLOPs of a run."""
    rows = []
    for arm in arms:
        parts = arm_parts(study, options, arm, options.seeds[0])
        flops = sum(config.run.steps * step_flops(config) for config in parts)
        steps = " + ".join(str(config.run.steps) for config in parts)
        rows.append(
            [
                arm,
                f"{count_parameters(parts[-1]):,}",
                steps,
                f"{flops:.3e}",
                " ".join(config.run.out.name for config in parts),
            ]
        )
    title = f"{study.question} ({len(options.seeds)} seeds each)"
    return table(title, ["arm", "parameters", "steps", "FLOPs of a run", "directory of the first seed"], rows)


def describe_full(study: Study, arms: Sequence[str]) -> str:
    """A row for each part of each arm at full scale, and what each changes."""
    rows, total = [], 0.0
    trained = [arm for arm in arms if study.arms[arm].existing is None]
    for arm in trained:
        parts = full_parts(study, arm)
        for number, config in enumerate(parts):
            cost = full_cost(config)
            total += cost["gpu_hours"]
            name = arm if number == len(parts) - 1 else f"{arm}, first"
            numbers = [cost["parameters"], cost["steps"], cost["images"]]
            rows.append(
                [name, *(f"{one:,.0f}" for one in numbers), f"{cost['flops']:.3e}", f"{cost['gpu_hours']:,.0f}"]
            )
    rows.append(["total, one seed", "", "", "", "", f"{total:,.0f}"])
    rent = RentConfig(gpus=GPUS)
    head = f"{study.question} At full scale on {GPUS} A100, {rent.mfu:.0%} of the peak ASSUMED, encoders included:"
    lines = [table(head, ["arm", "parameters", "steps", "images", "training FLOPs", "A100-hours"], rows)]
    lines += [f"{arm}: {_told(study.arms[arm].full)}" for arm in trained]
    lines += [f"{arm}: a finished run sits the exams, nothing is trained" for arm in arms if arm not in trained]
    return "\n".join(lines)


def _told(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {json.dumps(config_dict(value))}" for name, value in changes.items()) or "the preset"
