"""Scores of finished RL runs on other prompts than those of the study, so that no choice was made on them.

python -m experiments.ablations.rl_rescore --out runs/rl --eval-seed 5000143           five CPU-minutes
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

from experiments.ablations.rl import RlStudy, arm_config, paired
from experiments.checkpoints import find_checkpoint, load_checkpoint
from experiments.reinforce_eval import evaluate, held_out_prompts
from experiments.runs import latest_checkpoint, provenance, write_json
from lensmini.parallel import Group

__all__ = ["RescoreConfig", "main"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RescoreConfig:
    """Runs and prompts."""

    out: Path = Path("runs/rl")
    """Of the study; ``ARM-rescored-SEED.json`` is written there."""
    base: Path = Path("runs/quickstart")
    """Where the runs started."""
    arm: str = "nft"
    """Which runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs."""
    eval_seed: int = 5_000_143
    """Of the prompts."""
    seen: tuple[int, ...] = (5_000_011, 5_000_077)
    """Seeds of prompts that were scored before; what they share with these is left out."""


def main(config: RescoreConfig) -> dict[str, Any]:
    """Paint and judge, print and write."""
    torch.set_num_threads(1)
    study = arm_config(RlStudy(out=config.out, base=config.base), config.arm, config.seeds[0])
    study = replace(study, eval=replace(study.eval, seed=config.eval_seed, variety=2))
    before = [held_out_prompts(replace(study, eval=replace(study.eval, seed=seed))) for seed in config.seen]
    known = {prompt.text for prompts in before for prompt in prompts}
    places = [index for index, prompt in enumerate(held_out_prompts(study)) if prompt.text not in known]
    model, world = load_checkpoint(find_checkpoint(config.base), study.base_weights, quiet=True)
    base = evaluate(model, world, study, Group(0, 1))
    scores = []
    for seed in config.seeds:
        found = latest_checkpoint(config.out / f"{config.arm}-{seed}")
        if found is None:
            raise SystemExit(f"rl_rescore: {config.out / f'{config.arm}-{seed}'} has no checkpoint")
        model.load_state_dict(load_file(found[0] / "ema.safetensors"))
        scores.append(evaluate(model, world, study, Group(0, 1), num_guided=1))
    after = [_pick(score["free"]["answers"], places) for score in scores]
    free, guided = (_pick(base[name]["answers"], places) for name in ("free", "guided"))
    result = {
        "command": f"python -m experiments.ablations.rl_rescore --arm {config.arm} --eval-seed {config.eval_seed}",
        "num_prompts": len(places),
        "base_free": sum(free) / len(free),
        "base_guided": sum(guided) / len(guided),
        "free": [sum(row) / len(row) for row in after],
        "free_minus_base_free": paired(after, [free] * len(after)),
        "free_minus_base_guided": paired(after, [guided] * len(after)),
        "held_out": {"base_free": base["free"]["held_out"], "free": [score["free"]["held_out"] for score in scores]},
        "provenance": provenance(),
    }
    write_json(config.out / f"{config.arm}-rescored-{config.eval_seed}.json", result)
    print({name: value for name, value in result.items() if name != "provenance"})
    return result


def _pick(answers: Sequence[int], places: Sequence[int]) -> list[int]:
    return [answers[place] for place in places]


if __name__ == "__main__":
    main(tyro.cli(RescoreConfig, prog="python -m experiments.ablations.rl_rescore"))
