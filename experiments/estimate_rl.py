"""The price of an RL run: pictures, questions to the judge, FLOPs, GPU-hours, seconds of a step.

Counted from the shapes of the run; what is assumed is a named field. A picture costs its sampling, its decoding, and for
each time at which it is trained on a forward of the sampling policy, one of the reference, and a forward and a backward.
"""

from dataclasses import dataclass, field
from typing import Any

from experiments import estimate_rows as counts
from experiments.estimate_rows import EstimateConfig, RentConfig, StageConfig, TrainConfig
from experiments.reinforce_config import ReinforceConfig, lens
from lensmini.cost import forward_flops, parameter_count
from lensmini.nn import LensConfig

__all__ = ["DECODE_TFLOPS", "RlEstimateConfig", "lens_rl", "main", "rl_costs", "rl_table"]

DECODE_TFLOPS = 10.47
"""FLUX.2's autoencoder, decoding one picture of 1024^2: counted once with torch's counter on the meta device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RlEstimateConfig:
    """An RL run on rented machines."""

    rl: ReinforceConfig = field(default_factory=lens)
    """The run."""
    model: LensConfig = field(default_factory=LensConfig)
    """The transformer."""
    cluster: RentConfig = field(default_factory=lambda: RentConfig(gpus=64))
    """The machines; the paper: 64 A100."""
    criteria: int = 11
    """Of a rubric: ten and the global one, at most."""
    text_tokens: int = 150
    """Of a prompt; an assumption."""
    downsample: int = 16
    """Pixels per side of a latent position."""
    judge_seconds: float = 2.0
    """Of one call; an assumption: measure yours."""
    judge_calls_in_flight: int = 256
    """At once."""
    judge_tokens: int = 1100
    """Of one call, the picture's included; an assumption."""


def lens_rl() -> RlEstimateConfig:
    """The paper's RL stage: 180 steps of 48 groups of 24 pictures, 11 questions each, LoRA, 64 A100."""
    return RlEstimateConfig()


def rl_costs(config: RlEstimateConfig) -> dict[str, float]:
    """Counts of a step and of the run.

    Args:
        config: run, model and machines.

    Returns:
        ``pictures``, ``questions``, ``calls`` of a step; TFLOP of a picture by kind; ``step_flops``, ``run_flops``;
        ``gpu_seconds`` and ``judge_seconds`` of a step, ``step_seconds`` if both are overlapped as far as sampling goes,
        ``gpu_hours``, ``run_pictures``, ``run_calls``, ``run_tokens`` of the judge.

    Example:
        >>> costs = rl_costs(lens_rl())
        >>> costs["pictures"], costs["questions"], costs["run_calls"]
        (1152, 12672, 2280960)
    """
    rl, model, rent = config.rl, config.model, config.cluster
    rollout, objective, rank = rl.rollout, rl.objective, rl.adapter.rank
    stage = StageConfig(images_per_gpu=(rollout.chunk,))
    train = TrainConfig(sharding="ddp", lora_rank=rank, text_tokens=config.text_tokens)
    priced = EstimateConfig(stages=(stage,), model=model, train=train, cluster=rent)
    tokens = [h * w // config.downsample**2 for h, w in rollout.canvases]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    adapters = [counts.adapter_flops(model, n, config.text_tokens, rank) for n in tokens]
    plain = mean([float(forward_flops(model, n, config.text_tokens)) for n in tokens])
    with_adapter = plain + mean([float(flops) for flops in adapters])
    trained = mean([counts.image_flops(priced, n, rl.engine.recompute) for n in tokens])
    if objective.name == "grpo":
        times, helpers = float(objective.window), plain if objective.kl else 0.0
    else:
        times = float(objective.updates * (objective.times or rollout.num_steps))
        helpers = with_adapter + (plain if objective.kl else 0.0)
    scenes = rl.prompts.source == "scenes"
    pixels = mean([float(h * w) for h, w in rollout.canvases])
    flops = {
        "sampling": rollout.num_steps * with_adapter,
        "decoding": 0.0 if scenes else 1e12 * DECODE_TFLOPS * pixels / 1024**2,
        "old policy and reference": times * helpers,
        "forward and backward": times * trained,
    }
    pictures = rollout.groups * rollout.group_size
    calls = pictures * (config.criteria if rl.reward.calls == "criterion" else 1)
    peak = 1e12 * rent.cluster().peak_tflops * rent.mfu * rent.gpus
    step_flops = pictures * sum(flops.values())
    sampling = pictures * (flops["sampling"] + flops["decoding"]) / peak
    judging = 0.0 if scenes else calls * config.judge_seconds / config.judge_calls_in_flight
    updating = step_flops / peak - sampling
    steps = rl.run.steps
    seconds = (max(sampling, judging) if rl.reward.overlap else sampling + judging) + updating
    return {
        "parameters": parameter_count(model),
        "trained": counts.adapter_parameters(model, rank) or parameter_count(model),
        "pictures": pictures,
        "questions": pictures * config.criteria,
        "calls": calls,
        **{f"TFLOP of a picture, {name}": value / 1e12 for name, value in flops.items()},
        "step_flops": step_flops,
        "run_flops": steps * step_flops,
        "gpu_seconds": sampling + updating,
        "judge_seconds": judging,
        "step_seconds": seconds,
        "gpu_hours": steps * seconds * rent.gpus / 3600,
        "days": steps * seconds / 86_400,
        "run_pictures": steps * pictures,
        "run_calls": steps * calls,
        "run_tokens": steps * calls * config.judge_tokens,
    }


def rl_table(config: RlEstimateConfig) -> str:
    """The costs in words."""
    costs, rl, rent = rl_costs(config), config.rl, config.cluster
    adapter = f", LoRA of rank {rl.adapter.rank}" if rl.adapter.rank else ""
    kinds = [name for name in costs if name.startswith("TFLOP")]
    rows: list[tuple[str, str]] = [
        ("parameters", f"{costs['parameters']:,.0f}, trained {costs['trained']:,.0f}{adapter}"),
        ("pictures", f"{costs['pictures']:,.0f} a step, {costs['run_pictures']:,.0f} in {rl.run.steps} steps"),
        ("questions", f"{costs['questions']:,.0f} a step (at most; {config.criteria} a picture)"),
    ]
    if rl.prompts.source == "file":
        tokens = f"{costs['run_tokens']:.2e} tokens at {config.judge_tokens} (ASSUMED)"
        rows.append(("judge calls", f"{costs['calls']:,.0f} a step, {costs['run_calls']:,.0f} in all; {tokens}"))
    rows += [(name, f"{costs[name]:,.2f}") for name in kinds]
    rows += [("FLOPs", f"{costs['step_flops']:.3e} a step, {costs['run_flops']:.3e} in all")]
    if rl.prompts.source == "file":
        rows += [
            (
                "seconds of a step",
                f"{costs['step_seconds']:,.0f}: GPUs {costs['gpu_seconds']:,.0f}, judge {costs['judge_seconds']:,.0f} "
                f"({config.judge_seconds:g} s a call, {config.judge_calls_in_flight} at once: ASSUMED)",
            ),
            (
                "GPU-hours",
                f"{costs['gpu_hours']:,.0f} on {rent.gpus} {rent.gpu} at {rent.mfu:.0%} of "
                f"{rent.cluster().peak_tflops:g} TFLOP/s (ASSUMED), {costs['days']:.2f} days; judge's machines not counted",
            ),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def main(config: RlEstimateConfig) -> dict[str, Any]:
    """Count and print."""
    print(rl_table(config))
    return dict(rl_costs(config))
