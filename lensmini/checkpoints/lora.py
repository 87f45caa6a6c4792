"""LoRA adapters added to the weights of a transformer and taken off again bit for bit.

Axes: r rank, i and o input and output width of a linear layer.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lensmini.checkpoints.lora_files import LoRA, LoRALayer, load_lora, save_lora

__all__ = ["LoRA", "LoRALayer", "MergedLoRA", "apply_lora", "load_lora", "merge_lora", "save_lora", "unmerge_lora"]

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, eq=False)
class MergedLoRA:
    """What :func:`unmerge_lora` needs to take a merged adapter off; the model itself holds nothing.

    Example:
        >>> model = nn.ModuleDict({"img_in": nn.Linear(16, 32)})
        >>> merged = merge_lora(model, LoRA({"img_in": (torch.ones(2, 16), torch.ones(32, 2), 2.0)}))
        >>> merged.originals["img_in"].shape
        torch.Size([32, 16])
    """

    originals: dict[str, Tensor]
    """For each layer the weight ``[o, i]`` before merging, on the CPU."""
    checksums: dict[str, int]
    """For each layer a checksum of the bits that merging left."""


@torch.no_grad()
def merge_lora(model: nn.Module, lora: LoRA, *, scale: float = 1.0, keep: bool = True) -> MergedLoRA:
    """Add an adapter to the weights in place: ``W + scale * alpha / r * B A`` (arXiv 2106.09685, section 4.1).

    The sum is taken in float32 (float64 for float64 weights) and rounded once to the weight's dtype. Everything is
    checked before the first weight changes, and an error on the way restores what had changed if ``keep``. Adapters
    stack: each is added to the weights that it finds. Layers that two adapters share come off in reverse order, last
    on first off.

    Args:
        model: a :class:`LensTransformer`, or any module with linear layers of the adapter's names.
        lora: the adapter.
        scale: strength; 0 changes nothing, negative subtracts.
        keep: False keeps no second copy of the touched weights, and the adapter cannot be taken off.

    Returns:
        The record that :func:`unmerge_lora` takes: the touched weights on the CPU, or nothing without ``keep``.

    Raises:
        ValueError: if ``scale`` is not finite, or naming every layer of the adapter that the model does not have, that
            has another shape, whose weight is not floating point or has no data, or whose sum its dtype cannot hold.

    Example:
        >>> model = nn.ModuleDict({"img_in": nn.Linear(16, 32)}).requires_grad_(False)
        >>> before = model["img_in"].weight.clone()
        >>> merged = merge_lora(model, LoRA({"img_in": (torch.ones(2, 16), torch.ones(32, 2), 2.0)}), scale=0.5)
        >>> round((model["img_in"].weight - before).mean().item(), 4)
        1.0
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    modules, weights, problems = dict(model.named_modules()), {}, []
    for path, layer in lora.layers.items():
        weight, shape = getattr(modules.get(path), "weight", None), [len(layer.up), layer.down.shape[1]]
        if not isinstance(weight, Tensor):
            problems.append(f"{path} is not in the model")
        elif list(weight.shape) != shape:
            problems.append(f"{path} has a weight of shape {list(weight.shape)}, the adapter is for {shape}")
        elif weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or weight.is_meta:
            problems.append(f"{path} has a weight without floating-point data ({weight.dtype} on {weight.device})")
        else:
            weights[path] = weight
    problems = problems or [
        f"{path} would hold infinite numbers or NaN in {weight.dtype}"
        for path, weight in weights.items()
        if not bool(_sum(weight, lora, path, scale).isfinite().all())
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"lora: expected an adapter that fits the model, but {'; '.join(problems[:8])}{more}")
    merged = MergedLoRA({}, {})
    try:
        for path, weight in weights.items():
            total = _sum(weight, lora, path, scale)
            if keep:
                merged.originals[path] = weight.detach().cpu().clone()
            weight.copy_(total)
            if keep:
                merged.checksums[path] = _checksum(weight)
    except BaseException:
        for path, original in merged.originals.items():
            weights[path].copy_(original)
        raise
    return merged


@torch.no_grad()
def unmerge_lora(model: nn.Module, merged: MergedLoRA) -> None:
    """Take a merged adapter off: every weight gets back the bits it had before, on whatever device it now is.

    Args:
        model: the module that was merged into.
        merged: what :func:`merge_lora` returned.

    Raises:
        ValueError: if a layer is gone, changed its dtype, or its weight is not the one that merging left: another
            adapter was merged on top and must come off first, this one is already off, or training went on. Also
            if it was merged without ``keep``.

    Example:
        >>> model = nn.ModuleDict({"img_in": nn.Linear(16, 32)})
        >>> before = model["img_in"].weight.clone()
        >>> unmerge_lora(model, merge_lora(model, LoRA({"img_in": (torch.ones(2, 16), torch.ones(32, 2), 2.0)})))
        >>> torch.equal(model["img_in"].weight, before)
        True
    """
    if not merged.originals:
        raise ValueError("merged: expected a merge that kept the weights of before, got one with keep=False")
    modules, weights, problems = dict(model.named_modules()), {}, []
    for path, original in merged.originals.items():
        weight = getattr(modules.get(path), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != original.shape or weight.dtype != original.dtype:
            problems.append(f"{path} is gone or has another shape or dtype")
        elif _checksum(weight) != merged.checksums[path]:
            problems.append(f"{path} has changed since")
        weights[path] = weight
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"merged: expected the weights that merging left (adapters come off in reverse order, each once), but "
            f"{'; '.join(problems[:8])}{more}"
        )
    for path, original in merged.originals.items():
        weights[path].copy_(original)


@contextmanager
def apply_lora(model: nn.Module, lora: LoRA, *, scale: float = 1.0) -> Iterator[MergedLoRA]:
    """Merge an adapter for the length of a ``with`` block, and take it off behind it, after an error too.

    Args:
        model: as :func:`merge_lora`.
        lora: the adapter.
        scale: strength.

    Yields:
        The record of the merge.

    Raises:
        ValueError: as :func:`merge_lora` and :func:`unmerge_lora`.

    Example:
        >>> model = nn.ModuleDict({"img_in": nn.Linear(16, 32)})
        >>> with apply_lora(model, LoRA({"img_in": (torch.ones(2, 16), torch.ones(32, 2), 2.0)})):
        ...     during = model["img_in"].weight.clone()
        >>> round((during - model["img_in"].weight).mean().item(), 4)
        2.0
    """
    merged = merge_lora(model, lora, scale=scale)
    try:
        yield merged
    finally:
        unmerge_lora(model, merged)


def _sum(weight: Tensor, lora: LoRA, path: str, scale: float) -> Tensor:
    """The merged weight ``[o, i]``, added in float32 or wider and rounded to the weight's dtype."""
    wide, layer = torch.promote_types(weight.dtype, torch.float32), lora.layers[path]
    delta = layer.up.to(weight.device, wide) @ layer.down.to(weight.device, wide)
    return (weight.to(wide) + scale * lora.scaling(path) * delta).to(weight.dtype)


def _checksum(weight: Tensor) -> int:
    """Of the bits of ``[o, i]``, so that it holds on any device; both places and values count."""
    bits = weight.detach().contiguous().view(BITS[weight.element_size()])
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    places = torch.arange(1, max(bits.shape) + 1, device=bits.device)
    return int((rows * places[: len(rows)]).sum()) * 31 + int((columns * places[: len(columns)]).sum())
