"""Are dense captions better to train on than brief ones, or than both in turn (arXiv 2605.21573, figure 4)?

    python -m experiments.ablations.captions                      four arms, three seeds: about two CPU-hours, on two cores one
    python -m experiments.ablations.captions --arms dense brief   some; the same command goes on
    python -m experiments.ablations.captions --full --dry-run     at the paper's scale: GPU-hours on 128 A100

The paper's figure 4 (a 1.2B backbone on 130M pictures, GenEval over steps, values not in the text): detailed beats mixed and
brief. Here the same scenes are told in three ways. A brief caption is a third of the sequence, so one arm makes as
many more steps as give the dense arm's FLOPs. Two exams of the same requests, scenes and noise: full descriptions, and the bare
requests. A full description is also what a rewriter makes of the request that knows the training captions: it is given a whole
scene which fulfils the request, so it adds content as well as words, and is an upper bound on what a learned rewriter gives.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experiments import pretrain
from experiments.ablations.study import Arm, Claim, Exam, Study, cli, scene_exam
from experiments.pretrain_config import PretrainConfig, toy_1b

__all__ = ["STUDY", "exams", "lens_toy"]


def lens_toy() -> PretrainConfig:
    """Stage 1 with a 1.2B backbone, 120K steps, for ablations; resolution and batch are stage 1's: the paper states neither."""
    base = pretrain.stage1()
    return replace(base, model=toy_1b().model, run=replace(base.run, steps=120_000))


def exams(base: PretrainConfig, per_kind: int) -> Mapping[str, Exam]:
    """The same requests in full and bare."""
    return {
        "described": scene_exam(base, per_kind),
        "bare": scene_exam(base, per_kind, form="short"),
    }


def _arm(density: str, *, text_tokens: int, compute_of: str | None = None) -> Arm:
    full = {"data.path": Path("shards") / density, "data.mean_text_tokens": text_tokens}
    return Arm(changes={"data.density": density}, compute_of=compute_of, full=full)


STUDY = Study(
    name="captions",
    question="Are dense captions better to train on than brief or mixed ones, at equal steps and at equal compute?",
    paper="figure 4: detailed beats mixed and brief on GenEval over steps; one run each, values not in the text",
    arms={
        "dense": _arm("dense", text_tokens=150),
        "brief": _arm("brief", text_tokens=20),
        "mixed": _arm("mixed", text_tokens=85),
        "brief_equal_compute": _arm("brief", text_tokens=20, compute_of="dense"),
    },
    exams=exams,
    claims=(
        Claim(
            text="descriptions: dense over brief, equal steps",
            ours=("dense", "described"),
            others=("brief", "described"),
        ),
        Claim(
            text="descriptions: dense over brief, equal compute",
            ours=("dense", "described"),
            others=("brief_equal_compute", "described"),
        ),
        Claim(
            text="descriptions: dense over mixed, equal steps",
            ours=("dense", "described"),
            others=("mixed", "described"),
        ),
        Claim(
            text="each in its own form, equal compute: dense with a rewriter over brief with the bare requests",
            ours=("dense", "described"),
            others=("brief_equal_compute", "bare"),
        ),
        Claim(
            text="bare requests, equal steps: dense over brief",
            ours=("dense", "bare"),
            others=("brief", "bare"),
            deciding=False,
        ),
        Claim(
            text="bare requests, equal steps: mixed over dense",
            ours=("mixed", "bare"),
            others=("dense", "bare"),
            deciding=False,
        ),
        Claim(
            text="each in its own form, equal steps: dense with a rewriter over mixed with the bare requests",
            ours=("dense", "described"),
            others=("mixed", "bare"),
            deciding=False,
        ),
    ),
    full_base=lens_toy,
    shown=("described", "bare"),
    remarks=(
        "The programmatic rewriter adds content: it is given a whole scene that fulfils the request.",
        "Dense training captions and descriptions share their grammar, so the first three claims favour dense captions; the "
        "fourth compares each arm in the form that it was trained on.",
        "FLOPs of the transformer are what is equal; the frozen language model's are spent once on 4,000 captions.",
    ),
)


if __name__ == "__main__":
    cli(STUDY)
