"""A learned rubric reward in miniature: verdicts of the exact verifier into a calibrated, differentiable judge.

    python -m experiments.reward_model mini --out runs/reward_model         two CPU cores, a few minutes with the pictures
    python -m experiments.reward_model three_seeds --out runs/reward_model3 intervals: experiments/results/reward_model.json
    python -m experiments.reward_model smallest --out /tmp/reward            seconds, for a look at the machinery

The counterpart of a reward distilled from a judge (Z-Reward, arXiv 2606.09076; rubrics: arXiv 2605.21573 section 6).
Frozen features: the miniature's autoencoder (pixels to latents) and its language model. A head learns the verifier's
verdicts on renderings, spoilt in every way a rubric asks about, and on pictures that a trained base painted. Questions:

1. Does it know more than simpler predictors of other scenes, of painted pictures, and of colour-shape pairs never seen?
2. Are its probabilities honest (Brier score, expected calibration error)?
3. Does climbing it change the picture? Where a criterion fails, its log-odds are climbed, in the autoencoder's latents and
   in pixels; the verifier, and a second judge that nothing was trained on, say whether it holds afterwards. Controls: as
   many steps of the same length along a random direction, and climbing another criterion.

Needs a trained base for the painted pictures (``python -m experiments.quickstart``). The head is a stage under ``runs/``
that :func:`prepare_reward_model` finds again. Writes ``summary.json``, ``metrics.jsonl`` and ``ascents.png``.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments import pretrain
from experiments.checkpoints import find_checkpoint, load_checkpoint
from experiments.miniature.autoencoder import smallest_autoencoder
from experiments.miniature.language_model import smallest_language_model
from experiments.miniature.world import Miniature, MiniatureConfig, prepare_miniature
from experiments.reward_ascent import (
    AscentConfig,
    compare_ascents,
    measure_ascents,
    pixel_gradient_error,
    pool_ascents,
)
from experiments.reward_scenes import Sample, judge_scenes, spoilt_pictures, suite
from experiments.runs import append_jsonl, cached_stage, config_dict, config_hash, progress, provenance, write_json
from experiments.scoring import paint_prompts
from lensmini.data import MINIATURE_CANVASES
from lensmini.rewards.model import (
    Answers,
    FrozenFeatures,
    Judged,
    RewardModelConfig,
    RubricRewardModel,
    compare_reward_model,
    fit_reward_model,
    load_reward_model,
    save_reward_model,
    weights_digest,
)

__all__ = [
    "PRESETS",
    "RewardModelRun",
    "main",
    "mini",
    "miniature_features",
    "prepare_reward_model",
    "run",
    "smallest",
    "three_seeds",
]

Split = Literal["train", "calibration", "held_out", "withheld"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "held_out", "withheld")


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturesConfig:
    """What is judged: numbers of pictures for training, calibration, held-out scenes and withheld pairs."""

    rendered: tuple[int, int, int, int] = (2400, 300, 420, 300)
    """Renderings, spoilt or not."""
    painted: tuple[int, int, int, int] = (120, 60, 120, 60)
    """Pictures of the base, where there is one."""
    canvases: tuple[tuple[int, int], ...] = MINIATURE_CANVASES
    """Heights and widths, in turn."""
    num_steps: int = 8
    """Sampling steps of painted pictures: few, so that mistakes are made."""
    guidance_scale: float = 2.0
    """Of painted pictures."""
    mu: float | None = 1.8
    """Time shift of their sampling schedule."""

    def __post_init__(self) -> None:
        if min(self.rendered) < 1 or min(self.painted) < 0 or not self.canvases:
            raise ValueError("rendered, painted, canvases: expected positive, non-negative and at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """The head and how it is trained."""

    width: int = 64
    """Of the head."""
    num_layers: int = 2
    """Looks at the picture."""
    context_blocks: int = 2
    """Convolutions over the latents: one latent alone does not show a shape."""
    steps: int = 700
    """Of the optimiser."""
    batch_size: int = 24
    """Pictures of a step, each with all its criteria."""
    learning_rate: float = 4e-3
    """Peak."""
    noise: float = 0.1
    """Standard deviation of noise on the latents, which are about 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelRun:
    """One run: data, head, questions."""

    out: Path = Path("runs/reward_model")
    """Where pictures and numbers go; stages go beside it."""
    seed: int = 0
    """Of scenes, weights and batches: the first one. Painted pictures are the same for all."""
    num_seeds: int = 1
    """Runs, from that seed on."""
    base: Path | None = Path("runs/quickstart")
    """A run whose model paints; none trains on renderings alone."""
    world: Literal["mini", "smallest"] = "mini"
    """Autoencoder and language model: those of the quickstart, or untrained ones for tests."""
    data: PicturesConfig = field(default_factory=PicturesConfig)
    """Pictures."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """What is trained."""
    ascent: AscentConfig = field(default_factory=AscentConfig)
    """What is climbed."""
    fresh_seeds: tuple[int, ...] = (101, 102, 103)
    """Of cases that nothing was chosen on, for the comparison of ascents with their controls."""


def mini() -> RewardModelRun:
    """Everything, one seed."""
    return RewardModelRun()


def three_seeds() -> RewardModelRun:
    """Three runs, and intervals."""
    return RewardModelRun(out=Path("runs/reward_model3"), num_seeds=3)


def smallest() -> RewardModelRun:
    """Seconds, without a base: for tests."""
    return RewardModelRun(
        out=Path("runs/smallest_reward"),
        base=None,
        world="smallest",
        data=PicturesConfig(rendered=(24, 8, 8, 8), painted=(0, 0, 0, 0), canvases=((16, 16), (16, 24))),
        head=HeadConfig(width=16, num_layers=1, context_blocks=1, steps=6, batch_size=8),
        ascent=AscentConfig(num=4, steps=2),
        fresh_seeds=(101,),
    )


PRESETS: tuple[Callable[[], RewardModelRun], ...] = (mini, three_seeds, smallest)


def miniature_features(world: Miniature) -> FrozenFeatures:
    """The miniature's frozen parts as features: latents of pictures, and all chosen layers of the language model."""

    def image(images: Tensor) -> Tensor:
        vae = world.autoencoder
        return vae.encode((2 * images - 1).to(next(vae.parameters()).dtype))

    def text(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        layers, mask = world.encoder(texts)
        return torch.cat(layers, -1), mask

    name = f"miniature {weights_digest(world.autoencoder, world.encoder)} layers {world.encoder.layers}"
    return FrozenFeatures(image=image, text=text, identity=name)


def prepare_reward_model(
    config: RewardModelRun, world: Miniature, root: Path, *, quiet: bool = False
) -> RubricRewardModel:
    """The trained reward of a config's first seed: found under ``root``, or trained there.

    Args:
        config: of the reward; :func:`mini` as a rule.
        world: autoencoder and language model, the same as the policy's.
        root: where stages are kept, ``runs/`` in the scripts.
        quiet: print nothing about stages.

    Returns:
        The model, frozen, in evaluation mode. As a judge: ``lensmini.rewards.model.RewardModelJudge(model)``.

    Raises:
        FileNotFoundError: if the base that is to paint is not there.
    """
    return _prepare(config, world, root, quiet=quiet)[0]


def _prepare(
    config: RewardModelRun, world: Miniature, root: Path, *, quiet: bool
) -> tuple[RubricRewardModel, dict[str, Any]]:
    """The model, and what its stage says about its training."""
    features = miniature_features(world)
    painted = None if config.base is None else _paint(config, world, root, quiet=quiet)
    key = {
        "head": config.head,
        "rendered": config.data.rendered,
        "canvases": config.data.canvases,
        "painted": None if painted is None else painted.name,
        "features": features.identity,
        "seed": config.seed,
        "version": 1,
    }
    make = partial(_train, config, world, features, painted, quiet=quiet)
    directory, _ = cached_stage(root, "reward-model", key, make, quiet=quiet)
    model = load_reward_model(directory, features).requires_grad_(False)
    return model, json.loads((directory / "fit.json").read_text())


def _paint(config: RewardModelRun, world: Miniature, root: Path, *, quiet: bool) -> Path:
    """The stage that holds the base's pictures."""
    assert config.base is not None
    checkpoint = find_checkpoint(config.base)
    data = config.data
    key = {
        "base": weights_digest(load_checkpoint(checkpoint, quiet=True)[0]),
        "world": world.key,
        "painted": data.painted,
        "canvases": data.canvases,
        "sampling": [data.num_steps, data.guidance_scale, data.mu],
        "version": 1,
    }

    def make(directory: Path) -> None:
        model, _ = load_checkpoint(checkpoint, quiet=True)
        started, pictures = time.process_time(), {}
        for split in SPLITS:
            prompts = _painted_prompts(config, split)
            if prompts:
                texts, canvases = [prompt.text for prompt in prompts], _turned(data.canvases, len(prompts))
                found = paint_prompts(model, world, texts, canvases, data)
                pictures |= {f"{split}.{index:05d}": one.contiguous() for index, one in enumerate(found)}
        save_file(pictures, directory / "pictures.safetensors")
        write_json(directory / "painting.json", {"cpu_seconds": time.process_time() - started, "num": len(pictures)})

    return cached_stage(root, "reward-pictures", key, make, quiet=quiet)[0]


def _painted_prompts(config: RewardModelRun, split: Split) -> list[Any]:
    index = SPLITS.index(split)
    return suite(config.data.painted[index], 7_000_000 + index, _pairs(split))


def _pairs(split: Split) -> Literal["seen", "withheld"]:
    return "withheld" if split == "withheld" else "seen"


def _turned(canvases: Sequence[tuple[int, int]], num: int) -> list[tuple[int, int]]:
    # Every kind of prompt meets every canvas, whatever their numbers have in common.
    return [canvases[(index + index // 6) % len(canvases)] for index in range(num)]


def pictures_of(config: RewardModelRun, split: Split, painted: Path | None) -> list[Sample]:
    """The pictures of a split: renderings of the config's seed, and the painted ones."""
    index = SPLITS.index(split)
    seed = 10 * config.seed + index + 1
    prompts = suite(config.data.rendered[index], 5_000_000 + seed, _pairs(split))
    samples = spoilt_pictures(prompts, _turned(config.data.canvases, len(prompts)), seed, _pairs(split))
    if painted is not None:
        stored = load_file(painted / "pictures.safetensors")
        samples += [
            Sample(prompt, stored[f"{split}.{number:05d}"], "painted")
            for number, prompt in enumerate(_painted_prompts(config, split))
        ]
    return samples


def _train(
    config: RewardModelRun,
    world: Miniature,
    features: FrozenFeatures,
    painted: Path | None,
    directory: Path,
    *,
    quiet: bool,
) -> None:
    """Render, judge, train, calibrate and measure; everything that is found goes into ``fit.json``."""
    head, started, clock = config.head, time.perf_counter(), time.process_time()
    train, calibration = (judge_split(config, split, painted)[1] for split in SPLITS[:2])
    prepared = time.process_time() - clock
    sizes = RewardModelConfig(
        image_dim=world.autoencoder.channels,
        text_dim=world.encoder.model.config.hidden_size * len(world.encoder.layers),
        width=head.width,
        num_layers=head.num_layers,
        context_blocks=head.context_blocks,
        use_prompt=False,  # every sentence is complete, and what was asked for is mostly there: a look at the prompt pays
        seed=config.seed,
    )
    model = RubricRewardModel(features, sizes)
    with progress(head.steps, 0, "reward model", rank=int(quiet)) as bar:

        def report(step: int, loss: float) -> None:
            if step % 10 == 0 or step == head.steps:
                append_jsonl(directory / "metrics.jsonl", {"step": step, "loss": loss})
            bar.update()

        fit_reward_model(
            model,
            train,
            calibration,
            steps=head.steps,
            batch_size=head.batch_size,
            learning_rate=head.learning_rate,
            noise=head.noise,
            seed=config.seed,
            on_step=report,
        )
    save_reward_model(model, directory)
    write_json(
        directory / "fit.json",
        {
            "cpu_seconds": {"pictures_and_verdicts": prepared, "all": time.process_time() - clock},
            "wall_seconds": time.perf_counter() - started,
            "parameters": sum(one.numel() for one in model.head.parameters()),
            "calibration": model.calibration.tolist(),
        },
    )


def judge_split(config: RewardModelRun, split: Split, painted: Path | None) -> tuple[list[Sample], Judged]:
    """Pictures of a split and their verdicts; only training asks contrasting questions."""
    samples = pictures_of(config, split, painted)
    return samples, judge_scenes(samples, contrast=split == "train")


def measure(config: RewardModelRun, model: RubricRewardModel, painted: Path | None) -> dict[str, Any]:
    """Scorecards of the model and of simpler predictors on held-out scenes and on withheld pairs."""
    parts = {split: judge_split(config, split, painted) for split in SPLITS}
    answers = compare_reward_model(model, *(parts[split][1] for split in SPLITS))
    kinds = {split: [one.kind == "painted" for one in parts[split][0]] for split in SPLITS}
    return {split: _measures(one, kinds[split]) for split, one in zip(SPLITS[2:], answers, strict=True)}


def _measures(answers: dict[str, Answers], painted: list[bool]) -> dict[str, Any]:
    """Scorecards by predictor: of everything, of renderings and painted pictures, and by category."""
    found: dict[str, Any] = {}
    for name, one in answers.items():
        cards = {"all": one.scorecard()._asdict()}
        for label, wanted in (("rendered", False), ("painted", True)):
            part = _rows(one, [painted[picture] == wanted for picture in one.pictures])
            if len(part.pictures):
                cards[label] = part.scorecard()._asdict()
        if name in ("model", "logistic"):
            cards |= {f"category {each}": one.scorecard(each)._asdict() for each in sorted({*one.categories})}
        found[name] = cards
    for name in ("majority", "by_criterion", "logistic"):
        found[f"model_over_{name}"] = {"all": advantage(answers["model"], answers[name])}
    return found


def advantage(one: Answers, other: Answers, *, resamples: int = 1000) -> dict[str, float]:
    """How much more accurate, and how much lower in Brier score, one predictor is on the same answers.

    Returns:
        Differences ``accuracy`` and ``brier`` (positive is better) with 95 % intervals ``..._low`` and ``..._high`` from
        resampling whole pictures: answers about one picture are not independent.
    """
    pictures = torch.tensor(one.pictures)
    errors = [(each.scores - each.targets).square() for each in (one, other)]
    right = [0.5 + 0.5 * torch.sign(each.scores - 0.5) * torch.sign(each.targets - 0.5) for each in (one, other)]
    counts = torch.zeros(int(pictures.max()) + 1, dtype=torch.float64)
    number = counts.index_add(0, pictures, torch.ones(len(pictures), dtype=torch.float64))
    generator, found = torch.Generator().manual_seed(0), {}
    drawn = torch.randint(len(number), (resamples, len(number)), generator=generator)
    for name, gain in (("accuracy", right[0] - right[1]), ("brier", errors[1] - errors[0])):
        sums = counts.index_add(0, pictures, gain.double())
        means = (sums[drawn].sum(1) / number[drawn].sum(1)).sort().values
        found |= {name: (sums.sum() / number.sum()).item(), f"{name}_low": means[int(0.025 * resamples)].item()}
        found[f"{name}_high"] = means[int(0.975 * resamples)].item()
    return found


def _rows(answers: Answers, keep: list[bool]) -> Answers:
    chosen = torch.tensor(keep, dtype=torch.bool)
    lists = [[value for value, kept in zip(column, keep, strict=True) if kept] for column in answers[3:]]
    return Answers(*[column[chosen] for column in answers[:3]], *lists)  # pyright: ignore[reportArgumentType]


def open_world(config: RewardModelRun, root: Path) -> Miniature:
    """The frozen parts: the base's own, or those of the config's world."""
    if config.base is not None:
        return load_checkpoint(find_checkpoint(config.base), quiet=True)[1]
    beneath = pretrain.mini().miniature
    if config.world == "smallest":
        beneath = MiniatureConfig(
            language_model=smallest_language_model(), autoencoder=smallest_autoencoder(), layers=(0, 1), strict=False
        )
    return prepare_miniature(beneath, root)


def run(config: RewardModelRun) -> dict[str, Any]:
    """Train and measure each seed that has not been; returns what ``summary.json`` holds."""
    out, root = config.out, config.out.parent
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    world, rows = open_world(config, root), []
    for seed in range(config.seed, config.seed + config.num_seeds):
        one = replace(config, seed=seed)
        model, fit = _prepare(one, world, root, quiet=False)
        painted = None if config.base is None else _paint(one, world, root, quiet=True)
        key = {"model": model.revision, "data": config.data, "ascent": config.ascent, "seed": seed, "version": 3}
        key["fresh_seeds"] = config.fresh_seeds
        make = partial(_examine, one, model, world, painted)
        directory, _ = cached_stage(root, "reward-measures", key, make)
        rows.append({"seed": seed, **fit, **json.loads((directory / "measures.json").read_text())})
        append_jsonl(out / "metrics.jsonl", rows[-1])
        if seed == config.seed:
            shutil.copyfile(directory / "ascents.png", out / "ascents.png")
    summary = {
        "question": "Does a head on frozen features learn the verifier's verdicts: better than simple predictors, honest, and "
        "so that climbing it changes the picture in the direction that was asked?",
        "config": config_dict(config),
        "config_hash": config_hash(config),
        **provenance(),
        "seeds": [row["seed"] for row in rows],
        "arms": summarise(rows),
        "ascents_together": pool_ascents([row["ascents"] for row in rows]),
        "runs": rows,
    }
    write_json(out / "summary.json", summary)
    return summary


def _examine(
    config: RewardModelRun, model: RubricRewardModel, world: Miniature, painted: Path | None, directory: Path
) -> None:
    """Ask everything that is asked about a trained model."""
    clock = time.process_time()
    found = measure(config, model, painted)
    samples = pictures_of(config, "held_out", painted)
    found["gradient_error"] = pixel_gradient_error(model, world, samples[:2])
    # Clean scenes with mistakes, of which each can be put right, and painted pictures; all of one size.
    canvas = config.data.canvases[0]

    def mistakes(seed: int) -> list[Sample]:
        return spoilt_pictures(suite(4 * config.ascent.num, seed), [canvas], seed, spoils=False)

    cases = mistakes(8_000_000 + config.seed)
    cases += [one for one in samples if one.kind == "painted" and one.image.shape[1:] == canvas]
    found["ascents"] = measure_ascents(model, world, cases, config.ascent, config.seed, directory)
    fresh = [8_000_000 + 1000 * seed + config.seed for seed in config.fresh_seeds]
    found["fresh_ascents"] = compare_ascents(model, world, [mistakes(one) for one in fresh], fresh, config.ascent)
    write_json(directory / "measures.json", {**found, "measuring_cpu_seconds": time.process_time() - clock})


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with half the 95 % interval of Student's t, for every number that all seeds have."""
    parts = (
        "held_out",
        "withheld",
        "ascents",
        "fresh_ascents",
        "gradient_error",
        "cpu_seconds",
        "measuring_cpu_seconds",
        "calibration",
    )
    return {part: _together([row[part] for row in rows]) for part in parts}


def _together(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _together([one[key] for one in values]) for key in first if all(key in one for one in values)}
    if isinstance(first, list):
        return [_together(list(column)) for column in zip(*values, strict=True)]
    factor = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values))
    known = [float(one) for one in values if one is not None]
    if len(known) < len(values):
        return {"mean": None, "half_interval": None}
    mean = math.fsum(known) / len(known)
    spread = math.sqrt(math.fsum((one - mean) ** 2 for one in known) / max(1, len(known) - 1))
    return {"mean": mean, "half_interval": factor * spread / math.sqrt(len(known)) if factor else None}


def main(config: RewardModelRun) -> None:
    """Run, and print the scores."""
    summary = run(config)
    shown = lambda cell: f"{cell['mean']:.3f}" + (f" +- {cell['half_interval']:.3f}" if cell["half_interval"] else "")  # noqa: E731
    for split in ("held_out", "withheld"):
        for name, cards in summary["arms"][split].items():
            for part in ("all", "rendered", "painted"):
                if part in cards:
                    numbers = "  ".join(f"{key} {shown(cell)}" for key, cell in cards[part].items())
                    print(f"{split:9s} {name:13s} {part:9s} {numbers}")
    for space, arms in summary["arms"]["ascents"].items():
        for arm, cells in arms.items():
            numbers = [
                f"{key} {shown(cell)}" for key, cell in cells.items() if "mean" in cell and cell["mean"] is not None
            ]
            print(f"{space:9s} {arm:13s} " + "  ".join(numbers))
    for control in ("random", "another"):
        cells = summary["arms"]["fresh_ascents"][control]
        print(f"latents   asked against {control}: " + "  ".join(f"{key} {shown(cell)}" for key, cell in cells.items()))
    print(f"pixel gradient against finite differences: {summary['arms']['gradient_error']['mean']:.1e}")
    print(f"{config.out / 'summary.json'}, {config.out / 'ascents.png'}")


if __name__ == "__main__":
    choices = {preset.__name__: (str(preset.__doc__), preset()) for preset in PRESETS}
    main(tyro.extras.overridable_config_cli(choices, prog="python -m experiments.reward_model"))
