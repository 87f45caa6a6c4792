"""Ranks as a grid (replicate, shard), and parameters that live on it.

Axes: parameters have any shape; DTensors here are split along their first axis or not at all.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["fill_parameters", "full_tensor", "make_mesh", "parameter_copies"]


def make_mesh(world_size: int, *, shard: int | None = None, device: str | None = None) -> DeviceMesh:
    """A mesh ``(replicate, shard)`` of all ranks: parameters are split over ``shard`` ranks and copied over the rest.

    Hybrid sharding (HSDP) splits inside a node, where links are fast, and only sums gradients across nodes. ``shard ==
    world_size`` is plain FSDP, ``shard == 1`` keeps everything on every rank.

    Args:
        world_size: ranks of the job; ``torch.distributed`` must be running with as many.
        shard: ranks that share one copy; by default the ranks of this node (torchrun's ``LOCAL_WORLD_SIZE``), or all.
        device: "cuda" or "cpu"; by default "cuda" where there is one.

    Returns:
        The mesh; neighbouring ranks share a copy.

    Raises:
        ValueError: if ``shard`` does not divide ``world_size``, or the job has another size or is not running.

    Example:
        >>> make_mesh(4, shard=3)
        Traceback (most recent call last):
        ValueError: shard: expected a divisor of world_size = 4, got 3
    """
    if shard is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        shard = local if world_size % local == 0 else world_size
    if shard < 1 or world_size % shard:
        raise ValueError(f"shard: expected a divisor of world_size = {world_size}, got {shard}")
    running = dist.get_world_size() if dist.is_initialized() else 0
    if running != world_size:
        raise ValueError(f"world_size: expected that of the running job, {running or 'none runs'}, got {world_size}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return init_device_mesh(device, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def fill_parameters(
    model: nn.Module, value_of: Callable[[str, torch.Size], Tensor], *, device: torch.device | str | None = None
) -> nn.Module:
    """Give every parameter its value, wherever it lives: each rank keeps its part, and nothing is sent.

    For a model that was sharded on the meta device. ``value_of`` must return the same on every rank; whole parameters
    exist one at a time. Buffers are allocated but not filled: a model whose buffers hold values must set them itself.

    Args:
        model: sharded or not, on any device or on meta.
        value_of: from name and shape to the whole value, on any device and in any dtype: an initialisation that is a
            function of the name, or a checkpoint's reader.
        device: where meta parameters go; by default the mesh's device, else the CPU.

    Returns:
        The model itself.

    Raises:
        ValueError: if a value has another shape.

    Example:
        >>> with torch.device("meta"):
        ...     layer = nn.Linear(2, 1)
        >>> fill_parameters(layer, lambda name, shape: torch.ones(shape)).weight.tolist()
        [[1.0, 1.0]]
    """
    parameters = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in parameters.values()):
        meshes = [p.device_mesh.device_type for p in parameters.values() if isinstance(p, DTensor)]
        model.to_empty(device=torch.device(device or (meshes[0] if meshes else "cpu")))
        parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        value = value_of(name, parameter.shape)
        if value.shape != parameter.shape:
            raise ValueError(f"{name}: expected shape {list(parameter.shape)}, got {list(value.shape)}")
        value = value.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            # No source rank: everyone cuts its own part from the same value.
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
    return model


@torch.no_grad()
def parameter_copies(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Copies of all parameters by name, sharded as they are: the start of an average for ``lerp_parameters_``.

    Args:
        model: sharded or not.
        dtype: of the copies; averages need float32.

    Returns:
        Tensors without gradient.

    Example:
        >>> model = nn.Linear(2, 1).bfloat16()
        >>> {name: copy.dtype for name, copy in parameter_copies(model).items()}
        {'weight': torch.float32, 'bias': torch.float32}
    """
    return {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank of its mesh has to ask.

    Example:
        >>> full_tensor(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
