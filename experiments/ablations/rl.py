"""The RL study in miniature: does rubric RL help, how is a careless reward hacked, and which objective and prompts matter.

    python -m experiments.ablations.rl --out runs/rl                          every arm, three seeds: hours
    python -m experiments.ablations.rl --out runs/rl --arms nft naive         some
    python -m experiments.ablations.rl --out runs/rl --only-summary           results so far

The paper has no row before RL, no reward ablation, no seeds (arXiv 2605.21573, section on RL); its prompt-set rows
(a quarter, a half, all; without one category) are here in miniature. All arms start from the same base; those of the
preset's length, and those that are short, make the same number of pictures from the same prompts and noise. Scores are of
held-out prompts, paired by prompt and noise. Finished runs are kept, so that the same command goes on; ``OUT/rl.json`` is what
``experiments/results/rl.json`` holds.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments import reinforce
from experiments.ablations.rl_report import draw_curves, draw_pictures, write_table
from experiments.reinforce_config import ReinforceConfig, mini
from experiments.runs import config_hash, provenance, read_jsonl, write_json

__all__ = ["ARMS", "RlStudy", "arm_config", "main", "paired", "run_arm", "summarise"]

ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "nft": {},
    "naive_full": {"reward": {"kind": "naive"}},
    "grpo_ddim_full": {"objective": {"name": "grpo", "kernel": "ddim", "eta": 0.7}},
    "grpo_ddim_slow": {"objective": {"name": "grpo", "kernel": "ddim", "eta": 0.7}, "optim": {"lr": 1.5e-4}},
    "awm_slow": {"objective": {"name": "awm"}, "optim": {"lr": 1.5e-4}},
    "nft_short": {},
    "naive": {"reward": {"kind": "naive"}},
    "grpo_ddim": {"objective": {"name": "grpo", "kernel": "ddim", "eta": 0.7}},
    "awm": {"objective": {"name": "awm"}},
    "quarter": {"prompts": {"share": 0.25}},
    "without_relation": {"prompts": {"without": ("relation",)}},
    "half": {"prompts": {"share": 0.5}},
    "grpo_flow": {"objective": {"name": "grpo", "kernel": "flow", "eta": 0.7}},
    "grpo_cps": {"objective": {"name": "grpo", "kernel": "cps", "eta": 0.5}},
    "model": {"reward": {"kind": "model"}},
    "bare": {"prompts": {"form": "short"}},
    "bare_naive": {"prompts": {"form": "short"}, "reward": {"kind": "naive"}},
}
"""What each arm changes of the preset ``mini``."""

FULL = ("nft", "naive_full", "grpo_ddim_full", "grpo_ddim_slow", "awm_slow")
"""These have the preset's length, and are compared with the first; "slow" is a quarter of its rate, which was chosen for NFT
and at which AWM's reward falls to 0.4 within 40 steps."""
BARE = ("bare", "bare_naive")
"""These are trained and scored on bare requests for ``RlStudy.bare_steps``, and are compared with the first; the base paints
what it likes there, so that too much is a way to please. The others have ``RlStudy.short_steps`` and are compared with
"nft_short"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RlStudy:
    """Arms and seeds."""

    out: Path = Path("runs/rl")
    """A directory for each run, and the results."""
    base: Path = Path("runs/quickstart")
    """Where all start."""
    arms: tuple[str, ...] = tuple(ARMS)
    """In this order, all seeds of one before the next."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of prompts' order, noise and times."""
    short_steps: int = 16
    """Steps of the arms that do not have the preset's length."""
    bare_steps: int = 40
    """Steps of those on bare requests."""
    processes: int = 1
    """Of each run; it changes no result."""
    only_summary: bool = False
    """Run nothing."""

    def __post_init__(self) -> None:
        if not set(self.arms) <= set(ARMS):
            raise ValueError(f"arms: expected some of {list(ARMS)}, got {list(self.arms)}")


def arm_config(study: RlStudy, arm: str, seed: int) -> ReinforceConfig:
    """One run of the study."""
    config = replace(mini(), base=study.base)
    for name, values in ARMS[arm].items():
        config = replace(config, **{name: replace(getattr(config, name), **values)})
    run = replace(config.run, out=study.out / f"{arm}-{seed}", seed=seed, processes=study.processes)
    if arm in FULL:
        return replace(config, run=run)
    steps = study.bare_steps if arm in BARE else study.short_steps
    return replace(config, run=replace(run, steps=steps), eval=replace(config.eval, num_guided=126))


def run_arm(study: RlStudy, arm: str, seed: int) -> Path:
    """Train and score a run, unless it is there; returns its summary."""
    config = arm_config(study, arm, seed)
    summary = config.run.out / "summary.json"
    if not summary.exists():
        reinforce.main(config)
        if not summary.exists():
            raise SystemExit(f"rl: {arm}, seed {seed} was stopped; the same command goes on from there")
    return summary


def summarise(study: RlStudy) -> dict[str, Any]:
    """Everything that is known so far, with intervals.

    Returns:
        For each arm the scores of each seed and, against the base, paired differences with their 95 % intervals: Student's t
        over seeds, and a bootstrap over prompts of the mean over seeds.
    """
    arms: dict[str, Any] = {}
    base: dict[str, Any] | None = None
    for arm in ARMS:
        files = {seed: study.out / f"{arm}-{seed}" / "summary.json" for seed in study.seeds}
        found = {seed: json.loads(path.read_text()) for seed, path in files.items() if path.exists()}
        if found:
            base = base or (None if arm in BARE else next(iter(found.values()))["before"])
            arms[arm] = _describe_arm(study, arm, found)
    if base is None:
        raise ValueError(f"out: expected finished runs in {study.out}, found none")
    compared = {
        f"{reference} - {arm}": paired(
            [arms[reference]["answers"][s] for s in shared], [arms[arm]["answers"][s] for s in shared]
        )
        for arm in arms
        if arm != (reference := _reference(arm))
        and reference in arms
        and (shared := [s for s in arms[reference]["answers"] if s in arms[arm]["answers"]])
    }
    for arm in arms.values():
        del arm["answers"]
    return {
        "question": "Does rubric RL raise the guidance-free score, at what price? Reward, objective, prompts?",
        "command": "python -m experiments.ablations.rl",
        "config_hash": config_hash(arm_config(study, "nft", 0)),
        "base": {**_scores(base), "num_prompts": base["num_prompts"]},
        "arms": arms,
        "compared": compared,
        "provenance": provenance(),
    }


def _reference(arm: str) -> str:
    return FULL[0] if arm in FULL else BARE[0] if arm in BARE else "nft_short"


def _describe_arm(study: RlStudy, arm: str, found: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    after, before = [s["after"] for s in found.values()], [s["before"] for s in found.values()]
    free, base_free = ([one["free"]["answers"] for one in part] for part in (after, before))
    base_guided, guided = ([one["guided"]["answers"] for one in part] for part in (before, after))
    shared = [row[: len(guided[0])] for row in base_guided]
    cpu = [
        math.fsum(row["cpu_seconds"] for row in read_jsonl(study.out / f"{arm}-{seed}" / "timing.jsonl"))
        for seed in found
    ]
    return {
        "changes": ARMS[arm],
        **({"base": _scores(before[0])} if arm in BARE else {}),
        "seeds": {str(seed): _scores(s["after"]) for seed, s in found.items()},
        "mean": _mean([_scores(one) for one in after]),
        "free_minus_base_free": paired(free, base_free),
        "free_minus_base_guided": paired(free, base_guided),
        "guided_minus_base_guided": paired(guided, shared),
        "train_cpu_seconds": cpu,
        "config_hash": [s["config_hash"] for s in found.values()],
        "commit": sorted({s["provenance"]["commit"] or "?" for s in found.values()}),
        "answers": dict(zip(found, free, strict=True)),
    }


def _scores(score: Mapping[str, Any]) -> dict[str, Any]:
    kept = (
        "strict",
        "loose",
        "rubric",
        "held_out",
        "held_out_strict",
        "foreground",
        "background_right",
        "objects",
        "by_kind",
    )
    parts = {name: {key: score[name][key] for key in kept if key in score[name]} for name in ("free", "guided")}
    return {**parts, "diversity": score["diversity"]}


def _mean(rows: Sequence[Any]) -> Any:
    if isinstance(rows[0], Mapping):
        return {key: _mean([row[key] for row in rows]) for key in rows[0]}
    return math.fsum(rows) / len(rows)


def paired(ones: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Mean difference of answers paired by seed and prompt, and two intervals of 95 %."""
    gaps = torch.tensor(ones, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    seeds = gaps.mean(1)
    factor = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(seeds))
    half = factor * (seeds.std() / len(seeds) ** 0.5).item() if factor else None
    mean, by_prompt = seeds.mean().item(), gaps.mean(0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(by_prompt), (4000, len(by_prompt)), generator=generator)
    low, high = by_prompt[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "mean": mean,
        "by_seed": seeds.tolist(),
        "interval_seeds": None if half is None else [mean - half, mean + half],
        "interval_prompts": [low, high],
    }


def main(study: RlStudy) -> dict[str, Any]:
    """Run what is missing, arm by arm; the results are written after each run."""
    result: dict[str, Any] = {}
    work: list[tuple[str, int]] = [(arm, seed) for arm in study.arms for seed in study.seeds]
    for arm, seed in [] if study.only_summary else work:
        print(f"{arm}, seed {seed}", flush=True)
        run_arm(study, arm, seed)
        write_json(study.out / "rl.json", summarise(study))
    result = summarise(study)
    write_json(study.out / "rl.json", result)
    write_table(result, study.out / "table.md")
    draw_curves(study.out, tuple(result["arms"]), study.seeds, study.out / "curves.png")
    draw_pictures(study, study.out / "pictures.png")
    print((study.out / "table.md").read_text())
    return result


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    make: Callable[..., RlStudy] = tyro.cli
    main(make(RlStudy, args=arguments, prog="python -m experiments.ablations.rl"))


if __name__ == "__main__":
    cli()
