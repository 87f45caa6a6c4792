"""Flow-matching pre-training (arXiv 2605.21573, section 2: stages 1 and 2), from a miniature to the paper's two stages.

    python -m experiments.pretrain mini --run.out runs/mini               two CPU cores, about 7 minutes
    python -m experiments.pretrain folder --data.path DIR                 your pictures: name.png|jpg beside name.txt
    python -m experiments.pretrain stage1 --dry-run                       the paper's 512x512 stage: size and cost
    python -m experiments.pretrain stage2 --dry-run                       the paper's 27 mixed resolutions

The same command again resumes; Ctrl-C and SIGTERM save first. A run directory holds ``metrics.jsonl`` (a function of config
and seed alone, byte for byte), ``timing.jsonl``, ``step-N/`` checkpoints, sample grids and ``summary.json``.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from experiments.bank import Batch, FeatureBank
from experiments.dry_run import describe_run
from experiments.folder_data import FolderConfig, FolderError, check_folder, folder_banks
from experiments.miniature.world import Miniature, MiniatureConfig, prepare_miniature
from experiments.pictures import save_grid
from experiments.pretrain_data import SceneConfig, scene_banks
from experiments.runs import (
    RunConfig,
    StopRequest,
    append_jsonl,
    config_dict,
    progress,
    provenance,
    truncate_jsonl,
    write_json,
)
from experiments.scoring import paint_prompts, score_suite
from experiments.training import OptimConfig, SettingsError, TrainingState, check_same_run
from lensmini.data import LENS_BUCKETS, BatchPlan, Bucket, build_scene_prompts, loss_weights
from lensmini.nn import LensConfig
from lensmini.objectives import flow_matching_loss, training_mu
from lensmini.parallel import Group, run_processes
from lensmini.paths import interpolate, velocity_target


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperDataConfig:
    """Lens-800M as the paper feeds it: pictures in buckets, captions by GPT-4.1, both encoders frozen and online."""

    buckets: tuple[Bucket, ...] = (Bucket(512, 512),)
    """Resolutions; one bucket per rank and step."""
    images_per_rank: tuple[int, ...] = (24,)
    """Images per rank and step for 512, 768 and 1024 pixel bases, in this order."""
    num_ranks: int = 128
    """GPUs; the paper used 128 A100 of 80 GB."""
    text_dropout: float = 0.1
    """Share of samples whose text is masked as a whole; the paper does not state it."""
    mean_text_tokens: int = 150
    """Text tokens per caption that the cost estimate assumes: about 109 words."""
    text_encoder: str = "openai/gpt-oss-20b"
    """Language model, a folder or repository that transformers reads."""
    autoencoder: str = "black-forest-labs/FLUX.2-dev"
    """Autoencoder, a folder or repository that diffusers reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What is measured while training."""

    validate_every: int = 250
    """Steps between losses on held-out pictures with fixed noise and times, per canvas; 0 never."""
    score_every: int = 0
    """Steps between short runs of the scene suite; 0 never."""
    num_prompts: int = 96
    """Prompts of each of these."""
    num_steps: int = 12
    """Sampling steps."""
    guidance_scale: float = 4.0
    """Guidance of samples and scores."""
    mu: float | None = 1.8
    """Time shift of the sampling schedule; none is the released model's rule, 0 equal steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One pre-training run."""

    model: LensConfig
    """The transformer."""
    data: SceneConfig | FolderConfig | PaperDataConfig
    """The samples."""
    optim: OptimConfig
    """Optimisers, schedule, times."""
    run: RunConfig
    """Where, how long, how often."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Measurements."""
    miniature: MiniatureConfig = field(default_factory=MiniatureConfig)
    """The miniature's language model and autoencoder, trained on first use (not read by stage1 and stage2)."""
    init_from: Path | None = None
    """Checkpoint directory (step-N) of an earlier stage to start from."""
    init_weights: str = "ema"
    """Which of its weights: "model" or "ema"; the paper does not state it."""
    reset_optimizer: bool = True
    """Start with fresh moments rather than the checkpoint's; the paper does not state it."""
    dry_run: bool = False
    """Print config, parameters, memory and FLOPs and leave."""

    def __post_init__(self) -> None:
        if self.init_weights not in ("model", "ema"):
            raise ValueError(f'init_weights: expected "model" or "ema", got {self.init_weights!r}')
        if isinstance(self.data, SceneConfig | FolderConfig) and self.data.num_slots % self.run.processes:
            raise ValueError(
                f"processes: expected a divisor of data.num_slots = {self.data.num_slots}, got {self.run.processes}"
            )


MINI_MODEL = LensConfig(
    num_layers=4,
    num_attention_heads=2,
    attention_head_dim=64,
    axes_dims_rope=(8, 28, 28),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=128,
    selected_layer_index=(0, 1, 2, 3),
)


def mini() -> PretrainConfig:
    """Scenes, several ratios, a tiny GPT-OSS encoder: minutes on two CPU cores."""
    return PretrainConfig(
        model=MINI_MODEL,
        data=SceneConfig(),
        optim=OptimConfig(
            lr=5e-3,
            muon_lr=1e-2,
            betas=(0.9, 0.98),
            warmup_steps=20,
            decay_fraction=0.4,
            ema_decay=0.99,
            time_mu=1.8,
            init_gate=0.1,
        ),
        run=RunConfig(out=Path("runs/mini"), steps=1750, checkpoint_every=400, sample_every=400, processes=2),
    )


def folder() -> PretrainConfig:
    """Your own captioned pictures, at about 32 pixels with the miniature's encoders unless you name others."""
    base = mini()
    run = replace(base.run, out=Path("runs/folder"), steps=1000)
    return replace(base, data=FolderConfig(), run=run)


def stage1() -> PretrainConfig:
    """The paper's low-resolution stage: 512x512, 400K steps, 3072 images a step, 128 A100."""
    return PretrainConfig(
        model=LensConfig(),
        data=PaperDataConfig(),
        optim=OptimConfig(lr=2e-4),
        run=RunConfig(out=Path("runs/stage1"), steps=400_000, checkpoint_every=1000, log_every=10),
    )


def stage2() -> PretrainConfig:
    """The paper's mixed-resolution stage: 27 buckets, 400K steps, 24 / 10 / 6 images a GPU, from stage 1."""
    return PretrainConfig(
        model=LensConfig(),
        data=PaperDataConfig(buckets=LENS_BUCKETS, images_per_rank=(24, 10, 6)),
        optim=OptimConfig(lr=1e-4),
        run=RunConfig(out=Path("runs/stage2"), steps=400_000, checkpoint_every=1000, log_every=10),
        init_from=Path("runs/stage1/step-400000"),
    )


PRESETS: tuple[Callable[[], PretrainConfig], ...] = (mini, folder, stage1, stage2)


def per_sample_loss(state: TrainingState, batch: Batch, times: Tensor) -> Tensor:
    """Flow-matching loss ``[b]`` of a batch at given times."""
    layout = batch.layout
    noisy = interpolate(batch.image_tokens, batch.noise, times, layout=layout)
    velocity = state.compute.forward_packed(noisy, times, batch.text_tokens, layout)
    return flow_matching_loss(velocity, velocity_target(batch.image_tokens, batch.noise), layout=layout)  # pyright: ignore


def sample_times(batch: Batch, optim: OptimConfig) -> Tensor:
    """Logit-normal times ``[b]`` from the batch's own normal numbers."""
    mu = training_mu(batch.layout.grids.prod(1)) if optim.time_mu is None else optim.time_mu
    return torch.sigmoid(mu + optim.time_std * batch.normal)


@torch.no_grad()
def validation_losses(state: TrainingState, bank: FeatureBank, group: Group, seed: int) -> dict[str, float]:
    """Mean loss on every held-out picture at four fixed times with fixed noise, per canvas."""
    sums: dict[str, list[float]] = {}
    for index, ((height, width), members) in enumerate(sorted(bank.by_grid().items())):
        if index % group.world_size != group.rank:
            continue
        batch = bank.collate(members, seed=seed, step=-1, text_dropout=0.0)
        for t in (0.2, 0.4, 0.6, 0.8):
            losses = per_sample_loss(state, batch, torch.full((len(members),), t))
            sums.setdefault(f"{height}x{width}", []).extend(losses.tolist())
    merged: dict[str, list[float]] = {}
    for part in group.gather(sums):
        for name, values in part.items():
            merged.setdefault(name, []).extend(values)
    result = {f"validation_{name}": sum(values) / len(values) for name, values in sorted(merged.items())}
    everything = [value for values in merged.values() for value in values]
    return {"validation": sum(everything) / len(everything), **result}


def evaluate(
    config: PretrainConfig, state: TrainingState, world: Miniature, bank: FeatureBank, group: Group
) -> dict[str, float]:
    """What is due at this step: validation loss, suite scores, a grid of samples."""
    last, row = state.step == config.run.steps, {}

    def due(every: int) -> bool:
        return bool(every) and (state.step % every == 0 or last)

    if due(config.eval.validate_every):
        row |= validation_losses(state, bank, group, config.run.seed)
    data = config.data
    if isinstance(data, SceneConfig) and due(config.eval.score_every):
        prompts = build_scene_prompts(max(1, config.eval.num_prompts // 6), seed=1_000_003, wording=data.wording)
        score, _ = score_suite(state.compute, world, prompts, data.canvases, config.eval, group)
        row |= {"strict": score.strict, "loose": score.loose, "atom": score.atom}
    if group.rank == 0 and (last or due(config.run.sample_every)):
        canvases = data.canvases if isinstance(data, SceneConfig) else ((32, 32),)
        if isinstance(data, SceneConfig):
            texts = [prompt.text for prompt in build_scene_prompts(2, seed=1_000_033, wording=data.wording)]
        else:
            texts = world_captions(config)[:12]
        pictures = paint_prompts(state.compute, world, texts, canvases, config.eval)
        save_grid(pictures, texts, config.run.out / f"samples-{state.step:06d}.png")
    return row


def world_captions(config: PretrainConfig) -> list[str]:
    """Captions of a folder run, for its sample grids."""
    assert isinstance(config.data, FolderConfig)
    return (config.run.out / "captions.txt").read_text().splitlines()


def make_plan(config: PretrainConfig, bank: FeatureBank) -> BatchPlan:
    """The order of a run's pictures; a function of config and bank, whatever the number of processes."""
    data = config.data
    assert isinstance(data, SceneConfig | FolderConfig)
    return bank.plan(
        batch_size=data.batch_size,
        num_slots=data.num_slots,
        mode=data.mode,
        seed=config.run.seed,
        model=config.model,
    )


def train(group: Group, config: PretrainConfig) -> None:
    """The loop of one process."""
    torch.set_num_threads(config.run.threads)
    run, optim, data = config.run, config.optim, config.data
    assert isinstance(data, SceneConfig | FolderConfig)
    world = prepare_miniature(config.miniature, run.out.parent, quiet=True)
    make_banks = scene_banks if isinstance(data, SceneConfig) else folder_banks
    bank, held_out = make_banks(data, world, run.out, quiet=True)  # pyright: ignore[reportArgumentType]
    state = TrainingState(config.model, optim, seed=run.seed, group=group)
    if not state.resume(run.out) and config.init_from is not None:
        state.load(config.init_from, which=config.init_weights, optimizer=not config.reset_optimizer)
    if group.rank == 0:
        for name in ("metrics.jsonl", "timing.jsonl"):
            truncate_jsonl(run.out / name, state.step)
    plan = make_plan(config, bank)
    plan.micro_steps(group.world_size)
    start, started, resumed = time.perf_counter(), time.process_time(), state.step
    with StopRequest() as stop, progress(run.steps, state.step, "pretrain", rank=group.rank) as bar:
        while state.step < run.steps:
            bank.prepare(plan, state.step, group.rank, group.world_size)
            step, loss = plan.step(state.step), 0.0
            for slot in range(group.rank, plan.num_slots, group.world_size):
                pictures, repeats = step.slot(slot).tolist(), step.repeats(slot).tolist()
                batch = bank.collate(
                    pictures, repeats=repeats, seed=run.seed, step=state.step, text_dropout=data.text_dropout
                )
                weights = loss_weights(batch.layout, plan.totals(step), data.weighting)
                part = (weights * per_sample_loss(state, batch, sample_times(batch, optim))).sum()
                part.backward()
                state.accumulate()
                loss += part.item()
            loss, stopping, _ = state.collect(group, [loss, float(bool(stop)), 0.0])
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"step {step.step + 1}: the loss is {loss}; lower the learning rates (optim.lr, optim.muon_lr). The last "
                    f"checkpoint in {run.out} is from before"
                )
            row = {"step": step.step + 1, "loss": loss, **state.update(run.steps)}
            row |= evaluate(config, state, world, held_out, group)
            done = state.step == run.steps
            if group.rank == 0:
                if len(row) > 4 or state.step % run.log_every == 0 or done:
                    append_jsonl(run.out / "metrics.jsonl", row)
                    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - started}
                    append_jsonl(
                        run.out / "timing.jsonl", {"step": state.step, "steps": state.step - resumed, **seconds}
                    )
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if stopping or done or (run.checkpoint_every and state.step % run.checkpoint_every == 0):
                    state.save(run.out, config, keep=run.keep_checkpoints, plan=bank.order_id(plan))
            if stopping:
                break
    if group.rank == 0 and state.step == run.steps:
        last = json.loads((run.out / "metrics.jsonl").read_text().splitlines()[-1])
        write_json(run.out / "summary.json", {**last, "config": config_dict(config), "provenance": provenance()})


def main(config: PretrainConfig) -> None:
    """Prepare what the run stands on, then train in as many processes as it asks for."""
    if config.dry_run or isinstance(config.data, PaperDataConfig):
        print(describe_run(config))
        if not config.dry_run:
            raise SystemExit("stage1 and stage2 need the cluster engine, which is not here yet: use --dry-run")
        return
    if isinstance(config.data, FolderConfig):
        check_folder(config.data)
    check_same_run(config.run.out, config)
    config.run.out.mkdir(parents=True, exist_ok=True)
    write_json(config.run.out / "config.json", config)
    world = prepare_miniature(config.miniature, config.run.out.parent)
    make_banks = scene_banks if isinstance(config.data, SceneConfig) else folder_banks
    bank, _ = make_banks(config.data, world, config.run.out)  # pyright: ignore[reportArgumentType]
    check_same_run(config.run.out, config, bank.order_id(make_plan(config, bank)))
    del world, bank
    run_processes(train, config.run.processes, config)


def cli() -> None:
    """Read a preset and its overrides from the command line and run it."""
    presets = {make.__name__: (make.__doc__ or "", make()) for make in PRESETS}
    config = tyro.extras.overridable_config_cli(presets, prog="python -m experiments.pretrain")
    try:
        main(config)
    except (FolderError, SettingsError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    cli()
