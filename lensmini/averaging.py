"""Move one set of parameters towards another: EMA, NFT's old policy and IDA are this one operation.

No axes: parameters have any shape.

The average of a sharded model is a list of DTensors that goes through here like any other.
"""

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["lerp_parameters_"]

Parameters = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


@torch.no_grad()
def lerp_parameters_(target: Parameters, source: Parameters, weight: float) -> None:
    """Move ``target`` towards ``source`` in place: ``target += weight * (source - target)``.

    An exponential moving average of decay d is ``weight = 1 - d``, and so is DiffusionNFT's old policy
    (arXiv 2509.16117 section 3); SenseFlow's implicit distribution alignment (arXiv 2506.00523) moves the fake
    score's network towards the student with a small weight (0.03 in Lens). Of a module only the parameters take
    part; pass buffers explicitly if they should. Optimiser state is never touched.

    Keep averages in float32: in bfloat16 a weight below 1/256 changes next to nothing.

    Args:
        target: a module, a mapping from names to tensors, or tensors; changed in place.
        source: the same parameters in any floating dtype and on any device. If both have names, they are matched
            by name, else by order.
        weight: in [0, 1]; 0 leaves ``target`` as it is and 1 copies ``source``, both bit for bit.

    Raises:
        ValueError: if ``weight`` leaves [0, 1], or names, number, shapes or kinds of the tensors disagree; then
            nothing has been changed.

    Example:
        >>> average = {"weight": torch.zeros(2)}
        >>> lerp_parameters_(average, {"weight": torch.tensor([1.0, 2.0])}, 0.25)
        >>> average["weight"]
        tensor([0.2500, 0.5000])
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: expected a number in [0, 1], got {weight}")
    targets, sources = _align(target, source)
    if weight == 0 or not targets:
        return
    if weight == 1:
        for old, new in zip(targets, sources, strict=True):  # DTensors have no copy of lists
            old.copy_(new)
        return
    aligned = [new.to(device=old.device, dtype=old.dtype) for old, new in zip(targets, sources, strict=True)]
    torch._foreach_lerp_(targets, aligned, weight)  # pyright: ignore[reportPrivateImportUsage]


def _align(target: Parameters, source: Parameters) -> tuple[list[Tensor], list[Tensor]]:
    old, new = _named(target), _named(source)
    if all(isinstance(parameters, nn.Module | Mapping) for parameters in (target, source)):
        missing, unexpected = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
        if missing or unexpected:
            raise ValueError(f"source: expected the names of target, lacks {missing} and has besides {unexpected}")
        pairs = [(name, tensor, new[name]) for name, tensor in old.items()]
    elif len(old) != len(new):
        raise ValueError(f"source: expected {len(old)} tensors as in target, got {len(new)}")
    else:
        names = new if isinstance(source, nn.Module | Mapping) else old
        pairs = [*zip(names, old.values(), new.values(), strict=True)]
    wrong = [f"{name}: {list(a.shape)} against {list(b.shape)}" for name, a, b in pairs if a.shape != b.shape]
    if wrong:
        raise ValueError(f"source: expected the shapes of target, got {'; '.join(wrong)}")
    kinds = [name for name, a, b in pairs if not (a.is_floating_point() and b.is_floating_point())]
    if kinds:
        raise ValueError(f"target and source: expected floating point tensors, got others at {kinds}")
    return [a for _, a, _ in pairs], [b for _, _, b in pairs]


def _named(parameters: Parameters) -> dict[str, Tensor]:
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    if isinstance(parameters, Mapping):
        return dict(cast(Mapping[str, Tensor], parameters))
    return {f"[{index}]": tensor for index, tensor in enumerate(parameters)}
