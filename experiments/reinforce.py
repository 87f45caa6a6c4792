"""Rubric reinforcement learning (arXiv 2605.21573, section 2.5 and appendix: Lens-Base to Lens), from a miniature to 64 GPUs.

    python -m experiments.reinforce mini                                    one CPU core, from the quickstart's model
    python -m experiments.reinforce mini --reward.kind naive                a careless reward, and how it is hacked
    python -m experiments.reinforce mini --objective.name grpo --objective.kernel flow
    python -m experiments.reinforce lens --dry-run                          the paper's run: pictures, calls, memory, FLOPs
    torchrun --nnodes 8 --nproc-per-node 8 -m experiments.reinforce lens --prompts.path PROMPTS.jsonl
      --reward.url http://judge:8000/v1 --reward.model qwen-vl

A step samples groups of pictures of one prompt each without guidance, in mixed shapes; a judge answers the prompt's rubric
about every picture while the next ones are sampled; pictures are compared with their group; DiffusionNFT (or AWM, or GRPO)
moves the model. Prompts with rubrics for ``lens`` come from ``experiments.build_prompts``.

The same command again goes on where the run was stopped, with the same trajectory; verdicts in ``OUT/verdicts.sqlite`` are
never asked for again. ``OUT`` also has ``metrics.jsonl``, ``timing.jsonl``, ``page.html``, grids of samples at fixed seeds and
``summary.json`` with the scores before and after.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.checkpoints import load_checkpoint
from experiments.generate import read_config
from experiments.miniature.world import Miniature
from experiments.pictures import save_grid
from experiments.reinforce_config import PRESETS, ReinforceConfig
from experiments.reinforce_dry_run import describe_run
from experiments.reinforce_eval import evaluate, held_out_prompts, paint_suite
from experiments.reinforce_metrics import Judged, describe, write_report
from experiments.reinforce_rewards import Judging, Task, load_tasks, make_judges, rewards_of
from experiments.reinforce_rollout import (
    Rollout,
    Sample,
    decode,
    encode_prompt,
    my_chunks,
    roll_out,
    step_samples,
)
from experiments.reinforce_state import Policies, find_base
from experiments.reinforce_update import Moments, accumulate_chunk
from experiments.runs import (
    StopRequest,
    append_jsonl,
    cached_stage,
    config_dict,
    config_hash,
    progress,
    provenance,
    truncate_jsonl,
    write_json,
)
from experiments.training import SettingsError, check_same_run, read_run
from experiments.usage import cpu_seconds
from lensmini.nn import LensConfig
from lensmini.objectives.policy import group_advantages
from lensmini.parallel import Group, run_processes
from lensmini.rewards import Verdict
from lensmini.rewards.judges import JudgeUnavailableError

__all__ = ["cli", "main", "open_world", "train"]


def train(group: Group, config: ReinforceConfig, judge: Any = None) -> None:
    """The loop of one process; ``judge`` stands in for the configured one, for rehearsals."""
    torch.set_num_threads(config.run.threads)
    run, objective, first = config.run, config.objective, group.rank == 0
    base = find_base(config.base)
    model_config, world = open_world(config, base)
    tasks, policies = load_tasks(config.prompts, config.reward.kind), Policies(config, group, model_config, base)
    judges = make_judges(config, world, judge)
    check_same_run(run.out, config)
    policies.resume()
    spent = sum(group.gather(cpu_seconds()))
    for name in ("metrics.jsonl", "timing.jsonl") if first else ():
        truncate_jsonl(run.out / name, policies.iteration)
    with (
        StopRequest() as stop,
        Judging(judges[0], overlap=config.reward.overlap) as judging,
        progress(run.steps, policies.iteration, "reinforce", rank=group.rank) as bar,
    ):
        while policies.iteration < run.steps:
            step, clock = policies.iteration, [time.perf_counter()]
            samples = step_samples(config.rollout, len(tasks), step, run.seed)
            chunks = my_chunks(samples, config.rollout.chunk, group)
            rollouts, pictures = sample_and_submit(policies, world, tasks, chunks, judging, config)
            clock.append(time.perf_counter())
            judged = collect_verdicts(judging, group, samples, tasks)
            clock.append(time.perf_counter())
            if judged.unavailable is not None:
                left = left_out(config, policies, group, step, judged.unavailable)
                bar.update()
                if left:
                    break
                continue
            rewards, known = rewards_of(judged.table, judged.group, config)
            advantages = group_advantages(rewards, judged.group, mask=known, scale=objective.advantage_scale)
            share, mine = 1 / max(1, int(known.sum())), positions(samples, chunks)
            moments, updates, stopping = list[Moments](), dict[str, float](), 0.0
            for update in range(objective.updates):
                for rollout, places in zip(rollouts, mine, strict=True):
                    parts = advantages[places].to(policies.device), known[places].to(policies.device)
                    moments.append(accumulate_chunk(policies, rollout, *parts, config, update=update, share=share))
                numbers = [sum(part.loss for part in moments), float(bool(stop))]
                loss, stopping = policies.state.collect(group, [*numbers, 0.0])[:2]
                updates = {"loss": loss / objective.updates, **policies.state.update(config.num_updates)}
            policies.follow(step)
            done = policies.iteration == run.steps
            told = (config, judged, rewards, known, moments, pictures, mine, judges[1], group, policies.iteration)
            row = {"step": policies.iteration, **updates, **describe(*told)}
            clock.append(time.perf_counter())
            now = sum(group.gather(cpu_seconds()))
            if first and (done or policies.iteration % run.log_every == 0):
                append_jsonl(run.out / "metrics.jsonl", row)
                names = ("sampling", "waiting_for_judge", "updating")
                seconds = {name: b - a for name, a, b in zip(names, clock[:-1], clock[1:], strict=True)}
                append_jsonl(
                    run.out / "timing.jsonl", {"step": policies.iteration, **seconds, "cpu_seconds": now - spent}
                )
                spent = now
            if run.sample_every and (done or policies.iteration % run.sample_every == 0) and first:
                save_samples(policies, world, tasks, config)
                write_report(config)
            if stopping or done or (run.checkpoint_every and policies.iteration % run.checkpoint_every == 0):
                policies.save({"iteration": policies.iteration})
            bar.set_postfix(reward=f"{row['reward']['mean'] or 0:.3f}", refresh=False)
            bar.update()
            if stopping:
                break
    if policies.iteration == run.steps:
        finish(policies, world, config, group, base)


def open_world(config: ReinforceConfig, base: Path) -> tuple[LensConfig, Miniature]:
    """Sizes of the transformer, and the frozen text encoder and autoencoder that belong to it."""
    if (base / "run.json").exists():
        model, world = load_checkpoint(base, config.base_weights, quiet=True)
        return model.config, world
    from lensmini.checkpoints import load_text_encoder, load_transformer
    from lensmini.nn import load_autoencoder
    from lensmini.pipeline.folder import find_pipeline

    source, _ = find_pipeline(base.as_posix())
    device, dtype = config.engine.torch_device(), getattr(torch, config.optim.dtype)
    sizes = load_transformer(source, device="meta").config
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    encoder = load_text_encoder(source, subfolder="text_encoder", layers=sizes.selected_layer_index, **options)
    return sizes, Miniature(encoder, load_autoencoder(source, subfolder="vae", **options), source.as_posix(), {})


def sample_and_submit(
    policies: Policies,
    world: Miniature,
    tasks: Sequence[Task],
    chunks: Sequence[Sequence[Sample]],
    judging: Judging,
    config: ReinforceConfig,
) -> tuple[list[Rollout], list[Tensor]]:
    """This process's chunks of a step and their pictures; each chunk goes to the judge as soon as it is there."""
    rollouts, pictures, texts = list[Rollout](), list[Tensor](), dict[int, Tensor]()
    for chunk in chunks:
        for sample in chunk:
            if sample.prompt not in texts:
                texts[sample.prompt] = encode_prompt(world, tasks[sample.prompt].text)
        with policies.acting("old" if config.objective.name == "nft" else "trained") as model:
            rollout = roll_out(
                model,
                chunk,
                [texts[sample.prompt] for sample in chunk],
                config,
                downsample=world.autoencoder.downsample,
                step=policies.iteration,
                device=policies.device,
            )
        images = decode(world.autoencoder, rollout)
        judging.submit(images, [tasks[sample.prompt].rubric for sample in chunk])
        rollouts.append(rollout)
        pictures += images
    return rollouts, pictures


def collect_verdicts(judging: Judging, group: Group, samples: Sequence[Sample], tasks: Sequence[Task]) -> Judged:
    """The verdicts of all pictures of a step, of all processes, in the order of the samples."""
    rows: list[list[Verdict]] = []
    unavailable = None
    try:
        rows = judging.results()
    except JudgeUnavailableError as error:
        unavailable = str(error)
    parts = group.gather((rows, unavailable))
    causes = [cause for _, cause in parts if cause is not None]
    everything = [row for part, _ in parts for row in part]
    return Judged.of(everything, samples, tasks, causes[0] if causes else None)


def positions(samples: Sequence[Sample], chunks: Sequence[Sequence[Sample]]) -> list[Tensor]:
    """For each chunk the places of its samples among all of the step."""
    first = samples[0].number
    return [torch.tensor([sample.number - first for sample in chunk]) for chunk in chunks]


def left_out(config: ReinforceConfig, policies: Policies, group: Group, step: int, cause: str) -> bool:
    """Note a step without a judge; save and stop the run, or go to the next step. True to leave the loop."""
    stop = config.reward.unavailable == "stop"
    if group.rank == 0:
        action = "stop" if stop else "skip"
        append_jsonl(config.run.out / "events.jsonl", {"step": step + 1, "cause": cause, "action": action})
    if stop:
        policies.save({"iteration": policies.iteration})
        raise JudgeUnavailableError(f"step {step + 1}: {cause}; saved, the same command goes on from there")
    for _ in range(config.objective.updates):
        policies.state.skip()
    return False


def save_samples(policies: Policies, world: Miniature, tasks: Sequence[Task], config: ReinforceConfig) -> None:
    """A grid of the first prompts at fixed seeds, without guidance: held-out ones of scenes, else trained ones."""
    scored = config.prompts.source == "scenes" and config.eval.num_prompts
    texts = [p.text for p in held_out_prompts(config)[:12]] if scored else [task.text for task in tasks[:12]]
    canvases = [config.rollout.canvases[index % len(config.rollout.canvases)] for index in range(len(texts))]
    with policies.acting("ema") as model:
        features = [encode_prompt(world, text) for text in texts]
        seeds = range(len(texts))
        pictures = paint_suite(model, world, features, canvases, seeds, config.eval, guided=False, chunk=12)
    save_grid(pictures, texts, config.run.out / f"samples-{policies.iteration:06d}.png")


def finish(policies: Policies, world: Miniature, config: ReinforceConfig, group: Group, base: Path) -> None:
    """Score the policy and, once for all runs from one base, the base; write ``summary.json``."""
    summary: dict[str, Any] = {"step": policies.iteration, "skipped_steps": 0}
    if config.prompts.source == "scenes" and config.eval.num_prompts:
        before = base_score(policies, world, config, group, base)
        which = "ema" if config.eval.weights == "ema" else "trained"
        with policies.acting(which) as model:
            after = evaluate(model, world, config, group, num_guided=config.eval.num_guided)
        summary |= {"before": before, "after": after}
    if group.rank == 0:
        rows = [json.loads(line) for line in (config.run.out / "metrics.jsonl").read_text().splitlines()]
        events = config.run.out / "events.jsonl"
        skipped = [json.loads(line)["action"] for line in events.read_text().splitlines()] if events.exists() else []
        summary |= {"loss": rows[-1]["loss"], "skipped_steps": skipped.count("skip"), "cpu_seconds": cpu_seconds()}
        summary |= {"config": config_dict(config), "config_hash": config_hash(config), "provenance": provenance()}
        write_json(config.run.out / "summary.json", summary)
        write_report(config)
        for name in ("before", "after") if "after" in summary else ():
            score = summary[name]
            print(
                f"{name:7s} without guidance: strict {score['free']['strict']:.3f}, held-out judge "
                f"{score['free']['held_out']:.3f}; guided: strict {score['guided']['strict']:.3f}; foreground "
                f"{score['free']['foreground']:.3f}; diversity {score['diversity']:.3f}",
                flush=True,
            )


def base_score(
    policies: Policies, world: Miniature, config: ReinforceConfig, group: Group, base: Path
) -> dict[str, Any]:
    """The scores of the reference, kept beside the runs: they depend on the base and the settings of the score alone."""
    run = read_run(base)
    prompts = {name: getattr(config.prompts, name) for name in ("num_prompts", "seed", "wording", "form")}
    painted = {
        name: getattr(config.eval, name)
        for name in ("num_prompts", "num_steps", "guidance_scale", "mu", "variety", "seed")
    }
    key: dict[str, Any] = {
        "eval": painted,
        "training": run["config"],
        "step": run["step"],
        "weights": config.base_weights,
    }
    key |= {"canvases": config.rollout.canvases, "prompts": prompts}

    def make(directory: Path) -> None:
        with policies.acting("reference") as model:
            write_json(directory / "score.json", evaluate(model, world, config, Group(0, 1)))

    result = None
    if group.rank == 0:
        path, _ = cached_stage(config.run.out.parent, "base-score", key, make)
        result = json.loads((path / "score.json").read_text())
    return group.gather(result)[0]


def main(config: ReinforceConfig) -> None:
    """Train in as many processes as the settings ask for, or describe the run."""
    if config.dry_run:
        print(describe_run(config))
        return
    check_same_run(config.run.out, config)
    if os.environ.get("RANK", "0") == "0":
        config.run.out.mkdir(parents=True, exist_ok=True)
        write_json(config.run.out / "config.json", config)
    run_processes(train, config.run.processes, config, timeout_minutes=max(30.0, config.engine.timeout_minutes))


def cli(arguments: Sequence[str] | None = None) -> None:
    """Read a preset and its overrides from the command line and run it."""
    config = read_config(PRESETS, "python -m experiments.reinforce", arguments)
    try:
        main(config)
    except (SettingsError, JudgeUnavailableError, FileNotFoundError) as error:
        raise SystemExit(f"reinforce: {error}") from None


if __name__ == "__main__":
    cli()
