"""Time and memory of one distillation step of all networks: student, fake score, frozen teacher and discriminator head.

``python -m benchmarks.distill_step`` (about a minute on a CPU core). On CUDA at the released width, in bfloat16 with float32
weights, and as deep as ``--depth`` says (12 of 48 blocks by default: by count 43 GB of weights, gradients, moments and
averages); on the CPU the same code with a narrow model in float32, which says nothing about a GPU and only that the parts
run.

The losses and updates are those of ``experiments.distill``, on four pictures of mixed sizes. ``ratio`` is the seconds of a
step (4 updates of fake score and head, 1 of the student) over those of a plain training step of one network on the same
pictures, scaled by the FLOPs of both: 1 means that simulation, features and directions cost what their products cost.
Goal: at most 1.3.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.timing import interleaved, report
from experiments.bank import Batch
from experiments.distill_config import DistillConfig, lens, mini
from experiments.distill_draws import draw
from experiments.distill_dry_run import step_flops
from experiments.distill_objectives import critic_losses, dmd_loss
from experiments.distill_state import DistillState
from experiments.engine import EngineConfig
from lensmini.cost import train_flops
from lensmini.nn import LensConfig, LensTransformer
from lensmini.objectives import flow_matching_loss
from lensmini.packed import Layout
from lensmini.parallel import Group, run_processes
from lensmini.paths import interpolate, velocity_target

GOAL = 1.3
SMALL = LensConfig(
    num_layers=4,
    num_attention_heads=4,
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=128,
    selected_layer_index=(0, 1, 2, 3),
)


def settings(depth: int) -> tuple[DistillConfig, LensConfig, list[tuple[int, int]], int]:
    """Config, model, latent grids and text length for the device at hand."""
    if torch.cuda.is_available():
        model, base = LensConfig(num_layers=depth), lens()
        blocks = tuple(depth * quarter // 4 for quarter in (1, 2, 3))
        engine = EngineConfig(sharding="full", recompute="full")
        return _with(base, engine, blocks), model, [(64, 64), (48, 84), (84, 48), (56, 72)], 150
    return _with(mini(), EngineConfig(), (1, 2)), SMALL, [(16, 16), (12, 20), (20, 12), (14, 18)], 40


def _with(config: DistillConfig, engine: EngineConfig, blocks: tuple[int, ...]) -> DistillConfig:
    run = replace(config.run, out=Path("unused"), steps=1000)
    return replace(config, engine=engine, adversary=replace(config.adversary, blocks=blocks), run=run)


def make_batch(model: LensConfig, grids: list[tuple[int, int]], text: int, device: torch.device) -> Batch:
    """Random pictures and texts."""
    layout, num = Layout.build(grids, text_lengths=[text] * len(grids)), len(grids)
    generator = torch.Generator().manual_seed(0)
    tokens, noise = (torch.randn(layout.num_image_tokens, model.in_channels, generator=generator) for _ in range(2))
    features = torch.randn(num * text, model.num_text_layers, model.enc_hidden_dim, generator=generator)
    return Batch(tokens, features, layout, noise, torch.randn(num, generator=generator), tuple(range(num))).to(device)


def measure(group: Group, depth: int, rounds: int) -> None:
    """Time critic and student updates and a plain training step in turns, and print the result."""
    torch.manual_seed(0)
    config, model_config, grids, text = settings(depth)
    device = config.engine.torch_device()
    dtype = getattr(torch, config.optim.dtype)
    source = LensTransformer(model_config).init_weights(0, gate=0.1)
    weights = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    teacher: Any = SimpleNamespace(model=source.to(device, dtype).requires_grad_(False), weights=weights)
    state = DistillState(config, teacher, group)
    assert state.fake is not None
    fake, batch = state.fake, make_batch(model_config, grids, text, device)
    draws = draw(batch, 0, 0, num_walk=0)._replace(update=0.5)

    def critic() -> None:
        fake.begin(last=True)
        critic_losses(state, batch, draws, config).total.mean().backward()
        fake.accumulate()
        fake.collect(group, [])
        state.update_critic()

    def student() -> None:
        state.student.begin(last=True)
        dmd_loss(state, batch, draws, config).total.mean().backward()
        state.student.accumulate()
        state.student.collect(group, [])
        state.update_student()

    def plain() -> None:
        state.student.begin(last=True)
        t = torch.full((len(grids),), 0.5, device=device)
        noisy = interpolate(batch.image_tokens, batch.noise, t, layout=batch.layout)
        velocity = state.student.compute.forward_packed(noisy, t, batch.text_tokens, batch.layout)
        target = velocity_target(batch.image_tokens, batch.noise)
        flow_matching_loss(velocity, target, layout=batch.layout).mean().backward()  # pyright: ignore[reportArgumentType]
        state.student.accumulate()
        state.student.collect(group, [])
        state.student.update(config.run.steps)

    seconds = interleaved({"critic": critic, "student": student, "plain": plain}, rounds=rounds, warmup=1)
    step = config.critic.updates * seconds["critic"] + seconds["student"]
    tokens = batch.layout.num_image_tokens // len(grids)
    flops = sum(step_flops(config, model_config, tokens, text).values()) / float(
        train_flops(model_config, tokens, text)
    )
    ratio = step / seconds["plain"] / flops
    on_gpu = device.type == "cuda"
    details: dict[str, object] = {
        "seconds": {name: round(value, 4) for name, value in {**seconds, "step": step}.items()},
        "flops_over_a_plain_step": round(flops, 2),
        "model": {"width": model_config.inner_dim, "blocks": model_config.num_layers, "dtype": config.optim.dtype},
        "image_tokens": list(batch.layout.image_lengths),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
        "gpu": on_gpu or "none here: a narrow model on the CPU, no figure for a GPU",
    }
    report("distill_step", ratio=ratio, goal=GOAL, better="lower", holds=ratio <= GOAL, details=details)


def main(depth: int = 12, rounds: int = 3) -> None:
    """Measure in a job of one process, which the sharded engine wants."""
    run_processes(measure, 1, depth, rounds, alone=torch.cuda.is_available())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12, help="blocks, with a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    main(**vars(parser.parse_args()))
