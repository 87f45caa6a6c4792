"""A whole forward pass as one CUDA graph: for small pictures, whose kernels end before the host has launched the next."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["cuda_graph"]

WARM_UP = 3
"""Calls before the capture: kernels are chosen and compiled, and workspaces allocated."""


def cuda_graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Record a function of CUDA tensors at its first call and replay it afterwards.

    Args:
        function: of tensors, whose shapes, dtypes and device stay the same from call to call, without a
            synchronisation inside. Whatever else it reads must stay where it is.

    Returns:
        The replayed function; its result is a copy.

    Raises:
        ValueError: at the first call, if an argument is not a CUDA tensor; later, if a shape or dtype changed.

    Example:
        >>> cuda_graph(torch.neg)(torch.ones(1))
        Traceback (most recent call last):
        ValueError: cuda_graph: expected tensors on a CUDA device, got cpu
    """
    graph: Any = None
    inputs: list[Tensor] = []
    result: Tensor | None = None

    def replay(*arguments: Tensor) -> Tensor:
        nonlocal graph, inputs, result
        if graph is None:
            for argument in arguments:
                if argument.device.type != "cuda":
                    raise ValueError(f"cuda_graph: expected tensors on a CUDA device, got {argument.device}")
            inputs = [argument.clone() for argument in arguments]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = function(*inputs)
        found, wanted = [[(x.shape, x.dtype) for x in group] for group in (arguments, inputs)]
        if found != wanted:
            raise ValueError(f"cuda_graph: expected the shapes of the first call, {wanted}, got {found}")
        for mine, given in zip(inputs, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        assert result is not None
        return result.clone()

    return replay
