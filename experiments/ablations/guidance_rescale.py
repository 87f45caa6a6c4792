"""Does restoring the norms after guidance keep colours whole, and what does it cost (arXiv 2605.21573)?

    python -m experiments.ablations.guidance_rescale                      five scales, with and without; paints only
    python -m experiments.ablations.guidance_rescale --seeds 0            one seed of the noise
    python -m experiments.ablations.guidance_rescale --checkpoint DIR     another finished run of the quickstart

The released model restores every token's norm after guidance, and the paper shows no comparison. Nothing is trained: one
finished run paints the same prompts from the same noise at each scale, with and without. Beside the verifier's score stand
saturation and the share of channel values at 0 or 255, which too much guidance pushes up.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experiments.ablations.study import Arm, Claim, Exam, Study, cli, scene_exam
from experiments.pretrain_config import PretrainConfig

__all__ = ["SCALES", "STUDY", "exams"]

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Guidance; 4 is the preset's."""


def exams(base: PretrainConfig, per_kind: int) -> Mapping[str, Exam]:
    """The same prompts and noise at every scale; at scale 1 there is nothing to restore."""
    first = scene_exam(base, per_kind)
    found = {}
    for scale in SCALES:
        for rescale in (True, False) if scale > 1 else (True,):
            sampler = replace(first.sampler, guidance_scale=scale, rescale=rescale)
            found[f"{scale:g}{'' if rescale else ' plain'}"] = first._replace(sampler=sampler)
    return found


STUDY = Study(
    name="guidance_rescale",
    question="Does restoring the norms after guidance keep scores and colours at high scales?",
    paper="the released pipeline restores them; no comparison in the paper",
    arms={"base": Arm(existing=Path("runs/quickstart"))},
    exams=exams,
    claims=(
        Claim(text="scale 8: strict, restored over plain", ours=("base", "8"), others=("base", "8 plain")),
        Claim(
            text="scale 8: plain clips more",
            ours=("base", "8 plain"),
            others=("base", "8"),
            score="clipped",
            margin=0.005,
        ),
        Claim(
            text="scale 4: strict, equal", ours=("base", "4"), others=("base", "4 plain"), kind="equal", deciding=False
        ),
        Claim(text="scale 4 over no guidance", ours=("base", "4"), others=("base", "1"), deciding=False),
        Claim(text="scale 16: restored over plain", ours=("base", "16"), others=("base", "16 plain"), deciding=False),
    ),
    shown=("4", "8", "8 plain", "16", "16 plain"),
    remarks=("One trained run; seeds are of the noise alone.",),
)


if __name__ == "__main__":
    cli(STUDY)
