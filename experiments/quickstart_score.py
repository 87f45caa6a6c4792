"""The quickstart's score: four suites of prompts painted in several processes and judged by the exact verifier.

Every number stands beside its own chance (perfect pictures of the wrong prompts; the model's own pictures of the wrong
prompts) and its own ceiling (perfect pictures of the right prompts through the autoencoder).

Axes: h height, w width, in pixels.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.bank import FeatureBank
from experiments.generate import UNSEEN_CANVASES, load_checkpoint
from experiments.pretrain_data import SceneConfig, scene_banks
from experiments.runs import progress, write_json
from experiments.scoring import paint_prompts
from lensmini.data import (
    KINDS,
    ScenePrompt,
    SuiteScore,
    build_scene_prompts,
    chance_score,
    render_scene,
    score_images,
)
from lensmini.data.scene_captions import Wording
from lensmini.nn import Autoencoder, LensTransformer, from_uint8, to_uint8
from lensmini.objectives import flow_matching_loss
from lensmini.parallel import Group
from lensmini.paths import interpolate, velocity_target

__all__ = ["ScoreConfig", "build_suites", "judge", "score_checkpoint", "wilson_interval"]

Canvas = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """What is painted and judged at the end, and how."""

    num_prompts: int = 384
    """Dense-form prompts on the trained canvases, rounded up to equally many of each kind."""
    num_others: int = 96
    """Prompts of each of the other suites: unseen canvases, withheld pairs, short form."""
    num_samples: int = 30
    """Pictures of the sample grid: the first prompts of another seed, not chosen."""
    unseen_canvases: tuple[Canvas, ...] = UNSEEN_CANVASES
    """Heights and widths that were never trained."""
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights or the last ones."""
    num_steps: int = 12
    """Sampling steps."""
    guidance_scale: float = 4.0
    """Guidance."""
    mu: float | None = 1.8
    """Time shift of the sampling schedule; none is the released model's rule, 0 equal steps."""
    without_rescale: bool = False
    """Score the first suite once more without restoring the norms after guidance."""
    seed: int = 2_000_003
    """Of the suites."""
    processes: int = 2
    """Processes that share the painting, with one thread each."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_others"):
            if getattr(self, name) < 2 * len(KINDS):
                raise ValueError(
                    f"{name}: expected at least {2 * len(KINDS)}, two of a kind, got {getattr(self, name)}"
                )
        if self.num_samples < 1 or self.processes < 1 or self.num_steps < 1 or not self.unseen_canvases:
            raise ValueError("num_samples, processes, num_steps, unseen_canvases: expected at least one of each")


class Suite(NamedTuple):
    """Prompts, each with its canvas."""

    prompts: list[ScenePrompt]
    canvases: list[Canvas]
    rescale: bool = True


def build_suites(config: ScoreConfig, canvases: Sequence[Canvas], *, wording: Wording = "synonyms") -> dict[str, Suite]:
    """The suites by name: trained, unseen, withheld, short, samples, and without_rescale if wanted.

    Unseen and short ask for the same scenes as the front part of trained, so that they can be compared with it.

    Args:
        config: sizes and seed.
        canvases: the trained ones.
        wording: of the dense prompts, the training captions'.

    Returns:
        The suites.

    Example:
        >>> suites = build_suites(ScoreConfig(), [(32, 32), (24, 40)])
        >>> {name: len(suite.prompts) for name, suite in suites.items()}
        {'trained': 384, 'unseen': 96, 'withheld': 96, 'short': 96, 'samples': 30}
    """
    every = [*canvases, *config.unseen_canvases]
    many, few = (-(-number // len(KINDS)) for number in (config.num_prompts, config.num_others))
    build = partial(build_scene_prompts, wording=wording)
    trained = build(many, config.seed)
    samples = build(-(-config.num_samples // len(KINDS)), config.seed + 1)[: config.num_samples]
    suites = {
        "trained": _suite(trained, canvases),
        "unseen": _suite(build(few, config.seed), config.unseen_canvases),
        "withheld": _suite(build(few, config.seed, pairs="withheld"), canvases),
        "short": _suite(build(few, config.seed, form="short"), canvases),
        "samples": Suite(samples, [every[index % len(every)] for index in range(len(samples))]),
    }
    if config.without_rescale:
        suites["without_rescale"] = suites["trained"]._replace(rescale=False)
    return suites


def _suite(prompts: list[ScenePrompt], canvases: Sequence[Canvas]) -> Suite:
    # Every kind meets every canvas, whatever their numbers have in common.
    places = [divmod(index, len(KINDS)) for index in range(len(prompts))]
    return Suite(prompts, [canvases[(row + column) % len(canvases)] for row, column in places])


@torch.no_grad()
def score_checkpoint(
    group: Group, checkpoint: Path, config: ScoreConfig, data: SceneConfig, out: Path, directory: Path
) -> None:
    """Paint the suites, shared out over the processes, and let the first one judge them.

    Args:
        group: of the processes.
        checkpoint: a ``step-N`` directory.
        config: what to paint.
        data: what the model was trained on.
        out: directory of the run.
        directory: gets ``scores.json`` and the sample grid's pictures in ``samples.safetensors``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, world = load_checkpoint(checkpoint, config.weights, quiet=True)
    suites = build_suites(config, data.canvases, wording=data.wording)
    jobs = [(name, index) for name, suite in suites.items() for index in range(len(suite.prompts))]

    def shape(job: tuple[str, int]) -> tuple[bool, Canvas, int]:
        suite, index = suites[job[0]], job[1]
        return suite.rescale, suite.canvases[index], len(suite.prompts[index].text.split())

    jobs.sort(key=shape)
    mine = [jobs[first : first + 24] for first in range(0, len(jobs), 24)][group.rank :: group.world_size]
    painted: dict[tuple[str, int], Tensor] = {}
    with progress(sum(map(len, mine)), 0, "paint for the score", rank=group.rank) as bar:
        for chunk in mine:
            for rescale in {shape(job)[0] for job in chunk}:
                part = [job for job in chunk if shape(job)[0] == rescale]
                texts = [suites[name].prompts[index].text for name, index in part]
                canvases = [suites[name].canvases[index] for name, index in part]
                seeds = [index for _, index in part]
                pictures = paint_prompts(model, world, texts, canvases, config, seeds=seeds, rescale=rescale)
                painted |= dict(zip(part, pictures, strict=True))
            bar.update(len(chunk))
    losses = None
    if group.rank == group.world_size - 1:
        losses = losses_by_time(model, scene_banks(data, world, out, quiet=True)[1])
    parts = group.gather((painted, losses))
    if group.rank == 0:
        found = {job: picture for part, _ in parts for job, picture in part.items()}
        scores: dict[str, Any] = {"losses_by_time": parts[-1][1]}
        for name, suite in suites.items():
            pictures = [found[name, index] for index in range(len(suite.prompts))]
            if name == "samples":
                scores[name] = _describe_samples(suite, pictures, data.canvases)
                save_file(
                    {f"{i:04d}": p.contiguous() for i, p in enumerate(pictures)}, directory / f"{name}.safetensors"
                )
            else:
                scores[name] = judge(suite, pictures, world.autoencoder)
        write_json(directory / "scores.json", scores)
    torch.set_num_threads(threads)


def judge(suite: Suite, pictures: Sequence[Tensor], autoencoder: Autoencoder) -> dict[str, Any]:
    """Every score of a suite, with its chances and its ceiling.

    Args:
        suite: prompts and canvases.
        pictures: ``[3, h_i, w_i]`` uint8, one per prompt.
        autoencoder: for the ceiling.

    Returns:
        ``strict``, ``loose``, ``atom``, ``low`` and ``high`` (95 % interval of strict: normal, over prompts, stratified
        by kind), ``chance_*`` of perfect pictures and ``shifted_*`` of these pictures for the wrong prompts,
        ``autoencoder_*`` of perfect pictures through the autoencoder, ``by_kind``, ``by_canvas`` and ``num``.
    """
    score = score_images(pictures, suite.prompts)
    chance, shifted = chance_score(suite.prompts), chance_score(suite.prompts, images=pictures)
    ceiling = score_images(_reconstruct(suite, autoencoder), suite.prompts)
    by_kind = {
        kind: {
            **{name: getattr(one, name) for name in ("strict", "loose", "atom", "num")},
            **dict(zip(("low", "high"), wilson_interval(one.strict, one.num), strict=True)),
            "chance_strict": chance.by_kind[kind].strict,
            "shifted_strict": shifted.by_kind[kind].strict,
            "autoencoder_strict": ceiling.by_kind[kind].strict,
        }
        for kind, one in score.by_kind.items()
    }
    by_canvas = {}
    for canvas in sorted(set(suite.canvases)):
        members = [index for index, other in enumerate(suite.canvases) if other == canvas]
        by_canvas["{}x{}".format(*canvas)] = {
            "strict": math.fsum(score.reports[index].strict for index in members) / len(members),
            "loose": math.fsum(score.reports[index].loose for index in members) / len(members),
            "autoencoder_strict": math.fsum(ceiling.reports[index].strict for index in members) / len(members),
            "num": len(members),
        }
    margin = 1.96 * score.strict_error
    return {
        **_means("", score),
        "low": max(0.0, score.strict - margin),
        "high": min(1.0, score.strict + margin),
        **_means("chance_", chance),
        **_means("shifted_", shifted),
        **_means("autoencoder_", ceiling),
        "by_kind": by_kind,
        "by_canvas": by_canvas,
        "num": len(suite.prompts),
    }


def wilson_interval(share: float, num: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``num`` (E. B. Wilson, 1927), which keeps a width at 0 and 1.

    Example:
        >>> [round(end, 2) for end in wilson_interval(0.0, 64)]
        [0.0, 0.06]
    """
    z = 1.96
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def losses_by_time(model: LensTransformer, bank: FeatureBank, *, num_times: int = 9) -> list[dict[str, float]]:
    """Flow-matching loss on held-out pictures at fixed times, beside that of predicting no velocity at all.

    Args:
        model: the transformer.
        bank: held-out pictures; as many as there are captions are used, evenly over the grids.
        num_times: times, evenly between 0 (picture) and 1 (noise).

    Returns:
        For each time ``time``, ``loss`` and ``zero_loss``.
    """
    chosen = range(0, bank.num_pictures, bank.num_pictures // len(bank.caption_of.unique()))
    batch = bank.collate(chosen, seed=0, step=-1, text_dropout=0.0)
    target, dtype = velocity_target(batch.image_tokens, batch.noise), model.img_in.weight.dtype
    zero = flow_matching_loss(torch.zeros_like(target), target, layout=batch.layout).mean().item()
    rows = []
    for number in range(1, num_times + 1):
        times = torch.full((len(batch.pictures),), number / (num_times + 1))
        noisy = interpolate(batch.image_tokens, batch.noise, times, layout=batch.layout)
        velocity = model.forward_packed(noisy, times, batch.text_tokens.to(dtype), batch.layout)
        loss = flow_matching_loss(velocity, target, layout=batch.layout).mean().item()  # pyright: ignore[reportArgumentType]
        rows.append({"time": number / (num_times + 1), "loss": loss, "zero_loss": zero})
    return rows


def _means(prefix: str, score: SuiteScore) -> dict[str, float]:
    return {f"{prefix}{name}": getattr(score, name) for name in ("strict", "loose", "atom")}


@torch.no_grad()
def _reconstruct(suite: Suite, autoencoder: Autoencoder) -> list[Tensor]:
    members = defaultdict(list)
    for index, canvas in enumerate(suite.canvases):
        members[canvas].append(index)
    found = {}
    for (height, width), chosen in members.items():
        images = torch.stack([render_scene(suite.prompts[index].scene, height, width) for index in chosen])
        again = to_uint8(autoencoder.decode(autoencoder.encode(from_uint8(images))))
        found |= dict(zip(chosen, again, strict=True))
    return [found[index] for index in range(len(suite.prompts))]


def _describe_samples(suite: Suite, pictures: Sequence[Tensor], trained: Sequence[Canvas]) -> list[dict[str, Any]]:
    reports = score_images(pictures, suite.prompts).reports
    return [
        {
            "prompt": prompt.text,
            "kind": prompt.kind,
            "height": canvas[0],
            "width": canvas[1],
            "trained": canvas in tuple(trained),
            "right": bool(report.strict),
            "wrong": [str(q) for q, answer in zip(report.questions, report.answers, strict=True) if not answer],
        }
        for prompt, canvas, report in zip(suite.prompts, suite.canvases, reports, strict=True)
    ]
