"""Training of a tiny model over mixed resolutions, alone or sharded: the same function of the number of steps.

``tests/test_sharded.py`` runs :func:`train` in one process and in several and compares what they leave.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.muon import Muon
from lensmini.averaging import lerp_parameters_
from lensmini.nn import LensConfig, LensTransformer
from lensmini.nn.initialise import initial_value
from lensmini.objectives import flow_matching_loss
from lensmini.packed import Layout
from lensmini.parallel import (
    Checkpointer,
    Group,
    clip_gradients,
    fill_parameters,
    full_tensor,
    last_microbatch,
    load_tensors,
    make_mesh,
    parameter_copies,
    replicate_model,
    shard_model,
)
from lensmini.paths import interpolate, velocity_target

CONFIG = LensConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
    in_channels=16,
    out_channels=4,
    enc_hidden_dim=8,
    selected_layer_index=(1, 3),
)
NUM_SLOTS = 12
GRIDS = ((2, 2), (1, 4), (3, 2), (4, 4))


def value_of(name: str, shape: Sequence[int]) -> Tensor:
    """Initial weights with nothing at zero, so that every parameter has a gradient worth comparing."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return initial_value(name, torch.Size(shape), seed=0, gate=0.1).double() + 0.02 * noise


def batch_of(step: int, slot: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Layout]:
    """One slot: one to three images of mixed sizes, some without text."""
    generator = torch.Generator().manual_seed(1000 * step + slot)
    count = 1 + (slot + step) % 3
    grids = [GRIDS[(slot + step + i) % len(GRIDS)] for i in range(count)]
    lengths = [(slot + 2 * i) % 4 for i in range(count)]
    layout = Layout.build(grids, text_lengths=lengths)
    shapes = [(layout.num_image_tokens, 16), (layout.num_image_tokens, 16), (sum(lengths), 2, 8), (count,)]
    clean, noise, text, t = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return clean.to(dtype), noise.to(dtype), text.to(dtype), t.sigmoid().float(), layout


def backward(compute: Any, step: int, slots: Sequence[int], dtype: torch.dtype, model: nn.Module) -> Tensor:
    """Accumulate the gradient of the global mean over some slots; returns these slots' part of the loss."""
    images = sum(1 + (slot + step) % 3 for slot in range(NUM_SLOTS))
    total = torch.zeros((), dtype=torch.float64)
    for number, slot in enumerate(slots):
        last_microbatch(model, number == len(slots) - 1)
        clean, noise, text, t, layout = batch_of(step, slot, dtype)
        velocity = compute(interpolate(clean, noise, t, layout=layout), t, text, layout)
        loss = flow_matching_loss(velocity, velocity_target(clean, noise), layout=layout).sum() / images
        loss.backward()
        total += loss.detach().double()
    return total


def make(kind: str, group: Group, dtype: torch.dtype, shard: int | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """(model that holds the weights, callable that computes, module that takes part in accumulation)."""
    with torch.device("meta"):
        model = LensTransformer(CONFIG).to(dtype)
    if kind == "sharded":
        mesh = make_mesh(group.world_size, shard=shard, device="cpu")
        shard_model(model, model.transformer_blocks, mesh, methods=("forward_packed",), **options)
    fill_parameters(model, value_of)
    if kind == "replicated":
        copies = replicate_model(model, method="forward_packed", unused=model.unused_parameters())
        return model, copies, copies
    return model, model.forward_packed, model


def make_optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    parameters = dict(model.named_parameters())
    if name == "sgd":
        return [torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)]
    if name == "adamw":
        return [torch.optim.AdamW(parameters.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, foreach=True)]
    hidden = {n: p for n, p in parameters.items() if n.endswith(("qkv.weight", "w1.weight", "w2.weight"))}
    rest = [p for n, p in parameters.items() if n not in hidden]
    return [torch.optim.AdamW(rest, lr=1e-2, foreach=True), Muon(hidden, lr=0.05, splits={"qkv.weight": 3})]


def tensors_of(model: nn.Module, optimizers: Sequence[Any], ema: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optim.{names[parameter]}.{key}": value for key, value in state.items()}
    return tensors


def train(
    group: Group,
    kind: str,
    optimizer: str,
    dtype: torch.dtype,
    *,
    steps: tuple[int, int] = (0, 5),
    shard: int | None = None,
    load: Path | None = None,
    save: Path | None = None,
    background: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Train from step to step; returns whole tensors: first gradients, norms, losses, weights and their average."""
    model, compute, module = make(kind, group, dtype, shard, **options)
    ema, optimizers = parameter_copies(model, dtype=dtype), make_optimizers(model, optimizer)
    slots = range(group.rank, NUM_SLOTS, group.world_size)
    found: dict[str, Any] = {"grads": {}, "norms": [], "losses": []}
    for step in range(*steps):
        if load is not None and step == steps[0]:
            # One step makes the optimisers' state; then everything is overwritten.
            backward(compute, step, slots, dtype, module)
            for one in optimizers:
                one.step()
            tensors = tensors_of(model, optimizers, ema)
            for tensor in tensors.values():
                tensor.fill_(float("nan"))
            load_tensors(load, tensors)
        model.zero_grad()
        loss = group.sum_(backward(compute, step, slots, dtype, module))
        if step == 0:
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found["grads"] = {name: full_tensor(grad).clone() for name, grad in grads.items()}
        found["norms"].append(clip_gradients(model.parameters(), 0.1))
        found["losses"].append(loss.item())
        for one in optimizers:
            one.step()
        lerp_parameters_(ema, dict(model.named_parameters()), 0.2)
    tensors = tensors_of(model, optimizers, ema)
    if save is not None:
        saver = Checkpointer(save, group, background=background)
        saver.save(steps[1], tensors, {"world_size": group.world_size})
        # Training goes on at once: what was saved must not change with it.
        backward(compute, 0, slots, dtype, module)
        for one in optimizers:
            one.step()
        saver.wait()
    else:
        found["weights"] = {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}
        found["ema"] = {name: full_tensor(tensor).clone() for name, tensor in ema.items()}
    return found


def worker(group: Group, folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Run several trainings in one job and leave the first rank's results in ``folder/name.pt``."""
    torch.set_num_threads(1)
    for name, job in jobs.items():
        found = train(group, **job)
        if group.rank == 0:
            torch.save(found, folder / f"{name}.pt")
