"""Muon for many small matrices: orthogonalised momentum, batched over matrices of one shape.

The update of a matrix is its Nesterov momentum with all singular values pushed towards 1 by a quintic Newton-Schulz
iteration (Jordan et al., 2024, "Muon"), scaled by ``sqrt(max(1, rows / columns))``. ``torch.optim.Muon`` does the same one
matrix at a time; here fused projections are split into the matrices they stand for, and all matrices of one shape share a
batched product, which is what a small model on a CPU needs. Of matrices that are sharded over ranks (DTensors) each rank
gets some whole, so that none is worked on twice within a copy of the model.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from experiments.precision import fast_dtype
from lensmini.parallel import Group, map_matrices

__all__ = ["Muon", "orthogonalise"]

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, *, num_iterations: int = 5) -> Tensor:
    """Push the singular values of ``[n, rows, columns]`` towards 1, in bfloat16, or float32 on CPUs that lack it.

    Example:
        >>> s = torch.linalg.svdvals(orthogonalise(torch.randn(1, 8, 4)).float())
        >>> bool((s > 0.5).all() and (s < 1.5).all())
        True
    """
    tall = matrices.shape[1] > matrices.shape[2]
    dtype = torch.bfloat16 if matrices.is_cuda else getattr(torch, fast_dtype())
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for the hidden matrices of a network.

    Args:
        named_parameters: matrices ``[rows, columns]``, or stacks of them ``[n, rows, columns]``, by name.
        lr: learning rate.
        momentum: of the gradient's moving average.
        splits: how many equal matrices, stacked by rows, a matrix stands for, by suffix of its name.
        group: processes with equal gradients that share the work, each orthogonalising its part of the matrices; not for
            sharded parameters, which share it by themselves.

    Raises:
        ValueError: if a parameter is not a matrix or a stack, or its rows do not divide.
    """

    def __init__(
        self,
        named_parameters: Mapping[str, Tensor],
        *,
        lr: float = 1e-2,
        momentum: float = 0.95,
        splits: Mapping[str, int] | None = None,
        group: Group | None = None,
    ) -> None:
        self.group = Group(0, 1) if group is None else group
        self.num_parts = []
        for name, parameter in named_parameters.items():
            parts = next((n for suffix, n in (splits or {}).items() if name.endswith(suffix)), 1)
            stack = parameter.ndim == 3 and parts == 1
            if not stack and (parameter.ndim != 2 or parameter.shape[0] % parts):
                kind = f"a matrix of {parts} equal parts" if parts > 1 else "a matrix or a stack of matrices"
                raise ValueError(f"{name}: expected {kind}, got shape {list(parameter.shape)}")
            self.num_parts.append(parts)
        super().__init__(list(named_parameters.values()), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        """Update every parameter from its gradient."""
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        sharded: dict[tuple[torch.Size, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, parts in zip(group["params"], self.num_parts, strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            buffer = state.setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(buffer, momentum)
            if hasattr(parameter, "to_local"):
                sharded[parameter.shape, parts].append((parameter, update))
                continue
            stacks = (parameter, update) if parameter.ndim == 3 else (parameter.chunk(parts), update.chunk(parts))
            for target, matrix in zip(*stacks, strict=True):
                by_shape[matrix.shape[0], matrix.shape[1]].append((target, matrix))
        for (shape, parts), pairs in sharded.items():
            rate = lr * max(1.0, shape[0] / parts / shape[1]) ** 0.5
            results = map_matrices(partial(_orthogonalise_parts, parts=parts), [update for _, update in pairs])
            targets = [parameter.to_local() for parameter, _ in pairs]  # pyright: ignore
            torch._foreach_add_(targets, [result.to(targets[0].dtype) for result in results], alpha=-rate)  # pyright: ignore
        if not by_shape:
            return
        mine = (self.group.rank, self.group.world_size)
        updates = {}
        dtype = next(iter(by_shape.values()))[0][0].dtype
        flat = torch.zeros(sum(len(pairs) * rows * columns for (rows, columns), pairs in by_shape.items()), dtype=dtype)
        start = 0
        for (rows, columns), pairs in by_shape.items():
            updates[rows, columns] = flat[start : start + len(pairs) * rows * columns].view(len(pairs), rows, columns)
            start += len(pairs) * rows * columns
            if len(pairs) > mine[0]:
                stack = torch.stack([matrix for _, matrix in pairs[mine[0] :: mine[1]]])
                updates[rows, columns][mine[0] :: mine[1]] = orthogonalise(stack).to(dtype)
        self.group.sum_(flat)
        for (rows, columns), pairs in by_shape.items():
            rate = lr * max(1.0, rows / columns) ** 0.5
            targets = [target for target, _ in pairs]
            torch._foreach_add_(targets, list(updates[rows, columns]), alpha=-rate)  # pyright: ignore


def _orthogonalise_parts(matrices: Tensor, *, parts: int) -> Tensor:
    """Each of the equal parts, stacked by rows, of each matrix."""
    if not len(matrices):
        return matrices
    pieces = orthogonalise(matrices.reshape(-1, matrices.shape[1] // parts, matrices.shape[2]))
    return pieces.reshape(matrices.shape).to(matrices.dtype)
