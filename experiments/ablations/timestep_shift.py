"""Which time shift is best to paint with, and to train with (arXiv 2605.21573 has different ones)?

    python -m experiments.ablations.timestep_shift --arms base           shifts of painting alone: nothing is trained
    python -m experiments.ablations.timestep_shift                       and three of training, three seeds: hours
    python -m experiments.ablations.timestep_shift --full --dry-run      at the paper's scale: GPU-hours on 128 A100

The paper trains at a shift by resolution and samples with the released rule, and compares neither. Here one finished run
paints at five shifts, and so do runs that were trained at three.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experiments.ablations.study import Arm, Claim, Exam, Study, cli, scene_exam
from experiments.pretrain_config import PretrainConfig

__all__ = ["SHIFTS", "STUDY", "exams"]

SHIFTS = (-1.0, 0.0, 1.0, 1.8, 3.0)
"""Of painting: logit offsets towards noise; 0 is equal steps, 1.8 the preset's."""


def exams(base: PretrainConfig, per_kind: int) -> Mapping[str, Exam]:
    """The same prompts and noise at every shift."""
    first = scene_exam(base, per_kind)
    return {f"{mu:g}": first._replace(sampler=replace(first.sampler, mu=mu)) for mu in SHIFTS}


def _trained(mu: float) -> Arm:
    return Arm(changes={"optim.time_mu": mu}, full={"optim.time_mu": mu})


STUDY = Study(
    name="timestep_shift",
    question="Which time shift is best to train with, and which to paint with?",
    paper="the paper and the released pipeline give both and compare neither",
    arms={
        "base": Arm(existing=Path("runs/quickstart")),
        "trained_0": _trained(0.0),
        "trained_1.8": _trained(1.8),
        "trained_3": _trained(3.0),
    },
    exams=exams,
    claims=(
        Claim(text="painting: 1.8 over equal steps", ours=("base", "1.8"), others=("base", "0")),
        Claim(text="painting: 1.8 over 3", ours=("base", "1.8"), others=("base", "3"), deciding=False),
        Claim(text="painting: equal steps over -1", ours=("base", "0"), others=("base", "-1"), deciding=False),
        Claim(
            text="training: 1.8 over 0, both painted at 1.8", ours=("trained_1.8", "1.8"), others=("trained_0", "1.8")
        ),
        Claim(
            text="training: each at its own shift, 1.8 over 0",
            ours=("trained_1.8", "1.8"),
            others=("trained_0", "0"),
            deciding=False,
        ),
        Claim(
            text="training: 1.8 over 3, both painted at 1.8",
            ours=("trained_1.8", "1.8"),
            others=("trained_3", "1.8"),
            deciding=False,
        ),
    ),
    shown=("-1", "0", "1.8", "3"),
    remarks=("The arm base is one trained run; its seeds are of the noise alone.",),
)


if __name__ == "__main__":
    cli(STUDY)
