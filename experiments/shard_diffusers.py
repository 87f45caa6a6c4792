"""A diffusers transformer over many ranks: the part that shards and trains it is the body of :func:`train`.

    python -m experiments.shard_diffusers                                       one process
    torchrun --nproc-per-node 2 -m experiments.shard_diffusers                  two, with the same losses

Needs the extra ``lensmini[diffusers]``; the model is a tiny Flux with random weights, seconds on a CPU.
"""

from collections.abc import Callable
from typing import Any

import torch

from lensmini.parallel import (
    Group,
    clip_gradients,
    fill_parameters,
    last_microbatch,
    make_mesh,
    run_processes,
    shard_model,
)

__all__ = ["build", "main", "samples", "train"]

NUM_SAMPLES = 4


def build() -> Any:
    """A tiny Flux on the meta device."""
    from diffusers import FluxTransformer2DModel  # pyright: ignore[reportPrivateImportUsage]

    sizes: dict[str, Any] = {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
    }
    with torch.device("meta"):
        return FluxTransformer2DModel(
            in_channels=8, joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6), **sizes
        )


def value_of(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights from the name alone, the same on every rank."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5


def samples(number: int) -> dict[str, torch.Tensor]:
    """Inputs of one sample; its target is noise."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(2.0), indexing="ij"), -1)
    return {
        "hidden_states": torch.randn(1, 6, 8, generator=draw),
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=draw),
        "pooled_projections": torch.randn(1, 10, generator=draw),
        "timestep": torch.rand(1, generator=draw),
        "img_ids": ids.reshape(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def train(group: Group, steps: int, report: Callable[[int, float, Any], None]) -> None:
    """Shard a diffusers transformer and train it: everything that is not the model or the data."""
    model = build()
    mesh = make_mesh(group.world_size, shard=group.world_size)
    shard_model(model, [*model.transformer_blocks, *model.single_transformer_blocks], mesh, recompute="full")
    fill_parameters(model, value_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        mine, total = range(group.rank, NUM_SAMPLES, group.world_size), torch.zeros(())
        for number in mine:
            last_microbatch(model, number == mine[-1])
            velocity = model(**samples(step * NUM_SAMPLES + number), return_dict=False)[0]
            loss = (velocity - 1).square().mean() / NUM_SAMPLES
            loss.backward()
            total += loss.detach()
        report(step, group.sum_(total).item(), model)
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _say(group: Group) -> None:
    def report(step: int, loss: float, model: Any) -> None:
        if group.rank == 0:
            print(f"step {step}: loss {loss:.4f}")

    train(group, 3, report)


def main() -> None:
    """Three steps in this job."""
    run_processes(_say, 1, alone=True)


if __name__ == "__main__":
    main()
