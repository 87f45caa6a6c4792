"""One model over many ranks: FSDP2 on a (replicate, shard) mesh for any list of blocks, or DDP for small models."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lensmini.parallel.recompute import Recompute, recompute_blocks

__all__ = ["clip_gradients", "last_microbatch", "replicate_model", "shard_model", "state_bytes"]


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    recompute: Recompute = "none",
    compile: bool | Mapping[str, Any] = False,
    prefetch: int = 1,
    methods: Sequence[str] = (),
    reshard: bool = True,
) -> nn.Module:
    """Shard a model's parameters, gradients and optimiser state over the ranks of a mesh, in place (FSDP2).

    In this order: activation checkpointing and compilation per block, ``fully_shard`` per block and for the rest, prefetch.
    Weights stay in their own dtype (float32 masters); blocks compute in ``dtype`` and gradients are summed in float32.
    Inputs are NOT cast: times and rotary tables keep their float32. Gradients are SUMS over all ranks, never means: weigh
    the loss by the global batch (``loss_weights``), and it does not matter how samples were split over ranks.

    Args:
        model: built on the meta device (then :func:`fill_parameters`), or filled alike on every rank.
        blocks: submodules that are gathered, computed and freed as a whole, in the order in which they run.
        mesh: of :func:`make_mesh`.
        dtype: of the arithmetic, such as bfloat16; None is the parameters' own.
        recompute: of :func:`recompute_blocks`.
        compile: compile each block, one graph for all shapes; a mapping holds options of ``torch.compile``.
        prefetch: blocks whose parameters are gathered ahead, forward and backward; 0 leaves it to torch.
        methods: methods besides ``forward`` that run the model, such as ``"forward_packed"``.
        reshard: free each block's gathered parameters between forward and backward; False costs memory and saves a gather.

    Returns:
        The model itself.

    Raises:
        ValueError: if there is no block, a block is no part of the model or comes twice, a method is missing, or
            ``prefetch`` is negative.

    Example:
        Under ``torchrun``, with a diffusers transformer as well::

            mesh = make_mesh(group.world_size)
            shard_model(model, model.transformer_blocks, mesh, dtype=torch.bfloat16, recompute="full")

        >>> shard_model(nn.Linear(1, 1), [], mesh=None)
        Traceback (most recent call last):
        ValueError: blocks: expected different submodules of Linear, got 0 modules
    """
    listed = list(blocks)
    inside = {id(module) for module in model.modules()} - {id(model)}
    if not listed or any(id(block) not in inside for block in listed) or len(set(map(id, listed))) < len(listed):
        raise ValueError(f"blocks: expected different submodules of {type(model).__name__}, got {len(listed)} modules")
    missing = [name for name in methods if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(f"methods: expected methods of {type(model).__name__}, got {missing}")
    if prefetch < 0:
        raise ValueError(f"prefetch: expected at least 0, got {prefetch}")
    names = mesh.mesh_dim_names or ()
    if "replicate" in names and mesh["replicate"].size() == 1:
        # Nobody to sum with: plain FSDP, without an all-reduce of one rank per block.
        mesh = mesh["shard"]
    recompute_blocks(listed, recompute)
    if compile:
        given = dict(compile) if isinstance(compile, Mapping) else {}
        for block in listed:
            block.compile(**{"dynamic": True, "fullgraph": recompute == "none", **given})
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if dtype is None:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in listed:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The rest too: after a forward without backward its parameters would stay gathered, in the low precision.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for name in methods:
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Plain sums: gloo knows no scaled ones, and weights of the loss have divided already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for index, block in enumerate(listed if prefetch else ()):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch(listed[index + 1 : index + 1 + prefetch])  # pyright: ignore
        before = listed[max(0, index - prefetch) : index]
        block.set_modules_to_backward_prefetch(before[::-1])  # pyright: ignore
    return model


def last_microbatch(model: nn.Module, last: bool) -> None:
    """Say before a forward whether it is the last of a step: ranks then sum what has been accumulated.

    Under FSDP the ranks that share a copy reduce each micro-batch (no rank holds a whole gradient) and copies meet once;
    under DDP everything meets once. Any other model is left alone.

    Args:
        model: of :func:`shard_model` or :func:`replicate_model`.
        last: whether gradients are complete after this micro-batch.

    Example:
        >>> last_microbatch(nn.Linear(1, 1), False)
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_all_reduce(last)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``, sharded or not; parameters without one are left out.

    ``g *= min(1, max_norm / (|g| + 1e-6))``, one norm over everything (arXiv 1211.5063).

    Args:
        parameters: with gradients that are complete on every rank.
        max_norm: positive; infinity only measures.

    Returns:
        The norm before, float32 and without axes, the same on every rank. If it is not finite, nothing was scaled.

    Raises:
        ValueError: if ``max_norm`` is not positive.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], 1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, got {max_norm}")
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    places: dict[Any, list[Tensor]] = {}
    for grad in grads:
        key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else (None, grad.device)
        places.setdefault(key, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(same) for same in places.values()]
    whole = [(norm.full_tensor() if isinstance(norm, DTensor) else norm).float() for norm in norms]
    if not whole:
        return torch.zeros(())
    norm = (
        whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack([n.to(whole[0].device) for n in whole]))
    )
    if norm.isfinite():
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0).item()
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in grads], factor)  # pyright: ignore
    return norm


def state_bytes(num_parameters: int, *, average: bool = True) -> int:
    """Bytes of training state without sharding: float32 weights, gradients, two AdamW moments, and an average.

    Example:
        >>> state_bytes(4_104_225_152) / 1e9
        82.1
    """
    return num_parameters * (20 if average else 16)


def replicate_model(
    model: nn.Module,
    *,
    method: str = "forward",
    unused: Iterable[str] = (),
    memory_bytes: int | None = None,
    average: bool = True,
) -> DistributedDataParallel:
    """Keep a whole copy of a small model on every rank and sum gradients over all of them (DDP).

    Gradients are SUMS, as in :func:`shard_model`. Keep ``model`` itself for optimisers, averages and checkpoints, and call
    the result to compute.

    Args:
        model: filled alike on every rank, on its device.
        method: which of its methods the result's call runs, such as ``"forward_packed"``.
        unused: names of parameters that never get a gradient, such as those of ``LensTransformer.unused_parameters()``;
            they are frozen, since the reducer would wait for them for ever.
        memory_bytes: of one rank's device; refuses what cannot fit: 20 bytes a parameter before any activation.
        average: whether an average of the weights is kept as well (4 of the 20 bytes).

    Returns:
        The model for computing; see :func:`last_microbatch` for accumulation.

    Raises:
        ValueError: if the state does not fit, or names or the method are unknown.

    Example:
        >>> model = nn.Linear(1000, 1000)
        >>> replicate_model(model, memory_bytes=10**7)
        Traceback (most recent call last):
        ValueError: memory_bytes: expected at least 0.020 GB for 1,001,000 parameters ...
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    needed = state_bytes(count, average=average)
    if memory_bytes is not None and needed > memory_bytes:
        raise ValueError(
            f"memory_bytes: expected at least {needed / 1e9:.3f} GB for {count:,} parameters on every rank (4 bytes weight + 4 "
            f"gradient + 8 moments{' + 4 average' if average else ''}), before activations, got {memory_bytes / 1e9:.3f} GB: "
            "shard the model instead (shard_model)"
        )
    if not callable(getattr(model, method, None)):
        raise ValueError(f"method: expected a method of {type(model).__name__}, got {method!r}")
    names = dict(model.named_parameters())
    unknown = sorted(set(unused) - names.keys())
    if unknown:
        raise ValueError(f"unused: expected names of parameters, got {unknown[:4]}")
    for name in unused:
        names[name].requires_grad_(False)
    copies = DistributedDataParallel(_Method(model, method), gradient_as_bucket_view=True)
    copies.register_comm_hook(None, _sum_bucket)
    return copies


class _Method(nn.Module):
    """A module whose forward is a method of another one."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return getattr(self.model, self.method)(*arguments, **named)


def _sum_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
