"""Flow-matching pre-training (arXiv 2605.21573, section 2: stages 1 and 2), from a miniature to the paper's two stages.

    python -m experiments.pretrain mini --run.out runs/mini               two CPU cores, about 7 minutes
    python -m experiments.pretrain folder --data.path DIR                 your pictures: name.png|jpg beside name.txt
    python -m experiments.pretrain stage1 --dry-run                       the paper's 512x512 stage: size and cost
    python -m experiments.pretrain stage2 --dry-run                       the paper's 27 mixed resolutions

On GPUs, from shards that ``experiments.prepare_data`` wrote; ``--max-restarts`` lets the job go on by itself when a rank
dies, from its last checkpoint:

    python -m experiments.pretrain finetune_24gb --data.path OUT/shards --init-from FOLDER_OR_REPO
    torchrun --nproc-per-node 8 --max-restarts 20 -m experiments.pretrain lab_8gpu --data.path OUT/shards
    sbatch --nodes 16 --ntasks-per-node 1 --gpus-per-node 8 --requeue --wrap 'srun torchrun --nnodes 16 --nproc-per-node 8
      --rdzv-backend c10d --rdzv-endpoint $(scontrol show hostnames $SLURM_NODELIST | head -1):29500 --max-restarts 20
      -m experiments.pretrain stage1 --data.path OUT/shards'

The same command again resumes, on any number of GPUs that divides ``data.num_ranks``; Ctrl-C and SIGTERM save first. A run
directory holds ``metrics.jsonl`` (a function of config and seed alone, byte for byte on the same ranks), ``timing.jsonl``,
``events.jsonl`` (steps that were not applied, with their samples), ``step-N/`` checkpoints, sample grids and
``summary.json``.
"""

import json
import os
from dataclasses import replace
from typing import Any

import torch
import tyro

from experiments.bank import Batch, FeatureBank
from experiments.dry_run import describe_run
from experiments.engine import make_state, peak_flops
from experiments.feed import Feed
from experiments.folder_data import FolderConfig, FolderError, check_folder, folder_banks
from experiments.guards import Guard, RunawayError
from experiments.meters import Meter, SlotLosses, loss_table
from experiments.miniature.world import Miniature, prepare_miniature
from experiments.pretrain_config import PRESETS, EvalConfig, PretrainConfig, folder, mini, stage1, stage2
from experiments.pretrain_data import SceneConfig, scene_banks
from experiments.pretrain_eval import evaluate, per_sample_loss, sample_times
from experiments.runs import (
    StopRequest,
    append_jsonl,
    config_dict,
    latest_checkpoint,
    progress,
    provenance,
    truncate_jsonl,
    write_json,
)
from experiments.shard_data import ShardBank, ShardsConfig, load_encoders
from experiments.sharded_state import ShardedState
from experiments.training import SettingsError, check_same_run, read_run
from lensmini.data import BatchPlan, loss_weights
from lensmini.parallel import Group, run_processes

__all__ = [
    "PRESETS",
    "EvalConfig",
    "PretrainConfig",
    "cli",
    "folder",
    "main",
    "make_plan",
    "mini",
    "stage1",
    "stage2",
    "train",
]


def make_plan(config: PretrainConfig, bank: FeatureBank | ShardBank) -> BatchPlan:
    """The order of a run's pictures; a function of config and bank, whatever the number of processes."""
    data = config.data
    if isinstance(bank, ShardBank):
        return bank.plan(seed=config.run.seed, model=config.model)
    assert isinstance(data, SceneConfig | FolderConfig)
    return bank.plan(
        batch_size=data.batch_size,
        num_slots=data.num_slots,
        mode=data.mode,
        seed=config.run.seed,
        model=config.model,
    )


def open_data(
    config: PretrainConfig, device: torch.device
) -> tuple[Miniature, FeatureBank | ShardBank, FeatureBank | ShardBank | None]:
    """Frozen encoders, training samples and held-out ones."""
    data, out = config.data, config.run.out
    if isinstance(data, ShardsConfig):
        world = load_encoders(data, config.model, device)
        held_out = None
        if data.held_out is not None:
            held_out = ShardBank(data.held_out, replace(data, features="online"), world, out, device)
        return world, ShardBank(data.path, data, world, out, device), held_out
    world = prepare_miniature(config.miniature, out.parent, quiet=True)
    make_banks: Any = scene_banks if isinstance(data, SceneConfig) else folder_banks
    return world, *make_banks(data, world, out, quiet=True)


def train(group: Group, config: PretrainConfig) -> None:
    """The loop of one process."""
    torch.set_num_threads(config.run.threads)
    run, optim, data, first = config.run, config.optim, config.data, group.rank == 0
    device = config.engine.torch_device()
    world, bank, held_out = open_data(config, device)
    plan = make_plan(config, bank)
    check_same_run(run.out, config, bank.order_id(plan))
    adapted: dict[str, Any] = {"adapter": config.adapter, "base": config.init_from}
    state = make_state(config.engine, config.model, optim, seed=run.seed, group=group, **adapted)
    plan.micro_steps(group.world_size)
    guard, meter = Guard(config.guard, run.out), Meter(config.model, group, peak_flops(config.engine))

    def collate(step: int, pictures: list[int], repeats: list[int]) -> Batch:
        bank.prepare(plan, step, group.rank, group.world_size)
        batch = bank.collate(pictures, repeats=repeats, seed=run.seed, step=step, text_dropout=data.text_dropout)
        return batch.to(device)

    def start() -> Feed:
        """Weights, guard and order of samples as they were at the last checkpoint, or at the beginning."""
        if not state.resume(run.out) and config.init_from is not None and not config.adapter.rank:
            state.load(config.init_from, which=config.init_weights, optimizer=not config.reset_optimizer)
        found = latest_checkpoint(run.out)
        if found is None and config.guard.policy == "restore":
            # Somewhere to go back to.
            state.save(run.out, config, keep=run.keep_checkpoints, plan=bank.order_id(plan))
        guard.resume(read_run(found[0]).get("guard") if found else None)
        for name in ("metrics.jsonl", "timing.jsonl") if first else ():
            truncate_jsonl(run.out / name, state.step)
        return Feed(
            plan,
            collate,
            rank=group.rank,
            world_size=group.world_size,
            start=state.step,
            end=run.steps,
            ahead=config.engine.batches_ahead,
        )

    feed, resumed = start(), state.step
    with StopRequest() as stop, progress(run.steps, state.step, "pretrain", rank=group.rank) as bar:
        while state.step < run.steps:
            index, loss, parts = state.step, 0.0, list[SlotLosses]()
            left_out = guard.leaves_out(index)
            slots = [] if left_out else range(group.rank, plan.num_slots, group.world_size)
            for slot in slots:
                with meter.waiting():
                    batch = feed.take(index, slot)
                meter.add(batch.layout)
                state.begin(last=slot == slots[-1])
                times = sample_times(batch, optim)
                losses = per_sample_loss(state, batch, times)
                weights = loss_weights(batch.layout, plan.totals(plan.step(index)), data.weighting)
                part = (weights * losses).sum()
                part.backward()
                state.accumulate()
                loss += part.item()
                parts.append(SlotLosses(times, losses, batch.layout.grids, batch.pictures))
            loss, stopping, _ = state.collect(group, [loss, float(bool(stop)), 0.0])
            row: dict[str, Any] = {"step": index + 1, "loss": loss}
            cause = None if left_out else guard.cause(index, loss, state.gradient_norm())
            if left_out or cause is not None:
                row = {"step": index + 1, "loss": None, "skipped": cause or "left out"}
                if cause is not None and _give_up(config, guard, group, parts, row, state.step):
                    feed.close()
                    feed = start()
                    bar.reset(run.steps)
                    bar.update(state.step)
                    continue
                state.skip()
            else:
                row |= state.update(run.steps)
            row |= evaluate(config, state, world, held_out, group)
            done = state.step == run.steps
            if len(row) > 4 or state.step % run.log_every == 0 or done or row["loss"] is None:
                row |= loss_table(parts, group) if row["loss"] is not None else {}
                spent = bank.take_spent() if isinstance(bank, ShardBank) else None
                timing = {"step": state.step, "steps": state.step - resumed, **meter.report(spent)}
                if first:
                    append_jsonl(run.out / "metrics.jsonl", row)
                    append_jsonl(run.out / "timing.jsonl", timing)
            bar.set_postfix(loss=f"{loss:.3f}", skipped=guard.skipped, refresh=False)
            bar.update()
            if stopping or done or (run.checkpoint_every and state.step % run.checkpoint_every == 0):
                notes = {"guard": guard.state()}
                state.save(run.out, config, keep=run.keep_checkpoints, plan=bank.order_id(plan), notes=notes)
            if stopping:
                break
        state.finish()
        feed.close()
    if first and state.step == run.steps:
        last = json.loads((run.out / "metrics.jsonl").read_text().splitlines()[-1])
        last |= {"skipped_steps": guard.skipped, "sharded": isinstance(state, ShardedState)}
        write_json(run.out / "summary.json", {**last, "config": config_dict(config), "provenance": provenance()})


def _give_up(
    config: PretrainConfig, guard: Guard, group: Group, parts: list[SlotLosses], row: dict[str, Any], step: int
) -> bool:
    """Note a bad step with the samples it had and their losses; whether to go back to the last checkpoint.

    Raises:
        RunawayError: if the run has to stop.
    """
    mine = [
        [number, value if abs(value) < float("inf") else str(value)]
        for part in parts
        for number, value in zip(part.samples, part.losses.detach().float().cpu().tolist(), strict=True)
    ]
    samples = sorted((pair for rank in group.gather(mine) for pair in rank), key=lambda pair: pair[0])
    out, action = config.run.out, "stop"
    try:
        action = guard.action()
    except RunawayError as error:
        raise RunawayError(
            f"step {step + 1}: {row['skipped']}; {error}. Lower the learning rates (optim.lr, optim.muon_lr), or see "
            f"--guard.policy. The last checkpoint in {out} is from before; {out / 'events.jsonl'} names the samples"
        ) from None
    finally:
        if group.rank == 0:
            append_jsonl(
                out / "events.jsonl", {"step": step + 1, "cause": row["skipped"], "action": action, "samples": samples}
            )
    if action == "restore":
        guard.leave_out(write=group.rank == 0)
    return action == "restore"


def main(config: PretrainConfig) -> None:
    """Prepare what the run stands on, then train in as many processes as it asks for."""
    if config.dry_run:
        print(describe_run(config))
        return
    first, out = os.environ.get("RANK", "0") == "0", config.run.out
    if isinstance(config.data, FolderConfig):
        check_folder(config.data)
    if isinstance(config.data, ShardsConfig) and not (config.data.path / "shards.json").exists():
        raise FolderError(
            f"data.path: expected shards of `python -m experiments.prepare_data` in {config.data.path}, found no shards.json "
            "(--dry-run describes the run without them)"
        )
    check_same_run(out, config)
    if first:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", config)
        if not isinstance(config.data, ShardsConfig):
            world = prepare_miniature(config.miniature, out.parent)
            make_banks: Any = scene_banks if isinstance(config.data, SceneConfig) else folder_banks
            bank, _ = make_banks(config.data, world, out)
            check_same_run(out, config, bank.order_id(make_plan(config, bank)))
            del world, bank
    sharded = config.engine.sharding != "none"
    timeout = config.engine.timeout_minutes
    run_processes(train, config.run.processes, config, timeout_minutes=timeout, alone=sharded)


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
