"""Whole matrices out of sharded ones, for optimisers that need them: each rank works on its share of the matrices.

Axes: n matrices, r rows, c columns, s ranks that share a copy.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["map_matrices"]


def map_matrices(function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """Apply a function of whole matrices to matrices that are sharded by rows, each matrix on one rank.

    Two exchanges move every element twice: rows go to the rank that works on their matrix, results go back. Gathering
    every matrix on every rank, as ``torch.optim.Muon`` on DTensors does, moves s times as much and does s times the work.

    Args:
        function: ``[n, r, c]`` to ``[n, r, c]``, matrix by matrix; called once on each rank, also with n = 0.
        matrices: all ``[r, c]``, in the same dtype: DTensors on one mesh split by rows over its "shard" axis, or plain
            tensors that are equal on every rank.

    Returns:
        Results as the local parts of each matrix (a plain matrix is whole), in the order given.

    Raises:
        ValueError: if shapes, dtypes or placements differ.

    Example:
        >>> map_matrices(lambda stack: 2 * stack, [torch.ones(1, 2), torch.zeros(1, 2)])
        [tensor([[2., 2.]]), tensor([[0., 0.]])]
    """
    if not matrices:
        return []
    first = matrices[0]
    for matrix in matrices:
        if matrix.ndim != 2 or matrix.shape != first.shape or matrix.dtype != first.dtype:
            raise ValueError(
                f"matrices: expected {first.dtype} matrices {list(first.shape)}, got {matrix.dtype} {list(matrix.shape)}"
            )
    if not isinstance(first, DTensor):
        return list(function(torch.stack(list(matrices))))
    mesh = first.device_mesh["shard"]
    rank, size = mesh.get_local_rank(), mesh.size()
    parts = []
    for matrix in matrices:
        if not isinstance(matrix, DTensor) or matrix.device_mesh != first.device_mesh or not _by_rows(matrix):
            raise ValueError('matrices: expected DTensors of one mesh, split by rows over its "shard" axis')
        parts.append(matrix.to_local())
    rows, columns = first.shape
    # torch.chunk's rule, which fully_shard follows: equal parts, then a shorter one, then none.
    height = -(-rows // size)
    mine = len(range(rank, len(parts), size))
    padded = [torch.nn.functional.pad(part, (0, 0, 0, height - part.shape[0])) for part in parts]
    outgoing = [
        torch.stack(padded[to::size]) if padded[to::size] else first.to_local().new_zeros(0) for to in range(size)
    ]
    incoming = [outgoing[0].new_empty(mine, height, columns) for _ in range(size)]
    _exchange(incoming, outgoing, mesh.get_group())
    whole = torch.cat(incoming, dim=1)[:, :rows] if mine else first.to_local().new_empty(0, rows, columns)
    result = function(whole)
    result = torch.nn.functional.pad(result, (0, 0, 0, height * size - rows))
    back = [part.contiguous() for part in result.split(height, dim=1)]
    returned = [outgoing[0].new_empty(len(range(at, len(parts), size)), height, columns) for at in range(size)]
    _exchange(returned, back, mesh.get_group())
    return [returned[index % size][index // size, : part.shape[0]] for index, part in enumerate(parts)]


def _by_rows(matrix: DTensor) -> bool:
    placements = dict(zip(matrix.device_mesh.mesh_dim_names or (), matrix.placements, strict=True))
    return placements.get("shard") == Shard(0)


def _exchange(incoming: list[Tensor], outgoing: list[Tensor], group: dist.ProcessGroup) -> None:
    """Send ``outgoing[i]`` to rank i; ``incoming[i]`` comes from it."""
    flat = torch.cat([part.reshape(-1) for part in outgoing])
    sizes = [part.numel() for part in incoming]
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [part.numel() for part in outgoing], group=group)
    for part, values in zip(incoming, received.split(sizes), strict=True):
        part.copy_(values.view_as(part))
