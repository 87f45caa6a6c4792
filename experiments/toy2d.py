"""Reinforcement learning of a flow model where everything can be seen: every objective of the library, in two dimensions.

    python -m experiments.toy2d mini --out runs/toy2d
    python -m experiments.toy2d mini --objectives nft grpo_ddim --seed 1
    python -m experiments.toy2d three_seeds --out runs/toy2d3             intervals: experiments/results/toy2d.json

Two prompts, each a mixture of Gaussians: a ring, and a grid of nine. Flow matching first; then, from that base and with
equally many sampled points, DiffusionNFT (plain and self-normalised), AWM, RAM, and GRPO with four kernels climb a linear
reward whose direction and offset differ between the prompts. A share of the rewards is missing, as from a judge that
failed. For a linear reward the best policy at any distance from the data is known: the exponential tilt, again a mixture,
with shares ``w_k exp(lambda d.mu_k)`` and means moved by ``lambda s^2 d``. Each arm is compared with the tilt that earns the
same reward. Under a minute on two CPU cores; writes ``densities.png``, ``metrics.jsonl`` and ``summary.json``.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import Tensor

from experiments.runs import append_jsonl, config_dict, config_hash, progress, provenance, write_json
from experiments.toy2d_world import OFFSETS, FlowNet, draw, draw_data, draw_tilt, fresh_net, paint, rewards_of, score
from lensmini.averaging import lerp_parameters_
from lensmini.objectives import flow_matching_loss
from lensmini.objectives.policy import (
    clipped_surrogate,
    group_advantages,
    matching_log_ratio,
    nft_decay,
    nft_loss,
    optimality,
    ram_target,
    velocity_gap,
)
from lensmini.paths import interpolate, velocity_target
from lensmini.sampling import Kernel, gaussian_kl, replay_step, sample_ode, sample_sde, time_grid

__all__ = ["OBJECTIVES", "Toy2d", "main", "mini", "quick", "run", "three_seeds", "train_arm", "train_base"]

Objective = Literal["nft", "nft_self_normalised", "awm", "ram", "grpo_ddim", "grpo_flow", "grpo_dance", "grpo_cps"]
OBJECTIVES: tuple[Objective, ...] = (
    "nft",
    "nft_self_normalised",
    "awm",
    "ram",
    "grpo_ddim",
    "grpo_flow",
    "grpo_dance",
    "grpo_cps",
)
ETAS: dict[str, float] = {"ddim": 0.8, "flow": 0.7, "dance": 0.5, "cps": 0.5}
LEARNING_RATES: dict[str, float] = {"nft": 5e-4, "nft_self_normalised": 5e-4, "awm": 3e-4, "ram": 1e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy2d:
    """One run: a base, and arms from it."""

    out: Path = Path("runs/toy2d")
    """Where pictures and numbers go."""
    seed: int = 0
    """Of weights, data and noise: the first one."""
    num_seeds: int = 1
    """Runs, from that seed on; the pictures are of the first."""
    objectives: tuple[Objective, ...] = OBJECTIVES
    """Arms, each from the same base."""
    base_steps: int = 5000
    """Steps of flow matching."""
    batch_size: int = 512
    """Points of a step of flow matching."""
    width: int = 128
    """Of the network's three hidden layers."""
    iterations: int = 60
    """Rollouts of an arm, at most."""
    stop_at: float = 1.0
    """Reward over the prompt's offset at which an arm stops, so that arms are compared where they earn the same."""
    groups: int = 16
    """Groups of a rollout, half of them of each prompt."""
    group_size: int = 32
    """Points of a group."""
    updates: int = 4
    """Optimiser steps on one rollout."""
    num_steps: int = 10
    """Sampling steps of a rollout."""
    penalty: float = 0.02
    """Weight of the distance to the base: of velocities, or the KL of steps for GRPO."""
    missing: float = 0.05
    """Share of rewards that are lost."""
    eval_points: int = 4000
    """Points of a prompt that are scored."""

    def __post_init__(self) -> None:
        if not 0 <= self.missing <= 1 or self.groups % 2 or min(self.base_steps, self.updates, self.num_steps) < 1:
            raise ValueError(
                "missing, groups, base_steps, updates, num_steps: expected a share, an even number and positive numbers, "
                f"got {self.missing}, {self.groups}, {self.base_steps}, {self.updates}, {self.num_steps}"
            )


def mini() -> Toy2d:
    """All objectives, one seed."""
    return Toy2d()


def three_seeds() -> Toy2d:
    """Three runs, and intervals."""
    return Toy2d(num_seeds=3)


def quick() -> Toy2d:
    """A few seconds, for a look at the machinery."""
    return Toy2d(base_steps=150, width=32, iterations=4, eval_points=400, objectives=("nft", "grpo_ddim"))


def train_base(config: Toy2d) -> FlowNet:
    """Flow matching on both prompts."""
    generator = torch.Generator().manual_seed(config.seed)
    net = fresh_net(config.width, generator)
    average = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.base_steps)
    pool_prompt = torch.randint(2, (50_000,), generator=generator)
    pool = draw_data(pool_prompt, generator)
    for step in range(config.base_steps):
        rows = torch.randint(len(pool), (config.batch_size,), generator=generator)
        clean, prompt = pool[rows], pool_prompt[rows]
        noise, t = torch.randn(clean.shape, generator=generator), torch.rand(len(clean), generator=generator)
        velocity = net(interpolate(clean, noise, t), t, prompt)
        loss = flow_matching_loss(velocity, velocity_target(clean, noise)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        lerp_parameters_(average, net, min(1.0, 10 / (step + 10)) if step < 500 else 0.01)
    return average.requires_grad_(False)


def train_arm(base: FlowNet, objective: Objective, config: Toy2d, log: Callable[[dict[str, Any]], None]) -> FlowNet:
    """One objective from the base: rollout, rewards, advantages, updates."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    policy = copy.deepcopy(base).requires_grad_(True)
    old = copy.deepcopy(base)
    optimiser = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATES.get(objective, 3e-4))
    prompt, group = _groups(config, generator)
    for iteration in range(config.iterations):
        noise = torch.randn(len(prompt), 2, generator=generator)
        times = time_grid(config.num_steps)
        steps = []
        if objective.startswith("grpo"):
            kernel = cast(Kernel, objective.removeprefix("grpo_"))
            clean, steps = sample_sde(
                lambda x, t: policy(x, t, prompt),
                noise,
                times,
                lambda _: torch.randn(len(prompt), 2, generator=generator),
                eta=ETAS[kernel],
                kind=kernel,
            )
        else:  # RAM wants samples of the policy itself; the others of the old one
            sampler = policy if objective == "ram" else old
            with torch.no_grad():
                clean = sample_ode(lambda x, t, net=sampler: net(x, t, prompt), noise, times, step="dpm2")
        rewards = rewards_of(clean, prompt)
        lost = torch.rand(len(rewards), generator=generator) < config.missing
        rewards = rewards.masked_fill(lost, torch.nan)
        known = rewards.isfinite()
        advantage = group_advantages(rewards, group, mask=known, scale="none" if objective == "ram" else "group")
        share = known.sum().clamp_min(1)
        losses = []
        for update in range(min(config.updates, len(steps)) if steps else config.updates):
            if steps:
                loss = torch.zeros(())
                for step in steps[update :: config.updates]:
                    replay = replay_step(lambda x, t: policy(x, t, prompt), step, mask=known)
                    log_ratio = replay.log_prob - step.log_prob.where(known, 0.0)
                    if update == 0 and bool(log_ratio.any()):
                        raise RuntimeError("the first ratio after a rollout must be exactly one")
                    with torch.no_grad():
                        anchor = replay_step(lambda x, t: base(x, t, prompt), step, mask=known).mean
                    distance = gaussian_kl(replay.mean, anchor, replay.std, mask=known)
                    each = clipped_surrogate(log_ratio, advantage, 0.2, 0.2, mask=known) + config.penalty * distance
                    loss = loss + each.sum() / share
            else:
                fresh, t = torch.randn(clean.shape, generator=generator), torch.rand(len(clean), generator=generator)
                each = _matching(objective, policy, old, base, clean, fresh, t, prompt, advantage, known, config)
                loss = each.sum() / share
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        lerp_parameters_(old, policy, 1 - nft_decay(iteration) if objective.startswith("nft") else 1.0)
        gain = (rewards - OFFSETS[prompt])[known]
        reached = gain.mean().item() if len(gain) else None
        row = {"objective": objective, "step": iteration, "loss": sum(losses) / len(losses), "reward": reached}
        log({**row, "missing": int(lost.sum())})
        if reached is not None and reached >= config.stop_at:
            break
    return policy.requires_grad_(False)


def _matching(
    objective: Objective,
    policy: FlowNet,
    old: FlowNet,
    base: FlowNet,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    prompt: Tensor,
    advantage: Tensor,
    known: Tensor,
    config: Toy2d,
) -> Tensor:
    """``[b]``: the loss of an objective without likelihoods, with its penalty."""
    noisy, target = interpolate(clean, noise, t), velocity_target(clean, noise)
    velocity = policy(noisy, t, prompt)
    with torch.no_grad():
        before, reference = old(noisy, t, prompt), base(noisy, t, prompt)
    penalty = config.penalty * velocity_gap(velocity, reference, mask=known)
    if objective == "ram":
        goal = ram_target(velocity, reference, target, 2 * advantage, mask=known)
        return velocity_gap(velocity, goal, mask=known)  # anchored at the base by itself
    if objective == "awm":
        ratio = matching_log_ratio(velocity, before, target, mask=known)
        return clipped_surrogate(ratio, advantage, 0.2, 0.2, mask=known) + penalty
    r = optimality(advantage, 3.0, mask=known)
    if objective == "nft":
        return nft_loss(velocity, before, target, r, mask=known) + penalty
    scaled = nft_loss(velocity, before, target, r, weight="self_normalised", t=t, mask=known)
    return scaled + penalty


def _groups(config: Toy2d, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompt and group of every point of a rollout, in mixed order."""
    group = torch.arange(config.groups).repeat_interleave(config.group_size)
    group = group[torch.randperm(len(group), generator=generator)]
    return group % 2, group


def run(config: Toy2d) -> dict[str, Any]:
    """Train the base and every arm for each seed, score and draw them; returns what ``summary.json`` holds."""
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.jsonl").unlink(missing_ok=True)
    started = time.perf_counter()
    scores: list[dict[str, list[dict[str, float]]]] = []
    rollouts: dict[str, list[int]] = {objective: [] for objective in config.objectives}
    with progress(config.num_seeds * len(config.objectives), description="objectives") as bar:
        for seed in range(config.seed, config.seed + config.num_seeds):
            one = replace(config, seed=seed)
            base = train_base(one)
            generator = torch.Generator().manual_seed(seed + 3)
            points = {
                "data": [draw_data(torch.full((config.eval_points,), p), generator) for p in (0, 1)],
                "tilt": [draw_tilt(p, config.stop_at, config.eval_points, generator) for p in (0, 1)],
                "base": [paint(base, p, config.eval_points, seed) for p in (0, 1)],
            }
            for objective in config.objectives:
                rows: list[dict[str, Any]] = []
                net = train_arm(base, objective, one, rows.append)
                for row in rows:
                    append_jsonl(config.out / "metrics.jsonl", {"seed": seed, **row})
                rollouts[objective].append(len(rows))
                points[objective] = [paint(net, p, config.eval_points, seed) for p in (0, 1)]
                bar.update()
            scores.append({name: [score(both[p], p) for p in (0, 1)] for name, both in points.items()})
            if seed == config.seed:
                draw(points, scores[0], config.out / "densities.png")
    summary = {
        "question": "At the same linear reward, which objective stays on the data and near the exact tilt?",
        "config": config_dict(config),
        "config_hash": config_hash(config),
        **provenance(),
        "scores": scores,
        "arms": {name: _interval([each[name] for each in scores]) for name in scores[0]},
        "rollouts": rollouts,
        "points_of_a_rollout": config.groups * config.group_size,
        "seconds": time.perf_counter() - started,
    }
    write_json(config.out / "summary.json", summary)
    return summary


def _interval(runs: list[list[dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Mean of both prompts, and half the 95 % interval of Student's t over seeds; none for one seed."""
    factor = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(runs))
    cells = {}
    for key in runs[0][0]:
        values = torch.tensor([sum(prompt[key] for prompt in both) / 2 for both in runs], dtype=torch.float64)
        half = factor * (values.std() / len(runs) ** 0.5).item() if factor else None
        cells[key] = {"mean": values.mean().item(), "half_interval": half}
    return cells


def main(config: Toy2d) -> None:
    """Run, and print the scores: a line for each arm, means over prompts and seeds."""
    summary = run(config)
    for name, cells in summary["arms"].items():
        values = "  ".join(
            f"{key} {cell['mean']:.3f}" + (f" +- {cell['half_interval']:.3f}" if cell["half_interval"] else "")
            for key, cell in cells.items()
        )
        print(f"{name:20s} {values}  rollouts {summary['rollouts'].get(name, '')}")
    print(f"{summary['seconds']:.0f} s; {config.out / 'densities.png'}")


if __name__ == "__main__":
    choices = {preset.__name__: (str(preset.__doc__), preset()) for preset in (mini, three_seeds, quick)}
    main(tyro.extras.overridable_config_cli(choices, prog="python -m experiments.toy2d"))
