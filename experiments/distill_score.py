"""Teacher and students on the same prompts from the same noise, and how much of the teacher's score a student keeps."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.distill_config import DistillConfig, ScoreSettings, Walk
from experiments.distill_state import Teacher
from experiments.miniature.world import Miniature
from experiments.painting import paint
from experiments.pictures import save_grid
from experiments.pretrain_data import SceneConfig, encode_texts
from experiments.runs import cached_stage, latest_checkpoint, progress, write_json
from experiments.usage import cpu_seconds
from lensmini.data import BACKGROUNDS, COLOURS, KINDS, ScenePrompt, build_scene_prompts, score_images
from lensmini.nn import LensConfig, LensTransformer, to_uint8
from lensmini.packed import Layout, unpack
from lensmini.sampling import empirical_mu, few_step_sample, initial_noise, step_noise, time_grid

__all__ = [
    "Interval",
    "Sampler",
    "Suite",
    "build_suite",
    "load_student",
    "paint_suite",
    "paired_ratio",
    "score_run",
    "score_sampler",
]

_DIVERSE_PROMPTS, _DIVERSE_SEEDS, _TOLERANCE = 16, 6, 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How a model is sampled."""

    num_steps: int
    guidance_scale: float = 1.0
    mu: float | None = None
    walk: Walk = "euler"

    @property
    def calls(self) -> int:
        """Network evaluations of a picture."""
        return self.num_steps * (1 if self.guidance_scale == 1 else 2)


class Suite(NamedTuple):
    """Prompts with their canvases and text features."""

    prompts: list[ScenePrompt]
    canvases: list[tuple[int, int]]
    texts: list[Tensor]

    def take(self, indices: Sequence[int]) -> "Suite":
        """Some of them, in any order, as often as they are named."""
        return Suite(
            [self.prompts[index] for index in indices],
            [self.canvases[index] for index in indices],
            [self.texts[index] for index in indices],
        )


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def build_suite(score: ScoreSettings, data: SceneConfig, world: Miniature) -> Suite:
    """Prompts in the form of the training captions, all kinds equally often, each kind on every canvas."""
    per_kind = -(-score.num_prompts // len(KINDS))
    prompts = build_scene_prompts(per_kind, score.seed, wording=data.wording)
    places = [divmod(index, len(KINDS)) for index in range(len(prompts))]
    canvases = [data.canvases[(row + column) % len(data.canvases)] for row, column in places]
    return Suite(prompts, canvases, encode_texts([prompt.text for prompt in prompts], world, quiet=True))


@torch.no_grad()
def paint_suite(
    model: LensTransformer, world: Miniature, suite: Suite, sampler: Sampler, seeds: Sequence[int], *, chunk: int = 24
) -> list[Tensor]:
    """One picture ``[3, h, w]`` uint8 per prompt, from its own seed; the same whatever the chunk."""
    side, pictures = world.autoencoder.downsample, dict[int, Tensor]()
    order = sorted(range(len(suite.texts)), key=lambda i: (suite.canvases[i], len(suite.texts[i])))
    with progress(len(order), 0, f"paint {sampler.num_steps} steps, guidance {sampler.guidance_scale:g}") as bar:
        for first in range(0, len(order), chunk):
            chosen = order[first : first + chunk]
            texts, numbers = [suite.texts[i] for i in chosen], [seeds[i] for i in chosen]
            grids = [(suite.canvases[i][0] // side, suite.canvases[i][1] // side) for i in chosen]
            if sampler.walk == "renoise":
                latents = _renoised(model, texts, grids, numbers, sampler)
            else:
                steps, scale = sampler.num_steps, sampler.guidance_scale
                latents = paint(model, texts, grids, numbers, num_steps=steps, guidance_scale=scale, mu=sampler.mu)
            for index, latent in zip(chosen, latents, strict=True):
                pictures[index] = to_uint8(world.autoencoder.decode(latent[None]))[0]
            bar.update(len(chosen))
    return [pictures[index] for index in range(len(order))]


def _renoised(
    model: LensTransformer,
    texts: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    seeds: Sequence[int],
    sampler: Sampler,
) -> list[Tensor]:
    layout = Layout.build(grids, text_lengths=[len(text) for text in texts])
    text, channels, num = (
        torch.cat(list(texts)).to(model.img_in.weight.dtype),
        model.config.in_channels,
        sampler.num_steps,
    )
    times = time_grid(num, [empirical_mu(h * w, num) if sampler.mu is None else sampler.mu for h, w in grids])
    tokens = few_step_sample(
        lambda x, t: model.forward_packed(x, t, text, layout),  # pyright: ignore
        initial_noise(seeds, channels, layout),
        times,
        lambda step: step_noise(seeds, step, channels, layout),
        layout=layout,
    )
    return unpack(tokens, layout)


def score_sampler(model: LensTransformer, world: Miniature, suite: Suite, sampler: Sampler) -> dict[str, Any]:
    """Scores of one row, prompt by prompt, and how different its pictures of one prompt are.

    Returns:
        ``strict``, ``loose``, ``atom`` (means), ``right`` (a string of 0 and 1, one per prompt), ``by_kind``, ``clean`` (share
        of pixels within 32 of a colour of the world, in every channel), ``diversity`` (mean RMS difference of two pictures
        of a prompt, of 255), ``calls`` of the network per picture, ``cpu_seconds``.
    """
    start = cpu_seconds()
    painted = paint_suite(model, world, suite, sampler, range(len(suite.prompts)))
    score = score_images(painted, suite.prompts)
    several = [index for index in range(min(_DIVERSE_PROMPTS, len(suite.prompts))) for _ in range(_DIVERSE_SEEDS)]
    seeds = [10_000_000 + number for number in range(len(several))]
    pictures = paint_suite(model, world, suite.take(several), sampler, seeds)
    apart = []
    for first in range(0, len(pictures), _DIVERSE_SEEDS):
        group = torch.stack(pictures[first : first + _DIVERSE_SEEDS]).flatten(1).double()
        apart.append(torch.pdist(group).mean() / group.shape[1] ** 0.5)
    return {
        "strict": score.strict,
        "loose": score.loose,
        "atom": score.atom,
        "by_kind": {kind: one.strict for kind, one in score.by_kind.items()},
        "clean": sum(map(_clean, painted)) / len(painted),
        "diversity": torch.stack(apart).mean().item(),
        "calls": sampler.calls,
        "cpu_seconds": cpu_seconds() - start,
        "right": "".join(str(int(report.strict)) for report in score.reports),
    }


def _clean(picture: Tensor) -> float:
    colours = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()])
    distance = (picture[None].int() - colours[:, :, None, None]).abs().amax(1).amin(0)
    return (distance <= _TOLERANCE).double().mean().item()


def paired_ratio(student: Sequence[str], teacher: str, *, seed: int = 0, draws: int = 10_000) -> Interval:
    """Ratio of the strict scores and its 95 % interval: a bootstrap over prompts, the same ones for both.

    Args:
        student: for each training seed its ``right``; their mean per prompt is compared.
        teacher: its ``right``.
        seed: of the bootstrap.
        draws: resamples.

    Returns:
        The ratio with its interval.

    Raises:
        ValueError: if the teacher got nothing right.

    Example:
        >>> paired_ratio(["1101"], "1101")
        Interval(value=1.0, low=1.0, high=1.0)
    """
    ours = np.array([[int(answer) for answer in row] for row in student], dtype=float).mean(0)
    theirs = np.array([int(answer) for answer in teacher], dtype=float)
    if not theirs.any():
        raise ValueError("teacher: expected a teacher that gets something right, got none")
    rows = np.random.default_rng(seed).integers(0, len(theirs), (draws, len(theirs)))
    ratios = ours[rows].mean(1) / np.maximum(theirs[rows].mean(1), 1e-9)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(ours.mean() / theirs.mean()), float(low), float(high))


def teacher_row(
    config: DistillConfig, teacher: Teacher, sampler: Sampler, suite: Suite | None = None
) -> dict[str, Any]:
    """The teacher's scores, painted once beside its run for all who ask the same."""
    assert isinstance(config.data, SceneConfig)
    data, digest = (
        config.data,
        hashlib.sha256(teacher.model.proj_out.weight.detach().float().numpy().tobytes()).hexdigest(),
    )
    prompts = {"num_prompts": config.score.num_prompts, "seed": config.score.seed, "wording": data.wording}
    key = {"teacher": digest, "sampler": sampler, "prompts": prompts, "canvases": data.canvases, "version": 2}

    def make(directory: Path) -> None:
        asked = build_suite(config.score, data, teacher.world) if suite is None else suite
        write_json(directory / "row.json", score_sampler(teacher.model, teacher.world, asked, sampler))

    path, _ = cached_stage(teacher.path.resolve().parent.parent, "distill-teacher", key, make)
    return json.loads((path / "row.json").read_text())


def load_student(path: Path, weights: str = "ema") -> LensTransformer:
    """The transformer of a ``step-N`` directory alone."""
    model = LensTransformer(LensConfig.from_dict(json.loads((path / "config.json").read_text())))
    model.load_state_dict(load_file(path / f"{weights}.safetensors"), strict=True)
    return model.requires_grad_(False).eval()


def score_run(config: DistillConfig, teacher: Teacher) -> dict[str, Any]:
    """The finished run's student against its teacher, and a grid of both; nothing where nothing is to be scored."""
    found, data, score = latest_checkpoint(config.run.out), config.data, config.score
    if not score.num_prompts or not isinstance(data, SceneConfig) or found is None:
        return {}
    suite = build_suite(score, data, teacher.world)
    student = load_student(found[0])
    own = Sampler(num_steps=config.student.num_steps, mu=config.student.mu, walk=config.student.walk)
    full = Sampler(num_steps=score.teacher_steps, guidance_scale=score.teacher_guidance, mu=score.mu)
    rows = {
        "student": score_sampler(student, teacher.world, suite, own),
        "teacher": teacher_row(config, teacher, full, suite),
    }
    few = suite.take(range(min(score.samples, len(suite.prompts))))
    numbers = range(len(few.prompts))
    pairs = [
        paint_suite(model, teacher.world, few, sampler, numbers)
        for model, sampler in ((teacher.model, full), (student, own))
    ]
    pictures = [picture for pair in zip(*pairs, strict=True) for picture in pair]
    names = [f"teacher, {full.calls} calls", f"student, {own.calls} calls"]
    captions = [f"{name}: {prompt.text}" for prompt in few.prompts for name in names]
    save_grid(pictures, captions, config.run.out / "samples.png")
    if not rows["teacher"]["strict"]:
        return rows
    ratio = paired_ratio([rows["student"]["right"]], rows["teacher"]["right"])
    return {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high, **rows}
