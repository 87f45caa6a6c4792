"""Where advantages say something: how far the gradients of two halves of a rollout agree, by time and by kind of weights.

    python -m experiments.ablations.rl_signal                             about three CPU-minutes, from the quickstart's model

Both halves are pictures of the same policy for other prompts. The gradient of advantage-weighted matching (DiffusionNFT's at
the sampling policy, up to a factor) is summed over each; its cosine is S^2 / (S^2 + N^2) for a signal S and a noise N of a
half. What agrees need not be good: see docs/reinforce.md.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from experiments.miniature.rubrics import scene_judge
from experiments.reinforce import open_world
from experiments.reinforce_config import mini
from experiments.reinforce_rewards import load_tasks, rewards_of
from experiments.reinforce_rollout import Rollout, decode, encode_prompt, my_chunks, roll_out, seed_of, step_samples
from experiments.reinforce_state import Policies, find_base
from experiments.runs import config_dict, provenance, write_json
from lensmini.objectives.policy import group_advantages
from lensmini.parallel import Group
from lensmini.paths import interpolate, velocity_target
from lensmini.rewards import to_matrix
from lensmini.rewards.judges import judge_pictures
from lensmini.sampling import initial_noise

__all__ = ["SignalConfig", "main"]

KINDS = {
    "norms of text": ("txt_norm.",),
    "norms of queries and keys": ("attn.norm_",),
    "text: projections": ("txt_qkv", "to_add_out", "txt_in"),
    "text: modulation and MLP": ("txt_mod", "txt_mlp", "txt_norm1", "txt_norm2"),
    "image: projections": ("img_qkv", "to_out.0", "img_in", "proj_out"),
    "image: modulation and MLP": ("img_mod", "img_mlp", "img_norm1", "img_norm2", "norm_out"),
    "time": ("time_text_embed",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalConfig:
    """One measurement."""

    out: Path = Path("runs/rl_signal.json")
    """The result."""
    base: Path = Path("runs/quickstart")
    """The policy."""
    groups: int = 48
    """Prompts; half of them make each half."""
    times: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.75, 0.86, 0.95)
    """At which pictures are noised again."""
    shared_noise: bool = False
    """One training noise for the pictures of a group that have the same size."""
    num_canvases: int = 5
    """Shapes, of the preset's."""
    seed: int = 11
    """Of pictures and noise."""


def main(config: SignalConfig) -> dict[str, Any]:
    """Measure, print and write."""
    torch.set_num_threads(1)
    base = mini()
    settings = replace(
        base,
        base=config.base,
        rollout=replace(base.rollout, groups=config.groups, canvases=base.rollout.canvases[: config.num_canvases]),
    )
    settings = replace(settings, objective=replace(base.objective, name="awm", trained=()))
    place = find_base(config.base)
    sizes, world = open_world(settings, place)
    policies, tasks = Policies(settings, Group(0, 1), sizes, place), load_tasks(settings.prompts)
    samples = step_samples(settings.rollout, len(tasks), 0, config.seed)
    rollouts, pictures = [], []
    for chunk in my_chunks(samples, settings.rollout.chunk, Group(0, 1)):
        texts = [encode_prompt(world, tasks[sample.prompt].text) for sample in chunk]
        where = {"downsample": world.autoencoder.downsample, "step": 0, "device": policies.device}
        rollouts.append(roll_out(policies.model, chunk, texts, settings, **where))
        pictures += decode(world.autoencoder, rollouts[-1])
    rubrics = [tasks[sample.prompt].rubric for sample in samples]
    group = torch.tensor([sample.group for sample in samples])
    rewards, known = rewards_of(to_matrix(judge_pictures(scene_judge(), pictures, rubrics), rubrics), group, settings)
    advantages = group_advantages(rewards, group, mask=known).split([len(r.samples) for r in rollouts])
    rows = {}
    for t in config.times:
        middle = len(rollouts) // 2
        halves = [
            _gradient(policies, rollouts[part], advantages[part], t, config)
            for part in (slice(None, middle), slice(middle, None))
        ]
        rows[str(t)] = _agreement(*halves)
        print(t, {name: round(value, 3) for name, value in rows[str(t)].items()}, flush=True)
    result = {
        "question": "At which times, and in which weights, do gradients of two halves of a rollout agree (cosine)?",
        "command": "python -m experiments.ablations.rl_signal",
        "pictures_of_a_half": len(samples) // 2,
        "mean_reward": rewards.mean().item(),
        "agreement": rows,
        "config": config_dict(config),
        "provenance": provenance(),
    }
    write_json(config.out, result)
    return result


def _gradient(
    policies: Policies, rollouts: Sequence[Rollout], advantages: Sequence[Tensor], t: float, config: SignalConfig
) -> dict[str, Tensor]:
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        layout, times = rollout.layout, torch.full((len(rollout.samples),), t)
        names = [sample.group if config.shared_noise else sample.number for sample in rollout.samples]
        seeds = [seed_of(config.seed, "training", name, round(100 * t)) for name in names]
        noise = initial_noise(seeds, rollout.latents.shape[1], layout)
        noisy, target = (
            interpolate(rollout.latents, noise, times, layout=layout),
            velocity_target(rollout.latents, noise),
        )
        velocity = policies.model.forward_packed(noisy, times, rollout.text_tokens, layout)
        assert isinstance(velocity, Tensor)
        residual = velocity.detach() - target
        # The gradient of NFT's loss where both policies agree, each picture over its mean absolute error.
        each = layout.mean(velocity * residual) / layout.mean(residual.abs())
        (advantage * each).sum().backward()
    gradient = {n: p.grad for n, p in policies.model.named_parameters() if p.grad is not None}
    policies.model.zero_grad(set_to_none=True)
    return gradient


def _agreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        kinds = [kind for kind, parts in KINDS.items() if any(part in name for part in parts)][:1]
        for kind in ("all", *kinds):
            for place, value in enumerate(((a * b).sum(), a.square().sum(), b.square().sum())):
                sums[kind][place] += value.item()
    return {kind: ab / (aa * bb) ** 0.5 for kind, (ab, aa, bb) in sorted(sums.items())}


if __name__ == "__main__":
    main(tyro.cli(SignalConfig, prog="python -m experiments.ablations.rl_signal"))
