"""RL of a second, and ways to end it at a chosen moment: ``python -m tests.experiments.tiny_reinforce ROOT OUT [WHERE:COUNT]``.

At the COUNT-th time that the run gets to WHERE it gets SIGKILL. The judge's scores, and which of them fail, are functions of
the picture; it notes every question that it answers in ``ROOT/asked-OUT.txt``.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments import reinforce, reinforce_state, training
from experiments.reinforce_config import ReinforceConfig, smallest
from experiments.training import TrainingState
from lensmini.parallel import Group, run_processes
from lensmini.rewards.judges import JudgeRequest, ScriptedJudge
from tests.experiments import tiny_run

PLACES: dict[str, tuple[Any, str]] = {
    "rollout": (reinforce, "roll_out"),
    "verdicts": (reinforce, "collect_verdicts"),
    "gradient": (reinforce, "accumulate_chunk"),
    "update": (training.TrainingState, "update"),
    "follow": (reinforce_state.Policies, "follow"),
    "save": (reinforce_state.Policies, "save"),
    "file": (training, "save_file"),
}
"""Before a chunk's pictures; before a step's verdicts are collected; before a chunk's gradient; before the optimiser's step;
before the old policy follows; before a checkpoint; before one of its files."""


def prepare(root: Path) -> Path:
    """Encoders, and a base whose velocities are not zero."""
    tiny_run.prepare(root)
    config = tiny_run.tiny_config(root / "base", processes=1)
    config = replace(config, optim=replace(config.optim, dtype="float32"))
    state = TrainingState(tiny_run.MODEL, config.optim, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    state.ema.load_state_dict(state.model.state_dict())
    return state.save(root / "base", config, keep=1)


def tiny_config(root: Path, out: str = "run", **changes: Any) -> ReinforceConfig:
    """The smallest run; ``changes`` are fields of its groups, as ``objective={"name": "awm"}``."""
    config = smallest()
    config = replace(config, base=root / "base", optim=replace(config.optim, dtype="float32", lr=1e-2))
    changes = {"run": {"out": root / out, "seed": 3, "steps": 4}, **changes}
    changes["run"] = {"out": root / out, "seed": 3, "steps": 4, **changes["run"]}
    groups = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **groups)


def verdict(request: JudgeRequest) -> float | str:
    """A bit of the picture's hash, or a failure for some."""
    digit = int(request.image_hash[:6], 16) + len(request.criterion.id)
    return "timeout" if digit % 19 == 0 else float(digit % 3 == 0)


def noting_judge(file: Path) -> ScriptedJudge:
    """The same, with every scored question written down."""

    def answer(request: JudgeRequest) -> float | str:
        value = verdict(request)
        if not isinstance(value, str):
            with file.open("a") as stream:
                stream.write(f"{request.image_hash} {request.criterion.id}\n")
        return value

    return ScriptedJudge(answer)


def strike_at(where: str, count: int) -> None:
    """Have this process killed at the COUNT-th call."""
    owner, name = PLACES[where]
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def train(group: Group, root: Path, config: ReinforceConfig) -> None:
    """One process of a run with the noting judge."""
    reinforce.train(group, config, noting_judge(root / f"asked-{config.run.out.name}.txt"))


def main(root: Path, out: str, strike: str | None = None, processes: int = 1) -> None:
    """Run, or be killed."""
    if strike:
        where, count = strike.split(":")
        strike_at(where, int(count))
    torch.set_num_threads(1)
    config = tiny_config(root, out, run={"processes": processes})
    run_processes(train, processes, root, config)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4])
