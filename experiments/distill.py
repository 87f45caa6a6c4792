"""Distillation to a few steps without guidance: Lens-Turbo's recipe (arXiv 2605.21573 D.2), and its rows of ablation.

    python -m experiments.distill mini                                     the quickstart's model, two CPU cores
    python -m experiments.distill mini --lora runs/rl/adapter.safetensors  after reinforcement learning
    python -m experiments.distill ca_only                                  one row of the ablation
    python -m experiments.distill lens --dry-run                           the paper's run: networks, memory and cost
    torchrun --nproc-per-node 8 -m experiments.distill lens --data.path OUT/shards --teacher FOLDER_OR_REPO

    python -m experiments.generate mini "P" --checkpoint runs/distill      four steps without guidance, as it was trained

Each step: four updates of the fake score and of the discriminator on samples of the student, then one of the student by
distribution matching, guidance augmentation and the discriminator, then the fake score is moved towards the student (IDA).
The same command again resumes with all networks and moments; Ctrl-C and SIGTERM save first. ``metrics.jsonl``,
``step-N/`` (paints by itself), ``student/`` and ``fake/`` (what a resume needs besides), and ``summary.json``.
"""

import os
import time
from typing import Any

import torch

from experiments.distill_config import PRESETS, DistillConfig
from experiments.distill_consistency import CONSISTENCY_LOSSES
from experiments.distill_dry_run import describe_distillation
from experiments.distill_objectives import STUDENT_LOSSES, critic_losses, warm_loss
from experiments.distill_score import score_run
from experiments.distill_state import DistillState, Teacher, resolved
from experiments.distill_update import Run, descend
from experiments.generate import read_config
from experiments.guards import Guard, RunawayError
from experiments.pretrain_data import scene_banks
from experiments.runs import StopRequest, append_jsonl, progress, provenance, read_jsonl, truncate_jsonl, write_json
from experiments.shard_data import ShardBank, ShardsConfig
from experiments.training import SettingsError, check_same_run
from experiments.usage import cpu_seconds
from lensmini.parallel import Group, run_processes

__all__ = ["PRESETS", "DistillConfig", "main", "open_run", "train"]


def open_run(group: Group, config: DistillConfig) -> Run:
    """Teacher, data, order of samples and networks of a run, at the beginning or where its last checkpoint left them."""
    teacher, out, quiet = Teacher(config, config.engine.torch_device()), config.run.out, group.rank != 0
    if isinstance(config.data, ShardsConfig):
        bank: Any = ShardBank(config.data.path, config.data, teacher.world, out, config.engine.torch_device())
        plan = bank.plan(seed=config.run.seed, model=teacher.model.config)
    else:
        # Beside the teacher's run, which has encoded the same scenes already.
        bank, _ = scene_banks(config.data, teacher.world, teacher.path.resolve().parent, quiet=quiet)
        data = config.data
        plan = bank.plan(
            batch_size=data.batch_size,
            num_slots=data.num_slots,
            mode=data.mode,
            seed=config.run.seed,
            model=teacher.model.config,
        )
    check_same_run(out, resolved(config, teacher), bank.order_id(plan))
    guards = {who: Guard(config.guard, out) for who in ("critic", "student")}
    run = Run(config, group, bank, plan, DistillState(config, teacher, group), guards)
    kept = run.state.resume().get("guards", {})
    for who, guard in guards.items():
        guard.resume(kept.get(who))
    return run


def train(group: Group, config: DistillConfig) -> None:
    """The loop of one process."""
    torch.set_num_threads(config.run.threads)
    run = open_run(group, config)
    state, out, first, spent = run.state, config.run.out, group.rank == 0, sum(group.gather(cpu_seconds()))
    if first:
        truncate_jsonl(out / "metrics.jsonl", state.step)
        truncate_jsonl(out / "timing.jsonl", state.step)
    per_step, steps = config.critic.updates + 1, config.run.steps
    losses = STUDENT_LOSSES | CONSISTENCY_LOSSES
    with StopRequest() as stop, progress(steps, state.step, "distill", rank=group.rank) as bar:
        while state.step < steps:
            started, row = time.perf_counter(), dict[str, float]()
            update = state.step * per_step
            for number in range(update, update + config.critic.updates):
                row = descend(run, number, critic_losses, "critic")
            loss = warm_loss if state.step < config.warm_start else losses[config.method]
            row |= descend(run, update + config.critic.updates, loss, "student")
            stops, used = zip(*group.gather((bool(stop), cpu_seconds())), strict=True)
            stopping, done, now = any(stops), state.step == steps, sum(used)
            if first and (state.step % config.run.log_every == 0 or done or "skipped" in row):
                append_jsonl(out / "metrics.jsonl", {"step": state.step, **row})
                timing = {"seconds": time.perf_counter() - started, "cpu_seconds": now - spent}
                append_jsonl(out / "timing.jsonl", {"step": state.step, **timing})
                spent = now
            bar.set_postfix(loss=f"{row.get('loss', float('nan')):.3f}", skipped=run.skipped, refresh=False)
            bar.update()
            if stopping or done or (config.run.checkpoint_every and state.step % config.run.checkpoint_every == 0):
                state.save(
                    plan=run.bank.order_id(run.plan),
                    notes={"guards": {who: guard.state() for who, guard in run.guards.items()}},
                )
            if stopping:
                return
    if first:
        used = sum(row["cpu_seconds"] for row in read_jsonl(out / "timing.jsonl"))
        summary = {"step": state.step, "skipped": run.skipped, "cpu_seconds": used}
        summary |= score_run(config, state.teacher)
        write_json(
            out / "summary.json", {**summary, "config": resolved(config, state.teacher), "provenance": provenance()}
        )


def main(config: DistillConfig) -> None:
    """Describe the run, or train in as many processes as it asks for."""
    if config.dry_run:
        print(describe_distillation(config))
        return
    config.run.out.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") == "0":
        write_json(config.run.out / "config.json", config)
    sharded, minutes = config.engine.sharding != "none", config.engine.timeout_minutes
    run_processes(train, config.run.processes, config, timeout_minutes=minutes, alone=sharded)


def cli() -> None:
    """Read a preset and its overrides from the command line and run it."""
    config = read_config(PRESETS, "python -m experiments.distill")
    try:
        main(config)
    except (SettingsError, RunawayError, FileNotFoundError) as error:
        raise SystemExit(f"distill: {error}") from None


if __name__ == "__main__":
    cli()
