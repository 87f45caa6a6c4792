"""Initial values of the transformer's parameters, each a function of the seed and its name."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["initial_value"]

_ZERO = ("img_mod.1.weight", "txt_mod.1.weight", "norm_out.linear.weight", "proj_out.weight")


def initial_value(name: str, shape: Sequence[int], *, seed: int, gate: float = 0.0) -> Tensor:
    """The float32 CPU value with which training from scratch starts a parameter (adaLN-zero, arXiv 2212.09748).

    Args:
        name: the parameter's name in the state dict; it selects the rule and, with the seed, the random stream.
        shape: its full shape.
        seed: any integer.
        gate: bias of the blocks' gates.

    Returns:
        ``shape``: zeros for biases, modulations and the output layer (gates have the bias ``gate``), ones for norms, and
        ``U(-a, a)`` with ``a = sqrt(6 / (in + out))`` (Xavier) for the other matrices; the fused query, key and value
        matrix counts as three.

    Example:
        >>> initial_value("transformer_blocks.0.img_norm1.weight", [2], seed=0)
        tensor([1., 1.])
    """
    if name.endswith(("img_mod.1.bias", "txt_mod.1.bias")):
        vectors = torch.zeros(6, shape[0] // 6)
        vectors[[2, 5]] = gate
        return vectors.flatten()
    if name.endswith((".bias", *_ZERO)):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.ones(*shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    outputs = shape[0] // 3 if name.endswith("qkv.weight") else shape[0]
    bound = math.sqrt(6 / (shape[1] + outputs))
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
