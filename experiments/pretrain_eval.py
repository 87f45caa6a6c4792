"""What a pre-training run measures on the way: validation loss, suite scores, a grid of samples."""

import torch
from torch import Tensor

from experiments.adapter_state import AdapterState
from experiments.bank import Batch, FeatureBank
from experiments.folder_data import FolderConfig
from experiments.miniature.world import Miniature
from experiments.pictures import save_grid
from experiments.pretrain_config import PretrainConfig
from experiments.pretrain_data import SceneConfig
from experiments.scoring import paint_prompts, score_suite
from experiments.shard_data import ShardBank
from experiments.sharded_state import ShardedState
from experiments.training import OptimConfig, TrainingState
from lensmini.data import build_scene_prompts
from lensmini.nn import LensTransformer
from lensmini.objectives import flow_matching_loss, training_mu
from lensmini.parallel import Group
from lensmini.paths import interpolate, velocity_target

__all__ = ["State", "evaluate", "per_sample_loss", "sample_times", "validation_losses"]

State = TrainingState | ShardedState | AdapterState
_LARGE_BATCH = 8
"""Held-out pictures that go through a large model at a time."""


def per_sample_loss(state: State, batch: Batch, times: Tensor) -> Tensor:
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
def validation_losses(state: State, bank: FeatureBank | ShardBank, group: Group, seed: int) -> dict[str, float]:
    """Mean loss on every held-out picture at four fixed times with fixed noise, per canvas."""
    together = isinstance(state, ShardedState)
    tasks = []
    for (height, width), members in sorted(bank.by_grid().items()):
        size = _LARGE_BATCH if isinstance(bank, ShardBank) else len(members)
        parts = [members[first : first + size] for first in range(0, len(members), size)]
        tasks += [(f"{height}x{width}", part) for part in parts]
    rounds = -(-len(tasks) // group.world_size)
    sums: dict[str, list[float]] = {}
    for index in range(group.rank, rounds * group.world_size, group.world_size):
        real = index < len(tasks)
        if not real and not together:
            continue
        # Where parameters are sharded every rank computes something, whether it counts or not.
        name, members = tasks[index if real else 0]
        batch = bank.collate(members, seed=seed, step=-1, text_dropout=0.0).to(_device(state))
        for t in (0.2, 0.4, 0.6, 0.8):
            losses = per_sample_loss(state, batch, torch.full((len(members),), t, device=batch.noise.device))
            if real:
                sums.setdefault(name, []).extend(losses.tolist())
    merged: dict[str, list[float]] = {}
    for part in group.gather(sums):
        for name, values in part.items():
            merged.setdefault(name, []).extend(values)
    result = {f"validation_{name}": sum(values) / len(values) for name, values in sorted(merged.items())}
    everything = [value for values in merged.values() for value in values]
    return {"validation": sum(everything) / len(everything), **result}


def evaluate(
    config: PretrainConfig,
    state: State,
    world: Miniature,
    bank: FeatureBank | ShardBank | None,
    group: Group,
) -> dict[str, float]:
    """What is due at this step: validation loss, suite scores, a grid of samples."""
    last, row = state.step == config.run.steps, {}

    def due(every: int) -> bool:
        return bool(every) and (state.step % every == 0 or last)

    if due(config.eval.validate_every) and bank is not None:
        row |= validation_losses(state, bank, group, config.run.seed)
    data, together = config.data, isinstance(state, ShardedState)
    # Where parameters are sharded all ranks paint the same pictures, since each needs the others.
    painters = Group(0, 1) if together else group
    if isinstance(data, SceneConfig) and due(config.eval.score_every):
        prompts = build_scene_prompts(max(1, config.eval.num_prompts // 6), seed=1_000_003, wording=data.wording)
        score, _ = score_suite(_painter(state), world, prompts, data.canvases, config.eval, painters)
        row |= {"strict": score.strict, "loose": score.loose, "atom": score.atom}
    wanted = due(config.run.sample_every) or (last and not isinstance(bank, ShardBank | None))
    if (group.rank == 0 or together) and wanted:
        if isinstance(data, SceneConfig):
            canvases = data.canvases
            texts = [prompt.text for prompt in build_scene_prompts(2, seed=1_000_033, wording=data.wording)]
        elif isinstance(data, FolderConfig):
            canvases, texts = ((32, 32),), (config.run.out / "captions.txt").read_text().splitlines()[:12]
        else:
            canvases = tuple((bucket.height, bucket.width) for bucket in data.buckets)
            assert isinstance(bank, ShardBank | None)
            texts = [] if bank is None else bank.captions(range(min(12, len(bank.index))))
        if texts:
            pictures = paint_prompts(_painter(state), world, texts, canvases, config.eval)
            if group.rank == 0:
                save_grid(pictures, texts, config.run.out / f"samples-{state.step:06d}.png")
    return row


def _device(state: State) -> torch.device:
    return torch.device("cpu") if isinstance(state, TrainingState) else state.device


def _painter(state: State) -> LensTransformer:
    """What paints: a sharded or replicated model itself, or the low-precision copy."""
    return state.model if isinstance(state, ShardedState) else state.compute
