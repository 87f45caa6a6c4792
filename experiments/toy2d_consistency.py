"""Few-step students of a flow model where everything can be seen: every consistency objective, in two dimensions.

    python -m experiments.toy2d_consistency mini --out runs/toy2d_consistency
    python -m experiments.toy2d_consistency three_seeds                          intervals

The teacher is the base of ``experiments.toy2d``: flow matching on a ring and a grid of Gaussians. Each student starts
from its weights and gets equally many batches of equally many points: discrete distillation (Euler and Heun teacher),
continuous consistency on the straight path, sCM and rCM in TrigFlow, MeanFlow along the teacher, and improved MeanFlow,
which has no teacher. MeanFlow's second time enters through a layer that starts at zero, so that its student, too, starts
as the teacher. Scored: the distance to the end of the teacher's own ODE from the same noise (of a map; students that
draw fresh noise have one at a single step only), and the share of points on the data.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from experiments.runs import config_dict, config_hash, progress, provenance, write_json
from experiments.toy2d import Toy2d, train_base
from experiments.toy2d_world import FlowNet, draw_data, score
from lensmini.averaging import lerp_parameters_
from lensmini.objectives import (
    adaptive_weight,
    consistency_loss,
    consistency_target,
    directional_derivative,
    mean_velocity_loss,
    mean_velocity_target,
    normalise_tangent,
    rf_to_trig,
    sample_time_pairs,
    tangent_warmup,
    teacher_step,
    trig_prediction,
    trigflow_direction,
    trigflow_tangent,
    velocity_gap,
)
from lensmini.paths import clean_prediction, interpolate, velocity_target
from lensmini.sampling import few_step_sample, sample_ode, time_grid

__all__ = ["ARMS", "SpanNet", "ToyConsistency", "main", "mini", "quick", "run", "three_seeds", "train_student"]

Arm = Literal["discrete_euler", "discrete_heun", "continuous", "scm", "rcm", "meanflow", "improved_meanflow"]
ARMS: tuple[Arm, ...] = ("discrete_euler", "discrete_heun", "continuous", "scm", "rcm", "meanflow", "improved_meanflow")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConsistency:
    """A teacher, and students from it."""

    out: Path = Path("runs/toy2d_consistency")
    """Where numbers go."""
    seed: int = 0
    """Of weights, data and noise: the first one."""
    num_seeds: int = 1
    """Runs, from that seed on."""
    arms: tuple[Arm, ...] = ARMS
    """Students."""
    base_steps: int = 1500
    """Steps of flow matching."""
    width: int = 64
    """Of the network's hidden layers."""
    steps: int = 300
    """Steps of a student."""
    batch_size: int = 256
    """Points of a step."""
    lr: float = 1e-3
    """Of Adam, falling to zero along a cosine."""
    grid_steps: int = 32
    """Steps of the discrete teacher."""
    warmup_steps: int = 75
    """Student steps until a derivative counts in full."""
    eval_points: int = 2000
    """Points of a prompt that are scored."""

    def __post_init__(self) -> None:
        if min(self.base_steps, self.steps, self.batch_size, self.grid_steps, self.num_seeds) < 1 or self.lr <= 0:
            raise ValueError("base_steps, steps, batch_size, grid_steps, num_seeds, lr: expected positive numbers")


def mini() -> ToyConsistency:
    """All students, one seed."""
    return ToyConsistency()


def three_seeds() -> ToyConsistency:
    """Three runs, and intervals."""
    return ToyConsistency(num_seeds=3)


def quick() -> ToyConsistency:
    """A few seconds, for a look at the machinery."""
    return ToyConsistency(base_steps=150, width=32, steps=20, eval_points=200, warmup_steps=5)


class SpanNet(nn.Module):
    """A velocity network with a second time: the span ``t - r``, through a layer that starts at zero.

    Example:
        >>> net = FlowNet(8)
        >>> x, t, prompt = torch.ones(3, 2), torch.ones(3), torch.tensor([0, 1, 1])
        >>> bool(SpanNet(net)(x, t, t / 2, prompt).equal(net(x, t, prompt)))
        True
    """

    def __init__(self, net: FlowNet) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        first = self.net.layers[0]
        assert isinstance(first, nn.Linear)
        self.span = nn.Linear(8, first.out_features, bias=False)
        nn.init.zeros_(self.span.weight)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, prompt: Tensor) -> Tensor:
        """``[b, 2]``, ``[b]``, ``[b]`` and ``[b]`` to ``[b, 2]``."""
        angles = t[:, None] * torch.pi * 2.0 ** torch.arange(-1, 3, device=x.device)
        spans = (t - r)[:, None] * torch.pi * 2.0 ** torch.arange(-1, 3, device=x.device)
        one_hot = nn.functional.one_hot(prompt, 2).to(x.dtype)
        inner = self.net.layers[0](torch.cat([x, angles.sin(), angles.cos(), one_hot], 1))
        inner = inner + self.span(torch.cat([spans.sin(), 1 - spans.cos()], 1))
        return self.net.layers[1:](inner)


Velocity = Callable[[Tensor, Tensor], Tensor]


def train_student(teacher: FlowNet, arm: Arm, config: ToyConsistency) -> FlowNet | SpanNet:
    """One student; its moving average."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    student = SpanNet(teacher) if arm.endswith("meanflow") else copy.deepcopy(teacher)
    student.requires_grad_(True)
    average = copy.deepcopy(student).requires_grad_(False)
    optimiser = torch.optim.Adam(student.parameters(), lr=config.lr, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    for step in range(config.steps):
        prompt = torch.randint(2, (config.batch_size,), generator=generator)
        clean = draw_data(prompt, generator)
        noise = torch.randn(clean.shape, generator=generator)
        warmup = tangent_warmup(step, config.warmup_steps)
        optimiser.zero_grad()
        _loss(arm, student, teacher, average, clean, noise, prompt, warmup, generator, config).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        decay.step()
        lerp_parameters_(average, student, 0.02)
    return average


def _loss(
    arm: Arm,
    student: FlowNet | SpanNet,
    teacher: FlowNet,
    average: FlowNet | SpanNet,
    clean: Tensor,
    noise: Tensor,
    prompt: Tensor,
    warmup: float,
    generator: torch.Generator,
    config: ToyConsistency,
) -> Tensor:
    """``[b]``: the loss of one batch."""
    num = len(clean)
    t = torch.rand(num, generator=generator)
    if isinstance(student, SpanNet):
        # As published, three quarters of the points learn the velocity itself, r = t.
        share = torch.rand(num, generator=generator)
        r = torch.where(torch.rand(num, generator=generator) < 0.25, t * share, t)
        noisy, flow = interpolate(clean, noise, t), velocity_target(clean, noise)
        if arm == "meanflow":
            with torch.no_grad():
                along = flow = teacher(noisy, t, prompt)
        else:
            with torch.no_grad():
                along = student(noisy, t, t, prompt)
        primals, tangents = (noisy, t, r), (along, torch.ones_like(t), torch.zeros_like(r))
        value, slope = directional_derivative(lambda x, t, r: student(x, t, r, prompt), primals, tangents)
        loss = mean_velocity_loss(value, slope, flow, t, r)
        return adaptive_weight(loss, p=0.5) * loss

    def own(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, prompt)

    def guide_(x: Tensor, t: Tensor) -> Tensor:
        return teacher(x, t, prompt)

    if arm.startswith("discrete"):
        t, t_next = sample_time_pairs(num, time_grid(config.grid_steps), generator=generator)
        noisy = interpolate(clean, noise, t)
        there = teacher_step(guide_, noisy, t, t_next, solver="heun" if arm == "discrete_heun" else "euler")
        target = consistency_target(lambda x, t: average(x, t, prompt), there, t_next)
        return consistency_loss(clean_prediction(noisy, own(noisy, t), t), target, c=0.03)
    noisy = interpolate(clean, noise, t)
    with torch.no_grad():
        flow = guide_(noisy, t)
    if arm == "continuous":
        value, slope = directional_derivative(own, (noisy, t), (flow, torch.ones_like(t)))
        tangent = mean_velocity_target(flow, warmup * slope, t, torch.zeros_like(t)) - value.detach()
    else:
        state, goal, angle = rf_to_trig(noisy, flow, t)
        primals, tangents = (state, angle), trigflow_direction(goal, angle)
        value, slope = directional_derivative(lambda x, a: trig_prediction(own, x, a), primals, tangents)
        tangent = trigflow_tangent(
            value, goal, state, slope, angle, warmup=warmup, variant="scm" if arm == "scm" else "rcm"
        )
    bounded = normalise_tangent(tangent, reduction="l2" if arm == "rcm" else "rms")
    return velocity_gap(value, value.detach() + bounded)


@torch.no_grad()
def sample(net: FlowNet | SpanNet, prompt: Tensor, noise: Tensor, num_steps: int, generator: torch.Generator) -> Tensor:
    """Points of a student in that many evaluations, each in its own way."""
    times = time_grid(num_steps)
    if isinstance(net, SpanNet):
        x = noise
        for t, r in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            here, there = torch.full((len(x),), t), torch.full((len(x),), r)
            x = x - (t - r) * net(x, here, there, prompt)
        return x
    fresh = [torch.randn(noise.shape, generator=generator) for _ in range(num_steps - 1)]
    return few_step_sample(lambda x, t: net(x, t, prompt), noise, times, fresh)


@torch.no_grad()
def measure(teacher: FlowNet, students: dict[str, FlowNet | SpanNet], config: ToyConsistency) -> dict[str, Any]:
    """For each student and number of steps: distance to the teacher's map where there is one, and points on the data."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    prompt = torch.arange(2).repeat_interleave(config.eval_points)
    noise = torch.randn(len(prompt), 2, generator=generator)
    goal = sample_ode(lambda x, t: teacher(x, t, prompt), noise, time_grid(64), step="heun")
    rows: dict[str, Any] = {}

    def add(name: str, steps: int, points: Tensor, is_map: bool) -> None:
        halves = points.chunk(2)
        found = [score(half, p)["on_support"] for p, half in enumerate(halves)]
        rows.setdefault(name, {})[str(steps)] = {
            "distance": (points - goal).square().sum(1).mean().sqrt().item() if is_map else None,
            "on_support": sum(found) / 2,
        }

    for steps in (1, 2, 4, 64):
        solver = "heun" if steps == 64 else "euler"
        add(
            "teacher", steps, sample_ode(lambda x, t: teacher(x, t, prompt), noise, time_grid(steps), step=solver), True
        )
    for name, net in students.items():
        for steps in (1, 2, 4):
            points = sample(net, prompt, noise, steps, generator)
            add(name, steps, points, steps == 1 or isinstance(net, SpanNet))
    return rows


def run(config: ToyConsistency) -> dict[str, Any]:
    """Teacher and students for each seed; returns what ``summary.json`` holds."""
    config.out.mkdir(parents=True, exist_ok=True)
    started, seeds = time.process_time(), []
    with progress(config.num_seeds * len(config.arms), description="students") as bar:
        for seed in range(config.seed, config.seed + config.num_seeds):
            one = replace(config, seed=seed)
            teacher = train_base(Toy2d(seed=seed, base_steps=one.base_steps, width=one.width))
            students: dict[str, FlowNet | SpanNet] = {}
            for arm in one.arms:
                students[arm] = train_student(teacher, arm, one)
                bar.update()
            seeds.append(measure(teacher, students, one))
    summary = {
        "question": "Which consistency objective carries the teacher's map over into how few steps?",
        "config": config_dict(config),
        "config_hash": config_hash(config),
        **provenance(),
        "metric": "distance: RMS to the end of the teacher's ODE (64 Heun steps) from the same noise, where it is a map; "
        "on_support: share of points within 3.5 std of a component",
        "seeds": seeds,
        "cpu_seconds": time.process_time() - started,
    }
    write_json(config.out / "summary.json", summary)
    return summary


def main(config: ToyConsistency) -> None:
    """Run, and print a line for each student: means over seeds."""
    summary = run(config)
    for name in summary["seeds"][0]:
        cells = []
        for steps in summary["seeds"][0][name]:
            rows = [seed[name][steps] for seed in summary["seeds"]]
            on_data = sum(row["on_support"] for row in rows) / len(rows)
            known = [row["distance"] for row in rows if row["distance"] is not None]
            distance = f"{sum(known) / len(known):.3f}" if known else "  -  "
            cells.append(f"{steps:>2} steps: {distance}, {on_data:.0%} on the data")
        print(f"{name:18s} {'   '.join(cells)}")
    print(f"{summary['cpu_seconds']:.0f} CPU-seconds; {config.out / 'summary.json'}")


if __name__ == "__main__":
    choices = {preset.__name__: (str(preset.__doc__), preset()) for preset in (mini, three_seeds, quick)}
    main(tyro.extras.overridable_config_cli(choices, prog="python -m experiments.toy2d_consistency"))
