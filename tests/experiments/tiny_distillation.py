"""A distillation of a second, and ways to kill it at a chosen moment."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments import distill, distill_state, training
from experiments.distill_config import (
    AdversaryConfig,
    CriticConfig,
    DistillConfig,
    MatchingConfig,
    ScoreSettings,
    StudentConfig,
)
from experiments.runs import RunConfig
from experiments.training import OptimConfig, TrainingState
from tests.experiments.tiny_run import MODEL, SCENES, prepare, tiny_config

STEPS = 6
PLACES = ("critic", "student", "student saved", "both saved", "name")
"""Before an update of the fake score, or of the student; within a checkpoint: after the first network's part, after the
second's, before the directory that joins them gets its name."""


def make_teacher(root: Path) -> Path:
    """A run of another name with random weights, and the frozen parts beneath it."""
    prepare(root)
    config = replace(tiny_config(root / "teacher"), optim=OptimConfig(dtype="float32"))
    state = TrainingState(MODEL, config.optim, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in state.model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    state.ema.load_state_dict(state.model.state_dict())
    state.step = 7
    return state.save(root / "teacher", config, keep=1)


def tiny_distillation(out: Path, teacher: Path, **changes: Any) -> DistillConfig:
    """A run of the smallest size that does everything."""
    config = DistillConfig(
        teacher=teacher,
        data=replace(SCENES, batch_size=4, num_slots=2, text_dropout=0.0),
        student=StudentConfig(mu=0.5, stop="sample", walk="renoise"),
        matching=MatchingConfig(guidance=3.0),
        adversary=AdversaryConfig(blocks=(0,), hidden_dim=8, weight=0.1),
        critic=CriticConfig(updates=2, lr=1e-3),
        optim=OptimConfig(lr=1e-3, betas=(0.0, 0.9), ema_decay=0.5, dtype="float32"),
        run=RunConfig(out=out, steps=STEPS, seed=3, log_every=1, checkpoint_every=2),
        score=ScoreSettings(num_prompts=0),
    )
    return replace(config, **changes)


def launch(config: DistillConfig, place: str = "", count: int = 1) -> None:
    """Run it in this process, which kills itself the ``count``-th time that it gets to ``place``."""
    torch.set_num_threads(1)
    seen = 0

    def arrive() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(function: Callable[..., Any], *, when: Callable[[Any], bool], after: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if not after and when(arguments[0]):
                arrive()
            result = function(*arguments, **options)
            if after and when(arguments[0]):
                arrive()
            return result

        return wrapped

    states = distill_state.DistillState
    if place == "critic":
        states.update_critic = wrap(states.update_critic, when=lambda _: True, after=False)
    elif place == "student":
        states.update_student = wrap(states.update_student, when=lambda _: True, after=False)
    elif place in ("student saved", "both saved"):
        fakes = place == "both saved"
        critic_lr = config.critic.lr
        # Student and fake score are told apart by the average that only the student keeps.
        kind = lambda state: (state.optim.ema_decay == 0 and state.optim.lr == critic_lr) == fakes  # noqa: E731
        save = training.TrainingState.save
        training.TrainingState.save = wrap(save, when=kind, after=True)
    elif place == "name":
        distill_state.write_json = wrap(distill_state.write_json, when=lambda path: path.name == "run.json", after=True)
    distill.main(config)


run = partial(launch)
